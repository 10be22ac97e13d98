"""Knowledge gradient: how much higher the best posterior mean over the space will be after a run at x.

Given a run at x, the posterior mean at x' moves along a line in one standard normal Z: a(x') + b(x') Z with a the mean
now and b = cov(x', x) / sqrt(var(x) + noise) (Frazier, "A Tutorial on Bayesian Optimization", arXiv 1807.02811, section
4.2). Over finitely many x' the expected maximum is exact; the three criteria differ in which x' they look at. Pending
runs are believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.log_ei import log_h
from bo.acquisition.samples import candidates, joint, known, whole
from bo.surrogates.composite import Belief
from search_spaces import Space

LOG = True
#: Candidates, and draws over them, whose maximisers are where the best posterior mean may come to lie.
POINTS, DRAWS = 512, 64
#: Fantasies whose best points `make` climbs to, and its steps.
QUANTILES, STEPS = 5, 5
#: Fantasies of `make_one_shot`, and its steps.
FANTASIES, LONG = 8, 8
#: The logarithm of no gain at all.
NOTHING = -1e12
#: Length of the first step of a climb, and of the longest one, in ranges.
FIRST, LONGEST = 0.05, 0.2


def make_discrete(situation: Situation, points: int = POINTS, draws: int = DRAWS) -> Acquisition:
    """log of the exact knowledge gradient over x itself and a fixed set of points, see `peaks`.

    ValueError for `points` or `draws` that are no whole numbers above zero.
    """
    belief = situation.believed
    A = peaks(situation, whole("points", points), whole("draws", draws))
    now = belief.value(A)[0].detach()
    best = now.max()

    def acquisition(X: Tensor) -> Tensor:
        return log_gain(*lines(belief, X, A, now), best)

    return acquisition


def make(
    situation: Situation, points: int = POINTS, draws: int = DRAWS, quantiles: int = QUANTILES, steps: int = STEPS
) -> Acquisition:
    """log of the hybrid knowledge gradient: exact over x, a fixed set of points, and the best points of fantasies.

    For each of a few quantiles of Z the posterior mean that it would leave is climbed, by so many `steps`, from where
    it is highest in the set; the expected maximum over all that is then exact: Pearce et al., "Practical Bayesian
    Optimization of Objectives with Conditioning Variables", arXiv 2002.09996, section 3. What was climbed to is held
    when derivatives are taken: its line counts for Z near the quantile at which it is highest, where it gains nothing
    by moving. ValueError for settings that are no whole numbers above zero; `steps` may be zero.
    """
    space, belief = situation.space, situation.believed
    z = levels(whole("quantiles", quantiles))
    whole("steps", steps, 0)
    A = peaks(situation, whole("points", points), whole("draws", draws))
    now = belief.value(A)[0].detach()
    best = now.max()

    def acquisition(X: Tensor) -> Tensor:
        a, b = lines(belief, X, A, now)
        inner = fantasy_peaks(space, belief, X.detach(), A, a.detach(), b.detach(), z, steps)
        a_inner, b_inner = moved(belief, X, inner)
        return log_gain(torch.cat([a, a_inner], dim=-1), torch.cat([b, b_inner], dim=-1), best)

    return acquisition


def make_one_shot(
    situation: Situation, points: int = POINTS, draws: int = DRAWS, fantasies: int = FANTASIES, steps: int = LONG
) -> Acquisition:
    """log of the one-shot knowledge gradient, its inner problems solved for every x.

    Balandat et al., "BoTorch", arXiv 1910.06403, section 4: the mean over fixed fantasies of the posterior mean at one
    point each, see `one_shot`. There these points are coordinates of the search; here it has d coordinates only, as for
    any criterion, and what is maximised jointly is the same. The fantasies are stratified quantiles of Z. Slower than
    `make` and less exact, it is what libraries compute. ValueError for settings that are no whole numbers above zero.
    """
    space, belief = situation.space, situation.believed
    z = levels(whole("fantasies", fantasies))
    whole("steps", steps)
    A = peaks(situation, whole("points", points), whole("draws", draws))
    now = belief.value(A)[0].detach()
    top = A[now.argmax()]

    def acquisition(X: Tensor) -> Tensor:
        with torch.no_grad():
            a, b = lines(belief, X, A, now)
        inner = fantasy_peaks(space, belief, X.detach(), A, a, b, z, steps)
        gain = one_shot(belief, X, inner, z) - one_shot(belief, X, top.expand_as(inner), z)
        return gain.clamp_min(1e-300).log()

    return acquisition


def one_shot(belief: Belief, X: Tensor, inner: Tensor, z: Tensor) -> Tensor:
    """Mean over f fantasies z of the posterior mean at a point each after a run at X (b x d): b; inner: b x f x d.

    Its maximum over `inner`, less the best posterior mean now, is the knowledge gradient as sampled by z.
    """
    a, b = moved(belief, X, inner)
    return (a + b * z).mean(-1)


def lines(belief: Belief, X: Tensor, A: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Intercepts and slopes in Z of the posterior mean at A (m x d) and at x itself after a run at x: b x (m + 1).

    now: the mean at A, m.
    """
    mean, sd = belief.value(X)
    total = (sd.square() + belief.noise).sqrt()[:, None]
    a = torch.cat([now.expand(len(X), -1), mean[:, None]], dim=-1)
    return a, torch.cat([belief.covariance(X, A), sd.square()[:, None]], dim=-1) / total


