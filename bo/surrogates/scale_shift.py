"""A Gaussian process over scales whose optimum may drift: one for each metric, fitted together.

f(x, s) = g(x - W s) + level(cell) + residual(cell, x), where s is log2 of the scale over the target's, W a matrix of
drifts with W ~ N(Wbar, sw^2) integrated out, and a cell is all runs of one scale. Small runs then tell about large ones
as much as an uncertain drift allows; runs far away in scale blur themselves out. The noise has its own slope in scale.
Runs of another study are one more step, along an axis of its own, of which the drift is that study's displacement. With
a single cell it is the usual exact Gaussian process with a Matern-5/2 kernel.

A convex bowl for a mean, and an amplitude that grows with scale, were tried and did not pay (experiments/README.md).

What is of the size of the cells is written in torch, for its derivatives; what is of the size of the runs squared is in
closed form (`likelihood`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN, SETTLED, Factor, bend, matern, remembered, sought
from bo.surrogates.hyperparameters import (
    BELIEVED_NOISE,
    JITTER,
    MEAN_VARIANCE,
    Hyper,
    Layout,
    NumericalError,
)
from search_spaces.parameter import Array

#: Runs, times the root of the number of metrics, up to which hyperparameters are fitted to all of them.
MANY = 550


@dataclass(frozen=True)
class Points:
    """n points as the kernel sees them, for each of p metrics.

    z: p x n x D, features less their mean drift about the middle of the cube, shares at their power. linear: p x n x q,
    whose products are what is linear in the shares. noise: p x n, variances of a run there.
    """

    z: Tensor
    linear: Tensor
    noise: Tensor

    @classmethod
    def of(cls, inputs: Inputs, hyper: Hyper, layout: Layout) -> Points:
        J, unit = len(layout.drift_unit), layout.drift_unit[:, None]
        drift = torch.einsum("cjm,pjm->pcj", inputs.places, hyper.drift * unit)  # p x C x J
        F = inputs.F - 0.5
        if layout.shares:
            F = torch.cat([F[:, : -layout.shares], shares(inputs, hyper, layout)], dim=-1)
        z = F - torch.nn.functional.pad(drift[:, inputs.kind], (0, F.shape[-1] - J))
        linear = hyper.linear.sqrt()[:, None, None] * z[..., F.shape[-1] - layout.shares :]
        noise = hyper.noise[:, None] * (hyper.louder @ inputs.scales.T).exp()  # p x C
        return cls(z, linear, noise[:, inputs.kind])


@dataclass(frozen=True)
class Pairs:
    """What the kernel is made of between C and E kinds of points, for each of p metrics.

    inverse: p x C x E x D, one over squared widths. scale: p x C x E, what a Matern-5/2 correlation is multiplied by.
    constant: p x C x E.
    """

    inverse: Tensor
    scale: Tensor
    constant: Tensor

    @classmethod
    def of(cls, a: Inputs, b: Inputs, hyper: Hyper, layout: Layout) -> Pairs:
        width = hyper.lengthscale[:, list(layout.groups)].square()  # p x D
        unit = layout.drift_unit[:, None]
        sw2 = (hyper.spread[:, None] * unit).square()  # p x J x m
        v = torch.einsum("cejm,pjm->pcej", (a.places[:, None] - b.places[None]).square(), sw2)
        v = torch.nn.functional.pad(v, (0, width.shape[-1] - v.shape[-1]))  # p x C x E x D
        inverse = (width[:, None, None] + v).reciprocal()
        shrink = (inverse * width[:, None, None]).log().sum(-1) / 2
        alike = likeness(a, b, hyper, layout)
        scale = hyper.amplitude[:, None, None] * shrink.exp() * (1 + hyper.residual[:, None, None] * alike)
        constant = MEAN_VARIANCE + hyper.level[:, None, None] * alike
        return cls(inverse, scale, constant)


def likeness(a: Inputs, b: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Correlation of what C and E kinds of points have of their own: one within a cell, p or 1 x C x E.

    Between cells it is zero, or falls off with their distance in scale where nearly every run is a cell.
    """
    same = (a.cells[:, None] == b.cells[None]).to(torch.float64)[None]
    if not layout.smooth:
        return same
    own = layout.axes - layout.foreign
    apart = (a.scales[:, None] - b.scales[None]).square()  # C x E x m
    decay = (-0.5 * apart[..., :own].sum(-1) / hyper.reach[:, None, None].square()).exp()
    return decay * (apart[..., own:].sum(-1) == 0)


