"""A target of a table, disguised, with the cells below it; and a search there by a policy of the engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bo import Minimize
from bo.policies.design import sobol
from bo.ports import History, Policy
from bo.trial import Trial
from search_spaces import Fidelity, Mixture, Real, Scale, Space

SOURCES = "abcdefghijklmnopqrstuvwxyz"


class Measured(Fidelity):
    """The cells that a table has, the last of them the target, in place of every combination of their axes' values.

    price: what a run below the target costs, in target runs; by the operations that it takes where it is None.
    """

    measured: tuple[Scale, ...]
    price: float | None

    def __init__(self, cells: Sequence[Mapping[str, float]], price: float | None = None) -> None:
        ranges = {axis: [cell[axis] for cell in cells] for axis in ("params", "tokens")}
        # A constant axis is no range; widening it changes nothing, since only logarithms of ratios enter.
        axes: Any = {axis: Real(min(values), max(values) * (1 + 1e-6)) for axis, values in ranges.items()}
        super().__init__(target=dict(cells[-1]), **axes)
        object.__setattr__(self, "price", price)
        object.__setattr__(self, "measured", tuple(self.scale(cell) for cell in cells))

    def cells(self) -> tuple[Scale, ...]:
        return self.measured

    def cost(self, scale: Mapping[str, float | str]) -> float:
        if self.price is None:
            return super().cost(scale)
        return 1.0 if self.scale(scale, beyond=True) == self.target else self.price


@dataclass(frozen=True)
class Problem:
    """box: a disguised problem of blackbox.py, its fidelities from the cheapest to the target."""

    box: Any

    @cached_property
    def least(self) -> float:
        """The least noise-free, undisguised loss at the target."""
        return float(self.box.inner.optimum()[1])

    def space(self, price: float | None = None) -> Space:
        """What is searched, where a run below the target costs `price`."""
        cells = [{"params": each.params, "tokens": each.tokens} for each in self.box.fidelities]
        return Space(fidelity=Measured(cells, price), **{each.name: parameter(each) for each in self.box.params})

    @cached_property
    def fidelities(self) -> dict[Scale, Any]:
        """By scale, from the cheapest to the target."""
        fidelity = self.space().fidelity
        assert fidelity is not None
        return dict(zip(fidelity.cells(), self.box.fidelities, strict=True))

    @property
    def cells(self) -> tuple[Scale, ...]:
        return tuple(self.fidelities)

    def loss(self, config: Mapping[str, Any], scale: Scale, seed: int | None = None) -> float:
        """As disguised: what a run shows with the noise of its seed; without a seed there is none."""
        plain = {name: list(v.values()) if isinstance(v, Mapping) else v for name, v in config.items()}
        return float(self.box.evaluate(plain, self.fidelities[scale], seed))

    def regret(self, config: Mapping[str, Any]) -> float:
        """Percent by which the noise-free, undisguised loss at the target exceeds its least."""
        shown = self.loss(config, self.cells[-1])
        return 100 * ((shown - float(self.box.b)) / float(self.box.a) / self.least - 1)

    def run(self, id: int, config: Mapping[str, Any], scale: Scale, source: str, seed: int, cost: float) -> Trial:
        metrics = {"loss": self.loss(config, scale, seed)}
        return Trial(id, config, scale, seed, source, cost, "finished", metrics=metrics)


def parameter(shown: Any) -> Any:
    if shown.type == "simplex":
        return Mixture(*SOURCES[: shown.size])
    return Real(shown.low, shown.high, log=shown.type == "log")


@dataclass(frozen=True)
class Searched:
    """regrets: of the best so far after each target run. proxies: their number; cost: theirs, in target runs."""

    regrets: tuple[float, ...]
    proxies: int
    cost: float
    seconds: float


def proxies(problem: Problem, space: Space, each: int, cells: int, seed: int) -> list[Trial]:
    """Space-filling runs, `each` in every one of the cheapest `cells`."""
    scales = [scale for scale in problem.cells[:-1][:cells] for _ in range(each)]
    configs = sobol(space, seed, 0, len(scales))
    return [
        problem.run(i, config, scale, "added", seed, space.cost(scale))
        for i, (config, scale) in enumerate(zip(configs, scales, strict=True))
    ]


def search(
    problem: Problem,
    space: Space,
    policy: Policy,
    given: Sequence[Trial],
    cap: int,
    seed: int,
    enough: float,
) -> Searched:
    """Run what the policy asks for until `cap` target runs were made or the regret is at most `enough`.

    All policies draw their space-filling runs from one sequence of the seed. given: proxies that are there.
    """
    begun, done = time.process_time(), list(given)
    regrets: list[float] = []
    memory: Mapping[str, Any] = {"sequence": seed}
    while len(regrets) < cap and not (regrets and regrets[-1] <= enough):
        history = History(space, Minimize("loss"), tuple(done), seen=len(done), memory=memory)
        proposals = policy.propose(history, 1, np.random.default_rng([seed, len(done)]))
        if not proposals:
            raise RuntimeError(f"{policy} proposes nothing after {len(done)} runs, though none is running.")
        (proposal,) = proposals
        memory, cost = proposal.memory, space.cost(proposal.scale)
        trial = problem.run(len(done), proposal.config, proposal.scale, proposal.source, seed, cost)
        done.append(trial)
        if proposal.scale == space.top:
            regrets.append(min([problem.regret(proposal.config), *regrets[-1:]]))
    small = [trial for trial in done if trial.scale != space.top]
    spent = sum(trial.cost for trial in small)
    return Searched(tuple(regrets), len(small), spent, time.process_time() - begun)
