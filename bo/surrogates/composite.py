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
from bo.surrogates import scale_shift
from bo.surrogates.features import Features, Inputs
from bo.surrogates.scale_shift import ScaleShiftGP
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
class Composite:
    """The objective over the space at any scale, given a dataset. correlation: p x p, between metrics."""

    data: Dataset
    gp: ScaleShiftGP
    correlation: Tensor

    def value(self, X: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (b each) of the noise-free objective at b x d encoded points of a scale.

        Larger is better; in user units up to a constant that depends on the scale alone.
        """
        weight = self._weight(scale)
        mean, variance = self.gp.posterior(self._inputs(X, scale))  # p x b
        return weight @ mean, self._variance(weight, variance).sqrt()

    def predict(self, x: Tensor, scale: Scale) -> Prediction:
        """What a run of the encoded configuration (d,) at a scale will measure."""
        outcome = self.data.outcome
        level = outcome.level(self.data.place(scale))
        mean, variance = self.gp.posterior(self._inputs(x[None], scale))
        # Beyond the cap the map back to user units is not affine; its slope at the mean serves for the interval.
        metrics, slope = outcome.backward(mean[:, 0], level)
        noisy = self._variance(outcome.weight * slope, variance + self.gp.hyper.noise[:, None])[0]
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

    def _weight(self, scale: Scale) -> Tensor:
        """Units of the objective a model unit of each metric (p) is worth at a scale."""
        outcome = self.data.outcome
        _, gain = outcome.affine(outcome.level(self.data.place(scale)))
        return outcome.weight * gain

    def _variance(self, weight: Tensor, variance: Tensor) -> Tensor:
        """w' Sigma w for p x b variances of the metrics: b."""
        sd = weight[:, None] * variance.sqrt()
        return ((self.correlation @ sd) * sd).sum(0).clamp_min(1e-300)

    def _inputs(self, X: Tensor, scale: Scale) -> Inputs:
        place = self.data.place(scale)
        cell = torch.full((len(X),), self._cell(place), dtype=torch.long)
        return self.gp.features(X, place.expand(len(X), -1), cell)

    def _cell(self, place: Tensor) -> int:
        """Index of the cell at a place; places without results share none with the data, and are told apart."""
        known = coincide(self.data.outcome.places, place)
        if known.any():
            return int(known.nonzero()[0, 0])
        waiting = coincide(self.data.S_pending, place)
        return len(known) + (int(waiting.nonzero()[0, 0]) if waiting.any() else len(waiting))


def fit(data: Dataset, start: Mapping[str, Any] | None = None) -> Composite:
    """The model of a dataset with at least one finite run; `start` is an earlier fit's `memory`."""
    features = Features(data.space)
    gp = scale_shift.fit(features, features(data.X, data.S, data.cell), data.Y, start)
    return Composite(data, gp, correlation(gp))


def correlation(gp: ScaleShiftGP) -> Tensor:
    """Correlation (p x p) between metrics of their scaled leave-one-out residuals, shrunk towards none."""
    mean, variance = gp.leave_one_out()
    residual = (gp.Y - mean) / variance.sqrt()  # n x p
    second = residual.T @ residual
    size = second.diagonal().clamp_min(1e-12).sqrt()
    n, p = residual.shape
    return (n * second / size[:, None] / size + PRIOR_RUNS * torch.eye(p, dtype=torch.float64)) / (n + PRIOR_RUNS)
