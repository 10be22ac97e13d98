"""A surrogate that is given by s functions, drawn from a posterior or fitted to parts of the runs.

Their mean and covariance are the posterior's. A few functions cannot tell apart what many points would say: to
believe in as many points as there are functions would leave nothing open anywhere. So the covariance is tapered with
distance, as in ensemble Kalman filters (Houtekamer & Mitchell 2001, "A sequential ensemble Kalman filter for
atmospheric data assimilation", section 2c); the product of two covariances is one, and variances stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.process import Coordinates, Process, Standard, lift, matern

Members = Callable[[Inputs], Tensor]
"""b points -> p x s x b, standardised."""

#: Lengthscale of the taper in ranges of a parameter, for two of them; it grows with the root of their number.
TAPER = 1.0
#: As if so many more runs had been foretold, each wrong by a standard deviation of the outcomes.
PRIOR_RUNS = 2.0
#: The least variance of functions and of noise, standardised.
LEAST = 1e-6
#: The most that spread is stretched by, as a factor of the standard deviation.
STRETCH = 10.0


@dataclass(frozen=True)
class Spread:
    """How wrong functions are about runs that were left out, p each, standardised.

    stretch: what their deviations from their mean are multiplied by. rest: variance that they lack everywhere.
    """

    stretch: Tensor
    rest: Tensor

    @classmethod
    def of(cls, away: Tensor, variance: Tensor, noise: Tensor) -> Spread:
        """away, variance: n x p, errors about left-out runs and variances of functions there. noise: p.

        Functions that were fitted alike are too much alike; what is not noise is taken as theirs.
        """
        n = len(away)
        missed = ((away.square().sum(0) - n * noise).clamp_min(0) + PRIOR_RUNS) / (n + PRIOR_RUNS)
        usual = variance.mean(0)
        stretch = (missed / usual.clamp_min(LEAST)).sqrt().clamp(1 / STRETCH, STRETCH)
        return cls(stretch, (missed - stretch.square() * usual).clamp_min(LEAST))

    def __call__(self, variance: Tensor) -> Tensor:
        """What variances (n x p) of functions amount to."""
        return self.stretch.square() * variance + self.rest


def sampled(
    features: Features,
    coordinates: Coordinates,
    inputs: Inputs,
    members: Members,
    standard: Standard,
    noise: Tensor,
    left_out: tuple[Tensor, Tensor],
    remembered: Mapping[str, Any],
    spread: Spread | None = None,
) -> Process:
    """The process of s functions. noise (p) and left_out (n x p each) are standardised."""
    p, sd = len(standard.mean), standard.sd
    width = TAPER * math.sqrt(max(1.0, (max(features.groups) + 1 + len(coordinates.reach)) / 2))
    stretch, rest = (sd, LEAST * sd.square()) if spread is None else (sd * spread.stretch, sd.square() * spread.rest)

    def mean(at: Inputs) -> Tensor:
        return standard.mean[:, None] + sd[:, None] * members(at).mean(1)

    def embed(at: Inputs) -> Tensor:
        found = members(at)
        away = (found - found.mean(1, keepdim=True)) * lift(stretch, found) / math.sqrt(found.shape[1] - 1)
        where = (coordinates(at) / width).expand(p, -1, -1)
        return torch.cat([away.mT, where], dim=-1)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u[..., :-D] @ v[..., :-D].mT + lift(rest, u)) * matern(u[..., -D:], v[..., -D:])

    D = len(coordinates.shift) + len(coordinates.reach)
    with torch.no_grad():
        nothing = embed(inputs)[:, :0]
    left_mean, left_variance = left_out
    return Process(
        features,
        mean,
        embed,
        kernel,
        sd.square(),
        noise * sd.square(),
        known=nothing,
        alpha=nothing[..., 0],
        chol=nothing @ nothing.mT,
        left_out=(standard.mean + sd * left_mean, sd.square() * left_variance),
        remembered=remembered,
    )
