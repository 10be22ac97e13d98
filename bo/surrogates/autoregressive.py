"""A Gaussian process over scales that is autoregressive: f_t = rho_t f_(t-1) + delta_t, from the smallest scale up.

Kennedy & O'Hagan 2000, "Predicting the output from a complex computer code when fast approximations are available",
eq. 1, as the joint process that it is; so runs need not be nested. rho_t may be negative. The delta_t have variances of
their own and the lengthscales of f_1. Cells come in the order of `Scales`. A scale without runs follows the next
smaller one, by the mean of all rho, of which the prior's doubt is integrated out, and a delta of the mean variance. One
of `across`: each cell has its own level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import across
from bo.surrogates.across import Own, Scales, Treatment
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Block
from bo.surrogates.multi_task import OWN, SPREAD, cells, coregionalised
from bo.surrogates.surrogate import Surrogate


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    scales = Scales.of(features, inputs)
    T = len(scales)

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        rho, delta = own["rho"], own["delta"].exp()
        unit = torch.eye(T, dtype=torch.float64)
        chain = [unit[0].expand(len(rho), -1)]  # what f_t has of f_1, delta_2 ... delta_T
        for t in range(1, T):
            chain.append(rho[:, [t - 1]] * chain[-1] + delta[:, [t - 1]].sqrt() * unit[t])
        L = torch.stack(chain, dim=1)  # p x T x T
        doubt = SPREAD**2 * L.square().sum(-1)
        return cells(L, rho.mean(-1)[:, None, None] * L, doubt + delta.mean(-1, keepdim=True))[:, scales.row(at)]

    blocks = (
        Block("rho", (T - 1,), 1.0, SPREAD, -3.0, 3.0),
        Block("delta", (T - 1,), math.log(OWN), 1.0, math.log(1e-4), math.log(5.0)),
    )
    # A scale that is the opposite of the one before is far from the centre of the prior, where all are alike.
    opposite = tuple({"rho": 1 - 2 * one} for one in np.eye(T - 1))
    return Treatment(blocks, place, coregionalised, opposite)
