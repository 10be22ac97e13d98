"""Nevergrad's NGOpt, with the budget it chooses its algorithm by; points that it is told are its `suggest`-ed ones."""

from __future__ import annotations

import warnings
from typing import Any

import nevergrad as ng
import numpy as np

from experiments.compare.protocol import Axis, Config, Task, flat, flatten, serve, unflatten


class NGOpt:
    def __init__(self, task: Task) -> None:
        self.axes = task.axes
        space = ng.p.Dict(**{axis.name: parameter(axis) for axis in flat(task.axes)})
        space.random_state = np.random.RandomState(task.seed)
        if task.noisy:
            space.function.deterministic = False
        self.search = ng.optimizers.NGOpt(space, budget=task.budget, num_workers=1)
        self.running: Any = None

    def tell(self, config: Config, value: float) -> None:
        if self.running is None:
            self.search.suggest(flatten(self.axes, config))
            self.running = self.search.ask()
        self.search.tell(self.running, value)
        self.running = None

    def suggest(self) -> Config:
        self.running = self.search.ask()
        return unflatten(self.axes, dict(self.running.value))

    def recommend(self) -> Config:
        return unflatten(self.axes, dict(self.search.provide_recommendation().value))


def parameter(axis: Axis) -> Any:
    if axis.kind == "choice":
        return ng.p.Choice(list(axis.names))
    kind = ng.p.Log if axis.log else ng.p.Scalar
    scalar = kind(lower=axis.low, upper=axis.high)
    return scalar.set_integer_casting() if axis.kind == "integer" else scalar


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    serve(NGOpt)
