"""Trials on processes of this machine; what every executor promises is in test_executors.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bo import Trial
from bo.ports import Lost, Reported, Returned
from integrations.process_pool import ProcessPool
from search_spaces import Scale

SECONDS = 120.0

# A user's script as scripts are: no main guard, and the training function is in it.
SCRIPT = """
import os, sys, time
from pathlib import Path
from bo import Minimize, Study, run
from integrations.process_pool import ProcessPool
from search_spaces import Real, Space

folder, wait = Path(sys.argv[1]), float(sys.argv[2])

def train(trial):
    (folder / f"pid-{trial.id}").write_text(str(os.getpid()))
    time.sleep(wait)
    return {"loss": trial.config["lr"]}

study = Study.create(folder / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
run(study, train, executor=ProcessPool(2), n_trials=4)
print("told", sum(trial.told for trial in study.trials))
"""


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(train, workers=1):
        made.append(ProcessPool(workers))
        made[-1].open(train, tmp_path)
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def trial(id=0, attempt=1):
    return Trial(id=id, config={}, scale=Scale(), seed=0, source="sobol", attempt=attempt)


def last(executor, each):
    executor.submit(each)
    said = []
    deadline = time.monotonic() + SECONDS
    while not said or isinstance(said[-1], Reported):
        assert time.monotonic() < deadline
        executor.wait(said.extend, 0.2)
    return said[-1]


def script(tmp_path, wait):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(path), str(tmp_path), str(wait)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_worker_runs_many_trials(opened):
    executor = opened(lambda trial: {"pid": float(os.getpid())})
    assert len({last(executor, trial(id)).metrics["pid"] for id in range(3)}) == 1


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9 (SIGKILL)"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal 11 (SIGSEGV)"),
    ],
)
def test_the_cause_of_a_loss_names_exit_code_or_signal(opened, end, cause):
    executor = opened(lambda trial: end() if trial.attempt == 1 else {"loss": 0.0})
    assert last(executor, trial()) == Lost(0, 1, cause)
    assert isinstance(last(executor, trial(attempt=2)), Returned)


def test_a_worker_that_dies_between_trials_costs_an_attempt_and_no_more(opened, ended):
    executor = opened(lambda trial: {"pid": float(os.getpid())})
    pid = int(last(executor, trial()).metrics["pid"])
    os.kill(pid, signal.SIGKILL)
    ended(pid)

    assert last(executor, trial(1)) == Lost(1, 1, "signal 9 (SIGKILL)")
    assert isinstance(last(executor, trial(1, attempt=2)), Returned)


def test_a_worker_has_one_thread_unless_the_user_wants_more(opened, monkeypatch):
    def train(trial):
        return {"threads": float(os.environ["OMP_NUM_THREADS"])}

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert last(opened(train), trial()).metrics == {"threads": 1.0}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert last(opened(train), trial()).metrics == {"threads": 3.0}


def test_what_a_trial_starts_ends_with_its_worker(opened, tmp_path, pid_in, ended):
    def train(trial):
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / f"child-{trial.id}").write_text(str(child.pid))
        if trial.id == 0:
            os._exit(1)
        time.sleep(SECONDS)

    executor = opened(train)
    last(executor, trial(0))
    ended(pid_in(tmp_path / "child-0"))
    executor.submit(trial(1))
    child = pid_in(tmp_path / "child-1")
    executor.close()
    ended(child)


def test_closing_ends_a_worker_that_ignores_sigterm(opened, tmp_path, pid_in, ended):
    def train(trial):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(SECONDS)

    executor = opened(train)
    executor.submit(trial())
    pid = pid_in(tmp_path / "pid")
    executor.close()

    ended(pid, seconds=0.5)


def test_a_script_needs_no_main_guard(tmp_path):
    output, _ = script(tmp_path, wait=0.0).communicate(timeout=SECONDS)
    assert output == "told 4\n"


def test_no_worker_outlives_a_killed_driver(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    driver.kill()
    driver.communicate()

    for pid in pids:
        ended(pid)


def test_ctrl_c_reaches_the_driver_alone_and_it_ends_the_workers(tmp_path, pid_in, ended):
    driver = script(tmp_path, wait=SECONDS)
    pids = [pid_in(tmp_path / f"pid-{id}") for id in range(2)]
    assert os.getpgid(driver.pid) not in {os.getpgid(pid) for pid in pids}
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    output, _ = driver.communicate(timeout=SECONDS)

    assert output.count("KeyboardInterrupt") == 1
    for pid in pids:
        ended(pid, seconds=0.5)


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True])
def test_a_wrong_number_of_workers_is_refused(workers):
    with pytest.raises(ValueError, match=f"whole number of workers of at least 1, got {workers!r}"):
        ProcessPool(workers)


def test_one_trial_too_many_is_refused(opened):
    executor = opened(lambda trial: time.sleep(SECONDS))
    executor.submit(trial(0))
    with pytest.raises(RuntimeError, match="ProcessPool has 1 workers and all are busy"):
        executor.submit(trial(1))
