"""Deep kernel learning: a Gaussian process over what a small network makes of the features, learned together.

Wilson et al. 2016, "Deep kernel learning". With 10 to 50 runs a network learns them by heart (Ober et al. 2021, "The
promises and pitfalls of deep kernel learning"), so here the features themselves stay coordinates beside its outputs,
its weights have a prior, the outputs begin all but unseen, and the ascent is short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bo.surrogates import process
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import MEAN_VARIANCE, NumericalError
from bo.surrogates.process import Coordinates, Process, Standard, lift, log_normal, matern

#: Median and log-sd of the priors: variance of the process, of the noise, and how far the network moves points.
AMPLITUDE, NOISE, REACH = (2.0, 1.0), (4e-3, 1.0), (0.3, 1.0)
#: Prior standard deviation of a weight about where it began: about zero, hundreds of weights would all end there.
AWAY = 0.3
#: Lengthscales are at most and at least so much.
BOUNDS = (0.03, 30.0)
#: The outputs of the network.
OUTPUTS = 2


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    *,
    width: int = 16,
    iterations: int = 80,
) -> Process:
    """Maximum a posteriori weights and hyperparameters by one L-BFGS-B run; draws weights from torch's generator.

    z = (x / lengthscale, reach g(x)), g a tanh network with two hidden layers of `width` units, covariance Matern-5/2
    of z. start: what `memory` of an earlier fit returned; it has the hyperparameters, weights are learned anew.
    NumericalError when a covariance cannot be factorised.
    """
    coordinates, standard = Coordinates.of(features, inputs), Standard.of(Y)
    x, target = coordinates(inputs), standard(Y)
    p, D, groups = Y.shape[-1], x.shape[-1], torch.tensor(features.groups)
    extra = D - len(groups)  # the scale axes
    G = int(groups.max()) + 1 + extra
    of = torch.cat([groups, G - extra + torch.arange(extra)])
    stretch = math.sqrt(max(1.0, G / 2))  # as the lengthscales of the default process
    sizes = (D, width, width, OUTPUTS)
    shapes = [(i + 1, o) for i, o in pairwise(sizes)]  # the last row is the bias
    H = G + 3
    weights = torch.randn(sum(i * o for i, o in shapes), dtype=torch.float64)

    def network(x: Tensor, weights: Tensor) -> Tensor:
        """b x D points under p x W standard normal weights: p x b x OUTPUTS."""
        y = 2 * math.sqrt(3) * x.expand(p, *x.shape)
        parts = torch.split(weights, [i * o for i, o in shapes], dim=-1)
        for layer, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            W = part.reshape(p, *shape)
            fan_in = min(G, shape[0] - 1) if layer == 0 else shape[0] - 1
            y = (torch.tanh(y) if layer else y) @ W[:, :-1] / math.sqrt(fan_in) + W[:, -1:]
        return y

    def embedded(x: Tensor, theta: Tensor) -> Tensor:
        lengthscale, reach = theta[:, :G].exp(), theta[:, G + 2].exp()
        moved = network(x, theta[:, H:]) * lift(reach, x.expand(p, *x.shape))
        return torch.cat([x / lengthscale[:, None, of], moved], dim=-1)

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
        u, amplitude, noise = embedded(x, theta), theta[:, G].exp(), theta[:, G + 1].exp()
        value = process.log_likelihood(
            amplitude[:, None, None] * matern(u, u) + MEAN_VARIANCE, target, noise, amplitude
        )
        value = value + (2 * theta[:, :G] - 6 * theta[:, :G].exp() / stretch).sum(-1)  # Gamma(3, 6) times the stretch
        for i, prior in enumerate((AMPLITUDE, NOISE, REACH)):
            value = value + log_normal(theta[:, G + i], *prior)
        value = -(value - 0.5 * ((theta[:, H:] - weights) / AWAY).square().sum(-1)).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)

    centre = np.log([*[0.5 * stretch] * G, AMPLITUDE[0], NOISE[0], REACH[0] / 3])
    starts = [np.tile(np.concatenate([centre, weights.numpy()]), p)]
    earlier = np.array((start or {}).get("theta", []), dtype=np.float64)
    if earlier.shape == (p, H) and np.isfinite(earlier).all():
        starts.append(np.concatenate([np.concatenate([row, weights.numpy()]) for row in earlier]))
    best = min(starts, key=lambda raw: loss(raw)[0])
    bounds = (
        [tuple(np.log(BOUNDS))] * G + [(value - 7, value + 6) for value in centre[G:]] + [(None, None)] * len(weights)
    )
    options = {"maxiter": iterations, "ftol": 1e-7}
    found = minimize(loss, best, jac=True, method="L-BFGS-B", bounds=bounds * p, options=options).x
    if not np.isfinite(found).all():
        raise NumericalError("The fit of the deep kernel ended at values that are not finite.")
    theta = torch.tensor(found.reshape(p, -1))
    scale = standard.sd.square()
    amplitude, noise = theta[:, G].exp() * scale, theta[:, G + 1].exp() * scale

    return process.conditioned(
        features,
        standard.mean,
        lambda at: embedded(coordinates(at), theta),
        lambda u, v: lift(amplitude, u) * matern(u, v) + lift(MEAN_VARIANCE * scale, u),
        inputs,
        Y,
        amplitude,
        noise,
        {"theta": [[round(value, 6) for value in row] for row in theta[:, :H].tolist()]},
    )
