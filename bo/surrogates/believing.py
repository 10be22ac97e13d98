"""What several processes together believe of runs without a result, where only their covariance is at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from bo.surrogates import process
from bo.surrogates.features import Inputs
from bo.surrogates.hyperparameters import BELIEVED_NOISE


@dataclass(frozen=True)
class Believing(ABC):
    """A posterior that is conditioned on its own mean as one process: its parts keep what they know.

    believed: r points, with the Cholesky factors p x r x r of their posterior covariance, or none.
    """

    believed: tuple[Inputs, Tensor] | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""

    @abstractmethod
    def open_covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """`covariance` before anything is believed."""

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k."""
        found = self.open_covariance(at, other)
        return found if self.believed is None else found - self._known(at).mT @ self._known(other)

    def closed(self, variance: Tensor, at: Inputs) -> Tensor:
        """Variances at b points (p x b) less what is believed there."""
        return variance if self.believed is None else variance - self._known(at).square().sum(-2)

    def closed_within(self, covariance: Tensor, at: Inputs) -> Tensor:
        """Covariances of b groups of q points (p x b x q x q) less what is believed there."""
        if self.believed is None:
            return covariance
        half = self._known(at)
        half = half.reshape(*half.shape[:2], -1, covariance.shape[-1]).transpose(1, 2)  # p x b x r x q
        return covariance - half.mT @ half

    def believe(self, at: Inputs) -> Self:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes."""
        with torch.no_grad():
            points = at if self.believed is None else self.believed[0].join(at)
            open = self.open_covariance(points, points)
            chol = process.factor(open, BELIEVED_NOISE * self.noise, open.diagonal(dim1=-2, dim2=-1).mean(-1))
        return replace(self, believed=(points, chol))

    def _known(self, at: Inputs) -> Tensor:
        """What believed points explain of the covariance of b points, as half' half: p x r x b."""
        assert self.believed is not None
        points, chol = self.believed
        half: Tensor = torch.linalg.solve_triangular(chol, self.open_covariance(points, at), upper=False)
        return half
