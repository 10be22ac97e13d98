"""How a training function gets to another process, and how a trial is run there.

Importable functions travel by name, together with the places the driver imports from; functions of a script, a notebook
or another function travel by value. With a store, trials also run where the study's folder cannot be seen.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle

from bo.journal import identity
from bo.ports import Message, Raised, Train, Underway
from bo.study import trial_folder
from bo.trial import Trial
from bo.worker import RunningTrial, execute
from integrations.masking import masked

if TYPE_CHECKING:
    from integrations.store import Store


class NotLoaded(Exception):
    """The training function arrived at a worker and could not be loaded there."""


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # it has no types
    """Sends modules of other classes than Python's own by name, too.

    torch has such (`torch.distributed.config`), and cloudpickle takes one for used where a function says `torch` and
    `trial.config`.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            return import_module, (obj.__name__,)
        return super().reducer_override(obj)


def _by_value(thing: object) -> bytes:
    """`thing` pickled, functions of scripts and notebooks by their code."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(thing)
    return buffer.getvalue()


def pack(train: Train, store: Store | None = None, study: Path | None = None) -> bytes:
    """`train` as bytes for `run_packed`; ValueError when it holds something that cannot leave this process.

    store: keeps the trials' checkpoints, and lets workers run that cannot see the study's folder. study: that folder,
    by which a worker tells it from another of the same path on its own disk.
    """
    try:
        function = _by_value(train)
    except Exception as error:  # objects raise what they like when they cannot be pickled
        raise ValueError(
            f"The training function cannot be sent to a worker process ({type(error).__name__}: {error}); open files, "
            "locks and generators inside it, or run it with the in-process executor."
        ) from error
    return pickle.dumps((tuple(sys.path), function, store, study and identity(study)))


def run_packed(packed: bytes, trial: Trial, study: Path, send: Callable[[Underway], bool]) -> Message:
    """Run a trial of the study in folder `study` in this worker process; what it prints goes to the trial's log.txt.

    With a store the trial goes on from its newest checkpoint there. Where the worker cannot see the study's folder, the
    trial's own is one on the worker's disk, which is removed when the attempt has ended.
    """
    try:
        _, store, named = _contents(packed)
    except Exception as error:  # a store whose package is not installed here
        message = f"A worker cannot take the trial: {type(error).__name__}: {error}"
        return Raised(trial.id, trial.attempt, masked(message), masked(traceback.format_exc()), diverged=False)
    seen = sees(packed, study)
    if store is None and not seen:
        return Raised(
            trial.id,
            trial.attempt,
            f"A worker cannot see the study's folder {study}; on several machines it must lie on a file system that "
            "all of them share, or the trials' checkpoints in a store.",
            traceback="",
            diverged=False,
        )

    def train(running: RunningTrial) -> Mapping[str, float]:
        return unpack(packed)(running)  # in here, so that what importing it prints is logged too

    with contextlib.ExitStack() as stack:
        keeper = None
        folder = trial_folder(study, trial.id)
        if store is not None:
            from integrations.trial_store import TrialStore, scratch  # fsspec, which a run without a store spares

            keeper = TrialStore(store, trial)
            if not seen:
                label = f"{(named or 'study')[:8]}-{trial.id}-{trial.attempt}"
                folder = stack.enter_context(scratch(label)) / folder.name
        last = execute(train, trial, folder, send, log=True, keeper=keeper)
        if keeper is not None:
            keeper.keep_log(folder / "log.txt")
    if isinstance(last, Raised):  # it goes into the journal, where what the environment keeps secret must not be
        return replace(last, error=masked(last.error), traceback=masked(last.traceback))
    return last


def sees(packed: bytes, study: Path) -> bool:
    """Whether this worker sees the study's folder, and not another one of the same path."""
    _, store, named = _contents(packed)
    return study.is_dir() and (store is None or named is None or identity(study) == named)


@functools.lru_cache(maxsize=1)
def _contents(packed: bytes) -> tuple[bytes, Store | None, str | None]:
    """The pickled function, the store and the study's identity; this process imports from where the driver does."""
    path, function, store, study = pickle.loads(packed)
    sys.path.extend(place for place in path if place not in sys.path)
    return function, store, study


@functools.lru_cache(maxsize=1)
def unpack(packed: bytes) -> Train:
    """What `pack` packed, at a worker.

    Cached: a function that travels by value would otherwise load its data again in every trial.
    """
    try:
        train: Train = pickle.loads(_contents(packed)[0])
    except Exception as error:
        raise NotLoaded(f"A worker cannot load the training function: {type(error).__name__}: {error}") from error
    return train
