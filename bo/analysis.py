"""Numbers about the model for reports: how well it predicts, what its kernel has learned, which parameters matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from bo import dataset
from bo.objective import Pareto
from bo.policies import guard, model_choice
from bo.policies.design import reproducible
from bo.policies.engine import Engine
from bo.policies.optimum import DRIFTS
from bo.ports import History
from bo.quasirandom import sobol_points
from bo.surrogates.composite import Belief, Composite, combined
from bo.surrogates.drift import drawn as drawn_drifts
from bo.surrogates.drift import exponents
from bo.surrogates.features import Features
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.hyperparameters import NumericalError
from bo.surrogates.nonlinear import NonlinearBelief
from bo.surrogates.scale_shift import ScaleShiftGP
from bo.trial import results
from search_spaces import Integer, Real, Scale, Space
from search_spaces.parameter import Array

LEVELS = (0.5, 0.8, 0.9)
#: Rows of the design that effects of the posterior mean are estimated from, a power of two.
ROWS = 1024
#: Samples of the posterior for the intervals of effects, points of each at most, and rows at least.
DRAWS, POINTS, FEWEST = 64, 1536, 16
#: Least variance of the mean over the space, next to what is open about it, for effects to be told apart.
FLAT = 1e-9


@dataclass(frozen=True)
class LeftOut:
    """One run as the model foretells it from all others: the objective in the user's sign, a 90% interval with noise.

    The hyperparameters were fitted with the run, so errors are a little smaller than those of new runs.
    """

    trial: int
    measured: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Coverage:
    """How many of the runs lie in their interval of a probability, each foretold from all others."""

    level: float
    inside: int
    runs: int


@dataclass(frozen=True)
class Lengthscale:
    """How far something has to move for a metric to change: `encoded` in the unit cube, `user` in `unit`.

    user is None where there is no unit: for an option (two of which are 1 apart), a part of a schedule's curve, and the
    cube root of a share.
    """

    name: str
    encoded: float
    user: float | None
    unit: str


@dataclass(frozen=True)
class MetricKernel:
    """What the Gaussian process of one metric has learned; noise and amplitude are standard deviations in its units."""

    metric: str
    noise: float
    amplitude: float
    lengthscales: tuple[Lengthscale, ...]


@dataclass(frozen=True)
class Effect:
    """Shares of the variance of the objective over the space, 0 to 1, with 90% intervals.

    first: what the parameter explains alone. total: what would be left if all others were known. given: the options
    under which the parameter counts, to which the space is then narrowed.
    """

    parameter: str
    given: str
    first: float
    first_low: float
    first_high: float
    total: float
    total_low: float
    total_high: float


@dataclass(frozen=True)
class Drift:
    """By which power of a scale axis the best value of a parameter grows, as a metric has it, with a 90% interval.

    Of a number without a log scale it is three times the ranges an octave. Only of axes that the scales that ran span.
    """

    parameter: str
    axis: str
    metric: str
    exponent: float
    low: float
    high: float


@dataclass(frozen=True)
class Diagnostics:
    """The model of a study at one scale. kernels: empty where the model has none that can be read.

    drifts: of the model that has them, whether it decides or not. treatment: where models of several scales were
    compared, which decides, and why.
    """

    scale: dict[str, float]
    left_out: tuple[LeftOut, ...]
    coverage: tuple[Coverage, ...]
    kernels: tuple[MetricKernel, ...]
    effects: tuple[Effect, ...]
    drifts: tuple[Drift, ...] = ()
    trust: str | None = None
    treatment: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """Tables for the terminal."""
        error = math.sqrt(float(np.mean([(run.measured - run.mean) ** 2 for run in self.left_out])))
        spread = float(np.std([run.measured for run in self.left_out]))
        lines = [
            f"{len(self.left_out)} runs, each foretold from the others: off by {error:.4g}, they vary by {spread:.4g}"
        ]
        for each in self.coverage:
            share = each.inside / each.runs
            lines.append(f"  {each.level:.0%} intervals hold {each.inside} of {each.runs} ({share:.0%})")
        lines.append("What matters (share of the variance: alone, and with all it interacts with; 90% intervals)")
        width = max((len(effect.parameter + effect.given) + 3 for effect in self.effects), default=0)
        for effect in sorted(self.effects, key=lambda effect: (effect.given, -effect.total)):
            name = effect.parameter + (f" if {effect.given}" if effect.given else "")
            lines.append(
                f"  {name:<{width}}  {effect.first:4.0%} ({effect.first_low:.0%} to {effect.first_high:.0%})  "
                f"{effect.total:4.0%} ({effect.total_low:.0%} to {effect.total_high:.0%})"
            )
        for kernel in self.kernels:
            lines.append(
                f"{kernel.metric}: a run's noise {kernel.noise:.3g}, variation {kernel.amplitude:.3g}; it changes over"
            )
            for scale in kernel.lengthscales:
                user = "" if scale.user is None else f"{scale.user:.3g} {scale.unit}, "
                lines.append(f"  {scale.name}: {user}{scale.encoded:.2g} of the cube")
        if self.drifts:
            lines.append("How the best moves with scale (best ~ axis ^ exponent; 90% intervals)")
            wide = max(len(drift.parameter) for drift in self.drifts)
            for drift in self.drifts:
                lines.append(
                    f"  {drift.parameter:<{wide}}  {drift.axis} ^ {drift.exponent:+.2f} ({drift.low:+.2f} to "
                    f"{drift.high:+.2f})" + (f"  {drift.metric}" if len(self.kernels) > 1 else "")
                )
        if self.treatment:
            lines.append(self.treatment)
        if self.trust:
            lines.append(f"Runs elsewhere are {self.trust}.")
        return "\n".join(lines)


def diagnose(history: History, scale: Scale | None, rng: np.random.Generator, surrogate: str = "gp") -> Diagnostics:
    """Diagnostics of the model of a history at a scale, by default the largest that is run.

    surrogate: a name of `bo.surrogates.surrogate.SURROGATES`, as the policy has it. Runs of all scales that the model
    learns from are foretold. ValueError when fewer than two runs have a result, when there are several objectives, or
    when nothing could be fitted.
    """
    at = history.space.top if scale is None else scale
    if isinstance(history.objective, Pareto):
        raise ValueError("There are several objectives; diagnose the history with each of objective.parts by itself.")
    data = dataset.from_history(history)
    if data.finite < 2:
        raise ValueError(f"Diagnostics need at least 2 runs with finite results, there are {data.finite}; run some.")
    with reproducible(rng):
        try:
            model, memory = model_choice.fit(data, at, history.memory.get("model"), Engine(surrogate))
            finite = ~data.diverged
            ids = np.array([trial.id for trial in results(history.trials)])[finite.numpy()]
            alone = len(model.data.X) < len(ids)  # a model of this scale
            if alone:
                ids = ids[data.at(at)[finite].numpy()]
            left_out, coverage = foretold(model, ids.tolist(), history.objective.shown(1.0))
            belief = model.at(at)
            columns = dataset.Columns.of(history.objective)
            metrics = (*columns.names, *(f"{limit.metric} beyond its limit" for limit in columns.limits))
            effects = importance(belief, history.space.at(at), rng)
        except NumericalError as error:
            raise ValueError(f"No model could be fitted: {error}") from error
        trust = None
        if guard.elsewhere(history):
            found = guard.verdict(data, history, Engine(surrogate))
            trust = f"{'trusted' if found.trusted else 'not trusted'}: {found.why}"
        treatment, drifting = None, model
        if (gain := memory.get("joint_input")) is not None:
            better, worse = ("without", "with") if gain > 0 else ("with", "without")
            treatment = (
                f"Of the models over scales, the one {better} drifts foretells the runs nearest to the target "
                f"{abs(gain):.1f} nats better than the one {worse}."
            )
            if alone:
                treatment += " A model of this scale alone foretells it better yet, and decides."
            if alone or gain > 0:
                drifting = model_choice.named(data.measured(), {}, Engine(surrogate))
        moves = drifts(drifting, metrics)
        return Diagnostics(
            dict(at), left_out, coverage, kernels(model, metrics, belief), effects, moves, trust, treatment
        )


def drifts(model: Composite, metrics: Sequence[str]) -> tuple[Drift, ...]:
    """How the best value of each number moves with scale, where the model has such drifts."""
    if not isinstance(model.gp, ScaleShiftGP) or not model.gp.layout.across:
        return ()
    return tuple(
        Drift(each.parameter, each.axis, metrics[each.metric], each.mean, each.low, each.high)
        for each in exponents(model.gp, drawn_drifts(model.gp, DRIFTS))
    )


# --------------------------------------------------------------------------------------------------- predictions


def foretold(model: Composite, ids: Sequence[int], sign: float) -> tuple[tuple[LeftOut, ...], tuple[Coverage, ...]]:
    """Leave-one-out predictions of the runs with finite results, and the coverage of their intervals.

    ids: of the trials in the rows of the data. sign: -1 where the user's objective is the negative of the minimised.
    """
    data, outcome = model.data, model.data.outcome
    mean, variance = model.gp.leave_one_out()  # n x p
    runs, scores = [], []
    for i in range(len(data.Y)):
        level = outcome.level(data.S[i])
        belief = model.around(data.S[i])
        if isinstance(belief, NonlinearBelief):
            utility, spread, _ = belief.moments(mean[i][:, None], variance[i][:, None])
            exact, _, _ = belief.moments(data.Y[i][:, None], torch.zeros_like(variance[i][:, None]))
            centre, measured = float(belief.minimised(utility)), float(belief.minimised(exact))
            sd = float(belief.minimised(utility - spread) - belief.minimised(utility + spread)) / 2
        else:
            metrics, slope = outcome.backward(mean[i], level)
            sd = float(combined(outcome.weight * slope, variance[i][:, None], model.correlation)[0].sqrt())
            measured = float(outcome.weight @ outcome.backward(data.Y[i], level)[0])
            centre = float(outcome.weight @ metrics)
        others = int((data.cell == data.cell[i]).sum()) - 1
        half = float(stdtrit(others + 2, 0.95)) * sd  # as in `Composite.predict`
        low, high = sorted((sign * (centre - half), sign * (centre + half)))
        runs.append(LeftOut(ids[i], sign * measured, sign * centre, low, high))
        scores.append((abs(measured - centre) / sd, others + 2))
    coverage = []
    for level_ in LEVELS:
        inside = sum(z <= float(stdtrit(freedom, 0.5 + level_ / 2)) for z, freedom in scores)
        coverage.append(Coverage(level_, inside, len(scores)))
    return tuple(runs), tuple(coverage)


# -------------------------------------------------------------------------------------------------------- kernels


def kernels(model: Composite, metrics: Sequence[str], belief: Belief) -> tuple[MetricKernel, ...]:
    """The hyperparameters of each metric's process at the scale of `belief`; none for a model of another kind."""
    gp = model.gp
    if not isinstance(gp, GaussianProcess | ScaleShiftGP):
        return ()
    outcome = model.data.outcome
    unit = outcome.affine(outcome.level(belief.place))[1].tolist()  # units of the metric a model unit is worth there
    names = features_in_words(gp.features)
    found = []
    for i, metric in enumerate(metrics):
        encoded = gp.hyper.lengthscale[i].tolist()
        scales = tuple(
            Lengthscale(name, value, None if per is None else value * per, what)
            for value, (name, per, what) in zip(encoded, names, strict=True)
        )
        noise, amplitude = math.sqrt(float(gp.noise[i])), math.sqrt(float(gp.hyper.amplitude[i]))
        found.append(MetricKernel(metric, unit[i] * noise, unit[i] * amplitude, scales))
    return tuple(found)


