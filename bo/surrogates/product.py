"""A Gaussian process over scales by a product, k(x, x') k_s(s, s'), both Matern-5/2 with a lengthscale each.

Kandasamy et al. 2017, "Multi-fidelity Bayesian optimisation with continuous approximations", arXiv 1703.06240. Runs
tell the less about a scale the further away they are from it, whatever x is. One of `across`: each cell has its own
level.
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
from bo.surrogates.process import matern
from bo.surrogates.surrogate import Surrogate


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    """Lengthscales of scale are in the reach of the runs on each axis, about once that, give or take a factor e."""
    scales = Scales.of(features, inputs)

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        return at.S / scales.reach / own["scale"].exp()[:, None]

    def kernel(one: Points, other: Points, own: Own) -> Tensor:
        return one.alike(other) * matern(one.place, other.place)

    block = Block("scale", (inputs.S.shape[-1],), 0.0, 1.0, math.log(0.03), math.log(30.0))
    return Treatment((block,), place, kernel)
