"""How many runs until the best of a pool of real mixtures is found, at one scale, without proxies?

    python -m experiments.replay_regmix --tables DIR [--objectives 12] [--seeds 2] [--pools 64,256]

DIR/regmix has the losses of language models on 13 domains over mixtures of 17 (arXiv 2407.01492). An objective is a
random weighted sum of the losses; a search sees only the runs that it buys, five random ones first. Ours models every
loss by itself, on the powers of shares that it learns; the rival is BoTorch's default, a Gaussian process of the sum on
raw shares with log-EI. Domains are permuted and losses rescaled by objective, so that nothing remembered is of use.
Printed are the mean and the median number of runs to the pool's best and to one within a tenth of the pool's spread of
it (one more than were made, where a search of 40 runs does not get there), and the paired ratio with an interval.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

from bo import History, Trial, WeightedSum
from bo.policies.design import reproducible
from bo.policies.engine import Engine
from bo.policies.posterior import Search
from search_spaces import Mixture, Space

START, MOST = 5, 40


@dataclass(frozen=True)
class Pool:
    """Shares (n x k) and losses (n x p) of runs, and the weights (p) of the sum that is minimised."""

    shares: np.ndarray
    losses: np.ndarray
    weights: np.ndarray

    @property
    def values(self) -> np.ndarray:
        return self.losses @ self.weights


def table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Shares and losses of every run; shares have three decimals and are divided by their sum."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares, losses = (
        np.array([[float(v) for name, v in row.items() if name.startswith(start)] for row in rows])
        for start in ("mix_", "loss_")
    )
    return shares / shares.sum(1, keepdims=True), losses


def draw(shares: np.ndarray, losses: np.ndarray, size: int, seed: int) -> Pool:
    """A pool of some runs under a random objective, disguised."""
    rng = np.random.default_rng([size, seed])
    rows = rng.permutation(len(shares))[:size]
    scale = np.exp(rng.uniform(-1, 1, losses.shape[1]))
    return Pool(
        shares[rows][:, rng.permutation(shares.shape[1])],
        (losses * scale)[rows],
        rng.dirichlet(np.full(losses.shape[1], 0.5)) / scale,
    )


def ours(pool: Pool, bought: list[int], seed: int) -> int:
    """The next run: the engine's criterion over the rows that were not bought."""
    names, metrics = (
        [f"{what}{i}" for i in range(n)] for what, n in (("d", pool.shares.shape[1]), ("m", len(pool.weights)))
    )
    space = Space(data=Mixture(*names))
    configs = [{"data": dict(zip(names, row, strict=True))} for row in pool.shares.tolist()]
    objective = WeightedSum(dict(zip(metrics, pool.weights.tolist(), strict=True)))
    told = []
    for i, row in enumerate(bought):
        measured = dict(zip(metrics, pool.losses[row].tolist(), strict=True))
        told.append(Trial(i, configs[row], space.top, 0, "sobol", status="finished", metrics=measured))
    rng = np.random.default_rng([seed, len(bought)])
    with reproducible(rng):
        search = Search.of(History(space, objective, tuple(told)), space.top, Engine(), rng)
        criterion = search.criterion(search.situation(), greedy=False)
        with torch.no_grad():
            values = criterion(torch.as_tensor(space.encode_all(configs))).numpy().copy()
    values[bought] = -np.inf
    return int(values.argmax())


def default(pool: Pool, bought: list[int], seed: int) -> int:
    """The next run by BoTorch's default model of the sum on raw shares."""
    torch.manual_seed(seed)
    X, y = torch.as_tensor(pool.shares), -torch.as_tensor(pool.values)[bought, None]
    model = SingleTaskGP(X[bought], y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    with torch.no_grad():
        values = LogExpectedImprovement(model, best_f=y.max())(X[:, None]).numpy().copy()
    values[bought] = -np.inf
    return int(values.argmax())


def runs(pool: Pool, choose: Callable[[Pool, list[int], int], int], seed: int) -> tuple[int, int]:
    """Runs until the pool's best, and until one within a tenth of the pool's standard deviation of it."""
    values = pool.values
    close = values.min() + 0.1 * values.std()
    bought = np.random.default_rng([seed, 7]).permutation(len(values))[:START].tolist()
    while len(bought) < MOST and values[bought].min() > values.min():
        bought.append(choose(pool, bought, seed))
    near = np.flatnonzero(values[bought] <= close)
    found = np.flatnonzero(values[bought] <= values.min())
    return int(found[0]) + 1 if len(found) else MOST + 1, int(near[0]) + 1 if len(near) else MOST + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, required=True, help="folder with regmix/")
    parser.add_argument("--objectives", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pools", default="64,256", help="sizes, at most 256")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the rival's, about the scale of inputs
    shares, losses = table(options.tables / "regmix" / "1M_test.csv")
    for size in map(int, options.pools.split(",")):
        found: dict[str, list[tuple[int, int]]] = {"ours": [], "botorch": []}
        for number in range(options.objectives):
            pool = draw(shares, losses, size, number)
            for seed in range(options.seeds):
                found["ours"].append(runs(pool, ours, seed))
                found["botorch"].append(runs(pool, default, seed))
        mine, other = (np.array(found[name], dtype=float) for name in ("ours", "botorch"))
        rng = np.random.default_rng(0)
        draws = rng.integers(len(mine), size=(2000, len(mine)))
        for column, what in enumerate(("the best", "near it")):
            ratios = other[draws, column].mean(1) / mine[draws, column].mean(1)
            low, high = np.quantile(ratios, [0.05, 0.95])
            words = ", ".join(
                f"{name} mean {np.mean(each[:, column]):.1f} median {np.median(each[:, column]):.0f}"
                for name, each in (("ours", mine), ("BoTorch on raw weights", other))
            )
            ratio = other[:, column].mean() / mine[:, column].mean()
            print(f"pool of {size}, runs to {what}: {words}; ratio {ratio:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
