"""One trial: a configuration, the scale it runs at, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, overload

from search_spaces import Scale

Status = Literal["running", "finished", "stopped", "diverged", "failed"]

#: Statuses with a result that a model may learn from. A "failed" run tells about the machine or the code; a "stopped"
#: one has no final metrics, only its reports.
TOLD: tuple[Status, ...] = ("finished", "diverged")


class StopTrial(Exception):
    """Raised by `trial.report` when this run was ended early; let it pass through the training function."""


class Diverged(Exception):
    """May be raised by a training function: this configuration does not train (loss not finite, or above its start)."""


@dataclass(frozen=True, slots=True)
class Report:
    """Metrics of a run at one of its steps."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Branch:
    """What a run has handed in, on its way, as the result of its configuration at a smaller scale."""

    scale: Scale
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """A record of one trial; immutable, replaced as its study learns more.

    `cost` is in runs at the top scale; of a trial that was stopped it is that of the share of its run that it made, as
    far as that is known. `source` says where the configuration came from: a policy's own word
    ("sobol", "ladder/proxy", "ladder/target", "bayes"), "enqueued", "added" or "prior". `predicted` is the objective
    that the model expected, {"mean", "low", "high"} in minimised user units with a 90% interval. `metrics` are those of
    the finished run; `reports` those on the way. `study` names the other study that a run of source "prior" was made
    for, the same name for all its runs; it is None for runs of this study, those that were "added" to it too.

    `attempt` counts from 1 and grows when a worker was lost; `losses` are those of them that count against the trial,
    because it and not its machine may have been to blame.

    `branches` are results of the same configuration at smaller scales that the run has handed in, `wanted` the scales
    at which its policy asked for some.
    """

    id: int
    config: Mapping[str, Any]
    scale: Scale
    seed: int
    source: str
    cost: float = 1.0
    status: Status = "running"
    attempt: int = 1
    losses: int = 0
    metrics: Mapping[str, float] | None = None
    reports: tuple[Report, ...] = ()
    error: str | None = None
    traceback: str | None = None
    seconds: float | None = None
    predicted: Mapping[str, float] | None = None
    note: str | None = None
    study: str | None = None
    wanted: tuple[Scale, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def told(self) -> bool:
        """Whether it holds a result that a model may learn from."""
        return self.status in TOLD

    @property
    def awaited(self) -> tuple[Scale, ...]:
        """The scales at which a branch is wanted and has not been handed in."""
        there = {branch.scale for branch in self.branches}
        return tuple(scale for scale in self.wanted if scale not in there)


class Trials(Sequence[Trial]):
    """Trials in a row that never change: `put` gives another row that shares all but a piece of this one.

    So a history can be handed out at any moment, to any thread, at a cost that hardly grows with the number of trials.
    """

    __slots__ = ("_length", "_pieces", "tally")
    PIECE = 256

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        row = tuple(trials)
        self._pieces = tuple(row[at : at + self.PIECE] for at in range(0, len(row), self.PIECE))
        self._length = len(row)
        self.tally: Mapping[str, tuple[int, float]] = {}
        """How many there are of each source, and what they cost together."""
        for trial in row:
            self.tally = _counted(self.tally, trial)

    def put(self, trial: Trial) -> Trials:
        """These with `trial` in the place of its id, or at the end where that is the next."""
        which, at = divmod(trial.id, self.PIECE)
        made = object.__new__(Trials)
        piece = self._pieces[which] if which < len(self._pieces) else ()
        made._pieces = (*self._pieces[:which], (*piece[:at], trial, *piece[at + 1 :]), *self._pieces[which + 1 :])
        fresh = trial.id == self._length
        made._length = self._length + fresh
        before = None if fresh else piece[at]
        same = before is not None and before.cost == trial.cost  # the source never changes, the cost with a stop
        made.tally = self.tally if same else _counted(self.tally, trial, before)
        return made

    @overload
    def __getitem__(self, at: int) -> Trial: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Trial, ...]: ...
    def __getitem__(self, at: int | slice) -> Trial | tuple[Trial, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(self._length)))
        if not -self._length <= at < self._length:
            raise IndexError(f"There are {self._length} trials and no trial {at}.")
        which, place = divmod(at % self._length, self.PIECE)
        return self._pieces[which][place]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Trial]:
        return chain.from_iterable(self._pieces)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as of what holds dictionaries

    def __repr__(self) -> str:
        return repr(tuple(self))


def _counted(
    tally: Mapping[str, tuple[int, float]], trial: Trial, before: Trial | None = None
) -> Mapping[str, tuple[int, float]]:
    """A tally with `trial`, in the place of `before` if there is one."""
    count, cost = tally.get(trial.source, (0, 0.0))
    known = 0.0 if before is None else before.cost
    return {**tally, trial.source: (count + (before is None), cost - known + trial.cost)}


def results(trials: Iterable[Trial]) -> list[Trial]:
    """All that a model may learn from: told trials, and each branch of any trial as one told at the branch's scale.

    Run times that are those of a run and its branches together are left out.
    """
    found: list[Trial] = []
    for trial in trials:
        if trial.told:
            found.append(replace(trial, seconds=None) if trial.branches else trial)
        found += [
            replace(trial, scale=branch.scale, metrics=branch.metrics, status="finished", cost=0.0, seconds=None)
            for branch in trial.branches
        ]
    return found


def unfinished(trials: Iterable[Trial]) -> list[Trial]:
    """All without a result: trials that are not told, and each branch that a running one owes as one that runs."""
    found: list[Trial] = []
    for trial in trials:
        if not trial.told:
            found.append(trial)
        if trial.status == "running":
            found += [replace(trial, scale=scale) for scale in trial.awaited]
    return found
