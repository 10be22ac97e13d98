"""Runs that were not made for a study: plain rows, as another study or an import from another system hands them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search_spaces import Space


@dataclass(frozen=True)
class Run:
    """One finished run. Values are as they were found: they are looked at when a study takes them.

    id: its number or name where it was made. scale: axis -> value. diverged: it has no result, since its configuration
    does not train; a metric that is NaN or infinite says the same. origin: what tells it apart from every other run;
    without one, all of the row does. study, note: where it was first made and what is to be said of it, for runs that
    were a prior there too.
    """

    id: int | str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    scale: Mapping[str, Any] = field(default_factory=dict)
    diverged: bool = False
    origin: str | None = None
    study: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Runs:
    """Finished runs that belong together: made by one training function, measured alike.

    name: what their study is called from now on (`Trial.study`). rows: the runs. left_out: those that could not be
    read or have no result, by their ids, with the reasons. space: what they were drawn from, where it is known.
    """

    name: str
    rows: tuple[Run, ...]
    left_out: tuple[tuple[int | str, str], ...] = ()
    space: Space | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Runs need a text as their name, got {self.name!r}.")
