"""What scales save on functions made for it: criteria over (config, scale) next to LogEI at the target alone.

    python -m experiments.multi_fidelity [--problems hartmann,branin] [--methods ...] [--seeds 20]    # what is missing
    python -m experiments.multi_fidelity --report

BoTorch's AugmentedHartmann (6 + 1) and AugmentedBranin (2 + 1) without noise; the scale s is one of RUNGS, and a run
there costs 0.05 + s. A search is scored by what it has spent when the configuration that it recommends is first within
GOAL of the best at s = 1. That is looked at after every run at the target alone and after every other one over
scales, once some run was within NEAR of the best there. Rivals are also scored by the best run at the target so far,
and the earlier of the two counts; over scales, where the recommended one need never have run, the second number adds
the target run that confirms it. A line of results/multi_fidelity.jsonl is a search; none is made twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bo import Minimize
from bo.policies.bayes import Bayes
from bo.policies.multi_fidelity import MultiFidelity
from bo.ports import History, Limits, Policy
from bo.trial import Trial
from experiments.compare.methods import engine_version
from experiments.compare.report import medians
from search_spaces import Fidelity, Real, Scale, Space

RUNGS = (0.05, 0.1, 0.25, 0.5, 1.0)
NEAR = 3.0  # goals
RESULTS = Path(__file__).parent / "results" / "multi_fidelity.jsonl"


def price(scale: Scale) -> float:
    return 0.05 + scale["s"]


TARGET = 1.05  # what a run at s = 1 costs


@dataclass(frozen=True)
class Problem:
    """name: of BoTorch's class. low, high: of each coordinate but s. goal: the regret to reach. most: cost to spend."""

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    best: float
    goal: float
    most: float

    @property
    def space(self) -> Space:
        ranges = zip(self.low, self.high, strict=True)
        return Space(
            fidelity=Fidelity(s=RUNGS, target={"s": 1.0}, cost=price),
            **{f"x{i}": Real(low, high) for i, (low, high) in enumerate(ranges)},
        )

    def function(self) -> Callable[[Mapping[str, Any], float], float]:
        """The loss of a configuration at a scale."""
        import torch
        from botorch import test_functions

        made = getattr(test_functions, self.name)()

        def loss(config: Mapping[str, Any], s: float) -> float:
            x = [config[f"x{i}"] for i in range(len(self.low))]
            return float(made.evaluate_true(torch.tensor([[*x, s]], dtype=torch.float64)))

        return loss


PROBLEMS = {
    "hartmann": Problem("AugmentedHartmann", (0.0,) * 6, (1.0,) * 6, -3.32237, 0.1, 80 * TARGET),
    "branin": Problem("AugmentedBranin", (-5.0, 0.0), (10.0, 15.0), 0.397887, 0.1, 40 * TARGET),
}
#: Over scales, the settings of the policy; at the target alone, None for BoTorch and a policy for ours.
METHODS: dict[str, Policy | None] = {
    "log_ei": Bayes(),
    "log_ei, BoTorch": None,
    "knowledge_gradient": MultiFidelity(proxy_cap=None),
    "knowledge_gradient, 0-avoiding": MultiFidelity(proxy_cap=None, avoid_zero=True),
    "max_value_entropy": MultiFidelity("max_value_entropy", proxy_cap=None),
    "ei_cooled": MultiFidelity("ei_cooled", proxy_cap=None),
    "knowledge_gradient, linear_truncated": MultiFidelity(surrogate="linear_truncated", proxy_cap=None),
    "max_value_entropy, linear_truncated": MultiFidelity(
        "max_value_entropy", surrogate="linear_truncated", proxy_cap=None
    ),
}
RIVALS = ("log_ei", "log_ei, BoTorch")
#: What cooling counts down.
COOLED_OVER = 20.0


def search(method: str, name: str, seed: int) -> dict[str, Any]:
    """One search. steps: cost so far, s, regret at the target of what was run, and of the recommendation (or None)."""
    problem, start = PROBLEMS[name], time.process_time()
    policy = METHODS[method]
    steps = list(ours(policy, problem, seed) if policy is not None else botorch(problem, seed))
    seconds = (time.process_time() - start) / len(steps)
    return {
        "method": method,
        "problem": name,
        "seed": seed,
        "version": engine_version(),
        "seconds": round(seconds, 3),
        "steps": steps,
    }


Step = tuple[float, float, float, float | None]


def ours(policy: Policy, problem: Problem, seed: int) -> Iterator[Step]:
    space, loss, spent, best = problem.space, problem.function(), 0.0, math.inf
    limits = Limits(budget=COOLED_OVER) if getattr(policy, "acquisition", "") == "ei_cooled" else Limits()
    history = History(space, Minimize("loss"), (), limits)
    across = isinstance(policy, MultiFidelity)
    while spent < problem.most:
        n = len(history.trials)
        found = policy.propose(history, 1, np.random.default_rng([seed, n]))
        if not found:
            return
        proposal = found[0]
        told = loss(proposal.config, proposal.scale["s"])
        spent += price(proposal.scale)
        regret = loss(proposal.config, 1.0) - problem.best
        best = min(best, regret)
        trial = Trial(
            *(n, proposal.config, proposal.scale, n, proposal.source, space.cost(proposal.scale), "finished"),
            metrics={"loss": told},
        )
        history = replace(history, trials=(*history.trials, trial), memory=proposal.memory)
        recommended = None
        if best < NEAR * problem.goal and (not across or n % 2 == 0):
            config = policy.recommend(history, space.top, np.random.default_rng([seed, n, 1])).config
            recommended = loss(config, 1.0) - problem.best
        yield rounded(spent, proposal.scale["s"], regret, recommended)
        if recommended is not None and recommended <= problem.goal:
            return


