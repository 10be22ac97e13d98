from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import Minimize, dataset
from bo.ports import History
from bo.quasirandom import normal_points, sobol_points
from bo.surrogates import divergence
from bo.surrogates.divergence import MOST, Divergence, Layout, Sites, caution, coordinates, given, log_evidence
from bo.surrogates.features import Features, Inputs
from bo.trial import Trial
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space

LINE = Space(x=Real(0, 1))
PLANE = Space(lr=Real(1e-5, 1.0, log=True), y=Real(0, 1))
MANY = Space(**{f"x{i}": Real(0, 1) for i in range(6)})
RICH = Space(
    lr=Real(1e-4, 1e-1, log=True),
    layers=Integer(1, 8),
    schedule=Schedule("cosine", "linear", warmup=Real(0.0, 0.1), floor=0.0),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {}}),
    data=Mixture("code", "docs", "prose"),
    fidelity=Fidelity(params=(1e5, 1e6, 1e7), tokens=(1e6, 1e7), target={"params": 1e7, "tokens": 1e7}),
)
SCALED = Space(
    lr=Real(2.0**-12, 1.0, log=True),
    fidelity=Fidelity(params=(1e5, 4e5, 1.6e6, 6.4e6), tokens=(1e6,), target={"params": 6.4e6, "tokens": 1e6}),
)


def inputs(space: Space, X: Tensor) -> Inputs:
    """Points at one scale."""
    S = torch.zeros(len(X), len(space.fidelity.axes) if space.fidelity else 0, dtype=torch.float64)
    return Features(space)(X, S, torch.zeros(len(X), dtype=torch.long))


def fitted(space: Space, X: Tensor, diverged: Tensor) -> Divergence:
    model = divergence.fit(Features(space), inputs(space, X), diverged)
    assert model is not None
    return model


def ok(model: Divergence, space: Space, X: Tensor) -> Tensor:
    return model.log_ok(inputs(space, X)).exp()


def along(values: Tensor) -> Tensor:
    """Points of PLANE with these first coordinates."""
    return torch.stack([values, torch.full_like(values, 0.5)], dim=-1)


