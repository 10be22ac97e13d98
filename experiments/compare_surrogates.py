"""Which model of the metrics foretells best, and finds best? Every surrogate on the same runs of the same problems.

    python -m experiments.compare_surrogates [--tables DIR] [--seeds 5] [--trials 30] [--surrogates gp,random_forest]

Problems: Branin and Hartmann-6 in their usual boxes, a function of a conditional space with four branches, and with
--tables emulators of real training runs, disguised (DIR holds `blackbox.py` and the Step-Law and mixing-law tables).
"held out": from 10, 30 and 100 random runs the model foretells 300 others; printed are the mean log density of their
outcomes in model units (standardised by the runs), the root mean square error in the same unit, the rank correlation,
and the processor seconds of a fit. "search": log-EI by that model after a few space-filling runs; printed is the
noise-free regret of the best run. Everything is the median over seeds with the range.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bo import History, Minimize, Trial, dataset, ports
from bo.acquisition.log_ei import log_ei
from bo.dataset import Dataset, Outcome, compress
from bo.optimize import maximise
from bo.policies.design import reproducible, sobol
from bo.surrogates.composite import Composite, correlation
from bo.surrogates.features import Features
from bo.surrogates.surrogate import SURROGATES
from experiments.compare.problems import blackbox
from search_spaces import Choice, Integer, Mixture, Real, Scale, Space

COMPARED = ("gp", "deep_kernel", "infinite_network", "deep_ensemble", "hamiltonian_network", "random_forest")
SIZES = (10, 30, 100)
HELD_OUT = 300
TABLES = ("steplaw-dense-214M", "mixlaw-redpajama")


@dataclass(frozen=True)
class Problem:
    """A noise-free function of configs to be minimised, and its least value."""

    name: str
    space: Space
    loss: Callable[[Mapping[str, Any]], float]
    least: float


def branin(c: Mapping[str, Any]) -> float:
    a, b = c["x"], c["y"]
    bent = b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6
    return float(bent**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10)


def hartmann6(c: Mapping[str, Any]) -> float:
    x = np.array([c[f"x{i}"] for i in range(6)])
    A = [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
    P = [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
    return float(-np.array([1, 1.2, 3, 3.2]) @ np.exp(-(np.array(A) * (x - np.array(P) * 1e-4) ** 2).sum(1)))


def branches(c: Mapping[str, Any]) -> float:
    """A bowl in the learning rate that every branch moves, and what each branch has of its own."""
    u = np.log10(c["lr"])
    if c["optimizer"] == "sgd":
        own = 0.4 + (u + 1.5) ** 2 + 2 * (c["momentum"] - 0.9) ** 2
    elif c["optimizer"] == "adam":
        own = 0.1 + (u + 3) ** 2 + 8 * (c["beta"] - 0.93) ** 2
    elif c["optimizer"] == "lion":
        own = (u + 3.6) ** 2 + 0.3 * np.sin(6 * c["decay"]) + 0.3
    else:
        own = 0.2 + 0.5 * (u + 2.2) ** 2 + 0.02 * abs(c["order"] - 3)
    return float(own + 0.1 * (c["depth"] - 5) ** 2 / 9)


SYNTHETIC = (
    Problem("branin", Space(x=Real(-5, 10), y=Real(0, 15)), branin, 0.39788735772973816),
    Problem("hartmann6", Space(**{f"x{i}": Real(0, 1) for i in range(6)}), hartmann6, -3.322368011391339),
    Problem(
        "conditional",
        Space(
            lr=Real(1e-5, 1e0, log=True),
            depth=Integer(1, 10),
            optimizer=Choice(
                {
                    "sgd": {"momentum": Real(0, 1)},
                    "adam": {"beta": Real(0.5, 1)},
                    "lion": {"decay": Real(0, 1)},
                    "shampoo": {"order": Integer(1, 12)},
                }
            ),
        ),
        branches,
        0.0,  # of "lion" at decay pi / 4, depth 5
    ),
)


def disguised(module: Any, name: str) -> Problem:
    """An emulator of a table at its target scale."""
    box = module.disguise(module.get(name), "surrogates")
    parameters: dict[str, Any] = {}
    for p in box.params:
        if p.type == "simplex":
            parameters[p.name] = Mixture(*[f"s{i}" for i in range(p.size)])
        elif p.type in ("int", "logint"):
            parameters[p.name] = Integer(int(p.low), int(p.high), log=p.type == "logint")
        else:
            parameters[p.name] = Real(p.low, p.high, log=p.type == "log")

    def loss(config: Mapping[str, Any]) -> float:
        plain = {k: np.array(list(v.values())) if isinstance(v, Mapping) else v for k, v in config.items()}
        return float(box.evaluate(plain))

    return Problem(name, Space(**parameters), loss, float(box.optimum()[1]))


def told(problem: Problem, configs: Sequence[Mapping[str, Any]]) -> Dataset:
    trials = (
        Trial(i, dict(config), Scale(), 0, "added", status="finished", metrics={"loss": problem.loss(config)})
        for i, config in enumerate(configs)
    )
    return dataset.from_history(History(problem.space, Minimize("loss"), tuple(trials)))


def fitted(name: str, data: Dataset, start: Mapping[str, Any] | None = None) -> Composite:
    features = Features(data.space)
    inputs = features(data.X, data.S, data.cell)
    surrogate = ports.load(SURROGATES, name, "surrogate")(features, inputs, data.Y, start)
    return Composite(data, surrogate, correlation(surrogate, data.Y))


def model_units(outcome: Outcome, losses: np.ndarray) -> np.ndarray:
    """Losses as the model sees them, also those that are better than all told."""
    u = torch.as_tensor(losses)[:, None]
    excess = (u - outcome.best[0]) / (outcome.best[0] if outcome.relative else 1.0)
    units: np.ndarray = (-(compress(excess, outcome.cap) - outcome.mean) / outcome.sd)[:, 0].numpy()
    return units


def foretell(name: str, problem: Problem, n: int, seed: int) -> tuple[float, float, float, float]:
    """Log density, root mean square error, rank correlation, and seconds of the fit."""
    configs = problem.space.sample(np.random.default_rng([seed, n]), n + HELD_OUT)
    data = told(problem, configs[:n])
    y = model_units(data.outcome, np.array([problem.loss(config) for config in configs[n:]]))
    with reproducible(np.random.default_rng(seed)):
        begun = time.process_time()
        model = fitted(name, data)
        seconds = time.process_time() - begun
        with torch.no_grad():
            at = model.at(Scale()).inputs(torch.as_tensor(problem.space.encode_all(configs[n:])))
            mean, variance = (values[0].numpy() for values in model.gp.posterior(at))
    variance = variance + float(model.gp.noise[0])
    density = -0.5 * ((y - mean) ** 2 / variance + np.log(2 * np.pi * variance)).mean()
    return float(density), float(np.sqrt(np.mean((y - mean) ** 2))), float(spearmanr(y, mean)[0]), seconds


def search(name: str, problem: Problem, trials: int, seed: int) -> float:
    """Regret after so many runs, the first of them space-filling."""
    d = len(problem.space.columns)
    configs = sobol(problem.space, seed, 0, min(trials, 4 + d // 2))
    memory: Mapping[str, Any] | None = None
    while len(configs) < trials:
        rng = np.random.default_rng([seed, len(configs)])
        with reproducible(rng):
            data = told(problem, configs)
            model = fitted(name, data, memory)
            memory = model.gp.memory()
            belief = model.at(Scale())
            with torch.no_grad():
                here = belief.value(data.X)[0]
            best = float(here.max())
            leaders = data.X[torch.argsort(here, descending=True)[:10]]

            def acquisition(X: torch.Tensor, belief: Any = belief, best: float = best) -> torch.Tensor:
                return log_ei(*belief.value(X), best)

            found = maximise(acquisition, problem.space, leaders, data.X, rng)
        configs.append(problem.space.decode(found.x))
    return min(map(problem.loss, configs)) - problem.least


def spread(values: Sequence[float]) -> str:
    return f"{np.median(values):7.3g} ({min(values):.2g} to {max(values):.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, help="folder with blackbox.py; without it, synthetic problems only")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=30, help="of a search; 0 for none")
    parser.add_argument("--surrogates", default=",".join(COMPARED))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="runs to foretell from")
    parser.add_argument("--problems", help="some of them, by name")
    options = parser.parse_args()
    names = options.surrogates.split(",")
    problems = list(SYNTHETIC)
    if options.tables:
        problems += [disguised(blackbox(options.tables), name) for name in TABLES]
    if options.problems:
        problems = [problem for problem in problems if problem.name in options.problems.split(",")]
    print(f"{'held out':<20}{'n':>4} {'':<21}{'log density':<26}{'error':<26}{'rank correlation':<26}seconds")
    for problem in problems:
        for n in map(int, options.sizes.split(",") if options.sizes else ()):
            for name in names:
                columns = zip(*(foretell(name, problem, n, seed) for seed in range(options.seeds)), strict=True)
                cells = "".join(f"{spread(column):<26}" for column in columns)
                print(f"{problem.name:<20}{n:>4} {name:<21}{cells}".rstrip(), flush=True)
    if options.trials:
        print(f"search              regret after {options.trials} runs")
        for problem in problems:
            for name in names:
                regrets = [search(name, problem, options.trials, seed) for seed in range(options.seeds)]
                print(f"{problem.name:<20}     {name:<21}{spread(regrets)}", flush=True)


if __name__ == "__main__":
    main()
