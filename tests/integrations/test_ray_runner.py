"""Trials on Ray; what every executor promises is in test_executors.py."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from bo import Trial
from bo.journal import StudyInUse
from bo.ports import Branched, Lost, Raised, Reported, Returned
from integrations import ray_runner
from integrations.ray_runner import RayRunner, _by_default
from integrations.ray_seat import EMPTY, MOST, PAGE, from_record, record_path, to_line
from search_spaces import Scale

SECONDS = 120.0

# Starts a Ray of its own, as `windtunnel run` does; HOME is the test's, to see what is left there.
SCRIPT = """
import os, sys, time
from pathlib import Path
from bo import Minimize, Study, run
from integrations.ray_runner import RayRunner
from search_spaces import Real, Space

folder, wait = Path(sys.argv[1]), float(sys.argv[2])

def train(trial):
    (folder / f"pid-{trial.id}").write_text(str(os.getpid()))
    trial.report(0, {"loss": 1.0})
    time.sleep(wait)
    return {"loss": trial.config["lr"]}

before = dict(os.environ)
study = Study.create(folder / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=RayRunner(workers=2), n_trials=3)
print("told", sum(trial.told for trial in study.trials))
try:  # a second Ray in the same process comes up like the first
    run(study, train, executor=RayRunner(resources={"resources": {"wafer": 2}}), n_trials=4)
except ValueError as error:
    print(str(error).partition(", and")[0])
print("environment", {n for n in os.environ | before if n[:4] == "RAY_" and os.environ.get(n) != before.get(n)})
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
        made.append(RayRunner(**settings))
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


@pytest.mark.slow
def test_a_ray_of_our_own_is_quiet_and_leaves_no_trace(tmp_path):
    output, _ = script(tmp_path, wait=0.0).communicate(timeout=120)

    assert output == "told 3\nTrial 3 needs {'CPU': 1.0, 'wafer': 2.0}\nenvironment set()\n"
    assert list((tmp_path / "home").iterdir()) == []  # no token: it would change how other clusters start


