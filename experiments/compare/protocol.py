"""How the harness and a method talk: JSON lines over a process's standard input and output. Standard library only.

    {"do": "space", "axes": [...], "seed": 3, "budget": 40, "design": 6, "noisy": false}   -> {}
    {"do": "tell", "config": {...}, "value": 0.31}                                         -> {}
    {"do": "suggest"}                                                                      -> {"config": {...}}
    {"do": "recommend"}                                                                    -> {"config": {...}}

Values are minimised. The first `design` points are told before anything is asked. Every answer has the seconds
that it took, {"cpu": ..., "wall": ...}, and says what went wrong, {"error": ...}. This file runs in the environments of
the rivals, so it imports nothing of the project.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

Config: TypeAlias = dict[str, Any]

#: Least value of a coordinate that stands for a share, see `shares`.
LEAST = 1e-4


@dataclass(frozen=True)
class Axis:
    """One parameter. kind: "real" and "integer" have low, high and log; "choice" and "mixture" (shares) have names."""

    name: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a method is told of a search before it starts.

    budget: evaluations, the first `design` of which are told to it. noisy: whether equal configs have unequal values.
    """

    axes: tuple[Axis, ...]
    seed: int
    budget: int
    design: int
    noisy: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> Task:
        axes = tuple(Axis(**{**axis, "names": tuple(axis["names"])}) for axis in line["axes"])
        return Task(axes, line["seed"], line["budget"], line["design"], line["noisy"])


class Method(Protocol):
    """What a rival's file makes of a Task."""

    def tell(self, config: Config, value: float) -> None: ...

    def suggest(self) -> Config: ...

    def recommend(self) -> Config: ...


class Best:
    """The best observed: what stands for a recommendation where a library has no word of its own for it."""

    def __init__(self) -> None:
        self.config: Config = {}
        self.value = math.inf

    def tell(self, config: Config, value: float) -> None:
        if value < self.value or not self.config:
            self.config, self.value = config, value


# ------------------------------------------------------------------------------- shares, for methods that have none


def flat(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes with each mixture of K sources replaced by K real coordinates in [LEAST, 1]."""
    return tuple(
        each
        for axis in axes
        for each in (
            [Axis(f"{axis.name}.{source}", "real", LEAST, 1.0) for source in axis.names]
            if axis.kind == "mixture"
            else [axis]
        )
    )


def flatten(axes: Sequence[Axis], config: Config) -> Config:
    """A config in the coordinates of `flat`: of all that stand for the same shares, the one with exponents w K."""
    values: Config = {}
    for axis in axes:
        if axis.kind == "mixture":
            for source in axis.names:
                exponent = len(axis.names) * config[axis.name][source]
                values[f"{axis.name}.{source}"] = max(math.exp(-exponent), LEAST)
        else:
            values[axis.name] = config[axis.name]
    return values


def unflatten(axes: Sequence[Axis], values: Config) -> Config:
    return {
        axis.name: dict(zip(axis.names, shares([values[f"{axis.name}.{s}"] for s in axis.names]), strict=True))
        if axis.kind == "mixture"
        else values[axis.name]
        for axis in axes
    }


def shares(places: Sequence[float]) -> list[float]:
    """-log(u) over their sum: even over the simplex where u is even over the cube (Optuna's FAQ recommends it)."""
    exponents = [-math.log(u) for u in places]
    total = math.fsum(exponents)
    return [e / total for e in exponents] if total > 0 else [1 / len(places)] * len(places)


# ------------------------------------------------------------------------------------------------ a method's process


def serve(make: Callable[[Task], Method]) -> None:
    """Answer the lines of standard input until it ends. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    method: Method | None = None
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        answer: dict[str, Any] = {}
        try:
            asked = json.loads(line)
            if asked["do"] == "space":
                method = make(Task.from_json(asked))
            elif method is None:
                raise RuntimeError(f"{asked['do']} came before the space.")
            elif asked["do"] == "tell":
                method.tell(asked["config"], asked["value"])
            elif asked["do"] in ("suggest", "recommend"):
                answer["config"] = getattr(method, asked["do"])()
            else:
                raise RuntimeError(f"There is no {asked['do']!r}.")
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        answer |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(answer), file=answers, flush=True)
