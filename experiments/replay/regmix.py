"""How many target runs until the best of a pool of real mixtures is found, given small runs of other mixtures?

    python -m experiments.replay.regmix --tables DIR [--methods ours,law] [--pools 64,256] [--proxies 16,32,64]
                                        [--objectives 24] [--seeds 20] [--workers 1] [--report]

DIR/regmix has the losses of language models on 13 domains over mixtures of 17 (arXiv 2407.01492). The target is 60M
parameters, a proxy a model of 1M that was trained on a mixture of another set, none of the pool's. An objective is a
weighted sum of the losses; 24 were drawn once and are kept in regmix_objectives.json. A target is an objective with a
pool, a random part of the table or all of it; a seed draws the proxies, or the five random runs that a method without
any begins with. Domains are permuted and losses rescaled by objective, so that nothing remembered is of use.

ours chooses by the engine's criterion over the rows that were not bought, after the first run by its posterior mean;
ours_scalar is told the sum alone, ours_alone has no proxies. The others are in `regmix_baselines.py`. A regret is in
percent of the pool's best; a search ends with the best or after CAP target runs. Rows are kept in
results/replay_regmix.jsonl, and --report prints what they say.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bo.objective import WeightedSum
from bo.policies.design import reproducible
from bo.policies.engine import Engine
from bo.policies.posterior import Search
from bo.ports import History
from bo.trial import Trial
from experiments.compare.environments import default_folder
from experiments.compare.methods import Entry
from experiments.compare.run import Process
from experiments.replay.protocol import Contender, Key, Row, compare, load, make, text
from experiments.replay.regmix_baselines import BASELINES, Array, Question
from search_spaces import Fidelity, Mixture, Scale, Space

OBJECTIVES = Path(__file__).with_name("regmix_objectives.json")
RESULTS = Path(__file__).parents[1] / "results" / "replay_regmix.jsonl"
START, CAP = 5, 40
SMALL, TARGET = 1e6, 60e6
"""Parameters of a proxy and of a target run; both see 1B tokens."""
OURS = ("ours", "ours_scalar", "ours_alone")
DEAR = ("ax", "ax_scalarized", "botorch_model_list", "optuna_gp")
DEAR_SEEDS = 2
"""How many seeds the methods have that take long."""


# ------------------------------------------------------------------------------------------------------------ the task


@lru_cache(maxsize=8)
def table(path: Path) -> tuple[Array, Array]:
    """Shares and losses of every run; shares have three decimals and are divided by their sum."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares, losses = (
        np.array([[float(v) for name, v in row.items() if name.startswith(start)] for row in rows])
        for start in ("mix_", "loss_")
    )
    return shares / shares.sum(1, keepdims=True), losses


def tables(folder: Path) -> tuple[tuple[Array, Array], ...]:
    """Runs at the target, those that proxies come from, and the mixtures of the former at the proxies' scale."""
    return tuple(table(folder / "regmix" / f"{name}.csv") for name in ("60M_test", "1M_train", "1M_test"))


def disguise(rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Array]:
    """An order of the 17 domains, and factors on the 13 losses."""
    return rng.permutation(17), np.exp(rng.uniform(-1, 1, 13))


@lru_cache(maxsize=1)
def objectives() -> Array:
    """Weights of the losses, 24 x 13."""
    return np.array(json.loads(OBJECTIVES.read_text(encoding="utf-8"))["weights"])


@dataclass(frozen=True)
class Case:
    """One search to be made: an objective, a pool of at most `size` runs, proxies (a number of them), a seed."""

    folder: Path
    objective: int
    size: int
    proxies: int
    seed: int

    @property
    def problem(self) -> str:
        return f"objective {self.objective}, pool of {min(self.size, len(tables(self.folder)[0][0]))}"

    def question(self) -> Question:
        """The task before the first target run, disguised; the losses of the pool are `losses`, in rows of the pool."""
        rng = np.random.default_rng([self.objective, self.size])
        (shares, losses), (other, small), (held, held_small) = tables(self.folder)
        rows = rng.permutation(len(shares))[: self.size]
        order, unit = disguise(rng)
        drawn = np.random.default_rng([self.seed, 3]).permutation(len(other))[: self.proxies]
        return Question(
            shares=shares[rows][:, order],
            weights=objectives()[self.objective] / unit,
            proxies=other[drawn][:, order],
            proxy_losses=small[drawn] * unit,
            bought=(),
            losses=losses[rows] * unit,
            held=held[:, order],
            held_losses=held_small * unit,
            seed=self.seed,
        )


