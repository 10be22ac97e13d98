"""What do sources that mislead cost, and what do faithful ones save?

    python -m experiments.replay.guard --tables DIR [--seeds 10] [--workers 2] [--kinds negated,faithful] [--report]

DIR/steplaw has the Step Law tables (arXiv 2503.04715): losses of dense and of mixture-of-experts models over learning
rate and batch size. Each cell but the cheapest of its table is a target, disguised. Before the search there are 24
space-filling runs of a source, given as runs of another study ("prior"), as the study's own proxies ("proxies"), or, if
asked for by --ways, as runs of another study of models as large as the target ("prior at the target"), or beside the
proxies that the default ladder plans for itself, each of which costs 1/70 of a target run ("planned"). There the pairs
are the same ladder without a prior ("no source") and, in the same box, the target by itself ("alone").

    faithful    the target's own surface on another level, steeper, and displaced a little: its best point is within
                0.5% at the target, and ranks in its best quarter correlate by 0.9
    useless     values that have nothing to do with the configuration
    shuffled    those of the faithful source, each at another configuration
    negated     its worst values where the best were
    displaced   its optimum three octaves away
    family      as it was measured: the cheapest cell of the other family
    cell        as it was measured: the cheapest cell of the same table

The last two are at their own scales, the others at a quarter of the target's parameters and tokens. Searches are paired
by seed with one that has no source. Printed are means over targets with 90% intervals: target runs until the regret is
at most 0.25% (one more than the cap, where a search does not get there), how many more these are than without a source,
with the bound that nine of ten resamples are below, the share of the runs that it takes without a source to the score
that it has there after 6 (at least 0.25%), and the regret of the first run. Of the planned ladder also how much more it
costs than the target by itself, proxies included.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bo.policies.bayes import Bayes
from bo.policies.design import sobol
from bo.policies.ladder import Ladder
from bo.ports import Policy
from bo.trial import Trial
from experiments.compare.problems import blackbox
from experiments.replay import protocol, steplaw
from experiments.replay.problem import Problem, search
from experiments.replay.protocol import Array, Contender, Key, Row
from experiments.replay.searches import drawn
from search_spaces import Scale

Cell: TypeAlias = tuple[str, float, float]
"""Table, parameters and tokens."""
Surface: TypeAlias = Callable[[Array], Array]
"""n x 2 octaves of learning rate and batch size -> n losses, as published."""

RUNS, SHARE, CAP = 24, 1 / 4, 15
"""Runs of a source, its parameters and tokens next to the target's, and target runs at most."""
TOLERANCE, SCORED = 0.25, 6
"""Percent that count and end a search; the runs after which the score without a source is taken."""
BEST, RANKS, FARTHEST, AWAY = 0.5, 0.9, 0.5, 3.0
"""What is faithful: percent, rank correlation; the octaves it is displaced at most, and those of a displaced one."""
NONE = Contender("none", "alone", "no source")
ADVERSARIAL = ("useless", "shuffled", "negated", "displaced", "family")
KINDS = ("faithful", *ADVERSARIAL, "cell")
MEASURED = ("family", "cell")
WAYS = ("prior", "proxies", "prior at the target", "planned")
PLANNED, PRICE = "planned", 1 / 70
"""The way with the ladder's own proxies, and what one costs in target runs."""
UNAIDED = Contender("alone", PLANNED, "target alone")


