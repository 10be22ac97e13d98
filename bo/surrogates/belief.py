"""What is believed of the objective at one scale, where it is a weighted sum of one process a metric."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bo.surrogates.features import Inputs
from bo.surrogates.surrogate import Surrogate


@dataclass(frozen=True)
class Belief:
    """What is believed of the noise-free objective at one scale: larger is better, X are encoded points.

    It is in user units, up to a constant that depends on the scale alone. Every method is differentiable in X.
    place: m. cell: index of the scale. weight: units of the objective a model unit of each metric is worth, p.
    correlation: p x p, between the metrics.
    """

    surrogate: Surrogate
    place: Tensor
    cell: int
    weight: Tensor
    correlation: Tensor

    def value(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at b x d points: b each."""
        mean, variance = self.surrogate.posterior(self.inputs(X))  # p x b
        if len(self.weight) == 1:
            return self.weight[0] * mean[0], (self.weight[0].abs() * variance[0].sqrt()).clamp_min(1e-150)
        return self.weight @ mean, combined(self.weight, variance, self.correlation).sqrt()

    def mean(self, X: Tensor) -> Tensor:
        """Mean at b x d points, b, for less than it takes to have the deviation too."""
        return self.weight @ self.surrogate.mean(self.inputs(X))

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b x q) and covariance (b x q x q) of b groups of q points, X: b x q x d."""
        b, q, d = X.shape
        mean, covariance = self.surrogate.joint(self.inputs(X.reshape(b * q, d)), q)
        stretch = self.stretch(covariance.diagonal(dim1=-2, dim2=-1).reshape(-1, b * q)).reshape(b, q)
        summed = torch.einsum("p,pbqr->bqr", self.weight.square(), covariance)
        return torch.einsum("p,pbq->bq", self.weight, mean), stretch[..., None] * summed * stretch[:, None]

    def covariance(self, X: Tensor, Z: Tensor) -> Tensor:
        """Between b x d and k x d points: b x k."""
        at, other = self.inputs(X), self.inputs(Z)
        summed = torch.einsum("p,pbk->bk", self.weight.square(), self.surrogate.covariance(at, other))
        if len(self.weight) == 1:
            return summed
        stretch = [self.stretch(self.surrogate.posterior(inputs)[1]) for inputs in (at, other)]
        return stretch[0][:, None] * summed * stretch[1]

    @property
    def noise(self) -> Tensor:
        """Variance of what one run measures about the objective there, shape ()."""
        return combined(self.weight, self.surrogate.noise[:, None], self.correlation)[0]

    def believe(self, X: Tensor) -> Belief:
        """Conditioned on its own mean at r x d points, as if they had been run."""
        return replace(self, surrogate=self.surrogate.believe(self.inputs(X))) if len(X) else self

    def inputs(self, X: Tensor) -> Inputs:
        cell = torch.full((len(X),), self.cell, dtype=torch.long)
        return self.surrogate.features(X, self.place.expand(len(X), -1), cell)

    def stretch(self, variance: Tensor) -> Tensor:
        """What the correlation of metrics does to standard deviations of their sum, where variances are p x b: b."""
        if len(self.weight) == 1:
            return torch.ones(variance.shape[-1], dtype=torch.float64)
        apart = (self.weight.square() @ variance).clamp_min(1e-300)
        return (combined(self.weight, variance, self.correlation) / apart).sqrt()


def combined(weight: Tensor, variance: Tensor, correlation: Tensor) -> Tensor:
    """w' Sigma w for p x b variances of the metrics: b."""
    sd = weight[:, None] * variance.sqrt()
    return ((correlation @ sd) * sd).sum(0).clamp_min(1e-300)
