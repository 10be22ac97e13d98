"""The usual Gaussian process, averaged over what few runs leave open about its hyperparameters.

Snoek et al. 2012, "Practical Bayesian Optimization of Machine Learning Algorithms", section 3.2. Draws come from a
short Hamiltonian chain for each metric that starts at the maximum a posteriori, in coordinates in which the posterior
about it is as wide in every direction: there one trajectory of a quarter turn is a draw of its own.

After few runs it foretells others better than one process does, and its intervals are truer; but searches by it were no
shorter and took three times the seconds (experiments/hyperparameter_averaging.py), so it is not the usual one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import gp
from bo.surrogates import surrogate as surrogates
from bo.surrogates.ensemble import Ensemble
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess, LogPosterior
from bo.surrogates.surrogate import Surrogate
from search_spaces.parameter import Array

#: Runs for each coordinate up to which hyperparameters are averaged: more leave little open.
FEW = 10
#: Trajectories before the first draw, and from one draw to the next.
BURN, THIN = 4, 2
#: Leapfrog steps of a trajectory, and how far they go together: a quarter turn, where the density is round and normal.
LEAPS, TURN = 4, math.pi / 2
#: Bounds that one leapfrog step may meet.
BOUNCES = 20
#: Half the step of differences of the gradient, in raw numbers.
STEP = 1e-3
#: The least precision that is believed of a direction; priors alone have about 0.2 and more.
FLAT = 0.1


def fit(
    features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None, draws: int = 12
) -> Surrogate:
    """Maximum a posteriori, then the mixture of `draws` processes with hyperparameters drawn from their posterior.

    Draws from torch's generator. With more than FEW runs for each coordinate, or with runs at several scales, it is the
    usual process by itself. The power of shares, which all metrics have in common, keeps its fitted value. ValueError
    for less than one draw; NumericalError when nothing could be fitted.
    """
    if draws < 1:
        raise ValueError(f"Averaging needs at least 1 draw of the hyperparameters, got {draws}.")
    n, p = Y.shape
    if n > FEW * len(features.space.columns) or inputs.across:
        return surrogates.fit("gp", features, inputs, Y, start)
    mode = gp.fit(features, inputs, Y, start)
    layout, F = mode.layout, mode.F
    free = np.array([block.name != "power" for block in layout.blocks for _ in range(block.size)])
    bounds = np.array(layout.bounds)[free].T
    raw = mode.theta.mean(0).numpy().copy()  # the power, as `Layout.hyper` takes it; the rest is filled in
    theta = mode.theta.repeat(draws, 1, 1)  # draws x p x H
    for i in range(p):
        posterior = LogPosterior(layout, F, Y[:, [i]].numpy())

        def loss(part: Array, posterior: LogPosterior = posterior) -> tuple[float, Array]:
            raw[free] = part
            value, gradient = posterior.loss(raw)
            # Priors are of lengthscales, not of their logarithms, which are drawn: those have a factor l more.
            gradient[: layout.G] -= 1
            return value - float(raw[: layout.G].sum()), gradient[free]

        theta[:, i, torch.from_numpy(free)] = torch.from_numpy(chain(loss, mode.theta[i].numpy()[free], bounds, draws))
    members = tuple(GaussianProcess.given(features, layout, each, F, Y, n) for each in theta)
    return Ensemble(members, torch.full((p, draws), 1 / draws, dtype=torch.float64), mode.memory())


def chain(loss: Callable[[Array], tuple[float, Array]], begin: Array, bounds: Array, draws: int) -> Array:
    """Draws (draws x H) from the density exp(-loss) within bounds (2 x H), from torch's generator.

    loss: its value and gradient at H numbers. begin: near where it is least. Neal 2011, "MCMC using Hamiltonian
    dynamics", section 2, and 5.1 for bounds.
    """
    root, at, (value, gradient) = spread(loss, begin), begin, loss(begin)
    total, kept = BURN + THIN * draws, []
    momenta = torch.randn(total, len(begin), dtype=torch.float64).numpy()
    chances, lengths = torch.rand(2, total, dtype=torch.float64).numpy()
    for t, momentum in enumerate(momenta):
        # Of different lengths, lest some direction comes back to where it was.
        step = TURN / LEAPS * (0.7 + 0.6 * lengths[t])
        energy = value + 0.5 * float(momentum @ momentum)
        to, to_value, slope = at, value, gradient
        for _ in range(LEAPS):
            to, momentum = moved(to, momentum - 0.5 * step * (slope @ root), step, root, bounds)
            to_value, slope = loss(to)
            momentum = momentum - 0.5 * step * (slope @ root)
        if chances[t] < math.exp(min(0.0, energy - to_value - 0.5 * float(momentum @ momentum))):
            at, value, gradient = to, to_value, slope
        if t >= BURN and (t - BURN) % THIN == THIN - 1:
            kept.append(at)
    return np.array(kept)


def moved(at: Array, momentum: Array, time: float, root: Array, bounds: Array) -> tuple[Array, Array]:
    """Where a straight way of that time ends, thrown back by the bounds it meets, and the momentum it ends with."""
    for _ in range(BOUNCES):
        speed = root @ momentum
        with np.errstate(divide="ignore", invalid="ignore"):
            until = np.where(speed == 0, math.inf, (np.where(speed > 0, bounds[1], bounds[0]) - at) / speed)
        first = int(until.argmin())
        if until[first] >= time:
            break
        at = at + until[first] * speed
        at[first] = bounds[int(speed[first] > 0), first]
        time -= until[first]
        momentum = momentum - 2 * speed[first] / float(root[first] @ root[first]) * root[first]
    else:
        time = 0.0  # in a corner; the draw may be the worse for it
    return np.clip(at + time * (root @ momentum), *bounds), momentum


def spread(loss: Callable[[Array], tuple[float, Array]], at: Array) -> Array:
    """A root R of the covariance R R' that the normal density with the curvature at a point has: H x H."""
    steps = STEP * np.eye(len(at))
    curvature = np.array([loss(at + step)[1] - loss(at - step)[1] for step in steps]) / (2 * STEP)
    precision, axes = np.linalg.eigh((curvature + curvature.T) / 2)
    return np.asarray(axes / np.sqrt(np.maximum(precision, FLAT)))
