"""The two things a study needs from outside: a policy that proposes, and an executor that runs.

A policy gets data (`History`) and never the study; an executor gets a trial and never the study. What an executor has
to say comes back as one of six messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bo.objective import Objective
from bo.trial import Trial, Trials
from search_spaces import Scale, Space, stable_until

# ------------------------------------------------------------------------------------------- what an executor says


@dataclass(frozen=True)
class Reported:
    """The run reported metrics at a step and goes on."""

    trial: int
    attempt: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Branched:
    """The run handed in what its configuration gives at a smaller scale, and goes on."""

    trial: int
    attempt: int
    scale: Scale
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Returned:
    """The training function returned its metrics."""

    trial: int
    attempt: int
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Stopped:
    """The run was asked to end early and did."""

    trial: int
    attempt: int
    seconds: float


@dataclass(frozen=True)
class Raised:
    """The training function raised; `diverged` when it raised `Diverged`. It is not retried: it would raise again."""

    trial: int
    attempt: int
    error: str
    traceback: str
    diverged: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Lost:
    """The worker is gone; nothing says that the configuration does not train, so it is retried.

    innocent: the machine was taken away (node lost, preempted), so that it says nothing about the trial either; one
    that was killed or ran out of memory may do so again.
    """

    trial: int
    attempt: int
    cause: str
    innocent: bool = False


#: What a run says on its way, any number of times; all other messages are its last.
Underway = Reported | Branched
Message = Underway | Returned | Stopped | Raised | Lost
Train = Callable[[Any], Mapping[str, float]]
Deliver = Callable[[Sequence[Message]], None]
"""Takes messages over: when it returns they are on the disk, and who kept them may forget them."""


class Executor(Protocol):
    """Runs trials somewhere. Its methods are called from one thread, the driver's.

    apart: whether trials run in other processes, so that the driver has time to think while they do.
    """

    apart: bool

    def open(self, train: Train, folder: Path) -> None:
        """Get ready to run `train` for the study in `folder` (absolute); called once, before the first submit."""

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Take up those of `trials`, left by an earlier driver, that still run here or have their end kept here.

        They are from then on as if submitted; every other run of the study that is found is ended. Called once, after
        `open`. Where no run outlives its driver there are none.
        """

    def capacity(self) -> int:
        """How many more trials it would take now; 0 when it is busy."""

    def submit(self, trial: Trial) -> None:
        """Start a trial, without waiting for its end."""

    def wait(self, deliver: Deliver, timeout: float) -> None:
        """Deliver what has happened; return once something was delivered, or after `timeout` seconds."""

    def stop(self, trial: int) -> None:
        """Ask the run of that trial to end at its next report; does nothing when it is not running here."""

    def close(self, leave: bool = False) -> None:
        """End what still runs and let go of everything; may be called twice.

        leave: what can outlive its driver is left to the next one.
        """


# ---------------------------------------------------------------------------------------------- what a policy sees

#: Sources of trials that were not run for this study: told by the user, or taken from another study.
ELSEWHERE = ("added", "prior")


@dataclass(frozen=True)
class Limits:
    """Totals of a study: trials at every scale together, and spend in runs at the top scale; None is no limit."""

    n_trials: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.n_trials is not None and (type(self.n_trials) is not int or self.n_trials < 1):
            raise ValueError(f"n_trials must be a whole number of at least 1, got {self.n_trials!r}.")
        if self.budget is not None and not (isinstance(self.budget, (int, float)) and 0 < self.budget < float("inf")):
            raise ValueError(f"budget must be a finite number above 0, in runs at the top scale, got {self.budget!r}.")


