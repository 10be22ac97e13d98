"""Sweeps on Ray through kills of everything but the disk, with a count of what ran and what was told."""

import collections
import contextlib
import functools
import json
import os
import random
import re
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

# Holds a node: writes a line when it is up, and ends it at the end of its input. The first node of a cluster has no
# address to join.
NODE = """
import json, sys
from ray._private.node import Node
from ray._private.parameter import RayParams

settings = {
    "object_store_memory": 150 * 1024**2, "min_worker_port": 0, "max_worker_port": 0, "node_manager_port": 0,
    "include_log_monitor": False, "include_dashboard": False, **json.loads(sys.argv[1])
}
node = Node(RayParams(**settings), head="gcs_address" not in settings, shutdown_at_exit=True, spawn_reaper=True)
print(json.dumps([node.gcs_address, node.all_processes["raylet"][0].process.pid]), flush=True)
sys.stdin.read()
"""

# A driver. Each attempt leaves a file when it begins and one when it has done its last step.
DRIVER = """
import json, os, random, sys, time
import ray
from pathlib import Path
from bo import Minimize, Study, journal, run
from integrations.command_line import terminable
from integrations.ray_runner import RayRunner
from search_spaces import Real, Space

folder, trials, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
pace, at = settings.pop("pace"), settings.pop("at")

def mark(trial, what, **more):
    path = folder / "runs" / f"{trial.id}-{trial.attempt}-{os.getpid()}-{what}"
    path.with_suffix(".new").write_text(json.dumps({"at": time.time(), **more}))
    path.with_suffix(".new").rename(path)

def train(trial):
    first = (trial.load() or {"step": 0})["step"]
    mark(trial, "begun", step=first)
    for step in range(first, steps(trial.id)):
        time.sleep(pace)
        trial.save({"step": step + 1})
        trial.report(step, {"loss": trial.config["lr"] + 1 / (step + 1)})
    mark(trial, "done")
    return {"loss": trial.config["lr"]}

def steps(id):
    return random.Random(id).randrange(2, 15)

(folder / "runs").mkdir(parents=True, exist_ok=True)
if at is not None:  # Ray would take the first node that it finds among the machine's processes
    ray.init(settings["address"], _node_ip_address=at, log_to_driver=False)
if journal.exists(folder):
    study = Study.open(folder)
else:
    study = Study.create(folder, Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol", seed=0)
with terminable() as dismissed:  # as the command line has it
    run(study, train, executor=RayRunner(**settings), n_trials=trials, leave=dismissed)
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


def environment(loopback: bool = True) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if loopback else {}
    return clean | {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": str(HERE)}


def until(holds, seconds: float = SECONDS, pause: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(pause)
    return False


def alive(pid: int, since: float) -> bool:
    """Whether the process is there that had this number at a time; the numbers come round in a long sweep."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    (booted,) = (int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    started = booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0] != "Z" and started < since + 1.0  # to which the first of them is rounded


def ip(*words: object) -> str:
    return subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True).stdout


@functools.cache
def without_namespaces() -> str:
    """Why there are no network namespaces here; nothing where there are."""
    try:
        Network().close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces can be made: {getattr(error, 'stderr', None) or error}".strip()
    return ""


class Network:
    """A bridge and namespaces whose links end at it; what killed tests have left of theirs is removed first."""

    def __init__(self) -> None:
        for name in [*ip("netns", "list").split(), *ip("-br", "link", "show", "type", "bridge").split()]:
            if (found := re.fullmatch(r"wt(\d+)(?:n\d+)?", name)) and not Path(f"/proc/{found[1]}").exists():
                self._remove(name)
        pid = os.getpid()
        self.name, self._subnet, self._spaces = f"wt{pid}", f"10.{64 + pid // 256 % 64}.{pid % 256}", list[str]()
        ip("link", "add", self.name, "type", "bridge")
        try:
            ip("link", "set", self.name, "up")
            self._remove(self.add()[0])
        except BaseException:
            self.close()
            raise

    def add(self) -> tuple[str, str]:
        """A new namespace, and its address."""
        number = len(self._spaces) + 1
        name, address = f"{self.name}n{number}", f"{self._subnet}.{number}"
        self._spaces.append(name)
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", self.name, "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            ip("-n", name, "link", "set", link, "up")
        return name, address

    @staticmethod
    def _remove(name: str) -> None:
        """Remove a namespace with all that runs there, and the link of this name."""
        with contextlib.suppress(subprocess.CalledProcessError):
            for pid in ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for kind in ("link", "netns"):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(kind, "delete", name)

    def close(self) -> None:
        for name in (*self._spaces, self.name):
            self._remove(name)


