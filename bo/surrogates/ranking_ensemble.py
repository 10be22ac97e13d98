"""A Gaussian process for each scale, weighed by how well it ranks the runs of the scale that is asked about.

Feurer, Letham, Bakshy 2018, "Scalable meta-learning for Bayesian optimization using ranking-weighted Gaussian process
ensembles", arXiv 1802.02219: a model weighs as much as it is likely to put fewer pairs of runs in the wrong order than
all others, by samples of the posteriors; the scale's own model is judged by runs that it did not see. Equal losses
share a sample. Many useless models would each be lucky sometimes, and dilute the own one: so each is left out with the
probability that it is no better than that (the guard of later versions of the paper, without its horizon; here anew in
each sample, so that weights are what they are on average over what is left out).

Of a scale with fewer than 3 runs nothing can be ranked. Its own model there has the weight of one among equals, and the
others share the rest as they do at the nearest scale where they could be ranked. The paper has equal weights then; on
losses of real models these foretold worse.

Ranks say nothing of the level: other scales' models are moved to that of the runs at hand. Runs of scales that have
few are put together by `Levels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bo.quasirandom import normal_points, sobol_points
from bo.surrogates import gp
from bo.surrogates.believing import Believing
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.levels import Levels
from bo.surrogates.surrogate import Surrogate

#: Models at most, and runs of each but the target's at least: two are in some order whatever a model is like.
MODELS, FEWEST = 8, 3
#: Samples of a posterior; runs whose pairs are ranked, at most.
SAMPLES, RANKED = 256, 100
#: As if so many runs more had been foretold at their level.
BELIEF = 1.0
#: Variances below this are rounding; outcomes are standardised.
LEAST = 1e-10


@dataclass(frozen=True)
class RankingEnsemble(Believing):
    """f at level c is the sum over models of weight_ci (f_i + shift_ci), f_i independent posteriors of p metrics.

    weight: p x L x L, for each level those of the L models, which sum to one; shift: as many. left_out: leave-one-out
    means and variances, n x p each. What is believed, the sum believes and not each model: a run at a scale where a
    model has no weight tells nothing about it.
    """

    features: Features
    levels: Levels
    members: tuple[GaussianProcess, ...]
    weight: Tensor
    shift: Tensor
    left_out: tuple[Tensor, Tensor]

    @property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures at the target, shape (p,)."""
        return (self.weight[:, self.levels.target] * torch.stack([each.noise for each in self.members], -1)).sum(-1)

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        each = [member.posterior(at) for member in self.members]
        means, variances = (torch.stack(found, dim=-1) for found in zip(*each, strict=True))  # p x b x L
        variance = (self._weights(at).square() * variances).sum(-1)
        return self._weighed(at, means), self.closed(variance, at).clamp_min(LEAST)

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return self._weighed(at, torch.stack([member.mean(at) for member in self.members], dim=-1))

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale."""
        each = [member.joint(at, q) for member in self.members]
        means, covariances = (torch.stack(found, dim=-1) for found in zip(*each, strict=True))
        p, L = len(self.weight), len(self.members)
        weight = self._weights(at).reshape(p, -1, q, L)
        covariance = (weight[..., :, None, :] * weight[..., None, :, :] * covariances).sum(-1)
        return self._weighed(at, means.reshape(p, -1, L)).reshape(p, -1, q), self.closed_within(covariance, at)

    def open_covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """`covariance` before anything is believed."""
        one, two = self._weights(at), self._weights(other)
        each = [
            one[..., :, None, i] * two[..., None, :, i] * member.covariance(at, other)
            for i, member in enumerate(self.members)
        ]
        return torch.stack(each).sum(0)

    def _weights(self, at: Inputs) -> Tensor:
        """Of the models at b points: p x b x L."""
        return self.weight[:, self.levels(at)]

    def _weighed(self, at: Inputs, means: Tensor) -> Tensor:
        """The mean, p x b, where those of the models are p x b x L."""
        return (self._weights(at) * (means + self.shift[:, self.levels(at)])).sum(-1)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each.

        The level's own model is without the run; weights and shifts are those of all runs.
        """
        return self.left_out

    def memory(self) -> dict[str, Any]:
        """What the next fit starts from, as JSON."""
        return {"members": [member.memory() for member in self.members]}


