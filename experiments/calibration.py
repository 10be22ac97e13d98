"""How often the truth lies in the 90% interval of the objective: runs that the model was not given.

    python -m experiments.calibration [--tables DIR] [--seeds 16]

Weighted sums of several metrics, one model a metric. "box": random smooth functions of four numbers, of which five
metrics are random combinations, with noise that the metrics of a run share in part. "mixture": losses of six domains by
the mixing law of Ye et al. 2024 (arXiv 2403.16952), L = c + k exp(sum_j t_j w_j), over five sources. RegMix (arXiv
2407.01492; DIR holds regmix/1M_train.csv and 1M_test.csv): 13 losses of 1M-parameter models over 17 sources. Each seed
draws the runs to fit and the weights of the sum. Printed is the share of held-out runs within the interval for the sum,
the mean over seeds with their range, and the same for single metrics; "ratio" is the root mean square of error over
predicted standard deviation, 1 when it is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bo import History, Trial, WeightedSum, dataset
from bo.policies.design import reproducible
from bo.surrogates import composite
from bo.surrogates.composite import Z90, Composite
from experiments.compare_features import Run, regmix
from search_spaces import Mixture, Real, Scale, Space

SIZES = (32, 64)
HELD_OUT = 128
WAVES = 64
#: Standard deviation of a run's noise over that of the metric itself, and the share of its variance that all have.
NOISE, COMMON = 0.05, 0.5


def box(seed: int, n: int) -> tuple[Space, list[Run]]:
    """n runs of five metrics that are random sums of three random functions with a Gaussian spectrum."""
    rng = np.random.default_rng([seed, 1])
    space = Space(a=Real(0, 1), b=Real(0, 1), c=Real(0, 1), d=Real(0, 1))
    configs = space.sample(rng, n)
    x = space.encode_all(configs)
    frequency = rng.standard_normal((3, 4, WAVES)) / 0.5
    latent = np.cos(np.einsum("nd,kdw->nkw", x, frequency) + rng.uniform(0, 2 * np.pi, (3, WAVES)))
    functions = np.einsum("nkw,kw->nk", latent, rng.standard_normal((3, WAVES))) / np.sqrt(WAVES)
    return space, noisy(configs, functions @ rng.standard_normal((3, 5)), rng)


def mixture(seed: int, n: int) -> tuple[Space, list[Run]]:
    """n runs of six losses, each lowered by the sources that are like its domain."""
    rng = np.random.default_rng([seed, 2])
    space = Space(data=Mixture("s0", "s1", "s2", "s3", "s4"))
    configs = space.sample(rng, n)
    w = np.array([list(config["data"].values()) for config in configs])
    rates = -rng.exponential(2.0, (5, 6))
    return space, noisy(configs, 2 + rng.uniform(1, 3, 6) * np.exp(w @ rates), rng)


def noisy(configs: Sequence[dict[str, object]], truth: np.ndarray, rng: np.random.Generator) -> list[Run]:
    """The runs with noise added to their metrics, n x p."""
    n, p = truth.shape
    shared = np.sqrt(COMMON) * rng.standard_normal((n, 1)) + np.sqrt(1 - COMMON) * rng.standard_normal((n, p))
    measured = truth + NOISE * truth.std(0) * shared
    rows = zip(configs, measured.tolist(), strict=True)
    return [(config, {f"m{k}": value for k, value in enumerate(row)}) for config, row in rows]


def fitted(space: Space, runs: Sequence[Run], weights: dict[str, float], seed: int) -> Composite:
    trials = tuple(
        Trial(i, config, Scale(), 0, "added", status="finished", metrics=metrics)
        for i, (config, metrics) in enumerate(runs)
    )
    with reproducible(np.random.default_rng(seed)):
        return composite.fit(dataset.from_history(History(space, WeightedSum(weights), trials)))


def scores(model: Composite, space: Space, runs: Sequence[Run], weights: dict[str, float]) -> np.ndarray:
    """Of each run (n) error over predicted standard deviation: the sum's, then each metric's, n x (1 + p).

    The standard deviation is what makes the predicted 90% interval normal.
    """
    X = space.encode_all([config for config, _ in runs])
    measured = np.array([[metrics[name] for name in weights] for _, metrics in runs])
    columns = [_scores(model, X, measured @ np.array(list(weights.values())))]
    for k, weight in enumerate(weights.values()):
        only = torch.zeros(len(weights), dtype=torch.float64)
        only[k] = weight
        alone = replace(model, data=replace(model.data, outcome=replace(model.data.outcome, weight=only)))
        columns.append(_scores(alone, X, weight * measured[:, k]))
    return np.stack(columns, axis=-1)


def _scores(model: Composite, X: np.ndarray, measured: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        expected = [model.predict(torch.as_tensor(x), Scale()) for x in X]
    half = np.array([(prediction.high - prediction.low) / 2 for prediction in expected])
    return (measured - np.array([prediction.mean for prediction in expected])) / (half / Z90)


def compare(name: str, problems: Sequence[tuple[Space, list[Run], list[Run]]]) -> None:
    """One line a size: problems are one a seed, with the runs to choose from and those held out."""
    for n in SIZES:
        found = []
        for seed, (space, pool, held_out) in enumerate(problems):
            rng = np.random.default_rng([seed, 3])
            metrics = list(pool[0][1])
            weights = dict(zip(metrics, rng.dirichlet(np.ones(len(metrics))).tolist(), strict=True))
            runs = [pool[i] for i in rng.permutation(len(pool))[:n]]
            found.append(scores(fitted(space, runs, weights, seed), space, held_out, weights))
        z = np.stack(found)  # seeds x runs x (1 + p)
        inside = np.abs(z) <= Z90
        each, ratio = inside[..., 0].mean(-1), np.sqrt(np.square(z).mean((0, 1)))
        print(
            f"{name:<10}{n:>4} runs   sum {each.mean():.1%} ({each.min():.0%} to {each.max():.0%}), ratio "
            f"{ratio[0]:.2f}   metrics {inside[..., 1:].mean():.1%}, ratio {np.median(ratio[1:]):.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, help="folder with regmix/; without it, made-up metrics only")
    parser.add_argument("--seeds", type=int, default=16)
    options = parser.parse_args()
    for name, make in (("box", box), ("mixture", mixture)):
        made = [make(seed, max(SIZES) + HELD_OUT) for seed in range(options.seeds)]
        compare(name, [(space, runs[: max(SIZES)], runs[max(SIZES) :]) for space, runs in made])
    if options.tables:
        train, test = (regmix(options.tables / "regmix" / f"1M_{part}.csv") for part in ("train", "test"))
        space = Space(data=Mixture(*train[0][0]["data"]))
        compare("RegMix", [(space, train, test)] * options.seeds)


if __name__ == "__main__":
    main()
