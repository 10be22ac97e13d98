"""Workers at once: are proposals spread while others run, and what does it cost to know less when they are made?

    python -m experiments.parallel_proposals [--seeds 8] [--trials 40] [--workers 8] [--processes 1]

First, eight proposals asked one by one, none told, after 20 noisy runs in three coordinates (log learning rate, log
batch size, schedule): how many of the 28 pairs have the same batch size and schedule and lie within 0.02 decades of
learning rate? The second column measures it without the rule that no proposal is one that runs already, which is left
out of the maximiser's arguments; nothing but the belief in pending runs is then left to spread them.

Then, regret after as many trials with eight workers as with one. A worker asks as soon as its run has ended, which runs
do in an order drawn by seed. Regret is that of the recommendation, without noise. The ratio is that of geometric means
over seeds, with a 90% interval from a bootstrap over seeds; regret is floored at 1e-4 of the range of a problem or a
tenth of its noise, below which differences mean nothing. The aim: at most 1.5.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bo import Minimize, Study, Trial
from bo.optimize import maximise
from bo.policies import posterior
from search_spaces import Choice, Integer, Real, Space

CLOSE = 0.02  # decades of learning rate
SHAPES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Problem:
    """loss: of a config and the problem's shift, without noise. range: between good and bad. floor: of the regret."""

    space: Space
    loss: Callable[[Mapping[str, Any], np.ndarray], float]
    best: float
    range: float
    noise: float

    @property
    def floor(self) -> float:
        return max(1e-4 * self.range, 0.1 * self.noise)


def recipe(config: Mapping[str, Any], shift: np.ndarray) -> float:
    """Learning rate and batch size interact; the schedule moves the best learning rate."""
    shape = SHAPES.index(config["schedule"])
    lr = math.log10(config["lr"]) + 2.5 + 0.5 * shift[0] - 0.2 * shape
    batch = math.log2(config["batch"]) - 6 - shift[1]
    return float(3 + 0.15 * (lr - 0.1 * batch) ** 2 + 0.01 * batch**2 + 0.02 * shape)


