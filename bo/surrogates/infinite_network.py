"""A Bayesian network of infinite width: a Gaussian process with the arc-cosine kernel of a deep ReLU network.

Cho & Saul 2009, "Kernel methods for deep learning"; Lee et al. 2018, "Deep neural networks as Gaussian processes". It
is not stationary, and wiggles on the scale of the whole space only, which is meant for many dimensions. Depth and the
centres of the priors are those of Li et al. 2023, "A study of Bayesian neural network surrogates", arXiv 2305.20028.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bo.surrogates import process
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import NumericalError
from bo.surrogates.process import Coordinates, Process, Standard, lift, log_normal

#: Median and log-sd of the priors: variance of weights (times fan-in) and of biases, of the process, of the noise, and
#: how much more or less than the others a feature counts.
WEIGHT, BIAS, AMPLITUDE, NOISE, RELEVANCE = (10.0, 1.0), (1.3, 1.0), (2.0, 1.0), (4e-3, 1.0), (1.0, 0.25)
#: Keeps the angle of two points away from 0 and pi, where its derivative is infinite.
EDGE = 1e-12


def arc_cosine(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, depth: int) -> Tensor:
    """Covariance of the outputs of a ReLU network at ... x n x D and ... x k x D points: ... x n x k.

    Weights have variance `weight` over the fan-in (D at first), biases `bias`. Cho & Saul 2009, eq. 6 with degree 1.
    """
    D = u.shape[-1]
    K = weight * (u @ v.mT) / D + bias
    a = weight * u.square().sum(-1)[..., :, None] / D + bias  # ... x n x 1
    b = weight * v.square().sum(-1)[..., None, :] / D + bias  # ... x 1 x k
    for _ in range(depth):
        root = (a * b).sqrt()
        cosine = (K / root).clamp(EDGE - 1, 1 - EDGE)
        angle = torch.acos(cosine)
        K = weight / (2 * math.pi) * root * (torch.sin(angle) + (math.pi - angle) * cosine) + bias
        a, b = weight * a / 2 + bias, weight * b / 2 + bias
    return K


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    *,
    depth: int = 3,
    iterations: int = 60,
) -> Process:
    """Maximum a posteriori variances, one L-BFGS-B run over all metrics; `start` is what `memory` of a fit returned.

    The variance of the process is a hyperparameter of its own, so those of weights and biases make its shape alone.
    NumericalError when a covariance cannot be factorised.
    """
    coordinates, standard = Coordinates.of(features, inputs), Standard.of(Y)
    x, target = coordinates(inputs), standard(Y)
    p, groups = Y.shape[-1], torch.tensor(features.groups)
    D = x.shape[-1]
    extra = D - len(groups)  # the scale axes
    G = int(groups.max()) + 1 + extra
    of = torch.cat([groups, G - extra + torch.arange(extra)])
    centre = np.log([WEIGHT[0], BIAS[0], AMPLITUDE[0], NOISE[0], *[RELEVANCE[0]] * G])

    def kernel(u: Tensor, v: Tensor, weight: Tensor, bias: Tensor, amplitude: Tensor) -> Tensor:
        # At a point that lies as far out as an average one a network of one layer more has this variance.
        typical = weight / 3 + bias
        for _ in range(depth):
            typical = weight * typical / 2 + bias
        K = arc_cosine(u, v, lift(weight, u), lift(bias, u), depth)
        return K * lift(amplitude / typical, u)

    def embedded(x: Tensor, relevance: Tensor) -> Tensor:
        # Numbers within +-1, squares a third on average; the columns of an option or a curve count as one.
        return 2 * x * relevance[:, None, of] * math.sqrt(D / G)

    def loss(raw: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(raw.reshape(p, -1), requires_grad=True)
        weight, bias, amplitude, noise = theta.exp().unbind(-1)[:4]
        u = embedded(x, theta[:, 4:].exp())
        value = process.log_likelihood(kernel(u, u, weight, bias, amplitude), target, noise, amplitude)
        for i, prior in enumerate((WEIGHT, BIAS, AMPLITUDE, NOISE)):
            value = value + log_normal(theta[:, i], *prior)
        value = -(value + log_normal(theta[:, 4:], *RELEVANCE).sum(-1)).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), gradient.numpy().reshape(-1)

    starts = [np.tile(centre, p)]
    earlier = np.array((start or {}).get("theta", []), dtype=np.float64)
    if earlier.shape == (p, len(centre)) and np.isfinite(earlier).all():
        starts.append(earlier.reshape(-1))
    bounds = [(value - 6, value + 6) for value in np.tile(centre, p)]
    best = min(starts, key=lambda raw: loss(raw)[0])
    options = {"maxiter": iterations, "ftol": 1e-7}
    found = minimize(loss, best, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    if not np.isfinite(found).all():
        raise NumericalError("The fit of the infinite network ended at values that are not finite.")
    theta = torch.tensor(found.reshape(p, -1))
    weight, bias, amplitude, noise = theta.exp().unbind(-1)[:4]
    relevance, scale = theta[:, 4:].exp(), standard.sd.square()

    return process.conditioned(
        features,
        standard.mean,
        lambda at: embedded(coordinates(at), relevance),
        lambda u, v: kernel(u, v, weight, bias, amplitude * scale),
        inputs,
        Y,
        amplitude * scale,
        noise * scale,
        {"theta": [[round(value, 6) for value in row] for row in theta.tolist()]},
    )