@dataclass(frozen=True)
class History:
    """All a policy may know: the journal up to line `seen`, folded.

    `memory` is what the policy's last proposal left for the next one (fitted hyperparameters, for a warm start).
    It never changes, so that it may be looked at in another thread while the study goes on.
    """

    space: Space
    objective: Objective
    trials: Sequence[Trial]
    limits: Limits = Limits()
    seen: int = 0
    memory: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Cost of every trial proposed so far, in runs at the top scale; runs made elsewhere cost nothing here.

        One that was stopped counts by the share of its run that it made, or in full where nobody knows that.
        """
        return sum(cost for source, (_, cost) in self._tally.items() if source not in ELSEWHERE)

    def affordable(self, runs: Sequence[Scale | Proposal]) -> int:
        """How many runs at these scales, or of these proposals, the limits still allow in this order."""
        room = len(runs) if self.limits.n_trials is None else max(0, self.limits.n_trials - self.proposed)
        if self.limits.budget is None:
            return min(len(runs), room)
        if self.spent > self.limits.budget:
            return 0
        costs = (run.cost(self.space) if isinstance(run, Proposal) else self.space.cost(run) for run in runs[:room])
        totals = accumulate(costs, initial=self.spent)
        return sum(total <= self.limits.budget * (1 + 1e-9) for total in totals) - 1

    @property
    def proposed(self) -> int:
        """Number of trials that count towards `limits.n_trials`."""
        return sum(count for source, (count, _) in self._tally.items() if source not in ELSEWHERE)

    def count(self, *sources: str) -> int:
        """How many trials of these sources there are, whatever became of them."""
        return sum(self._tally[source][0] for source in sources if source in self._tally)

    @property
    def _tally(self) -> Mapping[str, tuple[int, float]]:
        """By source, kept by a study and counted where a history was made by hand."""
        return (self.trials if isinstance(self.trials, Trials) else Trials(self.trials)).tally

    @property
    def own(self) -> tuple[Trial, ...]:
        """The trials of this study, added ones included: all but those of other studies."""
        return tuple(trial for trial in self.trials if trial.study is None)

    @property
    def studies(self) -> tuple[str, ...]:
        """Names of the other studies that runs are from, in the order of their first run."""
        return tuple(dict.fromkeys(trial.study for trial in self.trials if trial.study is not None))


@dataclass(frozen=True)
class Proposal:
    """A configuration to run, at a scale, and why; `note` says what an operator should know (a fallback's reason).

    wanted: smaller scales at which the run is to hand in what the same configuration gives there (`trial.branch`).
    """

    config: Mapping[str, Any]
    scale: Scale
    source: str
    predicted: Mapping[str, float] | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    wanted: tuple[Scale, ...] = ()

    def cost(self, space: Space) -> float:
        """In runs at the top scale: of the run, and for each branch of what comes after the stable phase there."""
        rest = 1.0 - (stable_until(self.config) or 0.0)
        return space.cost(self.scale) + rest * sum(map(space.cost, self.wanted))


@dataclass(frozen=True)
class Recommendation:
    """The configuration the model believes best at a scale; the objective is in minimised user units, 90% interval.

    trial: the one that ran it, when it was chosen among those that ran. intervals: where the best value of each number
    lies with 90%, by its path (`data.code`). options: how likely each option of a choice is the best. guess: why the
    config is one, where no run was near. trust: whether runs elsewhere decided about the target, and why.
    """

    config: Mapping[str, Any]
    scale: Scale
    mean: float | None
    low: float | None
    high: float | None
    note: str | None = None
    trial: int | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    guess: str | None = None
    trust: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a study under its limits comes to.

    proxies: the scale of each, cheapest cells first. cost: of them all, in target runs. saved: target runs that they
    are expected to save. targets: runs at the target that the limits leave, None without limits. why: where there are
    no proxies, the reason.
    """

    proxies: tuple[Scale, ...]
    cost: float
    saved: float
    targets: int | None
    why: str | None = None


class Policy(Protocol):
    """Decides what to run next: a pure function of its settings, the history and the generator.

    It may have a method `check(space, objective)` too, with ValueError for settings that do not fit them, which
    `Study.create` asks, and a method `plan(history)` that says what the study comes to. `quick = True` says that it
    proposes within milliseconds, whatever the history, so that nobody minds waiting for it.
    """

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        """At most `n` proposals; none when nothing more is worth running or affordable under `history.limits`."""

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        """The best configuration at `scale` by what is expected of it: of all, or of those that ran."""


# ------------------------------------------------------------------------- late binding: names to implementations
# The only place where a name becomes a module; what stands here is loaded when it is first used, so that readers,
# workers and the command line do not pay for torch or ray.

POLICIES: dict[str, str] = {
    "sobol": "bo.policies.sobol:Sobol",
    "bayes": "bo.policies.bayes:Bayes",
    "ladder": "bo.policies.ladder:Ladder",
    "multi_fidelity": "bo.policies.multi_fidelity:MultiFidelity",
    "trust_region": "bo.policies.trust_region:TrustRegion",
}

EXECUTORS: dict[str, str] = {
    "in-process": "integrations.in_process:InProcess",
    "pool": "integrations.process_pool:ProcessPool",
    "ray": "integrations.ray_runner:RayRunner",
}


def load(table: Mapping[str, str], name: str, what: str) -> Any:
    """The class that `table` has under `name`; ValueError naming `what` and the known names otherwise."""
    if name not in table:
        raise ValueError(f"There is no {what} named {name!r}; there are {', '.join(sorted(table))}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
