"""Where the inequalities of a space hold: tests, the way back inside, and random points of it.

Everything is decided by the inequalities themselves at decoded values, so sums, products and anything between them,
logarithmic axes and integers are all alike. A point outside is pulled towards an anchor, a point well inside, to where
that way first meets the allowed set.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces.constraint import Inequality
from search_spaces.parameter import (
    Array,
    Choice,
    Column,
    Fixed,
    Integer,
    Parameter,
    Real,
    codes_of,
    is_number,
    suggestion,
)

Mask: TypeAlias = npt.NDArray[np.bool_]

#: A point that breaks an inequality by less than this, relative to its sides, is left alone: it is rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Place:
    """A parameter and its place: columns start .. stop - 1, and for a Choice of sub-spaces the places of each code."""

    name: str
    parameter: Parameter
    start: int
    stop: int
    when: tuple[tuple[int, int], ...]
    """It counts only where, for each pair (column, code), that choice column has that code."""
    branches: tuple[tuple["Place", ...], ...]

    def numbers(self, x: Array, relaxed: bool) -> Array:
        """The `n` values at (n, d) points as numbers; integers as they are before rounding when `relaxed`."""
        columns = x[:, self.start : self.stop]
        if isinstance(self.parameter, Integer):
            return self.parameter.relaxed(columns) if relaxed else self.parameter.numbers(columns)
        if isinstance(self.parameter, Real):
            return self.parameter.numbers(columns)
        return np.array(self.parameter.decode(columns), dtype=np.float64)


def counts(part: Place | Column, x: Array, columns: Sequence[Column]) -> Mask:
    """(n, d) points -> (n,): whether the option, or family, that a place or a column belongs to is chosen."""
    on = np.ones(len(x), dtype=np.bool_)
    for condition, code in part.when:
        on &= codes_of(x[:, condition], columns[condition].levels) == code
    return on


@dataclass(frozen=True)
class Region:
    """The points of a space at which inequalities hold.

    `relaxed` reads integers before they are rounded, which makes the region's border smooth.
    """

    columns: tuple[Column, ...]
    inequalities: tuple[Inequality, ...]
    places: Mapping[str, tuple[Place, ...]]
    """Where the numbers that they name are; one name may stand in several options."""
    _known: dict[tuple[bool, ...], Array] = field(default_factory=dict, repr=False)
    """Points inside, the anchor first, by which of the places count; found when first needed."""

    @classmethod
    def of(cls, columns: tuple[Column, ...], inequalities: Sequence[Inequality], placed: Sequence[Place]) -> "Region":
        """ValueError when an inequality names what is not there, or no number."""
        places: dict[str, tuple[Place, ...]] = {}
        for inequality in inequalities:
            for name in inequality.names:
                places[name] = tuple(place for place in placed if place.name == name)
                _check_numbers(inequality, name, places[name], placed)
            _check_together(inequality, [places[name] for name in inequality.names])
        return cls(columns, tuple(inequalities), places)

    @property
    def moved(self) -> tuple[int, ...]:
        """The columns that the inequalities name."""
        return tuple(sorted({i for place in self._each for i in range(place.start, place.stop)}))

    @property
    def _each(self) -> list[Place]:
        return [place for places in self.places.values() for place in places]

    def refuse_empty(self) -> None:
        """ValueError when nothing is found inside for some choice of options: every point of the cube is read there."""
        choices = sorted({column for place in self._each for column, _ in place.when})
        levels = [self.columns[column].levels for column in choices]
        codes = np.array(list(itertools.product(*map(range, levels))), dtype=np.float64)
        x = np.full((len(codes), len(self.columns)), 0.5)
        x[:, choices] = (codes + 0.5) / levels
        if self.inequalities:
            for _ in self._inside(x, self._free(x)):
                pass  # looking is enough

    def holds(self, x: Array) -> Mask:
        """(n, d) points -> (n,): whether every inequality holds at what the point decodes to."""
        return np.asarray(np.all(self._excess(x, relaxed=False) <= 0, axis=1))

    def pull(self, x: Array, relaxed: bool, slack: float = ROUNDING) -> Array:
        """The points (n, d), those that break an inequality by more than `slack` moved on the way to their anchor."""
        bad = np.any(self._excess(x, relaxed) > slack, axis=1)
        if not bad.any():
            return x
        outer = x[bad]
        free = self._free(outer)
        anchor = np.empty_like(outer)
        for rows, inside in self._inside(outer, free):
            anchor[rows] = inside[0]
        start, way = np.where(free, anchor, outer), np.where(free, outer - anchor, 0.0)
        low, width = np.zeros(len(outer)), 1.0
        eighths = np.arange(1, 8) / 8
        for _ in range(14):  # eighths of eighths: as good as 42 halvings, in a third of the calls
            t = low[:, None] + width * eighths  # n x 7
            at = start[:, None] + t[..., None] * way[:, None]  # n x 7 x d
            good = np.all(self._excess(at.reshape(-1, at.shape[-1]), relaxed) <= 0, axis=1).reshape(t.shape)
            width /= 8
            low += width * np.where(good.all(axis=1), 7, good.argmin(axis=1))
        low *= 1 - 1e-9  # a little further in, so that encoding and decoding cannot round it out again
        pulled = x.copy()
        pulled[bad] = start + low[:, None] * way
        return pulled

    def walk(self, x: Array, rng: np.random.Generator) -> Array:
        """Points (n, d) inside, reached from x by hit-and-run steps over the numbers that the inequalities name.

        Each step draws a direction and a point on the line within the cube, and shrinks that line towards where it
        stands until the point is inside (Neal 2003, "Slice sampling", section 5): uniform over the region.
        """
        x = self.pull(x, relaxed=False, slack=0.0).copy()
        free = self._free(x)
        known = list(self._inside(x, free))
        for step in range(10 * len(self.moved)):
            # Along an axis, out of corners; or from one point inside to another, along whatever is thin.
            way = rng.standard_normal(x.shape)
            if step % 2:
                alone = rng.random(x.shape) * free
                way = np.where(alone == alone.max(axis=1, keepdims=True), way, 0.0)
            else:
                for rows, inside in known:
                    one, other = (inside[rng.integers(len(inside), size=rows.sum())] for _ in range(2))
                    way[rows] = one - other + 1e-3 * way[rows] * np.abs(one - other).max(axis=1, keepdims=True)
            way = np.where(free, way, 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = np.sort([-x / way, (1 - x) / way], axis=0)  # 2 x n x d, where the line leaves the cube
            low, high = (np.where(way == 0, end, ends[i]) for i, end in enumerate((-np.inf, np.inf)))
            low, high = low.max(axis=1), high.min(axis=1)
            todo = np.flatnonzero(np.isfinite(high - low))
            for _ in range(60):
                t = low[todo] + rng.random(len(todo)) * (high - low)[todo]
                step = np.clip(x[todo] + t[:, None] * way[todo], 0.0, 1.0)
                good = self.holds(step)
                x[todo[good]] = step[good]
                todo, t = todo[~good], t[~good]
                if not len(todo):
                    break
                low[todo], high[todo] = np.where(t < 0, t, low[todo]), np.where(t > 0, t, high[todo])
        return x

    def _excess(self, x: Array, relaxed: bool) -> Array:
        """(n, d) points -> (n, c): of each inequality, at most 0 where it holds or says nothing."""
        values: dict[str, Array] = {}
        present: dict[str, Mask] = {}  # of the names that not every point has
        for name, places in self.places.items():
            if not places[0].when:  # then it is the only one
                values[name] = places[0].numbers(x, relaxed)
                continue
            values[name], present[name] = np.ones(len(x)), np.zeros(len(x), dtype=np.bool_)
            for place in places:
                rows = counts(place, x, self.columns)
                values[name][rows] = place.numbers(x[rows], relaxed)
                present[name] |= rows
        excess = np.full((len(x), len(self.inequalities)), -1.0)
        for column, inequality in enumerate(self.inequalities):
            some = [present[name] for name in inequality.names if name in present]
            found = inequality.excess(values)
            excess[:, column] = np.where(np.all(some, axis=0), found, -1.0) if some else found
        return excess

    def _free(self, x: Array) -> Mask:
        """(n, d) the coordinates that inequalities name, where they count."""
        free = np.zeros(x.shape, dtype=np.bool_)
        for place in self._each:
            free[:, place.start : place.stop] |= counts(place, x, self.columns)[:, None]
        return free

    def _inside(self, x: Array, free: Mask) -> Iterator[tuple[Mask, Array]]:
        """For each set of places that counts at some of (n, d) points: which of them, and (r, d) points inside.

        The first of these is the anchor; only their free coordinates mean anything.
        """
        signs = np.array([counts(place, x, self.columns) for place in self._each]).reshape(-1, len(x)).T  # n x places
        for sign in np.unique(signs, axis=0):
            rows, key = (signs == sign).all(axis=1), tuple(sign.tolist())
            if key not in self._known:
                self._known[key] = self._search(x[rows][0], free[rows][0])
            yield rows, self._known[key]

    def _search(self, x: Array, free: Mask) -> Array:
        """(r, d) points inside with the options of x, the deepest first; ValueError when none is found."""
        rng = np.random.default_rng(0)
        tried = np.where(free, rng.random((256, len(x))), x)
        tried[0] = np.where(free, 0.5, x)

        def worst(points: Array) -> Array:
            rounded, relaxed = (self._excess(points, relaxed).max(axis=1) for relaxed in (False, True))
            return np.asarray(np.maximum(rounded, relaxed))

        score = worst(tried)
        for _ in range(1000 if free.any() else 0):
            if (score <= 0).sum() >= 64:
                break
            # Directions at random beside single axes: along an axis no edge between two inequalities can be followed.
            way = rng.standard_normal(tried.shape) * (rng.random(tried.shape) < rng.choice([1.0, 2 / free.sum()]))
            size = 10.0 ** rng.uniform(-4, 0, (len(tried), 1))
            step = np.where(free, np.clip(tried + size * way, 0.0, 1.0), x)
            value = worst(step)
            better = value < score
            tried[better], score[better] = step[better], value[better]
        inside = tried[score <= 0]
        if not len(inside):
            chosen = [place for place in self._each if place.when and counts(place, x[None], self.columns)[0]]
            paths = [self.columns[place.start].name for place in chosen if place.start < place.stop]
            where = f" where there is {' and '.join(paths)}" if paths else ""
            raise ValueError(
                f"No config was found that satisfies {list(map(str, self.inequalities))}{where}; loosen one of them."
            )
        mean = np.where(free, inside.mean(axis=0), x)
        anchor = mean if worst(mean[None])[0] <= 0 else tried[score.argmin()]
        return np.concatenate([anchor[None], inside])


def _check_together(inequality: Inequality, places: Sequence[tuple[Place, ...]]) -> None:
    """ValueError when no config has all the names, as they belong to options that exclude each other."""
    for some in itertools.product(*places):
        when = {condition for place in some for condition in place.when}
        if len(dict(when)) == len(when):  # no choice would need two codes
            return
    raise ValueError(
        f"The constraint {inequality.text!r} names {list(inequality.names)}, which no config has together, since they "
        "belong to different options; leave it out."
    )


def _check_numbers(inequality: Inequality, name: str, places: Sequence[Place], placed: Sequence[Place]) -> None:
    if not places:
        known = list(dict.fromkeys(place.name for place in placed))
        hint = suggestion(name, known, f"its names are {known}.")
        raise ValueError(f"The constraint {inequality.text!r} names {name!r}, which the space does not know; {hint}")
    for place in places:
        parameter = place.parameter
        fixed = isinstance(parameter, Fixed) and is_number(parameter.value)
        options = isinstance(parameter, Choice) and all(map(is_number, parameter.options))
        if not (fixed or options or isinstance(parameter, Real | Integer)):
            raise ValueError(
                f"The constraint {inequality.text!r} needs numbers, and {name} is {parameter!r}; "
                "write the constraint as a function of the config."
            )
