"""From told trials to float64 tensors: the one crossing from user units to model units.

Outside, metrics are minimised or maximised in the units of the user. Inside, every column of `Y` is "larger is better",
standardised, and comparable across scales: each cell (the runs of one scale) is centred at its own best value, one unit
serves all cells, and losses that explode are compressed. Where it matters, near the best, the map is affine, so that a
weighted sum of per-metric Gaussian processes is itself Gaussian and log-EI on it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bo.objective import Objective
from bo.ports import ELSEWHERE, History
from bo.trial import Trial
from search_spaces import Scale, Space

#: Excess over the best, relative to it, above which a loss counts as exploded and is compressed.
EXPLODED = 0.05


@dataclass(frozen=True)
class Level:
    """Where the metrics of a cell lie: the best value seen there, or a guess and its standard deviation.

    best, sd: shape (p,), in the oriented (minimised) units of each metric; sd is zero where the cell has results.
    """

    best: Tensor
    sd: Tensor


@dataclass(frozen=True)
class Outcome:
    """The transform of the metrics: y = -(h(excess) - mean) / sd with excess = (u - best of the cell) / size.

    u is the metric times the sign of its weight, so it is minimised; size is the cell's best value when `relative`,
    else 1. h is the identity up to `cap` and cap (1 + log(excess / cap)) beyond, which joins it with a continuous
    derivative.

    best: shape (c, p), NaN where a cell has no finite result. cap, mean, sd, weight (magnitudes): shape (p,).
    places: shape (c, m), log2 of each cell's scale over the target's.
    """

    relative: bool
    best: Tensor
    places: Tensor
    cap: Tensor
    mean: Tensor
    sd: Tensor
    weight: Tensor

    def excess(self, u: Tensor, cell: Tensor) -> Tensor:
        best = self.best[cell]  # n x p
        return ((u - best) / best if self.relative else u - best).clamp_min(0)

    def forward(self, u: Tensor, cell: Tensor) -> Tensor:
        """Oriented metrics (n x p) of cells (n) to model units (n x p)."""
        return -(compress(self.excess(u, cell), self.cap) - self.mean) / self.sd

    def level(self, place: Tensor) -> Level:
        """Level of the cell at `place` (shape (m,)): its best value, or what the other cells make likely.

        For a cell without results it is a Bayesian linear regression of the (log) best values on the place, with a
        flat intercept, slopes N(0, 0.06^2) an octave, and residuals of 0.02 pooled with what is seen, all in the unit
        of the (log) level. It decides no choice of a configuration; it makes predicted intervals honest, that is: wide.
        """
        seen = torch.isfinite(self.best).all(-1)  # c
        here = seen & coincide(self.places, place)
        if here.any():
            best = self.best[here][0]
            return Level(best, torch.zeros_like(best))
        size = torch.ones_like(self.sd) if self.relative else self.sd / EXPLODED
        value = (self.best[seen].log() if self.relative else self.best[seen]) / size  # c' x p
        offset = self.places[seen] - place  # c' x m
        design = torch.cat([torch.ones(len(offset), 1, dtype=torch.float64), offset], dim=-1)  # c' x (1 + m)
        slope, scatter, belief = 0.06, 0.02, 2.0  # the scatter is believed like that of two cells
        prior = torch.full((design.shape[-1],), (scatter / slope) ** 2, dtype=torch.float64)
        prior[0] = 1e-9
        covariance = torch.linalg.inv(torch.diag(prior) + design.T @ design)  # in units of the scatter
        coefficient = covariance @ (design.T @ value)  # (1 + m) x p
        misfit = (value - design @ coefficient).square().sum(0)
        scatter2 = (belief * scatter**2 + misfit) / (belief + len(value))
        mean = coefficient[0] * size
        sd = (scatter2 * (1 + covariance[0, 0])).sqrt() * size
        return Level(mean.exp(), mean.exp() * sd) if self.relative else Level(mean, sd)

    def affine(self, level: Level) -> tuple[Tensor, Tensor]:
        """(shift, gain), shape (p,): below the cap u = shift - gain y in a cell of that level."""
        size = level.best if self.relative else torch.ones_like(level.best)
        return level.best + size * self.mean, size * self.sd

    def backward(self, y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Oriented metrics (p) of a cell of that level at model units y (p), and their derivatives by -y."""
        size = level.best if self.relative else torch.ones_like(level.best)
        h = self.mean - self.sd * y
        stretch = (h / self.cap - 1).clamp(0, 50).exp()  # inverts `compress`: 1 below the cap
        return level.best + size * torch.where(h <= self.cap, h, self.cap * stretch), size * self.sd * stretch


