"""A trial's checkpoints: nested plain data, arrays and tensors in one file, written whole or not at all.

A checkpoint is a zip archive: `tree.json` holds the nesting and every plain value, `<i>.npy` the arrays, `tensors.pt`
the tensors (read back with `weights_only=True`). Nothing is pickled on the way in that could run code on the way out.

Names say the attempt, then a number: a later attempt's are the newer ones, whatever an earlier attempt that is still
alive somewhere (its machine was cut off) goes on to write.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

KEPT = 2  # the newest, and the one before it in case a disk returns the newest damaged


Kind = Literal["checkpoint", "files"]  # of `trial.save`, and of `trial.checkpoint_dir`

_NAME = re.compile(r"(checkpoint|files)-(?:(\d{3,})-)?(\d{6,})(?:\.zip)?")


def save(folder: Path, state: Any, attempt: int = 1) -> Path:
    """Write `state` as the newest checkpoint in `folder`, atomically; returns its path.

    `state` may nest dictionaries, lists and tuples of None, booleans, numbers, strings, bytes, numpy arrays and torch
    tensors. Anything else raises TypeError with its path in the nesting, and nothing is written.
    """
    arrays: list[np.ndarray[Any, Any]] = []
    tensors: list[Any] = []
    tree = _pack(state, "state", arrays, tensors)
    private_folder(folder)
    path = folder / f"{_next(folder, 'checkpoint', attempt)}.zip"
    with whole(path) as partial, open(partial, "wb", opener=private) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("tree.json", json.dumps(tree))
            for i, array in enumerate(arrays):
                with archive.open(f"{i}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            if tensors:
                buffer = io.BytesIO()
                sys.modules["torch"].save(tensors, buffer)
                archive.writestr("tensors.pt", buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    for old in _there(folder, "checkpoint")[KEPT:]:
        (folder / old).unlink(missing_ok=True)
    return path


def load(folder: Path) -> Any:
    """The newest whole checkpoint in `folder`, or None; a damaged one is passed over with a warning."""
    passed: set[str] = set()
    while names := [name for name in _there(folder, "checkpoint") if name not in passed]:
        name = names[0]
        passed.add(name)
        try:
            return _read(folder / name)
        except FileNotFoundError:  # an earlier attempt that is still alive has stored newer ones meanwhile
            continue
        except (MemoryError, ImportError):  # the machine is to blame
            raise
        except Exception as error:  # a damaged or foreign file fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"Checkpoint {folder / name} is damaged ({reason}) and is passed over.", stacklevel=2)
    return None


def begin_files(folder: Path, attempt: int = 1) -> Path:
    """A folder to write files of any format into, at first a copy of the last one that was kept.

    What earlier attempts have begun is removed; one that is still alive somewhere cannot touch this attempt's.
    """
    fresh = folder / f".files-{attempt:03d}"
    for begun in (*folder.glob(".files-*"), fresh):
        if begun.name <= fresh.name:
            shutil.rmtree(begun, ignore_errors=True)
    while last := _there(folder, "files")[:1]:
        try:
            shutil.copytree(folder / last[0], fresh)
        except OSError:
            if (folder / last[0]).exists():
                raise
        if (folder / last[0]).exists():
            return fresh
        shutil.rmtree(fresh, ignore_errors=True)  # another attempt has kept newer ones while this was copied
    private_folder(fresh)
    return fresh


def keep_files(folder: Path, fresh: Path, attempt: int = 1) -> Path:
    """Make `fresh` the newest folder of files in `folder`, by one renaming; returns its path."""
    path = folder / _next(folder, "files", attempt)
    fresh.rename(path)
    sync_folder(folder)
    for old in _there(folder, "files")[1:]:
        gone = folder / f".files-000-{secrets.token_hex(4)}"  # so that no copy is made of a part
        with contextlib.suppress(FileNotFoundError):
            (folder / old).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return path


def newest_first(names: Iterable[str], kind: Kind) -> list[str]:
    """Those of `names` that are checkpoints of a kind, the newest first."""
    ages = {name: age(name) for name in names if name.startswith(kind)}
    return sorted((name for name in ages if ages[name] > (0, 0)), key=ages.__getitem__, reverse=True)


def age(name: str) -> tuple[int, int]:
    """Attempt and number that the name of a checkpoint says; zeros where it is none."""
    found = _NAME.fullmatch(name)
    return (int(found[2] or 0), int(found[3])) if found else (0, 0)


def remove(folder: Path) -> None:
    """Remove every checkpoint in `folder`; what else is there, the log, stays."""
    for name in _there(folder, "checkpoint"):
        (folder / name).unlink(missing_ok=True)
    for name in _there(folder, "files"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for partial in (*folder.glob(".checkpoint-*"), *folder.glob(".files-*")):  # of killed processes
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def archive_folder(folder: Path, path: Path) -> None:
    """Write the files in `folder` as the zip archive `path`."""
    with open(path, "wb", opener=private) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for each in sorted(folder.rglob("*")):
            archive.write(each, each.relative_to(folder))


def unpack_folder(path: Path, folder: Path) -> None:
    """Write what the zip archive `path` holds into the new folder `folder`.

    Raises BadZipFile when it is damaged, ValueError when a member would land outside; then nothing is written.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            inside = PurePosixPath(member.filename)
            if inside.is_absolute() or ".." in inside.parts or "\\" in member.filename:
                raise ValueError(f"its member {member.filename!r} would land outside")
        if torn := archive.testzip():
            raise zipfile.BadZipFile(f"its member {torn!r} is damaged")
        folder.mkdir(mode=0o700)
        for member in archive.infolist():
            place = folder / member.filename
            if member.is_dir():
                private_folder(place)
                continue
            private_folder(place.parent)
            with archive.open(member) as source, open(place, "wb", opener=private) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        tree = json.loads(archive.read("tree.json"))
        arrays = {
            name: np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
            for name in archive.namelist()
            if name.endswith(".npy")
        }
        tensors = []
        if "tensors.pt" in archive.namelist():
            import torch  # only a run that saved tensors needs it

            tensors = torch.load(io.BytesIO(archive.read("tensors.pt")), weights_only=True)
    return _unpack(tree, arrays, tensors)


