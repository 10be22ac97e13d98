"""One trial: a configuration, the scale it runs at, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from search_spaces import Scale

Status = Literal["running", "finished", "stopped", "diverged", "failed"]

#: Statuses with a result that a model may learn from. A "failed" run tells about the machine or the code; a "stopped"
#: one has no final metrics, only its reports.
TOLD: tuple[Status, ...] = ("finished", "diverged")


class StopTrial(Exception):
    """Raised by `trial.report` when this run was ended early; let it pass through the training function."""


class Diverged(Exception):
    """May be raised by a training function: this configuration does not train (loss not finite, or above its start)."""


@dataclass(frozen=True)
class Report:
    """Metrics of a run at one of its steps."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """A record of one trial; immutable, replaced as its study learns more.

    `cost` is in runs at the top scale. `source` says where the configuration came from: a policy's own word
    ("sobol", "ladder/proxy", "ladder/target", "bayes"), "enqueued", "added" or "prior". `predicted` is the objective
    that the model expected, {"mean", "low", "high"} in minimised user units with a 90% interval. `metrics` are those of
    the finished run; `reports` those on the way.
    """

    id: int
    config: Mapping[str, Any]
    scale: Scale
    seed: int
    source: str
    cost: float = 1.0
    status: Status = "running"
    attempt: int = 1
    metrics: Mapping[str, float] | None = None
    reports: tuple[Report, ...] = ()
    error: str | None = None
    traceback: str | None = None
    seconds: float | None = None
    predicted: Mapping[str, float] | None = None
    note: str | None = None

    @property
    def told(self) -> bool:
        """Whether it holds a result that a model may learn from."""
        return self.status in TOLD
