"""Run what is missing of the comparison, cheapest first; a run that has a result is never made again.

    python -m experiments.compare.run [--methods tpe,gp] [--problems branin] [--seeds 20] [--minutes 60] [--jobs 1]
                                      [--tables DIR] [--environments DIR]

A result is kept by method, version, problem and seed: a line of results/METHOD.jsonl, with

    regret   noiseless regret of the method's own recommendation after 25, 50 and 100% of the budget
    seen     noiseless regret of each point it evaluated (not where an evaluation takes long)
    cpu      its CPU seconds for each proposal, the result before told included; wall: the same by the clock
    noise    standard deviation of a measurement, in units of the regret
    recommend_cpu, status ("done", "timeout" with what it had by then, or "error" with the error)

Runs can be stopped at any time. The order is by expected CPU seconds times one more than the seed, so dear methods get
their first seeds before cheap ones their last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from experiments.compare import problems
from experiments.compare.environments import default_folder
from experiments.compare.methods import METHODS, ROOT, Entry
from experiments.compare.problems import PROBLEMS, Instance, Problem, space_filling
from experiments.compare.protocol import Config

RESULTS = Path(__file__).parent / "results"
LIMIT = 900.0  # CPU seconds of a method in a run; four times as many by the clock
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
Key = tuple[str, str, str, int, int]
"""Method, its version, problem, its version, seed."""


class Failed(Exception):
    """A method answered with an error, or ended."""


class TooLong(Exception):
    """A method used up its time."""


class Process:
    """A method in its own process, asked and answered a line at a time."""

    def __init__(self, python: Path, command: Sequence[str], limit: float) -> None:
        self.limit, self.ends = limit, time.monotonic() + 4 * limit
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [str(python), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 5)),
        )
        self.rest = b""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self) -> bytes:
        stream = self.process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as ready:
            ready.register(stream, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not ready.select(self.ends - time.monotonic()):
                    raise TooLong
                if not (more := os.read(stream.fileno(), 65536)):
                    raise self._ended()
                self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _ended(self) -> Exception:
        code = self.process.wait()
        if code == -signal.SIGXCPU:
            return TooLong()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return Failed(f"ended with {code}: {lines[-1][:400] if lines else 'nothing on standard error'}")


def search(entry: Entry, problem: Problem, seed: int, python: Path, limit: float = LIMIT) -> dict[str, Any]:
    """One run: its line of the results."""
    instance = problem.make(seed)
    told: dict[str, Any] = {"regret": [], "seen": [], "cpu": [], "wall": [], "recommend_cpu": 0.0}
    status: dict[str, Any] = {"status": "done"}
    try:
        with Process(python, entry.command, limit) as method:
            _converse(method, problem, instance, seed, told)
    except TooLong:
        status = {"status": "timeout", "limit": limit}
    except Failed as failure:
        status = {"status": "error", "error": str(failure)}
    if problem.seconds:
        del told["seen"]
    rounded = {name: _short(value, 2 if name in ("cpu", "wall") else 5) for name, value in told.items()}
    key = dict(
        zip(("method", "version", "problem", "problem_version", "seed"), _key(entry, problem, seed), strict=True)
    )
    return {**key, "noise": _short(instance.noise, 5), **rounded, **status}


def _converse(method: Process, problem: Problem, instance: Instance, seed: int, told: dict[str, Any]) -> None:
    method.ask("space", **problem.task(instance, seed).to_json())
    spent = {"cpu": 0.0, "wall": 0.0}
    for number in range(problem.budget):
        if number < problem.design:
            config = space_filling(instance.axes, seed, problem.design)[number]
        else:
            answer = method.ask("suggest")
            config = answer["config"]
            for clock in spent:
                told[clock].append(spent[clock] + answer[clock])
        told["seen"].append(_excess(problem, instance, config))
        answer = method.ask("tell", config=config, value=instance.measure(config, number))
        spent = {clock: answer[clock] for clock in spent}
        if number + 1 in problem.checkpoints:
            answer = method.ask("recommend")
            told["regret"].append(instance.regret(answer["config"]))
            told["recommend_cpu"] += answer["cpu"]


def _excess(problem: Problem, instance: Instance, config: Config) -> float:
    return 0.0 if problem.seconds else instance.regret(config)


def _short(value: Any, digits: int) -> Any:
    return [_short(each, digits) for each in value] if isinstance(value, list) else float(f"{value:.{digits}g}")


# ---------------------------------------------------------------------------------------------------- what is missing


def _key(entry: Entry, problem: Problem, seed: int) -> Key:
    return entry.name, entry.version, problem.name, problem.version, seed


def load(folder: Path) -> dict[Key, dict[str, Any]]:
    """All results; of two lines with one key the first without an error counts, and a line that a kill cut is none."""
    found: dict[Key, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                run = json.loads(line)
            except json.JSONDecodeError:
                continue
            key = (run["method"], run["version"], run["problem"], run["problem_version"], run["seed"])
            if found.get(key, {"status": "error"})["status"] == "error":
                found[key] = run
    return found


def append(folder: Path, run: Mapping[str, Any]) -> None:
    """One write of one line, after the end of a line that a kill cut short."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{run['method']}.jsonl"
    torn = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    line = json.dumps(run, separators=(",", ":"))
    with file.open("a", encoding="utf-8") as end:
        end.write(("\n" if torn else "") + line + "\n")


