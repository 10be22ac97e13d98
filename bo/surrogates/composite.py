"""The posterior of the objective: a weighted sum of one Gaussian process a metric, or another function of them.

Losses of single domains are smooth functions of a mixture, their weighted sum is what counts, and a sum of Gaussian
processes is Gaussian: mean and variance are analytic. The metrics of one run move together, so the variance is
w' Sigma(x) w with the correlation between metrics estimated from leave-one-out residuals.

That holds as far as the metrics' transform is affine. It compresses what explodes, and a sum of compressed metrics is
no compressed sum: one domain that explodes would hardly count beside a dozen that do not. Expected improvement of such
a sum would be that of another objective, so it is not computed: once a run that is bad looks good in it (`additive`),
the transform is undone on samples, as for objectives that are no sums (`bo.surrogates.nonlinear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from bo.dataset import Z90 as Z90
from bo.dataset import Dataset, Level, coincide
from bo.surrogates import nonlinear
from bo.surrogates import surrogate as surrogates
from bo.surrogates.belief import Belief as Belief
from bo.surrogates.belief import combined as combined
from bo.surrogates.features import Features
from bo.surrogates.surrogate import Surrogate
from search_spaces import Scale

#: Runs' worth of belief that residuals of different metrics are uncorrelated.
PRIOR_RUNS = 4.0
#: Excess over the best, in that of a good run, from which on a run that looks good is mistaken for one.
MISTAKEN = 2.0


@dataclass(frozen=True)
class Prediction:
    """The objective of a run, in minimised user units, with a 90% interval that includes the noise of the run."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Composite:
    """The objective over the space at any scale, given a dataset.

    correlation: p x p, between metrics. additive: whether the objective is a sum of what is modelled; ValueError where
    it is said to be one and is not.
    """

    data: Dataset
    gp: Surrogate
    correlation: Tensor
    additive: bool = True

    def __post_init__(self) -> None:
        if self.additive and not additive(self.data):
            raise ValueError(
                "The objective is no sum of its metrics as they are modelled, so expected improvement cannot add them "
                "up; fit the model by composite.fit, which looks at it by samples."
            )

    def at(self, scale: Scale) -> Belief:
        """The objective at one scale: what acquisitions are made of."""
        return self.around(self.data.place(scale))

    def around(self, place: Tensor) -> Belief:
        """The objective at a place (m,), which may be that of another study."""
        outcome = self.data.outcome
        level, cell = outcome.level(place), self._cell(place)
        _, gain = outcome.affine(level)
        belief = Belief(self.gp, place, cell, outcome.weight * gain, self.correlation)
        if self.additive:
            return belief
        least = outcome.least[cell] if outcome.least is not None and cell < len(outcome.least) else None
        return nonlinear.NonlinearBelief.over(belief, outcome, level, self.data.Y, least)

    def predict(self, x: Tensor, scale: Scale) -> Prediction:
        """What a run of the encoded configuration (d,) at a scale will measure."""
        outcome, belief = self.data.outcome, self.at(scale)
        # Hyperparameters are a point estimate; Student's t stands in for what a few runs leave open about them.
        here = int((self.data.at(scale) & ~self.data.diverged).sum())
        wide = float(stdtrit(here + 2, 0.95))
        if isinstance(belief, nonlinear.NonlinearBelief):
            return Prediction(*belief.interval(x, wide / Z90))
        mean, variance = self.gp.posterior(belief.inputs(x[None]))
        level = outcome.foretold(self.data.place(scale))
        # Beyond the cap the map back to user units is not affine; its slope at the mean serves for the interval.
        metrics, slope = outcome.backward(mean[:, 0], level)
        noisy = combined(outcome.weight * slope, variance + self.gp.noise[:, None], self.correlation)[0]
        within = wide**2 * noisy
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


def fit(
    data: Dataset,
    start: Mapping[str, Any] | None = None,
    surrogate: str = "gp",
    drift: Mapping[tuple[str, str], tuple[float, float]] | None = None,
) -> Composite:
    """The model of a dataset with at least one finite run; `start` is an earlier fit's `memory`.

    drift: what is believed of drifts, as `Features` takes it.
    """
    features = Features(data.space, drift or {})
    gp = surrogates.fit(surrogate, features, features(data.X, data.S, data.cell), data.Y, start)
    return Composite(data, gp, correlation(gp, data.Y), additive(data))


def additive(data: Dataset) -> bool:
    """Whether the objective is a sum of what is modelled, as far as it matters.

    A sum of transformed metrics is one where no run that is bad is good by it. Of one metric it always is: that orders
    runs as its transform does.
    """
    outcome = data.outcome
    if outcome.columns is not None and outcome.columns.nonlinear is not None:
        return False
    if outcome.least is None or outcome.reach is None or len(outcome.parts) > 1 or len(outcome.sd) - outcome.limits < 2:
        return True
    least, level = outcome.least[data.cell], Level(outcome.best[data.cell], torch.zeros_like(data.Y))
    shift, gain = outcome.affine(level)
    size = least if outcome.relative else torch.ones_like(least)
    seems = ((shift - gain * data.Y) @ outcome.weight - least) / size
    true = (outcome.backward(data.Y, level)[0] @ outcome.weight - least) / size
    return not bool(((seems <= outcome.reach) & (true > MISTAKEN * outcome.reach)).any())


def correlation(gp: Surrogate, Y: Tensor) -> Tensor:
    """Correlation (p x p) between metrics of their scaled leave-one-out residuals, shrunk towards none."""
    if Y.shape[-1] == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    mean, variance = gp.leave_one_out()
    residual = (Y - mean) / variance.sqrt()  # n x p
    second = residual.T @ residual
    size = second.diagonal().clamp_min(1e-12).sqrt()
    n = len(residual)
    shrunk: Tensor = n / (n + PRIOR_RUNS) * second / size[:, None] / size
    return shrunk.fill_diagonal_(1.0)  # also that of a metric that never misses
