"""What is searched: synthetic functions, tables of real runs and a small real training, with budgets and first points.

This list, the budgets and the first points were settled before the first method ran; whoever changes a problem raises
its version, and its results are made anew.

A seed makes an instance. Continuous functions are turned about the centre of the box and moved: with z* the published
minimiser, W the widths of the published domain, R a random rotation and x* drawn from [0.2, 0.8]^d, the instance is
f(z* + W R (x - x*)) for x in the unit cube, so its minimum is f(z*) at x*. Branin, Levy, Ackley, Rosenbrock and
Hartmann have no lower value outside of their domains. Tables are disguised, with the seed as the secret.

Every method is told the same first points, a scrambled Sobol sequence of the seed, and trial number i gets the same
noise. Regret is the noiseless value less the instance's least one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.stats import ortho_group, qmc

from experiments.compare.environments import default_folder
from experiments.compare.protocol import Axis, Config, Task, shares

Array: TypeAlias = npt.NDArray[np.float64]
Function: TypeAlias = Callable[[Array], float]


@dataclass(frozen=True)
class Instance:
    """One seed of a problem.

    measure: config and number of the trial -> the value a method is told. regret: config -> its noiseless excess over
    the least value. noise: standard deviation of a measurement, in units of the regret.
    """

    axes: tuple[Axis, ...]
    measure: Callable[[Config, int], float]
    regret: Callable[[Config], float]
    noise: float = 0.0


@dataclass(frozen=True)
class Problem:
    """budget: evaluations in all; the first `design` of them are the same for every method. make: seed -> Instance."""

    name: str
    budget: int
    design: int
    make: Callable[[int], Instance]
    version: int = 1
    tables: bool = False
    seconds: float = 0.0
    """Rough CPU seconds of an evaluation."""

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Evaluations after which a method recommends: 25, 50 and 100% of the budget."""
        return tuple(math.ceil(self.budget * share) for share in SHARES)

    def task(self, instance: Instance, seed: int) -> Task:
        return Task(instance.axes, seed, self.budget, self.design, instance.noise > 0)


SHARES = (0.25, 0.5, 1.0)


def space_filling(axes: Sequence[Axis], seed: int, n: int) -> list[Config]:
    """The first n configs of a scrambled Sobol sequence: even on each axis, and over each simplex."""
    widths = [len(axis.names) if axis.kind == "mixture" else 1 for axis in axes]
    points = qmc.Sobol(sum(widths), rng=np.random.default_rng([seed, 1])).random(2 ** math.ceil(math.log2(n)))[:n]
    starts = np.cumsum([0, *widths])
    return [
        {
            axis.name: _value(axis, row[start : start + width])
            for axis, start, width in zip(axes, starts[:-1], widths, strict=True)
        }
        for row in np.clip(points, 1e-9, 1 - 1e-9).tolist()
    ]


def _value(axis: Axis, u: list[float]) -> Any:
    if axis.kind == "mixture":
        return dict(zip(axis.names, shares(u), strict=True))
    if axis.kind == "choice":
        return axis.names[int(u[0] * len(axis.names))]
    low, high = (axis.low, axis.high) if axis.kind == "real" else (axis.low - 0.5, axis.high + 0.5)
    value = low * (high / low) ** u[0] if axis.log else low + u[0] * (high - low)
    clipped = min(max(value, axis.low), axis.high)
    return clipped if axis.kind == "real" else round(clipped)


def cube(d: int) -> tuple[Axis, ...]:
    return tuple(Axis(f"x{i}", "real") for i in range(d))


def vector(config: Config, names: Sequence[str]) -> Array:
    return np.array([config[name] for name in names])


def draws(seed: int, name: str) -> np.random.Generator:
    """Random numbers that make the instance; another stream than the first points' and the noise's."""
    return np.random.default_rng([seed, 0, *name.encode()])


def noisy(loss: Callable[[Config], float], sd: float, seed: int) -> Callable[[Config, int], float]:
    def measure(config: Config, trial: int) -> float:
        return loss(config) + sd * float(np.random.default_rng([seed, 2, trial]).standard_normal())

    return measure


# ---------------------------------------------------------------------------------------------------------- functions


