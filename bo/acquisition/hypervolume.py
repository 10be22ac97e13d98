"""Expected hypervolume improvement: what a run adds to the front of several objectives.

Runs are noisy and some are pending, so nobody knows the front: it is drawn from the joint posterior at the points that
ran or will. Given a draw every objective is Gaussian, so the expected volume that a point adds to it is in closed form,
a sum over the boxes of which the space above the front is made. (Daulton, Balandat, Bakshy, "Parallel Bayesian
Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement", NeurIPS 2021, eq. 4, who sample the
last step too; boxes as in Yang et al., J. Glob. Optim. 75, 2019; logarithms as in Ament et al., arXiv 2310.20708.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.log_ei import log_h
from bo.acquisition.samples import joint, known, normals, posterior_mean, whole
from bo.dataset import undominated
from bo.objective import reference_point
from bo.surrogates.composite import Belief, Composite, combined
from search_spaces import Scale

LOG = True
#: Draws of the front, and points that may be on it, at most.
SAMPLES, MOST = 16, 64
#: Deviations above its mean at which a point could still be on the front.
REACH = 2.0
#: Least variance that is left at a point given the drawn ones, relative to the largest of theirs.
LEAST = 1e-8


def objectives(model: Composite, scale: Scale) -> tuple[Belief, ...]:
    """What is believed of each objective of a Pareto study at one scale; larger is better, in user units up to a shift.

    They differ in nothing but their weights. A model conditioned on pending runs gives beliefs that are.
    """
    outcome, belief = model.data.outcome, model.at(scale)
    _, gain = outcome.affine(outcome.level(belief.place))
    return tuple(replace(belief, weight=part * gain) for part in outcome.parts)


def reference(model: Composite, scale: Scale) -> Tensor | None:
    """What each objective has to beat, in the units of `objectives`: k. None where the study names no reference."""
    outcome = model.data.outcome
    if outcome.reference is None:
        return None
    shift, _ = outcome.affine(outcome.level(model.data.place(scale)))
    return outcome.parts @ shift - outcome.reference


def make(
    situation: Situation,
    *,
    beliefs: Sequence[Belief],
    reference: Tensor | None = None,
    points: Tensor | None = None,
    samples: int = SAMPLES,
    most: int = MOST,
) -> Acquisition:
    """log E[volume that one run adds to the front], in the product of the objectives' units.

    beliefs: of k >= 2 objectives, conditioned on the pending runs: `objectives` of the believed model, which differ in
    nothing but their weights, so that the model is asked once for all. Given their draws at `points` (n x d; by default
    all that were tried or are pending; under limits pass those that keep them) they are taken to be independent.
    reference: k; by default a tenth of the range beyond the front of posterior means. At most `most` points take part,
    those likeliest to be on the front. While there are none, it is the posterior mean of the balanced sum. ValueError
    for `samples` or `most` that are no whole numbers above zero.
    """
    whole("samples", samples)
    whole("most", most)
    points = known(situation) if points is None else points
    if not len(points):
        return posterior_mean(situation.believed)
    points = points[promising(beliefs, points, most)]
    mean, roots = zip(*(joint(belief, points) for belief in beliefs), strict=True)
    if reference is None:
        reference = inferred(torch.stack(mean, dim=-1))
    normal = normals(situation.rng, samples, len(beliefs) * len(points)).reshape(samples, len(beliefs), len(points))
    drawn = torch.stack([m + normal[:, k] @ root.T for k, (m, root) in enumerate(zip(mean, roots, strict=True))], -1)
    low, high = padded([boxes(front, reference) for front in drawn])  # s x c x k each
    floors = [LEAST * root.square().sum(-1).max() for root in roots]

    surrogate, ran = beliefs[0].surrogate, beliefs[0].inputs(points)
    stretched = [belief.stretch(surrogate.posterior(ran)[1]).detach() for belief in beliefs]  # n each

    def acquisition(X: Tensor) -> Tensor:
        at = beliefs[0].inputs(X)
        (metrics, variance), shared = surrogate.posterior(at), surrogate.covariance(at, ran)  # p x b (x n)
        total = torch.zeros((), dtype=torch.float64)
        for k, (belief, root) in enumerate(zip(beliefs, roots, strict=True)):
            between = torch.einsum("p,pbn->nb", belief.weight.square(), shared)
            between = stretched[k][:, None] * between * belief.stretch(variance)
            half = torch.linalg.solve_triangular(root, between, upper=False)  # n x b
            spread = combined(belief.weight, variance, belief.correlation)
            rest = (spread - half.square().sum(0)).clamp_min(floors[k]).sqrt()  # b
            given = belief.weight @ metrics + normal[:, k] @ half  # s x b
            total = total + log_between(given.T[..., None], rest[:, None, None], low[..., k], high[..., k])
        return total.flatten(1).logsumexp(-1) - math.log(samples)  # b x s x c -> b

    return acquisition


def log_between(mean: Tensor, sd: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """log E[min(max(f, low), high) - low] for f ~ N(mean, sd^2), broadcast: the length that f beats between two bounds.

    `high` may be infinite. It is log(EI(low) - EI(high)), from logarithms alone.
    """
    least = log_h((mean - low) / sd)
    bounded = torch.isfinite(high)
    if not bounded.any():
        return sd.log() + least
    top = torch.where(bounded, high, low + 1e9 * sd)
    ratio = (log_h((mean - top) / sd) - least).clamp_max(-1e-15)  # log EI(high) / EI(low)
    return sd.log() + least + torch.log(-torch.expm1(ratio))


def boxes(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Disjoint boxes that make up what is above `reference` (k) and that none of n x k points beats; larger is better.

    Lower and upper corners, c x k each, infinite where open; n + 1 boxes for two objectives. By slices along the last
    objective: in each, those points count that reach above it.
    """
    inside = values[(values > reference).all(-1)]
    if len(reference) == 1 or not len(inside):
        low = torch.cat([inside, reference[None]]).max(0).values[None]
        return low, torch.full_like(low, math.inf)
    inside = inside[undominated(-inside)]
    levels = reference.new_tensor([float(reference[-1]), *sorted(set(inside[:, -1].tolist())), math.inf])
    lows, highs = [], []
    for bottom, top in pairwise(levels):
        low, high = boxes(inside[inside[:, -1] > bottom][:, :-1], reference[:-1])
        lows.append(torch.cat([low, bottom.expand(len(low), 1)], dim=-1))
        highs.append(torch.cat([high, top.expand(len(high), 1)], dim=-1))
    return torch.cat(lows), torch.cat(highs)


