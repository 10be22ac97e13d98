"""The size of a run: named scale axes, the target, and what a run costs.

`scale` is one point on the axes, `target` the scale that the search is for, `cost` what a run at a scale takes, in
floating-point operations by default.
"""

import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search_spaces.parameter import Array, Integer, Real, is_number, plain

CELLS_OF_A_RANGE = 4


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Scale(Mapping[str, float]):
    """Axis -> value; equal and hashed by its values. `label` gives the name of a rung that has one.

    `Scale()` has no axes: the scale of every trial of a space without fidelity.
    """

    _values: tuple[tuple[str, float], ...]
    _labels: tuple[tuple[str, str], ...]

    def __init__(self, values: Mapping[str, float] | None = None, labels: Mapping[str, str] | None = None) -> None:
        for axis, value in (values or {}).items():
            if not is_number(value) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"A scale needs a positive number for {axis}, got {plain(value)!r}.")
        object.__setattr__(self, "_values", tuple((axis, float(value)) for axis, value in (values or {}).items()))
        object.__setattr__(self, "_labels", tuple((labels or {}).items()))

    def __getitem__(self, axis: str) -> float:
        for name, value in self._values:
            if name == axis:
                return value
        raise KeyError(axis)

    def __iter__(self) -> Iterator[str]:
        return (axis for axis, _ in self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values))

    def __repr__(self) -> str:
        return f"Scale({', '.join(f'{axis}={self.label(axis)}' for axis in self)})"

    def label(self, axis: str) -> str:
        """The name of the value in the dictionary of rungs, else the number as text."""
        return dict(self._labels).get(axis, f"{self[axis]:g}")

    def to_json(self) -> dict[str, float]:
        return dict(self._values)


@dataclass(frozen=True)
class Axis:
    """One scale axis: rungs (ascending) or a range."""

    name: str
    values: tuple[float, ...]
    """The rungs; empty for a range."""
    labels: tuple[str, ...]
    """Names of the rungs; empty when they have none."""
    low: float
    high: float
    rungs: bool
    integer: bool = False
    """Only whole numbers are on this range."""

    @classmethod
    def of(cls, name: str, given: object) -> "Axis":
        """An axis as users write it: a tuple or dictionary of rungs, or a Real or Integer as a range."""
        if isinstance(given, Real | Integer):
            if given.low <= 0:
                raise ValueError(f"Fidelity axis {name} needs values > 0, got low={given.low!r}.")
            return cls(name, (), (), float(given.low), float(given.high), False, isinstance(given, Integer))
        if not isinstance(given, Mapping | Sequence) or isinstance(given, str) or not given:
            raise ValueError(
                f"Fidelity axis {name} needs rungs (a tuple of numbers or a dictionary name -> number) "
                f"or a range (Real or Integer), got {given!r}."
            )
        values = given.values() if isinstance(given, Mapping) else given
        for value in values:
            if not is_number(value) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"Fidelity axis {name} needs finite numbers > 0, got {plain(value)!r}.")
        if isinstance(given, Mapping):
            for label in given:
                if not isinstance(label, str):
                    raise ValueError(f"Fidelity axis {name} needs texts as names of its rungs, got {label!r}.")
            labels, rungs = zip(*sorted(given.items(), key=lambda item: item[1]), strict=True)
        else:
            labels, rungs = (), tuple(sorted(given))
        rungs = tuple(map(float, rungs))
        if len(set(rungs)) < len(rungs):
            raise ValueError(f"Fidelity axis {name} has a rung twice, got {list(rungs)}; each may be there once.")
        return cls(name, rungs, labels, rungs[0], rungs[-1], True)

    def allows(self, value: float) -> bool:
        if self.rungs:
            return value in self.values
        return self.low <= value <= self.high and (not self.integer or value.is_integer())

    @property
    def allowed(self) -> str:
        """What is allowed, for an error message."""
        if self.labels:
            return "one of " + ", ".join(f"{name}={v:g}" for name, v in zip(self.labels, self.values, strict=True))
        if self.rungs:
            return f"one of {', '.join(f'{value:g}' for value in self.values)}"
        return f"a {'whole ' if self.integer else ''}number in [{self.low:g}, {self.high:g}]"

    def cells(self, top: float) -> tuple[float, ...]:
        """The rungs up to `top`; of a range, log-spaced values up to it, the ends included."""
        if self.rungs:
            return tuple(value for value in self.values if value <= top)
        inner = np.geomspace(self.low, top, CELLS_OF_A_RANGE)[1:-1].tolist()
        values = (self.low, *(map(float, map(round, inner)) if self.integer else inner), top)
        return tuple(sorted(set(values)))


@dataclass(frozen=True)
class CostFunction:
    """A cost function as it can be stored: where it is defined, and the hash of its source, which alone is compared."""

    reference: str = field(compare=False)
    """module:function"""
    sha256: str
    function: Callable[[Scale], float] | None = field(default=None, compare=False, repr=False)
    """None when read from JSON and not handed in."""

    @classmethod
    def of(cls, function: object) -> "CostFunction":
        if not inspect.isfunction(function):
            raise ValueError(f"cost must be a function of a scale, got {function!r}.")
        reference = f"{function.__module__}:{function.__qualname__}"
        try:
            source = inspect.getsource(function)
        except OSError:
            raise ValueError(
                f"The cost function {reference} has no source file, so a study could not tell whether it changed; "
                "define it in a file."
            ) from None
        return cls(reference, hashlib.sha256(source.encode()).hexdigest(), function)


