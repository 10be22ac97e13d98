"""A finished study in whatever file or folder it lies: what `windtunnel run --prior PATH` takes."""

from __future__ import annotations

import os
from pathlib import Path

from bo import Objective, Runs, Study, journal
from integrations import foreign_runs
from search_spaces import Space


def read(path: str | os.PathLike[str], space: Space, objective: Objective) -> Study | Runs:
    """By what it is: a study of ours, a folder of Ray Tune, a CSV file, the JSON of Ax, else a file of Optuna.

    Scale axes are those of the space, by their names; a CSV file needs a column for each metric of the objective.
    ValueError where nothing is there or it cannot be read.
    """
    where = foreign_runs.existing(Path(path), "a finished study")
    axes = [] if space.fidelity is None else [axis.name for axis in space.fidelity.axes]
    if where.is_dir() and journal.exists(where):
        return Study.open(where)
    if where.is_dir():
        from integrations.ray_runs import read_ray

        return read_ray(where, axes=axes)
    if where.suffix == ".csv":
        from integrations.csv_runs import read_csv

        return read_csv(where, metrics=objective.metrics, axes=axes)
    if where.suffix == ".json":
        from integrations.ax_runs import read_ax

        return read_ax(where, axes=axes)
    from integrations.optuna_runs import read_optuna

    names = {"value": objective.metrics[0]} if len(objective.metrics) == 1 else None  # what Optuna calls it unasked
    return read_optuna(where, axes=axes, names=names)