@dataclass(frozen=True)
class Ground:
    """What sources are made of: a surface, and the least and largest octaves of the box (2)."""

    loss: Surface
    low: Array
    high: Array

    @cached_property
    def grid(self) -> Array:
        """Points of the box: 3721 x 2."""
        sides = [np.linspace(low, high, 61) for low, high in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)

    @cached_property
    def on_grid(self) -> Array:
        return self.loss(self.grid)

    def is_faithful(self, source: Surface) -> bool:
        """Whether its best point is good here, and in its best quarter ranks are as here (Spearman's correlation)."""
        found = source(self.grid)
        best = 100 * (self.on_grid[found.argmin()] / self.on_grid.min() - 1)
        quarter = found <= np.quantile(found, 0.25)
        theirs, here = (values[quarter].argsort().argsort().astype(float) for values in (found, self.on_grid))
        return bool(best <= BEST and np.corrcoef(theirs, here)[0, 1] >= RANKS)

    def faithful(self, rng: np.random.Generator) -> Surface:
        """This surface, higher, steeper, and displaced as far as it stays faithful, half an octave at most."""
        least, direction, octaves = float(self.on_grid.min()), towards(rng.uniform(0, 2 * math.pi)), FARTHEST

        def small(at: Array) -> Array:
            return 1.2 * least + 1.3 * (self.loss(at) - least)

        while not self.is_faithful(found := displaced(small, octaves * direction)):
            octaves /= 2
        return found

    def displaced(self, rng: np.random.Generator) -> Surface:
        """The faithful surface with its optimum three octaves away, within the box as far as a direction has it so."""
        small, optimum = self.faithful(rng), self.grid[self.on_grid.argmin()]
        directions = [towards(angle) for angle in rng.uniform(0, 2 * math.pi, 64)]

        def outside(direction: Array) -> float:
            there = optimum + AWAY * direction
            return float((np.maximum(self.low - there, 0) + np.maximum(there - self.high, 0)).sum())

        return displaced(small, AWAY * min(directions, key=outside))

    def values(self, kind: str, at: Array, rng: np.random.Generator) -> Array:
        """Losses (n) of a source of this kind at n x 2 octaves."""
        if kind == "displaced":
            return self.displaced(rng)(at)
        honest = self.faithful(rng)(at)
        if kind == "useless":
            low, middle, high = np.quantile(honest, [0.25, 0.5, 0.75])
            return np.asarray(middle + (high - low) / 1.35 * rng.standard_normal(len(at)))
        if kind == "shuffled":
            return np.asarray(rng.permutation(honest))
        return honest.max() + honest.min() - honest if kind == "negated" else honest


def displaced(surface: Surface, by: Array) -> Surface:
    return lambda at: surface(at - by)


def towards(angle: float) -> Array:
    return np.array([math.cos(angle), math.sin(angle)])


