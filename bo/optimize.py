"""The maximiser of an acquisition over a space: many raw points, a batched ascent, then single changes.

An acquisition is a callable: b x d encoded points -> b values, larger is better, differentiable in the coordinates
that are continuous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from search_spaces import Space

Acquisition = Callable[[Tensor], Tensor]

#: Two points this close in every coordinate, with the same choices, are the same run.
SAME = 1e-3
#: A share below the cube of this, above its floor, is nothing.
TRACE = 0.03
RAW = 512
RESTARTS = 6
ITERATIONS = 40
ROUNDS = 3


@dataclass(frozen=True)
class Found:
    """A maximiser x (d,), a fixed point of encode(decode(x)), its value, and whether it is new."""

    x: Tensor
    value: float
    new: bool


def maximise(
    acquisition: Acquisition, space: Space, incumbents: Tensor, taken: Tensor, rng: np.random.Generator
) -> Found:
    """The best point of `space` that is not `taken`.

    incumbents: k x d good points, best first, around which is searched closely; they may be returned unless taken.
    taken: points (r x d) that must not be returned; where everything found is among them (a small discrete space that
    is exhausted), the best of all is returned with `new` False.
    """
    raw = torch.as_tensor(raw_points(space, incumbents.numpy(), rng))
    values = _values(acquisition, raw)
    order = torch.argsort(values, descending=True, stable=True)
    refined = ascend(acquisition, space, raw[_spread(raw[order], RESTARTS, order)])
    refined = refined[torch.argsort(_values(acquisition, refined), descending=True, stable=True)]
    best = change_one(acquisition, space, refined[0])
    top = torch.cat([best[None], refined])
    pool = settle(space, torch.cat([top, without_traces(space, top), raw[order][:RAW]]))
    values = _values(acquisition, pool)
    new = ~same(pool, taken)
    ranked = torch.where(new, values, -math.inf) if new.any() else values
    index = int(ranked.argmax())
    return Found(pool[index], float(values[index]), bool(new.any()))


def sobol_points(d: int, n: int, seed: int, first: int = 0) -> np.ndarray:
    """Points number first .. first + n - 1 of a scrambled Sobol sequence: n x d in [0, 1].

    Owen-scrambled points lie uniformly in each coordinate and fill it evenly at any length.
    """
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    engine.fast_forward(first)  # type: ignore[no-untyped-call]
    points: np.ndarray = engine.draw(n, dtype=torch.float64).clamp(0, 1).numpy()
    return points


def raw_points(space: Space, incumbents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sobol points, the incumbents and their neighbourhoods, and copies of all these on faces of the simplex."""
    d = len(space.columns)
    parts = [space.quantile(sobol_points(d, RAW, seed=int(rng.integers(2**31))))]
    if len(incumbents):
        parts.append(incumbents)
        centres = np.repeat(incumbents[:5], 32, axis=0)
        width = 10.0 ** rng.uniform(-2.5, -0.5, (len(centres), 1))
        step = width * rng.standard_normal(centres.shape)
        moved = rng.random(centres.shape) < max(0.5, 2 / d)
        # A choice is kept or drawn anew: small steps mean nothing between options.
        fresh = rng.random(centres.shape)
        choice = np.array([column.kind == "choice" for column in space.columns])
        redraw = choice & (rng.random(centres.shape) < 0.2)
        parts.append(np.clip(np.where(redraw, fresh, centres + step * (moved & ~choice)), 0, 1))
    points = np.concatenate(parts)
    shares = np.array([column.kind == "share" for column in space.columns])
    if shares.any():
        faces = points[: RAW // 2] if not len(incumbents) else np.concatenate([points[: RAW // 4], points[RAW:]])
        gone = shares & (rng.random(faces.shape) < rng.uniform(0, 1, (len(faces), 1)))
        points = np.concatenate([points, np.where(gone, 0.0, faces)])
    points[~space.active(points)] = 0.5
    return points


def ascend(acquisition: Acquisition, space: Space, starts: Tensor) -> Tensor:
    """Local maxima over the continuous coordinates from b x d starts, by one L-BFGS-B run over all of them stacked.

    Choices, and coordinates that are not active, stay as they are; integers move as if continuous.
    """
    choice = torch.tensor([column.kind == "choice" for column in space.columns])
    free = torch.as_tensor(space.active(starts.numpy())) & ~choice
    if not free.any():
        return starts

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        X = torch.tensor(flat.reshape(starts.shape), requires_grad=True)
        value = -acquisition(X).sum()
        (gradient,) = torch.autograd.grad(value, X)
        return value.item(), torch.where(free, gradient, 0.0).numpy().reshape(-1)

    low, high = torch.where(free, 0.0, starts), torch.where(free, 1.0, starts)
    bounds = list(zip(low.reshape(-1).tolist(), high.reshape(-1).tolist(), strict=True))
    found = minimize(
        loss, starts.numpy().reshape(-1), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS}
    ).x
    ended = torch.tensor(found.reshape(starts.shape))
    # The sum rose, yet a single start may have been traded for another.
    better = _values(acquisition, ended) > _values(acquisition, starts)
    return torch.where(better[:, None], ended, starts)


