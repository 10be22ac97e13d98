"""What one name of a space may hold: a real number, an integer, one of several options, or a fixed value.

Every parameter is a frozen value that checks itself when it is made and knows its own chart: `encode` takes its values
to columns of the unit cube, `decode` takes every point of those columns back to a value. Both work on many values at
once (`n` values, `k` columns of this parameter). `Mixture` and `Schedule` implement the same class in their own files.
"""

import difflib
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Scalar: TypeAlias = str | int | float | bool | None

# Up to here a double separates neighbouring integers on a log axis: the error of exp(log v) stays well below 1/2.
LARGEST_INTEGER = 2**44


@dataclass(frozen=True)
class Column:
    """One coordinate of the unit cube: where it comes from and when it means anything."""

    name: str
    """The path, for example `optimizer.adamw.lr`."""
    parameter: str
    """The parameter of the space that it belongs to, for example `optimizer`."""
    kind: Literal["real", "integer", "choice", "share"]
    levels: int = 0
    """How many values there are; 0 when continuous."""
    octaves: float | None = None
    """log2(high / low) on a log axis, else None."""
    when: tuple[tuple[int, int], ...] = ()
    """The column counts only where, for each pair (column, code), that choice column has that code."""
    floor: float = 0.0
    """The least share, for a share."""
    free: float = 0.0
    """What the mixture's floors leave to be shared, for a share."""
    mixture: str = ""
    """The path of the mixture, equal for all shares of one simplex."""
    schedule: str = ""
    """The path of the schedule, for its family and its settings."""


class Parameter(ABC):
    """What `Space` asks of everything that can stand behind a name."""

    @abstractmethod
    def columns(self, path: str) -> tuple[Column, ...]:
        """The `k` columns; in `when`, column numbers are counted from the first of them."""

    @abstractmethod
    def check(self, path: str, value: Any) -> Any:
        """The value as a config holds it; ValueError, beginning with `path`, when it is not allowed."""

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> Array:
        """`n` checked values to an (n, k) array in [0, 1]."""

    @abstractmethod
    def decode(self, x: Array) -> list[Any]:
        """An (n, k) array in [0, 1] to `n` allowed values."""

    def settled(self, x: Array) -> Array:
        """(n, k) columns to those of the values that are read there: `encode(decode(x))`, bit for bit."""
        return self.encode(self.decode(x))

    def quantile(self, u: Array) -> Array:
        """(n, k) uniform numbers to (n, k) columns distributed as `Space.sample` draws them."""
        return u

    def start(self, x: Array) -> Array:
        """(n, k) columns with what has a natural value to start from put there: a mixture's reference."""
        return x

    def to_json(self, value: Any) -> Any:
        """A checked value as plain JSON; `check` takes it back."""
        return value

    @property
    def limited(self) -> bool:
        """Whether points of the columns are moved before they are read: `settled` says where to."""
        return False

    @property
    def scale_axes(self) -> tuple[str, ...]:
        """The scale axes on which it depends what is allowed."""
        return ()

    def at(self, path: str, scale: Mapping[str, float]) -> "Parameter":
        """What is allowed at this scale, on the same columns; ValueError, beginning with `path`, when nothing is."""
        return self


