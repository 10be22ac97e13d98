"""A Gaussian process over scales by the linear truncated kernel, k0(x, x') + (1-s)(1-s')(1+ss')^p k1(x, x').

Wu et al. 2019, "Practical multi-fidelity Bayesian optimization for hyperparameter tuning", arXiv 1903.04703; BoTorch's
`LinearTruncatedFidelityKernel`. A smaller run measures the target and a bias, which is smoother in x and vanishes at
the target: so a small run is never taken for the opposite of a large one. Over several scale axes there is a term for
each set A of them, with prod_(j in A) (1-s_j)(1-s'_j) and (1 + sum_(j in A) s_j s'_j)^p; with one axis or two these are
BoTorch's. Of other studies, of which there may be many, each has one for itself alone. s is `Scales.fraction`. One of
`across`: each cell has its own level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import across
from bo.surrogates.across import Own, Points, Scales, Treatment
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Block, Layout
from bo.surrogates.process import lift, matern
from bo.surrogates.surrogate import Surrogate

#: How much longer lengthscales of the bias are believed to be: Gamma(3, 1) of two numbers, in BoTorch Gamma(6, 2).
SMOOTHER = 6.0
#: The largest power.
POWERS = 4


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    """p is Gamma(3, 3), as in BoTorch. The variance of the bias, in BoTorch that of k0, is its own, about as large."""
    scales, m, ours = Scales.of(features, inputs), inputs.S.shape[-1], len(features.axes)
    sets = [list(axes) for axes in chain.from_iterable(combinations(range(ours), size) for size in range(1, ours + 1))]
    sets += [[study] for study in range(ours, m)]

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        s = scales.fraction(at.S).expand(len(x), -1, -1)
        return torch.cat([s, x / own["biased"].exp()[:, None, list(features.groups)]], dim=-1)

    def kernel(one: Points, other: Points, own: Own) -> Tensor:
        s, t = one.place[..., :m], other.place[..., :m]
        factor = torch.zeros((), dtype=torch.float64)
        for axes in sets:
            u, v = s[..., axes], t[..., axes]
            left = (1 - u).prod(-1)[..., :, None] * (1 - v).prod(-1)[..., None, :]
            factor = factor + left * power(u @ v.mT, own["power"].exp())
        bias = lift(own["bias"].exp(), s) * matern(one.place[..., m:], other.place[..., m:])
        return one.alike(other) + factor * bias

    stretch = Layout.of(features, inputs, across=False).stretch
    low, high = math.log(0.03), math.log(30.0 * SMOOTHER)
    blocks = (
        Block("biased", stretch.shape, np.log(0.5 * SMOOTHER * stretch), math.inf, low, high),
        Block("bias", (), 0.0, 1.0, math.log(1e-4), math.log(100.0)),
        Block("power", (), 0.0, math.inf, math.log(0.01), math.log(POWERS)),
    )
    return Treatment(blocks, place, kernel)


def power(product: Tensor, p: Tensor) -> Tensor:
    """(1 + product)^p for a whole p (one a metric), a straight line in p between them, up to POWERS.

    Over four scales or more a power that is not whole need not make a positive definite kernel, in BoTorch either:
    FitzGerald & Horn 1977, "On fractional Hadamard powers of positive definite matrices".
    """
    found = torch.ones_like(product)
    for k in range(POWERS):
        found = found * (1 + lift((p - k).clamp(0, 1), product) * product)
    return found
