"""Does the best mixture move from 1M to 60M parameters, and does the model of both scales carry it?

    python -m experiments.replay.regmix_drift --tables DIR [--seeds 3]

For the 24 objectives of `regmix_objectives.json`. Among mixtures that were run at both scales: how often the best is
the same, what copying that of the small scale costs (mean and most), and the rank correlation (median and least). In
the whole simplex, on emulators fitted to all runs: how far the best mixtures lie apart (half the sum of absolute
differences), what copying costs there, and which shares grow or shrink with scale, with 90% bootstrap intervals over
objectives (of 17 shares that stay, one or two seem to move); beside the first two, what a second search at 60M says,
since a difference no larger shows nothing. And with the runs of these mixtures at 1M and of m at 60M: how well are the
others at 60M foretold? "copied" is the loss at 1M with a level, or a level and a slope, in logarithms, fitted to the m
runs of that loss; "model" is the posterior mean over both scales. Errors are root mean squares over runs and losses, in
percent, means over seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bo.policies.design import reproducible
from bo.policies.engine import Engine
from bo.policies.posterior import Search
from experiments.replay.protocol import column, interval, single
from experiments.replay.regmix import RESULTS, Ours, objectives, tables
from experiments.replay.regmix_baselines import Array, Question
from experiments.replay.regmix_simplex import emulator, lowest

TOLD = (4, 8, 16, 32, 64)


def among_runs(small: Array, large: Array) -> dict[str, Any]:
    """small, large: n x p losses of equal mixtures."""
    rows = []
    for weights in objectives():
        before, after = small @ weights, large @ weights
        copied = int(before.argmin())
        excess = 100 * (after[copied] / after.min() - 1)
        rows.append([copied == after.argmin(), excess, spearmanr(before, after)[0]])
    same, excess, rank = np.array(rows, dtype=float).T
    return {
        "the best is the same": short(same.mean()),
        "copying costs, %": [short(excess.mean()), short(excess.max())],
        "rank correlation": [short(np.median(rank)), short(rank.min())],
    }


def in_the_simplex(folder: Path, names: list[str]) -> dict[str, Any]:
    found: dict[str, Array] = {}
    for number, weights in enumerate(objectives()):
        small, (large, least) = lowest(folder, number, "1M", True)[0], lowest(folder, number, "60M", True)
        again, other = lowest(folder, number, "60M", True, again=1)
        copied = float(emulator(folder, True).losses(small[None])[0] @ weights)
        apart, luck = (np.abs(each - large).sum() / 2 for each in (small, again))
        costs = (100 * (each / least - 1) for each in (copied, other))
        found[str(number)] = np.array([[apart, luck, *costs, *(large - small)]])
    said = ("apart", "two searches at 60M apart", "copying costs, %", "the other search costs, %")
    shifts = {name: interval(found, column(len(said) + i)) for i, name in enumerate(names)}
    moved = {name: str(s) for name, s in shifts.items() if s.low > 0 or s.high < 0}
    return {what: str(interval(found, column(i))) for i, what in enumerate(said)} | {"shares that move": moved}


def foretold(shares: Array, small: Array, large: Array, told: int, seed: int) -> dict[str, float]:
    """Errors at the runs of the large scale that were not told, in percent."""
    rows = np.random.default_rng([seed, told]).permutation(len(shares))
    given, other = rows[:told], rows[told:]
    x, y = np.log(small), np.log(large)
    level = x + (y - x)[given].mean(0)
    centred, about = x - x[given].mean(0), y[given].mean(0)
    slope = (centred[given] * (y[given] - about)).sum(0) / np.square(centred[given]).sum(0)
    guesses = {"copied, level": level, "copied, slope": about + slope * centred}
    p = small.shape[1]
    question = Question(
        shares=shares,
        weights=np.full(p, 1 / p),
        proxies=shares,
        proxy_losses=small,
        bought=tuple(given.tolist()),
        losses=large[given],
        held=shares[:0],
        held_losses=small[:0],
    )
    guesses["model"] = np.log(model(question))
    return {name: 100 * float(np.sqrt(np.square(guess - y)[other].mean())) for name, guess in guesses.items()}


def model(question: Question) -> Array:
    """Posterior mean of every loss of every row at the target, n x p."""
    history, configs = Ours().history(question)
    rng = np.random.default_rng(0)
    with reproducible(rng):
        found = Search.of(history, history.space.top, Engine(), rng).model
    place = found.data.place(history.space.top)
    with torch.no_grad():
        belief = found.around(place)
        mean = found.gp.mean(belief.inputs(torch.as_tensor(history.space.encode_all(configs))))  # p x n
        losses, _ = found.data.outcome.backward(mean.T, found.data.outcome.level(place))
    return np.asarray(losses)


def short(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder with blackbox.py and regmix/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULTS.with_name("replay_regmix_drift.json"))
    options = parser.parse_args()
    single()
    folder = options.tables.resolve()
    (shares, large), _, (_, small) = tables(folder)
    with (folder / "regmix" / "60M_test.csv").open(newline="") as file:
        names = [name.removeprefix("mix_") for name in next(csv.reader(file)) if name.startswith("mix_")]
    result: dict[str, Any] = {"among the runs": among_runs(small, large)}
    result["left-out runs at 60M, errors in %"] = {}
    for told in TOLD:
        errors = [foretold(shares, small, large, told, seed) for seed in range(options.seeds)]
        means = {name: short(float(np.mean([each[name] for each in errors]))) for name in errors[0]}
        result["left-out runs at 60M, errors in %"][f"{told} told"] = means
        print(told, means, flush=True)
    result["in the simplex"] = in_the_simplex(folder, names)
    text = json.dumps(result, indent=2)
    options.result.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
