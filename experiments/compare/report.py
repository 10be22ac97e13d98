"""What the comparison says so far: medians, ranks and the worst ratios, with 90% bootstrap intervals; losses included.

    python -m experiments.compare.report [--ours windtunnel] [--version V] [--seeds] [--results DIR]

Regret is noiseless and of each method's own recommendation, floored at 1e-3 of random search's median at the end of the
budget or at the noise of a measurement, whichever is larger. A median is over all seeds that a cell has; `n` says how
many, and "-" that there are none. The rank of a method on a problem is that of its median; its mean is over the
problems that all methods shown have. A ratio is of the medians over the seeds that both methods have, resampled in
pairs; the rival is the one with the largest ratio. A run that timed out or failed before a checkpoint counts as the
worst of all there. Of several versions of a method the one with the last result is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from experiments.compare.environments import default_folder
from experiments.compare.methods import METHODS
from experiments.compare.problems import PROBLEMS, SHARES
from experiments.compare.run import RESULTS, Key, load

Array: TypeAlias = npt.NDArray[np.float64]
RESAMPLES, LEVEL = 2000, 0.90
OF_RANDOM = 1e-3
FEWEST_SHARED = 3  # seeds, for a ratio
#: Problem, and the regret that its points are counted to.
REACHED = ("step-law", 0.25)


@dataclass(frozen=True)
class Cell:
    """The runs of one method on one problem: seed -> regret at each checkpoint (infinite where there is none)."""

    runs: Mapping[int, tuple[float, ...]]
    cpu: float
    """Mean CPU seconds of a proposal."""
    unfinished: int
    """Runs that timed out or failed."""
    noise: float
    """Standard deviation of a measurement, median over the seeds."""
    seen: Mapping[int, tuple[float, ...]]
    """Seed -> regret of each point; empty where it was not kept."""

    def at(self, checkpoint: int, seeds: Iterable[int] | None = None) -> Array:
        return np.array([self.runs[seed][checkpoint] for seed in (sorted(self.runs) if seeds is None else seeds)])


Cells = Mapping[tuple[str, str], Cell]
"""Method and problem."""


def gather(results: Mapping[Key, Mapping[str, Any]], versions: Mapping[str, str]) -> dict[tuple[str, str], Cell]:
    """The cells of the listed problems' present versions and of one version of each method."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for (method, version, problem, problem_version, _), run in results.items():
        listed = PROBLEMS.get(problem)
        if listed and listed.version == problem_version and versions.get(method) == version:
            grouped.setdefault((method, problem), []).append(run)
    return {key: _cell(runs) for key, runs in grouped.items()}


def _cell(runs: Sequence[Mapping[str, Any]]) -> Cell:
    padded = {run["seed"]: tuple([*run["regret"], *[np.inf] * len(SHARES)][: len(SHARES)]) for run in runs}
    seconds = [second for run in runs for second in run["cpu"]]
    unfinished = sum(run["status"] != "done" for run in runs)
    noise = float(np.median([run["noise"] for run in runs]))
    seen = {run["seed"]: tuple(run.get("seen", ())) for run in runs}
    return Cell(padded, float(np.mean(seconds)) if seconds else float("nan"), unfinished, noise, seen)


def latest(results: Mapping[Key, Mapping[str, Any]], chosen: Mapping[str, str]) -> dict[str, str]:
    """The version of each method that is shown."""
    return {**{key[0]: key[1] for key in results}, **chosen}


def floor(problem: str, cells: Cells) -> float:
    """Regret below which nothing is told apart; the noise alone while random search has not run."""
    if random := cells.get(("random", problem)):
        return max(OF_RANDOM * float(np.median(random.at(-1))), random.noise)
    return max((cell.noise for (_, name), cell in cells.items() if name == problem), default=0.0)


def floored(problem: str, method: str, checkpoint: int, cells: Cells, seeds: Iterable[int] | None = None) -> Array:
    return np.maximum(cells[method, problem].at(checkpoint, seeds), floor(problem, cells))


def interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return float(low), float(high)