def compress(excess: Tensor, cap: Tensor) -> Tensor:
    """Identity up to `cap`, logarithmic beyond; increasing, continuously differentiable."""
    return torch.where(excess <= cap, excess, cap * (1 + torch.log(excess.clamp_min(cap) / cap)))


@dataclass(frozen=True)
class Dataset:
    """What the model learns from: n told runs in c cells, p metrics, d coordinates, m scale axes, r open runs.

    X: n x d encoded configurations. S: n x m, log2(scale / target). cell: n, index into `scales`. Y: n x p, larger is
    better. diverged: n. X_pending, S_pending: r x d, r x m, runs without a result: those
    still running, and those that failed or were stopped, which told nothing and must not be asked for again.
    running: r, which of them run.
    """

    space: Space
    X: Tensor
    S: Tensor
    cell: Tensor
    scales: tuple[Scale, ...]
    Y: Tensor
    diverged: Tensor
    X_pending: Tensor
    S_pending: Tensor
    running: Tensor
    outcome: Outcome

    @property
    def finite(self) -> int:
        """Number of runs with finite metrics."""
        return int((~self.diverged).sum())

    def at(self, scale: Scale) -> Tensor:
        """Mask (n) of the runs told at a scale."""
        index = self.scales.index(scale) if scale in self.scales else -1
        return self.cell == index

    def place(self, scale: Scale) -> Tensor:
        """log2(scale / target), shape (m,)."""
        return torch.as_tensor(places(self.space, [scale])[0])

    def taken(self, scale: Scale) -> Tensor:
        """Encoded configurations (k x d) that ran, run, or failed at a scale."""
        same = coincide(self.S_pending, self.place(scale))
        return torch.cat([self.X[self.at(scale)], self.X_pending[same]])

    def started(self, scale: Scale) -> Tensor:
        """Encoded configurations (k x d) that have a result at a scale, or will."""
        same = coincide(self.S_pending, self.place(scale))
        return torch.cat([self.X[self.at(scale)], self.X_pending[same & self.running]])

    def rows(self, keep: Tensor) -> Dataset:
        """The same transform, with the told runs of a mask (n) and only the open runs at their scales."""
        told = {name: getattr(self, name)[keep] for name in ("X", "S", "cell", "Y", "diverged")}
        same = coincide(self.S_pending[:, None], told["S"][None]).any(-1)
        waiting = {name: getattr(self, name)[same] for name in ("X_pending", "S_pending", "running")}
        return replace(self, **told, **waiting)


def coincide(one: Tensor, other: Tensor) -> Tensor:
    """Whether places (..., m) are of one scale, but for rounding: the broadcast shape without m."""
    return (one - other).abs().sum(-1) < 1e-9


def places(space: Space, scales: Sequence[Scale]) -> np.ndarray:
    """log2(scale / target) of each scale: n x m, with m = 0 in a space without fidelity."""
    if space.fidelity is None:
        return np.zeros((len(scales), 0))
    return np.array([space.fidelity.log2(scale) for scale in scales]).reshape(len(scales), len(space.fidelity.axes))


def from_history(history: History) -> Dataset:
    """The told and the open trials of a history as tensors."""
    space, objective = history.space, history.objective
    told = [trial for trial in history.trials if trial.told]
    waiting = [trial for trial in history.trials if not trial.told]
    scales = tuple(dict.fromkeys(trial.scale for trial in told))
    cell = torch.tensor([scales.index(trial.scale) for trial in told], dtype=torch.long)
    u = torch.tensor([_oriented(trial, objective) for trial in told], dtype=torch.float64)
    u = u.reshape(len(told), len(objective.weights))
    allowed = torch.tensor(_allowed(space, told), dtype=torch.bool)
    outcome = fit_outcome(u, cell, torch.as_tensor(places(space, scales)), _magnitudes(objective), allowed)
    diverged = ~torch.isfinite(u).all(-1)
    Y = torch.zeros_like(u)
    if not diverged.all():
        Y[~diverged] = outcome.forward(u[~diverged], cell[~diverged])
        Y[diverged] = Y[~diverged].min(0).values
    return Dataset(
        space=space,
        X=_encoded(space, told),
        S=torch.as_tensor(places(space, [trial.scale for trial in told])),
        cell=cell,
        scales=scales,
        Y=Y,
        diverged=diverged,
        X_pending=_encoded(space, waiting),
        S_pending=torch.as_tensor(places(space, [trial.scale for trial in waiting])),
        running=torch.tensor([trial.status == "running" for trial in waiting], dtype=torch.bool),
        outcome=outcome,
    )


