"""Learning-rate schedules: as values, functions of the step, and as a parameter of a space.

A value says what share of the peak learning rate a step gets:

    WSD(decay=0.2, warmup=0.02).factor(step, total_steps)

Steps are counted from 0, so a run of T steps asks for 0 .. T - 1; step T, the state after the run, is allowed as well.
All lengths are fractions of the run. Warm-up lasts W = round(warmup * T) whole steps (a half goes to the even number)
and gives step t < W the factor (t + 1) / W, so the last of them has the peak; after it comes the family's own curve
from 1 down to `floor`, a fraction of the peak.

A new family is one dataclass and one row of FAMILIES.
"""

import difflib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from search_spaces.parameter import Array, Column, Parameter, Real, codes_of, is_number, plain


class Curve(ABC):
    """A schedule as a value: a frozen dataclass a family, whose fields are its settings, numbers with defaults."""

    family: ClassVar[str]
    warmup: float
    floor: float

    def __post_init__(self) -> None:
        for setting in self.settings():
            value = plain(getattr(self, setting))
            if not is_number(value):
                raise ValueError(f"Schedule {self.family} needs a number for {setting}, got {value!r}.")
            object.__setattr__(self, setting, float(value))
        self._require(0 <= self.warmup < 1, "warmup in [0, 1), a fraction of the steps", warmup=self.warmup)
        self._require(0 <= self.floor <= 1, "floor in [0, 1], a fraction of the peak", floor=self.floor)

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The names of the family's settings."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]  # every family is a dataclass

    def _require(self, holds: bool, allowed: str, **given: float) -> None:
        if not holds:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"Schedule {self.family} needs {allowed}, got {got}.")

    @overload
    def factor(self, step: float, total_steps: float) -> float: ...
    @overload
    def factor(self, step: Sequence[float] | npt.NDArray[Any], total_steps: float) -> Array: ...
    def factor(self, step: float | Sequence[float] | npt.NDArray[Any], total_steps: float) -> float | Array:
        """Learning rate at `step` over its peak; a number for a number, an array for an array of steps.

        ValueError when a step is outside [0, total_steps] or total_steps is no whole number >= 1.
        """
        total = plain(total_steps)
        if not is_number(total) or not math.isfinite(total) or total < 1 or total != int(total):
            raise ValueError(f"total_steps must be a whole number >= 1, got {total!r}.")
        total = int(total)  # tokens // tokens_per_step is a float
        t = np.asarray(step, dtype=np.float64)
        inside = (t >= 0) & (t <= total)  # False for NaN
        if not inside.all():
            raise ValueError(f"step must be in [0, total_steps={total}], got {t[~inside].flat[0]:g}.")
        warm = round(self.warmup * total)
        after = self.floor + (1.0 - self.floor) * self._fall(np.maximum(t, warm), warm, total)
        factors = np.where(t < warm, (t + 1.0) / max(warm, 1), after)
        return factors if factors.ndim else float(factors)

    @abstractmethod
    def _fall(self, t: Array, warm: int, total: int) -> Array:
        """The curve from 1 to 0 at steps t >= warm."""

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family} | {name: getattr(self, name) for name in self.settings()}


def _progress(t: Array, warm: int, total: int) -> Array:
    """u = (t - W) / (T - W) in [0, 1]; 0 where warm-up takes the whole run."""
    return (t - warm) / max(total - warm, 1)


