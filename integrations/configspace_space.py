"""Search spaces of ConfigSpace to ours.

    space = from_configspace(cs)
    study.enqueue(dict(cs.get_default_configuration()))    # defaults are no part of a space

Conditional hyperparameters become parameters of the options, of a Choice, that they need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ConfigSpace import (
    AndConjunction,
    CategoricalHyperparameter,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    InCondition,
    NotEqualsCondition,
    OrdinalHyperparameter,
    UniformFloatHyperparameter,
    UniformIntegerHyperparameter,
)

from integrations import foreign_space
from search_spaces import Choice, Fidelity, Space
from search_spaces.parameter import is_scalar, plain

# What has to hold for a hyperparameter to be there: each parent, with the values of it that allow it.
_Needs = list[tuple[str, list[Any]]]


def from_configspace(
    cs: ConfigurationSpace,
    *,
    constraints: Sequence[object] = (),
    fidelity: Fidelity | None = None,
    drop: Collection[str] = (),
) -> Space:
    """The space of a ConfigurationSpace.

    UniformFloat -> Real, UniformInteger -> Integer, Categorical -> Choice, Ordinal -> ordered Choice, Constant -> a
    fixed value. A child of categorical hyperparameters whose choices are texts, by EqualsCondition, NotEqualsCondition,
    InCondition or an AndConjunction of these, becomes a parameter of those options.

    drop: ("forbidden",) leaves out forbidden clauses; `constraints` can say the same. ValueError, by name, for what has
    no counterpart: Normal and Beta hyperparameters, weights, other conditions.
    """
    for name in drop:
        if name != "forbidden":
            raise ValueError(f"drop= may hold 'forbidden', got {name!r}.")
    if cs.forbidden_clauses and "forbidden" not in drop:
        raise ValueError(
            f"The forbidden clauses {list(map(str, cs.forbidden_clauses))} have no counterpart; write them as "
            "constraints= and pass drop=('forbidden',)."
        )
    made = {name: _parameter(name, hyperparameter) for name, hyperparameter in cs.items()}
    needs = {name: [need for c in cs.parent_conditions_of[name] for need in _needs(name, c)] for name in cs}
    parameters = _entries(made, needs, {}, frozenset())
    placed = set(_names(parameters))
    for name in made:
        if name not in placed:
            parents = list(dict.fromkeys(parent for parent, _ in needs[name]))
            why = "none of which depends on the others" if len(parents) > 1 else "but no value of that allows it"
            raise ValueError(f"{name} depends on {parents}, {why}; write this part of the space by hand.")
    return foreign_space.space_of(parameters, constraints, fidelity)


def _parameter(name: str, hyperparameter: Any) -> object:
    hp = hyperparameter
    if type(hp) is UniformFloatHyperparameter:
        return foreign_space.real(name, hp.lower, hp.upper, bool(hp.log))
    if type(hp) is UniformIntegerHyperparameter:
        return foreign_space.whole(name, hp.lower, hp.upper, bool(hp.log))
    if type(hp) is CategoricalHyperparameter:
        if hp.weights is not None and len(set(hp.weights)) > 1:
            raise ValueError(f"{name} has the weights {hp.weights}, and options of a Choice have none; remove them.")
        return foreign_space.options(name, hp.choices)
    if type(hp) is OrdinalHyperparameter:
        return foreign_space.options(name, hp.sequence, ordered=True)
    if type(hp) is Constant:
        return foreign_space.options(name, [hp.value])
    raise ValueError(
        f"{name} is a {type(hp).__name__}, which has no counterpart; make it uniform, categorical, ordinal or constant."
    )


def _needs(name: str, condition: Any) -> Iterator[tuple[str, list[Any]]]:
    """The parents that a condition names, each with the values of it that fulfil the condition."""
    if type(condition) is AndConjunction:
        for part in condition.components:
            yield from _needs(name, part)
        return
    if type(condition) not in (EqualsCondition, NotEqualsCondition, InCondition):
        raise ValueError(
            f"{name} is there where {condition}, a {type(condition).__name__}, which has no counterpart; use "
            "EqualsCondition, NotEqualsCondition, InCondition or an AndConjunction of them."
        )
    parent = condition.parent
    if type(parent) is Constant:
        values = [plain(parent.value)]
    elif type(parent) is CategoricalHyperparameter and all(isinstance(choice, str) for choice in parent.choices):
        values = [plain(choice) for choice in parent.choices]
    else:
        raise ValueError(
            f"{name} is there where {condition}, and only options that are texts can have parameters of their own; "
            f"make {parent.name} a categorical hyperparameter with texts as choices."
        )
    yield parent.name, [value for value in values if condition.satisfied_by_value({parent.name: value})]


def _entries(
    made: Mapping[str, object], needs: Mapping[str, _Needs], known: Mapping[str, Any], above: frozenset[str]
) -> dict[str, object]:
    """The hyperparameters that join those `above` once their parents have the `known` values."""
    known = dict(known)
    here: list[str] = []
    while ready := [name for name in made if name not in above.union(here) and _there(needs[name], known)]:
        here += ready
        known |= {name: made[name] for name in ready if is_scalar(made[name])}  # a parent with a single value
    parents = {parent for each in needs.values() for parent, _ in each}
    entries: dict[str, object] = {}
    for name in sorted(here, key=list(made).index):
        entry = made[name]
        if isinstance(entry, Choice) and name in parents:
            options = [str(option) for option in entry.options]
            subspaces = {o: _entries(made, needs, known | {name: o}, above.union(here)) for o in options}
            entry = Choice(subspaces) if any(subspaces.values()) else entry
        entries[name] = entry
    return entries


def _there(needs: _Needs, known: Mapping[str, Any]) -> bool:
    return all(parent in known and known[parent] in allowed for parent, allowed in needs)


def _names(entries: Mapping[str, object]) -> Iterator[str]:
    """All names, those of options too."""
    for name, entry in entries.items():
        yield name
        if isinstance(entry, Choice):
            for subspace in entry.subspaces.values():
                yield from _names(subspace)
