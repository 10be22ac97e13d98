"""When a running trial is to end early: a rule over the reports of its study.

    Study.create("studies/lm", space, objective=objective, stopping="halving")
    Study.create("studies/lm", space, objective=objective, stopping={"name": "halving", "first": 1000, "eta": 3})

A rule is settings and a pure function of the reports; `Study.report` asks it with each of them and writes its answer
beside the report, so that a study that was killed and opened again goes by what was decided.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, cast

from bo.objective import Objective, Pareto
from bo.trial import Report, Trial
from search_spaces.parameter import is_number


class StoppingRule(Protocol):
    """Says whether a running trial is to end early; a frozen dataclass whose fields are its settings."""

    @property
    def last(self) -> int | None:
        """Steps of a whole run, where the rule was told."""

    def check(self, objective: Objective) -> None:
        """ValueError for an objective that the rule cannot judge reports by."""

    def decide(self, trial: Trial, trials: Iterable[Trial], objective: Objective) -> bool:
        """Whether `trial`, whose last report has just come, is to end, by its reports and those of all `trials`."""


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (ASHA; Li et al. 2020, arXiv 1810.05934): the best 1/eta go on at each rung.

    A run is judged once at each rung, by its first report there, against all that have reported there at the same
    scale; the rungs are at `first`, first * eta, first * eta^2 ... steps, below `last`. What is reported there as the
    objective counts, not a number is the worst, and a run whose reports do not have it is never stopped. Neither is one
    with fewer than `peers` others there, so that the first runs of a scale go their whole way.

    first: by default 0.3 of a whole run. Earlier, ranks are the noise of the warm-up; on mixtures under one schedule,
    halving at 0.3 and 0.53 of the steps cost 0.55 of all of them and lost the best run in 0.8% of the cases.
    last: steps of a whole run, where nothing is judged; by default as many as the shortest finished run of that scale
    has reported.

    Runs with unlike schedules are not comparable at one step: a cosine comes down late. Where batch sizes differ,
    report tokens for steps.
    """

    first: int | None = None
    eta: float = 2.0
    last: int | None = None
    peers: int = 3

    def __post_init__(self) -> None:
        for name, least in (("first", 1), ("last", 2), ("peers", 1)):
            value = getattr(self, name)
            if not (value is None and name != "peers") and (type(value) is not int or value < least):
                raise ValueError(f"Halving needs {name} to be a whole number of at least {least}, got {value!r}.")
        if not is_number(self.eta) or not 1 < self.eta < math.inf:
            raise ValueError(f"Halving needs a finite eta above 1, got {self.eta!r}.")
        if self.first is not None and self.last is not None and self.first >= self.last:
            raise ValueError(f"Halving needs first to be below last={self.last}, got {self.first}.")
        object.__setattr__(self, "eta", float(self.eta))

    def check(self, objective: Objective) -> None:
        if isinstance(objective, Pareto):
            raise ValueError("Halving goes by one number, and a Pareto objective has none; leave stopping= out.")

    def decide(self, trial: Trial, trials: Iterable[Trial], objective: Objective) -> bool:
        *_, before, step = (-1, -1, *(report.step for report in trial.reports[-2:]))
        known = self.first or 0.3 * (self.last or 0)
        if known and not before < self._rung(known, step) <= step:  # most reports, and they are told at once
            return False
        peers = _peers(trial, trials)
        whole = (other.reports[-1].step for other in peers if other.status == "finished")
        last = self.last or min(whole, default=math.inf)
        rung = self._rung(self.first or 0.3 * last, step)
        if not before < rung <= step < last:
            return False
        own = _value(trial.reports[-1], objective)
        values = [value for other in peers if (value := _at(rung, other, objective)) is not None]
        if own is None or len(values) < self.peers:
            return False
        go_on = max(1, int((len(values) + 1) / self.eta))
        return sum(value < own for value in values) >= go_on

    def _rung(self, first: float, step: int) -> float:
        """The highest rung up to `step`, or the first."""
        rung = float(first)
        while rung * self.eta <= step:
            rung *= self.eta
        return rung


def share(trial: Trial, trials: Iterable[Trial], last: int | None = None) -> float | None:
    """The part of a whole run that a trial has made by its last report; None where nobody knows how long a run is.

    A whole run has `last` steps, or else as many as the finished ones of its scale have reported, as far as these agree
    to a tenth. Nothing is known of a trial that was to branch, whose cost is not only its own run's.
    """
    if not trial.reports or trial.wanted:
        return None
    whole = [other for other in _peers(trial, trials) if other.status == "finished"]
    lengths = [_made(other) for other in whole] if last is None else [last]
    if not lengths or max(lengths) > 1.1 * min(lengths):
        return None
    made = _made(trial)
    return made / min(lengths) if 0 < made < min(lengths) else None


def _peers(trial: Trial, trials: Iterable[Trial]) -> list[Trial]:
    """The others at a trial's scale that have reported."""
    at = trial.scale  # the same object in one study, where comparing would take ten times as long
    return [o for o in trials if o.reports and o.id != trial.id and (o.scale is at or o.scale == at)]


def _made(trial: Trial) -> int:
    """Steps by the last report; where the first is of step 0, they are counted from 0."""
    return trial.reports[-1].step + (trial.reports[0].step == 0)


def _at(rung: float, other: Trial, objective: Objective) -> float | None:
    """What a run reported when it came to the rung, None where it did not or reported something else."""
    index = bisect_left(other.reports, rung, key=lambda report: report.step)
    return _value(other.reports[index], objective) if index < len(other.reports) else None


def _value(report: Report, objective: Any) -> float | None:
    """The minimised number, the largest where it is not one; None when a metric of it is missing."""
    if not set(objective.named) <= set(report.metrics):
        return None
    value: float = objective.of(report.metrics)
    return math.inf if math.isnan(value) else value


#: name -> rule: the only place where a name becomes one.
RULES: dict[str, type[Any]] = {"halving": Halving}


def make(given: str | Mapping[str, Any] | StoppingRule) -> StoppingRule:
    """A rule from its name, or from a dictionary with its "name" and settings; ValueError when there is none such."""
    if type(given) in RULES.values():
        return cast(StoppingRule, given)
    settings = {"name": given} if isinstance(given, str) else given
    if not isinstance(settings, Mapping) or settings.get("name") not in RULES:
        known = ", ".join(sorted(RULES))
        raise ValueError(f"stopping must be one of {known}, or a dictionary with such a name, got {given!r}.")
    rule = RULES[settings["name"]]
    known_settings = [field.name for field in fields(rule)]
    if unknown := sorted(set(settings) - {"name", *known_settings}):
        raise ValueError(f"The rule {settings['name']!r} has the settings {known_settings}, got {unknown}.")
    made: StoppingRule = rule(**{name: value for name, value in settings.items() if name != "name"})
    return made


def to_json(rule: Any) -> dict[str, Any]:
    """What `make` makes the rule of again, with every setting, so that later defaults do not change it."""
    name = next(name for name, kind in RULES.items() if type(rule) is kind)
    return {"name": name, **asdict(rule)}
