"""Where runs diverge: a Gaussian process classifier of the told runs, by expectation propagation.

A latent function is positive where runs diverge. It is a plane plus a Matern-5/2 process: a cliff at the high side of a
coordinate is a plane, and what bends the edge, or walls a region in, is left to the process. Between the last run that
went well and the first one that diverged the edge is then about anywhere with equal probability, and beyond a diverged
run more of them are expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.optimize import minimize
from scipy.special import log_ndtr
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import matern
from bo.surrogates.hyperparameters import NumericalError
from search_spaces.parameter import Array

#: Runs that are learned from: of more, those next to the edge, and some of the others.
MOST, OTHERS = 120, 30
#: Octaves of scale that lie as far apart as the two ends of a coordinate.
OCTAVES = 10.0
#: Sweeps of expectation propagation at most, what is kept of a site in each, and the change at which it has converged.
SWEEPS, KEPT, CONVERGED = 40, 0.2, 1e-3
#: A further run may diverge about once in `CAUTION` times as many runs as have diverged so far.
CAUTION, MOST_CAUTIOUS = 60.0, 6000.0


def caution(diverged: int) -> float:
    """The power of P(not diverged) in a criterion, once so many runs have diverged.

    Where improvement grows towards an edge that is anywhere within a distance w with equal probability, the maximiser
    of improvement times P^k steps w / (1 + k) towards it and diverges with probability 1 / (1 + k). With k sixty
    times the number of diverged runs, that number would grow as the root of a thirtieth of all runs. It grows faster
    where the edge is known more finely than the model of it can tell, which is also why k may become this large.
    """
    return min(CAUTION * diverged, MOST_CAUTIOUS)


@dataclass(frozen=True)
class Layout:
    """How the H hyperparameters lie in one vector of raw numbers, with their normal priors and bounds.

    groups: the group of each coordinate (D'), G of them, which share a lengthscale. Then follow the logarithms of the
    amplitude (a variance, next to the unit variance of a run about the latent function), of the plane's share in it,
    and by how many standard deviations runs are believed not to diverge before any has been told.
    """

    groups: tuple[int, ...]

    @property
    def G(self) -> int:
        return max(self.groups) + 1

    @cached_property
    def prior(self) -> Array:
        """Mean, standard deviation, and bounds of each raw number: H x 4."""
        ln, stretch = math.log, math.sqrt(max(1.0, self.G / 2))  # as in the model of the metrics
        # The amplitude says how sharp an edge may be: to the 200th part of a lengthscale.
        shared = [[ln(3e4), 2.0, 0.0, ln(1e6)], [0.0, 1.0, ln(1e-2), ln(1e2)], [1.5, 0.5, 0.0, 3.0]]
        return np.array([[ln(0.7 * stretch), 0.8, ln(0.05), ln(20.0)]] * self.G + shared)

    def latent(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lengthscale of each coordinate (D'), amplitude, the plane's share, and the prior mean."""
        amplitude = theta[self.G].exp()
        return (
            theta[: self.G].exp()[list(self.groups)],
            amplitude,
            theta[self.G + 1].exp(),
            -theta[self.G + 2] * amplitude.sqrt(),
        )

    def kernel(self, A: Tensor, B: Tensor, theta: Tensor) -> Tensor:
        """Prior covariance of the latent function between n x D' and k x D' coordinates: n x k."""
        lengthscale, amplitude, plane, _ = self.latent(theta)
        a, b = (A - 0.5) / lengthscale, (B - 0.5) / lengthscale
        product = a @ b.T
        r2 = (a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * product).clamp_min(0)
        return amplitude * (matern(r2) + plane * product)

    def variance(self, A: Tensor, theta: Tensor) -> Tensor:
        """The diagonal of `kernel` at n x D' coordinates: n."""
        lengthscale, amplitude, plane, _ = self.latent(theta)
        return amplitude * (1 + plane * ((A - 0.5) / lengthscale).square().sum(-1))


@dataclass(frozen=True)
class Sites:
    """The n Gaussian factors exp(nu f - tau f^2 / 2) in the place of labels, and the log of what they leave out."""

    tau: Array
    nu: Array
    log_size: float


@dataclass(frozen=True)
class Divergence:
    """P(a run diverges) given n runs of both kinds.

    theta: H raw hyperparameters. Z: n x D' coordinates. root: n, of the sites' precisions. chol: n x n, the factor of
    I + root K root. alpha: n, what the covariances with the runs are to be multiplied by for the latent mean.
    """

    layout: Layout
    theta: Tensor
    Z: Tensor
    root: Tensor
    chol: Tensor
    alpha: Tensor

    def log_ok(self, inputs: Inputs) -> Tensor:
        """log P(a run does not diverge) at b points: b, at most 0, finite, differentiable in `inputs.F`.

        Rasmussen & Williams 2006, eqs. 3.60 and 3.82, with a prior mean.
        """
        Z = coordinates(inputs)
        cross = self.layout.kernel(Z, self.Z, self.theta)  # b x n
        mean = self.layout.latent(self.theta)[-1] + cross @ self.alpha
        half = torch.linalg.solve_triangular(self.chol, self.root[:, None] * cross.T, upper=False)
        variance = (self.layout.variance(Z, self.theta) - half.square().sum(0)).clamp_min(0)
        log_probability: Tensor = torch.special.log_ndtr(-mean / (1 + variance).sqrt())
        return log_probability

    def memory(self) -> dict[str, Any]:
        """The fitted hyperparameters as JSON, for the next fit to start from."""
        return {"raw": [round(value, 6) for value in self.theta.tolist()]}


def fit(
    features: Features, inputs: Inputs, diverged: Tensor, start: Mapping[str, Any] | None = None, iterations: int = 30
) -> Divergence | None:
    """Where runs diverge, with maximum a posteriori hyperparameters; None while all runs diverged, or none did.

    diverged: n booleans. start: what `memory` of an earlier fit returned, for a warm start; what does not fit is
    ignored. Of many runs those next to the edge are used. NumericalError when the fit ends at something not finite.
    """
    if diverged.all() or not diverged.any():
        return None
    Z = coordinates(inputs).detach()
    first = max(features.groups) + 1
    layout = Layout(features.groups + tuple(range(first, first + inputs.S.shape[-1])))
    keep = telling(Z, diverged)
    Z, sign = Z[keep], np.where(diverged[keep].numpy(), 1.0, -1.0)
    mean, sd, low, high = layout.prior.T
    sites = Sites(np.full(len(sign), 1e-3), np.zeros(len(sign)), 0.0)

    def loss(raw: Array) -> tuple[float, Array]:
        nonlocal sites  # those of similar hyperparameters are close
        theta = torch.tensor(raw, requires_grad=True)
        K, level = layout.kernel(Z, Z, theta), layout.latent(theta)[-1]
        sites = propagate(K.detach().numpy(), level.item(), sign, sites)
        value = log_evidence(K, level, sites)
        (gradient,) = torch.autograd.grad(value, theta)
        away = (raw - mean) / sd
        return 0.5 * float(away @ away) - value.item(), away / sd - gradient.numpy()

    begin = np.asarray((start or {}).get("raw", ()), dtype=np.float64)
    fits = begin.shape == mean.shape and bool(np.isfinite(begin).all())
    bounds = list(zip(low, high, strict=True))
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-4}
    found = minimize(
        loss, np.clip(begin, low, high) if fits else mean, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    ).x
    if not np.isfinite(found).all():
        raise NumericalError("The fit of where runs diverge ended at values that are not finite.")
    return given(layout, torch.tensor(found), Z, sign, sites)


