from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bo import Minimize, WeightedSum, dataset
from bo.acquisition.log_ei import log_ei
from bo.ports import History
from bo.surrogates import composite, scale_shift
from bo.surrogates.differences import differentiable
from bo.surrogates.features import Features, Inputs, cube_roots
from bo.surrogates.gp import matern
from bo.surrogates.hyperparameters import ENOUGH_MIXTURES, JITTER, MEAN_VARIANCE, POWER, Layout, NumericalError
from bo.surrogates.scale_shift import ScaleShiftGP, Target, kernel, shares
from bo.trial import Trial
from search_spaces import WSD, Choice, Fidelity, Integer, Linear, Mixture, Real, Schedule, Space

RICH = Space(
    lr=Real(1e-4, 1e-2, log=True),
    layers=Integer(1, 8),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
    data=Mixture("code", "docs", "prose", floor={"docs": 0.1}),
    fidelity=Fidelity(params=(1e5, 1e6, 4e6), tokens=(1e6, 1e7), target={"params": 4e6, "tokens": 1e7}),
)
LINE = Space(
    lr=Real(2.0**-10, 1.0, log=True),
    fidelity=Fidelity(params=(1e5, 4e5, 1.6e6), tokens=(1e6,), target={"params": 1.6e6, "tokens": 1e6}),
)
CURVED = Space(
    lr=Real(1e-4, 1e-2, log=True),
    run=Choice(
        {
            "scheduled": {
                "schedule": Schedule(
                    "linear", "cosine", warmup=Real(0.0, 0.1), floor=0.0, wsd={"decay": Real(0.2, 0.9)}
                )
            },
            "constant": {},
        }
    ),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)


