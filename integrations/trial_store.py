"""A trial's checkpoints in a store: on their way there from whatever machine it runs on, and back.

In the store a trial has the names it has in the study's folder: `trials/00007/checkpoint-001-000005.zip`, own formats
(`trial.checkpoint_dir`) as one archive each, and the log of each attempt.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from bo import checkpoint
from bo.checkpoint import Kind
from bo.trial import Trial
from bo.worker import OutOfReach
from integrations.store import Absent, Store, StoreError

PATIENCE = (1.0, 3.0, 9.0, 27.0)  # seconds before each further try to reach a store when an attempt starts
FORGOTTEN = 3600.0  # seconds after which a scratch folder without a lock was left by a process killed in making it

T = TypeVar("T")


class TrialStore:
    """The keeper of one attempt of a trial (`bo.worker.Keeper`)."""

    def __init__(self, store: Store, trial: Trial) -> None:
        self.store, self.attempt = store, trial.attempt
        self.place = place_of(trial.id)

    def fetch(self, folder: Path) -> None:
        """Bring the newest whole checkpoints into `folder`, unless those there are newer; raises OutOfReach."""
        there = _patiently(self._names)
        for kind in ("checkpoint", "files"):
            mine = max(map(checkpoint.age, checkpoint.newest_first(os.listdir(folder), kind)), default=(0, 0))
            for name in checkpoint.newest_first(there, kind):
                if checkpoint.age(name) <= mine or self._fetched(name, kind, folder):
                    break

    def keep(self, path: Path) -> None:
        """Store a checkpoint. One that cannot be stored is missed only when this machine is lost, so a warning says so.

        What an earlier attempt stores, still alive on a machine that was cut off, is older than this attempt's.
        """
        kind: Kind = "files" if path.is_dir() else "checkpoint"
        try:
            if kind == "checkpoint":
                self.store.put(path, f"{self.place}/{path.name}")
            else:
                archive = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
                try:
                    checkpoint.archive_folder(path, archive)
                    self.store.put(archive, f"{self.place}/{path.name}.zip")
                finally:
                    archive.unlink(missing_ok=True)
        except StoreError as error:
            warnings.warn(f"Checkpoint {path.name} is on this machine alone: {error}", stacklevel=2)
            return
        with contextlib.suppress(StoreError):  # they are removed after the next one
            old = checkpoint.newest_first(self._names(), kind)[checkpoint.KEPT :]
            self.store.remove(*(f"{self.place}/{name}" for name in old))

    def keep_log(self, path: Path) -> None:
        """Store what this attempt has printed."""
        with contextlib.suppress(StoreError):  # where it would be said is the log
            if path.exists():
                self.store.put(path, f"{self.place}/log-{self.attempt:03d}.txt")

    def _names(self) -> list[str]:
        return [name.rpartition("/")[2] for name in self.store.names(self.place)]

    def _fetched(self, name: str, kind: Kind, folder: Path) -> bool:
        """Whether this checkpoint is in `folder` now; a damaged one is passed over with a warning."""
        archive = folder / f".{name}.{secrets.token_hex(4)}"
        try:
            _patiently(lambda: self.store.get(f"{self.place}/{name}", archive))
            if kind == "files":
                fresh = folder / f"{archive.name}.new"
                checkpoint.unpack_folder(archive, fresh)
                fresh.rename(folder / name.removesuffix(".zip"))
            else:
                with zipfile.ZipFile(archive) as whole:
                    if torn := whole.testzip():
                        raise zipfile.BadZipFile(f"its member {torn!r} is damaged")
                archive.rename(folder / name)
        except Absent:  # removed since it was listed: a newer one is on its way
            return False
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            warnings.warn(f"Checkpoint {name} in {self.store} is damaged ({error}) and is passed over.", stacklevel=2)
            return False
        finally:
            archive.unlink(missing_ok=True)
        return True


def place_of(trial: int) -> str:
    """The folder of a trial in a store."""
    return f"trials/{trial:05d}"


def forget(store: Store, trials: Collection[int]) -> None:
    """Remove the checkpoints of these trials from a store; their logs stay."""
    places = {place_of(trial) for trial in trials}
    where = places.pop() if len(places) == 1 else "trials"  # one listing for any number
    split = [name.rpartition("/") for name in store.names(where, partial=True)]
    ours = [(place, name) for place, _, name in split if place == where or place in places]
    store.remove(*(f"{place}/{name}" for place, name in ours if name.startswith(("checkpoint-", "files-", "."))))


@contextlib.contextmanager
def scratch(label: str) -> Iterator[Path]:
    """A folder of this process's own under the system's temporary one, removed afterwards.

    What killed processes have left there is removed as well: the lock in such a folder is held while it is in use.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"windtunnel-{label}-"))
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(folder / ".lock", folder / "lock")  # before, a sweep would take it for one that is left
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob("windtunnel-*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > FORGOTTEN:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(lock)


def _patiently(ask: Callable[[], T]) -> T:
    """What `ask` gives, tried again while the store is out of reach; OutOfReach when it stays so."""
    for pause in (*PATIENCE, None):
        try:
            return ask()
        except Absent:
            raise
        except StoreError as error:
            if pause is None:
                raise OutOfReach(f"a store out of reach ({str(error).rstrip('.')})") from None
            time.sleep(pause)
    raise AssertionError
