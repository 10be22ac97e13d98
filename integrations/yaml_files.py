"""Spaces and configs as YAML, for people to read and write; what is written is read back bit for bit.

    parameters:
      lr: {kind: real, low: 1e-4, high: 1e-2, log: true}
      momentum: 0.9                           # a bare value is fixed
      optimizer:
        kind: choice
        options: {adamw: {beta2: {kind: real, low: 0.9, high: 0.999}}, lion: {}}
      data: {kind: mixture, names: [code, docs], floor: {code: 0.1}}
      schedule: {kind: schedule, families: [cosine, rex], warmup: 0.02, wsd: {decay: {low: 0.05, high: 0.3}}}
    constraints: [beta2 <= 1 - lr]
    fidelity:
      axes: {params: {rungs: {tiny: 1e5, small: 1e6}}, tokens: {rungs: [1e6, 1e7]}}
      target: {params: small, tokens: 1e7}

The keys beside `kind` are the arguments of the class, with the same defaults, and mean what they mean in Python.
Scalars are those of YAML 1.2: only true and false are bools, 1e-4 is a number, 2026-01-01 is a text. Bare yes, no, on,
off and <<, which many readers take for bools and merges, are refused; in quotes they are texts.
"""

from __future__ import annotations

import inspect
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from bo.checkpoint import sync_folder, whole
from integrations.foreign_space import refuse_reserved
from search_spaces import Choice, Integer, Mixture, Real, Schedule, Space, space_from_json, space_to_json
from search_spaces.codec import KINDS
from search_spaces.mixture_schedule import MixtureSchedule
from search_spaces.parameter import Fixed, Parameter, suggestion

_Made = TypeVar("_Made")
_Kind = TypeVar("_Kind", bound=Parameter)

_TAG = "tag:yaml.org,2002:"

# YAML 1.2.2, section 10.3.2 (the core schema), in the order in which they are tried, with the characters they begin by.
_SCALARS: tuple[tuple[str, str, Sequence[str], Callable[[str], Any]], ...] = (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""], lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", lambda text: _whole(text)),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: _number(text),
    ),
)
# Texts in YAML 1.2, but to readers of YAML 1.1 bools, and the key that merges a mapping.
_DISPUTED = ("yes", "no", "on", "off", "<<")
# A few lines of aliases can stand for more than any memory holds.
_MOST = 100_000
_READ: dict[str, Callable[[str], Any]] = {_TAG + name: read for name, _, _, read in _SCALARS} | {_TAG + "str": str}


class _Loader(yaml.SafeLoader):
    """Only composes nodes: nothing of the text is ever constructed but by `_READ`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # its own, in place of those of YAML 1.1


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 or 1.1 would read as something else, so that every reader gets texts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Only double quotes escape; PyYAML breaks lines at U+0085 and its like in others, and reads a space there.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)

for _name, _pattern, _first, _ in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), list(_first))


class _Mapping(dict[str, Any]):
    """A mapping that knows where it was written."""

    def __init__(self, source: str, line: int) -> None:
        super().__init__()
        self.source = source
        self.line = line
        self.lines: dict[str, int] = {}

    def at(self, key: str = "") -> str:
        """The place of a key's value, or of the mapping itself."""
        return f"{self.source}, line {self.lines.get(key, self.line)}"


def space_to_yaml(space: Space) -> str:
    """A space as YAML; `space_from_yaml` gives an equal one back."""
    written = space_to_json(space)
    readable: dict[str, Any] = {"parameters": {name: _readable(obj) for name, obj in written["parameters"]}}
    if "constraints" in written:
        readable["constraints"] = written["constraints"]
    if written["fidelity"] is not None:
        readable["fidelity"] = _readable_fidelity(written["fidelity"])
    return _dump(readable)


def space_from_yaml(text: str, **functions: Any) -> Space:
    """The space that a YAML text describes; `functions` as `search_spaces.space_from_json` takes them.

    ValueError, with the line, for what is no YAML, for a key twice, and for whatever the space has that it may not.
    """
    return _space(text, "The YAML text", functions)


def config_to_yaml(space: Space, config: Mapping[str, Any]) -> str:
    """A config of this space as YAML; `config_from_yaml` gives it back bit for bit."""
    return _dump(space.to_json(config))


def config_from_yaml(space: Space, text: str) -> dict[str, Any]:
    """The config of this space that a YAML text holds; ValueError as from `Space.validate` and for what is no YAML."""
    return _config(space, text, "The YAML text")