# ----------------------------------------------------------------------------------------------------------------- us


def parameters(scale: Scale) -> float:
    return scale["params"]


@dataclass
class Ours:
    """The engine over the rows of a pool. `memory` is what a fit hands to the next one, as in a study."""

    scalar: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def __call__(self, question: Question) -> int:
        history, configs = self.history(question)
        rng = np.random.default_rng([question.seed, len(question.bought)])
        with reproducible(rng):
            import torch

            search = Search.of(history, history.space.top, Engine(), rng)
            criterion = search.criterion(search.situation(), greedy=False)
            with torch.no_grad():
                values = criterion(torch.as_tensor(history.space.encode_all(configs))).numpy()
        self.memory = search.memory
        return question.best(values)

    def history(self, question: Question) -> tuple[History, list[dict[str, Any]]]:
        """What a study would hold, and the configs of the pool."""
        names = [f"d{i}" for i in range(question.shares.shape[1])]
        space = Space(data=Mixture(*names), fidelity=scales()) if len(question.proxies) else Space(data=Mixture(*names))
        weights = np.ones(1) if self.scalar else question.weights
        metrics = [f"m{i}" for i in range(len(weights))]
        objective = WeightedSum(dict(zip(metrics, weights.tolist(), strict=True)))
        told: list[Trial] = []

        def add(shares: Array, losses: Array, scale: Scale) -> None:
            values = losses @ question.weights[:, None] if self.scalar else losses
            for config, row in zip(configs(names, shares), values.tolist(), strict=True):
                measured, cost = dict(zip(metrics, row, strict=True)), scale.get("params", TARGET) / TARGET
                told.append(Trial(len(told), config, scale, 0, "added", cost, "finished", metrics=measured))

        if len(question.proxies):
            assert space.fidelity is not None
            add(question.proxies, question.proxy_losses, space.fidelity.scale({"params": SMALL}))
        add(question.shares[list(question.bought)], question.losses, space.top)
        history = History(space, objective, tuple(told), seen=len(told), memory=self.memory)
        return history, configs(names, question.shares)


def scales() -> Fidelity:
    return Fidelity(params=(SMALL, TARGET), target={"params": TARGET}, cost=parameters)


def configs(names: Sequence[str], shares: Array) -> list[dict[str, Any]]:
    return [{"data": dict(zip(names, row, strict=True))} for row in shares.tolist()]


# ---------------------------------------------------------------------------------------------------------- a search


def chooser(method: str) -> Callable[[Question], int]:
    """A method at the start of a search."""
    if method in OURS:
        return Ours(scalar=method == "ours_scalar")
    if BASELINES[method].environment is None:
        return BASELINES[method].choose
    return Rival(process(method))


@dataclass
class Rival:
    """A baseline in a process of its own. cpu: seconds that it took."""

    process: Process
    cpu: float = 0.0

    def __call__(self, question: Question) -> int:
        return int(self.ask("row", question))

    def values(self, question: Question) -> Array:
        """What a regression expects of each row."""
        return np.array(self.ask("values", question))

    def ask(self, what: str, question: Question) -> Any:
        answer = self.process.ask(what, **question.to_json())
        self.cpu += answer["cpu"]
        return answer[what]


@lru_cache(maxsize=8)
def process(method: str) -> Process:
    """A baseline in its own environment, for all its searches."""
    environment = str(BASELINES[method].environment)
    python = Entry(method, "", environment, 0.0).python(default_folder())
    if python is None:
        raise SystemExit(f"{method} is absent; build it: python -m experiments.compare.environments {environment}")
    return Process(python, ["-m", "experiments.replay.regmix_baselines", method], limit=1e5)


