"""The Gaussian process for thousands of runs: the exact one, seen through some hundred inducing points.

Snelson & Ghahramani 2006, "Sparse Gaussian Processes using Pseudo-inputs", eq. 6 to 8: what inducing points do not show
of a run counts as noise of its own, so a run next to one of them tells as much as in the exact model, and one far from
all of them only what they can show. With n runs and m inducing points it takes n m^2 work once, and m^2 for a point
that is asked about; nothing of size n x n, or n x m, is ever held.

Inducing points and hyperparameters (those of the exact model of a part of the runs) favour the best runs: there the
error is half that of Titsias' bound (2009) with as many points, where one noise for all runs makes up for what the
points cannot show anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.surrogates import gp, scale_shift
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GROWN
from bo.surrogates.hyperparameters import BELIEVED_NOISE, JITTER, Hyper, Layout
from bo.surrogates.scale_shift import cholesky, diagonal, kernel, noise, within

#: Runs that hyperparameters are fitted to, inducing points, and runs that these are chosen among.
SUBSET, INDUCING, CANDIDATES = 800, 1000, 2500
#: The share of each of these that goes to the best runs, where a search has to see clearly.
BEST = 1 / 4
#: Runs looked at together.
BLOCK = 1024


@dataclass(frozen=True)
class InducingGP:
    """The posterior of p metrics given n runs, through m inducing points.

    theta: p x H raw hyperparameters. points: the m inducing points. root: p x m x m, the inverse of the Cholesky factor
    of their covariance K. rest: p x m x m, of which rest' rest is the inverse of K + C D C', with C the covariance with
    the runs and D their precisions given the points. alpha: p x m, what weighs the covariance with the points for the
    mean. believed: r points, with the Cholesky factors p x r x r of their posterior covariance, or none. runs: number
    of runs that the hyperparameters were fitted to.
    """

    features: Features
    layout: Layout
    theta: Tensor
    points: Inputs
    root: Tensor
    rest: Tensor
    alpha: Tensor
    inputs: Inputs
    Y: Tensor
    runs: int
    believed: tuple[Inputs, Tensor] | None = None

    @classmethod
    def given(
        cls, features: Features, layout: Layout, theta: Tensor, points: Inputs, inputs: Inputs, Y: Tensor, runs: int
    ) -> InducingGP:
        """The posterior under fixed hyperparameters.

        NumericalError when the covariance of the inducing points cannot be factorised.
        """
        hyper = layout.hyper(theta)
        chol = cholesky(kernel(points, points, hyper, layout), hyper.amplitude)
        eye = torch.eye(len(points), dtype=torch.float64)
        root = torch.linalg.solve_triangular(chol, eye.expand_as(chol), upper=False)
        B, c = eye.repeat(len(root), 1, 1), torch.zeros_like(root[..., 0])
        for some, y in blocks(inputs, Y):
            A = root @ kernel(points, some, hyper, layout)  # p x m x block
            weighed = A / own(some, A, hyper, layout)[:, None]
            B += weighed @ A.mT
            c += torch.einsum("pmb,bp->pm", weighed, y)
        rest = torch.linalg.solve_triangular(torch.linalg.cholesky(B), root, upper=False)
        alpha = (rest.mT @ (rest @ (chol @ c[..., None]))).squeeze(-1)
        return cls(features, layout, theta, points, root, rest, alpha, inputs, Y, runs)

    @cached_property
    def hyper(self) -> Hyper:
        return self.layout.hyper(self.theta)

    @property
    def noise(self) -> Tensor:
        """Variance of a run about the metric it measures, shape (p,)."""
        return self.hyper.noise

    def posterior(self, at: Inputs) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free metrics at b points: p x b each."""
        mean, explained, regained = self._reduced(at)
        variance = diagonal(at, self.hyper, self.layout) - explained.square().sum(-2) + regained.square().sum(-2)
        return mean, variance.clamp_min(1e-10 * self.hyper.amplitude[:, None])

    def mean(self, at: Inputs) -> Tensor:
        """The mean of `posterior` alone: p x b."""
        return self._reduced(at)[0]

    def joint(self, at: Inputs, q: int) -> tuple[Tensor, Tensor]:
        """Mean (p x b x q) and covariance (p x b x q x q) of b groups of q points each, all of one scale."""
        mean, *parts = self._reduced(at)
        p = len(mean)
        # p x b x m x q
        explained, regained = (part.reshape(p, part.shape[1], -1, q).transpose(1, 2) for part in parts)
        covariance = within(at, q, self.hyper, self.layout) - explained.mT @ explained + regained.mT @ regained
        return mean.reshape(p, -1, q), covariance

    def covariance(self, at: Inputs, other: Inputs) -> Tensor:
        """Posterior covariance between b and k points: p x b x k."""
        (_, *one), (_, *two) = self._reduced(at), self._reduced(other)
        return kernel(at, other, self.hyper, self.layout) - one[0].mT @ two[0] + one[1].mT @ two[1]

    def _reduced(self, at: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Mean at b points (p x b); what inducing and believed points would explain of their covariance were they known
        (p x (m + r) x b), and what of that stays open because they are not (p x m x b), each as half' half.
        """
        cross = kernel(self.points, at, self.hyper, self.layout)  # p x m x b
        mean = (self.alpha[:, None] @ cross).squeeze(-2)
        explained, regained = self.root @ cross, self.rest @ cross
        if self.believed is None:
            return mean, explained, regained
        points, chol = self.believed
        _, seen, open = self._believed
        left = kernel(points, at, self.hyper, self.layout) - seen.mT @ explained + open.mT @ regained  # p x r x b
        known = torch.linalg.solve_triangular(chol, left, upper=False)
        return mean, torch.cat([explained, known], dim=-2), regained

    @cached_property
    def _believed(self) -> tuple[Tensor, Tensor, Tensor]:
        """`_reduced` of the believed points, without them."""
        assert self.believed is not None
        return replace(self, believed=None)._reduced(self.believed[0])

    def believe(self, at: Inputs) -> InducingGP:
        """Conditioned on its own posterior mean at r points: there the variance shrinks, no mean changes."""
        with torch.no_grad():
            points = at if self.believed is None else self.believed[0].join(at)
            open = replace(self, believed=None).covariance(points, points)
            noise = BELIEVED_NOISE * self.noise
            chol = cholesky(open + noise[:, None, None] * torch.eye(len(points)), self.hyper.amplitude)
        return replace(self, believed=(points, chol))

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every run's metrics given the others, noise included: n x p each.

        Rasmussen & Williams 2006, eq. 5.12, exact for the covariance that m points make of n runs; the run that is left
        out may stay an inducing point, which tells nothing of what it measured.
        """
        means, variances = [], []
        with torch.no_grad():
            for some, y in blocks(self.inputs, self.Y):
                cross = kernel(self.points, some, self.hyper, self.layout)
                unknown = own(some, self.root @ cross, self.hyper, self.layout)  # p x block
                # What is left of a run's own variance once its share in the posterior is taken out.
                share = (1 - (self.rest @ cross).square().sum(-2) / unknown).clamp_min(1e-9)
                residual = y.T - (self.alpha[:, None] @ cross).squeeze(-2)
                means.append(y - (residual / share).T)
                variances.append((unknown / share).T)
        return torch.cat(means), torch.cat(variances)

    def memory(self) -> dict[str, Any]:
        """The fitted hyperparameters as JSON, for the next fit to start from."""
        return {"metrics": [self.layout.names(row) for row in self.theta.numpy()], "runs": self.runs}


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    inducing: int = INDUCING,
    subset: int = SUBSET,
) -> InducingGP:
    """The model of n runs through `inducing` of them, with the exact model's hyperparameters of `subset` of them.

    Hyperparameters are fitted again when there are GROWN times more runs than `start` was fitted to.
    """
    layout = Layout.of(features, inputs, inputs.across)
    n, p = Y.shape
    known = [layout.vector(values) for values in (start or {}).get("metrics", ())]
    runs = int((start or {}).get("runs", 0))
    if len(known) == p and runs <= n < GROWN * runs:
        theta = torch.as_tensor(np.stack(known))
    else:
        part = leading(Y, subset)
        warm = {"metrics": (start or {}).get("metrics", ())}
        exact = (scale_shift if inputs.across else gp).fit(features, inputs.rows(part), Y[part], warm)
        # Whether the power of shares is learned may hang on which runs are looked at.
        theta = torch.as_tensor(np.stack([layout.vector(values) for values in exact.memory()["metrics"]]))
        runs = n
    candidates = inputs.rows(leading(Y, CANDIDATES))
    points = candidates.rows(spread(candidates, layout.hyper(theta), layout, inducing))
    return InducingGP.given(features, layout, theta, points, inputs, Y, runs)


