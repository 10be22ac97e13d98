"""The maximiser of an acquisition over a space: many raw points, a batched ascent, then single changes.

An acquisition is a callable: b x d encoded points -> b values, larger is better, differentiable in the coordinates
that are continuous. It is asked about allowed points only: a maximiser climbs through the way back into the space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bo.acquisition.acquisition import Acquisition
from bo.acquisition.samples import nearby
from bo.quasirandom import sobol_points
from bo.surrogates.differences import differentiable
from search_spaces import Space
from search_spaces.parameter import Array

#: Two points this close in every coordinate, with the same choices, are the same run.
SAME = 1e-3
#: Two that run at once should be this far apart in some coordinate: what the first will tell is not known yet.
APART = 1e-2
#: A share below the cube of this, above its floor, is nothing.
TRACE = 0.03
RAW = 512
#: Where predicates hold for less than this share of the space, an eighth of the raw points has to do: to find one, they
#: are asked thousands of times.
SPARSE = 1 / 8
RESTARTS = 6
#: Of the leading raw points so many are looked at for a new one, before all of them are.
LEADING = 32
ITERATIONS = 40
#: Where there is a pool already (the further points of a batch), fewer starts and shorter ways do; and fewer still
#: for all but the first of those.
QUICK, QUICKEST = (2, 12), (1, 4)
ROUNDS = 3
#: Halvings of the way back from a point that a predicate forbids, and random steps (rounds x points) along borders.
HALVINGS = 20
STEPS = (40, 64)


@dataclass(frozen=True)
class Found:
    """A maximiser x (d,), a fixed point of encode(decode(x)), its value, and whether it is new."""

    x: Tensor
    value: float
    new: bool


def maximise(
    acquisition: Acquisition,
    space: Space,
    incumbents: Tensor,
    taken: Tensor,
    rng: np.random.Generator,
    pool: Tensor | None = None,
    effort: tuple[int, int] = QUICK,
    waiting: Tensor | None = None,
) -> Found:
    """The best allowed point of `space`, which is that of one scale (`Space.at`), that is not `taken`.

    incumbents: k x d good points, best first, around which is searched closely; they may be returned unless taken.
    taken: points (r x d) that must not be returned; where everything found is among them (a small discrete space that
    is exhausted), the best of all is returned with `new` False. pool: what `draw_pool` gave, to search from it with
    little `effort`: starts, and steps of the ascent. waiting: points (r x d) of runs under way, kept APART from where
    there is anything else. ValueError when the space has no allowed point.
    """
    quick = pool is not None
    raw = draw_pool(space, incumbents, rng) if pool is None else pool
    values = _values(acquisition, raw)
    acquisition = within(acquisition, space)
    order = torch.argsort(values, descending=True, stable=True)
    starts, iterations = effort if quick else (RESTARTS, ITERATIONS)
    refined = ascend(acquisition, space, raw[_spread(raw[order], starts, order)], iterations)
    best = refined[_values(acquisition, refined).argmax()]
    if not quick:
        best = change_one(acquisition, space, best)
    if space.constraints:
        best = walk(acquisition, space, best, rng)
    top = torch.cat([best[None], refined])
    leading = torch.cat([top, without_traces(space, top), raw[order[:LEADING]]])
    crowded = raw[:0] if waiting is None else waiting
    for near in (APART, SAME):
        for found in (leading, raw[order[LEADING:]]):
            settled = settle(space, found)
            settled = settled[allowed(space, settled)]
            new = ~same(settled, taken) & ~same(settled, crowded, near)
            if new.any():
                values = torch.where(new, _values(acquisition, settled), -math.inf)
                return Found(settled[values.argmax()], float(values.max()), True)
    best = settle(space, best[None])
    return Found(best[0], float(_values(acquisition, best)[0]), False)


def draw_pool(space: Space, incumbents: Tensor, rng: np.random.Generator) -> Tensor:
    """Allowed points to search from: k x d, spread over the space and close about the incumbents."""
    raw = torch.as_tensor(raw_points(space, incumbents.numpy(), rng))
    return raw[allowed(space, raw)]


def within(acquisition: Acquisition, space: Space) -> Acquisition:
    """The acquisition at the allowed points that points of the cube are read as, and so with the slope along them."""
    columns = space.repaired
    if not columns:
        return acquisition
    index = torch.tensor(columns)

    def repaired(x: Array) -> Array:
        return space.repair(x)[:, columns]

    def value(X: Tensor) -> Tensor:
        return acquisition(X.index_copy(1, index, differentiable(repaired, X, columns)))

    return value


def raw_points(space: Space, incumbents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sobol points, the incumbents and their neighbourhoods, and copies of all these on faces of the simplex.

    They keep to caps and inequalities; predicates may fail.
    """
    d = len(space.columns)
    seed = int(rng.integers(2**31))

    def stream(first: int, n: int) -> np.ndarray:
        return sobol_points(d, n, seed, first)

    count = RAW
    if space.predicates and allowed(space, torch.as_tensor(space.quantile(stream(0, RAW)))).double().mean() < SPARSE:
        count //= 8
    parts = [space.draw(stream, 0, count)]
    if len(incumbents):
        parts += [incumbents, nearby(space, np.repeat(incumbents[:5], 32, axis=0), rng)]
    points = np.concatenate(parts)
    shares = np.array([column.kind == "share" for column in space.columns])
    if shares.any():
        faces = points[: count // 2] if not len(incumbents) else np.concatenate([points[: count // 4], points[count:]])
        gone = shares & (rng.random(faces.shape) < rng.uniform(0, 1, (len(faces), 1)))
        points = np.concatenate([points, np.where(gone, 0.0, faces)])
    points[~space.active(points)] = 0.5
    return space.repair(points) if space.repaired else points


def ascend(acquisition: Acquisition, space: Space, starts: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Local maxima over the continuous coordinates from b x d starts, by one L-BFGS-B run over all of them stacked.

    Choices, and coordinates that are not active, stay as they are; integers move as if continuous. A way that ends at
    a point that is not allowed is gone back to where it leaves the allowed set.
    """
    choice = torch.tensor([column.kind == "choice" for column in space.columns])
    free = torch.as_tensor(space.active(starts.numpy())) & ~choice
    if not free.any():
        return starts

    def inside(flat: np.ndarray) -> Tensor:  # L-BFGS-B may leave a bound of 0 by 1e-19
        return torch.tensor(flat.reshape(starts.shape)).clamp(0, 1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        X = inside(flat).requires_grad_()
        value = -acquisition(X).sum()
        (gradient,) = torch.autograd.grad(value, X)
        return value.item(), torch.where(free, gradient, 0.0).numpy().reshape(-1)

    low, high = torch.where(free, 0.0, starts), torch.where(free, 1.0, starts)
    bounds = list(zip(low.reshape(-1).tolist(), high.reshape(-1).tolist(), strict=True))
    # At the kinks that caps and inequalities make, a line search could go on for long.
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-7}
    found = minimize(loss, starts.numpy().reshape(-1), jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    ended = retreat(space, starts, inside(found))
    # The sum rose, yet a single start may have been traded for another.
    better = _values(acquisition, ended) > _values(acquisition, starts)
    return torch.where(better[:, None], ended, starts)


def retreat(space: Space, starts: Tensor, ends: Tensor) -> Tensor:
    """The ends (b x d) that are allowed, and elsewhere the last allowed points found on the way from `starts`."""
    out = ~allowed(space, ends)
    if not out.any():
        return ends
    low, high = torch.zeros(len(ends), 1, dtype=torch.float64), torch.ones(len(ends), 1, dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        good = allowed(space, starts + middle * (ends - starts))[:, None]
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(out[:, None], starts + low * (ends - starts), ends)


def walk(acquisition: Acquisition, space: Space, x: Tensor, rng: np.random.Generator) -> Tensor:
    """The best of random steps from x (d,), shorter as they fail.

    An optimum is often on the border of what is allowed, or in a corner of it, and a predicate has no slope.
    """
    free = space.active(x[None].numpy())[0] & [column.kind != "choice" for column in space.columns]
    value, size = float(_values(acquisition, x[None])[0]), 0.1
    rounds, count = STEPS
    for _ in range(rounds):
        way = rng.standard_normal((count, len(x))) * 10.0 ** rng.uniform(-1, 0.3, (count, 1))
        # Along a border few directions lead on; among those of few coordinates there are more.
        way *= free & (rng.random(way.shape) < rng.choice([0.4, 1.0], (count, 1)))
        steps = (x + torch.as_tensor(size * way)).clamp(0, 1)
        steps = steps[allowed(space, steps)]
        values = _values(acquisition, steps)
        better = len(steps) > 0 and float(values.max()) > value
        if better:
            x, value = steps[values.argmax()], float(values.max())
        size *= 1.2 if better else 0.6
        if size < 1e-5:
            break
    return x


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
    return settled[~same(settled, x[None]) & allowed(space, settled)]


def settle(space: Space, X: Tensor) -> Tensor:
    """The points (b x d) that a config can hold: integers and options at their centres, shares on their chart.

    What breaks a predicate stays where it is, since no config holds it.
    """
    points = X.clamp(0, 1).numpy()
    settled = space.settle(points)
    if space.constraints:
        broken = ~space.satisfies(space.decode_all(points))
        settled[broken] = points[broken]
    return torch.as_tensor(settled)


def allowed(space: Space, X: Tensor) -> Tensor:
    """Which of b x d points are read as configs that satisfy all constraints: b booleans."""
    if not space.constraints:
        return torch.ones(len(X), dtype=torch.bool)
    return torch.as_tensor(space.satisfies(space.decode_all(X.clamp(0, 1).numpy())), dtype=torch.bool)


def same(X: Tensor, taken: Tensor, near: float = SAME) -> Tensor:
    """Which of b x d points are, for the purpose of a run, among r x d others: b booleans."""
    if not len(taken):
        return torch.zeros(len(X), dtype=torch.bool)
    return (torch.cdist(X, taken, p=math.inf) < near).any(-1)


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
