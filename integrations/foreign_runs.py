"""What the imports of finished runs share: values under our names, metrics that are numbers, scale axes apart.

Nothing of the system that made the runs is executed and nothing is unpickled: texts and numbers are read. What of a
configuration fits a space, and which runs do, is seen when a study takes them: `Study.add_prior`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bo import Run
from search_spaces.parameter import is_number, plain


def row(
    id: int | str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    axes: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    scale: Mapping[str, Any] | None = None,
) -> Run:
    """One run. Values inside values are flat, `optimizer/lr` say, and metrics that are no numbers are left away.

    names: theirs -> ours, of parameters, metrics and axes. axes: which of ours, found among the parameters or else the
    metrics, are scale axes. scale: values on axes that are known to be some.
    """
    told, numbers, place = (
        {(names or {}).get(name, name): plain(value) for name, value in flat(given)}
        for given in (config, metrics, scale or {})
    )
    for axis in axes:
        found = told.pop(axis, None)
        other = numbers.pop(axis, None)
        if (value := other if found is None else found) is not None:
            place[axis] = number(value)
    return Run(id, told, {name: value for name, value in numbers.items() if is_number(value)}, place)


def flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Names and values, those inside a dictionary under its name and theirs."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{name}/{inner}", part) for inner, part in flat(value))
        else:
            yield str(name), value


def number(value: Any) -> Any:
    """The number that a text says; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def existing(path: Path, what: str) -> Path:
    """The path; ValueError where nothing is there."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the path of {what}.")
    return path


def refuse_none(rows: Sequence[object], left_out: Sequence[tuple[int | str, str]], where: object) -> None:
    """ValueError where no run could be read."""
    if not rows:
        why = f"; the first of {len(left_out)}, {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{where} holds no finished run{why}")
