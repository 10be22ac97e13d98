"""SMAC3's HyperparameterOptimizationFacade: random forest and EI; its initial design are the points it is told.

With noise its intensifier may repeat a configuration under another seed, as it does for its own users.
"""

from __future__ import annotations

import logging
import warnings
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ConfigSpace import Categorical, Configuration, ConfigurationSpace, Float, Integer
from smac import HyperparameterOptimizationFacade, Scenario
from smac.runhistory.dataclasses import TrialValue

from experiments.compare.protocol import Axis, Best, Config, Task, flat, flatten, serve, unflatten


class Smac:
    def __init__(self, task: Task) -> None:
        self.axes, self.task, self.best = task.axes, task, Best()
        self.space = ConfigurationSpace(seed=task.seed)
        self.space.add(*(parameter(axis) for axis in flat(task.axes)))
        self.folder = TemporaryDirectory(prefix="smac-compare-")
        self.first: list[tuple[Configuration, float]] = []
        self.running: Any = None

    def tell(self, config: Config, value: float) -> None:
        self.best.tell(config, value)
        if self.running is None:
            self.first.append((Configuration(self.space, values=flatten(self.axes, config)), value))
        else:
            self.search.tell(self.running, TrialValue(cost=value), save=False)
            self.running = None

    @cached_property
    def search(self) -> Any:
        """Made when the first points are known, since they are its initial design."""
        facade = HyperparameterOptimizationFacade
        scenario = Scenario(
            self.space,
            deterministic=not self.task.noisy,
            n_trials=self.task.budget,
            seed=self.task.seed,
            output_directory=Path(self.folder.name),
        )
        first = [config for config, _ in self.first]
        design = facade.get_initial_design(scenario, n_configs=0, additional_configs=first)
        return facade(scenario, nothing, initial_design=design, logging_level=logging.ERROR, overwrite=True)

    def suggest(self) -> Config:
        while True:
            trial = self.search.ask()
            told = next((i for i, (config, _) in enumerate(self.first) if config == trial.config), None)
            if told is None:
                self.running = trial
                return unflatten(self.axes, plain(trial.config))
            _, value = self.first.pop(told)  # asked for again, under another seed, it is run
            self.search.tell(trial, TrialValue(cost=value), save=False)

    def recommend(self) -> Config:
        incumbent = self.search.intensifier.get_incumbent()
        return unflatten(self.axes, plain(incumbent)) if incumbent is not None else self.best.config


def nothing(config: Configuration, seed: int = 0) -> float:
    raise NotImplementedError("The harness evaluates.")


def plain(config: Any) -> Config:
    return {name: getattr(value, "item", lambda value=value: value)() for name, value in dict(config).items()}


def parameter(axis: Axis) -> Any:
    if axis.kind == "choice":
        return Categorical(axis.name, list(axis.names))
    if axis.kind == "integer":
        return Integer(axis.name, (int(axis.low), int(axis.high)), log=axis.log)
    return Float(axis.name, (axis.low, axis.high), log=axis.log)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    serve(Smac)