def given(layout: Layout, theta: Tensor, Z: Tensor, sign: Array, sites: Sites | None = None) -> Divergence:
    """The posterior under fixed hyperparameters. sign: n, 1 for a diverged run, else -1. sites: to start from."""
    K, level = layout.kernel(Z, Z, theta), layout.latent(theta)[-1]
    begin = sites or Sites(np.full(len(sign), 1e-3), np.zeros(len(sign)), 0.0)
    found = propagate(K.numpy(), level.item(), sign, begin)
    tau, nu = torch.tensor(found.tau), torch.tensor(found.nu)
    root, shifted = tau.sqrt(), nu - tau * level
    chol = factor(K, root)
    alpha = shifted - root * torch.cholesky_solve((root * (K @ shifted))[:, None], chol)[:, 0]
    return Divergence(layout, theta, Z, root, chol, alpha)


def coordinates(inputs: Inputs) -> Tensor:
    """The features, and where a point lies on the scale axes: n x D'.

    An edge that moves with scale, in proportion to its logarithm, is a plane in these.
    """
    return torch.cat([inputs.F, inputs.S / OCTAVES], dim=-1)


def telling(Z: Tensor, diverged: Tensor) -> Tensor:
    """Indices of up to MOST of n runs: those next to one of the other kind, and some evenly among the others.

    Runs of a kind that are surrounded by their own kind say little about where the edge is.
    """
    n = len(Z)
    if n <= MOST:
        return torch.arange(n)
    kinds = [diverged.nonzero()[:, 0], (~diverged).nonzero()[:, 0]]
    near = MOST - OTHERS
    room = [min(len(kind), max(near // 2, near - len(other))) for kind, other in (kinds, kinds[::-1])]
    gap = torch.cdist(Z[kinds[0]], Z[kinds[1]])
    chosen = torch.zeros(n, dtype=torch.bool)
    for kind, axis, count in zip(kinds, (1, 0), room, strict=True):
        chosen[kind[torch.argsort(gap.min(axis).values, stable=True)[:count]]] = True
    rest = (~chosen).nonzero()[:, 0]
    chosen[rest[torch.linspace(0, len(rest) - 1, OTHERS).long()]] = True
    return chosen.nonzero()[:, 0]


def propagate(K: Array, level: float, sign: Array, sites: Sites) -> Sites:
    """The sites for labels with the likelihood Phi(sign f), where f ~ N(level, K): all are updated at once, damped.

    Rasmussen & Williams 2006, algorithm 3.5 and eq. 3.58; the likelihood being log-concave, precisions lie in (0, 1].
    """
    tau, nu = sites.tau, sites.nu
    last: Array | None = None
    for _ in range(SWEEPS):
        root = np.sqrt(tau)
        chol, info = lapack.dpotrf(np.eye(len(K)) + root[:, None] * K * root, lower=1)
        if info:
            raise NumericalError(f"The covariance of {len(K)} runs of which some diverged could not be factorised.")
        half, _ = lapack.dtrtrs(chol, root[:, None] * K, lower=1)
        variance = np.maximum(K.diagonal() - np.square(half).sum(0), 1e-10)
        shifted = nu - tau * level
        mean = level + K @ shifted - half.T @ (half @ shifted)
        # The posterior without its own site, and then with the label itself in that site's place.
        cavity_tau = np.maximum(1 / variance - tau, 1e-10)
        cavity_nu = mean / variance - nu
        m, v = cavity_nu / cavity_tau, 1 / cavity_tau
        z = sign * m / np.sqrt(1 + v)
        log_z = log_ndtr(z)
        ratio = np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_z)
        tilted_mean = m + sign * v * ratio / np.sqrt(1 + v)
        tilted_tau = 1 / (v - v * v * ratio * (z + ratio) / (1 + v))
        now = np.concatenate([mean, np.sqrt(variance)]) / math.sqrt(K[0, 0])
        if last is not None and np.abs(now - last).max() < CONVERGED:
            break
        last = now
        tau = KEPT * tau + (1 - KEPT) * np.clip(tilted_tau - cavity_tau, 1e-10, 1.0)
        nu = KEPT * nu + (1 - KEPT) * (tilted_mean * tilted_tau - cavity_nu)
    total = cavity_tau + tau
    gained = np.square(cavity_nu + nu) / total - np.square(cavity_nu) / cavity_tau
    return Sites(tau, nu, float((log_z - 0.5 * np.log(cavity_tau / total) - 0.5 * gained).sum()))


def log_evidence(K: Tensor, level: Tensor, sites: Sites) -> Tensor:
    """Log probability of the labels: that of f ~ N(level, K) with the sites in their place, and what these leave out.

    At a fixed point of the propagation its gradient is that at fixed sites (Seeger 2005, "Expectation propagation for
    exponential families", section 4): none has to pass through the sweeps.
    """
    tau, nu = torch.tensor(sites.tau), torch.tensor(sites.nu)
    root, shifted = tau.sqrt(), nu - tau * level
    chol = factor(K, root)
    spread = K @ shifted
    half = torch.linalg.solve_triangular(chol, (root * spread)[:, None], upper=False)
    at_level = (nu * level - 0.5 * tau * level.square()).sum()
    density: Tensor = at_level - chol.diagonal().log().sum() + 0.5 * (shifted @ spread - half.square().sum())
    return density + sites.log_size


def factor(K: Tensor, root: Tensor) -> Tensor:
    lower: Tensor = torch.linalg.cholesky(torch.eye(len(K), dtype=torch.float64) + root[:, None] * K * root)
    return lower
