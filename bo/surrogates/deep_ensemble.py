"""A deep ensemble: small tanh networks that started elsewhere and saw different runs; where they differ, nobody knows.

Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty estimation using deep ensembles"; on 80% of
the runs each as in Li et al. 2023, arXiv 2305.20028, but dealt so that every run is left out by as many networks: these
foretell it, and tell by how much the networks are too sure of themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.process import Coordinates, Process, Standard
from bo.surrogates.sampled import LEAST, Spread, sampled

#: The parts that runs are dealt into; a network sees all but one.
FOLDS = 5
#: Weight of the squared weights, as if they had a standard normal prior and runs a noise of that variance.
DECAY = 1e-3
RATE = 0.02


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    *,
    rounds: int = 3,
    width: int = 32,
    steps: int = 400,
) -> Process:
    """5 `rounds` networks with two hidden layers a metric, trained together by Adam; draws from torch's generator.

    `start` is not used: networks that went on from where others ended would differ less and less.
    """
    coordinates, standard = Coordinates.of(features, inputs), Standard.of(Y)
    x, target = coordinates(inputs), standard(Y)
    n, p = Y.shape
    D, G = x.shape[-1], max(features.groups) + 1 + len(coordinates.reach)
    s = FOLDS * rounds
    # A fold a network, every run in one fold of each round: s x n, false where a network does not see a run.
    deal = torch.stack([torch.randperm(n) % FOLDS for _ in range(rounds)])  # rounds x n
    seen = (deal[:, None] != torch.arange(FOLDS)[:, None]).reshape(s, n)
    sizes = (D, width, width, 1)
    weights = [torch.randn(p * s, i + 1, o, dtype=torch.float64) for i, o in pairwise(sizes)]
    fan_in = (min(G, D), width, width)

    def network(x: Tensor, weights: list[Tensor]) -> Tensor:
        """b x D points: p x s x b."""
        y = 2 * math.sqrt(3) * x.expand(p * s, -1, -1)
        for layer, (W, count) in enumerate(zip(weights, fan_in, strict=True)):
            y = torch.baddbmm(W[:, -1:], torch.tanh(y) if layer else y, W[:, :-1] / math.sqrt(count))
        return y.reshape(p, s, -1)

    weights = [W.requires_grad_() for W in weights]
    optimizer = torch.optim.Adam(weights, lr=RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        wrong = ((network(x, weights) - target.T[:, None]).square() * seen).sum()
        loss = wrong + DECAY * sum((W.square().sum() for W in weights), wrong.new_zeros(()))
        for W, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            W.grad = gradient
        optimizer.step()
        schedule.step()
    weights = [W.detach() for W in weights]

    found = network(x, weights)  # p x s x n
    left, hidden = _mean(found, ~seen), found.var(1).T
    residual = torch.where(seen.any(0)[:, None], target - _mean(found, seen), 0.0)
    noise = residual.square().mean(0).clamp_min(LEAST)
    spread = Spread.of(target - left, hidden, noise)
    return sampled(
        features,
        coordinates,
        inputs,
        lambda at: network(coordinates(at), weights),
        standard,
        noise,
        (left, spread(hidden) + noise),
        {"stretch": spread.stretch.tolist()},
        spread,
    )


def _mean(found: Tensor, mask: Tensor) -> Tensor:
    """Over the networks of a mask (s x n), found: p x s x n -> n x p."""
    return ((found * mask).sum(1) / mask.sum(0).clamp_min(1)).T
