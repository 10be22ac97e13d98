"""What "better" means over a dictionary of named metrics.

A training run returns named numbers; the objective turns them into the one number that is minimised. Each kind here is
linear in the metrics, so a study can model every metric by itself and add the posteriors up exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class _Linear(ABC):
    """What the kinds share: each is a sum of weighted metrics, minimised."""

    @property
    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Metric name -> its weight in the sum that is minimised."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def missing(self, metrics: Mapping[str, float]) -> list[str]:
        """Names that the objective needs and `metrics` has not."""
        return sorted(set(self.weights) - set(metrics))

    def value(self, metrics: Mapping[str, float]) -> float:
        """The minimised number of one run, not finite when a named metric is not; ValueError when one is missing."""
        if absent := self.missing(metrics):
            raise ValueError(f"The result has no metric {absent}, which the objective needs; it has {sorted(metrics)}.")
        return sum(weight * metrics[name] for name, weight in self.weights.items())

    def shown(self, minimised: float) -> float:
        """The minimised number in the user's own sign: the metric as the user knows it."""
        return minimised


@dataclass(frozen=True)
class Minimize(_Linear):
    """Minimise one metric, for example `Minimize("loss")`."""

    metric: str

    def __post_init__(self) -> None:
        _check_name("Minimize", self.metric)

    @property
    def weights(self) -> dict[str, float]:
        return {self.metric: 1.0}


@dataclass(frozen=True)
class Maximize(_Linear):
    """Maximise one metric, for example `Maximize("accuracy")`."""

    metric: str

    def __post_init__(self) -> None:
        _check_name("Maximize", self.metric)

    @property
    def weights(self) -> dict[str, float]:
        return {self.metric: -1.0}

    def shown(self, minimised: float) -> float:
        return -minimised


@dataclass(frozen=True)
class WeightedSum(_Linear):
    """Minimise a weighted sum of metrics, for example `WeightedSum({"loss/code": 0.5, "loss/docs": 0.5})`.

    Every metric gets a model of its own: losses of single domains are far easier to predict than their sum.
    Weights are finite and not zero; a negative weight maximises its metric.
    """

    terms: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(
                f"WeightedSum needs a dictionary of at least one metric and its weight, got {self.terms!r}."
            )
        for name, weight in self.terms.items():
            _check_name("WeightedSum", name)
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not math.isfinite(weight)
                or not weight
            ):
                raise ValueError(f"WeightedSum needs a finite weight other than 0 for {name!r}, got {weight!r}.")
        object.__setattr__(self, "terms", {name: float(weight) for name, weight in self.terms.items()})

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.terms.items())))

    @property
    def weights(self) -> dict[str, float]:
        return dict(self.terms)


Objective = Minimize | Maximize | WeightedSum

KINDS: dict[str, type[Minimize] | type[Maximize] | type[WeightedSum]] = {
    "minimize": Minimize,
    "maximize": Maximize,
    "weighted_sum": WeightedSum,
}


def to_json(objective: Objective) -> dict[str, Any]:
    kind = next(kind for kind, cls in KINDS.items() if type(objective) is cls)
    return {"kind": kind, "terms": dict(objective.terms) if isinstance(objective, WeightedSum) else objective.metric}


def from_json(obj: Mapping[str, Any]) -> Objective:
    if obj.get("kind") not in KINDS:
        raise ValueError(f"Unknown kind of objective {obj.get('kind')!r}; this version knows {sorted(KINDS)}.")
    return KINDS[obj["kind"]](obj["terms"])


def _check_name(kind: str, metric: object) -> None:
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"{kind} needs the name of a metric, got {metric!r}.")
