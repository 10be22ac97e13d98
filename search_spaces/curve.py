"""Learning-rate schedules as values: functions of the step.

A value says what share of the peak learning rate a step gets:

    WSD(decay=0.2, warmup=0.02).factor(step, total_steps)

Steps are counted from 0, so a run of T steps asks for 0 .. T - 1; step T, the state after the run, is allowed as well.
All lengths are fractions of the run. Warm-up lasts W = round(warmup * T) whole steps (a half goes to the even number)
and gives step t < W the factor (t + 1) / W, so the last of them has the peak; after it comes the family's own curve
from 1 down to `floor`, a fraction of the peak. In the formulas below u = (t - W) / (T - W) is the progress after
warm-up.

A new family is one dataclass and one row of FAMILIES.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from search_spaces.parameter import Array, Real, is_number, plain, suggestion

#: A number, or one for each of many curves: an array that broadcasts with the steps.
Values: TypeAlias = float | Array
Steps: TypeAlias = float | Sequence[float] | npt.NDArray[Any]

#: Keeps quotients finite where they are not used.
TINY = 1e-100
#: Steps of a run of which nothing is known, where a curve depends on them: `Power`, `InverseSqrt` without warm-up.
ASSUMED_STEPS = 10_000

#: What settings that several families have are tuned over when nothing is said of them.
WARMUP, FLOOR, DECAY = Real(0.0, 0.1), Real(0.0, 0.2), Real(0.05, 0.5)


def tuned(default: Any, over: Any) -> Any:
    """A field with this default, which a `Schedule` varies over a Real, or over a tuple of numbers and Reals."""
    return field(default=default, metadata={"range": over})


@dataclass(frozen=True)
class Moment:
    """When a factor is asked for: in steps, or in fractions of the run in the limit of many steps."""

    t: Array
    warm: Values
    """Where warm-up ends."""
    total: float
    step: float
    """One step: 1, or 0 in the limit."""
    blur: Values = 0.0
    """Jumps of a curve are spread evenly over this much of the run."""
    tokens: Values | None = None
    """Tokens of the whole run, in the limit, where they are known."""

    @property
    def progress(self) -> Array:
        """u = (t - W) / (T - W) in [0, 1]; 0 in warm-up and where that takes the whole run."""
        rest: Array = (np.maximum(self.t, self.warm) - self.warm) / np.maximum(self.total - self.warm, TINY)
        return rest

    def left(self, decay: Values) -> Array:
        """How much of the last `decay` of the run is still to come, in [0, 1]."""
        return np.minimum((self.total - self.t) / (decay * self.total), 1.0)

    def passed(self, fraction: Values) -> Array:
        """1 from this fraction of the run on (a whole number of steps), 0 before."""
        if self.step:
            return np.where(self.t >= np.round(fraction * self.total), 1.0, 0.0)
        return np.clip((self.t - fraction) / self.blur + 0.5, 0.0, 1.0)


class Curve(ABC):
    """A schedule as a value: a frozen dataclass a family, whose fields are its settings with their defaults.

    Settings are numbers, those named in `lists` tuples of numbers.
    """

    family: ClassVar[str]
    lists: ClassVar[tuple[str, ...]] = ()
    warmup: float

    def __post_init__(self) -> None:
        for setting in self.settings():
            value = getattr(self, setting)
            if setting in self.lists:
                object.__setattr__(self, setting, self._numbers(setting, value))
                continue
            value = plain(value)
            if not _finite(value):
                raise ValueError(f"Schedule {self.family} needs a finite number for {setting}, got {value!r}.")
            object.__setattr__(self, setting, float(value))
        self._check()

    def _numbers(self, setting: str, value: Any) -> tuple[float, ...] | None:
        if value is None and self.defaults()[setting] is None:
            return None
        items: list[Any] = [plain(item) for item in value] if isinstance(value, list | tuple | np.ndarray) else [None]
        if not all(map(_finite, items)):
            raise ValueError(f"Schedule {self.family} needs a list of finite numbers for {setting}, got {value!r}.")
        return tuple(map(float, items))

    def _check(self) -> None:
        """ValueError when a setting is not allowed. No rule joins more than two numbers: see `Schedule`."""
        self._require(0 <= self.warmup < 1, "warmup in [0, 1), a fraction of the steps", warmup=self.warmup)

    def _check_decay(self, decay: float) -> None:
        self._require(0 < decay <= 1, "decay in (0, 1], a fraction of the steps", decay=decay)
        self._require(self.warmup + decay <= 1, "warmup + decay <= 1", warmup=self.warmup, decay=decay)

    def _require(self, holds: bool, allowed: str, **given: Any) -> None:
        if not holds:
            got = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"Schedule {self.family} needs {allowed}, got {got}.")

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The names of the family's settings."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]  # every family is a dataclass

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings of a value that is made without any."""
        every = fields(cls)  # type: ignore[arg-type]  # every family is a dataclass
        return {f.name: f.default for f in every}

    @classmethod
    def ranges(cls) -> dict[str, Any]:
        """What a `Schedule` varies when it is not told otherwise: setting -> Real, or tuple of numbers and Reals."""
        every = fields(cls)  # type: ignore[arg-type]  # every family is a dataclass
        return {f.name: f.metadata["range"] for f in every if "range" in f.metadata}

    @classmethod
    def unchecked(cls, settings: Mapping[str, Any]) -> Self:
        """A value from settings known to be allowed; for `limit` they may be (r, 1) arrays."""
        curve = object.__new__(cls)
        curve.__dict__.update(settings)
        return curve

    @overload
    def factor(self, step: float, total_steps: float) -> float: ...
    @overload
    def factor(self, step: Sequence[float] | npt.NDArray[Any], total_steps: float) -> Array: ...
    def factor(self, step: Steps, total_steps: float) -> float | Array:
        """Learning rate at `step` over its peak; a number for a number, an array for an array of steps.

        ValueError when a step is outside [0, total_steps] or total_steps is no whole number >= 1.
        """
        return _as_asked(self._factor(self._moment(step, total_steps)))

    def limit(self, fractions: Array, blur: Values, tokens: Values | None = None) -> Array:
        """The factor at fractions (m) of the run, all above 0, in the limit of many steps.

        A jump is spread over `blur` (a number, or m of them) of the run, so that the result is continuous in every
        setting. tokens: of the whole run, for families that count them; without, it has ASSUMED_STEPS steps.
        """
        return self._factor(Moment(fractions, self.warmup, 1.0, 0.0, blur, tokens))

    def s1(self, total_steps: float) -> float:
        """S_1, the sum of the factors of a run's steps (Tissue et al. 2024, arXiv 2408.11029)."""
        total = _whole(total_steps)
        return float(self.factor(np.arange(total), total).sum())

    def s2(self, total_steps: float, momentum: float = 0.999) -> float:
        """S_2 = sum over steps i and k <= i of (eta_(k-1) - eta_k) momentum^(i-k), eta relative to its peak.

        The annealing area of Tissue et al. 2024 (arXiv 2408.11029): k runs over the steps after warm-up. `momentum`,
        their lambda, is in [0, 1].
        """
        if not (is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(f"S_2 needs momentum in [0, 1], got {momentum!r}.")
        total = _whole(total_steps)
        first = max(round(self.warmup * total), 1)
        k = np.arange(first, total)
        drops = -np.diff(self.factor(np.arange(first - 1, total), total))
        # The sum over i >= k is a geometric series of T - k terms.
        weights = total - k if momentum == 1 else (1.0 - momentum ** (total - k)) / (1.0 - momentum)
        return float(drops @ weights)

    @property
    def stable_until(self) -> float | None:
        """The part of the run up to which the factor stays what it was at the end of warm-up; None where it never does.

        Up to there a run is the beginning of every longer one, but for its warm-up.
        """
        end = self._held()
        return end if end > self.warmup else None

    def _held(self) -> float:
        """Where the factor first changes after warm-up, were that short."""
        return 0.0

    def to_json(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self.settings()}
        return {"family": self.family} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()
        }

    def _moment(self, step: Steps, total_steps: float) -> Moment:
        total = _whole(total_steps)
        t = np.asarray(step, dtype=np.float64)
        inside = (t >= 0) & (t <= total)  # False for NaN
        if not inside.all():
            raise ValueError(f"step must be in [0, total_steps={total}], got {t[~inside].flat[0]:g}.")
        return Moment(t, round(self.warmup * total), total, 1.0)

    def _factor(self, at: Moment) -> Array:
        warming = (at.t + at.step) / np.maximum(at.warm, TINY)
        return np.where(at.t < at.warm, warming * self._start(at), self._after(at))

    def _start(self, at: Moment) -> Values:
        """Where warm-up leads to."""
        return 1.0

    @abstractmethod
    def _after(self, at: Moment) -> Array:
        """The factor after warm-up; before its end, any number."""