def is_number(value: object) -> TypeGuard[float]:
    """True for real numbers of Python and numpy; bool is not one (True would pass as 1 otherwise)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A numpy scalar as the Python value it stands for; everything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def suggestion(name: object, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about a name that is not known: the nearest known one, or `otherwise` when none is near."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def is_scalar(value: object) -> bool:
    """True for what JSON can hold bare: text, finite numbers, true, false and null."""
    return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def codes_of(x: Array, levels: int) -> npt.NDArray[np.intp]:
    """Cells 0 .. levels - 1 of [0, 1]; the last one holds its upper end."""
    return np.minimum((x * levels).astype(np.intp), levels - 1)


def _range_repr(name: str, low: float, high: float, log: bool) -> str:
    return f"{name}({low!r}, {high!r}{', log=True' if log else ''})"


def _log_octaves(low: float, high: float, log: bool) -> float | None:
    return math.log2(high) - math.log2(low) if log else None


@dataclass(frozen=True, repr=False)
class Real(Parameter):
    """A real number in [low, high], uniform, or uniform in its logarithm with `log=True`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            bound = plain(getattr(self, name))
            if not is_number(bound) or not math.isfinite(bound):
                raise ValueError(f"Real needs finite numbers as bounds, got {name}={bound!r}.")
            object.__setattr__(self, name, float(bound))
        if not self.low < self.high:
            raise ValueError(
                f"Real needs low < high, got low={self.low!r}, high={self.high!r}; a fixed value needs no Real."
            )
        if not isinstance(self.log, bool):
            raise ValueError(f"Real needs log=True or log=False, got log={self.log!r}.")
        if self.log and self.low <= 0:
            raise ValueError(f"Real on a log scale needs low > 0, got low={self.low!r}.")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"Real needs high - low to fit a float, got low={self.low!r}, high={self.high!r}.")

    def __repr__(self) -> str:
        return _range_repr("Real", self.low, self.high, self.log)

    def columns(self, path: str) -> tuple[Column, ...]:
        return (Column(path, path, "real", octaves=_log_octaves(self.low, self.high, self.log)),)

    def check(self, path: str, value: Any) -> float:
        if type(value) is float and self.low <= value <= self.high:  # the usual case, and NaN fails the comparison
            return value
        value = plain(value)  # a float32 would be compared in single precision
        if is_number(value) and self.low <= value <= self.high:
            return float(value)
        raise ValueError(f"{path} must be a number in [{self.low!r}, {self.high!r}], got {value!r}.")

    def encode(self, values: Sequence[float]) -> Array:
        return self._encoded(np.array(values, dtype=np.float64)[:, None])

    def settled(self, x: Array) -> Array:
        return self._encoded(self.numbers(x)[:, None])

    def _encoded(self, v: Array) -> Array:
        """(n, 1) values to (n, 1) columns."""
        if self.log:
            start, span = math.log(self.low), math.log(self.high) - math.log(self.low)
            x = (np.log(v) - start) / span
        else:
            x = (v - self.low) / (self.high - self.low)
        # np.log and math.log may differ in the last bit, so an end could fall just outside.
        return np.clip(x, 0.0, 1.0)

    def decode(self, x: Array) -> list[float]:
        return list(self.numbers(x).tolist())

    def numbers(self, x: Array) -> Array:
        """(n, 1) columns to an array of the `n` values."""
        if self.log:
            start, span = math.log(self.low), math.log(self.high) - math.log(self.low)
            v = np.exp(start + x[:, 0] * span)
        else:
            v = self.low + x[:, 0] * (self.high - self.low)
        v = np.clip(v, self.low, self.high)
        v[x[:, 0] == 0] = self.low  # rounding must not move the ends
        v[x[:, 0] == 1] = self.high
        return np.asarray(v)


