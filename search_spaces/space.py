"""Space: names and their parameters, and the one crossing between configs and points of the unit cube.

A config is a dictionary name -> value in plain Python, as users write it. A point is `d` numbers in [0, 1], one a
column, as models see it. Every point decodes to a valid config; coordinates that belong to an option or family not
chosen are ignored, and `encode` puts 0.5 there. A point that breaks an inequality is read where the way from it to a
point well inside (its anchor) first meets the allowed set.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces.constraint import TOLERANCE, Inequality, Predicate, as_constraint
from search_spaces.fidelity import Fidelity, Scale
from search_spaces.parameter import Array, Choice, Column, Fixed, Parameter, as_parameter, codes_of, suggestion
from search_spaces.region import Mask, Place, Region, counts

Config: TypeAlias = dict[str, Any]
#: Uniform numbers number `start` .. `start + count - 1` of some sequence: (start, count) -> (count, d).
Stream: TypeAlias = Callable[[int, int], Array]

#: Points of the stream to try, and how many of them must be allowed, for it to be filtered; otherwise a walk is taken.
TRIED, ALLOWED = 512, 8
#: Allowed points that a walk gives at a time, and such blocks to try before a set of configs counts as empty.
CHAINS, BLOCKS = 64, 64


@dataclass(frozen=True, init=False, repr=False)
class Space:
    """Named parameters, and the scale axes when there are some.

        Space(lr=Real(1e-4, 1e-2, log=True), warmup=0.02, data=Mixture("code", "docs"), fidelity=Fidelity(...))

    A bare number, text, bool or None is a fixed value: it is part of every config and takes no column. `constraints`
    are inequalities such as "batch_size * accumulation <= 512" and functions config -> bool. As far as a search can
    tell, a set of them that leaves nothing is refused, and so are inequalities that leave nothing of some option.
    """

    parameters: dict[str, Parameter] = field(hash=False)
    fidelity: Fidelity | None
    columns: tuple[Column, ...]
    """The `d` coordinates. They carry the order of the parameters too, which dictionaries do not compare."""
    constraints: tuple[Inequality | Predicate, ...]
    _places: tuple[Place, ...] = field(compare=False)
    _whole: "Space | None" = field(compare=False)
    """What this is at one scale of."""
    _region: Region = field(compare=False)
    """Of the inequalities that speak of no scale axis, or of one whose value is known."""

    def __init__(
        self, /, *, constraints: Sequence[object] = (), fidelity: Fidelity | None = None, **parameters: object
    ) -> None:
        if fidelity is not None and not isinstance(fidelity, Fidelity):
            raise ValueError(f"fidelity must be a Fidelity, got {fidelity!r}.")
        if not isinstance(constraints, list | tuple):
            raise ValueError(f"constraints must be a list of texts and functions, got {constraints!r}.")
        made = {name: as_parameter(name, entry) for name, entry in parameters.items()}
        _names(made)
        self._fill(made, fidelity, tuple(map(as_constraint, constraints)))
        if not self.columns:
            raise ValueError("Space has nothing to search; give it at least one parameter that is not fixed.")
        self._refuse_empty()

    def _fill(
        self,
        parameters: dict[str, Parameter],
        fidelity: Fidelity | None,
        constraints: tuple[Inequality | Predicate, ...],
    ) -> None:
        columns: list[Column] = []
        places = _lay_out(parameters, columns, path="", owner=None, when=())
        axes = set() if fidelity is None else {axis.name for axis in fidelity.axes}
        inequalities = [c for c in constraints if isinstance(c, Inequality)]
        for inequality in inequalities:
            if both := axes.intersection(inequality.names).intersection(place.name for place in _every(places)):
                raise ValueError(
                    f"The constraint {inequality.text!r} names {sorted(both)}, which are parameters and scale axes; "
                    "rename the parameters."
                )
        now = [c for c in inequalities if not axes.intersection(c.names)]
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "fidelity", fidelity)
        object.__setattr__(self, "columns", tuple(columns))
        object.__setattr__(self, "constraints", constraints)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_whole", None)
        object.__setattr__(self, "_region", Region.of(self.columns, now, tuple(_every(places))))

    def _refuse_empty(self) -> None:
        """ValueError when something depends on a scale axis that is not there, or when some scale leaves nothing."""
        axes = () if self.fidelity is None else tuple(axis.name for axis in self.fidelity.axes)
        for place in self.placed:
            for axis in place.parameter.scale_axes:
                if axis not in axes:
                    raise ValueError(
                        f"{place.name} depends on the scale axis {axis!r}; give the space a fidelity with that axis, "
                        f"got {list(axes)}."
                    )
        scales = () if self.fidelity is None else (*self.fidelity.cells(), self.fidelity.top, self.fidelity.target)
        for space in [self.at(scale) for scale in scales] if self._scaled else [self]:
            space._region.refuse_empty()
            if self.predicates and not self.lacking:
                space.sample(np.random.default_rng(0), 1)

    def __repr__(self) -> str:
        entries: dict[str, object] = {n: p.value if isinstance(p, Fixed) else p for n, p in self.parameters.items()}
        if self.constraints:
            entries["constraints"] = [constraint.text for constraint in self.constraints]
        if self.fidelity is not None:
            entries["fidelity"] = self.fidelity
        return f"Space({', '.join(f'{name}={entry!r}' for name, entry in entries.items())})"

    @property
    def top(self) -> Scale:
        """The largest scale that is run, whose results count; the empty scale without fidelity."""
        return Scale() if self.fidelity is None else self.fidelity.top

    def cost(self, scale: Mapping[str, float | str]) -> float:
        """Of a run at `scale`, in runs at the top scale."""
        return 1.0 if self.fidelity is None else self.fidelity.relative_cost(scale)

    @cached_property
    def placed(self) -> tuple[Place, ...]:
        """Every parameter with its columns, those inside options too."""
        return tuple(_every(self._places))

    @cached_property
    def predicates(self) -> tuple[Predicate, ...]:
        """The constraints that are functions of a config."""
        return tuple(constraint for constraint in self.constraints if isinstance(constraint, Predicate))

    @property
    def lacking(self) -> tuple[str, ...]:
        """The predicates that are not at hand, by where they were: until they are, nothing is drawn."""
        return tuple(predicate.text for predicate in self.predicates if predicate.stored.function is None)

    @cached_property
    def _scaled(self) -> bool:
        """Whether what is allowed depends on the scale."""
        inequalities = sum(isinstance(constraint, Inequality) for constraint in self.constraints)
        return len(self._region.inequalities) < inequalities or any(p.scale_axes for p in self.parameters.values())

    def at(self, scale: Mapping[str, float | str]) -> "Space":
        """The space at one scale: the same columns, with the caps and inequalities that hold there.

        Encoding is the same at every scale; decoding, sampling and `validate` then keep to what is allowed at this one.
        ValueError when nothing is.
        """
        if self.fidelity is None:
            return self
        values = self.fidelity.scale(scale, beyond=True)
        whole = self.whole
        if not whole._scaled:
            return self
        space: Space = object.__new__(Space)
        space._fill(
            {name: parameter.at(name, values) for name, parameter in whole.parameters.items()},
            self.fidelity,
            tuple(c.given(values) if isinstance(c, Inequality) else c for c in whole.constraints),
        )
        object.__setattr__(space, "_whole", whole)
        return space

    @property
    def whole(self) -> "Space":
        """The space of every scale: what `at` was asked of, else itself."""
        return self._whole or self

    def encode(self, config: Mapping[str, Any]) -> Array:
        """A config to its (d,) point; ValueError as `validate`."""
        point: Array = self.encode_all([config])[0]
        return point

    def encode_all(self, configs: Sequence[Mapping[str, Any]]) -> Array:
        """`n` configs to (n, d) points; ValueError as `validate`, but that no predicate is asked."""
        x = np.full((len(configs), len(self.columns)), 0.5)
        _encode(self._places, [self._checked(config) for config in configs], np.arange(len(configs)), x)
        return x

    def decode(self, x: npt.ArrayLike) -> Config:
        """A (d,) point of the unit cube to the config there."""
        return self.decode_all(np.asarray(x)[None])[0]

    def decode_all(self, x: npt.ArrayLike) -> list[Config]:
        """(n, d) points of the unit cube to `n` configs, all within the inequalities; ValueError for a point outside.

        A point on the border itself may break one by rounding, less than 1e-12 of its sides, and predicates may fail:
        `satisfies` tells.
        """
        points = self._region.pull(self._points(x), relaxed=False)
        configs: list[Config] = [{} for _ in points]
        _decode(self._places, points, configs)
        return configs

    def settle(self, x: npt.ArrayLike) -> Array:
        """(n, d) points to those of the configs that are read there: `encode_all(decode_all(x))`, without the configs.

        Predicates are not asked. ValueError for a point outside the cube.
        """
        points = self._region.pull(self._points(x), relaxed=False)
        settled = np.full(points.shape, 0.5)
        _settle(self._places, points, np.arange(len(points)), settled)
        return settled

    def quantile(self, u: npt.ArrayLike) -> Array:
        """(n, d) uniform numbers to (n, d) points distributed as `sample`, so that a Sobol sequence fills the space."""
        uniform = self._points(u)
        x = np.empty_like(uniform)
        for place in _every(self._places):
            x[:, place.start : place.stop] = place.parameter.quantile(uniform[:, place.start : place.stop])
        x[~self.active(x)] = 0.5
        return x

    def start(self, x: npt.ArrayLike) -> Array:
        """(n, d) points with the reference of every mixture that has one put there."""
        points = self._points(x).copy()
        for place in _every(self._places):
            points[:, place.start : place.stop] = place.parameter.start(points[:, place.start : place.stop])
        points[~self.active(points)] = 0.5
        return points

    def sample(self, rng: np.random.Generator, n: int) -> list[Config]:
        """`n` independent configs: reals uniform on their axis, options alike, shares as their mixture says.

        With constraints they are drawn from what is left of that, see `draw`.
        """
        return self.decode_all(self.draw(lambda _, count: rng.random((count, len(self.columns))), 0, n))

    def draw(self, stream: Stream, first: int, n: int) -> Array:
        """Allowed points number first .. first + n - 1 that a stream of uniform numbers leads to: n x d.

        Without constraints they are the quantiles of the stream. With constraints they are those of them that are
        allowed, so they fill the allowed set as the stream fills the cube. Where next to none are allowed, the numbers
        that inequalities name are drawn by a random walk instead, uniformly over their allowed set given the options.
        ValueError when nothing allowed is found.
        """
        if not self.constraints:
            return self.quantile(stream(first, n))
        blocks: list[Array] = [self._allowed(self.quantile(stream(0, TRIED)))]
        if len(blocks[0]) < ALLOWED and self._region.inequalities:
            blocks = []
            seed = np.ascontiguousarray(stream(0, 1)).view(np.uint32).ravel().tolist()
            more = (self._walked(np.random.default_rng([*seed, block])) for block in itertools.count())
        else:
            more = (self.quantile(stream(TRIED * block, TRIED)) for block in itertools.count(1))
        found = sum(map(len, blocks))
        for tried, points in enumerate(more):
            if found >= first + n:
                break
            if tried == BLOCKS and not found:
                raise ValueError(
                    f"No config was found that satisfies {list(map(str, self.constraints))}; loosen one of them."
                )
            blocks.append(self._allowed(points))
            found += len(blocks[-1])
        return np.concatenate(blocks)[first : first + n]

    def _allowed(self, x: Array) -> Array:
        """Those of (n, d) points that no inequality has to move and that satisfy everything."""
        inside = x[self._region.holds(x)]
        return inside[self.satisfies(self.decode_all(inside))]

    def _walked(self, rng: np.random.Generator) -> Array:
        """CHAINS points within the inequalities."""
        return self._region.walk(self.quantile(rng.random((CHAINS, len(self.columns)))), rng)

    def repair(self, x: npt.ArrayLike) -> Array:
        """(n, d) points -> (n, d): where `decode` reads them, before rounding; an allowed point is its own.

        Continuous and piecewise smooth, as long as no option and no set of used sources changes: a maximiser may climb
        through it. Only the columns `repaired` move.
        """
        points = self._points(x).copy()
        for place in _every(self._places):
            if place.parameter.limited:
                rows = counts(place, points, self.columns)
                columns = points[rows, place.start : place.stop]
                points[rows, place.start : place.stop] = place.parameter.settled(columns)
        return self._region.pull(points, relaxed=True)

    @cached_property
    def repaired(self) -> tuple[int, ...]:
        """The columns that `repair` may move; none where it does nothing."""
        limited = {i for p in self.placed if p.parameter.limited for i in range(p.start, p.stop)}
        return tuple(sorted(limited.union(self._region.moved)))

    def satisfies(self, configs: Sequence[Mapping[str, Any]]) -> Mask:
        """(n,) whether each config satisfies every constraint, exactly as Python computes it.

        ValueError when a predicate is not at hand or fails.
        """
        if not self.constraints:
            return np.ones(len(configs), dtype=np.bool_)
        return np.array([all(c.holds(config) for c in self.constraints) for config in configs], dtype=np.bool_)

    def active(self, x: npt.ArrayLike) -> Mask:
        """(n, d) points -> (n, d): False where a coordinate belongs to an option or family not chosen."""
        points = self._points(x)
        on = np.ones(points.shape, dtype=np.bool_)
        for index, column in enumerate(self.columns):
            if column.when:
                on[:, index] = counts(column, points, self.columns)
        return on

    def validate(self, config: Mapping[str, Any]) -> Config:
        """The config in the order of the space, its numbers as plain Python, fixed values filled in.

        ValueError for a name that is missing, unknown or of an option not chosen, for a value not allowed and for a
        constraint that does not hold (inequalities within 1e-9 of their sides; predicates as far as they are at hand).
        """
        checked = self._checked(config)
        for predicate in self.predicates:
            if predicate.stored.function and not predicate.holds(checked):
                raise ValueError(predicate.refuse(checked))
        return checked

    def allows(self, config: Mapping[str, Any]) -> bool:
        """Whether `validate` takes the config."""
        try:
            self.validate(config)
        except ValueError:
            return False
        return True

    def _checked(self, config: Mapping[str, Any]) -> Config:
        """As `validate`, without the predicates."""
        if not isinstance(config, Mapping):
            raise ValueError(f"A config must be a dictionary name -> value, got {config!r}.")
        checked: Config = {}
        missing: list[str] = []
        _check(self._places, config, checked, missing)
        if missing or not config.keys() <= checked.keys():
            self._refuse_names(config, checked, missing)
        for constraint in self.constraints:
            if isinstance(constraint, Inequality) and not constraint.holds(checked, TOLERANCE):
                raise ValueError(constraint.refuse(checked))
        return checked

    def to_json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config as plain JSON; `from_json` gives it back bit for bit."""
        checked = self.validate(config)
        return {f.name: f.parameter.to_json(checked[f.name]) for f in _chosen(self._places, checked)}

    def from_json(self, obj: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote. Predicates are not asked: what was written stays, though they may change."""
        return self._checked(obj)

    def _points(self, x: npt.ArrayLike) -> Array:
        points = np.asarray(x, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != len(self.columns):
            raise ValueError(f"Points of this space have {len(self.columns)} coordinates, got shape {points.shape}.")
        if not ((points >= 0) & (points <= 1)).all():  # False for NaN
            raise ValueError(f"Points must lie in the unit cube, got values from {points.min()} to {points.max()}.")
        return points

    def _refuse_names(self, config: Mapping[str, Any], checked: Config, missing: list[str]) -> None:
        known = _names(self.parameters)
        extra = [name for name in config if name not in checked]
        for name in extra:
            if name not in known:
                hint = suggestion(name, known, f"its names are {known}.")
                raise ValueError(f"Config has a value for {name!r}, which the space does not know; {hint}")
        if missing:
            raise ValueError(
                f"Config has no value for {missing}; the space needs {'it' if len(missing) == 1 else 'them'}."
            )
        raise ValueError(f"Config has values for {extra}, which belong to options not chosen; leave them out.")


def _names(parameters: Mapping[str, Parameter]) -> list[str]:
    """All names that a config may hold; ValueError when one would stand for two parameters at once."""
    taken: list[str] = []
    for name, parameter in parameters.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"A parameter needs a text as its name, got {name!r}.")
        mine = [name]
        if isinstance(parameter, Choice):
            # Options exclude each other, so they may use the same names.
            inner = dict.fromkeys(n for subspace in parameter.subspaces.values() for n in _names(subspace))
            mine += inner
        for each in mine:
            if each in taken or mine.count(each) > 1:
                raise ValueError(
                    f"The name {each!r} stands for two parameters of the same config; "
                    "only options of one Choice may share a name, so rename one of them."
                )
        taken += mine
    return taken


def _lay_out(
    parameters: Mapping[str, Parameter],
    columns: list[Column],
    path: str,
    owner: str | None,
    when: tuple[tuple[int, int], ...],
) -> tuple[Place, ...]:
    """Gives every parameter its place, an option's after its choice, and appends the columns."""
    places = []
    for name, parameter in parameters.items():
        start, top = len(columns), owner or name
        for column in parameter.columns(path + name):
            conditions = when + tuple((start + index, code) for index, code in column.when)
            columns.append(replace(column, parameter=top, when=conditions))
        stop = len(columns)
        subspaces = parameter.subspaces if isinstance(parameter, Choice) else {}
        branches = tuple(
            _lay_out(subspace, columns, f"{path}{name}.{option}.", top, (*when, (start, code)))
            for code, (option, subspace) in enumerate(subspaces.items())
        )
        places.append(Place(name, parameter, start, stop, when, branches))
    return tuple(places)


def _every(places: tuple[Place, ...]) -> Iterator[Place]:
    """All places, those of every option too."""
    for place in places:
        yield place
        for branch in place.branches:
            yield from _every(branch)


def _chosen(places: tuple[Place, ...], config: Mapping[str, Any]) -> Iterator[Place]:
    """The places that this config has, in its order."""
    for place in places:
        yield place
        if place.branches:
            yield from _chosen(_branch(place, config[place.name]), config)


def _branch(place: Place, option: Any) -> tuple[Place, ...]:
    """The places of this option of a Choice of sub-spaces."""
    assert isinstance(place.parameter, Choice)
    return place.branches[place.parameter.code(option)]


def _check(places: tuple[Place, ...], config: Mapping[str, Any], checked: Config, missing: list[str]) -> None:
    for place in places:
        name, parameter = place.name, place.parameter
        if name in config:
            checked[name] = parameter.check(name, config[name])
        elif isinstance(parameter, Fixed):
            checked[name] = parameter.value
        else:
            missing.append(name)
            continue
        if place.branches:
            _check(_branch(place, checked[name]), config, checked, missing)


def _encode(places: tuple[Place, ...], configs: list[Config], rows: npt.NDArray[np.intp], x: Array) -> None:
    """Writes these `configs` into these `rows` of x, column by column."""
    for place in places:
        x[rows, place.start : place.stop] = place.parameter.encode([config[place.name] for config in configs])
        for branch, members in _members(place, x, rows):
            _encode(branch, [configs[i] for i in members], rows[members], x)


def _decode(places: tuple[Place, ...], points: Array, configs: list[Config]) -> None:
    """Adds the values of these places to the configs, one a point."""
    for place in places:
        values = place.parameter.decode(points[:, place.start : place.stop])
        for config, value in zip(configs, values, strict=True):
            config[place.name] = value
        for branch, members in _members(place, points, slice(None)):
            _decode(branch, points[members], [configs[i] for i in members])


def _settle(places: tuple[Place, ...], points: Array, rows: npt.NDArray[np.intp], x: Array) -> None:
    """Writes into these `rows` of x the columns of the values of these places at the points, one a row."""
    for place in places:
        x[rows, place.start : place.stop] = place.parameter.settled(points[:, place.start : place.stop])
        for branch, members in _members(place, points, slice(None)):
            _settle(branch, points[members], rows[members], x)


def _members(
    place: Place, x: Array, rows: npt.NDArray[np.intp] | slice
) -> Iterator[tuple[tuple[Place, ...], npt.NDArray[np.intp]]]:
    """For a Choice of sub-spaces: each option's places, and which of these rows of x chose it."""
    if place.branches:
        codes = codes_of(x[rows, place.start], len(place.branches))
        for code, branch in enumerate(place.branches):
            members = np.flatnonzero(codes == code)
            if branch and len(members):
                yield branch, members