def medians(values: Array, rng: np.random.Generator) -> tuple[float, float, float]:
    """The median and its bootstrap interval over seeds."""
    return float(np.median(values)), *interval(np.median(rng.choice(values, (RESAMPLES, len(values))), axis=1))


def ranks(methods: Sequence[str], problems: Sequence[str], checkpoint: int, cells: Cells) -> Array:
    """Problems x methods: 1 is the least median regret, ties share the mean of their places."""
    rows = []
    for problem in problems:
        values = np.array([np.median(floored(problem, method, checkpoint, cells)) for method in methods])
        rows.append([1 + (values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
    return np.array(rows)


def ratio(ours: str, problem: str, checkpoint: int, cells: Cells, rng: np.random.Generator) -> tuple[str, Array] | None:
    """The rival over which ours is worst on the seeds they share, and resampled ratios, the plain one first."""
    if (ours, problem) not in cells:
        return None
    found: list[tuple[float, str, Array, Array]] = []
    for method in METHODS:
        if method in (ours, "random") or (method, problem) not in cells:
            continue
        shared = sorted(set(cells[ours, problem].runs) & set(cells[method, problem].runs))
        if len(shared) >= FEWEST_SHARED:
            mine, theirs = (floored(problem, each, checkpoint, cells, shared) for each in (ours, method))
            found.append((float(over(np.median(mine), np.median(theirs))), method, mine, theirs))
    if not found:
        return None
    plain, method, mine, theirs = max(found, key=lambda row: row[0])
    rows = rng.integers(len(mine), size=(RESAMPLES, len(mine)))
    return method, np.concatenate([[plain], over(np.median(mine[rows], axis=1), np.median(theirs[rows], axis=1))])


def over(mine: npt.ArrayLike, theirs: npt.ArrayLike) -> Array:
    """Their ratio, 1 where they are equal: where neither finished both are infinite."""
    a, b = np.asarray(mine, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == b, 1.0, a / b)


def runs_to(problem: str, method: str, goal: float, cells: Cells) -> dict[int, int]:
    """Seed -> the number of the first point whose regret is at most `goal`; one more than the budget without one."""
    budget = PROBLEMS[problem].budget
    found = cells[method, problem].seen
    return {seed: next((i for i, r in enumerate(seen, 1) if r <= goal), budget + 1) for seed, seen in found.items()}


# ------------------------------------------------------------------------------------------------------------- tables


def tables(cells: Cells, versions: Mapping[str, str], ours: str) -> list[str]:
    rng = np.random.default_rng(0)
    methods = [name for name in METHODS if any(key[0] == name for key in cells)]
    problems = [name for name in PROBLEMS if any(key[1] == name for key in cells)]
    lines = ["Methods: " + ", ".join(f"{name} {versions[name]}" for name in methods), ""]
    for checkpoint, share in enumerate(SHARES):
        lines += [f"## Median floored regret after {share:.0%} of the budget", ""]
        lines += ["| problem | floor | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
        for problem in problems:
            shown = [_median(problem, method, checkpoint, cells, rng) for method in methods]
            lines.append(f"| {problem} | {floor(problem, cells):.2g} | " + " | ".join(shown) + " |")
        lines += ["", *_mean_ranks(methods, problems, checkpoint, cells, rng), ""]
    lines += [*_worst(ours, problems, cells, rng), ""]
    return [*lines, *_reached(ours, methods, cells, rng), *_costs(methods, problems, cells)]


def _median(problem: str, method: str, checkpoint: int, cells: Cells, rng: np.random.Generator) -> str:
    if (method, problem) not in cells:
        return "-"
    values = floored(problem, method, checkpoint, cells)
    middle, low, high = medians(values, rng)
    return f"{middle:.2g} ({low:.2g} to {high:.2g}; n {len(values)})"


def _mean_ranks(
    methods: Sequence[str], problems: Sequence[str], checkpoint: int, cells: Cells, rng: np.random.Generator
) -> list[str]:
    whole = [problem for problem in problems if all((method, problem) in cells for method in methods)]
    if not whole:
        return ["Mean ranks: no problem has results of all methods yet."]
    table = ranks(methods, whole, checkpoint, cells)
    drawn = table[rng.integers(len(whole), size=(RESAMPLES, len(whole)))].mean(axis=1)  # resamples x methods
    order = np.argsort(table.mean(axis=0), kind="stable")
    each = [
        f"{methods[i]} {table[:, i].mean():.2f} ({low:.2f} to {high:.2f})"
        for i in order
        for low, high in [interval(drawn[:, i])]
    ]
    return [f"Mean rank over {len(whole)} of {len(problems)} problems: {', '.join(each)}"]


def _worst(ours: str, problems: Sequence[str], cells: Cells, rng: np.random.Generator) -> list[str]:
    lines = [
        f"## {ours} over its best rival, the worst first",
        "",
        "| problem | share | rival | ratio |",
        "|---|---|---|---|",
    ]
    rows = []
    for problem in problems:
        for checkpoint, share in enumerate(SHARES):
            if found := ratio(ours, problem, checkpoint, cells, rng):
                rival, values = found
                low, high = interval(values[1:])
                beaten = " **lost**" if low > 2 else ""
                shown = f"| {problem} | {share:.0%} | {rival} | {values[0]:.2f} ({low:.2f} to {high:.2f}){beaten} |"
                rows.append((values[0], shown))
    return [*lines, *(shown for _, shown in sorted(rows, key=lambda row: -row[0]))]


def _reached(ours: str, methods: Sequence[str], cells: Cells, rng: np.random.Generator) -> list[str]:
    problem, goal = REACHED
    if (ours, problem) not in cells:
        return []
    lines = [f"## Runs to {goal:g}% on {problem}, the first points included", ""]
    lines += [f"| method | runs | {ours} | ratio | seeds |", "|---|---|---|---|---|"]
    mine = runs_to(problem, ours, goal, cells)
    for method in methods:
        if method == ours or (method, problem) not in cells:
            continue
        theirs = runs_to(problem, method, goal, cells)
        shared = sorted(set(mine) & set(theirs))
        if len(shared) < FEWEST_SHARED:
            continue
        pairs = np.array([(theirs[seed], mine[seed]) for seed in shared], dtype=float)  # seeds x 2
        drawn = pairs[rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))].mean(axis=1)
        low, high = interval(drawn[:, 0] / drawn[:, 1])
        means = pairs.mean(axis=0)
        shown = f"{means[0] / means[1]:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {method} | {means[0]:.1f} | {means[1]:.1f} | {shown} | {len(shared)} |")
    return [*lines, ""]


def _costs(methods: Sequence[str], problems: Sequence[str], cells: Cells) -> list[str]:
    lines = ["## CPU seconds of a proposal, mean; runs that timed out or failed", ""]
    lines += ["| problem | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for problem in problems:
        shown = []
        for method in methods:
            cell = cells.get((method, problem))
            shown.append(
                "-" if cell is None else f"{cell.cpu:.2g}" + (f"; {cell.unfinished}" if cell.unfinished else "")
            )
        lines.append(f"| {problem} | " + " | ".join(shown) + " |")
    return lines


def absent(environments: Path, cells: Cells, seeds: int) -> list[str]:
    """What is not there: environments, and seeds of cells."""
    lines = [
        f"{n} is absent: its environment is not built in {environments}"
        for n, e in METHODS.items()
        if not e.python(environments)
    ]
    for method in METHODS:
        short = [
            f"{problem} {seeds - have}"
            for problem in PROBLEMS
            if (have := len(cells[method, problem].runs) if (method, problem) in cells else 0) < seeds
        ]
        if short:
            lines.append(f"{method}: seeds missing of {seeds}: {', '.join(short)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default="windtunnel", choices=list(METHODS))
    parser.add_argument("--version", action="append", default=[], metavar="METHOD=V", help="instead of the latest")
    parser.add_argument("--seeds", type=int, default=20, help="how many a cell is to have")
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = load(options.results)
    versions = latest(results, dict(each.split("=", 1) for each in options.version))
    cells = gather(results, versions)
    print(
        "\n".join(
            [
                *tables(cells, versions, options.ours),
                "",
                "## Missing",
                "",
                *absent(options.environments, cells, options.seeds),
            ]
        )
    )


if __name__ == "__main__":
    main()