def features_in_words(features: Features) -> list[tuple[str, float | None, str]]:
    """Of each group of features its name, and what the range of the cube is in user units, and which, if any."""
    space = features.space
    parameters = {place.start: place.parameter for place in space.placed}
    words: list[tuple[str, float | None, str]] = []
    for i in features.numeric:
        column, parameter = space.columns[i], parameters.get(i)
        if column.octaves:
            words.append((column.name, column.octaves, "octaves"))
        elif isinstance(parameter, Real | Integer):
            ends = parameter.numbers(np.array([[0.0], [1.0]]))
            words.append((column.name, float(ends[1] - ends[0]), "units"))
        elif column.levels:
            words.append((column.name, float(column.levels), "levels"))
        else:
            words.append((column.name, None, ""))
    words += [(space.columns[i].name, None, "") for i in features.choices]
    for _, columns in features.schedules:
        path = space.columns[columns[0]].schedule
        words += [(f"{path}, {part}", None, "") for part in ("warm-up", "middle", "decay")]
    words += [(space.columns[i].name, None, "") for columns in features.mixtures for i in columns]
    return words


# ----------------------------------------------------------------------------------------------------- importance


def importance(belief: Belief, space: Space, rng: np.random.Generator) -> tuple[Effect, ...]:
    """First-order and total effects (Sobol' indices) of the posterior mean over configs as `Space.sample` draws them.

    Of every parameter with all that belongs to it, and of every parameter of an option given that option. Estimators
    of Jansen 1999, on a Sobol sequence: Saltelli et al. 2010, "Variance based sensitivity analysis of model output",
    Comput. Phys. Commun. 181, table 2, second of the first-order and second of the total ones. Points that break an
    inequality count as where the space reads them; predicates are not asked. Intervals are 90% of the effects of
    functions drawn from the posterior, on rows drawn with replacement, and are widened to hold the effect of the mean,
    which is smoother than the function.
    """
    whole: dict[str, list[int]] = {}
    for i, column in enumerate(space.columns):
        whole.setdefault(column.parameter, []).append(i)
    groups: dict[tuple[tuple[int, int], ...], dict[str, list[int]]] = {(): whole}
    for place in space.placed:
        if place.when and place.stop > place.start:
            path = f"{option_words(space, *place.when[-1], '.')}.{place.name}"
            groups.setdefault(place.when, {})[path] = list(range(place.start, place.stop))
    found = []
    for when, columns in groups.items():
        estimates = effects(belief, space, list(columns.values()), when, rng)
        given = ", ".join(option_words(space, *pair) for pair in when)
        found += [Effect(name, given, *row) for name, row in zip(columns, estimates.tolist(), strict=True)]
    return tuple(found)