# A packed value is a JSON scalar, or [tag, content]: the tag keeps tuples apart from lists, and keys that are not
# strings (an optimizer's state is keyed by integers) apart from those that are.
def _pack(value: Any, where: str, arrays: list[np.ndarray[Any, Any]], tensors: list[Any]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return ["float", repr(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, Mapping):
        return [
            "dict",
            [
                [_pack(key, f"{where} key {key!r}", arrays, tensors), _pack(item, f"{where}[{key!r}]", arrays, tensors)]
                for key, item in value.items()
            ],
        ]
    if type(value) in (list, tuple):
        items = [_pack(item, f"{where}[{i}]", arrays, tensors) for i, item in enumerate(value)]
        return ["tuple" if type(value) is tuple else "list", items]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        arrays.append(np.asarray(value))
        return ["scalar" if isinstance(value, np.generic) else "array", len(arrays) - 1]
    torch = sys.modules.get("torch")  # a state can only hold tensors where torch is loaded
    if torch is not None and isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu())
        return ["tensor", len(tensors) - 1]
    raise TypeError(
        f"trial.save cannot store {where}, a {type(value).__name__}; it takes nested dictionaries, lists and tuples of "
        "numbers, strings, bytes, None, arrays and tensors, and trial.checkpoint_dir() takes files of any format."
    )


def _unpack(tree: Any, arrays: Mapping[str, np.ndarray[Any, Any]], tensors: list[Any]) -> Any:
    if not isinstance(tree, list):
        return tree
    tag, content = tree
    match tag:
        case "float":
            return float(content)
        case "bytes":
            return base64.b64decode(content)
        case "dict":
            return {_unpack(key, arrays, tensors): _unpack(item, arrays, tensors) for key, item in content}
        case "list":
            return [_unpack(item, arrays, tensors) for item in content]
        case "tuple":
            return tuple(_unpack(item, arrays, tensors) for item in content)
        case "array":
            return arrays[f"{content}.npy"]
        case "scalar":
            return arrays[f"{content}.npy"][()]
        case "tensor":
            return tensors[content]
    raise ValueError(f"unknown tag {tag!r}")


def _there(folder: Path, kind: Kind) -> list[str]:
    """Names of the checkpoints of a kind in `folder`, the newest first."""
    try:
        return newest_first(os.listdir(folder), kind)
    except FileNotFoundError:
        return []


def _next(folder: Path, kind: Kind, attempt: int) -> str:
    number = 1 + max((age(name)[1] for name in _there(folder, kind)), default=0)
    return f"{kind}-{attempt:03d}-{number:06d}"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` for a block to write to: it takes the place of `path` when the block ends, or is removed.

    Its name is drawn, since an orphan of a killed driver may still write.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def private(path: str, flags: int) -> int:
    """Opens a file that only its owner may read, as an `opener` of `open`."""
    return os.open(path, flags, 0o600)


def private_folder(folder: Path) -> None:
    """Make `folder` and those above it; each that is made is its owner's alone."""
    if not folder.is_dir():
        private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the folder's own entries (a file just made or renamed) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
