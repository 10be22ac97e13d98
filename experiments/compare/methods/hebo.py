"""HEBO; its random start (`rand_sample`) is replaced by the points it is told."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from hebo.design_space.design_space import DesignSpace
from hebo.optimizers.hebo import HEBO

from experiments.compare.protocol import Axis, Best, Config, Task, flat, flatten, serve, unflatten


class Hebo:
    def __init__(self, task: Task) -> None:
        np.random.seed(task.seed)
        torch.manual_seed(task.seed)
        self.axes, self.best = task.axes, Best()
        space = DesignSpace().parse([parameter(axis) for axis in flat(task.axes)])
        self.search = HEBO(space, rand_sample=task.design, scramble_seed=task.seed)

    def tell(self, config: Config, value: float) -> None:
        self.best.tell(config, value)
        self.search.observe(pd.DataFrame([flatten(self.axes, config)]), np.array([[value]]))

    def suggest(self) -> Config:
        row = self.search.suggest(n_suggestions=1).iloc[0].to_dict()
        return unflatten(self.axes, {axis.name: plain(axis, row[axis.name]) for axis in flat(self.axes)})

    def recommend(self) -> Config:
        return self.best.config


def plain(axis: Axis, value: Any) -> Any:
    if axis.kind == "choice":
        return str(value)
    return int(value) if axis.kind == "integer" else min(max(float(value), axis.low), axis.high)


def parameter(axis: Axis) -> dict[str, Any]:
    if axis.kind == "choice":
        return {"name": axis.name, "type": "cat", "categories": list(axis.names)}
    kind = {"real": {False: "num", True: "pow"}, "integer": {False: "int", True: "pow_int"}}[axis.kind][axis.log]
    return {"name": axis.name, "type": kind, "lb": axis.low, "ub": axis.high, **({"base": 10} if axis.log else {})}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    serve(Hebo)
