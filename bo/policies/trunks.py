"""Proxies as trunks: one run for each configuration, and short decays from its checkpoints in place of shorter runs.

Up to the end of its stable phase a run is the beginning of every longer one, so that a run of D tokens gives the result
of D / 2 tokens for the price of a decay (Hu et al. 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bo.ports import Proposal
from bo.trial import Trial
from search_spaces import Curve, Scale, Space, stable_until

#: What part of a branch's stable phase the longer warm-up of its trunk may take. At a quarter the results of small
#: language models are off by half of what seeds scatter, at a half by all of it (`experiments.trunk_and_branch`).
WARMING = 0.3

Config = Mapping[str, Any]
Run = tuple[Config, Scale, tuple[Scale, ...]]
"""A config, the scale it runs at, and the scales it branches to."""


def runs(space: Space, cells: Sequence[Scale], axis: str | None, draw: Callable[[Scale, int], Config]) -> Iterator[Run]:
    """Runs that give one result in each of the cells: in the order of these, the longest of a line before the others.

    axis: along which a run that can be is a trunk; None where every result takes a run of its own.
    draw: the configuration of run number i, at a scale.
    """
    left, number = list(cells), 0
    while left:
        at = left[0] if axis is None else max(line(left, left[0], axis), key=lambda cell: cell[axis])
        config = draw(at, number)
        wanted = () if axis is None else branches(space, config, at, axis, left)
        for cell in (at, *wanted):
            left.remove(cell)
        number += 1
        yield config, at, wanted


def branches(space: Space, config: Config, scale: Scale, axis: str, cells: Iterable[Scale]) -> tuple[Scale, ...]:
    """Those of the cells, each once and shortest first, that a run of `config` at a scale can branch to.

    They are shorter along the axis and like it on all others, and the space allows the configuration there.
    """
    held = stable_until(config)
    if held is None:
        return ()
    warm = max(value.warmup for value in config.values() if isinstance(value, Curve)) * scale[axis]
    shorter = {cell for cell in line(cells, scale, axis) if cell[axis] < scale[axis]}
    fits = [cell for cell in shorter if warm <= WARMING * held * cell[axis] and space.at(cell).allows(config)]
    return tuple(sorted(fits, key=lambda cell: cell[axis]))


def line(cells: Iterable[Scale], scale: Scale, axis: str) -> list[Scale]:
    """The cells that differ from a scale along the axis alone, or not at all."""
    return [cell for cell in cells if all(cell[other] == scale[other] for other in scale if other != axis)]


def price(space: Space, cells: Sequence[Scale], axis: str | None, configs: Sequence[Config]) -> tuple[float, float]:
    """(cost in runs at the top scale, number of runs) of one result in each of the cells: means over configs.

    axis: as in `runs`; where it is None, no configs are needed.
    """
    if axis is None:
        return sum(map(space.cost, cells)), float(len(cells))
    made = [run for config in configs for run in runs(space, cells, axis, partial(_given, config))]
    cost = sum(Proposal(config, at, "", wanted=wanted).cost(space) for config, at, wanted in made)
    return cost / len(configs), len(made) / len(configs)


def _given(config: Config, at: Scale, number: int) -> Config:
    return config


def covered(trial: Trial) -> tuple[Scale, ...]:
    """The cells that a run serves: its own, those it has branched to and, while it runs, those it is asked to."""
    expected = trial.awaited if trial.status == "running" else ()
    return (trial.scale, *(branch.scale for branch in trial.branches), *expected)
