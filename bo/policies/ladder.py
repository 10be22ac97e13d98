"""Small runs first: space-filling proxies over a few cheap scales, then the target from the joint posterior."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bo.objective import Objective
from bo.policies import guard, recommendation
from bo.policies.design import NOTHING, initial, reproducible, sequence_seed, sobol, started
from bo.policies.engine import Engine
from bo.policies.plan import plan
from bo.policies.trunks import covered, price, runs
from bo.ports import ELSEWHERE, History, Limits, Plan, Proposal, Recommendation
from search_spaces import Scale, Space

PROXY = "ladder/proxy"
#: Configurations whose trunks say what a trunk costs.
PRICED = 16


@dataclass(frozen=True)
class Ladder(Engine):
    """No random runs at the target: proxies, the minimiser of the joint posterior mean, then the engine's criterion.

    The settings are those of `Engine`, and proxy_cap: what the proxies may cost together, in target runs; never more
    than half of the study's budget or two thirds of its trials. trunks: a scale axis along which proxies with a stable
    phase are one run that branches (see `trunks`); the training function has to hand in what `trial.wanted` asks for.
    """

    proxy_cap: float = 1.0
    trunks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.proxy_cap, bool) or not 0 <= self.proxy_cap < math.inf:
            raise ValueError(f"Ladder needs proxy_cap to be a finite number of at least 0, got {self.proxy_cap!r}.")

    def check(self, space: Space, objective: Objective) -> None:
        """ValueError where the settings do not fit a study of this space and objective."""
        super().check(space, objective)
        axes = [axis.name for axis in space.fidelity.axes] if space.fidelity is not None else []
        if self.trunks is not None and self.trunks not in axes:
            raise ValueError(
                f"Ladder needs trunks to be a scale axis of the space, one of {axes}, got {self.trunks!r}."
            )

    def plan(self, history: History) -> Plan:
        """What the study comes to, by its limits and what the user's own runs take of them."""
        space, limits = history.space, unclaimed(history)
        if self.trunks is None:
            return plan(space, limits, self.proxy_cap)
        configs = sobol(space.at(space.top), 0, 0, PRICED)
        return plan(space, limits, self.proxy_cap, lambda cells: price(space, cells, self.trunks, configs)[0])

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            planned = self.plan(history).proxies
            if missing := outstanding(history, planned):
                return proxies(history, missing, n, rng, self.trunks)
            if waiting(history, len(planned)):
                return ()
            if not planned and not started(history, None):
                return initial(history, n, rng)
            if sum(trial.status == "finished" for trial in history.trials) < 2:
                return initial(history, n, rng, NOTHING)
            first = history.count("ladder/target") == 0
            return guard.propose(history, n, rng, "ladder/target", self, first, None)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried, self)


def proxies(
    history: History,
    scales: tuple[Scale, ...],
    n: int,
    rng: np.random.Generator,
    axis: str | None = None,
    source: str = PROXY,
) -> tuple[Proposal, ...]:
    """The next up to n space-filling runs at the planned scales, as far as limits allow.

    axis: as `trunks` has it. source: what they are called.
    """
    seed, space = sequence_seed(history, rng), history.space
    first = history.count("sobol", source)
    memory = {**history.memory, "sequence": seed}

    def draw(scale: Scale, number: int) -> Mapping[str, Any]:
        return sobol(space.at(scale), seed, first + number, 1)[0]

    proposals = [
        Proposal(config, scale, source, memory=memory, wanted=wanted)
        for config, scale, wanted in islice(runs(space, scales, axis, draw), n)
    ]
    return tuple(proposals[: history.affordable(proposals)])


def unclaimed(history: History) -> Limits:
    """The limits less what the user's own, enqueued runs take of them."""
    own = [history.space.cost(trial.scale) for trial in history.trials if trial.source == "enqueued"]
    n_trials, budget = history.limits.n_trials, history.limits.budget
    return Limits(
        None if n_trials is None else max(1, n_trials - len(own)),
        None if budget is None else max(1e-9, budget - sum(own)),
    )


def outstanding(history: History, planned: tuple[Scale, ...], source: str = PROXY) -> tuple[Scale, ...]:
    """The planned runs that there are none for yet, in order; a larger plan, and runs added to the study, are fine.

    Runs of another study stand for none of them: it may have measured something else.
    Runs that failed or were stopped tell nothing, so others are made in their place, as long as no more than half fail.
    """
    made = [trial for trial in history.own if trial.source in (source, *ELSEWHERE)]
    served = [trial for trial in made if trial.status not in ("failed", "stopped")]
    if 2 * (len(made) - len(served)) > max(2, len(planned)):
        served = made
    there = Counter(cell for trial in served for cell in covered(trial))
    missing = []
    for scale in planned:
        if there[scale]:
            there[scale] -= 1
        else:
            missing.append(scale)
    return tuple(missing)


def waiting(history: History, planned: int, source: str = PROXY) -> bool:
    """Whether a target run would be a shot in the dark: proxies still run and fewer than half of them have ended."""
    running = sum(trial.source == source and trial.status == "running" for trial in history.trials)
    return running > planned / 2
