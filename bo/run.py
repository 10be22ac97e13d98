"""The loop that keeps an executor busy until the study's limits are reached."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from bo import ports
from bo.ports import Executor, Lost, Message, Raised, Reported, Returned, Stopped, Train
from bo.study import Study
from bo.trial import Trial

log = logging.getLogger("windtunnel")

Reason = Literal["limits", "hours", "target", "patience", "stopped"]
Moment = Literal["started", "reported", "told", "failed", "stopped", "retried"]
Watch = Callable[[Moment, Trial], None]

RETRIES = 3  # a worker that is lost this often takes its trial down with it: an out-of-memory run never fits
HOPELESS = 3  # trials that fail one after another, with none told before, mean that the code and not a config is wrong
POLL = 0.25  # seconds between looks at the executor and at requests from other terminals


class TrainingBroken(Exception):
    """The training function fails whatever its configuration; the message holds its error."""


def run(
    study: Study,
    train: Train,
    *,
    executor: Executor | str = "in-process",
    n_trials: int | None = None,
    budget: float | None = None,
    hours: float | None = None,
    target: float | None = None,
    patience: int | None = None,
    watch: Watch | None = None,
) -> Reason:
    """Run trials until a limit is reached; trials left running by an earlier driver go on from their checkpoints.

    train: a function of a `RunningTrial` that returns its metrics.
    executor: an object, or a name of `bo.ports.EXECUTORS`.
    n_trials, budget: totals of the study, at every scale together and in runs at the top scale; they are journaled, and
    a later call without them keeps them. hours: no trial starts later than this after the call. target: stop when the
    best objective, in the user's sign, is at least this good. patience: stop after this many told trials at the top
    scale without a better one. watch: called with what happened and the trial, after it is on the disk.

    Returns why it ended; the study is left open, and can be run again with larger limits. Raises ValueError for a wrong
    value, TrainingBroken when every trial fails, KeyboardInterrupt as it came.
    """
    _check(hours=hours, target=target, patience=patience)
    if not callable(train):
        raise ValueError(f"run needs a training function, got {type(train).__name__}.")
    limits = study.limit(n_trials, budget)
    if limits == ports.Limits() and hours is None and target is None and patience is None:
        raise ValueError("run needs an end: give n_trials=, budget=, hours=, target= or patience=.")
    runs_it = ports.load(ports.EXECUTORS, executor, "executor")() if isinstance(executor, str) else executor
    driver = _Driver(study, runs_it, watch or (lambda moment, trial: None))
    ending = _Ending(study, hours, target, patience)
    clear_requests(study.folder)
    try:
        runs_it.open(train, study.folder.resolve())
        return driver.drive(ending)
    finally:
        runs_it.close()


class _Driver:
    """Moves trials between a study and an executor; all of it can be told again from the journal."""

    def __init__(self, study: Study, executor: Executor, watch: Watch) -> None:
        self.study, self.executor, self.watch = study, executor, watch
        self.waiting = list(study.running)  # asked for, not submitted: what an earlier driver left, and retries
        self.failures = 0

    def drive(self, ending: _Ending) -> Reason:
        reason: Reason | None = None
        while True:
            reason = reason or ending.reason()
            while reason != "stopped" and self.executor.capacity() and (self.waiting or reason is None):
                trials = [self.waiting.pop(0)] if self.waiting else list(self.study.ask(1))
                if not trials:
                    if self.study.running:
                        break  # what they tell may bring more to run
                    reason = "limits"
                for trial in trials:
                    self.executor.submit(trial)
                    self.watch("started", trial)
            if reason and (reason == "stopped" or not self.study.running):
                return reason
            self.executor.wait(self.deliver, POLL)
            for id in requested_stops(self.study.folder):
                self.executor.stop(id)

    def deliver(self, message: Message) -> None:
        """Put a message of the executor into the study; one of an attempt that is over is too late and is dropped."""
        study, id = self.study, message.trial
        trial = study.trial(id)
        if trial.status != "running" or message.attempt != trial.attempt:
            return
        match message:
            case Reported(step=step, metrics=metrics):
                study.report(id, step, metrics)
                if id in requested_stops(study.folder):
                    self.executor.stop(id)
            case Returned(metrics=metrics, seconds=seconds):
                if absent := study.objective.missing(metrics):
                    study.fail(
                        id, f"The result has no metric {absent}, which the objective needs; it has {sorted(metrics)}."
                    )
                else:
                    study.tell(id, metrics, seconds)
            case Stopped(seconds=seconds):
                study.stop(id, seconds)
            case Raised(error=error, traceback=traceback, diverged=diverged):
                study.fail(id, error, diverged=diverged, traceback=traceback)
            case Lost(cause=cause) if trial.attempt > RETRIES:
                study.fail(id, f"Its worker was lost {trial.attempt} times, the last time by {cause}.")
            case Lost(cause=cause):
                self.waiting.append(study.retry(id, cause))
        now = study.trial(id)
        if isinstance(message, Reported):
            moment: Moment = "reported"
        elif now.status == "running":
            moment = "retried"
        else:
            moment = "told" if now.told else "stopped" if now.status == "stopped" else "failed"
        self.watch(moment, now)
        self.failures = self.failures + 1 if moment == "failed" else 0 if moment == "told" else self.failures
        if self.failures >= HOPELESS and not any(trial.told and trial.source != "added" for trial in study.trials):
            raise TrainingBroken(
                f"The first {self.failures} trials failed, the last with {now.error!r}. Mend the training function, "
                f"then resume the study.\n\n{now.traceback or ''}".rstrip()
            )


class _Ending:
    """When to start no more trials."""

    def __init__(self, study: Study, hours: float | None, target: float | None, patience: int | None) -> None:
        self.study, self.target, self.patience = study, target, patience
        self.deadline = math.inf if hours is None else study.now() + 3600 * hours

    def reason(self) -> Reason | None:
        if stop_requested(self.study.folder):
            return "stopped"
        if self.study.now() >= self.deadline:
            return "hours"
        best = self.study.best() if self.target is not None or self.patience is not None else None
        if best is None:
            return None
        objective = self.study.objective
        value = objective.value(best.metrics or {})
        if self.target is not None and value <= objective.shown(self.target):
            return "target"
        later = [t for t in self.study.trials if t.id > best.id and t.told and t.scale == self.study.top]
        if self.patience is not None and len(later) >= self.patience:
            return "patience"
        return None


# ------------------------------------------------------------------- requests from other terminals: files, not journal
# Only the driver writes the journal, so another process leaves a file and the driver acts on it.


def request_stop(folder: Path, trial: int | None = None) -> None:
    """Ask the driver of the study in `folder` to end, or to end one trial."""
    requests = folder / "requests"
    requests.mkdir(exist_ok=True)
    (requests / ("stop" if trial is None else f"stop-{trial}")).touch()


def stop_requested(folder: Path) -> bool:
    return (folder / "requests" / "stop").exists()


def requested_stops(folder: Path) -> set[int]:
    try:
        names = os.listdir(folder / "requests")
    except FileNotFoundError:
        return set()
    return {int(name.removeprefix("stop-")) for name in names if name.startswith("stop-")}


def clear_requests(folder: Path) -> None:
    """Forget what was asked of an earlier driver."""
    for path in (folder / "requests").glob("stop*"):
        path.unlink(missing_ok=True)


def _check(hours: float | None, target: float | None, patience: int | None) -> None:
    if hours is not None and not (isinstance(hours, (int, float)) and 0 < hours < math.inf):
        raise ValueError(f"hours must be a finite number above 0, got {hours!r}.")
    if target is not None and not (isinstance(target, (int, float)) and math.isfinite(target)):
        raise ValueError(f"target must be a finite value of the objective, got {target!r}.")
    if patience is not None and (type(patience) is not int or patience < 1):
        raise ValueError(f"patience must be a whole number of at least 1, got {patience!r}.")