def kernel(a: Inputs, b: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior covariance between n and k points for each of p metrics: p x n x k.

    With v_j = sum_a (sw_a ds_a)^2 for a numeric feature and 0 for any other it is

        a prod_j sqrt(l_j^2 / (l_j^2 + v_j)) M(r) (1 + residual [same cell]) + level [same cell] + ...,
        r^2 = sum_j (dx_j - (Wbar ds)_j)^2 / (l_j^2 + v_j),   M Matern-5/2,

    plus a constant mean and a linear term in the shares, both integrated out. It is positive definite as an expectation
    of kernels that are: Matern-5/2 is E_t exp(-r^2 / 2t) with t ~ Gamma(5/2, rate 5/2), and for W | t ~ N(Wbar, t sw^2)
    the integral over W of exp(-|x - x' - W ds|^2 / (2 t l^2)) is Gaussian again with t l^2 + t v in the place of t l^2.
    The residual shares the lengthscales, and is Matern within a cell, where v = 0.
    """
    return covariance(a, b, Points.of(a, hyper, layout), Points.of(b, hyper, layout), hyper, layout)


def covariance(a: Inputs, b: Inputs, A: Points, B: Points, hyper: Hyper, layout: Layout) -> Tensor:
    """`kernel` of points that were looked at before."""
    # Widths depend on two points only through their kinds, of which there are few (C of a, E of b): so squared
    # distances are sums of matrix products, and nothing of size n x k x D is ever formed.
    pairs = Pairs.of(a, b, hyper, layout)
    in_a, in_b = a.membership, b.membership  # n x C, k x E
    left = torch.einsum("pnd,nc,pced->pned", A.z, in_a, pairs.inverse)
    right = torch.einsum("pkd,ke->pked", B.z, in_b)
    product = left.flatten(-2) @ right.flatten(-2).mT  # p x n x k
    a2 = torch.einsum("pned,pnd->pne", left, A.z) @ in_b.T
    b2 = in_a @ torch.einsum("pked,pkd,pced->pck", right, B.z, pairs.inverse)
    r2 = (a2 + b2 - 2 * product).clamp_min(0)
    spread = in_a @ torch.stack([pairs.scale, pairs.constant]) @ in_b.T  # 2 x p x n x k
    found: Tensor = spread[0] * matern(r2) + spread[1] + A.linear @ B.linear.mT
    return found


def shares(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """The features that are shares at their power, n x (number of shares)."""
    return bend(inputs.F[:, inputs.F.shape[-1] - layout.shares :], layout.centres, hyper.power)


def within(inputs: Inputs, q: int, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior covariances of groups of q points of one scale, where no drift comes between them: p x b x q x q."""
    points, pairs = Points.of(inputs, hyper, layout), Pairs.of(inputs, inputs, hyper, layout)
    width = hyper.lengthscale[:, list(layout.groups)]  # p x D
    groups, factors = (
        part.reshape(len(part), len(inputs) // q, q, part.shape[-1]) for part in (points.z, points.linear)
    )
    groups = groups / width[:, None, None]
    r2 = (groups[..., :, None, :] - groups[..., None, :, :]).square().sum(-1)  # p x b x q x q
    kind = inputs.kind.reshape(-1, q)
    spread = torch.stack([pairs.scale, pairs.constant])[:, :, kind[:, :, None], kind[:, None]]
    found: Tensor = spread[0] * matern(r2) + spread[1] + factors @ factors.mT
    return found


def diagonal(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior variances, p x n: the diagonal of `kernel`."""
    points, pairs = Points.of(inputs, hyper, layout), Pairs.of(inputs, inputs, hyper, layout)
    own = (pairs.scale + pairs.constant).diagonal(dim1=-2, dim2=-1)  # p x C
    found: Tensor = own[:, inputs.kind] + points.linear.square().sum(-1)
    return found


def noise(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Variance of a run about the metric that it measures, p x n."""
    return Points.of(inputs, hyper, layout).noise


@dataclass(frozen=True)
class ScaleShiftGP:
    """The posterior of p metrics given n runs.

    inputs: n points, of which the last `believed` are not measured. Y: n x p. chol: p x n x n, of the covariance with
    noise. alpha: p x n x 1, its inverse times Y. theta: p x H raw hyperparameters. runs, cells: numbers of runs and of
    scales that these were fitted to.
    """

    features: Features
    layout: Layout
    theta: Tensor
    inputs: Inputs
    Y: Tensor
    chol: Tensor
    alpha: Tensor
    believed: int = 0
    runs: int = 0
    cells: int = 0

    @classmethod
    def given(
        cls, features: Features, layout: Layout, theta: Tensor, inputs: Inputs, Y: Tensor, believed: int = 0
    ) -> ScaleShiftGP:
        """The posterior under fixed hyperparameters; NumericalError when the covariance cannot be factorised."""
        hyper = layout.hyper(theta)
        points = Points.of(inputs, hyper, layout)
        K = covariance(inputs, inputs, points, points, hyper, layout)
        share = torch.ones(len(inputs), dtype=torch.float64)
        share[len(inputs) - believed :] = BELIEVED_NOISE
        chol = cholesky(K + torch.diag_embed(points.noise * share), hyper.amplitude)
        alpha = torch.cholesky_solve(Y.T[..., None], chol)
        return cls(features, layout, theta, inputs, Y, chol, alpha, believed)

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @property
    def noise(self) -> Tensor:
        """Variance of a run at the target about the metric it measures, shape (p,)."""
        return self.hyper.noise

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        mean, half = self._reduced(at)
        prior = diagonal(at, self.hyper, self.layout)
        return mean, (prior - half.square().sum(-2)).clamp_min(1e-10 * self.hyper.amplitude[:, None])

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        cross = kernel(at, self.inputs, self.hyper, self.layout)
        return (cross @ self.alpha).squeeze(-1)

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale."""
        mean, half = self._reduced(at)
        p, n, points = half.shape
        half = half.reshape(p, n, points // q, q).transpose(1, 2)  # p x b x n x q
        # One large group is a matrix product; many small ones are less work by themselves.
        one = kernel(at, at, self.hyper, self.layout)[:, None] if q == points else None
        prior = one if one is not None else within(at, q, self.hyper, self.layout)
        covariance = prior - half.mT @ half
        return mean.reshape(p, -1, q), covariance

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k."""
        _, half = self._reduced(at)
        _, other_half = self._reduced(other)
        return kernel(at, other, self.hyper, self.layout) - half.mT @ other_half

    def _reduced(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean at b points (p x b), and what the runs explain of their covariance as half' half (half: p x n x b)."""
        cross = kernel(at, self.inputs, self.hyper, self.layout)  # p x b x n
        mean = (cross @ self.alpha).squeeze(-1)
        return mean, torch.linalg.solve_triangular(self.chol, cross.mT, upper=False)

    def believe(self, at: Inputs) -> ScaleShiftGP:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes.

        The kriging believer of Ginsbourger et al. 2010, "Kriging is well-suited to parallelize optimization".
        """
        mean, _ = self.posterior(at)
        Y, believed = torch.cat([self.Y, mean.T]), self.believed + len(at)
        given = self.given(self.features, self.layout, self.theta, self.inputs.join(at), Y, believed)
        return replace(given, runs=self.runs, cells=self.cells)

    def memory(self) -> dict[str, Any]:
        """The fitted hyperparameters as JSON, for the next fit to start from."""
        metrics = [self.layout.names(row) for row in self.theta.numpy()]
        return {"metrics": metrics, "runs": self.runs, "cells": self.cells}

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every measured run's metrics given the others, noise included: n x p each.

        Rasmussen & Williams 2006, eq. 5.12.
        """
        precision = torch.cholesky_inverse(self.chol).diagonal(dim1=-2, dim2=-1).T  # n x p
        measured = len(self.Y) - self.believed
        return (self.Y - self.alpha.squeeze(-1).T / precision)[:measured], 1 / precision[:measured]


def fit(
    features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None, iterations: int = 60
) -> ScaleShiftGP:
    """Maximum a posteriori hyperparameters of p independent processes, all at once, as `gp.sought` has it.

    Y: n x p standardised outcomes. start: what `memory` of an earlier fit returned, for a warm start. Where there are
    many runs, and hardly more than `start` was fitted to, and at no more scales, its hyperparameters are taken as they
    are. Of very many they are fitted to some, see `few`. NumericalError when no covariance can be factorised.
    """
    n, p = Y.shape
    cells = len(torch.unique(inputs.cell))
    layout = Layout.of(features, inputs, inputs.across)
    known, runs = remembered(layout, p, start)
    same = known is not None and (start or {}).get("cells") == cells
    if known is not None and same and SETTLED <= runs <= n < GROWN * runs:
        given = ScaleShiftGP.given(features, layout, torch.from_numpy(known), inputs, Y)
        return replace(given, runs=runs, cells=cells)
    rows = few(inputs, int(MANY / p**0.5))
    some = Target.of(inputs.rows(rows), Y[rows], layout)
    found = sought(some.loss, layout, p, n, known, runs if same else 0, iterations)
    return replace(ScaleShiftGP.given(features, layout, torch.from_numpy(found), inputs, Y), runs=n, cells=cells)


def few(inputs: Inputs, most: int) -> Tensor:
    """Numbers of up to `most` runs: as many of each cell, or all of one that has fewer, spread over their order.

    Where there are more cells than that, of one each of some of them.
    """
    kept: list[Tensor] = []
    cells = sorted((torch.nonzero(inputs.cell == cell)[:, 0] for cell in torch.unique(inputs.cell)), key=len)
    if len(cells) > most:
        cells = [cells[int(i)] for i in torch.linspace(0, len(cells) - 1, most, dtype=torch.float64).round()]
    left = most
    for i, rows in enumerate(cells):
        count = min(len(rows), max(1, left // (len(cells) - i)))
        kept.append(rows[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()])
        left -= count
    return torch.cat(kept).sort().values


@dataclass(frozen=True)
class Target:
    """The log posterior of hyperparameters given n runs, sorted by kind; starts: where each kind's rows begin."""

    inputs: Inputs
    Y: Tensor
    layout: Layout
    starts: np.ndarray

    @classmethod
    def of(cls, inputs: Inputs, Y: Tensor, layout: Layout) -> Target:
        order = torch.argsort(inputs.kind, stable=True)
        inputs, Y = inputs.rows(order), Y[order]
        starts = torch.searchsorted(inputs.kind, torch.arange(len(inputs.cells)))
        return cls(inputs, Y, layout, starts.numpy())

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Log marginal likelihood at p x H raw hyperparameters, up to a constant: p. Differentiable."""
        hyper = self.layout.hyper(theta)
        points = Points.of(self.inputs, hyper, self.layout)
        pairs = Pairs.of(self.inputs, self.inputs, hyper, self.layout)
        found = [
            _LogLikelihood.apply(  # type: ignore[no-untyped-call]
                *(part[i] for part in (points.z, pairs.inverse, pairs.scale, pairs.constant, points.linear)),
                y,
                points.noise[i],
                self.starts,
            )
            for i, y in enumerate(self.Y.T)
        ]
        return torch.stack(found)

    def log_posterior(self, theta: Tensor) -> Tensor:
        """The same, and the log prior: p."""
        return self.log_likelihood(theta) + self.layout.log_prior(theta)

    def loss(self, raw: Array) -> tuple[float, Array]:
        """Minus the log posterior of p H raw hyperparameters together, and its gradient."""
        theta = torch.tensor(raw.reshape(self.Y.shape[-1], -1), requires_grad=True)
        value = -self.log_posterior(theta).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)


class _LogLikelihood(torch.autograd.Function):
    """`likelihood` of one metric with its gradient."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *parts, starts = given
        numbers: Any = (part.detach().numpy() for part in parts)
        value, ctx.gradients = likelihood(*numbers, starts)  # type: ignore[call-arg]
        return torch.tensor(value, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_value: Tensor) -> tuple[Tensor | None, ...]:
        return *(to_value * torch.from_numpy(gradient) for gradient in ctx.gradients), None


def likelihood(
    z: Array, inverse: Array, scale: Array, constant: Array, X: Array, r: Array, noise: Array, starts: np.ndarray
) -> tuple[float, tuple[Array, ...]]:
    """Log density of outcomes r (n), up to a constant, and its derivatives by everything but `starts`.

    Their covariance is scale M(d) + constant + X X' + diag(noise) with d^2 = sum_j inverse_j (z_j - z'_j)^2. z: n x D
    and X: n x q, rows sorted by kind; those of kind c begin at starts[c]. inverse: C x C x D, scale, constant: C x C.
    Rasmussen & Williams 2006, eq. 5.9. Where it cannot be factorised the value is -1e10, without a slope: a line search
    turns back from there.
    """
    n, C = len(z), len(starts)
    counts = np.diff(starts, append=n)
    rows = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]

    def spread(table: Array) -> Array:
        return np.repeat(np.repeat(table, counts, axis=0), counts, axis=1)

    def gathered(each: Array) -> Array:
        return np.add.reduceat(np.add.reduceat(each, starts, axis=0), starts, axis=1)

    W = np.repeat(inverse, counts, axis=1)  # C x n x D
    z2, d = np.square(z), np.empty((n, n))
    for c, mine in enumerate(rows):
        d[mine] = z2[mine] @ W[c].T - 2 * z[mine] @ (z * W[c]).T + (z2 * W[c]).sum(1)
    d = np.sqrt(np.maximum(d, 0, out=d) * 5)
    decay = np.exp(-d)
    M, full = (1 + d * (1 + d / 3)) * decay, spread(scale)
    K = full * M + spread(constant) + X @ X.T
    K[np.diag_indices(n)] += noise
    size = float(scale.diagonal().mean())
    try:
        factor = Factor.of(K, size)
    except NumericalError:
        return -1e10, tuple(np.zeros_like(part) for part in (z, inverse, scale, constant, X, r, noise))
    alpha = factor.rest(factor.half(r))
    G = 0.5 * (np.outer(alpha, alpha) - factor.inverse)
    T = G * full * decay * (1 + d) * (-5 / 6)  # by the squared distance
    to_z, to_inverse = np.empty_like(z), np.empty_like(inverse)
    for c, mine in enumerate(rows):
        A, t = z[mine], T[mine]
        to_z[mine] = 4 * (A * (t @ W[c]) - t @ (z * W[c]))
        each = (np.square(A).T @ t).T + z2 * t.sum(0)[:, None] - 2 * z * (A.T @ t).T  # n x D
        to_inverse[c] = np.add.reduceat(each, starts, axis=0)
    value = -0.5 * float(r @ alpha) - factor.log_root_determinant
    to_scale = gathered(G * M)
    to_scale[np.diag_indices(C)] += JITTER * G.trace() / C
    return value, (to_z, to_inverse, to_scale, gathered(G), 2 * G @ X, -alpha, G.diagonal().copy())


def cholesky(K: Tensor, amplitude: Tensor) -> Tensor:
    """Lower factors of p x n x n covariances, with the least jitter (relative to `amplitude`, p) needed."""
    eye = torch.eye(K.shape[-1], dtype=torch.float64)
    jitter = JITTER
    while jitter < 1e-2:
        factor, failed = torch.linalg.cholesky_ex(K + jitter * amplitude[:, None, None] * eye)
        if not failed.any():
            lower: Tensor = factor
            return lower
        jitter *= 100
    raise NumericalError(f"A covariance of {K.shape[-1]} runs stayed singular with a jitter of 1% of its amplitude.")
