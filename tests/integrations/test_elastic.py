"""Nodes that come and go under a sweep: started by Ray's autoscaler, joining by hand, taken away after a notice."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bo import Study, journal
from integrations.ray_runner import RayRunner

HERE = Path(__file__).parents[2]
SECONDS = 90.0

# A sweep of enqueued trials, each of which writes down where it runs, and where what it starts in its other bundles.
DRIVER = """
import json, sys, time
from pathlib import Path
import ray
from bo import Minimize, Study, run
from integrations.ray_runner import RayRunner
from search_spaces import Fidelity, Real, Space

folder, (labels, kinds, steps, settings) = Path(sys.argv[1]), json.loads(sys.argv[2])

@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()

def train(trial):
    first = (trial.load() or {"step": 0})["step"]
    label = trial.scale.label("params")
    nodes = [ray.get_runtime_context().get_node_id()]
    for bundle in kinds[label].get("bundles", [])[1:]:
        other = {kind: n for kind, n in bundle.items() if kind not in ("CPU", "GPU")}
        there = where.options(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), resources=other)
        nodes.append(ray.get(there.remote()))
    with open(folder / "ran", "a") as file:
        print(json.dumps([trial.id, trial.attempt, label, nodes, first]), file=file)
    for step in range(first, steps):
        time.sleep(0.1)
        trial.save({"step": step + 1})
        trial.report(step, {"loss": 1.0})
    return {"loss": 1.0}

params = dict(zip(kinds, range(1, 1 + len(kinds))))
axes = Fidelity(params=params, tokens=(1.0,), target={"params": list(kinds)[-1], "tokens": 1.0})
space = Space(lr=Real(0.0, 1.0), fidelity=axes)
study = Study.create(folder, space, objective=Minimize("loss"), policy="sobol", seed=0)
for n, label in enumerate(labels):
    study.enqueue({"lr": n / len(labels)}, scale={"params": label, "tokens": 1.0})
executor = RayRunner(resources=lambda trial: kinds[trial.scale.label("params")], **settings)
run(study, train, executor=executor, n_trials=len(labels))
"""

# Says what the nodes have that are there, whenever it is asked.
NODES = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
for _ in sys.stdin:
    print(">", json.dumps({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}), flush=True)
"""

# A cluster whose nodes come and go as it is told.
BY_HAND = """
import sys
from ray.cluster_utils import Cluster

cluster, nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), {}
print(">", cluster.address, flush=True)
for line in sys.stdin:
    if (asked := line.strip()) == "add":
        node = cluster.add_node(num_cpus=1, num_gpus=1)
        nodes[node.node_id] = node
        print(">", node.node_id, flush=True)
    else:
        cluster.remove_node(nodes.pop(asked), allow_graceful=False)
        print("> gone", flush=True)
cluster.shutdown()
"""

RAY = "from ray.scripts.scripts import main; main()"

# Of a fake cloud: its nodes are raylets on this machine.
HEAD = "f" * 51 + "00000"
PROVIDER = {
    "type": "external",  # by the name that Ray has for it a file is wanted that the wheel lacks
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "head_node_id": HEAD,
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "launch_multiple": True,
}
KINDS = ("CPU", "proxy", "accel")  # what nodes have that is looked at
MEMORY = 80_000_000  # bytes of the object store of each node, which has nothing to do here
LISTS = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
LISTS += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return clean | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on the loopback address
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": str(HERE),
        **more,
    }


