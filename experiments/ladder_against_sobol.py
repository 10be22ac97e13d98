"""Does the ladder beat Sobol search at equal compute on the real language-model job?

    python -m experiments.ladder_against_sobol --seeds 5 --budget 8 --workers 2

Both arms search the same space with the same training function and spend the same compute, counted in target runs: the
ladder's proxies are paid for out of its budget, and neither arm gets a baseline. An arm is scored by the best target
loss it has measured once a share of the budget is spent. Small models use a processor worse than 6 N D says, so Sobol
runs on beyond the budget, and the last line of the table compares at equal measured seconds as well. Studies are kept
in --folder, so an interrupted run goes on; the numbers go to experiments/results/ladder_against_sobol.json.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from bo import Study, run
from bo.journal import NAME, read
from experiments.corpus import open_corpus
from integrations.in_process import InProcess
from integrations.training_file import TrainingFile

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget
ARMS = {"ladder": 1.0, "sobol": 1.25}  # and what it may spend, in budgets
JOB = Path(__file__).parent / "language_model.py"
RESULTS = Path(__file__).parent / "results" / "ladder_against_sobol.json"


def search(arm: str, seed: int, folder: Path, budget: float) -> dict[str, Any]:
    """One study of one arm; what it had found when each share of the budget was spent."""
    job = TrainingFile(JOB).load()
    path = folder / f"{arm}-{seed}"
    if read(path / NAME)[0]:
        study = Study.open(path, space=job.space, objective=job.objective)
    else:
        study = Study.create(path, job.space, objective=job.objective, seed=seed, policy=arm)
    with study:
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
    """Median best loss of each arm, with its range, and the paired difference."""
    by = {(result["arm"], result["seed"]): result["progress"] for result in results}
    lines = [
        f"{'':<20}{'ladder, median (range)':<29}{'sobol, median (range)':<29}{'sobol - ladder, paired':<33}ladder ahead"
    ]
    for share in (*SHARES, None):
        arms: dict[str, list[float | None]] = {arm: [] for arm in ARMS}
        for arm, seed in product(ARMS, range(seeds)):
            column, most = (0, budget * share) if share else (1, by["ladder", seed][-1][1])
            arms[arm].append(next((p[2] for p in reversed(by[arm, seed]) if p[column] <= most + 1e-9), None))
        pairs = [
            (sobol, ladder)
            for sobol, ladder in zip(arms["sobol"], arms["ladder"], strict=True)
            if None not in (sobol, ladder)
        ]
        cells = []
        for arm in ARMS:
            told = [value for value in arms[arm] if value is not None]
            text = f"{median(told):.4f} ({min(told):.4f} to {max(told):.4f})" if told else "none told yet"
            cells.append(f"{text:<29}")
        gains = [sobol - ladder for sobol, ladder in pairs]
        gain = f"{median(gains):+.4f} ({min(gains):+.4f} to {max(gains):+.4f})" if gains else ""
        name = f"{share:.0%} of the budget" if share else "equal seconds"
        lines.append(f"{name:<20}{''.join(cells)}{gain:<33}{sum(g > 0 for g in gains)} of {len(gains)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=8.0, help="of each arm, in target runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("studies/ladder_against_sobol"))
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
