"""Files in a folder that every machine reaches: a shared folder, or a bucket of an object store, by its URL.

Every file appears whole or not at all: object stores do that by themselves, elsewhere a file is written beside its
place and moved there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec import url_to_fs
from fsspec.registry import available_protocols, get_filesystem_class, known_implementations

from bo.checkpoint import private, private_folder, sync_folder, whole
from integrations.masking import masked, masked_urls

#: Object stores, where a file that is being written is seen by nobody.
WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"})


class StoreError(OSError):
    """A store cannot be used or does not answer; the message says which and why, without secrets."""


class Absent(StoreError):
    """The store answers, and has no such file."""


@dataclass(frozen=True)
class Store:
    """The files under a URL: a path, or a place such as s3://bucket/folder in a form that fsspec knows.

    Credentials come from where the service's own tools find them (environment, instance role, ~/.aws). Names of files
    are paths with "/" under the URL. Raises ValueError for a URL of no known kind, or whose package is not installed.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str | os.PathLike) or not str(self.url).strip():
            raise ValueError(f"A store is a folder or a URL such as s3://bucket/folder, got {self.url!r}.")
        url = str(self.url)
        protocol, mark, rest = url.partition("://")
        if not mark or protocol in ("file", "local"):
            url = str(Path(rest if mark else url).expanduser().absolute())  # workers have another working directory
        else:
            _check(protocol, masked_urls(url))
        object.__setattr__(self, "url", url.rstrip("/") or "/")

    def __str__(self) -> str:
        return masked_urls(self.url)

    def __repr__(self) -> str:
        return f"Store({str(self)!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)  # made anew, and so checked anew, on another machine

    def put(self, path: Path, name: str) -> None:
        """Store a copy of the file `path` as `name`, in place of what may be there."""
        with self._doing(f"store {name}"):
            if (here := self._local(name)) is not None:
                _copy(path, here)
                return
            system, place = self._at(name)
            if WHOLE.intersection(_protocols(system)):
                system.put_file(str(path), place)
                return
            folder, _, last = place.rpartition("/")
            partial = f"{folder}/.{last}.{secrets.token_hex(4)}"
            system.makedirs(folder, exist_ok=True)
            try:
                system.put_file(str(path), partial)
                system.mv(partial, place)
            except BaseException:
                with contextlib.suppress(Exception):
                    system.rm_file(partial)
                raise

    def get(self, name: str, path: Path) -> None:
        """Copy the file `name` to `path`, whole or not at all. Raises Absent when there is none."""
        with self._doing(f"read {name}"):
            if (here := self._local(name)) is not None:
                _copy(here, path)
                return
            system, place = self._at(name)
            with whole(path) as partial:
                os.close(private(str(partial), os.O_CREAT | os.O_WRONLY))
                system.get_file(place, str(partial))

    def names(self, folder: str = "", partial: bool = False) -> list[str]:
        """Names of all files in `folder` and the folders in it, sorted; partial: also what a killed `put` has left."""
        with self._doing(f"list {folder or 'it'}"):
            if (here := self._local(folder)) is not None:
                root = Path(self.url)
                found = [str(path.relative_to(root)) for path in here.rglob("*") if path.is_file()]
            else:
                system, place = self._at(folder)
                system.invalidate_cache()  # others write here, too
                root_of = self._at("")[1].rstrip("/") + "/"
                try:
                    found = [name.removeprefix(root_of) for name in system.find(place)]
                except FileNotFoundError:
                    found = []
        return sorted(name for name in found if partial or not name.rpartition("/")[2].startswith("."))

    def remove(self, *names: str) -> None:
        """Remove these files; those that are not there are no error."""
        with self._doing("remove files"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if (here := self._local(name)) is not None:
                        here.unlink()
                    else:
                        system, place = self._at(name)
                        system.rm_file(place)

    def _local(self, name: str) -> Path | None:
        return None if "://" in self.url else Path(self.url) / name

    def _at(self, name: str) -> tuple[Any, str]:
        """The file system, which fsspec keeps for the next time, and the path of a file on it."""
        system, root = url_to_fs(self.url)
        return system, f"{root.rstrip('/')}/{name}" if name else root

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Turns whatever a file system raises into one sentence; without its cause, which may name credentials."""
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise Absent(f"{self} cannot {what}: there is no such file or bucket ({self._words(error)}).") from None
        except PermissionError as error:
            raise StoreError(
                f"{self} gives no permission to {what} ({self._words(error)}); see to the credentials in this "
                "process's environment, or to the folder's owner."
            ) from None
        except Exception as error:  # each file system has its own
            raise StoreError(f"{self} cannot {what}: {self._words(error)}.") from None

    def _words(self, error: Exception) -> str:
        first = (str(error).strip().splitlines() or [""])[0]
        text = masked(f"{type(error).__name__}: {first}".replace(self.url, str(self)))
        return text[:300].rstrip(" .:")


def _check(protocol: str, shown: str) -> None:
    """ValueError unless there is such a kind of file system and what it needs is installed."""
    try:
        get_filesystem_class(protocol)
    except ValueError:
        known = ", ".join(name for name in ("s3", "gs", "az", "sftp", "hdfs") if name in available_protocols())
        raise ValueError(
            f"There is no store of the kind {protocol!r}, got {shown}; give a folder, or a URL of a kind such as "
            f"{known}."
        ) from None
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err") or str(error)
        raise ValueError(
            f"The store {shown} needs a package that is not here ({hint.rstrip('.')}); install it on this machine and "
            "on every worker."
        ) from None


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _copy(source: Path, target: Path) -> None:
    """Copy a file for its owner's eyes; whole, on the disk, or not at all."""
    with open(source, "rb") as file:
        private_folder(target.parent)
        with whole(target) as partial, open(partial, "wb", opener=private) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
    sync_folder(target.parent)
