"""MixtureSchedule: shares of data sources that change once in training, as when a domain is upsampled at the end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from search_spaces.mixture import TOLERANCE, Mixture
from search_spaces.parameter import Array, Column, Parameter, Real, is_number, plain

#: What shares may miss one by, as caps that leave a single mixture are sums of rounded numbers.
ROUNDING = 1e-12
#: Where upsampling at the end was found to pay (Blakeney et al. 2024, arXiv 2406.03476).
SWITCH = Real(0.7, 0.95)


@dataclass(frozen=True)
class SwitchedMixture:
    """Shares of the same sources before and after a switch: a value of `MixtureSchedule`.

    `switch` is the fraction of training, in (0, 1), that has the `first` shares; the rest has the `last`.
    """

    first: dict[str, float]
    last: dict[str, float]
    switch: float

    def __post_init__(self) -> None:
        for which in ("first", "last"):
            shares = getattr(self, which)
            if not isinstance(shares, Mapping) or not shares:
                raise ValueError(f"SwitchedMixture needs a dictionary source -> share as {which}, got {shares!r}.")
            for name, share in shares.items():
                if not (type(share) is float or is_number(share)) or not 0 <= share <= 1 + TOLERANCE:
                    raise ValueError(f"SwitchedMixture needs {which} shares in [0, 1], got {name}={plain(share)!r}.")
            total = math.fsum(shares.values())
            if abs(total - 1) > TOLERANCE:
                raise ValueError(
                    f"SwitchedMixture needs {which} shares that sum to 1 (within 1e-9), got a sum of {total!r}; "
                    "divide them by it."
                )
            object.__setattr__(self, which, {name: float(share) for name, share in shares.items()})
        if self.first.keys() != self.last.keys():
            raise ValueError(
                f"SwitchedMixture needs the same sources first and last, got {list(self.first)} and {list(self.last)}."
            )
        object.__setattr__(self, "switch", _switch(self.switch))

    def __hash__(self) -> int:
        return hash((frozenset(self.first.items()), frozenset(self.last.items()), self.switch))

    def shares(self, step: float, total_steps: float) -> dict[str, float]:
        """The shares of `step`, counted from 0: the first ones in steps 0 .. round(switch * total_steps) - 1.

        A half is rounded to the even number. ValueError when the step is outside [0, total_steps] or total_steps is no
        whole number >= 1.
        """
        total = plain(total_steps)
        if not is_number(total) or not math.isfinite(total) or total < 1 or total != int(total):
            raise ValueError(f"total_steps must be a whole number >= 1, got {total!r}.")
        if not is_number(step) or not 0 <= step <= total:
            raise ValueError(f"step must be in [0, total_steps={int(total)}], got {plain(step)!r}.")
        return dict(self.first if step < round(self.switch * total) else self.last)

    @property
    def average(self) -> dict[str, float]:
        """The shares of the whole run, were it switched at exactly `switch`."""
        s = self.switch
        return {name: s * share + (1 - s) * self.last[name] for name, share in self.first.items()}

    def to_json(self) -> dict[str, Any]:
        return {"first": dict(self.first), "last": dict(self.last), "switch": self.switch}


@dataclass(frozen=True, init=False, repr=False)
class MixtureSchedule(Parameter):
    """A mixture up to a switch point and another from there on; a value is a `SwitchedMixture`.

        MixtureSchedule(Mixture("web", "code", supply={"code": 2e9}), Mixture("web", "code", floor={"code": 0.3}))

    `switch` is the fraction of training before it, a number or a Real within (0, 1); by default it is tuned over
    [0.7, 0.95], where upsampling at the end was found to pay (Blakeney et al. 2024, arXiv 2406.03476). Both mixtures
    name the same sources in the same order. A supply is given to `first` and holds for the run: at each scale (see
    `at`) switch * first + (1 - switch) * last <= supply * max_epochs / tokens for every source. It cannot be joined
    with max_domains.

    The columns are those of the switch, when it is tuned, of the first and of the last mixture. Under a supply they
    are read in this order: `first` keeps to what floors of `last` leave and to what caps of `last` make it need, and
    `last` to what `first` leaves. So every point of the cube keeps to the supply, and every pair that does is reached.
    """

    first: Mixture
    last: Mixture
    switch: Real | float
    limits: tuple[float, ...]
    """The largest average share of each source at one scale; empty where no supply is enforced."""

    def __init__(self, first: Mixture, last: Mixture, switch: Real | float = SWITCH) -> None:
        for which, mixture in (("first", first), ("last", last)):
            if not isinstance(mixture, Mixture):
                raise ValueError(f"MixtureSchedule needs a Mixture as {which}, got {mixture!r}.")
        if first.names != last.names:
            raise ValueError(
                "MixtureSchedule needs the same sources in the same order first and last, "
                f"got {list(first.names)} and {list(last.names)}; fix a share at 0 where a source is not used."
            )
        if last.supply:
            raise ValueError(
                f"MixtureSchedule takes the supply of the whole run from its first mixture, got {dict(last.supply)} in "
                "the last; give it to the first."
            )
        for which, mixture in (("first", first), ("last", last)):
            if first.supply and mixture.max_domains is not None:
                raise ValueError(
                    f"MixtureSchedule with a supply cannot limit the number of sources, got "
                    f"max_domains={mixture.max_domains} in the {which} mixture; leave out one of the two."
                )
        if isinstance(switch, Real):
            if not 0 < switch.low < switch.high < 1:
                raise ValueError(f"MixtureSchedule needs a switch within (0, 1), got {switch!r}.")
        else:
            switch = _switch(switch)
        put = object.__setattr__
        put(self, "first", first)
        put(self, "last", last)
        put(self, "switch", switch)
        put(self, "limits", ())

    def __repr__(self) -> str:
        switch = "" if self.switch == SWITCH else f", switch={self.switch!r}"
        return f"MixtureSchedule({self.first!r}, {self.last!r}{switch})"

    def columns(self, path: str) -> tuple[Column, ...]:
        switch = self.switch.columns(f"{path}.switch") if isinstance(self.switch, Real) else ()
        return (*switch, *self.first.columns(f"{path}.first"), *self.last.columns(f"{path}.last"))

    def check(self, path: str, value: Any) -> SwitchedMixture:
        given = vars(value) if isinstance(value, SwitchedMixture) else value
        if not isinstance(given, Mapping) or given.keys() != {"first", "last", "switch"}:
            raise ValueError(
                f"{path} must be a SwitchedMixture or a dictionary with first, last and switch, got {value!r}."
            )
        switch = plain(given["switch"])
        if isinstance(self.switch, Real):
            switch = self.switch.check(f"{path}.switch", switch)
        elif not is_number(switch) or switch != self.switch:
            raise ValueError(f"{path}.switch is fixed at {self.switch!r} in this space, got {switch!r}.")
        first, last = self.first.check(f"{path}.first", given["first"]), self.last.check(f"{path}.last", given["last"])
        checked = SwitchedMixture(first, last, switch)
        # What one part has too much is taken from it alone, so the tolerance of the average is that much smaller.
        slack = TOLERANCE * min(checked.switch, 1 - checked.switch)
        for (name, share), limit in zip(checked.average.items() if self.limits else (), self.limits, strict=True):
            if share > limit + slack:
                raise ValueError(
                    f"{path} needs shares of {name!r} whose average over the run is <= {limit!r}, what its supply "
                    f"allows at this scale, got {share!r}; lower its first or last share, or move the switch."
                )
        return checked

    def encode(self, values: Sequence[SwitchedMixture]) -> Array:
        first, last = [value.first for value in values], [value.last for value in values]
        switch = [self.switch.encode([value.switch for value in values])] if isinstance(self.switch, Real) else []
        return np.concatenate([*switch, self.first.encode(first), self.last.encode(last)], axis=1)

    def settled(self, x: Array) -> Array:
        _, first, last = self._read(x)
        settled = [self.switch.settled(self._parts(x)[0])] if isinstance(self.switch, Real) else []
        return np.concatenate([*settled, self.first.encoded(first), self.last.encoded(last)], axis=1)

    def decode(self, x: Array) -> list[SwitchedMixture]:
        switch, first, last = self._read(x)
        names = self.first.names
        return [
            SwitchedMixture(dict(zip(names, w1, strict=True)), dict(zip(names, w2, strict=True)), s)
            for w1, w2, s in zip(first.tolist(), last.tolist(), switch.tolist(), strict=True)
        ]

    def _read(self, x: Array) -> tuple[Array, Array, Array]:
        """The switches (n) at (n, k) columns, and the first and the last shares: n x len(names) each."""
        x_switch, x_first, x_last = self._parts(x)
        switch = self.switch.numbers(x_switch) if isinstance(self.switch, Real) else np.full(len(x), self.switch)
        first, last = self._shares(switch[:, None], x_first, x_last)
        return switch, first, last

    def _parts(self, x: Array) -> tuple[Array, Array, Array]:
        """The columns of the switch (none when it is fixed), of the first and of the last mixture."""
        start = int(isinstance(self.switch, Real))
        middle = start + len(self.first.names) - len(self.first.fixed)
        return x[:, :start], x[:, start:middle], x[:, middle:]

    def _shares(self, s: Array, x_first: Array, x_last: Array) -> tuple[Array, Array]:
        """Both shares of the sources at switches `s` (n x 1): two of n x len(names)."""
        if not self.limits:
            return self.first.shares(x_first), self.last.shares(x_last)
        (low1, _), (low2, high2) = self._bounds
        caps = self._left(s, 0, low2)
        first = self.first.shares(x_first, caps)
        # Above its knee a first share takes from what the last one may have. All together may take `spare`, or the last
        # could not sum to one; where they take more, what is above the knees shrinks and other sources step in.
        knee = np.clip((np.array(self.limits) - (1 - s) * high2) / s, low1, caps)
        above = np.maximum(first - knee, 0.0)
        taken = above.sum(axis=1, keepdims=True)  # n x 1
        spare = np.maximum(self._left(s, 1, low1).sum(axis=1, keepdims=True) - 1, 0.0) * (1 - s) / s
        short = taken[:, 0] > spare[:, 0]
        if short.any():
            lowered = knee[short] + above[short] * (spare[short] / taken[short])
            first[short] = self.first.shares(x_first[short], lowered)
        return first, self.last.shares(x_last, self._left(s, 1, first))

    def _left(self, s: Array, part: int, other: Array) -> Array:
        """The largest shares of the first (0) or last (1) part where the other part has these: n x len(names)."""
        mine, others = (1 - s, s) if part else (s, 1 - s)
        low, high = self._bounds[part]
        return np.clip((np.array(self.limits) - others * other) / mine, low, high)

    @cached_property
    def _bounds(self) -> tuple[Array, Array]:
        """Of the first and of the last mixture: the least shares and the largest ones, 2 x len(names)."""
        return np.array(list(self.first.bounds.values())).T, np.array(list(self.last.bounds.values())).T

    @property
    def limited(self) -> bool:
        return self.first.limited or self.last.limited or any(limit < 1 for limit in self.limits)

    def quantile(self, u: Array) -> Array:
        """The switch and each mixture as they draw their own; pairs beyond the supply are moved as every point is."""
        u_switch, u_first, u_last = self._parts(u)
        x = np.concatenate([u_switch, self.first.quantile(u_first), self.last.quantile(u_last)], axis=1)
        return self.settled(x) if self.limited else x

    def start(self, x: Array) -> Array:
        """The references of the first and of the last mixture, where they have one."""
        x_switch, x_first, x_last = self._parts(x)
        x = np.concatenate([x_switch, self.first.start(x_first), self.last.start(x_last)], axis=1)
        return self.settled(x) if self.limited else x

    def to_json(self, value: SwitchedMixture) -> dict[str, Any]:
        return value.to_json()

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return self.first.scale_axes

    def at(self, path: str, scale: Mapping[str, float]) -> "MixtureSchedule":
        """The schedule without a supply, and with the largest average shares that follow from it at this scale."""
        if not self.first.supply:
            return self
        schedule: MixtureSchedule = object.__new__(MixtureSchedule)
        for field in fields(self):
            object.__setattr__(schedule, field.name, getattr(self, field.name))
        object.__setattr__(schedule, "first", self.first.with_fields(supply=(), max_epochs=()))
        object.__setattr__(schedule, "limits", self.first.largest_shares(scale))
        # What is allowed is a convex set of (switch, switch * first, (1 - switch) * last): its ends are enough.
        for switch in (self.switch.low, self.switch.high) if isinstance(self.switch, Real) else (self.switch,):
            schedule._refuse_empty(f"{path} at tokens={scale['tokens']:g}, switch={switch:g}", switch)
        return schedule

    def _refuse_empty(self, where: str, switch: float) -> None:
        (low1, high1), (low2, high2) = self._bounds
        limits, s = np.array(self.limits), np.array([[switch]])
        least = switch * low1 + (1 - switch) * low2
        if (least > limits + TOLERANCE).any():
            i = int(np.argmax(least - limits))
            raise ValueError(
                f"{where} needs a supply of {self.first.names[i]!r} for what floors and fixed shares take, an average "
                f"share of {least[i]:g}, got one for {limits[i]:g}; raise it or max_epochs, or lower a floor."
            )
        for what, most in (
            ("first", self._left(s, 0, low2).sum()),
            ("last", self._left(s, 1, low1).sum()),
            ("average", np.minimum(switch * high1 + (1 - switch) * high2, limits).sum()),
        ):
            if most < 1 - ROUNDING:
                raise ValueError(
                    f"{where} needs {what} shares that can sum to 1, got caps and supplies that allow {most:g}; raise "
                    "a cap, a supply or max_epochs, or train on fewer tokens."
                )


def _switch(given: object) -> float:
    switch = plain(given)
    if not is_number(switch) or not 0 < switch < 1:
        raise ValueError(f"A switch must be in (0, 1), a fraction of training, got {switch!r}.")
    return float(switch)
