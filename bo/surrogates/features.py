"""From the unit cube of a space to the inputs of a kernel, differentiable in torch.

Numbers stay as they are (the space has already taken logs); a choice becomes one-hot; shares become w^(1/3), the power
under which losses of real mixtures are smoothest. A coordinate that is not active (it belongs to an option not chosen)
is constant, so it can never influence the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from search_spaces import Choice, Mixture, Space
from search_spaces.parameter import Parameter

#: Added to every z before shares are formed: keeps the chart differentiable where all z vanish; changes no share by
#: more than 1e-15 elsewhere.
TINY = 1e-6
#: Drift of an optimum along a linear axis, in ranges an octave of scale, next to one of an octave on a log axis.
LINEAR_DRIFT = 1 / 3


@dataclass(frozen=True)
class Inputs:
    """n points as the kernel sees them.

    F: n x D features, those of numeric columns first, in the order of `Features.numeric`. places: C x J x m, the
    different places on the scale axes that numeric features of a point have, zero for a feature that is not active.
    membership: n x C, one where a point has these places, zero elsewhere. cell: n, equal for points of one scale.
    """

    F: Tensor
    places: Tensor
    membership: Tensor
    cell: Tensor

    def __len__(self) -> int:
        return len(self.F)

    def join(self, other: Inputs) -> Inputs:
        return Inputs(
            torch.cat([self.F, other.F]),
            torch.cat([self.places, other.places]),
            torch.block_diag(self.membership, other.membership),  # type: ignore[no-untyped-call]
            torch.cat([self.cell, other.cell]),
        )


@dataclass(frozen=True)
class Features:
    """The map from encoded points of one space to kernel inputs: D features in G groups that share a lengthscale."""

    space: Space

    @cached_property
    def numeric(self) -> tuple[int, ...]:
        """Columns that hold numbers: J of them."""
        return tuple(i for i, column in enumerate(self.space.columns) if column.kind in ("real", "integer"))

    @cached_property
    def choices(self) -> tuple[int, ...]:
        return tuple(i for i, column in enumerate(self.space.columns) if column.kind == "choice")

    @cached_property
    def mixtures(self) -> tuple[tuple[int, ...], ...]:
        """Columns of each mixture."""
        return tuple(_mixtures(self.space.parameters, 0)[0])

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Group of each feature (D): numeric columns alone, a choice one for its options, every share alone."""
        sizes = [1] * len(self.numeric)
        sizes += [self.space.columns[i].levels for i in self.choices]
        sizes += [1] * sum(map(len, self.mixtures))
        return tuple(group for group, size in enumerate(sizes) for _ in range(size))

    @property
    def shares(self) -> int:
        """Number of features that are shares; they come last."""
        return sum(map(len, self.mixtures))

    @cached_property
    def drift_unit(self) -> Tensor:
        """Ranges of each numeric column (J) in which a drift of one octave an octave is expressed."""
        octaves = [self.space.columns[i].octaves for i in self.numeric]
        return torch.tensor([1 / o if o else LINEAR_DRIFT for o in octaves], dtype=torch.float64)

    def __call__(self, X: Tensor, S: Tensor, cell: Tensor) -> Inputs:
        """X: n x d encoded points; S: n x m places on the scale axes; cell: n."""
        active = torch.as_tensor(self.space.active(X.detach().numpy()))  # n x d
        held = torch.where(active, X, 0.5)
        parts = [held[:, list(self.numeric)]]
        for i in self.choices:
            levels = self.space.columns[i].levels
            code = (held[:, i].detach() * levels).long().clamp(0, levels - 1)
            # Two different options are at distance one.
            hot = torch.nn.functional.one_hot(code, levels).to(torch.float64) / math.sqrt(2)
            parts.append(hot * active[:, i, None])
        for columns in self.mixtures:
            floors = torch.tensor([self.space.columns[i].floor for i in columns], dtype=torch.float64)
            root = cube_roots(X[:, list(columns)], floors)
            parts.append(torch.where(active[:, list(columns)], root, len(columns) ** (-1 / 3)))
        on = active[:, list(self.numeric)].to(torch.float64)  # n x J
        # A column of zeros, since rows without any entry could not be told apart or found equal.
        rows, which = torch.unique(torch.cat([on.new_zeros(len(X), 1), on, S], dim=-1), dim=0, return_inverse=True)
        J = len(self.numeric)
        places = rows[:, 1 : 1 + J, None] * rows[:, None, 1 + J :]
        membership = torch.nn.functional.one_hot(which, len(rows)).to(torch.float64)
        return Inputs(torch.cat(parts, dim=-1), places, membership, cell)


def cube_roots(z: Tensor, floors: Tensor) -> Tensor:
    """w^(1/3) of the shares w = floor + (1 - sum of floors) z^3 / sum(z^3), n x k -> n x k.

    Where a floor is zero the root is proportional to z: the form below has a finite gradient at z = 0, w^(1/3) has not.
    """
    z = z + TINY
    unit = z / z.pow(3).sum(-1, keepdim=True).pow(1 / 3)  # cubes sum to one
    free = 1 - floors.sum()
    return torch.where(floors > 0, (floors + free * unit.pow(3)).clamp_min(1e-300).pow(1 / 3), free.pow(1 / 3) * unit)


def _mixtures(parameters: Mapping[str, Parameter], start: int) -> tuple[list[tuple[int, ...]], int]:
    """Columns of every mixture under `parameters`, whose first column is `start`, and the first column after them."""
    found = []
    for parameter in parameters.values():
        stop = start + len(parameter.columns(""))
        if isinstance(parameter, Mixture):
            found.append(tuple(range(start, stop)))
        start = stop
        for subspace in parameter.subspaces.values() if isinstance(parameter, Choice) else ():
            inner, start = _mixtures(subspace, start)
            found += inner
    return found, start
