"""Search spaces of Optuna to ours.

from_optuna({"lr": FloatDistribution(1e-4, 1e-1, log=True), "layers": IntDistribution(2, 8)})
from_optuna(optuna.load_study(...))     # what its trials were drawn from
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from integrations import foreign_space
from search_spaces import Fidelity, Space


def from_optuna(
    source: Mapping[str, BaseDistribution] | Study | Iterable[FrozenTrial],
    *,
    constraints: Sequence[object] = (),
    fidelity: Fidelity | None = None,
) -> Space:
    """The space of a dictionary of distributions, or of the distributions of a study or its trials.

    FloatDistribution -> Real, IntDistribution -> Integer, with a step an ordered Choice of the values that Optuna's
    uniform and TPE samplers give; CategoricalDistribution -> Choice; what has a single value -> a fixed value.
    ValueError, by name, for what has no counterpart; for a study also when a parameter's distribution changed, or when
    a complete trial lacks a parameter: it may depend on others, which the trials do not tell. The dictionary that
    `distributions_of` makes of such a study takes it for a parameter of every config.
    """
    if not isinstance(source, Mapping):
        trials = _trials(source)
        distributions = distributions_of(trials)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        for name in distributions:
            count = sum(name in trial.distributions for trial in complete)
            if 0 < count < len(complete):
                raise ValueError(
                    f"{name} is in {count} of {len(complete)} complete trials, so it may depend on others; write a "
                    "Choice of sub-spaces, or pass distributions_of(study) for a space that always has it."
                )
        source = distributions
    parameters = {name: _parameter(name, distribution) for name, distribution in source.items()}
    return foreign_space.space_of(parameters, constraints, fidelity)


def distributions_of(source: Study | Iterable[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Every parameter of a study's trials with its distribution; ValueError, by name, for one that has several."""
    found: dict[str, BaseDistribution] = {}
    for trial in _trials(source):
        for name, distribution in trial.distributions.items():
            # Texts tell options apart that are equal in Python: True, 1 and 1.0.
            if repr(found.setdefault(name, distribution)) != repr(distribution):
                raise ValueError(
                    f"{name} has two distributions in these trials, {found[name]} and {distribution}; pass a "
                    "dictionary with the one to search."
                )
    if not found:
        raise ValueError("These trials have no parameters; pass the distributions as a dictionary.")
    return found


def _trials(source: Study | Iterable[FrozenTrial]) -> list[FrozenTrial]:
    return source.get_trials(deepcopy=False) if isinstance(source, Study) else list(source)


def _parameter(name: str, distribution: BaseDistribution) -> object:
    match distribution:
        case FloatDistribution(low=low, high=high, step=None):
            return foreign_space.real(name, low, high, bool(distribution.log))
        case FloatDistribution(low=low, high=high, step=float(step)):
            count = round((high - low) / step) + 1
            return foreign_space.grid(name, count, lambda k: min(low + k * step, high))
        case IntDistribution(step=1):
            return foreign_space.whole(name, distribution.low, distribution.high, bool(distribution.log))
        case IntDistribution(low=low, high=high, step=step):
            return foreign_space.grid(name, (high - low) // step + 1, lambda k: low + k * step)
        case CategoricalDistribution():
            return foreign_space.options(name, distribution.choices)
    raise ValueError(
        f"{name} must be a FloatDistribution, IntDistribution or CategoricalDistribution of Optuna, "
        f"got {distribution!r}."
    )
