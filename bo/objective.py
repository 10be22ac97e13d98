"""What "better" means over a dictionary of named metrics.

A training run returns named numbers; the objective turns them into the one number that is minimised, or into several
that no one number stands for (`Pareto`), and may keep others within limits (`subject_to`). A study models every metric
by itself: where what is minimised is linear in the metrics the posteriors add up exactly, where it is not (`Largest`,
`Function`) they are put together by samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from search_spaces.parameter import is_number
from search_spaces.stored import StoredFunction

# ------------------------------------------------------------------------------------------------------ limits


@dataclass(frozen=True)
class _Limit:
    """What `AtMost` and `AtLeast` share: a metric that must stay on one side of a number, in the metric's own unit."""

    metric: str
    limit: float

    #: 1 where larger values of the metric break the limit, -1 where smaller ones do.
    sign: ClassVar[float]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        _check_name(kind, self.metric)
        if not _is_finite(self.limit):
            raise ValueError(f"{kind} needs a finite limit for {self.metric!r}, got {self.limit!r}.")
        object.__setattr__(self, "limit", float(self.limit))

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics keep the limit; one that is not a number does not."""
        return self.sign * (metrics[self.metric] - self.limit) <= 0


class AtMost(_Limit):
    """A metric that must not exceed a limit, for example `AtMost("memory_gb", 80)`."""

    sign = 1.0


class AtLeast(_Limit):
    """A metric that must not fall below a limit, for example `AtLeast("accuracy", 0.7)`."""

    sign = -1.0


Limit = AtMost | AtLeast


def _limits(kind: str, given: object) -> tuple[Limit, ...]:
    """The limits of an objective, checked; one alone may come without a list."""
    listed = [given] if isinstance(given, _Limit) else given
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ValueError(f"{kind} needs subject_to to be a list of AtMost and AtLeast, got {given!r}.")
    limits: list[Limit] = []
    for limit in listed:
        if not isinstance(limit, (AtMost, AtLeast)):
            raise ValueError(f"{kind} needs subject_to to be a list of AtMost and AtLeast, got {limit!r} in it.")
        if any(type(limit) is type(other) and limit.metric == other.metric for other in limits):
            raise ValueError(
                f"{kind} has two limits {type(limit).__name__} of {limit.metric!r}; keep the narrower one."
            )
        limits.append(limit)
    for low in limits:
        for high in limits:
            facing = isinstance(low, AtLeast) and isinstance(high, AtMost) and low.metric == high.metric
            if facing and low.limit > high.limit:
                raise ValueError(f"{kind} has limits that no {low.metric!r} keeps: {low} and {high}.")
    return tuple(limits)


# -------------------------------------------------------------------------------------------------- objectives


class _Objective(ABC):
    """What all kinds share: parts that are minimised, and limits on metrics."""

    subject_to: Sequence[Limit]

    @property
    @abstractmethod
    def parts(self) -> tuple[Single, ...]:
        """The objectives that count: itself, or those that no one number stands for."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that a run must return: those of the parts, then those with a limit."""
        named = [name for part in self.parts for name in part.named]
        return tuple(dict.fromkeys([*named, *(limit.metric for limit in self.subject_to)]))

    def missing(self, metrics: Mapping[str, float]) -> list[str]:
        """Names that the objective needs and `metrics` has not."""
        return sorted(set(self.metrics) - set(metrics))

    def feasible(self, metrics: Mapping[str, float]) -> bool:
        """Whether every limit holds; ValueError when a metric is missing."""
        self._check_complete(metrics)
        return all(limit.holds(metrics) for limit in self.subject_to)

    def values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The minimised number of every part, in order; not finite when a metric of it is not."""
        self._check_complete(metrics)
        return tuple(part.of(metrics) for part in self.parts)

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value not in ((), None)]
        return f"{type(self).__name__}({', '.join(given)})"

    def _check_complete(self, metrics: Mapping[str, float]) -> None:
        if absent := self.missing(metrics):
            raise ValueError(f"The result has no metric {absent}, which the objective needs; it has {sorted(metrics)}.")


class _Single(_Objective):
    """What the kinds with one number share."""

    @property
    @abstractmethod
    def named(self) -> tuple[str, ...]:
        """Names of the metrics that the number is made of."""

    @abstractmethod
    def of(self, metrics: Mapping[str, float]) -> float:
        """The minimised number, of metrics that are all there."""

    def value(self, metrics: Mapping[str, float]) -> float:
        """The minimised number of one run, not finite when a named metric is not; ValueError when one is missing."""
        self._check_complete(metrics)
        return self.of(metrics)

    def shown(self, minimised: float) -> float:
        """The minimised number in the user's own sign: the metric as the user knows it."""
        return minimised


