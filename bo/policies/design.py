"""What every policy needs before there is a model: space-filling points, prices, limits, reproducibility."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from bo.objective import Single
from bo.ports import History, Proposal
from bo.quasirandom import sequence_points
from bo.trial import Trial
from search_spaces import Space
from search_spaces.parameter import Array

NOTHING = "No two runs have finished, so there is nothing to fit a model to."
#: Source of a run at the target that was chosen by runs elsewhere before these were known to foretell it.
SHOT = "transfer"
TURNS = threading.RLock()


@cache
def libraries() -> ThreadpoolController:
    """The linear algebra of numpy and scipy."""
    return ThreadpoolController()


@contextmanager
def reproducible(rng: np.random.Generator) -> Iterator[None]:
    """One thread and a forked, seeded torch generator: the same input gives the same output, bit for bit.

    Many small matrices take many threads much longer than one, where other work goes on beside them. What is set here
    is the whole process's, so a study that is asked and one that recommends in another thread take turns.
    """
    with TURNS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with libraries().limit(limits=1), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(rng.integers(2**31)))
                yield
        finally:
            torch.set_num_threads(threads)


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
    points = space.draw(lambda start, count: sequence_points(len(space.columns), count, seed, start), first, n)
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
    configs = sobol(history.space.at(at), seed, history.count("sobol", "ladder/proxy"), history.affordable([at] * n))
    # What an earlier fit left is kept for the next one.
    memory = {**history.memory, "sequence": seed}
    return tuple(Proposal(config, at, "sobol", memory=memory, note=note) for config in configs)


def started(history: History, n_init: int | None) -> bool:
    """Whether the model may decide: enough runs at the top scale, or results anywhere, and at least two results."""
    return designed(history, n_init) and sum(trial.status == "finished" for trial in history.trials) >= 2


def designed(history: History, n_init: int | None) -> bool:
    """Whether there are enough runs at the top scale, or results anywhere, for the space-filling start.

    A run that untried sources chose is none of it: where they mislead, it lies in a corner.
    """
    at = history.space.top
    enough = n_init or 2 + math.ceil(len(history.space.columns) / 3)
    counted = [trial for trial in history.own if trial.scale == at and trial.source != SHOT]
    here = sum(trial.status in ("running", "finished", "diverged") for trial in counted)
    elsewhere = [trial for trial in history.trials if trial.scale != at or trial.study is not None]
    return max(here, sum(trial.status == "finished" for trial in elsewhere)) >= enough


def good(trial: Trial, objective: Single) -> bool:
    """Whether a run has a finite result within the limits of the objective."""
    if trial.status != "finished" or not trial.metrics:
        return False
    return math.isfinite(objective.value(trial.metrics)) and objective.feasible(trial.metrics)
