"""How a training function gets to another process, and how a trial is run there.

Importable functions travel by name, together with the places the driver imports from; functions of a script, a notebook
or another function travel by value.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import cloudpickle

from bo.ports import Message, Raised, Train, Underway
from bo.study import trial_folder
from bo.trial import Trial
from bo.worker import RunningTrial, execute


class NotLoaded(Exception):
    """The training function arrived at a worker and could not be loaded there."""


def pack(train: Train) -> bytes:
    """`train` as bytes for `run_packed`; ValueError when it holds something that cannot leave this process."""
    try:
        function = cloudpickle.dumps(train)
    except Exception as error:  # objects raise what they like when they cannot be pickled
        raise ValueError(
            f"The training function cannot be sent to a worker process ({type(error).__name__}: {error}); open files, "
            "locks and generators inside it, or run it with the in-process executor."
        ) from error
    return pickle.dumps((tuple(sys.path), function))


def run_packed(packed: bytes, trial: Trial, study: Path, send: Callable[[Underway], bool]) -> Message:
    """Run a trial of the study in folder `study` in this worker process; what it prints goes to the trial's log.txt."""
    if not study.is_dir():
        return Raised(
            trial.id,
            trial.attempt,
            f"A worker cannot see the study's folder {study}; on several machines it must lie on a file system that "
            "all of them share.",
            traceback="",
            diverged=False,
        )

    def train(running: RunningTrial) -> Mapping[str, float]:
        return _unpack(packed)(running)  # in here, so that what importing it prints is logged too

    return execute(train, trial, trial_folder(study, trial.id), send, log=True)


@functools.lru_cache(maxsize=1)
def _unpack(packed: bytes) -> Train:
    """Cached: a function that travels by value would otherwise load its data again in every trial."""
    try:
        path, function = pickle.loads(packed)
        sys.path.extend(place for place in path if place not in sys.path)
        train: Train = pickle.loads(function)
    except Exception as error:
        raise NotLoaded(f"A worker cannot load the training function: {type(error).__name__}: {error}") from error
    return train
