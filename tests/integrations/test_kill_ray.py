"""Sweeps on Ray through kills of everything but the disk, with a count of what ran and what was told."""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bo import Study, journal

SECONDS = 90.0
HERE = Path(__file__).parents[2]

# Holds a cluster: writes a line for its head and one for each node, adds a node for each line that it reads, and ends
# the cluster at the end of its input.
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
pids = lambda node: [each.process.pid for each in node.all_processes["raylet"]]
print(json.dumps({"address": cluster.address, "raylet": pids(cluster.head_node)[0]}), flush=True)
for line in sys.stdin:
    node = cluster.add_node(**json.loads(line))
    print(json.dumps({"node": node.node_id, "raylet": pids(node)[0]}), flush=True)
cluster.shutdown()
"""

# A driver. Each attempt leaves a file when it begins and one when it has done its last step.
DRIVER = """
import json, os, random, sys, time
from pathlib import Path
from bo import Minimize, Study, journal, run
from integrations.ray_runner import RayRunner
from search_spaces import Real, Space

folder, trials, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def mark(trial, what, **more):
    path = folder / "runs" / f"{trial.id}-{trial.attempt}-{os.getpid()}-{what}"
    path.with_suffix(".new").write_text(json.dumps({"at": time.time(), **more}))
    path.with_suffix(".new").rename(path)

def train(trial):
    first = (trial.load() or {"step": 0})["step"]
    mark(trial, "begun", step=first)
    for step in range(first, steps(trial.id)):
        time.sleep(0.2)
        trial.save({"step": step + 1})
        trial.report(step, {"loss": trial.config["lr"] + 1 / (step + 1)})
    mark(trial, "done")
    return {"loss": trial.config["lr"]}

def steps(id):
    return random.Random(id).randrange(2, 15)

(folder / "runs").mkdir(parents=True, exist_ok=True)
if journal.exists(folder):
    study = Study.open(folder)
else:
    study = Study.create(folder, Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol", seed=0)
run(study, train, executor=RayRunner(**settings), n_trials=trials)
"""

# On which nodes the attempts of a trial ran that loses two processes.
NODES = """
import json, os, signal, sys, ray
from pathlib import Path
from bo import Minimize, Study, run
from integrations.ray_runner import RayRunner
from search_spaces import Real, Space

folder = Path(sys.argv[2]) / "study"

def train(trial):
    with open(folder / "nodes", "a") as file:
        print(ray.get_runtime_context().get_node_id(), file=file)
    if trial.attempt < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"loss": 1.0}

study = Study.create(folder, Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=RayRunner(sys.argv[1], workers=1), n_trials=1)
print(json.dumps((folder / "nodes").read_text().split()))
"""

# What is left of a study on a cluster: actors and resources in use.
LEFT = """
import sys, json, ray, time
from ray.util import list_named_actors
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
until = time.monotonic() + 20
while True:
    actors = [each for each in list_named_actors(all_namespaces=True) if each["namespace"] == sys.argv[2]]
    there, free = ray.cluster_resources(), ray.available_resources()
    used = {kind: there[kind] - free.get(kind, 0.0) for kind in ("CPU",) if there[kind] != free.get(kind, 0.0)}
    if not (actors or used) or time.monotonic() > until:
        break
    time.sleep(0.2)
