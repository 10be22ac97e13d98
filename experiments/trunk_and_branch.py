"""Short decays from the checkpoints of one run in place of shorter runs: are they right, and do they pay?

    python -m experiments.trunk_and_branch [--sizes 0.03M,0.1M] [--seeds 6] [--budget 2] [--folder DIR]

On the language-model job, with WSD schedules alone. First, runs of the smallest model that branch on the way, next to
runs of their own at the same scales: the difference with equal seeds, which is what the longer warm-up of a trunk does,
beside the scatter of seeds; and how far the luck of a branch is that of its trunk. Then proxies of all sizes but the
target's, which is the last, as trunks (three numbers of tokens a run) and each by a run of its own, at equal compute by
6 N D. What the model makes of either is asked about runs at the target that it was not given, and by a target run of
the configuration that it believes best.

Every run is kept in --folder, so an interrupted experiment goes on; the numbers go to results/trunk_and_branch.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bo import History, Trial, dataset
from bo.policies import model_choice, posterior, trunks
from bo.policies.design import reproducible, sobol
from bo.ports import Branched, Message, Proposal, Returned
from bo.trial import Branch
from bo.worker import execute
from experiments.corpus import open_corpus
from integrations.training_file import Loaded, TrainingFile
from search_spaces import Fidelity, Real, Scale, Schedule, Space

JOB = TrainingFile(Path(__file__).parent / "language_model.py")
RESULTS = Path(__file__).parent / "results" / "trunk_and_branch.json"
TOKENS = (50e3, 100e3, 200e3, 400e3)  # the last is the target's
WARMUPS = (0.05, 0.1)  # of which the first is that of the proxies
CONFIGS, LUCKS = 6, 4  # of the first part: configurations, seeds of each
POOL = 12  # runs at the target that no model is given
ARMS: Mapping[str, str | None] = {"trunks": "tokens", "single": None}
Record = dict[str, Any]


def job_space(job: Loaded, sizes: Sequence[str], warmup: float) -> Space:
    """The job's space with nothing but WSD schedules, and scales of its own."""
    assert job.space.fidelity is not None
    labels = dict(zip(job.space.fidelity.axes[0].labels, job.space.fidelity.axes[0].values, strict=True))
    return Space(
        **{name: job.space.parameters[name] for name in ("lr", "batch") if name in job.space.parameters},
        schedule=Schedule(warmup=warmup, floor=0.0, wsd={"decay": Real(0.1, 0.4)}),
        data=job.space.parameters["data"],
        fidelity=Fidelity(
            params={label: labels[label] for label in sizes},
            tokens=TOKENS,
            target={"params": sizes[-1], "tokens": TOKENS[-1]},
        ),
    )


@dataclass(frozen=True)
class Runs:
    """Training runs, each made once and kept as a line of a file."""

    job: Loaded
    path: Path
    kept: dict[str, Record]

    @classmethod
    def open(cls, job: Loaded, folder: Path) -> Runs:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "runs.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return cls(job, path, {record["key"]: record for record in map(json.loads, lines)})

    def fly(
        self, key: str, space: Space, config: Mapping[str, Any], scale: Scale, seed: int, wanted: Sequence[Scale] = ()
    ) -> Trial:
        """The run as a told trial, with its branches."""
        if key not in self.kept:
            self.kept[key] = self._made(key, space, config, scale, seed, tuple(wanted))
            with self.path.open("a") as file:
                file.write(json.dumps(self.kept[key]) + "\n")
            print(f"{key}: {self.kept[key]['loss']} in {self.kept[key]['seconds']:.1f} s", flush=True)
        return self._trial(self.kept[key], space)

    def _made(
        self, key: str, space: Space, config: Mapping[str, Any], scale: Scale, seed: int, wanted: tuple[Scale, ...]
    ) -> Record:
        said: list[Message] = []
        trial = Trial(0, config, scale, seed, "experiment", wanted=wanted)
        with TemporaryDirectory() as folder:
            send, clock = lambda message: bool(said.append(message)), time.process_time
            last = execute(self.job.train, trial, Path(folder), send, log=True, clock=clock)
        metrics = dict(last.metrics) if isinstance(last, Returned) else None
        assert metrics is not None or getattr(last, "diverged", False), last
        return {
            "key": key,
            "config": space.to_json(config),
            "scale": scale.to_json(),
            "seed": seed,
            "metrics": metrics,
            "loss": None if metrics is None else self.job.objective.value(metrics),
            "branches": [[m.scale.to_json(), dict(m.metrics)] for m in said if isinstance(m, Branched)],
            "cost": Proposal(config, scale, "experiment", wanted=wanted).cost(space),
            "seconds": getattr(last, "seconds", 0.0),
        }

    def _trial(self, record: Record, space: Space) -> Trial:
        assert space.fidelity is not None
        at = space.fidelity.scale
        return Trial(
            id=0,
            config=space.from_json(record["config"]),
            scale=at(record["scale"]),
            seed=record["seed"],
            source="experiment",
            cost=record["cost"],
            status="diverged" if record["metrics"] is None else "finished",
            metrics=record["metrics"],
            seconds=record["seconds"],
            branches=tuple(Branch(at(scale), metrics) for scale, metrics in record["branches"]),
        )


