"""Clusters that are not there: `Study` and the driver's loop as they are, over machines and trials in virtual time.

    python -m experiments.simulate_cluster [--only call,single,sobol,bayes] [--trials N] [--fits N] [--save]

call: 64 workers, trials of 60 s (half to one and a half of that), an acquisition that takes 1 s a call for as many
proposals as are wanted. single: 32 workers, one proposal a call. Both are compared with a loop that asks for one trial
at a time and hears nothing meanwhile; what counts is the share of the workers' time that they wait for a proposal, and
how late results are heard.

sobol: 10,000 workers and 100,000 trials of 60 s. The driver's own time counts here, second for second: what it takes to
propose, to write to the disk and to hear makes free workers wait, and results come in the groups that this leads to.

bayes: the default policy, real fits on up to 10 * fits points: 100 workers, trials that end ten at a time, calls for
each ten or fewer. --fits 190 has 2,000 trials and takes eight minutes of a processor; without it there are 300.
"""

from __future__ import annotations

import argparse
import heapq
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from bo import Minimize, Study
from bo.policies.sobol import Sobol
from bo.ports import Deliver, History, Proposal, Returned, Train
from bo.run import Clock, Driver, Ending
from bo.study import Draft
from bo.trial import Trial
from search_spaces import Choice, Integer, Real, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    momentum=Real(0.0, 1.0),
    width=Integer(16, 512, log=True),
    optimizer=Choice("adamw", "lion"),
)
SECONDS = 60.0  # that a trial takes
RESULTS = Path(__file__).parent / "results" / "simulate_cluster.jsonl"


class Time:
    """Virtual seconds; with `real`, those that the driver itself takes go by as well."""

    def __init__(self, real: bool = False) -> None:
        self.now, self.real, self.since = 0.0, real, time.perf_counter()

    def __call__(self) -> float:
        if self.real:
            now = time.perf_counter()
            self.now, self.since = self.now + now - self.since, now
        return self.now

    def jump(self, to: float) -> None:
        """Go there, unless it is later already."""
        self.now = max(self(), to)
        self.since = time.perf_counter()


@dataclass(frozen=True)
class Acquisition:
    """Some proposals a call, each call so many seconds."""

    clock: Time
    seconds: float
    most: int | None = None
    quick: ClassVar[bool] = False

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        self.clock.now += self.seconds
        return Sobol().propose(history, min(n, self.most or n), rng)


class Thread:
    """Where the policy thinks: it starts now and is ready later, and others' time goes on as if it were not there."""

    def __init__(self, clock: Time) -> None:
        self.clock, self.until, self.calls = clock, float("inf"), list[float]()

    def start(self, draft: Draft, clock: Clock) -> None:
        start, cpu = self.clock.now, time.process_time()
        self.proposals = draft.proposals()
        took = self.clock.now - start or time.process_time() - cpu  # of a policy that is no simulation
        self.clock.now, self.until = start, start + took
        self.calls.append(took)

    def ready(self, patience: float) -> bool:
        self.clock.jump(min(self.until, self.clock.now + patience))
        return self.clock.now >= self.until

    def answer(self) -> tuple[tuple[Proposal, ...], float]:
        self.until = float("inf")
        return self.proposals, self.calls[-1]

    def close(self) -> None:
        pass


class Machines:
    """Workers that take their time over each trial and no other."""

    def __init__(self, workers: int, clock: Time, thread: Thread, lasts: Any, apart: bool = True) -> None:
        self.clock, self.thread, self.lasts, self.apart = clock, thread, lasts, apart
        self.free = [0.0] * workers  # since when
        self.ends: list[tuple[float, int]] = []
        self.worked, self.waits, self.late, self.groups = 0.0, list[float](), list[float](), list[int]()
        self.running: dict[int, Trial] = {}

    def open(self, train: Train, folder: Path) -> None:
        pass

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()

    def capacity(self) -> int:
        return len(self.free)

    def submit(self, trial: Trial) -> None:
        now, seconds = self.clock(), self.lasts(trial.id)
        self.waits.append(now - heapq.heappop(self.free))
        self.worked += seconds
        heapq.heappush(self.ends, (now + seconds, trial.id))
        self.running[trial.id] = trial

    def wait(self, deliver: Deliver, timeout: float) -> None:
        now = self.clock()
        self.clock.jump(min(now + timeout, *(end for end, _ in self.ends[:1])))
        messages = []
        while self.ends and self.ends[0][0] <= self.clock.now:
            end, id = heapq.heappop(self.ends)
            heapq.heappush(self.free, end)
            self.late.append(self.clock.now - end)
            trial = self.running.pop(id)
            messages.append(Returned(id, trial.attempt, {"loss": loss(trial)}, 0.0))
        if messages:
            self.groups.append(len(messages))
            deliver(messages)

    def stop(self, trial: int) -> None:
        pass

    def close(self, leave: bool = False) -> None:
        pass


def loss(trial: Trial) -> float:
    return float((np.log10(trial.config["lr"]) + 2.5) ** 2 + (trial.config["momentum"] - 0.7) ** 2)


