"""Which model of several scales foretells the target best? Every one of them on the same runs of real language models.

    python -m experiments.compare_scale_models --tables DIR [--seeds 5] [--models gp,multi_task] [--runs 0,2,4]

DIR holds `blackbox.py` and the Step-Law tables, disguised, as in `replay.steplaw`, whose targets these are. From 6
space-filling proxies in each of the 3 cheapest cells, or 12 in 5, and from 0, 2 or 4 random target runs, each model
foretells 200 other target runs. "alone" is the usual process given the target runs only. Printed are

- the mean log density of the held-out runs in model units, less their mean over the runs, since no decision depends on
  the level of the target, which nobody knows without runs there;
- the rank correlation with them;
- the regret, in percent, of the configuration with the best posterior mean of 2000;
- the same in the mean, and how often it is at most 0.25%; the processor seconds of a fit.

All but those are medians over targets and seeds, with quartiles. Seeds are paired: all models see the same runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from bo import History, Minimize, dataset
from bo.dataset import Dataset, compress
from bo.policies.design import reproducible
from bo.surrogates import composite
from bo.surrogates.surrogate import SURROGATES
from experiments.compare.problems import blackbox
from experiments.replay import searches, steplaw
from experiments.replay.problem import Problem, proxies

ALONE = "alone"
DESIGNS = {setting.name: (setting.each, setting.cells) for setting in searches.FREE}
COMPARED = (
    "gp",
    "scale_shift",
    "multi_task",
    "autoregressive",
    "nonlinear_autoregressive",
    "product",
    "joint_input",
    "linear_truncated",
    "down_sampling",
    "ranking_ensemble",
    ALONE,
)
RUNS = (0, 2, 4)
HELD_OUT, CANDIDATES = 200, 2000


@dataclass(frozen=True)
class Score:
    """How well one model foretold one target."""

    density: float
    ranks: float
    regret: float
    seconds: float


@dataclass(frozen=True)
class HeldOut:
    """Target runs that no model sees, X: n x d and their losses, and candidates, k x d."""

    X: torch.Tensor
    losses: np.ndarray
    candidates: torch.Tensor

    @classmethod
    def of(cls, problem: Problem, seed: int) -> HeldOut:
        configs = problem.space().sample(np.random.default_rng([seed, 1]), HELD_OUT + CANDIDATES)
        losses = [problem.loss(config, problem.cells[-1], seed) for config in configs[:HELD_OUT]]
        X = torch.as_tensor(problem.space().encode_all(configs))
        return cls(X[:HELD_OUT], np.array(losses), X[HELD_OUT:])


def told(problem: Problem, design: tuple[int, int], runs: int, seed: int) -> Dataset:
    space = problem.space()
    trials = proxies(problem, space, *design, seed)
    configs = space.sample(np.random.default_rng([seed, 2]), runs)
    trials += [problem.run(len(trials) + i, c, space.top, "added", seed, 1.0) for i, c in enumerate(configs)]
    return dataset.from_history(History(space, Minimize("loss"), tuple(trials)))


def score(name: str, problem: Problem, data: Dataset, out: HeldOut, seed: int) -> Score:
    target = problem.cells[-1]
    here = data.at(target)
    with reproducible(np.random.default_rng(seed)), torch.no_grad():
        begun = time.process_time()
        with torch.enable_grad():
            seen = data.rows(here) if name == ALONE else data
            model = composite.fit(seen, surrogate="gp" if name == ALONE else name)
        seconds = time.process_time() - begun
        belief = model.at(target)
        mean, covariance = (part[0, 0].numpy() for part in model.gp.joint(belief.inputs(out.X), HELD_OUT))
        best = out.candidates[model.gp.mean(belief.inputs(out.candidates))[0].argmax()]
    y = model_units(data, out.losses, float(data.outcome.level(data.place(target)).best[0]) if here.any() else None)
    covariance = covariance + float(model.gp.noise[0]) * np.eye(HELD_OUT)
    centred = np.eye(HELD_OUT) - 1 / HELD_OUT
    variance = (centred @ covariance @ centred).diagonal()
    density = -0.5 * ((centred @ (y - mean)) ** 2 / variance + np.log(2 * np.pi * variance)).mean()
    regret = problem.regret(problem.space().decode(best.numpy()))
    return Score(float(density), float(spearmanr(y, mean)[0]), regret, seconds)


def model_units(data: Dataset, losses: np.ndarray, best: float | None) -> np.ndarray:
    """Losses at the target as the model sees them; best: of the target runs told, None where there are none."""
    outcome, u = data.outcome, torch.as_tensor(losses)[:, None]
    level = u.min(0).values if best is None else torch.tensor([best], dtype=torch.float64)
    units: np.ndarray = (-(compress((u - level) / outcome.size(level), outcome.cap) - outcome.mean) / outcome.sd)[
        :, 0
    ].numpy()
    return units


def spread(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def line(scores: Sequence[Score]) -> str:
    density, ranks, regret, seconds = (
        [getattr(each, name) for each in scores] for name in ("density", "ranks", "regret", "seconds")
    )
    near = np.mean(np.array(regret) <= 0.25)
    columns = f"{spread(density):<25}{spread(ranks):<23}{spread(regret):<23}"
    return f"{columns}{np.mean(regret):6.2f} {100 * near:5.0f}%  {np.mean(seconds):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder with blackbox.py and steplaw/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", default=",".join(name for name in COMPARED if name in (*SURROGATES, ALONE)))
    parser.add_argument("--designs", default=",".join(DESIGNS), help="proxies: some of " + ", ".join(DESIGNS))
    parser.add_argument("--runs", default=",".join(map(str, RUNS)), help="target runs that are told")
    args = parser.parse_args()
    tables, names = args.tables.resolve(), args.models.split(",")
    listed = steplaw.targets(blackbox(tables), None)
    problems = [searches.problem(tables, target, "models") for target in listed]
    held_out = [[HeldOut.of(problem, seed) for seed in range(args.seeds)] for problem in problems]
    print(f"{len(problems)} targets, {args.seeds} seeds; medians (quartiles)")
    header = f"{'log density':<25}{'rank correlation':<23}{'regret in %':<23}{'mean':>6} {'<=0.25':>6}  seconds"
    for design in args.designs.split(","):
        for runs in map(int, args.runs.split(",")):
            print(f"{f'proxies {design}, target runs {runs}':<36}{header}", flush=True)
            for name in names:
                if name == ALONE and not runs:
                    continue
                scores = [
                    score(name, problem, told(problem, DESIGNS[design], runs, seed), out, seed)
                    for problem, outs in zip(problems, held_out, strict=True)
                    for seed, out in enumerate(outs)
                ]
                print(f"  {name:<34}{line(scores)}", flush=True)


if __name__ == "__main__":
    main()
