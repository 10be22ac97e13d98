"""From told trials to float64 tensors: the one crossing from user units to model units.

Outside, metrics are minimised or maximised in the units of the user. Inside, every column of `Y` is "larger is better",
standardised, and comparable across scales: each cell (the runs of one scale) is centred at its own best value, one unit
serves all cells, and losses that explode are compressed. Where it matters, near the best, the map is affine, so that a
weighted sum of per-metric Gaussian processes is itself Gaussian and log-EI on it is exact.

Runs of another study are cells of their own, a step away along an axis that stands for that study. Where nearly every
run is alone at its scale, cells are centred at a trend over the scales instead.

Metrics with a limit are further columns, centred at the limit instead, and affine around it. Metrics of a user's
function, which may be better either way, are centred at their median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bo.objective import Function, Largest, Limit, Objective, Pareto, Single
from bo.ports import ELSEWHERE, History
from bo.scaling import level as scaling
from bo.trial import Trial, results, unfinished
from search_spaces import Scale, Space

#: Runs of one scale from which on they tell its level.
FEW = 3
#: Excess over the best, relative to it, above which a loss counts as exploded and is compressed.
EXPLODED = 0.05
#: Draws of the level of a scale without runs.
DRAWS = 4096
#: 95% quantile of the standard normal distribution: its two-sided 90% interval.
Z90 = 1.6448536269514722


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
    derivative; it is odd, since runs that break a limit may be better than the best that keeps it.

    The last `limits` of the p columns are metrics with a limit. There u is what is beyond the limit, negative inside,
    best is 0 in every cell and size 1; the weight is 0, since limits are no part of what is minimised.

    Metrics of a `Function`, of which nobody knows which way is better, lie about the median of their cell, which stands
    in place of the best; u is the logarithm of those that are always positive.

    best: shape (c, p), NaN where a cell has no finite result. cap, mean, sd, weight: shape (p,). The weight is the
    magnitude in the minimised sum; with several objectives it is of their balanced sum, see `balanced`.
    places: shape (c, m), log2 of each cell's scale over the target's; then 0 on an axis for each other study, 1 on its
    own for the cells of one, `studies` axes in all. trend: shape (1 + m, p), coefficients of the level over (1, place),
    of its logarithm if `relative`, where cells are too small to tell their own. parts: shape (k, p), the weights of u
    in each of k objectives. reference: shape (k,), what each minimised objective has to beat, None where no one says.
    least: shape (c,), the objective's best value in each cell, NaN as in best. reach: shape (), up to which excess over
    that, on the scale of the metrics' excesses, a run counts as good. columns: which column is which.
    """

    relative: bool
    best: Tensor
    places: Tensor
    cap: Tensor
    mean: Tensor
    sd: Tensor
    weight: Tensor
    limits: int
    parts: Tensor
    reference: Tensor | None = None
    least: Tensor | None = None
    reach: Tensor | None = None
    columns: Columns | None = None
    studies: int = 0
    trend: Tensor | None = None

    @property
    def threshold(self) -> Tensor:
        """Model units of each limited metric from which on its limit is kept, shape (limits,)."""
        return (self.mean / self.sd)[len(self.mean) - self.limits :]

    def size(self, best: Tensor) -> Tensor:
        """What excesses over these best values (..., p) are measured in."""
        size = torch.ones_like(best)
        if self.relative:
            counted = best.shape[-1] - self.limits
            size[..., :counted] = best[..., :counted]
        return size

    def excess(self, u: Tensor, cell: Tensor) -> Tensor:
        best = self.best[cell]  # n x p
        return (u - best) / self.size(best)

    def forward(self, u: Tensor, cell: Tensor) -> Tensor:
        """Oriented metrics (n x p) of cells (n) to model units (n x p)."""
        return -(compress(self.excess(u, cell), self.cap) - self.mean) / self.sd

    def level(self, place: Tensor) -> Level:
        """Level of the cell at `place` (shape (m,)): its best value, or what the other cells make likely.

        For a cell without results it is a Bayesian linear regression of the (log) best values on the place, with a
        flat intercept, slopes N(0, 0.06^2) an octave, and residuals of 0.02 pooled with what is seen, all in the unit
        of the (log) level. What is said of such a cell goes by `foretold`; this weighs metrics against each other.
        """
        seen = torch.isfinite(self.best).all(-1)  # c
        here = seen & coincide(self.places, place)
        if here.any():
            best = self.best[here][0]
            return Level(best, torch.zeros_like(best))
        if self.trend is not None:  # the model knows how far levels are from it
            value = self.trend[0] + place @ self.trend[1:]
            best = value.exp() if self.relative else value
            return Level(torch.where(torch.arange(len(best)) < len(best) - self.limits, best, 0.0), value * 0)
        own = (self.places[:, self.places.shape[-1] - self.studies :] == 0).all(-1)
        if (seen & own).any():
            seen = seen & own
        counted = len(self.sd) - self.limits  # limits are known everywhere
        best = self.best[seen][:, :counted]
        size = torch.ones_like(best[0]) if self.relative else self.sd[:counted] / EXPLODED
        value = (best.log() if self.relative else best) / size  # c' x p
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
        mean, sd = (mean.exp(), mean.exp() * sd) if self.relative else (mean, sd)
        known = torch.zeros(self.limits, dtype=torch.float64)
        return Level(torch.cat([mean, known]), torch.cat([sd, known]))

    def foretold(self, place: Tensor) -> Level:
        """The same, but for a cell without results by the laws that the levels of this study's other scales follow.

        sd: of a normal distribution that is as wide between its 5% and 95% quantiles. It takes a few hundredths of a
        second a metric, so it is for what is said of a configuration and not for choosing it.
        """
        axes = self.places.shape[-1] - self.studies
        seen = torch.isfinite(self.best).all(-1) & (self.places[:, axes:] == 0).all(-1)
        level = self.level(place)
        if (
            self.trend is not None
            or not seen.any()
            or (place[axes:] != 0).any()
            or coincide(self.places[seen], place).any()
        ):
            return level
        best, sd = level.best.clone(), level.sd.clone()
        for i in range(len(best) - self.limits):
            known = self.best[seen][:, i].numpy()
            laws = scaling.Level.fit(self.places[seen][:, :axes].numpy(), known, 0.0 * known)
            at = place[:axes].numpy()
            best[i] = laws.predict(at)[0]
            low, high = np.quantile(laws.draws(at, DRAWS), [0.05, 0.95])
            sd[i] = (high - low) / (2 * Z90)
        return Level(best, sd)

    def affine(self, level: Level) -> tuple[Tensor, Tensor]:
        """(shift, gain), shape (p,): below the cap u = shift - gain y in a cell of that level."""
        size = self.size(level.best)
        return level.best + size * self.mean, size * self.sd

    def backward(self, y: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Oriented metrics (..., p) of a cell of that level at model units y (..., p), and their derivatives by -y."""
        size = self.size(level.best)
        h = self.mean - self.sd * y
        return level.best + size * expand(h, self.cap), size * self.sd * steepness(h, self.cap)


def compress(excess: Tensor, cap: Tensor) -> Tensor:
    """Identity up to `cap` on either side of 0, logarithmic beyond; odd, increasing, continuously differentiable."""
    far = cap * (1 + torch.log(torch.maximum(excess.abs(), cap) / cap))
    return torch.where(excess.abs() <= cap, excess, excess.sign() * far)


def expand(h: Tensor, cap: Tensor) -> Tensor:
    """Undoes `compress`."""
    return torch.where(h.abs() <= cap, h, h.sign() * cap * steepness(h, cap))


def steepness(h: Tensor, cap: Tensor) -> Tensor:
    """The derivative of `expand`: 1 up to `cap`, the excess over it beyond."""
    return (h.abs() / cap - 1).clamp(0, 50).exp()


@dataclass(frozen=True)
class Dataset:
    """What the model learns from: n told runs in c cells, p metrics, d coordinates, m scale axes, r open runs.

    X: n x d encoded configurations. S: n x m, log2(scale / target), and an axis for each other study. cell: n, index
    into `scales` and `studies`, what the runs of each cell have in common. Y: n x p, larger is
    better: the metrics of the objective, then a column for each limit. diverged: n. X_pending, S_pending: r x d, r x m,
    runs without a result: those still running, and those that failed or were stopped, which told nothing and must not
    be asked for again.
    running: r, which of them run.
    """

    space: Space
    X: Tensor
    S: Tensor
    cell: Tensor
    scales: tuple[Scale, ...]
    studies: tuple[str | None, ...]
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

    def index(self, scale: Scale) -> int:
        """Of the cell of this study's runs at a scale; the number of cells where there are none."""
        cells = zip(self.scales, self.studies, strict=True)
        return next((i for i, cell in enumerate(cells) if cell == (scale, None)), len(self.scales))

    def at(self, scale: Scale) -> Tensor:
        """Mask (n) of the runs told at a scale."""
        return self.cell == self.index(scale)

    @property
    def reached(self) -> list[Scale]:
        """The scales at which runs of this study have finished."""
        finite = set(self.cell[~self.diverged].tolist())
        cells = zip(self.scales, self.studies, strict=True)
        return [scale for i, (scale, study) in enumerate(cells) if study is None and i in finite]

    def place(self, scale: Scale) -> Tensor:
        """log2(scale / target), and 0 for each other study, shape (m,)."""
        own = torch.as_tensor(places(self.space, [scale])[0])
        return torch.nn.functional.pad(own, (0, self.S.shape[-1] - len(own)))

    def taken(self, scale: Scale) -> Tensor:
        """Encoded configurations (k x d) that ran, run, or failed at a scale."""
        same = coincide(self.S_pending, self.place(scale))
        return torch.cat([self.X[self.at(scale)], self.X_pending[same]])

    def underway(self, scale: Scale) -> Tensor:
        """Encoded configurations (k x d) that run at a scale."""
        return self.X_pending[coincide(self.S_pending, self.place(scale)) & self.running]

    @property
    def compressed(self) -> Tensor:
        """What the metrics of n' finite runs are above the best, as the outcome compresses it: n' x p."""
        return self.outcome.mean - self.outcome.sd * self.Y[~self.diverged]

    @property
    def excess(self) -> Tensor:
        """The same, not compressed."""
        return expand(self.compressed, self.outcome.cap)

    @property
    def log_slope(self) -> float:
        """Sum over all finite values of the log of how many model units a unit of excess is worth."""
        return float(-(steepness(self.compressed, self.outcome.cap).log() + self.outcome.sd.log()).sum())

    def reshaped(self, cap: Tensor) -> Dataset:
        """The same runs, with metrics compressed beyond other excesses (p)."""
        h = compress(self.excess, cap)
        sd = h.std(0, correction=0)
        outcome = replace(self.outcome, cap=cap, mean=h.mean(0), sd=torch.where(sd > 1e-9 * cap, sd, cap))
        Y = self.Y.clone()
        Y[~self.diverged] = (outcome.mean - h) / outcome.sd
        if self.diverged.any():
            Y[self.diverged] = Y[~self.diverged].min(0).values
        return replace(self, Y=Y, outcome=outcome)

    def measured(self) -> Dataset:
        """Without the told runs that diverged: what the metrics are learned from. Every open run stays."""
        told = ("X", "S", "cell", "Y", "diverged")
        return replace(self, **{name: getattr(self, name)[~self.diverged] for name in told})

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
    """The told and the open trials of a history, and their branches, as tensors."""
    space = history.space
    told, waiting = results(history.trials), unfinished(history.trials)
    index: dict[tuple[Scale, str | None], int] = {}
    cell = torch.tensor([index.setdefault((t.scale, t.study), len(index)) for t in told], dtype=torch.long)
    others = list(dict.fromkeys(study for _, study in index if study is not None))
    where = torch.as_tensor(places(space, [scale for scale, _ in index]))
    elsewhere = torch.tensor([[float(study == name) for name in others] for _, study in index], dtype=torch.float64)
    where = torch.cat([where, elsewhere.reshape(len(index), len(others))], dim=-1)
    columns = Columns.of(history.objective, told)
    u, value = columns.oriented(told), columns.values(told)
    allowed = torch.tensor(_allowed(space, told), dtype=torch.bool)
    outcome = fit_outcome(
        u,
        cell,
        where,
        columns.parts,
        allowed,
        limits=len(columns.limits),
        reference=columns.reference,
        value=value,
        either=columns.either,
        studies=len(others),
    )
    outcome = replace(outcome, columns=columns)
    open_places = torch.as_tensor(places(space, [trial.scale for trial in waiting]))
    diverged = ~torch.isfinite(u).all(-1)
    Y = torch.zeros_like(u)
    if not diverged.all():
        if not columns.either:
            u = within_reach(u, outcome.best[cell], allowed, outcome.limits)
        Y[~diverged] = outcome.forward(u[~diverged], cell[~diverged])
        Y[diverged] = Y[~diverged].min(0).values
    return Dataset(
        space=space,
        X=_encoded(space, told),
        S=where[cell],
        cell=cell,
        scales=tuple(scale for scale, _ in index),
        studies=tuple(study for _, study in index),
        Y=Y,
        diverged=diverged,
        X_pending=_encoded(space, waiting),
        S_pending=torch.nn.functional.pad(open_places, (0, len(others))),
        running=torch.tensor([trial.status == "running" for trial in waiting], dtype=torch.bool),
        outcome=outcome,
    )


@dataclass(frozen=True)
class Columns:
    """Which column of u means what: metrics of the objective, each minimised, then what is beyond each limit.

    names: of the metrics of the objective, in order. signs: 1 where a metric is minimised, -1 where it is maximised;
    what several objectives share goes by the first that names it. parts: k x p, weights of u in each of k objectives,
    0 for limits. reference: (k,), as in `Outcome`. nonlinear: the objective where it is no sum of metrics; there parts
    are the magnitudes of the weights, if it has some. logs: of each metric, whether u is its logarithm.
    """

    names: tuple[str, ...]
    signs: tuple[float, ...]
    limits: tuple[Limit, ...]
    parts: Tensor
    reference: Tensor | None
    nonlinear: Largest | Function | None = None
    logs: tuple[bool, ...] = ()

    @classmethod
    def of(cls, objective: Objective, told: Sequence[Trial] = ()) -> Columns:
        """told: the runs that say which metrics of a `Function` are always positive."""
        first: dict[str, float] = {}
        weighed = [_weights(part) for part in objective.parts]
        for weights in weighed:
            for name, weight in weights.items():
                first.setdefault(name, math.copysign(1.0, weight))
        rows = [
            [weights.get(name, 0.0) * sign for name, sign in first.items()] + [0.0] * len(objective.subject_to)
            for weights in weighed
        ]
        least = objective.minimised_reference if isinstance(objective, Pareto) else None
        reference = None if least is None else torch.tensor(least, dtype=torch.float64)
        parts = torch.tensor(rows, dtype=torch.float64)
        limits = tuple(objective.subject_to)
        if not isinstance(objective, (Largest, Function)):
            return cls(tuple(first), tuple(first.values()), limits, parts, reference)
        logs = tuple(isinstance(objective, Function) and _positive(told, name) for name in first)
        return cls(tuple(first), tuple(first.values()), limits, parts, None, objective, logs)

    @property
    def either(self) -> bool:
        """Whether the metrics of the objective may be better either way."""
        return isinstance(self.nonlinear, Function)

    def oriented(self, trials: Sequence[Trial]) -> Tensor:
        """u of told trials, n x p: every metric to be minimised; a row of NaN for one that diverged.

        A run whose metrics a `Function` makes no number of counts as diverged.
        """
        p = self.parts.shape[-1]
        rows = []
        for trial in trials:
            metrics = trial.metrics or {}
            row = [sign * metrics.get(name, math.nan) for name, sign in zip(self.names, self.signs, strict=True)]
            row += [limit.sign * (metrics.get(limit.metric, math.nan) - limit.limit) for limit in self.limits]
            finite = trial.status != "diverged" and all(map(math.isfinite, row))
            if finite and self.nonlinear is not None:
                finite = math.isfinite(self.nonlinear.of(metrics))
            if finite:
                row[: len(self.logs)] = [math.log(u) if log else u for u, log in zip(row, self.logs, strict=False)]
            rows.append(row if finite else [math.nan] * p)
        return torch.tensor(rows, dtype=torch.float64).reshape(len(trials), p)

    def values(self, trials: Sequence[Trial]) -> Tensor | None:
        """The objective of told trials where it is no sum of metrics, n; what is not finite is NaN."""
        if self.nonlinear is None:
            return None
        complete = [trial.metrics if not self.nonlinear.missing(trial.metrics or {}) else None for trial in trials]
        values = [self.nonlinear.of(metrics) if metrics else math.nan for metrics in complete]
        return torch.tensor([v if math.isfinite(v) else math.nan for v in values], dtype=torch.float64)


def _weights(part: Single) -> Mapping[str, float]:
    """Of each metric that an objective names; of a function of them, 1."""
    if isinstance(part, Function):
        return dict.fromkeys(part.named, 1.0)
    return part.terms if isinstance(part, Largest) else part.weights


def _positive(told: Sequence[Trial], name: str) -> bool:
    """Whether a metric is above 0 in every run that has it."""
    values = [(trial.metrics or {}).get(name, math.nan) for trial in told]
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0


def fit_outcome(
    u: Tensor,
    cell: Tensor,
    where: Tensor,
    parts: Tensor,
    allowed: Tensor,
    limits: int = 0,
    reference: Tensor | None = None,
    value: Tensor | None = None,
    either: bool = False,
    studies: int = 0,
) -> Outcome:
    """The transform for oriented metrics u (n x p; a row with a non-finite entry is a diverged run).

    cell: n, index into `where` (c x m), the places of the cells. parts (k x p), limits, reference: as in `Outcome`.
    allowed: n, false for runs made elsewhere that may not be made here. They set no best value, and count as good as
    the best one where they are better, else what can be reached would lie far away from everything.

    Only runs that keep all limits set best values and what is good, where there are such runs; the others may be
    better than the best.

    A run is good when its objective is at most the pooled median excess above the best of its cell, and at most 5% of
    it; with several objectives when no other of its cell beats it in all, and it beats the reference. A metric is kept
    linear as far as the good runs reach: with a single metric that caps it at the median excess or 5%; with several it
    also keeps those linear that are sacrificed at the best mixture.

    A limited metric is kept linear up to three times its median distance from the limit, on both sides. So are metrics
    that may be better `either` way, from their median, and as far as the good runs reach.

    value: n, the objective where it is no sum of the metrics. studies: number of the last axes of `where` that stand
    for other studies.

    Where most runs are at scales of few, those cells have the trend of `lowest` for their best.
    """
    p = u.shape[-1] - limits
    c = len(where)
    good = torch.isfinite(u).all(-1)
    weight = parts[0] if len(parts) == 1 else balanced(u[good], cell[good], parts)
    kept = good & (u[:, p:] <= 0).all(-1)
    objective = u @ weight if value is None else value
    table = torch.cat([u[:, :p], objective[:, None]], dim=-1)  # n x (p + 1), the objective last
    best = torch.full((c, p + 1), math.nan, dtype=torch.float64)
    for k in range(c):
        mine = good & (cell == k)
        if mine.any():
            choices = (mine & allowed & kept, mine & allowed, mine)
            best[k] = table[next(choice for choice in choices if choice.any())].min(0).values
            if either:
                best[k, :-1] = table[mine, :-1].median(0).values
    own = (where[:, where.shape[-1] - studies :] == 0).all(-1)
    seen = best[torch.isfinite(best).all(-1)]
    here = best[torch.isfinite(best).all(-1) & own]
    # Relative to the level makes small and large models comparable; it needs a level that is a stable, positive unit.
    relative = not either and len(seen) > 0 and bool((seen > 0).all()) and bool((table[good] > 0).all())
    if relative and len(here):
        relative = bool((here.max(0).values < 4 * here.min(0).values).all())
    trend = None
    if not either and scattered(cell):
        trend = lowest(table[good], where[cell[good]], relative)
        few = torch.bincount(cell[good], minlength=c) < FEW
        lines = trend[0] + where @ trend[1:]
        best = torch.where((few & torch.isfinite(best).all(-1))[:, None], lines.exp() if relative else lines, best)
    reachable = table[good] if either else within_reach(table[good], best[cell[good]], allowed[good], 0)
    excess = reachable / best[cell[good]] - 1 if relative else reachable - best[cell[good]]
    counted = kept[good] if kept.any() else torch.ones(len(excess), dtype=torch.bool)
    bound = EXPLODED if relative else math.inf
    spread = torch.stack([_median_of_positive(column).clamp_max(bound) for column in excess[counted].T])  # p + 1
    if len(parts) == 1:
        leading = counted & (excess[:, -1] <= spread[-1])
    else:
        leading = _leading(u[good] @ parts.T, cell[good], counted, reference)
    reach = excess[leading, :-1]
    if either:
        spread[:-1] = torch.stack([3 * _median_size(column) for column in excess[:, :-1].T])
        reach = reach.abs()
    cap = torch.maximum(spread[:-1], reach.max(0).values) if len(reach) else spread[:-1]
    beyond = u[good][:, p:]
    cap = torch.cat([cap, torch.stack([3 * _median_size(column) for column in beyond.T]) if limits else cap[:0]])
    h = compress(torch.cat([excess[:, :-1], beyond], dim=-1), cap)
    mean = h.mean(0) if len(h) else torch.zeros_like(cap)
    sd = h.std(0, correction=0) if len(h) else torch.ones_like(cap)
    sd = torch.where(sd > 1e-9 * cap, sd, cap)
    limit = torch.where(torch.isfinite(best[:, :1]), 0.0, math.nan).expand(c, limits)
    least, best = best[:, -1], torch.cat([best[:, :-1], limit], dim=-1)
    if trend is not None:
        trend = torch.nn.functional.pad(trend[:, :-1], (0, limits))
    return Outcome(
        relative=relative,
        best=best,
        places=where,
        cap=cap,
        mean=mean,
        sd=sd,
        weight=weight,
        limits=limits,
        parts=parts,
        reference=reference,
        least=least,
        reach=spread[-1],
        studies=studies,
        trend=trend,
    )


def scattered(cell: Tensor) -> bool:
    """Whether most of n runs are at scales that fewer than FEW ran at: then levels are smooth in scale, not free."""
    _, cells, counts = torch.unique(cell, return_inverse=True, return_counts=True)
    return 2 * int((counts[cells] < FEW).sum()) > len(cell) and len(counts) > FEW


def lowest(u: Tensor, where: Tensor, logs: bool) -> Tensor:
    """Coefficients of the line over (1, place) that runs (u: n x p at n x m places) lie above: (1 + m) x p.

    Its slopes are the least-squares ones, held back a little; it is as high as it can be. logs: of log u.
    """
    value = u.log() if logs else u
    middle = where.mean(0)
    offset = where - middle
    ridge = torch.eye(where.shape[-1], dtype=torch.float64)
    slopes = torch.linalg.solve(offset.T @ offset + ridge, offset.T @ (value - value.mean(0)))  # m x p
    above = value - offset @ slopes
    return torch.cat([(above.min(0).values - middle @ slopes)[None], slopes])


def within_reach(u: Tensor, best: Tensor, allowed: Tensor, limits: int) -> Tensor:
    """u (n x p), with runs that are not allowed here made no better than the best (n x p) of their cell."""
    out = ~allowed[:, None].expand_as(u).clone()
    out[:, u.shape[-1] - limits :] = False
    return torch.where(out & (u < best), best, u)


def balanced(u: Tensor, cell: Tensor, parts: Tensor) -> Tensor:
    """Weights (p) of the sum of several objectives (k x p), each in units of its own spread within a cell.

    It stands for them all where one number is needed: to transform metrics, and to climb scales.
    """
    spread = torch.ones(len(parts), dtype=torch.float64)
    if len(u):
        values = u @ parts.T  # n x k
        apart = torch.cat([values[mine] - values[mine].median(0).values for mine in _groups(cell)])
        spread = torch.stack([_median_size(column) for column in apart.T])
    return (parts / spread[:, None]).sum(0)


def undominated(values: Tensor) -> Tensor:
    """Which of n points (n x k, all minimised) no other beats: none is as good in all and better in one: n booleans."""
    points = values.detach().numpy()
    front = torch.zeros(len(points), dtype=torch.bool)
    left = np.lexsort(points.T[::-1]) if len(points) else np.zeros(0, dtype=int)  # what beats a point comes before it
    while len(left):
        front[left[0]] = True
        first, others = points[left[0]], points[left[1:]]
        left = left[1:][(others < first).any(-1) | (others == first).all(-1)]
    return front


def _leading(values: Tensor, cell: Tensor, counted: Tensor, reference: Tensor | None) -> Tensor:
    """Which of the runs that count (values n x k) are on the front of their cell and beat the reference, where any do.

    To the reference itself would be too far: a model that has to be right far from the front is less so near it.
    """
    front = torch.zeros(len(values), dtype=torch.bool)
    for group in _groups(cell):
        mine = group[counted[group]]
        front[mine] = undominated(values[mine])
    beats = front if reference is None else front & (values < reference).all(-1)
    return beats if beats.any() else front


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


def _groups(cell: Tensor) -> list[Tensor]:
    """Indices of the runs of each cell that has some."""
    return [(cell == k).nonzero()[:, 0] for k in sorted(set(cell.tolist()))]


def _median_size(values: Tensor) -> Tensor:
    """Median magnitude; where that is 0 the mean, and 1 where all are."""
    size = values.abs()
    for unit in (size.median(), size.mean()) if len(size) else ():
        if unit > 0:
            return unit
    return torch.ones((), dtype=torch.float64)


def _encoded(space: Space, trials: Sequence[Trial]) -> Tensor:
    d = len(space.columns)
    if not trials:
        return torch.zeros(0, d, dtype=torch.float64)
    return torch.as_tensor(space.encode_all([trial.config for trial in trials])).reshape(len(trials), d)
