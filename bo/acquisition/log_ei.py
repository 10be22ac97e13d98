"""Expected improvement in log space: where nothing promises much, EI's gradient vanishes, its logarithm's does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_ei(mean: Tensor, sd: Tensor, best: Tensor | float) -> Tensor:
    """log E[max(f - best, 0)] for f ~ N(mean, sd^2), elementwise; larger is better. sd > 0.

    Ament et al., "Unexpected Improvements to Expected Improvement", arXiv 2310.20708, eq. 9: with
    z = (mean - best) / sd it is log sd + log h(z), h(z) = phi(z) + z Phi(z).

    The incumbent `best` is up to the caller; with noisy runs it is the best posterior MEAN over the runs at hand, since
    the best measured value is the luckiest one.
    """
    return sd.log() + log_h((mean - best) / sd)


def log_h(z: Tensor) -> Tensor:
    """log(phi(z) + z Phi(z)), to about 1e-9 relative for every z, with gradients."""
    # Each branch sees only arguments it can handle: torch.where alone would let NaN gradients of the others through.
    near = z.clamp_min(-1.0)
    middle = z.clamp(-1e3, -1.0)
    far = z.clamp_max(-1e3)
    phi = torch.exp(-0.5 * near.square()) / math.sqrt(2 * math.pi)
    log_near = torch.log(phi + near * torch.special.ndtr(near))
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-middle / math.sqrt(2))  # Phi(z) / phi(z)
    log_middle = _log_phi(middle) + torch.log1p(middle * mills)
    log_far = _log_phi(far) - 2 * torch.log(-far) + torch.log1p(-3 / far.square())  # 1 + z mills ~ z^-2 - 3 z^-4
    return torch.where(z > -1.0, log_near, torch.where(z > -1e3, log_middle, log_far))


def _log_phi(z: Tensor) -> Tensor:
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