def branin(config: Mapping[str, Any], shift: np.ndarray) -> float:
    """Branin's function, moved by up to 0.1."""
    u, v = config["x"] + 0.1 * shift[0], config["y"] + 0.1 * shift[1]
    a, b = 15 * u - 5, 15 * v
    return float(
        (b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(a) + 10
    )


def hartmann(config: Mapping[str, Any], shift: np.ndarray) -> float:
    """Hartmann-3, moved by up to 0.1."""
    x = np.array([config[k] for k in "xyz"]) + 0.1 * shift[:3]
    A = np.array([[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]])
    P = np.array([[0.3689, 0.117, 0.2673], [0.4699, 0.4387, 0.747], [0.1091, 0.8732, 0.5547], [0.0381, 0.5743, 0.8828]])
    return float(-np.array([1.0, 1.2, 3.0, 3.2]) @ np.exp(-(A * (x - P) ** 2).sum(-1)))


def valley(config: Mapping[str, Any], shift: np.ndarray) -> float:
    """Rosenbrock's function in four coordinates, on a log scale, moved."""
    x = np.array([3 * config[k] - 1.5 + 0.2 * s for k, s in zip("wxyz", shift, strict=True)])
    return float(math.log1p(10 * ((x[1:] - x[:-1] ** 2) ** 2).sum() + ((1 - x[:-1]) ** 2).sum()))


RECIPE = Space(lr=Real(1e-5, 1e-1, log=True), batch=Integer(8, 512, log=True), schedule=Choice(list(SHAPES)))
PROBLEMS = {
    "recipe": Problem(RECIPE, recipe, 3.0, 1.0, 0.01),
    "branin": Problem(Space(x=Real(0, 1), y=Real(0, 1)), branin, 0.397887, 50.0, 0.0),
    "hartmann": Problem(Space(x=Real(0, 1), y=Real(0, 1), z=Real(0, 1)), hartmann, -3.86278, 3.86, 0.02),
    "valley": Problem(Space(**{k: Real(0, 1) for k in "wxyz"}), valley, 0.0, 4.0, 0.0),
}


class Search:
    """One study of one problem; what a run measures depends on the seed and the number of the trial."""

    def __init__(self, name: str, seed: int, folder: str, noise: float | None = None) -> None:
        self.problem = PROBLEMS[name]
        self.noise = self.problem.noise if noise is None else noise
        self.shift = np.random.default_rng([23, seed]).uniform(-1, 1, 4)
        self.seed = seed
        self.study = Study.create(folder, self.problem.space, objective=Minimize("loss"), seed=seed, policy="bayes")

    def tell(self, trial: Trial) -> None:
        noise = self.noise * np.random.default_rng([29, self.seed, trial.id]).standard_normal()
        self.study.tell(trial.id, {"loss": self.problem.loss(trial.config, self.shift) + noise})

    def regret(self) -> float:
        loss = self.problem.loss(self.study.recommend().config, self.shift)
        return max(loss - self.problem.best, self.problem.floor)


def regret(name: str, seed: int, trials: int, workers: int) -> float:
    with TemporaryDirectory() as folder:
        search, order = Search(name, seed, folder), np.random.default_rng([31, seed])
        running: list[Trial] = []
        for _ in range(trials):
            if len(running) == workers:
                search.tell(running.pop(int(order.integers(workers))))
            running += search.study.ask()
        for trial in running:
            search.tell(trial)
        found = search.regret()
        search.study.close()
    return found


def collapsed(seed: int, noise: float, told: int, pending: int) -> tuple[int, int]:
    """Pairs of pending proposals that are all but the same, with and without the rule against that."""
    with TemporaryDirectory() as folder:
        search = Search("recipe", seed, f"{folder}/one", noise)
        for _ in range(told):
            search.tell(*search.study.ask())
        search.study.close()
        shutil.copytree(f"{folder}/one", f"{folder}/other")
        ruled = proposals(f"{folder}/one", pending)
        posterior.maximise = without_rule
        try:
            bare = proposals(f"{folder}/other", pending)
        finally:
            posterior.maximise = maximise
    return close(ruled), close(bare)


def proposals(folder: str, count: int) -> list[Mapping[str, Any]]:
    """Asked one by one, none of them told."""
    study = Study.open(folder)
    configs = [trial.config for _ in range(count) for trial in study.ask()]
    study.close()
    return configs


def without_rule(*args: Any, **kwargs: Any) -> Any:
    """`maximise`, where nothing is taken."""
    acquisition, space, incumbents, taken, rng, *rest = args
    return maximise(acquisition, space, incumbents, taken[:0], rng, *rest[:2])


def close(configs: list[Mapping[str, Any]]) -> int:
    return sum(
        one["batch"] == other["batch"]
        and one["schedule"] == other["schedule"]
        and abs(math.log10(one["lr"] / other["lr"])) < CLOSE
        for one, other in combinations(configs, 2)
    )


def interval(one: np.ndarray, many: np.ndarray) -> tuple[float, float, float]:
    """Ratio of geometric means of the same seeds, with its 90% bootstrap interval."""
    logs = np.log(many / one)
    drawn = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(-1)
    low, high = np.quantile(drawn, [0.05, 0.95])
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--told", type=int, default=20, help="runs before the eight proposals")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        print(f"pairs of 28 within {CLOSE} decades in the same cell, {options.seeds} seeds: total (worst seed)")
        print(f"{'noise':<10}{'as it is':<14}without the rule")
        for noise in (0.0, 0.01, 0.1):
            jobs = [pool.submit(collapsed, seed, noise, options.told, 8) for seed in range(options.seeds)]
            ruled, bare = zip(*(job.result() for job in jobs), strict=True)
            print(f"{noise:<10g}{f'{sum(ruled)} ({max(ruled)})':<14}{sum(bare)} ({max(bare)})", flush=True)
        print(f"\nregret after {options.trials} trials, {options.seeds} seeds: medians; ratio with 90% interval")
        print(f"{'problem':<10}{'1 worker':<12}{f'{options.workers} workers':<12}ratio", flush=True)
        pooled: list[tuple[np.ndarray, np.ndarray]] = []
        for name in options.problems.split(","):
            arms = [
                [pool.submit(regret, name, seed, options.trials, workers) for seed in range(options.seeds)]
                for workers in (1, options.workers)
            ]
            one, many = (np.array([job.result() for job in jobs]) for jobs in arms)
            pooled.append((one, many))
            print(f"{name:<10}{np.median(one):<12.2g}{np.median(many):<12.2g}{ratio(one, many)}", flush=True)
        one, many = (np.concatenate(arm) for arm in zip(*pooled, strict=True))
        print(f"{'all':<34}{ratio(one, many)}")


def ratio(one: np.ndarray, many: np.ndarray) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*interval(one, many))


if __name__ == "__main__":
    main()