def moved(belief: Belief, X: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """As `lines`, where each x has its own points (b x q x d): b x q intercepts and slopes."""
    mean, covariance = belief.joint(torch.cat([X[:, None], inner], dim=1))
    total = (covariance[:, 0, 0].clamp_min(0) + belief.noise).clamp_min(1e-300).sqrt()
    return mean[:, 1:], covariance[:, 0, 1:] / total[:, None]


def log_gain(a: Tensor, b: Tensor, best: Tensor | None = None) -> Tensor:
    """log(E max_i(a_i + b_i Z) - best) for b x m lines: b. best: what is there already, at most max_i a_i; that itself.

    Exact (Frazier et al. 2009, "The Knowledge-Gradient Policy for Correlated Normal Beliefs", eq. 14): over neighbours
    i, j on the upper envelope, that cross at c, the sum of (b_j - b_i) h(-|c|), h(z) = phi(z) + z Phi(z). Every term is
    positive, so it is summed in log space, and has a gradient where it underflows.
    """
    order = envelope(a.detach(), b.detach())
    level, slope = a.gather(-1, order), b.gather(-1, order)  # b x e
    rise = slope.diff()
    new = rise.detach() > 0  # what ends before others is padded with its last line
    rise = torch.where(new, rise, 1.0)
    crossing = torch.where(new, -level.diff() / rise, 0.0)
    terms = torch.where(new, rise.log() + log_h(-crossing.abs()), -math.inf)
    parts = [terms, torch.full_like(a[:, :1], NOTHING)]
    if best is not None:
        above = level.max(-1, keepdim=True).values - best
        more = above.detach() > 0
        parts.append(torch.where(more, torch.where(more, above, 1.0).log(), -math.inf))
    return torch.cat(parts, dim=-1).logsumexp(-1)


def envelope(a: Tensor, b: Tensor) -> Tensor:
    """Which of m lines a_i + b_i z are the highest somewhere, from left to right: b x e, the last one repeated.

    From each line on to the one that crosses it first, for all rows at once: O(b m e).
    """
    lowest = torch.where(b == b.min(-1, keepdim=True).values, a, -math.inf)
    current = lowest.argmax(-1, keepdim=True)  # b x 1
    order = [current]
    while True:
        rise = b - b.gather(-1, current)
        crossing = torch.where(rise > 0, (a.gather(-1, current) - a) / rise.clamp_min(1e-300), math.inf)
        first, following = crossing.min(-1, keepdim=True)
        more = first < math.inf
        if not more.any():
            return torch.cat(order, dim=-1)
        current = torch.where(more, following, current)
        order.append(current)


def levels(count: int) -> Tensor:
    """Standard normal quantiles in the middle of `count` equally likely parts."""
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    z: Tensor = torch.special.ndtri(middle)
    return z


def peaks(situation: Situation, points: int, draws: int) -> Tensor:
    """Where the best posterior mean may come to lie: m x d, with the best known one.

    The maximisers of joint draws over `points` candidates and all tried or pending points, which is where the maximum
    may be; and the maximiser of the posterior mean among them, climbed to.
    """
    belief = situation.believed
    Z = torch.cat([candidates(situation, points), known(situation)])
    mean, root = joint(belief, Z)
    normal = torch.as_tensor(situation.rng.standard_normal((draws, len(Z))))
    chosen = torch.unique(torch.cat([(mean + normal @ root.T).argmax(-1), mean.argsort(descending=True)[:3]]))
    tops = Z[mean.argsort(descending=True)[:3]]

    def value(inner: Tensor) -> Tensor:
        return belief.value(inner[0])[0][None]

    return torch.cat([Z[chosen], climb(situation.space, value, tops[None], 4 * LONG)[0]])


def fantasy_peaks(
    space: Space, belief: Belief, X: Tensor, A: Tensor, a: Tensor, b: Tensor, z: Tensor, steps: int
) -> Tensor:
    """For each x (b x d) and fantasy z (f) about where the posterior mean after it is highest: b x f x d.

    a, b: the `lines` over A and x. It begins at the best of those points and climbs by `steps`.
    """
    start = (a[:, None] + b[:, None] * z[:, None]).argmax(-1)  # b x f
    every = torch.cat([A.expand(len(X), -1, -1), X[:, None]], dim=1)  # b x (m + 1) x d
    starts = every.gather(1, start[..., None].expand(-1, -1, X.shape[-1]))

    def value(inner: Tensor) -> Tensor:
        level, slope = moved(belief, X, inner)
        return level + slope * z

    return climb(space, value, starts, steps)


def climb(space: Space, value: Callable[[Tensor], Tensor], starts: Tensor, steps: int) -> Tensor:
    """The best points (b x q x d) on the way of so many gradient steps from b x q starts; value: -> b x q.

    Steps have the length of Barzilai & Borwein 1988: it follows the curvature without a matrix or a line search.
    Choices and coordinates that are not active stay; what leaves the allowed set is brought back.
    """
    flat = starts.reshape(-1, starts.shape[-1])
    choice = torch.tensor([column.kind == "choice" for column in space.columns])
    free = (torch.as_tensor(space.active(flat.numpy())) & ~choice).reshape(starts.shape)
    best, x, before = starts, starts, None
    top = torch.full(starts.shape[:-1], -math.inf, dtype=torch.float64)
    for step in range(steps + 1):
        at = x.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            values = value(at)
        better = values.detach() > top
        best = torch.where(better[..., None], x, best)
        top = torch.where(better, values.detach(), top)
        if step == steps:
            break
        (slope,) = torch.autograd.grad(values, at, torch.ones_like(values))
        slope = torch.where(free, slope, 0.0)
        # A coordinate at its end that pushes outwards does not count.
        slope = torch.where(((x <= 0) & (slope < 0)) | ((x >= 1) & (slope > 0)), 0.0, slope)
        size = slope.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        length = FIRST / size
        if before is not None:
            way, bend = x - before[0], before[1] - slope  # along the way a concave function loses slope
            curvature = (way * bend).sum(-1, keepdim=True)
            curved = curvature > 1e-300
            newton = way.square().sum(-1, keepdim=True) / torch.where(curved, curvature, 1.0)
            length = torch.where(curved, newton, 2 * way.norm(dim=-1, keepdim=True) / size)
        before = (x, slope)
        x = allowed(space, x, (x + slope * torch.minimum(length, LONGEST / size)).clamp(0, 1))
    return best


def allowed(space: Space, x: Tensor, to: Tensor) -> Tensor:
    """The points `to` (b x q x d) where the space reads them, and x where a predicate forbids that."""
    if not space.repaired and not space.constraints:
        return to
    flat = space.repair(to.reshape(-1, to.shape[-1]).numpy())
    landed = torch.as_tensor(flat).reshape(to.shape)
    if not space.constraints:
        return landed
    holds = torch.as_tensor(space.satisfies(space.decode_all(flat))).reshape(*to.shape[:-1], 1)
    return torch.where(holds, landed, x)
