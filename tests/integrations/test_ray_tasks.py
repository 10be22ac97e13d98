"""Trials as Ray tasks; what every executor promises is in test_executors.py."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from bo import Trial
from bo.ports import Reported, Returned
from integrations.ray_tasks import RayTasks, _by_default
from search_spaces import Scale

SECONDS = 120.0

# Starts a Ray of its own, as `windtunnel run` does; HOME is the test's, to see what is left there.
SCRIPT = """
import os, sys, time
from pathlib import Path
from bo import Minimize, Study, run
from integrations.ray_tasks import RayTasks
from search_spaces import Real, Space

folder, wait = Path(sys.argv[1]), float(sys.argv[2])

def train(trial):
    (folder / f"pid-{trial.id}").write_text(str(os.getpid()))
    trial.report(0, {"loss": 1.0})
    time.sleep(wait)
    return {"loss": trial.config["lr"]}

before = dict(os.environ)
study = Study.create(folder / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=RayTasks(workers=2), n_trials=3)
print("told", sum(trial.told for trial in study.trials))
try:  # a second Ray in the same process comes up like the first
    run(study, train, executor=RayTasks(resources={"resources": {"wafer": 2}}), n_trials=4)
except ValueError as error:
    print(str(error).partition(", and")[0])
print("environment", {name for name in os.environ.keys() | before.keys() if os.environ.get(name) != before.get(name)})
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(train, **settings):
        made.append(RayTasks(**settings))
        made[-1].open(train, tmp_path)
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def trial(id=0, params=1e5):
    return Trial(id=id, config={}, scale=Scale({"params": params}), seed=0, source="sobol")


def finish(executor, said, n):
    deadline = time.monotonic() + SECONDS
    while sum(not isinstance(message, Reported) for message in said) < n:
        assert time.monotonic() < deadline, said
        executor.wait(said.extend, 0.2)


def script(tmp_path, wait):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    (tmp_path / "home").mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, str(path), str(tmp_path), str(wait)],
        env={**clean, "PYTHONPATH": os.getcwd(), "HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_ray_of_our_own_is_quiet_and_leaves_no_trace(tmp_path):
    output, _ = script(tmp_path, wait=0.0).communicate(timeout=120)

    assert output == "told 3\nTrial 3 needs {'CPU': 1.0, 'wafer': 2.0}\nenvironment set()\n"
    assert list((tmp_path / "home").iterdir()) == []  # no token: it would change how other clusters start


def test_nothing_outlives_a_killed_driver(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    driver.kill()
    driver.communicate()

    for pid in pids:
        ended(pid, seconds=20.0)


def test_ctrl_c_is_clean(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to everything that the driver has started too
    output, _ = driver.communicate(timeout=SECONDS)

    assert output.count("KeyboardInterrupt") == 1  # of the driver; workers and Ray say nothing
    assert output.rstrip().endswith("KeyboardInterrupt")
    for pid in pids:
        ended(pid, seconds=20.0)


def test_a_ray_that_runs_already_is_used_and_left_running(opened):
    opened(lambda trial: {"loss": 0.0}).close()
    assert ray.is_initialized()


def test_reports_go_on_when_the_mailbox_dies(opened, tmp_path, until):
    def train(trial):
        for step in range(3):
            trial.report(step, {"loss": 1.0})
            while not (tmp_path / f"go-{step}").exists():
                time.sleep(0.02)
        return {"loss": 0.0}

    executor, said = opened(train, workers=1), []
    executor.submit(trial())
    until(lambda: executor.wait(said.extend, 0.1) or said)
    ray.kill(executor._mailbox, no_restart=False)
    for step in range(3):
        (tmp_path / f"go-{step}").touch()
    finish(executor, said, 1)

    assert [message.step for message in said[:-1]] == [0, 1, 2]
    assert isinstance(said[-1], Returned)


def test_resources_follow_the_trial(opened, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def train(trial):
        return {"cpus": ray.get_runtime_context().get_assigned_resources()["CPU"], "threads": threads()}

    def threads():
        return float(os.environ["OMP_NUM_THREADS"])

    executor, said = opened(train, resources=lambda trial: {"num_cpus": 1 if trial.scale["params"] < 1e6 else 3}), []
    executor.submit(trial(0, params=1e5))
    executor.submit(trial(1, params=1e7))
    finish(executor, said, 2)

    assert {message.trial: dict(message.metrics) for message in said} == {
        0: {"cpus": 1.0, "threads": 1.0},
        1: {"cpus": 3.0, "threads": 3.0},
    }


def test_capacity_is_what_the_resources_allow(opened):
    assert opened(lambda trial: {}).capacity() == 4
    assert opened(lambda trial: {}, resources={"num_cpus": 2}).capacity() == 2
    assert opened(lambda trial: {}, resources={"num_cpus": 0.5}).capacity() == 8
    assert opened(lambda trial: {}, resources={"num_gpus": 1}).capacity() == 1  # the cluster may grow one
    assert opened(lambda trial: {}, workers=3).capacity() == 3


@pytest.mark.parametrize(("gpus", "workers", "share"), [(8, 1, 1.0), (8, 8, 1.0), (1, 4, 1 / 4), (8, 12, 1 / 2)])
def test_workers_share_the_gpus_evenly(gpus, workers, share):
    assert _by_default(gpus, workers) == {"num_cpus": 1, "num_gpus": share}
    assert gpus * int(1 / share) >= workers


def test_at_most_one_trial_waits_in_rays_queue(opened):
    executor = opened(lambda trial: time.sleep(SECONDS), resources=lambda trial: {"num_cpus": 3})
    executor.submit(trial(0))
    assert executor.capacity() == 0
    executor.submit(trial(1))
    assert executor.capacity() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "RayTasks needs a whole number of workers of at least 1, got 0"),
        ({"resources": {"cpus": 1}}, "resources are a dictionary with keys among num_cpus, .*, got {'cpus'}"),
        ({"resources": [1]}, r"resources are a dictionary with keys among num_cpus, .*, got \[1\]"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RayTasks(**settings)


def test_a_wrong_answer_of_the_resources_function_is_refused(opened):
    executor = opened(lambda trial: {}, resources=lambda trial: 2)
    with pytest.raises(ValueError, match=r"resources are a dictionary with keys among num_cpus, .*, got 2"):
        executor.submit(trial())


def elsewhere(code):
    """What a process without Ray prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    return done.stdout + done.stderr


def test_an_address_where_nothing_answers_is_named_within_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from pathlib import Path; from integrations.ray_tasks import RayTasks as R; "
    words = elsewhere(code + f"R('127.0.0.1:{port}').open(len, Path('/tmp'))").splitlines()[-1]
    assert words.startswith(f"ConnectionError: Nothing answers at 127.0.0.1:{port} (")


def test_an_address_that_is_none_is_named():
    code = (
        "from pathlib import Path; from integrations.ray_tasks import RayTasks as R; R('nonsense').open(len, Path('/'))"
    )
    words = elsewhere(code).splitlines()[-1]
    assert words.startswith("ConnectionError: Ray at nonsense cannot be used: ")
    assert "RAY_AUTH_MODE" in words


@pytest.mark.slow
def test_a_trial_goes_on_elsewhere_when_its_node_dies(tmp_path):
    code = f"""
import os, time
from pathlib import Path
os.environ["RAY_AUTH_MODE"] = "disabled"
from ray.cluster_utils import Cluster
from bo import Trial
from bo.ports import Lost, Reported, Returned
from integrations.ray_tasks import RayTasks
from search_spaces import Scale

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0}})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]