@dataclass(frozen=True, init=False, repr=False)
class Fidelity:
    """Scale axes, the target, the cost.

        Fidelity(params={"tiny": 1e5, "small": 1e6}, tokens=(1e6, 3e7), target={"params": "small", "tokens": 3e7})

    An axis given as a tuple or dictionary is rungs, as Real or Integer a range. `cost` is a function of a Scale; it may
    be left out when the axes are params (N) and tokens (D): then it is 6 N D floating-point operations (Kaplan et al.
    2020, section 2.1). `runnable` is the largest scale that is run at all when the target is only recommended for;
    the target may then lie beyond every axis.
    """

    axes: tuple[Axis, ...]
    target: Scale
    runnable: Scale | None
    cost_function: CostFunction | None
    """None for 6 N D."""

    def __init__(
        self,
        cost: Callable[[Scale], float] | CostFunction | None = None,
        *,
        target: Mapping[str, float | str],
        runnable: Mapping[str, float | str] | None = None,
        **axes: object,
    ) -> None:
        if not axes:
            raise ValueError("Fidelity needs at least one axis, for example tokens=(1e6, 1e7).")
        if cost is None and set(axes) != {"params", "tokens"}:
            raise ValueError(
                f"Fidelity knows the cost of a run only when its axes are params and tokens, got {list(axes)}; "
                "pass cost=, a function of the scale."
            )
        stored = cost if cost is None or isinstance(cost, CostFunction) else CostFunction.of(cost)
        object.__setattr__(self, "cost_function", stored)
        object.__setattr__(self, "axes", tuple(Axis.of(name, given) for name, given in axes.items()))
        largest = None if runnable is None else self._scale(runnable, "runnable", beyond=False)
        object.__setattr__(self, "runnable", largest)
        object.__setattr__(self, "target", self._scale(target, "target", beyond=runnable is not None))

    @property
    def top(self) -> Scale:
        """The largest scale that is run."""
        return self.target if self.runnable is None else self.runnable

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis.name}={axis.allowed}" for axis in self.axes)
        return f"Fidelity({axes}; target={self.target}, runnable={self.runnable})"

    def scale(self, values: Mapping[str, float | str], *, beyond: bool = False) -> Scale:
        """The scale with these values or labels: rungs or within the range, unless `beyond`.

        `beyond` is for runs made elsewhere and for recommendations at sizes that are never run.
        """
        return self._scale(values, "scale", beyond)

    def _scale(self, values: Mapping[str, float | str], what: str, beyond: bool) -> Scale:
        if not isinstance(values, Mapping):
            raise ValueError(f"{what} must be a dictionary axis -> value, got {values!r}.")
        names = [axis.name for axis in self.axes]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{what} has no value for {missing}; it needs {names}.")
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"{what} has a value for {unknown}; the axes are {names}.")
        numbers, labels = {}, {}
        for axis in self.axes:
            given = plain(values[axis.name])
            value = dict(zip(axis.labels, axis.values, strict=False)).get(given) if isinstance(given, str) else given
            positive = is_number(value) and math.isfinite(value) and value > 0
            if value is None or not positive or not (beyond or axis.allows(float(value))):
                names_too = f" or {axis.allowed}" if axis.labels else ""
                allowed = f"a positive number{names_too}" if beyond else axis.allowed
                raise ValueError(f"{what} needs {axis.name} to be {allowed}, got {given!r}.")
            numbers[axis.name] = float(value)
            if axis.labels and value in axis.values:
                labels[axis.name] = axis.labels[axis.values.index(value)]
        return Scale(numbers, labels)

    def cells(self) -> tuple[Scale, ...]:
        """Every combination of rungs that exceeds `top` on no axis; of a range, four log-spaced values."""
        combinations = itertools.product(*(axis.cells(self.top[axis.name]) for axis in self.axes))
        names = [axis.name for axis in self.axes]
        return tuple(self.scale(dict(zip(names, values, strict=True))) for values in combinations)

    def cost(self, scale: Mapping[str, float | str]) -> float:
        """What a run at this scale costs: 6 N D, or what the cost function says (ValueError when not > 0)."""
        scale = self.scale(scale, beyond=True)
        if self.cost_function is None:
            return 6.0 * scale["params"] * scale["tokens"]
        if self.cost_function.function is None:
            raise ValueError(f"The cost function {self.cost_function.reference} is not at hand; hand it in as cost=.")
        cost = plain(self.cost_function.function(scale))
        if not is_number(cost) or not math.isfinite(cost) or cost <= 0:
            raise ValueError(f"The cost function must return a finite number > 0, got {cost!r} at {scale}.")
        return float(cost)

    def relative_cost(self, scale: Mapping[str, float | str]) -> float:
        """The cost in runs at `top`, the largest scale that is run."""
        return self.cost(scale) / self.cost(self.top)

    def log2(self, scale: Mapping[str, float | str]) -> Array:
        """(m,) doublings from the target to this scale, axis by axis."""
        scale = self.scale(scale, beyond=True)
        return np.array([math.log2(scale[axis.name] / self.target[axis.name]) for axis in self.axes])
