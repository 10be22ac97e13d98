"""The model to decide by: which of several, by what each foretells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bo.acquisition.environment import widened
from bo.dataset import Dataset
from bo.policies.engine import Engine
from bo.surrogates import composite
from bo.surrogates.composite import Composite
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.hyperparameters import EXACT, NumericalError
from search_spaces import Scale

#: Runs at a scale, and for each coordinate, from which on a model of that scale alone is tried against that of all
#: scales: a few that lie together foretell each other whatever is said of the rest of the space.
ENOUGH_ALONE, EACH = 6, 3
#: Multiples of the usual excess up to which a metric may be kept linear, 0 for as far as it reaches. With more than FEW
#: runs models are compared again after so much growth.
SHAPES, FEW, RECONSIDERED = (0.0, 1.0, 0.1), 50, 1.1
#: Runs, times the root of the number of metrics, up to which `joint_input` is tried next to the usual model of scales.
AFFORDED = 250
#: Least cap: a smaller one has no reciprocal.
TINY = 1e-300


def fit(
    data: Dataset,
    at: Scale,
    start: Any = None,
    engine: Engine = Engine(),  # noqa: B008 - a frozen value
    choose: bool = True,
) -> tuple[Composite, dict[str, Any]]:
    """The model to decide by at a scale, and what the next fit starts from.

    It is the model of all scales (of two, `over_scales`; the usual one without `choose`), unless a model of this scale
    alone foretells the runs here better, each from the others: small runs sometimes mislead. Within one scale a metric
    alone is compressed as far as that makes it likelier; what is averaged over environments hardly is. NumericalError
    where no run has a finite result.
    """
    data, surrogate = data.measured(), engine.surrogate
    if not len(data.Y):
        raise NumericalError("No run has a finite result.")
    if engine.average_over is not None:
        data = widened(data)
    elif bool(data.at(at).all()) and len(data.outcome.cap) - data.outcome.limits == 1:
        return shaped(data, start or {}, surrogate)
    if choose:
        model, memory = over_scales(data, start or {}, engine)
    else:
        model = named(data, start or {}, engine)
        memory = model.gp.memory()
    here = data.at(at)
    if len(data.scales) > 1 and int(here.sum()) >= max(ENOUGH_ALONE, EACH * len(data.space.columns)):
        alone = composite.fit(data.rows(here), surrogate=surrogate)
        if float(log_density(alone).sum()) > float(log_density(model)[here].sum()):
            model = alone
    return model, memory


def named(data: Dataset, start: Mapping[str, Any], engine: Engine) -> Composite:
    """The model that the engine names, as the law has it."""
    return composite.fit(data, start, engine.surrogate, engine.drift(data.space))


def over_scales(data: Dataset, start: Mapping[str, Any], engine: Engine) -> tuple[Composite, dict[str, Any]]:
    """The model of all scales: the named one; of the usual ones that with drifts or that of `joint_input`.

    What the optimum does from scale to scale is most often a drift, and with few runs it is best to say so. Many runs
    may show a shape that changes otherwise. So that is taken which in leave-one-out foretells the half of the runs that
    is nearest to the target better. What is believed of drifts, and other studies, go with drifts alone; where nothing
    can drift, as in mixtures, the choice did harm (experiments/README.md).
    """
    usual = named(data, start, engine)
    n, p = data.Y.shape
    given = engine.surrogate != "gp" or engine.drift(data.space) or any(study is not None for study in data.studies)
    still = len(data.scales) == 1 or not len(usual.gp.features.drift_unit)
    if given or still or n * math.sqrt(p) > AFFORDED:
        return usual, usual.gp.memory()
    other = composite.fit(data, surrogate="joint_input")
    octaves = data.S.sum(-1)
    gain = float((log_density(other) - log_density(usual))[octaves >= octaves.median()].sum())
    # The next fit of the usual model starts from this one; the other is quick to fit from nothing.
    return other if gain > 0 else usual, {**usual.gp.memory(), "joint_input": round(gain, 3)}


def shaped(data: Dataset, start: Mapping[str, Any], surrogate: str) -> tuple[Composite, dict[str, Any]]:
    """The model of the metric in the shape in which the usual process finds it most likely, in the user's unit.

    Losses that explode need a logarithm, smooth ones are spoilt by it. Tried are: linear as far as anything reached,
    and linear up to SHAPES times the usual excess. Of many runs it is decided anew only once there are RECONSIDERED
    times more of them.
    """
    n, last = len(data.Y), start.get("shape", {})
    usual, reach = data.outcome.cap, torch.maximum(data.excess.max(0).values, data.outcome.cap)
    first = torch.arange(len(usual)) == 0  # the others are metrics with limits

    def fitted(times: float, surrogate: str) -> Composite:
        cap = torch.where(first, (times * usual if times else reach).clamp_min(TINY), usual)
        return composite.fit(data.reshaped(cap), start, surrogate)

    settled = n > EXACT or (n > FEW and n < RECONSIDERED * last.get("runs", 0))
    if n < ENOUGH_ALONE or settled:
        times, since = float(last.get("times", 0.0)), int(last.get("runs", n))
        model = fitted(times, surrogate)
    else:
        likely: dict[float, float] = {}
        models = {times: fitted(times, "gp") for times in SHAPES}
        for times, model in models.items():
            assert isinstance(model.gp, GaussianProcess)
            likely[times] = model.gp.log_evidence + model.data.log_slope
        times, since = max(SHAPES, key=likely.__getitem__), n
        model = models[times] if surrogate == "gp" else fitted(times, surrogate)
    return model, {**model.gp.memory(), "shape": {"times": times, "runs": since}}


def log_density(model: Composite) -> Tensor:
    """Leave-one-out log density of each run's metrics, summed over metrics: n."""
    mean, variance = model.gp.leave_one_out()
    return (-0.5 * ((model.data.Y - mean).square() / variance + (2 * math.pi * variance).log())).sum(-1)
