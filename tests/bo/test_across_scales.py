from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.dataset import places
from bo.surrogates import autoregressive, gp, linear_truncated
from bo.surrogates.across import Prior, ScaleLayout, Scales
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import MEAN_VARIANCE
from bo.surrogates.surrogate import SURROGATES, Surrogate
from search_spaces import Fidelity, Mixture, Real, Space

NAMES = ("multi_task", "autoregressive", "product", "joint_input", "linear_truncated", "down_sampling")
LINE = Space(
    x=Real(0.0, 1.0),
    fidelity=Fidelity(params=(1e5, 4e5, 1.6e6), tokens=(1e6, 1e7), target={"params": 1.6e6, "tokens": 1e7}),
)
RICH = Space(
    lr=Real(1e-4, 1e-2, log=True),
    data=Mixture("code", "docs", "prose"),
    fidelity=Fidelity(params=(1e5, 4e5, 1.6e6), tokens=(1e6, 1e7), target={"params": 1.6e6, "tokens": 1e7}),
)

every = pytest.mark.parametrize("name", NAMES)


def module(name: str) -> ModuleType:
    assert SURROGATES[name] == f"bo.surrogates.{name}:fit"
    return import_module(f"bo.surrogates.{name}")


def runs(space: Space, n: int, seed: int = 0, cells: int | None = None) -> Inputs:
    """Random runs dealt to the cells in turn, the smallest first."""
    rng = np.random.default_rng(seed)
    assert space.fidelity is not None
    scales = space.fidelity.cells()[:cells]
    X = torch.as_tensor(space.encode_all(space.sample(rng, n)))
    index = torch.arange(n) % len(scales)
    return Features(space)(X, torch.as_tensor(places(space, scales))[index], index)


def prior(name: str, space: Space, inputs: Inputs, p: int = 1, seed: int = 0) -> Prior:
    """At random hyperparameters."""
    treatment = module(name).treatment(Features(space), inputs)
    layout = ScaleLayout.of_treatment(Features(space), inputs, treatment)
    low, high = np.maximum(np.array(layout.bounds), -2.5).T
    rng = np.random.default_rng(seed)
    return Prior(layout, treatment, torch.as_tensor(rng.uniform(low, np.minimum(high, 1.5), (p, len(low)))))


def point(x: float, S: Sequence[float], cell: int) -> Inputs:
    return Features(LINE)(torch.tensor([[x]]).double(), torch.tensor([list(S)]).double(), torch.tensor([cell]))


# ------------------------------------------------------------------------------------------------------- covariances


@every
@pytest.mark.parametrize("seed", range(3))
def test_covariances_are_positive_definite_at_scales_with_runs_and_without(name: str, seed: int) -> None:
    given_p = prior(name, RICH, runs(RICH, 12, seed, cells=4), 2, seed)
    everywhere = runs(RICH, 30, seed + 1)
    beyond = Inputs(everywhere.F, everywhere.on, everywhere.S + 1.0, everywhere.cell + 10)
    u = given_p.embed(everywhere.join(beyond))
    K = given_p.kernel(u, u)
    torch.testing.assert_close(K, K.mT)
    assert (torch.linalg.eigvalsh(K)[:, 0] > -1e-9 * K.diagonal(dim1=-2, dim2=-1).amax(-1)).all()


def matern52(distance: float) -> float:
    r = math.sqrt(5) * distance
    return (1 + r + r * r / 3) * math.exp(-r)


def tasks(own: Any, scales: Any, a: Inputs, b: Inputs) -> float:
    """Row 0 is of the smallest scale; neither point is of an unseen one."""
    w, v = own("loading"), np.exp(own("own"))
    i, j = scales(a), scales(b)
    return float(w[i] * w[j] + (v[i] if i == j else 0.0))


def chain(own: Any, scales: Any, a: Inputs, b: Inputs) -> float:
    """f_t by its own recursion: Cov(f_i, f_j) = rho_j Cov(f_i, f_(j-1)) for i < j."""
    rho, delta = own("rho"), np.exp(own("delta"))
    i, j = sorted((scales(a), scales(b)))
    variance = 1.0
    for t in range(i):
        variance = rho[t] ** 2 * variance + delta[t]
    return float(variance * np.prod(rho[i:j]))


