"""What the tests of executors share: a Ray, and looking at processes from outside."""

import os
import time
from pathlib import Path

import pytest


def _alive(pid):
    try:
        os.kill(pid, 0)
        if Path("/proc/self").exists():  # a zombie has ended, though its parent has not looked yet
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests of a file; executors use it and leave it running."""
    import ray  # which most files do without

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def until():
    """Waits for a condition, and fails when it does not come true."""

    def wait(condition, seconds=60.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"still not so after {seconds} s"
            time.sleep(0.05)

    return wait


@pytest.fixture
def ended(until):
    """Waits until a process has ended."""
    return lambda pid, seconds=20.0: until(lambda: not _alive(pid), seconds)


@pytest.fixture
def pid_in(until):
    """Waits for a file with a process id in it, and gives the id."""

    def read(path):
        until(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    return read
