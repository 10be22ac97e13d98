"""What every surrogate promises, whatever it is inside."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import ports
from bo.dataset import places
from bo.surrogates import deep_ensemble, infinite_network, process, random_forest
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hamiltonian_network import hamiltonian, weighted_out
from bo.surrogates.hyperparameters import NumericalError
from bo.surrogates.sampled import STRETCH, Spread
from bo.surrogates.surrogate import SURROGATES, Surrogate
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Space

#: What makes a fit quick enough for a test.
QUICK: dict[str, dict[str, Any]] = {
    "deep_ensemble": {"steps": 250, "width": 16},
    "hamiltonian_network": {"width": 12, "chains": 2, "burn": 40, "draws": 40},
    "random_forest": {"trees": 32},
}
#: Constant between thresholds.
STEPS = {"random_forest"}
#: The order of the runs matters to these only through what is drawn at random, or through rounding.
EXACT = {"gp", "scale_shift", "saas", "inducing", "infinite_network", "deep_kernel"}
#: The model of one scale takes all runs for those of one.
ONE_SCALE = {"gp"}

LINE = Space(x=Real(0.0, 1.0))
RICH = Space(
    lr=Real(1e-4, 1e-2, log=True),
    layers=Integer(1, 8),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
    data=Mixture("code", "docs", "prose", floor={"docs": 0.1}),
    fidelity=Fidelity(params=(1e5, 4e6), tokens=(1e6, 1e7), target={"params": 4e6, "tokens": 1e7}),
)

every = pytest.mark.parametrize("name", SURROGATES)


@dataclass(frozen=True)
class Case:
    """A surrogate fitted to n runs, and ten other points of one scale."""

    surrogate: Surrogate
    inputs: Inputs
    Y: Tensor
    X: Tensor
    at: Inputs


def fit(name: str, features: Features, inputs: Inputs, Y: Tensor, start: Any = None) -> Surrogate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Surrogate = ports.load(SURROGATES, name, "surrogate")(features, inputs, Y, start, **QUICK.get(name, {}))
        return made


def line(x: Tensor) -> Inputs:
    n = len(x)
    return Features(LINE)(x[:, None], torch.zeros(n, 0, dtype=torch.float64), torch.zeros(n, dtype=torch.long))


def wave(x: Tensor) -> Tensor:
    return torch.sin(5 * x) + x


@cache
def rich(name: str, n: int = 18) -> Case:
    """Two metrics of runs at several scales; gp gets one of them."""
    rng = np.random.default_rng(0)
    assert RICH.fidelity is not None
    cells = RICH.fidelity.cells()
    cells = cells[-1:] if name in ONE_SCALE else cells
    X = torch.as_tensor(RICH.encode_all(RICH.sample(rng, n + 10)))
    cell = torch.arange(n) % len(cells)
    S = torch.as_tensor(places(RICH, cells))
    bowl = (X[:n, 0] - 0.5).square() + 0.3 * X[:n, 1] + 0.02 * S[cell].sum(-1)
    Y = torch.stack([-bowl, X[:n, 0] + 0.1 * X[:n, 1]], dim=-1)
    Y = (Y - Y.mean(0)) / Y.std(0)
    features = Features(RICH)
    top = len(cells) - 1
    at = features(X[n:], S[top].expand(10, -1), torch.full((10,), top))
    inputs = features(X[:n], S[cell], cell)
    return Case(fit(name, features, inputs, Y), inputs, Y, X[n:], at)


@cache
def smooth(name: str) -> Case:
    """15 runs of a wave."""
    x = torch.linspace(0.02, 0.98, 15, dtype=torch.float64)
    y = wave(x)[:, None]
    Y = (y - y.mean()) / y.std()
    between = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    return Case(fit(name, Features(LINE), line(x), Y), line(x), Y, between[:, None], line(between))


@every
def test_shapes_types_and_signs_are_as_the_contract_has_them(name: str) -> None:
    case = rich(name)
    surrogate, at = case.surrogate, case.at
    mean, variance = surrogate.posterior(at)
    joint, covariance = surrogate.joint(at, 5)
    cross = surrogate.covariance(at, case.inputs)
    out = surrogate.leave_one_out()
    assert mean.shape == variance.shape == (2, 10)
    assert (joint.shape, covariance.shape) == ((2, 2, 5), (2, 2, 5, 5))
    assert cross.shape == (2, 10, 18)
    assert surrogate.noise.shape == (2,)
    assert out[0].shape == out[1].shape == (18, 2)
    for values in (mean, variance, joint, covariance, cross, surrogate.noise, *out):
        assert values.dtype == torch.float64
        assert torch.isfinite(values).all()
    for values in (variance, surrogate.noise, out[1]):
        assert (values > 0).all()


@every
def test_of_no_points_nothing_is_said(name: str) -> None:
    case = rich(name)
    none = case.at.rows(torch.arange(0))
    assert [values.shape for values in case.surrogate.posterior(none)] == [(2, 0)] * 2
    assert case.surrogate.mean(none).shape == (2, 0)
    assert case.surrogate.covariance(none, case.at).shape == (2, 0, 10)


@every
def test_no_gradient_is_missing_or_infinite(name: str) -> None:
    case = rich(name)
    F = case.at.F.clone().requires_grad_()
    at = replace(case.at, F=F)
    for values in (*case.surrogate.posterior(at), *case.surrogate.joint(at, 5), case.surrogate.covariance(at, at)):
        (gradient,) = torch.autograd.grad(values.sum(), F, retain_graph=True)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(set(SURROGATES) - STEPS))
def test_gradients_agree_with_differences(name: str) -> None:
    surrogate = smooth(name).surrogate
    x = torch.tensor([0.11, 0.42, 0.83], dtype=torch.float64, requires_grad=True)
    for part in range(2):
        (gradient,) = torch.autograd.grad(surrogate.posterior(line(x))[part].sum(), x)
        with torch.no_grad():
            up, down = (surrogate.posterior(line(x + step))[part][0] for step in (1e-6, -1e-6))
        torch.testing.assert_close(gradient, (up - down) / 2e-6, rtol=1e-3, atol=1e-4)


@every
def test_what_is_said_jointly_is_what_is_said_singly(name: str) -> None:
    case = rich(name)
    with torch.no_grad():
        mean, variance = case.surrogate.posterior(case.at)
        joint, covariance = case.surrogate.joint(case.at, 5)
        whole = case.surrogate.covariance(case.at, case.at)
    scale = float(variance.max())
    torch.testing.assert_close(joint.reshape(2, 10), mean)
    torch.testing.assert_close(
        covariance.diagonal(dim1=-2, dim2=-1).reshape(2, 10), variance, rtol=1e-6, atol=1e-7 * scale
    )
    torch.testing.assert_close(covariance[:, 0], whole[:, :5, :5], rtol=1e-6, atol=1e-7 * scale)
    torch.testing.assert_close(whole, whole.mT, rtol=1e-6, atol=1e-7 * scale)
    assert torch.linalg.eigvalsh(whole).min() > -1e-6 * scale


@every
def test_what_is_believed_keeps_every_mean_and_shrinks_the_variance_there(name: str) -> None:
    case = rich(name)
    with torch.no_grad():
        at = case.at
        few = Inputs(at.F[:3], at.on[:3], at.S[:3], at.cell[:3])
        believed = case.surrogate.believe(few)
        before, after = case.surrogate.posterior(at), believed.posterior(at)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    assert (after[1] <= before[1] * (1 + 1e-6) + 1e-9).all()
    assert (after[1][:, :3] < 0.3 * before[1][:, :3]).all()
    assert [values.shape for values in believed.leave_one_out()] == [(18, 2)] * 2
    with torch.no_grad():
        again = believed.believe(few).posterior(at)
    torch.testing.assert_close(again[0], before[0], rtol=1e-5, atol=1e-5)


@every
def test_many_believed_points_leave_open_what_lies_far_from_them(name: str) -> None:
    case = smooth(name)
    few = torch.linspace(0.02, 0.3, 40, dtype=torch.float64)
    far = line(torch.tensor([0.9, 0.95], dtype=torch.float64))
    with torch.no_grad():
        before, after = case.surrogate.posterior(far)[1], case.surrogate.believe(line(few)).posterior(far)[1]
    assert (after > 0.01 * before).all()


@every
def test_runs_left_out_are_foretold_and_about_as_well_as_claimed(name: str) -> None:
    case = smooth(name)
    mean, variance = case.surrogate.leave_one_out()
    wrong = (mean - case.Y).square()
    assert float(wrong.mean()) < 0.5 * float(case.Y.square().mean())
    assert 0.01 < float((wrong / variance).mean()) < 4


@every
def test_a_smooth_function_is_learned_from_fifteen_runs(name: str) -> None:
    case = smooth(name)
    raw = wave(torch.linspace(0.02, 0.98, 15, dtype=torch.float64))
    truth = (wave(case.X[:, 0]) - raw.mean()) / raw.std()
    with torch.no_grad():
        mean, variance = case.surrogate.posterior(case.at)
    assert float((mean[0] - truth).square().mean().sqrt()) < (0.3 if name in STEPS else 0.1)
    inside = (mean[0] - truth).abs() < 2 * (variance[0] + case.surrogate.noise[0]).sqrt()
    assert inside.double().mean() > 0.8


@every
def test_memory_is_json_and_the_next_fit_takes_it(name: str) -> None:
    case = smooth(name)
    memory = json.loads(json.dumps(case.surrogate.memory(), allow_nan=False))
    warm = fit(name, Features(LINE), case.inputs, case.Y, memory)
    with torch.no_grad():
        cold_mean, warm_mean = (surrogate.posterior(case.at)[0] for surrogate in (case.surrogate, warm))
    torch.testing.assert_close(warm_mean, cold_mean, rtol=0.05, atol=0.05)
    fit(name, rich(name).surrogate.features, rich(name).inputs, rich(name).Y, memory)  # of another space


@every
def test_the_same_seed_gives_the_same_model(name: str) -> None:
    case = smooth(name)
    again = fit(name, Features(LINE), case.inputs, case.Y)
    with torch.no_grad():
        assert all(map(torch.equal, case.surrogate.posterior(case.at), again.posterior(case.at)))


@every
def test_coordinates_that_are_not_active_change_no_prediction(name: str) -> None:
    case = rich(name)
    inactive = torch.as_tensor(~RICH.active(case.X.numpy()))
    assert inactive.any()
    noise = torch.rand(case.X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = torch.zeros(len(case.X), 2, dtype=torch.float64)
    with torch.no_grad():
        one, other = (
            case.surrogate.posterior(case.surrogate.features(X, place, case.at.cell))
            for X in (case.X, torch.where(inactive, noise, case.X))
        )
    assert all(map(torch.equal, one, other))


@every
def test_the_order_of_the_runs_matters_little(name: str) -> None:
    case = smooth(name)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    shuffled = fit(name, Features(LINE), line(case.inputs.F[order, 0]), case.Y[order])
    with torch.no_grad():
        (mean, variance), (other, _) = (surrogate.posterior(case.at) for surrogate in (case.surrogate, shuffled))
    if name in EXACT:
        torch.testing.assert_close(other, mean, rtol=1e-3, atol=1e-3)
    else:
        assert float((other - mean).square().mean().sqrt()) < max(0.1, 2 * float(variance.mean().sqrt()))


AWKWARD = {
    "one run": ([0.4], [0.0]),
    "two runs": ([0.2, 0.7], [1.0, -1.0]),
    "three runs": ([0.2, 0.5, 0.7], [1.0, 0.2, -1.2]),
    "ties": ([0.1, 0.3, 0.5, 0.7, 0.9], [0.3] * 5),
    "one config": ([0.5] * 12, list(np.random.default_rng(0).standard_normal(12))),
    "an outlier": ([0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9], [0.3, 0.4, 0.5, 0.4, 0.3, 0.2, -8.0]),
}


@every
@pytest.mark.parametrize("data", AWKWARD)
def test_nothing_breaks_a_fit(name: str, data: str) -> None:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in AWKWARD[data])
    surrogate = fit(name, Features(LINE), line(x), y[:, None])
    at = line(torch.linspace(0, 1, 9, dtype=torch.float64))
    with torch.no_grad():
        mean, variance = surrogate.posterior(at)
        believed = surrogate.believe(at).posterior(at)[1]
    for values in (mean, variance, believed, surrogate.noise, *surrogate.leave_one_out()):
        assert torch.isfinite(values).all()
    assert (variance > 0).all()
    assert (believed <= variance * (1 + 1e-6)).all()
    assert (mean.abs() <= 3 * y.abs().max().clamp_min(1.0)).all()


@every
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_runs_leave_what_is_far_from_them_open(name: str, n: int) -> None:
    x = torch.tensor([0.05, 0.1, 0.15], dtype=torch.float64)[:n]
    surrogate = fit(name, Features(LINE), line(x), torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)[:n])
    with torch.no_grad():
        _, variance = surrogate.posterior(line(torch.tensor([0.9], dtype=torch.float64)))
    assert float((variance[0, 0] + surrogate.noise[0]).sqrt()) > 0.2


@every
def test_metrics_are_fitted_apart(name: str) -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    Y = torch.stack([wave(x), -2 * x], dim=-1)
    at = line(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    surrogate = fit(name, Features(LINE), line(x), (Y - Y.mean(0)) / Y.std(0))
    with torch.no_grad():
        both = surrogate.posterior(at)[0]
    truth = torch.stack([wave(at.F[:, 0]), -2 * at.F[:, 0]], dim=-1)
    truth = (truth - Y.mean(0)) / Y.std(0)
    assert (both.T - truth).square().mean(0).sqrt().max() < 0.35


@pytest.mark.parametrize("name", sorted(set(SURROGATES) - ONE_SCALE))
def test_runs_of_another_scale_are_told_apart(name: str) -> None:
    space = Space(
        x=Real(0.0, 1.0), fidelity=Fidelity(params=(1e5, 1.6e6), tokens=(1e6,), target={"params": 1.6e6, "tokens": 1e6})
    )
    x = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cell = torch.arange(24) % 2
    S = torch.tensor([[-4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)[cell]
    features, Y = Features(space), torch.where(cell == 1, 1.0, -1.0)[:, None].double()
    surrogate = fit(name, features, features(x[:, None], S, cell), Y)
    at = torch.tensor([[0.5]], dtype=torch.float64)
    with torch.no_grad():
        low, high = (
            float(surrogate.posterior(features(at, torch.tensor([[place, 0.0]]).double(), torch.tensor([index])))[0])
            for index, place in enumerate((-4.0, 0.0))
        )
    assert low < -0.5
    assert high > 0.5


# ----------------------------------------------------------------------------------------------- parts of them


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of linear_operator, as it is imported
def test_the_arc_cosine_kernel_is_botorchs() -> None:
    from botorch.models.kernels import InfiniteWidthBNNKernel

    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(k, 4, generator=generator, dtype=torch.float64) for k in (6, 5))
    reference = InfiniteWidthBNNKernel(depth=3).double()
    reference.weight_var, reference.bias_var = 10.0, 1.3
    weight, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    torch.testing.assert_close(infinite_network.arc_cosine(u, v, weight, bias, 3), reference(u, v).to_dense().detach())


def test_the_arc_cosine_kernel_is_the_covariance_of_wide_random_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    nets, width = 400_000, 1
    # One hidden layer: a sum over units, so single units have its covariance.
    W = torch.randn(nets, 2, width, generator=generator, dtype=torch.float64) * math.sqrt(2.0 / 2)
    b = torch.randn(nets, 1, width, generator=generator, dtype=torch.float64) * math.sqrt(0.5)
    hidden = (x @ W + b).clamp_min(0)[..., 0]
    sample = 2.0 * hidden.T @ hidden / nets + 0.5
    weight, bias = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(infinite_network.arc_cosine(x, x, weight, bias, 1), sample, rtol=0.02, atol=0.02)


def test_chains_find_the_moments_of_a_normal_distribution() -> None:
    mean, sd = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)

    def log_density(theta: Tensor) -> Tensor:
        return -0.5 * ((theta - mean) / sd).square().sum(-1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept, accepted, step = hamiltonian(log_density, torch.zeros(8, 2, dtype=torch.float64), 100, 300)
    assert kept.shape == (300, 8, 2)
    assert ((accepted > 0.6) & (accepted < 0.97)).all()
    assert (step > 0.1).all()
    torch.testing.assert_close(kept.reshape(-1, 2).mean(0), mean, rtol=0, atol=0.3)
    torch.testing.assert_close(kept.reshape(-1, 2).std(0), sd, rtol=0.15, atol=0)


def test_weighing_functions_leaves_a_run_out_of_a_linear_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    y = phi @ torch.tensor([1.0, -0.5], dtype=torch.float64)
    y = y + 0.3 * torch.randn(8, generator=generator, dtype=torch.float64)

    def posterior(rows: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + phi[rows].T @ phi[rows] / 0.09)
        return inverse @ phi[rows].T @ y[rows] / 0.09, inverse

    centre, spread = posterior(torch.arange(8))
    draws = torch.randn(50_000, 2, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(spread).T + centre
    noise = torch.full((1, 50_000), 0.09, dtype=torch.float64)
    mean, variance = weighted_out((draws @ phi.T)[None], y[:, None], noise)
    for i in range(8):
        without, left = posterior(torch.arange(8)[torch.arange(8) != i])
        assert float(mean[i, 0]) == pytest.approx(float(phi[i] @ without), abs=0.03)
        assert float(variance[i, 0]) == pytest.approx(float(phi[i] @ left @ phi[i]) + 0.09, rel=0.1)


def test_functions_that_agree_too_well_are_spread_by_what_they_miss() -> None:
    away = torch.full((4000, 1), 0.4, dtype=torch.float64)
    variance, noise = torch.full((4000, 1), 0.01, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    some = Spread.of(away, variance, noise)
    assert float(some.stretch) == pytest.approx(4.0, rel=0.01)
    assert float(some(variance)[0]) == pytest.approx(0.16, rel=0.01)
    none = Spread.of(away, 0 * variance, noise)
    assert float(none.stretch) == STRETCH
    assert float(none(0 * variance)[0]) == pytest.approx(0.16, rel=0.01)


def test_a_forest_has_the_variance_of_its_trees_and_of_their_leaves() -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64)
    place = (x * 2).round() / 2
    rng = torch.Generator().manual_seed(0)
    noisy = 2 * place[:, None] + 0.3 * torch.randn(30, 1, generator=rng, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        repeated = random_forest.fit(Features(LINE), line(place), noisy)
    # Three places with many runs each: what is left within a leaf is noise, and the place is known to a share of it.
    assert float(repeated.noise[0]) == pytest.approx(0.09, rel=0.6)
    with torch.no_grad():
        _, variance = repeated.posterior(line(torch.tensor([0.5], dtype=torch.float64)))
    assert float(variance[0, 0]) < float(repeated.noise[0])


def test_every_run_is_left_out_by_as_many_networks_of_an_ensemble() -> None:
    case = smooth("deep_ensemble")
    mean, _ = case.surrogate.leave_one_out()
    with torch.no_grad():
        fitted, _ = case.surrogate.posterior(case.inputs)
    assert ((mean - case.Y).square().mean() > (fitted.T - case.Y).square().mean()).all()
    assert deep_ensemble.FOLDS == 5


def test_a_covariance_that_cannot_be_factorised_is_an_error_with_a_reason() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(NumericalError, match="3 runs stayed singular"):
        process.factor(-torch.eye(3, dtype=torch.float64)[None], 0 * one, one)