def shrunk(own: Any, scales: Any, a: Inputs, b: Inputs) -> float:
    c, d = np.exp(own("offset")), np.exp(own("power"))
    s, t = (fractions(each) for each in (a, b))
    return float(np.prod(c + (1 - s) ** (1 + d) * (1 - t) ** (1 + d)))


def far(own: Any, scales: Any, a: Inputs, b: Inputs) -> float:
    return matern52(float(np.linalg.norm((a.S - b.S)[0].numpy() / reach() / np.exp(own("scale")))))


FACTORS: dict[str, Callable[[Any, Any, Inputs, Inputs], float]] = {
    "multi_task": tasks,
    "autoregressive": chain,
    "down_sampling": shrunk,
    "product": far,
}


def reach() -> np.ndarray:
    return np.array([4.0, math.log2(10)])


def fractions(at: Inputs) -> np.ndarray:
    found: np.ndarray = 1 + at.S[0].numpy() / reach()
    return found


PAIRS = [(0, 0), (0, 1), (1, 4), (2, 5), (5, 5), (3, 4)]


def pairs(name: str) -> Any:
    """The prior of runs in all six cells, how its hyperparameters are read, and pairs of points of it."""
    inputs = runs(LINE, 12)
    made = prior(name, LINE, inputs, seed=3)
    scales = Scales.of(Features(LINE), inputs)

    def own(block: str) -> np.ndarray:
        found: np.ndarray = made.own[block][0].numpy()
        return found

    for i, j in PAIRS:
        a, b = (inputs.rows(torch.tensor([k])) for k in (i, j + 6))
        K = float(made.kernel(made.embed(a), made.embed(b))[0, 0, 0])
        constant = MEAN_VARIANCE + float(made.own["level"].exp()) * (i == j)
        x = abs(float(a.F - b.F)) / float(made.hyper.lengthscale)
        yield own, lambda at: int(scales.row(at)), a, b, (K - constant) / float(made.hyper.amplitude), x


@pytest.mark.parametrize("name", FACTORS)
def test_the_covariance_is_that_of_one_scale_times_a_factor_of_the_scales(name: str) -> None:
    for own, scales, a, b, found, x in pairs(name):
        assert found == pytest.approx(FACTORS[name](own, scales, a, b) * matern52(x), rel=1e-9)


def test_joint_input_is_one_kernel_of_x_and_scale() -> None:
    for own, _, a, b, found, x in pairs("joint_input"):
        s = np.linalg.norm((a.S - b.S)[0].numpy() / reach() / np.exp(own("scale")))
        assert found == pytest.approx(matern52(math.hypot(x, s)), rel=1e-9)


