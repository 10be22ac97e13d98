"""The loop that keeps an executor busy until the study's limits are reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from bo import journal, ports
from bo.objective import Pareto
from bo.ports import Branched, Executor, Lost, Message, Raised, Reported, Returned, Stopped, Train, Underway
from bo.study import Study
from bo.trial import Trial

Reason = Literal["limits", "hours", "target", "patience", "stopped"]
Moment = Literal["started", "reported", "branched", "told", "failed", "stopped", "retried"]
Watch = Callable[[Moment, Trial], None]

RETRIES = 3  # a worker that is lost more often takes its trial down with it: an out-of-memory run never fits
TAKEN = 50  # machines that may be taken away from one trial
# After so many failures in a row, and at least as many as ran at a time, it is the code or the machine and no config:
HOPELESS = 3  # while there was no result,
OUTAGE = 10  # and where there was.
POLL = 0.25  # seconds between looks at the executor and at requests from other terminals


class TrainingBroken(Exception):
    """Trial after trial fails, whatever its configuration; the message holds the last error."""


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
    value, StudyInUse when another process drives the study, TrainingBroken when trial after trial fails, and
    KeyboardInterrupt as it came.
    """
    _check(hours=hours, target=target, patience=patience)
    if not callable(train):
        raise ValueError(f"run needs a training function, got {type(train).__name__}.")
    study.lock()
    limits = study.limit(n_trials, budget)
    if limits == ports.Limits() and hours is None and target is None and patience is None:
        raise ValueError("run needs an end: give n_trials=, budget=, hours=, target= or patience=.")
    runs_it = ports.load(ports.EXECUTORS, executor, "executor")() if isinstance(executor, str) else executor
    driver = _Driver(study, runs_it, watch or (lambda moment, trial: None))
    try:
        runs_it.open(train, study.folder.resolve())
        driver.attach()
        return driver.drive(_Ending(study, hours, target, patience))
    finally:
        runs_it.close()
        clear_requests(study.folder)


class _Driver:
    """Moves trials between a study and an executor; all of it can be told again from the journal."""

    def __init__(self, study: Study, executor: Executor, watch: Watch) -> None:
        self.study, self.executor, self.watch = study, executor, watch
        self.waiting = list(study.running)  # asked for, not submitted: what an earlier driver left, and retries
        self.most = 0  # trials that ran at a time
        self.failed: list[Trial] = []  # one after another, since the last result

    def attach(self) -> None:
        """Leave to the executor what still runs of an earlier driver."""
        taken_up = {trial.id for trial in self.executor.attach(self.waiting)}
        self.waiting = [trial for trial in self.waiting if trial.id not in taken_up]

    def drive(self, ending: _Ending) -> Reason:
        reason: Reason | None = None
        while not stop_requested(self.study.folder):
            reason = reason or ending.reason()
            hopeless = len(self.failed) >= max(self.patience, self.most)
            if not hopeless:
                reason = self.fill(reason, ending)
            if hopeless and len(self.study.running) == len(self.waiting):  # what ran has ended, and no more is started
                raise _broken(self.failed)
            if reason and not self.study.running:
                return reason
            self.most = max(self.most, len(self.study.running))
            self.executor.wait(self.deliver, POLL)
            for id in requested_stops(self.study.folder):
                self.executor.stop(id)
        self.executor.wait(self.deliver, 0.0)  # results that are there already
        return "stopped"

    @property
    def patience(self) -> int:
        """Failures in a row that are borne."""
        trained = any(trial.told and trial.source not in ports.ELSEWHERE for trial in self.study.trials)
        return OUTAGE if trained else HOPELESS

    def fill(self, reason: Reason | None, ending: _Ending) -> Reason | None:
        """Start trials while the executor takes them and nothing says to end; returns why no more are asked for."""
        while self.executor.capacity() and not stop_requested(self.study.folder):
            reason = reason or ending.reason()
            if self.waiting:
                trials: tuple[Trial, ...] = (self.waiting.pop(0),)
            elif reason:
                break
            else:
                trials = self.study.ask(1)
            if not trials:
                # What still runs may bring more to run, once it is told.
                return reason if self.study.running else "limits"
            for trial in trials:
                self.executor.submit(trial)
                self.watch("started", trial)
        return reason

    def deliver(self, messages: Sequence[Message]) -> None:
        """Put messages of the executor into the study."""
        for message in messages:
            self.take(message)

    def take(self, message: Message) -> None:
        """Put one message into the study; one of an attempt that is over is too late and is dropped."""
        study, id = self.study, message.trial
        trial = study.trial(id)
        if trial.status != "running" or message.attempt != trial.attempt:
            return
        match message:
            case Reported(step=step, metrics=metrics):
                study.report(id, step, metrics)
            case Branched(scale=scale, metrics=metrics):
                try:
                    study.branch(id, scale, metrics)
                except ValueError as error:  # the training function's, and no reason to end all others
                    study.fail(id, str(error))
            case Returned(metrics=metrics, seconds=seconds):
                if absent := study.objective.missing(metrics):
                    has = f"it has {sorted(metrics)}"
                    study.fail(
                        id, f"The result has no metric {absent}, which the objective needs; {has}.", seconds=seconds
                    )
                else:
                    study.tell(id, metrics, seconds)
            case Stopped() if stop_requested(study.folder) and id not in requested_stops(study.folder):
                return  # the sweep ends, not the trial: it goes on when the study is resumed
            case Stopped(seconds=seconds):
                study.stop(id, seconds)
            case Raised(error=error, traceback=traceback, diverged=diverged, seconds=seconds):
                study.fail(id, error, diverged=diverged, traceback=traceback, seconds=seconds)
            case Lost(cause=cause, innocent=innocent):
                charged = trial.losses + (not innocent)
                if charged > RETRIES:
                    often = f"Its worker was lost {charged} times, the last time by {cause}"
                    study.fail(id, f"{often}; a run that needs more memory than there is ends so.")
                elif trial.attempt > TAKEN:
                    study.fail(id, f"Its machine was taken away {trial.attempt} times, the last time by {cause}.")
                else:
                    self.waiting.append(study.retry(id, cause, innocent=innocent))
        now = study.trial(id)
        goes_on = now.status == "running" and isinstance(message, Underway)
        if isinstance(message, Underway) and (
            not goes_on or stop_requested(study.folder) or id in requested_stops(study.folder)
        ):
            self.executor.stop(id)
        if goes_on:
            moment: Moment = "reported" if isinstance(message, Reported) else "branched"
        elif now.status == "running":
            moment = "retried"
        else:
            moment = "told" if now.told else "stopped" if now.status == "stopped" else "failed"
        if moment == "failed":
            self.failed.append(now)
        elif moment == "told":
            self.failed.clear()
        self.watch(moment, now)