class _Linear(_Single):
    """What the kinds share that minimise a sum of weighted metrics."""

    @property
    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Metric name -> its weight in the sum that is minimised."""

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def of(self, metrics: Mapping[str, float]) -> float:
        return sum(weight * metrics[name] for name, weight in self.weights.items())


@dataclass(frozen=True, repr=False)
class Minimize(_Linear):
    """Minimise one metric, for example `Minimize("loss")` or `Minimize("loss", subject_to=[AtMost("memory_gb", 80)])`.

    subject_to: limits that the best run has to keep; each limited metric gets a model of its own.
    """

    metric: str
    subject_to: Sequence[Limit] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        _check_name("Minimize", self.metric)
        object.__setattr__(self, "subject_to", _limits("Minimize", self.subject_to))

    @property
    def parts(self) -> tuple[Linear, ...]:
        return (self,)

    @property
    def weights(self) -> dict[str, float]:
        return {self.metric: 1.0}


@dataclass(frozen=True, repr=False)
class Maximize(_Linear):
    """Maximise one metric, for example `Maximize("accuracy")`; `subject_to` as with Minimize."""

    metric: str
    subject_to: Sequence[Limit] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        _check_name("Maximize", self.metric)
        object.__setattr__(self, "subject_to", _limits("Maximize", self.subject_to))

    @property
    def parts(self) -> tuple[Linear, ...]:
        return (self,)

    @property
    def weights(self) -> dict[str, float]:
        return {self.metric: -1.0}

    def shown(self, minimised: float) -> float:
        return -minimised


@dataclass(frozen=True, repr=False)
class WeightedSum(_Linear):
    """Minimise a weighted sum of metrics, for example `WeightedSum({"loss/code": 0.5, "loss/docs": 0.5})`.

    Every metric gets a model of its own: losses of single domains are far easier to predict than their sum.
    Weights are finite and not zero; a negative weight maximises its metric. `subject_to` as with Minimize.
    """

    terms: Mapping[str, float]
    subject_to: Sequence[Limit] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(
                f"WeightedSum needs a dictionary of at least one metric and its weight, got {self.terms!r}."
            )
        for name, weight in self.terms.items():
            _check_name("WeightedSum", name)
            if not _is_finite(weight) or not weight:
                raise ValueError(f"WeightedSum needs a finite weight other than 0 for {name!r}, got {weight!r}.")
        object.__setattr__(self, "terms", {name: float(weight) for name, weight in self.terms.items()})
        object.__setattr__(self, "subject_to", _limits("WeightedSum", self.subject_to))

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.terms.items())), self.subject_to))

    @property
    def parts(self) -> tuple[Linear, ...]:
        return (self,)

    @property
    def weights(self) -> dict[str, float]:
        return dict(self.terms)


@dataclass(frozen=True, init=False, repr=False)
class Largest(_Single):
    """Minimise the largest of several metrics, for example `Largest("loss/code", "loss/docs")`: the worst one counts.

    Every metric gets a model of its own; their largest has kinks that no model of it alone would see.
    weights: metric -> the finite number other than 0 by which it is multiplied first, 1 for those not named; a negative
    one turns a metric that is to be large. `subject_to` as with Minimize.
    """

    terms: Mapping[str, float]
    subject_to: Sequence[Limit]

    def __init__(
        self,
        *metrics: str,
        weights: Mapping[str, float] | None = None,
        subject_to: Sequence[Limit] | Limit = (),
    ) -> None:
        _check_names("Largest", metrics)
        if len(metrics) < 2:
            raise ValueError(f"Largest needs at least 2 metrics, got {len(metrics)}; for one take Minimize.")
        if not isinstance(weights or {}, Mapping):
            raise ValueError(f"Largest needs weights to be a dictionary of metrics and numbers, got {weights!r}.")
        given = dict(weights or {})
        if unknown := sorted(set(given) - set(metrics), key=str):
            raise ValueError(f"Largest has weights for {unknown}, which are none of its metrics {sorted(metrics)}.")
        for name, weight in given.items():
            if not _is_finite(weight) or not weight:
                raise ValueError(f"Largest needs a finite weight other than 0 for {name!r}, got {weight!r}.")
        object.__setattr__(self, "terms", {name: float(given.get(name, 1.0)) for name in metrics})
        object.__setattr__(self, "subject_to", _limits("Largest", subject_to))

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.terms.items())), self.subject_to))

    @property
    def parts(self) -> tuple[Largest, ...]:
        return (self,)

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.terms)

    def of(self, metrics: Mapping[str, float]) -> float:
        products = [weight * metrics[name] for name, weight in self.terms.items()]
        return math.nan if any(map(math.isnan, products)) else max(products)


@dataclass(frozen=True, init=False, repr=False)
class Function(_Single):
    """Minimise a function of several metrics, for example `Function(cost_per_point, metrics=("seconds", "accuracy"))`.

    function: takes a dictionary of the named metrics and returns a number. It should be smooth or have kinks, not
    jumps, and be quick: the search asks it about many thousands of values that the metrics may take, also ones that no
    run gave. Where it raises an ArithmeticError or a ValueError, or returns no finite number, a run is as bad as a
    diverged one. Only where it is defined and the hash of its source are stored, never its code:
    `Study.open(path, objective=...)` hands it in again.

    Every metric gets a model of its own, of its logarithm while all its values are positive. `subject_to` as with
    Minimize.
    """

    stored: StoredFunction
    terms: tuple[str, ...]
    subject_to: Sequence[Limit]

    def __init__(
        self,
        function: Callable[[dict[str, float]], float] | StoredFunction,
        metrics: Sequence[str],
        subject_to: Sequence[Limit] | Limit = (),
    ) -> None:
        if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
            raise ValueError(f"Function needs metrics to be a list of at least one name, got {metrics!r}.")
        _check_names("Function", metrics)
        if not isinstance(function, StoredFunction):
            function = StoredFunction.of(function, "The objective")
        object.__setattr__(self, "stored", function)
        object.__setattr__(self, "terms", tuple(metrics))
        object.__setattr__(self, "subject_to", _limits("Function", subject_to))

    def __repr__(self) -> str:
        limits = f", subject_to={self.subject_to!r}" if self.subject_to else ""
        return f"Function({self.stored.reference}, metrics={self.terms!r}{limits})"

    @property
    def parts(self) -> tuple[Function, ...]:
        return (self,)

    @property
    def named(self) -> tuple[str, ...]:
        return self.terms

    @property
    def lacking(self) -> str | None:
        """Where the function is defined, while it is not at hand."""
        return self.stored.reference if self.stored.function is None else None

    def of(self, metrics: Mapping[str, float]) -> float:
        """ValueError when the function is not at hand, is no function of these metrics or answers anything but numbers.

        What it cannot compute is NaN.
        """
        if self.stored.function is None:
            raise ValueError(
                f"The objective {self.stored.reference} is not at hand; hand it in by Study.open(path, objective=...)."
            )
        given = {name: metrics[name] for name in self.terms}
        if not all(map(math.isfinite, given.values())):
            return math.nan
        try:
            answer = self.stored.function(given)
        except (ArithmeticError, ValueError):
            return math.nan
        except Exception as error:
            raise ValueError(f"The objective {self.stored.reference} raised {error!r} for {given}.") from error
        if isinstance(answer, (str, complex)) or not hasattr(answer, "__float__"):
            raise ValueError(f"The objective {self.stored.reference} must return a number, got {answer!r}.")
        try:
            return float(answer)
        except Exception as error:  # an array of several numbers, say
            raise ValueError(f"The objective {self.stored.reference} must return a number, got {answer!r}.") from error


@dataclass(frozen=True, init=False, repr=False)
class Pareto(_Objective):
    """Several objectives that no one number stands for: `Pareto("loss", Maximize("throughput"))`.

    No trial is the best; `Study.front()` gives those that are not beaten in everything by another. A name alone is
    minimised; Minimize, Maximize and WeightedSum may share metrics. `subject_to` as with Minimize.

    reference: one number for each objective, in its own sign and unit, that a run has to beat to be worth anything;
    volumes are measured from it. Without it, it follows what was told (see `reference_point`), and volumes of different
    times are not comparable.
    """

    objectives: tuple[Minimize | Maximize | WeightedSum, ...]
    subject_to: Sequence[Limit]
    reference: tuple[float, ...] | None

    def __init__(
        self,
        *objectives: str | Minimize | Maximize | WeightedSum,
        subject_to: Sequence[Limit] | Limit = (),
        reference: Sequence[float] | None = None,
    ) -> None:
        parts = tuple(Minimize(part) if isinstance(part, str) else part for part in objectives)
        for part in parts:
            if not isinstance(part, (Minimize, Maximize, WeightedSum)):
                raise ValueError(f"Pareto needs names of metrics, Minimize, Maximize or WeightedSum, got {part!r}.")
            if part.subject_to:
                raise ValueError(f"Limits hold for all of Pareto; give {part} without subject_to and Pareto with it.")
        if len(parts) < 2:
            raise ValueError(f"Pareto needs at least 2 objectives, got {len(parts)}; for one take Minimize.")
        if len(set(parts)) < len(parts):
            raise ValueError(f"Pareto needs objectives that differ, got {', '.join(map(str, parts))}.")
        if reference is not None:
            given = isinstance(reference, Sequence) and not isinstance(reference, str)
            if not given or len(reference) != len(parts) or not all(_is_finite(value) for value in reference):
                raise ValueError(
                    f"Pareto needs reference to be {len(parts)} finite numbers, one for each objective, got "
                    f"{reference!r}."
                )
            reference = tuple(float(value) for value in reference)
        object.__setattr__(self, "objectives", parts)
        object.__setattr__(self, "subject_to", _limits("Pareto", subject_to))
        object.__setattr__(self, "reference", reference)

    @property
    def parts(self) -> tuple[Linear, ...]:
        return self.objectives

    @property
    def minimised_reference(self) -> tuple[float, ...] | None:
        """`reference` with every objective minimised."""
        if self.reference is None:
            return None
        return tuple(part.shown(value) for part, value in zip(self.parts, self.reference, strict=True))


Linear = Minimize | Maximize | WeightedSum
Single = Linear | Largest | Function
Objective = Single | Pareto

KINDS: dict[str, type[Objective]] = {
    "minimize": Minimize,
    "maximize": Maximize,
    "weighted_sum": WeightedSum,
    "largest": Largest,
    "function": Function,
    "pareto": Pareto,
}

LIMITS: dict[str, type[AtMost] | type[AtLeast]] = {"at_most": AtMost, "at_least": AtLeast}

# -------------------------------------------------------------------------------------------------- fronts
# Here, and in Python alone, because a study shows its front and volume without loading torch.

Values = tuple[float, ...]


def undominated(values: Sequence[Values]) -> list[int]:
    """Indices of the points (all minimised) that no other beats: none is as good in all and better in one.

    Equal points do not beat each other. Points with a number that is not finite are never among them.
    """
    order = sorted((i for i, v in enumerate(values) if all(map(math.isfinite, v))), key=lambda i: values[i])
    front: list[int] = []
    for i in order:  # whatever beats a point comes before it in this order
        if not any(values[j] != values[i] and _no_worse(values[j], values[i]) for j in front):
            front.append(i)
    return sorted(front)


def reference_point(front: Sequence[Values]) -> Values:
    """Where volumes are measured from when no one says: a tenth of the front's range beyond its worst value in each.

    Ishibuchi et al., "How to specify a reference point in hypervolume calculation", Evol. Comput. 26(3), 2018: at 1.1
    of the range the ends of the front count too. Where the front has no range, a tenth of the value's size is taken.
    front: undominated points, all minimised, at least one.
    """
    worst = [max(column) for column in zip(*front, strict=True)]
    best = [min(column) for column in zip(*front, strict=True)]
    return tuple(w + 0.1 * ((w - b) or abs(w) or 1.0) for w, b in zip(worst, best, strict=True))


def hypervolume(values: Sequence[Values], reference: Values) -> float:
    """Volume of what is beaten by one of the points (all minimised) and better than the reference in everything.

    By slices along the last objective, each a volume with one objective less: exact, for fronts of some hundred points
    of two objectives or some ten of four.
    """
    inside = [v for v in values if all(a < r for a, r in zip(v, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(inside)[0]
    inside = sorted({inside[i] for i in undominated(inside)}, key=lambda v: v[-1])
    tops = [*(v[-1] for v in inside[1:]), reference[-1]]
    return sum(
        (top - v[-1]) * hypervolume([u[:-1] for u in inside[: i + 1]], reference[:-1])
        for i, (v, top) in enumerate(zip(inside, tops, strict=True))
        if top > v[-1]
    )


def _no_worse(one: Values, other: Values) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------------------------------------------- JSON


def to_json(objective: Objective) -> dict[str, Any]:
    """The objective as JSON; without limits it reads as versions without them wrote it."""
    kind = next(kind for kind, cls in KINDS.items() if type(objective) is cls)
    terms: Any
    match objective:
        case Pareto():
            terms = [to_json(part) for part in objective.parts]
        case WeightedSum() | Largest():
            terms = dict(objective.terms)
        case Function():
            terms = list(objective.terms)
        case _:
            terms = objective.metric
    json: dict[str, Any] = {"kind": kind, "terms": terms}
    if isinstance(objective, Function):
        json |= {"function": objective.stored.reference, "sha256": objective.stored.sha256}
    if objective.subject_to:
        names = {cls: name for name, cls in LIMITS.items()}
        json["subject_to"] = [
            {"kind": names[type(limit)], "metric": limit.metric, "limit": limit.limit} for limit in objective.subject_to
        ]
    if isinstance(objective, Pareto) and objective.reference is not None:
        json["reference"] = list(objective.reference)
    return json


def from_json(obj: Mapping[str, Any]) -> Objective:
    """The objective; of a `Function` all but the function itself, which has to be handed in."""
    if obj.get("kind") not in KINDS:
        raise ValueError(f"Unknown kind of objective {obj.get('kind')!r}; this version knows {sorted(KINDS)}.")
    limits = []
    for limit in obj.get("subject_to", ()):
        if limit.get("kind") not in LIMITS:
            raise ValueError(f"Unknown kind of limit {limit.get('kind')!r}; this version knows {sorted(LIMITS)}.")
        limits.append(LIMITS[limit["kind"]](limit["metric"], limit["limit"]))
    match obj["kind"]:
        case "pareto":
            parts = [from_json(part) for part in obj["terms"]]
            return Pareto(*parts, subject_to=limits, reference=obj.get("reference"))  # type: ignore[arg-type]
        case "largest":
            return Largest(*obj["terms"], weights=obj["terms"], subject_to=limits)
        case "function":
            return Function(StoredFunction(obj["function"], obj["sha256"]), obj["terms"], subject_to=limits)
    cls: Any = KINDS[obj["kind"]]
    objective: Objective = cls(obj["terms"], subject_to=tuple(limits))
    return objective


def _check_names(kind: str, metrics: Sequence[object]) -> None:
    for metric in metrics:
        _check_name(kind, metric)
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"{kind} needs metrics that differ, got {list(metrics)}.")


def _check_name(kind: str, metric: object) -> None:
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"{kind} needs the name of a metric, got {metric!r}.")


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)
