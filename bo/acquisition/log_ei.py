"""Expected improvement in log space: where nothing promises much, EI's gradient vanishes, its logarithm's does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import erfcx, ndtr
from torch import Tensor
from torch.autograd.function import once_differentiable

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.samples import known, posterior_mean
from search_spaces.parameter import Array

LOG = True


def make(situation: Situation) -> Acquisition:
    """log-EI over the best posterior mean among what was tried or is pending; while that is nothing, the mean itself.

    Pending runs are believed to come out as the posterior mean has it.
    """
    points, belief = known(situation), situation.believed
    if not len(points):
        return posterior_mean(belief)
    with torch.no_grad():
        best = belief.mean(points).max()
    return lambda X: log_ei(*belief.value(X), best)


def log_ei(mean: Tensor, sd: Tensor, best: Tensor | float) -> Tensor:
    """log E[max(f - best, 0)] for f ~ N(mean, sd^2), elementwise; larger is better. sd > 0.

    Ament et al., "Unexpected Improvements to Expected Improvement", arXiv 2310.20708, eq. 9: with
    z = (mean - best) / sd it is log sd + log h(z), h(z) = phi(z) + z Phi(z).

    The incumbent `best` is up to the caller; with noisy runs it is the best posterior MEAN over the runs at hand, since
    the best measured value is the luckiest one.
    """
    return sd.log() + log_h((mean - best) / sd)


def log_h(z: Tensor) -> Tensor:
    """log(phi(z) + z Phi(z)), to about 1e-9 relative for every z, with its gradient Phi(z) / h(z)."""
    value: Tensor = _LogH.apply(z)  # type: ignore[no-untyped-call]
    return value


class _LogH(torch.autograd.Function):
    """In closed form, since a search asks for it thousands of times: twenty small steps of autograd cost more."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        value, slope = _log_h(z.detach().numpy())
        ctx.save_for_backward(torch.as_tensor(slope))
        return torch.as_tensor(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return gradient * slope


def _log_h(z: Array) -> tuple[Array, Array]:
    """log h(z) and its derivative, each by three branches that see only arguments they can handle."""
    near, middle, far = np.maximum(z, -1.0), np.clip(z, -1e3, -1.0), np.minimum(z, -1e3)
    below = ndtr(near)
    h = np.exp(-0.5 * np.square(near)) / math.sqrt(2 * math.pi) + near * below
    mills = math.sqrt(math.pi / 2) * erfcx(-middle / math.sqrt(2))  # Phi(z) / phi(z)
    log_middle = _log_phi(middle) + np.log1p(middle * mills)
    log_far = _log_phi(far) - 2 * np.log(-far) + np.log1p(-3 / np.square(far))  # 1 + z mills ~ z^-2 - 3 z^-4
    value = np.where(z > -1.0, np.log(h), np.where(z > -1e3, log_middle, log_far))
    slope = np.where(z > -1.0, below / h, np.where(z > -1e3, mills / (1 + middle * mills), -far - 2 / far))
    return value, slope


def _log_phi(z: Array) -> Array:
    return np.asarray(-0.5 * np.square(z) - 0.5 * math.log(2 * math.pi))
