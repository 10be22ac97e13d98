"""The loop that keeps an executor busy until the study's limits are reached.

    policy -> Draft.proposals -> study.adopt -> waiting -> executor.submit -> messages -> deliver -> study

What arrives together goes to the disk together, and only then is it acknowledged and spoken of.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bo import journal, ports
from bo.checkpoint import private, private_folder
from bo.objective import Pareto
from bo.ports import (
    Branched,
    Executor,
    Lost,
    Message,
    Proposal,
    Raised,
    Reported,
    Returned,
    Stopped,
    Train,
    Underway,
)
from bo.retention import Forget, Leading, Retention
from bo.study import Draft, Study
from bo.trial import Trial

Reason = Literal["limits", "hours", "target", "patience", "stopped"]
Moment = Literal["started", "reported", "branched", "told", "failed", "stopped", "retried"]
Watch = Callable[[Moment, Trial], None]
Clock = Callable[[], float]

RETRIES = 3  # a worker that is lost more often takes its trial down with it: an out-of-memory run never fits
TAKEN = 50  # machines that may be taken away from one trial
BACK_OFF = 60.0  # seconds that a trial waits at most for its next attempt
# After so many failures in a row, and at least as many as ran at a time, it is the code or the machine and no config:
HOPELESS = 3  # while there was no result,
OUTAGE = 10  # and where there was.
POLL = 0.25  # seconds between looks at the executor and at requests from other terminals
SOON = 0.02  # the same while workers are free and the policy is thinking
QUICK = 0.01  # seconds that everything else may wait for a policy
NOTICED = 0.001  # of its time that a worker may wait for a policy


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
    keep: str = "target",
    forget: Forget | None = None,
    leave: Callable[[], bool] | None = None,
    clock: Clock = time.monotonic,
) -> Reason:
    """Run trials until a limit is reached; trials left running by an earlier driver go on from their checkpoints.

    train: a function of a `RunningTrial` that returns its metrics.
    executor: an object, or a name of `bo.ports.EXECUTORS`.
    n_trials, budget: totals of the study, at every scale together and in runs at the top scale; they are journaled, and
    a later call without them keeps them. hours: no trial starts later than this after the call. target: stop when the
    best objective, in the user's sign, is at least this good. patience: stop after this many told trials at the top
    scale without a better one. watch: called with what happened and the trial, after it is on the disk. keep: whose
    checkpoints stay when a trial has ended, a name of `bo.retention.RULES`; forget: called with the trials whose
    checkpoints are to go from a store as well. leave: asked when an exception ends the run, whether the trials that can
    outlive this driver are left to the next. clock: seconds that never run backwards, for `hours` and for the waits
    between the attempts of a trial.

    Returns why it ended; the study is left open, and can be run again with larger limits. Trials that were asked for
    and had not started stay so, and are the first of the next run. Raises ValueError for a wrong
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
    retention = Retention(study, keep, forget)
    ending = Ending(study, hours, target, patience, clock)
    driver = Driver(study, runs_it, ending, watch, retention=retention, clock=clock)
    left = False
    try:
        retention.throughout()
        runs_it.open(train, study.folder.resolve())
        return driver.drive()
    except BaseException:
        left = leave is not None and leave()
        driver.hear()
        raise
    finally:
        with contextlib.closing(driver.thinker):
            runs_it.close(left)
        clear_requests(study.folder)


class Thinker:
    """Has a policy answer in a thread of its own, one question at a time."""

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1, "policy")

    def start(self, draft: Draft, clock: Clock) -> None:
        self._answer = self._thread.submit(_timed, draft, clock)

    def ready(self, patience: float) -> bool:
        """Whether there is an answer, at the latest after so many seconds."""
        return bool(futures.wait([self._answer], patience).done)

    def answer(self) -> tuple[tuple[Proposal, ...], float]:
        """The proposals, and the seconds they took; what the policy raised is raised here."""
        return self._answer.result()

    def close(self) -> None:
        """Wait for the thread: a policy cannot be interrupted."""
        self._thread.shutdown(cancel_futures=True)


def _timed(draft: Draft, clock: Clock) -> tuple[tuple[Proposal, ...], float]:
    start = clock()
    return draft.proposals(), clock() - start


