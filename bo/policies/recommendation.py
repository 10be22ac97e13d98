"""The configuration that the model believes best, among all or among those that ran.

It is the best posterior mean, never the best measured value, which is the luckiest one of noisy runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo import dataset
from bo.acquisition.acquisition import Acquisition
from bo.acquisition.constrained import log_feasible
from bo.acquisition.environment import AveragedBelief, Environments
from bo.dataset import Dataset
from bo.objective import Pareto, Single
from bo.optimize import allowed, maximise
from bo.policies.design import middle
from bo.policies.engine import Engine
from bo.policies.posterior import LEADERS, find_edge, fit
from bo.ports import History, Recommendation
from bo.surrogates.composite import Z90, Belief, Composite, Prediction
from bo.surrogates.divergence import Divergence
from bo.surrogates.hyperparameters import NumericalError
from bo.trial import Trial
from search_spaces import Scale, Space

#: Standard deviations of the posterior mean over the runs that a probability of keeping limits counts for, below one
#: half, for each factor of e.
STRICT = 10.0
UNTOLD = "No run has finished yet: this is the middle of the space."
UNTRIED = "No run that was told is within the limits and allowed at this scale, so this one was not tried."


def recommend(
    history: History,
    scale: Scale,
    rng: np.random.Generator,
    tried: bool = False,
    engine: Engine = Engine(),  # noqa: B008 - a frozen value
) -> Recommendation:
    """The minimiser of the posterior mean at any scale: of all configurations, or with `tried` of those that ran.

    Those are the configurations with a finite result at that scale, or at any where there are none, as far as they are
    allowed there and kept the limits on metrics; of all configurations, one is sought that keeps them as likely as not.
    Where the engine averages over environments, the average is minimised. ValueError for several objectives.
    """
    if isinstance(history.objective, Pareto):
        raise ValueError(
            f"No configuration is the best of {len(history.objective.parts)} objectives; Study.front() gives the "
            "trials that none beats."
        )
    space = history.space.at(scale)
    data = dataset.from_history(history)
    if not data.finite:
        return Recommendation(middle(space), scale, None, None, None, UNTOLD)
    ran = candidates(history.trials, history.objective, scale, space)
    notes = [UNTRIED] if tried and not ran else []
    try:
        model, _ = fit(data, scale, history.memory.get("model"), engine)
        belief = engine.belief(model, scale)
        if tried and ran:
            x, trial, note = best_tried(belief, ran, torch.as_tensor(space.encode_all([t.config for t in ran])))
            notes += [note] if note else []
        else:
            x, trial = best_of_all(model, belief, data, scale, rng), None
            notes += kept_words(model, x, scale)
        expected = predict(model, belief, x, scale)
    except NumericalError as error:
        config, id = best_measured(history.trials, history.objective, space)
        why = f"The best run so far, without a model: {error}"
        return Recommendation(config, scale, None, None, None, why, id)
    if isinstance(belief, AveragedBelief):
        notes.append(averaged_words(belief.environments, trial is None))
    if not (data.at(scale) & ~data.diverged).any():
        notes.append(f"No run has finished at this scale; its level is extrapolated from {len(data.scales)} other(s).")
    config = space.decode(x) if trial is None else dict(trial.config)
    id = None if trial is None else trial.id
    return Recommendation(config, scale, expected.mean, expected.low, expected.high, " ".join(notes) or None, id)


def candidates(trials: Sequence[Trial], objective: Single, scale: Scale, space: Space) -> list[Trial]:
    """The runs with a finite result within its limits at a scale, or at any where there are none, as `space` allows."""
    finished = [trial for trial in trials if trial.status == "finished" and trial.metrics]
    good = [
        trial
        for trial in finished
        if math.isfinite(objective.value(trial.metrics or {}))
        and objective.feasible(trial.metrics or {})
        and space.allows(trial.config)
    ]
    return [trial for trial in good if trial.scale == scale] or good


def best_measured(trials: Sequence[Trial], objective: Single, space: Space) -> tuple[dict[str, Any], int | None]:
    """The config with the best result as `space` (of one scale) allows it, and the trial that ran just that.

    Results within the limits come first. Where a config is not allowed, it is what the space reads it as; the middle of
    the space where none is.
    """

    def rank(trial: Trial) -> tuple[bool, float]:
        return not objective.feasible(trial.metrics or {}), objective.value(trial.metrics or {})

    for trial in sorted((trial for trial in trials if trial.status == "finished"), key=rank):
        if space.allows(trial.config):
            return dict(trial.config), trial.id
        read = space.decode(space.whole.encode(trial.config))
        if space.allows(read):  # what was allowed where it ran need not be here
            return read, None
    return middle(space), None


def best_of_all(model: Composite, belief: Belief, data: Dataset, scale: Scale, rng: np.random.Generator) -> Tensor:
    """The maximiser (d,) of the `worth` of a configuration."""
    X, space = model.data.X, data.space.at(scale)
    edge = find_edge(data)
    value = worth(model, belief, edge, scale)
    with torch.no_grad():
        order = torch.argsort(value(X), descending=True, stable=True)
    found = maximise(value, space, X[order[:LEADERS]], X[:0], rng).x
    ran = X[model.data.at(scale)]
    ran = ran[allowed(space, ran)]
    if edge is not None and len(ran):  # at an edge, what ran is known not to be beyond it
        with torch.no_grad():
            mean, there = belief.value(ran)[0], value(found[None])
        if mean.max() >= there:
            found = ran[mean.argmax()]
    if isinstance(belief, AveragedBelief):
        return belief.environments.put(found, belief.environments.heaviest)
    return found


def worth(model: Composite, belief: Belief, edge: Divergence | None, scale: Scale) -> Acquisition:
    """The mean where limits are kept as likely as not; elsewhere so much less that such a point wins if there is one.

    Where runs diverged, the mean is of what was never seen beyond an edge: it counts for as much as a run is likely not
    to diverge, and for the rest the worst of what was seen does, and as much again.
    """
    log_kept = log_feasible(model, scale)
    with torch.no_grad():
        told = belief.value(model.data.X)[0]
    spread, worst = told.std(correction=0), 2 * told.min() - told.max()

    def value(at: Tensor) -> Tensor:
        mean, _ = belief.value(at)
        if edge is not None:
            mean = worst + (mean - worst) * edge.log_ok(model.at(scale).inputs(at)).exp()
        if not model.data.outcome.limits:
            return mean
        return mean + STRICT * spread * (log_kept(at) + math.log(2)).clamp_max(0)

    return value


def best_tried(belief: Belief, ran: list[Trial], X: Tensor) -> tuple[Tensor, Trial, str | None]:
    """Of the runs at n x d points the one with the best mean: its point, the trial, and which runs repeat it.

    Runs of one configuration are replicates of one point, with one mean; the first of them stands for all.
    """
    with torch.no_grad():
        mean, _ = belief.value(X)
    index = int(mean.argmax())
    again = [trial.id for trial, x in zip(ran, X, strict=True) if torch.equal(x, X[index]) and trial is not ran[index]]
    note = f"It ran {len(again) + 1} times, also as {', '.join(f'trial {id}' for id in again)}." if again else None
    return X[index], ran[index], note


def predict(model: Composite, belief: Belief, x: Tensor, scale: Scale) -> Prediction:
    """What a run at x (d,) will measure; of an average, what a run in every environment will measure on average."""
    if not isinstance(belief, AveragedBelief):
        return model.predict(x, scale)
    environments = belief.environments
    means = torch.tensor([model.predict(at, scale).mean for at in environments.everywhere(x)], dtype=torch.float64)
    with torch.no_grad():
        _, sd = belief.value(x[None])
        half = Z90 * float((sd[0].square() + belief.noise).sqrt())
    centre = float(environments.weights @ means)
    return Prediction(centre, centre - half, centre + half)


def kept_words(model: Composite, x: Tensor, scale: Scale) -> list[str]:
    """How likely limits are kept at x (d,), where there are any."""
    if not model.data.outcome.limits:
        return []
    with torch.no_grad():
        kept = float(log_feasible(model, scale)(x[None]).exp())
    return [f"It keeps the limits with a probability of {kept:.0%}."]


def averaged_words(environments: Environments, put: bool) -> str:
    """What the numbers of a recommendation are an average of, and the environment it was put in."""
    names = ", ".join(environments.options[0])
    words = f"Best on average over {names} ({len(environments.weights)} environments)."
    if put:
        options = environments.options[environments.heaviest]
        words += f" It is put in the one with most weight, {', '.join(f'{n}={o}' for n, o in options.items())}."
    return words
