"""Gradients, by differences, through what is only known in numpy: curves of schedules, the way back into a space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from search_spaces.parameter import Array

#: Half the distance of the two points of a difference: the cube root of the rounding error, where both errors balance.
STEP = 1e-5


def differentiable(function: Callable[[Array], Array], X: Tensor, columns: tuple[int, ...]) -> Tensor:
    """function(X), b x d -> b x m, row by row, with central differences over some columns of the cube as gradient.

    The gradient in every other column is zero. Where a step would leave [0, 1] it ends there.
    """
    if X.requires_grad and columns:
        value: Tensor = _Differences.apply(X, function, columns)  # type: ignore[no-untyped-call]
        return value
    return torch.as_tensor(function(X.detach().numpy()))


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, function: Callable[[Array], Array], columns: tuple[int, ...]) -> Tensor:
        """Value and slopes by one call, since a call of numpy costs more than its rows."""
        x, index = X.detach().numpy(), list(columns)
        c, (b, d) = len(index), x.shape
        each = np.arange(c)
        ends = np.tile(x, (2, c, 1, 1))  # 2 x c x b x d
        ends[0, each, :, index] = np.minimum(ends[0, each, :, index] + STEP, 1.0)
        ends[1, each, :, index] = np.maximum(ends[1, each, :, index] - STEP, 0.0)
        step = ends[0, each, :, index] - ends[1, each, :, index]  # c x b
        values = function(np.concatenate([x, ends.reshape(2 * c * b, d)]))
        up, down = values[b:].reshape(2, c, b, -1)
        ctx.d, ctx.index = d, index
        ctx.slope = torch.as_tensor((up - down) / step[..., None])  # c x b x m
        return torch.as_tensor(values[:b])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found = gradient.new_zeros(len(gradient), ctx.d)
        found[:, ctx.index] = torch.einsum("cbm,bm->bc", ctx.slope, gradient)
        return found, None, None
