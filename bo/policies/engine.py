"""What a search decides by: the model, the criterion, and what is taken into account beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bo import ports
from bo.acquisition import hypervolume, prior_guided
from bo.acquisition.acquisition import ACQUISITIONS, Acquisition, Make, Situation
from bo.acquisition.environment import AveragedBelief, Environments
from bo.acquisition.samples import posterior_mean
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.surrogate import SURROGATES
from search_spaces import Scale

Cost = Literal["ignored", "seconds", "cooled"]
#: b x d -> b: a logarithm, to be added to that of a utility.
Term = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Engine:
    """What a search decides by, as the settings of a policy name it.

    surrogate: a name of SURROGATES. acquisition: a name of ACQUISITIONS, with its settings in `options`; of several
    objectives it is always the hypervolume. prior: the user's belief about where the optimum lies, as
    `prior_guided.parse` takes it, worth `beta` runs. cost: "seconds" divides the utility of a run by the time it is
    expected to take; "cooled" does so less and less as the limits are used up. average_over: choices that are an
    environment, with the weights of their options, as `Environments.of` takes them.
    """

    surrogate: str = "gp"
    acquisition: str = "log_ei"
    options: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] | None = None
    beta: float = prior_guided.BETA
    cost: Cost = "ignored"
    average_over: Mapping[str, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        ports.load(SURROGATES, self.surrogate, "surrogate")
        ports.load(ACQUISITIONS, self.acquisition, "acquisition")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a dictionary of settings of the acquisition, got {self.options!r}.")
        if self.cost not in get_args(Cost):
            raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got {self.cost!r}.")

    def belief(self, model: Composite, at: Scale) -> Belief:
        """What is believed of the objective at a scale: of its average, where an environment is no choice."""
        belief = model.at(at)
        if self.average_over is None:
            return belief
        return AveragedBelief.over(belief, Environments.of(model.data.space, self.average_over))

    def utility(self, situation: Situation) -> tuple[Acquisition, bool]:
        """The criterion by itself, and whether it is a logarithm; ValueError for options that it does not take."""
        make: Make = ports.load(ACQUISITIONS, self.acquisition, "acquisition")
        try:
            made = make(situation, **self.options)
        except TypeError:
            raise ValueError(f"The acquisition {self.acquisition!r} does not take {dict(self.options)!r}.") from None
        return made, bool(import_module(make.__module__).LOG)


def volume(situation: Situation, believed: Composite, at: Scale) -> Acquisition:
    """The criterion for several objectives."""
    beliefs, reference = hypervolume.objectives(believed, at), hypervolume.reference(believed, at)
    points = torch.cat([situation.tried, situation.pending])
    return hypervolume.make(situation, beliefs=beliefs, reference=reference, points=points)


def weighed(criterion: Acquisition, logarithm: bool, terms: tuple[Term, ...], situation: Situation) -> Acquisition:
    """A criterion with terms added, as they are to a logarithm.

    What is no logarithm is in the units of the objective; there a term counts in standard deviations of the posterior
    mean over the configurations tried.
    """
    if not terms:
        return criterion
    unit = 1.0
    if not logarithm and len(situation.tried) > 1:
        with torch.no_grad():
            unit = float(posterior_mean(situation.belief)(situation.tried).std())

    def acquisition(X: Tensor) -> Tensor:
        value = criterion(X)
        for term in terms:
            value = value + unit * term(X)
        return value

    return acquisition
