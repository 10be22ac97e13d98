"""How the best settings move with scale: published laws, rules and the user's own exponents, as values.

    law = StepLaw(lr="lr", batch="batch_size", sequence=2048)
    law.drift(["lr", "batch_size"], ["params", "tokens"])       # {("lr", "params"): (-0.713, 0.15), ...}
    law.value({"params": 1e9, "tokens": 1e11})                  # {"lr": 1.63e-3, "batch_size": 541}
    law == parse(law.to_json())

A law says by which power of a scale axis the best value of a parameter grows: octaves an octave. It is a weak belief,
a mean and a standard deviation for each pair of a parameter and an axis, for data to overrule. The literature does not
agree with itself (see each class), and on published tables the Step Law's exponents helped for dense models and harmed
for mixtures of experts: a law is an option to turn on, never a default.

A name that is None is not there: a parameter that is not searched, an axis that the study does not have. A new law is
one dataclass and one row of LAWS.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from search_spaces.parameter import is_number, plain, suggestion

#: (parameter, scale axis) -> mean and standard deviation of the drift of the best value, in octaves an octave.
Drift: TypeAlias = dict[tuple[str, str], tuple[float, float]]

#: Standard deviation about a published exponent. The Step Law refitted to its own published runs lies within it, other
#: groups' laws lie further off. Over five octaves of scale it is three quarters of an octave.
DRIFT_SD = 0.15


@dataclass(frozen=True)
class Law(ABC):
    """A frozen dataclass a law, whose fields are its settings; ValueError for settings that make no sense."""

    kind: ClassVar[str]

    @abstractmethod
    def pairs(self) -> Drift:
        """All that the law says."""

    def value(self, scale: Mapping[str, float]) -> dict[str, float]:
        """Parameter -> best value at a scale, of the parameters for which the law has one; ValueError for a scale
        that lacks an axis of the law."""
        return {}

    @property
    def couplings(self) -> dict[tuple[str, str], float]:
        """(follower, leader) -> the power of the leader, another parameter, by which the follower's best value goes."""
        return {}

    def drift(self, parameters: Iterable[str], axes: Iterable[str]) -> Drift:
        """What the law says of a study with these numeric parameters and scale axes.

        ValueError for a parameter or axis that the law names and the study does not have.
        """
        known = {"parameter": list(parameters), "axis": list(axes)}
        parameter_names, axis_names = self.names()
        for what, names in (("parameter", parameter_names), ("axis", axis_names)):
            for name in names:
                if name not in known[what]:
                    hint = suggestion(name, known[what], f"there are {known[what]}; None says that it is not there.")
                    thing = "number to search" if what == "parameter" else "scale axis"
                    raise ValueError(f"The law {self.kind!r} names {name!r}, which is no {thing}; {hint}")
        return self.pairs()

    def names(self) -> tuple[list[str], list[str]]:
        """The parameters and the axes that the law names."""
        pairs, coupled = self.pairs(), [name for pair in self.couplings for name in pair]
        return list(dict.fromkeys([name for name, _ in pairs] + coupled)), list(dict.fromkeys(a for _, a in pairs))

    def moved(self, config: Mapping[str, Any], start: Mapping[str, float], end: Mapping[str, float]) -> dict[str, Any]:
        """A config that is good at one scale as the law would have it at another.

        Each number that the law names is multiplied by (end / start) ** exponent for each axis; the rest stays. Nothing
        is rounded or kept within a range. ValueError for a scale that lacks an axis, or a named value that is not > 0.
        """
        moved = dict(config)
        for (name, axis), (exponent, _) in self.pairs().items():
            if name in moved:
                moved[name] = _positive(name, moved[name]) * (_on(end, axis) / _on(start, axis)) ** exponent
        return moved

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind} | {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class StepLaw(Law):
    """lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens (Li et al. 2025, arXiv 2503.04715).

    N: parameters without embeddings, D: tokens. For AdamW with 2,000 warm-up steps and a cosine to the fixed rate 1e-5.
    `sequence`: tokens of one unit of the batch parameter, 2048 say, or 1 where it is in tokens; without it the law has
    no value for the batch.

    What speaks against it. The published dense runs, refitted by the published recipe, give lr ~ N^-0.766 D^0.197 and
    batch ~ D^0.613; with N allowed, the batch falls as N^-0.27. Others find that the rate falls with tokens: D^-0.32
    (Bjorck et al., arXiv 2409.19913) and D^-0.51 (`PowerLaw`), with other schedules and batches. The best rate may
    bend upwards in log N at large scale (arXiv 2606.29158), so that this law comes out too low there.
    """

    kind = "step_law"
    lr: str | None = None
    batch: str | None = None
    params: str | None = "params"
    tokens: str | None = "tokens"
    sequence: float | None = None
    sd: float = DRIFT_SD

    def __post_init__(self) -> None:
        _names(self, (), ("lr", "batch", "params", "tokens"))
        if self.lr is None and self.batch is None:
            raise ValueError("step_law needs the name of the learning rate as lr, of the batch size as batch, or both.")
        if self.params is None and self.tokens is None:
            raise ValueError(
                "step_law needs the name of an axis: of the parameters as params, of the tokens as tokens."
            )
        if self.sequence is not None:
            object.__setattr__(self, "sequence", _positive("sequence", self.sequence))
        object.__setattr__(self, "sd", _positive("sd", self.sd))

    def pairs(self) -> Drift:
        powers = {
            (self.lr, self.params): -0.713,
            (self.lr, self.tokens): 0.307,
            (self.batch, self.params): 0.0,
            (self.batch, self.tokens): 0.571,
        }
        return _there(powers, self.sd)

    def value(self, scale: Mapping[str, float]) -> dict[str, float]:
        values = {}
        if self.lr is not None and self.params is not None and self.tokens is not None:
            values[self.lr] = 1.79 * _on(scale, self.params) ** -0.713 * _on(scale, self.tokens) ** 0.307
        if self.batch is not None and self.tokens is not None and self.sequence is not None:
            values[self.batch] = 0.58 * _on(scale, self.tokens) ** 0.571 / self.sequence
        return values


@dataclass(frozen=True)
class PowerLaw(Law):
    """lr = min(0.02, 4 B D^-0.51), B the batch in sequences of 4096 tokens (Shen et al. 2024, arXiv 2408.13359).

    The rate of a run of D tokens with a warm-up, a stable phase and a decay, the same at every size under muP; the fit
    gave 4.6, the models were trained with 4 (`search_spaces.Power` is the schedule made of it). `grows`: how the batch
    grows, axis -> exponent, nothing where it stays. `batch`: its name where it is searched too, see `BatchRule`.
    `batch_tokens`: the batch where it stays, for `value`.

    What speaks against it: the Step Law's rate rises with tokens, as D^0.307, batch included, and others have the rate
    go as the square root of the batch with Adam (`BatchRule`), not as the batch.
    """

    kind = "power"
    lr: str = "lr"
    tokens: str = "tokens"
    batch: str | None = None
    grows: Mapping[str, float] = field(default_factory=dict, hash=False)
    batch_tokens: float | None = None
    sd: float = DRIFT_SD

    def __post_init__(self) -> None:
        _names(self, ("lr", "tokens"), ("batch",))
        object.__setattr__(self, "grows", _powers("grows", self.grows))
        if self.batch is not None and not self.grows:
            raise ValueError("power needs grows where the batch is searched: {'tokens': 0.5}, say.")
        if self.batch_tokens is not None:
            if self.grows or self.batch is not None:
                raise ValueError("power has batch_tokens for a batch that stays; leave batch and grows away.")
            object.__setattr__(self, "batch_tokens", _positive("batch_tokens", self.batch_tokens))
        object.__setattr__(self, "sd", _positive("sd", self.sd))

    def pairs(self) -> Drift:
        found = _follows(self.lr, self.batch, self.grows, 1.0, self.sd)
        mean, sd = found.get((self.lr, self.tokens), (0.0, self.sd))
        return found | {(self.lr, self.tokens): (mean - 0.51, sd)}

    @property
    def couplings(self) -> dict[tuple[str, str], float]:
        return {} if self.batch is None else {(self.lr, self.batch): 1.0}

    def value(self, scale: Mapping[str, float]) -> dict[str, float]:
        if self.batch_tokens is None:
            return {}
        return {self.lr: min(0.02, 4.0 * self.batch_tokens / 4096 * _on(scale, self.tokens) ** -0.51)}


@dataclass(frozen=True)
class BatchRule(Law):
    """lr ~ batch ** exponent: as the batch grows with scale, so does the rate.

    `exponent`: 0.5, the square-root rule for Adam and its kind (Granziol et al. 2020, arXiv 2006.09092; Malladi et al.
    2022, arXiv 2205.10287), or 1, the linear rule for SGD with small batches (Goyal et al. 2017, arXiv 1706.02677).
    `grows`: how the batch grows, axis -> exponent. `batch`: its name where it is searched too; it then drifts as
    `grows` says, the rate follows whatever it does (`couplings`), and its own drift is the less certain for it.

    The literature does not agree: 0.5 for Adam in theory, 0.54 is what the Step Law implies along growing D, and the
    Power scheduler, with Adam, is linear. Beyond some batch the rate stops growing, and may fall (arXiv 2405.14578).
    """

    kind = "batch_rule"
    lr: str = "lr"
    batch: str | None = None
    grows: Mapping[str, float] = field(default_factory=dict, hash=False)
    exponent: float = 0.5
    sd: float = DRIFT_SD

    def __post_init__(self) -> None:
        _names(self, ("lr",), ("batch",))
        object.__setattr__(self, "grows", _powers("grows", self.grows))
        if not self.grows:
            raise ValueError("batch_rule needs grows, how the batch grows with scale: {'tokens': 0.5}, say.")
        object.__setattr__(self, "exponent", _finite("exponent", self.exponent))
        object.__setattr__(self, "sd", _positive("sd", self.sd))

    def pairs(self) -> Drift:
        return _follows(self.lr, self.batch, self.grows, self.exponent, self.sd)

    @property
    def couplings(self) -> dict[tuple[str, str], float]:
        return {} if self.batch is None else {(self.lr, self.batch): self.exponent}


@dataclass(frozen=True)
class WidthRule(Law):
    """lr ~ 1 / width, muP's rule for hidden weights under Adam (Yang et al. 2022, arXiv 2203.03466, table 3).

    It is about models in the usual parametrization with one rate for all weights, most of which are hidden. Where the
    rates are divided by the width already (`integrations.width_transfer`) the best rate does not move, and this law
    does not apply. `axis` is the scale axis and width ~ axis ** `width` is assumed: 1/2 for parameters at fixed depth;
    1/3 where depth grows with width; 1 where the axis is the width. muP says nothing of tokens, batch and depth.

    The Step Law's N^-0.713 is steeper than the N^-0.5 of this rule; its models grow in depth as well.
    """

    kind = "width_rule"
    lr: str = "lr"
    axis: str = "params"
    width: float = 0.5
    sd: float = DRIFT_SD

    def __post_init__(self) -> None:
        _names(self, ("lr", "axis"))
        for name in ("width", "sd"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))

    def pairs(self) -> Drift:
        return {(self.lr, self.axis): (-self.width, self.sd)}


