"""A study killed with SIGKILL after any line of its journal goes on as if it had not been, byte for byte."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bo import JournalError, Minimize, Study, WeightedSum, journal, run
from integrations.in_process import InProcess
from search_spaces import Fidelity, Mixture, Real, Schedule, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    data=Mixture("code", "prose", "web"),
    fidelity=Fidelity(params=(1e5, 3e5, 1e6), tokens=(1e6, 3e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)
OBJECTIVE = WeightedSum({"code": 0.7, "prose": 0.3})
N_TRIALS = 28
LINES = 87  # created, limits, enqueued, and three lines a trial
NEVER = -1

PROCESSES = multiprocessing.get_context("forkserver")  # forks a process that has loaded torch: a start costs 0.1 s
PROCESSES.set_forkserver_preload(["bo.policies.ladder", "integrations.in_process"])


def train(trial):
    """A deterministic bowl whose optimum moves with scale and that diverges at high rates; it reports and saves."""
    state = trial.load() or {"step": 0}
    lr, share = trial.config["lr"], trial.config["data"]["code"]
    if state["step"] == 0:
        trial.report(1, {"code": 5.0, "prose": 5.0})
        trial.save({"step": 1})
    if lr > 0.05:
        return {"code": float("nan"), "prose": 1.0}
    size = 1e6 / trial.scale["params"]
    off = (lr / (3e-3 * size**0.3)) ** 0.5
    loss = 2.0 + 0.1 * size**0.2 + 0.3 * (off + 1.0 / off - 2.0)
    area = float(trial.config["schedule"].factor(range(100), 100).mean())
    return {"code": loss + 0.2 * (share - 0.6) ** 2, "prose": loss + 0.3 * (share - 0.2) ** 2 + 0.1 * (area - 0.6) ** 2}


def drive(folder: Path, kill_at: int, torn: int) -> None:
    """Make the study or go on with it; die once line `kill_at` is on the disk, with `torn` bytes of a next one."""
    path, fsync = folder / journal.NAME, os.fsync

    def deadly(descriptor: int) -> None:
        fsync(descriptor)
        if path.exists() and path.read_bytes().count(b"\n") == kill_at:
            with open(path, "ab") as file:
                file.write(b'{"n":99,"at":0.0,"kind":"finished","trial":7,"met'[:torn])
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = deadly
    clock = lambda: 0.0  # noqa: E731
    with Study.open_or_create(folder, SPACE, objective=OBJECTIVE, seed=3, clock=clock) as study:
        if not study.trials and not study.queue:
            even = dict.fromkeys(("code", "prose", "web"), 1 / 3)
            study.enqueue({"lr": 1e-3, "schedule": {"family": "cosine"}, "data": even})
        run(study, train, executor=InProcess(clock=clock), n_trials=N_TRIALS)


def killed(folder: Path, kill_at: int, torn: int = 0) -> int:
    """The exit code of a driver in a process of its own."""
    process = PROCESSES.Process(target=drive, args=(folder, kill_at, torn))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert killed(folder, NEVER) == 0
    return (folder / journal.NAME).read_bytes()


def test_the_undisturbed_study_is_worth_killing(undisturbed):
    """It has a divergence, proxies, the target, and proposals of the model as well as the initial design."""
    assert undisturbed.count(b"\n") == LINES
    assert b'"kind":"diverged"' in undisturbed
    assert undisturbed.count(b'"source":"ladder/proxy"') >= 3
    assert undisturbed.count(b'"source":"ladder/target"') >= 3
    assert undisturbed.count(b'"memory":') >= 3


def check(folder: Path, undisturbed: bytes, kill_at: int) -> None:
    assert killed(folder, kill_at, torn=7 * kill_at % 50) == -signal.SIGKILL
    assert (folder / journal.NAME).read_bytes().startswith(b"".join(undisturbed.splitlines(keepends=True)[:kill_at]))
    assert killed(folder, NEVER) == 0
    assert (folder / journal.NAME).read_bytes() == undisturbed


@pytest.mark.parametrize("kill_at", [1, 21, 41, 61, LINES])
def test_a_killed_study_goes_on_as_if_it_had_not_been(tmp_path, undisturbed, kill_at):
    check(tmp_path, undisturbed, kill_at)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [n for n in range(1, LINES) if n not in (1, 21, 41, 61)])
def test_a_study_killed_at_any_other_line_goes_on_as_if_it_had_not_been(tmp_path, undisturbed, kill_at):
    check(tmp_path, undisturbed, kill_at)


def test_a_study_killed_again_and_again_goes_on_as_if_it_had_not_been(tmp_path, undisturbed):
    for kill_at in (2, 4, 5, 9, 20, 21, 40, 55):
        assert killed(tmp_path, kill_at, torn=kill_at) == -signal.SIGKILL
    assert killed(tmp_path, NEVER) == 0
    assert (tmp_path / journal.NAME).read_bytes() == undisturbed


def deadly(left: Iterator[int], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*args, **kwargs)


def fork_and_die(folder: Path, calls: int) -> None:
    """Fork the study in `folder`; die once so many calls were made that write, rename or make something."""
    left = iter(range(calls))
    for name in ("fsync", "replace", "mkdir", "ftruncate", "pwrite"):
        setattr(os, name, partial(deadly, left, getattr(os, name)))
    Study.open(folder / "study").fork(folder / "fork")


def test_a_fork_that_is_killed_is_there_whole_or_not_at_all_and_can_be_made_again(tmp_path):
    line = Space(lr=Real(0.0, 1.0))
    with Study.create(tmp_path / "study", line, objective=Minimize("loss"), policy="sobol") as study:
        run(study, lambda trial: {"loss": trial.config["lr"]}, n_trials=3)
    for calls in range(100):
        process = PROCESSES.Process(target=fork_and_die, args=(tmp_path, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if journal.exists(tmp_path / "fork"):
            break
    assert calls > 5
    fork = Study.open(tmp_path / "fork")
    assert [trial.metrics for trial in fork.trials] == [trial.metrics for trial in study.trials]
    with pytest.raises(JournalError, match="already holds a study"):
        study.fork(tmp_path / "fork")
