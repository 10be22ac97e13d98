"""Progress of a sweep: one line for each result, and on a terminal a last line that keeps moving."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from bo import Pareto, Study, Trial
from bo.run import Moment
from integrations.describe import config_line, number, objective_words, scale_words


class Progress:
    """A `watch` for `bo.run`; results stay on the screen or in the log, the last line shows what runs now.

    In a log file (a stream that is no terminal) there is no moving line, and starts are lines of their own.
    """

    def __init__(self, study: Study, stream: TextIO | None = None) -> None:
        self.study = study
        self.stream = stream or sys.stdout
        self.moving = self.stream.isatty()
        self.steps: dict[int, int] = {}

    def __call__(self, moment: Moment, trial: Trial) -> None:
        if moment == "reported":
            self.steps[trial.id] = trial.reports[-1].step
        elif moment == "branched":
            return
        elif moment == "started":
            self.steps[trial.id] = 0
            if not self.moving:
                self._line(self._words(trial, "starts"))
        elif moment == "retried":
            self._line(self._words(trial, f"lost its worker, goes on as attempt {trial.attempt}"))
        else:
            self.steps.pop(trial.id, None)
            result = objective_words(self.study, trial)
            if trial.error and trial.status == "failed":
                result += f": {trial.error}"
            self._line(self._words(trial, result, trial.id in self._leading()))
        if self.moving:
            self._last_line()

    def close(self) -> None:
        if self.moving:
            self._write("\r\x1b[K")

    def _leading(self) -> list[int]:
        """The best trial so far, or the front."""
        if isinstance(self.study.objective, Pareto):
            return [trial.id for trial in self.study.front()]
        best = self.study.best()
        return [] if best is None else [best.id]

    def _words(self, trial: Trial, result: str, leading: bool = False) -> str:
        scale = scale_words(trial.scale)
        mark = " *" if leading else "  "
        where = f"{scale:<26}" if scale else ""
        return (
            f"{time.strftime('%H:%M:%S')}  {trial.id:>4}  {trial.source:<13} {where}{result:>8}{mark} "
            f"{config_line(trial.config)}"
        )

    def _last_line(self) -> None:
        limits = self.study.limits
        spent = f"{self.study.spent:.2f}" + (f"/{number(limits.budget)}" if limits.budget else "") + " target runs"
        trials = f"{len(self.study.trials)}" + (f"/{limits.n_trials}" if limits.n_trials else "") + " trials"
        running = ", ".join(f"#{id} step {step}" for id, step in self.steps.items())
        leading = self._leading()
        if isinstance(self.study.objective, Pareto) and leading:
            found = f"front of {len(leading)}"
        else:
            limited = "no result within the limits yet" if self.study.objective.subject_to else "no target result yet"
            found = f"best {objective_words(self.study, self.study.trial(leading[0]))}" if leading else limited
        text = f"{trials}, {spent}, {found}; running {running or 'nothing'}"
        self._write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")

    def _line(self, text: str) -> None:
        self._write(f"\r\x1b[K{text}\n" if self.moving else f"{text}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
