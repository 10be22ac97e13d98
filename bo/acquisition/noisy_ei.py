"""Expected improvement under noise, in both senses: over the means of evaluated points, and over what they may be.

Where runs are noisy nobody knows what the best run achieved. Frazier's noisy EI asks how much higher the best posterior
mean among evaluated points will be; Letham's asks for classical EI and averages it over the posterior of the incumbent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.knowledge_gradient import lines, log_gain
from bo.acquisition.log_ei import log_ei
from bo.acquisition.samples import joint, known, normals, posterior_mean, promising, whole
from bo.surrogates.composite import Belief

LOG = True
#: Evaluated points that may set the incumbent, at most.
MOST = 100
SAMPLES = 64
#: Least variance that is left at a point given the evaluated ones, relative to the largest of theirs.
LEAST = 1e-8


def make_evaluated(situation: Situation, most: int = MOST) -> Acquisition:
    """log E[max_{i <= n + 1} mu_{n+1}(x_i) - max_{i <= n} mu_n(x_i) | x_{n+1} = x], exactly.

    Frazier, "A Tutorial on Bayesian Optimization", arXiv 1807.02811, section 4.1, for an analyst who returns one of the
    evaluated points. Pending runs are evaluated points that are believed. At most `most` points take part, those that
    could be best. While there are none, it is the posterior mean. ValueError for another `most`.
    """
    whole("most", most)
    points, belief = known(situation), situation.believed
    if not len(points):
        return posterior_mean(belief)
    points = points[promising(belief, points, most)]
    now = belief.value(points)[0].detach()
    best = now.max()

    def acquisition(X: Tensor) -> Tensor:
        return log_gain(*lines(belief, X, points, now), best)

    return acquisition


def make_integrated(situation: Situation, samples: int = SAMPLES, most: int = MOST) -> Acquisition:
    """log of classical EI averaged over the joint posterior of the objective at tried and pending points.

    Letham et al., "Constrained Bayesian Optimization with Noisy Experiments", arXiv 1706.07094, eq. 4. While there are
    no such points, it is the posterior mean. ValueError for `samples` or `most` that are no whole numbers above zero.
    """
    whole("samples", samples)
    whole("most", most)
    points, belief = known(situation), situation.belief
    if not len(points):
        return posterior_mean(belief)
    points = points[promising(belief, points, most)]
    return integrated(belief, points, normals(situation.rng, samples, len(points)))


def integrated(belief: Belief, points: Tensor, normal: Tensor, least: Tensor | float = -math.inf) -> Acquisition:
    """log E[max(f(x) - max(f(points), least), 0)], where f(points) (k x d) is drawn with s x k standard normals.

    Given a draw at the points f(x) is Gaussian, so that each of the s expectations is in closed form.
    """
    mean, root = joint(belief, points)
    best = (mean + normal @ root.T).max(-1).values.clamp_min(least)  # s
    floor = LEAST * root.square().sum(-1).max()

    def acquisition(X: Tensor) -> Tensor:
        at, sd = belief.value(X)
        half = torch.linalg.solve_triangular(root, belief.covariance(X, points).T, upper=False)  # k x b
        rest = (sd.square() - half.square().sum(0)).clamp_min(floor).sqrt()
        each = log_ei(at + normal @ half, rest, best[:, None])  # s x b
        return each.logsumexp(0) - math.log(len(normal))

    return acquisition
