"""What a run at any scale is worth to the search at the target.

A run at (x, s) measures y(x, s), and f(x', target) is correlated with it. So the run moves what is believed of the
target, and its worth is that of the same criteria there: how much higher the best posterior mean at the target will be
(Wu et al., "Practical Multi-fidelity Bayesian Optimization for Hyperparameter Tuning", arXiv 1903.04703), how much it
tells about the height of the optimum (Takeno et al., "Multi-fidelity Bayesian Optimization with Max-value Entropy
Search", arXiv 1901.08275), or the improvement as far as the run tells of it (Huang et al. 2006, "Sequential kriging
optimization using multiple-fidelity evaluations", eq. 10). A search divides it by what the run costs.

A run may pass smaller scales on its way, as a training passes fewer steps: what it measures there comes for free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.knowledge_gradient import DRAWS, NOTHING, POINTS, log_gain, peaks
from bo.acquisition.log_ei import log_ei
from bo.acquisition.max_value_entropy import HIGH, log_information
from bo.acquisition.samples import candidates, joint, known, whole
from bo.surrogates.composite import Belief
from bo.surrogates.features import Inputs
from bo.surrogates.nonlinear import NonlinearBelief

#: Draws of the maximum, and nodes of the integral over what a run measures.
SAMPLES, NODES = 16, 48
#: Scales that one run may measure, and outcomes of what it tells in each direction but the one in which it tells most.
MOST, OUTCOMES = 3, 5
#: Points whose covariances with themselves at another scale are computed at once.
BLOCK = 128
#: Relative jitter of the covariance of what one run measures.
JITTER = 1e-9
#: Deviations around the middle beyond which a normal density, and what is multiplied by it, is nothing.
FAR = 8.5
#: A maximum so many deviations below the mean is as far as it goes.
LOWEST = -4.0
#: What a correlation may be at most, and the least information: below, its logarithm would be one of rounding errors.
CLOSEST, LEAST = 1 - 1e-9, 1e-14


@dataclass(frozen=True)
class Run:
    """What one run would measure: the objective at its own scale, which comes first, and at those that it passes.

    beliefs: of k scales, conditioned on the same runs.
    """

    beliefs: tuple[Belief, ...]

    def effect(self, target: Belief, X: Tensor, A: Tensor) -> Tensor:
        """What runs at X (b x d) do to the posterior mean at the target, at A (m x d) and at x itself.

        Slopes in k independent standard normals, that is in what is measured, whitened: b x (m + 1) x k. Luck at
        different scales is taken to be independent.
        """
        crossed = torch.stack([across(belief, target, X, A) for belief in self.beliefs], dim=-1)
        root = torch.linalg.cholesky(self.measured(X))
        slopes: Tensor = torch.linalg.solve_triangular(root, crossed.mT, upper=False).mT
        return slopes

    def measured(self, X: Tensor) -> Tensor:
        """Covariance of what runs at b points measure, noise included: b x k x k."""
        k = len(self.beliefs)
        noise = torch.stack([belief.noise for belief in self.beliefs])
        rows = [[self.together(max(i, j), min(i, j), X) for j in range(k)] for i in range(k)]
        covariance = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        size = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        return covariance + torch.diag_embed(noise + JITTER * size)

    def together(self, i: int, j: int, X: Tensor) -> Tensor:
        """Covariance of the objective at two of the scales, at b points: b."""
        if i == j:
            return self.beliefs[i].value(X)[1].square()
        return across(self.beliefs[i], self.beliefs[j], X, X[:0])[:, 0]


class Utility(Protocol):
    """How the worth of runs is made: once for all scales, then for one of them.

    It is a logarithm, in nats per nothing: the cost of the run is not in it.
    """

    def __call__(self, situation: Situation) -> Callable[[Run], Acquisition]:
        """situation: at the target; `tried` are the configurations that ran at any scale."""


def knowledge_gradient(situation: Situation, points: int = POINTS, draws: int = DRAWS) -> Callable[[Run], Acquisition]:
    """log of how much higher the best posterior mean at the target will be: over x and fixed points, see `peaks`.

    Exact for a run that measures one scale. What several tell is turned, so that the direction which moves the means
    most is exact. ValueError for `points` or `draws` that are no whole numbers above zero.
    """
    target = situation.believed
    A = peaks(situation, whole("points", points), whole("draws", draws))
    with torch.no_grad():
        now = target.mean(A)
    best = now.max()

    def utility(run: Run) -> Acquisition:
        def acquisition(X: Tensor) -> Tensor:
            level = torch.cat([now.expand(len(X), -1), target.mean(X)[:, None]], dim=-1)
            return log_gain_of_several(level, run.effect(target, X, A), best)

        return acquisition

    return utility


def log_gain_of_several(a: Tensor, B: Tensor, best: Tensor) -> Tensor:
    """log(E max_i(a_i + B_i Z) - best) for b x m levels and their slopes (b x m x k) in k standard normals: b.

    best: what is there already, at most max_i a_i. Exact in the leading direction of Z, by Gauss-Hermite in the others.
    """
    k = B.shape[-1]
    if k == 1:
        return log_gain(a, B[..., 0], best)
    # A slope that all lines share changes no expectation: without that of the best line, none falls below it.
    top = a.detach().argmax(-1)[:, None, None].expand(-1, -1, k)
    B = B - B.gather(1, top)
    with torch.no_grad():
        turn = torch.linalg.eigh(B.mT @ B).eigenvectors  # b x k x k, the leading direction last
    B = B @ turn
    nodes, weights = np.polynomial.hermite_e.hermegauss(OUTCOMES)
    Z = torch.cartesian_prod(*[torch.as_tensor(nodes)] * (k - 1)).reshape(-1, k - 1)  # s x (k - 1)
    share = torch.cartesian_prod(*[torch.as_tensor(weights / weights.sum())] * (k - 1)).reshape(-1, k - 1).prod(-1)
    moved = a[:, None] + torch.einsum("bmk,sk->bsm", B[..., :-1], Z)  # b x s x m
    slope = B[:, None, :, -1].expand_as(moved)
    each = log_gain(moved.flatten(0, 1), slope.flatten(0, 1), best).reshape(moved.shape[:2])
    return (each + share.log()).logsumexp(-1)


def beyond(whole: Acquisition, least: Acquisition) -> Acquisition:
    """log of what a run is worth beyond another one that costs next to nothing, of the logarithms of both.

    The numerator of Wu et al., arXiv 1903.04703, section 3.3: where value and cost vanish together, their ratio need
    not, and a search would linger there.
    """

    def acquisition(X: Tensor) -> Tensor:
        value, little = whole(X), least(X)
        more = value.detach() > little.detach()
        share = torch.where(more, little - value, -1.0).exp()
        return torch.where(more, value + torch.log1p(-share.clamp_max(1 - 1e-15)), NOTHING)

    return acquisition


def max_value_entropy(
    situation: Situation, points: int = POINTS, samples: int = SAMPLES
) -> Callable[[Run], Acquisition]:
    """log of the information, in nats, that a run has about how far the optimum at the target is ahead.

    Takeno et al. 2020, arXiv 1901.08275, section 3.1, averaged over `samples` draws of f*, the maximum of joint draws
    at `points` candidates and all configurations known. Everything is measured from the best posterior mean: how high
    all losses at the target lie tells nothing about where to look, and before the first run there nothing else would
    be asked for. Where that configuration ran without noise this is the criterion as published. ValueError for
    `points` or `samples` that are no whole numbers above zero.
    """
    whole("samples", samples)
    target = situation.believed
    Z = torch.cat([candidates(situation, whole("points", points)), known(situation)])
    mean, root = joint(target, Z)
    normal = torch.as_tensor(situation.rng.standard_normal((samples, len(Z))))
    drawn = mean + normal @ root.T  # s x k
    top = mean.argmax()
    maximum = (drawn - drawn[:, top, None]).amax(-1)  # s

    def utility(run: Run) -> Acquisition:
        def acquisition(X: Tensor) -> Tensor:
            ahead, sd, told = improvement(run, target, Z[top], X)
            gamma = (maximum[:, None] - ahead) / sd  # s x b
            return log_information_between(gamma, told).logsumexp(0) - math.log(samples)

        return acquisition

    return utility


def ei_cooled(situation: Situation) -> Callable[[Run], Acquisition]:
    """log of the improvement expected at the target, times its correlation with what the run measures.

    Huang et al. 2006, eq. 10: posterior correlation with a noisy run is both their factors, since it falls where a run
    would only repeat what is known. It improves on the best posterior mean among the configurations known.
    """
    target, points = situation.believed, known(situation)
    with torch.no_grad():
        top = points[target.mean(points).argmax()]

    def utility(run: Run) -> Acquisition:
        def acquisition(X: Tensor) -> Tensor:
            ahead, sd, told = improvement(run, target, top, X)
            return log_ei(ahead, sd, 0.0) + told.log()

        return acquisition

    return utility


def improvement(run: Run, target: Belief, top: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of f(x) - f(top) at the target: mean, deviation, and its correlation with all that a run at x measures, b each.

    top: d. The correlation is the multiple one, in (0, 1).
    """
    mean, covariance = target.joint(torch.stack([X, top.expand_as(X)], dim=1))  # b x 2, b x 2 x 2
    own = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    variance = (own - 2 * covariance[:, 0, 1]).clamp_min(1e-9 * own.detach().abs() + 1e-300)
    effect = run.effect(target, X, top[None])  # b x 2 x k
    moved = (effect[:, 1] - effect[:, 0]).square().sum(-1)
    told = (moved / variance).clamp(LEAST, CLOSEST).sqrt()
    return mean[:, 0] - mean[:, 1], variance.sqrt(), told


