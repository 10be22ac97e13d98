"""Search in a box about the best configuration, which grows while it leads on and shrinks while it does not.

TuRBO-1 of Eriksson et al. 2019, "Scalable Global Optimization via Local Bayesian Optimization", section 2: in many
dimensions a model of the whole space promises most in its corners, where nothing is known and little is to be had.
Here the model keeps learning from all runs, after a restart too, and log-EI takes the place of a Thompson sample.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bo import dataset
from bo.acquisition.acquisition import Acquisition
from bo.acquisition.log_ei import log_ei
from bo.objective import Pareto, Single
from bo.optimize import (
    RAW,
    RESTARTS,
    ROUNDS,
    Found,
    allowed,
    ascend,
    neighbours,
    same,
    settle,
    within,
    without_traces,
)
from bo.policies import model_choice, posterior, recommendation
from bo.policies.design import good, initial, reproducible, started
from bo.policies.engine import Engine, weighed
from bo.ports import History, Proposal, Recommendation
from bo.quasirandom import sobol_points
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.features import Features
from bo.surrogates.hyperparameters import NumericalError
from bo.trial import Trial
from search_spaces import Scale, Space

#: Sides of the box at the start, at most, and at which the search starts again elsewhere; the cube has side 1.
SIDE, LARGEST, SMALLEST = 0.8, 1.6, 0.5**7
#: Successes in a row after which the box doubles.
SUCCESSES = 3
#: A success is better than the best by this share of what the best is ahead of the median run.
LEAST = 1e-3
#: Coordinates that a raw point changes, of many (Regis & Shoemaker 2013); the share of choices drawn anew.
MOVED, REDRAWN = 20, 0.2


@dataclass(frozen=True)
class TrustRegion:
    """Space-filling runs, then log-EI in a box about the best of them; where the box has become too small, again.

    n_init: space-filling runs at the start and after each restart; by default 2 and one more for every three
    coordinates. patience: failures in a row after which the box is halved; by default 4, or one for every coordinate.
    """

    n_init: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_init", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"TrustRegion needs {name} to be a whole number of at least 1, got {value!r}.")

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            at = history.space.top
            region = self.region(history)
            if region.restarts:
                again = f"The trust region became too small: restart {region.restarts}, space-filling runs first."
                missing = region.n_init - region.members(history, ("running", "finished", "diverged"))
                if missing > 0:
                    return initial(history, min(n, missing), rng, again)
            elif not started(history, self.n_init):
                return initial(history, n, rng)
            n = history.affordable([at] * n)
            return propose(history, region, n, rng) if n else ()

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        """The best posterior mean in the box about the best run, at the top scale; elsewhere, of all configurations."""
        with reproducible(rng):
            data = dataset.from_history(history)
            if tried or scale != history.space.top or not (data.at(scale) & ~data.diverged).any():
                return recommendation.recommend(history, scale, rng, tried)
            space = history.space.at(scale)
            try:
                model, _ = model_choice.fit(data, scale, history.memory.get("model"))
                value = recommendation.worth(model, model.at(scale), posterior.find_edge(data), scale)
                ran = torch.as_tensor(space.repair(data.X[data.at(scale) & ~data.diverged].numpy()))
                with torch.no_grad():
                    centre = ran[value(ran).argmax()]
                box = around(centre, self.region(history).side, model, space)
                found = confined(value, space, centre, box, ran[:0], rng)
                expected = model.predict(found.x, scale)
            except NumericalError:
                return recommendation.recommend(history, scale, rng, tried=True)
            note = " ".join(recommendation.kept_words(model, found.x, scale)) or None
            return Recommendation(space.decode(found.x), scale, expected.mean, expected.low, expected.high, note)

    def region(self, history: History) -> Region:
        """Where the search stands, by the told runs at the top scale in the order of their proposals."""
        d = len(history.space.columns)
        return fold(history, self.n_init or 2 + math.ceil(d / 3), self.patience or max(4, d))


@dataclass(frozen=True)
class Region:
    """The box's side, and the number of the first trial since the last restart. n_init: of every restart."""

    n_init: int
    side: float = SIDE
    first: int = 0
    restarts: int = 0

    def members(self, history: History, statuses: tuple[str, ...]) -> int:
        """Number of trials at the top scale since the last restart."""
        return sum(counts(trial, history) and trial.status in statuses for trial in history.trials[self.first :])


def fold(history: History, n_init: int, patience: int) -> Region:
    """The region after all told runs at the top scale; runs that diverged, or break a limit, are failures.

    Eriksson et al. 2019, section 2: SUCCESSES in a row double the side, `patience` failures halve it, below SMALLEST
    it starts anew.
    """
    region, objective = Region(n_init), single(history)
    values: list[float] = []
    successes = failures = 0
    side = region.side
    for number, trial in enumerate(history.trials):
        if not (counts(trial, history) and trial.told):
            continue
        value = objective.value(trial.metrics) if good(trial, objective) and trial.metrics else math.inf
        finite = [v for v in values if math.isfinite(v)]
        values.append(value)
        if len(values) <= n_init or not finite:
            continue
        best = min(finite)
        success = value < best - LEAST * (statistics.median(finite) - best)
        successes, failures = (successes + 1, 0) if success else (0, failures + 1)
        if successes == SUCCESSES:
            side, successes = min(2 * side, LARGEST), 0
        elif failures == patience:
            side, failures = side / 2, 0
        if side < SMALLEST:
            region = Region(n_init, SIDE, number + 1, region.restarts + 1)
            side, values, successes, failures = SIDE, [], 0, 0
    return Region(n_init, side, region.first, region.restarts)


