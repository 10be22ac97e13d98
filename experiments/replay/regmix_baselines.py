"""What others do to choose the next mixture of a pool, each in the environment that has its library.

    python -m experiments.replay.regmix_baselines NAME      # a line of JSON a question -> {"row": i, "cpu": seconds}

Every method is asked anew before every run, is given all runs so far and fits from scratch. With proxies, regressions
of their losses, greedy, fitted again with every run at the target:

    lightgbm             RegMix's regression (arXiv 2407.01492), a model a domain. The released code's leaves of 20 runs
                         and more cannot split 32; of what was tried these rank held-out runs best after 32 and 64
    lightgbm_scalar      the same of the weighted sum
    lightgbm_released    the released settings: up to 1,000 rounds, stopped by runs that only it is given
    law                  L_i = c_i + k_i exp(sum_j t_ij r_j) (Data Mixing Laws, arXiv 2403.16952), Huber, several starts

The mean ratio of losses at the target to what the proxies' model foretells there brings proxies to the target's level.
Without proxies, on raw shares:

    botorch              SingleTaskGP of the sum, LogEI over the rows
    botorch_model_list   ModelListGP, a process a loss, LogEI of their weighted sum over the rows
    ax, ax_scalarized    Ax's default model and criterion, of the sum and of a scalarized objective, over the rows
    optuna_tpe, optuna_gp   Optuna cannot score a pool: its suggestion, and of the rows not bought the nearest to it
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Predict: TypeAlias = Callable[[Array], Array]
"""Shares (n x k) -> losses (n x p)."""
Fit: TypeAlias = Callable[[Array, Array, "Question"], Predict]


@dataclass(frozen=True)
class Question:
    """Which row next? shares: N x k, of the pool; weights: p, of the sum of losses that is minimised.

    proxies, proxy_losses: n x k and n x p, small runs. bought, losses: m rows and their m x p losses. held,
    held_losses: further small runs, for who needs some to stop by. seed: for what is random.
    """

    shares: Array
    weights: Array
    proxies: Array
    proxy_losses: Array
    bought: tuple[int, ...]
    losses: Array
    held: Array
    held_losses: Array
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Question:
        k, p = np.shape(line["shares"])[1], len(line["weights"])
        widths = {"shares": k, "proxies": k, "held": k, "proxy_losses": p, "losses": p, "held_losses": p}
        tables = {name: np.array(line[name], dtype=float).reshape(-1, width) for name, width in widths.items()}
        return cls(**tables, weights=np.array(line["weights"]), bought=tuple(line["bought"]), seed=line["seed"])

    @property
    def values(self) -> Array:
        """What is minimised, of the runs bought."""
        return np.asarray(self.losses @ self.weights)

    def best(self, score: npt.ArrayLike) -> int:
        """The row of the highest score (N) among those not bought."""
        left = np.array(score, dtype=float)
        left[list(self.bought)] = -np.inf
        return int(left.argmax())


# ------------------------------------------------------------------------------------------ regressions on the proxies


@dataclass
class Regression:
    """Greedy on a model of the proxies and the runs at the target; that of the proxies alone is kept for a search."""

    fit: Fit
    scalar: bool = False
    known: tuple[bytes, Predict] | None = None

    def __call__(self, question: Question) -> int:
        return question.best(-self.values(question))

    def values(self, question: Question) -> Array:
        """Of each row, what the sum is expected to be."""
        weights = question.weights
        proxies, told = question.proxy_losses, question.losses
        if self.scalar:
            proxies, told, weights = proxies @ weights[:, None], told @ weights[:, None], np.ones(1)
        if self.known is None or self.known[0] != proxies.tobytes():
            self.known = proxies.tobytes(), self.fit(question.proxies, proxies, question)
        predict = self.known[1]
        if len(question.bought):
            here = question.shares[list(question.bought)]
            level = np.exp(np.log(told / predict(here)).mean(0))
            predict = self.fit(np.vstack([question.proxies, here]), np.vstack([proxies * level, told]), question)
        return np.asarray(predict(question.shares) @ weights)


BOOSTING = {"objective": "regression", "boosting_type": "gbdt", "learning_rate": 0.01, "seed": 42}
QUIET = {"verbosity": -1, "num_threads": 1, "force_col_wise": True}


def boosted(shares: Array, losses: Array, question: Question) -> Predict:
    """300 rounds with leaves of at least 5 runs."""
    import lightgbm as lgb

    settings = {**BOOSTING, **QUIET, "min_data_in_leaf": 5}
    models = [lgb.train(settings, lgb.Dataset(shares, column), 300) for column in losses.T]
    return lambda X: np.stack([model.predict(X) for model in models], axis=-1)


def boosted_as_released(shares: Array, losses: Array, question: Question) -> Predict:
    """Early stopping after three rounds without gain on runs held out, 256 in the paper; leaves are not set there."""
    import lightgbm as lgb

    held = question.held_losses if losses.shape[1] > 1 else question.held_losses @ question.weights[:, None]
    level = np.exp(np.log(losses).mean(0) - np.log(held).mean(0))  # refitted, losses are at the level of the target
    models = [
        lgb.train(
            {**BOOSTING, **QUIET, "metric": "l2"},
            lgb.Dataset(shares, column),
            1000,
            valid_sets=[lgb.Dataset(question.held, other)],
            callbacks=[lgb.early_stopping(3, verbose=False)],
        )
        for column, other in zip(losses.T, (held * level).T, strict=True)
    ]
    return lambda X: np.stack([model.predict(X) for model in models], axis=-1)


DELTA, STARTS = 0.03, 2  # more starts rank held-out runs no better


def law(shares: Array, losses: Array, question: Question) -> Predict:
    """The mixing law of each loss, the best of several starts by its Huber loss on the same runs."""
    rng = np.random.default_rng(question.seed)
    found = np.array([mixing_law(shares, y, rng) for y in losses.T])  # p x (2 + k): c, log k, t
    return lambda X: found[:, 0] + np.exp(found[:, 1] + X @ found[:, 2:].T)


def mixing_law(shares: Array, y: Array, rng: np.random.Generator, starts: int = STARTS) -> Array:
    """c, log k and t (k of them) of one loss (n)."""
    from scipy.optimize import minimize

    def loss(theta: Array) -> tuple[float, Array]:
        rise = np.exp(np.clip(theta[1] + shares @ theta[2:], -30, 30))
        off = theta[0] + rise - y
        slope = np.clip(off, -DELTA, DELTA) / len(y)  # Huber 1964
        value = np.where(np.abs(off) < DELTA, off**2 / 2, DELTA * (np.abs(off) - DELTA / 2)).mean()
        return float(value), np.r_[slope.sum(), slope @ rise, shares.T @ (slope * rise)]

    best, least = np.zeros(2 + shares.shape[1]), np.inf
    for _ in range(starts):
        c = y.min() * rng.uniform(0.3, 0.95)
        start = np.r_[c, np.log(np.median(y) - c), rng.normal(0, 1, shares.shape[1])]
        done = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        if done.fun < least:
            best, least = done.x, done.fun
    return best


# ----------------------------------------------------------------------------------------------- at the target alone


def by_botorch(question: Question, composite: bool) -> int:
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.acquisition.objective import ScalarizedPosteriorTransform
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import ModelListGP, SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood

    torch.set_num_threads(1)
    torch.manual_seed(question.seed)
    X, best = torch.as_tensor(question.shares), -float(question.values.min())
    told = X[list(question.bought)]
    if composite:
        model: Any = ModelListGP(*[SingleTaskGP(told, -torch.as_tensor(y)[:, None]) for y in question.losses.T])
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        weighed: Any = ScalarizedPosteriorTransform(torch.as_tensor(question.weights))
    else:
        model, weighed = SingleTaskGP(told, -torch.as_tensor(question.values)[:, None]), None
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    with torch.no_grad():
        return question.best(
            LogExpectedImprovement(model, best_f=best, posterior_transform=weighed)(X[:, None]).numpy()
        )


def by_ax(question: Question, scalarized: bool) -> int:
    import logging

    import torch
    from ax.adapter.registry import Generators
    from ax.api.client import Client
    from ax.api.configs import RangeParameterConfig
    from ax.core.observation import ObservationFeatures

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    k, p = question.shares.shape[1], len(question.weights)
    names = [f"w{i}" for i in range(k - 1)]  # Ax takes no equality
    rows = [dict(zip(names, map(float, row[:-1]), strict=True)) for row in question.shares]
    client = Client(random_seed=question.seed)
    client.configure_experiment(
        parameters=[RangeParameterConfig(name=name, bounds=(0.0, 1.0), parameter_type="float") for name in names],
        parameter_constraints=[" + ".join(names) + " <= 1"],
    )
    metrics = [f"m{i}" for i in range(p)] if scalarized else ["loss"]
    told = question.losses if scalarized else question.values[:, None]
    terms = " + ".join(f"{w:.12f} * {m}" for w, m in zip(question.weights, metrics, strict=False))
    client.configure_optimization(objective=f"-1 * ({terms})" if scalarized else "-loss")
    for row, losses in zip(question.bought, told, strict=True):
        number = client.attach_trial(parameters=rows[row])
        client.complete_trial(number, raw_data=dict(zip(metrics, map(float, losses), strict=True)))
    experiment = client._experiment
    adapter = Generators.BOTORCH_MODULAR(experiment=experiment, data=experiment.lookup_data())
    return question.best(adapter.evaluate_acquisition_function([ObservationFeatures(parameters=row) for row in rows]))


def by_optuna(question: Question, kind: str) -> int:
    """Shares are those of -log u, which Optuna's FAQ recommends; the nearest row is so in shares."""
    import optuna

    from experiments.compare.methods.optuna import distribution
    from experiments.compare.protocol import Axis, flat, flatten, unflatten

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = tuple(f"w{i}" for i in range(question.shares.shape[1]))
    axes = (Axis("data", "mixture", names=names),)
    distributions = {axis.name: distribution(axis) for axis in flat(axes)}
    kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
    sampler = kinds[kind](seed=question.seed + len(question.bought), n_startup_trials=len(question.bought))
    study = optuna.create_study(sampler=sampler)
    for row, value in zip(question.bought, question.values.tolist(), strict=True):
        config = {"data": dict(zip(names, question.shares[row].tolist(), strict=True))}
        params = flatten(axes, config)
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    found = unflatten(axes, study.ask(distributions).params)["data"]
    return question.best(-np.square(question.shares - np.array([found[name] for name in names])).sum(1))


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Baseline:
    """choose: a question's answer. environment: of `experiments.compare.environments`, None for the project's own."""

    choose: Callable[[Question], int]
    environment: str | None = None
    proxies: bool = False


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "random": Baseline(lambda q: q.best(np.random.default_rng([q.seed, len(q.bought)]).random(len(q.shares)))),
        "lightgbm": Baseline(Regression(boosted), "lightgbm", True),
        "lightgbm_scalar": Baseline(Regression(boosted, scalar=True), "lightgbm", True),
        "lightgbm_released": Baseline(Regression(boosted_as_released), "lightgbm", True),
        "law": Baseline(Regression(law), None, True),
        "botorch": Baseline(lambda q: by_botorch(q, composite=False)),
        "botorch_model_list": Baseline(lambda q: by_botorch(q, composite=True)),
        "ax": Baseline(lambda q: by_ax(q, scalarized=False), "ax"),
        "ax_scalarized": Baseline(lambda q: by_ax(q, scalarized=True), "ax"),
        "optuna_tpe": Baseline(lambda q: by_optuna(q, "tpe"), "optuna"),
        "optuna_gp": Baseline(lambda q: by_optuna(q, "gp"), "optuna"),
    }
)


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        before = time.process_time()
        try:
            asked, choose = json.loads(line), BASELINES[name].choose
            question = Question.from_json(asked)
            if asked["do"] == "values" and isinstance(choose, Regression):
                answer: dict[str, Any] = {"values": choose.values(question).tolist()}
            else:
                answer = {"row": choose(question)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({**answer, "cpu": time.process_time() - before}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
