"""Finished trials of Ax, from the JSON that its clients and experiments are saved to; Ax itself is not needed.

read_ax("ax_client.json")       # what client.save_to_json_file() or save_experiment() wrote
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bo import Run, Runs
from integrations import foreign_runs


def read_ax(path: str | os.PathLike[str], *, axes: Sequence[str] = (), names: Mapping[str, str] | None = None) -> Runs:
    """The arms of completed trials, with the mean of each metric, of a curve the last one.

    axes: parameters or metrics that are scale axes. names: names in Ax -> ours, by which axes are given then. Runs are
    known by the names of their arms.

    ValueError when the file is no JSON of Ax, or no trial is completed.
    """
    file = foreign_runs.existing(Path(path), "a JSON file of Ax")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        experiment = saved.get("experiment", saved)
        if experiment.get("__type") != "Experiment":
            raise ValueError("it holds no experiment")
        rows, left_out = _rows(experiment, axes, names)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:  # not of the form that Ax writes
        raise ValueError(f"{file} is no client or experiment that Ax saved as JSON: {error!r}.") from error
    foreign_runs.refuse_none(rows, left_out, file)
    return Runs(f"Ax {experiment.get('name') or file.name}", tuple(rows), tuple(left_out))


def _rows(
    experiment: Mapping[str, Any], axes: Sequence[str], names: Mapping[str, str] | None
) -> tuple[list[Run], list[tuple[int | str, str]]]:
    rows: list[Run] = []
    left_out: list[tuple[int | str, str]] = []
    for index, trial in experiment["trials"].items():
        status, means = trial["status"]["name"], _means(experiment["data_by_trial"].get(index))
        for arm in _arms(trial):
            if status == "COMPLETED" and arm["name"] in means:
                rows.append(foreign_runs.row(arm["name"], arm["parameters"], means[arm["name"]], axes, names))
            else:
                why = "has no data" if status == "COMPLETED" else f"is {status.lower().replace('_', ' ')}"
                left_out.append((arm["name"], f"Its trial {why}."))
    return rows, left_out


def _arms(trial: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of a trial with one arm or of a batch."""
    runs = [trial["generator_run"]] if "generator_run" in trial else []
    runs += [struct["generator_run"] for struct in trial.get("generator_run_structs", ())]
    for run in runs:
        yield from (run or {}).get("arms", ())


def _means(data: Any) -> dict[str, dict[str, float]]:
    """Arm -> metric -> mean; data that came later counts, and of it the last step."""
    found: dict[str, dict[str, float]] = {}
    tables = [table for _, table in sorted(data["value"], key=lambda item: item[0])] if data else []
    for table in tables:
        columns = json.loads(table["df"]["value"])
        steps = columns.get("step") or {}
        order = sorted(columns["mean"], key=lambda row: -1.0 if steps.get(row) is None else float(steps[row]))
        for row in order:
            mean = columns["mean"][row]
            if mean is not None:
                found.setdefault(columns["arm_name"][row], {})[columns["metric_name"][row]] = float(mean)
    return found
