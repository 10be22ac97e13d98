"""A Gaussian process over scales in which each is a function of the point and of the one below, f_t = g_t(x, f_(t-1)).

Perdikaris, Raissi, Damianou, Lawrence, Karniadakis 2017, "Nonlinear information fusion algorithms for data-efficient
multi-fidelity modelling", Proc. R. Soc. A 473, section 2: the covariance of g_t is k_rho(x, x') k_f(f, f') + k_delta(x,
x'), all Matern-5/2 here. Levels are fitted one after the other, each given the posterior mean of the one below at its
own runs, so that runs need not be nested. Four things differ, since there are often but two runs at the target:

- g_t has the mean f, and k_f a linear term too (Cutajar et al. 2019, arXiv 1903.07320, section 3): a scale is as the
  one below, or proportional to it, until its runs say otherwise, where a zero mean would forget all far from them;
- the lengthscales of k_rho are those of k_delta times one factor;
- a level whose runs are likelier without the one below stands alone;
- levels are at most six: `Levels` puts scales together.

The posterior at a level is no Gaussian. Its moments are those of fixed quasi-random draws through the levels below, the
last step in closed form. Covariances are those of the linearised chain, by the slopes that fit the draws best,
stretched to their variances, as for objectives that are no sums (`bo.surrogates.nonlinear`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import gp
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN, SETTLED, bend, remembered, sought
from bo.surrogates.hyperparameters import MEAN_VARIANCE, Block, Hyper, Layout, NumericalError
from bo.surrogates.levels import Levels
from bo.surrogates.nonlinear import normals
from bo.surrogates.process import Process, factor, lift, log_likelihood, matern
from bo.surrogates.surrogate import Surrogate
from search_spaces.parameter import Array

#: Levels at most, and runs of each but the target's at least. What drifts is blurred where scales are put together: on
#: real losses at six scales four levels foretold the target worse than six.
LEVELS, FEWEST = 6, 4
#: Draws through the levels, and steps of the fit of one.
DRAWS, ITERATIONS = 32, 60
#: Prior medians of the amplitude of k_delta, and variance of the level of a scale about that of the one below.
DIFFERENT, LEVEL = 0.2, 0.25
#: Least variance of what is drawn: the root of zero has no slope.
TINY = 1e-12


@dataclass(frozen=True)
class RelationLayout(Layout):
    """The hyperparameters of one scale, where the amplitude is that of k_delta, then those of k_rho k_f.

    slope: variance of the slope in f about one. curve: of k_f but for its linear term. width: the lengthscale of k_f.
    reach: lengthscales of k_rho over those of k_delta.
    """

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        ln = math.log
        usual = [replace(b, mean=ln(DIFFERENT)) if b.name == "amplitude" else b for b in super().blocks]
        return (
            *usual,
            Block("slope", (), ln(0.3), 1.5, ln(1e-3), ln(30.0)),
            Block("curve", (), ln(0.1), 1.5, ln(1e-4), ln(30.0)),
            Block("width", (), ln(1.0), 0.5, ln(0.1), ln(10.0)),
            Block("reach", (), ln(3.0), 0.7, ln(0.5), ln(30.0)),
        )


@dataclass(frozen=True)
class Points:
    """Points as a level sees them.

    x: p x ... x n x D in lengthscales; shares: p x ... x n x k, as the linear term has them; f: p x ... x n x 1, the
    level below there, or p x ... x n x 0 for one that stands alone.
    """

    x: Tensor
    shares: Tensor
    f: Tensor

    @property
    def packed(self) -> Tensor:
        """Side by side."""
        return torch.cat([self.x, self.shares, self.f], dim=-1)


@dataclass(frozen=True)
class Covariance:
    """The prior covariance of a level about the one below, at p x H raw hyperparameters."""

    layout: Layout
    theta: Tensor

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @property
    def related(self) -> bool:
        """Whether the level below counts."""
        return isinstance(self.layout, RelationLayout)

    @cached_property
    def relation(self) -> tuple[Tensor, ...]:
        """slope, curve, width and reach, p each."""
        return tuple(self.theta[:, -4:].exp().unbind(-1))

    @property
    def constant(self) -> float:
        """Variance of the level."""
        return LEVEL if self.related else MEAN_VARIANCE

    def points(self, F: Tensor, f: Tensor) -> Points:
        """F: b x D features. f: p x s x b x 1, of which a level that stands alone takes no notice."""
        k = self.layout.shares
        shares = bend(F[:, F.shape[-1] - k :], self.layout.centres, self.hyper.power) if k else F[:, F.shape[-1] :]
        bent = torch.cat([F[:, : F.shape[-1] - k], shares], dim=-1)
        width = self.hyper.lengthscale[:, None, None, list(self.layout.groups)]
        linear = self.hyper.linear.sqrt()[:, None, None, None]
        return Points(bent / width, shares * linear, f[..., : int(self.related)])

    def unpacked(self, u: Tensor) -> Points:
        D, k = len(self.layout.groups), self.layout.shares
        return Points(*torch.split(u, [D, k, int(self.related)], dim=-1))

    def __call__(self, one: Points, other: Points) -> Tensor:
        """Between p x ... x n and p x ... x k points: p x ... x n x k."""
        found = lift(self.hyper.amplitude, one.x) * matern(one.x, other.x) + one.shares @ other.shares.mT
        if not self.related:
            return found + self.constant
        slope, curve, width, _ = (lift(value, one.f) for value in self.relation)
        alike = slope * one.f * other.f.mT + curve * matern(one.f / width, other.f / width)
        return found + self.constant + self._far(one, other) * alike

    def _far(self, one: Points, other: Points) -> Tensor:
        """k_rho."""
        reach = lift(self.relation[-1], one.x)
        return matern(one.x / reach, other.x / reach)

    def variance(self, at: Points) -> Tensor:
        """The diagonal: p x ... x n."""
        found = lift(self.hyper.amplitude, at.x[..., 0]) + at.shares.square().sum(-1) + self.constant
        if not self.related:
            return found
        slope, curve, *_ = (lift(value, at.f[..., 0]) for value in self.relation)
        return found + slope * at.f[..., 0].square() + curve


@dataclass(frozen=True)
class Level:
    """One level given its n runs of p metrics.

    known: the runs, p x 1 x n. chol: p x n x n, of their covariance; alpha: p x n, its inverse times what they have
    beyond the level below. left_out: leave-one-out means and variances, n x p each, with the level below as it is.
    """

    covariance: Covariance
    known: Points
    chol: Tensor
    alpha: Tensor
    left_out: tuple[Tensor, Tensor]

    @classmethod
    def given(cls, covariance: Covariance, F: Tensor, f: Tensor, Y: Tensor) -> Level:
        """F: n x D. f: p x 1 x n x 1. Y: n x p. Leave-one-out is Rasmussen & Williams 2006, eq. 5.12."""
        hyper, known = covariance.hyper, covariance.points(F, f)
        chol = factor(covariance(known, known)[:, 0], hyper.noise, hyper.amplitude)
        beyond = Y.T - known.f.sum((1, -1))
        alpha = torch.cholesky_solve(beyond[..., None], chol).squeeze(-1)
        precision = torch.cholesky_inverse(chol).diagonal(dim1=-2, dim2=-1)
        return cls(covariance, known, chol, alpha, (Y - (alpha / precision).T, 1 / precision.T))

    def moments(self, at: Points) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance, p x s x b, at p x s x b points, and what the runs explain as half' half: p x s x n x b."""
        cross = self.covariance(at, self.known)  # p x s x b x n
        half = torch.linalg.solve_triangular(self.chol[:, None], cross.mT, upper=False)
        variance = self.covariance.variance(at) - half.square().sum(-2)
        mean = at.f.sum(-1) + (cross @ self.alpha[:, None, :, None]).squeeze(-1)
        return mean, variance.clamp_min(TINY), half


