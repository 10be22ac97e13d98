"""Do small runs help? Learning rate and batch size of real language models, replayed from published tables.

    python -m experiments.replay_steplaw --tables DIR [--seeds 12] [--runs 10]

DIR holds `blackbox.py` and the Step-Law tables (arXiv 2503.04715), as emulators of the loss over learning rate and
batch size at several numbers of parameters and tokens. Each problem is disguised, so that no remembered optimum helps.
For each target there is space-filling search, a Gaussian process at the target alone, and the model of all scales after
6 space-filling proxies in each of the 3 cheapest cells, or 12 in 5; only real cells are run, so the proxies are laid
out here and not by the ladder's own plan. Printed are, over seeds: the median regret in percent after 1, 2, 3, 5 and 10
target runs, the mean number of target runs to 0.25% and to 0.1% (one more than were made, where a search does not get
there), and what the proxies cost in target runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bo import Minimize
from bo.policies.bayes import Bayes
from bo.policies.design import sobol
from bo.policies.sobol import Sobol
from bo.ports import History, Policy
from bo.trial import Trial
from experiments.compare.problems import blackbox
from search_spaces import Fidelity, Real, Scale, Space

Cell = tuple[float, float]
"""Parameters and tokens."""

TARGETS: dict[str, list[Cell]] = {
    "dense": [(429260800, 50e9), (214663680, 100e9), (1073741824, 20e9), (429260800, 22.7e9)],
    "moe": [(187973632, 20e9)],
}
DESIGNS = {"6 in 3": (6, 3), "12 in 5": (12, 5)}
CHECKPOINTS = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class Problem:
    """A disguised emulator; `cells` are its scales, the target last, and `fidelities` what it calls them."""

    space: Space
    cells: tuple[Scale, ...]
    fidelities: Mapping[Scale, Any]
    box: Any
    optimum: float

    def loss(self, config: Mapping[str, Any], scale: Scale, seed: int) -> float:
        return float(self.box.evaluate(dict(config), self.fidelities[scale], seed))

    def regret(self, config: Mapping[str, Any]) -> float:
        """Percent by which the noise-free, undisguised loss at the target exceeds its least."""
        shown = self.box.evaluate(dict(config), self.fidelities[self.cells[-1]])
        return 100 * ((float(shown) - self.box.b) / self.box.a / self.optimum - 1)


def load(module: Any, table: str, target: Cell) -> Problem:
    """The problem of one target, with every cheaper cell of its table."""
    rows = module.load_csv(f"steplaw/{table}.csv")
    params = rows["params_nonemb" if table == "dense" else "params_active"]
    known = {(float(n), float(d)) for n, d in zip(params, rows["tokens"], strict=True)}
    pairs = [cell for cell in known if cell[0] * cell[1] < target[0] * target[1]] + [target]
    inner = module.StepLaw(f"{table} {target[0] / 1e6:.0f}M, {target[1] / 1e9:g}B tokens", table, sorted(pairs))
    box = module.disguise(inner, "replay")
    ranges = {name: [getattr(f, name) for f in box.fidelities] for name in ("params", "tokens")}
    # A constant axis is no range; widening it changes nothing, since only logarithms of ratios enter.
    axes = {name: Real(min(values), max(values) * (1 + 1e-6)) for name, values in ranges.items()}
    last = box.fidelities[-1]
    fidelity = Fidelity(target={"params": last.params, "tokens": last.tokens}, **axes)
    cells = tuple(fidelity.scale({"params": f.params, "tokens": f.tokens}) for f in box.fidelities)
    space = Space(fidelity=fidelity, **{p.name: Real(p.low, p.high, log=True) for p in box.params})
    return Problem(space, cells, dict(zip(cells, box.fidelities, strict=True)), box, inner.optimum()[1])


def proxies(problem: Problem, each: int, cells: int, seed: int) -> list[Trial]:
    """Space-filling runs, `each` in every one of the cheapest cells."""
    scales = [scale for scale in problem.cells[:-1][:cells] for _ in range(each)]
    configs = sobol(problem.space, seed, 0, len(scales))
    rows = enumerate(zip(configs, scales, strict=True))
    return [trial(problem, i, config, scale, "added", seed) for i, (config, scale) in rows]


def trial(problem: Problem, id: int, config: Mapping[str, Any], scale: Scale, source: str, seed: int) -> Trial:
    metrics = {"loss": problem.loss(config, scale, seed)}
    cost = problem.space.fidelity.relative_cost(scale)
    return Trial(id, config, scale, seed, source, cost, "finished", metrics=metrics)


def search(problem: Problem, policy: Policy, trials: Sequence[Trial], runs: int, seed: int) -> list[float]:
    """Regret of the best so far after each of `runs` target runs that follow `trials`."""
    done, memory, regrets = list(trials), {}, []
    for _ in range(runs):
        history = History(problem.space, Minimize("loss"), tuple(done), seen=len(done), memory=memory)
        (proposal,) = policy.propose(history, 1, np.random.default_rng([seed, len(done)]))
        memory = proposal.memory
        done.append(trial(problem, len(done), proposal.config, proposal.scale, proposal.source, seed))
        regrets.append(problem.regret(proposal.config))
    return list(np.minimum.accumulate(regrets))


def report(name: str, curves: Sequence[Sequence[float]], paid: float) -> str:
    table = np.array(curves)  # seeds x runs
    medians = "  ".join(f"{np.median(table[:, k - 1]):6.3f}" for k in CHECKPOINTS if k <= table.shape[1])
    reached = [float(np.mean((table > goal).sum(1) + 1)) for goal in (0.25, 0.1)]
    return (
        f"  {name:14s} {medians}   to 0.25%: {reached[0]:4.1f}   to 0.1%: {reached[1]:4.1f}   proxies cost {paid:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder with blackbox.py and steplaw/")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--runs", type=int, default=10, help="target runs of a search")
    args = parser.parse_args()
    module = blackbox(args.tables)
    everything: dict[str, list[list[float]]] = {}
    costs: dict[str, list[float]] = {}
    print(f"median regret in percent after {', '.join(map(str, CHECKPOINTS))} target runs; {args.seeds} seeds")
    for problem in (load(module, table, target) for table, targets in TARGETS.items() for target in targets):
        print(problem.box.inner.name, flush=True)
        entries: list[tuple[str, Policy, int, int]] = [("sobol", Sobol(), 0, 0), ("target alone", Bayes(), 0, 0)]
        entries += [(name, Bayes(), each, cells) for name, (each, cells) in DESIGNS.items()]
        for name, policy, each, cells in entries:
            starts = [proxies(problem, each, cells, seed) for seed in range(args.seeds)]
            curves = [search(problem, policy, start, args.runs, seed) for seed, start in enumerate(starts)]
            paid = sum(run.cost for run in starts[0])
            print(report(name, curves, paid), flush=True)
            everything.setdefault(name, []).extend(curves)
            costs.setdefault(name, []).append(paid)
    print("all")
    for name, curves in everything.items():
        print(report(name, curves, float(np.mean(costs[name]))))


if __name__ == "__main__":
    main()
