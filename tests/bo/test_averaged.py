from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import averaged, gp, scale_shift
from bo.surrogates import surrogate as surrogates
from bo.surrogates.averaged import chain, spread
from bo.surrogates.ensemble import Ensemble
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Layout
from search_spaces import Fidelity, Mixture, Real, Space
from search_spaces.parameter import Array

BOX = Space(**{f"x{i}": Real(0, 1) for i in range(4)})
RECIPE = Space(
    x=Real(0, 1),
    data=Mixture("p", "q", "r"),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6,), target={"params": 1e6, "tokens": 1e6}),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(space: Space, n: int, seed: int = 0) -> Inputs:
    X = torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(seed), n)))
    m = len(space.fidelity.axes) if space.fidelity else 0
    return Features(space)(X, torch.zeros(n, m, dtype=torch.float64), torch.zeros(n, dtype=torch.long))


def metric(inputs: Inputs) -> Tensor:
    x = inputs.F
    return (torch.sin(6 * x[:, 0]) + 2 * (x[:, 1] - 0.4).square() + x[:, 2] * x[:, 3])[:, None]


def standardised(inputs: Inputs, noise: float = 0.0) -> Tensor:
    y = metric(inputs)
    y = (y - y.mean()) / y.std()
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def wide(size: int) -> Array:
    return np.array([np.full(size, -30.0), np.full(size, 30.0)])


def test_a_chain_has_the_moments_of_a_slanted_normal_distribution() -> None:
    covariance = np.array([[4.0, 1.9, 0.0], [1.9, 1.0, 0.0], [0.0, 0.0, 0.01]])
    precision, centre = np.linalg.inv(covariance), np.array([1.0, -2.0, 3.0])

    def loss(x: Array) -> tuple[float, Array]:
        slope = precision @ (x - centre)
        return 0.5 * float((x - centre) @ slope), slope

    root = spread(loss, centre)
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-6)
    found = chain(loss, centre, wide(3), 2000)
    np.testing.assert_allclose(found.mean(0), centre, atol=0.15)
    np.testing.assert_allclose(np.cov(found.T), covariance, rtol=0.15, atol=0.05)


def test_a_chain_has_the_moments_of_a_skew_distribution() -> None:
    def loss(x: Array) -> tuple[float, Array]:  # logarithms of Gamma(3, 6)
        return float((6 * np.exp(x) - 3 * x).sum()), 6 * np.exp(x) - 3

    found = np.exp(chain(loss, np.full(2, math.log(0.5)), wide(2), 3000))
    np.testing.assert_allclose(found.mean(0), 0.5, rtol=0.06)
    np.testing.assert_allclose(found.var(0), 3 / 36, rtol=0.15)


def test_a_chain_stays_within_bounds_and_is_that_of_the_cut_distribution() -> None:
    def loss(x: Array) -> tuple[float, Array]:
        return 0.5 * float(x @ x), x

    found = chain(loss, np.zeros(2), np.array([[0.0, -0.3], [10.0, 0.5]]), 3000)
    assert ((found >= [0.0, -0.3]) & (found <= [10.0, 0.5])).all()
    assert found[:, 0].mean() == pytest.approx(math.sqrt(2 / math.pi), rel=0.05)
    assert found[:, 1].mean() == pytest.approx(0.0948, abs=0.015)


def test_what_runs_say_nothing_about_is_drawn_from_its_prior() -> None:
    inputs = drawn(BOX, 1)
    model = averaged.fit(Features(BOX), inputs, torch.zeros(1, 1, dtype=torch.float64), draws=600)
    assert isinstance(model, Ensemble)
    width = torch.stack([member.hyper.lengthscale[0] for member in model.members])
    stretch = torch.from_numpy(gp.fit(Features(BOX), inputs, torch.zeros(1, 1).double()).layout.stretch)
    torch.testing.assert_close(width.mean(0), 0.5 * stretch, rtol=0.12, atol=0)
    torch.testing.assert_close(width.std(0), math.sqrt(3) / 6 * stretch, rtol=0.2, atol=0)


def test_many_draws_agree_with_the_integral_over_a_grid() -> None:
    line = Space(x=Real(0, 1))
    inputs, at = drawn(line, 6), drawn(line, 20, 1)
    Y = torch.sin(9 * inputs.F)
    Y = (Y - Y.mean()) / Y.std()
    layout = gp.fit(Features(line), inputs, Y).layout
    posterior = gp.LogPosterior(layout, inputs.F.numpy(), Y.numpy())
    axes = [np.linspace(*ends, 14) for ends in ((-3.4, 1.5), (-2.5, 4.0), (-17.0, -0.5))]
    weight, moments = [], []
    for raw in np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3):
        weight.append(raw[0] - posterior.loss(raw)[0])
        one = gp.GaussianProcess.given(Features(line), layout, torch.tensor(raw)[None], inputs.F.numpy(), Y, 6)
        moments.append(torch.stack([part[0] for part in one.posterior(at)]))
    share = torch.softmax(torch.tensor(weight), 0)[:, None]
    mean, variance = torch.stack(moments).unbind(1)
    centre = (share * mean).sum(0)
    spread = (share * (variance + (mean - centre).square())).sum(0)
    found = averaged.fit(Features(line), inputs, Y, draws=1500).posterior(at)
    torch.testing.assert_close(found[0][0], centre, rtol=0, atol=0.05)
    torch.testing.assert_close(found[1][0].sqrt(), spread.sqrt(), rtol=0.1, atol=0.02)


