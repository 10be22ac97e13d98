"""What a criterion is made from and what it is, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bo.surrogates.composite import Belief
from search_spaces import Space

#: b x d encoded points -> b values, larger is better, differentiable in the coordinates that are continuous.
Acquisition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Situation:
    """All a criterion may know when the next run at one scale is chosen.

    space: what is allowed at that scale. belief: given the told runs. believed: that, and conditioned on its own mean
    at `pending`. tried: k x d encoded configs with a finite result there. pending: r x d that run there now or were
    proposed earlier in this batch. Of both only those that are likely to keep the limits on metrics. told: number of
    told runs at all scales. left: share of the study's limits still to be spent, 1 where there are none.
    """

    space: Space
    belief: Belief
    believed: Belief
    tried: Tensor
    pending: Tensor
    told: int
    left: float
    rng: np.random.Generator


class Make(Protocol):
    """How a criterion is made: the function `make` of its file.

    Utilities that are never negative are given by their logarithm, so that terms can be added to it: the logarithm of
    a probability, of one over a cost, of a user's prior.
    """

    def __call__(self, situation: Situation, **settings: Any) -> Acquisition:
        """The criterion in a situation; ValueError for settings it does not know or values it does not take."""


#: Every criterion that a study can name. Whether it is a logarithm stands in its file, as LOG.
ACQUISITIONS: dict[str, str] = {
    "log_ei": "bo.acquisition.log_ei:make",
    "noisy_ei": "bo.acquisition.noisy_ei:make_integrated",
    "noisy_ei_evaluated": "bo.acquisition.noisy_ei:make_evaluated",
    "joint_ei": "bo.acquisition.joint_ei:make",
    "upper_confidence_bound": "bo.acquisition.upper_confidence_bound:make",
    "thompson": "bo.acquisition.thompson:make",
    "max_value_entropy": "bo.acquisition.max_value_entropy:make",
    "knowledge_gradient": "bo.acquisition.knowledge_gradient:make",
    "knowledge_gradient_discrete": "bo.acquisition.knowledge_gradient:make_discrete",
    "knowledge_gradient_one_shot": "bo.acquisition.knowledge_gradient:make_one_shot",
}
