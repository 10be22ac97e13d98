"""Carry: runs of one space as runs of another, for a search that goes on in a changed space.

A parameter is known by its name and a value by what it is, so ranges may be widened, options, families and sources
added, axes made logarithmic. What would make two runs incomparable is refused by the name of the parameter. Scale axes
are known by their names too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search_spaces.fidelity import Scale
from search_spaces.mixture import TOLERANCE, Mixture
from search_spaces.mixture_schedule import MixtureSchedule, SwitchedMixture
from search_spaces.parameter import Choice, Fixed, Integer, Parameter, Real, is_number, plain, suggestion
from search_spaces.space import Config, Space

#: What Python writes where JSON has another word.
WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Carried:
    """What `carry` took over, and what it could not."""

    configs: tuple[Config, ...]
    """Configs of the new space."""
    indices: tuple[int, ...]
    """Of the config given that each was made from."""
    left_out: tuple[tuple[int, str], ...]
    """The other indices, each with the reason."""
    matched: tuple[str, ...] = ()
    """Parameters that both have."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that only the new space has, with the value that these runs get."""
    unused: tuple[str, ...] = ()
    """Parameters that only the runs have."""


@dataclass(frozen=True)
class CarriedScales:
    """What `carry_scales` took over, and what it could not; the names are of scale axes, as for `Carried`."""

    scales: tuple[Scale, ...]
    indices: tuple[int, ...]
    left_out: tuple[tuple[int, str], ...]
    matched: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def carry(
    configs: Sequence[Mapping[str, Any]],
    old: Space | None,
    new: Space,
    *,
    defaults: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
) -> Carried:
    """Configs of `old` as configs of `new`; those that `new` does not allow are left out, each with the reason.

    Values stay what they are. Where a config lacks a parameter of `new` it gets the one of `defaults`, which says what
    those runs did; a fixed parameter needs none. Sources that a mixture has gained have share 0, of sources it has lost
    there may be none. A parameter that `new` has not is left away if it was fixed, or is named in `drop`: then runs
    count as equal that differed in it.

    Where `old` is None the configs are of no space: a parameter counts as fixed that has one value wherever it is,
    parts of a value may lie flat (`data/code` of a mixture `data`), and a text is read as what the parameter allows.

    ValueError, which names the parameter, when the two are not comparable: another kind of parameter (a fixed value may
    become a Real, Integer or Choice, and the other way), a mixture that needs a share of a new source, a new parameter
    without a value, an old one that varied and is gone.
    """
    given, after = dict(defaults or {}), _by_name(new)
    if old is None:
        rows = [_gathered(config, after) for config in configs]
        values = _values(rows)
        fixed = {name for name, found in values.items() if all(value == found[0] for value in found)}
        names = list(values)
    else:
        rows, before = [old.validate(config) for config in configs], _by_name(old)
        fixed = {name for name, found in before.items() if all(isinstance(parameter, Fixed) for parameter in found)}
        names = list(before)
    _refuse_arguments(given, drop, names, after)
    for name in (name for name in names if old is not None and name in after):
        # A name may stand in several options: one pair that fits will do, values are looked at one by one.
        reasons = [_incomparable(name, was, is_) for was in before[name] for is_ in after[name]]
        if all(reasons):
            raise ValueError(reasons[0])
    kept: list[Config] = []
    indices: list[int] = []
    left_out: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        missing: list[str] = []
        taken: Config = {}
        try:
            _take(new.parameters, row, given, taken, missing)
            lost = [name for name in row if name not in taken and name not in drop and name not in fixed]
            if not missing and not lost:
                kept.append(new.validate(taken))
                indices.append(index)
                continue
        except ValueError as error:  # a value that the new space does not allow
            left_out.append((index, str(error)))
            continue
        for name in missing:
            if name not in names:
                raise ValueError(
                    f"Those runs have no value for {name!r}, which the new space needs; say what they did by "
                    f"defaults={{{name!r}: ...}}."
                )
        for name in lost:
            if name not in after:
                raise ValueError(
                    f"Those runs varied {name!r}, which the new space does not have, so they are not comparable; keep "
                    f"it, or count them as equal by drop=[{name!r}]."
                )
        odd = f"It has no value for {missing[0]!r}." if missing else f"It has {lost[0]!r} beside an option without it."
        left_out.append((index, odd))
    fills = {name: given.get(name, _value(parameters)) for name, parameters in after.items() if name not in names}
    return Carried(
        tuple(kept),
        tuple(indices),
        tuple(left_out),
        matched=tuple(name for name in names if name in after),
        given={name: value for name, value in fills.items() if value is not _VARIES},
        unused=tuple(name for name in names if name not in after),
    )


