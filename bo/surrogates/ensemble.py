"""Several Gaussian processes for the same metrics, weighted, as one: the moments of their mixture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bo.surrogates.believing import Believing
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.scale_shift import ScaleShiftGP

#: Variances below this are rounding; outcomes are standardised.
LEAST = 1e-10


@dataclass(frozen=True)
class Ensemble(Believing):
    """The mixture of K posteriors of p metrics, by its mean and covariance. weight: p x K, each row sums to one.

    remembered: what the next fit starts from, as JSON. Members that stay apart would leave it uncertain at a point that
    each believes by itself.
    """

    members: tuple[GaussianProcess | ScaleShiftGP, ...]
    weight: Tensor
    remembered: dict[str, Any]

    @property
    def features(self) -> Features:
        """What makes its inputs of encoded points."""
        return self.members[0].features

    @cached_property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""
        return (self.weight * torch.stack([member.noise for member in self.members], dim=-1)).sum(-1)

    @cached_property
    def lengthscale(self) -> Tensor:
        """What the squared distance along each group of features counts with, as a lengthscale: p x G."""
        inverse = torch.stack([member.hyper.lengthscale.pow(-2) for member in self.members], dim=-1)
        return (self.weight[:, None] * inverse).sum(-1).rsqrt()

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        each = [member.posterior(at) for member in self.members]
        mean, variance = (torch.stack(found) for found in zip(*each, strict=True))  # K x p x b
        centre = self._mean(mean)
        spread = (self.weight.T[..., None] * (variance + (mean - centre).square())).sum(0)
        return centre, self.closed(spread, at).clamp_min(LEAST)

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return self._mean(self._means(at))

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale."""
        each = [member.joint(at, q) for member in self.members]
        mean, covariance = (torch.stack(found) for found in zip(*each, strict=True))
        weight = self.weight.T[..., None, None]
        centre = (weight * mean).sum(0)
        away = mean - centre
        spread = (weight[..., None] * (covariance + away[..., :, None] * away[..., None, :])).sum(0)
        return centre, self.closed_within(spread, at)

    def open_covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """`covariance` before anything is believed."""
        covariance = torch.stack([member.covariance(at, other) for member in self.members])  # K x p x b x k
        one, two = (mean - self._mean(mean) for mean in map(self._means, (at, other)))
        spread = covariance + one[..., :, None] * two[..., None, :]
        found: Tensor = (self.weight.T[..., None, None] * spread).sum(0)
        return found

    def _means(self, at: Inputs) -> Tensor:
        """Of each member at b points: K x p x b."""
        return torch.stack([member.mean(at) for member in self.members])

    def _mean(self, means: Tensor) -> Tensor:
        """Of the mixture, where those of its members are K x p x b: p x b."""
        return (self.weight.T[..., None] * means).sum(0)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each.

        Each member's are exact; the weights are those of all runs.
        """
        each = [member.leave_one_out() for member in self.members]
        mean, variance = (torch.stack(found) for found in zip(*each, strict=True))  # K x n x p
        weight = self.weight.T[:, None]
        centre = (weight * mean).sum(0)
        return centre, (weight * (variance + (mean - centre).square())).sum(0)

    def memory(self) -> dict[str, Any]:
        """What the next fit starts from, as JSON."""
        return dict(self.remembered)
