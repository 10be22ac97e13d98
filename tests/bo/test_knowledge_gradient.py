from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from bo import Minimize, dataset
from bo.acquisition import knowledge_gradient
from bo.acquisition.acquisition import Situation
from bo.acquisition.knowledge_gradient import envelope, levels, lines, log_gain, one_shot
from bo.ports import History
from bo.surrogates import composite
from bo.trial import Trial
from search_spaces import Choice, Real, Space

LINE = Space(x=Real(0, 1))
CUBE = Space(x=Real(0, 1), y=Real(0, 1), z=Real(0, 1))


def situation(space: Space, n: int, noise: float = 0.1, seed: int = 0) -> Situation:
    rng = np.random.default_rng(seed)
    trials = []
    for i, config in enumerate(space.sample(rng, n)):
        x = space.encode(config)
        loss = float(((x - 0.4) ** 2).sum() + 0.5 * np.sin(9 * x[0]) + noise * rng.standard_normal())
        trials.append(Trial(i, config, space.top, 0, "sobol", status="finished", metrics={"loss": loss}))
    data = dataset.from_history(History(space, Minimize("loss"), tuple(trials)))
    belief = composite.fit(data).at(space.top)
    none = torch.zeros(0, len(space.columns), dtype=torch.float64)
    return Situation(space, belief, belief, data.X, none, n, 1.0, rng)


def gain(a: Any, b: Any) -> float:
    """E max_i(a_i + b_i Z) - max_i a_i for m lines, in O(m log m) by sorting slopes."""
    steepest = sorted({slope: level for level, slope in sorted(zip(a.tolist(), b.tolist(), strict=True))}.items())
    kept: list[tuple[float, float, float]] = []  # slope, level, where it begins to be the highest
    for slope, level in steepest:
        start = -math.inf
        while kept:
            start = (kept[-1][1] - level) / (slope - kept[-1][0])
            if start > kept[-1][2]:
                break
            kept.pop()
            start = -math.inf
        kept.append((slope, level, start))
    total = 0.0
    for (low, _, _), (high, _, start) in itertools.pairwise(kept):
        z = -abs(start)
        density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        total += (high - low) * (density + z * 0.5 * math.erfc(-z / math.sqrt(2)))
    return total


