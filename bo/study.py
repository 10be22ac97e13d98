"""The study: the one object with state, a journal and what it adds up to."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import secrets
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bo import journal as journals
from bo import objective as objectives
from bo import ports, state
from bo import stopping as rules
from bo.checkpoint import private_folder, sync_folder
from bo.elsewhere import Run, Runs
from bo.events import Event, event, metrics_to_json
from bo.journal import Journal, JournalError
from bo.objective import Function, Objective, Pareto
from bo.ports import History, Limits, Plan, Policy, Proposal, Recommendation
from bo.stopping import StoppingRule
from bo.trial import Report, Trial, Trials, results
from bo.worker import numbers, smaller, whole_step
from search_spaces import MeasuredCost, Scale, Space, carry, carry_scales
from search_spaces.codec import space_from_json, space_to_json
from search_spaces.parameter import is_number

VERSION = 1
log = logging.getLogger("windtunnel")


@dataclass(frozen=True)
class Prior:
    """What `Study.add_prior` did.

    added: the trials it made. left_out: the other runs by their ids, with the reasons; those that were there already
    are not among them. matched: parameters and scale axes that both have. given: those that only this study has, with
    the value that the runs got. unused: those that only the runs have.
    """

    added: tuple[Trial, ...]
    left_out: tuple[tuple[int | str, str], ...] = ()
    matched: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def words(self) -> str:
        """All of it as text, a line for each reason."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        lines = [
            f"Runs taken: {len(self.added)}, left out: {len(self.left_out)}.",
            f"In both: {', '.join(self.matched) or 'nothing'}.",
            f"Only here, and taken as: {given}." if given else "",
            f"Only there, and not used: {', '.join(self.unused)}." if self.unused else "",
        ]
        reasons: dict[str, list[str]] = {}
        for id, reason in self.left_out:
            reasons.setdefault(reason, []).append(str(id))
        lines += [f"{', '.join(ids)}: {reason}" for reason, ids in reasons.items()]
        return "\n".join(filter(None, lines))


@dataclass(frozen=True)
class Draft:
    """A question to a policy with all that its answer depends on, so that it may be asked in another thread.

    That is what the journal held up to line `history.seen`, and random numbers by the number of trials there.
    """

    policy: Policy
    history: History
    n: int
    seed: int

    def proposals(self) -> tuple[Proposal, ...]:
        return self.policy.propose(self.history, self.n, _generator(self.seed, len(self.history.trials)))


