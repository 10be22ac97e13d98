"""Do small runs help? Learning rate and batch size of real language models, replayed from published tables.

    python -m experiments.replay.steplaw --tables DIR [--seeds 12] [--workers 2] [--targets N] [--results FILE]

DIR/steplaw has the Step Law tables (arXiv 2503.04715): losses of dense and of mixture-of-experts models over learning
rate and batch size, in cells of parameters and tokens. Targets are all cells with at least three that take fewer
operations; with --targets as many of them, spread evenly over the families, and over the costs in a family. A search is
in the box that all its cells cover, so a cell that covers too little of the target's is left out. Regret is the
noise-free, undisguised loss of an emulator of the target above its least, in percent; no published exponent is used.
See searches.py for the settings, the methods and the other options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from experiments.replay import searches
from experiments.replay.protocol import Array

Cell: TypeAlias = tuple[float, float]
"""Parameters and tokens."""

PARAMETERS = {"dense": "params_nonemb", "moe": "params_active"}
CHEAPER = 3
#: Share of the target's range that a cell has to cover on each axis: the box of them all is then half of it at least.
COVERS = 3 / 4


@dataclass(frozen=True)
class Target:
    """A cell of a table, with those that take fewer operations; cells: from the cheapest to the target."""

    table: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        params, tokens = self.cells[-1]
        return f"{self.table} {params / 1e6:.0f}M {tokens / 1e9:g}B"

    def inner(self, blackbox: Any) -> Any:
        return blackbox.StepLaw(self.name, self.table, self.cells)


def targets(blackbox: Any, most: int | None) -> Sequence[Target]:
    """In order of cost, dense models first."""
    families = {}
    for table in PARAMETERS:
        try:
            ranges = read(blackbox, table)
        except FileNotFoundError:  # a folder may have one of them
            continue
        families[table] = [
            Target(table, (*cheaper, cell))
            for place, cell in enumerate(ranges)
            if len(cheaper := below(ranges, cell, list(ranges)[:place])) >= CHEAPER
        ]
    return searches.spread(families, most)


def read(blackbox: Any, table: str) -> dict[Cell, Array]:
    """Every cell of a table, the cheapest first, and the ranges (2 x 2) of log learning rate and log batch size."""
    rows = blackbox.load_csv(f"steplaw/{table}.csv")
    places = np.log(np.array([rows["lr"], rows["batch_seqs"]]))
    found: dict[Cell, Array] = {}
    for n, d in {(float(n), float(d)) for n, d in zip(rows[PARAMETERS[table]], rows["tokens"], strict=True)}:
        here = places[:, (rows[PARAMETERS[table]] == n) & (rows["tokens"] == d)]
        found[n, d] = np.stack([here.min(1), here.max(1)], axis=1)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] * item[0][1], item[0])))


def below(ranges: Mapping[Cell, Array], target: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Those of the cells that take fewer operations and cover enough of the target's ranges."""
    low, high = ranges[target].T

    def covered(cell: Cell) -> bool:
        overlap = np.minimum(high, ranges[cell][:, 1]) - np.maximum(low, ranges[cell][:, 0])
        return bool((overlap >= COVERS * (high - low) - 1e-9).all())

    return [cell for cell in cells if cell[0] * cell[1] < target[0] * target[1] and covered(cell)]


if __name__ == "__main__":
    searches.run(__doc__, "replay_steplaw.jsonl", targets)