# ----------------------------------------------------------------------------------------------------- are they right


def compare_results(runs: Runs, sizes: Sequence[str]) -> list[Record]:
    """Every branch next to the run that it stands for, for both lengths of warm-up; NaN where one diverged."""
    found = []
    for warmup in WARMUPS:
        space = job_space(runs.job, sizes, warmup)
        assert space.fidelity is not None
        long, *short = (space.fidelity.scale({"params": sizes[0], "tokens": tokens}) for tokens in TOKENS[2::-1])
        for c, config in enumerate(sobol(space, 0, 0, CONFIGS)):
            for seed in range(LUCKS):
                name = f"right/{warmup}/{c}/{seed}"
                trunk = runs.fly(f"{name}/trunk", space, config, long, seed, short)
                for scale in short:
                    alone = runs.fly(f"{name}/{scale['tokens']:g}", space, config, scale, seed)
                    branch = next((branch for branch in trunk.branches if branch.scale == scale), None)
                    metrics = (trunk.metrics, branch and branch.metrics, alone.metrics)
                    losses = [runs.job.objective.value(m) if m else math.nan for m in metrics]
                    found.append(
                        {
                            "warmup": warmup,
                            "config": c,
                            "lr": config["lr"],
                            "seed": seed,
                            "tokens": scale["tokens"],
                            **dict(zip(("trunk", "branch", "alone"), losses, strict=True)),
                        }
                    )
    return found


def table_of_results(found: Sequence[Record]) -> str:
    """Of each warm-up and number of tokens: bias and its scatter over configurations, scatter of seeds, shared luck."""
    lines = [
        f"{'warm-up':<9}{'tokens':<9}{'branch - own run':<26}{'over configs':<14}{'seeds':<9}luck shared with trunk"
    ]
    for warmup in WARMUPS:
        for tokens in TOKENS[:2]:
            rows = [row for row in found if row["warmup"] == warmup and row["tokens"] == tokens]
            by = {
                name: np.array([row[name] for row in rows]).reshape(-1, LUCKS) for name in ("trunk", "branch", "alone")
            }
            kept = np.isfinite(sum(by.values())).all(1)
            by = {name: values[kept] for name, values in by.items()}
            gap = (by["branch"] - by["alone"]).mean(1)  # one a configuration
            luck = {name: (values - values.mean(1, keepdims=True)).ravel() for name, values in by.items()}
            seeds = np.sqrt((luck["alone"] ** 2).sum() / (len(gap) * (LUCKS - 1)))
            low, high = interval(gap)
            shared = np.corrcoef(luck["trunk"], luck["branch"])[0, 1]
            lines.append(
                f"{warmup:<9}{tokens:<9g}{f'{gap.mean():+.4f} ({low:+.4f} to {high:+.4f})':<26}"
                f"{gap.std(ddof=1):<14.4f}{seeds:<9.4f}{shared:.2f}"
            )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- do they pay


