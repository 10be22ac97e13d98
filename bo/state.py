"""The state of a study: what its journal's events add up to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bo.events import Event, metrics_from_json
from bo.objective import Objective
from bo.ports import Limits
from bo.trial import Branch, Report, Trial, Trials
from search_spaces import Scale, Space

#: The study of prior runs in journals that do not name it.
UNNAMED = "another study"


@dataclass
class State:
    """A fold of events; changed by `apply` alone, at a cost that does not grow with the trials there are.

    `running` holds the ids of trials without an end, in their order, `queue` the enqueued (config, scale) that were not
    proposed yet, `memory` what the policy's last proposal left for the next, `training` the file a study was launched
    from, `ended` the trials in the order in which they ended, `origins` what tells the runs of other studies apart, by
    trial, `behind` the ids of running trials that the study's rule ends early, `seen` the number of the last line.
    """

    space: Space
    objective: Objective
    trials: Trials = field(default_factory=Trials)
    running: dict[int, None] = field(default_factory=dict)
    queue: list[tuple[Mapping[str, Any], Scale]] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    memory: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    ended: list[int] = field(default_factory=list)
    origins: dict[int, str] = field(default_factory=dict)
    behind: set[int] = field(default_factory=set)
    seen: int = 0
    _scales: dict[Scale, Scale] = field(default_factory=dict, compare=False, repr=False)
    """Those that trials run at, each once: what is the same object is equal at once."""

    def scale(self, axes: Mapping[str, float | str] | None) -> Scale:
        """The scale with these values or labels, which may lie beyond every rung; None is the top scale."""
        if self.space.fidelity is None:
            if axes:
                raise ValueError(f"The space has no fidelity=, so there is no scale {dict(axes)}.")
            scale = Scale()
        else:
            scale = self.space.top if axes is None else self.space.fidelity.scale(axes, beyond=True)
        return self._scales.setdefault(scale, scale)


def fold(space: Space, objective: Objective, events: Iterable[Event]) -> State:
    state = State(space, objective)
    for happened in events:
        apply(state, happened)
    return state


def apply(state: State, happened: Event) -> None:
    """Let one event happen to the state."""
    APPLY[happened["kind"]](state, happened)
    state.seen = happened["n"]


def _created(state: State, happened: Event) -> None:
    """The first line made the state's space and objective."""


def _training(state: State, happened: Event) -> None:
    state.training = {name: happened[name] for name in ("file", "sha256", "args")}


def _limits(state: State, happened: Event) -> None:
    state.limits = Limits(happened["n_trials"], happened["budget"])


def _enqueued(state: State, happened: Event) -> None:
    state.queue.append((state.space.from_json(happened["config"]), state.scale(happened["scale"])))


def _proposed(state: State, happened: Event) -> None:
    if happened["source"] == "enqueued":
        state.queue.pop(0)
    state.memory = happened.get("memory", state.memory)
    trial = Trial(
        id=happened["trial"],
        config=state.space.from_json(happened["config"]),
        scale=state.scale(happened["scale"]),
        seed=happened["seed"],
        source=happened["source"],
        cost=happened["cost"],
        predicted=happened.get("predicted"),
        note=happened.get("note"),
        wanted=tuple(map(state.scale, happened.get("wanted", ()))),
    )
    state.trials = state.trials.put(trial)
    state.running[trial.id] = None


def _added(state: State, happened: Event) -> None:
    trial = Trial(
        id=happened["trial"],
        config=state.space.from_json(happened["config"]),
        scale=state.scale(happened["scale"]),
        seed=0,
        source=happened.get("source", "added"),
        cost=0.0,
        status="diverged" if happened.get("diverged") else "finished",
        metrics=metrics_from_json(happened["metrics"]),
        note=happened.get("note"),
        study=happened.get("study", UNNAMED) if happened.get("source") == "prior" else None,
    )
    state.trials = state.trials.put(trial)
    state.ended.append(trial.id)
    if "origin" in happened:
        state.origins[happened["trial"]] = happened["origin"]


def _reported(state: State, happened: Event) -> None:
    report = Report(happened["step"], metrics_from_json(happened["metrics"]))
    state.trials = state.trials.put(with_report(state.trials[happened["trial"]], report))
    if happened.get("behind"):
        state.behind.add(happened["trial"])


def with_report(trial: Trial, report: Report) -> Trial:
    """`trial` as it is once it has made this report, in the place of those of its step and after."""
    earlier = trial.reports[: bisect_left(trial.reports, report.step, key=lambda earlier: earlier.step)]
    return replace(trial, reports=(*earlier, report))


def _branched(state: State, happened: Event) -> None:
    trial = state.trials[happened["trial"]]
    branch = Branch(state.scale(happened["scale"]), metrics_from_json(happened["metrics"]))
    others = tuple(other for other in trial.branches if other.scale != branch.scale)
    state.trials = state.trials.put(replace(trial, branches=(*others, branch)))


def _retried(state: State, happened: Event) -> None:
    losses = state.trials[happened["trial"]].losses + (not happened.get("innocent", False))
    _update(state, happened, attempt=happened["attempt"], losses=losses)


def _finished(state: State, happened: Event) -> None:
    _update(state, happened, status="finished", metrics=metrics_from_json(happened["metrics"]))


def _diverged(state: State, happened: Event) -> None:
    metrics = happened.get("metrics")
    metrics = None if metrics is None else metrics_from_json(metrics)
    _update(state, happened, status="diverged", metrics=metrics, error=happened["error"])


def _stopped(state: State, happened: Event) -> None:
    cost = state.trials[happened["trial"]].cost * happened.get("share", 1.0)
    _update(state, happened, status="stopped", cost=cost)


def _failed(state: State, happened: Event) -> None:
    _update(state, happened, status="failed", error=happened["error"], traceback=happened.get("traceback"))


def _update(state: State, happened: Event, **changes: Any) -> None:
    trial = state.trials[happened["trial"]]
    state.trials = state.trials.put(replace(trial, seconds=happened.get("seconds", trial.seconds), **changes))
    if "status" in changes:
        state.running.pop(trial.id, None)
        state.behind.discard(trial.id)
        state.ended.append(trial.id)


APPLY: dict[str, Callable[[State, Event], None]] = {
    "created": _created,
    "training": _training,
    "limits": _limits,
    "enqueued": _enqueued,
    "proposed": _proposed,
    "added": _added,
    "reported": _reported,
    "branched": _branched,
    "retried": _retried,
    "finished": _finished,
    "diverged": _diverged,
    "stopped": _stopped,
    "failed": _failed,
}
