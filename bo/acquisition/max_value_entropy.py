"""Max-value entropy search: how much a run tells about the height of the optimum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.log_ei import log_h
from bo.acquisition.samples import candidates, joint, known, whole

LOG = True
#: Points at which the objective is drawn, and draws of its maximum.
POINTS, SAMPLES = 512, 32
#: A maximum this many deviations below the mean tells all there is to tell, and logarithms begin to cancel.
LOWEST = -1e3
#: Above it log Phi(z) is -Phi(-z), to 1e-9.
HIGH = 6.0


def make(situation: Situation, points: int = POINTS, samples: int = SAMPLES, noisy: bool = True) -> Acquisition:
    """log of the information, in nats, that a run at x has about the maximum f* of the objective.

    Wang & Jegelka, "Max-value Entropy Search", arXiv 1703.01968, eq. 6, averaged over `samples` draws of f*. `noisy`:
    of a measured run, by the bound of Moss et al., "GIBBON", arXiv 2102.03324, eq. 10; else of a run without noise,
    exactly. f* is the maximum of joint draws at `points` candidates, and no less than the best posterior mean there.
    Pending runs are believed. ValueError for `points` or `samples` that are no whole numbers above zero, and where
    `noisy` is neither True nor False.
    """
    whole("samples", samples)
    if not isinstance(noisy, bool):
        raise ValueError(f"The acquisition needs noisy to be True or False, got {noisy!r}.")
    belief = situation.believed
    Z = torch.cat([candidates(situation, whole("points", points)), known(situation)])
    mean, root = joint(belief, Z)
    normal = torch.as_tensor(situation.rng.standard_normal((samples, len(Z))))
    maximum = (mean + normal @ root.T).max(-1).values.clamp_min(mean.max())  # s
    noise = belief.noise

    def acquisition(X: Tensor) -> Tensor:
        at, sd = belief.value(X)
        gamma = (maximum[:, None] - at) / sd  # s x b
        each = log_bound(gamma, sd.square() / (sd.square() + noise)) if noisy else log_information(gamma)
        return each.logsumexp(0) - math.log(samples)

    return acquisition


def log_information(gamma: Tensor) -> Tensor:
    """log(gamma phi(gamma) / (2 Phi(gamma)) - log Phi(gamma)), elementwise: what f itself tells about f <= f*.

    gamma = (f* - mean) / sd. About -gamma^2 / 2 for large gamma, where the information underflows.
    """
    gamma = gamma.clamp_min(LOWEST)
    # Each branch sees only arguments it can handle: torch.where alone would let NaN gradients of the others through.
    low, high = gamma.clamp_max(HIGH), gamma.clamp_min(HIGH)
    log_low = torch.log(0.5 * low * log_ratio(low).exp() - torch.special.log_ndtr(low))
    log_high = torch.logaddexp((0.5 * high).log() + log_ratio(high), torch.special.log_ndtr(-high))
    return torch.where(gamma < HIGH, log_low, log_high)


def log_bound(gamma: Tensor, share: Tensor) -> Tensor:
    """log(-log(1 - share r (gamma + r)) / 2) with r = phi(gamma) / Phi(gamma), elementwise.

    A lower bound of what a measured run tells, of whose variance f has the `share` in (0, 1]: of all densities with the
    variance that is left, the Gaussian one has the largest entropy.
    """
    gamma = gamma.clamp_min(LOWEST)
    # gamma + r = (phi + gamma Phi) / Phi, without the cancellation
    removed = share.log() + log_ratio(gamma) + log_h(gamma) - torch.special.log_ndtr(gamma)
    small, large = removed.clamp_max(-20.0), removed.clamp(-20.0, -1e-12)
    return math.log(0.5) + torch.where(removed < -20.0, small, torch.log(-torch.log1p(-large.exp())))


def log_ratio(z: Tensor) -> Tensor:
    """log(phi(z) / Phi(z))."""
    ratio: Tensor = -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(z)
    return ratio