class Falling(Curve):
    """A curve that falls from 1 to `floor`, a fraction of the peak: floor + (1 - floor) * fall."""

    floor: float

    def _check(self) -> None:
        super()._check()
        self._require(0 <= self.floor <= 1, "floor in [0, 1], a fraction of the peak", floor=self.floor)

    def _after(self, at: Moment) -> Array:
        return self.floor + (1.0 - self.floor) * self._fall(at)

    @abstractmethod
    def _fall(self, at: Moment) -> Array:
        """The curve from 1 to 0."""


@dataclass(frozen=True)
class Constant(Curve):
    """1."""

    family = "constant"
    warmup: float = tuned(0.0, WARMUP)

    def _after(self, at: Moment) -> Array:
        return np.ones_like(at.t)

    def _held(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Falling):
    """1 - u (with floor 0 "straight to zero": Bergsma et al. 2025, arXiv 2502.15938)."""

    family = "linear"
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.0, FLOOR)

    def _fall(self, at: Moment) -> Array:
        return 1.0 - at.progress


@dataclass(frozen=True)
class Cosine(Falling):
    """(1 + cos(pi u)) / 2 (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    family = "cosine"
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.0, FLOOR)

    def _fall(self, at: Moment) -> Array:
        return 0.5 * (1.0 + np.cos(math.pi * at.progress))


@dataclass(frozen=True)
class WSD(Falling):
    """Warm-up, stable, decay: 1 until the last decay * T steps, then linearly to 0.

    Hu et al. 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392.
    """

    family = "wsd"
    decay: float = tuned(0.2, DECAY)
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.0, FLOOR)

    def _check(self) -> None:
        super()._check()
        self._check_decay(self.decay)

    def _fall(self, at: Moment) -> Array:
        return at.left(self.decay)

    def _held(self) -> float:
        return 1.0 - self.decay


@dataclass(frozen=True)
class WSDSqrt(WSD):
    """WSD that falls as 1 - sqrt(v), v the part of the decay that is over (Haegele et al. 2024, arXiv 2405.18392)."""

    family = "wsd_sqrt"

    def _fall(self, at: Moment) -> Array:
        over = 1.0 - at.left(self.decay)
        # So little is the rounding error of 0, of which the root would be seen.
        return 1.0 - np.sqrt(np.where(over < 1e-12, 0.0, over))


@dataclass(frozen=True)
class WSDExponential(Curve):
    """WSD that falls as floor^v, a straight line in logs, v the part of the decay that is over.

    eta_0^(1-v) eta_end^v in Luo et al. 2025, arXiv 2503.12811, with floor = eta_end / eta_0 = 0.1 in their data.
    """

    family = "wsd_exponential"
    decay: float = tuned(0.2, DECAY)
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.1, Real(0.01, 0.2, log=True))

    def _check(self) -> None:
        super()._check()
        self._check_decay(self.decay)
        self._require(0 < self.floor <= 1, "floor in (0, 1], a fraction of the peak", floor=self.floor)

    def _after(self, at: Moment) -> Array:
        return self.floor ** (1.0 - at.left(self.decay))

    def _held(self) -> float:
        return 1.0 - self.decay


@dataclass(frozen=True)
class WSDHalfLife(Curve):
    """WSD that halves every half_life * T steps of the decay: 0.5^((t - S) / (half_life T)), S where the decay begins.

    MiniCPM: Hu et al. 2024, arXiv 2404.06395. There is no floor: the end is 0.5^(decay / half_life).
    """

    family = "wsd_half_life"
    decay: float = tuned(0.1, DECAY)
    half_life: float = tuned(0.03, Real(0.01, 0.1, log=True))
    warmup: float = tuned(0.0, WARMUP)

    def _check(self) -> None:
        super()._check()
        self._check_decay(self.decay)
        self._require(self.half_life > 0, "half_life > 0, a fraction of the steps", half_life=self.half_life)

    def _after(self, at: Moment) -> Array:
        half_lives: Array = (1.0 - at.left(self.decay)) * self.decay / self.half_life
        return 0.5**half_lives

    def _held(self) -> float:
        return 1.0 - self.decay


@dataclass(frozen=True)
class REX(Falling):
    """(1 - u) / (shape + (1 - shape)(1 - u)); shape 1/2 is Chen et al. 2021, arXiv 2107.04197, and shape 1 is linear.

    The paper has no warm-up and t / T for u. A port that is often met (IvanVassi/REX_LR) has shape 0.1.
    """

    family = "rex"
    shape: float = tuned(0.5, Real(0.1, 1.0))
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.0, FLOOR)

    def _check(self) -> None:
        super()._check()
        self._require(0 < self.shape <= 1, "shape in (0, 1]", shape=self.shape)

    def _fall(self, at: Moment) -> Array:
        rest = 1.0 - at.progress
        return rest / (self.shape + (1.0 - self.shape) * rest)


@dataclass(frozen=True)
class Power(Curve):
    """min(1, batch a n^b / lr_max), then an exponential decay (Shen et al. 2024, arXiv 2408.13359).

    The learning rate, in units of `lr_max`, that fits n tokens at a batch of batch_tokens / sequence_tokens sequences:
    with `lr_max` as the peak rate it is the paper's. n = (t + 1) * batch_tokens counts the step's own batch, as warm-up
    does. Warm-up ends where the law, capped at 1, is then; over the last `decay` of the run the law is multiplied by
    floor + (1 - floor) (e^-v - e^-1) / (1 - e^-1), v the part of the decay that is over, so that `floor` is a fraction
    of the law. Up to that decay it is IBM's dolomite-engine, whose step s is t + 1 here.
    """

    family = "power"
    a: float = 4.0
    b: float = -0.51
    batch_tokens: float = 2.0**22
    lr_max: float = 0.02
    sequence_tokens: float = 4096.0
    decay: float = tuned(0.1, DECAY)
    warmup: float = tuned(0.0, WARMUP)
    floor: float = tuned(0.0, FLOOR)

    def _check(self) -> None:
        super()._check()
        self._check_decay(self.decay)
        self._require(0 <= self.floor <= 1, "floor in [0, 1], a fraction of the law", floor=self.floor)
        self._require(self.b < 0, "b < 0", b=self.b)
        for setting in ("a", "batch_tokens", "lr_max", "sequence_tokens"):
            value = getattr(self, setting)
            self._require(value > 0, f"{setting} > 0", **{setting: value})

    def _start(self, at: Moment) -> Values:
        return self._law(at, at.warm)

    def _after(self, at: Moment) -> Array:
        falling = (np.exp(at.left(self.decay) - 1.0) - math.exp(-1)) / (1.0 - math.exp(-1))
        return self._law(at, at.t + at.step) * (self.floor + (1.0 - self.floor) * falling)

    def _law(self, at: Moment, done: Values) -> Array:
        """The law once the run is at `done`, which has the unit of at.t."""
        if at.step:
            tokens = done * self.batch_tokens
        else:
            tokens = done * (ASSUMED_STEPS * self.batch_tokens if at.tokens is None else at.tokens)
        batch = self.batch_tokens / self.sequence_tokens
        return np.minimum(1.0, batch / self.lr_max * self.a * np.maximum(tokens, 1.0) ** self.b)


@dataclass(frozen=True)
class InverseSqrt(Curve):
    """sqrt(W / t) (Vaswani et al. 2017, section 5.3). It falls from the end of warm-up: without any, W is 1."""

    family = "inverse_sqrt"
    warmup: float = tuned(0.02, WARMUP)

    def _after(self, at: Moment) -> Array:
        peak = np.maximum(at.warm, at.step or 1.0 / ASSUMED_STEPS)
        return np.sqrt(peak / np.maximum(at.t, peak))


@dataclass(frozen=True)
class OneCycle(Curve):
    """Half a cosine up from 1/div to 1 over `warmup`, then one down to 1/(div final_div): torch's OneCycleLR.

    Smith & Topin 2018, arXiv 1708.07120. torch's indexing is kept: the peak is at warmup * T - 1, not rounded to a
    step, and the end at step T - 1, after which it holds.
    """

    family = "onecycle"
    warmup: float = tuned(0.3, Real(0.1, 0.5))
    div: float = 25.0
    final_div: float = 1e4

    def _check(self) -> None:
        super()._check()
        self._require(self.div >= 1, "div >= 1", div=self.div)
        self._require(self.final_div >= 1, "final_div >= 1", final_div=self.final_div)

    def momentum(self, step: Steps, total_steps: float, low: float = 0.85, high: float = 0.95) -> float | Array:
        """torch's momentum, which mirrors the factor: `low` at the peak, `high` at both ends."""
        _, height = self._height(self._moment(step, total_steps))
        return _as_asked(high - (high - low) * height)

    def _factor(self, at: Moment) -> Array:
        return self._after(at)  # which has its own warm-up

    def _after(self, at: Moment) -> Array:
        rising, height = self._height(at)
        low = np.where(rising, 1.0 / self.div, 1.0 / (self.div * self.final_div))
        return low + (1.0 - low) * height

    def _height(self, at: Moment) -> tuple[npt.NDArray[np.bool_], Array]:
        """Whether it still rises, and 0 at the ends, 1 at the peak."""
        peak = self.warmup * at.total - at.step
        t = np.minimum(at.t, at.total - at.step)
        up = np.minimum(t / np.maximum(peak, TINY), 1.0)
        down = (t - peak) / ((1.0 - self.warmup) * at.total)
        return t < peak, 0.5 * np.where(t < peak, 1.0 - np.cos(math.pi * up), 1.0 + np.cos(math.pi * down))


