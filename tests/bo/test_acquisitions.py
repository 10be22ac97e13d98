from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from bo import Minimize, WeightedSum, dataset, ports
from bo.acquisition import (
    joint_ei,
    knowledge_gradient,
    max_value_entropy,
    noisy_ei,
    thompson,
    upper_confidence_bound,
)
from bo.acquisition.acquisition import ACQUISITIONS, Acquisition, Situation
from bo.acquisition.log_ei import log_ei
from bo.acquisition.samples import candidates, joint, known, normals, promising
from bo.ports import History
from bo.surrogates import composite
from bo.trial import Trial
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Space

PLANE = Space(x=Real(0, 1), y=Real(0, 1))
RICH = Space(
    lr=Real(1e-4, 1e-2, log=True),
    layers=Integer(1, 8),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
    data=Mixture("code", "docs", "prose", floor={"docs": 0.1}, cap={"code": 0.6}),
    constraints=["layers * lr <= 0.04"],
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6,), target={"params": 1e6, "tokens": 1e6}),
)
MAKERS: dict[str, Callable[..., Acquisition]] = {
    **{name: ports.load(ACQUISITIONS, name, "acquisition") for name in ACQUISITIONS},
    "entropy without noise": lambda situation: max_value_entropy.make(situation, noisy=False),
}
#: Of those that climb inside, the slope holds what was climbed to: it is not that of differences.
CLIMBING = ("knowledge_gradient", "knowledge_gradient_one_shot")


def situation(space: Space, n: int, r: int = 0, noise: float = 0.05, several: bool = False, seed: int = 0) -> Situation:
    """n runs at the top scale (of two metrics, some at another scale too, where `several`), r more under way."""
    rng = np.random.default_rng(seed)
    objective = WeightedSum({"a": 2.0, "b": 1.0}) if several else Minimize("loss")
    trials, scales = [], [space.top] if not several else list(space.fidelity.cells())
    for i, config in enumerate(space.sample(rng, n)):
        x = space.encode(config)
        loss = 2 + float((x[0] - 0.4) ** 2 + 0.3 * np.sin(5 * x[1]) + noise * rng.standard_normal())
        metrics = {"a": loss, "b": 3 + float(x[0])} if several else {"loss": loss}
        trials.append(Trial(i, config, scales[i % len(scales)], 0, "sobol", status="finished", metrics=metrics))
    data = dataset.from_history(History(space, objective, tuple(trials)))
    belief = composite.fit(data).at(space.top)
    pending = torch.as_tensor(space.encode_all(space.sample(rng, r))).reshape(r, len(space.columns))
    return Situation(space, belief, belief.believe(pending), data.X[data.at(space.top)], pending, n, 1.0, rng)


def points(space: Space, n: int, seed: int = 1) -> Tensor:
    return torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(seed), n)))


def slopes(acquisition: Acquisition, X: Tensor) -> Tensor:
    at = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(acquisition(at).sum(), at)
    return gradient


def differences(acquisition: Acquisition, X: Tensor, step: float = 1e-5) -> Tensor:
    columns = []
    with torch.no_grad():
        for i in range(X.shape[1]):
            e = torch.zeros(X.shape[1], dtype=torch.float64)
            e[i] = step
            columns.append((acquisition(X + e) - acquisition(X - e)) / (2 * step))
    return torch.stack(columns, dim=-1)


# -------------------------------------------------------------------------------------------------- every criterion


