"""What criteria that integrate over the posterior share: points to look at, and normal numbers to draw with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.quasirandom import normal_points, sobol_points
from bo.surrogates.composite import Belief
from bo.surrogates.hyperparameters import NumericalError
from search_spaces import Space
from search_spaces.parameter import Array

#: Added to the diagonal of a joint covariance before it is factorised, relative to its largest entry.
JITTER = 1e-8
#: Runs around which `candidates` look closely.
LEADERS = 5
#: Standard deviations within which a point must be able to be the best to be `promising`; beyond lies 1e-9 of one.
REACH = 6.0


def known(situation: Situation) -> Tensor:
    """All that has, or will have, a result at this scale: (k + r) x d."""
    return torch.cat([situation.tried, situation.pending])


def posterior_mean(belief: Belief) -> Acquisition:
    """What a criterion of improvement comes down to while there is nothing to improve on."""

    def acquisition(X: Tensor) -> Tensor:
        return belief.value(X)[0]

    return acquisition


def candidates(situation: Situation, count: int) -> Tensor:
    """Up to `count` allowed points, half of them all over the space, half around the runs of best posterior mean."""
    space, rng = situation.space, situation.rng
    d, seed = len(space.columns), int(rng.integers(2**31))
    around = known(situation)
    near = count // 2 if len(around) else 0
    parts = [space.draw(lambda first, n: sobol_points(d, n, seed, first), 0, count - near)]
    if near:
        with torch.no_grad():
            order = torch.argsort(situation.belief.value(around)[0], descending=True, stable=True)
        leaders = around[order[:LEADERS]].numpy()
        points = nearby(space, leaders[np.arange(near) % len(leaders)], rng)
        points[: len(leaders)] = leaders[:near]
        points[~space.active(points)] = 0.5
        points = space.repair(points)
        if space.constraints:
            points = points[space.satisfies(space.decode_all(points))]
        parts.append(points)
    return torch.as_tensor(np.concatenate(parts))


def nearby(space: Space, centres: Array, rng: np.random.Generator) -> Array:
    """A point of the cube near each of k x d: some numbers and shares moved by steps of many sizes, choices redrawn."""
    width = 10.0 ** rng.uniform(-2.5, -0.5, (len(centres), 1))
    step = width * rng.standard_normal(centres.shape)
    moved = rng.random(centres.shape) < max(0.5, 2 / len(space.columns))
    # A choice is kept or drawn anew: small steps mean nothing between options.
    fresh = rng.random(centres.shape)
    choice = np.array([column.kind == "choice" for column in space.columns])
    redrawn = choice & (rng.random(centres.shape) < 0.2)
    return np.clip(np.where(redrawn, fresh, centres + step * (moved & ~choice)), 0, 1)


def promising(belief: Belief, X: Tensor, most: int) -> Tensor:
    """Mask (k) of the k x d points that could be the best of them by REACH deviations; the `most` likeliest of those.

    No run x moves the mean at x_i by more than |Z| sd(x_i), so the rest hardly adds to an expected maximum.
    """
    with torch.no_grad():
        mean, sd = belief.value(X)
    keep = mean + REACH * sd >= (mean - REACH * sd).max()
    if int(keep.sum()) > most:
        bound = torch.where(keep, mean + 2 * sd, -math.inf)
        keep = torch.zeros_like(keep)
        keep[torch.topk(bound, most).indices] = True
    return keep


def normals(rng: np.random.Generator, s: int, k: int) -> Tensor:
    """s quasi-random points of k independent standard normals: s x k. s should be a power of two."""
    return normal_points(k, s, int(rng.integers(2**31)))


def joint(belief: Belief, Z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k) at k x d points and a lower factor (k x k) of their covariance, with the least jitter needed.

    NumericalError when it cannot be factorised.
    """
    with torch.no_grad():
        mean, covariance = belief.joint(Z[None])
    size = covariance[0].diagonal().max().clamp_min(1e-300)
    eye = torch.eye(len(Z), dtype=torch.float64)
    jitter = JITTER
    while jitter < 1e-1:
        root, failed = torch.linalg.cholesky_ex(covariance[0] + jitter * size * eye)
        if not failed:
            return mean[0], root
        jitter *= 10
    raise NumericalError(f"The joint covariance of {len(Z)} points stayed singular with a jitter of 1% of its size.")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A setting that counts something; ValueError when it is no whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"The acquisition needs {name} to be a whole number of at least {least}, got {value!r}.")
    return value


def amount(name: str, value: Any, least: float = 0.0) -> float:
    """A setting that measures something; ValueError when it is no finite number of at least `least`."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ValueError(f"The acquisition needs {name} to be a finite number of at least {least:g}, got {value!r}.")
    return float(value)