@dataclass(frozen=True)
class Step(Curve):
    """gamma^k, k the number of milestones, fractions of the whole run, that are passed; steps are whole."""

    family = "step"
    lists = ("milestones",)
    gamma: float = tuned(0.1, Real(0.05, 0.5, log=True))
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)
    warmup: float = tuned(0.0, WARMUP)

    def _check(self) -> None:
        super()._check()
        self._require(0 < self.gamma <= 1, "gamma in (0, 1]", gamma=self.gamma)
        self._require(
            _increasing(self.milestones), "milestones that increase within (0, 1)", milestones=self.milestones
        )

    def _after(self, at: Moment) -> Array:
        passed = sum((at.passed(milestone) for milestone in self.milestones), np.zeros_like(at.t))
        return self.gamma**passed

    def _held(self) -> float:
        return self.milestones[0] if self.milestones else 1.0


@dataclass(frozen=True)
class Exponential(Curve):
    """exp(-u / time_constant). There is no floor: the end is exp(-1 / time_constant)."""

    family = "exponential"
    time_constant: float = tuned(0.3, Real(0.1, 1.0, log=True))
    warmup: float = tuned(0.0, WARMUP)

    def _check(self) -> None:
        super()._check()
        self._require(self.time_constant > 0, "time_constant > 0", time_constant=self.time_constant)

    def _after(self, at: Moment) -> Array:
        return np.exp(-at.progress / self.time_constant)


