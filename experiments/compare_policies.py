"""Do proxies pay on the real language-model job? The ladder against search at the target alone, at equal compute.

    python -m experiments.compare_policies --seeds 5 --budget 8 --workers 2

All arms search the same space with the same training function and spend the same compute, counted in target runs: the
ladder's proxies are paid for out of its budget, and no arm gets a baseline. An arm is scored by the best target loss it
has measured once a share of the budget is spent. Small models use a processor worse than 6 N D says, so the arms
without proxies run on beyond the budget, and the last lines of the table compare at equal measured seconds as well.
Studies are kept in --folder, so an interrupted run goes on; the numbers go to results/compare_policies.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from bo import Study, run
from experiments.corpus import open_corpus
from integrations.in_process import InProcess
from integrations.training_file import TrainingFile

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget
ARMS = {"ladder": 1.0, "bayes": 1.25, "sobol": 1.25}  # and what it may spend, in budgets
JOB = Path(__file__).parent / "language_model.py"
RESULTS = Path(__file__).parent / "results" / "compare_policies.json"


def search(arm: str, seed: int, folder: Path, budget: float) -> dict[str, Any]:
    """One study of one arm; what it had found when each share of the budget was spent."""
    job = TrainingFile(JOB).load()
    path = folder / f"{arm}-{seed}"
    with Study.open_or_create(path, job.space, objective=job.objective, seed=seed, policy=arm) as study:
        run(study, job.train, executor=InProcess(), budget=budget * ARMS[arm])
    return {"arm": arm, "seed": seed, "progress": progress(study), **counts(study)}


def progress(study: Study) -> list[tuple[float, float, float | None]]:
    """After each trial: target runs spent, seconds trained, the best target loss so far."""
    best: float | None = None
    spent, seconds = 0.0, 0.0
    curve: list[tuple[float, float, float | None]] = []
    for trial in study.trials:
        spent, seconds = spent + trial.cost, seconds + (trial.seconds or 0.0)
        if trial.status == "finished" and trial.scale == study.top:
            value = study.objective.value(trial.metrics or {})
            best = value if best is None else min(best, value)
        curve.append((spent, seconds, best))
    return curve


def counts(study: Study) -> dict[str, Any]:
    at_top = [trial for trial in study.trials if trial.scale == study.top]
    return {
        "proxies": len(study.trials) - len(at_top),
        "target_runs": len(at_top),
        "diverged": sum(trial.status == "diverged" for trial in study.trials),
        "spent": round(study.spent, 3),
        "proxy_seconds": round(sum(t.seconds or 0.0 for t in study.trials if t.scale != study.top), 1),
        "target_seconds": round(sum(t.seconds or 0.0 for t in at_top), 1),
        "best_config": study.space.to_json(best.config) if (best := study.best()) else None,
    }


def table(results: list[dict[str, Any]], seeds: int, budget: float) -> str:
    """Each arm's best loss, and by how much the ladder is ahead of it on the same seeds: medians, with ranges."""
    by = {(result["arm"], result["seed"]): result["progress"] for result in results}
    lines = [f"{'':<20}{'':<8}{'best target loss':<28}{'behind the ladder':<31}ladder ahead"]
    for share in (*SHARES, None):
        name = f"{share:.0%} of the budget" if share else "equal seconds"
        best: dict[str, list[float]] = {}
        for arm in ARMS:
            best[arm] = []
            for seed in range(seeds):
                column, most = (0, budget * share) if share else (1, by["ladder", seed][-1][1])
                told = (p[2] for p in reversed(by[arm, seed]) if p[column] <= most + 1e-9)
                best[arm].append(next((loss for loss in told if loss is not None), math.inf))
            behind = [mine - ladder for mine, ladder in zip(best[arm], best["ladder"], strict=True)]
            compared = (
                "" if arm == "ladder" else f"{spread(behind, '+'):<31}{sum(gap > 0 for gap in behind)} of {seeds}"
            )
            lines.append(f"{name:<20}{arm:<8}{spread(best[arm]):<28}{compared}".rstrip())
            name = ""
    return "\n".join(lines)


def spread(values: list[float], sign: str = "") -> str:
    return f"{median(values):{sign}.4f} ({min(values):{sign}.4f} to {max(values):{sign}.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=8.0, help="of each arm, in target runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("studies/compare_policies"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    corpus = open_corpus()
    print(f"corpus {corpus.sha256[:16]}, {options.seeds} seeds, {options.budget:g} target runs an arm", flush=True)
    results = []
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(search, arm, seed, options.folder, options.budget)
            for seed, arm in product(range(options.seeds), ARMS)
        ]
        for job_done in jobs:
            results.append(job_done.result())
            last = results[-1]
            print(
                f"{last['arm']:<7} seed {last['seed']}: {last['progress'][-1][2]} after {last['spent']} target runs",
                flush=True,
            )
    print(table(results, options.seeds, options.budget))
    RESULTS.parent.mkdir(exist_ok=True)
    note = {
        "corpus": corpus.sha256,
        "budget": options.budget,
        "versions": {package: version(package) for package in ("torch", "botorch", "numpy")},
        "results": results,
    }
    RESULTS.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
