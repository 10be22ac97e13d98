"""A Gaussian process over scales by intrinsic coregionalisation, B_ij k(x, x'): each cell is a task.

Bonilla et al. 2007, "Multi-task Gaussian process prediction"; Swersky et al. 2013, "Multi-task Bayesian optimization".
B = w w' + diag(v): what a cell has in common with the others by its loading w, of either sign, and what it has of its
own. Where scales lie does not count while they have runs. A scale without runs is as the next smaller one, and has as
much beside as cells have of their own on average. One of `across`: each cell has its own level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import across
from bo.surrogates.across import Own, Points, Scales, Treatment
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Block
from bo.surrogates.surrogate import Surrogate

#: Standard deviation of how much a cell has in common with the others, about one, and the centre of the variance that
#: it has of its own, as a share of the amplitude.
SPREAD, OWN = 1.0, 0.5


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Maximum a posteriori, as `across.fit` has it."""
    return across.fit(features, inputs, Y, start, treatment)


def treatment(features: Features, inputs: Inputs) -> Treatment:
    scales = Scales.of(features, inputs)
    T = len(scales)

    def place(at: Inputs, x: Tensor, own: Own) -> Tensor:
        variance = own["own"].exp()
        L = torch.cat([own["loading"][..., None], variance.sqrt().diag_embed()], dim=-1)  # p x T x (1 + T)
        return cells(L, L, variance.mean(-1, keepdim=True).expand(-1, T))[:, scales.row(at)]

    blocks = (
        Block("loading", (T,), 1.0, SPREAD, -3.0, 3.0),
        Block("own", (T,), math.log(OWN), 1.0, math.log(1e-4), math.log(5.0)),
    )
    # A cell that is the opposite of the others is far from the centre of the prior, where all are alike.
    opposite = tuple({"loading": 1 - 2 * one} for one in np.eye(T))
    return Treatment(blocks, place, coregionalised, opposite)


def cells(L: Tensor, beyond: Tensor, own: Tensor) -> Tensor:
    """What `coregionalised` has to know of T cells with runs, then of one without after each: p x 2T x (q + 1).

    L, beyond: p x T x q, their loadings on independent functions. own: p x T, variances that the latter have beside.
    """
    roots = torch.cat([torch.zeros_like(own), own.sqrt()], dim=-1)
    return torch.cat([torch.cat([L, beyond], dim=1), roots[..., None]], dim=-1)


def coregionalised(one: Points, other: Points, own: Own) -> Tensor:
    """B_ij k(x, x'), of what `cells` returned."""
    B = one.place[..., :-1] @ other.place[..., :-1].mT
    roots = one.place[..., -1][..., :, None] * other.place[..., -1][..., None, :]
    return (B + one.same(other) * roots) * one.alike(other)