def carry_scales(
    scales: Sequence[Mapping[str, Any]],
    new: Space,
    *,
    scale: Mapping[str, float | str] | None = None,
    drop: Sequence[str] = (),
) -> CarriedScales:
    """Scales of runs (axis -> value) as scales of `new`; those that are none are left out, each with the reason.

    Axes that `new` has too are taken as they are; what the runs had on one that they lack is said by `scale`. Of axes
    that `new` has not only the largest value counts, of several the values with the largest product: runs at smaller
    ones were other runs, and are left out unless `drop` names the axis.

    ValueError, which names the axis, when `scale` lacks one, or names one that the runs have or `new` has not.
    """
    axes = [] if new.fidelity is None else [axis.name for axis in new.fidelity.axes]
    had, said = list(_values(scales)), dict(scale or {})
    for axis in said:
        if axis not in axes:
            hint = suggestion(axis, axes, f"its axes are {axes}.")
            raise ValueError(f"scale names {axis!r}, which is no axis of the new space; {hint}")
        if scales and all(axis in its for its in scales):
            raise ValueError(f"scale names {axis!r}, on which each of those runs has a value; leave it out.")
    for axis in axes if scales else ():
        if axis not in had and axis not in said:
            raise ValueError(
                f"Those runs have no value on the scale axis {axis!r}, which the new space has; say what they had by "
                f"scale={{{axis!r}: ...}}."
            )
    unused = tuple(axis for axis in had if axis not in axes)
    largest = _largest(scales, [axis for axis in unused if axis not in drop])
    kept: list[Scale] = []
    indices: list[int] = []
    left_out: list[tuple[int, str]] = []
    for index, its in enumerate(scales):
        place = said | {axis: value for axis, value in its.items() if axis in axes}
        try:
            _refuse_smaller(its, largest)
            kept.append(Scale() if new.fidelity is None else new.fidelity.scale(place, beyond=True))
            indices.append(index)
        except ValueError as error:
            left_out.append((index, str(error)))
    return CarriedScales(
        tuple(kept),
        tuple(indices),
        tuple(left_out),
        matched=tuple(axis for axis in axes if axis in had),
        given={axis: value for axis, value in said.items() if axis not in had},
        unused=unused,
    )


