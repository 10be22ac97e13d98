"""From a history to proposals and recommendations by the posterior of the objective."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo import dataset
from bo.acquisition.log_ei import log_ei
from bo.dataset import Dataset
from bo.acquisition.acquisition import Acquisition
from bo.optimize import maximise
from bo.policies.design import initial, middle, sequence_seed
from bo.ports import History, Proposal, Recommendation
from bo.surrogates import composite
from bo.surrogates.composite import Composite
from bo.surrogates.hyperparameters import NumericalError
from search_spaces import Scale

#: Runs at a scale from which on a model of that scale alone is tried against the model of all scales.
ENOUGH_ALONE = 6


def propose(
    history: History, n: int, rng: np.random.Generator, source: str, greedy: bool = False
) -> tuple[Proposal, ...]:
    """Up to `n` runs at the top scale: log-EI on the posterior over all scales, one after the other.

    While nothing was run at the top scale, the first is the minimiser of the posterior mean: a random run there costs
    as much and tells less. `greedy` asks for it where something was run, a recipe of the user's say. Later ones improve
    on the best posterior mean over the runs told or running there; each proposal, and each run without a result, is
    believed to come out as the posterior mean has it.
    """
    at = history.space.top
    n = history.affordable([at] * n)
    if n == 0:
        return ()
    data, allowed = dataset.from_history(history), history.space.at(at)
    try:
        model, fitted = fit(data, at, history.memory.get("model"))
        believed = model.believe(model.data.X_pending, model.data.S_pending)
        memory = {"sequence": sequence_seed(history, rng), "model": fitted}
        taken = data.taken(at)
        # Some were made elsewhere and are not allowed here: to improve on those may be out of reach.
        running = torch.as_tensor(allowed.repair(data.started(at).numpy()))
        proposals: list[Proposal] = []
        for i in range(n):
            over = running[:0] if greedy and i == 0 else running
            found = maximise(criterion(believed, at, over), allowed, leaders(believed, at), taken, rng)
            note = None if found.new else "Every configuration of the space has been tried; this one is run again."
            config = allowed.decode(found.x)
            proposals.append(Proposal(config, at, source, predicted(believed, found.x, at), memory, note))
            believed = believed.believe(found.x[None], data.place(at)[None])
            taken, running = torch.cat([taken, found.x[None]]), torch.cat([running, found.x[None]])
    except NumericalError as error:
        return initial(history, n, rng, f"A space-filling point in place of the model's: {error}")
    return tuple(proposals)


def recommend(history: History, scale: Scale, rng: np.random.Generator) -> Recommendation:
    """The minimiser of the posterior mean at any scale, tried or not."""
    space = history.space.at(scale)
    data = dataset.from_history(history)
    if not data.finite:
        untold = "Nothing was told yet: this is the middle of the space."
        return Recommendation(middle(space), scale, None, None, None, untold)
    try:
        model, _ = fit(data, scale, history.memory.get("model"))
        untaken = torch.zeros(0, len(space.columns), dtype=torch.float64)
        found = maximise(posterior_mean(model, scale), space, leaders(model, scale), untaken, rng)
        expected = model.predict(found.x, scale)
    except NumericalError as error:
        config = best_allowed(history, scale)
        return Recommendation(config, scale, None, None, None, f"The best run so far, without a model: {error}")
    note = None
    if not (data.at(scale) & ~data.diverged).any():
        note = f"No run has finished at this scale; its level is extrapolated from {len(data.scales)} other(s)."
    return Recommendation(space.decode(found.x), scale, expected.mean, expected.low, expected.high, note)


def best_allowed(history: History, scale: Scale) -> dict[str, Any]:
    """The best configuration told, as it is allowed at a scale; the middle of the space where none of them is."""
    space = history.space.at(scale)
    finished = [trial for trial in history.trials if trial.status == "finished"]
    for trial in sorted(finished, key=lambda trial: history.objective.value(trial.metrics or {})):
        for config in (trial.config, space.decode(history.space.encode(trial.config))):
            if space.allows(config):  # one that was allowed where it ran need not be here
                return dict(config)
    return middle(space)


def fit(data: Dataset, at: Scale, start: Any = None) -> tuple[Composite, dict[str, Any]]:
    """The model to decide by at a scale, and what the next fit starts from.

    It is the model of all scales, unless a model of this scale alone foretells the runs here better, each from the
    others: small runs sometimes mislead.
    """
    model = composite.fit(data, start)
    memory = model.gp.memory()
    here = data.at(at)
    if len(data.scales) > 1 and int((here & ~data.diverged).sum()) >= ENOUGH_ALONE:
        alone = composite.fit(data.rows(here))
        if float(log_density(alone).sum()) > float(log_density(model)[here].sum()):
            model = alone
    return model, memory


def log_density(model: Composite) -> Tensor:
    """Leave-one-out log density of each run's metrics, summed over metrics: n."""
    mean, variance = model.gp.leave_one_out()
    return (-0.5 * ((model.data.Y - mean).square() / variance + (2 * math.pi * variance).log())).sum(-1)


def criterion(model: Composite, at: Scale, running: Tensor) -> Acquisition:
    """Log-EI over the best posterior mean among `running` (k x d); the posterior mean itself while there are none."""
    if not len(running):
        return posterior_mean(model, at)
    belief = model.at(at)
    best = belief.value(running)[0].max()

    def acquisition(X: Tensor) -> Tensor:
        return log_ei(*belief.value(X), best)

    return acquisition


def posterior_mean(model: Composite, at: Scale) -> Acquisition:
    belief = model.at(at)

    def acquisition(X: Tensor) -> Tensor:
        return belief.value(X)[0]

    return acquisition


def leaders(model: Composite, at: Scale, k: int = 10) -> Tensor:
    """The told configurations, of every scale, that the posterior mean at this scale likes best: up to k x d."""
    X = model.data.X
    with torch.no_grad():
        order = torch.argsort(model.at(at).value(X)[0], descending=True, stable=True)
    return X[order[:k]]


def predicted(model: Composite, x: Tensor, at: Scale) -> dict[str, float]:
    expected = model.predict(x, at)
    return {"mean": expected.mean, "low": expected.low, "high": expected.high}