class Node:
    """A node of a cluster, in a process of its own; where there is a network it has a namespace there."""

    def __init__(self, network: Network | None, join: str | None, cpus: int) -> None:
        self._network, self._halted = network, list[int]()
        settings: dict[str, object] = {"num_cpus": cpus, "num_gpus": 0}
        settings |= {"gcs_address": join} if join else {}
        self.within: list[str] = []  # the words before a command that is to run here
        self.ip = None
        if network is not None:
            self.name, self.ip = network.add()
            self.within = ["ip", "netns", "exec", self.name]
            settings["node_ip_address"] = self.ip
        self._process = subprocess.Popen(
            [*self.within, sys.executable, "-c", NODE, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(loopback=network is None),
            start_new_session=True,
        )
        line = next((line for line in self._process.stdout if line.startswith("[")), None)
        assert line is not None, "the node did not start"
        self.address, self.raylet = json.loads(line)

    def workers(self) -> list[int]:
        children = subprocess.run(["pgrep", "-P", str(self.raylet)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in children]

    def cut(self) -> None:
        """Take it from all others: what they send is lost without a word. Without a network all on it halts instead."""
        if self._network is not None:
            ip("link", "set", self.name, "nomaster")
            return
        self._halted = [self.raylet, *self.workers()]
        for pid in self._halted:
            os.kill(pid, signal.SIGSTOP)

    def heal(self) -> None:
        if self._network is not None:
            ip("link", "set", self.name, "master", self._network.name)
        for pid in self._halted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._halted = []

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.raylet, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.heal()
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


class Outliving:
    """A cluster that no driver ends, with a head without CPUs and nodes of one CPU each."""

    def __init__(self, nodes: int, network: Network | None = None) -> None:
        self.network = network
        self.nodes: list[Node] = []
        self.head = Node(network, None, 0)
        for _ in range(nodes):
            self.add()

    def add(self) -> None:
        self.nodes.append(Node(self.network, self.head.address, cpus=1))

    def of(self, pid: int) -> Node:
        return next(node for node in self.nodes if pid in node.workers())

    def close(self) -> None:
        for node in (*self.nodes, self.head):
            node.end()


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

    def __init__(self, folder: Path, cluster: Outliving, trials: int, at: Node | None = None, **settings) -> None:
        self.folder, self.cluster, self.trials = folder / "study", cluster, trials
        self.at = at or cluster.head
        self.log = folder / "driver.log"
        address = cluster.head.address
        self.settings = {"address": address, "workers": 2, "lease": 60.0, "silence": 4.0, "pace": 0.2, **settings}
        self.settings["at"] = self.at.ip
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
                [*self._python(self.at), DRIVER, str(self.folder), str(self.trials), json.dumps(self.settings)],
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    @staticmethod
    def _python(node: Node) -> list[str]:
        return [*node.within, sys.executable, "-c"]

    @property
    def _environment(self) -> dict[str, str]:
        return environment(loopback=self.cluster.network is None)

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

    def moment(self, what: str, trial: int, attempt: int) -> float | None:
        return next((at for run, at in self.marks(what).items() if run[:2] == (trial, attempt)), None)

    def where(self, trial: int, attempt: int) -> Node:
        return self.cluster.of(next(run[2] for run in self.marks("begun") if run[:2] == (trial, attempt)))

    def first_step(self, trial: int, attempt: int) -> int:
        """The step of the checkpoint from which an attempt went on."""
        (path,) = (self.folder / "runs").glob(f"{trial}-{attempt}-*-begun")
        return json.loads(path.read_text())["step"]

    def steps(self, trial: int, attempt: int) -> list[int]:
        """What an attempt has reported."""
        events = journal.read(self.journal)[0]
        return [e["step"] for e in events if e["kind"] == "reported" and (e["trial"], e["attempt"]) == (trial, attempt)]

    def running(self) -> list[tuple[int, int, int]]:
        done = self.marks("done")
        return [run for run, at in self.marks("begun").items() if run not in done and alive(run[2], at)]

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
        last = {pid: at for at, pid in sorted((at, pid) for (_, _, pid), at in begun.items())}

        def there() -> int:
            return sum(alive(pid, at) for pid, at in last.items())

        until(lambda: not there(), 10)
        count.orphaned = there()
        space = f"windtunnel-{journal.identity(self.folder)}"
        left = subprocess.run(
            [*self._python(self.cluster.head), LEFT, self.cluster.head.address, space],
            capture_output=True,
            text=True,
            env=self._environment,
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
    sweep = Sweep(folder, cluster, trials)
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
        elif kind == "partitions":  # before or after what runs there is given up, the node comes back
            node = rng.choice(cluster.nodes)
            node.cut()
            if rng.random() < 0.5:  # the next driver finds it so
                sweep.kill_driver()
                sweep.start()
            time.sleep(rng.choice((0.5, 2.0)) * sweep.settings["silence"])
            node.heal()
        else:
            cluster.nodes.pop(rng.randrange(len(cluster.nodes))).kill()
            cluster.add()
    return sweep.finish(1200.0)


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


@pytest.mark.slow
def test_a_driver_that_is_told_to_go_leaves_its_trials_to_the_next(cluster, tmp_path):
    sweep = Sweep(tmp_path, cluster, trials=2, pace=3.0)
    sweep.start()
    assert until(sweep.running), sweep.log.read_text()
    sweep.driver.terminate()
    sweep.driver.wait(60)
    assert sweep.running(), sweep.log.read_text()
    sweep.kills.append(time.time())
    sweep.start()
    count = sweep.finish()
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
        [sys.executable, "-c", NODES, cluster.head.address, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    first, second, third = json.loads(done.stdout.splitlines()[-1])
    assert first != second
    assert third in (first, second)


@pytest.fixture(scope="module")
def network():
    made = None if without_namespaces() else Network()
    yield made
    if made is not None:
        made.close()


@pytest.fixture(scope="module")
def apart(network):
    """A cluster whose nodes have networks of their own, where the machine allows."""
    made = Outliving(nodes=3, network=network)
    yield made
    made.close()


@pytest.fixture
def cut_off(apart, tmp_path):
    """Two trials, of which the first takes twelve seconds, on a node that is cut off after the first two or so."""
    if reason := without_namespaces():
        pytest.skip(reason)
    made = []

    def start(**settings):
        sweep = Sweep(tmp_path, apart, trials=2, pace=1.5, silence=4.0, **settings)
        sweep.start()
        assert until(lambda: sweep.steps(0, 1)), sweep.log.read_text()
        node = sweep.where(0, 1)
        made.append(node)
        node.cut()
        return sweep, node

    yield start
    for node in made:
        node.heal()


@pytest.mark.slow
def test_a_trial_on_a_node_that_is_cut_off_goes_on_elsewhere_and_is_told_once(apart, cut_off):
    sweep, node = cut_off()
    since = time.time()
    assert until(lambda: sweep.moment("begun", 0, 2), 20.0), sweep.log.read_text()  # Ray itself needs a minute
    assert sweep.where(0, 2) is not node
    assert "silence: it was not heard of for 4 s" in sweep.journal.read_text()
    assert until(lambda: sweep.moment("done", 0, 1))  # behind the partition
    assert not sweep.moment("done", 0, 2)  # so both wrote to one folder at a time
    node.heal()
    count = sweep.finish()
    print(count, "noticed and begun elsewhere after", sweep.moment("begun", 0, 2) - since)
    assert count.faults() == {}
    assert (count.retried, count.late) == (1, 1)
    first = sweep.first_step(0, 2)
    assert first > 0
    assert sweep.steps(0, 2) == list(range(first, 8))
    assert list(sweep.folder.glob("trials/*/said-*")) == []


@pytest.mark.slow
def test_a_node_that_is_cut_off_for_less_than_the_silence_goes_on_as_if_nothing_had_been(cut_off):
    sweep, node = cut_off()
    time.sleep(2.0)
    node.heal()
    count = sweep.finish()
    print(count)
    assert count.faults() == {}
    assert count.retried == 0
    assert sweep.steps(0, 1) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.0, 10.0], ids=["for less than the silence", "for longer"])
def test_a_sweep_goes_on_when_its_driver_was_cut_off_from_all(apart, tmp_path, seconds):
    if reason := without_namespaces():
        pytest.skip(reason)
    own = Node(apart.network, apart.head.address, cpus=0)
    try:
        sweep = Sweep(tmp_path, apart, trials=4, at=own, pace=1.0, silence=4.0)
        sweep.start()
        assert until(lambda: sweep.steps(0, 1)), sweep.log.read_text()
        own.cut()
        time.sleep(seconds)
        own.heal()
        count = sweep.finish()
    finally:
        own.end()
    print(count)
    assert count.faults() == {}
    if seconds < 4.0:
        assert count.retried == 0


@pytest.mark.slow
def test_a_sweep_survives_kills_of_everything(apart, tmp_path):
    kills = {name: int(os.environ.get(f"KILLS_{name.upper()}", n)) for name, n in KILLS.items()}
    count = survive(apart, tmp_path, trials=4 * sum(kills.values()), seed=2, **kills)
    print(count)
    assert count.faults() == {}