@dataclass(frozen=True)
class Exponents(Law):
    """The user's own: parameter -> axis -> exponent, or -> (exponent, its standard deviation).

    Exponents({"lr": {"params": -0.5, "tokens": (0.2, 0.3)}, "batch_size": {"tokens": 0.5}})
    """

    kind = "exponents"
    exponents: Mapping[str, Mapping[str, float | tuple[float, float]]] = field(hash=False)
    sd: float = DRIFT_SD
    """Of the exponents that have none of their own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sd", _positive("sd", self.sd))
        if not isinstance(self.exponents, Mapping) or not self.exponents:
            raise ValueError(f"exponents needs a dictionary parameter -> axis -> exponent, got {self.exponents!r}.")
        taken: dict[str, dict[str, float | tuple[float, float]]] = {}
        for name, of in self.exponents.items():
            if not isinstance(of, Mapping) or not of:
                raise ValueError(f"exponents needs a dictionary axis -> exponent for {name!r}, got {of!r}.")
            taken[name] = {}
            for axis, given in of.items():
                what = f"the exponent of {name!r} on {axis!r}"
                if not isinstance(given, list | tuple):
                    taken[name][axis] = _finite(what, given)
                elif len(given) == 2:
                    taken[name][axis] = (
                        _finite(what, given[0]),
                        _positive(f"the standard deviation of {what}", given[1]),
                    )
                else:
                    raise ValueError(f"A law needs {what} to be a number, or two with its spread, got {given!r}.")
        object.__setattr__(self, "exponents", taken)

    def pairs(self) -> Drift:
        return {
            (name, axis): given if isinstance(given, tuple) else (given, self.sd)
            for name, of in self.exponents.items()
            for axis, given in of.items()
        }


@dataclass(frozen=True)
class Together(Law):
    """Several laws, each of other parameters or other axes: a width rule and a batch rule, say. It has no values."""

    kind = "together"
    laws: tuple[Law, ...]

    def __post_init__(self) -> None:
        if isinstance(self.laws, list | tuple):
            laws = tuple(parse(law) if isinstance(law, Mapping) else law for law in self.laws)
            object.__setattr__(self, "laws", laws)
        if not isinstance(self.laws, tuple) or not self.laws or not all(isinstance(law, Law) for law in self.laws):
            raise ValueError(f"together needs a list of laws, got {self.laws!r}.")
        pairs = [pair for law in self.laws for pair in law.pairs()]
        for name, axis in pairs:
            if pairs.count((name, axis)) > 1:
                raise ValueError(f"Two laws say how {name!r} goes with {axis!r}; leave one of them away.")

    def pairs(self) -> Drift:
        return {pair: drift for law in self.laws for pair, drift in law.pairs().items()}

    @property
    def couplings(self) -> dict[tuple[str, str], float]:
        return {pair: power for law in self.laws for pair, power in law.couplings.items()}


#: Every law by the kind that JSON has for it.
LAWS: dict[str, type[Law]] = {
    "step_law": StepLaw,
    "power": PowerLaw,
    "batch_rule": BatchRule,
    "width_rule": WidthRule,
    "exponents": Exponents,
    "together": Together,
}


def parse(given: Mapping[str, Any]) -> Law:
    """A law from its settings, as a policy has them and as `to_json` writes them.

        {"kind": "step_law", "lr": "lr", "batch": "batch_size"}

    ValueError for an unknown kind or setting, and for settings that the law refuses.
    """
    if not isinstance(given, Mapping) or "kind" not in given:
        raise ValueError(f"A law must be a dictionary with a kind, one of {list(LAWS)}, got {given!r}.")
    kind = given["kind"]
    if kind not in list(LAWS):
        raise ValueError(f"There is no law {kind!r}; {suggestion(kind, LAWS, f'the laws are {list(LAWS)}.')}")
    made = LAWS[kind]
    known = [item.name for item in fields(made)]
    for name in given:
        if name != "kind" and name not in known:
            hint = suggestion(name, known, f"its settings are {known}.")
            raise ValueError(f"The law {kind!r} has no setting {name!r}; {hint}")
    try:
        return made(**{name: value for name, value in given.items() if name != "kind"})
    except TypeError:  # the one way left to be wrong: a setting without a default is missing
        raise ValueError(f"The law {kind!r} needs {known[0]!r}.") from None


def scale_lr(lr: float, batch: float, new_batch: float, exponent: float = 0.5) -> float:
    """lr (new_batch / batch) ** exponent: 0.5 the square-root rule for Adam, 1 the linear one for SGD, 0 none.

    ValueError for what is not a finite number > 0 (`exponent`: finite). See `BatchRule`.
    """
    ratio = _positive("new_batch", new_batch) / _positive("batch", batch)
    return float(_positive("lr", lr) * ratio ** _finite("exponent", exponent))


def _follows(lr: str, batch: str | None, grows: Mapping[str, float], exponent: float, sd: float) -> Drift:
    """Drifts of a rate that goes as a power of a batch, which is certain to grow so unless it is searched as well."""
    own = math.hypot(sd, exponent * sd) if batch is not None else sd
    found: Drift = {(lr, axis): (exponent * power, own) for axis, power in grows.items()}
    if batch is not None:
        found |= {(batch, axis): (power, sd) for axis, power in grows.items()}
    return found


def _there(powers: Mapping[tuple[str | None, str | None], float], sd: float) -> Drift:
    """The exponents of the parameters and axes that are there."""
    return {(n, a): (power, sd) for (n, a), power in powers.items() if n is not None and a is not None}


def _on(scale: Mapping[str, float], axis: str) -> float:
    if axis not in scale:
        raise ValueError(f"The law needs a scale with the axis {axis!r}, got {dict(scale)!r}.")
    return _positive(axis, scale[axis])


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Law):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _names(law: Law, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Names of parameters and axes are texts, all different; None says that one is not there."""
    given = [getattr(law, name) for name in (*needed, *optional)]
    for name, value in zip((*needed, *optional), given, strict=True):
        if not isinstance(value, str) and not (value is None and name in optional):
            raise ValueError(f"The law {law.kind!r} needs a name as {name}, got {value!r}.")
    there = [value for value in given if value is not None]
    if len(set(there)) < len(there):
        raise ValueError(f"The law {law.kind!r} has a name twice, got {there}; each stands for one thing.")


def _powers(what: str, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or not all(isinstance(axis, str) for axis in given):
        raise ValueError(f"A law needs a dictionary axis -> exponent as {what}, got {given!r}.")
    return {axis: _finite(f"{what}[{axis!r}]", power) for axis, power in given.items()}


def _finite(what: str, given: Any) -> float:
    value = plain(given)
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"A law needs a finite number as {what}, got {value!r}.")
    return float(value)


def _positive(what: str, given: Any) -> float:
    value = _finite(what, given)
    if value <= 0:
        raise ValueError(f"A law needs a number > 0 as {what}, got {value!r}.")
    return value
