"""A Gaussian process over scales whose optimum may drift: one for each metric, fitted together.

f(x, s) = g(x - W s) + level(cell) + residual(cell, x), where s is log2 of the scale over the target's, W a matrix of
drifts with W ~ N(Wbar, sw^2) integrated out, and a cell is all runs of one scale. Small runs then tell about large ones
as much as an uncertain drift allows; runs far away in scale blur themselves out. With a single cell it is the usual
exact Gaussian process with a Matern-5/2 kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN, SETTLED, bend, matern, remembered, sought
from bo.surrogates.hyperparameters import BELIEVED_NOISE, JITTER, MEAN_VARIANCE, Hyper, Layout, NumericalError


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
    # Spreads depend on two points only through their places, of which there are few (C of a, E of b): so squared
    # distances are sums of matrix products, and nothing of size n x k x D is ever formed.
    width = hyper.lengthscale[:, list(layout.groups)].square()  # p x D
    ds2 = (a.places[:, None] - b.places[None]).square()  # C x E x J x m
    unit = layout.drift_unit[:, None]
    v = torch.einsum("cejm,pjm->pcej", ds2, (hyper.spread[:, None, :] * unit).square())
    v = torch.nn.functional.pad(v, (0, width.shape[-1] - v.shape[-1]))  # p x C x E x D
    scale = (width[:, None, None] + v).reciprocal()
    shrink = (scale * width[:, None, None]).prod(-1).sqrt()  # p x C x E
    A, B = (shifted(inputs, hyper, layout) for inputs in (a, b))  # p x n x D, p x k x D
    in_a, in_b = a.membership, b.membership  # n x C, k x E
    left = torch.einsum("pnd,nc,pced->pned", A, in_a, scale)
    right = torch.einsum("pkd,ke->pked", B, in_b)
    product = left.flatten(-2) @ right.flatten(-2).mT  # p x n x k
    a2 = torch.einsum("pned,pnd->pne", left, A) @ in_b.T
    b2 = in_a @ torch.einsum("pked,pkd,pced->pck", right, B, scale)
    shared = hyper.amplitude[:, None, None] * (in_a @ shrink @ in_b.T) * matern((a2 + b2 - 2 * product).clamp_min(0))
    same = (a.cell[:, None] == b.cell[None, :]).to(torch.float64)  # n x k
    own = 1 + hyper.residual[:, None, None] * same
    level = MEAN_VARIANCE + hyper.level[:, None, None] * same
    first = A.shape[-1] - layout.shares  # shares do not drift: they are alike for all metrics
    return shared * own + level + hyper.linear[:, None, None] * (A[0, :, first:] @ B[0, :, first:].T)


def shifted(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Features less their mean drift, about the middle of the cube, shares at their power: p x n x D."""
    drift = torch.einsum("cjm,pjm->pcj", inputs.places, hyper.drift * layout.drift_unit[:, None])  # p x C x J
    F = inputs.F - 0.5
    if layout.shares:
        F = torch.cat([F[:, : -layout.shares], shares(inputs, hyper, layout)], dim=-1)
    moved: Tensor = torch.nn.functional.pad(inputs.membership @ drift, (0, F.shape[-1] - drift.shape[-1]))
    return F - moved


def shares(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """The features that are shares at their power, n x (number of shares)."""
    return bend(inputs.F[:, inputs.F.shape[-1] - layout.shares :], layout.centres, hyper.power)


def within(inputs: Inputs, q: int, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior covariances of groups of q points of one scale, where no drift comes between them: p x b x q x q."""
    width = hyper.lengthscale[:, list(layout.groups)]  # p x D
    F = shifted(inputs, hyper, layout)  # p x (b q) x D
    first = F.shape[-1] - layout.shares
    groups = (F / width[:, None]).reshape(len(F), -1, q, F.shape[-1])
    r2 = (groups[..., :, None, :] - groups[..., None, :, :]).square().sum(-1)  # p x b x q x q
    own = (hyper.amplitude * (1 + hyper.residual))[:, None, None, None] * matern(r2)
    linear = F[0, :, first:].reshape(groups.shape[1], q, layout.shares)
    constant = (MEAN_VARIANCE + hyper.level)[:, None, None, None]
    return own + constant + hyper.linear[:, None, None, None] * (linear @ linear.mT)


def diagonal(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior variances, p x n: the diagonal of `kernel`."""
    constant = hyper.amplitude * (1 + hyper.residual) + MEAN_VARIANCE + hyper.level
    return constant[:, None] + hyper.linear[:, None] * shares(inputs, hyper, layout).square().sum(-1)


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
        K = kernel(inputs, inputs, hyper, layout)
        share = torch.ones(len(inputs), dtype=torch.float64)
        share[len(inputs) - believed :] = BELIEVED_NOISE
        chol = cholesky(K + torch.diag_embed(hyper.noise[:, None] * share), hyper.amplitude)
        return cls(features, layout, theta, inputs, Y, chol, torch.cholesky_solve(Y.T[..., None], chol), believed)

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""
        return self.hyper.noise

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        mean, half = self._reduced(at)
        prior = diagonal(at, self.hyper, self.layout)
        return mean, (prior - half.square().sum(-2)).clamp_min(1e-10 * self.hyper.amplitude[:, None])

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return (kernel(at, self.inputs, self.hyper, self.layout) @ self.alpha).squeeze(-1)

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale."""
        mean, half = self._reduced(at)
        p, n, points = half.shape
        half = half.reshape(p, n, points // q, q).transpose(1, 2)  # p x b x n x q
        covariance = within(at, q, self.hyper, self.layout) - half.mT @ half
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
    are. NumericalError when no covariance can be factorised.
    """
    n, p = Y.shape
    cells = len(torch.unique(inputs.cell))
    layout = Layout.of(features, inputs, across=cells > 1)

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
        value = -log_posterior(theta, inputs, Y, layout).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)

    known, runs = remembered(layout, p, start)
    same = known is not None and (start or {}).get("cells") == cells
    if known is not None and same and SETTLED <= runs <= n < GROWN * runs:
        given = ScaleShiftGP.given(features, layout, torch.from_numpy(known), inputs, Y)
        return replace(given, runs=runs, cells=cells)
    found = sought(loss, layout, p, n, known, runs if same else 0, iterations)
    return replace(ScaleShiftGP.given(features, layout, torch.from_numpy(found), inputs, Y), runs=n, cells=cells)


def log_posterior(theta: Tensor, inputs: Inputs, Y: Tensor, layout: Layout) -> Tensor:
    """Log marginal likelihood plus log prior of p x H raw hyperparameters, up to a constant: p."""
    hyper = layout.hyper(theta)
    n = len(Y)
    K = kernel(inputs, inputs, hyper, layout) + torch.diag_embed(hyper.noise[:, None].expand(-1, n))
    chol = cholesky(K, hyper.amplitude)
    half = torch.linalg.solve_triangular(chol, Y.T[..., None], upper=False)  # p x n x 1
    fit_term = -0.5 * half.square().sum((-2, -1))
    log_root_determinant = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    density: Tensor = fit_term - log_root_determinant + layout.log_prior(theta)
    return density


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
