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
from bo.policies import guard
from bo.policies.design import good, middle
from bo.policies.engine import Engine
from bo.policies.model_choice import fit
from bo.policies.optimum import Optimum, sampled
from bo.policies.posterior import LEADERS, find_edge
from bo.ports import History, Recommendation
from bo.scaling.level import Level
from bo.surrogates.composite import Z90, Belief, Composite, Prediction
from bo.surrogates.divergence import Divergence
from bo.surrogates.drift import leads, spanned
from bo.surrogates.hyperparameters import NumericalError
from bo.trial import Trial
from search_spaces import Scale, Space

#: Octaves beyond all runs from which on a recommendation is called a guess.
FAR = 0.5
#: Draws of what a run at a scale without one will measure.
DRAWS = 4096
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
    objective = history.objective
    if isinstance(objective, Pareto):
        raise ValueError(
            f"No configuration is the best of {len(objective.parts)} objectives; Study.front() gives the "
            "trials that none beats."
        )
    space = history.space.at(scale)
    data, trust = dataset.from_history(history), None
    if guard.elsewhere(history):
        if misleading := guard.misled(history, engine):
            history = guard.without(history, misleading)
            data = dataset.from_history(history)
        verdict = guard.verdict(data, history, engine)
        trust = f"{'trusted' if verdict.trusted else 'not trusted'}: {verdict.why}"
        if misleading:
            trust += f"; without {', '.join(misleading)}, by which the runs of this study are foretold worse"
        if not verdict.trusted and scale == history.space.top and int((data.at(scale) & ~data.diverged).sum()) > 1:
            data = dataset.from_history(guard.at_target(history))
    if not data.finite:
        return Recommendation(middle(space), scale, None, None, None, UNTOLD)
    ran = candidates(history.trials, objective, scale, space)
    notes = [UNTRIED] if tried and not ran else []
    try:
        # Where nothing ran the interval of each number is that of the drift, so the model is the one that has drifts.
        model, _ = fit(data, scale, history.memory.get("model"), engine, choose=bool(data.at(scale).any()))
        belief = engine.belief(model, scale)
        averaged = isinstance(belief, AveragedBelief)
        if tried and ran:
            x, trial, note = best_tried(belief, ran, torch.as_tensor(space.encode_all([t.config for t in ran])))
            notes += [note] if note else []
        else:
            x, trial = best_of_all(model, belief, data, scale, rng), None
            notes += kept_words(model, x, scale)
        expected = predict(model, belief, x, scale)
        best = None if trial is not None or averaged else sampled(model, scale, x, rng)
        if best is not None and not (data.at(scale) & ~data.diverged).any():
            expected = extrapolated(model, best, scale, rng) or expected
    except NumericalError as error:
        config, id = best_measured(history.trials, objective, space)
        why = f"The best run so far, without a model: {error}"
        return Recommendation(config, scale, None, None, None, why, id)
    if averaged:
        assert isinstance(belief, AveragedBelief)
        notes.append(averaged_words(belief.environments, trial is None))
    if not (data.at(scale) & ~data.diverged).any():
        others = len(data.reached) or len(data.scales)
        notes.append(f"No run has finished at this scale; its level is extrapolated from {others} other(s).")
    return Recommendation(
        config=space.decode(x) if trial is None else dict(trial.config),
        scale=scale,
        mean=expected.mean,
        low=expected.low,
        high=expected.high,
        note=" ".join(notes) or None,
        trial=None if trial is None else trial.id,
        intervals={} if best is None else best.intervals(),
        options={} if best is None else best.options(),
        guess=far(data, scale),
        trust=trust,
    )


def candidates(trials: Sequence[Trial], objective: Single, scale: Scale, space: Space) -> list[Trial]:
    """The runs with a finite result within its limits at a scale, or at any where there are none, as `space` allows.

    Those of other studies are among them only where this one has none at all.
    """
    able = [trial for trial in trials if good(trial, objective) and space.allows(trial.config)]
    own = [trial for trial in able if trial.study is None]
    return [trial for trial in own if trial.scale == scale] or own or able


def extrapolated(model: Composite, best: Optimum, scale: Scale, rng: np.random.Generator) -> Prediction | None:
    """What a run will measure at a scale without one, by the law that the best results of other scales follow.

    It is as much worse than the best there as the config is expected to be; the interval is of draws of both. None
    where only other studies have runs.
    """
    data = model.data
    scales = data.reached
    if not scales:
        return None
    values, sds = [], []
    with torch.no_grad():
        for cell in scales:
            belief = model.at(cell)
            x = data.X[belief.mean(data.X).argmax()]
            values.append(model.predict(x, cell).mean)
            sds.append(float(belief.value(x[None])[1]))
        noise = float(model.at(scale).noise)
    places = torch.stack([data.place(cell) for cell in scales])
    ours = places.shape[-1] - data.outcome.studies
    level = Level.fit(places[:, :ours].numpy(), values, sds)
    at = data.place(scale)[:ours].numpy()
    draws = level.draws(at, DRAWS) + rng.choice(best.shortfall.numpy(), DRAWS)
    low, high = np.quantile(draws + math.sqrt(noise) * rng.standard_normal(DRAWS), [0.05, 0.95])
    return Prediction(level.predict(at)[0] + float(best.shortfall.mean()), float(low), float(high))


def far(data: Dataset, scale: Scale) -> str | None:
    """Why what is said of a scale is a guess: it lies beyond all runs, or along an axis that they do not span."""
    scales = data.reached
    if not scales or scale in scales or data.space.fidelity is None:
        return None
    names = [axis.name for axis in data.space.fidelity.axes]
    places = torch.stack([data.place(cell) for cell in scales])[:, : len(names)]
    at = data.place(scale)[: len(names)]
    beyond = torch.maximum(at - places.amax(0), places.amin(0) - at)
    words = [
        f"{name} is {float(octaves):.1f} octaves beyond every run"
        for name, octaves in zip(names, beyond, strict=True)
        if octaves > FAR
    ]
    if not leads(places, at):
        words += [
            f"no runs tell how the best moves with {name} alone"
            for name, along, octaves in zip(names, spanned(places), at - places[-1], strict=True)
            if not along and octaves != 0
        ]
    return f"A guess: {'; '.join(words)}." if words else None


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