@dataclass(frozen=True)
class Piecewise(Curve):
    """One level, a fraction of the peak, for each stage; stages are equally long, or end at `boundaries`.

    Boundaries are fractions of the whole run; steps are whole. Warm-up leads to the first level.
    """

    family = "piecewise"
    lists = ("levels", "boundaries")
    levels: tuple[float, ...] = tuned((1.0, 0.3, 0.1), (1.0, Real(0.1, 1.0, log=True), Real(0.01, 1.0, log=True)))
    boundaries: tuple[float, ...] | None = None
    warmup: float = tuned(0.0, WARMUP)

    def _check(self) -> None:
        super()._check()
        within = all(0 <= level <= 1 for level in self.levels)
        self._require(bool(self.levels) and within, "levels in [0, 1], fractions of the peak", levels=self.levels)
        if self.boundaries is None:
            return
        boundaries, levels = self.boundaries, self.levels
        self._require(_increasing(boundaries), "boundaries that increase within (0, 1)", boundaries=boundaries)
        fits = len(boundaries) == len(levels) - 1
        self._require(fits, "one boundary fewer than levels", boundaries=boundaries, levels=levels)

    def _start(self, at: Moment) -> Values:
        return self.levels[0]

    def _after(self, at: Moment) -> Array:
        stages = len(self.levels)
        boundaries = self.boundaries or [stage / stages for stage in range(1, stages)]
        value = self.levels[0] * np.ones_like(at.t)
        for boundary, level in zip(boundaries, self.levels[1:], strict=True):
            passed = at.passed(boundary)
            value = value * (1.0 - passed) + level * passed
        return value

    def _held(self) -> float:
        return self.boundaries[0] if self.boundaries else 1.0 / len(self.levels)


