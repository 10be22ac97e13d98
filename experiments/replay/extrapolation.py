"""Do the intervals of a recommendation hold the truth, at a scale where nothing ran?

    python -m experiments.replay.extrapolation --tables DIR [--seeds 24] [--draws 300] [--report]

Space-filling proxies in some cells ("12 in 5": twelve in each of five), then `recommend` at a dearer cell, `steps`
above the dearest of them in the order of cost. The family "steplaw" has the disguised emulators of DIR/steplaw (arXiv
2503.04715): every target with at least three cheaper cells, every number of steps that leaves enough cells. The others
are synthetic, a problem a draw: "law", a bowl whose optimum moves by drawn exponents over a drawn loss law of
parameters and tokens; "bent", the same with an optimum in each cell a fifth of an octave off; "quiet" and "loud", "law"
with runs without noise and with three times the noise.

Counted, of 90% intervals:

    metric      that it holds the noise-free loss of the recommended configuration at that cell
    strict      of each coordinate, that it holds the place of the optimum, to half a step of a grid of 161
    good        of each coordinate, that with some value in it, the others free, the loss is within 0.05% of the least:
                optima of emulators are flat, and known no better than that (a run's noise is 0.06%)

Printed are means over targets with 90% bootstrap intervals (over targets, then seeds; of the synthetic families over
draws), median widths, of the metric in percent and of coordinates in octaves, and how often a recommendation was
called a guess, because the cell lies beyond all that ran.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from bo import Minimize
from bo.policies.design import sobol
from bo.policies.ladder import Ladder
from bo.ports import History
from experiments.compare.problems import blackbox
from experiments.replay import protocol, steplaw
from experiments.replay.problem import Problem
from experiments.replay.protocol import Array
from experiments.replay.searches import drawn

RESULTS = Path(__file__).parents[1] / "results" / "replay_extrapolation.jsonl"
SETTINGS = {"12 in 5": (12, 5), "8 in 4": (8, 4), "6 in 3": (6, 3)}
#: Points of a coordinate at which the truth is looked at, and the share of the loss within which it is flat.
GRID, FLAT = 161, 0.0005
SECRETS = ("first", "second", "third")
#: Of the synthetic families: noise of a run as a share of the loss, and octaves that an optimum is off its law.
SYNTHETIC = {"law": (0.001, 0.0), "bent": (0.001, 0.2), "quiet": (0.0, 0.0), "loud": (0.003, 0.0)}
Truth: TypeAlias = Callable[[Array], Array]
"""n x 2 points of the unit square of the box -> n losses of the cell that is recommended for, as they are shown."""


@dataclass(frozen=True)
class Said:
    """What was said of a cell and what is so. octaves: between its cost and that of the dearest that ran.

    low, high, mean, value: the metric's interval and what the recommended configuration has; least: what the best one
    has; size: that before the disguise, in units of what is shown. lows, highs, best, ranges: of each coordinate, its
    interval and the optimum in [0, 1], and octaves of the whole range. good: whether something in the interval of each
    is as good as the best. edge: whether the optimum lies at an end of the range.
    """

    family: str
    problem: str
    setting: str
    steps: int
    seed: int
    octaves: float
    low: float
    high: float
    mean: float
    value: float
    least: float
    size: float
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    best: tuple[float, ...]
    ranges: tuple[float, ...]
    good: tuple[bool, ...]
    edge: tuple[bool, ...]
    guess: bool
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.family, self.problem, self.setting, self.steps, self.seed

    @property
    def held(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def strict(self) -> tuple[bool, ...]:
        half = 0.5 / (GRID - 1)
        return tuple(a - half <= x <= b + half for a, x, b in zip(self.lows, self.best, self.highs, strict=True))


def say(problem: Sized | Known, truth: Truth, ran: Sequence[int], each: int, luck: int) -> dict[str, Any]:
    """What is recommended for the last cell of a problem after `each` proxies in some others, next to the truth."""
    begun, space = time.process_time(), problem.space()
    scales = [problem.cells[i] for i in ran for _ in range(each)]
    configs = sobol(space, luck, 0, len(scales))
    told = [
        problem.run(i, config, scale, "added", luck, space.cost(scale))
        for i, (config, scale) in enumerate(zip(configs, scales, strict=True))
    ]
    history = History(space, Minimize("loss"), tuple(told), seen=len(told), memory={"sequence": luck})
    found = Ladder(proxy_cap=0).recommend(history, space.top, np.random.default_rng(luck))
    seconds = time.process_time() - begun
    ends = [(each.name, each.low, each.high) for each in problem.box.params]

    def unit(name: str, value: float) -> float:
        low, high = next((low, high) for each, low, high in ends if each == name)
        return math.log(value / low) / math.log(high / low)

    point = {name: (float(found.config[name]),) * 2 for name, _, _ in ends}
    intervals = [[unit(name, end) for end in {**point, **found.intervals}[name]] for name, _, _ in ends]
    side = np.linspace(0, 1, GRID)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    losses = truth(grid.reshape(-1, 2)).reshape(GRID, GRID)
    best = np.array(np.unravel_index(losses.argmin(), losses.shape))
    flat = losses <= losses.min() + FLAT * problem.size
    good = []
    for j, (low, high) in enumerate(intervals):
        half = 0.5 / (GRID - 1)
        good.append(bool((flat.any(axis=1 - j) & (low - half <= side) & (side <= high + half)).any()))
    at = np.array([[unit(name, found.config[name]) for name, _, _ in ends]])
    return {
        "octaves": math.log2(1 / max(space.cost(scale) for scale in scales)),
        "low": found.low,
        "high": found.high,
        "mean": found.mean,
        "value": float(truth(at)[0]),
        "least": float(losses.min()),
        "size": problem.size,
        "lows": tuple(low for low, _ in intervals),
        "highs": tuple(high for _, high in intervals),
        "best": tuple(side[best].tolist()),
        "ranges": tuple(math.log2(high / low) for _, low, high in ends),
        "good": tuple(good),
        "edge": tuple(bool(i in (0, GRID - 1)) for i in best),
        "guess": found.guess is not None,
        "seconds": seconds,
    }


# ----------------------------------------------------------------------------------------------------------- Step Law


@cache
def disguised(tables: Path, target: steplaw.Target, secret: str) -> Sized:
    module = blackbox(tables)
    return Sized(module.disguise(target.inner(module), secret))


@dataclass(frozen=True)
class Sized(Problem):
    """A problem and what its losses are measured in: those of the target before the disguise."""

    @cached_property
    def size(self) -> float:
        return float(self.box.a) * self.least


def emulated(problem: Problem) -> Truth:
    box = problem.box
    cell = box.inner.cells[box.inner.fidelities[-1].name]
    low, high = (np.log([getattr(p, end) for p in box.inner.params]) for end in ("low", "high"))

    def truth(at: Array) -> Array:
        lr, batch = np.exp(low + at * (high - low)).T
        return np.asarray(box.a * cell.predict(lr, batch) + box.b)

    return truth


# --------------------------------------------------------------------------------------------------- synthetic problems


@dataclass(frozen=True)
class Drawn:
    """A problem with a known drift, as `Problem` takes it: losses of two numbers over parameters and tokens.

    In octaves x of the two numbers and s of the two axes from the target the loss is

        (E + A 2^(-alpha s_1) + B 2^(-beta s_2)) (1 + h(R (x - x* - W s - off))),
        h(u) = sum_j k_j (cosh(r_j u_j) - 1) / r_j^2,

    at most twice the least, with everything drawn: exponents W ~ N(0, 0.35^2), as steep as real ones, so that optima
    drift by up to a few octaves; R a turn by at most 30 degrees.
    """

    seed: int
    noise: float
    bent: float

    @cached_property
    def drawn(self) -> SimpleNamespace:
        rng = np.random.default_rng([self.seed, 4])
        params = 2.0 ** np.sort(rng.choice(np.arange(-4, 1), 3, replace=False))
        params[-1] = 1.0
        tokens = 2.0 ** np.array([-4.0, -2.5, -1.0, 0.0])
        pairs = [(n, d) for n in params for d in tokens if n * d < 1]
        kept = [pairs[i] for i in rng.choice(len(pairs), 7, replace=False)]
        cells = [*sorted(kept, key=lambda cell: (cell[0] * cell[1], cell)), (1.0, 1.0)]
        turn = rng.uniform(-math.pi / 6, math.pi / 6)
        return SimpleNamespace(
            cells=cells,
            ranges=rng.uniform(5, 9, 2),
            best=rng.uniform(0.25, 0.75, 2),
            drift=0.35 * rng.standard_normal((2, 2)),
            curve=2 * 0.0025 / rng.uniform(0.5, 1.5, 2) ** 2,  # a quarter of a percent after so many octaves
            rate=rng.uniform(0.2, 0.6, 2),
            turn=np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]),
            off=self.bent * rng.standard_normal((len(cells), 2)),
            floor=rng.uniform(0.5, 2.0),
            factors=rng.uniform(0.2, 1.0, 2),
            exponents=rng.uniform(0.15, 0.5, 2),
        )

    @property
    def fidelities(self) -> list[Any]:
        cells = enumerate(self.drawn.cells)
        return [SimpleNamespace(name=f"f{i}", params=1e8 * n, tokens=1e9 * d) for i, (n, d) in cells]

    @property
    def params(self) -> list[Any]:
        ranges = enumerate(self.drawn.ranges)
        return [SimpleNamespace(name=f"x{i}", type="log", low=1.0, high=float(2**octaves)) for i, octaves in ranges]

    def losses(self, at: Array, cell: int) -> Array:
        """n x 2 points of the unit square -> n."""
        have = self.drawn
        s = np.log2(have.cells[cell])
        level = have.floor + (have.factors * 2 ** (-have.exponents * s)).sum()
        off = (at - have.best) * have.ranges - have.drift @ s - have.off[cell]
        bowl = have.curve * (np.cosh(have.rate * (off @ have.turn.T)) - 1) / have.rate**2
        return np.asarray(level * (1 + np.minimum(bowl.sum(axis=-1), 1.0)))

    def evaluate(self, config: Mapping[str, float], fidelity: Any, seed: int | None = None) -> float:
        at = np.log2([config[each.name] for each in self.params]) / self.drawn.ranges
        cell = int(fidelity.name[1:])
        loss = float(self.losses(at[None], cell)[0])
        if seed is None or not self.noise:
            return loss
        # Of a run, not of a cell: as many numbers as there are runs.
        bits = np.frombuffer(at.tobytes(), dtype=np.uint32)
        return loss * (1 + self.noise * float(np.random.default_rng([seed, cell, *bits]).standard_normal()))


@dataclass(frozen=True)
class Known(Problem):
    """A drawn problem: nothing is disguised."""

    @cached_property
    def size(self) -> float:
        side = np.linspace(0, 1, GRID)
        grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
        return float(self.box.losses(grid, len(self.box.fidelities) - 1).min())


# ------------------------------------------------------------------------------------------------------ what is made


@dataclass(frozen=True)
class Case:
    """A recommendation to be made. target: of Step Law, else None. steps: above the dearest proxies."""

    tables: Path
    family: str
    target: steplaw.Target | None
    setting: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return self.target.name if self.target is not None else f"draw {self.seed}"

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.family, self.name, self.setting, self.steps, self.seed

    def __call__(self) -> Said:
        each, cells = SETTINGS[self.setting]
        luck = drawn(protocol.Key(self.name, "", "", self.seed))
        if self.target is not None:
            problem: Sized | Known = disguised(self.tables, self.target, SECRETS[self.seed % len(SECRETS)])
            truth = emulated(problem)
        else:
            box = Drawn(self.seed, *SYNTHETIC[self.family])
            problem, truth = Known(box), partial(box.losses, cell=len(box.fidelities) - 1)
        last = len(problem.cells) - 1 - self.steps
        found = say(problem, truth, range(last - cells + 1, last + 1), each, luck)
        return Said(self.family, self.name, self.setting, self.steps, self.seed, **found)


def cases(tables: Path, families: Sequence[str], seeds: int, draws: int) -> list[Case]:
    """Seed after seed, so that what is there at any time is balanced."""
    found: list[Case] = []
    if "steplaw" in families:
        for seed in range(seeds):
            for target in steplaw.targets(blackbox(tables), None):
                for setting, (_, cells) in SETTINGS.items():
                    found += [
                        Case(tables, "steplaw", target, setting, steps, seed)
                        for steps in range(1, len(target.cells) - cells + 1)
                    ]
    for seed in range(draws):  # settings and steps in turn
        names = list(SETTINGS)
        for family in SYNTHETIC:
            if family in families:
                found.append(Case(tables, family, None, names[seed % 3], 1 + seed // 3 % 3, seed))
    return found


def load(file: Path) -> dict[tuple[str, str, str, int, int], Said]:
    """A line that a kill cut short is none."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            given = json.loads(line)
        except json.JSONDecodeError:
            continue
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        said = Said(**values)
        rows[said.key] = said
    return rows


