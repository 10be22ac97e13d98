"""What the model should see of a schedule and of a mixture: predictions of runs that it was not given.

    python -m experiments.compare_features [--tables DIR] [--seeds 8]

Schedules: configurations of three spaces with a loss that a law of the curve gives (Tissue et al. 2024, arXiv
2408.11029: L = L0 + A S1^-alpha - C S2), once seen as curves, as they are, and once by family and settings, like any
other choice with parameters. Mixtures: 1M-parameter runs of RegMix (arXiv 2407.01492; DIR holds regmix/1M_train.csv and
1M_test.csv), with the power of the shares learned, as it is, and fixed at 1/3. Printed is the Spearman correlation of
predictions with the truth over held-out runs, for mixtures the mean over 13 validation losses: medians over seeds, with
their range.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bo import History, Trial, WeightedSum, dataset
from bo.policies.design import reproducible
from bo.ports import Limits
from bo.surrogates import composite, hyperparameters
from search_spaces import FAMILIES, Mixture, Scale, Schedule, Space

STEPS = 1000
SPACES = {
    "13 families": Schedule(*(name for name in FAMILIES if name not in ("power", "refined"))),
    "4 families": Schedule("cosine", "linear", "wsd", "rex"),
    "wsd alone": Schedule("wsd"),
}
Run = tuple[Mapping[str, Any], Mapping[str, float]]
"""A config and its metrics."""


def law(config: Mapping[str, Any]) -> float:
    """L0 + A S1^-alpha - C S2 with S1 and S2 in units of the steps, and constants of the size of the paper's."""
    schedule = config["schedule"]
    return float(
        2.5 + 0.5 * (schedule.s1(STEPS) / STEPS) ** -0.4 - 0.4 * schedule.s2(STEPS, momentum=0.99) / (STEPS / 10)
    )


def correlation(space: Space, train: Sequence[Run], test: Sequence[Run], seed: int) -> float:
    """Spearman correlation of predicted with measured metrics of `test`, given `train`; the mean over metrics."""
    metrics = list(train[0][1])
    trials = tuple(
        Trial(id=i, config=config, scale=Scale(), seed=0, source="added", status="finished", metrics=measured)
        for i, (config, measured) in enumerate(train)
    )
    history = History(space, WeightedSum(dict.fromkeys(metrics, 1.0)), trials, Limits(), 0, {})
    with reproducible(np.random.default_rng(seed)), torch.no_grad():
        with torch.enable_grad():
            gp = composite.fit(dataset.from_history(history)).gp
        X = torch.as_tensor(space.encode_all([config for config, _ in test]))
        mean, _ = gp.posterior(gp.features(X, torch.zeros(len(X), 0), torch.zeros(len(X), dtype=torch.long)))
    truth = np.array([[measured[name] for name in metrics] for _, measured in test])
    return float(np.mean([spearmanr(-mean[k].numpy(), truth[:, k])[0] for k in range(len(metrics))]))


def by_settings(space: Space) -> Space:
    """The same space, whose schedules look to a model like any choice with parameters."""
    copy = Space(**space.parameters)
    object.__setattr__(copy, "columns", tuple(replace(column, schedule="") for column in copy.columns))
    return copy


def schedules(seeds: int) -> None:
    for name, schedule in SPACES.items():
        space = Space(schedule=schedule)
        for n in (15, 30):
            found: dict[str, list[float]] = {"curve": [], "settings": []}
            for seed in range(seeds):
                configs = space.sample(np.random.default_rng(seed), n + 100)
                runs = [(config, {"loss": law(config)}) for config in configs]
                found["curve"].append(correlation(space, runs[:n], runs[n:], seed))
                found["settings"].append(correlation(by_settings(space), runs[:n], runs[n:], seed))
            show(f"{name}, {n} runs", found)


def mixtures(tables: Path, seeds: int) -> None:
    train, test = (regmix(tables / "regmix" / f"1M_{part}.csv") for part in ("train", "test"))
    space = Space(data=Mixture(*train[0][0]["data"]))
    for n in (32, 64):
        found: dict[str, list[float]] = {"learned": [], "fixed": []}
        for seed in range(seeds):
            chosen = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:n]]
            found["learned"].append(correlation(space, chosen, test, seed))
            enough, hyperparameters.ENOUGH_MIXTURES = hyperparameters.ENOUGH_MIXTURES, len(train)
            try:
                found["fixed"].append(correlation(space, chosen, test, seed))
            finally:
                hyperparameters.ENOUGH_MIXTURES = enough
        show(f"RegMix, {n} mixtures", found)


def regmix(path: Path) -> list[Run]:
    """The runs of a table; its shares have three decimals and are divided by their sum."""
    runs = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            shares = {name[4:]: float(value) for name, value in row.items() if name.startswith("mix_")}
            total = sum(shares.values())
            losses = {name: float(value) for name, value in row.items() if name.startswith("loss_")}
            runs.append(({"data": {name: share / total for name, share in shares.items()}}, losses))
    return runs


def show(what: str, found: Mapping[str, Sequence[float]]) -> None:
    cells = [f"{name} {median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for name, values in found.items()]
    first, second = found.values()
    ahead = sum(mine > other for mine, other in zip(first, second, strict=True))
    print(f"{what:<24}{cells[0]:<34}{cells[1]:<34}ahead in {ahead} of {len(first)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", type=Path, help="folder with regmix/; without it, schedules only")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    schedules(options.seeds)
    if options.tables:
        mixtures(options.tables, options.seeds)


if __name__ == "__main__":
    main()
