"""A configuration that is good on average over environments (seeds, data sets), where each run measures one of them.

The objective is sum_e p(e) f(x, e): "random environmental conditions" in Frazier, "A Tutorial on Bayesian
Optimization", arXiv 1807.02811, section 5. An average of a Gaussian process is Gaussian, so every criterion can be
asked about it as about any other objective; then the run is made in the environment that tells most about the average
there: Williams, Santner & Notz 2000, "Sequential design of computer experiments to minimize integrated response
functions", Statistica Sinica 10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bo.dataset import Dataset
from bo.surrogates.composite import Belief
from search_spaces import Choice, Space
from search_spaces.parameter import is_number

#: How much farther from the best an average is linear than a single objective, at most.
WIDER = 20.0


@dataclass(frozen=True)
class Environments:
    """What is averaged over: E environments, each a value of k columns of the space.

    columns: k. points: E x k, encoded. weights: E, above 0, sum to one. options: of each environment, parameter ->
    option.
    """

    columns: tuple[int, ...]
    points: Tensor
    weights: Tensor
    options: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, space: Space, average_over: Mapping[str, Mapping[str, float]]) -> Environments:
        """Every combination of options of these parameters, with the product of their weights.

        average_over: parameter -> option, as text -> weight of at least 0, for example {"dataset": {"a": 2, "b": 1}};
        options without a weight do not count, and weights need not sum to one. ValueError where it does not fit the
        space.
        """
        if not isinstance(average_over, Mapping) or not average_over:
            raise ValueError(f"average_over must be a dictionary parameter -> option -> weight, got {average_over!r}.")
        places = {place.name: place for place in space.placed if not place.when}
        columns, choices = [], []
        for name, weights in average_over.items():
            parameter = places[name].parameter if name in places else None
            if not isinstance(parameter, Choice) or parameter.subspaces:
                plain = [n for n, p in places.items() if isinstance(p.parameter, Choice) and not p.parameter.subspaces]
                raise ValueError(f"average_over names {name!r}; it may name a Choice of plain values, such as {plain}.")
            columns.append(places[name].start)
            choices.append([(name, option, weight) for option, weight in _weighed(name, parameter, weights)])
        if len(space.columns) == len(columns):
            raise ValueError("average_over names every parameter of the space, which leaves nothing to choose.")
        combinations = list(itertools.product(*choices))
        points = [[float(places[n].parameter.encode([o])[0, 0]) for n, o, _ in each] for each in combinations]
        joint = torch.tensor([math.prod(weight for *_, weight in each) for each in combinations], dtype=torch.float64)
        options = tuple({name: option for name, option, _ in each} for each in combinations)
        return cls(tuple(columns), torch.tensor(points, dtype=torch.float64), joint / joint.sum(), options)

    @property
    def heaviest(self) -> int:
        """Number of the environment with most weight, the first of them."""
        return int(self.weights.argmax())

    def put(self, X: Tensor, environment: int) -> Tensor:
        """The points (..., d) in one environment."""
        return X.index_copy(-1, torch.tensor(self.columns), self.points[environment].expand(*X.shape[:-1], -1))

    def everywhere(self, X: Tensor) -> Tensor:
        """The points (..., d) in every environment: (..., E, d)."""
        return torch.stack([self.put(X, e) for e in range(len(self.weights))], dim=-2)


def _weighed(name: str, parameter: Choice, weights: Mapping[str, float]) -> list[tuple[Any, float]]:
    """The options that count, in their order, and their weights."""
    known = {str(option): option for option in parameter.options}
    if not isinstance(weights, Mapping) or any(str(option) not in known for option in weights):
        raise ValueError(f"average_over needs weights for options of {name!r}, {sorted(known)}, got {weights!r}.")
    given = {str(option): weight for option, weight in weights.items()}
    for option, weight in given.items():
        if not is_number(weight) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"average_over needs a finite weight of at least 0 for {name}={option}, got {weight!r}.")
    counted = [(option, float(given[text])) for text, option in known.items() if given.get(text, 0) > 0]
    if not counted:
        raise ValueError(f"average_over needs a weight above 0 for an option of {name!r}, got {weights!r}.")
    return counted


def widened(data: Dataset) -> Dataset:
    """The data with metrics kept linear much farther from the best, up to the worst run that did not explode.

    An average is one of what was measured, not of its logarithm: what is good on average may be bad somewhere.
    """
    if not data.finite:
        return data
    outcome = data.outcome
    counted = torch.arange(len(outcome.cap)) < len(outcome.cap) - outcome.limits
    reach = torch.minimum(data.excess.max(0).values, WIDER * outcome.cap)
    return data.reshaped(torch.where(counted, torch.maximum(outcome.cap, reach), outcome.cap))


@dataclass(frozen=True)
class AveragedBelief(Belief):
    """What is believed of the average: a `Belief` for which the environment of a point does not matter.

    each: what is believed in every environment by itself.
    """

    environments: Environments
    each: Belief

    @classmethod
    def over(cls, belief: Belief, environments: Environments) -> AveragedBelief:
        given = {f.name: getattr(belief, f.name) for f in fields(Belief)}
        return cls(**given, environments=environments, each=belief)

    def believe(self, X: Tensor) -> AveragedBelief:
        return self.over(self.each.believe(X), self.environments)

    def value(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the average at b x d points: b each."""
        mean, covariance = self.each.joint(self.environments.everywhere(X))  # b x E, b x E x E
        weights = self.environments.weights
        return mean @ weights, (covariance @ weights @ weights).clamp_min(1e-300).sqrt()

    def mean(self, X: Tensor) -> Tensor:
        """Mean of the average at b x d points: b."""
        places = self.environments.everywhere(X)  # b x E x d
        return self.each.mean(places.reshape(-1, X.shape[-1])).reshape(places.shape[:2]) @ self.environments.weights

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b x q) and covariance (b x q x q) of the average at b groups of q points, X: b x q x d."""
        b, q, d = X.shape
        weights = self.environments.weights
        E = len(weights)
        mean, covariance = self.each.joint(self.environments.everywhere(X).reshape(b, q * E, d))
        averaged = torch.einsum("bqerf,e,f->bqr", covariance.reshape(b, q, E, q, E), weights, weights)
        return mean.reshape(b, q, E) @ weights, averaged

    def covariance(self, X: Tensor, Z: Tensor) -> Tensor:
        """Of the averages at b x d and k x d points: b x k."""
        d, weights = X.shape[-1], self.environments.weights
        b, k, E = len(X), len(Z), len(weights)
        points = [self.environments.everywhere(points).reshape(-1, d) for points in (X, Z)]
        return torch.einsum("bekf,e,f->bk", self.each.covariance(*points).reshape(b, E, k, E), weights, weights)

    @property
    def noise(self) -> Tensor:
        """Variance of the average of one run in each environment, shape ()."""
        return self.each.noise * self.environments.weights.square().sum()

    def explained(self, X: Tensor) -> Tensor:
        """By how much a run at each of b points in each environment shrinks the variance of the average there: b x E.

        It is Cov(average, f_e)^2 / (Var f_e + noise of a run).
        """
        _, covariance = self.each.joint(self.environments.everywhere(X))  # b x E x E
        about = covariance @ self.environments.weights  # b x E
        return about.square() / (covariance.diagonal(dim1=-2, dim2=-1) + self.each.noise)

    def most_telling(self, x: Tensor, cost: Tensor | None = None) -> Tensor:
        """x (d,) in the environment whose run tells most about the average there, per cost (E; equal by default)."""
        with torch.no_grad():
            worth = self.explained(x[None])[0]
        return self.environments.put(x, int((worth if cost is None else worth / cost).argmax()))