@dataclass(frozen=True)
class Cosine(Curve):
    """(1 + cos(pi u)) / 2 with u = (t - W) / (T - W) (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    family = "cosine"
    warmup: float = 0.0
    floor: float = 0.0

    def _fall(self, t: Array, warm: int, total: int) -> Array:
        return 0.5 * (1.0 + np.cos(math.pi * _progress(t, warm, total)))


@dataclass(frozen=True)
class Linear(Curve):
    """1 - u with u = (t - W) / (T - W)."""

    family = "linear"
    warmup: float = 0.0
    floor: float = 0.0

    def _fall(self, t: Array, warm: int, total: int) -> Array:
        return 1.0 - _progress(t, warm, total)


@dataclass(frozen=True)
class WSD(Curve):
    """Warm-up, stable, decay: 1 until the last decay * T steps, then linearly to 0.

    Hu et al. 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392.
    """

    family = "wsd"
    decay: float = 0.2
    warmup: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.decay <= 1, "decay in (0, 1], a fraction of the steps", decay=self.decay)
        self._require(self.warmup + self.decay <= 1, "warmup + decay <= 1", warmup=self.warmup, decay=self.decay)

    def _fall(self, t: Array, warm: int, total: int) -> Array:
        return np.minimum((total - t) / (self.decay * total), 1.0)


@dataclass(frozen=True)
class REX(Curve):
    """(1 - z) / (1/2 + (1 - z)/2), z = (t - W) / (T - W) (Chen et al. 2021, arXiv 2107.04197).

    The paper has no warm-up and z = t / T; here z runs over what follows warm-up, as u does for the others.
    """

    family = "rex"
    warmup: float = 0.0
    floor: float = 0.0

    def _fall(self, t: Array, warm: int, total: int) -> Array:
        rest = 1.0 - _progress(t, warm, total)
        return rest / (0.5 + 0.5 * rest)


FAMILIES: dict[str, type[Curve]] = {
    "cosine": Cosine,
    "linear": Linear,
    "wsd": WSD,
    "rex": REX,
}


def curve_from_json(obj: Mapping[str, Any]) -> Curve:
    """The value that `to_json` wrote; settings left out have the family's defaults."""
    settings = dict(obj)
    family = settings.pop("family", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"A schedule needs a family, one of {list(FAMILIES)}, got family={family!r}.")
    unknown = [name for name in settings if name not in FAMILIES[family].settings()]
    if unknown:
        raise ValueError(f"Schedule {family} has no setting {unknown}; it has {list(FAMILIES[family].settings())}.")
    return FAMILIES[family](**settings)


@dataclass(frozen=True)
class _Slot:
    """A column of a setting that varies: of every family, or of one."""

    setting: str
    real: Real
    family: str | None
    """None for every family."""

    def holds_for(self, family: str) -> bool:
        return self.family is None or self.family == family


