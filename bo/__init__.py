"""How to search: the study, its objective, and the loop that runs it. Importing this loads neither torch nor ray."""

from bo.elsewhere import Run, Runs
from bo.journal import JournalError, StudyInUse
from bo.objective import AtLeast, AtMost, Function, Largest, Maximize, Minimize, Objective, Pareto, WeightedSum
from bo.ports import History, Limits, Proposal, Recommendation
from bo.run import TrainingBroken, run
from bo.study import Prior, Study
from bo.trial import Diverged, Report, StopTrial, Trial
from bo.worker import RunningTrial

__all__ = [
    "AtLeast",
    "AtMost",
    "Diverged",
    "Function",
    "History",
    "JournalError",
    "Largest",
    "Limits",
    "Maximize",
    "Minimize",
    "Objective",
    "Pareto",
    "Prior",
    "Proposal",
    "Recommendation",
    "Report",
    "Run",
    "RunningTrial",
    "Runs",
    "StopTrial",
    "Study",
    "StudyInUse",
    "TrainingBroken",
    "Trial",
    "WeightedSum",
    "run",
]