def fit(features: Features, inputs: Inputs, Y: Tensor, start: Mapping[str, Any] | None = None) -> Surrogate:
    """Of runs of one scale it is the usual process. start: used where it is of as many models."""
    levels = Levels.of(features, inputs, MODELS, FEWEST)
    L, level = len(levels), levels(inputs)
    if L == 1:
        return gp.fit(features, inputs, Y, start)
    earlier = (start or {}).get("members", ())
    begins = earlier if len(earlier) == L else [None] * L
    rows = [(level == k).nonzero()[:, 0] for k in range(L)]
    points = [inputs.rows(row) for row in rows]
    members = tuple(gp.fit(features, points[k], Y[rows[k]], begins[k]) for k in range(L))
    weight = torch.stack([weights(members, k, points[k], Y[rows[k]]) for k in range(L)], dim=1)
    weight = completed(weight, [len(row) for row in rows], levels)
    shift = torch.stack([shifts(members, k, points[k], Y[rows[k]]) for k in range(L)], dim=1)
    made = RankingEnsemble(features, levels, members, weight, shift, (Y, Y))
    left = [left_out(made, k, points[k]) for k in range(L)]
    mean, variance = (torch.empty_like(Y) for _ in range(2))
    for row, (centre, spread) in zip(rows, left, strict=True):
        mean[row], variance[row] = centre, spread
    return replace(made, left_out=(mean, variance))


def weights(members: tuple[GaussianProcess, ...], own: int, at: Inputs, Y: Tensor) -> Tensor:
    """Of L models for the n runs Y (n x p) of the level that model `own` was fitted to: p x L.

    Of very many runs RANKED are ranked, from the best to the worst. All zero where there are too few.
    """
    n, p = Y.shape
    if n < FEWEST:
        return torch.zeros(p, len(members), dtype=torch.float64)
    with torch.no_grad():
        losses = torch.stack(
            [
                own_losses(member, Y, seed=k) if k == own else losses_of(member, at, Y, seed=k)
                for k, member in enumerate(members)
            ],
            dim=1,
        )  # p x L x s
    losses = guarded(losses, own)
    best = (losses == losses.min(1, keepdim=True).values).to(torch.float64)
    return (best / best.sum(1, keepdim=True)).mean(-1)


def guarded(losses: Tensor, own: int) -> Tensor:
    """The losses (p x L x s), infinite where a model is left out of a sample: see above."""
    better = (losses < losses[:, [own]]).to(torch.float64).mean(-1, keepdim=True)  # p x L x 1
    better[:, own] = 1.0
    chance = torch.as_tensor(sobol_points(losses.shape[1], losses.shape[-1], seed=own)).T  # L x s
    return torch.where(chance <= better, losses, torch.inf)


def losses_of(member: GaussianProcess, at: Inputs, Y: Tensor, seed: int) -> Tensor:
    """Pairs of n runs Y (n x p), counted both ways, that each sample of a posterior puts in the wrong order: p x s."""
    found = []
    for i, kept in enumerate(ranked(Y)):
        mean, covariance = (part[i, 0] for part in member.joint(at.rows(kept), len(kept)))
        f = mean + normal_points(len(kept), SAMPLES, seed) @ root(covariance).T  # s x n
        found.append(misranked(f[:, :, None], f[:, None], Y[kept, i]))
    return torch.stack(found)


