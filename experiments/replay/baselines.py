"""A search at one scale to compare with, kept as it is whatever becomes of the engine; NumPy and SciPy only.

A Gaussian process with a constant mean and an ARD Matern-5/2 kernel, its hyperparameters by MAP: lengthscales
Gamma(3, 6), output scale Gamma(2, 0.15) (BoTorch's defaults up to 0.11), noise variance LogNormal(-4, 1) (its default
since 0.12). Losses are transformed by log1p(excess over the best / median excess), diverged runs count as the worst,
and the next run has the largest log-EI (Ament et al. 2023, arXiv 2310.20708). In two coordinates three space-filling
runs come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import erfcx, ndtr

from bo.policies.design import initial
from bo.ports import History, Proposal, Recommendation
from search_spaces import Mixture, Scale, Space

Array: TypeAlias = npt.NDArray[np.float64]

LEAST_NOISE = 1e-4
#: (log lengthscale, log output scale, log noise) that a fit starts from.
STARTS = ((-1.0, 0.7, -5.0), (0.0, 0.7, -3.0), (-2.0, 0.0, -5.0))
DRAWN, KEPT, NEAR, STEPS = 2048, 8, 48, (0.1, 0.03, 0.01, 0.003)


def transform(losses: Array) -> Array:
    """n losses, of which some may be infinite or NaN -> n values, larger is better, standardised."""
    finite = np.isfinite(losses)
    excess = losses[finite] - losses[finite].min()
    unit = float(np.median(excess[excess > 0])) if (excess > 0).any() else 1.0
    values = np.full(len(losses), np.log1p(excess.max() / unit))
    values[finite] = np.log1p(excess / unit)
    return np.asarray((values.mean() - values) / (values.std() or 1.0))


def correlation(A: Array, B: Array, lengths: Array) -> tuple[Array, Array]:
    """The Matern-5/2 correlation of n x d and m x d points, and its derivative by -(distance in lengths)^2 / 2."""
    r = np.sqrt(5 * np.square((A[:, None] - B) / lengths).sum(-1))
    decay = np.exp(-r)
    return (1 + r + r**2 / 3) * decay, 5 / 3 * (1 + r) * decay


def negative_log_posterior(theta: Array, X: Array, y: Array) -> tuple[float, Array]:
    """Of the logarithms (d lengthscales, output scale, noise) given n x d points and n values; and its gradient.

    The mean is the one that makes the values likeliest.
    """
    d = X.shape[1]
    lengths, scale, noise = np.exp(theta[:d]), math.exp(theta[d]), math.exp(theta[d + 1])
    M, slope = correlation(X, X, lengths)
    try:
        L = cholesky(scale * M + noise * np.eye(len(X)), lower=True)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(theta)
    weights, _ = solved(L, y)
    inner = np.outer(weights, weights) - cho_solve((L, True), np.eye(len(X)))
    value = -0.5 * float(y @ weights) - float(np.log(np.diag(L)).sum())  # the mean is orthogonal to the weights
    prior = float((2 * theta[:d] - 6 * lengths).sum()) + theta[d] - 0.15 * scale
    prior += -theta[d + 1] - 0.5 * (theta[d + 1] + 4) ** 2
    gaps = np.square((X[:, None] - X) / lengths)  # n x n x d
    gradient = np.empty_like(theta)
    gradient[:d] = 0.5 * scale * np.einsum("ij,ijk->k", inner * slope, gaps) + 2 - 6 * lengths
    gradient[d] = 0.5 * scale * float((inner * M).sum()) + 1 - 0.15 * scale
    gradient[d + 1] = 0.5 * noise * float(np.trace(inner)) - 1 - (theta[d + 1] + 4)
    return -float(value + prior), -gradient


def solved(L: Array, y: Array) -> tuple[Array, float]:
    """K^-1 (y - mean) and the mean, with K = L L^T."""
    ones = cho_solve((L, True), np.ones(len(y)))
    mean = float(ones @ y / ones.sum())
    return cho_solve((L, True), y - mean), mean


@dataclass(frozen=True)
class Process:
    """The posterior given n x d points and n values."""

    X: Array
    theta: Array
    L: Array
    weights: Array
    mean: float

    @classmethod
    def fit(cls, X: Array, y: Array) -> Process:
        d = X.shape[1]
        bounds = [(-4.0, 3.0)] * d + [(-4.0, 5.0), (math.log(LEAST_NOISE), 1.0)]
        found = [
            minimize(
                negative_log_posterior,
                np.array([length] * d + [scale, noise]),
                args=(X, y),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
            )
            for length, scale, noise in STARTS
        ]
        return cls.given(X, y, np.asarray(min(found, key=lambda each: float(each.fun)).x))

    @classmethod
    def given(cls, X: Array, y: Array, theta: Array) -> Process:
        d = X.shape[1]
        M, _ = correlation(X, X, np.exp(theta[:d]))
        L = cholesky(math.exp(theta[d]) * M + math.exp(theta[d + 1]) * np.eye(len(X)), lower=True)
        return cls(X, theta, L, *solved(L, y))

    def __call__(self, A: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the noise-free values at m x d points."""
        d = self.X.shape[1]
        scale = math.exp(self.theta[d])
        cross = scale * correlation(A, self.X, np.exp(self.theta[:d]))[0]
        left = solve_triangular(self.L, cross.T, lower=True)
        return self.mean + cross @ self.weights, np.sqrt(np.maximum(scale - np.square(left).sum(0), 1e-12))


