"""Carry: configs of one space as configs of another, for a search that goes on in a changed space.

A parameter is known by its name and a value by what it is, so ranges may be widened, options, families and sources
added, axes made logarithmic. What would make two runs incomparable is refused by the name of the parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_spaces.mixture import TOLERANCE, Mixture
from search_spaces.mixture_schedule import MixtureSchedule, SwitchedMixture
from search_spaces.parameter import Choice, Fixed, Integer, Parameter, Real
from search_spaces.space import Config, Space


@dataclass(frozen=True)
class Carried:
    """What `carry` took over, and what it could not."""

    configs: tuple[Config, ...]
    """Configs of the new space."""
    indices: tuple[int, ...]
    """Of the config given that each was made from."""
    left_out: tuple[tuple[int, str], ...]
    """The other indices, each with the reason."""


def carry(
    configs: Sequence[Mapping[str, Any]],
    old: Space,
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

    ValueError, which names the parameter or scale axis, when the spaces are not comparable: other scale axes (their
    rungs may differ), another kind of parameter (a fixed value may become a Real, Integer or Choice, and the other
    way), a mixture that needs a share of a new source, a new parameter without a value, an old one that varied and is
    gone.
    """
    given = dict(defaults or {})
    before, after = _by_name(old), _by_name(new)
    _refuse_axes(old, new)
    _refuse_arguments(given, drop, before, after)
    for name in before.keys() & after.keys():
        # A name may stand in several options: one pair that fits will do, values are looked at one by one.
        reasons = [_incomparable(name, was, is_) for was in before[name] for is_ in after[name]]
        if all(reasons):
            raise ValueError(reasons[0])
    kept: list[Config] = []
    indices: list[int] = []
    left_out: list[tuple[int, str]] = []
    for index, config in enumerate(configs):
        was = old.validate(config)
        missing: list[str] = []
        taken: Config = {}
        try:
            _take(new.parameters, was, given, taken, missing)
            rest = [name for name in was if name not in taken and name not in drop]
            lost = [name for name in rest if not all(isinstance(parameter, Fixed) for parameter in before[name])]
            if not missing and not lost:
                kept.append(new.validate(taken))
                indices.append(index)
                continue
        except ValueError as error:  # a value that the new space does not allow
            left_out.append((index, str(error)))
            continue
        if missing:
            raise ValueError(
                f"Configs of the old space have no value for {missing[0]!r}, which the new one needs; say what those "
                f"runs did by defaults={{{missing[0]!r}: ...}}."
            )
        for name in lost:
            if name not in after:
                raise ValueError(
                    f"The old space varied {name!r}, which the new one does not have, so its runs are not comparable; "
                    f"keep it, or count them as equal by drop=[{name!r}]."
                )
        left_out.append((index, f"{lost[0]} belongs to an option of the new space that is not chosen."))
    return Carried(tuple(kept), tuple(indices), tuple(left_out))


def _by_name(space: Space) -> dict[str, list[Parameter]]:
    """What stands behind each name; several where options share it."""
    named: dict[str, list[Parameter]] = {}
    for place in space.placed:
        named.setdefault(place.name, []).append(place.parameter)
    return named


def _refuse_axes(old: Space, new: Space) -> None:
    was, is_ = ([] if s.fidelity is None else [axis.name for axis in s.fidelity.axes] for s in (old, new))
    for axis in (*was, *is_):
        if (axis in was) != (axis in is_):
            which = "old" if axis in was else "new"
            raise ValueError(
                f"Only the {which} space has the scale axis {axis!r}, so runs of the two cannot be compared; both need "
                f"the same axes, got {was} and {is_}."
            )


def _refuse_arguments(
    defaults: Mapping[str, Any],
    drop: Sequence[str],
    before: Mapping[str, list[Parameter]],
    after: Mapping[str, list[Parameter]],
) -> None:
    if isinstance(drop, str):
        raise ValueError(f"drop must be a list of names, got {drop!r}; write [{drop!r}].")
    for name in drop:
        if name not in before:
            raise ValueError(f"drop names {name!r}, which the old space does not have; it has {list(before)}.")
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
            taken[name] = parameter.check(name, _as(name, parameter, config[name]))
        elif name in defaults:
            taken[name] = parameter.check(name, defaults[name])
        elif isinstance(parameter, Fixed):
            taken[name] = parameter.value
        else:
            missing.append(name)
            continue
        if isinstance(parameter, Choice) and parameter.subspaces:
            _take(parameter.subspaces[taken[name]], config, defaults, taken, missing)


def _as(path: str, parameter: Parameter, value: Any) -> Any:
    """The value, with shares of the sources that the parameter mixes."""
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
        if source not in mixture.names and share > TOLERANCE:
            raise ValueError(f"{path} has a share {share!r} of {source!r}, which the new space does not mix.")
    return {name: shares.get(name, 0.0) for name in mixture.names}
