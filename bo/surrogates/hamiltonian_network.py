"""A Bayesian neural network by Hamiltonian Monte Carlo: functions drawn from the posterior of a small tanh network.

Neal 2011, "MCMC using Hamiltonian dynamics"; found best among stochastic networks by Li et al. 2023, arXiv 2305.20028.
Several chains run side by side for every metric, each with a step size of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.process import Coordinates, Process, Standard
from bo.surrogates.sampled import sampled

#: Median and log-sd of the priors of the standard deviations: of a unit's slope over the space, of the function, of the
#: noise, all for standardised outcomes.
SLOPE, SIZE, NOISE = (2.0, 0.7), (1.5, 0.7), (0.06, 1.0)
#: The least noise that is considered, a standard deviation: with less, steps are too short to get anywhere.
LEAST = 0.01
#: Acceptance that step sizes are set for, and the leapfrog steps of a proposal: a uniform number up to this one.
TARGET, LEAPS = 0.8, 12
#: Steps downhill before chains start.
DESCENT = 100
#: Functions kept, at most.
KEPT = 128


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    *,
    width: int = 24,
    chains: int = 4,
    burn: int = 100,
    draws: int = 100,
) -> Process:
    """`draws` of each of `chains` chains after `burn` proposals, thinned; draws from torch's generator.

    One hidden layer of `width` units, standard normal priors. Given the hidden units the outer weights are a linear
    regression: they are integrated out on the way, and drawn exactly at the end. What `memory` returns has the
    acceptance of each chain and the step sizes; `start` is not used. Leave-one-out weighs the functions by one over the
    likelihood of the run left out, truncated (Ionides 2008, "Truncated importance sampling").
    """
    coordinates, standard = Coordinates.of(features, inputs), Standard.of(Y)
    x, target = coordinates(inputs), standard(Y)
    p, D = Y.shape[-1], x.shape[-1]
    c = p * chains
    wanted = target.T.repeat_interleave(chains, 0)  # c x n
    sizes = [D * width, width, 3]

    def hidden(x: Tensor, theta: Tensor) -> Tensor:
        """The hidden units, times the size of their sum, at b x D points under m x W raw numbers: m x b x width."""
        inner, bias, scales = torch.split(theta, sizes, dim=-1)
        slope = SLOPE[0] * (SLOPE[1] * scales[:, 0, None, None]).exp()
        size = SIZE[0] * (SIZE[1] * scales[:, 1, None, None]).exp()
        found: Tensor = torch.tanh((x @ inner.reshape(-1, D, width) + bias[:, None]) * slope) * size / math.sqrt(width)
        return found

    def noise(theta: Tensor) -> Tensor:
        """Variance under m x W raw numbers: m."""
        return (LEAST + NOISE[0] * (NOISE[1] * theta[:, -1]).exp()).square()

    def regression(theta: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of m x n outcomes on hidden units: the factor L of the precision of the outer weights, L^-1 H'y / noise, and
        which of the m cannot be factorised."""
        H, variance = hidden(x, theta), noise(theta)[:, None, None]
        L, failed = torch.linalg.cholesky_ex(torch.eye(width, dtype=torch.float64) + H.mT @ H / variance)
        return L, torch.linalg.solve_triangular(L, H.mT @ wanted[..., None] / variance, upper=False), failed > 0

    def log_density(theta: Tensor) -> Tensor:
        L, half, failed = regression(theta, wanted)
        variance = noise(theta)
        explained = half.square().sum((-2, -1)) - wanted.square().sum(-1) / variance
        volume = L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * len(x) * variance.log()
        return torch.where(failed, -math.inf, 0.5 * explained - volume - 0.5 * theta.square().sum(-1))

    begin = _descended(log_density, 0.3 * torch.randn(c, sum(sizes), dtype=torch.float64))
    kept, accepted, step = hamiltonian(log_density, begin, burn, draws)  # draws x c x W
    thin = max(1, math.ceil(draws * chains / KEPT))
    theta = kept[::thin].reshape(-1, p, chains, kept.shape[-1]).transpose(0, 1).reshape(p, -1, kept.shape[-1])
    s = theta.shape[1]
    theta = theta.reshape(p * s, -1)
    L, half, _ = regression(theta, target.T.repeat_interleave(s, 0))
    outer = torch.linalg.solve_triangular(L.mT, half + torch.randn(half.shape, dtype=torch.float64), upper=True)
    variance = noise(theta).reshape(p, s)

    def members(at: Inputs) -> Tensor:
        found: Tensor = (hidden(coordinates(at), theta) @ outer).reshape(p, s, -1)
        return found

    return sampled(
        features,
        coordinates,
        inputs,
        members,
        standard,
        variance.mean(1),
        weighted_out(members(inputs), target, variance),
        {"acceptance": [round(value, 4) for value in accepted.tolist()], "step": [round(v, 6) for v in step.tolist()]},
    )