def log_information_between(gamma: Tensor, rho: Tensor) -> Tensor:
    """log of the information, in nats, that y has about f <= f*, elementwise.

    gamma = (f* - mean) / sd of f, s x b; rho: correlation of f and y, in (0, 1), b. With u the standardised y its
    density is p(u) = phi(u) Phi(z) / Phi(gamma), z = (gamma - rho u) / sqrt(1 - rho^2), and the loss of entropy is

        rho^2 gamma r / 2 - log Phi(gamma) + E_p log Phi(z),   r = phi(gamma) / Phi(gamma)

    (Takeno et al. 2020, eq. 7, where the first part is that of the normal density in closed form). For rho = 1 it is
    that of max-value entropy search. The integral is a trapezoidal sum over where it is not nothing. For gamma above
    HIGH, where hardly anything is left to tell, it falls as that of f itself.
    """
    rho = rho.expand_as(gamma)
    near, rest = gamma.clamp(LOWEST, HIGH), (1 - rho.square()).sqrt()
    log_below = torch.special.log_ndtr(near)
    ratio = (-0.5 * near.square() - 0.5 * math.log(2 * math.pi) - log_below).exp()
    with torch.no_grad():  # beyond these ends there is nothing, so where they lie has no slope
        middle = -rho * ratio  # of u, which varies by at most one about it
        low = torch.maximum(middle - FAR, (near - FAR * rest) / rho)  # below, Phi(z) is one
        high = torch.minimum(middle + FAR, (near + FAR * rest) / rho)  # above, it is zero
        step = (high - low) / (NODES - 1)
        u = low[..., None] + step[..., None] * torch.arange(NODES, dtype=torch.float64)
    log_phi = torch.special.log_ndtr((near[..., None] - rho[..., None] * u) / rest[..., None])
    density = (-0.5 * u.square() - 0.5 * math.log(2 * math.pi) + log_phi - log_below[..., None]).exp()
    told: Tensor = 0.5 * rho.square() * near * ratio - log_below + (density * log_phi).sum(-1) * step
    return told.clamp_min(LEAST).log() + log_information(gamma.clamp_min(HIGH)) - LAST


