"""Limits on metrics: how likely they are kept.

Expected improvement under limits is the improvement over the best run that keeps them, times the probability that the
new one does: a sum of logarithms (Gardner et al., "Bayesian Optimization with Inequality Constraints", ICML 2014,
eq. 6; in log space Ament et al., arXiv 2310.20708, section 4). While no run keeps them, the probability alone is
maximised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition
from bo.surrogates.composite import Composite
from search_spaces import Scale


def log_feasible(model: Composite, scale: Scale) -> Acquisition:
    """log P(the noise-free metrics keep all limits) at one scale, 0 without limits; differentiable.

    Limits are taken to be broken independently of each other: the sum of log Phi((mean - threshold) / sd), in model
    units.
    """
    outcome, belief = model.data.outcome, model.at(scale)
    first, threshold = len(outcome.mean) - outcome.limits, outcome.threshold[:, None]

    def acquisition(X: Tensor) -> Tensor:
        mean, variance = belief.surrogate.posterior(belief.inputs(X))  # p x b
        z = (mean[first:] - threshold) / variance[first:].clamp_min(1e-300).sqrt()
        each: Tensor = torch.special.log_ndtr(z)
        return each.sum(0)

    return acquisition


def likely_feasible(model: Composite, scale: Scale, X: Tensor) -> Tensor:
    """Which of k x d points keep all limits with a probability of at least one half: k booleans."""
    with torch.no_grad():
        return log_feasible(model, scale)(X).exp() >= 0.5
