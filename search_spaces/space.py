"""Space: names and their parameters, and the one crossing between configs and points of the unit cube.

A config is a dictionary name -> value in plain Python, as users write it. A point is `d` numbers in [0, 1], one a
column, as models see it. Every point decodes to a valid config; coordinates that belong to an option or family not
chosen are ignored, and `encode` puts 0.5 there.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces.fidelity import Fidelity, Scale
from search_spaces.parameter import Array, Choice, Column, Fixed, Parameter, as_parameter, codes_of

Config: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """A parameter and its place: columns start .. stop - 1, and for a Choice of sub-spaces the places of each code."""

    name: str
    parameter: Parameter
    start: int
    stop: int
    branches: tuple[tuple["_Place", ...], ...]


@dataclass(frozen=True, init=False, repr=False)
class Space:
    """Named parameters, and the scale axes when there are some.

        Space(lr=Real(1e-4, 1e-2, log=True), warmup=0.02, data=Mixture("code", "docs"), fidelity=Fidelity(...))

    A bare number, text, bool or None is a fixed value: it is part of every config and takes no column.
    """

    parameters: dict[str, Parameter]
    fidelity: Fidelity | None
    columns: tuple[Column, ...]
    """The `d` coordinates. They carry the order of the parameters too, which dictionaries do not compare."""
    _places: tuple[_Place, ...] = field(compare=False)

    def __init__(self, /, *, fidelity: Fidelity | None = None, **parameters: object) -> None:
        if fidelity is not None and not isinstance(fidelity, Fidelity):
            raise ValueError(f"fidelity must be a Fidelity, got {fidelity!r}.")
        made = {name: as_parameter(name, entry) for name, entry in parameters.items()}
        _names(made)
        columns: list[Column] = []
        places = _lay_out(made, columns, path="", owner=None, when=())
        if not columns:
            raise ValueError("Space has nothing to search; give it at least one parameter that is not fixed.")
        object.__setattr__(self, "parameters", made)
        object.__setattr__(self, "fidelity", fidelity)
        object.__setattr__(self, "columns", tuple(columns))
        object.__setattr__(self, "_places", places)

    def __repr__(self) -> str:
        entries: dict[str, object] = {n: p.value if isinstance(p, Fixed) else p for n, p in self.parameters.items()}
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

    def encode(self, config: Mapping[str, Any]) -> Array:
        """A config to its (d,) point; ValueError as `validate`."""
        point: Array = self.encode_all([config])[0]
        return point

    def encode_all(self, configs: Sequence[Mapping[str, Any]]) -> Array:
        """`n` configs to (n, d) points; ValueError as `validate`."""
        x = np.full((len(configs), len(self.columns)), 0.5)
        _encode(self._places, [self.validate(config) for config in configs], np.arange(len(configs)), x)
        return x

    def decode(self, x: npt.ArrayLike) -> Config:
        """A (d,) point of the unit cube to the config there."""
        return self.decode_all(np.asarray(x)[None])[0]

    def decode_all(self, x: npt.ArrayLike) -> list[Config]:
        """(n, d) points of the unit cube to `n` configs; ValueError for a point outside."""
        points = self._points(x)
        configs: list[Config] = [{} for _ in points]
        _decode(self._places, points, configs)
        return configs

    def quantile(self, u: npt.ArrayLike) -> Array:
        """(n, d) uniform numbers to (n, d) points distributed as `sample`, so that a Sobol sequence fills the space."""
        uniform = self._points(u)
        x = np.empty_like(uniform)
        for place in _every(self._places):
            x[:, place.start : place.stop] = place.parameter.quantile(uniform[:, place.start : place.stop])
        x[~self.active(x)] = 0.5
        return x

    def sample(self, rng: np.random.Generator, n: int) -> list[Config]:
        """`n` independent configs: reals uniform on their axis, options alike, shares uniform on the simplex."""
        return self.decode_all(self.quantile(rng.random((n, len(self.columns)))))

    def active(self, x: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """(n, d) points -> (n, d): False where a coordinate belongs to an option or family not chosen."""
        points = self._points(x)
        on = np.ones(points.shape, dtype=np.bool_)
        for index, column in enumerate(self.columns):
            for condition, code in column.when:
                on[:, index] &= codes_of(points[:, condition], self.columns[condition].levels) == code
        return on

    def validate(self, config: Mapping[str, Any]) -> Config:
        """The config in the order of the space, its numbers as plain Python, fixed values filled in.

        ValueError for a name that is missing, unknown or of an option not chosen, and for a value not allowed.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"A config must be a dictionary name -> value, got {config!r}.")
        checked: Config = {}
        missing: list[str] = []
        _check(self._places, config, checked, missing)
        if missing or not config.keys() <= checked.keys():
            self._refuse_names(config, checked, missing)
        return checked

    def to_json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config as plain JSON; `from_json` gives it back bit for bit."""
        checked = self.validate(config)
        return {f.name: f.parameter.to_json(checked[f.name]) for f in _chosen(self._places, checked)}

    def from_json(self, obj: Mapping[str, Any]) -> Config:
        """The config that `to_json` wrote."""
        return self.validate(obj)

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
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"its names are {known}."
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
) -> tuple[_Place, ...]:
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
        places.append(_Place(name, parameter, start, stop, branches))
    return tuple(places)


def _every(places: tuple[_Place, ...]) -> Iterator[_Place]:
    """All places, those of every option too."""
    for place in places:
        yield place
        for branch in place.branches:
            yield from _every(branch)


def _chosen(places: tuple[_Place, ...], config: Mapping[str, Any]) -> Iterator[_Place]:
    """The places that this config has, in its order."""
    for place in places:
        yield place
        if place.branches:
            yield from _chosen(_branch(place, config[place.name]), config)


def _branch(place: _Place, option: Any) -> tuple[_Place, ...]:
    """The places of this option of a Choice of sub-spaces."""
    assert isinstance(place.parameter, Choice)
    return place.branches[place.parameter.code(option)]


def _check(places: tuple[_Place, ...], config: Mapping[str, Any], checked: Config, missing: list[str]) -> None:
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


def _encode(places: tuple[_Place, ...], configs: list[Config], rows: npt.NDArray[np.intp], x: Array) -> None:
    """Writes these `configs` into these `rows` of x, column by column."""
    for place in places:
        x[rows, place.start : place.stop] = place.parameter.encode([config[place.name] for config in configs])
        for branch, members in _members(place, x, rows):
            _encode(branch, [configs[i] for i in members], rows[members], x)


def _decode(places: tuple[_Place, ...], points: Array, configs: list[Config]) -> None:
    """Adds the values of these places to the configs, one a point."""
    for place in places:
        values = place.parameter.decode(points[:, place.start : place.stop])
        for config, value in zip(configs, values, strict=True):
            config[place.name] = value
        for branch, members in _members(place, points, slice(None)):
            _decode(branch, points[members], [configs[i] for i in members])


def _members(
    place: _Place, x: Array, rows: npt.NDArray[np.intp] | slice
) -> Iterator[tuple[tuple[_Place, ...], npt.NDArray[np.intp]]]:
    """For a Choice of sub-spaces: each option's places, and which of these rows of x chose it."""
    if place.branches:
        codes = codes_of(x[rows, place.start], len(place.branches))
        for code, branch in enumerate(place.branches):
            members = np.flatnonzero(codes == code)
            if branch and len(members):
                yield branch, members
