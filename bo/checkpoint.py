"""A trial's checkpoints: nested plain data, arrays and tensors in one file, written whole or not at all.

A checkpoint is a zip archive: `tree.json` holds the nesting and every plain value, `<i>.npy` the arrays, `tensors.pt`
the tensors (read back with `weights_only=True`). Nothing is pickled on the way in that could run code on the way out.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KEPT = 2  # the newest, and the one before it in case a disk returns the newest damaged


def save(folder: Path, state: Any) -> Path:
    """Write `state` as the newest checkpoint in `folder`, atomically; returns its path.

    `state` may nest dictionaries, lists and tuples of None, booleans, numbers, strings, bytes, numpy arrays and torch
    tensors. Anything else raises TypeError with its path in the nesting, and nothing is written.
    """
    arrays: list[np.ndarray[Any, Any]] = []
    tensors: list[Any] = []
    tree = _pack(state, "state", arrays, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    number = max((_number(path) for path in _files(folder)), default=0) + 1
    path = folder / f"checkpoint-{number:06d}.zip"
    partial = folder / f".{path.name}.{secrets.token_hex(4)}"  # an orphan of a killed driver may still write
    try:
        with open(partial, "wb") as file:
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
        os.chmod(partial, 0o600)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(folder)
    for old in sorted(_files(folder), key=_number)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def load(folder: Path) -> Any:
    """The newest whole checkpoint in `folder`, or None; a damaged one is passed over with a warning."""
    for path in sorted(_files(folder), key=_number, reverse=True):
        try:
            return _read(path)
        except (zipfile.BadZipFile, EOFError, json.JSONDecodeError, KeyError, ValueError, OSError) as error:
            warnings.warn(f"Checkpoint {path} is damaged ({error}) and is passed over.", stacklevel=2)
    return None


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


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint-*.zip"))


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def sync_folder(folder: Path) -> None:
    """Make the folder's own entries (a file just made or renamed) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