@dataclass(frozen=True, repr=False)
class Integer(Parameter):
    """A whole number in [low, high]. Each has a cell of the column and sits in its middle.

    Cells are equally wide; with `log=True` the cell of v is [v, v + 1) on a log scale, so that every octave has the
    same mass: 1 that of 2 and 3 together, and of 4 to 7.
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            bound = plain(getattr(self, name))
            if type(bound) is not int or abs(bound) > LARGEST_INTEGER:
                raise ValueError(f"Integer needs whole numbers up to 2**44 as bounds, got {name}={bound!r}.")
            object.__setattr__(self, name, bound)
        if not self.low < self.high:
            raise ValueError(
                f"Integer needs low < high, got low={self.low}, high={self.high}; a fixed value needs no Integer."
            )
        if not isinstance(self.log, bool):
            raise ValueError(f"Integer needs log=True or log=False, got log={self.log!r}.")
        if self.log and self.low < 1:
            raise ValueError(f"Integer on a log scale needs low >= 1, got low={self.low}.")

    def __repr__(self) -> str:
        return _range_repr("Integer", self.low, self.high, self.log)

    @property
    def levels(self) -> int:
        return self.high - self.low + 1

    def columns(self, path: str) -> tuple[Column, ...]:
        return (Column(path, path, "integer", self.levels, _log_octaves(self.low, self.high, self.log)),)

    def check(self, path: str, value: Any) -> int:
        value = plain(value)
        if type(value) is int and self.low <= value <= self.high:
            return value
        raise ValueError(f"{path} must be a whole number in [{self.low}, {self.high}], got {value!r}.")

    def _log_ends(self) -> tuple[float, float]:
        return math.log(self.low), math.log(self.high + 1)

    def encode(self, values: Sequence[int]) -> Array:
        return self._encoded(np.array(values, dtype=np.float64)[:, None])

    def settled(self, x: Array) -> Array:
        return self._encoded(self.numbers(x)[:, None])

    def _encoded(self, v: Array) -> Array:
        """(n, 1) whole numbers to (n, 1) columns."""
        if not self.log:
            return (v - self.low + 0.5) / self.levels
        start, end = self._log_ends()
        return (np.log(v + 0.5) - start) / (end - start)

    def relaxed(self, x: Array) -> Array:
        """(n, 1) columns to `n` numbers that are rounded to the values; v itself where v is encoded."""
        if self.log:
            start, end = self._log_ends()
            v: Array = np.exp(start + x[:, 0] * (end - start)) - 0.5
        else:
            v = self.low - 0.5 + x[:, 0] * self.levels
        return v

    def decode(self, x: Array) -> list[int]:
        return list(self.numbers(x).astype(np.int64).tolist())

    def numbers(self, x: Array) -> Array:
        """(n, 1) columns to an array of the `n` values, whole numbers as floats."""
        return np.clip(np.floor(self.relaxed(x) + 0.5), self.low, self.high)


@dataclass(frozen=True)
class Fixed(Parameter):
    """A constant: it stands in every config and takes no column. Users write the bare value."""

    value: Scalar
    type_: type = field(init=False, repr=False)
    """Part of equality, since True == 1 == 1.0 in Python and not in JSON."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", plain(self.value))
        if not is_scalar(self.value):
            raise ValueError(f"A fixed value must be text, a finite number, a bool or None, got {self.value!r}.")
        object.__setattr__(self, "type_", type(self.value))

    def columns(self, path: str) -> tuple[Column, ...]:
        return ()

    def check(self, path: str, value: Any) -> Scalar:
        value = plain(value)
        same = is_number(value) if is_number(self.value) else type(value) is self.type_
        if same and value == self.value:
            return self.value
        raise ValueError(f"{path} is fixed at {self.value!r} in this space, got {value!r}.")

    def encode(self, values: Sequence[Scalar]) -> Array:
        return np.empty((len(values), 0))

    def decode(self, x: Array) -> list[Scalar]:
        return [self.value] * len(x)


