"""JSON <-> space. Lists wherever order counts, so that no writer of JSON can change a space by sorting its keys.

JSON that was written by hand or damaged is refused at the first key that is missing, unknown or of the wrong type, with
the path of names that leads there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from search_spaces.constraint import Inequality, Predicate
from search_spaces.curve import family_named
from search_spaces.fidelity import Axis, Fidelity, MeasuredCost, Scale
from search_spaces.mixture import Mixture
from search_spaces.mixture_schedule import MixtureSchedule
from search_spaces.parameter import Choice, Fixed, Integer, Parameter, Real, suggestion
from search_spaces.schedule import Schedule, Setting
from search_spaces.space import Space
from search_spaces.stored import StoredFunction

Json: TypeAlias = dict[str, Any]


class Kind(NamedTuple):
    """How one class of parameter is written and read; the kind's name is added and taken off outside."""

    made: type[Parameter]
    write: Callable[[Any], Json]
    read: Callable[[Json], Parameter]


def _keys(obj: object, needed: Sequence[str], optional: Sequence[str] = ()) -> Json:
    """The object, with all the needed keys and no others but the optional ones; ValueError otherwise."""
    if not isinstance(obj, Mapping):
        raise ValueError(f"expected an object with the keys {list(needed)}, got {obj!r}.")
    known = [*needed, *optional]
    for key in obj:
        if key not in known:
            raise ValueError(f"has an unknown key {key!r}; {suggestion(key, known, f'known are {known}.')}")
    if missing := [key for key in needed if key not in obj]:
        raise ValueError(f"has no {missing[0]!r}; it needs {list(needed)}.")
    return dict(obj)


def _list(key: str, obj: object) -> list[Any]:
    if not isinstance(obj, list):
        raise ValueError(f"needs a list as {key}, got {obj!r}.")
    return obj


def _texts(key: str, obj: object) -> list[str]:
    texts = _list(key, obj)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"needs texts in {key}, got {text!r}.")
    return texts


def _pairs(key: str, obj: object) -> list[tuple[str, Any]]:
    """A list of [name, value], no name twice."""
    pairs: list[tuple[str, Any]] = []
    for pair in _list(key, obj):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"needs pairs [name, value] in {key}, got {pair!r}.")
        if pair[0] in [name for name, _ in pairs]:
            raise ValueError(f"has {pair[0]!r} twice in {key}; each may be there once.")
        pairs.append((pair[0], pair[1]))
    return pairs