def save_space(space: Space, path: str | Path) -> None:
    """Writes a space to a YAML file; a reader sees the file before or after, never a part of it."""
    _save(space_to_yaml(space), Path(path))


def load_space(path: str | Path, **functions: Any) -> Space:
    """The space in a YAML file; ValueError, with the file and line, as from `space_from_yaml`."""
    return _space(_text(Path(path)), str(path), functions)


def save_config(space: Space, config: Mapping[str, Any], path: str | Path) -> None:
    """Writes a config of this space to a YAML file, as `save_space` does."""
    _save(config_to_yaml(space, config), Path(path))


def load_config(space: Space, path: str | Path) -> dict[str, Any]:
    """The config of this space in a YAML file; ValueError, with the file, as from `config_from_yaml`."""
    return _config(space, _text(Path(path)), str(path))


def _space(text: str, source: str, functions: Mapping[str, Any]) -> Space:
    root = _mapping(_parse(text, source), source, "a space")
    _keys(root, "a space", known=("parameters", "constraints", "fidelity"), needed=("parameters",))
    parameters = _parameters(root, "parameters", "")
    _at(root.at("parameters"), lambda: refuse_reserved(parameters))
    written: dict[str, Any] = {"parameters": [[n, _written(p)] for n, p in parameters.items()], "fidelity": None}
    if "constraints" in root:
        written["constraints"] = _list(root["constraints"], root.at("constraints"), "constraints")
    if "fidelity" in root:
        written["fidelity"] = _fidelity(_mapping(root["fidelity"], root.at("fidelity"), "fidelity"))
    return _at(source, lambda: space_from_json(written, **functions))


def _written(parameter: Parameter) -> dict[str, Any]:
    """A parameter's JSON."""
    kind = _kind(type(parameter))
    return {"kind": kind} | KINDS[kind].write(parameter)


def _kind(made: Callable[..., Parameter]) -> str:
    return next(kind for kind, row in KINDS.items() if row.made is made)


def _config(space: Space, text: str, source: str) -> dict[str, Any]:
    root = _mapping(_parse(text, source), source, "a config")
    return _at(source, lambda: space.validate(root))


def _readable(obj: Mapping[str, Any]) -> Any:
    """A parameter's JSON as people write it: where that has lists, people write names."""
    rest = dict(obj)
    match obj["kind"]:
        case "fixed":
            return obj["value"]
        case "choice" if "subspaces" in obj:
            subspaces = rest.pop("subspaces")
            inner = {option: {name: _readable(entry) for name, entry in entries} for option, entries in subspaces}
            return rest | {"options": inner}
        case "mixture":
            return _readable_mixture(rest)
        case "mixture_schedule":
            return rest | {"first": _readable_mixture(obj["first"]), "last": _readable_mixture(obj["last"])}
        case "schedule":
            shared = rest.pop("shared")
            return rest | {"families": dict(obj["families"])} | shared
    return rest


def _readable_mixture(obj: Mapping[str, Any]) -> dict[str, Any]:
    """The floors, caps and reference of a mixture by name."""
    rest = dict(obj)
    for stored, name in (("floors", "floor"), ("caps", "cap"), ("reference", "reference")):
        if stored in rest:
            rest[name] = dict(zip(obj["names"], rest.pop(stored), strict=True))
    if not any(rest["floor"].values()):
        del rest["floor"]
    return rest


def _parameters(owner: _Mapping, key: str, prefix: str) -> dict[str, Parameter]:
    """The parameters of the space, or of an option."""
    entries = _mapping(owner[key], owner.at(key), prefix.rstrip(".") or key)
    return {name: _parameter(prefix + name, entry, entries.at(name)) for name, entry in entries.items()}


def _parameter(path: str, value: Any, at: str) -> Parameter:
    """A parameter as people write it; ValueError, by its name and line, when it is none."""
    if isinstance(value, list):
        raise ValueError(
            f"{at}: {path} is a list; write {{kind: choice, options: [...]}} for one of them, got {value}."
        )
    if not isinstance(value, _Mapping):
        return _at(f"{at}: {path}", lambda: Fixed(value))
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in MADE_BY:
        hint = _near(kind, list(MADE_BY)) if "kind" in value else f"there are {list(MADE_BY)}."
        raise ValueError(f"{at}: {path} needs a kind of parameter, got kind={kind!r}; {hint}")
    return MADE_BY[kind](path, value)