def botorch(problem: Problem, seed: int) -> Iterator[Step]:
    """BoTorch's default loop at s = 1, after as many Sobol points as ours begins with."""
    from experiments.compare.methods.botorch import BoTorch
    from experiments.compare.problems import space_filling
    from experiments.compare.protocol import Axis, Task

    loss, spent = problem.function(), 0.0
    axes = tuple(
        Axis(f"x{i}", "real", low, high) for i, (low, high) in enumerate(zip(problem.low, problem.high, strict=True))
    )
    design = 2 + math.ceil(len(axes) / 3)
    method = BoTorch(Task(axes, seed, round(problem.most / TARGET), design, noisy=False))
    waiting = space_filling(axes, seed, design)
    while spent < problem.most:
        config = waiting.pop(0) if waiting else method.suggest()
        value = loss(config, 1.0)
        method.tell(config, value)
        spent += TARGET
        yield rounded(spent, 1.0, value - problem.best, None)
        if value - problem.best <= problem.goal:  # the best that ran is what it recommends, without noise
            return


def rounded(spent: float, s: float, regret: float, recommended: float | None) -> Step:
    return round(spent, 4), s, round(regret, 5), None if recommended is None else round(recommended, 5)


# -------------------------------------------------------------------------------------------------------------- report


def reached(row: Mapping[str, Any]) -> tuple[float, float]:
    """What was spent until a recommendation was good, and until a run at the target was; infinite where none was."""
    goal = PROBLEMS[row["problem"]].goal
    recommended = next((spent for spent, _, _, there in row["steps"] if there is not None and there <= goal), math.inf)
    ran = next((spent for spent, s, regret, _ in row["steps"] if s == 1.0 and regret <= goal), math.inf)
    if row["method"] in RIVALS:
        return min(recommended, ran), ran
    return recommended, min(ran, recommended + TARGET)


def report(rows: list[dict[str, Any]]) -> str:
    rng = np.random.default_rng(0)
    lines = []
    for problem in PROBLEMS:
        mine = {m: {r["seed"]: r for r in rows if r["method"] == m and r["problem"] == problem} for m in METHODS}
        cost = {m: {seed: reached(row) for seed, row in found.items()} for m, found in mine.items()}
        lines += [
            "",
            f"{problem}: what was spent until regret {PROBLEMS[problem].goal:g} at the target, medians (90% intervals)",
            f"{'':<40}seeds  {'recommended':<22}{'ran there':<22}{'of log_ei':<20}lowest s  runs  seconds a run",
        ]
        for method, by in cost.items():
            if not by:
                continue
            share = ""
            if method not in RIVALS:
                shares = [
                    reduce(by[seed][0], cost[rival][seed][0])
                    for rival in RIVALS[:1]
                    for seed in by
                    if seed in cost[rival]
                ]
                share = spread(shares, rng) if shares else ""
            runs = [row["steps"] for row in mine[method].values()]
            lowest = np.mean([sum(step[1] == RUNGS[0] for step in steps) / len(steps) for steps in runs])
            lines.append(
                f"{method:<40}{len(by):<7}{spread([a for a, _ in by.values()], rng):<22}"
                f"{spread([b for _, b in by.values()], rng):<22}{share:<20}{lowest:<10.0%}"
                f"{median(map(len, runs)):<6.0f}{median(row['seconds'] for row in mine[method].values()):.2f}"
            )
    return "\n".join(lines[1:])


def reduce(one: float, other: float) -> float:
    """one / other, where either may never have got there."""
    return 1.0 if math.isinf(one) and math.isinf(other) else one / other


def spread(values: list[float], rng: np.random.Generator) -> str:
    middle, low, high = medians(np.array([min(value, 1e9) for value in values]), rng)
    words = [f"{value:.3g}" if value < 1e8 else "never" for value in (middle, low, high)]
    return f"{words[0]} ({words[1]} to {words[2]})"


def load() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    if not options.report:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        warnings.filterwarnings("ignore")
        import torch

        torch.set_num_threads(1)
        for seed in range(options.first, options.seeds):
            for name in options.problems.split(","):
                for method in options.methods.split(";"):
                    if any((r["method"], r["problem"], r["seed"]) == (method, name, seed) for r in load()):
                        continue
                    row = search(method, name, seed)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(name, method, seed, [f"{cost:.2f}" for cost in reached(row)], len(row["steps"]), flush=True)
    print(report(load()))


if __name__ == "__main__":
    main()
