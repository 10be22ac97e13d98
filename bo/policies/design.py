"""What every policy needs before there is a model: space-filling points, prices, limits, reproducibility."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bo.optimize import sobol_points
from bo.ports import History, Proposal
from search_spaces import Space
from search_spaces.parameter import Array


@contextmanager
def reproducible(rng: np.random.Generator) -> Iterator[None]:
    """One torch thread and a forked, seeded torch generator: the same input gives the same output, bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            yield
    finally:
        torch.set_num_threads(threads)


def count(history: History, *sources: str) -> int:
    """How many trials of these sources there are, whatever became of them."""
    return sum(trial.source in sources for trial in history.trials)


def sequence_seed(history: History, rng: np.random.Generator) -> int:
    """Seed of the study's Sobol sequence: drawn once, then carried in memory from proposal to proposal."""
    fresh = int(rng.integers(2**31))
    return int(history.memory.get("sequence", fresh))


def sobol(space: Space, seed: int, first: int, n: int) -> list[dict[str, Any]]:
    """Configurations number first .. first + n - 1 of a scrambled Sobol sequence through the space of one scale.

    The very first has what the space gives to start from: the reference of a mixture.
    """
    if not n:
        return []
    points = space.draw(lambda start, count: sobol_points(len(space.columns), count, seed, start), first, n)
    if first == 0:
        points[:1] = from_start(space, points[:1])
    return space.decode_all(points)


def from_start(space: Space, x: Array) -> Array:
    """x (1 x d) with what the space gives to start from, unless the constraints are against that."""
    begun = space.repair(space.start(x))
    return begun if space.satisfies(space.decode_all(begun)).all() else x


def middle(space: Space) -> dict[str, Any]:
    """The configuration in the middle of the space of one scale; where a predicate forbids it, one that is allowed."""
    d = len(space.columns)
    (config,) = space.decode_all(from_start(space, space.quantile(np.full((1, d), 0.5))))
    return config if space.satisfies([config]).all() else sobol(space, 0, 0, 1)[0]


def initial(history: History, n: int, rng: np.random.Generator, note: str | None = None) -> tuple[Proposal, ...]:
    """The next points of the study's Sobol sequence, to run at the top scale; `note` when they stand in for a model."""
    seed = sequence_seed(history, rng)
    at = history.space.top
    configs = sobol(history.space.at(at), seed, count(history, "sobol", "ladder/proxy"), history.affordable([at] * n))
    # What an earlier fit left is kept for the next one.
    memory = {**history.memory, "sequence": seed}
    return tuple(Proposal(config, at, "sobol", memory=memory, note=note) for config in configs)
