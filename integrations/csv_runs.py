"""Finished runs in a CSV file, a line each.

read_csv("sweep.csv", metrics=["loss"], axes=["params", "tokens"])
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bo import Run, Runs
from integrations import foreign_runs


def read_csv(
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[str],
    axes: Sequence[str] = (),
    config: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    delimiter: str = ",",
) -> Runs:
    """The runs of a file whose first line names its columns.

    metrics: columns with results; a NaN or infinite one is of a run that diverged. axes: which columns are scale axes,
    as far as they are there. config: columns that are parameters; by default all others. names: names of columns ->
    ours, by which metrics, axes and config are given then. An empty cell is no value. Parts of a value have columns of
    their own, `data/code` and `data/docs` of a mixture `data`. Runs are known by their line.

    ValueError when there is no such file, a column of metrics or config is not there, or no line holds a run.
    """
    file = foreign_runs.existing(Path(path), "a CSV file")
    rows: list[Run] = []
    left_out: list[tuple[int | str, str]] = []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        head = [(names or {}).get(name, name) for name in next(reader, [])]
        if twice := sorted({name for name in head if head.count(name) > 1}):
            raise ValueError(f"{file} has two columns {twice[0]!r}; rename one by names=.")
        for name in (*metrics, *(config or ())):
            if name not in head:
                raise ValueError(f"{file} has no column {name!r}; it has {head}.")
        kept = [name for name in head if name not in (*metrics, *axes)] if config is None else list(config)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(head):
                left_out.append((reader.line_num, f"It has {len(cells)} cells where the first line has {len(head)}."))
                continue
            line = {name: cell.strip() for name, cell in zip(head, cells, strict=True) if cell.strip()}
            results = {name: foreign_runs.number(line[name]) for name in metrics if name in line}
            if texts := [value for value in results.values() if isinstance(value, str)]:
                left_out.append((reader.line_num, f"Its metrics need to be numbers, got {texts[0]!r}."))
                continue
            told = {name: line[name] for name in (*kept, *axes) if name in line}
            rows.append(foreign_runs.row(reader.line_num, told, results, axes))
    foreign_runs.refuse_none(rows, left_out, file)
    return Runs(f"CSV {file.name}", tuple(rows), tuple(left_out))
