"""Bayesian optimization at the top scale: a few space-filling runs, then what the engine makes of the results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bo.policies import guard, recommendation
from bo.policies.design import NOTHING, designed, initial, reproducible, started
from bo.policies.engine import Engine
from bo.ports import History, Proposal, Recommendation
from search_spaces import Scale


@dataclass(frozen=True)
class Bayes(Engine):
    """Runs at other scales (enqueued, or made elsewhere) are learned from as far as `guard` trusts them.

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
            return guard.propose(history, n, rng, "bayes", self, False, self.n_init)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried, self)