class Driver:
    """Moves trials between a study and an executor; all of it can be told again from the journal.

    While trials run in other processes the policy thinks in a thread, on a history that does not change, and what it
    proposes is written by this loop. It is asked in the loop where nothing runs meanwhile, and where it is `quick`.
    """

    def __init__(
        self,
        study: Study,
        executor: Executor,
        ending: Ending,
        watch: Watch | None = None,
        *,
        retention: Retention | None = None,
        clock: Clock = time.monotonic,
        thinker: Thinker | None = None,
    ) -> None:
        self.study, self.executor, self.ending, self.clock = study, executor, ending, clock
        self.watch, self.retention = watch or (lambda moment, trial: None), retention
        self.thinker = thinker or Thinker()
        # Asked for and not on the executor, by the time from when on they may start: what an earlier driver left, what
        # was asked for ahead of demand, and retries. A heap.
        self.waiting: list[tuple[float, int]] = []
        self.out: set[int] = set()  # on the executor
        self.most = 0  # of them at a time
        self.failed: list[Trial] = []  # one after another, since the last result
        self.trained = any(trial.told and trial.source not in ports.ELSEWHERE for trial in study.ended)
        self.requests: set[str] = set()
        self.draft: Draft | None = None  # what the policy is thinking about
        self.took = 0.0  # seconds of its last answer
        self.barren = -1  # the last line of a history to which it had nothing to add
        self.ends: deque[float] = deque(maxlen=64)  # when the last trials came to theirs
        self.coming: Sequence[Message] = ()  # what is being put into the study

    def drive(self) -> Reason:
        """Run until there is a reason not to; the executor has to be open."""
        left = self.study.running
        self.out = {trial.id for trial in self.executor.attach(left)}
        self.most = len(self.out)
        self.waiting = [(-math.inf, trial.id) for trial in left if trial.id not in self.out]
        for id in filter(self.study.should_stop, self.out):  # decided, and the driver died before it was done
            self.executor.stop(id)
        self.quick = self.executor.apart and self.study.quick
        while not self.asked_to_end():
            for id in _named(self.requests):
                self.executor.stop(id)
            reason = None if self.hopeless else self.fill()
            if self.hopeless and not self.out:  # what ran has ended, and no more is started
                raise _broken(self.failed)
            if reason and not self.out:
                return reason
            idle = self.draft is not None and self.executor.capacity()
            self.executor.wait(self.deliver, SOON if idle else POLL)
        self.executor.wait(self.deliver, 0.0)  # results that are there already
        return "stopped"

    @property
    def hopeless(self) -> bool:
        """Whether so many trials have failed one after another that no more are started."""
        return len(self.failed) >= max(OUTAGE if self.trained else HOPELESS, self.most)

    def fill(self) -> Reason | None:
        """Start trials while the executor takes them; returns why no more are started."""
        while not (reason := self.ending.reason()) and (free := self.executor.capacity()):
            if not (self.waiting and self.waiting[0][0] <= self.clock()):
                self.think(free)
                if not self.waiting and not self.out and self.draft is None:
                    return "limits"
            ready = list(self.ready(free))
            for trial in ready:
                self.executor.submit(trial)
                self.out.add(trial.id)
                self.watch("started", trial)
            self.most = max(self.most, len(self.out))
            if not ready:
                break
        if not reason and self.executor.apart and not self.quick:
            self.think(0)
        return reason

    def ready(self, n: int) -> Iterator[Trial]:
        """Up to `n` of those waiting whose time has come; they wait no more."""
        now = self.clock()
        while n and self.waiting and self.waiting[0][0] <= now:
            id = heapq.heappop(self.waiting)[1]
            if self.study.should_stop(id) or f"stop-{id}" in self.requests:
                began = (trial := self.study.trial(id)).attempt > 1 or trial.reports
                stopped = self.study.stop(id, share=None if began else 0.0)
                self.say("told" if stopped.told else "stopped", stopped)
                continue
            yield self.study.trial(id)
            n -= 1

    def think(self, n: int) -> None:
        """Ask for `n` trials that can start and for some ahead of demand; they wait once they are there."""
        if queue := self.study.queue:  # before what the policy is thinking about, whose answer is void then
            asked = self.study.ask(min(n, len(queue))) if n else ()
            self.hold(asked)
            if asked or self.draft is None:
                return
        if self.draft is None:
            wanted = n + max(0, self.ahead() - len(self.waiting))
            if not wanted or self.study.seen == self.barren or (draft := self.study.draft(wanted)) is None:
                return
            if self.quick or not (self.executor.apart and self.out):
                self.adopt(draft, *_timed(draft, self.clock))
                return
            self.draft = draft
            self.thinker.start(draft, self.clock)
        if self.thinker.ready(QUICK):
            draft, self.draft = self.draft, None
            if not self.adopt(draft, *self.thinker.answer()):
                self.think(n)

    def adopt(self, draft: Draft, proposals: Sequence[Proposal], seconds: float) -> bool:
        """Have an answer's trials wait; False where it is void, since others were made meanwhile."""
        self.took = seconds
        trials = self.study.adopt(draft, proposals)
        if trials == ():
            self.barren = draft.history.seen
        self.hold(trials or ())
        return trials is not None

    def hold(self, trials: Sequence[Trial]) -> None:
        now = self.clock()
        for trial in trials:
            heapq.heappush(self.waiting, (now, trial.id))

    def ahead(self) -> int:
        """How many trials to have waiting before a worker is free.

        Twice as many as come to their end while the policy thinks, so that one answer is used up while it works on the
        next, and at most a quarter of what runs at a time, since what is asked for later knows more. None where the
        policy answers at once, or where workers would wait for it less than a thousandth of their time.
        """
        if self.took <= QUICK or len(self.ends) < 2:
            return 0
        rate = len(self.ends) / max(self.clock() - self.ends[0], 1e-9)
        if rate * self.took < NOTICED * self.most:
            return 0
        return min(self.most // 4, math.ceil(2 * rate * self.took))

    def deliver(self, messages: Sequence[Message]) -> None:
        """Put messages of the executor into the study, with one write: when this returns they are on the disk."""
        self.coming = messages
        self.look()
        heard = []
        with self.study.together():
            for message in messages:
                if (moment := self.take(message)) is not None:
                    heard.append((message, moment, self.study.trial(message.trial)))
            if self.quick and not self.hopeless and not self.ending.reason():
                # What takes the place of those that have ended goes to the disk in the same write.
                ended = sum(not isinstance(message, Underway) for message, _, _ in heard)
                self.think(max(0, ended - len(self.waiting)))
        for message, moment, trial in heard:
            if isinstance(message, Underway) and (
                moment not in ("reported", "branched")
                or self.study.should_stop(trial.id)
                or "stop" in self.requests
                or f"stop-{trial.id}" in self.requests
            ):
                self.executor.stop(trial.id)
            self.say(moment, trial)
        self.coming = ()

    def hear(self) -> None:
        """Keep what is there already, after Ctrl-C or an error: it would be trained again.

        Workers may have been sent what ends this driver; that is no fault of their trials.
        """

        def deliver(messages: Sequence[Message]) -> None:
            self.deliver([replace(m, innocent=True) if isinstance(m, Lost) else m for m in messages])

        self.quick = False  # nothing more is asked for
        with contextlib.suppress(Exception):  # the first error is the one to hear of
            deliver(self.coming)
            if self.executor.apart:  # elsewhere nothing runs meanwhile, and to wait is to train
                self.executor.wait(deliver, 0.0)

    def say(self, moment: Moment, trial: Trial) -> None:
        """Let others hear of what is on the disk."""
        if self.retention is not None and moment in ("told", "failed", "stopped"):
            self.retention.ended(trial)
        self.watch(moment, trial)

    def take(self, message: Message) -> Moment | None:
        """Put one message into the study; one of an attempt that is over is too late and is dropped."""
        id = message.trial
        trial = self.study.trial(id)
        if trial.status != "running" or message.attempt != trial.attempt:
            return None
        if isinstance(message, Stopped) and "stop" in self.requests and f"stop-{id}" not in self.requests:
            self.out.discard(id)
            return None  # the sweep ends, not the trial: it goes on when the study is resumed
        try:
            self.record(message, trial)
        except ValueError as error:  # the training function's fault, and no reason to end all others
            self.study.fail(id, str(error))
        now = self.study.trial(id)
        if now.status == "running" and isinstance(message, Underway):
            return "reported" if isinstance(message, Reported) else "branched"
        self.out.discard(id)
        if now.status == "running":
            return "retried"
        self.ends.append(self.clock())
        if now.told:
            self.trained = True
            self.failed.clear()
            return "told"
        if now.status == "stopped":
            return "stopped"
        self.failed.append(now)
        return "failed"

    def record(self, message: Message, trial: Trial) -> None:
        study, id = self.study, trial.id
        match message:
            case Reported(step=step, metrics=metrics):
                study.report(id, step, metrics)
            case Branched(scale=scale, metrics=metrics):
                study.branch(id, scale, metrics)
            case Returned(metrics=metrics, seconds=seconds):
                if absent := study.objective.missing(metrics):
                    has = f"it has {sorted(metrics)}"
                    study.fail(
                        id, f"The result has no metric {absent}, which the objective needs; {has}.", seconds=seconds
                    )
                else:
                    study.tell(id, metrics, seconds)
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
                    study.retry(id, cause, innocent=innocent)
                    pause = 0.0 if innocent and trial.attempt == 1 else min(BACK_OFF, 2.0 ** (trial.attempt - 1))
                    heapq.heappush(self.waiting, (self.clock() + pause, id))

    def look(self) -> None:
        """Hear what other terminals ask of this driver."""
        self.requests = _requests(self.study.folder)

    def asked_to_end(self) -> bool:
        self.look()
        return "stop" in self.requests


def _broken(failed: list[Trial]) -> TrainingBroken:
    last = failed[-1]
    return TrainingBroken(
        f"{len(failed)} trials failed one after another, the last, trial {last.id}, with {last.error!r}. Mend what "
        f"made them fail, then resume the study.\n\n{last.traceback or ''}".rstrip()
    )


class Ending:
    """When to start no more trials."""

    def __init__(
        self,
        study: Study,
        hours: float | None = None,
        target: float | None = None,
        patience: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if target is not None and isinstance(study.objective, Pareto):
            raise ValueError("A front has no target; end the run by n_trials=, budget=, hours= or patience=.")
        self.study, self.target, self.patience, self.clock = study, target, patience, clock
        self.deadline = math.inf if hours is None else clock() + 3600 * hours
        self.heard = 0  # of the trials that have ended
        self.leading = Leading(study)
        self.later = 0  # told at the top scale since the last of these

    def reason(self) -> Reason | None:
        if self.clock() >= self.deadline:
            return "hours"
        if self.target is None and self.patience is None:
            return None
        ended = self.study.ended_after(self.heard)
        self.heard += len(ended)
        for trial in ended:
            if trial.told and trial.source != "prior" and trial.scale == self.study.top:
                self.later = 0 if self.leading.take(trial) else self.later + 1
        objective = self.study.objective
        if self.target is not None and self.leading.trials:
            assert not isinstance(objective, Pareto)
            if objective.value(self.leading.trials[0].metrics or {}) <= objective.shown(self.target):
                return "target"
        return "patience" if self.patience is not None and self.later >= self.patience else None


# ------------------------------------------------------------------- requests from other terminals: files, not journal
# Only the driver writes the journal, so another process leaves a file, addressed to it, and the driver acts on it.


def request_stop(folder: Path, trial: int | None = None) -> None:
    """Ask the driver of the study in `folder` to end, or to end one trial."""
    requests = folder / "requests"
    private_folder(requests)
    name = "stop" if trial is None else f"stop-{trial}"
    with open(requests / name, "w", encoding="utf-8", opener=private) as request:
        request.write(journal.driver(folder))


def stop_requested(folder: Path) -> bool:
    """Whether the present driver is asked to end."""
    return "stop" in _requests(folder)


def _requests(folder: Path) -> set[str]:
    """Names of the requests that are for the present driver; what was asked of an earlier one is over."""
    try:
        names = os.listdir(folder / "requests")
    except FileNotFoundError:
        return set()
    driver = journal.driver(folder) if names else ""
    return {name for name in names if name.startswith("stop") and _text(folder / "requests" / name) == driver}


def _named(requests: set[str]) -> set[int]:
    """The trials that are asked to end."""
    ids = (name.removeprefix("stop-") for name in requests)
    return {int(id) for id in ids if id.isdecimal()}


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