@dataclass(frozen=True)
class Refined(Curve):
    """w(u) times what is left of its sum, for the weights that a first run's gradient norms give.

    Defazio et al. 2023, arXiv 2310.07831: of n weights at evenly spaced u, node i has w_i * sum_{p > i} w_p over the
    largest of these; between the nodes it is linear. Equal weights are linear decay. Refinement brings its own warm-up,
    so `warmup` is not tuned unless asked for; warm-up leads to the first node.
    """

    family = "refined"
    lists = ("weights",)
    weights: tuple[float, ...] = (1.0, 1.0)
    warmup: float = 0.0

    def _check(self) -> None:
        super()._check()
        positive = all(weight > 0 for weight in self.weights)
        self._require(positive and len(self.weights) >= 2, "at least two weights > 0", weights=self.weights)

    @classmethod
    def from_gradient_norms(
        cls, norms: Sequence[float] | npt.NDArray[Any], optimizer: str = "adam", window: float = 0.1, nodes: int = 50
    ) -> Self:
        """The schedule for a run like the one that had these gradient norms, one a step, T >= 2 of them.

        optimizer: "adam" for any of its kin, which needs L1 norms (w = 1 / norm), or "sgd", which needs L2 norms
        (w = norm^-2). The norms are smoothed by a running median over an odd number of steps, the part `window` of the
        run, in [0, 1], reflected at both ends. nodes: how many weights are kept, at most T.
        """
        powers = {"adam": -1.0, "sgd": -2.0}
        if optimizer not in powers:
            raise ValueError(f"Refinement knows optimizer={list(powers)}, got {optimizer!r}.")
        series = np.asarray(norms, dtype=np.float64)
        if series.ndim != 1 or len(series) < 2 or not (np.isfinite(series) & (series > 0)).all():
            raise ValueError(f"Refinement needs a gradient norm > 0 for each of at least two steps, got {norms!r}.")
        if not 0 <= window <= 1:
            raise ValueError(f"Refinement needs window in [0, 1], a fraction of the steps, got {window!r}.")
        if nodes < 2:
            raise ValueError(f"Refinement needs at least two nodes, got {nodes!r}.")
        half = int(window * len(series)) // 2
        padded = np.pad(series, half, mode="reflect")
        kept = np.round(np.linspace(0, len(series) - 1, min(nodes, len(series)))).astype(int)
        smooth = np.array([np.median(padded[step : step + 2 * half + 1]) for step in kept])
        return cls(tuple((smooth / smooth.min()) ** powers[optimizer]))

    def _start(self, at: Moment) -> Values:
        return self._nodes()[..., 0]

    def _after(self, at: Moment) -> Array:
        nodes, last = self._nodes(), len(self.weights) - 1
        place = at.progress * last
        shape = np.broadcast_shapes(place.shape, nodes.shape[:-1])
        left = np.broadcast_to(np.minimum(place.astype(np.intp), last - 1), shape)
        nodes = np.broadcast_to(nodes, (*shape, last + 1))
        low, high = (np.take_along_axis(nodes, (left + i)[..., None], axis=-1)[..., 0] for i in (0, 1))
        between: Array = low + (high - low) * (place - left)
        return between

    def _nodes(self) -> Array:
        """The curve at its nodes: n, or r x 1 x n for r curves."""
        weights = np.moveaxis(np.array(self.weights), 0, -1)
        weights = weights / weights.max(axis=-1, keepdims=True)
        tails = np.zeros_like(weights)  # tails[i] = sum_{p > i} w_p
        tails[..., :-1] = np.cumsum(weights[..., :0:-1], axis=-1)[..., ::-1]
        nodes: Array = weights * tails
        nodes /= nodes.max(axis=-1, keepdims=True)
        return nodes


