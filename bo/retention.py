"""Which checkpoints stay: a sweep of ten thousand runs would fill any disk with those of runs that are over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Final

from bo import checkpoint
from bo.objective import Pareto, undominated
from bo.ports import ELSEWHERE
from bo.study import Study, trial_folder
from bo.trial import Trial

Forget = Callable[[Collection[int]], None]
#: Of the trials that have ended, those whose newest checkpoints stay; a trial that may go on always keeps its own.
RULES: Final[dict[str, str]] = {
    "all": "every trial's",
    "target": "those of trials that finished at the top scale",
    "best": "those of the best trial that ran here, or of the front of several objectives",
    "none": "none",
}
log = logging.getLogger("windtunnel")


class Leading:
    """The best of the ended trials that it was shown, or their front: what each costs does not grow with their number.

    By the study's objective, among those that `Study.best` or `Study.front` counts.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.trials: list[Trial] = []

    def take(self, trial: Trial) -> bool:
        """Whether `trial` is now the best, or one of the front."""
        if not self.study.contends(trial):
            return False
        objective, rivals = self.study.objective, [*self.trials, trial]
        if isinstance(objective, Pareto):
            kept = undominated([objective.values(rival.metrics or {}) for rival in rivals])
            self.trials = [rivals[i] for i in kept]
        else:
            self.trials = [min(rivals, key=lambda rival: (objective.value(rival.metrics or {}), rival.id))]
        return trial in self.trials


class Retention:
    """Removes checkpoints by a rule as a study's trials end.

    rule: a name of `RULES`. forget: called with the trials whose checkpoints are to go from a store as well. Logs stay.
    What cannot be removed is warned about and is no reason to end a sweep.
    """

    def __init__(self, study: Study, rule: str = "target", forget: Forget | None = None) -> None:
        if rule not in RULES:
            known = ", ".join(f"{name!r} ({what})" for name, what in RULES.items())
            raise ValueError(f"keep says whose checkpoints stay when a trial has ended: one of {known}; got {rule!r}.")
        self.study, self.rule, self.forget = study, rule, forget
        self._leading = Leading(study)

    def throughout(self) -> tuple[int, ...]:
        """Remove what the rule does not spare in the whole study, as on a resume; returns the trials it was."""
        own = [trial for trial in self.study.ended if trial.source not in ELSEWHERE]
        spared = self._spared(own)
        return self._remove(trial.id for trial in own if trial.id not in spared)

    def ended(self, trial: Trial) -> tuple[int, ...]:
        """Remove what the rule does not spare now that `trial` has ended; returns the trials it was."""
        had = {trial.id, *(best.id for best in self._leading.trials)}
        return self._remove(sorted(had - self._spared([trial])))

    def _spared(self, trials: Iterable[Trial]) -> set[int]:
        match self.rule:
            case "all":
                return {trial.id for trial in trials}
            case "target":
                return {trial.id for trial in trials if trial.status == "finished" and trial.scale == self.study.top}
            case "best":
                for trial in trials:
                    self._leading.take(trial)
                return {trial.id for trial in self._leading.trials}
        return set()

    def _remove(self, ids: Iterable[int]) -> tuple[int, ...]:
        unwanted = tuple(ids)
        for id in unwanted:
            folder = trial_folder(self.study.folder, id)
            try:
                if folder.is_dir():
                    checkpoint.remove(folder)
            except OSError as error:
                log.warning("Checkpoints of trial %d cannot be removed (%s); remove them by hand.", id, error)
        if unwanted and self.forget is not None:
            self.forget(unwanted)
        return unwanted