@dataclass(frozen=True)
class Chain:
    """The levels that there are so far, from the bottom, of p metrics. normal: s x (L - 1), for draws through L."""

    levels: Levels
    steps: tuple[Level, ...]
    normal: Tensor
    p: int

    def nothing(self, F: Tensor) -> Tensor:
        """What is below the bottom at b points: p x 1 x b x 1."""
        return F.new_zeros(self.p, 1, len(F), 1)

    def through(self, F: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level the mean, the variance and the slope in the one below at b points: p x b each."""
        found, f = [], self.nothing(F)
        for level, z in zip(self.steps, [*self.normal.T, None], strict=False):
            mean, variance, _ = level.moments(level.covariance.points(F, f))  # p x s x b
            centre, below = mean.mean(1, keepdim=True), (f - f.mean(1, keepdim=True)).squeeze(-1)
            away = mean - centre
            slope = (away * below).mean(1) / below.square().mean(1).clamp_min(TINY)
            found.append((centre[:, 0], variance.mean(1) + away.square().mean(1), slope))
            if z is not None:
                f = (mean + variance.sqrt() * z[:, None])[..., None]
        return found

    def moments(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of each point at its level: p x b each."""
        means, variances, _ = zip(*self.through(at.F), strict=True)
        which = self.levels(at)
        return chosen(means, which), chosen(variances, which)

    def mean(self, at: Inputs) -> Tensor:
        return self.moments(at)[0]

    def embed(self, at: Inputs) -> Tensor:
        """b points to p x b x E numbers: their loadings on what each level has of its own, then how each sees them."""
        which, found, below = self.levels(at), self.through(at.F), self.nothing(at.F)
        parts, own = [], []
        for level, (mean, *_) in zip(self.steps, found, strict=True):
            points = level.covariance.points(at.F, below)
            _, variance, half = level.moments(points)
            parts += [points.packed[:, 0], half[:, 0].mT]
            own.append(variance[:, 0])
            below = mean[:, None, :, None]
        loadings: list[Tensor] = []  # from the top
        for r in reversed(range(len(self.steps))):
            here = (which == r).to(torch.float64).expand(self.p, -1)
            loadings.append(here + loadings[-1] * found[r + 1][2] if loadings else here)
        loading = torch.stack(loadings[::-1], dim=-1)  # p x b x L
        linear = (loading.square() * torch.stack(own, dim=-1)).sum(-1)
        stretch = (chosen([variance for _, variance, _ in found], which) / linear).sqrt()
        return torch.cat([stretch[..., None] * loading, *parts], dim=-1)

    def kernel(self, u: Tensor, v: Tensor) -> Tensor:
        """p x ... x n x E and p x ... x k x E -> p x ... x n x k."""
        sizes = [len(self.steps)]
        for level in self.steps:
            sizes += [level.known.packed.shape[-1], level.alpha.shape[-1]]
        (one, *ones), (other, *others) = (torch.split(w, sizes, dim=-1) for w in (u, v))
        total = u.new_zeros(())
        for r, level in enumerate(self.steps):
            prior = level.covariance(*(level.covariance.unpacked(parts[2 * r]) for parts in (ones, others)))
            own = prior - ones[2 * r + 1] @ others[2 * r + 1].mT
            total = total + one[..., :, None, r] * other[..., None, :, r] * own
        return total


def chosen(values: Sequence[Tensor], which: Tensor) -> Tensor:
    """Of p x b values of each level those of the level of each point: p x b."""
    return torch.stack(list(values))[which, :, torch.arange(len(which))].T


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Of runs of one scale it is the usual process. start: used where it is of as many levels.

    NumericalError when no covariance can be factorised.
    """
    levels = Levels.of(features, inputs, LEVELS, FEWEST)
    L, which = len(levels), levels(inputs)
    if L == 1:
        return gp.fit(features, inputs, Y, start)
    earlier = (start or {}).get("levels", ())
    begins = earlier if len(earlier) == L else [{}] * L
    chain = Chain(levels, (), normals(DRAWS, torch.eye(L - 1, dtype=torch.float64)), Y.shape[-1])
    mean, variance, memory = torch.empty_like(Y), torch.empty_like(Y), []
    for k, begin in enumerate(begins):
        points, outcomes = inputs.rows(which == k), Y[which == k]
        alone = gp.fit(features, points, outcomes, begin.get("alone"))
        below, covariance = chain.nothing(points.F), Covariance(alone.layout, alone.theta)
        memory.append({"alone": alone.memory()})
        if k:
            with torch.no_grad():
                below = chain.through(points.F)[-1][0][:, None, :, None]
            found = Related.fitted(features, points, below, outcomes, begin.get("related"))
            memory[-1]["related"] = found.memory()
            if found.log_evidence > alone.log_evidence:
                covariance = Covariance(found.layout, found.theta)
        level = Level.given(covariance, points.F, below, outcomes)
        chain = replace(chain, steps=(*chain.steps, level))
        mean[which == k], variance[which == k] = level.left_out
    with torch.no_grad():
        none = chain.embed(inputs)[:, :0]
    return Chained(
        features,
        chain.mean,
        chain.embed,
        chain.kernel,
        variance=torch.ones(Y.shape[-1], dtype=torch.float64),
        noise=chain.steps[levels.target].covariance.hyper.noise,
        known=none,
        alpha=none[..., 0],
        chol=none @ none.mT,
        left_out=(mean, variance),
        remembered={"levels": memory},
        chain=chain,
    )


@dataclass(frozen=True)
class Chained(Process):
    """The process of a chain. While nothing is believed, its moments are those of the draws, without covariances."""

    chain: Chain

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        return super().posterior(at) if self.known.shape[1] else self.chain.moments(at)

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return self.chain.mean(at)


@dataclass(frozen=True)
class Related:
    """Hyperparameters of a level, given the one below: p x H. runs: number of runs that they were fitted to.

    log_evidence: log density of the outcomes and the hyperparameters together, up to the constant of `gp`.
    """

    layout: Layout
    theta: Tensor
    runs: int
    log_evidence: float

    @classmethod
    def fitted(
        cls, features: Features, inputs: Inputs, below: Tensor, Y: Tensor, start: Mapping[str, Any] | None
    ) -> Related:
        """Maximum a posteriori, given the level below at its n runs: p x 1 x n x 1.

        As in `gp.fit`, the hyperparameters of `start` are kept while there are hardly more runs.
        """
        n, p = Y.shape
        layout = RelationLayout.of(features, inputs, across=False)

        def log_posterior(theta: Tensor) -> Tensor:
            covariance = Covariance(layout, theta)
            points, hyper = covariance.points(inputs.F, below), covariance.hyper
            beyond = Y - below[:, 0, :, 0].T
            likelihood = log_likelihood(covariance(points, points)[:, 0], beyond, hyper.noise, hyper.amplitude)
            return (likelihood + layout.log_prior(theta)).sum()

        def loss(raw: Array) -> tuple[float, Array]:
            theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
            try:
                value = -log_posterior(theta)
            except NumericalError:
                return 1e10, np.zeros_like(raw)  # a line search turns back from here
            (gradient,) = torch.autograd.grad(value, theta)
            return value.item(), gradient.numpy().reshape(-1)

        found, runs = remembered(layout, p, start)
        if found is None or not SETTLED <= runs <= n < GROWN * runs:
            found, runs = sought(loss, layout, p, n, found, runs, ITERATIONS), n
        theta = torch.from_numpy(found)
        return cls(layout, theta, runs, float(log_posterior(theta)))

    def memory(self) -> dict[str, Any]:
        """What the next fit starts from, as JSON."""
        return {"metrics": [self.layout.names(row) for row in self.theta.numpy()], "runs": self.runs}