def fit_outcome(u: Tensor, cell: Tensor, where: Tensor, weight: Tensor, allowed: Tensor) -> Outcome:
    """The transform for oriented metrics u (n x p; a row with a non-finite entry is a diverged run).

    cell: n, index into `where` (c x m), the places of the cells. weight: magnitudes in the minimised sum, shape (p,).
    allowed: n, false for runs made elsewhere that may not be made here. They set no best value, and count as good as
    the best one where they are better, else what can be reached would lie far away from everything.

    A run is good when its objective is at most the pooled median excess above the best of its cell, and at most 5% of
    it. A metric is kept linear as far as the good runs reach: with a single metric that caps it at the median excess
    or 5%; with several it also keeps those linear that are sacrificed at the best mixture.
    """
    p = u.shape[-1]
    c = len(where)
    good = torch.isfinite(u).all(-1)
    table = torch.cat([u, u @ weight[:, None]], dim=-1)  # n x (p + 1), the objective last
    best = torch.full((c, p + 1), math.nan, dtype=torch.float64)
    for k in range(c):
        mine = good & (cell == k)
        if mine.any():
            best[k] = table[mine & allowed if (mine & allowed).any() else mine].min(0).values
    seen = best[torch.isfinite(best).all(-1)]
    # Relative to the level makes small and large models comparable; it needs a level that is a stable, positive unit.
    relative = len(seen) > 0 and bool((seen > 0).all()) and bool((seen.max(0).values < 4 * seen.min(0).values).all())
    table, cell = table[good], cell[good]
    if relative:
        excess = (table / best[cell] - 1).clamp_min(0)
    elif len(table):
        excess = (table - best[cell]).clamp_min(0)
    else:
        excess = table
    limit = EXPLODED if relative else math.inf
    spread = torch.stack([_median_of_positive(column).clamp_max(limit) for column in excess.T])  # p + 1
    reach = excess[excess[:, -1] <= spread[-1], :-1]
    cap = torch.maximum(spread[:-1], reach.max(0).values) if len(reach) else spread[:-1]
    h = compress(excess[:, :-1], cap)
    mean = h.mean(0) if len(h) else torch.zeros(p, dtype=torch.float64)
    sd = h.std(0, correction=0) if len(h) else torch.ones(p, dtype=torch.float64)
    sd = torch.where(sd > 1e-9 * cap, sd, cap)
    return Outcome(relative, best[:, :-1], where, cap, mean, sd, weight)


def _allowed(space: Space, trials: Sequence[Trial]) -> list[bool]:
    """Whether its scale allows each run: only one made elsewhere may break what the space allows there."""
    there: dict[Scale, Space | None] = {}  # None where nothing is allowed
    for scale in {trial.scale for trial in trials if trial.source in ELSEWHERE}:
        try:
            there[scale] = space.at(scale)
        except ValueError:
            there[scale] = None
    return [
        trial.source not in ELSEWHERE or ((here := there[trial.scale]) is not None and here.allows(trial.config))
        for trial in trials
    ]


def _median_of_positive(excess: Tensor) -> Tensor:
    """Median of the excesses above zero; without any (one run, or ties) EXPLODED, which then only sets a unit."""
    above = excess[excess > 0]
    return above.median() if len(above) else torch.tensor(EXPLODED, dtype=torch.float64)


def _magnitudes(objective: Objective) -> Tensor:
    return torch.tensor([abs(w) for w in objective.weights.values()], dtype=torch.float64)


def _oriented(trial: Trial, objective: Objective) -> list[float]:
    """The metrics of a told trial, each to be minimised; NaN when it diverged."""
    metrics = trial.metrics or {}
    if trial.status == "diverged" or any(not math.isfinite(metrics.get(name, math.nan)) for name in objective.weights):
        return [math.nan] * len(objective.weights)
    return [math.copysign(1.0, weight) * metrics[name] for name, weight in objective.weights.items()]


def _encoded(space: Space, trials: Sequence[Trial]) -> Tensor:
    d = len(space.columns)
    if not trials:
        return torch.zeros(0, d, dtype=torch.float64)
    return torch.as_tensor(space.encode_all([trial.config for trial in trials])).reshape(len(trials), d)