def blocks(inputs: Inputs, Y: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
    """The runs and their outcomes, BLOCK at a time."""
    for rows in torch.split(torch.arange(len(Y)), BLOCK):
        yield inputs.rows(rows), Y[rows]


def leading(Y: Tensor, count: int) -> Tensor:
    """Numbers of up to `count` runs of n: the best, then others evenly over the ranks of what is left.

    The best are those with the largest sum of metrics (Y: n x p).
    """
    order = torch.argsort(Y.sum(-1), descending=True, stable=True)
    if len(order) <= count:
        return order
    best = int(BEST * count)
    rest = torch.linspace(best, len(order) - 1, count - best, dtype=torch.float64).round().long()
    return torch.cat([order[:best], order[rest]])


def spread(inputs: Inputs, hyper: Hyper, layout: Layout, count: int) -> Tensor:
    """Numbers of up to `count` of n points, best first: the best ones, then each where the others leave most open.

    The greedy choice of Burt, Rasmussen & van der Wilk 2020, "Convergence of Sparse Variational Inference in Gaussian
    Processes Regression", section 4.2: a pivoted Cholesky factorisation, here of the metrics' mean correlation.
    """
    n = len(inputs)
    K = (kernel(inputs, inputs, hyper, layout) / hyper.amplitude[:, None, None]).mean(0).numpy()
    count = min(count, n)
    low, left, chosen = np.zeros((count, n)), K.diagonal().copy(), []
    for k in range(count):
        forced = k < BEST * count and left[k] > 1e-6 * K[k, k]
        i = k if forced else int(left.argmax())
        if left[i] <= 1e-9 * K[i, i]:  # copies, and points that the others determine
            break
        chosen.append(i)
        low[k] = (K[i] - low[:k, i] @ low[:k]) / math.sqrt(left[i])
        left -= np.square(low[k])
        left[chosen] = 0.0
    return torch.tensor(chosen)


def own(inputs: Inputs, A: Tensor, hyper: Hyper, layout: Layout) -> Tensor:
    """Variances of runs that inducing points say nothing about: noise, and what A (p x m x n) leaves open. p x n."""
    open = (diagonal(inputs, hyper, layout) - A.square().sum(-2)).clamp_min(JITTER * hyper.amplitude[:, None])
    return noise(inputs, hyper, layout) + open
