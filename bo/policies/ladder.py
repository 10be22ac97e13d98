"""Small runs first: space-filling proxies over a few cheap scales, then the target from the joint posterior."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from bo.policies import posterior, recommendation
from bo.policies.bayes import NOTHING, started
from bo.policies.design import count, initial, reproducible, sequence_seed, sobol
from bo.ports import ELSEWHERE, History, Limits, Proposal, Recommendation
from search_spaces import Scale, Space

#: A proxy dearer than this, in target runs, tells too little for its price.
DEAREST = 1 / 8
#: Cells to spread proxies over, and proxies a cell.
CELLS = (5, 4, 3)
LEAST, MOST = 5, 12


@dataclass(frozen=True)
class Ladder:
    """No random runs at the target: proxies, the minimiser of the joint posterior mean, then log-EI.

    proxy_cap: what the proxies may cost together, in target runs; never more than half of the study's limits.
    """

    proxy_cap: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.proxy_cap, bool) or not 0 <= self.proxy_cap < math.inf:
            raise ValueError(f"Ladder needs proxy_cap to be a finite number of at least 0, got {self.proxy_cap!r}.")

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            planned = plan(history.space, unclaimed(history), self.proxy_cap)
            if missing := outstanding(history, planned):
                return proxies(history, missing[:n], rng)
            if waiting(history, len(planned)):
                return ()
            if not planned and not started(history, None):
                return initial(history, n, rng)
            if sum(trial.status == "finished" for trial in history.trials) < 2:
                return initial(history, n, rng, NOTHING)
            first = count(history, "ladder/target") == 0
            return posterior.propose(history, n, rng, "ladder/target", greedy=first)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried)


def proxies(history: History, scales: tuple[Scale, ...], rng: np.random.Generator) -> tuple[Proposal, ...]:
    """The next space-filling runs at the planned scales, as far as the limits allow."""
    seed = sequence_seed(history, rng)
    first = count(history, "sobol", "ladder/proxy")
    memory = {**history.memory, "sequence": seed}
    proposals: list[Proposal] = []
    for scale, equal in groupby(scales[: history.affordable(scales)]):
        configs = sobol(history.space.at(scale), seed, first + len(proposals), len(list(equal)))
        proposals += [Proposal(config, scale, "ladder/proxy", memory=memory) for config in configs]
    return tuple(proposals)


def unclaimed(history: History) -> Limits:
    """The limits less what the user's own, enqueued runs take of them."""
    own = [trial.cost for trial in history.trials if trial.source == "enqueued"]
    n_trials, budget = history.limits.n_trials, history.limits.budget
    return Limits(
        None if n_trials is None else max(1, n_trials - len(own)),
        None if budget is None else max(1e-9, budget - sum(own)),
    )


def outstanding(history: History, planned: tuple[Scale, ...]) -> tuple[Scale, ...]:
    """The planned runs that there are none for yet, in order; a larger plan, and runs made elsewhere, are fine."""
    there = Counter(trial.scale for trial in history.trials if trial.source in ("ladder/proxy", *ELSEWHERE))
    missing = []
    for scale in planned:
        if there[scale]:
            there[scale] -= 1
        else:
            missing.append(scale)
    return tuple(missing)


def waiting(history: History, planned: int) -> bool:
    """Whether a target run would be a shot in the dark: proxies still run and fewer than half of them have ended."""
    running = sum(trial.source == "ladder/proxy" and trial.status == "running" for trial in history.trials)
    return running > planned / 2


def plan(space: Space, limits: Limits, proxy_cap: float) -> tuple[Scale, ...]:
    """The scale of each proxy, cheapest cells first; empty when proxies do not pay.

    Five cells, else four, else three, of at least five proxies each and up to twelve (more in many dimensions), as many
    as `proxy_cap` and half of the limits pay for, where a target run stays affordable. Where that does not fit, four in
    three or two; then none.
    """
    if space.fidelity is None:
        return ()
    spend = proxy_cap
    if limits.budget is not None:
        spend = min(spend, limits.budget / 2)
        if limits.budget >= 1:  # proxies are there for a target run: leave enough for one
            spend = min(spend, limits.budget - 1)
    runs = math.inf if limits.n_trials is None else limits.n_trials // 2
    cheap = [cell for cell in space.fidelity.cells() if cell != space.top and space.cost(cell) <= DEAREST]
    ranked = spanning(space, sorted(cheap, key=lambda cell: (space.cost(cell), tuple(cell.values()))))
    most = max(MOST, 2 * len(space.columns))
    fewer = [(cells, LEAST) for cells in (2, 1) if len(ranked) == cells]
    for cells, least in [*((cells, LEAST) for cells in CELLS), *fewer, (3, 4), (2, 4)]:
        if cells <= len(ranked):
            each = min(most, runs // cells, spend // sum(space.cost(cell) for cell in ranked[:cells]))
            if each >= least:
                return tuple(
                    cell for cell in sorted(ranked[:cells], key=lambda c: space.cost(c)) for _ in range(int(each))
                )
    return ()


def spanning(space: Space, cells: list[Scale]) -> list[Scale]:
    """The cells, cheapest first, but those that first show a second value of an axis before all that do not.

    Drifts along an axis can be told apart only where the axis varies.
    """
    fidelity = space.fidelity
    assert fidelity is not None
    chosen: list[Scale] = []
    for cell in cells:
        offsets = [fidelity.log2(other) - fidelity.log2(cells[0]) for other in [*chosen, cell]]
        if not chosen or np.linalg.matrix_rank(np.array(offsets)) > np.linalg.matrix_rank(np.array(offsets[:-1])):
            chosen.append(cell)
    return chosen + [cell for cell in cells if cell not in chosen]
