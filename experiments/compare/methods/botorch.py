"""BoTorch's default loop: SingleTaskGP as it comes, LogEI (qLogNEI where there is noise), 10 restarts of 512 points.

Coordinates are scaled to the unit cube (rates by their logarithm), integers and categories are those of
MixedSingleTaskGP and optimize_acqf_mixed_alternating, and shares are raw with sum(w) = 1 as an equality constraint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from botorch.acquisition import LogExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import MixedSingleTaskGP, SingleTaskGP
from botorch.optim import optimize_acqf, optimize_acqf_mixed_alternating
from gpytorch.mlls import ExactMarginalLogLikelihood

from experiments.compare.protocol import Axis, Config, Task, serve


class BoTorch:
    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        self.axes, self.noisy = task.axes, task.noisy
        self.columns = [
            (axis, source) for axis in task.axes for source in (axis.names if axis.kind == "mixture" else (None,))
        ]
        self.configs: list[Config] = []
        self.X: list[list[float]] = []
        self.y: list[float] = []

    def tell(self, config: Config, value: float) -> None:
        self.configs.append(config)
        self.X.append([encoded(axis, config[axis.name][s] if s else config[axis.name]) for axis, s in self.columns])
        self.y.append(-value)

    def fitted(self) -> tuple[Any, Any]:
        X = torch.tensor(self.X, dtype=torch.float64)
        Y = torch.tensor(self.y, dtype=torch.float64).unsqueeze(-1)
        categories = self.columns_of("choice")
        model = MixedSingleTaskGP(X, Y, categories) if categories else SingleTaskGP(X, Y)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model, X

    def columns_of(self, kind: str) -> list[int]:
        return [i for i, (axis, _) in enumerate(self.columns) if axis.kind == kind]

    def suggest(self) -> Config:
        model, X = self.fitted()
        if self.noisy:
            acquisition: Any = qLogNoisyExpectedImprovement(model, X_baseline=X, prune_baseline=True)
        else:
            acquisition = LogExpectedImprovement(model, best_f=max(self.y))
        bounds = torch.tensor([limits(axis) for axis, _ in self.columns], dtype=torch.float64).T
        wholes = {i: levels(self.columns[i][0]) for i in self.columns_of("integer")}
        kinds = {i: [float(k) for k in range(len(self.columns[i][0].names))] for i in self.columns_of("choice")}
        common = {"bounds": bounds, "q": 1, "num_restarts": 10, "raw_samples": 512}
        if wholes or kinds:
            candidate, _ = optimize_acqf_mixed_alternating(acquisition, discrete_dims=wholes, cat_dims=kinds, **common)
        else:
            shares = self.columns_of("mixture")
            equal = [(torch.tensor(shares), torch.ones(len(shares), dtype=torch.float64), 1.0)] if shares else None
            candidate, _ = optimize_acqf(acquisition, equality_constraints=equal, **common)
        return self.decoded(candidate[0].tolist())

    def decoded(self, x: Sequence[float]) -> Config:
        config: Config = {}
        for (axis, source), u in zip(self.columns, x, strict=True):
            if source:
                config.setdefault(axis.name, {})[source] = max(u, 0.0)
            else:
                config[axis.name] = value(axis, u)
        for axis in self.axes:
            if axis.kind == "mixture":
                total = math.fsum(config[axis.name].values())
                config[axis.name] = {name: share / total for name, share in config[axis.name].items()}
        return config

    def recommend(self) -> Config:
        model, X = self.fitted()
        with torch.no_grad():
            return self.configs[int(model.posterior(X).mean.argmax())]


def limits(axis: Axis) -> tuple[float, float]:
    return (0.0, len(axis.names) - 1.0) if axis.kind == "choice" else (0.0, 1.0)


def levels(axis: Axis) -> list[float]:
    return [encoded(axis, n) for n in range(int(axis.low), int(axis.high) + 1)]


def encoded(axis: Axis, given: Any) -> float:
    if axis.kind == "mixture":
        return float(given)
    if axis.kind == "choice":
        return float(axis.names.index(given))
    if axis.log:
        return math.log(given / axis.low) / math.log(axis.high / axis.low)
    return (given - axis.low) / (axis.high - axis.low)


def value(axis: Axis, u: float) -> Any:
    if axis.kind == "choice":
        return axis.names[round(u)]
    at = axis.low * (axis.high / axis.low) ** u if axis.log else axis.low + u * (axis.high - axis.low)
    at = min(max(at, axis.low), axis.high)
    return round(at) if axis.kind == "integer" else at


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    serve(BoTorch)
