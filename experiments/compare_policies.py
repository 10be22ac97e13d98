"""Do proxies pay on the real language-model job? The ladder against search at the target alone, at equal compute.

    python -m experiments.compare_policies --seeds 5 --budget 8 --workers 2
    python -m experiments.compare_policies --report      # the table and the figure again, from the numbers kept

All arms search the same space with the same training function and spend the same compute, counted in target runs: the
ladder's proxies are paid for out of its budget, and no arm gets a baseline. An arm is scored by the best target loss it
has measured once a share of the budget is spent. Small models use a processor worse than 6 N D says, so the arms
without proxies run on beyond the budget, and the last lines of the table compare at equal seconds as well. Seconds are
those of the processor, for a run trains on one thread of the search's own process, and the report takes their median at
each scale: other work on the machine does not count, and neither do proposals.

Studies are kept in --folder, so an interrupted search goes on (of the run that was cut, the seconds after that alone
are counted). The numbers go to results/compare_policies.json, a line a trial, and the figure beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bo import Pareto, Study, Trial, run
from experiments import campaign_report
from experiments.corpus import open_corpus
from integrations.in_process import InProcess
from integrations.training_file import TrainingFile

ARMS = {"ladder": 1.0, "bayes": 1.4, "sobol": 1.4}  # and what it may spend, in budgets
JOB = Path(__file__).parent / "language_model.py"
RESULTS = Path(__file__).parent / "results" / "compare_policies.json"


# --------------------------------------------------------------------------------------------------------- the searches


def search(arm: str, seed: int, folder: Path, budget: float, job: Path = JOB) -> dict[str, Any]:
    """One study of one arm: its trials, a row each, and what the ladder's model says of the scales at the end."""
    import torch  # before the first run, whose time it is not

    torch.set_num_threads(1)
    file = TrainingFile(job).load()
    executor = InProcess(clock=time.process_time)
    with Study.open_or_create(
        folder / f"{arm}-{seed}", file.space, objective=file.objective, seed=seed, policy=arm
    ) as study:
        run(study, file.train, executor=executor, budget=budget * ARMS[arm])
        rows = [row(study, trial) for trial in study.trials]
        found = across(study) if arm == "ladder" else {}
    return {"arm": arm, "seed": seed, "trials": rows, **found}


def row(study: Study, trial: Trial) -> dict[str, Any]:
    assert not isinstance(study.objective, Pareto)
    finished = trial.status == "finished"
    kept = {
        "id": trial.id,
        "source": trial.source,
        "scale": dict(trial.scale),
        "cost": trial.cost,
        "seconds": None if trial.seconds is None else round(trial.seconds, 3),
        "status": trial.status,
        "loss": study.objective.value(trial.metrics or {}) if finished else None,
        "config": study.space.to_json(trial.config),
    }
    return kept | ({"predicted": dict(trial.predicted)} if trial.predicted else {})


def across(study: Study) -> dict[str, Any]:
    """What `windtunnel diagnose` says of drifts and of trust, and what is recommended at each scale that ran."""
    from bo.analysis import diagnose  # torch

    said = diagnose(study.history(), None, np.random.default_rng(study.seed), study.settings.get("surrogate", "gp"))
    best = []
    for scale in sorted({trial.scale for trial in study.trials}, key=study.space.cost):
        at = study.recommend(scale)
        best.append(
            {
                "scale": dict(scale),
                "cost": study.space.cost(scale),
                **{name: getattr(at, name) for name in ("mean", "low", "high", "guess", "trust")},
                "config": study.space.to_json(at.config),
                "intervals": {path: list(ends) for path, ends in at.intervals.items()},
            }
        )
    return {"drifts": [asdict(drift) for drift in said.drifts], "trust": said.trust, "recommended": best}


# ------------------------------------------------------------------------------------------------------------- the file


def to_text(value: Any, depth: int = 4, line: str = "\n") -> str:
    """JSON whose first `depth` levels take lines of their own: a line for each trial."""
    if not depth or not value or not isinstance(value, dict | list):
        return json.dumps(value, allow_nan=False)
    more, (first, last) = line + " ", "{}" if isinstance(value, dict) else "[]"
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    parts = value.values() if isinstance(value, dict) else value
    lines = [name + to_text(part, depth - 1, more) for name, part in zip(names, parts, strict=True)]
    return first + more + f",{more}".join(lines) + line + last


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=8.0, help="of each arm, in target runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("studies/compare_policies"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON; the figure is beside it")
    parser.add_argument("--report", action="store_true", help="run nothing: the table and the figure of --results")
    options = parser.parse_args(argv)
    if not options.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # seconds are the processor's
        note = campaign(options.seeds, options.budget, options.workers, options.folder)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(to_text(note) + "\n", encoding="utf-8")
    note = campaign_report.load(options.results)
    print(campaign_report.table(note))
    print(campaign_report.draw(note, options.results.with_suffix(".png")))


def campaign(seeds: int, budget: float, workers: int, folder: Path) -> dict[str, Any]:
    corpus = open_corpus()
    print(f"corpus {corpus.sha256[:16]}, {seeds} seeds, {budget:g} target runs an arm", flush=True)
    results = []
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(search, arm, seed, folder, budget) for seed, arm in product(range(seeds), ARMS)]
        for job in jobs:
            results.append(last := job.result())
            spent, seconds, best = campaign_report.progress(last["trials"])[-1]
            print(f"{last['arm']:<7} seed {last['seed']}: {best} after {spent:.3f}, {seconds:.0f} s", flush=True)
    versions = {package: version(package) for package in ("torch", "botorch", "numpy")}
    return {"corpus": corpus.sha256, "budget": budget, "versions": versions, "results": results}


if __name__ == "__main__":
    main()
