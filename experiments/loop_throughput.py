"""What the whole loop costs beside the bare one: trials that do nothing, on the same workers in the same run.

    python -m experiments.loop_throughput [--executor pool|ray|memory] [--trials 10000] [--workers N] [--rounds 3]

The bare loop hands trials to the executor and counts what comes back. The whole loop is `bo.run`: Sobol proposals, a
journal on the disk in the present folder with every line synced before it is spoken of, messages delivered in groups.
They take turns on workers that stay, and the ratio is that of the medians. Beside it: the driver's CPU time per trial,
its memory per finished trial (by how much its resident memory grew in the whole loops), and the time to open that study
again. "memory" hands every trial back at once: what is left is the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bo import Minimize, Study, run
from bo.ports import Deliver, Executor, Message, Returned, Train
from bo.trial import Trial
from integrations.process_pool import ProcessPool
from search_spaces import Choice, Integer, Real, Scale, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    momentum=Real(0.0, 1.0),
    width=Integer(16, 512, log=True),
    dropout=Real(0.0, 0.5),
    optimizer=Choice("adamw", "lion"),
)
CONFIG = {"lr": 1e-3, "momentum": 0.9, "width": 128, "dropout": 0.1, "optimizer": "adamw"}
WARM = 64  # trials that start the workers and load the policy


def nothing(trial: Any) -> dict[str, float]:
    return {"loss": trial.config["lr"]}


class Memory:
    """An executor that hands back at once what it got."""

    apart = True

    def __init__(self, workers: int) -> None:
        self.workers, self.trials = workers, list[Trial]()

    def open(self, train: Train, folder: Path) -> None:
        self.train = train

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()

    def capacity(self) -> int:
        return self.workers - len(self.trials)

    def submit(self, trial: Trial) -> None:
        self.trials.append(trial)

    def wait(self, deliver: Deliver, timeout: float) -> None:
        done, self.trials = self.trials, []
        deliver([Returned(trial.id, trial.attempt, dict(self.train(trial)), 0.0) for trial in done])

    def stop(self, trial: int) -> None:
        pass

    def close(self, leave: bool = False) -> None:
        pass


class Kept:
    """An executor that stays open from one loop to the next."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.opened = inner, False
        self.apart = inner.apart
        self.capacity, self.submit, self.wait, self.stop = inner.capacity, inner.submit, inner.wait, inner.stop

    def open(self, train: Train, folder: Path) -> None:
        if not self.opened:
            self.inner.open(train, folder)
            self.inner.attach(())
        self.opened = True

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()

    def close(self, leave: bool = False) -> None:
        pass


def bare(executor: Executor, first: int, n: int) -> None:
    """Run trials number first .. first + n - 1 by nothing but the executor."""
    left, ended = list(range(first + n - 1, first - 1, -1)), 0

    def count(messages: Sequence[Message]) -> None:
        nonlocal ended
        ended += sum(isinstance(message, Returned) for message in messages)

    while ended < n:
        for _ in range(min(executor.capacity(), len(left))):
            executor.submit(Trial(left.pop(), CONFIG, Scale(), 0, "sobol"))
        executor.wait(count, 0.25)


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(executor: Executor, trials: int, rounds: int, folder: Path) -> dict[str, Any]:
    loops: dict[str, list[float]] = {"bare": [], "whole": [], "cpu": []}
    with Study.create(folder / "study", SPACE, objective=Minimize("loss"), policy="sobol") as study:
        run(study, nothing, executor=executor, n_trials=WARM)
        bare(executor, 10**9, WARM)
        held = 0
        for turn in range(rounds):
            start = time.perf_counter()
            bare(executor, 10**6 * (turn + 1), trials // rounds)
            loops["bare"].append((time.perf_counter() - start) / (trials // rounds))
            before = resident()
            start, cpu = time.perf_counter(), time.process_time()
            run(study, nothing, executor=executor, n_trials=WARM + (turn + 1) * (trials // rounds))
            loops["whole"].append((time.perf_counter() - start) / (trials // rounds))
            loops["cpu"].append((time.process_time() - cpu) / (trials // rounds))
            held += resident() - before
        told = sum(trial.status == "finished" for trial in study.trials) - WARM
        lines, size = study.seen, (study.folder / "journal.jsonl").stat().st_size
    start = time.perf_counter()
    Study.open(folder / "study")
    bare_s, whole_s = statistics.median(loops["bare"]), statistics.median(loops["whole"])
    return {
        "trials": told,
        "bare_per_second": round(1 / bare_s, 1),
        "whole_per_second": round(1 / whole_s, 1),
        "ratio": round(bare_s / whole_s, 3),
        "driver_cpu_ms_per_trial": round(1e3 * statistics.median(loops["cpu"]), 3),
        "bytes_per_finished_trial": round(held / told),
        "journal_lines": lines,
        "journal_bytes_per_trial": round(size / told),
        "replay_seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=("pool", "ray", "memory"), default="pool")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.executor == "ray":
        from integrations.ray_runner import RayRunner

        inner: Any = RayRunner(workers=options.workers, resources={"num_cpus": 0.01}, isolate=False)
    else:
        inner = {"pool": ProcessPool, "memory": Memory}[options.executor](options.workers)
    with TemporaryDirectory(dir=".") as folder:
        try:
            found = measure(Kept(inner), options.trials, options.rounds, Path(folder))
        finally:
            inner.close()
    print(json.dumps({"executor": options.executor, "workers": options.workers, **found}))


if __name__ == "__main__":
    main()
