"""Does the usual process gain from averaging over its hyperparameters while there are few runs?

    python -m experiments.hyperparameter_averaging --seeds 4 --searches 4

Three tables: how well held-out runs are foretold after 5 to 40 runs at random; the regret of what is recommended after
half of a search's trials and after all of them, paired by seed; and CPU seconds a proposal. Functions are shifted and
rotated, or their coordinates shuffled and mirrored, per seed. Intervals are 90%, by bootstrap.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

from bo import Minimize
from bo.policies.bayes import Bayes
from bo.ports import History
from bo.surrogates import averaged, gp
from bo.surrogates.composite import Z90
from bo.surrogates.features import Features, Inputs
from bo.surrogates.surrogate import Surrogate
from bo.trial import Trial
from experiments.high_dimension import Function, ackley, hartmann, rosenbrock
from search_spaces import Real, Scale, Space

ARMS = {"one": "gp", "averaged": "gp_averaged"}
HELD_OUT = 400
#: Noise of a held-out comparison, in standard deviations of the function.
NOISES = (0.0, 0.2)
RESAMPLES = 2000
#: Regrets below this are the same.
FLOOR = 1e-4


def branin(x: np.ndarray) -> float:
    """Of two numbers in [0, 1], less its minimum."""
    a, b = 15 * x[0] - 5, 15 * x[1]
    valley = (b - 5.1 / (4 * np.pi**2) * a * a + 5 / np.pi * a - 6) ** 2
    return float(valley + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10 - 0.397887)


def levy(z: np.ndarray) -> float:
    """Minimum 0 at 0, among ripples."""
    w = 1 + 4 * z
    middle = (np.square(w[:-1] - 1) * (1 + 10 * np.square(np.sin(np.pi * w[:-1] + 1)))).sum()
    last = (w[-1] - 1) ** 2 * (1 + np.sin(2 * np.pi * w[-1]) ** 2)
    return float(np.sin(np.pi * w[0]) ** 2 + middle + last)


def log_rosenbrock(z: np.ndarray) -> float:
    return float(np.log1p(rosenbrock(z)))


@dataclass(frozen=True)
class Problem:
    """A function of d numbers in [0, 1]; `turned` when its argument is to be shifted and rotated about 0.

    trials and noise: of a search, the noise in units of the function.
    """

    function: Callable[[np.ndarray], float]
    d: int
    turned: bool
    trials: int = 30
    noise: float = 0.0


FORETOLD = {
    "branin": Problem(branin, 2, False),
    "log rosenbrock": Problem(log_rosenbrock, 4, True),
    "ackley": Problem(ackley, 5, True),
    "hartmann": Problem(hartmann, 6, False),
    "hartmann of 10": Problem(lambda x: hartmann(x[:6]), 10, False),
    "levy": Problem(levy, 10, True),
}
SEARCHED = {
    "branin": Problem(branin, 2, False, 20),
    "levy": Problem(levy, 4, True, 40),
    "hartmann": Problem(hartmann, 6, False, 50),
    "noisy hartmann": Problem(hartmann, 6, False, 50, 0.1),
}


def placed(problem: Problem, seed: int) -> Function:
    """What is to be minimised over [0, 1]^d: its minimum is 0."""
    rng, d = np.random.default_rng([seed, problem.d]), problem.d
    if problem.turned:
        rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
        centre = rng.uniform(0.3, 0.7, d)
        return lambda x: problem.function(rotation @ (x - centre))
    order, mirrored = rng.permutation(d), rng.random(d) < 0.5
    return lambda x: problem.function(np.where(mirrored, 1 - x, x)[order])


def cube(d: int) -> Space:
    return Space(**{f"x{i}": Real(0, 1) for i in range(d)})


def foretell(name: str, n: int, noise: float, seed: int) -> dict[str, Any]:
    """How each arm foretells held-out runs from n others: log density, error in sds of the runs, coverage, CPU s."""
    problem = FORETOLD[name]
    rng, d, measure = np.random.default_rng([seed, n]), problem.d, placed(problem, seed)
    X = rng.random((n + HELD_OUT, d))
    y = -np.array([measure(x) for x in X])
    y += noise * y.std() * rng.standard_normal(len(y))
    y = (y - y[:n].mean()) / y[:n].std()
    features = Features(cube(d))
    empty, cell = torch.zeros(len(X), 0, dtype=torch.float64), torch.zeros(len(X), dtype=torch.long)
    inputs = features(torch.from_numpy(X), empty, cell)
    told, held = inputs.rows(torch.arange(n)), inputs.rows(torch.arange(n, len(X)))
    Y, found = torch.from_numpy(y[:n])[:, None], {}
    for arm, fit in (("one", gp.fit), ("averaged", averaged.fit)):
        torch.manual_seed(seed)
        begun = time.process_time()
        model = fit(features, told, Y)
        found[arm] = (*scores(model, held, y[n:]), time.process_time() - begun)
    return {"name": name, "n": n, "noise": noise, "seed": seed, **found}


def scores(model: Surrogate, at: Inputs, y: np.ndarray) -> tuple[float, float, float]:
    """Mean log density of runs, root mean squared error, and the share within 90% intervals."""
    with torch.no_grad():
        mean, variance = model.posterior(at)
    total = (variance[0] + model.noise[0]).numpy()
    away = np.square(y - mean[0].numpy())
    density = -0.5 * (away / total + np.log(2 * np.pi * total))
    return float(density.mean()), float(np.sqrt(away.mean())), float((away < Z90**2 * total).mean())


def search(name: str, arm: str, seed: int) -> dict[str, Any]:
    """One study: regrets of what the arm recommends after half of the trials and all of them, and CPU a proposal."""
    problem, policy = SEARCHED[name], Bayes(surrogate=ARMS[arm])
    rng, d, measure = np.random.default_rng([seed, 9]), problem.d, placed(problem, seed)
    history, regrets, seconds = History(cube(d), Minimize("loss"), ()), [], 0.0
    for i in range(problem.trials):
        begun = time.process_time()
        (proposal,) = policy.propose(history, 1, np.random.default_rng([seed, i]))
        seconds += time.process_time() - begun
        loss = measure(np.array(list(proposal.config.values()))) + problem.noise * rng.standard_normal()
        trial = Trial(i, proposal.config, Scale(), i, proposal.source, status="finished", metrics={"loss": loss})
        history = History(history.space, history.objective, (*history.trials, trial), memory=proposal.memory)
        if i + 1 in (problem.trials // 2, problem.trials):
            best = policy.recommend(history, Scale(), np.random.default_rng(0)).config
            regrets.append(measure(np.array(list(best.values()))))
    return {"name": name, "arm": arm, "seed": seed, "regrets": regrets, "seconds": seconds / problem.trials}


def interval(values: np.ndarray, middle: Callable[..., Any]) -> str:
    """The middle of paired differences and its 90% interval."""
    rng = np.random.default_rng(0)
    again = middle(values[rng.integers(len(values), size=(RESAMPLES, len(values)))], axis=1)
    low, high = np.quantile(again, (0.05, 0.95))
    return f"{middle(values):+.3f} ({low:+.3f} to {high:+.3f})"


def foretold_table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'noise':<7}{'n':>3}  {'log density: one':<18}{'averaged':<10}{'mean gain':<27}{'median gain':<27}"
        f"{'RMSE: one':<11}{'averaged':<10}{'within 90%: one':<17}{'averaged':<10}CPU ms: one, averaged"
    ]
    for noise, n in sorted({(r["noise"], r["n"]) for r in results}):
        mine = [r for r in results if (r["noise"], r["n"]) == (noise, n)]
        one, other = (np.array([r[arm] for r in mine]) for arm in ARMS)
        gain, (a, b) = other[:, 0] - one[:, 0], (np.median(each, axis=0) for each in (one, other))
        within = [each[:, 2].mean() for each in (one, other)]
        lines.append(
            f"{noise:<7}{n:>3}  {a[0]:<18.3f}{b[0]:<10.3f}{interval(gain, np.mean):<27}{interval(gain, np.median):<27}"
            f"{a[1]:<11.3f}{b[1]:<10.3f}{within[0]:<17.3f}{within[1]:<10.3f}{1e3 * a[3]:.0f}, {1e3 * b[3]:.0f}"
        )
    return "\n".join(lines)


def searched_table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'function':<16}{'d':>3}{'trials':>8}  {'log10 regret: one':<19}{'averaged':<10}{'median gain':<27}"
        f"{'mean gain':<27}CPU ms a proposal: one, averaged"
    ]
    for name, part in product(SEARCHED, (0, 1)):
        problem = SEARCHED[name]
        mine = {arm: {r["seed"]: r for r in results if (r["name"], r["arm"]) == (name, arm)} for arm in ARMS}
        seeds = sorted(set(mine["one"]) & set(mine["averaged"]))
        if not seeds:
            continue
        regret = [np.array([mine[arm][seed]["regrets"][part] for seed in seeds]) for arm in ARMS]
        one, other = (np.log10(np.maximum(each, FLOOR)) for each in regret)
        took = [1e3 * median(mine[arm][seed]["seconds"] for seed in seeds) for arm in ARMS]
        lines.append(
            f"{name:<16}{problem.d:>3}{(problem.trials // 2, problem.trials)[part]:>8}  {np.median(one):<19.3f}"
            f"{np.median(other):<10.3f}{interval(one - other, np.median):<27}{interval(one - other, np.mean):<27}"
            f"{took[0]:.0f}, {took[1]:.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--seeds", type=int, default=4, help="data sets of each function")
    parser.add_argument("--functions", nargs="+", default=list(SEARCHED), choices=list(SEARCHED))
    parser.add_argument("--searches", type=int, default=4, help="pairs of searches of each function")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        grid = product(FORETOLD, options.runs, NOISES, range(options.seeds))
        foretold = [pool.submit(foretell, *each) for each in grid]
        searched = [pool.submit(search, *each) for each in product(options.functions, ARMS, range(options.searches))]
        if foretold:
            print(foretold_table([each.result() for each in foretold]), flush=True)
        print(searched_table([each.result() for each in searched]), flush=True)


if __name__ == "__main__":
    main()
