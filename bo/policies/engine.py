"""What a search decides by: the model, the criterion, and what is taken into account beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bo import dataset, ports
from bo.acquisition import hypervolume, prior_guided
from bo.acquisition.acquisition import ACQUISITIONS, Acquisition, Make, Situation
from bo.acquisition.environment import AveragedBelief, Environments
from bo.acquisition.samples import amount
from bo.objective import Minimize, Objective, Pareto
from bo.scaling.laws import Drift, parse
from bo.surrogates import composite
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.features import Features
from bo.surrogates.surrogate import DRIFTING, SURROGATES
from bo.trial import Trial
from search_spaces import Real, Scale, Space

Cost = Literal["ignored", "seconds", "cooled"]


@dataclass(frozen=True)
class Engine:
    """What a search decides by, as the settings of a policy name it.

    surrogate: a name of SURROGATES. acquisition: a name of ACQUISITIONS, with its settings in `options`; of several
    objectives it is always the hypervolume. prior: the user's belief about where the optimum lies, as
    `prior_guided.parse` takes it, worth `beta` runs. cost: "seconds" divides the utility of a run by the time it is
    expected to take; "cooled" does so less and less as the limits are used up. law: what is believed of how the best
    configuration moves with scale, as `bo.scaling.laws.parse` takes it; nothing by default. average_over: choices that
    are an environment, with the weights of their options, as `Environments.of` takes them.
    """

    surrogate: str = "gp"
    acquisition: str = "log_ei"
    options: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] | None = None
    beta: float = prior_guided.BETA
    cost: Cost = "ignored"
    average_over: Mapping[str, Mapping[str, float]] | None = None
    law: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        ports.load(SURROGATES, self.surrogate, "surrogate")
        ports.load(ACQUISITIONS, self.acquisition, "acquisition")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a dictionary of settings of the acquisition, got {self.options!r}.")
        if self.cost not in get_args(Cost):
            raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got {self.cost!r}.")
        amount("beta", self.beta)

    def check(self, space: Space, objective: Objective) -> None:
        """ValueError where the settings do not fit a study of this space and objective."""
        if isinstance(objective, Pareto):
            if self.average_over is not None:
                raise ValueError("average_over needs one objective; of several it is not known what to average.")
            if self.acquisition != "log_ei" or self.options:
                raise ValueError(
                    f"Of several objectives the acquisition is always the hypervolume, got {self.acquisition!r} with "
                    f"options {dict(self.options)!r}; leave both away."
                )
        if self.prior is not None:
            prior_guided.parse(space, self.prior)
        if self.average_over is not None:
            Environments.of(space, self.average_over)
        self.drift(space)
        if self.law is not None and self.surrogate not in DRIFTING:
            raise ValueError(
                f"A law is of drifts, which the surrogate {self.surrogate!r} does not have; leave the law away, or "
                f"take one of {', '.join(DRIFTING)}."
            )
        if self.options:
            self.utility(example())

    def drift(self, space: Space) -> Drift:
        """What the law says of this space; ValueError where they do not fit."""
        if self.law is None:
            return {}
        features = Features(space)
        names = [space.columns[i].name.split(".")[-1] for i in features.numeric]
        return parse(self.law).drift(names, features.axes)

    def belief(self, model: Composite, at: Scale) -> Belief:
        """What is believed of the objective at a scale: of its average, where an environment is no choice."""
        belief = model.at(at)
        if self.average_over is None:
            return belief
        return AveragedBelief.over(belief, Environments.of(model.data.space, self.average_over))

    def utility(self, situation: Situation) -> tuple[Acquisition, bool]:
        """The criterion by itself, and whether it is a logarithm; ValueError for options that it does not take."""
        make: Make = ports.load(ACQUISITIONS, self.acquisition, "acquisition")
        known = list(inspect.signature(make).parameters)[1:]
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(f"The acquisition {self.acquisition!r} has options {known}, got {unknown}.")
        return make(situation, **self.options), bool(import_module(make.__module__).LOG)


def example() -> Situation:
    """A search of one number after two runs, for a criterion to be made and its options to be looked at."""
    space = Space(x=Real(0.0, 1.0))
    trials = tuple(
        Trial(i, {"x": x}, space.top, i, "added", status="finished", metrics={"loss": x})
        for i, x in enumerate((0.25, 0.75))
    )
    data = dataset.from_history(ports.History(space, Minimize("loss"), trials))
    belief = composite.fit(data).at(space.top)
    return Situation(space, belief, belief, data.X, data.X[:0], len(data.X), 1.0, np.random.default_rng(0))


def volume(situation: Situation, believed: Composite, at: Scale) -> Acquisition:
    """The criterion for several objectives."""
    beliefs, reference = hypervolume.objectives(believed, at), hypervolume.reference(believed, at)
    return hypervolume.make(situation, beliefs=beliefs, reference=reference)


def weighed(criterion: Acquisition, terms: tuple[Acquisition, ...], unit: float = 1.0) -> Acquisition:
    """A criterion with terms added: logarithms, as are criteria but those in the units of the objective.

    unit: how much of such a criterion a term of one is worth.
    """
    if not terms:
        return criterion

    def acquisition(X: Tensor) -> Tensor:
        value = criterion(X)
        for term in terms:
            value = value + unit * term(X)
        return value

    return acquisition


def unit(belief: Belief, X: Tensor) -> float:
    """What a logarithm of one counts for in units of the objective: the spread of the mean over k x d told points."""
    with torch.no_grad():
        return float(belief.mean(X).std(correction=0)) or 1.0
