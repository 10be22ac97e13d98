"""Ax's Client with its default method ("fast"); its initialisation is replaced by the trials that are attached.

Its Client takes no equality, so a mixture of K sources is K - 1 shares whose sum is at most one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

from experiments.compare.protocol import Axis, Config, Task, serve


class Ax:
    def __init__(self, task: Task) -> None:
        self.axes = task.axes
        self.client = Client(random_seed=task.seed)
        sums = [
            " + ".join(f"{axis.name}_{source}" for source in axis.names[:-1]) + " <= 1"
            for axis in task.axes
            if axis.kind == "mixture"
        ]
        self.client.configure_experiment(
            parameters=[each for axis in task.axes for each in parameters(axis)], parameter_constraints=sums
        )
        self.client.configure_optimization(objective="-loss")
        self.client.configure_generation_strategy(
            initialization_budget=task.design, initialization_random_seed=task.seed, initialize_with_center=False
        )
        self.running: int | None = None

    def tell(self, config: Config, value: float) -> None:
        if self.running is None:
            self.running = self.client.attach_trial(parameters=self.flattened(config))
        self.client.complete_trial(trial_index=self.running, raw_data={"loss": value})
        self.running = None

    def suggest(self) -> Config:
        ((self.running, values),) = self.client.get_next_trials(max_trials=1).items()
        return self.config(values)

    def recommend(self) -> Config:
        return self.config(self.client.get_best_parameterization(use_model_predictions=True)[0])

    def flattened(self, config: Config) -> Config:
        values: Config = {}
        for axis in self.axes:
            if axis.kind == "mixture":
                values |= {f"{axis.name}_{source}": config[axis.name][source] for source in axis.names[:-1]}
            else:
                values[axis.name] = config[axis.name]
        return values

    def config(self, values: Any) -> Config:
        config: Config = {}
        for axis in self.axes:
            if axis.kind == "mixture":
                shares = [max(float(values[f"{axis.name}_{source}"]), 0.0) for source in axis.names[:-1]]
                shares.append(max(1 - sum(shares), 0.0))
                config[axis.name] = {n: s / sum(shares) for n, s in zip(axis.names, shares, strict=True)}
            else:
                config[axis.name] = values[axis.name]
        return config


def parameters(axis: Axis) -> Iterator[Any]:
    if axis.kind == "mixture":
        for source in axis.names[:-1]:
            yield RangeParameterConfig(name=f"{axis.name}_{source}", bounds=(0.0, 1.0), parameter_type="float")
    elif axis.kind == "choice":
        yield ChoiceParameterConfig(name=axis.name, values=list(axis.names), parameter_type="str", is_ordered=False)
    elif axis.kind == "integer":
        bounds = (int(axis.low), int(axis.high))
        yield RangeParameterConfig(name=axis.name, bounds=bounds, parameter_type="int", scaling=scaling(axis))
    else:
        bounds = (axis.low, axis.high)
        yield RangeParameterConfig(name=axis.name, bounds=bounds, parameter_type="float", scaling=scaling(axis))


def scaling(axis: Axis) -> Any:
    return "log" if axis.log else "linear"


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    serve(Ax)