def proxies(runs: Runs, space: Space, arm: str, seed: int, budget: float) -> list[Trial]:
    """As many rounds of one result a cell as the budget pays for, space-filling as the ladder's."""
    assert space.fidelity is not None
    axis = ARMS[arm]
    cells = [cell for cell in space.fidelity.cells() if all(cell[name] < space.top[name] for name in cell)]
    cost, _ = trunks.price(space, cells, axis, sobol(space, seed, 0, 64))
    each = [cell for cell in cells for _ in range(int(budget / cost))]

    def draw(at: Scale, number: int) -> dict[str, Any]:
        return sobol(space.at(at), seed, number, 1)[0]

    trials: list[Trial] = []
    for i, (config, at, wanted) in enumerate(trunks.runs(space, each, axis, draw)):
        made = runs.fly(f"pay/{arm}/{seed}/{i}", space, config, at, 1000 * seed + i, wanted)
        trials.append(replace(made, id=len(trials)))
    return trials


def judge(runs: Runs, space: Space, arm: str, seed: int, budget: float, pool: Sequence[Trial]) -> Record:
    """What the proxies of one arm tell of the target."""
    trials = proxies(runs, space, arm, seed, budget)
    history = History(space, runs.job.objective, tuple(trials))
    at, value = space.top, runs.job.objective.value
    with reproducible(np.random.default_rng(seed)):
        model, _ = model_choice.fit(dataset.from_history(history), at)
        with torch.no_grad():
            said = -model.at(at).mean(torch.as_tensor(space.encode_all([run.config for run in pool]))).numpy()
    losses = np.array([value(run.metrics or {}) for run in pool])
    with reproducible(np.random.default_rng(seed)):
        (first,) = posterior.propose(history, 1, np.random.default_rng(seed), "first", greedy=True)
    target = runs.fly(f"first/{arm}/{seed}", space, first.config, at, 0)
    return {
        "arm": arm,
        "seed": seed,
        "runs": len(trials),
        "results": sum(1 + len(trial.branches) for trial in trials),
        "diverged": sum(trial.status == "diverged" for trial in trials),
        "cost": sum(trial.cost for trial in trials),
        "seconds": sum(trial.seconds or 0.0 for trial in trials),
        "correlation": float(spearmanr(said, losses)[0]),
        "picked": float(losses[said.argmin()] - losses.min()),
        "first": None if target.metrics is None else value(target.metrics),
    }


def table_of_arms(judged: Sequence[Record]) -> str:
    lines = [f"{'':<24}{'trunks':<28}{'runs of their own':<28}trunks less own, 90% interval"]
    for name in ("cost", "seconds", "runs", "results", "correlation", "picked", "first"):
        mine, own = (np.array([row[name] for row in judged if row["arm"] == arm], dtype=float) for arm in ARMS)
        cells = [f"{np.median(v):.4g} ({v.min():.4g} to {v.max():.4g})" for v in (mine, own)]
        low, high = interval(mine - own)
        lines.append(f"{name:<24}{cells[0]:<28}{cells[1]:<28}{(mine - own).mean():+.4g} ({low:+.4g} to {high:+.4g})")
    return "\n".join(lines)


def interval(values: np.ndarray) -> tuple[float, float]:
    """A 90% bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(1)
    return float(np.quantile(means, 0.05)), float(np.quantile(means, 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="0.03M,0.1M", help="of the proxies and, last, of the target")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--budget", type=float, default=2.0, help="of the proxies of an arm, in target runs")
    parser.add_argument("--folder", type=Path, default=Path("studies/trunk_and_branch"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sizes = options.sizes.split(",")
    runs = Runs.open(JOB.load(), options.folder / "-".join(sizes))
    found = compare_results(runs, sizes)
    print(table_of_results(found), flush=True)
    space = job_space(runs.job, sizes, WARMUPS[0])
    pool = [runs.fly(f"pool/{i}", space, config, space.top, 0) for i, config in enumerate(sobol(space, 12345, 0, POOL))]
    finished = [run for run in pool if run.status == "finished"]
    judged = [judge(runs, space, arm, seed, options.budget, finished) for seed in range(options.seeds) for arm in ARMS]
    print(table_of_arms(judged))
    note = {
        "corpus": open_corpus().sha256,
        "sizes": sizes,
        "budget": options.budget,
        "versions": {package: version(package) for package in ("torch", "botorch", "numpy")},
        "right": found,
        "pay": judged,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
