"""A seat: an actor of Ray in which one trial after another runs, and which outlives the driver that made it.

What a run says is numbered and kept here until a driver says that it has it on its disk. Drivers ask for news by calls
that wait for some; such a call shows each side that the other is alive. A seat that hears of no driver for the time of
its lease ends itself, with all that its trial has started; one that has nothing to run or to say, much sooner.

What is kept is also written to a file in the trial's folder, for the driver to read when the seat is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any, NoReturn

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bo.checkpoint import private, private_folder
from bo.ports import Branched, Lost, Message, Raised, Reported, Returned, Stopped, Underway
from bo.study import trial_folder
from bo.trial import Trial
from integrations.shipping import run_packed, sees
from search_spaces import Scale

PAGE = 1000  # messages a call brings at most
MOST = 10_000  # messages kept, above which a report waits until a driver has taken some
WATCH = 1.0  # seconds between looks at the lease
EMPTY = 30.0  # seconds of lease without a run: whoever asked for the seat is gone

#: The node and the process of a seat, and numbered messages.
Page = tuple[str, int, list[tuple[int, Message]]]
#: What a seat is told to run: a trial, and which attempt of it.
Run = tuple[int, int]


class Seat:
    """The actor's class. `run` has a thread of its own; all else is in the concurrency group "io".

    Ray keeps the main thread to itself in an actor that answers while it works, so trials run beside it.
    """

    def __init__(self, packed: bytes, folder: str, lease: float, hang: float | None) -> None:
        self._packed, self._folder, self._lease, self._hang = packed, Path(folder), lease, hang
        context = ray.get_runtime_context()
        self._node, self._name = context.get_node_id(), context.get_actor_name() or ""
        self._news = threading.Condition()
        self._run: Run | None = None  # the last it was told
        self._over = True  # whether that has had its last message
        self._kept: deque[tuple[int, Message]] = deque()
        self._count = 0
        self._stopping: set[Run] = set()
        self._poll = 0  # the newest call that waits; older ones are of drivers that are gone
        self._heard = self._sign = time.monotonic()
        self._record: IO[str] | None = None
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def run(self, trial: Trial, have: int) -> Page:
        """Run the trial, unless it is the one that ran here last; what it has said, when it has ended."""
        with self._news:
            self._hear(have)
            known = self._run == (trial.id, trial.attempt)
            if not known:
                self._run, self._over, self._sign = (trial.id, trial.attempt), False, time.monotonic()
                self._stopping &= {self._run}
                self._begin_record()
        if not known:
            self._say(_fault(run_packed(self._packed, trial, self._folder, self._send)))
        with self._news:
            return self._page()

    @ray.method(concurrency_group="io")
    def listen(self, have: int, seconds: float) -> Page:
        """What was said after message number `have`, which the driver has; waits for some at most so long."""
        with self._news:
            self._hear(have)
            self._poll += 1
            mine = self._poll
            self._news.notify_all()
            self._news.wait_for(lambda: self._kept or self._poll != mine, seconds)
            return self._page()

    @ray.method(concurrency_group="io")
    def stop(self, run: Run) -> None:
        """Have this run end at its next report, also one that begins later."""
        with self._news:
            self._hear(0)
            self._stopping.add(run)
            self._news.notify_all()

    @ray.method(concurrency_group="io")
    def runs(self) -> Run | None:
        """What runs here, or has ended and was not heard of; asked by a driver that takes over."""
        with self._news:
            self._hear(0)
            self._poll += 1
            self._news.notify_all()
            # A run that was stopped may have been so because its sweep was: it goes on from its checkpoint.
            if self._over and (not self._kept or isinstance(self._kept[-1][1], Stopped)):
                return None
            self._stopping.clear()
            return self._run

    @ray.method(concurrency_group="io")
    def stay(self) -> None:
        """Ends with the seat."""
        threading.Event().wait()

    def _hear(self, have: int) -> None:
        self._heard = time.monotonic()
        while self._kept and self._kept[0][0] <= have:
            self._kept.popleft()
        self._news.notify_all()

    def _page(self) -> Page:
        return self._node, os.getpid(), [self._kept[i] for i in range(min(len(self._kept), PAGE))]

    def _send(self, message: Underway) -> bool:
        self._say(message)
        run = (message.trial, message.attempt)
        with self._news:
            self._news.wait_for(lambda: len(self._kept) <= MOST or self._over or run in self._stopping)
            return self._over or run in self._stopping

    def _say(self, message: Message) -> None:
        with self._news:
            self._sign = time.monotonic()
            if self._over:
                return
            self._over = not isinstance(message, Underway)
            self._count += 1
            self._write(message)
            self._kept.append((self._count, message))
            self._news.notify_all()

    def _begin_record(self) -> None:
        """The record of the run, which at first says where this attempt has begun, though nothing was said yet."""
        assert self._run is not None
        path = record_path(self._folder, *self._run)
        with contextlib.suppress(Exception):  # a full disk, or what `run_packed` says better
            if sees(self._packed, self._folder):
                private_folder(path.parent)
                self._record = open(path, "w", encoding="utf-8", opener=private)  # noqa: SIM115  # over many calls
                self._record.write(json.dumps({"seat": self._name}) + "\n")
                self._record.flush()

    def _write(self, message: Message) -> None:
        """Onto the record of the run; one that cannot be written is missed only when this process is killed."""
        if self._record is None:
            return
        with contextlib.suppress(OSError):
            if not isinstance(message, Stopped):
                self._record.write(to_line(self._count, message))
                self._record.flush()
        if self._over:
            with contextlib.suppress(OSError):
                self._record.close()
            self._record = None

    def _watch(self) -> None:
        seen, raylet, looked, pause = None, os.getppid(), time.monotonic(), min(WATCH, self._lease / 10)
        while True:
            time.sleep(pause)
            now = time.monotonic()
            # While the trial held Python's lock, nothing here could hear of a driver.
            self._heard += max(0.0, now - looked - pause - WATCH)
            looked = now
            # Without its raylet it is dead to all others, and its trial may be begun again elsewhere.
            if os.getppid() != raylet:
                end()
            with self._news:
                lease = min(self._lease, EMPTY) if self._over and not self._kept else self._lease
                if now - self._heard > lease:
                    if self._run is not None:
                        cause = f"its lease, for no driver was heard of for {lease:g} s"
                        self._say(Lost(*self._run, cause, innocent=True))  # onto the record
                    end()
            if self._hang is None or self._over or self._run is None:
                continue
            id, attempt = self._run
            with contextlib.suppress(OSError):  # a checkpoint is a new name in the folder
                saved = (id, attempt, trial_folder(self._folder, id).stat().st_mtime_ns)
                if saved != seen:
                    seen, self._sign = saved, now
            if now - self._sign > self._hang:
                cause = f"a hang: its training function gave no sign for {self._hang:g} s (`hang`)"
                self._say(Lost(id, attempt, cause))


_remote: Any = ray.remote  # whose types do not know concurrency groups
SEAT = _remote(concurrency_groups={"io": 5}, max_restarts=0, max_task_retries=0)(Seat)


@ray.remote(num_cpus=0)
class Room:
    """An actor that holds the placement group of a seat, which has the first bundle.

    Group and seat are its own and end with it, and it ends with the seat, so that none is left when a driver is gone.
    """

    def __init__(self, bundles: list[dict[str, float]], strategy: str, settings: dict[str, Any], *seat: Any) -> None:
        group = placement_group(bundles, strategy)
        place = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        self._seat = SEAT.options(scheduling_strategy=place, **settings).remote(*seat)
        threading.Thread(target=self._watch, name="seat", daemon=True).start()

    def seat(self) -> Any:
        return self._seat

    def _watch(self) -> None:
        with contextlib.suppress(Exception):
            ray.get(self._seat.stay.remote())
        end()


#: Errors of Ray that a training function with actors or tasks of its own meets when one of them is lost.
_FAULTS = ("ActorDiedError", "ActorUnavailableError", "NodeDiedError", "WorkerCrashedError", "OutOfMemoryError")


def _fault(last: Message) -> Message:
    """The last message, as a loss where a part of the trial was lost on another node."""
    if not isinstance(last, Raised) or last.error.partition(":")[0] not in _FAULTS:
        return last
    taken_away = "node has died" in last.traceback or "NodeDiedError" in last.error
    return Lost(last.trial, last.attempt, f"the loss of one of its parts ({last.error})", taken_away)


def end() -> NoReturn:
    """End this process and, where it leads a group as Ray's workers do, all that was started in it."""
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# --------------------------------------------------------------------------------------------- the record of a run
# JSON, because a study's files may come from elsewhere and are never unpickled.

