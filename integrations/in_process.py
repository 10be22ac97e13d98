"""Trials one after another in the driver's own process: for small jobs, tests and debugging."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bo.ports import Deliver, Train, Underway
from bo.study import trial_folder
from bo.trial import Trial
from bo.worker import execute

if TYPE_CHECKING:
    from integrations.store import Store


class InProcess:
    """An executor with one slot: `wait` runs the submitted trial in the calling thread, where a debugger sees it.

    What the run prints stays on the terminal. clock: seconds, for the run times. store: keeps trials' checkpoints.
    """

    apart = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter, store: Store | None = None) -> None:
        self._clock, self._store = clock, store
        self._trial: Trial | None = None
        self._stopping = False

    def open(self, train: Train, folder: Path) -> None:
        self._train, self._folder = train, folder

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()

    def capacity(self) -> int:
        return 0 if self._trial else 1

    def submit(self, trial: Trial) -> None:
        if self._trial is not None:
            raise RuntimeError(
                f"InProcess runs one trial at a time and has trial {self._trial.id}; look at capacity()."
            )
        self._trial, self._stopping = trial, False

    def wait(self, deliver: Deliver, timeout: float) -> None:
        """Runs the submitted trial to its end, however long that takes."""
        if self._trial is None:
            time.sleep(timeout)
            return
        trial, broken = self._trial, None

        def send(message: Underway) -> bool:
            nonlocal broken
            if broken is None:
                try:
                    deliver([message])
                except Exception as error:  # the driver's own (a full disk): not the training function's to handle
                    broken = error
            return self._stopping or broken is not None

        try:
            folder = trial_folder(self._folder, trial.id)
            keeper = None
            if self._store is not None:
                from integrations.trial_store import TrialStore  # fsspec, which a run without a store spares

                keeper = TrialStore(self._store, trial)
            last = execute(self._train, trial, folder, send, log=False, clock=self._clock, keeper=keeper)
        finally:
            self._trial = None
        if broken is not None:
            raise broken
        deliver([last])

    def stop(self, trial: int) -> None:
        if self._trial is not None and self._trial.id == trial:
            self._stopping = True

    def close(self, leave: bool = False) -> None:
        self._trial = None
