"""JSON <-> space. Lists wherever order counts, so that no writer of JSON can change a space by sorting its keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from search_spaces.constraint import Inequality, Predicate
from search_spaces.fidelity import Axis, CostFunction, Fidelity, Scale
from search_spaces.mixture import Mixture
from search_spaces.parameter import Choice, Fixed, Integer, Parameter, Real
from search_spaces.schedule import Schedule
from search_spaces.space import Space
from search_spaces.stored import StoredFunction

Json: TypeAlias = dict[str, Any]


class Kind(NamedTuple):
    """How one class of parameter is written and read; the kind's name is added and taken off outside."""

    made: type[Parameter]
    write: Callable[[Any], Json]
    read: Callable[[Json], Parameter]


def _write_range(real: Real | Integer) -> Json:
    return {"low": real.low, "high": real.high, "log": real.log}


def _write_choice(choice: Choice) -> Json:
    if choice.subspaces:
        return {"subspaces": [[name, _write_entries(entries)] for name, entries in choice.subspaces.items()]}
    return {"options": list(choice.options)} | ({"ordered": True} if choice.ordered else {})


def _read_choice(obj: Json) -> Choice:
    if "subspaces" in obj:
        return Choice({name: _read_entries(entries) for name, entries in obj["subspaces"]})
    return Choice(*obj["options"], ordered=obj.get("ordered", False))


def _write_mixture(mixture: Mixture) -> Json:
    return {"names": list(mixture.names), "floors": list(mixture.floors)}


def _read_mixture(obj: Json) -> Mixture:
    return Mixture(*obj["names"], floor=dict(zip(obj["names"], obj["floors"], strict=True)))


def _write_settings(settings: Mapping[str, float | Real]) -> Json:
    return {name: _write_range(value) if isinstance(value, Real) else value for name, value in settings.items()}


def _read_settings(obj: Json) -> dict[str, float | Real]:
    return {name: Real(**value) if isinstance(value, dict) else value for name, value in obj.items()}


def _write_schedule(schedule: Schedule) -> Json:
    families = [[name, _write_settings(settings)] for name, settings in schedule.families.items()]
    return {"families": families, "shared": _write_settings(schedule.shared)}


def _read_schedule(obj: Json) -> Schedule:
    families = {name: _read_settings(settings) for name, settings in obj["families"]}
    return Schedule(**families, **_read_settings(obj["shared"]))


KINDS: dict[str, Kind] = {
    "fixed": Kind(Fixed, lambda fixed: {"value": fixed.value}, lambda obj: Fixed(**obj)),
    "real": Kind(Real, _write_range, lambda obj: Real(**obj)),
    "integer": Kind(Integer, _write_range, lambda obj: Integer(**obj)),
    "choice": Kind(Choice, _write_choice, _read_choice),
    "mixture": Kind(Mixture, _write_mixture, _read_mixture),
    "schedule": Kind(Schedule, _write_schedule, _read_schedule),
}


def space_to_json(space: Space) -> Json:
    """A space as plain JSON; `space_from_json` gives an equal one back."""
    fidelity = None if space.fidelity is None else _write_fidelity(space.fidelity)
    written: Json = {"parameters": _write_entries(space.parameters), "fidelity": fidelity}
    # Left out when there are none: journals of spaces without constraints stay as they are.
    return written | ({"constraints": list(map(_write_constraint, space.constraints))} if space.constraints else {})