def option_words(space: Space, column: int, code: int, between: str = "=") -> str:
    """`optimizer=adamw` for a code of a choice column."""
    path = space.columns[column].name
    place = next((place for place in space.placed if place.start == column and place.branches), None)
    return f"{path}{between}{code if place is None else place.parameter.options[code]}"  # type: ignore[attr-defined]


def effects(
    belief: Belief,
    space: Space,
    groups: Sequence[Sequence[int]],
    when: tuple[tuple[int, int], ...],
    rng: np.random.Generator,
) -> Array:
    """Of g groups of columns: first, its low and high end, total, its low and high end: g x 6, each in [0, 1]."""
    points = design(space, groups, when, int(rng.integers(2**31)))  # (2 + g) x ROWS x d
    with torch.no_grad():
        blocks = [belief.value(block) for block in torch.as_tensor(points)]
    mean, sd = torch.stack([m for m, _ in blocks]).numpy(), torch.stack([s for _, s in blocks]).numpy()
    if mean[:2].var() <= FLAT * np.square(sd).mean():
        return np.zeros((len(groups), 6))
    first, total = jansen(mean)
    rows = max(FEWEST, min(ROWS, POINTS // len(points)))
    samples = drawn(belief, torch.as_tensor(points[:, :rows]), rng)  # DRAWS x (2 + g) x rows
    shares = np.array([jansen(f[:, rng.integers(rows, size=rows)]) for f in samples])  # DRAWS x 2 x g
    low, high = np.quantile(shares, [0.05, 0.95], axis=0)
    columns = []
    for k, share in enumerate((first, total)):
        columns += [share, np.minimum(low[k], share), np.maximum(high[k], share)]
    return np.stack(columns, axis=-1)


def design(space: Space, groups: Sequence[Sequence[int]], when: tuple[tuple[int, int], ...], seed: int) -> Array:
    """Points A, B, and for each of g groups A with the columns of the group from B: (2 + g) x ROWS x d."""
    d = len(space.columns)
    uniform = sobol_points(2 * d, ROWS, seed)
    A, B = uniform[:, :d], uniform[:, d:]
    blocks = [A, B]
    for columns in groups:
        block = A.copy()
        block[:, columns] = B[:, columns]
        blocks.append(block)
    stacked = np.concatenate(blocks)
    for column, code in when:
        stacked[:, column] = (code + 0.5) / space.columns[column].levels
    x = space.quantile(stacked)
    if space.repaired:
        x = space.repair(x)
    return x.reshape(len(blocks), ROWS, d)


def jansen(f: Array) -> tuple[Array, Array]:
    """First-order and total effects of g groups from values of A, B and the g mixed blocks, (2 + g) x rows: g each."""
    variance = max(float(f[:2].var()), 1e-300)
    first = 1 - np.square(f[1] - f[2:]).mean(-1) / (2 * variance)
    total = np.square(f[0] - f[2:]).mean(-1) / (2 * variance)
    return np.clip(first, 0, 1), np.clip(total, 0, 1)


def drawn(belief: Belief, points: Tensor, rng: np.random.Generator) -> Array:
    """DRAWS functions from the posterior at points (..., d): DRAWS x ...."""
    shape, d = points.shape[:-1], points.shape[-1]
    with torch.no_grad():
        mean, covariance = belief.joint(points.reshape(1, -1, d))
    size = covariance[0].diagonal().mean()
    eye = torch.eye(len(mean[0]), dtype=torch.float64)
    for jitter in (1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        factor, failed = torch.linalg.cholesky_ex(covariance[0] + jitter * size * eye)
        if not failed:
            break
    else:
        raise NumericalError(f"The posterior at {len(eye)} points stayed singular with a jitter of 1% of its variance.")
    normal = torch.as_tensor(rng.standard_normal((DRAWS, len(eye))))
    values: Array = (mean + normal @ factor.T).reshape(DRAWS, *shape).numpy()
    return values
