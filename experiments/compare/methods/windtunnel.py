"""This checkout, as a user has it: a study in a folder, asked and told; nothing chosen but the policy."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch

from bo import Minimize, Study
from experiments.compare.protocol import Axis, Config, Task, serve
from search_spaces import Choice, Integer, Mixture, Real, Space


class Windtunnel:
    def __init__(self, task: Task) -> None:
        self.folder = TemporaryDirectory(prefix="windtunnel-compare-")  # kept until the process ends
        self.study = Study.create(
            f"{self.folder.name}/study",
            Space(**{axis.name: parameter(axis) for axis in task.axes}),
            objective=Minimize("loss"),
            policy="bayes",
            seed=task.seed,
        )
        self.study.limit(n_trials=task.budget)
        self.running: int | None = None

    def tell(self, config: Config, value: float) -> None:
        if self.running is None:
            self.study.enqueue(config)
            self.suggest()
        assert self.running is not None
        self.study.tell(self.running, {"loss": value})
        self.running = None

    def suggest(self) -> Config:
        (trial,) = self.study.ask()
        self.running = trial.id
        return plain(trial.config)

    def recommend(self) -> Config:
        return plain(self.study.recommend().config)


def parameter(axis: Axis) -> Any:
    if axis.kind == "real":
        return Real(axis.low, axis.high, log=axis.log)
    if axis.kind == "integer":
        return Integer(int(axis.low), int(axis.high), log=axis.log)
    return Choice(*axis.names) if axis.kind == "choice" else Mixture(*axis.names)


def plain(config: Any) -> Config:
    return {name: dict(value) if hasattr(value, "items") else value for name, value in config.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Windtunnel)