def own_losses(member: GaussianProcess, Y: Tensor, seed: int) -> Tensor:
    """As `losses_of`, of the model of these runs: each is compared with others by a sample that did not see it: p x s.

    With the covariance of the runs s I - s^2 P, P the inverse of that of the outcomes and s the noise, a sample f
    without run j is f - u_j (alpha_j / P_jj + z_j / sqrt(P_jj)), u_j = e_j - s P e_j, for a standard normal z_j.
    """
    found = []
    for i, kept in enumerate(ranked(Y)):
        rows, n = kept.numpy(), len(kept)
        P = torch.from_numpy(member.factors[i].inverse)
        alpha, noise = torch.from_numpy(member.alpha[i]), member.noise[i]
        without = torch.eye(len(P), dtype=torch.float64) - noise * P
        normal = normal_points(2 * n, SAMPLES, seed)
        P, alpha, without = P[rows][:, rows], alpha[rows], without[rows][:, rows]
        f = Y[kept, i] - noise * alpha + normal[:, :n] @ root(noise * without).T  # s x n
        precision = P.diagonal()
        moved = (alpha / precision - normal[:, n:] / precision.sqrt())[..., None] * without  # s x n x n, a row a run
        apart = f[:, None] - moved
        found.append(misranked(apart.diagonal(dim1=-2, dim2=-1)[..., None], apart, Y[kept, i]))
    return torch.stack(found)


def ranked(Y: Tensor) -> list[Tensor]:
    """For each metric of n x p outcomes up to RANKED runs, evenly from the best to the worst."""
    count = min(len(Y), RANKED)
    even = torch.linspace(0, len(Y) - 1, count, dtype=torch.float64).round().long()
    return [torch.argsort(column, stable=True)[even] for column in Y.T]


def misranked(one: Tensor, other: Tensor, y: Tensor) -> Tensor:
    """How many pairs of n different outcomes are in the wrong order: s; one, other: s x n x n by broadcasting."""
    differ = y[:, None] != y
    return (((one < other) != (y[:, None] < y)) & differ).sum((-2, -1)).to(torch.float64)


def root(covariance: Tensor) -> Tensor:
    """A root R of an n x n covariance R R', which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    found: Tensor = vectors * values.clamp_min(0).sqrt()
    return found


def completed(weight: Tensor, runs: list[int], levels: Levels) -> Tensor:
    """The weights (p x L x L) with those of levels of too few runs: see above. Where all have too few, equal ones."""
    L = len(runs)
    weight = weight.clone()
    middle = torch.stack([levels.places[levels.level == k].mean(0) for k in range(L)])
    enough = [k for k in range(L) if runs[k] >= FEWEST]
    for k in range(L):
        if runs[k] >= FEWEST:
            continue
        if enough:
            near = min(enough, key=lambda j: (float((middle[j] - middle[k]).abs().sum()), -j))
            weight[:, k] = (1 - 1 / L) * weight[:, near]
            weight[:, k, k] += 1 / L
        else:
            weight[:, k] = 1 / L
    return weight


def shifts(members: tuple[GaussianProcess, ...], own: int, at: Inputs, Y: Tensor) -> Tensor:
    """By how much n runs Y (n x p) of a level lie above what each of L models foretells, shrunk: p x L."""
    with torch.no_grad():
        above = torch.stack([(Y.T - member.mean(at)).sum(-1) for member in members], dim=-1) / (len(Y) + BELIEF)
    above[:, own] = 0
    return above


def left_out(made: RankingEnsemble, own: int, at: Inputs) -> tuple[Tensor, Tensor]:
    """Leave-one-out means and variances of the n runs of a level: n x p each."""
    member, weight, shift = made.members[own], made.weight[:, own].T, made.shift[:, own].T  # L x p
    mean, variance = member.leave_one_out()
    centre, spread = weight[own] * mean, weight[own].square() * (variance - member.noise) + member.noise
    with torch.no_grad():
        for k, other in enumerate(made.members):
            if k != own:
                mean, variance = other.posterior(at)
                centre = centre + weight[k] * (mean.T + shift[k])
                spread = spread + weight[k].square() * variance.T
    return centre, spread.clamp_min(LEAST)