def space_from_json(
    obj: Json,
    cost: Callable[[Scale], float] | None = None,
    constraints: Sequence[Callable[[Mapping[str, Any]], bool]] = (),
) -> Space:
    """The space that `space_to_json` wrote.

    Functions are never run from JSON: without `cost` the space works except for costs, without its functions among
    `constraints` it cannot be sampled. One handed in must have the source that was hashed, otherwise ValueError.
    """
    fidelity = obj["fidelity"]
    if fidelity is None and cost is not None:
        raise ValueError("This space has no fidelity, so there is no cost to hand in; leave cost= out.")
    given = [StoredFunction.of(function, "The constraint") for function in constraints]
    limits = [_read_constraint(constraint, given) for constraint in obj.get("constraints", ())]
    if given:
        raise ValueError(f"This space has no constraint {given[0].reference}, or another version of it; leave it out.")
    parameters: dict[str, Any] = _read_entries(obj["parameters"])
    made = None if fidelity is None else _read_fidelity(fidelity, cost)
    return Space(constraints=limits, fidelity=made, **parameters)


def _write_constraint(constraint: Inequality | Predicate) -> Any:
    if isinstance(constraint, Inequality):
        return constraint.text
    return {"function": constraint.stored.reference, "sha256": constraint.stored.sha256}


def _read_constraint(obj: Any, given: list[StoredFunction]) -> Inequality | Predicate:
    """The constraint; a function of `given` with its hash is taken from there."""
    if isinstance(obj, str):
        return Inequality.of(obj)
    stored = StoredFunction(obj["function"], obj["sha256"])
    return Predicate(given.pop(given.index(stored)) if stored in given else stored)


def _write_entries(parameters: Mapping[str, Parameter]) -> list[Any]:
    return [[name, _write_parameter(name, parameter)] for name, parameter in parameters.items()]


def _read_entries(entries: list[Any]) -> dict[str, Parameter]:
    return {name: _read_parameter(name, obj) for name, obj in entries}


def _write_parameter(name: str, parameter: Parameter) -> Json:
    for kind, row in KINDS.items():
        if type(parameter) is row.made:
            return {"kind": kind, **row.write(parameter)}
    raise ValueError(
        f"{name} is a {type(parameter).__name__}, which has no row in codec.KINDS; the kinds are {list(KINDS)}."
    )


def _read_parameter(name: str, obj: Json) -> Parameter:
    rest = dict(obj)
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{name} is of kind {kind!r}, which this version does not know; it knows {list(KINDS)}.")
    return KINDS[kind].read(rest)


def _write_fidelity(fidelity: Fidelity) -> Json:
    cost = fidelity.cost_function
    return {
        "axes": [_write_axis(axis) for axis in fidelity.axes],
        "target": fidelity.target.to_json(),
        "runnable": None if fidelity.runnable is None else fidelity.runnable.to_json(),
        "cost": None if cost is None else {"function": cost.reference, "sha256": cost.sha256},
    }


def _read_fidelity(obj: Json, cost: Callable[[Scale], float] | None) -> Fidelity:
    axes = {axis["name"]: _read_axis(axis) for axis in obj["axes"]}
    return Fidelity(_read_cost(obj["cost"], cost), target=obj["target"], runnable=obj["runnable"], **axes)


def _read_cost(stored: Json | None, given: Callable[[Scale], float] | None) -> CostFunction | None:
    if stored is None:
        if given is not None:
            raise ValueError("This space counts costs as 6 N D, so there is no cost to hand in; leave cost= out.")
        return None
    if given is None:
        return CostFunction(stored["function"], stored["sha256"])
    cost = CostFunction.of(given)
    if cost.sha256 != stored["sha256"]:
        raise ValueError(
            f"The cost function {cost.reference} differs from {stored['function']}, with which this space was made; "
            "hand in the original."
        )
    return cost


def _write_axis(axis: Axis) -> Json:
    if axis.rungs:
        return {"name": axis.name, "rungs": list(axis.values), "labels": list(axis.labels)}
    return {"name": axis.name, "low": axis.low, "high": axis.high, "integer": axis.integer}


def _read_axis(obj: Json) -> object:
    if "rungs" in obj:
        return dict(zip(obj["labels"], obj["rungs"], strict=True)) if obj["labels"] else tuple(obj["rungs"])
    return Integer(int(obj["low"]), int(obj["high"])) if obj["integer"] else Real(obj["low"], obj["high"])
