"""Space-filling search: the sequence that the initial design begins, continued."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.compare.problems import space_filling
from experiments.compare.protocol import Best, Config, Task, serve


class Random(Best):
    def __init__(self, task: Task) -> None:
        super().__init__()
        configs = space_filling(task.axes, task.seed, task.budget)
        self.rest: Iterator[Config] = iter(configs[task.design :])

    def suggest(self) -> Config:
        return next(self.rest)

    def recommend(self) -> Config:
        return self.config


if __name__ == "__main__":
    serve(Random)
