"""A study's journal, mirrored to a store while it grows, so that the study can be resumed on another machine.

Object stores have no append, so the journal lies there in segments of whole lines, `journal/FIRST-LAST-DIGEST.jsonl`.
A segment takes in those before it that are no longer than itself: there are as many of them as the number of lines has
binary digits, and each line is written that often at most. `study.json` says whose journal it is and who mirrors it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bo import journal
from bo.checkpoint import private, private_folder, sync_folder
from bo.journal import JournalError
from integrations.store import Absent, Store
from integrations.trial_store import forget

FOLDER: Final = "journal"
ABOUT: Final = "study.json"
TRAINING: Final = "training_file.py"
LONGEST: Final = 60.0  # seconds between tries while the store is out of reach
log = logging.getLogger("windtunnel")

_NAME = re.compile(r"journal/(\d{9})-(\d{9})-([0-9a-f]{16})\.jsonl")


class Forked(JournalError):
    """The store holds lines of this study, or of another one, that this folder's journal does not have."""


@dataclass(frozen=True)
class Segment:
    """Lines `first` to `last` of a journal in a store."""

    first: int
    last: int
    digest: str

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.first:09d}-{self.last:09d}-{self.digest}.jsonl"


class Mirror:
    """Mirrors the journal of the study in `folder`, and its training file, to `store` in a thread of its own.

        with Mirror(folder, store): ...

    `start` looks whether the place is free or holds the beginning of this journal, and raises Forked or StoreError
    otherwise. From then on the driver is never held up: a store that does not answer is one warning and tried again.
    interval: seconds between looks at the journal.
    """

    def __init__(self, folder: Path, store: Store, interval: float = 1.0) -> None:
        self.folder, self.store, self.interval = folder, store, interval
        self.forked: str | None = None  # who else drives this study, once that was noticed
        self._segments: list[Segment] = []  # one after another, from line 1
        self._ends: list[int] = []  # of each line, in bytes
        self._size = 0  # of the journal at the last look: what is younger may yet be taken back by its writer
        self._training: tuple[int, int] | None = None
        self._unwanted: deque[Collection[int]] = deque()
        self._failing = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="journal mirror", daemon=True)

    def start(self) -> Mirror:
        self._read(os.path.getsize(self.folder / journal.NAME))
        there = _segments(self.store)
        about = _about(self.store)
        if about and about["study"] != journal.identity(self.folder):
            raise _another(self.store, about)
        if stranger := self._stranger(there):
            raise Forked(
                f"{self.store} holds lines {stranger.first} to {stranger.last} of this study as {self.folder} does not "
                f"have them; they were mirrored by {_who(about)}. One study has one driver: go on there, or restore it "
                "from the store into a new folder."
            )
        self._segments = _chain(there)[0]
        self._put_text(
            ABOUT,
            json.dumps({"study": journal.identity(self.folder), "pid": os.getpid(), "host": socket.gethostname()}),
        )
        self._size = self._ends[-1] if self._ends else 0
        self._thread.start()
        return self

    def __enter__(self) -> Mirror:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def mirrored(self) -> int:
        """The number of lines that are in the store."""
        return self._segments[-1].last if self._segments else 0

    def forget(self, trials: Collection[int]) -> None:
        """Have the checkpoints of these trials removed from the store, some time soon."""
        self._unwanted.append(trials)

    def close(self, timeout: float = 30.0) -> None:
        """Mirror what is left, for at most `timeout` seconds, and say what is not."""
        if not self._thread.ident:
            return
        self._ending.set()
        self._thread.join(timeout)
        lines = (self.folder / journal.NAME).read_bytes().count(b"\n")
        if self.forked is None and (left := lines - self.mirrored):
            log.warning(
                "The last %d of %d lines of %s are not mirrored in %s; they are safe here, and mirrored when the study "
                "is resumed here.",
                *(left, lines, self.folder / journal.NAME, self.store),
            )

    def _watch(self) -> None:
        pause = self.interval
        while True:
            last = self._ending.wait(pause)
            try:
                self._look(last)
                pause, self._failing = self.interval, False
            except Forked as error:
                self.forked = str(error)
                log.warning("%s", error)
                return
            except Exception as error:  # whatever a file system raises, the sweep goes on
                if not self._failing:
                    log.warning("The journal is not mirrored for now, and the sweep goes on: %s", error)
                pause, self._failing = min(LONGEST, max(2 * pause, 1.0)), True
            if last:
                return

    def _look(self, last: bool) -> None:
        size = os.path.getsize(self.folder / journal.NAME)
        if self._ends and size < self._ends[-1]:
            self._take_back(size)
        self._read(size if last else min(size, self._size))
        self._size = size
        if len(self._ends) > self.mirrored:
            self._push()
        with contextlib.suppress(FileNotFoundError):
            state = (self.folder / TRAINING).stat()
            if (now := (state.st_mtime_ns, state.st_size)) != self._training:
                self.store.put(self.folder / TRAINING, TRAINING)
                self._training = now
        while self._unwanted:
            forget(self.store, self._unwanted[0])
            self._unwanted.popleft()

    def _push(self) -> None:
        """Put the lines that are not mirrored yet, with the shorter segments before them."""
        there = _segments(self.store)
        if stranger := self._stranger(there):
            about = _about(self.store) or {"pid": "?", "host": "?"}
            raise Forked(
                f"{self.store} got lines {stranger.first} to {stranger.last} of this study from another driver (the "
                f"last to start was pid {about['pid']} on {about['host']}); one study has one driver. Nothing more is "
                f"mirrored from {self.folder}: stop one of the two."
            )
        first, last, merged = self.mirrored + 1, len(self._ends), list[Segment]()
        while self._segments and self._bytes(self._segments[-1]) <= self._bytes_of(first, last):
            merged.append(self._segments.pop())
            first = merged[-1].first
        segment = Segment(first, last, self._digest(first, last))
        try:
            self._put_text(segment.name, self._lines(first, last))
        except BaseException:
            self._segments += reversed(merged)
            raise
        self._segments.append(segment)
        self.store.remove(*(old.name for old in there if old not in self._segments))

    def _take_back(self, size: int) -> None:
        """The driver's last lines did not reach its disk whole, and were taken back."""
        while self._ends and self._ends[-1] > size:
            self._ends.pop()
        while self._segments and self._segments[-1].last > len(self._ends):
            self.store.remove(self._segments.pop().name)

    def _stranger(self, there: Iterable[Segment]) -> Segment | None:
        """A segment in the store that is not what the journal here has in these lines."""
        for each in there:
            if each in self._segments:
                continue
            if each.last > len(self._ends) or each.digest != self._digest(each.first, each.last):
                return each
        return None

    def _read(self, size: int) -> None:
        """Find the ends of the lines up to `size` bytes."""
        end = self._ends[-1] if self._ends else 0
        with open(self.folder / journal.NAME, "rb") as file:
            file.seek(end)
            data = file.read(max(0, size - end))
        for line in data.split(b"\n")[:-1]:
            end += len(line) + 1
            self._ends.append(end)

    def _start(self, line: int) -> int:
        return self._ends[line - 2] if line > 1 else 0

    def _bytes_of(self, first: int, last: int) -> int:
        return self._ends[last - 1] - self._start(first)

    def _bytes(self, segment: Segment) -> int:
        return self._bytes_of(segment.first, segment.last)

    def _lines(self, first: int, last: int) -> bytes:
        with open(self.folder / journal.NAME, "rb") as file:
            file.seek(self._start(first))
            return file.read(self._bytes_of(first, last))

    def _digest(self, first: int, last: int) -> str:
        return _digest(self._lines(first, last))

    def _put_text(self, name: str, text: str | bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            self.store.put(Path(file.name), name)


def fetched(store: Store, folder: Path) -> bool:
    """Whether `folder`, which had no study, has that of the store now: for a command that begins or goes on.

    Raises what `restore` raises, and Forked where the store is taken by a study of which it has no lines.
    """
    if journal.exists(folder):
        return False
    if not _segments(store):
        if about := _about(store):
            raise _another(store, about)
        return False
    restore(store, folder)
    return True


def restore(store: Store, folder: Path) -> int:
    """Make `folder` the study that `store` holds the journal of; returns the number of its lines.

    Trials that were running go on from their checkpoints in the store. Nothing of it is run or unpickled. Raises
    JournalError when the folder has a study already, or the store has none or not all of it, StoreError when it does
    not answer; then the folder has no journal.
    """
    if journal.exists(folder):
        raise JournalError(f"{folder} already holds a study; restore {store} into a new folder, or resume this one.")
    segments, rest = _chain(_segments(store))
    if not segments:
        raise JournalError(f"{store} holds no journal of a study" + (", only a part of one." if rest else "."))
    private_folder(folder)
    partial = folder / f".{journal.NAME}.{secrets.token_hex(4)}"
    piece = partial.with_name(f"{partial.name}.part")
    try:
        with open(partial, "wb", opener=private) as whole:
            for segment in segments:
                store.get(segment.name, piece)
                data = piece.read_bytes()
                if _digest(data) != segment.digest:
                    raise JournalError(f"{segment.name} in {store} is damaged: its digest does not hold.")
                whole.write(data)
            whole.flush()
            os.fsync(whole.fileno())
        lines = partial.read_bytes().splitlines(keepends=True)
        for other in rest:  # what a merging left behind says the same; anything else is another history
            if other.last > len(lines) or _digest(b"".join(lines[other.first - 1 : other.last])) != other.digest:
                raise JournalError(
                    f"{store} has lines {other.first} to {other.last} ({other.name}) that do not follow from line 1 to "
                    f"{segments[-1].last}: two drivers have mirrored there, or a part is missing. Remove the one that "
                    "is not to be gone on with."
                )
        events, _ = journal.read(partial)
        with contextlib.suppress(Absent):
            store.get(TRAINING, folder / TRAINING)
        partial.rename(folder / journal.NAME)
        sync_folder(folder)
    finally:
        partial.unlink(missing_ok=True)
        piece.unlink(missing_ok=True)
    return len(events)


def _segments(store: Store) -> list[Segment]:
    found = filter(None, map(_NAME.fullmatch, store.names(FOLDER)))
    return [Segment(int(each[1]), int(each[2]), each[3]) for each in found]


def _chain(segments: Iterable[Segment]) -> tuple[list[Segment], list[Segment]]:
    """The segments that follow each other from line 1, the longest where there is a choice, and all others."""
    rest = sorted(segments, key=lambda each: (each.first, each.last))
    chain: list[Segment] = []
    while following := [each for each in rest if each.first == (chain[-1].last + 1 if chain else 1)]:
        chain.append(following[-1])
        rest.remove(following[-1])
    return chain, rest


def _about(store: Store) -> dict[str, Any] | None:
    """Whose journal is in the store, and who mirrors it or did last."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            store.get(ABOUT, Path(folder) / ABOUT)
            about: dict[str, Any] = json.loads((Path(folder) / ABOUT).read_text())
        except (Absent, ValueError):
            return None
    return {"study": about.get("study"), "pid": about.get("pid", "?"), "host": about.get("host", "?")}


def _who(about: dict[str, Any] | None) -> str:
    return f"pid {about['pid']} on {about['host']}" if about else "another process"


def _another(store: Store, about: dict[str, Any]) -> Forked:
    return Forked(f"{store} holds another study, mirrored by {_who(about)}; give this one a place of its own.")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