def _broken(failed: list[Trial]) -> TrainingBroken:
    last = failed[-1]
    return TrainingBroken(
        f"{len(failed)} trials failed one after another, the last, trial {last.id}, with {last.error!r}. Mend what "
        f"made them fail, then resume the study.\n\n{last.traceback or ''}".rstrip()
    )


class _Ending:
    """When to start no more trials."""

    def __init__(self, study: Study, hours: float | None, target: float | None, patience: int | None) -> None:
        if target is not None and isinstance(study.objective, Pareto):
            raise ValueError("A front has no target; end the run by n_trials=, budget=, hours= or patience=.")
        self.study, self.target, self.patience = study, target, patience
        self.deadline = math.inf if hours is None else study.now() + 3600 * hours

    def reason(self) -> Reason | None:
        if self.study.now() >= self.deadline:
            return "hours"
        if self.target is None and self.patience is None:
            return None
        objective = self.study.objective
        if isinstance(objective, Pareto):
            leading = [trial.id for trial in self.study.front()]
        else:
            best = self.study.best()
            if best and self.target is not None and objective.value(best.metrics or {}) <= objective.shown(self.target):
                return "target"
            leading = [best.id] if best else []
        told = [trial for trial in self.study.ended if trial.told and trial.source != "prior"]
        at_top = [trial.id for trial in told if trial.scale == self.study.top]
        later = at_top[max((at_top.index(id) + 1 for id in leading), default=0) :]
        return "patience" if self.patience is not None and len(later) >= self.patience else None


# ------------------------------------------------------------------- requests from other terminals: files, not journal
# Only the driver writes the journal, so another process leaves a file, addressed to it, and the driver acts on it.


def request_stop(folder: Path, trial: int | None = None) -> None:
    """Ask the driver of the study in `folder` to end, or to end one trial."""
    requests = folder / "requests"
    requests.mkdir(exist_ok=True)
    (requests / ("stop" if trial is None else f"stop-{trial}")).write_text(journal.driver(folder))


def stop_requested(folder: Path) -> bool:
    """Whether the present driver is asked to end."""
    return "stop" in _requests(folder)


def requested_stops(folder: Path) -> set[int]:
    """The trials that the present driver is asked to end."""
    return {int(name.removeprefix("stop-")) for name in _requests(folder) if name != "stop"}


def _requests(folder: Path) -> list[str]:
    """Names of the requests that are for the present driver; what was asked of an earlier one is over."""
    driver = journal.driver(folder)
    return [path.name for path in (folder / "requests").glob("stop*") if _text(path) == driver]


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:  # cleared since it was listed
        return None


def clear_requests(folder: Path) -> None:
    """Forget what was asked."""
    for path in (folder / "requests").glob("stop*"):
        path.unlink(missing_ok=True)


def _check(hours: float | None, target: float | None, patience: int | None) -> None:
    if hours is not None and not (isinstance(hours, (int, float)) and 0 < hours < math.inf):
        raise ValueError(f"hours must be a finite number above 0, got {hours!r}.")
    if target is not None and not (isinstance(target, (int, float)) and math.isfinite(target)):
        raise ValueError(f"target must be a finite value of the objective, got {target!r}.")
    if patience is not None and (type(patience) is not int or patience < 1):
        raise ValueError(f"patience must be a whole number of at least 1, got {patience!r}.")
