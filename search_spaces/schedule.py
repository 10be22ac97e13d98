"""A learning-rate schedule as a parameter of a space: which family, and the settings that vary."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces.curve import (
    FAMILIES,
    Curve,
    curve_from_json,
    family_named,
    refuse_setting,
)
from search_spaces.mixture_schedule import SwitchedMixture
from search_spaces.parameter import Array, Column, Parameter, Real, codes_of, is_number, plain

#: Where `Schedule.curves` looks at a curve, as fractions of training: m of them, closer in warm-up and in the decay.
PROGRESS: Array = np.concatenate([np.arange(1, 9) / 80, np.arange(3, 17) / 20, np.arange(65, 81) / 80])
PROGRESS.setflags(write=False)
#: The part of training that each of PROGRESS stands for (m).
_PARTS: Array = np.diff(PROGRESS, prepend=0.0)

#: A setting: fixed at a number, varied by a Real, a tuple of such, or fixed at None.
Setting: TypeAlias = float | Real | tuple[float | Real, ...] | None


@dataclass(frozen=True)
class _Slot:
    """A column of a setting, or of an item of one, that varies: of every family, or of one."""

    setting: str
    item: int | None
    real: Real
    family: str | None
    """None for every family."""

    @property
    def name(self) -> str:
        return self.setting if self.item is None else f"{self.setting}.{self.item}"

    def holds_for(self, family: str) -> bool:
        return self.family is None or self.family == family

    def of(self, curve: Curve) -> float:
        value = getattr(curve, self.setting)
        number: float = value if self.item is None else value[self.item]
        return number


@dataclass(frozen=True, init=False, repr=False)
class Schedule(Parameter):
    """The schedule as a parameter: which family, and the settings that vary.

        Schedule("cosine", "linear", warmup=Real(0, 0.1), wsd={"decay": Real(0.05, 0.3)}, rex={"floor": 0.0})

    Names, and keywords that are names of families, say which families are in it; such a keyword gives that family its
    own settings. Other keywords hold for all families that have such a setting and no own one. A setting is a number
    (fixed) or a Real; one that is a list has a tuple of these. Left out, it varies over the family's range (`ranges`),
    or has its default where there is none.

    Columns: one for the family when there are several, one for each setting that varies, or item of one. What varies
    in the same way for every family is one column; anything else is a column for each family it holds for, counting
    only there.
    """

    families: Mapping[str, Mapping[str, Setting]] = field(hash=False)
    """Family -> its own settings: everything but the shared ones."""
    shared: Mapping[str, Setting] = field(hash=False)
    """Settings that vary in the same way for every family."""
    _slots: tuple[_Slot, ...] = field(hash=True, compare=False)
    """The columns after that of the family."""

    def __init__(self, *families: str, **settings: Any) -> None:
        own = {name: settings.pop(name) for name in list(settings) if name in FAMILIES}
        names = (*families, *(name for name in own if name not in families))
        _check_families(names, own)
        known = tuple(dict.fromkeys(s for name in names or FAMILIES for s in FAMILIES[name].settings()))
        for setting in settings:
            if setting not in known:
                refuse_setting(f"Schedule with the families {list(names)}", setting, (*known, *FAMILIES))
        if not names:
            raise ValueError(f"Schedule needs at least one family; there are {list(FAMILIES)}.")
        complete: dict[str, dict[str, Setting]] = {}
        for name in names:
            family = FAMILIES[name]
            given = family.defaults() | family.ranges()
            given |= {setting: value for setting, value in settings.items() if setting in given}
            given |= own.get(name, {})
            complete[name] = {setting: _setting(family, setting, value) for setting, value in given.items()}
            _check_corners(family, complete[name])
        first = complete[names[0]]
        shared = {
            setting: first[setting]
            for setting in known
            if _varies(first.get(setting))
            and all(
                setting not in own.get(name, {}) and complete[name].get(setting) == first[setting] for name in names
            )
        }
        resolved = {
            name: {setting: value for setting, value in entries.items() if setting not in shared}
            for name, entries in complete.items()
        }
        object.__setattr__(self, "families", resolved)
        object.__setattr__(self, "shared", shared)
        slots = _slots(shared, None)
        for name, entries in resolved.items():
            slots += _slots(entries, name)
        object.__setattr__(self, "_slots", tuple(slots))

    def __repr__(self) -> str:
        """Only what differs from the families' own ranges and defaults."""
        given: dict[str, dict[str, Setting]] = {}
        for name, entries in self.families.items():
            usual = FAMILIES[name].defaults() | FAMILIES[name].ranges()
            given[name] = {s: v for s, v in {**self.shared, **entries}.items() if v != usual[s]}
        common = {
            setting: value
            for setting, value in next(iter(given.values())).items()
            if all(setting in own and own[setting] == value for own in given.values())
        }
        own = {name: {s: v for s, v in some.items() if s not in common} for name, some in given.items()}
        parts = [repr(name) for name, some in own.items() if not some]
        parts += [f"{setting}={value!r}" for setting, value in common.items()]
        parts += [f"{name}={some!r}" for name, some in own.items() if some]
        return f"Schedule({', '.join(parts)})"

    @property
    def _layout(self) -> tuple[tuple[str, ...], int, tuple[_Slot, ...]]:
        """The families' names, the column where the settings begin (0 or 1), the settings' columns."""
        return tuple(self.families), int(len(self.families) > 1), self._slots

    def columns(self, path: str) -> tuple[Column, ...]:
        names, first, slots = self._layout
        columns = [Column(path, path, "choice", len(names), schedule=path)] if first else []
        for slot in slots:
            where = path if slot.family is None else f"{path}.{slot.family}"
            when = ((0, names.index(slot.family)),) if first and slot.family is not None else ()
            (column,) = slot.real.columns(f"{where}.{slot.name}")
            columns.append(replace(column, parameter=path, when=when, schedule=path))
        return tuple(columns)

    def check(self, path: str, value: Any) -> Curve:
        if isinstance(value, Mapping):
            given = self._fixed(path, value) | dict(value)
            try:
                value = curve_from_json(given)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        if not isinstance(value, Curve):
            raise ValueError(f"{path} must be a schedule such as Cosine(warmup=0.02), got {value!r}.")
        if value.family not in self.families:
            raise ValueError(f"{path} must be of a family in {list(self.families)}, got {value!r}.")
        for setting, allowed in {**self.shared, **self.families[value.family]}.items():
            where, given = f"{path}.{setting}", getattr(value, setting)
            if isinstance(allowed, tuple):
                if given is None or len(given) != len(allowed):
                    raise ValueError(f"{where} has {len(allowed)} items in this space, got {given!r}.")
                for item, (bounds, number) in enumerate(zip(allowed, given, strict=True)):
                    _check_number(f"{where}.{item}", bounds, number)
            else:
                _check_number(where, allowed, given)
        return value

    def _fixed(self, path: str, given: Mapping[str, Any]) -> dict[str, Setting]:
        """What is fixed for the family of a schedule in JSON: it may leave that out, but nothing that varies."""
        family = given.get("family")
        settings = {**self.shared, **self.families[family]} if family in list(self.families) else {}
        if missing := [name for name, allowed in settings.items() if _varies(allowed) and name not in given]:
            raise ValueError(f"{path} has no value for {missing}; schedule {family} needs it in this space.")
        return {name: allowed for name, allowed in settings.items() if not _varies(allowed)}

    def encode(self, values: Sequence[Curve]) -> Array:
        names, first, slots = self._layout
        x = np.full((len(values), first + len(slots)), 0.5)
        rows: dict[str, list[int]] = {name: [] for name in names}
        for row, value in enumerate(values):
            rows[value.family].append(row)
        for code, name in enumerate(names):
            curves = [values[row] for row in rows[name]]
            if first:
                x[rows[name], 0] = (code + 0.5) / len(names)
            for column, slot in enumerate(slots, start=first):
                if slot.holds_for(name):
                    x[rows[name], column] = slot.real.encode([slot.of(curve) for curve in curves])[:, 0]
        return x

    def settled(self, x: Array) -> Array:
        names, first, slots = self._layout
        settled = np.full(x.shape, 0.5)
        for name, rows in self._rows(x):
            if first:
                settled[rows, 0] = (names.index(name) + 0.5) / len(names)
            for column, slot in enumerate(slots, start=first):
                if slot.holds_for(name):
                    settled[rows, column] = slot.real.settled(x[rows, column : column + 1])[:, 0]
        return settled

    def decode(self, x: Array) -> list[Curve]:
        values = np.empty(len(x), dtype=object)
        for name, rows in self._rows(x):
            settings, varying = self._settings(name, x[rows])
            family, setting_names = FAMILIES[name], tuple(varying)
            columns = [list(zip(*v, strict=True)) if isinstance(v, tuple) else v for v in varying.values()]
            if not columns:
                values[rows] = family.unchecked(settings)
                continue
            # The corners were tried when this was made, so everything between them is allowed.
            values[rows] = [
                family.unchecked(settings | dict(zip(setting_names, row, strict=True)))
                for row in zip(*columns, strict=True)
            ]
        return list(values)

    def curves(self, x: Array, tokens: Array | None) -> Array:
        """(n, k) columns to (n, m) factors at PROGRESS, in the limit of many steps: what training sees of a schedule.

        Continuous in every setting. tokens: n, of each row's run, for families that count them (`Power`); when nothing
        is known of them, it has 10,000 steps.
        """
        factors = np.empty((len(x), len(PROGRESS)))
        for name, rows in self._rows(x):
            settings, varying = self._settings(name, x[rows])
            for setting, values in varying.items():
                arrays = [np.array(v)[:, None] for v in (values if isinstance(values, tuple) else (values,))]
                settings[setting] = tuple(arrays) if isinstance(values, tuple) else arrays[0]
            known = None if tokens is None else tokens[rows][:, None]
            factors[rows] = FAMILIES[name].unchecked(settings).limit(PROGRESS, _PARTS, known)
        return factors

    def _rows(self, x: Array) -> list[tuple[str, npt.NDArray[np.intp]]]:
        """Each family that occurs, and its rows."""
        names, first, _ = self._layout
        codes = codes_of(x[:, 0], len(names)) if first else np.zeros(len(x), dtype=np.intp)
        found = [(name, np.flatnonzero(codes == code)) for code, name in enumerate(names)]
        return [(name, rows) for name, rows in found if len(rows)]

    def _settings(
        self, family: str, x: Array
    ) -> tuple[dict[str, Any], dict[str, list[float] | tuple[list[float], ...]]]:
        """The fixed settings of r rows of one family, and those that vary: r numbers, or r for each item."""
        _, first, slots = self._layout
        numbers = {
            (slot.setting, slot.item): slot.real.decode(x[:, column : column + 1])
            for column, slot in enumerate(slots, start=first)
            if slot.holds_for(family)
        }
        fixed: dict[str, Any] = {}
        varying: dict[str, list[float] | tuple[list[float], ...]] = {}
        for setting, value in {**self.shared, **self.families[family]}.items():
            if not _varies(value):
                fixed[setting] = value
            elif isinstance(value, tuple):
                varying[setting] = tuple(
                    numbers[setting, i] if isinstance(item, Real) else [item] * len(x) for i, item in enumerate(value)
                )
            else:
                varying[setting] = numbers[setting, None]
        return fixed, varying

    def to_json(self, value: Curve) -> dict[str, Any]:
        return value.to_json()


