"""What the runs leave open about how the optimum drifts: draws of the drift from its posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bo.surrogates.averaged import chain
from bo.surrogates.scale_shift import MANY, ScaleShiftGP, Target, few
from search_spaces.parameter import Array

#: The standard deviation of a drift that is held fixed; nothing is left to be uncertain.
FIXED = 0.01
#: Metrics up to which all hyperparameters are drawn with the drift; of more the others stay what they were fitted to.
ALL = 2
#: Octaves, root mean square, from which on places differ along a direction, and up to which a place is no further from
#: what they span than rounding: tokens are whole batches, so cells that are meant to be on a line hardly ever are.
NEAR = 0.1


def drawn(gp: ScaleShiftGP, count: int) -> tuple[ScaleShiftGP, ...]:
    """`count` posteriors of the metrics, each with a drift drawn from what the runs leave open, and held there.

    The fitted spread of the drift is a prior; here it is fixed at next to nothing, and the drift, with the other
    hyperparameters, drawn by a Hamiltonian chain for each metric. Draws from torch's generator. NumericalError where a
    covariance cannot be factorised.
    """
    layout, n = gp.layout, len(gp.Y) - gp.believed
    names = [block.name for block in layout.blocks for _ in range(block.size)]
    fixed = {"power", "spread"}
    p = gp.Y.shape[1]
    free = np.array([(name not in fixed) if p <= ALL else name == "drift" for name in names])
    spread = np.array([name == "spread" for name in names])
    bounds = np.array(layout.bounds)[free].T
    rows = few(gp.inputs.rows(torch.arange(n)), int(MANY / p**0.5))
    theta = gp.theta.repeat(count, 1, 1)  # count x p x H
    theta[:, :, torch.from_numpy(spread)] = float(np.log(FIXED))
    for i in range(p):
        posterior = Target.of(gp.inputs.rows(rows), gp.Y[rows][:, [i]], layout)
        raw = theta[0, i].numpy().copy()

        def loss(part: Array, posterior: Target = posterior, raw: Array = raw) -> tuple[float, Array]:
            raw[free] = part
            value, gradient = posterior.loss(raw)
            return value, gradient[free]

        theta[:, i, torch.from_numpy(free)] = torch.from_numpy(chain(loss, raw[free].copy(), bounds, count))
    inputs, Y = gp.inputs, gp.Y
    return tuple(
        replace(ScaleShiftGP.given(gp.features, layout, each, inputs, Y, gp.believed), runs=gp.runs, cells=gp.cells)
        for each in theta
    )


@dataclass(frozen=True)
class Exponent:
    """By which power of a scale axis the best value of a parameter grows, as one metric has it.

    For a number without a log scale it is ranges an octave, three times. low, high: a 90% interval.
    """

    parameter: str
    axis: str
    metric: int
    mean: float
    low: float
    high: float


def exponents(gp: ScaleShiftGP, members: tuple[ScaleShiftGP, ...]) -> tuple[Exponent, ...]:
    """The drifts that draws have along the axes that the runs' scales span; of others nothing is known."""
    features, found = gp.features, []
    along = spanned(gp.inputs.scales[:, : len(features.axes)])
    drifts = torch.stack([member.hyper.drift for member in members])  # count x p x J x m
    for metric in range(drifts.shape[1]):
        for j, column in enumerate(features.numeric):
            for a, axis in enumerate(features.axes):
                if not along[a]:
                    continue
                draws = drifts[:, metric, j, a]
                low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
                name = features.space.columns[column].name
                found.append(Exponent(name, axis, metric, float(draws.mean()), low, high))
    return tuple(found)


def leads(places: Tensor, to: Tensor) -> bool:
    """Whether the differences of c places (c x m) span the way to another (m): then they tell how things move there."""
    along = directions(places)
    way = to - places.mean(0)
    return float((way - along @ (along.T @ way)).norm()) <= NEAR


def spanned(places: Tensor) -> list[bool]:
    """Of each axis, whether the differences of c places (c x m) span it: cells on one line do not tell axes apart."""
    along = directions(places)
    off = torch.eye(len(along), dtype=torch.float64) - along @ along.T
    return [float(each.norm()) <= NEAR for each in off]


def directions(places: Tensor) -> Tensor:
    """Orthonormal directions (m x r) along which c places (c x m) are further apart than NEAR."""
    _, widths, rows = torch.linalg.svd(places - places.mean(0), full_matrices=False)
    found: Tensor = rows[widths > NEAR * math.sqrt(len(places))].T
    return found
