"""Which search is best as coordinates grow in number: the usual one, a sparse prior, or a trust region?

    python -m experiments.high_dimension --dimensions 20 40 --trials 100 --seeds 3

Functions of d numbers, shifted per seed and those of full rank rotated too: an ellipsoid, Rosenbrock's and Ackley's
function that all coordinates bear on, and Hartmann's of six of them while the rest do nothing. Every arm is scored by
the noiseless value of its own recommendation above the optimum, after half of the trials and after all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch

from bo import Minimize
from bo.policies.bayes import Bayes
from bo.policies.sobol import Sobol
from bo.policies.trust_region import TrustRegion
from bo.ports import History, Policy, Proposal
from bo.trial import Trial
from experiments.compare import problems
from search_spaces import Real, Space

Function = Callable[[np.ndarray], float]


def ellipsoid(z: np.ndarray) -> float:
    """Axes up to ten times as long as others: minimum 0 at 0."""
    return float((np.square(z) * 100.0 ** np.linspace(0, 1, len(z))).sum())


def rosenbrock(z: np.ndarray) -> float:
    """Minimum 0 at 0, at the end of a bent valley."""
    y = 4 * z + 1
    return float((100 * np.square(y[1:] - np.square(y[:-1])) + np.square(1 - y[:-1])).sum())


def ackley(z: np.ndarray) -> float:
    """Minimum 0 at 0, in the midst of a field of shallow holes."""
    y = 20 * z
    bowl = -20 * np.exp(-0.2 * np.sqrt(np.square(y).mean())) - np.exp(np.cos(2 * np.pi * y).mean())
    return float(bowl + 20 + np.e)


def hartmann(x: np.ndarray) -> float:
    """Of six numbers in [0, 1], less its minimum."""
    return 3.32236801 + problems.hartmann(x)


FULL = {"ellipsoid": ellipsoid, "rosenbrock": rosenbrock, "ackley": ackley}
FUNCTIONS = ("ellipsoid", "rosenbrock", "ackley", "hartmann of 6")
ARMS = ("bayes", "saas", "trust_region", "sobol")


def function(name: str, d: int, seed: int) -> Function:
    """What is to be minimised over [0, 1]^d: its minimum is 0, for the full-rank ones within [0.25, 0.75]^d."""
    rng = np.random.default_rng([seed, d, FUNCTIONS.index(name)])
    if name == "hartmann of 6":
        order = rng.permutation(d)[:6]
        return lambda x: hartmann(x[order])
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    centre = rng.uniform(0.25, 0.75, d)
    return lambda x: FULL[name](rotation @ (x - centre))


def policy(arm: str) -> Policy:
    return {"sobol": Sobol(), "trust_region": TrustRegion(), "saas": Bayes("saas"), "bayes": Bayes()}[arm]


def search(arm: str, name: str, d: int, seed: int, trials: int) -> dict[str, Any]:
    """One study: regrets of what the arm recommends after half of the trials and all of them, and its CPU seconds."""
    space, measure, chosen = Space(**{f"x{i}": Real(0, 1) for i in range(d)}), function(name, d, seed), policy(arm)
    history, regrets, begun = History(space, Minimize("loss"), ()), [], time.process_time()
    for i in range(trials):
        (proposal,) = chosen.propose(history, 1, np.random.default_rng([seed, i]))
        history = told(history, proposal, measure)
        if i + 1 in (trials // 2, trials):
            found = chosen.recommend(history, space.top, np.random.default_rng([seed, i])).config
            regrets.append(measure(np.array(list(found.values()))))
    best = min(trial.metrics["loss"] for trial in history.trials if trial.metrics)
    seconds = time.process_time() - begun
    return {"arm": arm, "name": name, "d": d, "seed": seed, "regrets": regrets, "best": best, "seconds": seconds}


def told(history: History, proposal: Proposal, measure: Function) -> History:
    id = len(history.trials)
    loss = measure(np.array(list(proposal.config.values())))
    trial = Trial(id, proposal.config, proposal.scale, id, proposal.source, status="finished", metrics={"loss": loss})
    return replace(history, trials=(*history.trials, trial), memory=proposal.memory, seen=id + 1)


def table(results: list[dict[str, Any]], trials: int) -> str:
    lines = [
        f"{'function':<15}{'d':>3}  {'arm':<14}{f'regret after {trials // 2}':<30}{f'after {trials}':<30}"
        f"{'best measured':<30}CPU s"
    ]
    keys = sorted({(r["d"], FUNCTIONS.index(r["name"]), ARMS.index(r["arm"])) for r in results})
    for d, name, arm in keys:
        mine = [r for r in results if (r["d"], r["name"], r["arm"]) == (d, FUNCTIONS[name], ARMS[arm])]
        columns = [spread([r["regrets"][k] for r in mine]) for k in (0, 1)] + [spread([r["best"] for r in mine])]
        seconds = median(r["seconds"] for r in mine)
        lines.append(f"{FUNCTIONS[name]:<15}{d:>3}  {ARMS[arm]:<14}{''.join(f'{c:<30}' for c in columns)}{seconds:.0f}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--functions", nargs="+", default=["ellipsoid", "ackley", "hartmann of 6"], choices=FUNCTIONS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    results = []
    with ProcessPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        grid = product(options.dimensions, options.functions, range(options.seeds), options.arms)
        for done in [pool.submit(search, arm, name, d, seed, options.trials) for d, name, seed, arm in grid]:
            result = done.result()
            results.append(result)
            regrets = ", ".join(f"{regret:.3g}" for regret in result["regrets"])
            head = f"{result['name']} d={result['d']} seed {result['seed']} {result['arm']}"
            print(f"{head}: {regrets} ({result['seconds']:.0f} s)", flush=True)
    print(table(results, options.trials))


if __name__ == "__main__":
    main()