def change_one(acquisition: Acquisition, space: Space, x: Tensor) -> Tensor:
    """Hill climbing by single changes of a choice or an integer, each re-ascended."""
    value = float(_values(acquisition, x[None])[0])
    for _ in range(ROUNDS):
        moves = neighbours(space, x)
        if not len(moves):
            return x
        order = torch.argsort(_values(acquisition, moves), descending=True, stable=True)
        moves = ascend(acquisition, space, moves[order[:RESTARTS]])
        values = _values(acquisition, settle(space, moves))
        if float(values.max()) <= value + 1e-9:
            return x
        x, value = moves[values.argmax()], float(values.max())
    return x


def without_traces(space: Space, X: Tensor) -> Tensor:
    """The points (b x d) with shares that all but vanish at their floor: an ascent may stop just short of a face."""
    share = torch.tensor([column.kind == "share" for column in space.columns])
    active = torch.as_tensor(space.active(X.numpy()))
    return torch.where(share & active & (X < TRACE), 0.0, X)


def neighbours(space: Space, x: Tensor) -> Tensor:
    """Points (r x d) that differ from x (d,) in one active choice, or in one active integer by a step of 2^-k."""
    moves = []
    active = space.active(x[None].numpy())[0]
    for i, column in enumerate(space.columns):
        if not active[i] or not column.levels:
            continue
        if column.kind == "choice":
            code = min(int(x[i] * column.levels), column.levels - 1)
            others = [(other + 0.5) / column.levels for other in range(column.levels) if other != code]
        else:
            # Steps double from about one level up to half the range; on a log axis levels have no common width.
            steps = [2.0**-k for k in range(1, 2 + math.ceil(math.log2(column.levels)))]
            others = [float(x[i]) + sign * step for step in steps for sign in (-1, 1)]
        for other in others:
            move = x.clone()
            move[i] = other
            moves.append(move)
    if not moves:
        return x.new_zeros(0, len(x))
    settled = settle(space, torch.stack(moves))
    return settled[~same(settled, x[None])]


def settle(space: Space, X: Tensor) -> Tensor:
    """The points (b x d) that a config can hold: integers and options at their centres, shares on their chart."""
    return torch.as_tensor(space.encode_all(space.decode_all(X.clamp(0, 1).numpy())))


def same(X: Tensor, taken: Tensor) -> Tensor:
    """Which of b x d points are, for the purpose of a run, among r x d others: b booleans."""
    if not len(taken):
        return torch.zeros(len(X), dtype=torch.bool)
    return ((X[:, None] - taken[None]).abs() < SAME).all(-1).any(-1)


def _spread(ordered: Tensor, count: int, order: Tensor) -> Tensor:
    """Entries of `order` for up to `count` of the leading points that do not lie on top of each other."""
    chosen = [0]
    for i in range(1, len(ordered)):
        if len(chosen) == count:
            break
        if ((ordered[i] - ordered[chosen]).abs() > 0.05).any(-1).all():
            chosen.append(i)
    return order[chosen]


def _values(acquisition: Acquisition, X: Tensor) -> Tensor:
    with torch.no_grad():
        return acquisition(X)