def train(trial):
    first = (trial.load() or {{"step": 0}})["step"]
    for step in range(first, 40):
        trial.save({{"step": step}})
        trial.report(step, {{"loss": 1.0}})
        time.sleep(0.2)
    return {{"first": first}}

executor, said = RayTasks(cluster.address), []
executor.open(train, Path({str(tmp_path)!r}))
trials = [Trial(id=id, config={{}}, scale=Scale(), seed=0, source="sobol") for id in range(2)]
for trial in trials:
    executor.submit(trial)
assert executor.capacity() == 0

def deliver(messages):
    for message in messages:
        said.append(message)
        if isinstance(message, Lost):
            executor.submit(Trial(id=message.trial, config={{}}, scale=Scale(), seed=0, source="sobol", attempt=2))
        elif isinstance(message, Returned):
            first = message.metrics["first"] > 0
            print("returned", message.trial, "attempt", message.attempt, "from a checkpoint", first)

while sum(isinstance(message, Returned) for message in said) < 2:
    executor.wait(deliver, 0.25)
    if len(said) > 20 and nodes:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.clear()
executor.close()
cluster.shutdown()
print("causes", {{message.cause for message in said if isinstance(message, Lost)}})
"""
    words = elsewhere(code)
    assert "attempt 1 from a checkpoint False" in words
    assert "attempt 2 from a checkpoint True" in words
    assert "causes {'the death of its node'}" in words


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="the limit is set from what /proc/meminfo says is used")
def test_a_trial_that_takes_too_much_memory_is_retried_and_the_others_go_on(tmp_path):
    """Ray's own memory monitor kills it, with a limit of 1.5 GB above what is used now."""
    lines = Path("/proc/meminfo").read_text().replace(":", "").splitlines()
    meminfo = dict(line.split()[:2] for line in lines)
    total, free = float(meminfo["MemTotal"]), float(meminfo["MemAvailable"])
    code = """
import sys, time
from pathlib import Path
from bo import Minimize, Study, run
from integrations.ray_tasks import RayTasks
from search_spaces import Real, Space

def train(trial):
    if trial.id == 1 and trial.attempt == 1:
        block = bytearray(3 * 1024**3)
        time.sleep(60)
    return {"loss": trial.config["lr"]}

study = Study.create(sys.argv[1], Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=RayTasks(workers=2), n_trials=4)
print([(trial.status, trial.attempt) for trial in study.trials])
"""
    environment = os.environ | {
        "RAY_memory_usage_threshold": f"{(total - free + 1.5e6) / total:.4f}",
        "RAY_memory_monitor_refresh_ms": "100",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "study")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    expected = [("finished", 1), ("finished", 2), ("finished", 1), ("finished", 1)]
    assert done.stdout.splitlines()[-1] == str(expected), done.stderr
    assert b'"cause":"running out of its node\'s memory"' in (tmp_path / "study" / "journal.jsonl").read_bytes()