def spread(seed: int = 0) -> Any:
    """Seconds of each trial: half to one and a half of the usual."""
    factors = np.random.default_rng(seed).uniform(0.5, 1.5, 4096).tolist()
    return lambda id: SECONDS * factors[id % len(factors)]


def drive(study: Study, machines: Machines, clock: Time, n_trials: int) -> None:
    study.limit(n_trials=n_trials)
    Driver(study, machines, Ending(study, clock=clock), clock=clock, thinker=machines.thread).drive()


def waiting(machines: Machines, workers: int) -> dict[str, float]:
    """Shares of the workers' time, and how late results were heard."""
    steady = machines.waits[workers:]
    return {
        "waiting_share": round(sum(machines.waits) / (sum(machines.waits) + machines.worked), 5),
        "waiting_share_after_the_start": round(sum(steady) / (sum(steady) + machines.worked), 5),
        "median_wait_s": round(median(steady), 4),
        "p99_wait_s": round(quantiles(steady, n=100)[-1], 3),
        "p99_results_heard_late_by_s": round(quantiles(machines.late, n=100)[-1], 3),
    }


def slow(workers: int, most: int | None, n_trials: int, before: bool, folder: Path) -> dict[str, Any]:
    """A slow acquisition, in this loop or in one that asks for one trial at a time and waits for it."""
    clock = Time()
    machines = Machines(workers, clock, Thread(clock), spread(), apart=not before)
    with Study.create(folder / "study", SPACE, objective=Minimize("loss"), policy="sobol") as study:
        study._loaded_policy = Acquisition(clock, 1.0, 1 if before else most)
        drive(study, machines, clock, n_trials)
    return {"workers": workers, "trials": n_trials, "loop": "before" if before else "now"} | waiting(machines, workers)


def sobol(workers: int, n_trials: int, folder: Path) -> dict[str, Any]:
    clock, cpu, start = Time(real=True), time.process_time(), time.perf_counter()
    machines = Machines(workers, clock, Thread(clock), spread())
    with Study.create(folder / "study", SPACE, objective=Minimize("loss"), policy="sobol") as study:
        drive(study, machines, clock, n_trials)
        parts: list[float] = []
        for n in (1, 100, 10_000):  # the latency of a proposal, by how many are asked for at a time
            begin = time.perf_counter()
            draft = study.draft(n) or Draft(study._policy(), study.history(), n, study.seed)
            draft.policy.propose(History(SPACE, Minimize("loss"), study.trials, memory={"sequence": 1}), n, _rng())
            parts.append(round(1e3 * (time.perf_counter() - begin), 2))
    taken, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = (folder / "study" / "journal.jsonl").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin = time.process_time()
    again = Study.open(folder / "study")
    return {
        "workers": workers,
        "trials": len(again.trials),
        "virtual_seconds": round(clock.now, 1),
        "driver_cpu_ms_per_trial": round(1e3 * cpu / n_trials, 3),
        "driver_wall_ms_per_trial": round(1e3 * taken / n_trials, 3),
        "driver_busy_share": round(taken / clock.now, 3),
        "results_per_group": round(n_trials / len(machines.groups), 1),
        "proposal_ms_of_1_100_10000": parts,
        "journal_bytes": size,
        "replay_cpu_seconds": round(time.process_time() - begin, 1),
        "peak_memory_mb": round(peak),
        "peak_memory_of_replay_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **waiting(machines, workers),
    }


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def bayes(fits: int, folder: Path) -> dict[str, Any]:
    clock, cpu = Time(), time.process_time()
    thread = Thread(clock)
    machines = Machines(100, clock, thread, lambda id: SECONDS * (0.5 + id // 10 % 10 / 10))
    with Study.create(folder / "study", SPACE, objective=Minimize("loss"), policy="bayes") as study:
        drive(study, machines, clock, 100 + 10 * fits)
        best = study.best()
    assert best is not None
    assert best.metrics is not None
    return {
        "workers": 100,
        "trials": 100 + 10 * fits,
        "fits": len(thread.calls),
        "median_call_s": round(median(thread.calls), 3),
        "last_call_s": round(thread.calls[-1], 3),
        "longest_call_s": round(max(thread.calls), 3),
        "driver_cpu_s": round(time.process_time() - cpu, 1),
        "journal_bytes": (folder / "study" / "journal.jsonl").stat().st_size,
        "best": best.metrics["loss"],
        **waiting(machines, 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="call,single,sobol,bayes")
    parser.add_argument("--trials", type=int, default=100_000, help="of sobol, a tenth as many workers")
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    runs: list[tuple[str, Any]] = [
        *(("call", lambda folder, b=b: slow(64, None, 4000, b, folder)) for b in (True, False)),
        *(("single", lambda folder, b=b: slow(32, 1, 2000, b, folder)) for b in (True, False)),
        ("sobol", lambda folder: sobol(options.trials // 10, options.trials, folder)),
        ("bayes", lambda folder: bayes(options.fits, folder)),
    ]
    for name, simulate in runs:
        if name not in options.only.split(","):
            continue
        with TemporaryDirectory(dir=".") as folder:
            line = json.dumps({"simulation": name, **simulate(Path(folder))})
        print(line, flush=True)
        if options.save:
            with open(RESULTS, "a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