@dataclass(frozen=True)
class Target:
    """A cell, disguised; tables are read when they are first looked at. below: the cheaper ones that it comes with."""

    tables: Path
    cell: Cell
    below: tuple[steplaw.Cell, ...] = ()
    _emulated: dict[Cell, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def problem(self) -> Problem:
        module = blackbox(self.tables)
        its = [*self.below, self.cell[1:]]
        return Problem(module.disguise(module.StepLaw(name(self.cell), self.cell[0], its), "guard"))

    @cached_property
    def ground(self) -> Ground:
        low, high = (np.log2([getattr(p, end) for p in self.problem.box.inner.params]) for end in ("low", "high"))
        return Ground(self.measured(self.cell), low, high)

    def measured(self, cell: Cell) -> Surface:
        """A cell of a table; constant beyond where it was measured."""
        if cell not in self._emulated:  # fitted again, it would differ in the tenth digit
            self._emulated[cell] = blackbox(self.tables).StepLaw(name(cell), cell[0], [cell[1:]])
        inner = self._emulated[cell]
        low, high = (np.log2([getattr(p, end) for p in inner.params]) for end in ("low", "high"))
        (emulator,) = inner.cells.values()

        def loss(at: Array) -> Array:
            within = 2 ** np.clip(at, low, high)
            return np.asarray(emulator.predict(within[:, 0], within[:, 1]))

        return loss

    def scale(self, cell: Cell) -> Scale:
        """The scale of another cell in the disguise."""
        fidelity = self.problem.space().fidelity
        assert fidelity is not None
        axes = zip(("params", "tokens"), cell[1:], self.cell[1:], strict=True)
        return fidelity.scale({axis: fidelity.target[axis] * its / here for axis, its, here in axes}, beyond=True)

    def octaves(self, configs: Sequence[Mapping[str, Any]]) -> Array:
        """n x 2, undisguised."""
        opened = [self.problem.box._open(config) for config in configs]
        return np.log2([[config[p.name] for p in self.problem.box.inner.params] for config in opened])


def name(cell: Cell) -> str:
    return f"{cell[0]} {cell[1] / 1e6:.0f}M {cell[2] / 1e9:g}B"


def cells(tables: Path) -> dict[str, list[Cell]]:
    """The cells of each table, cheapest first."""
    found = {}
    for table, column in steplaw.PARAMETERS.items():
        rows = blackbox(tables).load_csv(f"steplaw/{table}.csv")
        known = {(table, float(n), float(d)) for n, d in zip(rows[column], rows["tokens"], strict=True)}
        found[table] = sorted(known, key=lambda cell: (cell[1] * cell[2], cell))
    return found


def source_cell(target: Target, kind: str) -> Cell:
    """Where a source is said to have run."""
    table, params, tokens = target.cell
    if kind not in MEASURED:
        return table, params * SHARE, tokens * SHARE
    known = cells(target.tables)
    return next(found[0] for other, found in known.items() if (other == table) == (kind == "cell"))


def source(target: Target, kind: str, way: str, luck: int) -> list[Trial]:
    """Runs of a source; those of all kinds and ways are at the same configurations."""
    rng, box, space = np.random.default_rng(luck), target.problem.box, target.problem.space()
    configs = sobol(space, int(rng.integers(2**31)), 0, RUNS)
    noise = box.inner.noise_sd * rng.standard_normal(RUNS)
    at, cell = target.octaves(configs), source_cell(target, kind)
    losses = target.measured(cell)(at) if kind in MEASURED else target.ground.values(kind, at, rng)
    shown = box.a * (losses + noise) + box.b
    scale = space.top if way == "prior at the target" else target.scale(cell)
    own = way == "proxies"
    return [
        Trial(
            id=i,
            config=config,
            scale=scale,
            seed=0,
            source="added" if own else "prior",
            cost=space.cost(scale) if own else 0.0,
            status="finished",
            metrics={"loss": loss},
            study=None if own else "elsewhere",
        )
        for i, (config, loss) in enumerate(zip(configs, shown.tolist(), strict=True))
    ]


# ------------------------------------------------------------------------------------------------------------ searches


@cache
def target_of(tables: Path, cell: Cell, planned: bool = False) -> Target:
    """A target, with the cheaper cells of its table that cover it where proxies are planned."""
    if not planned:
        return Target(tables, cell)
    ranges = steplaw.read(blackbox(tables), cell[0])
    return Target(tables, cell, tuple(steplaw.below(ranges, cell[1:], list(ranges))))


@dataclass(frozen=True)
class Search:
    """A search at a target after the runs of a source; one of kind "none" or "alone" has none and starts as usual."""

    tables: Path
    cell: Cell
    kind: str
    way: str
    seed: int

    @property
    def key(self) -> Key:
        return Key(name(self.cell), self.kind, self.way, self.seed)

    def __call__(self) -> Row:
        planned = self.way == PLANNED
        target, luck = target_of(self.tables, self.cell, planned), drawn(self.key)
        given = source(target, self.kind, self.way, luck) if self.kind in KINDS else []
        found = search(
            target.problem, target.problem.space(PRICE if planned else None), self.policy, given, CAP, luck, TOLERANCE
        )
        count, cost = len(given), sum(trial.cost for trial in given)
        if planned:  # a finished study costs nothing, its own proxies do
            count, cost = found.proxies - count, found.cost
        return Row(name(self.cell), self.kind, self.way, self.seed, found.regrets, count, cost, found.seconds)

    @property
    def policy(self) -> Policy:
        if self.way == PLANNED:
            return Bayes() if self.kind == UNAIDED.method else Ladder()
        return Bayes() if self.kind == NONE.method else Ladder(proxy_cap=0)  # no more proxies than are given


def searches(tables: Path, kinds: Sequence[str], ways: Sequence[str], seeds: int) -> list[Search]:
    """Seed after seed, so that what is there at any time is balanced."""
    targets = [cell for table in cells(tables).values() for cell in table[1:]]
    pairs = [(NONE.method, NONE.setting)] if set(ways) - {PLANNED} else []
    pairs += [(without.method, way) for way in ways if way == PLANNED for without in (nothing(way), UNAIDED)]
    pairs += [(kind, way) for way in ways for kind in kinds]
    return [Search(tables, cell, *pair, seed) for seed in range(seeds) for cell in targets for pair in pairs]


# -------------------------------------------------------------------------------------------------------------- report


def nothing(way: str) -> Contender:
    """What the searches of a way are paired with."""
    return Contender(NONE.method, PLANNED, NONE.label) if way == PLANNED else NONE


def scores(rows: Mapping[Key, Row], without: Contender = NONE) -> dict[str, float]:
    """Of each problem the median regret without a source after some runs, at least the tolerance."""
    found: dict[str, list[float]] = {}
    for row in rows.values():
        if (row.method, row.setting) == (without.method, without.setting):
            found.setdefault(row.problem, []).append(row.regrets[:SCORED][-1])
    return {problem: max(TOLERANCE, float(np.median(regrets))) for problem, regrets in found.items()}


def until(score: Mapping[str, float]) -> Callable[[Row], float]:
    """Target runs to the score of a row's problem."""
    return lambda row: row.runs(score[row.problem], CAP)


def report(rows: Mapping[Key, Row], kinds: Sequence[str] = KINDS, ways: Sequence[str] = WAYS) -> str:
    head = (
        f"{'':13s}{f'runs to {TOLERANCE}%':22s}{'P90':>4s} {'cap':>4s}  {'more':25s}{'bound':>6s}  {'to the score':22s}"
    )
    lines = []
    for way in ways:
        without = nothing(way)
        score, others = scores(rows, without), [UNAIDED] if way == PLANNED else []
        lines += [f"{way}", f"{head}{'first run, %':26s}{'cost':>5s}  n"]
        for contender in (*others, without, *(Contender(kind, way) for kind in kinds)):
            pair = [contender, without]
            runs = protocol.paired(rows, pair, lambda row: row.runs(TOLERANCE, CAP))
            if not runs:
                continue
            reached = protocol.paired(rows, pair, until(score))
            first = protocol.paired(rows, [contender], lambda row: row.regrets[0])
            cost = protocol.paired(rows, [contender], lambda row: row.cost)
            price = np.mean(np.concatenate(list(cost.values())))
            means, searched = protocol.resampled(runs), [table[:, 0] for table in runs.values()]
            more = protocol.interval(runs, protocol.difference(0, 1), means)
            bound = float(np.quantile(protocol.difference(0, 1)(means), protocol.LEVEL))
            dearer = (
                protocol.paired(rows, [contender, UNAIDED], lambda row: row.total(TOLERANCE, CAP)) if others else {}
            )
            paid = protocol.interval(dearer, protocol.difference(0, 1)) if dearer else None
            lines.append(
                f"{contender!s:13s}{protocol.interval(runs, protocol.column(0), means)!s:22s}"
                f"{protocol.quantile(searched, 0.9):4.0f} {np.mean(np.concatenate(searched) > CAP):4.0%}  {more!s:25s}"
                f"{bound:6.2f}  {protocol.interval(reached, protocol.ratio(0, 1))!s:22s}"
                f"{protocol.interval(first, protocol.column(0))!s:26s}{price:5.2f}"
                f"  {len(runs)} x {np.mean([len(each) for each in searched]):.3g}"
                + (f"  {paid} more than alone, proxies included" if paid and contender != UNAIDED else "")
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "replay_guard.jsonl")
    parser.add_argument("--seeds", type=int, default=10, help="of each target")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ways", default=",".join(WAYS[:2]))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="make nothing and print what there is")
    args = parser.parse_args()
    kinds, ways = args.kinds.split(","), args.ways.split(",")
    if unknown := [word for word in (*kinds, *ways) if word not in (*KINDS, *WAYS)]:
        parser.error(f"There is no {unknown[0]!r}; there are {', '.join((*KINDS, *WAYS))}.")
    rows = protocol.load(args.results)
    if not args.report:
        for row in protocol.make(
            searches(args.tables.resolve(), kinds, ways, args.seeds), args.results, rows, args.workers
        ):
            rows[row.key] = row
            last = f"{len(row.regrets)} runs, {row.regrets[-1]:.3f}%, {row.seconds:.1f} s"
            print(f"{row.problem}, {row.method}, {row.setting}, seed {row.seed}: {last}", flush=True)
    print(report(rows, kinds, ways))


if __name__ == "__main__":
    main()
