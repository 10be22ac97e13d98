"""Expected improvement of a batch: what a run adds to those that are under way, whose outcomes are integrated out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.log_ei import log_ei
from bo.acquisition.noisy_ei import MOST, SAMPLES, integrated
from bo.acquisition.samples import normals, posterior_mean, promising, whole

LOG = True


def make(situation: Situation, samples: int = SAMPLES, most: int = MOST) -> Acquisition:
    """log E[max(f(x) - max(f(pending), best), 0)], `best` the best posterior mean over tried points.

    It is what the joint EI of the batch, pending and x, has above that of the pending runs (Ginsbourger et al. 2010),
    so that a batch chosen one by one is the greedy maximiser of the joint EI. Of more than `most` pending runs the
    least promising are believed. Without tried points the pending ones set what there is to improve on; without
    either, it is the posterior mean. ValueError for `samples` or `most` that are no whole numbers above zero.
    """
    whole("samples", samples)
    whole("most", most)
    belief, tried, pending = situation.belief, situation.tried, situation.pending
    best = belief.value(tried)[0].max().detach() if len(tried) else torch.tensor(-math.inf, dtype=torch.float64)
    if len(pending):
        keep = promising(belief, pending, most)
        if len(pending) > most:
            belief = belief.believe(pending[~keep])
        pending = pending[keep]
        return integrated(belief, pending, normals(situation.rng, samples, len(pending)), best)
    if not len(tried):
        return posterior_mean(belief)

    def acquisition(X: Tensor) -> Tensor:
        return log_ei(*belief.value(X), best)

    return acquisition