@pytest.mark.parametrize("several", [False, True], ids=["one metric", "two metrics and scales"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_criterion_is_finite_with_finite_slopes_in_a_rich_space(
    make: Callable[..., Acquisition], several: bool
) -> None:
    here = situation(RICH, 12, 2, several=several)
    acquisition, X = make(here), torch.cat([points(RICH, 6), known(here)])
    with torch.no_grad():
        values = acquisition(X)
    assert values.shape == (len(X),)
    assert torch.isfinite(values).all()
    assert torch.isfinite(slopes(acquisition, X)).all()
    assert float(values.std()) > 0


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in CLIMBING])
def test_slopes_agree_with_differences(name: str) -> None:
    acquisition, X = MAKERS[name](situation(PLANE, 10, 2)), points(PLANE, 24)
    if "gradient" in name:  # where the gain is 1e-9 or less, differences of covariances are rounding
        X = X[acquisition(X) > -20]
    assert len(X) > 10
    assert torch.allclose(slopes(acquisition, X), differences(acquisition, X), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_with_nothing_tried_at_the_scale_every_criterion_still_says_something_finite(
    make: Callable[..., Acquisition],
) -> None:
    here = situation(PLANE, 6)
    bare = replace(here, tried=here.tried[:0])
    X = points(PLANE, 5)
    assert torch.isfinite(make(bare)(X)).all()
    if make in (noisy_ei.make_evaluated, noisy_ei.make_integrated, joint_ei.make):
        assert torch.allclose(make(bare)(X), here.belief.value(X)[0])
    pending = points(PLANE, 2, 5)
    assert torch.isfinite(make(replace(bare, pending=pending, believed=here.belief.believe(pending)))(X)).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_same_situation_and_seed_give_the_same_criterion(make: Callable[..., Acquisition]) -> None:
    here, X = situation(PLANE, 8, 1), points(PLANE, 4)
    first, second = (make(replace(here, rng=np.random.default_rng(7)))(X) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (noisy_ei.make_evaluated, {"most": 0}),
        (noisy_ei.make_integrated, {"samples": 2.5}),
        (joint_ei.make, {"samples": True}),
        (upper_confidence_bound.make, {"beta": -1.0}),
        (upper_confidence_bound.make, {"beta": math.nan}),
        (thompson.make, {"points": 1}),
        (max_value_entropy.make, {"noisy": 1}),
        (knowledge_gradient.make, {"steps": -1}),
        (knowledge_gradient.make_discrete, {"draws": "many"}),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[..., Acquisition], wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"needs {name} to be"):
        make(situation(PLANE, 4), **wrong)


@pytest.mark.parametrize(
    "name", ["noisy_ei_evaluated", "noisy_ei", "joint_ei", "knowledge_gradient_discrete", "knowledge_gradient"]
)
def test_a_run_under_way_takes_the_worth_of_running_it_again(name: str) -> None:
    here, make = situation(PLANE, 10, noise=0.01), MAKERS[name]
    alone = make(here)
    grid = points(PLANE, 300)
    with torch.no_grad():
        best = grid[alone(grid).argmax()][None]
        busy = replace(here, pending=best, believed=here.belief.believe(best))
        assert float(make(busy)(best)) < float(alone(best)) - 1


# ------------------------------------------------------------------------------------------- expected improvement


def test_analytic_improvement_equals_its_monte_carlo_mean() -> None:
    here, X = situation(PLANE, 8), points(PLANE, 40)
    mean, sd = here.belief.value(X)
    best = here.belief.value(here.tried)[0].max()
    often = log_ei(mean, sd, best) > -8  # often enough above it for a mean to be normal
    mean, sd = mean[often], sd[often]
    assert len(mean) > 5
    normal = torch.as_tensor(np.random.default_rng(0).standard_normal((200_000, len(mean))))
    draws = (mean + sd * normal - best).clamp_min(0)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - log_ei(mean, sd, best).exp()).abs() <= 3 * error + 1e-12).all()


def test_noisy_improvement_over_evaluated_points_equals_quadrature() -> None:
    here, X = situation(PLANE, 7, noise=0.1), points(PLANE, 6)
    belief, tried = here.belief, here.tried
    values = noisy_ei.make_evaluated(here)(X)
    mean = belief.value(tried)[0]
    for x, value in zip(X, values, strict=True):
        at, sd = belief.value(x[None])
        total = (sd.square() + belief.noise).sqrt()
        a = torch.cat([mean, at]).numpy()
        b = torch.cat([belief.covariance(x[None], tried)[0], sd.square()]).numpy() / float(total)
        z = np.linspace(-9, 9, 400_001)
        highest = (a[:, None] + b[:, None] * z).max(0) - float(mean.max())
        assert math.exp(float(value)) == pytest.approx(np.trapezoid(highest * norm.pdf(z), z), rel=1e-6, abs=1e-10)


def test_integrated_improvement_equals_joint_sampling() -> None:
    here, X = situation(PLANE, 6, 2, noise=0.1), points(PLANE, 5)
    B = known(here)
    values = noisy_ei.make_integrated(here, samples=4096)(X)
    for x, value in zip(X, values, strict=True):
        mean, root = joint(here.belief, torch.cat([B, x[None]]))
        draws = mean + torch.as_tensor(np.random.default_rng(1).standard_normal((100_000, len(mean)))) @ root.T
        better = (draws[:, -1] - draws[:, :-1].max(-1).values).clamp_min(0)
        error = float(better.std()) / math.sqrt(len(better))
        assert abs(float(value.exp()) - float(better.mean())) <= 3 * error + 0.01 * float(value.exp())


def test_without_runs_under_way_the_joint_improvement_is_the_analytic_one() -> None:
    here, X = situation(PLANE, 8), points(PLANE, 9)
    best = here.belief.value(here.tried)[0].max()
    assert torch.equal(joint_ei.make(here)(X), log_ei(*here.belief.value(X), best))


def test_the_joint_improvement_is_what_a_point_adds_to_the_batch() -> None:
    here, X = situation(PLANE, 8, 3, noise=0.1), points(PLANE, 4)
    values = joint_ei.make(here, samples=4096)(X)
    best = here.belief.value(here.tried)[0].max()
    for x, value in zip(X, values, strict=True):
        mean, root = joint(here.belief, torch.cat([here.pending, x[None]]))
        draws = mean + torch.as_tensor(np.random.default_rng(2).standard_normal((200_000, 4))) @ root.T - best
        added = draws.max(-1).values.clamp_min(0) - draws[:, :-1].max(-1).values.clamp_min(0)
        error = float(added.std()) / math.sqrt(len(added))
        assert abs(float(value.exp()) - float(added.mean())) <= 3 * error + 0.01 * float(value.exp())


