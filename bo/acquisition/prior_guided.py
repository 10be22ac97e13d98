"""What the user believes about where the optimum lies, and less and less of it as runs come in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition
from bo.acquisition.samples import amount
from search_spaces import Space
from search_spaces.parameter import Choice, Integer, Real, is_number, suggestion
from search_spaces.region import Place

#: Runs that a belief is worth, Hvarfner et al. 2022.
BETA = 10.0
#: Least density of a value, relative to the middle of nowhere: nothing that the space allows is ruled out by a belief.
FLOOR = 1e-6


@dataclass(frozen=True)
class Bump:
    """A normal density over one column, cut off at its ends; centre and spread in ranges."""

    column: int
    centre: float
    spread: float

    def log_density(self, X: Tensor) -> Tensor:
        """log density relative to a uniform one, at b x d points: b."""
        z = (X[:, self.column] - self.centre) / self.spread
        root = math.sqrt(2) * self.spread
        inside = 0.5 * (math.erf((1 - self.centre) / root) + math.erf(self.centre / root))
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(self.spread * inside)


@dataclass(frozen=True)
class Weights:
    """A probability for each option of one column."""

    column: int
    probabilities: tuple[float, ...]

    def log_density(self, X: Tensor) -> Tensor:
        """log probability relative to equal ones, at b x d points: b."""
        count = len(self.probabilities)
        code = (X[:, self.column].detach() * count).long().clamp(0, count - 1)
        return (torch.tensor(self.probabilities, dtype=torch.float64) * count).log()[code]


@dataclass(frozen=True)
class Prior:
    """Independent beliefs about single parameters of a space, each counting where its parameter does."""

    space: Space
    parts: tuple[Bump | Weights, ...]

    def log_density(self, X: Tensor) -> Tensor:
        """log of the product of the beliefs, each relative to knowing nothing, at b x d points: b."""
        active = torch.as_tensor(self.space.active(X.detach().numpy()))  # b x d
        total = X.new_zeros(len(X))
        for part in self.parts:
            floored = torch.logaddexp(part.log_density(X), torch.tensor(math.log(FLOOR), dtype=torch.float64))
            total = total + torch.where(active[:, part.column], floored, 0.0)
        return total


def term(prior: Prior, told: int, beta: float = BETA) -> Acquisition:
    """The logarithm of prior^(beta / told), to be added to that of a utility.

    Hvarfner et al., "piBO: Augmenting Acquisition Functions with User Beliefs", arXiv 2204.11051, eq. 6: the power
    multiplies the logarithm, and falls as 1 / told, so that a wrong belief is outvoted. told: runs told so far, counted
    as one where there are none. ValueError for a beta that is no number of at least 0.
    """
    power = amount("beta", beta) / max(told, 1)

    return lambda X: power * prior.log_density(X)


def parse(space: Space, beliefs: Mapping[str, Any]) -> Prior:
    """The user's words as a prior over a space.

        {"lr": {"centre": 3e-4, "spread": 2.0}, "optimizer": {"adamw": 0.8, "lion": 0.2}}

    A number has a centre in its range, and a spread, one standard deviation: a factor above 1 on a log axis, else in
    units of the number above 0. A choice has probabilities of options, by their text; options that are not named share
    what is left of 1. A name that several options have is believed alike in each. ValueError for anything else.
    """
    if not isinstance(beliefs, Mapping) or not beliefs:
        raise ValueError(f"A prior must be a dictionary from names to beliefs, got {beliefs!r}.")
    names = list(dict.fromkeys(place.name for place in space.placed))
    parts: list[Bump | Weights] = []
    for name, belief in beliefs.items():
        places = [place for place in space.placed if place.name == name]
        if not places:
            hint = suggestion(name, names, f"its names are {names}.")
            raise ValueError(f"The prior has a belief about {name!r}, which the space does not know; {hint}")
        parts += [_part(place, belief) for place in places]
    return Prior(space, tuple(parts))


def _part(place: Place, belief: Any) -> Bump | Weights:
    name, parameter = place.name, place.parameter
    if not isinstance(parameter, Real | Integer | Choice):
        kind = type(parameter).__name__
        raise ValueError(f"The prior has a belief about {name!r}, a {kind}; only numbers and choices may have one.")
    if not isinstance(belief, Mapping):
        raise ValueError(f"The belief about {name!r} must be a dictionary, got {belief!r}.")
    if isinstance(parameter, Choice):
        return Weights(place.start, _probabilities(name, parameter, belief))
    if set(belief) != {"centre", "spread"}:
        raise ValueError(f"The belief about {name!r} needs a centre and a spread, got {dict(belief)!r}.")
    centre = parameter.check(f"The centre of the belief about {name!r}", belief["centre"])
    spread, least = belief["spread"], 1.0 if parameter.log else 0.0
    if not is_number(spread) or not math.isfinite(spread) or not spread > least:
        unit = "a factor above 1" if parameter.log else "a finite number above 0"
        raise ValueError(f"The spread of the belief about {name!r} must be {unit}, got {spread!r}.")
    low, high = float(parameter.low), float(parameter.high)
    if isinstance(parameter, Integer):
        low, high = (low, high + 1) if parameter.log else (low - 0.5, high + 0.5)  # its cells
    width = math.log(spread) / math.log(high / low) if parameter.log else float(spread) / (high - low)
    values: Any = [centre]
    return Bump(place.start, float(parameter.encode(values)[0, 0]), width)


def _probabilities(name: str, parameter: Choice, belief: Mapping[str, Any]) -> tuple[float, ...]:
    texts = [str(option) for option in parameter.options]
    given = {str(option): value for option, value in belief.items()}
    for option, value in given.items():
        if option not in texts:
            hint = suggestion(option, texts, f"its options are {texts}.")
            raise ValueError(f"The belief about {name!r} has {option!r}, which is no option of it; {hint}")
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(
                f"The probability of {option!r} for {name!r} must be above 0 and at most 1, got {value!r}."
            )
    unnamed, left = [text for text in texts if text not in given], 1 - sum(given.values())
    if unnamed and left <= 1e-9:
        raise ValueError(f"The probabilities for {name!r} must leave some of 1 for {unnamed}, got {dict(belief)!r}.")
    if not unnamed and abs(left) > 1e-9:
        raise ValueError(f"The probabilities for {name!r} must sum to 1, got {dict(belief)!r}.")
    return tuple(float(given.get(text, left / max(len(unnamed), 1))) for text in texts)
