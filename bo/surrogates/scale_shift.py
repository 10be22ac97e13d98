"""A Gaussian process over scales whose optimum may drift: one for each metric, fitted together.

f(x, s) = g(x - W s) + level(cell) + residual(cell, x), where s is log2 of the scale over the target's, W a matrix of
drifts with W ~ N(Wbar, sw^2) integrated out, and a cell is all runs of one scale. Small runs then tell about large ones
as much as an uncertain drift allows; runs far away in scale blur themselves out. With a single cell it is the usual
exact Gaussian process with a Matern-5/2 kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bo.surrogates.features import Features, Inputs

#: Prior variance of the constant mean, integrated out; outcomes are standardised.
MEAN_VARIANCE = 1.0
#: Added to the diagonal of every covariance, relative to the amplitude.
JITTER = 1e-8
#: The power under which losses of real mixtures are smoothest, and mixtures from which on it is learned.
POWER = 1 / 3
ENOUGH_MIXTURES = 20
#: Noise of a run that is believed, not measured, as a share of a measured one's: with all of it, several runs would be
#: sent to the same place to average it out, before the first has come back.
BELIEVED_NOISE = 1e-3


class NumericalError(ArithmeticError):
    """A covariance stayed singular whatever was added to its diagonal, or a fit ended at something not finite."""


@dataclass(frozen=True)
class Block:
    """One kind of hyperparameter, as the raw numbers that are fitted: a normal prior with mean and sd, and bounds."""

    name: str
    shape: tuple[int, ...]
    mean: float
    sd: float
    low: float
    high: float
    shared: bool = False
    """One for all metrics: the mean of what is fitted for each, whose priors together weigh as one."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of p metrics, the batch dimension first.

    lengthscale: p x G. amplitude, noise, linear: p (variances). drift: p x J x m mean drifts and spread: p x m, their
    standard deviations, in octaves an octave. level, residual: p, variances of a cell's own constant and, as a share of
    the amplitude, of its own function. power: one number for all metrics, the power of shares.
    """

    lengthscale: Tensor
    amplitude: Tensor
    noise: Tensor
    linear: Tensor
    drift: Tensor
    spread: Tensor
    level: Tensor
    residual: Tensor
    power: Tensor


@dataclass(frozen=True)
class Layout:
    """Which hyperparameters there are for a space and a set of cells, and how they lie in one vector of H numbers.

    groups: group of each feature (D). drift_unit: J. centres: the middle of each feature that is a share. axes: scale
    axes. across: there are several cells. bent: there are enough mixtures to learn the power of their shares.
    """

    groups: tuple[int, ...]
    drift_unit: Tensor
    centres: Tensor
    axes: int
    across: bool
    bent: bool

    @cached_property
    def G(self) -> int:
        return max(self.groups) + 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Everything positive is fitted by its logarithm. Lengthscales are Gamma(3, 6) times `stretch`: see there."""
        ln, stretch = math.log, self.stretch
        table = [
            Block("lengthscale", (self.G,), ln(0.5 * stretch), math.inf, ln(0.03), ln(30.0)),
            Block("amplitude", (), ln(2.0), 1.0, ln(0.02), ln(200.0)),
            Block("noise", (), ln(4e-3), 1.0, ln(1e-6), ln(1.0)),
        ]
        if self.shares:
            table.append(Block("linear", (), ln(0.5), 1.5, ln(1e-3), ln(100.0)))
        if self.bent:
            table.append(Block("power", (), ln(POWER), 0.4, ln(0.2), ln(1.0), shared=True))
        if self.across:
            table += [
                Block("drift", (len(self.drift_unit), self.axes), 0.0, 0.35, -2.0, 2.0),
                Block("spread", (self.axes,), ln(0.15), 0.7, ln(0.01), ln(2.0)),
                Block("level", (), ln(0.25), 1.0, ln(1e-3), ln(20.0)),
                Block("residual", (), ln(0.1), 1.0, ln(1e-4), ln(5.0)),
            ]
        return tuple(table)

    @property
    def shares(self) -> int:
        """Number of features that are shares; they come last."""
        return len(self.centres)

    @property
    def stretch(self) -> float:
        """Two coordinates are the case the prior was chosen for; distances grow with the root of the dimension.

        Hvarfner et al., "Vanilla Bayesian Optimization Performs Great in High Dimensions", arXiv 2402.02229, section 4.
        """
        return math.sqrt(max(1.0, self.G / 2))

    def vector(self, values: Mapping[str, Any] | None = None) -> np.ndarray:
        """H raw numbers: of each block what `values` holds, where it fits, and the centre of its prior elsewhere."""
        parts = []
        for block in self.blocks:
            given = np.asarray((values or {}).get(block.name, math.nan), dtype=np.float64).reshape(-1)
            fits = given.shape == (block.size,) and bool(np.isfinite(given).all())
            parts.append(np.clip(given, block.low, block.high) if fits else np.full(block.size, block.mean))
        return np.concatenate(parts)

    def names(self, vector: np.ndarray) -> dict[str, list[float]]:
        """The raw numbers by block, as JSON holds them."""
        stops = np.cumsum([block.size for block in self.blocks])
        parts = np.split(vector, stops[:-1])
        return {b.name: [round(v, 6) for v in part.tolist()] for b, part in zip(self.blocks, parts, strict=True)}

    @property
    def bounds(self) -> list[tuple[float, float]]:
        return [(block.low, block.high) for block in self.blocks for _ in range(block.size)]

    def hyper(self, theta: Tensor) -> Hyper:
        """theta: p x H raw numbers."""
        p = len(theta)
        sizes = [block.size for block in self.blocks]
        raw = {
            block.name: part.reshape(p, *block.shape)
            for block, part in zip(self.blocks, torch.split(theta, sizes, dim=-1), strict=True)
        }
        zero = torch.zeros(p, dtype=torch.float64)
        J, m = len(self.drift_unit), self.axes
        return Hyper(
            lengthscale=raw["lengthscale"].exp(),
            amplitude=raw["amplitude"].exp(),
            noise=raw["noise"].exp(),
            linear=raw["linear"].exp() if self.shares else zero,
            drift=raw["drift"] if self.across else torch.zeros(p, J, m, dtype=torch.float64),
            spread=raw["spread"].exp() if self.across else torch.zeros(p, m, dtype=torch.float64),
            level=raw["level"].exp() if self.across else zero,
            residual=raw["residual"].exp() if self.across else zero,
            power=raw["power"].mean().exp() if self.bent else torch.tensor(POWER, dtype=torch.float64),
        )

    def log_prior(self, theta: Tensor) -> Tensor:
        """Log density, up to a constant, of the p x H raw numbers: p."""
        sizes = [block.size for block in self.blocks]
        total = torch.zeros(len(theta), dtype=torch.float64)
        for block, part in zip(self.blocks, torch.split(theta, sizes, dim=-1), strict=True):
            if block.name == "lengthscale":
                total = total + (2 * part - 6 * part.exp() / self.stretch).sum(-1)  # Gamma(3, 6), of the lengthscale
            else:
                weight = 1 / len(theta) if block.shared else 1.0
                total = total - 0.5 * weight * ((part - block.mean) / block.sd).square().sum(-1)
        return total


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
    """The features that are shares at their power q, n x (number of shares): c^(1/3) ((w / c)^q - 1) / (3 q).

    With c the share when all are equal, and w^(1/3) - c^(1/3) at q = 1/3: whatever the power, about equal shares they
    lie as far apart, so a lengthscale means the same.
    """
    root = layout.centres.pow(1 / 3)
    power = 3 * hyper.power
    bent: Tensor = root * ((inputs.F[:, inputs.F.shape[-1] - layout.shares :] / root).pow(power) - 1) / power
    return bent