def stable_until(config: Mapping[str, Any]) -> float | None:
    """The part of a run up to which it is the beginning of all longer runs of this config, but for their warm-up.

    There the first of its schedules leaves the peak, or its mixture switches. None where a schedule has no stable
    phase, and for a config without a schedule, of whose learning rate nothing is known.
    """
    curves = [value.stable_until for value in config.values() if isinstance(value, Curve)]
    ends = [*curves, *(value.switch for value in config.values() if isinstance(value, SwitchedMixture))]
    return min(end for end in ends if end is not None) if curves and None not in curves else None


def _check_families(names: Sequence[str], own: Mapping[str, Any]) -> None:
    for name in names:
        family_named(name)
        if names.count(name) > 1:
            raise ValueError(f"Schedule has the family {name!r} twice; each may be there once.")
    for name, settings in own.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"Schedule needs a dictionary of settings for {name}, got {settings!r}.")
        for setting in settings:
            if setting not in FAMILIES[name].settings():
                refuse_setting(f"Schedule {name}", setting, FAMILIES[name].settings())


def _setting(family: type[Curve], setting: str, value: Any) -> Setting:
    """A setting as a Schedule keeps it."""
    if setting not in family.lists:
        return _entry(f"Schedule {family.family} needs a number or a Real for {setting}, got {value!r}.", value)
    if value is None and family.defaults()[setting] is None:
        return None
    message = f"Schedule {family.family} needs a list of numbers or Reals for {setting}, got {value!r}."
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(message)
    return tuple(_entry(message, item) for item in value)


