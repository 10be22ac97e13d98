"""Finished trials of Ray Tune, from an experiment's folder.

read_ray("~/ray_results/sweep")         # the files params.json and result.json of its trials
read_ray(tuner.fit())                   # the folder that these results are from
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bo import Run, Runs
from integrations import foreign_runs

if TYPE_CHECKING:
    from ray.tune import ResultGrid

#: How far a trial came; a scale axis of its own, so that those that were stopped early are not taken for whole ones.
PROGRESS = "training_iteration"
#: What Ray Tune itself puts beside the metrics.
OWN = frozenset(("config", "done", "experiment_tag", "hostname", "node_ip", "pid", "trial_id"))
OWN |= {"date", "timestamp", "time_since_restore", "time_this_iter_s", "time_total_s"}
OWN |= {"episodes_total", "iterations_since_restore", "timesteps_since_restore", "timesteps_total"}


def read_ray(
    source: str | os.PathLike[str] | ResultGrid, *, axes: Sequence[str] = (), names: Mapping[str, str] | None = None
) -> Runs:
    """The last results of trials that ended without an error.

    How many times a trial reported (`training_iteration`) is a scale axis: `Study.add_prior` then leaves out those that
    a scheduler stopped early, unless `names` says which axis of ours it is or drop=["training_iteration"] takes all.
    axes: further parameters or metrics that are scale axes. names: names there -> ours, by which axes are given then.
    What lies inside something has both names, `optimizer/lr`. Runs are known by the ids of their trials.

    ValueError when there is no such folder, or no trial in it has a result.
    """
    where = source if isinstance(source, str | os.PathLike) else source.experiment_path
    folder = foreign_runs.existing(Path(where).expanduser(), "an experiment's folder").resolve()
    rows: list[Run] = []
    left_out: list[tuple[int | str, str]] = []
    for id, config, last, why in _trials(folder):
        if why:
            left_out.append((id, why))
            continue
        metrics = {name: value for name, value in last.items() if name not in OWN | {PROGRESS}}
        place = {PROGRESS: last[PROGRESS]} if PROGRESS in last else {}
        rows.append(foreign_runs.row(id, config, metrics, axes, names, place))
    foreign_runs.refuse_none(rows, left_out, folder)
    return Runs(f"Ray {folder.name}", tuple(rows), tuple(left_out))


def _trials(folder: Path) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any], str]]:
    """Of each trial its id, its config, its last result, and why it has none."""
    for file in sorted(folder.glob("*/params.json")):
        id = file.parent.name
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            results = file.with_name("result.json")
            lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
            last = json.loads(next((line for line in reversed(lines) if line.strip()), "{}"))
            if not isinstance(config, dict) or not isinstance(last, dict):
                raise ValueError("a dictionary was expected")
        except ValueError as error:
            yield id, {}, {}, f"Its files cannot be read: {error}."
            continue
        failed = file.with_name("error.txt").exists()
        why = "It ended with an error." if failed else "" if last else "It has no result."
        yield str(last.get("trial_id", id)), config, last, why
