"""A Gaussian process over scales by the down-sampling kernel, k(x, x') (c + (1-s)^(1+d) (1-s')^(1+d)).

Wu et al. 2019, "Practical multi-fidelity Bayesian optimization for hyperparameter tuning", arXiv 1903.04703; BoTorch's
`DownsamplingKernel`. A smaller run measures the target, of variance c, and something more that vanishes towards it.
Over several scale axes it is the product over axes, each with its own c and d. s is `Scales.fraction`. One of `across`:
each cell has its own level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bo.surrogates import across
from bo.surrogates.across import Own, Points, Scales, Treatment
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Block
from bo.surrogates.process import lift
from bo.surrogates.surrogate import Surrogate

#: The least 1 - s: a power of zero has no slope.
TINY = 1e-12


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    """c and d are Gamma(3, 6), as in BoTorch."""
    scales, m = Scales.of(features, inputs), inputs.S.shape[-1]

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        left: Tensor = (1 - scales.fraction(at.S)).clamp_min(TINY) ** (1 + own["power"].exp())[:, None]
        return left

    def kernel(one: Points, other: Points, own: Own) -> Tensor:
        found = one.alike(other)
        for j in range(m):
            u, v = one.place[..., j], other.place[..., j]
            found = found * (lift(own["offset"][:, j].exp(), found) + u[..., :, None] * v[..., None, :])
        return found

    low, high = math.log(0.01), math.log(10.0)
    return Treatment(
        tuple(Block(name, (m,), math.log(0.5), math.inf, low, high) for name in ("offset", "power")), place, kernel
    )