def regrets(question: Question, choose: Callable[[Question], int], start: int, cap: int = CAP) -> tuple[float, ...]:
    """Percent above the pool's best of the best so far, until it is found or `cap` runs are made.

    question: with the losses of the whole pool, of which the method is shown those it has bought. The first `start`
    runs are random.
    """
    losses, values = question.losses, question.values
    bought = np.random.default_rng([question.seed, 7]).permutation(len(values))[:start].tolist()
    while len(bought) < cap and values[bought].min(initial=np.inf) > values.min():
        bought.append(choose(replace(question, bought=tuple(bought), losses=losses[bought])))
    best = np.minimum.accumulate(values[bought])
    made = int(np.argmax(best <= values.min())) + 1 if best[-1] <= values.min() else len(best)
    return tuple((100 * (best[:made] / values.min() - 1)).tolist())


@dataclass(frozen=True)
class Job:
    """A search by one method."""

    case: Case
    method: str

    @property
    def key(self) -> Key:
        setting = f"{self.case.proxies} proxies" if self.case.proxies else "no proxies"
        return Key(self.case.problem, self.method, setting, self.case.seed)

    def __call__(self) -> Row:
        before, proxies, choose = time.process_time(), self.case.proxies, chooser(self.method)
        found = regrets(self.case.question(), choose, 0 if proxies else START)
        took = choose.cpu if isinstance(choose, Rival) else time.process_time() - before
        return Row(**vars(self.key), regrets=found, proxies=proxies, cost=proxies * SMALL / TARGET, seconds=took)


def jobs(
    folder: Path, methods: Sequence[str], pools: Sequence[int], proxies: Sequence[int], numbers: int, seeds: int
) -> Iterator[Job]:
    """Seed by seed, so that what is made first covers all targets."""
    for seed in range(seeds):
        for method in methods:
            if method in DEAR and seed >= DEAR_SEEDS:
                continue
            for count in proxies if with_proxies(method) else (0,):
                for size in pools:
                    for number in range(numbers):
                        yield Job(Case(folder, number, size, count, seed), method)


def with_proxies(method: str) -> bool:
    return method in ("ours", "ours_scalar") or (method in BASELINES and BASELINES[method].proxies)


def report(rows: Mapping[Key, Row], method: str = "ours") -> Iterator[str]:
    """For each pool and number of proxies, all methods next to one: runs to the best, and to within 0.25% of it."""
    pools = sorted({key.problem.split(", ")[1] for key in rows}, key=lambda name: int(name.split()[-1]))
    for pool in pools:
        here = {key: row for key, row in rows.items() if key.problem.endswith(f", {pool}")}
        for setting in sorted(
            {key.setting for key in here if key.method == method}, key=lambda name: (len(name), name)
        ):
            reference = Contender(method, setting)
            others = sorted({(key.method, key.setting) for key in here if key.setting in (setting, "no proxies")})
            contenders = [reference, *(Contender(*each) for each in others if each != (method, setting))]
            for tolerance in (0.0, 0.25):
                goal = f"within {tolerance}% of the best" if tolerance else "the best"
                title = f"{pool}, {setting}, target runs to {goal}; at most {CAP}"
                yield text(title, compare(here, contenders, reference, tolerance, CAP), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder with regmix/")
    parser.add_argument("--methods", default=",".join([*OURS, *BASELINES]))
    parser.add_argument("--pools", default="64,256", help="sizes; one beyond the table is all of it")
    parser.add_argument("--proxies", default="16,32,64")
    parser.add_argument("--objectives", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=20, help=f"{DEAR_SEEDS} of them for {', '.join(DEAR)}")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print what the rows say")
    options = parser.parse_args()
    if not options.report:
        if options.tables is None:
            parser.error("--tables is needed to make rows.")
        pools, proxies = (tuple(map(int, given.split(","))) for given in (options.pools, options.proxies))
        methods = options.methods.split(",")
        missing = jobs(options.tables.resolve(), methods, pools, proxies, options.objectives, options.seeds)
        for row in make(missing, options.rows, load(options.rows), options.workers):
            print(f"{row.key}: {len(row.regrets)} runs, {row.seconds:.1f} s", flush=True)
    for each in report(load(options.rows)):
        print(each, flush=True)


if __name__ == "__main__":
    main()
