"""A study's stopping rule as the scheduler of Ray Tune.

study = Study.create("studies/lm", space, objective=Minimize("loss"), stopping={"name": "halving", "first": 30})
search = StudySearch(study)
tune.TuneConfig(search_alg=search, scheduler=StudyScheduler(search), num_samples=64)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from integrations.tune_search import StudySearch
from integrations.tune_trials import check_direction

#: Ends that stay as they are; a failed trial may be run again.
OVER = ("finished", "diverged", "stopped")


class StudyScheduler(FIFOScheduler):
    """Runs trials in their order and ends those that the study's rule ends, by the reports that the study holds.

    search: the searcher of the same run. What the rule calls a step is Tune's training_iteration. Trials of which the
    study holds the end are not run again, as Tune would after a restore, whose snapshot is older; that is all that it
    does with a study without a rule.
    """

    def __init__(self, search: StudySearch) -> None:
        if not isinstance(search, StudySearch):
            raise ValueError(f"StudyScheduler needs the StudySearch that proposes the trials, got {search!r}.")
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = search.shared
        self._stopped = 0

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        check_direction(self.shared.study.objective, metric, mode)
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Tune asks here before it tells the searcher, so the report is recorded here; it is there only once."""
        now = self.shared.report(trial.trial_id, result)
        end = now is not None and (now.status in OVER or self.shared.study.should_stop(now.id))
        self._stopped += end
        decision: str = TrialScheduler.STOP if end else TrialScheduler.CONTINUE
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        names, study = self.shared.names, self.shared.study
        for trial in tune_controller.get_trials():
            id = names.get(trial.trial_id)
            if trial.status == trial.PENDING and id is not None and study.trial(id).status in OVER:
                tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return f"{self.shared.study.stopping} of {self.shared.folder}: {self._stopped} trials stopped"