_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Reported, Branched, Returned, Raised, Lost)}


def record_path(folder: Path, trial: int, attempt: int) -> Path:
    """Where what an attempt says is on record until the driver has all of it."""
    return trial_folder(folder, trial) / f"said-{attempt:03d}.jsonl"


def to_line(number: int, message: Message) -> str:
    return json.dumps({"n": number, "kind": type(message).__name__, **vars(message)}, default=dict) + "\n"


def from_record(folder: Path, trial: int, attempt: int) -> list[tuple[int, Message]]:
    """What is on record of an attempt, up to a line that was cut short; nothing where there is no record."""
    found: list[tuple[int, Message]] = []
    try:
        for line in record_path(folder, trial, attempt).read_text(encoding="utf-8").splitlines():
            members: dict[str, Any] = json.loads(line)
            if "seat" in members:  # the first
                continue
            number, kind = members.pop("n"), _KINDS[members.pop("kind")]
            if "scale" in members:
                members["scale"] = Scale(members["scale"])
            found.append((number, kind(**members)))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return [said for said in found if (said[1].trial, said[1].attempt) == (trial, attempt)]


def seat_on_record(folder: Path, trial: int, attempt: int) -> str | None:
    """The name of the seat in which an attempt has begun."""
    try:
        with open(record_path(folder, trial, attempt), encoding="utf-8") as record:
            return str(json.loads(record.readline())["seat"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
