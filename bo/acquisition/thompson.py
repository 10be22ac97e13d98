"""Thompson sampling: one function drawn from the posterior; its maximiser is run."""

from __future__ import annotations

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.samples import candidates, joint, whole
from bo.surrogates.composite import Belief

LOG = False
#: Points at which the function is drawn.
POINTS = 256


def make(situation: Situation, points: int = POINTS) -> Acquisition:
    """A sample path of the noise-free objective, in user units: drawn anew each time it is made, then fixed.

    Pending runs change nothing, as in asynchronous Thompson sampling, Kandasamy et al., arXiv 1705.09236: what keeps
    proposals apart is that each has its own path. ValueError for `points` that is no whole number of at least 2.
    """
    Z = candidates(situation, whole("points", points, 2))
    return path(situation.belief, Z, torch.as_tensor(situation.rng.standard_normal(len(Z))))


def path(belief: Belief, Z: Tensor, normal: Tensor) -> Acquisition:
    """The posterior mean given values at Z (k x d) drawn jointly with these k standard normals.

    At Z it is exactly a draw; between, the most likely way to go on from there: the only continuation that a belief of
    any kind can give, smooth, and without the ripples that hundreds of points leave open.
    """
    _, root = joint(belief, Z)
    # cov(X, Z) cov(Z, Z)^-1 (draw - mean), where draw - mean = root normal
    weights = torch.linalg.solve_triangular(root.T, normal[:, None], upper=True)  # k x 1

    def acquisition(X: Tensor) -> Tensor:
        value: Tensor = belief.value(X)[0] + (belief.covariance(X, Z) @ weights).squeeze(-1)
        return value

    return acquisition
