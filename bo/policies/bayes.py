"""Bayesian optimization at the top scale: a few space-filling runs, then log-EI on a Gaussian process a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bo.policies import posterior
from bo.policies.design import initial, reproducible
from bo.ports import History, Proposal, Recommendation
from search_spaces import Scale


@dataclass(frozen=True)
class Bayes:
    """Runs at other scales (enqueued, or made elsewhere) are learned from, and stand in for the space-filling start.

    n_init: space-filling runs before the model decides; by default 2 and one more for every three coordinates.
    """

    n_init: int | None = None

    def __post_init__(self) -> None:
        if self.n_init is not None and (type(self.n_init) is not int or self.n_init < 1):
            raise ValueError(f"Bayes needs n_init to be a whole number of at least 1, got {self.n_init!r}.")

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            if not started(history, self.n_init):
                return initial(history, n, rng)
            return posterior.propose(history, n, rng, "bayes")

    def recommend(self, history: History, scale: Scale, rng: np.random.Generator) -> Recommendation:
        with reproducible(rng):
            return posterior.recommend(history, scale, rng)


def started(history: History, n_init: int | None) -> bool:
    """Whether the model may decide: enough runs at the top scale, or results anywhere, and at least two results."""
    at = history.space.top
    enough = n_init or 2 + math.ceil(len(history.space.columns) / 3)
    results = sum(trial.status == "finished" for trial in history.trials)
    here = sum(trial.scale == at and trial.status in ("running", "finished", "diverged") for trial in history.trials)
    elsewhere = sum(trial.scale != at and trial.status == "finished" for trial in history.trials)
    return results >= 2 and max(here, elsewhere) >= enough
