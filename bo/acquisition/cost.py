"""What a run costs: improvement per second in the place of improvement, all the way or less and less so."""

from __future__ import annotations

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition
from bo.surrogates import surrogate
from bo.surrogates.features import Features
from search_spaces import Space

#: Runs from which on differences between them are modelled, and the least spread of log seconds worth it.
ENOUGH, SPREAD = 5, 1e-3


def log_cost(
    space: Space, X: Tensor, S: Tensor, cell: Tensor, seconds: Tensor, place: Tensor, here: int
) -> Acquisition:
    """log seconds of a run (its median, in effect) at encoded points of one scale: b x d -> b, differentiable.

    A Gaussian process of the logarithm, since costs are positive and multiply, fitted to n finished runs: X: n x d,
    S: n x m, cell: n, as in `Dataset`; seconds: n, above zero. place (m) and `here` are those of the scale asked about.
    With fewer than five runs, or equal ones, it is their mean; without any it is zero, which decides nothing.
    ValueError for seconds that are not finite and above zero.
    """
    wrong = seconds[~(torch.isfinite(seconds) & (seconds > 0))]
    if len(wrong):
        raise ValueError(
            f"Costs must be finite numbers of seconds above zero, got {float(wrong[0])!r}; leave that run out."
        )
    y = seconds.log()
    mean = y.mean() if len(y) else torch.tensor(0.0, dtype=torch.float64)
    sd = y.std() if len(y) >= ENOUGH else torch.tensor(0.0, dtype=torch.float64)
    if sd < SPREAD:
        return lambda X: mean.expand(len(X))
    features = Features(space)
    model = surrogate.fit("gp", features, features(X, S, cell), ((y - mean) / sd)[:, None])

    def predicted(X: Tensor) -> Tensor:
        there = torch.full((len(X),), here, dtype=torch.long)
        level, _ = model.posterior(features(X, place.expand(len(X), -1), there))
        return mean + sd * level[0]

    return predicted


def term(log_cost: Acquisition, alpha: float = 1.0) -> Acquisition:
    """The logarithm of 1 / cost^alpha, to be added to that of a utility.

    alpha = 1 is utility per cost; alpha = `Situation.left` cools from there to plain improvement as the budget is spent
    (Lee et al., "Cost-aware Bayesian Optimization", arXiv 2003.10870). ValueError for an alpha outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"The exponent of a cost must be between 0 and 1, got {alpha!r}.")

    return lambda X: -alpha * log_cost(X)