def test_linear_truncated_is_the_target_and_a_bias_for_each_set_of_axes() -> None:
    for own, _, a, b, found, x in pairs("linear_truncated"):
        (s1, s2), (t1, t2) = fractions(a), fractions(b)
        p = float(np.exp(own("power")))
        one, two = (1 - s1) * (1 - t1), (1 - s2) * (1 - t2)

        def grown(z: float, p: float = p) -> float:
            return float((1 + z) ** math.floor(p) * (1 + (p - math.floor(p)) * z))

        factor = one * grown(s1 * t1) + two * grown(s2 * t2) + one * two * grown(s1 * t1 + s2 * t2)
        biased = matern52(abs(float(a.F - b.F)) / float(np.exp(own("biased"))[0]))
        assert found == pytest.approx(matern52(x) + float(np.exp(own("bias"))) * factor * biased, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of linear_operator, as it is imported
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_linear_truncated_is_botorchs_where_the_power_is_whole(p: float) -> None:
    from botorch.models.kernels import LinearTruncatedFidelityKernel

    inputs = runs(LINE, 12)
    made = prior("linear_truncated", LINE, inputs)
    made.own["power"].fill_(math.log(p))
    reference = LinearTruncatedFidelityKernel(fidelity_dims=[1, 2], dimension=3).double()
    reference.power = p
    reference.covar_module_unbiased.lengthscale = float(made.hyper.lengthscale)
    reference.covar_module_biased.lengthscale = float(made.own["biased"].exp())
    made.own["bias"].zero_()
    s = Scales.of(Features(LINE), inputs).fraction(inputs.S)
    points = made.points(made.embed(inputs))
    found = made.treatment.kernel(points, points, made.own)[0]
    torch.testing.assert_close(found, reference(torch.cat([inputs.F, s], -1)).to_dense().detach(), rtol=1e-6, atol=1e-8)


def test_a_power_that_is_not_whole_would_not_be_positive_definite_and_a_line_between_whole_ones_is() -> None:
    s = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    for p in (0.3, 0.7, 1.5):
        assert torch.linalg.eigvalsh((1 + s @ s.T) ** p)[0] < -1e-7
        line = linear_truncated.power((s @ s.T)[None], torch.tensor([p]).double())
        assert torch.linalg.eigvalsh(line)[0, 0] > -1e-12


@every
def test_only_tasks_and_chains_know_scales_that_are_opposite(name: str) -> None:
    inputs = runs(LINE, 12)
    shapes = []
    for seed in range(4):
        made = prior(name, LINE, inputs, seed=seed)
        points = made.points(made.embed(inputs))
        shapes.append(made.treatment.kernel(points, points, made.own))
    assert (torch.stack(shapes).min() < 0) == (name in ("multi_task", "autoregressive"))


def test_what_linear_truncated_says_of_the_target_is_the_kernel_of_one_scale() -> None:
    inputs = runs(LINE, 12)
    made = prior("linear_truncated", LINE, inputs)
    points, target = (made.points(made.embed(at)) for at in (inputs, inputs.rows(inputs.cell == 5)))
    torch.testing.assert_close(made.treatment.kernel(points, target, made.own), points.alike(target))


# ------------------------------------------------------------------------------------------------------------ scales


def test_scales_are_ordered_by_octaves_and_one_without_runs_comes_after_the_next_smaller() -> None:
    inputs = runs(LINE, 4)
    inputs = inputs.rows(torch.tensor([3, 0, 2]))  # of 4e5 by 1e7, 1e5 by 1e6 and 4e5 by 1e6
    scales = Scales.of(Features(LINE), inputs)
    assert scales.cell.tolist() == [0, 2, 3]
    assert scales.row(inputs).tolist() == [2, 0, 1]
    least, between, most = (point(0.5, S, cell) for S, cell in (([-9, -9], 7), ([-4, 0], 8), ([0, 0], 9)))
    assert [int(scales.row(at)) for at in (least, between, most)] == [3, 3 + 1, 3 + 2]


def test_fractions_are_linear_in_octaves_and_end_at_the_target() -> None:
    inputs = runs(LINE, 6)
    s = Scales.of(Features(LINE), inputs).fraction(
        torch.tensor([[-4.0, 0.0], [-2.0, 3.0], [-8.0, -math.log2(10) / 2]]).double()
    )
    torch.testing.assert_close(s, torch.tensor([[0.0, 1.0], [0.5, 1.0], [0.0, 0.5]]).double())
    flat = Scales(torch.tensor([0, 1]), torch.tensor([[-4.0, 0.0], [-2.0, 0.0]]).double(), 2)
    assert flat.fraction(flat.places)[:, 1].tolist() == [1.0, 1.0]


def with_another_study() -> Inputs:
    """Three runs each at the smallest scale, at the target, and at the target of another study."""
    S = torch.tensor([[-4.0, -math.log2(10), 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double()
    cell = torch.arange(9) % 3
    return Features(LINE)(torch.linspace(0, 1, 9, dtype=torch.float64)[:, None], S[cell], cell)


def test_another_study_at_the_target_comes_below_the_target() -> None:
    inputs = with_another_study()
    scales = Scales.of(Features(LINE), inputs)
    assert scales.cell.tolist() == [0, 2, 1]
    unseen = Scales.of(Features(LINE), inputs.rows(inputs.cell != 1)).row(inputs.rows(inputs.cell == 1))
    assert unseen.tolist() == [2 + 1] * 3  # the target without runs follows the other study, not the smallest scale


@pytest.mark.parametrize("name", ["linear_truncated", "down_sampling"])
def test_what_another_study_measures_is_not_the_target_itself(name: str) -> None:
    inputs = with_another_study()
    made = prior(name, LINE, inputs)
    points = made.points(made.embed(inputs))
    K = made.treatment.kernel(points, points, made.own)[0] / points.alike(points)[0]
    other, target = (int((inputs.cell == k).nonzero()[0, 0]) for k in (2, 1))
    assert float(K[other, other]) > 1.001 * float(K[target, target])


def test_terms_of_linear_truncated_grow_by_one_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    studies = 12
    S = torch.cat([torch.zeros(studies, 2), torch.eye(studies)], dim=-1).double()
    x = torch.linspace(0, 1, studies, dtype=torch.float64)[:, None]
    made = prior("linear_truncated", LINE, Features(LINE)(x, S, torch.arange(studies)))
    sets: list[Tensor] = []

    def power(product: Tensor, p: Tensor) -> Tensor:
        sets.append(p)
        return product

    monkeypatch.setattr(linear_truncated, "power", power)
    u = made.embed(Features(LINE)(x, S, torch.arange(studies)))
    made.kernel(u, u)
    assert len(sets) == 3 + studies


def bowls(inputs: Inputs) -> Tensor:
    Y = -(inputs.F[:, :1] - 0.5 - 0.03 * inputs.S.sum(-1, keepdim=True)).square() * 8
    return Y - Y.mean()


@every
def test_a_scale_without_runs_is_foretold_with_more_doubt_than_one_with_runs(name: str) -> None:
    inputs = runs(LINE, 20, cells=5)
    surrogate = module(name).fit(Features(LINE), inputs, bowls(inputs))
    with torch.no_grad():
        x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)[:, None]
        here, target = (
            Features(LINE)(x, torch.tensor([S]).double().expand(9, -1), torch.full((9,), cell))
            for S, cell in (([0.0, -math.log2(10)], 4), ([0.0, 0.0], 99))
        )
        (near, seen), (mean, unseen) = surrogate.posterior(here), surrogate.posterior(target)
    assert (unseen > seen).all()
    apart = (mean - mean.mean() - near + near.mean()).abs().max()
    assert float(apart) < float(near.max() - near.min())  # it is still like its neighbour


def test_an_unseen_scale_of_a_chain_has_the_mean_rho_and_the_doubt_of_it() -> None:
    inputs = runs(LINE, 12)
    made = prior("autoregressive", LINE, inputs, seed=5)
    rho, delta = made.own["rho"][0].mean(), made.own["delta"][0].exp().mean()
    last = inputs.rows(Scales.of(Features(LINE), inputs).row(inputs).argmax(keepdim=True))
    beyond = Inputs(last.F, last.on, last.S + 1, last.cell + 10)
    points = [made.points(made.embed(at)) for at in (last, beyond)]
    (before, cross), (_, own) = [[float(made.treatment.kernel(a, b, made.own)) for b in points] for a in points]
    assert cross == pytest.approx(float(rho) * before)
    assert own == pytest.approx(float(rho**2 + autoregressive.SPREAD**2) * before + float(delta))


# -------------------------------------------------------------------------------------------------------------- fits


@every
def test_within_one_cell_it_is_the_usual_process(name: str) -> None:
    inputs = runs(LINE, 8, cells=1)
    Y = bowls(inputs)
    found, usual = (fit(Features(LINE), inputs, Y).posterior(inputs) for fit in (module(name).fit, gp.fit))
    assert all(map(torch.equal, found, usual))


@every
def test_the_posterior_and_what_is_left_out_equal_a_plain_solve(name: str) -> None:
    inputs, at = runs(RICH, 14), runs(RICH, 6, 1)
    made = prior(name, RICH, inputs, 2, 1)
    Y = torch.randn(14, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    surrogate = made.given(Features(RICH), inputs, Y, {})
    K = made.kernel(made.embed(inputs), made.embed(inputs)) + made.hyper.noise[:, None, None] * torch.eye(14)
    cross = made.kernel(made.embed(at), made.embed(inputs))
    mean, variance = surrogate.posterior(at)
    expected = (cross @ torch.linalg.solve(K, Y.T[..., None])).squeeze(-1)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    reduced = made.kernel(made.embed(at), made.embed(at)) - cross @ torch.linalg.solve(K, cross.mT)
    torch.testing.assert_close(variance, reduced.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-5)
    kept = torch.arange(14) != 3
    others = made.given(Features(RICH), inputs.rows(kept), Y[kept], {})
    one, spread = others.posterior(inputs.rows(~kept))
    left, doubt = surrogate.leave_one_out()
    torch.testing.assert_close(left[3], one[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(doubt[3], spread[:, 0] + made.hyper.noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["autoregressive", "linear_truncated"])
def test_a_second_metric_changes_nothing_about_the_first(name: str) -> None:
    inputs = runs(LINE, 24)
    Y = torch.cat([bowls(inputs), torch.sin(7 * inputs.F)], dim=-1)
    both, alone = (module(name).fit(Features(LINE), inputs, Y[:, :p]).posterior(inputs)[0][0] for p in (2, 1))
    torch.testing.assert_close(both, alone, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["multi_task", "product"])
def test_hyperparameters_of_many_runs_are_kept_until_there_are_more_or_another_scale(name: str) -> None:
    inputs = runs(LINE, 112, cells=2)
    Y, fit = bowls(inputs), module(name).fit
    first = fit(Features(LINE), inputs.rows(torch.arange(108)), Y[:108]).memory()
    assert fit(Features(LINE), inputs, Y, first).memory() == first
    more = inputs.rows(torch.arange(108)).join(point(0.4, [-2.0, -math.log2(10)], 2))
    again = fit(Features(LINE), more, bowls(more), first).memory()
    assert (again["runs"], again["cells"]) == (109, 3)


def test_where_nearly_every_run_is_a_scale_levels_are_alike_where_they_are_near() -> None:
    inputs = runs(LINE, 12)
    apart = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    ranges = Inputs(inputs.F, inputs.on, -4 * torch.cat([apart, apart], dim=-1), torch.arange(12))
    made = prior("product", LINE, ranges)
    K = made.kernel(made.embed(ranges), made.embed(ranges))[0]
    points = made.points(made.embed(ranges))
    level = K - float(made.hyper.amplitude) * made.treatment.kernel(points, points, made.own)[0] - MEAN_VARIANCE
    distance = 2 * 16 * (apart - apart.T).square()
    expected = made.own["level"].exp() * (-0.5 * distance / made.own["reach"].exp().square()).exp()
    torch.testing.assert_close(level, expected, atol=1e-9, rtol=1e-6)
    assert torch.isfinite(module("product").fit(Features(LINE), ranges, bowls(ranges)).posterior(ranges)[0]).all()


# ------------------------------------------------------------------- two levels: 20 runs at the small, 5 at the large


def wave(rng: np.random.Generator, lengthscale: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function drawn from a process with a squared exponential kernel of unit variance."""
    slope, phase = rng.standard_normal(200) / lengthscale, rng.uniform(0, 2 * np.pi, 200)
    weight = rng.standard_normal(200) / 10
    return lambda x: np.asarray(np.cos(np.outer(x, slope) + phase) @ weight)


def toy(rho: float, own: float, seed: int, lengthscale: float) -> tuple[Inputs, Tensor, Inputs, Tensor]:
    """Runs of a small and a large scale, f_2 = rho f_1 + own g, and what more of the large ones measure."""
    rng = np.random.default_rng(seed)
    f, g = wave(rng, lengthscale), wave(rng, lengthscale)

    def large(x: np.ndarray) -> np.ndarray:
        return rho * f(x) + own * g(x)

    low, high = ((np.arange(k) + rng.uniform(0, 1, k)) / k for k in (20, 5))
    x, held = np.concatenate([low, high]), np.linspace(0.01, 0.99, 60)
    y = np.concatenate([f(low), large(high)]) + 0.01 * rng.standard_normal(25)
    truth = large(held) + 0.01 * rng.standard_normal(60)
    cell = torch.tensor([0] * 20 + [5] * 5 + [5] * 60)
    S = torch.tensor([[-4.0, -math.log2(10)], [0.0, 0.0]]).double()[(cell == 5).long()]
    every = Features(LINE)(torch.as_tensor(np.concatenate([x, held]))[:, None], S, cell)
    at = every.rows(torch.arange(25, 85))
    return every.rows(torch.arange(25)), torch.as_tensor(y)[:, None], at, torch.as_tensor(truth)


def foretold(surrogate: Surrogate, at: Inputs, truth: Tensor) -> tuple[float, float]:
    """Mean log density, and root mean square error."""
    with torch.no_grad():
        mean, variance = surrogate.posterior(at)
    error, spread = mean[0] - truth, variance[0] + surrogate.noise
    density = -0.5 * (error.square() / spread + (2 * math.pi * spread).log())
    return float(density.mean()), float(error.square().mean().sqrt())


def compared(name: str, rho: float, own: float, lengthscale: float, seeds: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Scores of the model and of the target alone, seeds x 2 each, and the model's hyperparameters."""
    ours, alone, memories = [], [], []
    for seed in range(seeds):
        inputs, Y, at, truth = toy(rho, own, seed, lengthscale)
        surrogate = module(name).fit(Features(LINE), inputs, Y)
        large = inputs.cell == 5
        memories.append({k: np.array(v) for k, v in surrogate.memory()["metrics"][0].items()})
        ours.append(foretold(surrogate, at, truth))
        alone.append(foretold(gp.fit(Features(LINE), inputs.rows(large), Y[large]), at, truth))
    return np.array(ours), np.array(alone), memories


seeds = pytest.mark.parametrize("seeds", [6, pytest.param(24, marks=pytest.mark.slow)])


def better(ours: np.ndarray, alone: np.ndarray) -> bool:
    """By log density, in the mean and most times."""
    return bool(ours[:, 0].mean() > alone[:, 0].mean()) and bool(np.mean(ours[:, 0] > alone[:, 0]) >= 0.75)


@seeds
@pytest.mark.parametrize("rho", [0.8, 1.3])
def test_a_chain_finds_rho_and_foretells_better_than_the_target_alone(rho: float, seeds: int) -> None:
    ours, alone, memories = compared("autoregressive", rho, 0.1, 0.2, seeds)
    assert np.median([memory["rho"][0] for memory in memories]) == pytest.approx(rho, rel=0.1)
    assert better(ours, alone)


@seeds
@pytest.mark.parametrize("rho", [0.8, 1.3])
def test_tasks_find_how_they_depend_and_foretell_better_than_the_target_alone(rho: float, seeds: int) -> None:
    ours, alone, memories = compared("multi_task", rho, 0.1, 0.2, seeds)
    w, v = (np.array([memory[name] for memory in memories]) for name in ("loading", "own"))
    slope = w[:, 0] * w[:, 1] / (w[:, 0] ** 2 + np.exp(v[:, 0]))  # B_12 / B_11
    assert np.median(slope) == pytest.approx(rho, rel=0.1)
    assert better(ours, alone)


@seeds
@pytest.mark.parametrize("name", ["autoregressive", "multi_task"])
def test_a_small_scale_that_is_the_opposite_of_the_large_one_helps(name: str, seeds: int) -> None:
    ours, alone, memories = compared(name, -1.0, 0.1, 0.2, seeds)
    assert ours[:, 1].mean() < 0.6 * alone[:, 1].mean()
    if name == "autoregressive":
        assert np.median([memory["rho"][0] for memory in memories]) == pytest.approx(-1.0, rel=0.1)


@seeds
@pytest.mark.parametrize("name", NAMES)
def test_a_small_scale_that_has_nothing_to_do_with_a_smooth_large_one_does_little_harm(name: str, seeds: int) -> None:
    ours, alone, _ = compared(name, 0.0, 1.0, 0.4, seeds)
    assert ours[:, 1].mean() < 1.05 * alone[:, 1].mean()