class Study:
    """A search: its space, its objective and every trial of it, kept in a folder.

    Made by `Study.create` or `Study.open`. Every change is on the disk before the call that made it returns. Reading
    needs no lock; the first change makes this process the study's one driver until `close`.
    """

    def __init__(self, folder: Path, header: Event, space: Space, journal: Journal, current: state.State) -> None:
        self.folder = folder
        self.seed: int = header["seed"]
        self.policy_name: str = header["policy"]
        self.settings: Mapping[str, Any] = header["settings"]
        self.stopping = rules.make(header["stopping"]) if "stopping" in header else None
        self._header = header
        self._journal = journal
        self._state = current
        self._loaded_policy: Policy | None = None
        self._grouped = False  # whether changes wait for the end of `together`

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        space: Space,
        *,
        objective: Objective,
        seed: int = 0,
        policy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        stopping: str | Mapping[str, Any] | StoppingRule | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """A new study in the folder `path`, which is made.

        policy: a name of `bo.ports.POLICIES`; by default "ladder" where the space has a fidelity, "bayes" elsewhere.
        settings: keyword settings of that policy. clock: seconds since the epoch.
        stopping: when runs end early, by default never: a name of `bo.stopping.RULES`, a dictionary with that "name"
        and the settings of the rule, or the rule itself.
        Raises ValueError for a wrong value, JournalError when the folder holds a study already or cannot be written.
        """
        if not isinstance(space, Space):
            raise ValueError(f"Study.create needs a Space, got {type(space).__name__}.")
        if not isinstance(objective, Objective):
            raise ValueError(f"Study.create needs an objective such as Minimize('loss'), got {objective!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}.")
        policy = policy or ("ladder" if space.fidelity else "bayes")
        if policy not in ports.POLICIES:
            raise ValueError(f"There is no policy named {policy!r}; there are {', '.join(sorted(ports.POLICIES))}.")
        if policy == "ladder" and not space.fidelity:
            raise ValueError("The ladder climbs scales; give the space a fidelity=, or choose policy='bayes'.")
        if policy == "trust_region" and isinstance(objective, Pareto):
            raise ValueError("A trust region needs one best run, and a Pareto objective has none; take policy='bayes'.")
        if settings:
            check = getattr(_make_policy(policy, settings), "check", None)
            if check is not None:
                check(space, objective)
        rule = None if stopping is None else rules.make(stopping)
        if rule is not None:
            rule.check(objective)
        folder = Path(path)
        try:
            private_folder(folder)
        except OSError as error:
            raise JournalError(f"{folder} cannot be made ({error.strerror}); choose a folder you own.") from error
        _refuse_another(folder)
        journal = Journal(folder, 0, clock)
        header = event(
            "created",
            version=VERSION,
            space=space_to_json(space),
            objective=objectives.to_json(objective),
            seed=seed,
            policy=policy,
            settings=dict(settings or {}),
            stopping=None if rule is None else rules.to_json(rule),
        )
        events = journal.append([header])
        return cls(folder, events[0], space, journal, state.fold(space, objective, events))

    @classmethod
    def open_or_create(
        cls,
        path: str | os.PathLike[str],
        space: Space,
        *,
        objective: Objective,
        seed: int = 0,
        policy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        stopping: str | Mapping[str, Any] | StoppingRule | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """The study in `path`, or a new one: what a script that may be killed and started again begins with.

        Raises what `create` and `open` raise, and ValueError when the study there was made with other arguments.
        """
        if not journals.exists(Path(path)):
            return cls.create(
                path,
                space,
                objective=objective,
                seed=seed,
                policy=policy,
                settings=settings,
                stopping=stopping,
                clock=clock,
            )
        study = cls.open(path, space=space, objective=objective, clock=clock)
        for name, given, was in (
            ("seed", seed, study.seed),
            ("policy", policy or study.policy_name, study.policy_name),
            ("settings", dict(settings or study.settings), dict(study.settings)),
            ("stopping", study.stopping if stopping is None else rules.make(stopping), study.stopping),
        ):
            if given != was:
                raise ValueError(f"{study.folder} was made with {name} {was!r}, not {given!r}; use a new folder.")
        return study

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        space: Space | None = None,
        objective: Objective | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """The study in the folder `path`, as its journal tells it; takes no lock and changes no byte.

        space, objective: when given they must equal the journal's, and are used in their place; a study with a
        callable in its space (a cost, a constraint) needs it handed in to be asked, or given configurations, and one
        whose objective is a `Function` needs that to be asked, or to name its best.
        Raises JournalError when there is no study or its journal is damaged, ValueError when space or objective differ.
        """
        folder = Path(path)
        events, _ = journals.read(folder / journals.NAME)
        if not events:
            raise JournalError(f"{folder} holds no study; make one with Study.create or `windtunnel run`.")
        header = events[0]
        if header["kind"] != "created" or header["version"] > VERSION:
            raise JournalError(f"{folder} was written by a newer version of Windtunnel; update to open it.")
        if space is None:
            space = space_from_json(header["space"])
        elif difference := _difference(header["space"], space_to_json(space)):
            raise ValueError(f"The space differs from the one {folder} was made with: {difference}. Use a new folder.")
        if objective is None:
            objective = objectives.from_json(header["objective"])
        elif objective != (was := objectives.from_json(header["objective"])):
            if isinstance(was, Function) and isinstance(objective, Function) and was.stored != objective.stored:
                raise ValueError(
                    f"The source of {objective} is not the one {folder} was made with; Study.fork re-weighs the told "
                    "metrics under another objective."
                )
            raise ValueError(
                f"The objective differs from the one {folder} was made with ({was}); Study.fork re-weighs the told "
                "metrics under another."
            )
        return cls(folder, header, space, Journal(folder, len(events), clock), state.fold(space, objective, events))

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def space(self) -> Space:
        return self._state.space

    @property
    def objective(self) -> Objective:
        return self._state.objective

    @property
    def trials(self) -> Trials:
        """Every trial, in the order of its id, as they are now."""
        return self._state.trials

    @property
    def running(self) -> tuple[Trial, ...]:
        """Trials that were asked for and have no end yet."""
        return tuple(self._state.trials[id] for id in self._state.running)

    @property
    def queue(self) -> tuple[tuple[Mapping[str, Any], Scale], ...]:
        """Enqueued configurations, with their scales, that were not asked for yet."""
        return tuple(self._state.queue)

    @property
    def limits(self) -> Limits:
        return self._state.limits

    @property
    def seen(self) -> int:
        """Number of the journal's last line."""
        return self._state.seen

    @property
    def spent(self) -> float:
        """Cost of every trial asked for so far, in runs at the top scale; see `History.spent`."""
        return self.history().spent

    @property
    def training(self) -> Mapping[str, Any] | None:
        """The file this study was launched from by the command line: its "file", "sha256" and "args"."""
        return self._state.training

    def now(self) -> float:
        """Seconds since the epoch by the study's clock."""
        return self._journal.clock()

    @property
    def top(self) -> Scale:
        """The scale whose results count: the target, or the largest runnable one below it."""
        return self.space.top

    @property
    def ended(self) -> tuple[Trial, ...]:
        """Trials that have an end, in the order in which they came to it."""
        return self.ended_after(0)

    def ended_after(self, n: int) -> tuple[Trial, ...]:
        """Those of `ended` that came after the first `n` of them."""
        return tuple(self._state.trials[id] for id in self._state.ended[n:])

    def trial(self, id: int) -> Trial:
        if not (isinstance(id, (int, np.integer)) and 0 <= id < len(self.trials)):
            known = f"its trials are 0 to {len(self.trials) - 1}" if self.trials else "it has none yet"
            raise ValueError(f"{self.folder} has no trial {id!r}; {known}.")
        return self._state.trials[id]

    def best(self, objective: Objective | None = None) -> Trial | None:
        """The told trial at the top scale with the best objective within its limits, None while there is none.

        Runs of other studies (`add_prior`) are not among them, nor are added runs of configurations that the space does
        not allow at the top scale. objective: re-weighs the told metrics without training again; trials without a
        metric it names are left out. ValueError for a Pareto objective, which has a `front` and no best trial.
        """
        better = objective or self.objective
        if isinstance(better, Pareto):
            raise ValueError(
                f"No trial is the best of {len(better.parts)} objectives; Study.front() gives those that none beats, "
                "best(objective=...) the best by one objective."
            )
        scored = [(better.value(trial.metrics or {}), trial.id) for trial in self._candidates(better)]
        for _, id in sorted(scored):
            if self._is_allowed(trial := self.trial(id)):
                return trial
        return None

    def front(self, objective: Objective | None = None) -> tuple[Trial, ...]:
        """The told trials at the top scale, within all limits, that no other beats in every objective; by id.

        Which trials count, and `objective`, are as for `best`. With one objective these are the best trial and those
        that equal it.
        """
        better = objective or self.objective
        trials = [trial for trial in self._candidates(better) if self._is_allowed(trial)]
        return tuple(trials[i] for i in objectives.undominated([better.values(t.metrics or {}) for t in trials]))

    def hypervolume(self) -> float:
        """How much of the objectives' space the front beats, up to the reference point; 0 while there is no front.

        In the product of the objectives' units. The reference is the objective's, else it follows the front (see
        `bo.objective.reference_point`) and volumes of different times are not comparable. ValueError for an objective
        other than Pareto.
        """
        if not isinstance(self.objective, Pareto):
            raise ValueError(f"Only a Pareto objective has a hypervolume; this study has {self.objective}.")
        values = [self.objective.values(trial.metrics or {}) for trial in self.front()]
        if not values:
            return 0.0
        reference = self.objective.minimised_reference or objectives.reference_point(values)
        return objectives.hypervolume(values, reference)

    def _candidates(self, objective: Objective) -> list[Trial]:
        """Trials that may be the best by an objective, but for what the space forbids."""
        return [trial for trial in self.trials if self._measured(trial, objective)]

    def _measured(self, trial: Trial, objective: Objective) -> bool:
        """Whether it has finished at the top scale with all numbers there, finite, and all limits kept."""
        metrics = trial.metrics
        if trial.status != "finished" or trial.source == "prior" or trial.scale != self.top or not metrics:
            return False
        there = not objective.missing(metrics) and all(map(math.isfinite, objective.values(metrics)))
        return there and objective.feasible(metrics)

    def contends(self, trial: Trial) -> bool:
        """Whether the trial may be the best, or one of the front."""
        return self._measured(trial, self.objective) and self._is_allowed(trial)

    def _is_allowed(self, trial: Trial) -> bool:
        """Whether the space allows the trial's configuration at the top scale: added ones may break what it forbids."""
        return trial.source != "added" or self.space.at(self.top).allows(trial.config)

    def measured_cost(self) -> MeasuredCost:
        """What runs take, in seconds by scale, as the finished ones took it: `Fidelity(cost=...)` of the next study.

        Write its numbers down there: fitted again later they would be others, and the space with them. Trials that lost
        a worker are left out, since their seconds are those of the last attempt. ValueError when nothing was measured.
        """
        if self.space.fidelity is None:
            raise ValueError("The space has no fidelity=, so there are no scales to learn the cost of a run from.")
        measured = [t for t in results(self.trials) if t.status == "finished" and t.attempt == 1]
        runs = [(trial.scale, trial.seconds) for trial in measured if trial.seconds]
        if not runs:
            raise ValueError(
                f"{self.folder} has no finished trial with its run time; run some, or tell them with seconds=."
            )
        return MeasuredCost.fit(runs)

    def should_stop(self, id: int) -> bool:
        """Whether the study's rule ends a running trial early; decided once, with each report, and in the journal."""
        return self.trial(id).id in self._state.behind

    def history(self) -> History:
        """What a policy gets to see now."""
        now = self._state
        return History(now.space, now.objective, self.trials, now.limits, now.seen, now.memory)

    def recommend(self, scale: Mapping[str, float | str] | None = None, *, tried: bool = False) -> Recommendation:
        """The configuration that the model believes best at `scale` (by default the target): of all, or of those tried.

        It goes by what is expected of a configuration, `best` by what was measured, which may have been luck.
        """
        target = self.space.fidelity.target if self.space.fidelity else None
        at = self._state.scale(target if scale is None else scale)
        return self._policy().recommend(self.history(), at, _generator(self.seed, len(self.trials)), tried)

    def plan(self, limits: Limits | None = None) -> Plan | None:
        """How many runs where the study comes to under its limits, or others; None where its policy makes no plan."""
        policy, history = self._policy(), self.history()
        if not hasattr(policy, "plan"):
            return None
        limits = limits or history.limits
        queued = [self.space.cost(scale) for _, scale in self.queue]  # they take their part of the limits
        n_trials = None if limits.n_trials is None else max(1, limits.n_trials - len(queued))
        budget = None if limits.budget is None else max(1e-9, limits.budget - sum(queued))
        found: Plan = policy.plan(replace(history, limits=Limits(n_trials, budget)))
        return found

    # ------------------------------------------------------------------------------------------------- changing

    def lock(self) -> None:
        """Become the study's one driver now, not with the first change. StudyInUse when another process is it."""
        self._journal.lock()

    def ask(self, n: int = 1) -> tuple[Trial, ...]:
        """Up to `n` trials to run: enqueued ones first, then the policy's. Fewer, or none, where limits are reached."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"ask needs a whole number of at least 1, got {n!r}.")
        queued = [Proposal(config, scale, "enqueued") for config, scale in self._state.queue[:n]]
        trials = self._propose(queued)
        left = n - len(trials)
        if len(trials) < len(queued) or not left or (draft := self.draft(left)) is None:
            return trials
        return trials + (self.adopt(draft, draft.proposals()) or ())

    @property
    def quick(self) -> bool:
        """Whether its policy says that it proposes within milliseconds, whatever it has seen."""
        return getattr(self._policy(), "quick", False)

    def draft(self, n: int) -> Draft | None:
        """What asking the policy for `n` trials comes to, for `Draft.proposals` to be called anywhere.

        None where the study has all the trials that its limits allow.
        """
        history = self.history()
        if history.limits.n_trials is not None and history.proposed >= history.limits.n_trials:
            return None
        return Draft(self._policy(), history, n, self.seed)

    def adopt(self, draft: Draft, proposals: Sequence[Proposal]) -> tuple[Trial, ...] | None:
        """The trials that a draft's proposals become; None where others were made since it was, so that it is void.

        What else has happened since does no harm: a proposal names the line of the journal up to which it looked.
        """
        if len(self.trials) != len(draft.history.trials):
            return None
        return self._propose(proposals, draft.history.seen)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Put all changes that are made within on the disk at its end, with one write; only then do they count.

        JournalError when the disk refuses: then none of them was made. What was changed before any other error stays,
        and after one, Ctrl-C too, the study is again what the disk holds.
        """
        if self._grouped:
            yield
            return
        self._grouped = True
        whole = False
        try:
            try:
                yield
            finally:
                self._journal.commit()
            whole = True
        finally:
            self._grouped = False
            if not whole:  # what the disk holds is true, whatever was in the making
                self._state = state.fold(self.space, self.objective, self._journal.reread())
                self._journal.length = self._state.seen

    def tell(self, id: int, metrics: Mapping[str, float], seconds: float | None = None) -> Trial:
        """Record the result of a trial.

        A metric that the objective names and that is not finite makes the trial a diverged one. Telling equal metrics
        again does nothing. Raises ValueError when the trial is unknown, ended otherwise, or a metric is missing.
        """
        trial, plain, seconds = self.trial(id), numbers(metrics, f"Trial {id}"), _seconds(seconds)
        if trial.told and trial.metrics is not None and _same(trial.metrics, plain):
            return trial
        if trial.status != "running":
            raise ValueError(f"Trial {id} is {trial.status} already; what was told is not changed.")
        if absent := self.objective.missing(plain):
            raise ValueError(f"Trial {id} has no metric {absent}, which the objective needs; it has {sorted(plain)}.")
        bad = {name: plain[name] for name in self.objective.metrics if not math.isfinite(plain[name])}
        stored = self._stored(plain, f"Trial {id}")
        if bad:
            what = ", ".join(f"{name}={value}" for name, value in bad.items())
            error = f"Trial {id} reported {what}; it is recorded as diverged."
            log.warning(error)
            self._append(event("diverged", trial=id, error=error, metrics=stored, seconds=seconds))
        else:
            self._append(event("finished", trial=id, metrics=stored, seconds=seconds))
        return self.trial(id)

    def fail(
        self, id: int, error: str, *, diverged: bool = False, traceback: str | None = None, seconds: float | None = None
    ) -> Trial:
        """Record that a trial has no result: `diverged` teaches the model, any other failure does not."""
        trial, seconds = self.trial(id), _seconds(seconds)
        if not isinstance(error, str) or not error:
            raise ValueError(f"fail needs a text that says what went wrong, got {error!r}.")
        if trial.status == ("diverged" if diverged else "failed") and trial.error == error:
            return trial
        if trial.status != "running":
            raise ValueError(f"Trial {id} is {trial.status} already; what was told is not changed.")
        if diverged:
            self._append(event("diverged", trial=id, error=error, seconds=seconds))
        else:
            self._append(event("failed", trial=id, error=error, traceback=traceback, seconds=seconds))
        return self.trial(id)

    def report(self, id: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a running trial at a step; what is recorded already is not written again.

        The study's rule is asked whether it ends the trial early; `should_stop` has the answer.
        """
        trial, plain = self._running(id, "reports nothing more"), numbers(metrics, f"Trial {id}")
        step = whole_step(step, f"Trial {id}")
        at = bisect_left(trial.reports, step, key=lambda earlier: earlier.step)
        if at < len(trial.reports) and trial.reports[at].step == step and _same(trial.reports[at].metrics, plain):
            return
        stored = self._stored(plain, f"Trial {id}")
        now = state.with_report(trial, Report(step, plain))
        behind = self.stopping is not None and self.stopping.decide(now, self.trials, self.objective)
        words = {"trial": id, "attempt": trial.attempt, "step": step, "metrics": stored, "behind": behind or None}
        self._append(event("reported", **words))

    def branch(self, id: int, scale: Mapping[str, float | str], metrics: Mapping[str, float]) -> None:
        """Record what the configuration of a running trial gives at a smaller scale, for the model to learn from.

        scale: the axes that are smaller than the trial's own; the others may be left out. It counts towards no limit.
        Equal metrics there are not written again, others replace the earlier ones; what is not finite of those that the
        objective names makes it a diverged result. ValueError when the scale is none that runs, or not a smaller one.
        """
        trial, plain = self._running(id, "branches no more"), numbers(metrics, f"Trial {id}")
        if self.space.fidelity is None:
            raise ValueError(f"Trial {id} has no scale axes to branch at; give the space a fidelity=.")
        at = self.space.fidelity.scale({**trial.scale, **scale})  # it stands for a run, so it must be a scale that runs
        smaller(trial.scale, {axis: at[axis] for axis in at if at[axis] != trial.scale[axis]}, f"Trial {id}")
        if absent := self.objective.missing(plain):
            raise ValueError(f"Trial {id} has a branch without {absent}, which the objective needs; {sorted(plain)}.")
        if any(earlier.scale == at and _same(earlier.metrics, plain) for earlier in trial.branches):
            return
        stored = self._stored(plain, f"Trial {id}")
        self._append(event("branched", trial=id, attempt=trial.attempt, scale=at.to_json(), metrics=stored))

    def retry(self, id: int, cause: str, *, innocent: bool = False) -> Trial:
        """Record that a trial's worker was lost; it goes on from its checkpoint as its next attempt.

        innocent: its machine was taken away, which does not count against the trial.
        """
        trial = self._running(id, "cannot be retried")
        self._append(event("retried", trial=id, attempt=trial.attempt + 1, cause=cause, innocent=innocent or None))
        return self.trial(id)

    def stop(self, id: int, seconds: float | None = None, share: float | None = None) -> Trial:
        """Record that a run was ended early: it keeps its reports and has no result.

        share: the part of its run that it made, 0 to 1, by which it counts towards the budget. By
        default that is told from its last report, by the steps of the finished runs of its scale, or at the top scale
        by what the study's rule was told; where that says nothing, it counts in full.
        One whose last report has a metric that the objective names and that is not finite is recorded as diverged.
        """
        trial, seconds = self._running(id, "cannot be stopped"), _seconds(seconds)
        if share is not None and not (is_number(share) and 0 <= share <= 1):
            raise ValueError(f"share must be a number from 0 to 1, got {share!r}.")
        last = trial.reports[-1].metrics if trial.reports else {}
        if not all(math.isfinite(last[name]) for name in self.objective.metrics if name in last):
            return self.tell(id, {**dict.fromkeys(self.objective.metrics, math.nan), **last}, seconds)
        if share is None:
            told = self.stopping.last if self.stopping is not None and trial.scale == self.top else None
            share = rules.share(trial, self.trials, told)
        share = None if share is None else float(share)
        self._append(event("stopped", trial=id, share=share, seconds=seconds))
        return self.trial(id)

    def enqueue(self, config: Mapping[str, Any], scale: Mapping[str, float | str] | None = None) -> None:
        """Have `config` (your current recipe) run before anything the policy proposes, at the top scale by default.

        ValueError when the scale is none that runs, or when the space does not allow the configuration there.
        """
        self._refuse_unchecked()
        at = self._state.scale(scale)
        if self.space.fidelity:
            self.space.fidelity.scale(at)  # it is to be run here, so it must be a scale that runs
        self._append(event("enqueued", config=self.space.at(at).to_json(config), scale=at.to_json()))

    def add(
        self, config: Mapping[str, Any], metrics: Mapping[str, float], scale: Mapping[str, float | str] | None = None
    ) -> Trial:
        """Tell a run that was made elsewhere, at its scale; it counts towards no limit and may be the best.

        The configuration must be one of the space. It may break what its scale alone forbids (epochs of a source, a
        constraint with a scale axis): the run was made, so it is learned from, but then it is never the best.
        """
        self._refuse_unchecked()
        id = len(self.trials)
        self._append(self._added(id, config, metrics, scale))
        return self.trial(id)

    def add_prior(
        self,
        prior: Study | Runs | str | os.PathLike[str],
        *,
        defaults: Mapping[str, Any] | None = None,
        drop: Sequence[str] = (),
        scale: Mapping[str, float | str] | None = None,
    ) -> Prior:
        """Take the finished runs of another study, of the one in that folder, or of an import, to learn from.

        They become trials of source "prior", with `Trial.study` and a note that say where they are from. They are in
        this study's journal from then on, so the other folder is not needed again; those that are there already, also
        by way of a third study, are not added again. They count towards no limit, are never the best, and never stand
        for results of this study.

        Spaces may differ as `search_spaces.carry` says, with its `defaults` and `drop`, and scale axes as
        `search_spaces.carry_scales` says: `scale` is what those runs had on axes that only this study has. What was
        matched, what was not, and which runs are left out and why is in what is returned; a warning counts the latter.
        What holds at one scale alone is treated as by `add`.

        ValueError, before anything is added, when the two are not comparable or no run has a metric that the objective
        names; JournalError when the folder holds no study that can be read.
        """
        self._refuse_unchecked()
        if not isinstance(prior, Runs):
            prior = (prior if isinstance(prior, Study) else Study.open(prior)).runs()
        rows = prior.rows
        unmeasured = {index: reason for index, row in enumerate(rows) if (reason := self._unmeasured(row))}
        finished = [index for index, row in enumerate(rows) if not row.diverged]
        if finished and all(index in unmeasured for index in finished):
            why = f"{rows[finished[0]].id}: {unmeasured[finished[0]]}"
            raise ValueError(f"No run of {prior.name} can be learned from; {why}")
        places = carry_scales([row.scale for row in rows], self.space, scale=scale, drop=drop)
        others = [name for name in drop if name not in places.unused]
        configs = carry([row.config for row in rows], prior.space, self.space, defaults=defaults, drop=others)
        at = dict(zip(places.indices, places.scales, strict=True))
        known = {self._origin(trial) for trial in results(self.trials)}
        first = len(self.trials)
        events: list[Event] = []
        for index, config in zip(configs.indices, configs.configs, strict=True):
            if index in at and index not in unmeasured and _origin_of(rows[index]) not in known:
                id = first + len(events)
                events.append(self._taken(id, prior.name, rows[index], config, at[index], source="prior"))
        if events:
            self._append(*events)
        reasons = {**dict(places.left_out), **dict(configs.left_out), **unmeasured}
        left_out = (*prior.left_out, *((rows[index].id, reasons[index]) for index in sorted(reasons)))
        if left_out:
            words = "%d of %d runs of %s are left out, the first, %s, because: %s"
            log.warning(words, len(left_out), len(rows) + len(prior.left_out), prior.name, *left_out[0])
        matched, unused = configs.matched + places.matched, configs.unused + places.unused
        return Prior(self.trials[first:], left_out, matched, {**configs.given, **places.given}, unused)

    def runs(self) -> Runs:
        """The told trials as plain rows, those of other studies too: what `add_prior` takes of this study."""
        name = f"{self.folder.name}#{_digest(self._header)[:8]}"
        rows = tuple(
            Run(
                id=trial.id,
                config=trial.config,
                metrics=trial.metrics or {},
                scale=trial.scale,
                diverged=trial.status == "diverged",
                origin=self._origin(trial),
                study=trial.study,
                note=trial.note if trial.id in self._state.origins else f"Trial {trial.id} of {self.folder}.",
            )
            for trial in results(self.trials)
        )
        return Runs(name, rows, space=self.space)

    def limit(self, n_trials: int | None = None, budget: float | None = None) -> Limits:
        """Set the study's totals; one that is None keeps what it was. Returns them."""
        limits = Limits(
            self.limits.n_trials if n_trials is None else n_trials, self.limits.budget if budget is None else budget
        )
        if limits != self.limits:
            self._append(event("limits", n_trials=limits.n_trials, budget=limits.budget))
        return limits

    def launched_from(self, file: str, sha256: str, args: tuple[str, ...]) -> None:
        """Record the training file that the trials from here on are run from."""
        now = {"file": file, "sha256": sha256, "args": list(args)}
        if now != self._state.training:
            self._append(event("training", **now))

    def fork(self, path: str | os.PathLike[str], *, objective: Objective | None = None, **arguments: Any) -> Study:
        """A new study in `path` with this one's told trials as runs made elsewhere, weighed by `objective`.

        arguments: of `Study.create`, where they are to differ from this study's. It is there whole or not at all.
        Raises ValueError, before anything is made, when a finished trial lacks a metric that the objective names.
        """
        better = objective or self.objective
        for trial in results(self.trials):
            if trial.status == "finished" and (absent := better.missing(trial.metrics or {})):
                raise ValueError(f"Trial {trial.id} has no metric {absent}, which the new objective names.")
        same: dict[str, Any] = {"seed": self.seed, "policy": self.policy_name, "settings": self.settings}
        same["stopping"] = self.stopping
        folder, runs = Path(path), self.runs()
        _refuse_another(folder)
        aside = folder / f".fork.{secrets.token_hex(4)}"  # half a study, if this process is killed meanwhile
        try:
            with Study.create(aside, self.space, objective=better, **same | arguments) as new:
                new._append(
                    *(
                        new._taken(
                            *(id, runs.name, row, row.config, row.scale),
                            source="added" if row.study is None else "prior",
                        )
                        for id, row in enumerate(runs.rows)
                    )
                )
            lock = journals.take_lock(folder)
            try:
                _refuse_another(folder)
                os.replace(aside / journals.NAME, folder / journals.NAME)
                sync_folder(folder)
            finally:
                os.close(lock)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        new = Study.open(folder, space=self.space, objective=better, clock=arguments.get("clock", time.time))
        new.lock()
        return new

    def close(self) -> None:
        """Let another process be the driver; reading goes on to work, and a change takes the lock again."""
        self._journal.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        told = sum(trial.told for trial in self.trials)
        return f"<Study {self.folder}: {told} of {len(self.trials)} trials told, policy {self.policy_name}>"

    # ------------------------------------------------------------------------------------------------- within

    def _append(self, *events: Event) -> None:
        with self.together():
            for happened in self._journal.stage(events):
                state.apply(self._state, happened)

    def _refuse_unchecked(self) -> None:
        """ValueError while a predicate is not at hand: a configuration it forbids would end all later asking."""
        for text in self.space.lacking:
            raise ValueError(f"The constraint {text} is not at hand; hand the space in by Study.open.")

    def _taken(
        self, id: int, name: str, row: Run, config: Mapping[str, Any], scale: Mapping[str, Any], *, source: str
    ) -> Event:
        """A run of the study of that name as trial `id` of this one, by its `config` and `scale` here."""
        lost = dict.fromkeys(self.objective.metrics, math.nan) if row.diverged else {}
        return self._added(
            id,
            config,
            {**row.metrics, **lost},
            scale,
            source=source,
            note=row.note or f"Run {row.id} of {name}.",
            origin=_origin_of(row),
            study=(row.study or name) if source == "prior" else None,
        )

    def _unmeasured(self, row: Run) -> str:
        """Why a run's metrics cannot be learned from; empty when they can."""
        try:
            plain = numbers(row.metrics, "A run")
        except ValueError as error:
            return str(error)
        if not row.diverged and (absent := self.objective.missing(plain)):
            return f"It has no metric {absent}, which the objective names; it has {sorted(plain)}."
        return ""

    def _origin(self, trial: Trial) -> str:
        """What tells a told run apart from every other: the study it was told to, its number and what it gave there."""
        here = [self._header, trial.id, trial.status, trial.metrics]
        if trial.scale != self._state.trials[trial.id].scale:  # a branch of it
            here.append(trial.scale.to_json())
        return self._state.origins.get(trial.id) or _digest(here)

    def _added(
        self,
        id: int,
        config: Mapping[str, Any],
        metrics: Mapping[str, float],
        scale: Mapping[str, float | str] | None,
        **origin: str | None,
    ) -> Event:
        at = self._state.scale(scale)
        valid, plain = self.space.validate(config), numbers(metrics, "add")
        if absent := self.objective.missing(plain):
            raise ValueError(f"add needs metric {absent}, which the objective names; it got {sorted(plain)}.")
        return event(
            "added",
            trial=id,
            config=self.space.to_json(valid),
            scale=at.to_json(),
            metrics=self._stored(plain, "A run made elsewhere"),
            diverged=not all(math.isfinite(plain[name]) for name in self.objective.metrics) or None,
            **origin,
        )

    def _stored(self, metrics: Mapping[str, float], who: str) -> dict[str, float | str | None]:
        """Metrics as the journal holds them, with a warning for what it cannot."""
        stored = metrics_to_json(metrics, self.objective.metrics)
        for name in (name for name, value in stored.items() if value is None):
            log.warning("%s reported %s=%s; it is stored as null.", who, name, metrics[name])
        return stored

    def _propose(self, proposals: Sequence[Proposal], seen: int | None = None) -> tuple[Trial, ...]:
        """Trials of proposals that looked at the journal up to line `seen`, by default all of it."""
        first, seen = len(self.trials), self.seen if seen is None else seen
        proposals = proposals[: self.history().affordable(proposals)]
        events = [
            event(
                "proposed",
                trial=first + i,
                config=self.space.at(proposal.scale).to_json(proposal.config),
                scale=proposal.scale.to_json(),
                seed=int(_generator(self.seed, first + i, 1).integers(2**31)),
                cost=proposal.cost(self.space),
                source=proposal.source,
                seen=seen,
                predicted=proposal.predicted,
                memory=proposal.memory or None,
                note=proposal.note,
                wanted=[scale.to_json() for scale in proposal.wanted] or None,
            )
            for i, proposal in enumerate(proposals)
        ]
        if events:
            self._append(*events)
        return self.trials[first:]

    def _policy(self) -> Policy:
        if self._loaded_policy is None:
            self._loaded_policy = _make_policy(self.policy_name, self.settings)
        return self._loaded_policy

    def _running(self, id: int, so: str) -> Trial:
        trial = self.trial(id)
        if trial.status != "running":
            raise ValueError(f"Trial {id} is {trial.status} already and {so}.")
        return trial


def _refuse_another(folder: Path) -> None:
    if journals.exists(folder):
        raise JournalError(f"{folder} already holds a study; Study.open or Study.open_or_create goes on with it.")


def _generator(seed: int, id: int, stream: int = 0) -> np.random.Generator:
    """Random numbers for trial `id` of a study with this seed: stream 0 to propose it, stream 1 for its own seed."""
    return np.random.default_rng(np.random.SeedSequence((seed, id, stream)))


def _make_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    cls = ports.load(ports.POLICIES, name, "policy")
    try:
        policy: Policy = cls(**settings)
    except TypeError:
        known = list(inspect.signature(cls).parameters)
        raise ValueError(f"The policy {name!r} has settings {known}, got {sorted(settings)}.") from None
    return policy


def _digest(json_value: Any) -> str:
    return hashlib.sha256(json.dumps(json_value, sort_keys=True).encode()).hexdigest()


def _origin_of(row: Run) -> str:
    """What tells a run apart from every other."""
    written = [row.id, dict(row.config), dict(row.metrics), dict(row.scale), row.diverged]
    return row.origin or hashlib.sha256(repr(written).encode()).hexdigest()


def _seconds(seconds: float | None) -> float | None:
    if seconds is not None and not (isinstance(seconds, (int, float)) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds must be a finite number of at least 0, got {seconds!r}.")
    return seconds


def trial_folder(folder: Path, id: int) -> Path:
    """Where trial `id` of the study in `folder` keeps its checkpoints and its log."""
    return folder / "trials" / f"{id:05d}"


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two sets of metrics are equal as the journal stores them, where NaN equals NaN."""
    return one.keys() == other.keys() and all(
        one[name] == other[name] or (not math.isfinite(one[name]) and not math.isfinite(other[name])) for name in one
    )


def _difference(journal: Any, given: Any, where: str = "") -> str:
    """The first place where two spaces' JSON differ, in words; empty when they are equal."""
    journal, given = _named(journal), _named(given)
    if isinstance(journal, list) and isinstance(given, list) and len(journal) == len(given):
        journal, given = dict(enumerate(journal)), dict(enumerate(given))
    if isinstance(journal, dict) and isinstance(given, dict):
        for key in [*journal, *(key for key in given if key not in journal)]:
            if key == "function" and "sha256" in journal:
                continue  # a callable is known by its hash; the module it is found in may be another
            if key not in given or key not in journal:
                return f"{where}{key} is only in the {'journal' if key in journal else 'given space'}"
            below = "" if key == "parameters" else f"{where}{key}."
            if difference := _difference(journal[key], given[key], below):
                return difference
        return ""
    return "" if journal == given else f"{where.rstrip('.')} was {journal!r} and is {given!r}"


def _named(json: Any) -> Any:
    """A list of [name, value] pairs, as spaces keep their order in JSON, as a dictionary; anything else as it is."""
    pairs = (
        isinstance(json, list)
        and json
        and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in json)
    )
    return dict(json) if pairs else json
