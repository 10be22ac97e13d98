"""Space-filling search: the points of one scrambled Sobol sequence, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bo.objective import Objective
from bo.policies import recommendation
from bo.policies.design import reproducible, sequence_seed, sobol
from bo.ports import History, Proposal, Recommendation
from search_spaces import Scale, Space


@dataclass(frozen=True)
class Sobol:
    """The i-th Sobol trial depends on the study's seed and on how many there were before, on nothing else.

    scale: where the trials run: "target" (the largest scale that is run), or a value or label for every axis.
    """

    scale: str | Mapping[str, float | str] = "target"
    quick: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale != "target" and not isinstance(self.scale, Mapping):
            raise ValueError(f'Sobol needs scale="target" or a dictionary axis -> value, got scale={self.scale!r}.')

    def check(self, space: Space, objective: Objective) -> None:
        """ValueError where `scale` is none of the space."""
        self._at(space)

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        at = self._at(history.space)
        with reproducible(rng):
            seed = sequence_seed(history, rng)
            configs = sobol(history.space.at(at), seed, history.count("sobol"), history.affordable([at] * n))
        return tuple(Proposal(config, at, "sobol", memory={"sequence": seed}) for config in configs)

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried)

    def _at(self, space: Space) -> Scale:
        if isinstance(self.scale, str):
            return space.top
        if space.fidelity is None:
            raise ValueError(f"Sobol got scale={dict(self.scale)}, but the space has no fidelity; leave scale away.")
        return space.fidelity.scale(self.scale)