@contextmanager
def _within(where: str) -> Iterator[None]:
    """Puts the way here before the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _write_range(real: Real | Integer) -> Json:
    return {"low": real.low, "high": real.high, "log": real.log}


def _read_real(obj: object) -> Real:
    return Real(**_keys(obj, ("low", "high"), ("log",)))


def _read_integer(obj: object) -> Integer:
    return Integer(**_keys(obj, ("low", "high"), ("log",)))


def _read_fixed(obj: object) -> Fixed:
    return Fixed(**_keys(obj, ("value",)))


def _write_choice(choice: Choice) -> Json:
    if choice.subspaces:
        return {"subspaces": [[name, _write_entries(entries)] for name, entries in choice.subspaces.items()]}
    return {"options": list(choice.options)} | ({"ordered": True} if choice.ordered else {})


def _read_choice(obj: Json) -> Choice:
    if "subspaces" in obj:
        subspaces = _pairs("subspaces", _keys(obj, ("subspaces",))["subspaces"])
        return Choice({name: _read_entries(name, entries) for name, entries in subspaces})
    given = _keys(obj, ("options",), ("ordered",))
    return Choice(_list("options", given["options"]), ordered=given.get("ordered", False))


def _write_mixture(mixture: Mixture) -> Json:
    """Beside the floors only what is there, as mixtures were written when there was nothing else."""
    obj: Json = {"names": list(mixture.names), "floors": list(mixture.floors)}
    if any(cap != 1 for cap in mixture.caps):
        obj["caps"] = list(mixture.caps)
    if mixture.fixed:
        obj["fixed"] = dict(mixture.fixed)
    if mixture.supply:
        obj |= {"supply": dict(mixture.supply), "max_epochs": dict(mixture.max_epochs)}
    if mixture.max_domains is not None:
        obj["max_domains"] = mixture.max_domains
    if mixture.reference is not None:
        obj |= {"reference": list(mixture.reference), "sampling": mixture.sampling}
    return obj


def _read_mixture(obj: Json) -> Mixture:
    optional = ("caps", "fixed", "supply", "max_epochs", "max_domains", "reference", "sampling")
    given = _keys(obj, ("names", "floors"), optional)
    names = _texts("names", given.pop("names"))
    for stored, name in (("floors", "floor"), ("caps", "cap"), ("reference", "reference")):
        if stored in given:
            numbers = _list(stored, given.pop(stored))
            if len(numbers) != len(names):
                raise ValueError(f"needs a number in {stored} for each of {names}, got {numbers}.")
            given[name] = dict(zip(names, numbers, strict=True))
    return Mixture(*names, **given)


def _write_mixture_schedule(schedule: MixtureSchedule) -> Json:
    switch = _write_range(schedule.switch) if isinstance(schedule.switch, Real) else schedule.switch
    return {"first": _write_mixture(schedule.first), "last": _write_mixture(schedule.last), "switch": switch}


def _read_mixture_schedule(obj: Json) -> MixtureSchedule:
    given = _keys(obj, ("first", "last", "switch"))
    switch = _read_setting(given["switch"])
    return MixtureSchedule(_read_mixture(given["first"]), _read_mixture(given["last"]), switch)


def _write_settings(settings: Mapping[str, Setting]) -> Json:
    return {name: _write_setting(value) for name, value in settings.items()}


def _write_setting(value: Setting) -> Any:
    if isinstance(value, tuple):
        return [_write_setting(item) for item in value]
    return _write_range(value) if isinstance(value, Real) else value


def _read_settings(obj: object) -> dict[str, Setting]:
    if not isinstance(obj, Mapping):
        raise ValueError(f"needs an object name -> setting, got {obj!r}.")
    return {name: _read_setting(value) for name, value in obj.items()}


def _read_setting(obj: Any) -> Any:
    if isinstance(obj, list):
        return tuple(_read_setting(item) for item in obj)
    return _read_real(obj) if isinstance(obj, dict) else obj


def _write_schedule(schedule: Schedule) -> Json:
    families = [[name, _write_settings(settings)] for name, settings in schedule.families.items()]
    return {"families": families, "shared": _write_settings(schedule.shared)}


def _read_schedule(obj: Json) -> Schedule:
    given = _keys(obj, ("families", "shared"))
    shared = _read_settings(given["shared"])
    families = {}
    for name, settings in _pairs("families", given["families"]):
        # A setting that the family has gained since was at what is its default now; left out, it would vary.
        gained = {setting: value for setting, value in family_named(name).defaults().items() if setting not in shared}
        families[name] = gained | _read_settings(settings)
    return Schedule(**families, **shared)


KINDS: dict[str, Kind] = {
    "fixed": Kind(Fixed, lambda fixed: {"value": fixed.value}, _read_fixed),
    "real": Kind(Real, _write_range, _read_real),
    "integer": Kind(Integer, _write_range, _read_integer),
    "choice": Kind(Choice, _write_choice, _read_choice),
    "mixture": Kind(Mixture, _write_mixture, _read_mixture),
    "mixture_schedule": Kind(MixtureSchedule, _write_mixture_schedule, _read_mixture_schedule),
    "schedule": Kind(Schedule, _write_schedule, _read_schedule),
}


def space_to_json(space: Space) -> Json:
    """A space as plain JSON; `space_from_json` gives an equal one back. Of one at one scale the whole is written."""
    space = space.whole
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
    with _within("space"):
        fidelity = _keys(obj, ("parameters", "fidelity"), ("constraints",))["fidelity"]
    if fidelity is None and cost is not None:
        raise ValueError("This space has no fidelity, so there is no cost to hand in; leave cost= out.")
    given = [StoredFunction.of(function, "The constraint") for function in constraints]
    with _within("constraints"):
        limits = [
            _read_constraint(constraint, given) for constraint in _list("constraints", obj.get("constraints", []))
        ]
    if given:
        raise ValueError(f"This space has no constraint {given[0].reference}, or another version of it; leave it out.")
    parameters: dict[str, Any] = _read_entries("parameters", obj["parameters"])
    for name in ("constraints", "fidelity"):
        if name in parameters:
            raise ValueError(f"parameters: {name!r} is an argument of every space; give the parameter another name.")
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
    parts = _keys(obj, ("function", "sha256"))
    stored = StoredFunction(parts["function"], parts["sha256"])
    return Predicate(given.pop(given.index(stored)) if stored in given else stored)


def _write_entries(parameters: Mapping[str, Parameter]) -> list[Any]:
    return [[name, _write_parameter(name, parameter)] for name, parameter in parameters.items()]


def _read_entries(where: str, entries: object) -> dict[str, Parameter]:
    with _within(where):
        pairs = _pairs("it", entries)
    return {name: _read_parameter(name, obj) for name, obj in pairs}


def _write_parameter(name: str, parameter: Parameter) -> Json:
    for kind, row in KINDS.items():
        if type(parameter) is row.made:
            return {"kind": kind, **row.write(parameter)}
    raise ValueError(
        f"{name} is a {type(parameter).__name__}, which has no row in codec.KINDS; the kinds are {list(KINDS)}."
    )


def _read_parameter(name: str, obj: Json) -> Parameter:
    if not isinstance(obj, Mapping):
        raise ValueError(f"{name} must be an object with its kind, got {obj!r}.")
    rest = dict(obj)
    kind = rest.pop("kind", None)
    if kind not in list(KINDS):
        raise ValueError(f"{name} is of kind {kind!r}, which this version does not know; it knows {list(KINDS)}.")
    with _within(name):
        return KINDS[kind].read(rest)


def _write_fidelity(fidelity: Fidelity) -> Json:
    return {
        "axes": [_write_axis(axis) for axis in fidelity.axes],
        "target": fidelity.target.to_json(),
        "runnable": None if fidelity.runnable is None else fidelity.runnable.to_json(),
        "cost": _write_cost(fidelity.cost_function),
    }


def _read_fidelity(obj: Json, cost: Callable[[Scale], float] | None) -> Fidelity:
    with _within("fidelity"):
        given = _keys(obj, ("axes", "target", "runnable", "cost"))
        axes = {}
        for axis in _list("axes", given["axes"]):
            keys = ("rungs", "labels") if isinstance(axis, Mapping) and "rungs" in axis else ("low", "high", "integer")
            (name,) = _texts("name", [_keys(axis, ("name", *keys))["name"]])
            with _within(name):
                axes[name] = _read_axis(axis)
    return Fidelity(_read_cost(given["cost"], cost), target=given["target"], runnable=given["runnable"], **axes)


def _write_cost(cost: StoredFunction | MeasuredCost | None) -> Json | None:
    if isinstance(cost, MeasuredCost):
        return {"seconds": cost.seconds, "exponents": list(map(list, cost.exponents.items()))}
    return None if cost is None else {"function": cost.reference, "sha256": cost.sha256}


def _read_cost(stored: Json | None, given: Callable[[Scale], float] | None) -> StoredFunction | MeasuredCost | None:
    named = isinstance(stored, Mapping) and "function" in stored
    if stored is not None:
        stored = _keys(stored, ("function", "sha256") if named else ("seconds", "exponents"))
    if stored is None or not named:
        if given is not None:
            counts = "as 6 N D" if stored is None else "in measured seconds"
            raise ValueError(f"This space counts costs {counts}, so there is no cost to hand in; leave cost= out.")
        if stored is None:
            return None
        return MeasuredCost(stored["seconds"], dict(_pairs("exponents", stored["exponents"])))
    if given is None:
        return StoredFunction(stored["function"], stored["sha256"])
    cost = StoredFunction.of(given, "The cost function")
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
        rungs, labels = _list("rungs", obj["rungs"]), _texts("labels", obj["labels"])
        if labels and len(labels) != len(rungs):
            raise ValueError(f"needs a label for each of {rungs}, or none, got {labels}.")
        return dict(zip(labels, rungs, strict=True)) if labels else tuple(rungs)
    real = Real(obj["low"], obj["high"])
    return Integer(int(real.low), int(real.high)) if obj["integer"] else real