def by_quadrature(a: Any, b: Any) -> float:
    """Piecewise between all crossings, so that no kink falls into a panel."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    crossings = [(a[i] - a[j]) / (b[j] - b[i]) for i in range(len(a)) for j in range(i) if b[i] != b[j]]
    edges = np.unique(np.clip([-12.0, 0.0, 12.0, *crossings], -12, 12))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        for left in np.linspace(low, high, 9)[:-1]:
            half = (high - low) / 16
            z = left + half * (nodes + 1)
            total += half * float(weights @ ((a[:, None] + b[:, None] * z).max(0) * norm.pdf(z)))
    return total - float(a.max())


# --------------------------------------------------------------------------------------------------- expected maximum


@pytest.mark.parametrize("seed", range(8))
def test_the_exact_gain_equals_quadrature_and_is_never_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal(9) * 10.0 ** rng.integers(-2, 2), rng.standard_normal(9)
    if seed % 2:
        b[3], a[4], b[5], a[5] = b[2], a[1], b[6], a[6]  # parallel lines, equal means, a line twice
    exact = by_quadrature(a, b)
    assert gain(a, b) == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert gain(a, b) >= 0
    assert math.exp(float(log_gain(torch.tensor(a)[None], torch.tensor(b)[None]))) == pytest.approx(
        exact, rel=1e-6, abs=1e-12
    )


def test_many_rows_of_lines_agree_with_sorting_each() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 40)), 0.3 * rng.standard_normal((200, 40))
    b[:50] = np.round(b[:50], 1)
    found = log_gain(torch.tensor(a), torch.tensor(b)).exp().numpy()
    assert found == pytest.approx(np.array([gain(x, y) for x, y in zip(a, b, strict=True)]), rel=1e-9, abs=1e-13)


def test_the_envelope_goes_from_the_least_slope_to_the_largest() -> None:
    a = torch.tensor([[0.0, 1.0, 0.0, -5.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    assert envelope(a, b).tolist() == [[0, 1, 2]]


def test_what_is_less_than_the_best_line_counts_what_is_above_it() -> None:
    a = torch.tensor([[0.0, 0.3]], dtype=torch.float64)
    b = torch.tensor([[0.1, 0.4]], dtype=torch.float64)
    assert float(log_gain(a, b, torch.tensor(0.0)).exp()) == pytest.approx(float(log_gain(a, b).exp()) + 0.3)


@pytest.mark.parametrize("gap", [1e-3, 0.5, 5.0, 60.0, 1e5])
def test_the_log_gain_has_slopes_where_the_gain_underflows(gap: float) -> None:
    a = torch.tensor([[0.0, -gap, -2 * gap - 0.1]], dtype=torch.float64)
    b = torch.tensor([[0.1, 0.7, -0.4]], dtype=torch.float64)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return log_gain(a, b, a[:, 0])

    at = (a.clone().requires_grad_(), b.clone().requires_grad_())
    found = torch.cat(torch.autograd.grad(value(*at).sum(), at))
    assert torch.isfinite(found).all()
    for row, (one, other) in enumerate([(a, b), (b, a)]):
        for i in range(1, 3):
            step = torch.zeros_like(one)
            step[0, i] = 1e-6 * max(1.0, gap if row == 0 else 1.0)
            ends = [value(one + s * step, other) if row == 0 else value(other, one + s * step) for s in (-1, 1)]
            expected = float(ends[1] - ends[0]) / (2 * float(step[0, i]))
            assert float(found[row, i]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_lines_that_are_all_alike_gain_next_to_nothing_and_stay_finite() -> None:
    a = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = log_gain(a, torch.ones(2, 3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(value.sum(), a)
    assert (value < -1e6).all()
    assert torch.isfinite(slope).all()


# ------------------------------------------------------------------------------------------------ knowledge gradient


def test_the_exact_gradient_on_a_grid_equals_fantasies_whose_inner_problem_is_solved() -> None:
    belief = situation(LINE, 6).belief
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    X = torch.tensor([[0.1], [0.45], [0.83]], dtype=torch.float64)
    now = belief.value(grid)[0]
    best = now.max()
    a, b = lines(belief, X, grid, now)
    exact = log_gain(a[:, :-1], b[:, :-1], best).exp()
    z = torch.as_tensor(np.random.default_rng(0).standard_normal(2000))
    after = a[:, None, :-1] + b[:, None, :-1] * z[:, None]  # b x f x m
    inner = grid[after.argmax(-1)]  # b x f x d
    parts = zip(inner.split(50, dim=1), z.split(50), strict=True)
    sampled = torch.stack([one_shot(belief, X, *part) for part in parts]).mean(0) - best
    error = after.max(-1).values.std(-1) / math.sqrt(len(z))
    assert ((sampled - exact).abs() <= 3 * error).all()


@dataclass(frozen=True)
class Library:
    """A belief over a model of BoTorch's."""

    model: Any

    def value(self, X: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.posterior(X[:, None])
        return posterior.mean[:, 0, 0], posterior.variance[:, 0, 0].sqrt()

    def covariance(self, X: Tensor, Z: Tensor) -> Tensor:
        whole = self.model.posterior(torch.cat([X, Z])).distribution.covariance_matrix
        return whole[: len(X), len(X) :]

    @property
    def noise(self) -> Tensor:
        return self.model.likelihood.noise[0].detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the libraries say about themselves when they are imported
def test_the_exact_gradient_agrees_with_botorch() -> None:
    from botorch.acquisition.knowledge_gradient import qKnowledgeGradient
    from botorch.models import SingleTaskGP
    from botorch.sampling.normal import IIDNormalSampler
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood

    rng = np.random.default_rng(0)
    X = torch.as_tensor(rng.random((8, 1)))
    Y = torch.sin(8 * X) + 0.1 * torch.as_tensor(rng.standard_normal((8, 1)))
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-6))
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    model = SingleTaskGP(X, Y, likelihood=likelihood, covar_module=kernel, outcome_transform=None).double()
    kernel.base_kernel.lengthscale, kernel.outputscale, likelihood.noise = 0.2, 1.0, 0.05
    model.eval()
    belief: Any = Library(model)
    grid = torch.linspace(0, 1, 301, dtype=torch.float64)[:, None]
    at = torch.tensor([[0.3], [0.7]], dtype=torch.float64)
    with torch.no_grad():
        now = belief.value(grid)[0]
        best = now.max()
        a, b = lines(belief, at, grid, now)
        exact = log_gain(a, b, best).exp()
        fantasies = 1024
        sampler = IIDNormalSampler(sample_shape=torch.Size([fantasies]), seed=0)
        theirs = qKnowledgeGradient(model, num_fantasies=fantasies, sampler=sampler, current_value=best)
        for x, ours in zip(at, exact, strict=True):
            fantasy = model.fantasize(X=x[None], sampler=sampler)
            means = fantasy.posterior(grid).mean[..., 0]  # f x m
            inner = grid[means.argmax(-1)]
            value = float(theirs(torch.cat([x[None], inner])[None]))
            error = float(means.max(-1).values.std()) / math.sqrt(fantasies)
            assert abs(value - float(ours)) <= 3 * error