def _made(path: str, given: _Mapping, make: type[_Kind], *first: Any, **made: Any) -> _Kind:
    """A parameter of class `make` with the keys as its arguments; `first` and `made` are arguments already."""
    if (kind := given.get("kind", _kind(make))) != _kind(make):
        raise ValueError(f"{given.at('kind')}: {path} must be of kind {_kind(make)!r}, got {kind!r}.")
    parameters = inspect.signature(make).parameters.values()
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    several = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_POSITIONAL]
    needed = [parameter.name for parameter in named if parameter.default is parameter.empty] + several
    _keys(given, path, known=[*several, *(parameter.name for parameter in named), "kind"], needed=needed)
    rest = {key: value for key, value in given.items() if key not in (*several, "kind")}
    return _at(f"{given.at()}: {path}", lambda: make(*first, **(rest | made)))


def _choice(path: str, given: _Mapping) -> Choice:
    options = given.get("options", [])
    if isinstance(options, _Mapping):
        subspaces = {option: _parameters(options, option, f"{path}.{option}.") for option in options}
        return _made(path, given, Choice, subspaces)
    return _made(path, given, Choice, *_list(options, given.at("options"), f"{path}.options"))


def _mixture(path: str, given: _Mapping) -> Mixture:
    return _made(path, given, Mixture, *_list(given.get("names", []), given.at("names"), f"{path}.names"))


def _mixture_schedule(path: str, given: _Mapping) -> MixtureSchedule:
    made: dict[str, Any] = {
        key: _mixture(f"{path}.{key}", _mapping(given[key], given.at(key), f"{path}.{key}"))
        for key in ("first", "last")
        if key in given
    }
    if "switch" in given:
        made["switch"] = _setting(f"{path}.switch", given["switch"])
    return _made(path, given, MixtureSchedule, **made)


def _schedule(path: str, given: _Mapping) -> Schedule:
    settings = {
        key: _setting(f"{path}.{key}", value) for key, value in given.items() if key not in ("kind", "families")
    }
    families = given.get("families", [])
    if isinstance(families, _Mapping):
        for key in families:
            if key in settings:
                raise ValueError(f"{families.at(key)}: {path} has the family {key!r} twice; each may be there once.")
        settings |= {key: _setting(f"{path}.{key}", value) for key, value in families.items()}
        families = []
    names = _list(families, given.at("families"), f"{path}.families")
    return _at(f"{given.at()}: {path}", lambda: Schedule(*names, **settings))


def _setting(path: str, value: Any) -> Any:
    """A setting of a schedule: a number, a range, a list of them, or the settings of a family."""
    if isinstance(value, list):
        return tuple(_setting(path, item) for item in value)
    if not isinstance(value, _Mapping):
        return value
    if "low" in value or "high" in value:
        return _made(path, value, Real)
    return {key: _setting(f"{path}.{key}", entry) for key, entry in value.items()}


#: How each kind of parameter is made of what people write.
MADE_BY: dict[str, Callable[[str, _Mapping], Parameter]] = {
    "fixed": lambda path, given: _made(path, given, Fixed),
    "real": lambda path, given: _made(path, given, Real),
    "integer": lambda path, given: _made(path, given, Integer),
    "choice": _choice,
    "mixture": _mixture,
    "mixture_schedule": _mixture_schedule,
    "schedule": _schedule,
}


def _readable_fidelity(obj: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in obj.items() if value is not None}
    if "exponents" in rest.get("cost", ()):
        rest["cost"] = obj["cost"] | {"exponents": dict(obj["cost"]["exponents"])}
    return rest | {"axes": dict(map(_readable_axis, obj["axes"]))}


