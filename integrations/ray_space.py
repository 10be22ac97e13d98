"""Search spaces of Ray Tune, a dictionary of domains, to ours and back.

    space = from_ray({"model": {"width": tune.choice([256, 512])}, "lr": tune.loguniform(1e-4, 1e-1)})
    space.sample(rng, 1)[0]                  # {"model/width": 512, "lr": 0.003}
    to_nested(trial.config)                  # {"model": {"width": 512}, "lr": 0.003}, as the trainable knows it

Dictionaries within dictionaries become names joined by "/", which a constraint names in a function of the config, since
in a text "/" divides. What one side cannot express is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search import sample

from integrations import foreign_space
from search_spaces import Choice, Fidelity, Integer, Real, Space
from search_spaces.parameter import Fixed, Parameter, is_scalar, plain

#: What `to_ray` may leave out when it is told to.
DROPPABLE = ("constraints", "fidelity", "order")

# Ray reads a dictionary with this single key as something else than a dictionary.
_KEYWORDS = ("eval", "grid_search")

# The samplers that draw uniformly, and whether on a log axis. Others, subclasses too, may draw anything.
_LOG: dict[tuple[type, type], bool] = {
    (sample.Float, type(tune.uniform(0, 1).get_sampler())): False,
    (sample.Float, type(tune.loguniform(1, 2).get_sampler())): True,
    (sample.Integer, type(tune.randint(0, 2).get_sampler())): False,
    (sample.Integer, type(tune.lograndint(1, 2).get_sampler())): True,
}
_CATEGORICAL = (type(tune.choice([0]).get_sampler()), sample.Grid)


def from_ray(
    param_space: Mapping[str, Any], *, constraints: Sequence[object] = (), fidelity: Fidelity | None = None
) -> Space:
    """The space of a `param_space` of Ray Tune.

    uniform, loguniform -> Real; randint, lograndint -> Integer (Ray leaves the upper end out); quniform, qloguniform,
    qrandint, qlograndint -> an ordered Choice of the values that Ray gives; choice, grid_search -> Choice; dictionaries
    as options -> sub-spaces, told apart by the first key that has a text of its own in each, such as "name"; constants
    -> fixed values. ValueError, by name, for everything else: sample_from, randn, lists, custom samplers.
    """
    if not isinstance(param_space, Mapping):
        raise ValueError(f"A param_space of Ray Tune is a dictionary, got {param_space!r}.")
    return foreign_space.space_of(_entries("", param_space), constraints, fidelity)


def to_ray(space: Space, *, drop: Collection[str] = ()) -> dict[str, Any]:
    """The `param_space` for Ray Tune; `to_flat` takes what Ray samples from it to a config of the space.

    A Choice of sub-spaces can be expressed where its name and those of its parameters begin alike, as in
    Choice "optimizer/name" with the parameters "optimizer/lr": Ray then chooses between dictionaries.

    drop: what Ray cannot express and may be left out: "fidelity", "constraints" (check with `space.validate`), "order"
    (of ordered options; whole numbers with equal steps keep it). ValueError, by name, for what is left: a Mixture, a
    Schedule, other sub-spaces.
    """
    for name in drop:
        if name not in DROPPABLE:
            raise ValueError(f"drop= may hold {list(DROPPABLE)}, got {name!r}.")
    if space.constraints and "constraints" not in drop:
        texts = [constraint.text for constraint in space.constraints]
        raise ValueError(f"Ray Tune has no constraints such as {texts}; leave them out by drop=('constraints',).")
    if space.fidelity is not None and "fidelity" not in drop:
        raise ValueError("Ray Tune's param_space has no scale axes; leave them out by drop=('fidelity',).")
    return to_nested(_exported(space.parameters, drop))


def to_nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with names joined by "/" as dictionaries within dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in config.items():
        *path, last = name.split("/")
        inner = nested
        for depth, part in enumerate(path, start=1):
            if (outer := "/".join(path[:depth])) in config:
                raise ValueError(f"{outer!r} cannot be a value and hold {name!r} as well; rename one of them.")
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def to_flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries within dictionaries as a config with names joined by "/": the inverse of `to_nested`.

    For spaces that Ray can express: the value of a Mixture is a dictionary too.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{_key('', key)}/{name}": inner for name, inner in to_flat(value).items()}
        else:
            flat[_key("", key)] = value
    return flat


def _key(prefix: str, key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{prefix}{key} must be a text to name a parameter, got {key!r}.")
    if "/" in key:
        raise ValueError(
            f"{prefix + key!r} has a '/' in a key, which joins the keys of nested dictionaries; rename it."
        )
    return prefix + key


def _entries(prefix: str, given: Mapping[Any, Any]) -> dict[str, object]:
    """Flat name -> parameter or fixed value."""
    entries: dict[str, object] = {}
    for key, entry in given.items():
        name, value = _key(prefix, key), plain(entry)
        if isinstance(value, sample.Domain):
            entries |= _domain(name, value)
        elif isinstance(value, dict) and list(value) == ["grid_search"]:
            entries |= _choice(name, value["grid_search"])
        elif isinstance(value, dict) and list(value) == ["eval"]:
            raise ValueError(f"{name} is computed by eval; compute it in the training function instead.")
        elif isinstance(value, dict) and value:
            entries |= _entries(f"{name}/", value)
        elif is_scalar(value):
            entries[name] = value
        else:
            raise ValueError(
                f"{name} must be a domain of Ray Tune, a dictionary of them or a constant (text, a finite number, a "
                f"bool, None), got {value!r}; set it in the training function."
            )
    return entries


def _domain(name: str, domain: Any) -> dict[str, object]:
    kind = type(domain)
    if kind is sample.Function:
        raise ValueError(
            f"{name} is drawn by a function (sample_from), whose range is unknown; give its range, and compute what "
            "depends on other parameters in the training function."
        )
    if kind not in (sample.Float, sample.Integer, sample.Categorical):
        raise ValueError(f"{name} is a {kind.__name__}, which has no counterpart; use a domain of ray.tune.")
    sampler, step = domain.get_sampler(), None
    if kind is sample.Categorical and type(sampler) in _CATEGORICAL:
        return _choice(name, domain.categories)
    if type(sampler) is sample.Quantized:
        step, sampler = sampler.q, sampler.sampler
    if isinstance(sampler, sample.Normal):
        raise ValueError(f"{name} is normally distributed, without bounds; give its range by uniform or loguniform.")
    log = _LOG.get((kind, type(sampler)))
    if log is None:
        raise ValueError(
            f"{name} is drawn by {type(sampler).__name__}, which has no counterpart; use uniform, loguniform, randint, "
            "lograndint or choice."
        )
    if step is not None and not (kind is sample.Integer and step == 1):
        return {name: _stepped(name, domain, step)}
    if kind is sample.Integer:
        low, end = (foreign_space.whole_number(name, bound) for bound in (domain.lower, domain.upper))
        return {name: foreign_space.whole(name, low, end - 1, log)}
    return {name: foreign_space.real(name, domain.lower, domain.upper, log)}


def _stepped(name: str, domain: Any, step: float) -> object:
    """The multiples of `step` between the bounds, both of them included, as Ray computes them."""
    for bound in (domain.lower, domain.upper):
        if not math.isfinite(bound):
            raise ValueError(f"{name} needs finite bounds, got {bound!r}.")
    if isinstance(domain, sample.Integer):
        step = foreign_space.whole_number(name, step)
    first, last = _index(domain.lower, step, math.ceil), _index(domain.upper, step, math.floor)
    return foreign_space.grid(name, last - first + 1, lambda k: domain.cast((first + k) * step))


def _index(bound: float, step: float, inwards: Callable[[float], int]) -> int:
    """The number of steps to `bound`, where it is a step but for rounding; otherwise to the next one inside."""
    steps = bound / step
    return round(steps) if math.isclose(steps, round(steps)) else inwards(steps)


def _choice(name: str, given: Iterable[Any]) -> dict[str, object]:
    """A Choice of values, or of the sub-spaces that dictionaries are."""
    values = list(given)
    if not any(isinstance(value, dict) for value in values):
        return {name: foreign_space.options(name, values)}
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} chooses between dictionaries and other values, got {values!r}; make them all alike.")
    entries = [_entries(f"{name}/", value) for value in values]
    if len(entries) == 1:
        return entries[0]
    labels = [
        key
        for key in entries[0]
        if all(isinstance(each.get(key), str) for each in entries)
        and len({each[key] for each in entries}) == len(entries)
    ]
    if not labels:
        raise ValueError(
            f"{name} chooses between dictionaries that have no name; give each a key such as 'name' with a text of its "
            f"own, got {values!r}."
        )
    label = labels[0]
    subspaces = {each.pop(label): each for each in entries}
    return {label: foreign_space.named(label, lambda: Choice(subspaces))}


def _exported(parameters: Mapping[str, Parameter], drop: Collection[str]) -> dict[str, Any]:
    """Flat name -> domain or constant; what holds dictionaries to choose from has their common name."""
    exported: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if any(part in _KEYWORDS for part in name.split("/")):
            raise ValueError(
                f"{name} has a part that Ray Tune takes for a keyword, one of {list(_KEYWORDS)}; rename it."
            )
        if isinstance(parameter, Choice) and parameter.subspaces:
            common, domain = _alternatives(name, parameter, drop)
            exported[common] = domain
        else:
            exported[name] = _as_domain(name, parameter, drop)
    return exported


def _as_domain(name: str, parameter: Parameter, drop: Collection[str]) -> Any:
    match parameter:
        case Fixed():
            return parameter.value
        case Real():
            return (tune.loguniform if parameter.log else tune.uniform)(parameter.low, parameter.high)
        case Integer():
            return (tune.lograndint if parameter.log else tune.randint)(parameter.low, parameter.high + 1)
        case Choice(ordered=False):
            return tune.choice(list(parameter.options))
        case Choice():
            values: list[Any] = list(parameter.options)
            if step := _step(values):
                return tune.qrandint(values[0], values[-1], step)
            if "order" in drop:
                return tune.choice(list(parameter.options))
            raise ValueError(
                f"{name} has ordered options, and Ray Tune's have no order; leave it out by drop=('order',)."
            )
    raise ValueError(
        f"{name} is a {type(parameter).__name__}, which Ray Tune's param_space cannot express; make it a fixed value, "
        "or search this space with a policy of Windtunnel."
    )


def _step(values: list[Any]) -> int:
    """The step when these are all multiples of one from the first to the last, else 0.

    A step of 1 is none: Ray then leaves out the last, and an Integer says the same.
    """
    if any(type(value) is not int for value in values):
        return 0
    step: int = values[1] - values[0]
    even = step > 1 and values[0] % step == 0 and values == list(range(values[0], values[-1] + 1, step))
    return step if even else 0


def _alternatives(name: str, choice: Choice, drop: Collection[str]) -> tuple[str, sample.Domain]:
    """The dictionaries that a Choice of sub-spaces is one of, and the name that they have in common."""
    flat = [{name: option} | _exported(entries, drop) for option, entries in choice.subspaces.items()]
    common = name.split("/")[:-1]
    for key in (key for each in flat for key in each):
        path = key.split("/")[:-1]
        common = [part for i, part in enumerate(common) if path[: i + 1] == common[: i + 1]]
    if not common:
        raise ValueError(
            f"{name} has sub-spaces whose parameters lie beside it, and Ray Tune can only choose between dictionaries; "
            f"rename it and them to begin alike, as in '{name}/name' and '{name}/lr'."
        )
    prefix = "/".join(common) + "/"
    options = [to_nested({key.removeprefix(prefix): value for key, value in each.items()}) for each in flat]
    return prefix[:-1], tune.choice(options)