@dataclass(frozen=True, init=False, repr=False)
class Choice(Parameter):
    """One of at least two options: `Choice("a", "b")`, `Choice(["a", "b"])`, or named sub-spaces.

    `Choice({"adamw": {"lr": Real(1e-4, 1e-2, log=True)}, "sgd": {}})` adds the parameters of the chosen option to the
    config, flat beside it. Options are told apart by type as well as value: True, 1 and 1.0 are three options.
    `Choice("tiny", "small", "large", ordered=True)` has an order that counts: neighbours are alike to a model, as
    neighbouring integers are, where options without order are all equally far apart.
    """

    options: tuple[Scalar, ...]
    types: tuple[type, ...]
    """The options' types: part of equality, since True == 1 == 1.0 in Python and not in JSON."""
    subspaces: Mapping[str, Mapping[str, Parameter]] = field(hash=False)
    """Option -> its parameters; empty when the options are plain values."""
    ordered: bool
    _codes: Mapping[tuple[type, Scalar], int] = field(compare=False)

    def __init__(self, *options: Any, ordered: bool = False) -> None:
        if not isinstance(ordered, bool):
            raise ValueError(f"Choice needs ordered=True or ordered=False, got ordered={ordered!r}.")
        if len(options) == 1 and isinstance(options[0], Mapping | list | tuple):
            options = (options[0],) if isinstance(options[0], Mapping) else tuple(options[0])
        named = len(options) == 1 and isinstance(options[0], Mapping)
        if named and ordered:
            raise ValueError("Choice of sub-spaces has no order, since their parameters differ; leave ordered= out.")
        subspaces = {name: _subspace(name, entries) for name, entries in options[0].items()} if named else {}
        values = tuple(map(plain, subspaces if named else options))
        for option in values:
            if not is_scalar(option):
                raise ValueError(f"A Choice option must be text, a finite number, a bool or None, got {option!r}.")
        if len(values) < 2:
            raise ValueError(f"Choice needs at least two options, got {list(values)}; a fixed value needs no Choice.")
        codes: dict[tuple[type, Scalar], int] = {}
        for code, option in enumerate(values):
            if codes.setdefault((type(option), option), code) != code:
                raise ValueError(f"Choice has the option {option!r} twice; each may be there once.")
        object.__setattr__(self, "options", values)
        object.__setattr__(self, "types", tuple(map(type, values)))
        object.__setattr__(self, "subspaces", subspaces)
        object.__setattr__(self, "ordered", ordered)
        object.__setattr__(self, "_codes", codes)

    def __repr__(self) -> str:
        if self.subspaces:
            return f"Choice({ {name: dict(entries) for name, entries in self.subspaces.items()} })"
        return f"Choice({', '.join(map(repr, self.options))}{', ordered=True' if self.ordered else ''})"

    def columns(self, path: str) -> tuple[Column, ...]:
        return (Column(path, path, "integer" if self.ordered else "choice", len(self.options)),)

    def code(self, value: Scalar) -> int:
        """The option's number; KeyError when it is none of them."""
        return self._codes[type(value), value]

    def check(self, path: str, value: Any) -> Scalar:
        value = plain(value)
        try:
            return self.options[self.code(value)]
        except (KeyError, TypeError):  # TypeError: not hashable, so no scalar
            raise ValueError(f"{path} must be one of {list(self.options)}, got {value!r}.") from None

    @property
    def scale_axes(self) -> tuple[str, ...]:
        inner = (p.scale_axes for entries in self.subspaces.values() for p in entries.values())
        return tuple(dict.fromkeys(axis for axes in inner for axis in axes))

    def at(self, path: str, scale: Mapping[str, float]) -> "Choice":
        if not self.scale_axes:
            return self
        return Choice(
            {
                option: {name: p.at(f"{path}.{option}.{name}", scale) for name, p in entries.items()}
                for option, entries in self.subspaces.items()
            }
        )

    def encode(self, values: Sequence[Scalar]) -> Array:
        codes = np.array([self.code(v) for v in values], dtype=np.float64)
        return ((codes + 0.5) / len(self.options))[:, None]

    def settled(self, x: Array) -> Array:
        return (codes_of(x, len(self.options)) + 0.5) / len(self.options)

    def decode(self, x: Array) -> list[Scalar]:
        return [self.options[code] for code in codes_of(x[:, 0], len(self.options)).tolist()]


def as_parameter(path: str, entry: object) -> Parameter:
    """The entry of a space as a parameter: a bare scalar is a fixed value."""
    if isinstance(entry, Parameter):
        return entry
    if is_scalar(plain(entry)):
        return Fixed(plain(entry))
    raise ValueError(
        f"{path} must be a parameter (Real, Integer, Choice, Mixture, Schedule) or a fixed value "
        f"(text, a finite number, a bool, None), got {entry!r}."
    )


def _subspace(option: object, entries: object) -> dict[str, Parameter]:
    if not isinstance(option, str):
        raise ValueError(f"An option with a sub-space needs a text as its name, got {option!r}.")
    if not isinstance(entries, Mapping):
        raise ValueError(
            f"Choice option {option!r} needs a dictionary of parameters ({{}} for none), got {entries!r}; "
            "for plain options write Choice('a', 'b')."
        )
    return {name: as_parameter(name, entry) for name, entry in entries.items()}
