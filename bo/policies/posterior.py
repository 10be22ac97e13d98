"""From a history to proposals by the posterior of the objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo import dataset
from bo.acquisition import constrained, cost, hypervolume, prior_guided
from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.environment import AveragedBelief
from bo.acquisition.samples import posterior_mean
from bo.dataset import Dataset
from bo.optimize import QUICK, QUICKEST, draw_pool, maximise, same
from bo.policies.design import initial, sequence_seed
from bo.policies.engine import Engine, unit, volume, weighed
from bo.policies.model_choice import fit
from bo.policies.optimum import sampled
from bo.policies.replicates import worth_repeating
from bo.ports import History, Proposal
from bo.surrogates import divergence
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.divergence import Divergence, caution
from bo.surrogates.drift import leads
from bo.surrogates.features import Features
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.hyperparameters import NumericalError
from bo.trial import results
from search_spaces import Scale, Space

#: Share of the objective by which configurations differ that are as good as each other, and first runs at a scale that
#: cover what is possible.
PLATEAU, SPREAD = 0.0025, 3
#: Points of a batch from which on the next are sought with least effort.
CAREFUL = 8
#: Of those told, the configurations around which is searched closely.
LEADERS = 10
COVER = "One of a few first runs that cover where the best may lie: what ran so far leaves that open."
AGAIN = "Every configuration of the space has been tried; this one is run again."


def propose(
    history: History,
    n: int,
    rng: np.random.Generator,
    source: str,
    engine: Engine = Engine(),  # noqa: B008 - a frozen value
    greedy: bool = False,
) -> tuple[Proposal, ...]:
    """Up to `n` runs at the top scale: the engine's criterion on the posterior over all scales, one after the other.

    While nothing was run at the top scale, the first is the minimiser of the posterior mean: a random run there costs
    as much and tells less. `greedy` asks for it where something was run, a recipe of the user's say. Each proposal, and
    each run without a result, is pending for the next.
    """
    at = history.space.top
    n = history.affordable([at] * n)
    if n == 0:
        return ()
    try:
        search = Search.of(history, at, engine, rng)
        proposals: list[Proposal] = []
        spread = search.first(n) if greedy else []
        for i in range(n):
            found, note = spread[i] if i < len(spread) else search.next(greedy=greedy and i == 0)
            expected = None if search.several else predicted(search.believed, found, at)
            proposals.append(Proposal(search.space.decode(found), at, source, expected, search.memory, note))
            if i + 1 < n:
                search = search.waiting_for(found).pooled()
    except NumericalError as error:
        return initial(history, n, rng, f"A space-filling point in place of the model's: {error}")
    return tuple(proposals)


@dataclass(frozen=True)
class Search:
    """All that the next run at one scale is chosen by.

    model: given the told runs; believed: and conditioned on its own mean at those without a result. tried, pending:
    k x d and r x d configurations there with a finite result, or that will have one; of both only those likely to keep
    the limits on metrics. taken: whatever ran there or runs. terms: logarithms that weigh every utility. told: number
    of told runs at all scales. left: share of the limits still to be spent. leaders: points about which is searched
    closely. pool: what the further points of a batch are searched from. chosen: number of points of the batch so far.
    """

    space: Space
    at: Scale
    engine: Engine
    model: Composite
    believed: Composite
    tried: Tensor
    pending: Tensor
    taken: Tensor
    terms: tuple[Acquisition, ...]
    told: int
    left: float
    memory: dict[str, Any]
    leaders: Tensor
    rng: np.random.Generator
    pool: Tensor | None = None
    chosen: int = 0

    @classmethod
    def of(cls, history: History, at: Scale, engine: Engine, rng: np.random.Generator) -> Search:
        space, data = history.space.at(at), dataset.from_history(history)
        model, fitted = fit(data, at, history.memory.get("model"), engine)
        memory = {"sequence": sequence_seed(history, rng), "model": fitted}
        edge = find_edge(data, history.memory.get("edge"))
        if edge is not None:
            memory["edge"] = edge.memory()
        left = remaining(history)
        finite = data.at(at) & ~data.diverged
        # Some were made elsewhere and are not allowed here: to improve on those may be out of reach.
        tried, pending = (torch.as_tensor(space.repair(X.numpy())) for X in (data.X[finite], data.underway(at)))
        if data.outcome.limits:
            tried, pending = (X[constrained.likely_feasible(model, at, X)] for X in (tried, pending))
        return cls(
            space=space,
            at=at,
            engine=engine,
            model=model,
            believed=model.believe(model.data.X_pending, model.data.S_pending),
            tried=tried,
            pending=pending,
            taken=data.taken(at),
            terms=terms(history, data, model, edge, engine, at, left),
            told=len(data.Y),
            left=left,
            memory=memory,
            leaders=leaders(model, at),
            rng=rng,
        )

    @property
    def several(self) -> bool:
        """Whether there are several objectives, and a front is sought."""
        return len(self.model.data.outcome.parts) > 1

    def next(self, greedy: bool) -> tuple[Tensor, str | None]:
        """The next point (d,), and what an operator should know of it."""
        situation = self.situation()
        criterion = self.criterion(situation, greedy)
        effort = QUICK if self.chosen < CAREFUL else QUICKEST
        found = maximise(criterion, self.space, self.leaders, self.taken, self.rng, self.pool, effort, self.pending)
        if isinstance(situation.believed, AveragedBelief):
            x = situation.believed.most_telling(found.x)
            return x, AGAIN if bool(same(x[None], self.taken)) else None
        row = None if greedy or self.several else worth_repeating(situation, found.x)
        if row is not None:
            return self.tried[row], "Run again on purpose: under this noise a repeat tells more than a new one."
        return found.x, None if found.new else AGAIN

    def first(self, n: int) -> list[tuple[Tensor, str | None]]:
        """Where the runs tell little of where the best configuration is, points for the first n runs at this scale.

        That is so with one or two scales, scales on another line, or runs of other studies alone, as long as the best
        point may well be better by more than a PLATEAU. The points, up to SPREAD, then cover what is possible: the
        minimiser of the mean first, which one run by itself does best with, then what adds most to it.
        """
        scales = [scale for scale in self.model.data.reached if scale != self.at]
        places = torch.stack([self.model.data.place(scale) for scale in scales]) if scales else torch.zeros(0, 0)
        axes = len(self.space.fidelity.axes) if self.space.fidelity is not None else 0
        known = len(scales) > 2 and leads(places[:, :axes], self.model.data.place(self.at)[:axes])
        if n == 1 or self.several or not axes or known:
            return []
        x, _ = self.next(greedy=True)
        best = sampled(self.model, self.at, x, self.rng)
        if float(best.shortfall.mean()) <= self.plateau:
            return []
        return [(point, COVER) for point in best.cover(x, min(n, SPREAD), self.rng, self.taken)]

    @property
    def plateau(self) -> float:
        """How much worse than the best is as good as it, in units of the objective."""
        outcome = self.model.data.outcome
        size = outcome.size(outcome.level(self.model.data.place(self.at)).best)
        relative = float((outcome.weight * size).sum()) if outcome.relative else 0.0
        return max(PLATEAU * relative, math.sqrt(float(self.engine.belief(self.model, self.at).noise)))

    def situation(self) -> Situation:
        return Situation(
            space=self.space,
            belief=self.engine.belief(self.model, self.at),
            believed=self.engine.belief(self.believed, self.at),
            tried=self.tried,
            pending=self.pending,
            told=self.told,
            left=self.left,
            rng=self.rng,
        )

    def criterion(self, situation: Situation, greedy: bool) -> Acquisition:
        """What to maximise: the posterior mean where nothing was run, what keeps the limits where nothing does yet."""
        outcome = self.model.data.outcome
        if outcome.limits and not len(self.tried):
            return weighed(constrained.log_feasible(self.believed, self.at), self.terms[1:])
        if greedy or not len(self.tried) + len(self.pending):
            criterion, logarithm = posterior_mean(situation.believed), False
        elif self.several:
            criterion, logarithm = volume(situation, self.believed, self.at), True
        else:
            criterion, logarithm = self.engine.utility(situation)
        worth = 1.0 if logarithm or not self.terms else unit(situation.belief, self.model.data.X)
        return weighed(criterion, self.terms, worth)

    def waiting_for(self, x: Tensor) -> Search:
        """With a run at x (d,) under way."""
        believed = self.believed.believe(x[None], self.model.data.place(self.at)[None])
        kept = x[None]
        if self.model.data.outcome.limits:
            kept = kept[constrained.likely_feasible(self.model, self.at, kept)]
        taken, pending = torch.cat([self.taken, x[None]]), torch.cat([self.pending, kept])
        return replace(self, believed=believed, taken=taken, pending=pending, chosen=self.chosen + 1)

    def pooled(self) -> Search:
        """With points to search from, drawn once for all that follow."""
        if self.pool is not None:
            return self
        pool, believed = draw_pool(self.space, self.leaders, self.rng), self.believed
        if isinstance(believed.gp, GaussianProcess):
            believed = replace(believed, gp=believed.gp.watch(believed.at(self.at).inputs(pool)))
        return replace(self, believed=believed, pool=pool)


def find_edge(data: Dataset, start: Mapping[str, Any] | None = None) -> Divergence | None:
    """Where runs diverge, as far as some have; `start` is an earlier one's `memory`."""
    if not data.diverged.any():
        return None
    features = Features(data.space)
    return divergence.fit(features, features(data.X, data.S, data.cell), data.diverged, start)


