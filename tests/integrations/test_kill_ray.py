"""A sweep on Ray whose driver is killed with SIGKILL at random moments loses no result and tells none twice."""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bo import Study, journal

FILE = """
import os, time
from bo import WeightedSum
from search_spaces import Fidelity, Mixture, Real, Schedule, Space

space = Space(
    lr=Real(1e-4, 1e-1, log=True),
    data=Mixture("code", "prose"),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    fidelity=Fidelity(params=(1e5, 3e5, 1e6), tokens=(1e5, 1e6), target={"params": 1e6, "tokens": 1e6}),
)
objective = WeightedSum({"code": 0.5, "prose": 0.5})
baseline = {"lr": 1e-2, "data": {"code": 0.5, "prose": 0.5}, "schedule": {"family": "cosine"}}

def train(trial):
    (trial.folder / f"{os.getpid()}.pid").touch()
    step = (trial.load() or {"step": 0})["step"]
    loss = 2.0 + abs(trial.config["lr"] - 1e-2) ** 0.5 + trial.config["data"]["code"]
    while step < 5:
        time.sleep(0.1)
        step += 1
        trial.save({"step": step})
        trial.report(step, {"code": loss + 1 / step, "prose": loss})
    return {"code": loss if trial.config["lr"] < 0.05 else float("nan"), "prose": loss}
"""


def driver(folder: Path, trials: int) -> subprocess.Popen[str]:
    words = ["run", "job.py", "--trials", str(trials), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    log = open(folder / "driver.log", "a")  # noqa: SIM115  # the process keeps it
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "integrations.command_line", *words],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            text=True,
        )


def until(holds, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def alive(study: Path) -> list[int]:
    """Processes that trained trials of this study and are still there."""
    pids = {int(path.stem) for path in study.glob("trials/*/*.pid")}
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
    return [pid for pid, command in commands.items() if command.exists() and b"ray" in command.read_bytes()]


def whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def sweep_with_kills(folder: Path, kills: int, trials: int) -> None:
    (folder / "job.py").write_text(FILE)
    study, rng = folder / "studies" / "job", random.Random(kills)
    path = study / journal.NAME
    told = b""
    for _ in range(kills):
        before = size(path)
        process = driver(folder, trials)
        # A moment in the work: some time after this driver has written its first line.
        assert until(lambda: size(path) > before or process.poll() is not None, 90), (folder / "driver.log").read_text()  # noqa: B023
        time.sleep(rng.uniform(0.0, 3.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = whole_lines(path)
        assert now.startswith(told), "a line that was there before is not as it was"
        told = now
        with open(path, "ab") as file:
            file.write(b'{"n":999,"at":1.0,"kind":"fini'[: rng.randrange(30)])
        assert until(lambda: not alive(study), 60), "a trial outlived its driver by a minute"
    process = driver(folder, trials)
    assert process.wait(600) == 0, (folder / "driver.log").read_text()

    events, _ = journal.read(path)
    ends = collections.Counter(e["trial"] for e in events if e["kind"] in ("finished", "diverged", "failed", "stopped"))
    done = Study.open(study)
    assert path.read_bytes().startswith(told)
    assert len(done.trials) == trials
    assert done.running == ()
    assert set(ends.values()) == {1}, "a trial was told twice"
    assert len(ends) == trials
    assert {trial.status for trial in done.trials} <= {"finished", "diverged"}
    assert until(lambda: not alive(study), 60)


def test_a_sweep_on_ray_survives_kills_of_its_driver(tmp_path):
    sweep_with_kills(tmp_path, kills=2, trials=12)


@pytest.mark.slow
def test_a_sweep_on_ray_survives_thirty_kills_of_its_driver(tmp_path):
    sweep_with_kills(tmp_path, kills=30, trials=120)
