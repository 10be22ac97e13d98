"""Loss against scale: parametric laws fitted to finished runs, with predictions and intervals.

    fit = fit_loss("chinchilla", {"params": N, "tokens": D}, losses)
    fit.constants["alpha"], fit.predict({"params": 7e10, "tokens": 1.4e12})

Each law is a sum of powers of the scale, so its logarithm is a log-sum-exp of terms that are linear in the coefficients
theta: log L = logsumexp_k T_k(scale) . theta, with log-constants and exponents in theta. A new law is one row of FORMS.
For the level that a study is likely to reach at a scale that it never ran, from a handful of cells, see `level`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from search_spaces.parameter import Array, suggestion

#: Of the Huber loss on log L: residuals beyond a tenth of a percent count by their size, not its square.
DELTA = 1e-3
RESAMPLES = 200
COVERAGE = 0.9
#: Points of the grid of starts that a fit starts from: those with the least objective.
STARTS = 8
#: The grid: exponents as of Hoffmann et al. 2022, appendix D.3, with small ones added, and what share of the median
#: loss a term has in the middle of the runs (theirs are of constants at N = D = 1, which depend on the units).
EXPONENTS = (0.05, 0.2, 0.5, 1.0, 2.0)
SHARES = (0.02, 0.1, 0.3, 0.6, 0.95)


class Form(NamedTuple):
    """A law of the loss: L = sum of its terms, each a constant times powers of the axes."""

    axes: tuple[str, ...]
    constants: tuple[str, ...]
    """One for each term; the first is the irreducible loss."""
    powers: tuple[str, ...]
    """The exponents, all > 0."""
    terms: Callable[[Array], Array]
    """n x m natural logarithms of the scale to n x k x e: how log term k goes with exponent e."""


def _chinchilla(logs: Array) -> Array:
    zero = np.zeros(len(logs))
    rows = [[zero, zero], [-logs[:, 0], zero], [zero, -logs[:, 1]]]
    return np.moveaxis(np.array(rows), -1, 0)


def _power(logs: Array) -> Array:
    return np.stack([np.zeros_like(logs), -logs], axis=1)


def _overtrained(logs: Array) -> Array:
    log_c, log_m = math.log(6) + logs.sum(axis=1), logs[:, 1] - logs[:, 0]
    rows = [[np.zeros(len(logs))], [log_m - log_c], [-log_m - log_c]]
    return np.moveaxis(np.array(rows), -1, 0)


#: Laws of the loss by name.
FORMS: dict[str, Form] = {
    # E + A / N^alpha + B / D^beta, Hoffmann et al. 2022, arXiv 2203.15556, eq. 2
    "chinchilla": Form(("params", "tokens"), ("E", "A", "B"), ("alpha", "beta"), _chinchilla),
    # E + A / x^alpha, of any one axis
    "power": Form(("scale",), ("E", "A"), ("alpha",), _power),
    # E + (a M^eta + b M^-eta) C^-eta, M = D / N, C = 6 N D, Gadre et al. 2024, arXiv 2403.08540
    "overtrained": Form(("params", "tokens"), ("E", "a", "b"), ("eta",), _overtrained),
}


class Prediction(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LossFit:
    """A fitted law. Its intervals of 90% are of the law itself, by bootstrap over the runs, not of a run about it.

    With hardly more scales than the law has numbers they are far too narrow; `level` is for such few cells.
    """

    form: str
    axes: tuple[str, ...]
    """The names of the axes, as the runs have them."""
    theta: tuple[float, ...]
    """log of each constant, then the exponents."""
    resampled: tuple[tuple[float, ...], ...] = field(repr=False)
    """theta of each bootstrap sample."""
    scatter: float
    """Root mean square of the residuals of log L."""

    @property
    def constants(self) -> dict[str, float]:
        """The numbers of the law by name: constants in units of the loss, exponents."""
        return _named(FORMS[self.form], np.array(self.theta))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Name -> ends of the interval of a number of the law."""
        drawn = [_named(FORMS[self.form], np.array(theta)) for theta in self.resampled]
        return {name: _interval([numbers[name] for numbers in drawn]) for name in self.constants}

    def predict(self, scale: Mapping[str, float]) -> Prediction:
        """The loss at a scale; ValueError for a scale that lacks an axis or has a value that is not > 0."""
        terms = FORMS[self.form].terms(_logs({axis: [scale[axis]] for axis in self.axes if axis in scale}, self.axes))
        value, *drawn = (math.exp(float(_log_loss(np.array(t), terms)[0][0])) for t in (self.theta, *self.resampled))
        return Prediction(value, *_interval(drawn))