print(json.dumps([actors, used]))
"""


KILLS = {"drivers": 200, "workers": 50, "raylets": 10, "partitions": 3}  # KILLS_DRIVERS=2 and so on sets others


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return clean | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback address
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": str(HERE),
    }


def until(holds, seconds: float = SECONDS, pause: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(pause)
    return False


def alive(pid: int) -> bool:
    """Whether a worker is there; a number that has been given to another process does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Outliving:
    """A cluster in a process of its own, with a head without CPUs and nodes of one CPU each."""

    def __init__(self, nodes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        self.address = self._line()["address"]
        self.raylets = [self.add() for _ in range(nodes)]

    def _line(self):
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the cluster did not start")

    def add(self) -> int:
        self._process.stdin.write(json.dumps({"num_cpus": 1}) + "\n")
        self._process.stdin.flush()
        return self._line()["raylet"]

    def workers(self, raylet: int) -> list[int]:
        children = subprocess.run(["pgrep", "-P", str(raylet)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in children]

    def close(self) -> None:
        for raylet in self.raylets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(raylet, signal.SIGCONT)
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Count:
    """What a sweep came to; all but the first four are to be 0."""

    trials: int = 0
    kills: int = 0
    went_on: int = 0  # attempts that were under way when a driver was killed, and went on to their end
    retried: int = 0
    lost: int = 0  # lines of the journal that were there before a kill and are not as they were
    untold: int = 0  # trials without an end
    told_twice: int = 0
    repeated: int = 0  # attempts that were done, and were given up later
    late: int = 0  # attempts that were given up, and were done later on a machine that was taken for dead
    run_twice: int = 0  # attempts that were begun twice
    orphaned: int = 0  # processes and actors that are left, and CPUs that are held

    def faults(self) -> dict[str, int]:
        named = ("lost", "untold", "told_twice", "repeated", "run_twice", "orphaned")
        return {name: getattr(self, name) for name in named if getattr(self, name)}


class Sweep:
    """A study whose drivers are killed."""

    def __init__(self, folder: Path, address: str, trials: int, **settings) -> None:
        self.folder, self.address, self.trials = folder / "study", address, trials
        self.log = folder / "driver.log"
        self.settings = {"address": address, "workers": 2, "lease": 60.0, "silence": 4.0, **settings}
        self.count = Count(trials=trials)
        self.driver: subprocess.Popen[bytes] | None = None
        self.kills: list[float] = []
        self._known = b""

    @property
    def journal(self) -> Path:
        return self.folder / journal.NAME

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(self.folder), str(self.trials), json.dumps(self.settings)],
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def at_work(self) -> None:
        """Waits until the present driver has written something."""
        before = self.size()
        assert until(lambda: self.size() > before or self.driver.poll() is not None), self.log.read_text()

    def marks(self, what: str) -> dict[tuple[int, int, int], float]:
        """(trial, attempt, pid) -> when; `what` is "begun" or "done"."""
        found = {}
        for path in (self.folder / "runs").glob(f"*-{what}"):
            trial, attempt, pid, _ = path.name.split("-")
            found[int(trial), int(attempt), int(pid)] = json.loads(path.read_text())["at"]
        return found

    def running(self) -> list[tuple[int, int, int]]:
        done = self.marks("done")
        return [run for run in self.marks("begun") if run not in done and alive(run[2])]

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.kills.append(time.time())
        self.count.kills += 1
        data = self.journal.read_bytes() if self.journal.exists() else b""
        now = data[: data.rfind(b"\n") + 1]
        self.count.lost += not now.startswith(self._known)
        self._known = now

    def finish(self, seconds: float = SECONDS) -> Count:
        """Waits for the end of the sweep and counts."""
        assert self.driver.wait(seconds) == 0, self.log.read_text()
        count, data = self.count, self.journal.read_bytes()
        events, _ = journal.read(self.journal)
        ends = collections.Counter(
            e["trial"] for e in events if e["kind"] in ("finished", "diverged", "failed", "stopped")
        )
        begun, done = self.marks("begun"), self.marks("done")
        count.lost += not data.startswith(self._known)
        count.untold = self.trials - len(ends)
        count.told_twice = sum(n - 1 for n in ends.values())
        given_up = {(e["trial"], e["attempt"] - 1): e["at"] for e in events if e["kind"] == "retried"}
        ends_of = {run[:2]: at for run, at in done.items()}
        count.repeated = sum(at < given_up.get(run, 0.0) for run, at in ends_of.items())
        count.late = sum(run in given_up for run in ends_of) - count.repeated
        count.run_twice = sum(n - 1 for n in collections.Counter(run[:2] for run in begun).values())
        count.retried = sum(e["kind"] == "retried" for e in events)
        count.went_on = sum(any(begun[run] < kill < done[run] for kill in self.kills) for run in done if run in begun)
        pids = {pid for _, _, pid in begun}
        until(lambda: not any(map(alive, pids)), 10)
        count.orphaned = sum(map(alive, pids))
        space = f"windtunnel-{journal.identity(self.folder)}"
        left = subprocess.run(
            [sys.executable, "-c", LEFT, self.address, space], capture_output=True, text=True, env=environment()
        )
        actors, used = json.loads(left.stdout.splitlines()[-1])
        count.orphaned += len(actors) + bool(used)
        study = Study.open(self.folder)
        assert len(study.trials) == self.trials
        reports = collections.Counter((e["trial"], e["step"], e["attempt"]) for e in events if e["kind"] == "reported")
        count.told_twice += sum(n - 1 for n in reports.values())
        return count


def survive(cluster: Outliving, folder: Path, trials: int, seed: int, **kills: int) -> Count:
    """A sweep through so many kills of drivers, workers and raylets, and partitions, in random order."""
    rng = random.Random(seed)
    plan = [kind for kind, n in kills.items() for _ in range(n)]
    rng.shuffle(plan)
    sweep = Sweep(folder, cluster.address, trials)
    sweep.start()
    for kind in plan:
        if kind == "drivers" and rng.random() < 0.3:  # also one that has not come to anything
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            sweep.at_work()
            assert until(lambda: sweep.running() or sweep.driver.poll() is not None), sweep.log.read_text()
            time.sleep(rng.uniform(0.0, 1.5))
        assert sweep.driver.poll() is None, f"over before its kills are\n{sweep.log.read_text()}"
        if kind == "drivers":
            sweep.kill_driver()
            sweep.start()
        elif kind == "workers":
            assert until(sweep.running)
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(sweep.running())[2], signal.SIGKILL)
        else:
            raylet = cluster.raylets.pop(rng.randrange(len(cluster.raylets)))
            if kind == "partitions":  # the node is there and says nothing, then comes back when it was given up
                stopped = [raylet, *cluster.workers(raylet)]
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                time.sleep(2 * sweep.settings["silence"])
                for pid in stopped:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                time.sleep(2.0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(raylet, signal.SIGKILL)
            cluster.raylets.append(cluster.add())
    return sweep.finish(600.0)


@pytest.fixture(scope="module")
def cluster():
    made = Outliving(nodes=2)
    yield made
    made.close()


def test_trials_go_on_while_drivers_are_killed(cluster, tmp_path):
    count = survive(cluster, tmp_path, trials=8, seed=1, drivers=2)
    print(count)
    assert count.faults() == {}
    assert count.went_on >= 1
    assert count.retried == 0


def test_trials_go_on_elsewhere_when_their_node_is_killed(cluster, tmp_path):
    count = survive(cluster, tmp_path, trials=5, seed=3, raylets=1)
    print(count)
    assert count.faults() == {}
    assert count.retried == 1


@pytest.mark.slow
def test_a_trial_that_lost_its_process_goes_on_on_another_node_if_there_is_one(cluster, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NODES, cluster.address, str(tmp_path)], capture_output=True, text=True, env=environment()
    )
    first, second, third = json.loads(done.stdout.splitlines()[-1])
    assert first != second
    assert third in (first, second)


@pytest.mark.slow
def test_a_sweep_survives_kills_of_everything(cluster, tmp_path):
    kills = {name: int(os.environ.get(f"KILLS_{name.upper()}", n)) for name, n in KILLS.items()}
    count = survive(cluster, tmp_path, trials=6 * sum(kills.values()), seed=2, **kills)
    print(count)
    assert count.faults() == {}