def _entry(message: str, value: Any) -> float | Real:
    value = plain(value)
    if isinstance(value, Real):
        return value
    if not is_number(value):
        raise ValueError(message)
    return float(value)


def _varies(value: Setting) -> bool:
    return isinstance(value, Real) or (isinstance(value, tuple) and any(isinstance(item, Real) for item in value))


def _slots(settings: Mapping[str, Setting], family: str | None) -> list[_Slot]:
    slots = []
    for setting, value in settings.items():
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        slots += [_Slot(setting, item, real, family) for item, real in items if isinstance(real, Real)]
    return slots


def _check_number(where: str, allowed: Setting, given: float | None) -> None:
    if isinstance(allowed, Real):
        allowed.check(where, given)
    elif given != allowed:
        raise ValueError(f"{where} is fixed at {allowed!r} in this space, got {given!r}.")


def _check_corners(family: type[Curve], settings: Mapping[str, Setting]) -> None:
    """Every decoded value must be allowed: no rule joins more than two numbers, and each is monotone in both, so it is
    enough to try the corners of any two that vary, with the others at their low ends."""
    slots = _slots(settings, None)
    for pair in itertools.combinations(slots, min(len(slots), 2)):
        for high in itertools.product((False, True), repeat=len(pair)):
            at_high = {(slot.setting, slot.item) for slot, up in zip(pair, high, strict=True) if up}
            corner = {
                setting: tuple(_end(item, (setting, i) in at_high) for i, item in enumerate(value))
                if isinstance(value, tuple)
                else _end(value, (setting, None) in at_high)
                for setting, value in settings.items()
            }
            family(**corner)


def _end(value: Setting, high: bool) -> Any:
    if isinstance(value, Real):
        return value.high if high else value.low
    return value