def test_the_hybrid_gradient_is_nearly_that_of_a_fine_grid_and_no_less_than_the_discrete_one() -> None:
    here = situation(CUBE, 10)
    rng = np.random.default_rng(3)
    X = torch.as_tensor(rng.random((12, 3)))
    grid = torch.as_tensor(rng.random((20_000, 3)))
    a, b = lines(here.belief, X, grid, here.belief.value(grid)[0])
    hybrid, discrete = (
        make(replace(here, rng=np.random.default_rng(5)))(X)
        for make in (knowledge_gradient.make, knowledge_gradient.make_discrete)
    )
    assert (hybrid >= discrete - 1e-9).all()
    best = torch.maximum(here.belief.value(grid)[0].max(), here.belief.value(here.tried)[0].max())
    exact = log_gain(a, b, best)
    assert float((hybrid - exact).median().abs()) < 0.15


def test_slopes_of_the_hybrid_gradient_are_nearly_right_though_what_was_climbed_to_is_held() -> None:
    acquisition = knowledge_gradient.make(situation(CUBE, 10), steps=20)
    X = torch.as_tensor(np.random.default_rng(4).random((6, 3))).requires_grad_()
    (slope,) = torch.autograd.grad(acquisition(X).sum(), X)
    with torch.no_grad():
        for i in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[i] = 1e-4
            expected = (acquisition(X + step) - acquisition(X - step)) / 2e-4
            assert float((slope[:, i] - expected).abs().median()) < 0.1 * float(expected.abs().max())


def test_the_one_shot_gradient_ranks_runs_as_the_hybrid_one() -> None:
    here = situation(CUBE, 10)
    X = torch.as_tensor(np.random.default_rng(6).random((25, 3)))
    with torch.no_grad():
        hybrid = knowledge_gradient.make(here)(X).exp()
        shot = knowledge_gradient.make_one_shot(here, fantasies=16)(X).exp()
    assert np.corrcoef(hybrid.numpy(), shot.numpy())[0, 1] > 0.95


def test_a_run_with_more_noise_is_worth_less() -> None:
    belief = situation(LINE, 6).belief
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    a, b = lines(belief, grid[::10], grid, belief.value(grid)[0])
    _, sd = belief.value(grid[::10])
    total = (sd.square() + belief.noise).sqrt()
    noisier = b * (total / (sd.square() + 4 * belief.noise + 0.1 * sd.max() ** 2).sqrt())[:, None]
    assert (log_gain(a, noisier) <= log_gain(a, b)).all()


def test_climbing_stays_in_the_space_and_changes_no_choice() -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1), c=Choice("a", "b"), constraints=["x + y <= 1"])
    starts = torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(0), 10)))

    def value(x: Tensor) -> Tensor:
        return x[..., 0] + 2 * x[..., 1] + x[..., 2]

    ends = knowledge_gradient.climb(space, value, starts[None], 20)[0]
    assert torch.equal(ends[:, 2], starts[:, 2])
    assert space.satisfies(space.decode_all(ends.numpy())).all()
    assert (value(ends) > value(starts)).all()


def test_quantiles_are_in_the_middle_of_equally_likely_parts() -> None:
    z = levels(5)
    assert torch.allclose(torch.special.ndtr(z), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