def within(inputs: Inputs, q: int, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior covariances of groups of q points of one scale, where no drift comes between them: p x b x q x q."""
    width = hyper.lengthscale[:, list(layout.groups)]  # p x D
    F = shifted(inputs, hyper, layout)  # p x (b q) x D
    first = F.shape[-1] - layout.shares
    groups = (F / width[:, None]).reshape(len(F), -1, q, F.shape[-1])
    r2 = (groups[..., :, None, :] - groups[..., None, :, :]).square().sum(-1)  # p x b x q x q
    own = (hyper.amplitude * (1 + hyper.residual))[:, None, None, None] * matern(r2)
    linear = F[0, :, first:].reshape(-1, q, layout.shares)
    constant = (MEAN_VARIANCE + hyper.level)[:, None, None, None]
    return own + constant + hyper.linear[:, None, None, None] * (linear @ linear.mT)


def diagonal(inputs: Inputs, hyper: Hyper, layout: Layout) -> Tensor:
    """Prior variances, p x n: the diagonal of `kernel`."""
    constant = hyper.amplitude * (1 + hyper.residual) + MEAN_VARIANCE + hyper.level
    return constant[:, None] + hyper.linear[:, None] * shares(inputs, hyper, layout).square().sum(-1)


def matern(r2: Tensor) -> Tensor:
    """Matern-5/2 of squared distances, with a finite gradient at zero."""
    r = (5 * r2 + 1e-20).sqrt()
    return (1 + r + r.square() / 3) * torch.exp(-r)


@dataclass(frozen=True)
class ScaleShiftGP:
    """The posterior of p metrics given n runs.

    inputs: n points, of which the last `believed` are not measured. Y: n x p. chol: p x n x n, of the covariance with
    noise. alpha: p x n x 1, its inverse times Y. theta: p x H raw hyperparameters.
    """

    features: Features
    layout: Layout
    theta: Tensor
    inputs: Inputs
    Y: Tensor
    chol: Tensor
    alpha: Tensor
    believed: int = 0

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
        return self.given(self.features, self.layout, self.theta, self.inputs.join(at), Y, believed)

    def memory(self) -> dict[str, Any]:
        """The fitted hyperparameters as JSON, for the next fit to start from."""
        return {"metrics": [self.layout.names(row) for row in self.theta.numpy()]}

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each.

        Rasmussen & Williams 2006, eq. 5.12.
        """
        precision = torch.cholesky_inverse(self.chol).diagonal(dim1=-2, dim2=-1).T  # n x p
        return self.Y - self.alpha.squeeze(-1).T / precision, 1 / precision


def fit(
    features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None, iterations: int = 60
) -> ScaleShiftGP:
    """Maximum a posteriori hyperparameters of p independent processes by one L-BFGS-B run over all of them.

    Y: n x p standardised outcomes. start: what `memory` of an earlier fit returned, for a warm start; the better of it
    and the centre of the prior is taken. NumericalError when no covariance can be factorised.
    """
    p = Y.shape[-1]
    layout = Layout(
        groups=features.groups,
        drift_unit=features.drift_unit,
        centres=features.centres,
        axes=inputs.places.shape[-1],
        across=bool((inputs.cell != inputs.cell[0]).any()),
        bent=mixtures(inputs, len(features.centres)) >= ENOUGH_MIXTURES,
    )

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
        value = -log_posterior(theta, inputs, Y, layout).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)

    centre = np.tile(layout.vector(), p)
    starts = [centre]
    if start and len(start.get("metrics", ())) == p:
        starts.append(np.concatenate([layout.vector(values) for values in start["metrics"]]))
    best = min(starts, key=lambda raw: loss(raw)[0])
    found = minimize(
        loss, best, jac=True, method="L-BFGS-B", bounds=layout.bounds * p, options={"maxiter": iterations, "ftol": 1e-7}
    ).x
    if not np.isfinite(found).all():
        raise NumericalError("The fit of the hyperparameters ended at values that are not finite.")
    return ScaleShiftGP.given(features, layout, torch.tensor(found.reshape(p, -1)), inputs, Y)


def mixtures(inputs: Inputs, shares: int) -> int:
    """How many different mixtures there are among points with so many shares."""
    return len(torch.unique((1e6 * inputs.F[:, inputs.F.shape[-1] - shares :]).round(), dim=0)) if shares else 0


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
