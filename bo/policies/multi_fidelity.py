"""Configuration and scale chosen together: where a run is worth most to the search at the target, per cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo import dataset
from bo.acquisition import constrained
from bo.acquisition.acquisition import Acquisition, Situation
from bo.acquisition.multi_fidelity import MOST, UTILITIES, Run, beyond
from bo.objective import Objective, Pareto
from bo.optimize import QUICK, Found, draw_pool, maximise
from bo.policies import posterior, recommendation
from bo.policies.design import NOTHING, initial, reproducible, sequence_seed, started
from bo.policies.engine import Engine, weighed
from bo.policies.ladder import outstanding, proxies, waiting
from bo.policies.model_choice import fit
from bo.policies.posterior import AGAIN, LEADERS, find_edge, log_ok, predicted, remaining
from bo.ports import History, Proposal, Recommendation
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.divergence import Divergence
from bo.surrogates.hyperparameters import NumericalError
from search_spaces import Scale, Space

START, NEXT = "multi_fidelity/start", "multi_fidelity"
#: Scales whose best raw points are climbed from, and by how much less, in logarithms, these may be worth. From how many
#: points, and how far.
KEPT, NEAR, EFFORT = 2, 0.5, (4, 20)
#: Criteria whose cost counts less and less as the limits are used up (Lee et al., arXiv 2003.10870).
COOLED = ("ei_cooled",)


@dataclass(frozen=True)
class MultiFidelity:
    """A few space-filling runs at the cheapest scales, then the run of any scale that is worth most per cost.

    acquisition: a name of UTILITIES. surrogate: a name of SURROGATES. proxy_cap: what runs below the top scale may cost
    together, in target runs, and never more than half of the study's limits; None for no cap. traces: scale axes whose
    smaller values a run passes, and hands in by `trial.branch` for nothing. avoid_zero: value only what a run tells
    beyond one at the smallest scale. n_init: space-filling runs at each of the first scales; by default 2 and one more
    for every three coordinates.

    The scales are the cells of the fidelity: its rungs, of a range a few that are spaced evenly on a logarithmic axis.
    Runs of one scale can be compared with each other, and between neighbours cost and value change little.
    """

    acquisition: str = "knowledge_gradient"
    surrogate: str = "gp"
    proxy_cap: float | None = 1.0
    traces: Sequence[str] = ()
    avoid_zero: bool = False
    n_init: int | None = None

    def __post_init__(self) -> None:
        if self.acquisition not in UTILITIES:
            raise ValueError(f"MultiFidelity has the acquisitions {sorted(UTILITIES)}, got {self.acquisition!r}.")
        cap = self.proxy_cap
        if cap is not None and (isinstance(cap, bool) or not 0 <= cap < math.inf):
            raise ValueError(f"MultiFidelity needs proxy_cap to be None or a finite number of at least 0, got {cap!r}.")
        if isinstance(self.traces, str) or not all(isinstance(axis, str) for axis in self.traces):
            raise ValueError(f"MultiFidelity needs traces to be a list of scale axes, got {self.traces!r}.")
        if not isinstance(self.avoid_zero, bool):
            raise ValueError(f"MultiFidelity needs avoid_zero to be True or False, got {self.avoid_zero!r}.")
        if self.n_init is not None and (type(self.n_init) is not int or self.n_init < 1):
            raise ValueError(f"MultiFidelity needs n_init to be a whole number of at least 1, got {self.n_init!r}.")
        object.__setattr__(self, "traces", tuple(self.traces))
        _ = self.engine  # which refuses a surrogate that there is not

    @property
    def engine(self) -> Engine:
        return Engine(surrogate=self.surrogate)

    def check(self, space: Space, objective: Objective) -> None:
        """ValueError where the settings do not fit a study of this space and objective."""
        axes = [] if space.fidelity is None else [axis.name for axis in space.fidelity.axes]
        if unknown := [axis for axis in self.traces if axis not in axes]:
            raise ValueError(f"traces names {unknown}, which is no scale axis; the axes are {axes}.")
        if isinstance(objective, Pareto):
            raise ValueError("MultiFidelity needs one objective, and a Pareto objective has none; take the ladder.")

    def propose(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        with reproducible(rng):
            planned = self.start(history)
            if missing := outstanding(history, planned, START):
                return proxies(history, missing, n, rng, source=START)
            if waiting(history, len(planned), START):
                return ()
            if not planned and not started(history, self.n_init):
                return initial(history, n, rng)
            if sum(trial.status == "finished" for trial in history.trials) < 2:
                return initial(history, n, rng, NOTHING)
            try:
                return self.search(history, n, rng)
            except NumericalError as error:
                return initial(history, n, rng, f"A space-filling point in place of the model's: {error}")

    def recommend(
        self, history: History, scale: Scale, rng: np.random.Generator, tried: bool = False
    ) -> Recommendation:
        with reproducible(rng):
            return recommendation.recommend(history, scale, rng, tried, self.engine)

    def start(self, history: History) -> tuple[Scale, ...]:
        """The scale of each space-filling run: at the cheapest cell, and at one a step larger along each axis.

        As many as half of what proxies may cost, and half of the limits, pay for: at least two each, at fewer cells if
        need be.
        """
        space = history.space
        if space.fidelity is None:
            return ()
        smallest, *others = space.fidelity.cells()
        cells = [smallest] if smallest != space.top else []
        for axis in space.fidelity.axes:
            for cell in others:
                if cell[axis.name] > smallest[axis.name] and all(
                    cell[name] == smallest[name] for name in cell if name != axis.name
                ):
                    cells += [cell] if cell != space.top else []
                    break
        runs = math.inf if history.limits.n_trials is None else history.limits.n_trials // 2
        spend = self.allowance(history) / 2
        if history.limits.budget is not None:
            spend = min(spend, history.limits.budget / 2)
        while cells:
            each = min(self.each(space), runs // len(cells), spend // sum(map(space.cost, cells)))
            if each >= 2:
                return tuple(cell for cell in cells for _ in range(int(each)))
            cells.remove(max(cells, key=space.cost))
        return ()

    def each(self, space: Space) -> int:
        return self.n_init or 2 + math.ceil(len(space.columns) / 3)

    def allowance(self, history: History) -> float:
        """What all runs below the top scale may cost together, in target runs."""
        if self.proxy_cap is None:
            return math.inf
        if history.limits.budget is None:
            return self.proxy_cap
        own = sum(history.space.cost(trial.scale) for trial in history.trials if trial.source == "enqueued")
        budget = max(0.0, history.limits.budget - own)
        rest = budget - 1 if budget >= 1 else math.inf  # enough is left for a target run
        return min(self.proxy_cap, budget / 2, rest)

    def affordable(self, history: History, chosen: Sequence[Scale]) -> tuple[Scale, ...]:
        """The scales that the limits and the cap allow a run at, after those just chosen."""
        space = history.space
        if space.fidelity is None:
            return (space.top,) if history.affordable([*chosen, space.top]) > len(chosen) else ()
        proxies = [trial for trial in history.trials if trial.scale != space.top and trial.source in (START, NEXT)]
        small = [scale for scale in chosen if scale != space.top]
        room = self.allowance(history) - sum(trial.cost for trial in proxies) - sum(map(space.cost, small))
        count = math.inf
        if self.proxy_cap is not None and history.limits.n_trials is not None:
            count = history.limits.n_trials // 2 - len(proxies) - len(small)
        return tuple(
            cell
            for cell in space.fidelity.cells()
            if (cell == space.top or (space.cost(cell) <= room + 1e-9 and count > 0))
            and history.affordable([*chosen, cell]) > len(chosen)
        )

    def search(self, history: History, n: int, rng: np.random.Generator) -> tuple[Proposal, ...]:
        """Up to `n` runs, one after the other; those before, and all without a result, are believed."""
        view = View.of(history, self, rng)
        if view.model.data.outcome.limits and not len(view.tried):
            # While nothing keeps the limits at the target, there is no best mean there to raise.
            return posterior.propose(history, n, rng, NEXT, self.engine)
        proposals: list[Proposal] = []
        while len(proposals) < n:
            scales = self.affordable(history, [proposal.scale for proposal in proposals])
            if not scales:
                break
            scale, found = view.best(view.telling(scales))
            note = None if found.new else AGAIN
            expected = predicted(replace(view.model, gp=view.beliefs[scale].surrogate), found.x, scale)
            config = history.space.at(scale).decode(found.x)
            proposals.append(Proposal(config, scale, NEXT, expected, view.memory, note))
            view = view.waiting_for(found.x, scale)
        return tuple(proposals)


@dataclass(frozen=True)
class View:
    """All that the next run is chosen by.

    goal: the scale that the search is for. model: given the told runs. beliefs: of every cell and the goal, conditioned
    on the mean at runs without a result too. tried, pending: k x d and r x d configurations that ran, or run, at any
    scale, as the goal allows them; of both only those likely to keep the limits on metrics there. taken: whatever ran
    or runs at each cell. leaders: points about which is searched closely.
    """

    policy: MultiFidelity
    space: Space
    goal: Scale
    model: Composite
    beliefs: Mapping[Scale, Belief]
    tried: Tensor
    pending: Tensor
    taken: Mapping[Scale, Tensor]
    leaders: Tensor
    edge: Divergence | None
    diverged: int
    left: float
    memory: dict[str, Any]
    rng: np.random.Generator
    first: bool = True

    @classmethod
    def of(cls, history: History, policy: MultiFidelity, rng: np.random.Generator) -> View:
        space, data = history.space, dataset.from_history(history)
        goal = space.top if space.fidelity is None else space.fidelity.target
        model, fitted = fit(data, goal, history.memory.get("model"), policy.engine)
        memory: dict[str, Any] = {"sequence": sequence_seed(history, rng), "model": fitted}
        edge = find_edge(data, history.memory.get("edge"))
        if edge is not None:
            memory["edge"] = edge.memory()
        there = space.at(goal)
        tried, pending = (
            torch.as_tensor(there.repair(X.numpy())) for X in (model.data.X, data.X_pending[data.running])
        )
        if data.outcome.limits:
            tried, pending = (X[constrained.likely_feasible(model, goal, X)] for X in (tried, pending))
        cells = (space.top,) if space.fidelity is None else space.fidelity.cells()
        believed = model.believe(model.data.X_pending, model.data.S_pending)
        return cls(
            policy=policy,
            space=space,
            goal=goal,
            model=model,
            beliefs=told_apart(believed, (goal, *cells)),
            tried=tried,
            pending=pending,
            taken={cell: data.taken(cell) for cell in cells},
            leaders=leaders(model, goal),
            edge=edge,
            diverged=int(data.diverged.sum()),
            left=remaining(history),
            memory=memory,
            rng=rng,
        )

    def telling(self, scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
        """Of the scales those that the model knows to be related: where it is of one cell alone, only the top."""
        alone = len(torch.unique(self.model.data.cell)) < 2 and self.space.top in scales
        return (self.space.top,) if alone else scales

    def best(self, scales: tuple[Scale, ...]) -> tuple[Scale, Found]:
        """The scale and the point that are worth most per cost."""
        criteria = self.criteria(scales)
        raw: dict[Scale, Tensor] = {}
        highest: dict[Scale, float] = {}
        for scale, criterion in criteria.items():
            space = self.space.at(scale)
            same = next((other for other in raw if self.space.at(other) is space), None)
            raw[scale] = draw_pool(space, self.leaders, self.rng) if same is None else raw[same]
            with torch.no_grad():
                highest[scale] = float(criterion(raw[scale]).max())
        top = max(highest.values())
        close = [
            scale for scale in sorted(criteria, key=highest.__getitem__, reverse=True) if highest[scale] > top - NEAR
        ]
        found: dict[Scale, Found] = {}
        for scale in close[: KEPT if self.first else 1]:
            space, effort = self.space.at(scale), EFFORT if self.first else QUICK
            # Choices and whole numbers are sought step by step too, which is done where no pool is given.
            pool = raw[scale] if not self.first or all(not column.levels for column in space.columns) else None
            found[scale] = maximise(
                criteria[scale], space, self.leaders, self.taken[scale], self.rng, pool, effort, self.pending
            )
        best = max(found, key=lambda scale: (found[scale].new, found[scale].value))
        return best, found[best]

    @property
    def situation(self) -> Situation:
        """That of the goal, where every configuration that ran counts as known."""
        goal = self.beliefs[self.goal]
        return Situation(
            space=self.space.at(self.goal),
            belief=goal,
            believed=goal,
            tried=self.tried,
            pending=self.pending,
            told=len(self.model.data.Y),
            left=self.left,
            rng=self.rng,
        )

    def criteria(self, scales: tuple[Scale, ...]) -> dict[Scale, Acquisition]:
        """For each scale the logarithm of what a run there is worth per cost."""
        policy = self.policy
        utility = UTILITIES[policy.acquisition](self.situation)
        exponent = self.left if policy.acquisition in COOLED else 1.0
        made: dict[Scale, Acquisition] = {}
        for scale in scales:
            criterion = utility(self.run(scale))
            if policy.avoid_zero and self.space.fidelity is not None:
                smallest = self.space.fidelity.cells()[0]
                if scale == smallest and len(scales) > 1:
                    continue
                criterion = beyond(criterion, utility(Run((self.beliefs[smallest],))))
            made[scale] = weighed(criterion, self.terms(scale, exponent))
        return made

    def terms(self, scale: Scale, exponent: float) -> tuple[Acquisition, ...]:
        """Logarithms: of one over the cost of a run, of how likely it is to end and to be of use at the goal."""
        price = 0.0 if self.space.fidelity is None else -exponent * math.log(self.space.fidelity.cost(scale))
        found: list[Acquisition] = [lambda X: torch.full((len(X),), price, dtype=torch.float64)]
        if self.model.data.outcome.limits:
            found.append(constrained.log_feasible(self.model, self.goal))
        if self.edge is not None:
            found.append(log_ok(self.edge, self.beliefs[scale], self.diverged))
        return tuple(found)

    def run(self, scale: Scale) -> Run:
        """What a run at a scale measures."""
        return Run(tuple(self.beliefs[cell] for cell in (scale, *passed(self.space, scale, self.policy.traces))))

    def waiting_for(self, x: Tensor, scale: Scale) -> View:
        """With a run at x (d,) under way."""
        surrogate = self.beliefs[scale].believe(x[None]).surrogate
        return replace(
            self,
            beliefs={scale: replace(belief, surrogate=surrogate) for scale, belief in self.beliefs.items()},
            pending=torch.cat([self.pending, x[None]]),
            taken={**self.taken, scale: torch.cat([self.taken[scale], x[None]])},
            first=False,
        )


def told_apart(model: Composite, scales: Sequence[Scale]) -> dict[Scale, Belief]:
    """The objective at several scales, where no two have the index of one cell.

    A model numbers the cells that it knows, and any other by the next number.
    """
    found: dict[Scale, Belief] = {}
    following = 1 + len(model.data.outcome.places) + len(model.data.S_pending)
    for scale in scales:
        if scale in found:
            continue
        belief = model.at(scale)
        if any(belief.cell == other.cell for other in found.values()):
            belief, following = replace(belief, cell=following), following + 1
        found[scale] = belief
    return found


def leaders(model: Composite, goal: Scale) -> Tensor:
    """The told configurations, of every scale, that the posterior mean at the goal likes best: up to k x d."""
    X = model.data.X
    with torch.no_grad():
        order = torch.argsort(model.at(goal).mean(X), descending=True, stable=True)
    return X[order[:LEADERS]]


def passed(space: Space, scale: Scale, traces: Sequence[str]) -> tuple[Scale, ...]:
    """Cells that a run at a scale passes along the traces, the dearest first: all, or some spread over them."""
    if space.fidelity is None or not traces:
        return ()
    below = [
        cell
        for cell in space.fidelity.cells()
        if cell != scale
        and all(cell[axis] <= scale[axis] if axis in traces else cell[axis] == scale[axis] for axis in cell)
    ]
    below.sort(key=space.cost, reverse=True)
    chosen = np.unique(np.linspace(0, len(below) - 1, min(len(below), MOST - 1)).round().astype(int))
    return tuple(below[i] for i in chosen)
