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
from bo.ports import Branched, Message, Raised, Reported, Returned, Stopped, Train, Underway
from bo.trial import Diverged, StopTrial, Trial
from search_spaces import Scale
from search_spaces.parameter import is_number


class RunningTrial:
    """What a training function gets: the configuration to train, and the ways to report, save and resume.

    `config` and `scale` say what to train, `seed` makes it repeatable, `attempt` counts from 1 and grows when a worker
    was lost, `folder` is the trial's own.
    """

    def __init__(self, trial: Trial, folder: Path, send: Callable[[Underway], bool]) -> None:
        self._trial = copy.deepcopy(trial)  # a run may change its config; in process the study must not see that
        self._send = send
        self._awaited = trial.awaited
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

    @property
    def wanted(self) -> tuple[Scale, ...]:
        """The smaller scales at which `branch` is wanted and has not been called yet, also by earlier attempts."""
        return self._awaited

    def branch(self, metrics: Mapping[str, float], /, **axes: float) -> None:
        """Hand in what a run of this configuration at a smaller scale would have measured.

            trial.branch({"loss": 2.1}, tokens=1e6)

        axes: the values of scale axes that are smaller than this run's own; the others are as they are here. A run
        whose schedule has a stable phase gets it by a short decay from an earlier checkpoint (Haegele et al. 2024,
        arXiv 2405.18392). Given twice for one scale, the later one counts.

        Raises StopTrial when this run is to end early, ValueError for what is no smaller value of an axis and for
        metrics that are no numbers. What is not a scale of the space fails the trial.
        """
        scale = smaller(self.scale, axes, "trial.branch")
        plain = numbers(metrics, "trial.branch")
        if self._send(Branched(self.id, self.attempt, scale, plain)):
            raise StopTrial(f"Trial {self.id} was asked to end at its branch {scale}.")
        self._awaited = tuple(other for other in self._awaited if other != scale)

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
    send: Callable[[Underway], bool],
    log: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Message:
    """Run one trial and turn whatever happens into its final message; only KeyboardInterrupt passes.

    folder: the trial's own, made here. send: hands over what is said underway and says whether the run is to end.
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


def smaller(scale: Scale, axes: Mapping[str, float], who: str) -> Scale:
    """`scale` with these axes' values in place of its own; ValueError saying `who` where they are not smaller ones."""
    if not axes:
        raise ValueError(f"{who} needs a smaller value of a scale axis, as in tokens=1e6; the axes are {list(scale)}.")
    for axis, value in axes.items():
        if axis not in scale:
            raise ValueError(f"{who} has a value for {axis!r}, which is no scale axis; the axes are {list(scale)}.")
        if not is_number(value) or not 0 < value < scale[axis]:
            raise ValueError(f"{who} needs {axis} to be smaller than the run's own {scale[axis]:g}, got {value!r}.")
    return Scale({**scale, **axes})


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