@dataclass(frozen=True, init=False, repr=False)
class Schedule(Parameter):
    """The schedule as a parameter: which family, and the settings that vary.

        Schedule("cosine", "linear", warmup=Real(0, 0.1), wsd={"decay": Real(0.05, 0.3)}, rex={"floor": 0.0})

    Names, and keywords that are names of families, say which families are in it; such a keyword gives that family its
    own settings. Other keywords hold for all families that have such a setting and no own one. A setting is a number
    (fixed) or a Real; left out, it has the family's default.

    Columns: one for the family when there are several, one for each setting that varies. A Real that holds for every
    family is one column; one that does not is a column for each family it holds for, counting only there.
    """

    families: Mapping[str, Mapping[str, float | Real]]
    """Family -> its own settings: everything but the shared ones."""
    shared: Mapping[str, Real]
    """Settings that vary in the same way for every family."""
    _slots: tuple[_Slot, ...] = field(compare=False)
    """The columns after that of the family."""

    def __init__(self, *families: str, **settings: Any) -> None:
        own = {name: settings.pop(name) for name in list(settings) if name in FAMILIES}
        names = (*families, *(name for name in own if name not in families))
        _check_families(names, own)
        known = tuple(dict.fromkeys(s for name in names or FAMILIES for s in FAMILIES[name].settings()))
        for setting in settings:
            if setting not in known:
                _refuse_setting(f"Schedule with the families {list(names)}", setting, (*known, *FAMILIES))
        if not names:
            raise ValueError(f"Schedule needs at least one family; there are {list(FAMILIES)}.")
        complete: dict[str, dict[str, float | Real]] = {}
        for name in names:
            defaults = {setting: getattr(FAMILIES[name], setting) for setting in FAMILIES[name].settings()}
            general = {setting: value for setting, value in settings.items() if setting in defaults}
            complete[name] = defaults | general | dict(own.get(name, {}))
            _check_corners(name, complete[name])
        shared = {
            setting: settings[setting]
            for setting in known
            if isinstance(settings.get(setting), Real)
            and all(setting in complete[name] and setting not in own.get(name, {}) for name in names)
        }
        resolved = {
            name: {
                setting: value if isinstance(value, Real) else float(value)
                for setting, value in entries.items()
                if setting not in shared
            }
            for name, entries in complete.items()
        }
        object.__setattr__(self, "families", resolved)
        object.__setattr__(self, "shared", shared)
        slots = [_Slot(setting, real, None) for setting, real in shared.items()]
        for name, entries in resolved.items():
            slots += [_Slot(setting, value, name) for setting, value in entries.items() if isinstance(value, Real)]
        object.__setattr__(self, "_slots", tuple(slots))

    def __repr__(self) -> str:
        settings = {**self.shared, **{name: dict(entries) for name, entries in self.families.items()}}
        return f"Schedule({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    @property
    def _layout(self) -> tuple[tuple[str, ...], int, tuple[_Slot, ...]]:
        """The families' names, the column where the settings begin (0 or 1), the settings' columns."""
        return tuple(self.families), int(len(self.families) > 1), self._slots

    def columns(self, path: str) -> tuple[Column, ...]:
        names, first, slots = self._layout
        columns = [Column(path, path, "choice", len(names))] if first else []
        for slot in slots:
            where = path if slot.family is None else f"{path}.{slot.family}"
            when = ((0, names.index(slot.family)),) if first and slot.family is not None else ()
            (column,) = slot.real.columns(f"{where}.{slot.setting}")
            columns.append(replace(column, parameter=path, when=when))
        return tuple(columns)

    def check(self, path: str, value: Any) -> Curve:
        if isinstance(value, Mapping):
            value = curve_from_json(self._fixed(path, value) | dict(value))
        if not isinstance(value, Curve):
            raise ValueError(f"{path} must be a schedule such as Cosine(warmup=0.02), got {value!r}.")
        if value.family not in self.families:
            raise ValueError(f"{path} must be of a family in {list(self.families)}, got {value!r}.")
        for setting, allowed in {**self.shared, **self.families[value.family]}.items():
            given = getattr(value, setting)
            if isinstance(allowed, Real):
                allowed.check(f"{path}.{setting}", given)
            elif given != allowed:
                raise ValueError(f"{path}.{setting} is fixed at {allowed!r} in this space, got {given!r}.")
        return value

    def _fixed(self, path: str, given: Mapping[str, Any]) -> dict[str, float]:
        """What is fixed for the family of a schedule in JSON: it may leave that out, but nothing that varies."""
        family = given.get("family")
        settings = {**self.shared, **self.families[family]} if family in list(self.families) else {}
        if missing := [name for name, allowed in settings.items() if isinstance(allowed, Real) and name not in given]:
            raise ValueError(f"{path} has no value for {missing}; schedule {family} needs it in this space.")
        return {name: allowed for name, allowed in settings.items() if not isinstance(allowed, Real)}

    def encode(self, values: Sequence[Curve]) -> Array:
        names, first, slots = self._layout
        x = np.full((len(values), first + len(slots)), 0.5)
        if first:
            x[:, 0] = (np.array([names.index(value.family) for value in values]) + 0.5) / len(names)
        for column, slot in enumerate(slots, start=first):
            rows = [row for row, value in enumerate(values) if slot.holds_for(value.family)]
            x[rows, column] = slot.real.encode([getattr(values[row], slot.setting) for row in rows])[:, 0]
        return x

    def decode(self, x: Array) -> list[Curve]:
        names, first, slots = self._layout
        codes = codes_of(x[:, 0], len(names)).tolist() if first else [0] * len(x)
        tuned = [slot.real.decode(x[:, [column]]) for column, slot in enumerate(slots, start=first)]
        values = []
        for row, code in enumerate(codes):
            family = names[code]
            settings: dict[str, Any] = dict(self.families[family])
            for slot, decoded in zip(slots, tuned, strict=True):
                if slot.holds_for(family):
                    settings[slot.setting] = decoded[row]
            values.append(FAMILIES[family](**settings))
        return values

    def to_json(self, value: Curve) -> dict[str, Any]:
        return value.to_json()


def _check_families(names: Sequence[str], own: Mapping[str, Any]) -> None:
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"{name!r} is no schedule family; there are {list(FAMILIES)}.")
        if names.count(name) > 1:
            raise ValueError(f"Schedule has the family {name!r} twice; each may be there once.")
    for name, settings in own.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"Schedule needs a dictionary of settings for {name}, got {settings!r}.")
        for setting in settings:
            if setting not in FAMILIES[name].settings():
                _refuse_setting(f"Schedule {name}", setting, FAMILIES[name].settings())


def _refuse_setting(what: str, setting: str, known: Sequence[str]) -> None:
    near = difflib.get_close_matches(setting, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {list(known)}."
    raise ValueError(f"{what} has no setting {setting!r}; {hint}")


def _check_corners(family: str, settings: Mapping[str, object]) -> None:
    """Every decoded value must be allowed; the rules are linear in the settings, so it is enough to try the corners."""
    for setting, value in settings.items():
        if not isinstance(value, Real) and not is_number(value):
            raise ValueError(f"Schedule {family} needs a number or a Real for {setting}, got {value!r}.")
    ends = [(value.low, value.high) if isinstance(value, Real) else (value,) for value in settings.values()]
    for corner in itertools.product(*ends):
        FAMILIES[family](**dict(zip(settings, corner, strict=True)))