def hamiltonian(
    log_density: Callable[[Tensor], Tensor], theta: Tensor, burn: int, draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chains (c x W) with step sizes by dual averaging: draws x c x W, acceptance after burning in (c), step sizes (c).

    Hoffman & Gelman 2014, "The no-U-turn sampler", section 3.2.
    """

    def slope(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        value = log_density(theta)
        (gradient,) = torch.autograd.grad(value.sum(), theta)
        return value.detach(), gradient

    c = len(theta)
    value, gradient = slope(theta)
    centre = torch.full((c,), math.log(0.1), dtype=torch.float64)  # log step sizes are pulled towards ten times 0.01
    log_step, average, surplus = centre - math.log(10), torch.zeros_like(centre), torch.zeros_like(centre)
    kept, accepted = [], torch.zeros_like(centre)
    for t in range(1, burn + draws + 1):
        step = (log_step if t <= burn else average).exp()[:, None]
        momentum = torch.randn(theta.shape, dtype=torch.float64)
        energy = value - 0.5 * momentum.square().sum(-1)
        to, to_gradient, to_value = theta, gradient, value
        for _ in range(int(torch.randint(1, LEAPS + 1, ()))):
            momentum = momentum + 0.5 * step * to_gradient
            to = to + step * momentum
            to_value, to_gradient = slope(to)
            momentum = momentum + 0.5 * step * to_gradient
        # A way that ended nowhere is one that is not taken.
        change = (to_value - 0.5 * momentum.square().sum(-1) - energy).nan_to_num(-math.inf, -math.inf, -math.inf)
        chance = change.clamp_max(0).exp()
        taken = torch.rand(c, dtype=torch.float64) < chance
        theta, gradient = (torch.where(taken[:, None], a, b) for a, b in ((to, theta), (to_gradient, gradient)))
        value = torch.where(taken, to_value, value)
        if t <= burn:
            surplus = (1 - 1 / (t + 10)) * surplus + (TARGET - chance) / (t + 10)
            log_step = centre - math.sqrt(t) / 0.05 * surplus
            average = t**-0.75 * log_step + (1 - t**-0.75) * average
        else:
            kept.append(theta)
            accepted = accepted + chance / draws
    return torch.stack(kept), accepted, average.exp()


def _descended(log_density: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Near a mode, by Adam."""
    theta = theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(DESCENT):
        (theta.grad,) = torch.autograd.grad(-log_density(theta).sum(), theta)
        optimizer.step()
    return theta.detach()


def weighted_out(found: Tensor, target: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Leave-one-out mean and variance (n x p each) from functions (p x s x n) and their noise variances (p x s)."""
    log_weight = 0.5 * (found - target.T[:, None]).square() / noise[..., None] + 0.5 * noise[..., None].log()
    weight = torch.softmax(log_weight, 1).clamp_max(found.shape[1] ** -0.5)  # sqrt(s) times the mean weight
    weight = weight / weight.sum(1, keepdim=True)
    mean = (weight * found).sum(1)
    variance = (weight * ((found - mean[:, None]).square() + noise[..., None])).sum(1)
    return mean.T, variance.T
