"""From the unit cube of a space to the inputs of a kernel, differentiable in torch.

Numbers stay as they are (the space has already taken logs); a choice becomes one-hot; a schedule becomes its curve;
shares become w^(1/3), from which the kernel takes the power of the shares it has learned. A coordinate that is not
active (it belongs to an option not chosen) is constant, so it can never influence the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bo.surrogates.differences import differentiable
from search_spaces import Schedule, Space
from search_spaces.parameter import Array
from search_spaces.schedule import PROGRESS

#: Added to every z before shares are formed: keeps the chart, and every power of a share, differentiable where z
#: vanishes; changes no share by more than 1e-15 unless all vanish.
TINY = 1e-6
#: Drift of an optimum along a linear axis, in ranges an octave of scale, next to one of an octave on a log axis.
LINEAR_DRIFT = 1 / 3
#: Standard deviation of the drift of an optimum that nothing is believed of, in octaves an octave.
DRIFT_SD = 0.35
#: Where the parts of a curve end, as fractions of training: warm-up, the middle, the decay. Each has its lengthscale.
PARTS = (0.1, 0.8, 1.0)


@dataclass(frozen=True)
class Inputs:
    """n points as the kernel sees them.

    F: n x D features, those of numeric columns first, in the order of `Features.numeric`, cube roots of shares last.
    on: n x J, whether each numeric feature is active. S: n x m places on the scale axes. cell: n, equal for points of
    one scale.
    """

    F: Tensor
    on: Tensor
    S: Tensor
    cell: Tensor

    def __len__(self) -> int:
        return len(self.F)

    @property
    def across(self) -> bool:
        """Whether points are of several scales, or of one that is not the target."""
        return bool((self.cell != self.cell[:1]).any() or (self.S != 0).any())

    @cached_property
    def _different(self) -> tuple[Tensor, Tensor]:
        """The different rows of (cell, on, S), and which of them each point has."""
        rows = torch.cat([self.cell[:, None].to(torch.float64), self.on.to(torch.float64), self.S], dim=-1)
        different: tuple[Tensor, Tensor] = torch.unique(rows, dim=0, return_inverse=True)
        return different

    @property
    def kind(self) -> Tensor:
        """n, which of the C different kinds each point is of: of one cell, with the same numeric features active."""
        return self._different[1]

    @property
    def cells(self) -> Tensor:
        """C, the cell of each kind."""
        return self._different[0][:, 0]

    @property
    def scales(self) -> Tensor:
        """C x m, the place of each kind."""
        rows, J = self._different[0], self.on.shape[-1]
        return rows[:, 1 + J :]

    @property
    def places(self) -> Tensor:
        """C x J x m, the places that the numeric features of each kind have, zero for one that is not active."""
        rows, J = self._different[0], self.on.shape[-1]
        return rows[:, 1 : 1 + J, None] * rows[:, None, 1 + J :]

    @property
    def membership(self) -> Tensor:
        """n x C, one where a point is of the kind, zero elsewhere."""
        return (self.kind[:, None] == torch.arange(len(self.cells))).to(torch.float64)  # one_hot refuses no points

    def join(self, other: Inputs) -> Inputs:
        return Inputs(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in ("F", "on", "S", "cell")))

    def rows(self, index: Tensor) -> Inputs:
        """Some of the points, by their numbers or by a mask."""
        return Inputs(self.F[index], self.on[index], self.S[index], self.cell[index])


@dataclass(frozen=True)
class Features:
    """The map from encoded points of one space to kernel inputs: D features in G groups that share a lengthscale.

    drift: what is believed of drifts, (parameter, scale axis) -> mean and standard deviation in octaves an octave;
    nothing in particular of those that are not there.
    """

    space: Space
    drift: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def numeric(self) -> tuple[int, ...]:
        """Columns that hold numbers: J of them. The settings of a schedule count through its curve only."""
        columns = enumerate(self.space.columns)
        return tuple(i for i, column in columns if column.kind in ("real", "integer") and not column.schedule)

    @cached_property
    def choices(self) -> tuple[int, ...]:
        columns = enumerate(self.space.columns)
        return tuple(i for i, column in columns if column.kind == "choice" and not column.schedule)

    @cached_property
    def schedules(self) -> tuple[tuple[Schedule, tuple[int, ...]], ...]:
        """Every schedule that varies, and its columns."""
        found = []
        for place in self.space.placed:
            if isinstance(place.parameter, Schedule) and place.stop > place.start:
                found.append((place.parameter, tuple(range(place.start, place.stop))))
        return tuple(found)

    @cached_property
    def mixtures(self) -> tuple[tuple[int, ...], ...]:
        """Columns of each simplex."""
        found: dict[str, list[int]] = {}
        for i, column in enumerate(self.space.columns):
            if column.kind == "share":
                found.setdefault(column.mixture, []).append(i)
        return tuple(map(tuple, found.values()))

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Group of each feature (D).

        Numeric columns are alone, a choice has one for its options, a schedule one for each part of its curve, and
        every share is alone.
        """
        sizes = [1] * len(self.numeric)
        sizes += [self.space.columns[i].levels for i in self.choices]
        sizes += [int((_part() == part).sum()) for _ in self.schedules for part in range(len(PARTS))]
        sizes += [1] * len(self.centres)
        return tuple(group for group, size in enumerate(sizes) for _ in range(size))

    @cached_property
    def centres(self) -> Tensor:
        """What each share is when all of its simplex are equal: as many as there are shares."""
        equal = [
            (sum(self.space.columns[i].floor for i in columns) + self.space.columns[columns[0]].free) / len(columns)
            for columns in self.mixtures
            for _ in columns
        ]
        return torch.tensor(equal, dtype=torch.float64)

    @cached_property
    def drift_unit(self) -> Tensor:
        """Ranges of each numeric column (J) in which a drift of one octave an octave is expressed."""
        octaves = [self.space.columns[i].octaves for i in self.numeric]
        return torch.tensor([1 / o if o else LINEAR_DRIFT for o in octaves], dtype=torch.float64)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the scale axes."""
        fidelity = self.space.fidelity
        return () if fidelity is None else tuple(axis.name for axis in fidelity.axes)

    @cached_property
    def believed_drift(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the drift of each numeric column along each scale axis: J x m each."""
        pairs = [[(self.space.columns[i].name.split(".")[-1], axis) for axis in self.axes] for i in self.numeric]
        table = [[self.drift.get(pair, (0.0, DRIFT_SD)) for pair in row] for row in pairs]
        found = torch.tensor(table, dtype=torch.float64).reshape(len(pairs), len(self.axes), 2)
        return found[..., 0], found[..., 1]

    def __call__(self, X: Tensor, S: Tensor, cell: Tensor) -> Inputs:
        """X: n x d encoded points; S: n x m places on the scale axes; cell: n."""
        if self._flat:
            return Inputs(X, torch.ones_like(X, dtype=torch.bool), S, cell)
        active = torch.as_tensor(self.space.active(X.detach().numpy()))  # n x d
        held = torch.where(active, X, 0.5)
        parts = [held[:, list(self.numeric)]]
        for i in self.choices:
            levels = self.space.columns[i].levels
            code = (held[:, i].detach() * levels).long().clamp(0, levels - 1)
            # Two different options are at distance one.
            hot = torch.nn.functional.one_hot(code, levels).to(torch.float64) / math.sqrt(2)
            parts.append(hot * active[:, i, None])
        parts += [self._curve(schedule, columns, held, active, S) for schedule, columns in self.schedules]
        sizes = [len(columns) for columns in self.mixtures]
        for columns, equal in zip(self.mixtures, torch.split(self.centres, sizes), strict=True):
            floors = torch.tensor([self.space.columns[i].floor for i in columns], dtype=torch.float64)
            root = cube_roots(X[:, list(columns)], floors, self.space.columns[columns[0]].free)
            parts.append(torch.where(active[:, list(columns)], root, equal.pow(1 / 3)))
        return Inputs(torch.cat(parts, dim=-1), active[:, list(self.numeric)], S, cell)

    @cached_property
    def _flat(self) -> bool:
        """Whether there are numbers only, in every config."""
        return all(column.kind in ("real", "integer") and not column.when for column in self.space.columns) and len(
            self.numeric
        ) == len(self.space.columns)

    def _curve(self, schedule: Schedule, columns: tuple[int, ...], held: Tensor, active: Tensor, S: Tensor) -> Tensor:
        """n x m factors along training, as features: training sees the curve alone, so its family is no feature.

        In each part the squared distance of two curves is their mean squared difference. Two draws of the usual
        families over their default ranges are then 0.3 apart, two of all families 0.4, as two numbers of [0, 1] are.
        """
        on = active[:, list(columns)]
        place = S[:, self.axes.index("tokens")] if "tokens" in self.axes else None

        def factors(rows: Array) -> Array:
            x = rows[:, : len(columns)]
            if place is None or self.space.fidelity is None:
                return schedule.curves(x, None)
            return schedule.curves(x, self.space.fidelity.target["tokens"] * 2.0 ** rows[:, -1])

        rows = held[:, list(columns)]
        tunes = enumerate(zip(columns, on.any(0).tolist(), strict=True))
        tuned = tuple(i for i, (column, used) in tunes if used and self.space.columns[column].kind != "choice")
        curve = differentiable(factors, rows if place is None else torch.cat([rows, place[:, None]], dim=-1), tuned)
        size = torch.bincount(_part())[_part()]
        return torch.where(on.any(-1, keepdim=True), curve / size.sqrt(), 0.0)


def _part() -> Tensor:
    """Which of PARTS each of PROGRESS is in."""
    return torch.bucketize(torch.tensor(PROGRESS), torch.tensor(PARTS, dtype=torch.float64))


def cube_roots(z: Tensor, floors: Tensor, free: float) -> Tensor:
    """w^(1/3) of the shares w = floor + free z^3 / sum(z^3), n x k -> n x k.

    Where a floor is zero the root is proportional to z: the form below has a finite gradient at z = 0, w^(1/3) has not.
    """
    z = z + TINY
    unit = z / z.pow(3).sum(-1, keepdim=True).pow(1 / 3)  # cubes sum to one
    return torch.where(floors > 0, (floors + free * unit.pow(3)).clamp_min(1e-300).pow(1 / 3), free ** (1 / 3) * unit)
