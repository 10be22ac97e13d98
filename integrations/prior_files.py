"""A finished study in whatever file or folder it lies: what `windtunnel run --prior PATH` takes."""

from __future__ import annotations

import os
from pathlib import Path

from bo import Maximize, Minimize, Objective, Runs, Study, WeightedSum, journal
from integrations import foreign_runs
from search_spaces import Space


def read(path: str | os.PathLike[str], space: Space, objective: Objective) -> Study | Runs:
    """By what it is: a study of ours, a folder of Ray Tune, a CSV file, the JSON of Ax, else a file of Optuna.

    Scale axes are those of the space, by their names; a CSV file needs a column for each metric of the objective. What
    a study of Optuna has no name for is the one metric of the objective, if both minimise it or both maximise it.
    ValueError where nothing is there or it cannot be read.
    """
    where = foreign_runs.existing(Path(path), "a finished study")
    axes = [] if space.fidelity is None else [axis.name for axis in space.fidelity.axes]
    if where.is_dir() and journal.exists(where):
        return Study.open(where)
    if where.is_dir():
        from integrations.ray_runs import read_ray

        return read_ray(where, axes=axes)
    if where.suffix.lower() == ".csv":
        from integrations.csv_runs import read_csv

        return read_csv(where, metrics=objective.metrics, axes=axes)
    if where.suffix == ".json":
        from integrations.ax_runs import read_ax

        return read_ax(where, axes=axes)
    from integrations.optuna_runs import opened, read_optuna

    found = opened(str(where))
    if len(objective.metrics) != 1 or found.metric_names is not None or len(found.directions) != 1:
        return read_optuna(found, axes=axes)
    (metric,) = objective.metrics  # which Optuna calls "value" unasked
    weight = objective.weights[metric] if isinstance(objective, Minimize | Maximize | WeightedSum) else 0.0
    if weight and (weight < 0) != (found.direction.name == "MAXIMIZE"):
        raise ValueError(
            f"{where} {found.direction.name.lower()}s what it calls no name, so it is not {objective!r}; read it by "
            f"read_optuna, with names= that say which metric it is, and give the runs to Study.add_prior."
        )
    return read_optuna(found, axes=axes, names={"value": metric})
