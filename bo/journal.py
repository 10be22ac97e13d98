"""The journal: a study's one truth, a file that only grows.

Reading takes no lock and changes no byte. The first append takes the study's lock, cuts off a torn last line and from
then on writes lines that are on the disk before anyone hears of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bo.checkpoint import sync_folder
from bo.events import Event, from_line, to_line

NAME: Final = "journal.jsonl"
LOCK: Final = "lock"
GLANCES: Final = 10
REMOTE: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")  # their locks may not reach other machines
log = logging.getLogger("windtunnel")


class JournalError(Exception):
    """The journal cannot be read or written; the message says which line or why."""


class StudyInUse(JournalError):
    """Another process writes this study."""


class Journal:
    """The file `folder/journal.jsonl` after its first `length` lines; `append` makes this process its one writer."""

    def __init__(self, folder: Path, length: int, clock: Callable[[], float]) -> None:
        self.folder = folder
        self.length = length
        self.clock = clock
        self._file: int | None = None
        self._lock: int | None = None
        self._end = 0
        self._staged: list[bytes] = []  # lines for the next commit

    def append(self, events: Sequence[Event]) -> list[Event]:
        """Write events as the next lines and return them as read back, with "n" and "at"; `stage`, then `commit`."""
        fresh = self.stage(events)
        self.commit()
        return fresh

    def stage(self, events: Sequence[Event]) -> list[Event]:
        """Have events written as the next lines by the next `commit`; returns them as they will be read back."""
        first = self.length + len(self._staged) + 1
        lines = [to_line(first + i, self.clock(), happened) for i, happened in enumerate(events)]
        self._staged += lines
        return [from_line(line) for line in lines]

    def commit(self) -> None:
        """Put what was staged on the disk: one write and one fsync for all.

        Raises StudyInUse when another process is the writer, JournalError when the disk refuses; then nothing of it was
        appended, and a later append may succeed.
        """
        lines, self._staged = self._staged, []
        if not lines:
            return
        self.lock()
        assert self._file is not None
        data = b"".join(lines)
        try:
            os.ftruncate(self._file, self._end)  # what an earlier refused write may have left
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise JournalError(
                f"{self.folder / NAME} cannot be written ({error.strerror}); what it holds so far is safe. Free "
                "space or mend the folder's permissions, then resume the study."
            ) from error
        except BaseException:  # Ctrl-C between the write and what is remembered of it: the file has to be read again
            self.close()
            raise
        self._end, self.length = self._end + len(data), self.length + len(lines)

    def reread(self) -> list[Event]:
        """All that the file holds, after a commit that failed; nothing is appended before `length` is set to theirs."""
        self.close()
        self.length, self._staged = -1, []
        events, _ = read(self.folder / NAME)
        return events

    def close(self) -> None:
        """Let go of the file and the lock; the next append takes them again."""
        for descriptor in (self._file, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._lock = None

    def lock(self) -> None:
        """Become the one writer, if this process is not yet, and cut off a torn last line.

        Raises StudyInUse or JournalError, and then it is not.
        """
        if self._file is not None:
            return
        try:
            self._lock = take_lock(self.folder)
            events, self._end = read(self.folder / NAME)
            if len(events) != self.length:
                raise StudyInUse(f"{self.folder} was changed by another process since it was opened; open it again.")
            self._file = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
            if torn := os.fstat(self._file).st_size - self._end:
                log.warning("%s ended in a torn line of %d bytes, which is dropped.", self.folder / NAME, torn)
                os.ftruncate(self._file, self._end)
            sync_folder(self.folder)
        except OSError as error:
            self.close()
            raise JournalError(
                f"{self.folder} cannot be written ({error.strerror}); choose a folder you own."
            ) from error
        except BaseException:
            self.close()
            raise


def exists(folder: Path) -> bool:
    """Whether `folder` has a journal with a whole first line; one that was torn there can be begun again."""
    try:
        with open(folder / NAME, "rb") as file:
            return file.readline().endswith(b"\n")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise JournalError(f"{folder / NAME} cannot be read ({error.strerror}).") from error


def identity(folder: Path) -> str:
    """What tells the study in `folder` apart from all others, wherever its folder is moved: 16 hexadecimal digits.

    By its journal's first line; where there is none yet, by the folder's path.
    """
    first = str(folder.resolve()).encode()
    if exists(folder):
        with open(folder / NAME, "rb") as file:
            first = file.readline()
    return hashlib.sha256(first).hexdigest()[:16]


def read(path: Path) -> tuple[list[Event], int]:
    """The events of a journal and the length of its whole lines; a torn last one, without its newline, is left out.

    Raises JournalError naming the number of a line that is bad otherwise. A file that does not exist has no events.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise JournalError(f"{path} cannot be read ({error.strerror}).") from error
    events: list[Event] = []
    end = 0
    *whole, rest = data.split(b"\n")  # not splitlines, which takes a damaged byte for the end of a line, too
    lines = [line + b"\n" for line in whole] + [rest] * bool(rest)
    for number, line in enumerate(lines, start=1):
        try:
            happened = from_line(line)
            if happened["n"] != number:
                raise ValueError(f"it is numbered {happened['n']}")
        except ValueError as error:
            if not line.endswith(b"\n"):  # only the last can be without: its write was cut short
                break
            raise JournalError(
                f"{path} is damaged at line {number}: {error}. Restore the file from a backup, or keep the "
                f"{number - 1} lines before it by deleting the rest."
            ) from error
        events.append(happened)
        end += len(line)
    return events, end


def take_lock(folder: Path) -> int:
    """The descriptor that holds the folder's lock until it is closed or its process dies.

    Raises StudyInUse naming the holder, or JournalError where the file system has no working locks (some NFS mounts).
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, folder)
        if not _excludes(folder / LOCK) or _mounted_as(folder) in REMOTE:
            log.warning("%s may be on a file system whose locks do not exclude; never start two drivers on it.", folder)
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time_ns()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    for glance in range(GLANCES + 1):  # a reader that looks whether there is a driver holds the lock for a moment
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise JournalError(
                    f"{folder} is on a file system without working locks ({error.strerror}), so two drivers could "
                    "write one study; choose a local folder."
                ) from error
            if glance == GLANCES:
                raise StudyInUse(f"{folder} is in use by {holder(folder)}; one study has one driver.") from error
            time.sleep(0.02)


def driver(folder: Path) -> str:
    """What the present or last driver of `folder` wrote into the lock: it tells one driver from the next."""
    try:
        return (folder / LOCK).read_text()
    except FileNotFoundError:
        return ""


def holder(folder: Path) -> str:
    """Who holds the lock of `folder`, in words."""
    try:
        who = json.loads(driver(folder))
        return f"pid {who['pid']} on {who['host']}"
    except (ValueError, KeyError):
        return "another process"


def in_use(folder: Path) -> bool:
    """Whether some process drives the study in `folder` now; takes the lock for an instant and leaves no trace."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _excludes(path: Path) -> bool:
    second = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(second)
    return False


def _mounted_as(folder: Path) -> str:
    """The type of the file system under `folder`, where the system tells (Linux)."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    place = folder.resolve()
    over = [(len(where), kind) for _, where, kind, *_ in mounts if place.is_relative_to(where)]
    return max(over, default=(0, ""))[1]