def _largest(scales: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> dict[str, Any]:
    """The values on these axes with the largest product, of the scales that have a number on each."""
    places = [[plain(its.get(axis)) for axis in axes] for its in scales]
    numbers = [place for place in places if all(is_number(value) and 0 < value < math.inf for value in place)]
    return dict(zip(axes, max(numbers, key=lambda place: (math.prod(place), place), default=()), strict=False))


def _refuse_smaller(its: Mapping[str, Any], largest: Mapping[str, Any]) -> None:
    for axis, value in largest.items():
        if its.get(axis) != value:
            raise ValueError(
                f"It ran at {axis}={its.get(axis)}; of an axis that the new space does not have only the largest value "
                f"counts, {axis}={value}."
            )


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each name in any of the rows."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


#: What a parameter has that has no single value.
_VARIES = object()


def _value(parameters: Sequence[Parameter]) -> Any:
    """The one value of parameters that are all fixed at it."""
    values = [parameter.value if isinstance(parameter, Fixed) else _VARIES for parameter in parameters]
    return values[0] if all(value == values[0] for value in values) else _VARIES


def _gathered(config: Mapping[str, Any], known: Mapping[str, object]) -> Config:
    """A flat row, with the parts of a value put together under the name that the space knows: `data/code`."""
    whole: Config = {}
    for name, value in config.items():
        first, *parts = name.split("/")
        if not parts or name in known or first not in known or first in config:
            whole[name] = value
            continue
        inner = whole.setdefault(first, {})
        for part in parts[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[parts[-1]] = value
    return whole


def _read(value: Any) -> Any:
    """What a text says: a number, true, a list, as JSON has it; any other text, and all else, as it is."""
    if isinstance(value, Mapping):
        return {name: _read(part) for name, part in value.items()}
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return WORDS.get(value, value)


def _by_name(space: Space) -> dict[str, list[Parameter]]:
    """What stands behind each name; several where options share it."""
    named: dict[str, list[Parameter]] = {}
    for place in space.placed:
        named.setdefault(place.name, []).append(place.parameter)
    return named


def _refuse_arguments(
    defaults: Mapping[str, Any],
    drop: Sequence[str],
    before: Sequence[str],
    after: Mapping[str, list[Parameter]],
) -> None:
    if isinstance(drop, str):
        raise ValueError(f"drop must be a list of names, got {drop!r}; write [{drop!r}].")
    for name in drop:
        if name not in before:
            raise ValueError(f"drop names {name!r}, which those runs do not have; they have {list(before)}.")
    for name, value in defaults.items():
        if name not in after:
            raise ValueError(f"defaults names {name!r}, which the new space does not have; it has {list(after)}.")
        if all(reasons := [_refused(name, parameter, value) for parameter in after[name]]):
            raise ValueError(reasons[0])


def _refused(name: str, parameter: Parameter, value: Any) -> str:
    """Why a value is not allowed; empty when it is."""
    try:
        parameter.check(name, value)
    except ValueError as error:
        return str(error)
    return ""


def _incomparable(name: str, was: Parameter, is_: Parameter) -> str:
    """Why no value of the one can be one of the other; empty when some may."""
    scalars = (Fixed, Real, Integer, Choice)
    fixed = isinstance(was, Fixed) or isinstance(is_, Fixed)
    if type(was) is not type(is_) and not (fixed and isinstance(was, scalars) and isinstance(is_, scalars)):
        return (
            f"{name} was of kind {type(was).__name__} and is of kind {type(is_).__name__} in the new space; "
            "keep the kind, or give it another name."
        )
    for path, old, new in _mixtures(name, was, is_):
        for source, (least, _) in new.bounds.items():
            if source not in old.names and least > 0:
                return (
                    f"{path} needs a share of at least {least:g} of the new source {source!r}, and runs of the old "
                    "space had none; give it no floor."
                )
    return ""


def _mixtures(name: str, was: Parameter, is_: Parameter) -> list[tuple[str, Mixture, Mixture]]:
    """The pairs of mixtures in a pair of parameters of one kind, with their paths."""
    if isinstance(was, Mixture) and isinstance(is_, Mixture):
        return [(name, was, is_)]
    if isinstance(was, MixtureSchedule) and isinstance(is_, MixtureSchedule):
        return [(f"{name}.first", was.first, is_.first), (f"{name}.last", was.last, is_.last)]
    return []


def _take(
    parameters: Mapping[str, Parameter], config: Config, defaults: Config, taken: Config, missing: list[str]
) -> None:
    """Adds the value of each parameter to `taken`, or its name to `missing`; ValueError for one not allowed."""
    for name, parameter in parameters.items():
        if name in config:
            taken[name] = _checked(name, parameter, config[name])
        elif name in defaults:
            taken[name] = parameter.check(name, defaults[name])
        elif isinstance(parameter, Fixed):
            taken[name] = parameter.value
        else:
            missing.append(name)
            continue
        if isinstance(parameter, Choice) and parameter.subspaces:
            _take(parameter.subspaces[taken[name]], config, defaults, taken, missing)


def _checked(name: str, parameter: Parameter, value: Any) -> Any:
    """The value as the parameter allows it, a text also as what it says."""
    try:
        return parameter.check(name, _as(name, parameter, value))
    except ValueError:
        if (said := _read(value)) == value:
            raise
        return parameter.check(name, _as(name, parameter, said))


def _as(path: str, parameter: Parameter, value: Any) -> Any:
    """The value, with shares of the sources that the parameter mixes; a whole number where it is to be one."""
    if isinstance(parameter, Integer) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(parameter, Choice) and is_number(value):
        equal = [option for option in parameter.options if is_number(option) and option == value]
        return equal[0] if len(equal) == 1 else value
    if isinstance(parameter, Mixture) and isinstance(value, Mapping):
        return _shares(path, parameter, value)
    if isinstance(parameter, MixtureSchedule) and isinstance(value, SwitchedMixture):
        first, last = parameter.first, parameter.last
        return {
            "first": _shares(f"{path}.first", first, value.first),
            "last": _shares(f"{path}.last", last, value.last),
            "switch": value.switch,
        }
    return value


def _shares(path: str, mixture: Mixture, shares: Mapping[str, float]) -> dict[str, float]:
    for source, share in shares.items():
        if source not in mixture.names and not (is_number(share) and share <= TOLERANCE):
            raise ValueError(f"{path} has a share {share!r} of {source!r}, which the new space does not mix.")
    return {name: shares.get(name, 0.0) for name in mixture.names}
