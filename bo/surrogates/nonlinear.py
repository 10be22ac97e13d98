"""What is believed of an objective that is no sum of the modelled metrics: the largest of them, a user's function.

Every metric keeps its own process, whose posterior is Gaussian; the objective's is not. It is looked at by samples: the
posterior of the metrics at a point is drawn with fixed quasi-random normals, the metrics' transform is undone on every
draw, and the objective is taken of it, as Astudillo and Frazier, "Bayesian Optimization of Composite Functions", ICML
2019, section 3, do. What criteria ask for are moments, so the draws are summed up by their mean and deviation. Between
points they are correlated as the objective's linear part is, by the slopes that fit the draws best (statistical
linearisation: Gelb, "Applied Optimal Estimation", 1974, section 6.2).

Expected improvement of those moments is what it is of a Gaussian; the true one is a little less where the objective is
the largest of metrics, since good luck has to strike them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bo.dataset import Columns, Level, Outcome, compress, expand
from bo.objective import Function
from bo.quasirandom import normal_points
from bo.surrogates.belief import Belief
from search_spaces.parameter import Array

#: Draws for the moments at a point, and for the quantiles of one prediction. At least so many times the metrics.
SAMPLES, MANY, TIMES = 64, 1024, 4
#: Half the distance of the two points of a difference, in deviations of a metric: as `differences.STEP`.
STEP = 1e-5


@dataclass(frozen=True)
class NonlinearBelief(Belief):
    """A `Belief` about an objective of the metrics that is no weighted sum of what is modelled.

    It is in user units up to where the objective counts as exploded; beyond, it is compressed as a metric is, so that
    the far tail of a bad configuration does not decide. A function that gives no number counts as the worst run does.

    weight: as for metrics alone. outcome, level: the transform of the metrics, and where they lie at the scale.
    least: the best value of the objective there, shape (). worst: of the told runs, shape (). leading: the metrics of
    the best told run, model units, p. normal: s x p standard normals with the metrics' correlation.
    """

    outcome: Outcome
    level: Level
    least: Tensor
    worst: Tensor
    leading: Tensor
    normal: Tensor

    @classmethod
    def over(cls, belief: Belief, outcome: Outcome, level: Level, Y: Tensor, least: Tensor | None) -> NonlinearBelief:
        """Y: n x p, the told runs. least: None where nothing was run at the scale."""
        values = objective(outcome)(outcome.backward(Y, level)[0])
        counted = torch.where(torch.isfinite(values), values, torch.inf)
        told = values[torch.isfinite(values)]
        if least is None or not torch.isfinite(least):
            middle = objective(outcome)(level.best[None])[0]
            least = middle if torch.isfinite(middle) else told.min()
        worst = torch.maximum(told.max(), least) if len(told) else least
        given = {f.name: getattr(belief, f.name) for f in fields(belief)}
        normal = normals(SAMPLES, belief.correlation)
        return cls(
            **given, outcome=outcome, level=level, least=least, worst=worst, leading=Y[counted.argmin()], normal=normal
        )

    def value(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at b x d points: b each."""
        mean, sd, _ = self.moments(*self.surrogate.posterior(self.inputs(X)))
        return mean, sd

    def mean(self, X: Tensor) -> Tensor:
        """Mean at b x d points: b."""
        return self.value(X)[0]

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b x q) and covariance (b x q x q) of b groups of q points, X: b x q x d."""
        b, q, d = X.shape
        metrics, covariance = self.surrogate.joint(self.inputs(X.reshape(b * q, d)), q)
        variance = covariance.diagonal(dim1=-2, dim2=-1)  # p x b x q
        p = len(variance)
        mean, sd, slope = self.moments(metrics.reshape(p, b * q), variance.reshape(p, b * q))
        slope = slope.reshape(p, b, q)
        summed = torch.einsum("pbq,pbqr,pbr->bqr", slope, covariance, slope)
        # Nothing but rounding, except where there is no slope.
        lost = sd.reshape(b, q).square() - summed.diagonal(dim1=-2, dim2=-1)
        return mean.reshape(b, q), summed + torch.diag_embed(lost)

    def covariance(self, X: Tensor, Z: Tensor) -> Tensor:
        """Between b x d and k x d points: b x k."""
        at, other = self.inputs(X), self.inputs(Z)
        slopes = [self.moments(*self.surrogate.posterior(inputs))[2] for inputs in (at, other)]
        return torch.einsum("pb,pbk,pk->bk", slopes[0], self.surrogate.covariance(at, other), slopes[1])

    @property
    def noise(self) -> Tensor:
        """Variance of what one run measures about the objective there, near the best told run, shape ()."""
        with torch.no_grad():
            _, sd, _ = self.moments(self.leading[:, None], self.surrogate.noise[:, None])
        return sd[0].square()

    def interval(self, x: Tensor, wider: float) -> tuple[float, float, float]:
        """What a run at x (d,) will measure, minimised: centre, and a 90% interval with noise.

        wider: how much larger deviations count than the model has them. Levels of a scale that was never run are
        guesses that fail together.
        """
        with torch.no_grad():
            mean, variance = self.surrogate.posterior(self.inputs(x[None]))
            centre = float(self.minimised(self.moments(mean, variance)[0])[0])
            p = len(mean)
            together = torch.eye(p + 1, dtype=torch.float64)
            together[:p, :p] = self.correlation
            normal = normals(MANY, together)
            y = mean[:, 0] + wider * (variance[:, 0] + self.surrogate.noise).sqrt() * normal[:, :p]
            u = self.outcome.backward(y, self.level)[0] + normal[:, p:] * self.level.sd
            drawn = self._finite(objective(self.outcome)(u))
            low, high = torch.quantile(drawn, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        return centre, min(low, centre), max(high, centre)

    def minimised(self, utility: Tensor) -> Tensor:
        """The objective in the user's unit, minimised, of what it is worth here, elementwise."""
        return self.least + self.size * expand(-utility / self.size, self._reach)

    @property
    def size(self) -> Tensor:
        """What excesses over the best are measured in, shape ()."""
        return self.least if self.outcome.relative else torch.ones_like(self.least)

    @property
    def _reach(self) -> Tensor:
        assert self.outcome.reach is not None
        return self.outcome.reach

    def moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation (b) of the objective, larger is better, and its slopes in the metrics: p x b.

        Of metrics (p x b each). The slopes are scaled so that independent metrics make up all the deviation.
        """
        sd = variance.clamp_min(1e-300).sqrt()
        y = mean.T + self.normal[:, None] * sd.T  # s x b x p
        value = self._finite(objective(self.outcome)(self.outcome.backward(y, self.level)[0]))
        utility = -self.size * compress((value - self.least) / self.size, self._reach)  # s x b
        centre = utility.mean(0)
        apart = utility - centre
        spread = apart.square().mean(0).clamp_min(1e-300).sqrt()
        shared = self.normal.T @ apart / len(apart)  # p x b
        slope = torch.linalg.solve(self.correlation, shared) / sd
        explained = (slope * sd).square().sum(0).clamp_min(1e-300).sqrt()
        return centre, spread, slope * spread / explained

    def _finite(self, value: Tensor) -> Tensor:
        return torch.where(torch.isfinite(value), value, self.worst)


def normals(least: int, correlation: Tensor) -> Tensor:
    """Quasi-random points (s x p) of normals with mean 0 and just this correlation, always the same; s >= least.

    Their first two moments are exact, and so are those of a sum of them.
    """
    p = len(correlation)
    s = max(least, 1 << (TIMES * p - 1).bit_length())
    normal = normal_points(p, s, seed=0)
    normal = normal - normal.mean(0)
    root = torch.linalg.cholesky(normal.T @ normal / s)
    white: Tensor = torch.linalg.solve_triangular(root, normal.T, upper=False)
    drawn: Tensor = torch.linalg.cholesky(correlation) @ white
    return drawn.T


def objective(outcome: Outcome) -> Callable[[Tensor], Tensor]:
    """The minimised objective as a function of u, ... x p -> ..., with gradients; NaN where a `Function` has none."""
    columns = outcome.columns
    if columns is None or columns.nonlinear is None:
        return lambda u: u @ outcome.weight
    if isinstance(columns.nonlinear, Function):
        return _by_the_user(columns.nonlinear, columns, outcome.sd)
    k = len(columns.names)
    weight = outcome.weight[:k]
    return lambda u: (u[..., :k] * weight).max(-1).values


def _by_the_user(function: Function, columns: Columns, unit: Tensor) -> Callable[[Tensor], Tensor]:
    names, logs = columns.names, np.array(columns.logs)
    k = len(names)
    step = STEP * unit[:k].numpy()

    def values(u: Array) -> Array:
        """Of N x k metrics, logarithms as they come: N."""
        with np.errstate(all="ignore"):
            metrics = np.where(logs, np.exp(np.where(logs, u, 0.0)), u)
            return np.array([function.of(dict(zip(names, row, strict=True))) for row in metrics.tolist()])

    def called(u: Tensor) -> Tensor:
        value: Tensor = _Called.apply(u[..., :k].reshape(-1, k), values, step)  # type: ignore[no-untyped-call]
        return value.reshape(u.shape[:-1])

    return called


class _Called(torch.autograd.Function):
    """N x k -> N by numpy, with central differences as gradient; none where a neighbour has no number."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, values: Callable[[Array], Array], step: Array) -> Tensor:
        at = u.detach().numpy()
        N, k = at.shape
        if not ctx.needs_input_grad[0]:
            return torch.as_tensor(values(at))
        moved = at[None, None] + np.stack([np.diag(step), -np.diag(step)])[:, :, None]  # 2 x k x N x k
        found = values(np.concatenate([at, moved.reshape(-1, k)]))
        up, down = found[N:].reshape(2, k, N)
        slope = (up - down) / (2 * step[:, None])
        ctx.slope = torch.as_tensor(np.where(np.isfinite(slope), slope, 0.0))  # k x N
        return torch.as_tensor(found[:N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.slope * gradient).T, None, None