def append(file: Path, said: Said) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    short = {each.name: _short(getattr(said, each.name)) for each in fields(said)}
    with file.open("a", encoding="utf-8") as end:
        end.write(("\n" if torn else "") + json.dumps(short, separators=(",", ":")) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_short(each) for each in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------------- report


def report(rows: Sequence[Said]) -> str:
    head = (
        f"  {'':22s}{'metric':21s}{'strict':21s}{'good':21s}{'metric wide':>11s}  {'octaves wide':15s}{'guess':>6s}  n"
    )
    lines = []
    for family in dict.fromkeys(each.family for each in rows):
        ours = [each for each in rows if each.family == family]
        lines += [family, head, line("all", ours)]
        lines += [line(setting, [each for each in ours if each.setting == setting]) for setting in SETTINGS]
        for low, high in ((0, 1), (1, 2), (2, 4), (4, math.inf)):
            words = f"{low} to {high} octaves" if high < math.inf else f"more than {low} octaves"
            lines.append(line(words, [each for each in ours if low < each.octaves <= high]))
        lines.append(line("called a guess", [each for each in ours if each.guess]))
        lines.append(line("called none", [each for each in ours if not each.guess]))
        lines.append(line("optimum at an end", [each for each in ours if any(each.edge)]))
        lines.append(line("optimum inside", [each for each in ours if not any(each.edge)]))
        if len({each.problem for each in ours}) < len(ours) / 10:
            lines += [
                line(name, [each for each in ours if each.problem == name])
                for name in dict.fromkeys(each.problem for each in ours)
            ]
        lines.append("")
    return "\n".join(filter(None, lines))


def line(words: str, rows: Sequence[Said]) -> str:
    """Coverage, coordinates by turns; widths are medians, of each coordinate."""
    if not rows:
        return ""
    strict, good = ([float(np.mean(getattr(each, name))) for each in rows] for name in ("strict", "good"))
    held = [cover(rows, values) for values in ([float(each.held) for each in rows], strict, good)]
    wide = 100 * float(np.median([(each.high - each.low) / each.size for each in rows]))
    octaves = np.median([(np.array(r.highs) - r.lows) * r.ranges for r in rows], axis=0)
    guess = float(np.mean([each.guess for each in rows]))
    targets = len({each.problem for each in rows})
    return (
        f"  {words:22s}{''.join(f'{each:21s}' for each in held)}{wide:10.2f}%  "
        f"{' '.join(f'{each:.2f}' for each in octaves):15s}{guess:6.0%}  {targets} x {len(rows) / targets:.3g}"
    )


def cover(rows: Sequence[Said], values: Sequence[float]) -> str:
    """The mean over targets of means over their rows, with its interval."""
    groups: dict[str, list[float]] = {}
    for each, value in zip(rows, values, strict=True):
        groups.setdefault(each.problem, []).append(value)
    found = protocol.interval({name: np.array(each)[:, None] for name, each in groups.items()}, protocol.column(0))
    return f"{found.value:.1%} ({found.low:.0%}-{found.high:.0%})"


def main() -> None:
    families = ("steplaw", *SYNTHETIC)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--families", default=",".join(families))
    parser.add_argument("--seeds", type=int, default=24, help="of each target of Step Law")
    parser.add_argument("--draws", type=int, default=300, help="of each synthetic family")
    parser.add_argument("--report", action="store_true", help="make nothing and print what there is")
    args = parser.parse_args()
    asked = args.families.split(",")
    if unknown := [name for name in asked if name not in families]:
        parser.error(f"There is no family {unknown[0]!r}; there are {', '.join(families)}.")
    rows = load(args.results)
    if not args.report:
        protocol.single()
        for case in cases(args.tables.resolve(), asked, args.seeds, args.draws):
            if case.key not in rows:
                rows[case.key] = case()
                append(args.results, rows[case.key])
    print(report([each for each in rows.values() if each.family in asked]))


if __name__ == "__main__":
    main()
