"""The level of the best result at scales that were never run, from the best of each scale that was.

    level = Level.fit(places, value, sd)        # c cells, log2 of their scales over the target's on m axes
    mean, sd = level.predict([0.0, 0.0])        # at the target
    draws = level.draws([0.0, 0.0], 1024)

The best loss at a scale is a power law of each axis with a common floor, and a smooth deviation from it:

    y(s) = L - sum_a B_a (1 - 2^(-alpha_a (s_a - c_a))) / (alpha_a ln 2) + deviation(s),   c the middle of the cells,

L the loss there and B_a what the first doubling of axis a takes off it. It is the law of Hoffmann et al. 2022 (arXiv
2203.15556, eq. 2) in other letters. Given the exponents and the size of the deviation everything is Gaussian and in
closed form (kriging with a law for its trend); these few numbers have priors and are averaged over by importance
sampling. So what a handful of cells cannot tell stays open: one cell gives a wide answer, six a narrow one, and far
from all of them it is wide again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, logsumexp, ndtri
from scipy.stats import qmc

from search_spaces.parameter import Array

#: What a doubling on every axis takes off the loss in the middle of the cells, as a share of it, and its standard
#: deviation: 4% for models of 1e9 parameters to 17% for 1e6 by the fit of Hoffmann et al. 2022.
FALL, FALL_SD = 0.08, 0.08
#: Exponents of the law: a median and a factor, one standard deviation (Hoffmann et al. 2022 have 0.34 and 0.28).
EXPONENT, EXPONENT_FACTOR = 0.3, 1.5
#: Standard deviation of the deviation, as a share of the loss: a median and a factor. It is Matern-5/2, over so many
#: octaves; what single cells deviate beside it, as a share of it.
DEVIATION, DEVIATION_FACTOR = 0.005, 3.0
OCTAVES, OWN = 4.0, 0.25
#: A law that has grown e to this between two cells is out of the question; further on it counts as that.
STEEPEST = 9.0
#: Keep laws that are out of the question from being singular: relative to what is inverted, and absolute.
JITTER, TINY = 1e-13, 1e-300
#: Laws that are averaged over, a power of 2; the rounds in which they are drawn nearer to what the cells leave open,
#: until this share of them counts, and how many have to count for the next round.
LAWS, ROUNDS, ENOUGH, FEW = 1024, 8, 0.3, 32


@dataclass(frozen=True, eq=False)
class Level:
    """What c cells tell of the best result at any scale; smaller results are better.

    places: c x m. value, sd: c, the best results and how well they are known. Where all results are > 0 the law's floor
    is too; a metric that may be negative has no such floor.
    """

    places: Array = field(repr=False)
    value: Array
    sd: Array

    @classmethod
    def fit(cls, places: npt.ArrayLike, value: npt.ArrayLike, sd: npt.ArrayLike) -> Level:
        """ValueError for no cells, arrays that do not fit each other, what is not finite, and a sd below 0."""
        S, y, e = (np.asarray(given, dtype=np.float64) for given in (places, value, sd))
        if S.ndim != 2 or not len(S) or y.shape != (len(S),) or e.shape != y.shape:
            raise ValueError(
                f"Level needs c x m places, c values and c sd, got shapes {S.shape}, {y.shape}, {e.shape}."
            )
        if not (np.isfinite(S).all() and np.isfinite(y).all() and np.isfinite(e).all() and (e >= 0).all()):
            raise ValueError(f"Level needs finite places and values and sd >= 0, got {y.tolist()} and {e.tolist()}.")
        if len(np.unique(S, axis=0)) < len(S):
            raise ValueError(
                f"Level needs one result for each place, got {len(S)} for {len(np.unique(S, axis=0))} places."
            )
        return cls(S, y, e)

    def predict(self, place: npt.ArrayLike) -> tuple[float, float]:
        """Mean and standard deviation of the best result at a place (m), of the noise-free result of that one cell."""
        mean, variance, weight = self._at(place)
        centre = weight @ mean
        spread = math.sqrt(weight @ (variance + (mean - centre) ** 2))
        return float(centre * self._unit), float(spread * self._unit)

    def draws(self, place: npt.ArrayLike, count: int) -> Array:
        """`count` draws of the same, evenly spread and in no particular order; count: a power of 2.

        How far results are off their law is itself hardly known, so tails are long, and a normal distribution with
        that standard deviation has too wide an interval of 90%.
        """
        mean, variance, weight = self._at(place)
        which, normal = qmc.Sobol(2, seed=0).random(count).T
        law = np.searchsorted(np.cumsum(weight)[:-1], which)
        return np.asarray((mean[law] + np.sqrt(variance[law]) * ndtri(normal)) * self._unit)

    def _at(self, place: npt.ArrayLike) -> tuple[Array, Array, Array]:
        """Mean and variance by each law, in units of the mean result, and how likely it is: K each."""
        at = np.asarray(place, dtype=np.float64)[None]
        if at.shape[1:] != self.places.shape[1:]:
            raise ValueError(f"Level needs a place of {self.places.shape[1]} axes, got the shape {at.shape[1:]}.")
        laws, weight = self._average
        return *laws.at(at), weight

    @cached_property
    def _unit(self) -> float:
        return float(np.abs(self.value).mean()) or 1.0

    @cached_property
    def _average(self) -> tuple[_Laws, Array]:
        """K laws, and how likely the cells leave each.

        A normal is fitted to the posterior in a few rounds, from the prior on (Cappe et al. 2004, "Population Monte
        Carlo"); the points are Sobol's, so that equal cells give equal answers.
        """
        m = self.places.shape[1]
        normal = ndtri(qmc.Sobol(m + 1, seed=0).random(LAWS))
        centre, root = np.zeros(m + 1), np.eye(m + 1)
        for _ in range(ROUNDS):
            u = centre + normal @ root.T  # K x (m + 1), a priori standard normal
            alpha, amplitude = EXPONENT * EXPONENT_FACTOR ** u[:, :m], DEVIATION * DEVIATION_FACTOR ** u[:, m]
            laws = _Laws(self.places, self.value / self._unit, self.sd / self._unit, alpha, amplitude)
            log_weight = laws.log_likelihood - 0.5 * (u**2 - normal**2).sum(axis=1)
            weight = np.exp(log_weight - logsumexp(log_weight))
            if _count(weight) > ENOUGH * LAWS:
                break
            rough, power = weight, 1.0
            while _count(rough) < FEW:  # no normal is fitted to fewer: what they say is taken less literally
                power /= 2
                rough = np.exp(power * log_weight - logsumexp(power * log_weight))
            centre = rough @ u
            covariance = (u - centre).T @ (rough[:, None] * (u - centre))
            root = np.linalg.cholesky(2 * covariance + 1e-3 * np.eye(m + 1))  # too wide is safe, too narrow is not
        return laws, weight


def _count(weight: Array) -> float:
    """How many equally likely laws weigh as much (Kish 1965)."""
    return float(1 / (weight**2).sum())


@dataclass(frozen=True, eq=False)
class _Laws:
    """K laws given c cells: with exponents alpha (K x m) and the size of the deviation (K) the rest is Gaussian.

    It is a Gaussian process with an explicit basis (Rasmussen & Williams 2006, section 2.7), of h = 1 + m functions: L
    flat a priori, B not. `plane` turns the cells (c x c) so that their covariance about the law is diagonal in every
    law at once, amplitude^2 + `noise` (c): so K laws cost little more than one.

    places: c x m. y, sd: c, results and their standard deviations in units of their mean size.
    """

    places: Array
    y: Array
    sd: Array
    alpha: Array
    amplitude: Array

    @cached_property
    def plane(self) -> tuple[Array, Array]:
        own = _matern(self.places, self.places) + OWN**2 * np.eye(len(self.y))
        inverse = np.linalg.inv(np.linalg.cholesky(own))
        noise, turn = np.linalg.eigh(inverse @ np.diag(self.sd**2) @ inverse.T)
        return turn.T @ inverse, np.maximum(noise, 0.0)

    @cached_property
    def precision(self) -> Array:
        """Of a turned cell about the law: K x c."""
        return np.asarray(1 / (self.amplitude[:, None] ** 2 + self.plane[1]))

    @cached_property
    def turned(self) -> tuple[Array, Array]:
        """The results (c) and what L and B count for in them (K x c x h), turned."""
        return self.plane[0] @ self.y, self.plane[0] @ self.basis(self.places)

    @cached_property
    def coefficients(self) -> tuple[Array, Array]:
        """Posterior mean (K x h) and covariance (K x h x h) of L and B."""
        (y, H), (mean, inverse) = self.turned, self.prior
        weighted = H * self.precision[..., None]
        precision = inverse + weighted.swapaxes(1, 2) @ H
        size = np.einsum("khh->k", precision)[:, None, None]
        covariance = np.linalg.inv(precision + JITTER * size * np.eye(len(mean)))
        return np.einsum("khi,ki->kh", covariance, inverse @ mean + weighted.swapaxes(1, 2) @ y), np.asarray(covariance)

    @property
    def prior(self) -> tuple[Array, Array]:
        """Mean (h) and inverse covariance (h x h) of L and of the falls B."""
        m = self.places.shape[1]
        return np.array([0.0] + [FALL / m] * m), np.diag([0.0] + [m / FALL_SD**2] * m)

    @cached_property
    def log_likelihood(self) -> Array:
        """Of the cells, and where all results are > 0 of the law's floor to be so too: K, up to a constant."""
        (y, H), (prior, inverse), (mean, covariance) = self.turned, self.prior, self.coefficients
        rest, moved = y - np.einsum("kch,kh->kc", H, mean), mean - prior
        found: Array = 0.5 * (np.log(self.precision).sum(-1) + np.linalg.slogdet(covariance)[1])
        found = found - 0.5 * ((self.precision * rest**2).sum(-1) + np.einsum("kh,hi,ki->k", moved, inverse, moved))
        if (self.y > 0).all():
            limit = np.insert(-1 / (self.alpha * math.log(2)), 0, 1.0, axis=1)  # what L and B count for in the floor
            spread = np.sqrt(np.maximum(np.einsum("kh,khi,ki->k", limit, covariance, limit), TINY))
            found = found + log_ndtr((limit * mean).sum(-1) / spread)
        return found

    def at(self, place: Array) -> tuple[Array, Array]:
        """Mean and variance (K each) of the result of a cell at a 1 x m place."""
        (y, H), (mean, covariance) = self.turned, self.coefficients
        same = (self.places == place).all(axis=1)
        near = self.plane[0] @ (_matern(self.places, place)[:, 0] + OWN**2 * same)  # c
        amplitude2 = self.amplitude[:, None] ** 2
        known = amplitude2 * self.precision * near  # K x c, weights of the turned cells
        rest = self.basis(place)[:, 0] - np.einsum("kc,kch->kh", known, H)
        variance = self.amplitude**2 * (1 + OWN**2 - (known * near).sum(-1))
        total = variance + np.einsum("kh,khi,ki->k", rest, covariance, rest)
        return known @ y + (rest * mean).sum(-1), np.maximum(total, 0.0)

    def basis(self, places: Array) -> Array:
        """What L and each B count for at b x m places: K x b x h."""
        rate = math.log(2) * self.alpha[:, None]
        fallen = np.expm1(np.minimum(-rate * (places - self.places.mean(axis=0)), STEEPEST)) / rate
        return np.insert(fallen, 0, 1.0, axis=2)


def _matern(a: Array, b: Array) -> Array:
    """Matern-5/2 correlation of the deviation at b x m and c x m places: b x c."""
    r = math.sqrt(5) / OCTAVES * np.linalg.norm(a[:, None] - b[None], axis=-1)
    return np.asarray((1 + r + r**2 / 3) * np.exp(-r))
