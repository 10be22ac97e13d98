"""What a Ray Tune run loses when its driver is killed, with a study as its searcher and without.

    python -m experiments.tune_kills [--kills 3] [--arms ours,random,optuna] [--seed 0]

Each arm runs trials of one second, two at a time, on a cluster of its own; its driver is killed by SIGKILL up to eight
seconds after the first trial that it finished, and restored by Tuner.restore with Tune's own settings. A trial writes a
line when it has finished, so that what finished can be held against what the search knows in the end:

lost: finished runs whose result the search does not know. repeated: finished runs that were run again. told twice:
trials with two ends. left: trials without an end.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bo import Minimize, Study, journal
from search_spaces import Real, Space

REPOSITORY = Path(__file__).parents[1]
STEPS, STEP = 4, 0.25  # reports of a trial, seconds between them
TRIALS = 12  # a kill, and as many for the end
ARMS = {"ours": "a study", "random": "random search", "optuna": "OptunaSearch"}
DRIVE = "import sys; from experiments.tune_kills import drive; drive(*sys.argv[1:])"


def train(config: dict[str, Any]) -> None:
    from ray import tune

    write(config["folder"], "started", config["lr"])
    for step in range(1, STEPS + 1):
        time.sleep(STEP)
        tune.report({"loss": (config["lr"] - 0.3) ** 2 + 1 / step})
    write(config["folder"], "finished", config["lr"])


def write(folder: str, what: str, lr: float) -> None:
    with open(Path(folder) / what, "a") as file:
        file.write(f"{lr!r}\n")
        file.flush()
        os.fsync(file.fileno())


def drive(arm: str, folder: str, trials: str) -> None:
    """One driver: starts the run or restores it, and writes down what is known when it has come to its end."""
    import ray
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    path, grid = str(Path(folder) / "ray" / "tune"), None
    if tune.Tuner.can_restore(path):
        try:
            grid = tune.Tuner.restore(path, trainable=train).fit()
        except (ValueError, RuntimeError) as error:  # killed before its first snapshot
            write(folder, f"begun again: {error}".partition("\n")[0][:80].replace("/", " "), 0.0)
    if grid is None:
        space: dict[str, Any] = {"folder": folder}
        search = scheduler = None
        if arm == "ours":
            from integrations.tune_scheduler import StudyScheduler
            from integrations.tune_search import StudySearch

            study = Study.open_or_create(
                Path(folder) / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol"
            )
            study.limit(n_trials=int(trials))  # it counts what Tune has forgotten, too
            own = StudySearch(study)
            trials, search, scheduler = "-1", ConcurrencyLimiter(own, max_concurrent=2), StudyScheduler(own)
        else:
            space["lr"] = tune.uniform(0.0, 1.0)
        if arm == "optuna":
            from ray.tune.search.optuna import OptunaSearch

            search = ConcurrencyLimiter(OptunaSearch(metric="loss", mode="min"), max_concurrent=2)
        config = tune.TuneConfig(search_alg=search, scheduler=scheduler, num_samples=int(trials), reuse_actors=True)
        where = tune.RunConfig(name="tune", storage_path=str(Path(folder) / "ray"), verbose=0)
        grid = tune.Tuner(train, param_space=space, tune_config=config, run_config=where).fit()
    whole = [result for result in grid if (result.metrics or {}).get("training_iteration") == STEPS]
    known = [result.metrics["config"]["lr"] for result in whole if result.metrics]
    (Path(folder) / "known.json").write_text(json.dumps({"known": known, "left": len(grid) - len(whole)}))


def lines(folder: Path, what: str) -> list[str]:
    path = folder / what
    return path.read_text().split() if path.exists() else []


def sweep(arm: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """One arm under its kills, driven to its end."""
    rng, start = random.Random(seed), time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    made = 0
    while True:
        before = len(lines(folder, "finished"))
        with open(folder / "driver.log", "a") as log:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVE, arm, str(folder), str(TRIALS * (kills + 1))],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        while made < kills and driver.poll() is None and len(lines(folder, "finished")) == before:
            time.sleep(0.05)
        if made < kills:
            time.sleep(rng.uniform(0.0, 8.0))
        if made == kills or driver.poll() is not None:
            break
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        made += 1
        time.sleep(3.0)  # its cluster ends with it
    if driver.wait() != 0:
        raise RuntimeError(f"The driver of {arm} ended with {driver.returncode}: {folder / 'driver.log'}")
    finished = collections.Counter(lines(folder, "finished"))
    known = json.loads((folder / "known.json").read_text())
    there, twice, left = set(map(repr, known["known"])), None, known["left"]
    if arm == "ours":
        study = Study.open(folder / "study")
        events, _ = journal.read(folder / "study" / journal.NAME)
        ends = collections.Counter(e["trial"] for e in events if e["kind"] in ("finished", "stopped", "failed"))
        there = {repr(trial.config["lr"]) for trial in study.trials if trial.told}
        twice, left = sum(count > 1 for count in ends.values()), len(study.running)
    return {
        "search": ARMS[arm],
        "kills": made,
        "started": len(lines(folder, "started")),
        "finished": len(finished),
        "lost": len(set(finished) - there),
        "repeated": finished.total() - len(finished),
        "told twice": "" if twice is None else twice,
        "left": left,
        "begun again": len(list(folder.glob("begun again*"))),
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for number, arm in enumerate(given.arms.split(",")):
        with tempfile.TemporaryDirectory(prefix="tune-kills-") as folder:
            row = sweep(arm, Path(folder), given.kills, given.seed)
        if not number:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