def log_ei(mean: Array, sd: Array, best: float) -> Array:
    """log E[max(f - best, 0)] of f ~ N(mean, sd^2), exact far into the tail (Ament et al. 2023, equation 9)."""
    u = (mean - best) / sd
    near, far = np.maximum(u, -1.0), np.minimum(u, -1.0)
    density = np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi)
    tail = np.where(far > -1e4, 1 + far * math.sqrt(math.pi / 2) * erfcx(-np.maximum(far, -1e4) / math.sqrt(2)), 1.0)
    logs = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) + np.where(far > -1e4, np.log(tail), -2 * np.log(-far))
    return np.where(u > -1, np.log(density + near * ndtr(near)), logs) + np.log(sd)


# -------------------------------------------------------------------------------------------------------- as a policy


class Domain(Protocol):
    """Where is searched: points are n x d arrays."""

    def point(self, config: Mapping[str, Any]) -> Array: ...

    def config(self, point: Array) -> dict[str, Any]: ...

    def seen(self, points: Array) -> Array:
        """What the process sees of points."""

    def draw(self, rng: np.random.Generator) -> Array: ...

    def near(self, points: Array, step: float, rng: np.random.Generator) -> Array: ...


@dataclass(frozen=True)
class Cube:
    """Numbers: points of the unit cube, logarithms taken where the space says so."""

    space: Space

    def point(self, config: Mapping[str, Any]) -> Array:
        return np.asarray(self.space.encode(config))

    def config(self, point: Array) -> dict[str, Any]:
        return self.space.decode(point)

    def seen(self, points: Array) -> Array:
        return points

    def draw(self, rng: np.random.Generator) -> Array:
        return rng.random((DRAWN, len(self.space.columns)))

    def near(self, points: Array, step: float, rng: np.random.Generator) -> Array:
        return np.clip(points + step * rng.standard_normal(points.shape), 0, 1)


@dataclass(frozen=True)
class Shares:
    """One mixture: its shares, of which the process sees the cube roots."""

    name: str
    sources: tuple[str, ...]

    def point(self, config: Mapping[str, Any]) -> Array:
        return np.array([config[self.name][source] for source in self.sources])

    def config(self, point: Array) -> dict[str, Any]:
        return {self.name: dict(zip(self.sources, (point / point.sum()).tolist(), strict=True))}

    def seen(self, points: Array) -> Array:
        return np.cbrt(points)

    def draw(self, rng: np.random.Generator) -> Array:
        k = len(self.sources)
        return np.concatenate([rng.dirichlet(np.full(k, alpha), DRAWN // 4) for alpha in (0.1, 0.3, 1.0, 3.0)])

    def near(self, points: Array, step: float, rng: np.random.Generator) -> Array:
        moved = np.maximum(points + step * rng.standard_normal(points.shape), 0)
        moved[moved.sum(1) == 0] = 1.0
        return np.asarray(moved / moved.sum(1, keepdims=True))


def domain(space: Space) -> Domain:
    mixtures = [(name, each) for name, each in space.parameters.items() if isinstance(each, Mixture)]
    if not mixtures:
        return Cube(space)
    if len(space.parameters) > 1:
        raise ValueError(f"The baseline searches numbers or one mixture, got {list(space.parameters)}.")
    ((name, mixture),) = mixtures
    return Shares(name, mixture.names)


@dataclass(frozen=True)
class Frozen:
    """Runs at the top scale by the process above; runs at other scales are not looked at.

    n_init: space-filling runs, those of every policy; by default 2 and one more for every three coordinates.
    """

    n_init: int | None = None

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        space = history.space
        here = [trial for trial in history.trials if trial.scale == space.top and trial.told]
        if len(here) < (self.n_init or 2 + math.ceil(len(space.columns) / 3)):
            return initial(history, 1, rng)
        where = domain(space)
        X = np.array([where.point(trial.config) for trial in here])
        y = transform(np.array([trial.metrics["loss"] if trial.metrics else math.nan for trial in here]))
        process = Process.fit(where.seen(X), y)

        def best(points: Array) -> Array:
            values = log_ei(*process(where.seen(points)), float(y.max()))
            return np.asarray(points[np.argsort(-values, kind="stable")[:KEPT]])

        points = best(where.draw(rng))
        for step in STEPS:
            points = best(np.concatenate([points, where.near(np.repeat(points, NEAR, axis=0), step, rng)]))
        return (Proposal(where.config(points[0]), space.top, "frozen", memory=history.memory),)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        raise NotImplementedError("This one only proposes.")