def test_functions_of_the_prior_are_foretold_better_than_by_one_process() -> None:
    features, rng, gain = Features(BOX), np.random.default_rng(0), []
    for seed in range(20):
        inputs = drawn(BOX, 110, seed)
        layout = Layout.of(features, inputs, across=False)
        raw = np.concatenate(
            [np.log(layout.stretch * rng.gamma(3, 1 / 6, 4)), rng.normal((math.log(2), math.log(3e-4)), (1, 2.5))]
        )
        (kernel,) = gp.kernels(layout, torch.from_numpy(raw)[None])
        K, _ = kernel.between(inputs.F.numpy(), inputs.F.numpy())
        root = np.linalg.cholesky(K + (kernel.noise + 1e-8) * np.eye(110))
        Y = torch.from_numpy(root @ rng.standard_normal(110))[:, None]
        told, at = inputs.rows(torch.arange(10)), inputs.rows(torch.arange(10, 110))
        density = []
        for fit in (gp.fit, averaged.fit):
            model = fit(features, told, Y[:10])
            mean, variance = model.posterior(at)
            total = variance[0] + model.noise[0]
            density.append(float((-0.5 * ((Y[10:, 0] - mean[0]).square() / total + total.log())).mean()))
        gain.append(density[1] - density[0])
    assert np.mean(gain) > 0.02


def test_the_same_torch_seed_gives_the_same_draws_and_another_one_others() -> None:
    inputs = drawn(BOX, 15)

    def theta(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = averaged.fit(Features(BOX), inputs, standardised(inputs))
        assert isinstance(model, Ensemble)
        return torch.stack([member.theta for member in model.members])

    assert torch.equal(theta(1), theta(1))
    assert not torch.equal(theta(1), theta(2))
    assert len(theta(1).unique(dim=0)) > 8


@pytest.mark.parametrize("n", [40, 41])
def test_beyond_ten_runs_a_coordinate_it_is_the_usual_process(n: int) -> None:
    inputs = drawn(BOX, n)
    Y = standardised(inputs, 0.1)
    before = torch.get_rng_state()
    model = averaged.fit(Features(BOX), inputs, Y)
    if n == 40:
        assert isinstance(model, Ensemble)
        assert len(model.members) == 12
    else:
        assert isinstance(model, gp.GaussianProcess)
        assert torch.equal(model.theta, gp.fit(Features(BOX), inputs, Y).theta)
        assert torch.equal(before, torch.get_rng_state())


def test_runs_at_several_scales_are_left_to_the_process_of_all_scales() -> None:
    space, n = RECIPE, 12
    X = torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(0), n)))
    cell = torch.arange(n) % 2
    S = torch.zeros(n, 2, dtype=torch.float64)
    S[:, 0] = -math.log2(10) * cell
    Y = X[:, :1] - X[:, :1].mean()
    model = averaged.fit(Features(space), Features(space)(X, S, cell), Y)
    assert isinstance(model, scale_shift.ScaleShiftGP)


def test_memory_is_that_of_one_process_so_that_either_starts_the_other() -> None:
    inputs = drawn(BOX, 15)
    Y, features = standardised(inputs), Features(BOX)
    usual = gp.fit(features, inputs, Y)
    model = surrogates.fit("gp_averaged", features, inputs, Y)
    assert model.memory() == usual.memory()
    memory = json.loads(json.dumps(model.memory()))
    warm = gp.fit(features, inputs, Y, memory)
    assert warm.log_evidence >= usual.log_evidence - 1e-3


def test_metrics_are_drawn_apart_and_share_the_power_of_shares() -> None:
    inputs = drawn(RECIPE, 30)
    Y = torch.stack([inputs.F[:, 0], inputs.F[:, -1]], dim=-1)
    Y = (Y - Y.mean(0)) / Y.std(0)
    usual = gp.fit(Features(RECIPE), inputs, Y)
    model = averaged.fit(Features(RECIPE), inputs, Y)
    assert isinstance(model, Ensemble)
    assert usual.layout.bent
    for member in model.members:
        torch.testing.assert_close(member.hyper.power, usual.hyper.power)
    width = torch.stack([member.hyper.lengthscale for member in model.members]).log()  # K x p x G
    assert width[:, 0, 0].mean() < width[:, 1, 0].mean()
    assert (width.std(0) > 0.05).all()


def test_no_draw_at_all_is_refused() -> None:
    inputs = drawn(BOX, 5)
    with pytest.raises(ValueError, match="at least 1 draw"):
        averaged.fit(Features(BOX), inputs, standardised(inputs), draws=0)
