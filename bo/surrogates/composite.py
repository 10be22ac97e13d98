"""The posterior of the objective: a weighted sum of one Gaussian process a metric.

Losses of single domains are smooth functions of a mixture, their weighted sum is what counts, and a sum of Gaussian
processes is Gaussian: mean and variance are analytic. The metrics of one run move together, so the variance is
w' Sigma(x) w with the correlation between metrics estimated from leave-one-out residuals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from bo.dataset import Dataset, coincide
from bo.surrogates import surrogate as surrogates
from bo.surrogates.features import Features, Inputs
from bo.surrogates.surrogate import Surrogate
from search_spaces import Scale

#: Runs' worth of belief that residuals of different metrics are uncorrelated.
PRIOR_RUNS = 4.0
#: 95% quantile of the standard normal distribution: its two-sided 90% interval.
Z90 = 1.6448536269514722


@dataclass(frozen=True)
class Prediction:
    """The objective of a run, in minimised user units, with a 90% interval that includes the noise of the run."""

    mean: float
    low: float
    high: float


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
        return self.weight @ mean, combined(self.weight, variance, self.correlation).sqrt()

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b x q) and covariance (b x q x q) of b groups of q points, X: b x q x d."""
        b, q, d = X.shape
        mean, covariance = self.surrogate.joint(self.inputs(X.reshape(b * q, d)), q)
        stretch = self._stretch(covariance.diagonal(dim1=-2, dim2=-1).reshape(-1, b * q)).reshape(b, q)
        summed = torch.einsum("p,pbqr->bqr", self.weight.square(), covariance)
        return torch.einsum("p,pbq->bq", self.weight, mean), stretch[..., None] * summed * stretch[:, None]

    def covariance(self, X: Tensor, Z: Tensor) -> Tensor:
        """Between b x d and k x d points: b x k."""
        at, other = self.inputs(X), self.inputs(Z)
        stretch = [self._stretch(self.surrogate.posterior(inputs)[1]) for inputs in (at, other)]
        summed = torch.einsum("p,pbk->bk", self.weight.square(), self.surrogate.covariance(at, other))
        return stretch[0][:, None] * summed * stretch[1]

    @property
    def noise(self) -> Tensor:
        """Variance of what one run measures about the objective there, shape ()."""
        return combined(self.weight, self.surrogate.noise[:, None], self.correlation)[0]

    def believe(self, X: Tensor) -> Belief:
        """Conditioned on its own mean at r x d points, as if they had been run."""
        return replace(self, surrogate=self.surrogate.believe(self.inputs(X))) if len(X) else self

    def metric(self, index: int) -> Belief:
        """What is believed of one metric alone, larger is better."""
        only = torch.zeros_like(self.weight)
        only[index] = self.weight[index]
        return replace(self, weight=only)

    def inputs(self, X: Tensor) -> Inputs:
        cell = torch.full((len(X),), self.cell, dtype=torch.long)
        return self.surrogate.features(X, self.place.expand(len(X), -1), cell)

    def _stretch(self, variance: Tensor) -> Tensor:
        """What the correlation of metrics does to standard deviations of their sum, where variances are p x b: b."""
        if len(self.weight) == 1:
            return torch.ones(variance.shape[-1], dtype=torch.float64)
        apart = (self.weight.square() @ variance).clamp_min(1e-300)
        return (combined(self.weight, variance, self.correlation) / apart).sqrt()


def combined(weight: Tensor, variance: Tensor, correlation: Tensor) -> Tensor:
    """w' Sigma w for p x b variances of the metrics: b."""
    sd = weight[:, None] * variance.sqrt()
    return ((correlation @ sd) * sd).sum(0).clamp_min(1e-300)


@dataclass(frozen=True)
class Composite:
    """The objective over the space at any scale, given a dataset. correlation: p x p, between metrics."""

    data: Dataset
    gp: Surrogate
    correlation: Tensor

    def at(self, scale: Scale) -> Belief:
        """The objective at one scale: what acquisitions are made of."""
        outcome = self.data.outcome
        place = self.data.place(scale)
        _, gain = outcome.affine(outcome.level(place))
        return Belief(self.gp, place, self._cell(place), outcome.weight * gain, self.correlation)

    def predict(self, x: Tensor, scale: Scale) -> Prediction:
        """What a run of the encoded configuration (d,) at a scale will measure."""
        outcome = self.data.outcome
        level = outcome.level(self.data.place(scale))
        mean, variance = self.gp.posterior(self.at(scale).inputs(x[None]))
        # Beyond the cap the map back to user units is not affine; its slope at the mean serves for the interval.
        metrics, slope = outcome.backward(mean[:, 0], level)
        noisy = combined(outcome.weight * slope, variance + self.gp.noise[:, None], self.correlation)[0]
        # Hyperparameters are a point estimate; Student's t stands in for what a few runs leave open about them.
        here = int((self.data.at(scale) & ~self.data.diverged).sum())
        within = float(stdtrit(here + 2, 0.95)) ** 2 * noisy
        # Levels of a scale that was never run are guesses that fail together: their deviations add up.
        half = float((within + (Z90 * (outcome.weight @ level.sd)).square()).sqrt())
        centre = float(outcome.weight @ metrics)
        return Prediction(centre, centre - half, centre + half)

    def believe(self, X: Tensor, S: Tensor) -> Composite:
        """Conditioned on its own mean at r x d encoded points and their r x m places: pending runs."""
        if not len(X):
            return self
        cells = torch.tensor([self._cell(place) for place in S], dtype=torch.long)
        return replace(self, gp=self.gp.believe(self.gp.features(X, S, cells)))

    def _cell(self, place: Tensor) -> int:
        """Index of the cell at a place; places without results share none with the data, and are told apart."""
        known = coincide(self.data.outcome.places, place)
        if known.any():
            return int(known.nonzero()[0, 0])
        waiting = coincide(self.data.S_pending, place)
        return len(known) + (int(waiting.nonzero()[0, 0]) if waiting.any() else len(waiting))


def fit(data: Dataset, start: Mapping[str, Any] | None = None, surrogate: str = "gp") -> Composite:
    """The model of a dataset with at least one finite run; `start` is an earlier fit's `memory`."""
    features = Features(data.space)
    gp = surrogates.fit(surrogate, features, features(data.X, data.S, data.cell), data.Y, start)
    return Composite(data, gp, correlation(gp, data.Y))


def correlation(gp: Surrogate, Y: Tensor) -> Tensor:
    """Correlation (p x p) between metrics of their scaled leave-one-out residuals, shrunk towards none."""
    if Y.shape[-1] == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    mean, variance = gp.leave_one_out()
    residual = (Y - mean) / variance.sqrt()  # n x p
    second = residual.T @ residual
    size = second.diagonal().clamp_min(1e-12).sqrt()
    n, p = residual.shape
    return (n * second / size[:, None] / size + PRIOR_RUNS * torch.eye(p, dtype=torch.float64)) / (n + PRIOR_RUNS)