def branin(z: Array) -> float:
    bowl = z[1] - 5.1 / (4 * math.pi**2) * z[0] ** 2 + 5 / math.pi * z[0] - 6
    return float(bowl**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(z[0]) + 10)


HARTMANN_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
HARTMANN_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
HARTMANN_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann(z: Array) -> float:
    return float(-HARTMANN_ALPHA @ np.exp(-(HARTMANN_A * (z - HARTMANN_P) ** 2).sum(axis=1)))


def levy(z: Array) -> float:
    w = 1 + (z - 1) / 4
    middle = ((w[:-1] - 1) ** 2 * (1 + 10 * np.sin(math.pi * w[:-1] + 1) ** 2)).sum()
    last = (w[-1] - 1) ** 2 * (1 + np.sin(2 * math.pi * w[-1]) ** 2)
    return float(np.sin(math.pi * w[0]) ** 2 + middle + last)


def ackley(z: Array) -> float:
    far = -20 * math.exp(-0.2 * math.sqrt(float((z**2).mean())))
    return float(far - math.exp(float(np.cos(2 * math.pi * z).mean())) + 20 + math.e)


def rosenbrock(z: Array) -> float:
    return float((100 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum())


@dataclass(frozen=True)
class Published:
    """A function, a minimiser of it, polished below where it is published with few digits, and its domain's widths."""

    function: Function
    minimiser: tuple[float, ...]
    widths: tuple[float, ...]

    @property
    def least(self) -> tuple[Array, float]:
        """The minimiser to machine precision, and the value there."""
        options = {"xatol": 1e-12, "fatol": 1e-15, "maxiter": 10_000, "maxfev": 10_000}
        start = np.array(self.minimiser)
        if self.function(start) == 0.0:
            return start, 0.0
        found = minimize(self.function, start, method="Nelder-Mead", options=options)
        return found.x, float(found.fun)


BRANIN = Published(branin, (math.pi, 2.275), (15.0, 15.0))
HARTMANN = Published(hartmann, (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573), (1.0,) * 6)


def turned(name: str, published: Published, seed: int, sd: float = 0.0, among: int | None = None) -> Instance:
    """The function, turned and moved; with `among`, in as many of that many coordinates, the others without effect."""
    rng, d = draws(seed, name), len(published.widths)
    rotation = np.asarray(ortho_group.rvs(d, random_state=rng))
    place = rng.uniform(0.2, 0.8, d)
    axes = cube(among or d)
    names = [axes[i].name for i in (rng.permutation(among)[:d] if among else range(d))]
    (z, least), widths = published.least, np.array(published.widths)

    def loss(config: Config) -> float:
        return published.function(z + widths * (rotation @ (vector(config, names) - place)))

    return Instance(axes, noisy(loss, sd, seed), lambda config: loss(config) - least, sd)


def levels(seed: int) -> Instance:
    """Two rates, a depth and a kind: the kind decides how the best rates go with the depth, and how much is lost.

    For each kind a bowl over the rates, turned and stretched, whose bottom moves on a line with the depth, and a dent
    in the depth. The best kind reaches 0, the others 0.15 and 0.3 more than that.
    """
    rng = draws(seed, "mixed")
    kinds, depths = ("a", "b", "c"), 12
    axes = (
        Axis("rate", "real", 1e-4, 1.0, log=True),
        Axis("share", "real", 0.0, 1.0),
        Axis("depth", "integer", 1, depths),
        Axis("kind", "choice", names=kinds),
    )
    levels = dict(zip(kinds, rng.permutation([0.0, 0.15, 0.3]).tolist(), strict=True))
    rotation = {kind: np.asarray(ortho_group.rvs(2, random_state=rng)) for kind in kinds}
    centre = {kind: rng.uniform(0.3, 0.7, 2) for kind in kinds}
    slope = {kind: rng.uniform(0.15, 0.5, 2) * rng.choice([-1, 1], 2) for kind in kinds}
    best = {kind: int(rng.integers(3, depths - 1)) for kind in kinds}

    def loss(config: Config) -> float:
        kind, depth = config["kind"], (config["depth"] - best[config["kind"]]) / depths
        at = np.array([1 + math.log10(config["rate"]) / 4, config["share"]])
        away = rotation[kind] @ (at - centre[kind] - slope[kind] * depth)
        return float(levels[kind] + 8 * away[0] ** 2 + 2 * away[1] ** 2 + 1.5 * depth**2)

    return Instance(axes, noisy(loss, 0.0, seed), loss)


def mixing(seed: int, sources: int = 6, domains: int = 5) -> Instance:
    """A data-mixing law: sum_j v_j (c_j + k_j exp(-t_j . w)) over shares w, convex, its minimum on a face as a rule."""
    rng = draws(seed, "simplex")
    names = tuple("abcdefgh"[:sources])
    value = rng.dirichlet(np.full(domains, 2.0))
    level = rng.uniform(1.0, 2.0, domains)
    size = rng.uniform(0.5, 2.0, domains)
    rate = rng.gamma(0.5, 2.0, (domains, sources))  # how much a source teaches of a domain

    def function(w: Array) -> float:
        return float(value @ (level + size * np.exp(-rate @ w)))

    def slope(w: Array) -> Array:
        return np.asarray(-rate.T @ (value * size * np.exp(-rate @ w)))

    found = minimize(
        function,
        np.full(sources, 1 / sources),
        jac=slope,
        bounds=[(0.0, 1.0)] * sources,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(sources)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )

    def loss(config: Config) -> float:
        return function(vector(config["data"], names))

    axes = (Axis("data", "mixture", names=names),)
    return Instance(axes, noisy(loss, 0.0, seed), lambda config: loss(config) - float(found.fun))


# ------------------------------------------------------------------------------------------------------------ tables

TABLES: list[Path] = []
"""The folder with blackbox.py and the tables, where one was given."""

Target: TypeAlias = tuple[str, int]
"""A table and the number of one of its scales, the cheapest first."""

STEP_LAW: tuple[Target, ...] = (
    *(("steplaw-dense-214M", scale) for scale in range(4)),
    *(("steplaw-dense-429M", scale) for scale in range(3)),
    ("steplaw-dense-1073M", 0),
    *(("steplaw-moe-1in89", scale) for scale in range(4)),
)


@cache
def blackbox(folder: Path) -> Any:
    """The module beside the tables; what it fits is cached in the user's folder, since theirs may not be ours."""
    spec = importlib.util.spec_from_file_location("blackbox", folder / "blackbox.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{folder} has no blackbox.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["blackbox"] = module  # its dataclasses look themselves up there
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    cached = default_folder() / "emulators.json"
    cached.parent.mkdir(parents=True, exist_ok=True)
    module._CACHE_FILE = str(cached)
    return module


@cache
def table(name: str) -> Any:
    return blackbox(TABLES[0]).get(name)


def disguised(seed: int, *targets: Target) -> Instance:
    """One scale of a table, disguised; the seed picks one of several. Regret is in percent of the least loss."""
    module = blackbox(TABLES[0])
    name, scale = targets[seed % len(targets)]
    inner = table(name)
    box = module.disguise(inner, f"compare {seed}")
    least = inner.optimum(scale)[1]
    axes = tuple(_axis(parameter) for parameter in box.params)

    def opened(config: Config) -> Config:
        return {k: np.array(list(v.values())) if isinstance(v, Mapping) else v for k, v in config.items()}

    def loss(config: Config) -> float:
        return float(box.evaluate(opened(config), scale))

    def regret(config: Config) -> float:
        return 100 * ((loss(config) - box.b) / box.a / least - 1)

    return Instance(axes, noisy(loss, box.noise_sd, seed), regret, 100 * inner.noise_sd / least)


def _axis(parameter: Any) -> Axis:
    if parameter.type == "simplex":
        return Axis(parameter.name, "mixture", names=tuple("abcdefghijklmnopqrst"[: parameter.size]))
    return Axis(parameter.name, "real", parameter.low, parameter.high, parameter.type == "log")


# ---------------------------------------------------------------------------------------------------------- training

DIGITS_LEAST, DIGITS_NOISE = 0.13, 0.03
"""A little less than the best validation loss among 430 configs, space-filling ones and moves from the best of these
(0.134, mean over `JUDGES`), and the standard deviation of a good config's loss over seeds."""


@cache
def digits() -> tuple[Any, Any, Any, Any]:
    """scikit-learn's handwritten digits, 700 to train on and 1,097 to validate."""
    import torch
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = torch.tensor(X[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    return X[:700], y[:700], X[700:], y[700:]


def train_digits(config: Config, seed: int, epochs: int = 6) -> float:
    """Validation loss of a network with two hidden layers, at most 10; SGD with momentum."""
    import torch

    X, y, held_X, held_y = digits()
    kinds = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh, "gelu": torch.nn.GELU}
    width, kind = config["width"], kinds[config["activation"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(64, width),
            kind(),
            torch.nn.Dropout(config["dropout"]),
            torch.nn.Linear(width, width),
            kind(),
            torch.nn.Linear(width, 10),
        )
        steps = torch.optim.SGD(
            net.parameters(), lr=config["lr"], momentum=1 - config["friction"], weight_decay=config["decay"]
        )
        for _ in range(epochs):
            for rows in torch.randperm(len(X)).split(config["batch"]):
                steps.zero_grad()
                torch.nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
                steps.step()
        net.eval()
        with torch.no_grad():
            loss = float(torch.nn.functional.cross_entropy(net(held_X), held_y))
    torch.set_num_threads(threads)
    return min(loss, 10.0) if math.isfinite(loss) else 10.0


DIGITS = (
    Axis("lr", "real", 1e-3, 1.0, log=True),
    Axis("friction", "real", 0.01, 1.0, log=True),
    Axis("decay", "real", 1e-6, 1e-1, log=True),
    Axis("dropout", "real", 0.0, 0.7),
    Axis("width", "integer", 8, 128, log=True),
    Axis("batch", "integer", 16, 128, log=True),
    Axis("activation", "choice", names=("relu", "tanh", "gelu")),
)
JUDGES = range(10_000, 10_005)
"""Seeds of the trainings whose mean loss is the noiseless value of a recommendation."""


def training(seed: int) -> Instance:
    """A trial trains with a seed of its own number; a recommendation is judged by other seeds, the same for all."""

    def measure(config: Config, trial: int) -> float:
        return train_digits(config, 1000 * seed % 9000 + trial)

    def regret(config: Config) -> float:
        return float(np.mean([train_digits(config, judge) for judge in JUDGES])) - DIGITS_LEAST

    return Instance(DIGITS, measure, regret, DIGITS_NOISE)


# ------------------------------------------------------------------------------------------------------------ the list


def _listed() -> Iterator[Problem]:
    yield Problem("branin", 30, 5, lambda seed: turned("branin", BRANIN, seed))
    yield Problem("levy-4", 50, 6, lambda seed: turned("levy", Published(levy, (1.0,) * 4, (20.0,) * 4), seed))
    yield Problem("rosenbrock-4", 50, 6, lambda seed: turned("rosenbrock", ROSENBROCK, seed))
    yield Problem("ackley-5", 60, 7, lambda seed: turned("ackley", Published(ackley, (0.0,) * 5, (15.0,) * 5), seed))
    yield Problem("hartmann-6", 60, 8, lambda seed: turned("hartmann", HARTMANN, seed))
    yield Problem("hartmann-6-noisy", 60, 8, lambda seed: turned("hartmann", HARTMANN, seed, sd=0.1))
    yield Problem("mixed-4", 50, 8, levels)
    yield Problem("simplex-6", 40, 8, mixing)
    yield Problem("levy-20", 100, 20, lambda seed: turned("levy", Published(levy, (1.0,) * 20, (20.0,) * 20), seed))
    yield Problem("hartmann-6-in-60", 100, 20, lambda seed: turned("hartmann", HARTMANN, seed, among=60))
    yield Problem("step-law", 20, 3, lambda seed: disguised(seed, *STEP_LAW), version=2, tables=True)
    yield Problem("red-pajama", 40, 8, lambda seed: disguised(seed, ("mixlaw-redpajama", 3)), tables=True)
    yield Problem("schedule", 40, 6, lambda seed: disguised(seed, ("schedule-24k", 1)), tables=True)
    yield Problem("digits", 40, 8, training, seconds=0.15)


ROSENBROCK = Published(rosenbrock, (1.0,) * 4, (15.0,) * 4)
PROBLEMS: Mapping[str, Problem] = MappingProxyType({problem.name: problem for problem in _listed()})
