"""Finished trials of Optuna, from a study or from the file it is stored in.

read_optuna(study)
read_optuna("optuna.db", study="sweep")         # SQLite, or the journal of a JournalFileBackend
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from optuna import Study, get_all_study_names, load_study
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from bo import Run, Runs
from integrations import foreign_runs

SQLITE = b"SQLite format 3\0"


def read_optuna(
    source: Study | str | os.PathLike[str],
    *,
    study: str | None = None,
    axes: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> Runs:
    """The complete trials, with the values that were returned and the user attributes that are numbers as metrics.

    source: a study, or the path of its file ("sqlite:///" may stand before it), which is not changed; of other storages
    hand in the study that optuna.load_study gives. study: its name, where there are several. The metrics are called as
    the study calls them, else "value", and "value_0", "value_1" of several objectives. axes: parameters, attributes or
    metrics that are scale axes. names: names there -> ours, by which axes are given then, for example
    names={"value": "loss"}. Runs are known by the numbers of their trials.

    ValueError when the file holds no study, or several and `study` names none, or no trial is complete.
    """
    theirs = source if isinstance(source, Study) else opened(str(source), study)
    called = theirs.metric_names
    if called is None:
        count = len(theirs.directions)
        called = ["value"] if count == 1 else [f"value_{i}" for i in range(count)]
    rows: list[Run] = []
    left_out: list[tuple[int | str, str]] = []
    for trial in theirs.get_trials(deepcopy=False):
        if trial.state != TrialState.COMPLETE:
            left_out.append((trial.number, f"It is {trial.state.name.lower()}."))
            continue
        metrics = {**trial.user_attrs, **dict(zip(called, trial.values, strict=True))}
        rows.append(foreign_runs.row(trial.number, trial.params, metrics, axes, names))
    foreign_runs.refuse_none(rows, left_out, theirs.study_name)
    return Runs(f"Optuna {theirs.study_name}", tuple(rows), tuple(left_out))


def opened(source: str, study: str | None = None) -> Study:
    """The study of that name, or the only one, in the file at a path; ValueError as `read_optuna` has it."""
    path = Path(source.removeprefix("sqlite:///"))
    if "://" in source.removeprefix("sqlite:///"):
        raise ValueError(f"{source.partition('://')[0]} storages are not opened; hand in optuna.load_study(...).")
    foreign_runs.existing(path, "an SQLite or journal file of Optuna")
    with path.open("rb") as file:
        relational = file.read(len(SQLITE)) == SQLITE
    try:
        storage: BaseStorage
        if relational:
            storage = RDBStorage(f"sqlite:///file:{quote(str(path.resolve()))}?mode=ro&uri=true")
        else:
            storage = JournalStorage(JournalFileBackend(str(path)))
        known = get_all_study_names(storage)
    except Exception as error:  # what a file that is none makes of a storage differs with what is in it
        raise ValueError(f"{path} is no SQLite or journal file of Optuna that this version reads: {error}") from error
    if study is None and len(known) != 1:
        raise ValueError(f"{path} holds {len(known)} studies, {known}; name one by study=.")
    if study is not None and study not in known:
        raise ValueError(f"{path} has no study {study!r}; it has {known}.")
    return load_study(study_name=study or known[0], storage=storage)