def fit_loss(
    form: str,
    scales: Mapping[str, npt.ArrayLike],
    losses: npt.ArrayLike,
    *,
    delta: float = DELTA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LossFit:
    """The law `form` of FORMS fitted to n runs: Huber loss on log L, from many starts (Hoffmann et al. 2022, D.3).

    scales: axis -> n values > 0; the law of one axis takes any name. losses: n, finite and > 0; give the best run of
    each scale, or runs with settings that were tuned. Of the grid, the STARTS best points are climbed from, each until
    it converges (the published fit stopped early, Besiroglu et al. 2024, arXiv 2404.10102). ValueError for an unknown
    law, other axes than it has, and fewer different scales than the law has numbers.
    """
    if form not in FORMS:
        raise ValueError(
            f"There is no law of the loss {form!r}; {suggestion(form, FORMS, f'there are {list(FORMS)}.')}"
        )
    law, y = FORMS[form], np.asarray(losses, dtype=np.float64)
    axes = tuple(scales) if form == "power" and len(scales) == 1 else law.axes
    logs = _logs(scales, axes)
    if y.shape != (len(logs),) or not (np.isfinite(y).all() and (y > 0).all()):
        raise ValueError(f"The law needs a finite loss > 0 for each of the {len(logs)} runs, got {y.tolist()}.")
    numbers, there = len(law.constants) + len(law.powers), len(np.unique(logs, axis=0))
    if there < numbers:
        raise ValueError(f"The law {form!r} has {numbers} numbers and needs runs at as many scales, got {there}.")
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta must be a finite number > 0, got {delta!r}.")
    terms, log_y = law.terms(logs), np.log(y)
    # In the middle of the runs all terms are shares of the loss, whatever the units; the fit is the same elsewhere.
    centre = terms.mean(axis=0)  # k x e
    middled, level = terms - centre, float(np.median(log_y))
    theta = _fit(_grid(law, level), middled, log_y, delta)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(len(y), size=len(y))
        drawn.append(_climbed(theta, middled[rows], log_y[rows], delta))
    residual = _log_loss(theta, middled)[0] - log_y
    found, *rest = (tuple(_shifted(t, centre).tolist()) for t in (theta, *drawn))
    return LossFit(form, axes, found, tuple(rest), float(np.sqrt(np.mean(residual**2))))


def compute_optimal(fitted: LossFit, flops: float) -> dict[str, float]:
    """params and tokens with the least loss at C = 6 N D, under a fit of "chinchilla" (Hoffmann et al. 2022, eq. 4).

    ValueError for another law and for flops that are not > 0.
    """
    if fitted.form != "chinchilla":
        raise ValueError(f"compute_optimal needs a fit of 'chinchilla', got one of {fitted.form!r}.")
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"compute_optimal needs a finite number of operations > 0, got {flops!r}.")
    c = fitted.constants
    total = c["alpha"] + c["beta"]
    ratio = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (1 / total)
    params = ratio * (flops / 6) ** (c["beta"] / total)
    return {"params": params, "tokens": flops / 6 / params}


def _named(law: Form, theta: Array) -> dict[str, float]:
    k = len(law.constants)
    return dict(zip((*law.constants, *law.powers), [*np.exp(theta[:k]).tolist(), *theta[k:].tolist()], strict=True))


def _logs(scales: Mapping[str, npt.ArrayLike], axes: Sequence[str]) -> Array:
    """n x m natural logarithms."""
    if set(scales) != set(axes):
        raise ValueError(f"The law has the axes {list(axes)}, got {list(scales)}.")
    columns = [np.asarray(scales[axis], dtype=np.float64) for axis in axes]
    if any(column.ndim != 1 or column.shape != columns[0].shape for column in columns):
        raise ValueError(f"The law needs as many values on each axis, got the shapes {[c.shape for c in columns]}.")
    if not all(np.isfinite(column).all() and (column > 0).all() for column in columns):
        raise ValueError(f"The law needs finite values > 0 on the axes {list(axes)}.")
    return np.log(np.stack(columns, axis=1))


def _log_loss(theta: Array, terms: Array) -> tuple[Array, Array]:
    """log L of n runs (n), and its slope in theta (n x (k + e))."""
    k = terms.shape[1]
    each = theta[:k] + terms @ theta[k:]  # n x k
    top = each.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(each - top).sum(axis=1))
    share = np.exp(each - log_sum[:, None])
    return log_sum, np.concatenate([share, np.einsum("nk,nke->ne", share, terms)], axis=1)


def _objective(theta: Array, terms: Array, log_y: Array, delta: float) -> float:
    """Sum over runs of the Huber loss of log L, in units of delta^2."""
    z = np.abs(_log_loss(theta, terms)[0] - log_y) / delta
    return float(np.where(z <= 1, 0.5 * z**2, z - 0.5).sum())


def _climbed(start: Array, terms: Array, log_y: Array, delta: float) -> Array:
    """The least objective near a start, by a trust-region Gauss-Newton method: L-BFGS crawls along this valley."""
    k = terms.shape[1]
    low, high = np.where(np.arange(len(start)) < k, -40.0, 0.0), np.where(np.arange(len(start)) < k, 40.0, 10.0)
    found = least_squares(
        lambda theta: _log_loss(theta, terms)[0] - log_y,
        start,
        lambda theta: _log_loss(theta, terms)[1],
        (low, high),
        loss="huber",
        f_scale=delta,
        x_scale="jac",
        max_nfev=500,
    )
    return np.asarray(found.x)


def _grid(law: Form, level: float) -> Array:
    """Starts, G x (k + e)."""
    shares = itertools.product(np.log(SHARES) + level, repeat=len(law.constants))
    powers = list(itertools.product(EXPONENTS, repeat=len(law.powers)))
    return np.array([(*share, *power) for share in shares for power in powers])


def _fit(starts: Array, terms: Array, log_y: Array, delta: float) -> Array:
    def value(theta: Array) -> float:
        return _objective(theta, terms, log_y, delta)

    order = np.argsort([value(start) for start in starts], kind="stable")[:STARTS]
    return min((_climbed(starts[i], terms, log_y, delta) for i in order), key=value)


def _shifted(theta: Array, centre: Array) -> Array:
    """theta for terms as they are, of theta for terms less their mean."""
    k = len(centre)
    return np.concatenate([theta[:k] - centre @ theta[k:], theta[k:]])


def _interval(drawn: Sequence[float]) -> tuple[float, float]:
    if not drawn:
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
