"""A pool only tests ranking: how good is the mixture that is found in the whole simplex?

    python -m experiments.replay.regmix_simplex --tables DIR [--methods ours,law] [--objectives 24] [--seeds 2]
                                                [--workers 1] [--report]

64 proxies are real runs at 1M parameters from one half of RegMix's training table. Target runs are answered, and what
is found is judged, by an emulator of the 60M losses that is fitted to runs which no method sees: the other half of the
table, and the test mixtures at 1M and 60M (`SimplexEmulator` of the tables' blackbox.py, one a loss). Nobody measured
where a search ends, so a row has the distance of the best mixture so far to the nearest run behind the emulator: half
the sum of absolute differences, the share of the data that would have to be exchanged.

lightgbm is RegMix's recipe: 100,000 mixtures scored, the mean of the best 128. The law and BoTorch choose the best of
20,000, half of them between a random one and the best run so far; random draws one. Ours proposes as in a study.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bo.policies.bayes import Bayes
from experiments.compare.problems import blackbox
from experiments.replay.protocol import Contender, Key, Row, column, interval, make, paired
from experiments.replay.regmix import (
    RESULTS,
    SMALL,
    START,
    TARGET,
    Ours,
    Rival,
    chooser,
    disguise,
    objectives,
    tables,
    with_proxies,
)
from experiments.replay.regmix_baselines import Array, Question

ROWS = RESULTS.with_name("replay_regmix_simplex.jsonl")
METHODS = ("ours", "ours_scalar", "ours_alone", "lightgbm", "law", "botorch", "random")
PROXIES, RUNS, SHOWN = 64, 8, (1, 2, 4, 8)
SCORED, AVERAGED, CANDIDATES = 100_000, 128, 20_000
STRENGTHS = (0.1, 5.0)
"""Sums of the parameters of RegMix's Dirichlet distributions, about a prior that is here the proxies' mean."""


# -------------------------------------------------------------------------------------------------------- the emulator


@dataclass(frozen=True)
class Emulator:
    """Losses over the simplex, "1M" or "60M". each: one model a loss. runs: shares (n x k) of what it was fitted to."""

    each: tuple[Any, ...]
    runs: Array

    def losses(self, shares: Array, scale: str = "60M") -> Array:
        """n x k -> n x p."""
        return np.asarray(np.exp(np.stack([model._raw(scale, shares) for model in self.each], axis=-1)))

    def distance(self, mixture: Array) -> float:
        return float(np.abs(self.runs - mixture).sum(1).min() / 2)


def halves(runs: int) -> tuple[Any, Any]:
    """Rows of the training table that proxies come from, and those behind the emulator."""
    rows = np.random.default_rng(60).permutation(runs)
    return rows[: runs // 2], rows[runs // 2 :]


@lru_cache(maxsize=2)
def emulator(folder: Path, everything: bool = False) -> Emulator:
    """Fitted to what no method sees, or to everything."""
    (test, large), (train, small), (_, test_small) = tables(folder)
    behind = np.arange(len(train)) if everything else halves(len(train))[1]
    module, name = blackbox(folder), "regmix-all" if everything else "regmix-simplex"
    shares, losses = np.vstack([train[behind], test]), np.vstack([small[behind], test_small])
    each = []
    for i in range(losses.shape[1]):
        sets = [("1M", SMALL, SMALL, 1e9, shares, losses[:, i]), ("60M", TARGET, TARGET, 1e9, test, large[:, i])]
        each.append(module.SimplexEmulator(f"{name}-{i}", shares.shape[1], sets, lin_fid=("60M",)))
    return Emulator(tuple(each), shares)


@lru_cache(maxsize=64)
def lowest(
    folder: Path, objective: int, scale: str = "60M", everything: bool = False, again: int = 0
) -> tuple[Array, float]:
    """The best mixture that is found on an emulator, and its sum: from many and around the best, closer and closer.

    again: number of another search for it. Of the same surface they end up to 0.1% and 0.07 of the data apart.
    """
    model, weights = emulator(folder, everything), objectives()[objective]
    rng, k = np.random.default_rng([objective, again] if again else objective), model.runs.shape[1]

    def values(X: Array) -> Array:
        return np.asarray(model.losses(X, scale) @ weights)

    X = np.vstack([model.runs, *(rng.dirichlet(np.full(k, strength / k), 1000) for strength in (1, 4, 16))])
    best = X[np.argsort(values(X))[:3]]
    for step in 0.5 * 0.7 ** np.arange(16):
        for i, x in enumerate(best):
            mixed = (1 - step) * x + step * rng.dirichlet(np.full(k, 0.3), 50)
            bent = x * np.exp(3 * step * rng.normal(size=(30, k)))
            near = np.vstack([x, mixed, bent / bent.sum(1, keepdims=True)])
            best[i] = near[values(near).argmin()]
    found = values(best)
    return best[found.argmin()], float(found.min())


# ------------------------------------------------------------------------------------------------------------ a search


@dataclass(frozen=True)
class Found(Row):
    """With the distance of the best mixture so far to the nearest run behind the emulator, after each target run."""

    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class Job:
    folder: Path
    objective: int
    method: str
    seed: int

    @property
    def key(self) -> Key:
        setting = f"{PROXIES} proxies" if with_proxies(self.method) else "no proxies"
        return Key(f"objective {self.objective}, simplex", self.method, setting, self.seed)

    def __call__(self) -> Found:
        before, rng = time.process_time(), np.random.default_rng([self.objective, self.seed])
        judge, proposer = emulator(self.folder), Proposer(self.method)
        order, unit = disguise(np.random.default_rng(self.objective))
        question = self.question(order, unit)
        values: list[float] = []
        mixtures: list[Array] = []
        for _ in range(RUNS):
            mixture = proposer(question, rng)
            plain = mixture[np.argsort(order)]
            losses = judge.losses(plain[None])
            values.append(float(losses[0] @ objectives()[self.objective]))
            mixtures.append(plain)
            shares, told = np.vstack([question.shares, mixture]), np.vstack([question.losses, losses * unit])
            question = replace(question, shares=shares, losses=told, bought=tuple(range(len(shares))))
        best = np.minimum.accumulate(values)
        at = [int(np.argmin(values[: n + 1])) for n in range(RUNS)]
        proxies = PROXIES if with_proxies(self.method) else 0
        return Found(
            **vars(self.key),
            regrets=tuple(100 * (best / lowest(self.folder, self.objective)[1] - 1)),
            proxies=proxies,
            cost=proxies * SMALL / TARGET,
            seconds=time.process_time() - before + proposer.cpu,
            distances=tuple(judge.distance(mixtures[i]) for i in at),
        )

    def question(self, order: Any, unit: Array) -> Question:
        """Before the first run at the target, disguised."""
        (train, small) = tables(self.folder)[1]
        given = halves(len(train))[0]
        rows = given[np.random.default_rng([self.seed, 5]).permutation(len(given))[:PROXIES]]
        rows = rows if with_proxies(self.method) else rows[:0]
        k, p = train.shape[1], small.shape[1]
        return Question(
            shares=np.zeros((0, k)),
            weights=objectives()[self.objective] / unit,
            proxies=train[rows][:, order],
            proxy_losses=small[rows] * unit,
            bought=(),
            losses=np.zeros((0, p)),
            held=np.zeros((0, k)),
            held_losses=np.zeros((0, p)),
            seed=self.seed,
        )


class Proposer:
    """The next mixture of a method. cpu: seconds in another process."""

    def __init__(self, method: str) -> None:
        self.method, self.choose = method, chooser(method)

    @property
    def cpu(self) -> float:
        return self.choose.cpu if isinstance(self.choose, Rival) else 0.0

    def __call__(self, question: Question, rng: np.random.Generator) -> Array:
        choose, told, k = self.choose, len(question.bought), question.shares.shape[1]
        if not len(question.proxies) and told < START:
            return rng.dirichlet(np.ones(k))
        if isinstance(choose, Ours):
            history, _ = choose.history(question)
            (proposal,) = Bayes(n_init=START).propose(history, 1, rng)
            choose.memory = dict(proposal.memory or {})
            return np.array([proposal.config["data"][f"d{i}"] for i in range(k)])
        if self.method == "lightgbm":
            assert isinstance(choose, Rival)
            X = mixtures(question, rng, SCORED)
            best = np.argsort(choose.values(replace(question, shares=np.vstack([question.shares, X])))[told:])
            return np.asarray(X[best[:AVERAGED]].mean(0))
        X = mixtures(question, rng, CANDIDATES)
        if told:
            half, least = len(X) // 2, question.shares[int(question.values.argmin())]
            X[:half] += rng.uniform(size=(half, 1)) * (least - X[:half])
        chosen: Array = X[choose(replace(question, shares=np.vstack([question.shares, X]))) - told]
        return chosen


def mixtures(question: Question, rng: np.random.Generator, n: int) -> Array:
    """n draws from Dirichlet distributions, of many strengths, about the mean of the proxies or the even mixture."""
    k = question.shares.shape[1]
    prior = question.proxies.mean(0) if len(question.proxies) else np.full(k, 1 / k)
    strength = np.geomspace(*STRENGTHS, 15)[rng.integers(15, size=n)]
    gammas = rng.standard_gamma(strength[:, None] * np.maximum(prior, 1e-3)) + 1e-12
    return np.asarray(gammas / gammas.sum(1, keepdims=True))


# -------------------------------------------------------------------------------------------------------------- rows


def load(file: Path) -> dict[Key, Found]:
    """As `protocol.load`, with distances."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [Found(**{**each, "distances": tuple(each["distances"])}) for each in map(json.loads, lines)]
    return {row.key: row for row in reversed(rows)}


