"""Bayesian optimization at the top scale: a few space-filling runs, then what the engine makes of the results."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bo.policies import posterior, recommendation
from bo.policies.design import initial, reproducible
from bo.policies.engine import Engine
from bo.ports import History, Proposal, Recommendation
from search_spaces import Scale

NOTHING = "No two runs have finished, so there is nothing to fit a model to."


@dataclass(frozen=True)
class Bayes(Engine):
    """Runs at other scales (enqueued, or made elsewhere) are learned from, and stand in for the space-filling start.

    The settings are those of `Engine`, and n_init: space-filling runs before the model decides; by default 2 and one
    more for every three coordinates.
    """

    n_init: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_init is not None and (type(self.n_init) is not int or self.n_init < 1):
            raise ValueError(f"Bayes needs n_init to be a whole number of at least 1, got {self.n_init!r}.")

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            if not started(history, self.n_init):
                return initial(history, n, rng, NOTHING if designed(history, self.n_init) else None)
            return posterior.propose(history, n, rng, "bayes", self)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried, self)


def started(history: History, n_init: int | None) -> bool:
    """Whether the model may decide: enough runs at the top scale, or results anywhere, and at least two results."""
    return designed(history, n_init) and sum(trial.status == "finished" for trial in history.trials) >= 2


def designed(history: History, n_init: int | None) -> bool:
    """Whether there are enough runs at the top scale, or results anywhere, for the space-filling start."""
    at = history.space.top
    enough = n_init or 2 + math.ceil(len(history.space.columns) / 3)
    here = sum(trial.scale == at and trial.status in ("running", "finished", "diverged") for trial in history.trials)
    elsewhere = sum(trial.scale != at and trial.status == "finished" for trial in history.trials)
    return max(here, elsewhere) >= enough
