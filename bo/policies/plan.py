"""The plan of a ladder: how many proxies at which scales, what they cost, and whether they pay at all.

What proxies are worth is a rule of thumb, not a promise. Alone, a search takes about ALONE runs a coordinate, beyond
the first, to come within a quarter of a percent of the best; the share of them that n proxies leave is
exp(-n / (LASTING d)). Both were measured on published runs over learning rate and batch size (`experiments.replay`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bo.ports import Limits, Plan
from search_spaces import Scale, Space

#: A proxy dearer than this, in target runs, tells too little for its price.
DEAREST = 1 / 8
#: Cells to spread proxies over; proxies a cell at least, where there are but three cells, and at most.
CELLS = (5, 4, 3)
LEAST, FEWEST, MOST = 6, 4, 12
#: Target runs a coordinate that a search without proxies takes, and proxies a coordinate that save all but 1/e of them.
ALONE, LASTING = 1.35, 8.0
#: How many times what they cost proxies have to be expected to save; what those at one or two scales save at most.
PAYS, SHOT = 2.0, 1.0


Price = Callable[[Sequence[Scale]], float]
"""What one result in each of some cells costs, in target runs."""


def plan(space: Space, limits: Limits, proxy_cap: float, price: Price | None = None) -> Plan:
    """How many proxies at which scales, and how many target runs the limits then leave.

    Proxies are spread over five cells, else four, else three, the cheapest that span the axes (fewer where there are no
    more), six to twelve a cell, at least four with three cells, more in many dimensions. There are as many as leave
    most of what they are expected to save, if that is at least twice what they cost, at most for `proxy_cap`, half of
    the budget and two thirds of the trials, where a target run stays affordable. Else there are none, and the plan says
    why. price: a run each, by default.
    """

    def apart(cells: Sequence[Scale]) -> float:
        return sum(map(space.cost, cells))

    proxies, why = _proxies(space, limits, proxy_cap, price or apart)
    each = len(proxies) // max(1, len(set(proxies)))
    cost = each * (price or apart)(list(dict.fromkeys(proxies))) if proxies else 0.0
    ends: list[float] = []
    if limits.n_trials is not None:
        ends.append(limits.n_trials - len(proxies))
    if limits.budget is not None:
        ends.append((limits.budget - cost) * (1 + 1e-9))
    targets = max(0, math.floor(min(ends))) if ends else None
    return Plan(proxies, cost, saved(len(set(proxies)), each, len(space.columns)), targets, why)


def saved(cells: int, each: int, d: int) -> float:
    """Target runs that so many proxies at so many scales are expected to save a search over d coordinates."""
    most = ALONE * d if cells >= min(CELLS) else SHOT
    return most * -math.expm1(-cells * each / (LASTING * max(1, d)))


def _proxies(space: Space, limits: Limits, proxy_cap: float, priced: Price) -> tuple[tuple[Scale, ...], str | None]:
    """The scale of each proxy, or none and why."""
    if space.fidelity is None:
        return (), "The space has no scales."
    d, spend = len(space.columns), proxy_cap
    if limits.budget is not None:
        spend = min(spend, limits.budget / 2)
        if limits.budget >= 1:  # proxies are there for a target run: leave enough for one
            spend = min(spend, limits.budget - 1)
    runs = math.inf if limits.n_trials is None else 2 * limits.n_trials // 3
    cheap = [cell for cell in space.fidelity.cells() if cell != space.top and space.cost(cell) <= DEAREST]
    if not cheap:
        return (), f"No scale costs less than 1/{1 / DEAREST:.0f} of a target run, so proxies would not pay."
    ranked = spanning(space, sorted(cheap, key=lambda cell: (space.cost(cell), tuple(cell.values()))))
    most, dear = max(MOST, 2 * d), False
    for cells in [cells for cells in CELLS if cells <= len(ranked)] or [len(ranked)]:
        price = priced(ranked[:cells])
        affordable = int(min(most, runs // cells, spend * (1 + 1e-9) // price))
        gain = [saved(cells, each, d) for each in range(affordable + 1)]
        each = max(range(affordable + 1), key=lambda each: gain[each] - each * price)
        least = LEAST if cells > min(CELLS) else FEWEST
        dear = dear or affordable >= least
        if each >= least and gain[each] >= PAYS * each * price:
            chosen = sorted(ranked[:cells], key=lambda cell: space.cost(cell))
            return tuple(cell for cell in chosen for _ in range(each)), None
    if dear:
        return (), f"The cheapest scales cost {space.cost(ranked[0]):.2g} target runs each, so proxies would not pay."
    return (), "The limits leave too little for proxies that tell something."


def spanning(space: Space, cells: list[Scale]) -> list[Scale]:
    """The cells, cheapest first, but those that first show a second value of an axis before all that do not.

    Drifts along an axis can be told apart only where the axis varies.
    """
    fidelity = space.fidelity
    assert fidelity is not None
    chosen: list[Scale] = []
    for cell in cells:
        offsets = [fidelity.log2(other) - fidelity.log2(cells[0]) for other in [*chosen, cell]]
        if not chosen or np.linalg.matrix_rank(np.array(offsets)) > np.linalg.matrix_rank(np.array(offsets[:-1])):
            chosen.append(cell)
    return chosen + [cell for cell in cells if cell not in chosen]