def test_runs_under_way_that_are_too_many_to_integrate_are_believed() -> None:
    here = situation(PLANE, 8, 30)
    few = joint_ei.make(here, most=5)
    with torch.no_grad():
        X = points(PLANE, 200)
        assert torch.isfinite(few(here.pending)).all()
        assert float(few(X).max()) > float(few(here.pending).max())


def test_points_that_cannot_be_best_are_left_out_and_the_best_stays() -> None:
    here = situation(PLANE, 40, noise=0.001)
    keep = promising(here.belief, here.tried, 10)
    mean = here.belief.value(here.tried)[0]
    assert 1 <= int(keep.sum()) <= 10
    assert bool(keep[mean.argmax()])
    every = noisy_ei.make_evaluated(here, most=40)
    X = points(PLANE, 20)
    a, b = knowledge_gradient.lines(here.belief, X, here.tried, mean)
    assert torch.allclose(every(X).exp(), knowledge_gradient.log_gain(a, b, mean.max()).exp(), rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------------------------------ bound and samples


def test_a_bound_without_deviations_is_the_posterior_mean_and_pending_runs_lower_it() -> None:
    here = situation(PLANE, 8, 2)
    X = points(PLANE, 5)
    assert torch.allclose(upper_confidence_bound.make(here, beta=0)(X), here.believed.value(X)[0])
    alone = replace(here, pending=here.pending[:0], believed=here.belief)
    busy, free = (upper_confidence_bound.make(each)(here.pending) for each in (here, alone))
    assert (busy < free).all()


def test_sample_paths_have_the_mean_and_deviation_of_the_posterior_where_they_are_drawn() -> None:
    here = situation(PLANE, 6)
    Z = candidates(here, 16)
    paths = torch.stack([thompson.path(here.belief, Z, row)(Z) for row in normals(here.rng, 256, len(Z))])
    mean, sd = here.belief.value(Z)
    assert torch.allclose(paths.mean(0), mean, atol=0.1 * float(sd.max()))
    assert torch.allclose(paths.std(0), sd, rtol=0.1, atol=0.05 * float(sd.max()))


def test_candidates_are_allowed_points_here_and_around_the_leaders() -> None:
    here = situation(RICH, 12)
    X = candidates(here, 100)
    assert len(X) > 50
    assert RICH.satisfies(RICH.decode_all(X.numpy())).all()
    leader = here.tried[here.belief.value(here.tried)[0].argmax()]
    assert (X - leader).abs().max(-1).values.min() < 1e-6


# --------------------------------------------------------------------------------------------------------- entropy


@pytest.mark.parametrize("gamma", [-8.0, -2.0, 0.0, 0.7, 3.0, 5.9, 6.1])
def test_the_information_of_a_value_about_the_maximum_is_the_entropy_it_loses(gamma: float) -> None:
    # The entropy of a standard normal less that of one cut off at gamma.
    log_mass = norm.logcdf(gamma)

    def integrand(u: float) -> float:
        log_density = norm.logpdf(u) - log_mass
        return -math.exp(log_density) * log_density

    cut = quad(integrand, min(-12.0, gamma - 12), gamma, epsabs=1e-14, epsrel=1e-12, limit=400)[0]
    exact = 0.5 * math.log(2 * math.pi * math.e) - cut
    found = math.exp(float(max_value_entropy.log_information(torch.tensor(gamma, dtype=torch.float64))))
    assert found == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("gamma", [-2.0, 0.0, 1.5])
def test_what_a_noisy_run_tells_is_bounded_from_below_and_by_what_a_run_without_noise_tells(
    gamma: float, share: float
) -> None:
    # u = y standardised; given f <= f* its density is phi(u) Phi((gamma - r u) / sqrt(1 - r^2)) / Phi(gamma).
    r = math.sqrt(share)

    def integrand(u: float) -> float:
        log_density = norm.logpdf(u) + norm.logcdf((gamma - r * u) / math.sqrt(1 - share)) - norm.logcdf(gamma)
        return -math.exp(log_density) * log_density

    exact = 0.5 * math.log(2 * math.pi * math.e) - quad(integrand, -12, 12, limit=400)[0]
    at = torch.tensor(gamma, dtype=torch.float64)
    bound = math.exp(float(max_value_entropy.log_bound(at, torch.tensor(share, dtype=torch.float64))))
    assert 0 < bound <= exact * (1 + 1e-6) + 1e-9
    assert bound >= 0.6 * exact
    assert bound <= math.exp(float(max_value_entropy.log_information(at)))


@pytest.mark.parametrize("gamma", [-1e5, -50.0, -3.0, 0.0, 5.99, 6.01, 40.0, 1e3, 1e6])
def test_the_logarithm_of_information_has_a_slope_in_far_tails(gamma: float) -> None:
    share = torch.tensor(0.7, dtype=torch.float64)
    for log in (max_value_entropy.log_information, lambda g: max_value_entropy.log_bound(g, share)):
        at = torch.tensor(gamma, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(log(at), at)
        step = 1e-5 * max(1.0, abs(gamma))
        ends = [log(torch.tensor(gamma + s, dtype=torch.float64)) for s in (-step, step)]
        assert float(slope) == pytest.approx(float(ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-5)
        assert torch.isfinite(slope)
