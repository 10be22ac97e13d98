"""A Gaussian process over configurations and scales alike: one Matern-5/2 over (x, log2 of every scale axis).

Scale axes are coordinates as any other, in units of the reach of the runs, with a lengthscale each. The linear term in
the shares is the same at all scales. One of `across`: each cell has its own level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bo.surrogates import across
from bo.surrogates.across import Own, Points, Scales, Treatment
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Block
from bo.surrogates.process import matern
from bo.surrogates.surrogate import Surrogate


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    """Lengthscales of scale have the prior of those of numbers, stretched for the axes too."""
    scales, m = Scales.of(features, inputs), inputs.S.shape[-1]

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        return at.S / scales.reach / own["scale"].exp()[:, None]

    def kernel(one: Points, other: Points, own: Own) -> Tensor:
        u, v = (torch.cat([points.x, points.place], dim=-1) for points in (one, other))
        return matern(u, v) + one.linear(other)

    stretch = math.sqrt(max(1.0, (max(features.groups) + 1 + m) / 2))
    block = Block("scale", (m,), math.log(0.5 * stretch), math.inf, math.log(0.03), math.log(30.0))
    return Treatment((block,), place, kernel)
