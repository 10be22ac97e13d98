"""Optuna's TPESampler ("tpe") or GPSampler ("gp"); their random start is replaced by the points they are told."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import optuna

from experiments.compare.protocol import Axis, Config, Task, flat, flatten, serve, unflatten


class Optuna:
    def __init__(self, task: Task) -> None:
        self.axes = task.axes
        self.distributions = {axis.name: distribution(axis) for axis in flat(task.axes)}
        kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        sampler = kinds[sys.argv[1]](seed=task.seed, n_startup_trials=task.design)
        self.study = optuna.create_study(sampler=sampler)
        self.running: Any = None

    def tell(self, config: Config, value: float) -> None:
        if self.running is None:
            trial = optuna.trial.create_trial(
                params=flatten(self.axes, config), distributions=self.distributions, value=value
            )
            self.study.add_trial(trial)
        else:
            self.study.tell(self.running, value)
            self.running = None

    def suggest(self) -> Config:
        self.running = self.study.ask(self.distributions)
        return unflatten(self.axes, self.running.params)

    def recommend(self) -> Config:
        return unflatten(self.axes, self.study.best_trial.params)


def distribution(axis: Axis) -> Any:
    if axis.kind == "choice":
        return optuna.distributions.CategoricalDistribution(axis.names)
    if axis.kind == "integer":
        return optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    serve(Optuna)
