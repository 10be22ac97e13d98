"""Whether runs elsewhere are to be trusted: small runs of this study, and runs of others, sometimes mislead.

Proxies at three scales or more whose differences span the way to the target are trusted, since the model sees in them
how the optimum moves, until the first runs at the target come out worse than their level allows, or all diverge. Beside
them another study counts as long as it foretells this one's runs, proxies and all. Anything less (one or two scales,
scales on another line, another study alone) gets one shot: the first run at the target is the best by it. From then on
the target is searched as if there were nothing else, with a space-filling start in which that run does not count; and
the runs elsewhere come back in once they foretell the runs at the target better than those foretell each other. Runs
near the shot do not tell whether it was a good one: those of the space-filling start do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from bo import dataset
from bo.dataset import Dataset
from bo.objective import Pareto
from bo.policies import posterior
from bo.policies.design import SHOT, designed, good, initial
from bo.policies.engine import Engine
from bo.policies.model_choice import log_density
from bo.policies.posterior import COVER
from bo.ports import History, Proposal
from bo.scaling.level import Level
from bo.surrogates import composite
from bo.surrogates.drift import leads
from bo.surrogates.hyperparameters import NumericalError

#: Scales from which on proxies are trusted, where they span the way to the target.
SCALES = 3
#: Nats by which runs elsewhere have to foretell better than the target's own, and runs there from which on they may.
MARGIN, TOLD = 1.0, 3
#: Standard deviations above the level that proxies foretell from which on they are refuted, and the least of one, as a
#: share of the level: laws of a handful of scales miss by more than they say, sources that mislead by far more.
REFUTED, LEAST = 3.0, 0.02
#: Runs at the target that proxies chose and that diverged, from which on they are refuted while none has finished: the
#: first may lie beyond an edge next to the best, from which the second keeps away.
ENDED = 2
#: Sources of runs at the target that runs elsewhere did not choose.
NOT_CHOSEN = ("enqueued", "added", "sobol")
ALONE = "By the runs at the target alone: those elsewhere have not been found to foretell them."


def propose(
    history: History, n: int, rng: np.random.Generator, source: str, engine: Engine, greedy: bool, n_init: int | None
) -> tuple[Proposal, ...]:
    """Up to n runs at the top scale, by all that ran as far as it is to be trusted; see the head of this file.

    greedy: whether a first run is the best by what is trusted. n_init: as `Bayes` has it.
    """
    n = history.affordable([history.space.top] * n)
    if not elsewhere(history):
        return posterior.propose(history, n, rng, source, engine)
    if n == 0 or isinstance(history.objective, Pareto):
        return posterior.propose(history, n, rng, source, engine, greedy)
    history = without(history, misled(history, engine))
    data = dataset.from_history(history)
    if spanning(data, history).trusted:
        return posterior.propose(history, n, rng, source, engine, greedy)
    alone = at_target(history)
    made: tuple[Proposal, ...] = ()
    if not any(trial.source in (SHOT, source) for trial in history.own):
        made = posterior.propose(history, min(n, posterior.SPREAD), rng, SHOT, engine, greedy=True)
        made = tuple(p for i, p in enumerate(made) if i == 0 or p.note == COVER)
    if len(made) < n and not designed(alone, n_init):
        return made + initial(alone, n - len(made), rng)
    if made:
        return made
    if verdict(data, history, engine).trusted:
        return posterior.propose(history, n, rng, source, engine)
    found = posterior.propose(alone, n, rng, source, engine)
    return tuple(replace(proposal, note=proposal.note or ALONE) for proposal in found)


def elsewhere(history: History) -> bool:
    """Whether runs at other scales, or of other studies, have told something."""
    top = history.space.top
    return any(trial.told and (trial.study is not None or trial.scale != top) for trial in history.trials)


@dataclass(frozen=True)
class Verdict:
    """Whether runs elsewhere decide about the target, and why."""

    trusted: bool
    why: str


def verdict(data: Dataset, history: History, engine: Engine) -> Verdict:
    """On what ran elsewhere, as it is now."""
    by_scales = spanning(data, history)
    if by_scales.trusted:
        return by_scales
    gain = foretold(data, history, engine)
    if gain is None:
        return by_scales
    words = f"in leave-one-out they foretell the runs at the target {abs(gain):.1f} nats "
    words += "better" if gain > 0 else "worse"
    return Verdict(gain > MARGIN, f"{by_scales.why}; {words} than those foretell each other")


def spanning(data: Dataset, history: History) -> Verdict:
    """By the scales that ran, which are to span the way to the target, and by the level of what they chose there."""
    assert not isinstance(history.objective, Pareto)
    if history.space.fidelity is None:
        return Verdict(False, "runs of other studies")
    scales = [scale for scale in data.reached if scale != history.space.top]
    axes = len(history.space.fidelity.axes)
    if len(scales) < SCALES:
        few = (
            f"{len(scales)} scale{'s' if len(scales) != 1 else ''} of this study" if scales else "runs of other studies"
        )
        return Verdict(False, few)
    places = torch.stack([data.place(scale) for scale in scales])[:, :axes]
    if not leads(places, data.place(history.space.top)[:axes]):
        return Verdict(False, f"{len(scales)} scales that do not span the way to the target")
    spans = f"{len(scales)} scales that span the way to the target"
    chosen = [t for t in history.own if t.scale == history.space.top and t.source not in NOT_CHOSEN]
    values = [history.objective.value(t.metrics or {}) for t in chosen if good(t, history.objective)]
    diverged = sum(t.status == "diverged" for t in chosen)
    if diverged >= ENDED and not any(t.status == "finished" for t in chosen):
        return Verdict(False, f"{spans}, but all {diverged} runs that they chose there diverged")
    least = data.outcome.least
    if least is None or not values:
        return Verdict(True, spans)
    known = torch.stack([least[data.index(scale)] for scale in scales])
    mean, sd = Level.fit(places.numpy(), known.numpy(), 0.0 * known.numpy()).predict(np.zeros(axes))
    off = (min(values) - mean) / max(sd, LEAST * abs(mean))
    if off > REFUTED:
        return Verdict(
            False, f"{spans}, but the best that they chose there, {min(values):.4g}, is far above {mean:.4g}"
        )
    return Verdict(True, spans)


def foretold(data: Dataset, history: History, engine: Engine) -> float | None:
    """Nats by which the model of all runs foretells those at the target, each from the others, better than these alone.

    None where too few ran there, or nothing could be fitted.
    """
    data = data.measured()
    here = data.at(history.space.top)
    if int(here.sum()) < TOLD:
        return None
    try:
        drift = engine.drift(data.space)
        joint = float(log_density(composite.fit(data, None, engine.surrogate, drift))[here].sum())
        alone = float(log_density(composite.fit(data.rows(here), None, engine.surrogate)).sum())
    except NumericalError:
        return None
    return joint - alone


def misled(history: History, engine: Engine) -> tuple[str, ...]:
    """The other studies that do not foretell this one's runs, at any scale; none are while it has no proxies.

    Each is judged by itself: a model of its runs and ours has to foretell each run of ours from all others no worse
    than a model of ours alone. One with which no model could be fitted is among them.
    """
    if not history.studies or not any(trial.told and trial.scale != history.space.top for trial in history.own):
        return ()
    data, drift = dataset.from_history(history).measured(), engine.drift(history.space)
    study = [data.studies[cell] for cell in data.cell.tolist()]

    def density(*names: str | None) -> float:
        kept = torch.tensor([name in names for name in study])
        ours = torch.tensor([name is None for name in study])[kept]
        return float(log_density(composite.fit(data.rows(kept), None, engine.surrogate, drift))[ours].sum())

    if None not in study:
        return ()
    try:
        alone, found = density(None), []
    except NumericalError:
        return ()
    for name in history.studies:
        try:
            worse = name in study and density(None, name) < alone
        except NumericalError:
            worse = True
        found += [name] if worse else []
    return tuple(found)


def without(history: History, studies: tuple[str, ...]) -> History:
    """What ran but for some other studies."""
    return replace(history, trials=tuple(t for t in history.trials if t.study not in studies)) if studies else history


def at_target(history: History) -> History:
    """What ran at the target alone."""
    return replace(history, trials=tuple(t for t in history.own if t.scale == history.space.top))
