"""A random forest, for spaces with many conditional parts: a tree asks about a parameter only where it splits by it.

Hutter et al. 2011, "Sequential model-based optimization for general algorithm configuration". Trees are constant
between their thresholds, so every gradient is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesRegressor  # type: ignore[import-untyped]
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.process import Coordinates, Process, Standard
from bo.surrogates.sampled import LEAST, Spread, sampled


def fit(
    features: Features,
    inputs: Inputs,
    Y: Tensor,
    start: Mapping[str, Any] | None = None,
    *,
    trees: int = 64,
) -> Process:
    """A forest a metric: `trees` on bootstraps, split at random thresholds; draws a seed from torch's generator.

    By the law of total variance it is the variance of the trees' means plus the mean of their leaves' own. What is left
    within a leaf is a run's noise, and leaves its mean open by a share of one over the runs in it. `start` is not used.
    """
    coordinates, standard = Coordinates.of(features, inputs), Standard.of(Y)
    x, target = coordinates(inputs).detach().numpy().astype(np.float32), standard(Y)
    n, p = Y.shape
    forests, left, total, noise = [], [], [], []
    for k in range(p):
        seed = int(torch.randint(2**31 - 1, ()))
        # Random thresholds lie anywhere between two runs, so many trees together are smooth; a plain forest is not.
        forest = ExtraTreesRegressor(trees, bootstrap=True, random_state=seed).fit(x, target[:, k].numpy())
        grown = [tree.tree_ for tree in forest.estimators_]
        forests.append(grown)
        means, variances, counts = _leaves(grown, x)
        used = np.zeros((trees, n), dtype=bool)
        for i, rows in enumerate(forest.estimators_samples_):
            used[i, rows] = True
        left.append(_left_out(means, ~used))
        total.append(means.var(0) + (variances / counts).mean(0))
        noise.append(np.average(variances, weights=used + 1e-12))
    wrong, hidden = target - torch.tensor(np.stack(left, 1)), torch.tensor(np.stack(total, 1))
    floor = torch.tensor(np.array(noise)).clamp_min(LEAST)
    spread = Spread.of(wrong, hidden, floor)

    def members(at: Inputs) -> Tensor:
        rows = coordinates(at)
        points = rows.detach().numpy().astype(np.float32)
        found = []
        for grown in forests:
            means, variances, counts = _leaves(grown, points)
            own = np.sqrt(variances / counts)
            found.append(np.concatenate([means + own, means - own]))
        # Nothing times the coordinates: constant, and yet a function of them to whoever asks for a gradient.
        return torch.tensor(np.stack(found)) + 0 * rows.sum(-1)

    return sampled(
        features,
        coordinates,
        inputs,
        members,
        standard,
        floor,
        (target - wrong, spread(hidden) + floor),
        {"stretch": spread.stretch.tolist()},
        spread,
    )


def _leaves(grown: list[Any], points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and number of runs of the leaf that each of b points is in, trees x b each."""
    rows = [(tree, tree.apply(points)) for tree in grown]
    means = np.stack([tree.value[leaf, 0, 0] for tree, leaf in rows])
    variances = np.stack([tree.impurity[leaf] for tree, leaf in rows])
    counts = np.stack([tree.weighted_n_node_samples[leaf] for tree, leaf in rows])
    return means, np.maximum(variances, 0), counts


def _left_out(means: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the trees that did not see a run; where all did, nothing is known but the mean of all runs, zero."""
    found: np.ndarray = (means * mask).sum(0) / np.maximum(mask.sum(0), 1)
    return found
