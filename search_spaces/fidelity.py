"""The size of a run: named scale axes, the target, and what a run costs.

`scale` is one point on the axes, `target` the scale that the search is for, `cost` what a run at a scale takes, in
floating-point operations by default.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_spaces.parameter import Array, Integer, Real, is_number, plain, suggestion
from search_spaces.stored import StoredFunction

CELLS_OF_A_RANGE = 4

#: What is believed of run times before any is seen: exponents are 1 give or take this,
EXPONENT_SD = 0.5
#: and runs scatter by this factor of e about their law, believed like the scatter of so many runs.
SCATTER, SCATTER_RUNS = 0.2, 4
#: Residuals beyond this many standard deviations count less (Huber 1981, 95% efficient for normal ones).
HUBER = 1.345


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Scale(Mapping[str, float]):
    """Axis -> value; equal and hashed by its values. `label` gives the name of a rung that has one.

    `Scale()` has no axes: the scale of every trial of a space without fidelity. With the axes params (N) and tokens (D)
    it knows what follows from them: `flops`, `tokens_per_param`, and the `steps` of a batch size.
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

    @property
    def flops(self) -> float:
        """6 N D floating-point operations (Kaplan et al. 2020, section 2.1); ValueError without params and tokens."""
        return 6.0 * self._axis("params", "flops") * self._axis("tokens", "flops")

    @property
    def tokens_per_param(self) -> float:
        """D / N; ValueError without params and tokens."""
        return self._axis("tokens", "tokens_per_param") / self._axis("params", "tokens_per_param")

    def steps(self, batch_tokens: float) -> int:
        """The steps that come nearest to the tokens, at `batch_tokens` tokens a step (see `batch_tokens`): at least 1.

        ValueError without tokens, or when one step takes more of them than there are.
        """
        tokens, batch_tokens = self._axis("tokens", "steps"), plain(batch_tokens)
        if not is_number(batch_tokens) or not 0 < batch_tokens < math.inf:
            raise ValueError(f"steps needs a finite number of tokens a step > 0, got {batch_tokens!r}.")
        if batch_tokens > tokens:
            raise ValueError(
                f"One step of {batch_tokens:g} tokens is more than the {tokens:g} tokens of the run; constrain the "
                "batch size, for example by constraints=['1024 * batch_size <= tokens / 100']."
            )
        return math.floor(tokens / batch_tokens + 0.5)

    def _axis(self, axis: str, what: str) -> float:
        if axis not in self:
            raise ValueError(f"{what} needs a scale with the axis {axis}; the axes of this one are {list(self)}.")
        return self[axis]

    def to_json(self) -> dict[str, float]:
        return dict(self._values)


def batch_tokens(config: Mapping[str, Any], *factors: str | float) -> float:
    """Tokens of one step: the product of the factors, each a number or the name of one in the config.

        trial.scale.steps(batch_tokens(trial.config, "batch_size", "accumulation", 1024))

    ValueError for a name that the config does not have, and for what is no number > 0.
    """
    product = 1.0
    for factor in factors:
        if isinstance(factor, str) and factor not in config:
            raise ValueError(f"batch_tokens needs {factor!r}, which the config does not have; it has {list(config)}.")
        value = plain(config[factor] if isinstance(factor, str) else factor)
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"batch_tokens needs finite numbers > 0, got {value!r} for {factor!r}.")
        product *= value
    return product


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
        inner = np.geomspace(self.low, top, CELLS_OF_A_RANGE)[1:-1].clip(self.low, top).tolist()  # but for rounding
        values = (self.low, *(map(float, map(round, inner)) if self.integer else inner), top)
        return tuple(sorted(set(values)))


@dataclass(frozen=True)
class MeasuredCost:
    """The cost of a run in seconds, as a power law: seconds * product of axis ** exponent.

        Fidelity(cost=MeasuredCost.fit(runs), ...)
        Fidelity(cost=MeasuredCost(2e-12, {"params": 1, "tokens": 1}), ...)

    It is plain data: it is stored with the space and printed as the text that makes it.

    A power law has no place for what every run takes whatever its size (start-up, compilation, a last evaluation).
    Where that is a good part of the small runs the exponents come out low, and a run far larger than all that were
    measured is underestimated: measure runs that take many times their start-up.
    """

    seconds: float
    """Of a run at 1 on every axis."""
    exponents: Mapping[str, float] = field(hash=False)
    """Axis -> exponent, at least 0."""

    def __post_init__(self) -> None:
        seconds = plain(self.seconds)
        if not is_number(seconds) or not 0 < seconds < math.inf:
            raise ValueError(f"MeasuredCost needs a finite number of seconds > 0, got {seconds!r}.")
        if not isinstance(self.exponents, Mapping) or not self.exponents:
            raise ValueError(f"MeasuredCost needs a dictionary axis -> exponent, got {self.exponents!r}.")
        for axis, exponent in self.exponents.items():
            if not is_number(exponent) or not 0 <= exponent < math.inf:
                raise ValueError(f"MeasuredCost needs a finite exponent >= 0 for {axis}, got {plain(exponent)!r}.")
        object.__setattr__(self, "seconds", float(seconds))
        object.__setattr__(self, "exponents", {axis: float(exponent) for axis, exponent in self.exponents.items()})

    @classmethod
    def fit(cls, runs: Iterable[tuple[Mapping[str, float], float]]) -> "MeasuredCost":
        """The law of measured runs, each a scale and its seconds; all with the same axes.

        Huber regression in logarithms, by iteratively reweighted least squares, so that some runs on a busy machine do
        not bend it; exponents are shrunk towards 1 (normal, sd 0.5), which decides where runs tell nothing: an axis
        that did not vary has exponent 1. ValueError without runs, for different axes, and for seconds that are not > 0.
        """
        measured = [(Scale(scale), plain(seconds)) for scale, seconds in runs]
        if not measured or not measured[0][0]:
            raise ValueError("MeasuredCost.fit needs at least one run at a scale with axes, got none.")
        axes = list(measured[0][0])
        for scale, seconds in measured:
            if set(scale) != set(axes):
                raise ValueError(f"MeasuredCost.fit needs runs with the same axes, got {axes} and {list(scale)}.")
            if not is_number(seconds) or not 0 < seconds < math.inf:
                raise ValueError(f"MeasuredCost.fit needs a finite number of seconds > 0, got {seconds!r} at {scale}.")
        places = np.log([[scale[axis] for axis in axes] for scale, _ in measured])  # n x m
        centre = places.mean(axis=0)
        level, exponents = _power_law(places - centre, np.log([seconds for _, seconds in measured]))
        return cls(math.exp(level - centre @ exponents), dict(zip(axes, exponents.tolist(), strict=True)))

    def at(self, scale: Mapping[str, float]) -> float:
        """Seconds of a run at a scale with these axes."""
        return self.seconds * math.prod(math.pow(scale[axis], exponent) for axis, exponent in self.exponents.items())