#: The logarithm of what f tells about f <= f* where it is HIGH.
LAST = float(log_information(torch.tensor(HIGH, dtype=torch.float64)))


def across(one: Belief, other: Belief, X: Tensor, A: Tensor) -> Tensor:
    """Posterior covariance of the objective at X (b x d) of one scale with that of another at A (m x d) and at X.

    b x (m + 1), the last column for each point with itself.
    """
    parts = [between(one, x, other, torch.cat([A, x])) for x in torch.split(X, BLOCK)]
    return torch.cat([torch.cat([part[:, : len(A)], part[:, len(A) :].diagonal()[:, None]], -1) for part in parts])


def between(one: Belief, X: Tensor, other: Belief, Z: Tensor) -> Tensor:
    """Posterior covariance of the objective at X (b x d) of one scale with that at Z (k x d) of another: b x k."""
    at, there = one.inputs(X), other.inputs(Z)
    covariance = one.surrogate.covariance(at, there)  # p x b x k
    return torch.einsum("pb,pbk,pk->bk", worth(one, at), covariance, worth(other, there))


def worth(belief: Belief, at: Inputs) -> Tensor:
    """Slopes of the objective in the metrics at b points, such that they carry all its deviation: p x b."""
    if isinstance(belief, NonlinearBelief):
        return belief.moments(*belief.surrogate.posterior(at))[2]
    if len(belief.weight) == 1:
        return belief.weight[:, None].expand(-1, len(at))
    return belief.weight[:, None] * belief.stretch(belief.surrogate.posterior(at)[1])


#: Every criterion over scales that a study can name.
UTILITIES: dict[str, Utility] = {
    "knowledge_gradient": knowledge_gradient,
    "max_value_entropy": max_value_entropy,
    "ei_cooled": ei_cooled,
}