def _readable_axis(obj: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An axis' JSON as its name and what people write."""
    rest = {key: value for key, value in obj.items() if key != "name"}
    if labels := rest.pop("labels", None):
        rest["rungs"] = dict(zip(labels, rest["rungs"], strict=True))
    return obj["name"], rest


def _fidelity(fidelity: _Mapping) -> dict[str, Any]:
    """A fidelity as people write it as its JSON."""
    _keys(fidelity, "fidelity", known=("axes", "target", "runnable", "cost"), needed=("axes", "target"))
    axes = _mapping(fidelity["axes"], fidelity.at("axes"), "fidelity.axes")
    written = [_axis(name, _mapping(axis, axes.at(name), f"fidelity.axes.{name}")) for name, axis in axes.items()]
    cost = fidelity.get("cost")
    if cost is not None:
        cost = _mapping(cost, fidelity.at("cost"), "fidelity.cost")
    if cost is not None and isinstance(cost.get("exponents"), _Mapping):
        cost = dict(cost) | {"exponents": list(map(list, cost["exponents"].items()))}
    return {"runnable": None} | fidelity | {"axes": written, "cost": cost}


def _axis(name: str, axis: _Mapping) -> dict[str, Any]:
    what = f"fidelity.axes.{name}"
    if "rungs" not in axis:
        _keys(axis, what, needed=("low", "high"), known=("low", "high", "integer", "rungs"))
        return {"name": name, "integer": False} | axis
    _keys(axis, what, known=("rungs",))
    rungs = axis["rungs"]
    if isinstance(rungs, _Mapping):
        return {"name": name, "rungs": list(rungs.values()), "labels": list(rungs)}
    return {"name": name, "rungs": rungs, "labels": []}


def _at(place: str, make: Callable[[], _Made]) -> _Made:
    """What `make` makes; its errors then say where."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None


def _mapping(value: Any, at: str, what: str) -> _Mapping:
    if not isinstance(value, _Mapping):
        raise ValueError(f"{at}: {what} must be a mapping (name: value), got {value!r}.")
    return value


def _list(value: Any, at: str, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{at}: {what} must be a list ([one, two]), got {value!r}.")
    return value


def _keys(mapping: _Mapping, what: str, *, known: Sequence[str], needed: Sequence[str] = ()) -> None:
    """ValueError for a key that is unknown or missing."""
    for key in mapping:
        if key not in known:
            raise ValueError(f"{mapping.at(key)}: {what} has no {key!r}; {_near(key, known)}")
    for key in needed:
        if key not in mapping:
            raise ValueError(f"{mapping.at()}: {what} needs {key!r}, got {list(mapping)}.")


def _near(given: object, known: Sequence[str] | Mapping[str, object]) -> str:
    return suggestion(given, known, f"there are {list(known)}.")


def _parse(text: str, source: str) -> Any:
    """Plain Python with a `_Mapping` for each mapping; ValueError, with the line, when the text is no plain YAML."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = 0.0 if root is None else _values(root, {})
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply to be read.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{source}{line}: no YAML that can be read here ({what}).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: no YAML that can be read here ({' '.join(str(error).split())}).") from None
    if root is None:
        raise ValueError(f"{source} is empty.")
    if values > _MOST:
        raise ValueError(f"{source}: aliases stand for more than {_MOST} values, or for themselves; write them out.")
    return _plain(root, source)


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes it stands for with its aliases written out; infinity where one contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for entry in inside for child in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def _plain(node: yaml.Node, source: str) -> Any:
    at = f"{source}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null" and not node.value:
        # Left empty, it is more often a line indented too little than a None.
        raise ValueError(f"{at}: a value is missing; write null for None, {{}} for an empty mapping.")
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in _DISPUTED:
        hint = "write the mapping out" if node.value == "<<" else "write true or false"
        raise ValueError(f"{at}: {node.value} is read in more than one way; {hint}, or put it in quotes for a text.")
    if isinstance(node, yaml.ScalarNode) and node.tag in _READ:
        try:
            return _READ[node.tag](node.value)
        except ValueError as error:
            raise ValueError(f"{at}: {error}.") from None
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_plain(item, source) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _plain_mapping(node, source)
    raise ValueError(f"{at}: the tag {node.tag.replace(_TAG, '!!')} is not read here; leave it out.")


def _plain_mapping(node: yaml.MappingNode, source: str) -> _Mapping:
    mapping = _Mapping(source, node.start_mark.line + 1)
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _plain(key_node, source)
        if not isinstance(key, str):
            raise ValueError(f"{source}, line {line}: a key must be a text, got {key!r}; put it in quotes.")
        if key in mapping:
            first = mapping.lines[key]
            raise ValueError(f"{source}, line {line}: the key {key!r} is there twice, first in line {first}.")
        mapping.lines[key] = line
        mapping[key] = _plain(value_node, source)
    return mapping


def _whole(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _dump(readable: Mapping[str, Any]) -> str:
    """A mapping as YAML: what holds only scalars on one line, all else a line an entry."""
    dumper = _Dumper(io.StringIO(), default_flow_style=None, sort_keys=False)
    root = dumper.represent_data(readable)
    assert isinstance(root, yaml.MappingNode)
    root.flow_style = False
    return str(yaml.serialize(root, Dumper=_Dumper, width=120, allow_unicode=True))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def _save(text: str, path: Path) -> None:
    with whole(path) as partial, open(partial, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