@dataclass(frozen=True)
class Run:
    entry: Entry
    problem: Problem
    seed: int
    seconds: float
    """CPU seconds that it is expected to take."""


def missing(
    entries: Sequence[Entry], listed: Sequence[Problem], seeds: int, known: Mapping[Key, Mapping[str, Any]]
) -> list[Run]:
    """Runs without a result, in the order in which they are made."""
    runs = []
    for entry in entries:
        version = entry.version
        for problem in listed:
            seconds = _expected(entry, problem, known)
            for seed in range(seeds):
                if (entry.name, version, problem.name, problem.version, seed) not in known:
                    runs.append(Run(entry, problem, seed, seconds))
    return sorted(runs, key=lambda run: run.seconds * (run.seed + 1))


def _expected(entry: Entry, problem: Problem, known: Mapping[Key, Mapping[str, Any]]) -> float:
    """The mean of the same method's runs on the problem, or else a guess from its cost on small ones."""
    made = [
        sum(run["cpu"]) + run["recommend_cpu"]
        for key, run in known.items()
        if (key[0], key[2], key[3]) == (entry.name, problem.name, problem.version) and run["status"] == "done"
    ]
    if made:
        return sum(made) / len(made) + problem.seconds * problem.budget + 2
    larger = max(problem.budget / 40, 1)  # where a proposal itself is dearer, too
    return 4 + (entry.seconds * larger + problem.seconds) * problem.budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas between (default: all)")
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="names with commas between (default: all)")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after as many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--limit", type=float, default=LIMIT, help="CPU seconds of a method in a run")
    parser.add_argument("--again", action="store_true", help="make runs that ended with an error again")
    parser.add_argument("--tables", type=Path, help="folder with blackbox.py; without it the tables are left out")
    parser.add_argument("--environments", type=Path, default=default_folder())
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)  # of the trainings that are evaluated here
    entries, pythons = [], {}
    for name in _chosen(parser, options.methods, METHODS):
        if python := METHODS[name].python(options.environments):
            entries.append(METHODS[name])
            pythons[name] = python
        else:
            print(
                f"{name} is absent: build its environment with python -m experiments.compare.environments", flush=True
            )
    if options.tables:
        problems.TABLES.append(options.tables.resolve())
    listed = [PROBLEMS[name] for name in _chosen(parser, options.problems, PROBLEMS)]
    if left_out := [problem.name for problem in listed if problem.tables and not problems.TABLES]:
        print(f"Without --tables these are left out: {', '.join(left_out)}", flush=True)
    listed = [problem for problem in listed if problem.name not in left_out]
    known = load(options.results)
    if options.again:
        known = {key: run for key, run in known.items() if run["status"] != "error"}
    runs = missing(entries, listed, options.seeds, known)
    hours = sum(run.seconds for run in runs) / 3600
    print(f"{len(runs)} runs are missing, about {hours:.1f} CPU hours", flush=True)
    stop, lock = time.monotonic() + 60 * options.minutes, Lock()

    def make(run: Run) -> None:
        if time.monotonic() > stop:
            return
        line = search(run.entry, run.problem, run.seed, pythons[run.entry.name], options.limit)
        with lock:
            append(options.results, line)
            print(_summary(line), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for made in [pool.submit(make, run) for run in runs]:
            made.result()


def _chosen(parser: argparse.ArgumentParser, given: str, known: Mapping[str, Any]) -> Iterator[str]:
    for name in filter(None, given.split(",")):
        if name not in known:
            parser.error(f"There is no {name!r}; there are {', '.join(known)}.")
        yield name


def _summary(line: Mapping[str, Any]) -> str:
    regret = " ".join(f"{value:.3g}" for value in line["regret"])
    seconds = sum(line["cpu"]) + line["recommend_cpu"]
    problem = f"{line['method']:<11}{line['problem']:<17}{line['seed']:>3}"
    ended = f"{line['status']} {line.get('error', '')}".rstrip()
    return f"{time.strftime('%T')} {problem}  {seconds:7.1f} s  {regret}  {ended}"


if __name__ == "__main__":
    main()