def _power_law(places: Array, y: Array) -> tuple[float, Array]:
    """(level, exponents >= 0) of y = level + places @ exponents, with centred places (n x m) and y (n), robustly."""
    n, m = places.shape
    design = np.concatenate([np.ones((n, 1)), places], axis=1)  # n x (1 + m)
    prior = np.array([0.0] + [1.0] * m)  # what the coefficients are shrunk to, and how much: the level not at all
    weights = np.ones(n)
    scatter2 = SCATTER**2
    for _ in range(50):
        coefficients, free = prior.copy(), np.ones(1 + m, dtype=np.bool_)
        while True:
            A = design[:, free]
            precision = A.T @ (weights[:, None] * A) + np.diag(scatter2 / EXPONENT_SD**2 * prior[free])
            target = weights * (y - design @ np.where(free, prior, coefficients))
            coefficients[free] = prior[free] + np.linalg.solve(precision, A.T @ target)
            if (coefficients[1:] >= 0).all():
                break
            lowest = 1 + int(np.argmin(coefficients[1:]))
            coefficients[lowest], free[lowest] = 0.0, False
        residual = np.abs(y - design @ coefficients)
        spread = 1.4826 * float(np.median(residual))  # the standard deviation, if it is normal
        scatter2 = (SCATTER_RUNS * SCATTER**2 + n * spread**2) / (SCATTER_RUNS + n)
        weights = np.minimum(1.0, HUBER * math.sqrt(scatter2) / np.maximum(residual, 1e-300))
    return float(coefficients[0]), coefficients[1:]


@dataclass(frozen=True, init=False, repr=False)
class Fidelity:
    """Scale axes, the target, the cost.

        Fidelity(params={"tiny": 1e5, "small": 1e6}, tokens=(1e6, 3e7), target={"params": "small", "tokens": 3e7})

    An axis given as a tuple or dictionary is rungs, as Real or Integer a range. `cost` is a function of a Scale, or a
    MeasuredCost learned from run times; it may be left out when the axes are params (N) and tokens (D): then it is
    6 N D floating-point operations (Kaplan et al. 2020, section 2.1). `runnable` is the largest scale that is run at
    all when the target is only recommended for; the target may then lie beyond every axis.
    """

    axes: tuple[Axis, ...]
    target: Scale
    runnable: Scale | None
    cost_function: StoredFunction | MeasuredCost | None
    """None for 6 N D."""

    def __init__(
        self,
        cost: Callable[[Scale], float] | StoredFunction | MeasuredCost | None = None,
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
                "pass cost=, a function of the scale or a MeasuredCost."
            )
        if isinstance(cost, MeasuredCost) and set(cost.exponents) != set(axes):
            raise ValueError(
                f"The measured cost has the axes {list(cost.exponents)} and the fidelity {list(axes)}; they must be "
                "the same."
            )
        known = cost is None or isinstance(cost, StoredFunction | MeasuredCost)
        object.__setattr__(self, "cost_function", cost if known else StoredFunction.of(cost, "The cost function"))
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
        if unknown := [name for name in values if name not in names]:
            hint = suggestion(unknown[0], names, f"the axes are {names}.")
            raise ValueError(f"{what} has a value for {unknown}, which is no axis; {hint}")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{what} has no value for {missing}; it needs {names}.")
        numbers, labels = {}, {}
        for axis in self.axes:
            given = plain(values[axis.name])
            value = dict(zip(axis.labels, axis.values, strict=False)).get(given) if isinstance(given, str) else given
            positive = is_number(value) and math.isfinite(value) and value > 0
            if value is None or not positive or not (beyond or axis.allows(float(value))):
                names_too = f" or {axis.allowed}" if axis.labels else ""
                allowed = f"a positive number{names_too}" if beyond else axis.allowed
                only = positive and what == "target"
                hint = "; a target that is never run needs runnable=, the largest scale that is" if only else ""
                raise ValueError(f"{what} needs {axis.name} to be {allowed}, got {given!r}{hint}.")
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
        """What a run at this scale costs: 6 N D, seconds, or what the cost function says (ValueError when not > 0)."""
        scale = self.scale(scale, beyond=True)
        if self.cost_function is None:
            return scale.flops
        if isinstance(self.cost_function, MeasuredCost):
            return self.cost_function.at(scale)
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
