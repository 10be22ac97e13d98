"""A cliff: the loss improves with the learning rate until it is NaN. How many runs diverge, and what is found?

    python -m experiments.divergence_cliff [--problems cliff,wide,slanted] [--seeds 20] [--trials 60] [--rivals]

NaN is told as it comes; nobody chooses a penalty. Coordinate 0 is log(lr) over [1e-5, 1], the others are in [0, 1]:

    loss = 1 - x0 + 1.2 / (d - 1) * sum_j (x_j - c_j)^2,    NaN where x0 >= e + t (x1 - 1/2)

with the edge e and the centres c drawn by seed. "cliff" has d = 2, e in [0.4, 0.8] and t = +-0.05; "wide" the same in
d = 5; "slanted" d = 2, e in [0.45, 0.65] and t = +-0.5, so the best runs lie along an edge that crosses the space.

Regret is that of the recommendation (of Optuna's best trial, in its case), without noise, over the range of finite
losses of the problem; the optimum is the infimum, which is at the edge itself and is attained by no run. A
recommendation that would diverge has regret inf. The aim: at most 10% diverged, median regret at most 0.003.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bo import Minimize, Study
from search_spaces import Real, Space

LOW, HIGH = 1e-5, 1.0  # learning rates
BENT = 1.2  # loss between the centre and a point one away from it in every smooth coordinate
KINDS = {"cliff": (2, (0.4, 0.8), 0.05), "wide": (5, (0.4, 0.8), 0.05), "slanted": (2, (0.45, 0.65), 0.5)}


@dataclass(frozen=True)
class Cliff:
    """edge: where runs diverge at x1 = 1/2, as a share of the range of log(lr). tilt: by how much it moves with x1."""

    edge: float
    tilt: float
    centres: tuple[float, ...]

    @classmethod
    def draw(cls, kind: str, seed: int) -> Cliff:
        d, edges, tilt = KINDS[kind]
        rng = np.random.default_rng([17, seed])
        return cls(rng.uniform(*edges), tilt * rng.choice([-1, 1]), tuple(rng.uniform(0.2, 0.8, d - 1).tolist()))

    @property
    def space(self) -> Space:
        return Space(lr=Real(LOW, HIGH, log=True), **{f"x{j + 1}": Real(0, 1) for j in range(len(self.centres))})

    def loss(self, config: Mapping[str, Any]) -> float:
        x0 = math.log(config["lr"] / LOW) / math.log(HIGH / LOW)
        others = [config[f"x{j + 1}"] for j in range(len(self.centres))]
        bowl = sum((x - c) ** 2 for x, c in zip(others, self.centres, strict=True)) / len(others)
        return math.nan if x0 >= self.edge + self.tilt * (others[0] - 0.5) else 1 - x0 + BENT * bowl

    @property
    def infimum(self) -> float:
        """At the edge, where every other coordinate but the one that moves it is at its centre."""
        x1 = np.linspace(0, 1, 100_001)
        edge = np.clip(self.edge + self.tilt * (x1 - 0.5), 0, 1)
        return float((1 - edge + BENT / len(self.centres) * (x1 - self.centres[0]) ** 2).min())

    @property
    def range(self) -> float:
        farthest = sum(max(c, 1 - c) ** 2 for c in self.centres) / len(self.centres)
        return 1 + BENT * farthest - self.infimum

    def regret(self, config: Mapping[str, Any]) -> float:
        loss = self.loss(config)
        return math.inf if math.isnan(loss) else (loss - self.infimum) / self.range


@dataclass(frozen=True)
class Outcome:
    """Whether each trial diverged, and the regret of what is recommended in the end."""

    diverged: tuple[bool, ...]
    regret: float


def windtunnel(problem: Cliff, trials: int, seed: int) -> Outcome:
    with TemporaryDirectory() as folder:
        study = Study.create(folder, problem.space, objective=Minimize("loss"), seed=seed, policy="bayes")
        for _ in range(trials):
            (trial,) = study.ask()
            study.tell(trial.id, {"loss": problem.loss(trial.config)})
        diverged = tuple(trial.status == "diverged" for trial in study.trials)
        found = Outcome(diverged, problem.regret(study.recommend().config))
        study.close()
    return found


def optuna(sampler: str, problem: Cliff, trials: int, seed: int) -> Outcome:
    """Optuna with its defaults; a run that diverged is told as failed, as its `optimize` does with NaN."""
    import optuna as library

    library.logging.set_verbosity(library.logging.ERROR)
    warnings.simplefilter("ignore")
    study = library.create_study(sampler=getattr(library.samplers, sampler)(seed=seed))
    diverged = []
    for _ in range(trials):
        trial = study.ask()
        config = {"lr": trial.suggest_float("lr", LOW, HIGH, log=True)}
        config |= {f"x{j + 1}": trial.suggest_float(f"x{j + 1}", 0, 1) for j in range(len(problem.centres))}
        loss = problem.loss(config)
        diverged.append(math.isnan(loss))
        if diverged[-1]:
            study.tell(trial, state=library.trial.TrialState.FAIL)
        else:
            study.tell(trial, loss)
    return Outcome(tuple(diverged), math.inf if all(diverged) else problem.regret(study.best_params))


METHODS: dict[str, Callable[[Cliff, int, int], Outcome]] = {
    "Windtunnel": windtunnel,
    "Optuna GP": partial(optuna, "GPSampler"),
    "Optuna TPE": partial(optuna, "TPESampler"),
}


def one(method: str, kind: str, trials: int, seed: int) -> Outcome:
    logging.disable(logging.WARNING)  # a warning for each run that diverged
    return METHODS[method](Cliff.draw(kind, seed), trials, seed)


def row(kind: str, method: str, found: list[Outcome]) -> str:
    counts = [sum(outcome.diverged) for outcome in found]
    half = len(found[0].diverged) // 2
    late = median(sum(outcome.diverged[half:]) for outcome in found)
    regrets = [outcome.regret for outcome in found]
    return (
        f"{kind:<9}{method:<12}{median(counts):>5g} ({min(counts)} to {max(counts)})"
        f"{late:>10g}{'':4}{median(regrets):.5f} ({min(regrets):.5f} to {max(regrets):.5f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", default=",".join(KINDS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--rivals", action="store_true", help="Optuna's samplers too")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    half = options.trials - options.trials // 2
    print(f"{options.seeds} seeds, {options.trials} trials; medians over seeds, with ranges")
    print(f"{'problem':<9}{'method':<12}{'diverged':<15}{f'of last {half}':>10}{'':4}regret", flush=True)
    with ProcessPoolExecutor(options.workers) as pool:
        for kind in options.problems.split(","):
            for method in METHODS if options.rivals else ["Windtunnel"]:
                jobs = [pool.submit(one, method, kind, options.trials, seed) for seed in range(options.seeds)]
                print(row(kind, method, [job.result() for job in jobs]), flush=True)


if __name__ == "__main__":
    main()