def counts(trial: Trial, history: History) -> bool:
    """Whether it is a run of this study at the top scale: what another study did moves no box."""
    return trial.study is None and trial.scale == history.space.top


def single(history: History) -> Single:
    """The objective; ValueError where there are several, which have no best run to search around."""
    if isinstance(history.objective, Pareto):
        raise ValueError(
            f"The policy trust_region searches about one best run, and {len(history.objective.parts)} objectives have "
            'none; use policy="bayes".'
        )
    return history.objective


def propose(history: History, region: Region, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
    """`n` runs at the top scale, each the best by log-EI in the box about the best posterior mean since the restart.

    It is weighed by how likely limits are kept and a run does not diverge.
    """
    at = history.space.top
    space, inside, objective = history.space.at(at), history.trials[region.first :], single(history)
    ran = [trial.config for trial in inside if counts(trial, history) and good(trial, objective)]
    if not ran:
        return initial(history, n, rng, "No run is within the limits yet to search around: a space-filling point.")
    members = torch.as_tensor(space.repair(space.encode_all(ran)))
    try:
        search = posterior.Search.of(history, at, Engine(), rng)
        proposals: list[Proposal] = []
        for _ in range(n):
            belief = search.believed.at(at)
            with torch.no_grad():
                mean, _ = belief.value(members)
            centre, best = members[mean.argmax()], mean.max()
            box = around(centre, region.side, search.model, space)
            utility = weighed(improvement(belief, best), search.terms)
            found = confined(utility, space, centre, box, search.taken, rng)
            note = None if found.new else "Every configuration found has been tried; this one is run again."
            expected = posterior.predicted(search.believed, found.x, at)
            proposals.append(Proposal(space.decode(found.x), at, "trust_region", expected, search.memory, note))
            search, members = search.waiting_for(found.x), torch.cat([members, found.x[None]])
    except NumericalError as error:
        return initial(history, n, rng, f"A space-filling point in place of the model's: {error}")
    return tuple(proposals)


def improvement(belief: Belief, best: Tensor) -> Acquisition:
    """Log-EI over `best`."""

    def acquisition(X: Tensor) -> Tensor:
        mean, sd = belief.value(X)
        return log_ei(mean, sd, best)

    return acquisition


def around(centre: Tensor, side: float, model: Composite, space: Space) -> Tensor:
    """The box (2 x d, low and high) about a point, longer in numbers with longer lengthscales; choices are free.

    Sides are as lengthscales to their geometric mean (Eriksson et al. 2019, section 2), and equal where the model has
    no lengthscales.
    """
    stretch = torch.ones(len(centre), dtype=torch.float64)
    features = Features(space)
    gp = model.gp
    lengthscale = getattr(gp, "lengthscale", None)  # p x G
    if lengthscale is None:
        lengthscale = getattr(getattr(gp, "hyper", None), "lengthscale", None)
    if lengthscale is not None and features.numeric:
        log = lengthscale[:, : len(features.numeric)].log().mean(0)
        stretch[list(features.numeric)] = (log - log.mean()).exp()
    half = 0.5 * side * stretch
    choice = torch.tensor([column.kind == "choice" for column in space.columns])
    low = torch.where(choice, 0.0, (centre - half).clamp_min(0.0))
    return torch.stack([low, torch.where(choice, 1.0, (centre + half).clamp_max(1.0))])


def confined(
    acquisition: Acquisition, space: Space, centre: Tensor, box: Tensor, taken: Tensor, rng: np.random.Generator
) -> Found:
    """`optimize.maximise` with numbers and shares in a box (2 x d) about an allowed point (d,); choices are free.

    A point that is rounded or repaired to what the space allows may lie just outside.
    """
    low, width = box[0], (box[1] - box[0]).clamp_min(1e-12)
    climbing = within(acquisition, space)
    raw = drawn(space, centre, box, rng)
    raw = torch.cat([centre[None], raw[allowed(space, raw)]])
    with torch.no_grad():
        order = torch.argsort(acquisition(raw), descending=True, stable=True)
    refined = raw[order[:RESTARTS]]
    if not space.predicates:  # an ascent that knows of them would have to know of the box
        starts = ((refined - low) / width).clamp(0, 1)
        refined = low + width * ascend(lambda U: climbing(low + width * U), space, starts)
    refined = settle(space, torch.cat([refined, without_traces(space, refined)]))
    pool = torch.cat([refined[allowed(space, refined)], settle(space, raw[order])])
    with torch.no_grad():
        values = acquisition(pool)
        for _ in range(ROUNDS):
            moves = neighbours(space, pool[values.argmax()])
            if not len(moves):
                break
            pool, values = torch.cat([pool, moves]), torch.cat([values, acquisition(moves)])
    new = ~same(pool, taken)
    ranked = torch.where(new, values, -math.inf) if new.any() else values
    index = int(ranked.argmax())
    return Found(pool[index], float(values[index]), bool(new.any()))


def drawn(space: Space, centre: Tensor, box: Tensor, rng: np.random.Generator) -> Tensor:
    """RAW points in the box, most of which share coordinates with its centre: k x d."""
    d = len(centre)
    points = box[0] + (box[1] - box[0]) * torch.as_tensor(sobol_points(d, RAW, int(rng.integers(2**31))))
    choice = np.array([column.kind == "choice" for column in space.columns])
    share = np.where(choice, REDRAWN, min(1.0, MOVED / d))
    moved = rng.random((RAW, d)) < share
    moved[np.arange(RAW), rng.integers(d, size=RAW)] = True
    X = torch.where(torch.as_tensor(moved), points, centre).numpy().copy()
    X[~space.active(X)] = 0.5
    return torch.as_tensor(space.repair(X) if space.repaired else X)