def sobol(d: int, n: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(sobol_points(d, n, seed))


# ---------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("amplitude", [1.0, 30.0])
def test_probabilities_and_evidence_are_those_of_the_integral(amplitude: float) -> None:
    """Three labels, one of the other kind; the integral over the latent function by quasi-random draws."""
    layout = Layout((0,))
    theta = torch.tensor([-0.7, np.log(amplitude), -1.0, 0.5], dtype=torch.float64)
    Z = torch.tensor([[0.1], [0.4], [0.7]], dtype=torch.float64)
    sign, at = np.array([-1.0, -1.0, 1.0]), torch.tensor([[0.0], [0.55], [0.9]], dtype=torch.float64)
    model = given(layout, theta, Z, sign)
    everything = torch.cat([Z, at])
    K, level = layout.kernel(everything, everything, theta), layout.latent(theta)[-1]
    f = level + normal_points(6, 2**18, seed=1) @ torch.linalg.cholesky(K + 1e-9 * torch.eye(6)).T
    weight = torch.special.ndtr(torch.tensor(sign) * f[:, :3]).prod(-1)
    exact = (weight[:, None] * torch.special.ndtr(-f[:, 3:])).sum(0) / weight.sum()
    found = ok(model, LINE, at)
    assert found.tolist() == pytest.approx(exact.tolist(), abs=0.02)
    start = Sites(np.full(3, 1e-3), np.zeros(3), 0.0)
    sites = divergence.propagate(K[:3, :3].numpy(), float(level), sign, start)
    assert float(log_evidence(K[:3, :3], level, sites)) == pytest.approx(float(weight.mean().log()), abs=0.02)


def test_the_gradient_of_the_evidence_is_that_at_fixed_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CONVERGED", 1e-10)
    monkeypatch.setattr(divergence, "SWEEPS", 500)
    layout = Layout((0, 1))
    Z = sobol(2, 12)
    sign = np.where(Z[:, 0] > 0.6, 1.0, -1.0)
    at = torch.tensor([-0.5, 0.2, np.log(50.0), -0.4, 1.2], dtype=torch.float64)

    def evidence(theta: Tensor) -> Tensor:
        K, level = layout.kernel(Z, Z, theta), layout.latent(theta)[-1]
        begin = Sites(np.full(12, 1e-3), np.zeros(12), 0.0)
        return log_evidence(K, level, divergence.propagate(K.detach().numpy(), level.item(), sign, begin))

    theta = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(evidence(theta), theta)
    for i in range(len(at)):
        step = torch.zeros_like(at)
        step[i] = 1e-4
        difference = float(evidence(at + step) - evidence(at - step)) / 2e-4
        assert float(gradient[i]) == pytest.approx(difference, abs=1e-5)


def test_it_is_differentiable_and_finite_everywhere() -> None:
    X = torch.rand(40, len(RICH.columns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = fitted(RICH, X, X[:, 0] > 0.7)
    at = torch.cat([X[:5], torch.zeros(1, X.shape[-1]), torch.ones(1, X.shape[-1])]).to(torch.float64)
    held = inputs(RICH, at)
    F = held.F.clone().requires_grad_()
    value = model.log_ok(replace(held, F=F))
    assert torch.isfinite(value).all()
    assert (value <= 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), F)
    assert torch.isfinite(gradient).all()
    for i in (0, 1, len(F[0]) - 1):
        step = torch.zeros_like(F)
        step[:, i] = 1e-6
        up, down = (model.log_ok(replace(held, F=(F + sign * step).detach())) for sign in (1, -1))
        assert gradient[:5, i].tolist() == pytest.approx(((up - down) / 2e-6)[:5].tolist(), rel=1e-3, abs=1e-4)
    assert torch.isfinite(model.log_ok(replace(held, F=1e3 * torch.ones_like(F)))).all()


# --------------------------------------------------------------------------------------------------- what it believes


@pytest.mark.parametrize("diverged", [False, True])
def test_runs_of_one_kind_teach_nothing(diverged: bool) -> None:
    X = sobol(2, 5)
    assert divergence.fit(Features(PLANE), inputs(PLANE, X), torch.full((5,), diverged)) is None


def test_one_diverged_run_warns_of_what_lies_beyond_it_and_around_it() -> None:
    X = torch.tensor([[0.3, 0.5], [0.2, 0.1], [0.8, 0.6]], dtype=torch.float64)
    model = fitted(PLANE, X, torch.tensor([False, False, True]))
    p = ok(model, PLANE, along(torch.tensor([0.0, 0.2, 0.8, 1.0], dtype=torch.float64)))
    assert p[:2].min() > 0.9
    assert p[2:].max() < 0.25


def test_the_edge_is_about_anywhere_between_the_last_good_and_the_first_diverged_run() -> None:
    """A step of a share t of the gap stays good with probability 1 - t: what `caution` counts on."""
    X = torch.cat([sobol(2, 12) * torch.tensor([0.4, 1.0]), along(torch.tensor([0.42, 0.5, 0.8]).double())])
    model = fitted(PLANE, X, X[:, 0] >= 0.5)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert ok(model, PLANE, along(0.42 + 0.08 * t)).tolist() == pytest.approx((1 - t).tolist(), abs=0.2)


def test_an_edge_is_found_in_the_one_coordinate_that_has_it() -> None:
    X = sobol(6, 50)
    model = fitted(MANY, X, X[:, 2] > 0.7)
    at = sobol(6, 400, seed=5)
    wrong = (ok(model, MANY, at) < 0.5) != (at[:, 2] > 0.7)
    assert wrong.double().mean() < 0.06
    assert model.theta[:6].argmin() == 2


def test_a_region_walled_in_by_good_runs_is_learned() -> None:
    X = sobol(2, 60)
    inside = ((X - 0.5).square().sum(-1)) < 0.05
    model = fitted(PLANE, X, inside)
    p = ok(model, PLANE, torch.tensor([[0.5, 0.5], [0.05, 0.5], [0.95, 0.5], [0.5, 0.02], [0.9, 0.9]]).double())
    assert p[0] < 0.1
    assert p[1:].min() > 0.85


def test_runs_that_diverge_at_random_make_no_cliff() -> None:
    X = sobol(2, 80)
    bad = torch.rand(80, generator=torch.Generator().manual_seed(4)) < 0.1
    p = ok(fitted(PLANE, X, bad), PLANE, sobol(2, 200, seed=8))
    assert p.mean() == pytest.approx(0.9, abs=0.1)
    assert (p > 0.6).double().mean() > 0.9


def test_an_edge_that_moves_with_scale_is_foretold_at_the_next_one() -> None:
    """It falls by half an octave an octave of parameters; nothing was run at the target."""
    features, generator = Features(SCALED), np.random.default_rng(0)
    offset = np.repeat([-6.0, -4.0, -2.0], 12)  # octaves of parameters below the target
    x = generator.random(36)
    S = torch.zeros(36, 2, dtype=torch.float64)
    S[:, 0] = torch.tensor(offset)
    cell = torch.tensor(np.repeat([0, 1, 2], 12))
    edge = 0.5 - 0.5 * offset / 12
    points = features(torch.tensor(x)[:, None], S, cell)
    model = divergence.fit(features, points, torch.tensor(x > edge))
    assert model is not None
    p = ok(model, SCALED, torch.tensor([[0.3], [0.4], [0.65], [0.75]], dtype=torch.float64))
    assert p[:2].min() > 0.6
    assert p[2:].max() < 0.35


def test_what_failed_without_diverging_is_not_learned_from() -> None:
    told = [{"loss": 1.0}, {"loss": 2.0}, None]
    status = ["finished", "finished", "diverged"]
    configs = PLANE.sample(np.random.default_rng(0), 5)
    trials = [
        Trial(i, configs[i], PLANE.top, i, "bayes", 1.0, status=s, metrics=m)  # type: ignore[arg-type]
        for i, (s, m) in enumerate(zip(status, told, strict=True))
    ]
    lost = [Trial(i, configs[i], PLANE.top, i, "bayes", 1.0, status="failed", error="node lost") for i in (3, 4)]
    at = sobol(2, 20)
    values = []
    for history in (
        History(PLANE, Minimize("loss"), tuple(trials)),
        History(PLANE, Minimize("loss"), (*trials, *lost)),
    ):
        data = dataset.from_history(history)
        values.append(ok(fitted(PLANE, data.X, data.diverged), PLANE, at))
    assert torch.equal(values[0], values[1])


# ------------------------------------------------------------------------------------------------------- how it is kept


def test_the_memory_is_json_and_a_fit_goes_on_from_it() -> None:
    X = sobol(2, 30)
    model = fitted(PLANE, X, X[:, 0] > 0.6)
    memory = json.loads(json.dumps(model.memory()))
    again = divergence.fit(Features(PLANE), inputs(PLANE, X), X[:, 0] > 0.6, memory)
    assert again is not None
    at = sobol(2, 50, seed=3)
    assert ok(again, PLANE, at).tolist() == pytest.approx(ok(model, PLANE, at).tolist(), abs=0.03)
    for other in ({"raw": [1.0]}, {"raw": [float("nan")] * 5}, {}):
        strange = divergence.fit(Features(PLANE), inputs(PLANE, X), X[:, 0] > 0.6, other)
        assert strange is not None
        assert torch.equal(strange.theta, model.theta)


def test_of_many_runs_those_next_to_the_edge_are_used() -> None:
    X = sobol(2, 2000)
    bad = X[:, 0] > 0.6 + 0.1 * (X[:, 1] - 0.5)
    model = fitted(PLANE, X, bad)
    assert len(model.Z) == MOST
    at = sobol(2, 1000, seed=2)
    wrong = (ok(model, PLANE, at) < 0.5) != (at[:, 0] > 0.6 + 0.1 * (at[:, 1] - 0.5))
    assert wrong.double().mean() < 0.01
    few = torch.zeros(2000, dtype=torch.bool)
    few[:3] = True
    kept = divergence.telling(coordinates(inputs(PLANE, X)), few)
    assert set(range(3)) <= set(kept.tolist())
    assert len(kept) == MOST


def test_the_same_run_told_many_times_is_learned_from() -> None:
    X = along(torch.tensor([0.3] * 30 + [0.7] * 30, dtype=torch.float64))
    p = ok(fitted(PLANE, X, X[:, 0] > 0.5), PLANE, along(torch.tensor([0.3, 0.7], dtype=torch.float64)))
    assert p[0] > 0.9
    assert p[1] < 0.1
    coin = torch.arange(60) % 2 == 0
    half = ok(fitted(PLANE, X[:1].expand(60, 2), coin), PLANE, X[:1])
    assert float(half[0]) == pytest.approx(0.5, abs=0.15)


def test_each_diverged_run_makes_more_cautious() -> None:
    assert [caution(n) for n in (0, 1, 2)] == [0.0, 60.0, 120.0]
    assert caution(1000) == caution(2000)