def padded(made: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Boxes of s fronts (c_i x k) as s x c x k, with empty boxes where a front has fewer."""
    count = max(len(low) for low, _ in made)

    def filled(corner: Tensor, low: Tensor) -> Tensor:
        return torch.cat([corner, low[-1].expand(count - len(low), -1)])

    return torch.stack([filled(low, low) for low, _ in made]), torch.stack([filled(high, low) for low, high in made])


def promising(beliefs: Sequence[Belief], X: Tensor, most: int) -> Tensor:
    """Which of n x d points could be on the front by REACH deviations: n booleans; the `most` that reach furthest."""
    with torch.no_grad():
        each = [belief.value(X) for belief in beliefs]
    mean = torch.stack([mean for mean, _ in each], dim=-1)  # n x k
    top = mean + REACH * torch.stack([sd for _, sd in each], dim=-1)
    front = mean[undominated(-mean)]
    depth = beaten_by(top, front)
    keep = depth <= 0
    if int(keep.sum()) > most:
        order = torch.argsort(beaten_by(mean, front), stable=True)
        keep = torch.zeros_like(keep)
        keep[order[:most]] = True
    return keep


def leaders(beliefs: Sequence[Belief], X: Tensor, count: int = 10) -> Tensor:
    """Up to `count` of n x d points that are on the front of the posterior means, or nearest to it."""
    with torch.no_grad():
        mean = torch.stack([belief.value(X)[0] for belief in beliefs], dim=-1)
    return X[torch.argsort(beaten_by(mean, mean[undominated(-mean)]), stable=True)[:count]]


def beaten_by(values: Tensor, front: Tensor) -> Tensor:
    """By how much some point of the front beats each of n x k values in all objectives, in the front's ranges: n."""
    size = (front.max(0).values - front.min(0).values).clamp_min(1e-12)
    return ((front[None] - values[:, None]) / size).min(-1).values.max(-1).values


def inferred(mean: Tensor) -> Tensor:
    """The reference (k) of n x k posterior means by the rule of `bo.objective.reference_point`."""
    front = -mean[undominated(-mean)]
    return -torch.tensor(reference_point([tuple(row) for row in front.tolist()]), dtype=torch.float64)
