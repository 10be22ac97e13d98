"""Trials on local processes, without Ray.

Each worker is one process for many trials, so that what `train` imports is loaded once a worker. It leads a session of
its own: Ctrl-C reaches the driver alone, and what a trial starts (data loaders) ends with its worker. Driver and worker
talk through a pair of sockets; a worker that finds the other end closed ends itself, so none outlives a killed driver.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.connection import wait as wait_any
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bo.ports import Deliver, Lost, Message, Train, Underway
from bo.trial import Trial
from integrations.shipping import pack, run_packed

if TYPE_CHECKING:
    from integrations.store import Store

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
WATCH = 1.0  # seconds between a worker's looks at its parent

# `-c` and not multiprocessing: its spawn runs the user's script again in each worker, and breaks without a main guard.
START = "import sys; sys.path[:] = {path!r}; from integrations.process_pool import serve; serve({fd}, {driver})"


class ProcessPool:
    """An executor on `workers` processes of this machine (default: one for each CPU core that the driver may use).

    Numeric libraries get one thread a worker unless OMP_NUM_THREADS says otherwise. store: keeps trials' checkpoints.
    """

    apart = True

    def __init__(self, workers: int | None = None, store: Store | None = None) -> None:
        if workers is not None and (type(workers) is not int or workers < 1):
            raise ValueError(f"ProcessPool needs a whole number of workers of at least 1, got {workers!r}.")
        self._size, self._store = workers or _cores(), store
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}  # by trial

    def open(self, train: Train, folder: Path) -> None:
        self._packed, self._folder = pack(train, self._store, folder), folder

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()  # workers end with their driver

    def capacity(self) -> int:
        return self._size - len(self._busy)

    def submit(self, trial: Trial) -> None:
        if not self.capacity():
            raise RuntimeError(f"ProcessPool has {self._size} workers and all are busy; look at capacity().")
        worker = self._idle.pop() if self._idle else _Worker(self._packed, self._folder)
        worker.trial = trial
        self._busy[trial.id] = worker
        worker.tell(trial)

    def wait(self, deliver: Deliver, timeout: float) -> None:
        workers = {worker.connection: worker for worker in self._busy.values()}
        messages: list[Message] = []
        for connection in wait_any(list(workers), timeout):
            worker = workers[connection]  # type: ignore[index]  # the stubs widen what wait() returns
            said = worker.messages()
            messages += said
            if not isinstance(said[-1], Underway):
                del self._busy[said[-1].trial]
                if isinstance(said[-1], Lost):
                    worker.end()
                else:
                    self._idle.append(worker)
        if messages:
            deliver(messages)

    def stop(self, trial: int) -> None:
        if trial in self._busy:
            self._busy[trial].tell(trial)

    def close(self, leave: bool = False) -> None:
        workers, self._idle, self._busy = [*self._idle, *self._busy.values()], [], {}
        for worker in workers:
            worker.signal(signal.SIGTERM)  # to all, before waiting for the first
        for worker in workers:
            worker.end()


class _Worker:
    """The driver's side of a worker process."""

    def __init__(self, packed: bytes, folder: Path) -> None:
        self.trial: Trial | None = None
        self.connection, theirs = Pipe()
        with theirs:
            path = [place for place in sys.path if isinstance(place, str)]  # as the import system does
            start = START.format(path=path, fd=theirs.fileno(), driver=os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.tell((packed, folder))

    def tell(self, what: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead: `messages` finds out
            self.connection.send(what)

    def messages(self) -> list[Message]:
        """What it has said of its trial by now, with Lost at the end when it is gone."""
        received: list[Message] = []
        try:
            while self.connection.poll() and (not received or isinstance(received[-1], Underway)):
                received.append(self.connection.recv())
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            assert self.trial is not None
            code = self._process.wait()  # one that was told to end says nothing about the trial
            innocent = code == -signal.SIGTERM
            received.append(Lost(self.trial.id, self.trial.attempt, _cause(code), innocent))
        return received

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where all are dead
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.signal(signal.SIGKILL)  # also what its trial has started and left
        self._process.wait()
        self.connection.close()


def serve(fd: int, driver: int) -> NoReturn:
    """The worker's side: run the trials that come through the socket `fd`, until process `driver` is gone."""
    connection = Connection(fd)
    packed, folder = connection.recv()
    trials: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    stopping: set[int] = set()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            # a child that the driver has forked would keep the socket open, so look at the parent as well
            while os.getppid() == driver:
                if connection.poll(WATCH):
                    told = connection.recv()
                    if isinstance(told, Trial):
                        stopping.clear()  # what was asked of its predecessor came too late
                        trials.put(told)
                    else:
                        stopping.add(told)
        os.killpg(os.getpid(), signal.SIGKILL)

    def send(message: Underway) -> bool:
        connection.send(message)
        return message.trial in stopping

    threading.Thread(target=listen, name="driver", daemon=True).start()
    while True:
        connection.send(run_packed(packed, trials.get(), folder, send))


def _cause(code: int) -> str:
    """How a process ended, in words, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