def terms(
    history: History,
    data: Dataset,
    model: Composite,
    edge: Divergence | None,
    engine: Engine,
    at: Scale,
    left: float,
) -> tuple[Acquisition, ...]:
    """The logarithms that weigh every utility, beside it."""
    found: list[Acquisition] = []
    if data.outcome.limits:
        found.append(constrained.log_feasible(model, at))
    if edge is not None:
        found.append(log_ok(edge, model.at(at), int(data.diverged.sum())))
    if engine.prior is not None:
        prior = prior_guided.parse(data.space, engine.prior)
        found.append(prior_guided.term(prior, len(data.Y), engine.beta))
    if engine.cost != "ignored":
        found.append(cost.term(seconds(history, data, at), 1.0 if engine.cost == "seconds" else left))
    return tuple(found)


def log_ok(edge: Divergence, belief: Belief, diverged: int) -> Acquisition:
    """log P(a run does not diverge), with the caution that so many diverged runs call for."""
    power = caution(diverged)
    return lambda X: power * edge.log_ok(belief.inputs(X))


def seconds(history: History, data: Dataset, at: Scale) -> Acquisition:
    """log seconds of a run at a scale, as those of known time have taken."""
    told = results(history.trials)
    timed = torch.tensor([bool(trial.seconds) and trial.attempt == 1 for trial in told], dtype=torch.bool)
    took = torch.tensor([trial.seconds or 0.0 for trial in told], dtype=torch.float64)
    place = data.place(at)
    return cost.log_cost(data.space, data.X[timed], data.S[timed], data.cell[timed], took[timed], place, data.index(at))


def remaining(history: History) -> float:
    """Share of the study's limits that is still to be spent, by the one that ends first; 1 where there are none."""
    limits, shares = history.limits, [1.0]
    if limits.n_trials is not None:
        shares.append(1 - history.proposed / limits.n_trials)
    if limits.budget is not None:
        shares.append(1 - history.spent / limits.budget)
    return max(0.0, min(shares))


def leaders(model: Composite, at: Scale) -> Tensor:
    """The told configurations, of every scale, that the posterior mean at this scale likes best: up to k x d.

    Of several objectives, those likeliest to be on the front.
    """
    X = model.data.X
    if len(model.data.outcome.parts) > 1:
        return hypervolume.leaders(hypervolume.objectives(model, at), X, LEADERS)
    with torch.no_grad():
        order = torch.argsort(model.at(at).mean(X), descending=True, stable=True)
    return X[order[:LEADERS]]


def predicted(model: Composite, x: Tensor, at: Scale) -> dict[str, float]:
    expected = model.predict(x, at)
    return {"mean": expected.mean, "low": expected.low, "high": expected.high}
