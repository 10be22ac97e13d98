"""Upper confidence bound: how good a point might well be."""

from __future__ import annotations

from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.samples import amount

LOG = False
#: Deviations above the mean: what Vizier's bandit takes at all times, Song et al., "The Vizier Gaussian Process Bandit
#: Algorithm", arXiv 2408.11527. The schedule of Srinivas et al. 2010 grows without end, and its authors divide it by 5.
BETA = 1.8


def make(situation: Situation, beta: float = BETA) -> Acquisition:
    """Posterior mean plus `beta` (at least 0) posterior standard deviations of the noise-free objective, user units.

    Pending runs shrink the deviation and leave the mean: GP-BUCB, Desautels et al. 2014, JMLR 15, section 4. ValueError
    for another beta.
    """
    weight, belief = amount("beta", beta), situation.believed

    def acquisition(X: Tensor) -> Tensor:
        mean, sd = belief.value(X)  # b each
        return mean + weight * sd

    return acquisition
