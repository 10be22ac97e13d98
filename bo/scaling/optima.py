"""How the best value of a parameter moves with scale, from a study's own runs, by the Step Law's recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from search_spaces.parameter import Array

#: Runs within this share of the best of their cell count as best.
TOLERANCE = 0.0025
RESAMPLES = 1000
#: Of an interval.
COVERAGE = 0.9
#: Directions along which the cells spread by less than this share of the widest one count as not spanned.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Exponent:
    """The power of a scale axis, with a bootstrap interval of 90%."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Optimum:
    """log2 parameter = intercept + slope . log2 scale, at the best runs of each cell."""

    axes: tuple[str, ...]
    """m scale axes."""
    exponents: Mapping[str, Exponent] = field(hash=False)
    """Of the axes whose direction the cells span: where N and D only ever grew together, neither has one."""
    directions: tuple[tuple[float, ...], ...]
    """What the cells span: r orthonormal directions of length m, widest first."""
    along: tuple[Exponent, ...]
    """The exponent along each of them, per doubling."""
    intercept: float
    """log2 of the parameter at 1 on every axis, as far as the cells tell."""
    cells: int
    runs: int
    """The best runs of the cells, to which the line was fitted."""

    @property
    def rank(self) -> int:
        """How many directions the cells span."""
        return len(self.directions)

    def at(self, scale: Mapping[str, float]) -> float:
        """The best value at a scale; ValueError for a scale that lacks an axis.

        Along directions that no cell tells of the value is taken not to move.
        """
        if missing := [axis for axis in self.axes if axis not in scale]:
            raise ValueError(f"The fit needs a scale with the axes {list(self.axes)}, got none for {missing}.")
        place = np.log2([scale[axis] for axis in self.axes])
        slope = np.array([exponent.value for exponent in self.along]) @ np.reshape(
            self.directions, (self.rank, len(place))
        )
        return float(2 ** (self.intercept + place @ slope))


def fit(
    parameter: npt.ArrayLike,
    places: npt.ArrayLike,
    losses: npt.ArrayLike,
    cells: npt.ArrayLike,
    axes: Sequence[str],
    *,
    tolerance: float = TOLERANCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Optimum:
    """The drift of the best value of one parameter: ordinary least squares in logarithms on the best runs of each cell.

    parameter: n, log2 of its value in each run. places: n x m, log2 of the scale on each of `axes`; leave an axis away
    for a parameter that does not depend on it. losses: n, > 0, smaller better; runs that diverged are infinite. cells:
    n, which scale a run belongs to. A run within `tolerance` of the best of its cell counts as best, and all these
    weigh the same (Li et al. 2025, "Predictable Scale", arXiv 2503.04715, and its fit_tool.py). ValueError for arrays
    that do not fit each other, and where no cell has a finite loss.

    The intervals come from `resamples` bootstrap samples of the runs within each cell. They hold what the choice of
    configurations and the noise of the runs leave open, not how far single cells lie off a common line. Of 120 true
    exponents of bowls over two parameters, 12 random runs in each of six cells, they held 93%.
    """
    x, S, y, cell = _finished(parameter, places, losses, cells, axes, tolerance)
    members = [np.flatnonzero(cell == which) for which in np.unique(cell)]
    kept = np.concatenate([_best(rows, y, tolerance) for rows in members])
    basis = _basis(S[[rows[0] for rows in members]])  # m x r
    intercept, slope = _line(x[kept], S[kept], basis)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, basis.shape[1]))
    for b in range(resamples):
        again = [_best(rows[rng.integers(len(rows), size=len(rows))], y, tolerance) for rows in members]
        rows = np.concatenate(again)
        _, drawn[b] = _line(x[rows], S[rows], basis)
    spanned = [a for a in range(len(axes)) if np.allclose(basis @ basis[a], np.eye(len(axes))[a], atol=1e-6)]
    return Optimum(
        axes=tuple(axes),
        exponents={axes[a]: _exponent(slope @ basis[a], drawn @ basis[a]) for a in spanned},
        directions=tuple(tuple(direction) for direction in basis.T.tolist()),
        along=tuple(_exponent(slope[r], drawn[:, r]) for r in range(basis.shape[1])),
        intercept=intercept,
        cells=len(members),
        runs=len(kept),
    )


def _finished(
    parameter: npt.ArrayLike,
    places: npt.ArrayLike,
    losses: npt.ArrayLike,
    cells: npt.ArrayLike,
    axes: Sequence[str],
    tolerance: float,
) -> tuple[Array, Array, Array, npt.NDArray[np.int64]]:
    """The runs that did not diverge, once everything is checked."""
    x, S, y = (np.asarray(given, dtype=np.float64) for given in (parameter, places, losses))
    cell = np.asarray(cells, dtype=np.int64)
    if S.shape != (len(x), len(axes)) or y.shape != x.shape or cell.shape != x.shape:
        raise ValueError(
            f"The fit needs n parameters, n x {len(axes)} places, n losses and n cells, got the shapes {x.shape}, "
            f"{S.shape}, {y.shape} and {cell.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(S).all() and (y > 0).all()):  # NaN is not > 0
        raise ValueError("The fit needs finite parameters and places, and losses > 0, infinite where a run diverged.")
    good = np.isfinite(y)
    if not good.any():
        raise ValueError("The fit needs at least one run with a finite loss, got none.")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}.")
    return x[good], S[good], y[good], cell[good]


def _best(rows: npt.NDArray[np.int64], y: Array, tolerance: float) -> npt.NDArray[np.int64]:
    """Of the runs of one cell (k rows, some maybe several times), those close to the best."""
    best: npt.NDArray[np.int64] = rows[y[rows] <= y[rows].min() * (1 + tolerance)]
    return best


def _basis(places: Array) -> Array:
    """Orthonormal directions (m x r) that c x m places span, widest first, each towards larger scales."""
    _, widths, directions = np.linalg.svd(places - places.mean(axis=0), full_matrices=False)
    basis: Array = directions[widths > NEGLIGIBLE * widths.max(initial=1.0)].T
    return np.where(basis.sum(axis=0) < 0, -basis, basis)


def _line(x: Array, places: Array, basis: Array) -> tuple[float, Array]:
    """Intercept, and slopes (r) along the basis, of ordinary least squares."""
    centre = places.mean(axis=0)
    slope, *_ = np.linalg.lstsq((places - centre) @ basis, x - x.mean())
    return float(x.mean() - centre @ (basis @ slope)), slope


def _exponent(value: float, drawn: Array) -> Exponent:
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Exponent(float(value), float(low), float(high))