def listening(pid):
    """Addresses, in hexadecimal digits, at which a process and all that it has started wait for connections."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {address for child in children for address in listening(child)}
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and line.split()[9] in sockets:
                found.add(local.partition(":")[0])
    return found


@pytest.mark.slow
def test_a_ray_of_our_own_ends_with_a_killed_driver(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    driver.kill()
    driver.communicate()

    for pid in pids:
        ended(pid, seconds=20.0)


def test_a_ray_of_our_own_is_within_reach_of_this_machine_only_and_ctrl_c_is_clean(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    if sys.platform == "linux":  # asks /proc
        assert listening(driver.pid) == {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to everything that the driver has started too
    output, _ = driver.communicate(timeout=SECONDS)

    assert output.count("KeyboardInterrupt") == 1  # of the driver; workers and Ray say nothing
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert list((tmp_path / "home").iterdir()) == []  # no token: it would change how other clusters start
    for pid in pids:
        ended(pid, seconds=20.0)


def test_a_ray_that_runs_already_is_used_and_left_running(opened):
    opened(lambda trial: {"loss": 0.0}).close()
    assert ray.is_initialized()


def test_resources_follow_the_trial(opened, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def train(trial):
        assert os.environ["SIZE"] == f"{trial.scale['params']:g}"
        return {"cpus": ray.get_runtime_context().get_assigned_resources()["CPU"], "threads": threads()}

    def threads():
        return float(os.environ["OMP_NUM_THREADS"])

    def resources(trial):
        params = trial.scale["params"]
        return {"num_cpus": 1 if params < 1e6 else 3, "env": {"SIZE": f"{params:g}"}}

    executor, said = opened(train, resources=resources), []
    executor.submit(trial(0, params=1e5))
    executor.submit(trial(1, params=1e7))
    finish(executor, said, 2)

    assert {message.trial: dict(message.metrics) for message in said} == {
        0: {"cpus": 1.0, "threads": 1.0},
        1: {"cpus": 3.0, "threads": 3.0},
    }


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [
        ({}, 4),
        ({"resources": {"num_cpus": 2}}, 2),
        ({"resources": {"num_cpus": 0.5}}, 8),
        ({"resources": {"num_gpus": 1}}, 1),  # the cluster may grow one
        ({"workers": 3}, 3),
    ],
)
def test_capacity_is_what_the_resources_allow(opened, settings, capacity):
    assert opened(lambda trial: {}, **settings).capacity() == capacity


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
        ({"workers": 0}, "RayRunner needs a whole number of workers of at least 1, got 0"),
        ({"resources": {"cpus": 1}}, "resources are a dictionary with keys among num_cpus, .*, got {'cpus'}"),
        ({"resources": [1]}, r"resources are a dictionary with keys among num_cpus, .*, got \[1\]"),
        ({"resources": {"env": {"N": 1}}}, r"env is a dictionary of environment variables, texts both, got {'N': 1}"),
        ({"resources": {"bundles": []}}, r"bundles are at least one dictionary of resources, got \[\]"),
        ({"resources": {"bundles": [{}], "num_cpus": 1}}, r"with bundles have all in these, got \['num_cpus'\] beside"),
        ({"lease": 0}, "RayRunner needs lease in seconds above 0, got 0"),
        ({"hang": float("inf")}, "RayRunner needs hang in seconds above 0, got inf"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RayRunner(**settings)


def test_a_wrong_answer_of_the_resources_function_is_refused(opened):
    executor = opened(lambda trial: {}, resources=lambda trial: 2)
    with pytest.raises(ValueError, match=r"resources are a dictionary with keys among num_cpus, .*, got 2"):
        executor.submit(trial())


# ---------------------------------------------------------------------------------------------------- trials and seats


def pids(executor, trials):
    """In which process each of these trials ran, one after another."""
    said = []
    for each in trials:
        executor.submit(each)
        finish(executor, said, len([message for message in said if not isinstance(message, Reported)]) + 1)
    return [message.metrics["pid"] for message in said]


@pytest.mark.parametrize(("isolate", "processes"), [(False, 1), (None, 1), (True, 3)])
def test_a_process_for_each_trial_or_one_for_all(opened, isolate, processes):
    executor = opened(lambda trial: {"pid": float(os.getpid())}, workers=1, isolate=isolate)
    assert len(set(pids(executor, [trial(id) for id in range(3)]))) == processes


def test_a_seat_is_used_again_for_equal_needs_only_and_makes_room_for_others(opened):
    def resources(trial):
        return {"num_cpus": 4 if trial.id == 2 else 2}

    executor = opened(lambda trial: {"pid": float(os.getpid())}, resources=resources)
    first, second, large, third = pids(executor, [trial(0), trial(1), trial(2), trial(3)])
    assert first == second
    assert len({first, large, third}) == 3  # each takes more of the machine than the other leaves


@pytest.mark.slow  # a busy machine takes as long to start a seat
def test_an_idle_seat_makes_way_for_a_trial_that_waits_for_room(opened):
    executor, said = opened(lambda trial: time.sleep(trial.id), resources=lambda trial: {"num_cpus": 2 + trial.id}), []
    executor.submit(trial(1))  # after which its seat has three of the four CPUs
    executor.submit(trial(0))
    since = time.monotonic()
    finish(executor, said, 2)
    assert time.monotonic() - since < ray_runner.IDLE


def test_a_training_function_that_carries_much_arrives(opened):
    much = bytes(range(256)) * ray_runner.INLINE
    executor, said = opened(lambda trial: {"size": float(len(much))}, workers=1), []
    executor.submit(trial())
    finish(executor, said, 1)
    assert said[0].metrics == {"size": 256.0 * ray_runner.INLINE}


def test_reports_come_in_pages_and_wait_where_nobody_takes_them(opened):
    n = MOST + 2 * PAGE

    def train(trial):
        for step in range(n):
            trial.report(step, {"loss": 1.0})
        return {"loss": 0.0}

    executor, said = opened(train, workers=1), []
    executor.submit(trial())
    finish(executor, said, 1)

    assert [message.step for message in said[:-1]] == list(range(n))


def test_a_training_function_that_hangs_is_lost(opened, tmp_path, pid_in, ended):
    def train(trial):
        for step in range(4):  # with signs it does not hang, whatever they are
            time.sleep(0.5)
            trial.save({"step": step}) if step % 2 else trial.report(step, {"loss": 1.0})
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(SECONDS)

    executor, said = opened(train, workers=1, hang=1.5), []
    executor.submit(trial())
    finish(executor, said, 1)

    cause = "a hang: its training function gave no sign for 1.5 s (`hang`)"
    assert said[2:] == [Lost(0, 1, cause)]
    ended(pid_in(tmp_path / "pid"))


def test_a_trial_of_several_nodes_has_a_placement_group_that_ends_with_it(opened, until):
    def train(trial):
        @ray.remote(num_cpus=1)
        class Part:
            def place(self):
                group = ray.util.get_current_placement_group()
                return group.id.hex()

        part = Part.remote()
        mine = ray.util.get_current_placement_group()
        assert ray.get(part.place.remote(), timeout=60) == mine.id.hex()
        return {"bundles": float(mine.bundle_count)}

    resources = {"bundles": [{"CPU": 1}, {"CPU": 1}], "strategy": "PACK"}
    executor, said = opened(train, resources=resources), []
    assert executor.capacity() == 2
    executor.submit(trial())
    finish(executor, said, 1)

    assert said == [Returned(0, 1, {"bundles": 2.0}, said[-1].seconds)]
    until(lambda: all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()))


def test_a_part_of_a_trial_that_is_lost_is_no_error_of_its_own(opened):
    def train(trial):
        @ray.remote(num_cpus=0)
        class Part:
            def end(self):
                os.kill(os.getpid(), signal.SIGKILL)

        ray.get(Part.remote().end.remote())

    executor, said = opened(train, workers=1), []
    executor.submit(trial())
    finish(executor, said, 1)

    assert isinstance(said[0], Lost)
    assert said[0].cause.startswith("the loss of one of its parts (ActorDiedError: ")


# ------------------------------------------------------------------------------------------------- drivers and seats


def forget(executor):
    """What is left of an executor when its driver is killed: its trials."""
    ray.kill(executor._claim)
    executor._seats, executor._calls, executor._packed = {}, {}, None


def stepping(tmp_path, steps=3):
    """A training function that reports each step, as soon as there is a file for it."""

    def train(trial):
        (tmp_path / "begun").open("a").write(f"{os.getpid()}\n")
        (tmp_path / "pid").write_text(str(os.getpid()))
        for step in range(steps):
            while not (tmp_path / f"go-{step}").exists():
                time.sleep(0.02)
            trial.report(step, {"loss": 1.0})
        return {"loss": 0.0}

    return train


GROUP = {"bundles": [{"CPU": 1}]}


@pytest.mark.parametrize(
    "resources", [None, pytest.param(GROUP, marks=pytest.mark.slow)], ids=["", "in a placement group"]
)
def test_a_trial_that_runs_is_taken_up_by_the_next_driver_and_all_others_end(
    opened, tmp_path, pid_in, until, ended, resources
):
    first, said = opened(stepping(tmp_path), workers=3, resources=resources), []
    (tmp_path / "go-0").touch()
    first.submit(trial(0))
    until(lambda: first.wait(said.extend, 0.1) or said)
    pid = pid_in(tmp_path / "pid")
    first.submit(trial(1))
    until(lambda: first.wait(said.extend, 0.1) or len((tmp_path / "begun").read_text().splitlines()) == 2)
    other = pid_in(tmp_path / "pid")
    forget(first)

    second, said = opened(stepping(tmp_path), workers=3, resources=resources), []
    assert second.attach([trial(0), replace(trial(1), attempt=2)]) == (trial(0),)  # of trial 1 an earlier one ran
    assert second.capacity() == 2
    ended(other)
    for step in (1, 2):
        (tmp_path / f"go-{step}").touch()
    finish(second, said, 1)
    assert [message.step for message in said[:-1]][-2:] == [1, 2]
    assert isinstance(said[-1], Returned)
    assert len((tmp_path / "begun").read_text().splitlines()) == 2
    ended(pid)  # it has what the earlier driver sent


def test_a_result_is_there_for_the_next_driver_even_when_its_process_is_gone(opened, tmp_path, pid_in, until, ended):
    for step in range(3):
        (tmp_path / f"go-{step}").touch()
    first = opened(stepping(tmp_path), workers=1)
    first.submit(trial())
    until(lambda: from_record(tmp_path, 0, 1)[3:])
    pid = pid_in(tmp_path / "pid")
    forget(first)
    os.kill(pid, signal.SIGKILL)
    ended(pid)

    second, said = opened(stepping(tmp_path), workers=1), []
    assert second.attach([trial()]) == (trial(),)
    finish(second, said, 1)
    assert [message.step for message in said[:-1]] == [0, 1, 2]
    assert isinstance(said[-1], Returned)
    assert not record_path(tmp_path, 0, 1).exists()


def test_a_trial_that_died_unseen_goes_on_as_its_next_attempt(opened, tmp_path, pid_in, until, ended):
    (tmp_path / "go-0").touch()
    first = opened(stepping(tmp_path), workers=1)
    first.submit(trial())
    until(lambda: from_record(tmp_path, 0, 1))
    forget(first)
    os.kill(pid_in(tmp_path / "pid"), signal.SIGKILL)
    ended(pid_in(tmp_path / "pid"))

    second, said = opened(stepping(tmp_path), workers=1), []
    assert second.attach([trial()]) == (trial(),)
    finish(second, said, 1)
    assert said == [Reported(0, 1, 0, {"loss": 1.0}), Lost(0, 1, "an end that no driver saw", innocent=True)]


def test_a_trial_that_died_unseen_before_it_said_anything_does_too(opened, tmp_path, pid_in, ended):
    """It may be alive on a machine that is cut off: an attempt of the same number would write over its files."""
    first = opened(stepping(tmp_path), workers=1)
    first.submit(trial())
    pid = pid_in(tmp_path / "pid")
    forget(first)
    os.kill(pid, signal.SIGKILL)
    ended(pid)

    second, said = opened(stepping(tmp_path), workers=1), []
    assert second.attach([trial()]) == (trial(),)
    finish(second, said, 1)
    assert said == [Lost(0, 1, "an end that no driver saw", innocent=True)]


def test_a_record_is_read_up_to_where_it_was_cut_and_nothing_in_it_is_run(tmp_path):
    path = record_path(tmp_path, 0, 1)
    path.parent.mkdir(parents=True)
    kept = [Branched(0, 1, Scale({"params": 1e4}), {"loss": float("inf")}), Raised(0, 1, "E", "lines", True, 1.0)]
    lines = [to_line(number, message) for number, message in enumerate(kept, start=1)]
    path.write_text("".join(lines) + lines[0][:20])
    assert from_record(tmp_path, 0, 1) == [(1, kept[0]), (2, kept[1])]
    assert from_record(tmp_path, 0, 2) == []
    for line in ('{"n": 1, "kind": "__import__"}', "[]", '{"n": 1, "kind": "Lost", "trial": 1}', "\x00"):
        path.write_text(line + "\n")
        assert from_record(tmp_path, 0, 1) == []


@pytest.mark.parametrize(
    "resources", [pytest.param(None, marks=pytest.mark.slow), GROUP], ids=["", "in a placement group"]
)
def test_trials_end_when_no_driver_was_heard_of_for_the_lease(opened, tmp_path, pid_in, until, ended, resources):
    executor = opened(stepping(tmp_path), workers=1, lease=2.0, resources=resources)
    executor.submit(trial())
    executor.wait(lambda said: None, 4.0)  # heard of all the time
    pid = pid_in(tmp_path / "pid")
    os.kill(pid, 0)
    forget(executor)
    ended(pid)
    assert from_record(tmp_path, 0, 1)[-1][1] == Lost(0, 1, "its lease, for no driver was heard of for 2 s", True)
    until(lambda: not executor._actors())
    until(lambda: all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()))


def test_a_worker_that_is_silent_is_lost_and_ended(opened, tmp_path, pid_in, ended):
    executor, said = opened(stepping(tmp_path), workers=1, silence=1.5), []
    executor.submit(trial())
    pid = pid_in(tmp_path / "pid")
    executor.wait(said.extend, 2.0)
    os.kill(pid, signal.SIGSTOP)
    finish(executor, said, 1)
    assert said == [Lost(0, 1, "silence: it was not heard of for 1.5 s", innocent=True)]
    assert executor.capacity() == 1
    ended(pid)


@pytest.mark.parametrize(
    "taken_up", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "when it was taken up"]
)
def test_a_trial_that_holds_pythons_lock_is_neither_silent_nor_without_a_driver(opened, tmp_path, pid_in, taken_up):
    def train(trial):
        (tmp_path / "pid").write_text(str(os.getpid()))
        while not (tmp_path / "go").exists():
            time.sleep(0.02)
        ctypes.PyDLL(None).sleep(6)  # unlike CDLL, this keeps the lock
        return {"loss": 0.0}

    executor, said = opened(train, workers=1, silence=4.0, lease=3.0), []
    executor.submit(trial())
    pid_in(tmp_path / "pid")
    if taken_up:
        forget(executor)
        executor = opened(train, workers=1, silence=4.0, lease=3.0)
        assert executor.attach([trial()]) == (trial(),)
    else:
        executor.wait(said.extend, 0.5)  # it is heard of
    (tmp_path / "go").touch()
    finish(executor, said, 1)
    assert isinstance(said[-1], Returned)


def test_a_trial_that_holds_pythons_lock_is_taken_up_by_what_its_record_says(opened, tmp_path, until):
    def train(trial):
        trial.report(0, {"loss": 1.0})
        ctypes.PyDLL(None).sleep(8)
        return {"loss": 0.0}

    first, said = opened(train, workers=1, silence=2.0), []
    first.submit(trial())
    until(lambda: from_record(tmp_path, 0, 1))
    forget(first)

    second = opened(train, workers=1, silence=2.0)
    assert second.attach([trial()]) == (trial(),)
    assert second.capacity() == 0
    finish(second, said, 1)
    assert [type(message) for message in said] == [Reported, Returned]


@pytest.mark.slow
def test_a_seat_that_has_nothing_to_run_ends_long_before_its_lease(opened, tmp_path, until):
    executor = opened(stepping(tmp_path), workers=1)
    seat = executor._start("", {}, {"CPU": 1.0}, set())  # as by a driver that dies before there is room
    forget(executor)
    until(lambda: ray_runner._known(seat.actor).get("State") == "ALIVE")
    time.sleep(EMPTY / 2)
    assert executor._actors()
    until(lambda: not executor._actors(), EMPTY)


@pytest.mark.slow
def test_a_process_that_is_busy_for_ever_is_lost_by_a_fault_of_its_own_though_it_was_never_heard_of(
    opened, monkeypatch
):
    monkeypatch.setattr(ray_runner, "BUSY", 1.5)
    executor, said = opened(lambda trial: ctypes.PyDLL(None).sleep(60), workers=1, silence=4.0), []
    executor.submit(trial())
    finish(executor, said, 1)
    assert said == [Lost(0, 1, "silence: it was not heard of for 6 s, though its process was at work")]


def test_silence_counts_only_while_the_driver_is_awake(opened, tmp_path, pid_in):
    executor, said = opened(stepping(tmp_path), workers=1, silence=1.5), []
    executor.submit(trial())
    pid_in(tmp_path / "pid")
    executor.wait(said.extend, 0.5)
    time.sleep(3.0)
    executor.wait(said.extend, 0.5)
    for step in range(3):
        (tmp_path / f"go-{step}").touch()
    finish(executor, said, 1)
    assert isinstance(said[-1], Returned)


def test_a_second_driver_is_refused_by_name(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runner, "YIELD", 0.5)
    opened(len)
    with pytest.raises(StudyInUse, match=rf"{tmp_path} is in use by pid {os.getpid()} on .*; one study has one driver"):
        opened(len)


# ----------------------------------------------------------------------------------------------- Ray in other processes


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
    code = "from pathlib import Path; from integrations.ray_runner import RayRunner as R; "
    words = elsewhere(code + f"R('127.0.0.1:{port}').open(len, Path('/tmp'))").splitlines()[-1]
    assert words.startswith(f"ConnectionError: Nothing answers at 127.0.0.1:{port} (")


def test_an_address_that_is_none_is_named():
    code = "from pathlib import Path; from integrations.ray_runner import RayRunner as R; "
    code += "R('nonsense').open(len, Path('/'))"
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
from integrations.ray_runner import RayRunner
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

executor, said = RayRunner(cluster.address), []
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
from integrations.ray_runner import RayRunner
from search_spaces import Real, Space

def train(trial):
    if trial.id == 1 and trial.attempt == 1:
        block = bytearray(3 * 1024**3)
        time.sleep(60)
    return {"loss": trial.config["lr"]}

study = Study.create(sys.argv[1], Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=RayRunner(workers=2), n_trials=4)
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
