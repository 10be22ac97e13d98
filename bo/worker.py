"""The worker's side of a trial: what a training function sees, and how its end becomes one message."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bo import checkpoint
from bo.ports import Branched, Lost, Message, Raised, Reported, Returned, Stopped, Train, Underway
from bo.trial import Diverged, StopTrial, Trial
from search_spaces import Scale
from search_spaces.parameter import is_number

MOST = 1_000_000  # bytes of metrics at a time, as text: they are numbers to go by, and stay in the journal for good
ERROR, TRACEBACK = 2_000, 50_000  # characters of an error that are kept


class Keeper(Protocol):
    """Keeps a trial's checkpoints where other machines find them."""

    def fetch(self, folder: Path) -> None:
        """Bring the newest checkpoints into `folder`, unless it has them; raises OutOfReach."""

    def keep(self, path: Path) -> None:
        """Keep a checkpoint that was just written: a file of `trial.save`, a folder of `trial.checkpoint_dir`."""


class OutOfReach(Exception):
    """What a worker needs does not answer: no fault of the trial, which is retried. Says what, after "lost by"."""


class RunningTrial:
    """What a training function gets: the configuration to train, and the ways to report, save and resume.

    `config` and `scale` say what to train, `seed` makes it repeatable, `attempt` counts from 1 and grows when a worker
    was lost, `folder` is the trial's own.
    """

    def __init__(
        self, trial: Trial, folder: Path, send: Callable[[Underway], bool], keeper: Keeper | None = None
    ) -> None:
        self._trial = copy.deepcopy(trial)  # a run may change its config; in process the study must not see that
        self._send = send
        self._awaited = trial.awaited
        self._keeper = keeper
        self._turn, self._over = threading.Lock(), False  # a run may report from several threads
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
        if self._say(Reported(self.id, self.attempt, step, numbers(metrics, "trial.report"))):
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
        if self._say(Branched(self.id, self.attempt, scale, plain)):
            raise StopTrial(f"Trial {self.id} was asked to end at its branch {scale}.")
        self._awaited = tuple(other for other in self._awaited if other != scale)

    def _say(self, message: Underway) -> bool:
        """Hand a message over, one at a time; whether the run is to end, as one is that has ended already."""
        with self._turn:
            return self._over or self._send(message)

    def end(self) -> None:
        """Say nothing more: the training function is over, whatever its threads still do."""
        with self._turn:
            self._over = True

    def save(self, state: Any) -> None:
        """Store `state` as this trial's newest checkpoint, whole or not at all (see `bo.checkpoint.save`)."""
        path = checkpoint.save(self.folder, state, self.attempt)
        if self._keeper is not None:
            self._keeper.keep(path)

    def load(self) -> Any:
        """The newest checkpoint that `save` stored, or None when there is none."""
        return checkpoint.load(self.folder)

    @contextlib.contextmanager
    def checkpoint_dir(self) -> Iterator[Path]:
        """A folder for files of any format, at first a copy of the last one; a block that raises changes nothing."""
        fresh = checkpoint.begin_files(self.folder, self.attempt)
        yield fresh
        path = checkpoint.keep_files(self.folder, fresh, self.attempt)
        if self._keeper is not None:
            self._keeper.keep(path)


def execute(
    train: Train,
    trial: Trial,
    folder: Path,
    send: Callable[[Underway], bool],
    log: bool,
    clock: Callable[[], float] = time.perf_counter,
    keeper: Keeper | None = None,
) -> Message:
    """Run one trial and turn whatever happens into its final message; only KeyboardInterrupt passes.

    folder: the trial's own, made here. send: hands over what is said underway and says whether the run is to end.
    log: whether what the run prints goes to `folder/log.txt` instead of the terminal. clock: seconds, for the run time.
    keeper: where its checkpoints are kept beside the folder.
    """
    start = clock()
    try:
        checkpoint.private_folder(folder)
        with _logged(folder / "log.txt") if log else contextlib.nullcontext():
            if keeper is not None:
                keeper.fetch(folder)
            running = RunningTrial(trial, folder, send, keeper)
            try:
                result = train(running)
            finally:
                running.end()
        return Returned(trial.id, trial.attempt, numbers(result, "The training function"), clock() - start)
    except StopTrial:
        return Stopped(trial.id, trial.attempt, clock() - start)
    except OutOfReach as error:
        return Lost(trial.id, trial.attempt, str(error), innocent=True)
    except (Exception, SystemExit) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if isinstance(error, Diverged):
            message = lines[0] if lines else "the training function raised Diverged"
        seconds, text = clock() - start, traceback.format_exc()
        diverged = isinstance(error, Diverged)
        return Raised(trial.id, trial.attempt, message[:ERROR], text[-TRACEBACK:], diverged, seconds)


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
    if (size := sum(map(len, plain)) + 25 * len(plain)) > MOST:
        raise ValueError(
            f"{who} must give metrics of at most {MOST:,} bytes at a time, got {len(plain):,} of about {size:,}; "
            "report what the search goes by, and write the rest to a file in trial.folder."
        )
    return plain


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    with (
        open(path, "a", buffering=1, encoding="utf-8", opener=checkpoint.private) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        yield