class Cluster:
    """A head without CPUs, and nodes beside it: by hand, or with `types` of them by Ray's autoscaler of a version."""

    def __init__(self, version="", types=None):
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short, for the sockets
        self.log = open(self.folder / "log", "wb")  # noqa: SIM115  # over many calls
        self.started = []
        self.there = set()  # nodes that joined by hand
        if types:
            self._autoscaled(version, types)
        else:
            self.holder = self.python(BY_HAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.address = self._line(self.holder)
        self.asked = self.python(NODES, self.address, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _autoscaled(self, version, types):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        common = {"node_config": {}, "min_workers": 0}
        nodes = {"ray.head.default": {**common, "resources": {"CPU": 0}, "max_workers": 0}}
        for name, (has, most) in types.items():
            nodes[name] = {**common, "resources": {**has, "object_store_memory": MEMORY}, "max_workers": most}
        config = {
            "cluster_name": "elastic",
            "max_workers": sum(most for _, most in types.values()),
            "idle_timeout_minutes": 0.05,
            "upscaling_speed": 1,
            "provider": {**PROVIDER, "gcs_address": self.address},
            "head_node_type": "ray.head.default",
            "available_node_types": nodes,
            **{name: {} for name in ("auth", "file_mounts")},
            **{name: [] for name in LISTS},
        }
        (self.folder / "types.json").write_text(json.dumps(config))
        words = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--include-dashboard=false"]
        words += [f"--object-store-memory={MEMORY}", f"--temp-dir={self.folder}", "--disable-usage-stats", "--block"]
        self.python(
            RAY,
            *("start", *words, f"--autoscaling-config={self.folder / 'types.json'}"),
            RAY_FAKE_CLUSTER="1",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_enable_autoscaler_v2=str(int(version == "v2")),
            RAY_CLOUD_INSTANCE_ID=HEAD,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD,
        )
        until(lambda: b"Ray runtime started" in (self.folder / "log").read_bytes(), self)

    def add(self):
        """A node of one CPU joins, with what it says is one GPU."""
        self.there.add(self._line(self.holder, "add"))

    def take_away(self, node):
        self._line(self.holder, node)
        self.there.remove(node)

    def drain(self, node, seconds):
        """The notice that a cloud gives before it takes a machine away."""
        words = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        words += ["--deadline-remaining-seconds", str(seconds), "--address", self.address]
        assert self.python(RAY, "drain-node", *words).wait(SECONDS) == 0, self.said()

    def nodes(self):
        """What each node beside the head has, of `KINDS`."""
        nodes = json.loads(self._line(self.asked, "?"))
        return {node: {kind: has[kind] for kind in KINDS if kind in has} for node, has in nodes.items() if "CPU" in has}

    def _line(self, process, asked=""):
        """What a process says next, when it was asked."""
        if asked:
            process.stdin.write(asked.encode() + b"\n")
            process.stdin.flush()
        for line in iter(process.stdout.readline, b""):
            if line.startswith(b"> "):
                return line[2:].decode().strip()
        raise AssertionError(self.said())

    def python(self, code, *words, stdin=None, stdout=None, **more):
        """A process that runs `code`."""
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=stdin,
            stdout=stdout or self.log,
            stderr=self.log,
            env=environment(**more),
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def said(self):
        return (self.folder / "log").read_text(errors="replace")[-5000:]

    def close(self):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # raylets too; workers end with these
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sweep:
    """A driver, and what its trials wrote down."""

    def __init__(self, cluster, folder, labels, kinds, steps, **settings):
        self.cluster, self.folder = cluster, folder / "study"
        given = [labels, kinds, steps, {"address": cluster.address, **settings}]
        self.driver = cluster.python(DRIVER, str(self.folder), json.dumps(given))

    def ran(self):
        """(trial, attempt) -> label, nodes, first step; as far as it has come."""
        path = self.folder / "ran"
        lines = path.read_text().splitlines() if path.exists() else []
        return {(trial, attempt): rest for trial, attempt, *rest in map(json.loads, lines)}

    def events(self):
        return journal.read(self.folder / journal.NAME)[0]

    def until(self, holds):
        assert self.driver.poll() is None or holds(), self.cluster.said()
        until(holds, self.cluster)

    def study(self):
        """Waits for the end."""
        assert self.driver.wait(SECONDS) == 0, self.cluster.said()
        return Study.open(self.folder)


def until(holds, cluster):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, cluster.said()
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------------- autoscaling


@pytest.fixture(params=["v1", "v2"])  # of `ray up`, and of KubeRay
def autoscaled(request):
    made = Cluster(request.param, {"small": ({"CPU": 1, "proxy": 1}, 2), "big": ({"CPU": 2, "accel": 1}, 1)})
    yield made
    made.close()


@pytest.mark.slow
def test_nodes_are_started_for_what_the_trials_ask_for_and_leave_when_idle(autoscaled, tmp_path):
    small, big = {"CPU": 1, "proxy": 1}, {"CPU": 2, "accel": 1}
    kinds = {
        "small": {"num_cpus": 1, "resources": {"proxy": 1}},
        "large": {"num_cpus": 2, "resources": {"accel": 1}},
        "pair": {"bundles": [small, big]},
    }
    assert autoscaled.nodes() == {}
    sweep = Sweep(autoscaled, tmp_path, ["small", "small", "large", "pair"], kinds, steps=20, workers=3)
    seen = {}
    while sweep.driver.poll() is None:
        seen |= autoscaled.nodes()
        time.sleep(0.2)

    assert [trial.status for trial in sweep.study().trials] == ["finished"] * 4
    where = {trial: nodes for (trial, _), (_, nodes, _) in sweep.ran().items()}
    has = {trial: [seen[node] for node in nodes] for trial, nodes in where.items()}
    assert has == {0: [small], 1: [small], 2: [big], 3: [small, big]}
    assert where[0] != where[1]  # a node for each of the two that ran at a time
    until(lambda: autoscaled.nodes() == {}, autoscaled)


# ------------------------------------------------------------------------------------------------ joining and leaving


@pytest.fixture(scope="module")
def cluster():
    made = Cluster()
    yield made
    made.close()


SMALL = {"small": {"num_cpus": 1}}


def test_a_node_that_joins_during_a_sweep_takes_trials(cluster, tmp_path):
    cluster.add()
    sweep = Sweep(cluster, tmp_path, ["small"] * 4, SMALL, steps=30)
    sweep.until(sweep.ran)
    cluster.add()
    assert [trial.status for trial in sweep.study().trials] == ["finished"] * 4
    assert {node for _, (node,), _ in sweep.ran().values()} == cluster.there


def test_proxies_share_gpus_before_a_run_that_takes_whole_nodes(cluster, tmp_path):
    while len(cluster.there) < 2:
        cluster.add()
    whole = {"CPU": 1, "GPU": 1}
    kinds = {
        "small": {"num_cpus": 0.25, "num_gpus": 0.25},
        "large": {"bundles": [whole, whole], "strategy": "STRICT_SPREAD"},
    }
    sweep = Sweep(cluster, tmp_path, ["small"] * 4 + ["large"], kinds, steps=60, workers=5)
    sweep.until(lambda: len(sweep.ran()) == 4)
    assert not any(event["kind"] == "finished" for event in sweep.events())  # four at once on two
    assert [trial.status for trial in sweep.study().trials] == ["finished"] * 5
    assert set(sweep.ran()[4, 1][1]) == cluster.there


def test_a_trial_whose_node_is_preempted_goes_on_elsewhere_and_is_not_charged(cluster, tmp_path):
    while len(cluster.there) < 2:
        cluster.add()
    sweep = Sweep(cluster, tmp_path, ["small"], SMALL, steps=150, workers=1)
    sweep.until(lambda: sweep.ran() and sum(e["kind"] == "reported" for e in sweep.events()) > 12)
    (_, (node,), _) = sweep.ran()[0, 1]
    noticed = time.monotonic()
    cluster.drain(node, 2)
    time.sleep(max(0.0, noticed + 5 - time.monotonic()))
    cluster.take_away(node)  # Ray leaves that to the cloud

    (trial,) = sweep.study().trials
    assert (trial.status, trial.attempt, trial.losses) == ("finished", 2, 0)
    _, elsewhere, first = sweep.ran()[0, 2]
    assert elsewhere == list(cluster.there)
    assert first > 10
    (retried,) = [event for event in sweep.events() if event["kind"] == "retried"]
    assert (retried["cause"], retried["innocent"]) == ("the preemption of its node", True)


# -------------------------------------------------------------------------------------------------------- Ray Client


@pytest.mark.parametrize("given", [True, False])
def test_the_address_of_ray_client_is_refused_with_what_to_do_instead(given, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "" if given else "ray://head:10001")
    executor = RayRunner("ray://head:10001" if given else None)
    with pytest.raises(ConnectionError, match=r"ray://head:10001 is for Ray Client.* with the address auto, or give"):
        executor.open(len, tmp_path)