FAMILIES: dict[str, type[Curve]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WSD,
    "wsd_sqrt": WSDSqrt,
    "wsd_exponential": WSDExponential,
    "wsd_half_life": WSDHalfLife,
    "rex": REX,
    "power": Power,
    "inverse_sqrt": InverseSqrt,
    "onecycle": OneCycle,
    "step": Step,
    "exponential": Exponential,
    "piecewise": Piecewise,
    "refined": Refined,
}


def curve_from_json(obj: Mapping[str, Any]) -> Curve:
    """The value that `to_json` wrote; settings left out have the family's defaults."""
    settings = dict(obj)
    family = family_named(settings.pop("family", None))
    for setting in settings:
        if setting not in family.settings():
            refuse_setting(f"Schedule {family.family}", setting, family.settings())
    return family(**settings)


def family_named(name: object) -> type[Curve]:
    """The class of a family; ValueError when there is none of that name."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    there_are = f"there are {list(FAMILIES)}."
    hint = suggestion(name, FAMILIES, there_are) if isinstance(name, str) else there_are
    raise ValueError(f"{name!r} is no schedule family; {hint}")


def refuse_setting(what: str, setting: str, known: Sequence[str]) -> None:
    """Raises the ValueError for a name that is no setting of `what`."""
    hint = suggestion(setting, known, f"known are {list(known)}.")
    raise ValueError(f"{what} has no setting {setting!r}; {hint}")


def _finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _whole(total_steps: float) -> int:
    total = plain(total_steps)
    if not _finite(total) or total < 1 or total != int(total):
        raise ValueError(f"total_steps must be a whole number >= 1, got {total!r}.")
    return int(total)  # tokens // tokens_per_step is a float


def _as_asked(values: Array) -> float | Array:
    return values if values.ndim else float(values)


def _increasing(fractions: Sequence[float]) -> bool:
    return all(low < high for low, high in zip((0.0, *fractions), (*fractions, 1.0), strict=True))
