"""The worker's side of a trial: what a training function sees, and how its end becomes one message."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bo import checkpoint
from bo.ports import Message, Raised, Reported, Returned, Stopped, Train
from bo.trial import Diverged, StopTrial, Trial
from search_spaces import Scale


class RunningTrial:
    """What a training function gets: the configuration to train, and the ways to report, save and resume.

    `config` and `scale` say what to train, `seed` makes it repeatable, `attempt` counts from 1 and grows when a worker
    was lost, `folder` is the trial's own.
    """

    def __init__(self, trial: Trial, folder: Path, send: Callable[[Reported], bool]) -> None:
        self._trial = copy.deepcopy(trial)  # a run may change its config; in process the study must not see that
        self._send = send
        self.folder = folder

    @property
    def id(self) -> int:
        return self._trial.id

    @property
    def config(self) -> dict[str, Any]:
        return dict(self._trial.config)

    @property
    def scale(self) -> Scale:
        return self._trial.scale

    @property
    def seed(self) -> int:
        return self._trial.seed

    @property
    def attempt(self) -> int:
        return self._trial.attempt

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand in the metrics of a step.

        Raises StopTrial when this run is to end early, ValueError when `step` or a metric is not a number.
        """
        step = whole_step(step, "trial.report")
        if self._send(Reported(self.id, self.attempt, step, numbers(metrics, "trial.report"))):
            raise StopTrial(f"Trial {self.id} was asked to end at step {step}.")

    def save(self, state: Any) -> None:
        """Store `state` as this trial's newest checkpoint, whole or not at all (see `bo.checkpoint.save`)."""
        checkpoint.save(self.folder, state)

    def load(self) -> Any:
        """The newest checkpoint that `save` stored, or None when there is none."""
        return checkpoint.load(self.folder)

    @contextlib.contextmanager
    def checkpoint_dir(self) -> Iterator[Path]:
        """A folder for files of any format, at first a copy of the last one; a block that raises changes nothing."""
        current, fresh, old = (self.folder / name for name in ("checkpoint", ".checkpoint-new", ".checkpoint-old"))
        if old.exists() and not current.exists():  # killed between the two renames below
            old.rename(current)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            shutil.copytree(current, fresh)
        else:
            fresh.mkdir(parents=True)
        yield fresh
        if current.exists():
            current.rename(old)
        fresh.rename(current)
        shutil.rmtree(old, ignore_errors=True)


def execute(
    train: Train,
    trial: Trial,
    folder: Path,
    send: Callable[[Reported], bool],
    log: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Message:
    """Run one trial and turn whatever happens into its final message; only KeyboardInterrupt passes.

    folder: the trial's own, made here. send: hands over a report and says whether the run is to end.
    log: whether what the run prints goes to `folder/log.txt` instead of the terminal. clock: seconds, for the run time.
    """
    start = clock()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _logged(folder / "log.txt") if log else contextlib.nullcontext():
            result = train(RunningTrial(trial, folder, send))
        return Returned(trial.id, trial.attempt, numbers(result, "The training function"), clock() - start)
    except StopTrial:
        return Stopped(trial.id, trial.attempt, clock() - start)
    except (Exception, SystemExit) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if isinstance(error, Diverged):
            message = lines[0] if lines else "the training function raised Diverged"
        seconds = clock() - start
        return Raised(trial.id, trial.attempt, message, traceback.format_exc(), isinstance(error, Diverged), seconds)


def whole_step(step: object, who: str) -> int:
    """`step` as a plain number; ValueError when it is not a whole one of at least 0."""
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"{who} needs a whole step of at least 0, got {step!r}.")
    return int(step)


def numbers(metrics: object, who: str) -> dict[str, float]:
    """`metrics` as plain floats; ValueError saying `who` gave something that is not a dictionary of named numbers."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{who} must give a dictionary of named numbers, got {type(metrics).__name__}.")
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"{who} must name its metrics by strings, got {name!r}.")
        try:
            number = value.item() if hasattr(value, "item") else value  # arrays and tensors of one element
        except (ValueError, RuntimeError):
            number = None
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"{who} must give one number for metric {name!r}, got {value!r}.")
        try:
            plain[name] = float(number)
        except OverflowError:
            plain[name] = math.inf if number > 0 else -math.inf
    return plain


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    with (
        open(path, "a", buffering=1, encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        yield
