"""A Gaussian process of any mean and covariance: what the alternative surrogates come down to.

A kernel over learned coordinates is one, conditioned on the runs. So is a set of function samples, by its empirical
mean and covariance: it knows the runs already, and is conditioned on believed points only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bo.surrogates import gp
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import BELIEVED_NOISE
from bo.surrogates.scale_shift import cholesky

Mean = Callable[[Inputs], Tensor]
"""b points -> p x b."""
Embed = Callable[[Inputs], Tensor]
"""b points -> p x b x E, all that the kernel has to know of them."""
Kernel = Callable[[Tensor, Tensor], Tensor]
"""p x ... x n x E and p x ... x k x E -> p x ... x n x k."""


@dataclass(frozen=True)
class Coordinates:
    """What a network is fed: features about the middle of the space and, if the runs have several scales, the scale.

    shift: D. reach: m, the runs' largest distance to the target on each scale axis in octaves; m = 0 with one scale.
    """

    shift: Tensor
    reach: Tensor

    @classmethod
    def of(cls, features: Features, inputs: Inputs) -> Coordinates:
        shift = torch.zeros(inputs.F.shape[-1], dtype=torch.float64)
        shift[: len(features.numeric)] = 0.5
        if len(features.centres):
            shift[-len(features.centres) :] = features.centres.pow(1 / 3)
        reach = inputs.S.abs().amax(0)
        several = bool((inputs.cell != inputs.cell[0]).any())
        return cls(shift, torch.where(reach > 0, reach, 1.0) if several else reach[:0])

    def __call__(self, at: Inputs) -> Tensor:
        """b x (D + m), numbers within +-1/2 and scales within +-1."""
        centred = at.F - self.shift
        return torch.cat([centred, at.S / self.reach], dim=-1) if len(self.reach) else centred


@dataclass(frozen=True)
class Standard:
    """Outcomes of p metrics, about their mean and in their standard deviations, a unit for ties."""

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, Y: Tensor) -> Standard:
        sd = Y.std(0, correction=0)
        return cls(Y.mean(0), torch.where(sd > 1e-9 * (1 + Y.abs().amax(0)), sd, 1.0))

    def __call__(self, Y: Tensor) -> Tensor:
        return (Y - self.mean) / self.sd


@dataclass(frozen=True)
class Process:
    """The posterior of p metrics.

    trend: the prior mean. known: p x k x E, the points it is conditioned on, of which the first n have been measured
    and bear on the mean by alpha (p x n). chol: p x k x k, of their covariance. variance: p, what `noise` and jitter
    are measured by. left_out: leave-one-out means and variances, n x p each. remembered: what `memory` returns.
    """

    features: Features
    trend: Mean
    embed: Embed
    kernel: Kernel
    variance: Tensor
    noise: Tensor
    known: Tensor
    alpha: Tensor
    chol: Tensor
    left_out: tuple[Tensor, Tensor]
    remembered: Mapping[str, Any]

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        u = self.embed(at)
        mean, half = self._reduced(at, u)
        prior = self.kernel(u[..., None, :], u[..., None, :])[..., 0, 0]
        return mean, (prior - half.square().sum(-2)).clamp_min(1e-10 * self.variance[:, None])

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return self._reduced(at, self.embed(at))[0]

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each."""
        u = self.embed(at)
        mean, half = self._reduced(at, u)
        p, k, points = half.shape
        half = half.reshape(p, k, points // q, q).transpose(1, 2)  # p x b x k x q
        group = u.reshape(p, -1, q, u.shape[-1])
        return mean.reshape(p, -1, q), self.kernel(group, group) - half.mT @ half

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k."""
        u, v = self.embed(at), self.embed(other)
        return self.kernel(u, v) - self._reduced(at, u)[1].mT @ self._reduced(other, v)[1]

    def _reduced(self, at: Inputs, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean at b points (p x b), and what `known` explains of their covariance as half' half (half: p x k x b)."""
        cross = self.kernel(u, self.known)  # p x b x k
        mean = self.trend(at) + (cross[..., : self.alpha.shape[-1]] @ self.alpha[..., None]).squeeze(-1)
        return mean, torch.linalg.solve_triangular(self.chol, cross.mT, upper=False)

    def believe(self, at: Inputs) -> Process:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes."""
        with torch.no_grad():
            u = self.embed(at)
            cross = torch.linalg.solve_triangular(self.chol, self.kernel(self.known, u), upper=False)  # p x k x r
            rest = self.kernel(u, u) - cross.mT @ cross
            corner = factor(rest, BELIEVED_NOISE * self.noise, self.variance)
        p, k, r = cross.shape
        chol = torch.cat([torch.cat([self.chol, cross.new_zeros(p, k, r)], -1), torch.cat([cross.mT, corner], -1)], -2)
        return replace(self, known=torch.cat([self.known, u], 1), chol=chol)

    def memory(self) -> dict[str, Any]:
        """What the next fit starts from, as JSON."""
        return dict(self.remembered)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each."""
        return self.left_out


def conditioned(
    features: Features,
    mean: Tensor,
    embed: Embed,
    kernel: Kernel,
    inputs: Inputs,
    Y: Tensor,
    variance: Tensor,
    noise: Tensor,
    remembered: Mapping[str, Any],
) -> Process:
    """The process with a constant prior mean (p) given n runs Y (n x p); NumericalError as `factor` has it.

    Leave-one-out is Rasmussen & Williams 2006, eq. 5.12.
    """
    with torch.no_grad():
        known = embed(inputs)
        chol = factor(kernel(known, known), noise, variance)
        alpha = torch.cholesky_solve((Y - mean).T[..., None], chol).squeeze(-1)  # p x n
        precision = torch.cholesky_inverse(chol).diagonal(dim1=-2, dim2=-1)

    def constant(at: Inputs) -> Tensor:
        return mean[:, None].expand(-1, len(at))

    left_out = (Y - (alpha / precision).T, 1 / precision.T)
    return Process(features, constant, embed, kernel, variance, noise, known, alpha, chol, left_out, remembered)


def factor(K: Tensor, noise: Tensor, variance: Tensor) -> Tensor:
    """Lower factors of p x n x n covariances with `noise` (p), and the least jitter needed, relative to `variance` (p).

    NumericalError where a jitter of 1% is not enough.
    """
    return cholesky(K + noise[:, None, None] * torch.eye(K.shape[-1], dtype=torch.float64), variance)


def log_likelihood(K: Tensor, Y: Tensor, noise: Tensor, variance: Tensor) -> Tensor:
    """Log marginal likelihood of n runs Y (n x p) about zero under p covariances K, up to a constant: p."""
    chol = factor(K, noise, variance)
    half = torch.linalg.solve_triangular(chol, Y.T[..., None], upper=False)  # p x n x 1
    found: Tensor = -0.5 * half.square().sum((-2, -1)) - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return found


def matern(u: Tensor, v: Tensor) -> Tensor:
    """Matern-5/2 correlation between ... x n x E and ... x k x E points in lengthscales."""
    square = u.square().sum(-1)[..., :, None] + v.square().sum(-1)[..., None, :] - 2 * u @ v.mT
    return gp.matern(square.clamp_min(0))


def lift(values: Tensor, like: Tensor) -> Tensor:
    """One value a metric (p) with as many dimensions as `like`, p x ..., to be broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def log_normal(value: Tensor, median: float, sd: float) -> Tensor:
    """Log density, up to a constant, of the logarithm `value` of what has that median and log-sd."""
    return -0.5 * ((value - math.log(median)) / sd).square()