def report(rows: Mapping[Key, Found], methods: Sequence[str]) -> Iterator[str]:
    """Mean regret with its interval, and mean distance, after some target runs, on what all methods have."""
    settings = {key.method: key.setting for key in rows}
    contenders = [Contender(method, settings[method]) for method in methods if method in settings]
    yield "percent above the least of the emulator after target runs, and distance of the mixture to the nearest run"
    for place, contender in enumerate(contenders):
        parts = []
        for runs in SHOWN:
            regrets, far = (
                paired(rows, contenders, lambda row, name=name, i=runs - 1: getattr(row, name)[i])  # type: ignore[misc]
                for name in ("regrets", "distances")
            )
            if regrets:
                at = interval(far, column(place)).value
                parts.append(f"{runs}: {interval(regrets, column(place))}, at {at:.2f}")
        yield f"  {contender!s:12s} {'   '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder with blackbox.py and regmix/")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--objectives", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--report", action="store_true", help="print what the rows say")
    options = parser.parse_args()
    methods = options.methods.split(",")
    if not options.report:
        if options.tables is None:
            parser.error("--tables is needed to make rows.")
        folder = options.tables.resolve()
        listed = [
            Job(folder, number, method, seed)
            for seed in range(options.seeds)
            for method in methods
            for number in range(options.objectives)
        ]
        for row in make(listed, options.rows, load(options.rows), options.workers):
            print(f"{row.key}: {row.regrets[-1]:.2f}%, {row.seconds:.1f} s", flush=True)
    for line in report(load(options.rows), methods):
        print(line)


if __name__ == "__main__":
    main()