def points(space: Space, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Encoded configs, places and cells, cells dealt in turn."""
    rng = np.random.default_rng(seed)
    cells = space.fidelity.cells()
    X = torch.as_tensor(space.encode_all(space.sample(rng, n)))
    index = torch.arange(n) % len(cells)
    S = torch.as_tensor(dataset.places(space, cells))[index]
    return X, S, index


def layout(space: Space, across: bool = True, bent: bool = False) -> Layout:
    features = Features(space)
    axes = len(space.fidelity.axes) if space.fidelity else 0
    return Layout(features.groups, features.drift_unit, features.centres, axes, across, bent)


def random_theta(shape: Layout, p: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    low, high = np.array(shape.bounds).T
    return torch.as_tensor(rng.uniform(np.maximum(low, -3), np.minimum(high, 2), (p, len(low))))


def history(space: Space, losses: Any, n: int, objective: Any, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    cells = space.fidelity.cells()
    trials = []
    for i, config in enumerate(space.sample(rng, n)):
        scale = cells[i % len(cells)]
        metrics = losses(space.encode(config), space.fidelity.log2(scale))
        trials.append(Trial(i, config, scale, 0, "sobol", status="finished", metrics=metrics))
    return History(space, objective, tuple(trials))


def two_losses(x: Any, s: Any) -> dict[str, float]:
    bowl = float((x[0] - 0.5 - 0.02 * s.sum()) ** 2 + 0.3 * (x[-1] - 0.6) ** 2)
    return {"a": 3.0 - 0.05 * float(s.sum()) + bowl, "b": 2.0 + 0.5 * bowl + 0.1 * float(x[1])}


# ------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("space", [RICH, CURVED], ids=["rich", "curved"])
def test_coordinates_that_are_not_active_never_reach_the_kernel(space: Space) -> None:
    X, S, cell = points(space, 12)
    inactive = torch.as_tensor(~space.active(X.numpy()))
    assert inactive.any()
    noise = torch.rand(X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, shape = Features(space), layout(space)
    hyper = shape.hyper(random_theta(shape, 2, 0))
    a, b = features(X, S, cell), features(torch.where(inactive, noise, X), S, cell)
    assert torch.equal(a.F, b.F)
    assert torch.equal(kernel(a, b, hyper, shape), kernel(a, a, hyper, shape))


def test_shares_enter_as_cube_roots_and_have_finite_gradients_on_faces() -> None:
    X, S, cell = points(RICH, 8)
    columns = Features(RICH).mixtures[0]
    roots = Features(RICH)(X, S, cell).F[:, -3:]
    shares = torch.tensor([list(config["data"].values()) for config in RICH.decode_all(X.numpy())], dtype=torch.float64)
    assert columns == (5, 6, 7) or len(columns) == 3
    assert torch.allclose(roots, shares.pow(1 / 3), atol=1e-5)
    z = torch.tensor([[0.0, 0.0, 0.7], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cube_roots(z, torch.zeros(3, dtype=torch.float64), 1.0).sum(), z)
    assert torch.isfinite(gradient[0]).all()


def test_mixtures_are_found_inside_options_too() -> None:
    space = Space(
        lr=Real(0, 1),
        a=Choice({"one": {"x.y": Mixture("p.1", "q"), "z": Mixture("r", "s", "t")}, "two": {"w": Real(0, 1)}}),
    )
    names = [[space.columns[i].name for i in mixture] for mixture in Features(space).mixtures]
    assert [len(each) for each in names] == [2, 3]
    assert all(space.columns[i].kind == "share" for mixture in Features(space).mixtures for i in mixture)


def test_two_mixtures_are_two_simplices_and_a_fixed_share_is_none_of_theirs() -> None:
    space = Space(a=Mixture("p", "q", "r", fixed={"q": 0.2}, floor={"p": 0.1}), b=Mixture("p", "q"))
    features = Features(space)
    assert features.mixtures == ((0, 1), (2, 3))
    config = {"a": {"p": 0.3, "q": 0.2, "r": 0.5}, "b": {"p": 1.0, "q": 0.0}}
    X = torch.as_tensor(space.encode(config))[None]
    F = features(X, torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, dtype=torch.long)).F[0]
    assert torch.allclose(F.pow(3), torch.tensor([0.3, 0.5, 1.0, 0.0], dtype=torch.float64), atol=1e-5)
    assert features.centres.tolist() == pytest.approx([0.4, 0.4, 0.5, 0.5])


def test_an_ordered_choice_is_a_number_that_may_drift() -> None:
    space = Space(x=Real(1, 4, log=True), size=Choice("s", "m", "l", ordered=True), fidelity=RICH.fidelity)
    features = Features(space)
    assert features.numeric == (0, 1)
    assert features.choices == ()
    assert features.drift_unit.tolist() == [0.5, 1 / 3]
    F = features(*points(space, 24)).F
    assert set(F[:, 1].tolist()) == {1 / 6, 0.5, 5 / 6}


# -------------------------------------------------------------------------------------------------------- schedules


def curved(value: Any, tokens: float = 1e7, space: Space = CURVED) -> Inputs:
    config = {"lr": 1e-3, "run": "scheduled", "schedule": value} if space is CURVED else {"schedule": value}
    place = torch.as_tensor(space.fidelity.log2({**space.fidelity.target, "tokens": tokens}))[None]
    return Features(space)(torch.as_tensor(space.encode(config))[None], place, torch.zeros(1, dtype=torch.long))


def test_equal_curves_are_equal_to_the_kernel_whatever_their_family() -> None:
    space = Space(
        schedule=Schedule("linear", warmup=0.0, floor=0.0, wsd={"decay": Real(0.2, 1.0)}), fidelity=LINE.fidelity
    )
    shape = layout(space)
    hyper = shape.hyper(torch.as_tensor(shape.vector())[None])

    def correlation(a: Inputs, b: Inputs) -> float:
        K = kernel(a.join(b), a.join(b), hyper, shape)[0] - MEAN_VARIANCE
        return float(K[0, 1] / K[0, 0])

    linear = curved(Linear(), 1e6, space)
    assert correlation(linear, curved(WSD(decay=1.0), 1e6, space)) == pytest.approx(1.0, abs=1e-6)
    assert correlation(linear, curved(WSD(decay=0.98), 1e6, space)) > 0.99
    assert correlation(linear, curved(WSD(decay=0.2), 1e6, space)) < 0.7


def test_the_squared_distance_of_curves_is_their_mean_squared_difference_in_each_part() -> None:
    # Both have reached the peak at 10% of training, and have the same decay from 80% on.
    early, late = curved(WSD(decay=0.2, warmup=0.1)), curved(WSD(decay=0.2, warmup=0.0))
    groups = torch.tensor(Features(CURVED).groups)
    apart = [float((early.F - late.F)[0, groups == group].square().sum()) for group in range(groups.max() + 1)]
    parts = [value for value in apart if value]
    assert len(parts) == 1
    assert 0.1 < parts[0] < 0.7  # warm-up against none: the mean of (1 - u)^2, on a grid
    assert len(apart) == 1 + 1 + 3


def test_the_settings_of_a_schedule_count_through_its_curve_alone() -> None:
    assert [CURVED.columns[i].name for i in Features(CURVED).numeric] == ["lr"]
    assert [CURVED.columns[i].name for i in Features(CURVED).choices] == ["run"]


def test_the_curve_of_a_family_that_counts_tokens_is_that_of_the_runs_tokens() -> None:
    space = Space(
        schedule=Schedule("linear", power={"batch_tokens": 2.0**18}),
        fidelity=Fidelity(params=(1e5,), tokens=(1e8, 1e10), target={"params": 1e5, "tokens": 1e10}),
    )
    x = torch.full((1, len(space.columns)), 0.5, dtype=torch.float64)
    features, cell = Features(space), torch.zeros(1, dtype=torch.long)
    for code, same in ((0.25, True), (0.75, False)):
        x[0, 0] = code
        few, many = (
            features(x, torch.as_tensor(space.fidelity.log2({"params": 1e5, "tokens": tokens}))[None], cell).F
            for tokens in (1e8, 1e10)
        )
        assert torch.equal(few, many) == same


def test_differences_are_the_gradient_of_what_numpy_computes() -> None:
    def function(x: Any) -> Any:
        return np.stack([np.sin(x[:, 0]) * x[:, 2], x[:, 2] ** 2, x[:, 1]], axis=1)

    X = torch.tensor([[0.3, 0.5, 0.7], [0.0, 0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 4.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((differentiable(function, X, (0, 2)) * weight).sum(), X)
    x = X.detach()
    exact = torch.stack(
        [
            weight[:, 0] * x[:, 0].cos() * x[:, 2],
            torch.zeros(2, dtype=torch.float64),  # not asked for
            weight[:, 0] * x[:, 0].sin() + 2 * weight[:, 1] * x[:, 2],
        ],
        dim=1,
    )
    assert torch.allclose(gradient, exact, atol=3e-5)
    assert not differentiable(function, X, ()).requires_grad


# --------------------------------------------------------------------------------------------------------- kernel


def test_shares_at_a_power_of_one_are_shares_and_at_a_third_are_cube_roots() -> None:
    X, S, cell = points(RICH, 8)
    shape, inputs = layout(RICH, bent=True), Features(RICH)(X, S, cell)
    w = torch.tensor([list(config["data"].values()) for config in RICH.decode_all(X.numpy())], dtype=torch.float64)
    for power in (0.2, POWER, 1.0):
        hyper = shape.hyper(torch.as_tensor(shape.vector({"power": [np.log(power)]}))[None])
        expected = 3 ** (-1 / 3) * ((3 * w) ** power - 1) / (3 * power)
        assert torch.allclose(shares(inputs, hyper, shape), expected, atol=1e-3 if power == 0.2 else 1e-5)


def test_at_every_power_the_gradient_is_finite_where_shares_vanish() -> None:
    space = Space(data=Mixture("a", "b", "c", "d"))
    shape = Layout(Features(space).groups, Features(space).drift_unit, Features(space).centres, 0, False, True)
    for power in (0.2, 0.5, 1.0):
        hyper = shape.hyper(torch.as_tensor(shape.vector({"power": [np.log(power)]}))[None])
        z = torch.tensor([[0.0, 0.0, 0.7, 0.2], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        inputs = Features(space)(z, torch.zeros(2, 0, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
        (gradient,) = torch.autograd.grad(kernel(inputs, inputs, hyper, shape)[0, 0, 1], z)
        assert torch.isfinite(gradient).all()


def test_the_power_is_one_number_and_its_prior_counts_once_however_many_metrics() -> None:
    shape = layout(RICH, bent=True)
    one, other = (shape.vector({"power": [value]}) for value in (np.log(POWER), np.log(0.8)))
    drops = []
    for p in (1, 5):
        centre, away = (torch.as_tensor(np.tile(vector, (p, 1))) for vector in (one, other))
        drops.append(float((shape.log_prior(centre) - shape.log_prior(away)).sum()))
        assert shape.hyper(away).power.shape == ()
        assert float(shape.hyper(away).power) == pytest.approx(0.8)
    assert drops[0] == pytest.approx(drops[1])
    assert drops[0] > 0


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_kernel_is_positive_definite_for_any_drift_and_spread(seed: int) -> None:
    X, S, cell = points(RICH, 24, seed)
    shape = layout(RICH)
    hyper = shape.hyper(random_theta(shape, 2, seed))
    inputs = Features(RICH)(X, S, cell)
    K = kernel(inputs, inputs, hyper, shape)
    smallest = torch.linalg.eigvalsh(K)[:, 0]
    assert torch.allclose(K, K.mT)
    assert (smallest > -1e-9 * K.diagonal(dim1=-2, dim2=-1).max(-1).values).all()
    assert torch.allclose(K.diagonal(dim1=-2, dim2=-1), scale_shift.diagonal(inputs, hyper, shape))


def test_the_integral_over_drifts_equals_monte_carlo() -> None:
    # Matern-5/2 is E_t exp(-r^2 / 2t) with t ~ Gamma(5/2, rate 5/2); given t the drift is N(Wbar, t sw^2).
    X, S, cell = points(LINE, 3)
    shape = layout(LINE)
    theta = torch.as_tensor(shape.vector({"drift": [0.8, 0.0], "spread": np.log([0.5, 0.4]), "lengthscale": [-1.2]}))[
        None
    ]
    hyper = shape.hyper(theta)
    inputs = Features(LINE)(X, S, cell)
    K = kernel(inputs, inputs, hyper, shape)[0]
    rng = np.random.default_rng(0)
    draws = 400_000
    mix = rng.gamma(2.5, 1 / 2.5, draws)
    unit = float(shape.drift_unit[0])
    drift = unit * (
        hyper.drift[0, 0].numpy() + np.sqrt(mix)[:, None] * hyper.spread[0].numpy() * rng.standard_normal((draws, 2))
    )
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        shifted = float(X[i, 0] - X[j, 0]) - drift @ (S[i] - S[j]).numpy()
        sample = np.exp(-0.5 * shifted**2 / (mix * float(hyper.lengthscale[0, 0]) ** 2))
        expected = (float(K[i, j]) - MEAN_VARIANCE) / float(hyper.amplitude[0])
        assert expected == pytest.approx(sample.mean(), abs=4 * sample.std() / np.sqrt(draws) + 1e-5)


def test_noise_may_grow_with_scale() -> None:
    X, S, cell = points(LINE, 8)
    shape, inputs = layout(LINE), Features(LINE)(X, S, cell)
    hyper = shape.hyper(torch.as_tensor(shape.vector({"noise": [-3.0], "louder": [0.4, -0.1]}))[None])
    louder = S @ torch.tensor([0.4, -0.1], dtype=torch.float64)
    assert torch.allclose(scale_shift.noise(inputs, hyper, shape)[0].log(), -3.0 + louder)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("space", [RICH, CURVED, LINE], ids=["rich", "curved", "line"])
def test_the_likelihood_and_its_gradient_equal_those_of_the_whole_covariance(space: Space, smooth: bool) -> None:
    features, shape = Features(space), replace(layout(space), smooth=smooth)
    inputs = features(*points(space, 25))
    Y = torch.randn(25, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = (0.3 * random_theta(shape, 2, 1) + 0.7 * torch.as_tensor(shape.vector())).requires_grad_()
    hyper = shape.hyper(theta)
    K, r = kernel(inputs, inputs, hyper, shape), Y.T
    size = scale_shift.Pairs.of(inputs, inputs, hyper, shape).scale.diagonal(dim1=-2, dim2=-1).mean(-1)
    K = K + torch.diag_embed(scale_shift.noise(inputs, hyper, shape)) + JITTER * size[:, None, None] * torch.eye(25)
    plain = -0.5 * (r[:, None] @ torch.linalg.solve(K, r[..., None])).squeeze() - 0.5 * torch.logdet(K)
    found = Target.of(inputs, Y, shape).log_likelihood(theta)
    assert torch.allclose(found, plain, rtol=1e-9)
    slopes = [torch.autograd.grad(value.sum(), theta)[0] for value in (found, plain)]
    assert torch.allclose(*slopes, rtol=1e-7, atol=1e-7)


def test_hyperparameters_of_many_runs_are_fitted_to_some_of_every_cell() -> None:
    X, S, cell = points(RICH, 90)
    rows = scale_shift.few(Features(RICH)(X[:80], S[:80], torch.clamp(cell[:80], max=2)), 30)
    assert len(rows) == 30
    counts = torch.bincount(torch.clamp(cell[:80], max=2)[rows])
    assert counts.max() - counts.min() <= 1
    assert torch.equal(scale_shift.few(Features(RICH)(X, S, cell), 200), torch.arange(90))
    alone = scale_shift.few(Features(RICH)(X, S, torch.arange(90)), 30)  # every run has a scale of its own
    assert len(alone) == 30
    assert (alone.diff() <= 4).all()


def test_with_one_cell_it_is_the_plain_matern_kernel() -> None:
    X, _, _ = points(LINE, 6)
    zero = torch.zeros(6, 2, dtype=torch.float64)
    inputs = Features(LINE)(X, zero, torch.zeros(6, dtype=torch.long))
    shape = layout(LINE, across=False)
    hyper = shape.hyper(random_theta(shape, 1, 3))
    K = kernel(inputs, inputs, hyper, shape)[0]
    r = 5**0.5 * (X - X.T).abs() / hyper.lengthscale[0, 0]
    expected = hyper.amplitude[0] * (1 + r + r**2 / 3) * torch.exp(-r) + MEAN_VARIANCE
    assert torch.allclose(K, expected, atol=1e-9)
    assert float(matern(torch.zeros((), dtype=torch.float64))) == pytest.approx(1.0, abs=1e-9)


# ------------------------------------------------------------------------------------------------------ posterior


def test_the_posterior_equals_a_five_line_solve() -> None:
    X, S, cell = points(RICH, 20)
    shape, features = layout(RICH), Features(RICH)
    theta = random_theta(shape, 2, 1)
    hyper = shape.hyper(theta)
    Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    train, test = features(X, S, cell), features(*points(RICH, 5, 9))
    mean, variance = ScaleShiftGP.given(features, shape, theta, train, Y).posterior(test)
    for k in range(2):
        K, q, prior = (kernel(a, b, hyper, shape)[k] for a, b in ((train, train), (test, train), (test, test)))
        noise = scale_shift.noise(train, hyper, shape)[k]
        inverse = torch.linalg.inv(K + torch.diag(noise) + JITTER * hyper.amplitude[k] * torch.eye(20))
        assert torch.allclose(mean[k], q @ inverse @ Y[:, k], atol=1e-7)
        assert torch.allclose(variance[k], (prior - q @ inverse @ q.T).diagonal(), atol=1e-7)


def test_leave_one_out_equals_leaving_each_out() -> None:
    X, S, cell = points(RICH, 10)
    shape, features = layout(RICH), Features(RICH)
    theta = random_theta(shape, 1, 2)
    Y = torch.randn(10, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = ScaleShiftGP.given(features, shape, theta, features(X, S, cell), Y).leave_one_out()
    keep = torch.arange(10) != 4
    rest = ScaleShiftGP.given(features, shape, theta, features(X[keep], S[keep], cell[keep]), Y[keep])
    at, spread = rest.posterior(features(X[4:5], S[4:5], cell[4:5]))
    noise = scale_shift.noise(features(X[4:5], S[4:5], cell[4:5]), rest.hyper, shape)[0, 0]
    noise = noise + JITTER * rest.hyper.amplitude[0]
    assert float(mean[4, 0]) == pytest.approx(float(at), abs=1e-8)
    assert float(variance[4, 0]) == pytest.approx(float(spread[0, 0] + noise), rel=1e-8)


def test_believed_points_change_no_mean_and_shrink_the_variance() -> None:
    model = composite.fit(dataset.from_history(history(RICH, two_losses, 24, WeightedSum({"a": 0.5, "b": 0.5}))))
    target = RICH.fidelity.target
    X, _, _ = points(RICH, 6, 3)
    place = model.data.place(target)
    believed = model.believe(X[:1], place[None])
    before, after = model.at(target).value(X), believed.at(target).value(X)
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert (after[1] <= before[1] + 1e-9).all()
    assert float(after[1][0]) < 0.5 * float(before[1][0])


def test_mean_and_variance_of_the_sum_agree_with_sampling() -> None:
    model = composite.fit(dataset.from_history(history(RICH, two_losses, 24, WeightedSum({"a": 0.7, "b": -0.4}))))
    target = RICH.fidelity.target
    X, _, _ = points(RICH, 4, 5)
    mean, sd = model.at(target).value(X)
    metric_mean, metric_variance = model.gp.posterior(model.at(target).inputs(X))
    root = torch.linalg.cholesky(model.correlation)
    draws = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ root.T
    weight = model.at(target).weight
    for b in range(4):
        sample = (metric_mean[:, b] + metric_variance[:, b].sqrt() * draws) @ weight
        assert float(mean[b]) == pytest.approx(float(sample.mean()), abs=5 * float(sd[b]) / 400)
        assert float(sd[b]) == pytest.approx(float(sample.std()), rel=0.02)


def test_metrics_that_move_together_make_the_sum_less_certain() -> None:
    rng = np.random.default_rng(0)

    def noisy(x: Any, s: Any) -> dict[str, float]:
        shared = 0.05 * rng.standard_normal()
        return {"a": 2.0 + float(x[0]) + shared, "b": 3.0 + float(x[0]) + shared + 0.01 * rng.standard_normal()}

    model = composite.fit(dataset.from_history(history(LINE, noisy, 30, WeightedSum({"a": 0.5, "b": 0.5}))))
    assert float(model.correlation[0, 1]) > 0.6


def test_a_metric_that_never_changes_correlates_with_itself() -> None:
    def losses(x: Any, s: Any) -> dict[str, float]:
        return {"a": 2.0 + float(x[0]), "b": 3.0}

    model = composite.fit(dataset.from_history(history(LINE, losses, 12, WeightedSum({"a": 0.5, "b": 0.5}))))
    assert model.correlation.diagonal().tolist() == [1.0, 1.0]
    assert torch.isfinite(model.correlation).all()


@pytest.mark.parametrize("space", [RICH, CURVED], ids=["rich", "curved"])
def test_gradients_of_the_acquisition_agree_with_differences(space: Space) -> None:
    model = composite.fit(dataset.from_history(history(space, two_losses, 24, WeightedSum({"a": 0.5, "b": 0.5}))))
    target = space.fidelity.target
    X = points(space, 3, 7)[0].requires_grad_()
    best = model.at(target).value(model.data.X)[0].max().detach()
    (gradient,) = torch.autograd.grad(log_ei(*model.at(target).value(X), best).sum(), X)
    for i, column in enumerate(space.columns):
        if column.kind != "choice":
            step = torch.zeros_like(X)
            step[:, i] = 1e-6
            with torch.no_grad():
                up, down = (log_ei(*model.at(target).value(X + sign * step), best) for sign in (1, -1))
            assert torch.allclose(gradient[:, i], (up - down) / 2e-6, rtol=1e-3, atol=1e-5)


def test_predictions_cover_what_is_measured() -> None:
    rng = np.random.default_rng(1)

    def noisy(x: Any, s: Any) -> dict[str, float]:
        return {name: value + 0.003 * rng.standard_normal() for name, value in two_losses(x, s).items()}

    objective = WeightedSum({"a": 0.5, "b": 0.5})
    target = RICH.fidelity.target
    train, test = history(RICH, noisy, 60, objective), history(RICH, noisy, 240, objective, seed=8)
    model = composite.fit(dataset.from_history(train))
    inside = []
    for trial in test.trials:
        if trial.scale == target:
            expected = model.predict(torch.as_tensor(RICH.encode(trial.config)), target)
            inside.append(expected.low <= objective.value(trial.metrics or {}) <= expected.high)
    assert 0.8 <= np.mean(inside) <= 1.0


# ------------------------------------------------------------------------------------------------------------ fit


def test_a_fit_finds_how_the_optimum_drifts() -> None:
    # The optimum moves by half an octave for every octave of parameters.
    def drifting(x: Any, s: Any) -> dict[str, float]:
        return {"loss": 2.0 + float((10 * x[0] - 5 - 0.5 * s[0]) ** 2) / 50}

    gp = composite.fit(dataset.from_history(history(LINE, drifting, 36, Minimize("loss")))).gp
    assert float(gp.hyper.drift[0, 0, 0]) == pytest.approx(0.5, abs=0.15)


def test_a_fit_is_deterministic_and_a_warm_start_ends_no_worse() -> None:
    data = dataset.from_history(history(RICH, two_losses, 24, WeightedSum({"a": 0.5, "b": 0.5})))
    first, second = composite.fit(data), composite.fit(data)
    assert torch.equal(first.gp.theta, second.gp.theta)
    warm = composite.fit(data, first.gp.memory())
    cold_value, warm_value = (
        Target.of(gp.inputs, data.Y, gp.layout).log_posterior(gp.theta).sum() for gp in (first.gp, warm.gp)
    )
    assert float(warm_value) >= float(cold_value) - 1e-3


def test_hyperparameters_of_many_runs_are_kept_until_there_are_more_or_another_scale() -> None:
    features, (X, S, cell) = Features(LINE), points(LINE, 180)
    noise = torch.randn(180, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Y = torch.sin(6 * (X - 0.03 * S[:, :1])) + 0.1 * noise
    two, rest = (cell < 2).nonzero()[:, 0], (cell == 2).nonzero()[:, 0]

    def fit(rows: Tensor, start: Any = None) -> ScaleShiftGP:
        return scale_shift.fit(features, features(X[rows], S[rows], cell[rows]), Y[rows], start)

    first = fit(two[:110])
    kept, again, other = (fit(rows, first.memory()) for rows in (two[:112], two, torch.cat([two[:110], rest[:1]])))
    assert torch.allclose(kept.theta, first.theta, atol=1e-5)
    assert (kept.runs, again.runs, other.runs) == (110, 120, 111)
    for refitted in (again, other):
        assert not torch.allclose(refitted.theta, first.theta, atol=1e-5)
    assert kept.believe(features(X[:1], S[:1], cell[:1])).memory() == kept.memory()


def linear_in_shares(n: int) -> dataset.Dataset:
    """Losses of `n` mixtures of five sources that are sums over the sources' shares, each share times its own slope."""
    space = Space(data=Mixture(*"abcde"), fidelity=LINE.fidelity)

    def losses(x: Any, s: Any) -> dict[str, float]:
        w = np.array(list(space.decode(x)["data"].values()))
        return {"a": 3 + float(w @ [0.1, 0.5, 0.2, 0.9, 0.4]), "b": 2 + float(w @ [0.5, 0.1, 0.3, 0.2, 0.8])}

    return dataset.from_history(history(space, losses, n, WeightedSum({"a": 0.5, "b": 0.5})))


def test_the_power_is_learned_where_losses_are_linear_in_the_shares() -> None:
    gp = composite.fit(linear_in_shares(45)).gp
    assert float(gp.hyper.power) > 0.5


def test_the_power_stays_a_third_while_there_are_few_mixtures() -> None:
    few = composite.fit(linear_in_shares(ENOUGH_MIXTURES - 1))
    assert float(few.gp.hyper.power) == POWER
    assert all("power" not in metric for metric in few.gp.memory()["metrics"])
    # The memory of a model without it starts one that has it, and the other way round.
    enough = composite.fit(linear_in_shares(ENOUGH_MIXTURES), few.gp.memory())
    assert all("power" in metric for metric in enough.gp.memory()["metrics"])
    composite.fit(few.data, enough.gp.memory())


def test_a_memory_of_another_shape_is_used_where_it_fits() -> None:
    shape = layout(RICH)
    vector = shape.vector({"noise": [-3.0], "lengthscale": [1.0], "drift": [float("nan")] * 4})
    names = shape.names(vector)
    assert names["noise"] == [-3.0]
    assert names["lengthscale"] == np.log(0.5 * shape.stretch).round(6).tolist()


def test_a_covariance_that_cannot_be_factorised_is_an_error_with_a_reason() -> None:
    broken = -torch.eye(3, dtype=torch.float64)[None]
    with pytest.raises(NumericalError, match="3 runs stayed singular"):
        scale_shift.cholesky(broken, torch.ones(1, dtype=torch.float64))


def test_inputs_join_end_to_end() -> None:
    inputs = Features(LINE)(*points(LINE, 3))
    assert isinstance(inputs.join(inputs), Inputs)
    assert len(inputs.join(inputs)) == 6


@pytest.mark.parametrize("names", ["a", "ab"], ids=["one metric", "two"])
def test_what_is_believed_jointly_is_what_is_believed_singly(names: str) -> None:
    objective = WeightedSum(dict.fromkeys(names, 1.0))
    model = composite.fit(dataset.from_history(history(RICH, two_losses, 24, objective)))
    assert RICH.fidelity is not None
    belief = model.at(RICH.fidelity.target)
    X, _, _ = points(RICH, 12, 3)
    mean, sd = belief.value(X)
    together, covariance = belief.joint(X.reshape(4, 3, -1))
    torch.testing.assert_close(together.reshape(-1), mean)
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1).reshape(-1), sd.square(), rtol=1e-6, atol=1e-12)
    whole = belief.covariance(X, X)
    for group in range(4):
        rows = slice(3 * group, 3 * group + 3)
        torch.testing.assert_close(covariance[group], whole[rows, rows], rtol=1e-6, atol=1e-12)
    assert torch.linalg.eigvalsh(whole).min() > -1e-9 * whole.diagonal().max()
