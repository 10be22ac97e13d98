"""Mixture: the shares of named data sources, none below its floor or above its cap, together one."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from search_spaces.parameter import Array, Column, Parameter, is_number, plain

Mask: TypeAlias = npt.NDArray[np.bool_]

TOLERANCE = 1e-9
LEAST_FREE = 1e-6  # well above the tolerance: else rounding alone could decide the shares
#: Up to here repeated tokens are worth nearly as much as new ones (Muennighoff et al. 2023, arXiv 2305.16264).
MAX_EPOCHS = 4.0
#: A share above its cap by less than this is at its cap: rounding must not send it through the water filling.
ROUNDING = 1e-14
#: Largest factor of z^3. Without one, shares would jump where the z of a source that has to take everything passes 0.
STRETCH = 1e6

#: RegMix (arXiv 2407.01492; its mixture_config/synthesize_mixture.py): the power of the reference, the strengths of
#: the Dirichlet distributions, how many times its reference a share may be, and what counts as no share.
TEMPER = 0.5
STRENGTHS = np.geomspace(0.1, 5.0, 15)
MOST_TIMES = 15.0
LEAST_SHARE = 2e-4
#: Candidates that are drawn at a time, and how often before one of them is moved to where it is allowed.
CANDIDATES, TRIES = 16, 64

#: What a number given for a source may be.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "floor": ("in [0, 1)", lambda value: 0 <= value < 1),
    "cap": ("in (0, 1]", lambda value: 0 < value <= 1),
    "fixed share": ("in [0, 1)", lambda value: 0 <= value < 1),
    "supply": ("> 0, of tokens", lambda value: 0 < value < math.inf),
    "max_epochs": ("> 0", lambda value: 0 < value < math.inf),
}


@dataclass(frozen=True, init=False, repr=False)
class Mixture(Parameter):
    """Shares of named sources; a value is a dictionary such as {"code": 0.5, "docs": 0.5}.

        Mixture("code", "docs", "web", floor={"code": 0.1}, cap=0.8, supply={"code": 2e9}, max_domains=2)

    `floor` and `cap` are the least and the largest share, of each source or by name; `fixed` holds shares that stay.
    `supply` holds the tokens that there are of a source, which a run may see `max_epochs` times (a number or by name):
    share * tokens <= supply * max_epochs. A source without an entry never ends. The caps that follow hold at one scale:
    `at` gives the mixture there; without it they are not enforced. At most `max_domains` sources are in use; those with
    a floor or a fixed share always are. `reference` is the mixture to start from, such as the natural proportions; it
    keeps to everything but `max_domains`, of which its largest shares are taken.

    The chart has one column for each of the `k` sources that are not fixed, z = ((w - floor) / free)^(1/3), where free
    is what floors and fixed shares leave. So the loss, which changes fastest where a share starts from nothing, is
    smoother in z than in w. Every z is read back as a mixture:
    - In use are sources with a floor and those of the largest z, `max_domains` together. When their caps cannot hold
      everything, those of the smallest z are exchanged for sources with the largest caps, no more than are needed.
    - w = min(cap, floor + t z^3) for these, with t such that the shares sum to one, which without caps in the way is
      t = free / sum(z^3).
    - t is at most 1e6 / max(z)^3; what is left then goes to all sources in use below their caps alike. Where all z
      are zero the shares are equal, as far as caps permit.
    Shares of exactly the floor and the cap are reached, and w is continuous in z, except where all z are zero and
    where other sources come into use.

    `sampling` is "regmix" (the default with a reference) or "uniform", see `quantile`.
    """

    names: tuple[str, ...]
    floors: tuple[float, ...]
    caps: tuple[float, ...]
    fixed: tuple[tuple[str, float], ...]
    supply: tuple[tuple[str, float], ...]
    max_epochs: tuple[tuple[str, float], ...]
    """One for each entry of `supply`."""
    max_domains: int | None
    reference: tuple[float, ...] | None
    sampling: str

    def __init__(
        self,
        *names: str,
        floor: float | Mapping[str, float] = 0.0,
        cap: float | Mapping[str, float] = 1.0,
        fixed: Mapping[str, float] | None = None,
        supply: Mapping[str, float] | None = None,
        max_epochs: float | Mapping[str, float] = MAX_EPOCHS,
        max_domains: int | None = None,
        reference: Mapping[str, float] | None = None,
        sampling: str | None = None,
    ) -> None:
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"A Mixture names its sources by texts, got {name!r}.")
            if names.count(name) > 1:
                raise ValueError(f"Mixture has the source {name!r} twice; each may be there once.")
        if len(names) < 2:
            raise ValueError(f"Mixture needs at least two sources, got {list(names)}; one source needs no shares.")
        put = object.__setattr__
        put(self, "names", names)
        floors, caps = _by_name("floor", names, floor), _by_name("cap", names, cap)
        put(self, "floors", tuple(floors.get(name, 0.0) for name in names))
        put(self, "caps", tuple(caps.get(name, 1.0) for name in names))
        put(self, "fixed", tuple(_by_name("fixed share", names, _mapping("fixed", fixed)).items()))
        put(self, "supply", tuple(_by_name("supply", names, _mapping("supply", supply)).items()))
        put(self, "max_epochs", tuple(self._epochs(max_epochs).items()))
        self._refuse_bounds()
        put(self, "max_domains", plain(max_domains))
        self._refuse_max_domains()
        start = None if reference is None else self._bounded("The reference of a Mixture", reference)
        put(self, "reference", None if start is None else tuple(start.values()))
        put(self, "sampling", ("uniform" if start is None else "regmix") if sampling is None else sampling)
        self._refuse_sampling()

    def _epochs(self, given: float | Mapping[str, float]) -> dict[str, float]:
        """The largest number of epochs of every source that has a supply."""
        supplied = [name for name, _ in self.supply]
        if isinstance(given, Mapping):
            without = [name for name in _by_name("max_epochs", self.names, given) if name not in supplied]
            if without:
                raise ValueError(f"Mixture has max_epochs for {without}, of which it has no supply; give their supply.")
            return {name: float(given.get(name, MAX_EPOCHS)) for name in supplied}
        if not supplied and given != MAX_EPOCHS:
            raise ValueError(
                f"Mixture has max_epochs={plain(given)!r} and no supply that it could limit; "
                "give supply={source: tokens}."
            )
        return _by_name("max_epochs", self.names, dict.fromkeys(supplied, given))

    def _refuse_bounds(self) -> None:
        fixed = dict(self.fixed)
        for name, floor, cap in zip(self.names, self.floors, self.caps, strict=True):
            if name in fixed and not floor <= fixed[name] <= cap:
                raise ValueError(
                    f"Mixture fixes {name!r} at {fixed[name]!r}, which is not between its floor {floor!r} and its cap "
                    f"{cap!r}; change one of them."
                )
            if name not in fixed and floor >= cap:
                raise ValueError(
                    f"Mixture needs a cap above the floor, got floor {floor!r} and cap {cap!r} for {name!r}; "
                    f"a share that stays is written fixed={{{name!r}: {floor!r}}}."
                )
        if len(self._open) < 2:
            raise ValueError(
                "Mixture needs at least two sources that are not fixed, "
                f"got {[self.names[i] for i in self._open]}; with fewer there is nothing to search."
            )
        if self.free < LEAST_FREE:
            what = "Floors and fixed shares" if fixed else "Floors"
            raise ValueError(f"{what} of a Mixture must leave at least 1e-6 to share, got a sum of {1 - self.free:g}.")
        most = math.fsum(high for _, high in self.bounds.values())
        if most < 1 + LEAST_FREE:
            raise ValueError(
                "Caps and fixed shares of a Mixture must sum to at least 1 + 1e-6, else there is nothing to choose, "
                f"got a sum of {most:g}; raise one of {dict(zip(self.names, self.caps, strict=True))}."
            )

    def _refuse_max_domains(self) -> None:
        count = self.max_domains
        if count is None:
            return
        if type(count) is not int or not 1 <= count <= len(self.names):
            raise ValueError(
                f"max_domains of a Mixture must be a whole number in [1, {len(self.names)}], got {count!r}."
            )
        always = [name for name, (low, _) in self.bounds.items() if low > 0]
        others = [self.names[i] for i in self._open if self.floors[i] == 0]
        if self._places < min(1, len(others)):
            raise ValueError(
                f"max_domains={count} of a Mixture leaves no place for {others}, since {always} always have a share; "
                "raise it."
                if others
                else f"max_domains={count} of a Mixture is too few for {always}, which always have a share; raise it."
            )
        if self.largest_sum < 1 - ROUNDING:
            raise ValueError(
                f"max_domains={count} of a Mixture is too few for its caps, which allow so many sources shares that "
                f"sum to {self.largest_sum:g}; raise it or the caps."
            )

    def _refuse_sampling(self) -> None:
        if self.sampling not in ("uniform", "regmix"):
            raise ValueError(f"sampling of a Mixture must be 'uniform' or 'regmix', got {self.sampling!r}.")
        if self.sampling == "uniform":
            return
        if self.reference is None:
            raise ValueError(
                "Mixture with sampling='regmix' draws mixtures around a reference and has none; "
                "give reference={source: share}, or leave sampling= out."
            )
        for i in self._open:
            if self.reference[i] == 0:
                raise ValueError(
                    f"The reference of a Mixture has no share of {self.names[i]!r}, so sampling='regmix' would never "
                    "give it one; give it a share, or write sampling='uniform'."
                )

    def __repr__(self) -> str:
        parts = list(map(repr, self.names))
        for what, values, default in (("floor", self.floors, 0.0), ("cap", self.caps, 1.0)):
            if len(set(values)) > 1:
                parts.append(f"{what}={ {n: v for n, v in zip(self.names, values, strict=True) if v != default} }")
            elif values[0] != default:
                parts.append(f"{what}={values[0]!r}")
        for what, pairs in (("fixed", self.fixed), ("supply", self.supply), ("max_epochs", self.max_epochs)):
            if pairs and not (what == "max_epochs" and all(epochs == MAX_EPOCHS for _, epochs in pairs)):
                parts.append(f"{what}={dict(pairs)}")
        if self.max_domains is not None:
            parts.append(f"max_domains={self.max_domains}")
        if self.reference is not None:
            parts.append(f"reference={dict(zip(self.names, self.reference, strict=True))}")
            if self.sampling != "regmix":
                parts.append(f"sampling={self.sampling!r}")
        return f"Mixture({', '.join(parts)})"

    @cached_property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The least and the largest share of each source; both are the share of one that is fixed."""
        fixed = dict(self.fixed)
        limits = zip(self.names, self.floors, self.caps, strict=True)
        return {name: (fixed.get(name, floor), fixed.get(name, cap)) for name, floor, cap in limits}

    @cached_property
    def free(self) -> float:
        """What floors and fixed shares leave to be shared."""
        return 1.0 - math.fsum(low for low, _ in self.bounds.values())

    @property
    def largest_sum(self) -> float:
        """The most that shares within their caps can sum to."""
        chosen = sorted((self.caps[i] for i in self._open if self.floors[i] == 0), reverse=True)[: self._places]
        return math.fsum([*chosen, *(high for low, high in self.bounds.values() if low > 0)])

    @cached_property
    def _open(self) -> list[int]:
        """The numbers of the `k` sources that are not fixed."""
        fixed = dict(self.fixed)
        return [i for i, name in enumerate(self.names) if name not in fixed]

    @cached_property
    def _open_floors(self) -> Array:
        return np.array(self.floors)[self._open]

    @cached_property
    def _open_caps(self) -> Array:
        return np.array(self.caps)[self._open]

    @cached_property
    def _least(self) -> Array:
        """The least share of each source."""
        return np.array([low for low, _ in self.bounds.values()])

    @cached_property
    def _places(self) -> int:
        """How many sources may be in use beside those that always are."""
        count = len(self.names) if self.max_domains is None else self.max_domains
        return count - sum(low > 0 for low, _ in self.bounds.values())

    def columns(self, path: str) -> tuple[Column, ...]:
        return tuple(
            Column(f"{path}.{self.names[i]}", path, "share", floor=self.floors[i], free=self.free, mixture=path)
            for i in self._open
        )

    def check(self, path: str, value: Any) -> dict[str, float]:
        shares = self._bounded(path, value)
        if self.max_domains is not None:
            used = [name for name, share in shares.items() if share > TOLERANCE]
            if len(used) > self.max_domains:
                raise ValueError(
                    f"{path} needs at most max_domains={self.max_domains} sources in use, got shares of {used}; "
                    f"leave {len(used) - self.max_domains} of them at 0."
                )
        return shares

    def _bounded(self, path: str, value: Any) -> dict[str, float]:
        """The shares, checked for everything but their number."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a dictionary with a share for each of {list(self.names)}, got {value!r}.")
        missing = [name for name in self.names if name not in value]
        unknown = [name for name in value if name not in self.bounds]
        if missing or unknown:
            wrong = f"a share for {unknown}{_nearest(unknown, self.names)}" if unknown else f"no share for {missing}"
            raise ValueError(f"{path} has {wrong}; it needs exactly {list(self.names)}.")
        shares = {}
        for name, (low, high) in self.bounds.items():
            share = plain(value[name])
            number = type(share) is float or is_number(share)
            if not number or share < 0 or not low - TOLERANCE <= share <= high + TOLERANCE:  # NaN fails the comparison
                raise ValueError(f"{path} needs {self._allowed(name, share)}, got {name}={share!r}.")
            shares[name] = float(share)
        total = math.fsum(shares.values())
        if abs(total - 1.0) > TOLERANCE:
            raise ValueError(
                f"{path} needs shares that sum to 1 (within 1e-9), got a sum of {total!r}; divide them by it."
            )
        return shares

    def _allowed(self, name: str, share: object) -> str:
        """What a wrong share would have to be."""
        low, high = self.bounds[name]
        if not is_number(share) or not math.isfinite(share) or share < 0:
            return "shares that are numbers >= 0"
        if name in dict(self.fixed):
            return f"{name} = {low!r}, where it is fixed"
        return f"{name} >= {low!r}, its floor" if share < low else f"{name} <= {high!r}, its cap"

    def encode(self, values: Sequence[Mapping[str, float]]) -> Array:
        names = [self.names[i] for i in self._open]
        w = np.array([[value[name] for name in names] for value in values], dtype=np.float64).reshape(-1, len(names))
        return self._encoded(w)

    def settled(self, x: Array) -> Array:
        return self.encoded(self.shares(x))

    def encoded(self, w: Array) -> Array:
        """Shares of all sources, n x len(names), to (n, k) columns."""
        # In the order of rows, as sums depend on it in the last bit.
        return self._encoded(np.ascontiguousarray(w[:, self._open]))

    def _encoded(self, w: Array) -> Array:
        p = np.maximum(w - self._open_floors, 0.0)  # n x k, a share may miss its floor by 1e-9
        z: Array = np.cbrt(p / p.sum(axis=1, keepdims=True))
        return z

    def decode(self, x: Array) -> list[dict[str, float]]:
        return [dict(zip(self.names, shares, strict=True)) for shares in self.shares(x).tolist()]

    def shares(self, x: Array, caps: Array | None = None) -> Array:
        """(n, k) columns to the shares of all sources, in their order: n x len(names).

        `caps`, n x len(names), holds other caps than the mixture's own, a row at a time; they must hold everything.
        """
        floors = self._open_floors
        tops = self._open_caps if caps is None else caps[:, self._open]
        room = np.maximum(np.broadcast_to(tops - floors, x.shape), 0.0)
        used = self._used(x, room, self.free)
        weights = _weights(x, used)
        p = self.free * (weights / weights.sum(axis=1, keepdims=True))  # n x k
        over = (p > room + ROUNDING).any(axis=1)
        if over.any():
            poured = _poured(weights[over], np.where(used, room, 0.0)[over], self.free)
            p[over] = np.where(poured < ROUNDING, 0.0, poured)  # rounding, which z would show magnified
        w = np.empty((len(x), len(self.names)))
        w[:] = self._least
        w[:, self._open] = np.where(p < room, floors + p, tops)
        return w

    def _used(self, z: Array, room: Array, mass: float) -> Mask:
        """Which sources that are not fixed are in use: n x k."""
        always = self._open_floors > 0
        used = np.ones(z.shape, dtype=np.bool_)
        if self._places >= np.count_nonzero(~always):
            return used
        # rank: 0 for the largest z; by_room: 0 for the largest room
        rank = np.argsort(np.argsort(np.where(always, np.inf, -z), axis=1, kind="stable"), axis=1)
        used = always | (rank < self._places)
        for taken in range(1, self._places + 1):
            short = np.flatnonzero(np.where(used, room, 0.0).sum(axis=1) < mass - ROUNDING)
            if not len(short):
                break
            kept = always | (rank[short] < self._places - taken)
            by_room = np.argsort(np.argsort(np.where(kept, np.inf, -room[short]), axis=1, kind="stable"), axis=1)
            used[short] = kept | (by_room < taken)
        return used

    @cached_property
    def limited(self) -> bool:
        binding = any(self.caps[i] < self.floors[i] + self.free for i in self._open)
        return binding or self._places < sum(self.floors[i] == 0 for i in self._open)

    def quantile(self, u: Array) -> Array:
        """Columns of mixtures drawn in the way of `sampling`.

        uniform: exponential variables over their sum are uniform on the simplex above the floors (Devroye 1986,
        theorem V.2.2). One beyond the caps, or of too many sources, is moved as every point is, so some have a share
        of exactly its cap.

        regmix: as RegMix draws its training mixtures (arXiv 2407.01492; mixture_config/synthesize_mixture.py): a
        Dirichlet distribution around the reference^0.5 shares what floors leave, its strength one of 15 log-spaced in
        [0.1, 5]; less than 2e-4 of that is nothing; mixtures with a share above min(1, 15 * reference), or above its
        cap, are drawn again. A row's numbers only seed the generator that draws it, so that this too is a function of
        the row alone. RegMix's rounding to multiples of 2e-4 and its removal of duplicates, which one row knows
        nothing of, are left out. Where 1024 draws are all refused the last one is moved to the caps, and may have more
        than 15 times its reference.
        """
        if self.sampling == "regmix":
            z = np.cbrt(self._around_reference(u))
        else:
            e = -np.log1p(-np.minimum(u, 1.0 - 2.0**-53))  # n x k
            total = e.sum(axis=1, keepdims=True)
            z = np.cbrt(np.where(total > 0, e / np.where(total > 0, total, 1.0), 1.0 / len(self._open)))
        return self.settled(z) if self.limited else z

    def _around_reference(self, u: Array) -> Array:
        """What shares of the free mass the drawn mixtures have: n x k."""
        assert self.reference is not None
        floors = self._open_floors
        reference = np.array(self.reference)[self._open]
        prior = reference**TEMPER / (reference**TEMPER).sum()
        most = (np.minimum(self._open_caps, MOST_TIMES * reference) - floors) / self.free
        p = np.empty_like(u)
        for row, seed in enumerate(np.ascontiguousarray(u, dtype="<f8").view("<u4")):
            rng = np.random.default_rng(seed)
            for _ in range(TRIES):
                strengths = STRENGTHS[rng.integers(len(STRENGTHS), size=CANDIDATES)]
                drawn = rng.standard_gamma(prior * strengths[:, None])
                drawn /= drawn.sum(axis=1, keepdims=True)  # gamma variables over their sum are Dirichlet
                drawn[(drawn < LEAST_SHARE) | ~self._used(drawn, np.ones_like(drawn), 1.0)] = 0.0
                drawn /= drawn.sum(axis=1, keepdims=True)
                allowed = np.flatnonzero((drawn <= most).all(axis=1))
                if len(allowed):
                    break
            p[row] = drawn[allowed[0] if len(allowed) else -1]
        return p

    def start(self, x: Array) -> Array:
        if self.reference is None:
            return x
        z = self.encode([dict(zip(self.names, self.reference, strict=True))])
        return np.repeat(self.settled(z) if self.limited else z, len(x), axis=0)

    def rounded(self, shares: Mapping[str, float], step: float = 0.01) -> dict[str, float]:
        """The nearest allowed mixture of whole multiples of `step`, by the sum of squared differences.

        With `max_domains`, the nearest that uses the largest of the shares as far as caps permit. ValueError for shares
        not allowed, for a step that does not divide 1, and when no such mixture is allowed.
        """
        parts = round(1 / step) if is_number(step) and 0 < step <= 1 else 0
        if abs(parts * step - 1) > TOLERANCE:
            raise ValueError(f"A mixture is rounded in steps that divide 1, such as 0.01 or 2e-4, got {plain(step)!r}.")
        wanted = np.array(list(self.check("The mixture to round", shares).values())) * parts  # in steps
        # Half the tolerance: what is found here has to pass `check` after a division too.
        low = np.array([math.ceil((low - TOLERANCE / 2) * parts) for low, _ in self.bounds.values()])
        high = np.array([math.floor((high + TOLERANCE / 2) * parts) for _, high in self.bounds.values()])
        if (low > high).any():
            name = self.names[int(np.argmax(low > high))]
            least, most = self.bounds[name]
            raise ValueError(
                f"No multiple of {step!r} is a share of {name!r}, which must be in [{least!r}, {most!r}]; "
                "take a finer step."
            )
        room = (high - low)[self._open].astype(np.float64)
        used = self._used(wanted[None, self._open], room[None], float(parts - low.sum()))[0]
        high[self._open] = np.where(used, high[self._open], low[self._open])
        if not low.sum() <= parts <= high.sum():
            raise ValueError(f"No allowed mixture has shares that are all multiples of {step!r}; take a finer step.")
        # Rounded one by one, then the cheapest steps that mend the sum: exact, as the squares are convex and separate.
        count = np.clip(np.rint(wanted), low, high)
        while missing := np.sign(parts - count.sum()):
            movable = count < high if missing > 0 else count > low
            count[np.argmax(np.where(movable, missing * (wanted - count), -np.inf))] += missing
        return dict(zip(self.names, (count / parts).tolist(), strict=True))

    @property
    def scale_axes(self) -> tuple[str, ...]:
        return ("tokens",) if self.supply else ()

    def largest_shares(self, scale: Mapping[str, float]) -> tuple[float, ...]:
        """The largest share of each source that its supply allows at this scale, infinity where it never ends."""
        epochs, supply = dict(self.max_epochs), dict(self.supply)
        return tuple(
            supply[name] * epochs[name] / scale["tokens"] if name in supply else math.inf for name in self.names
        )

    def at(self, path: str, scale: Mapping[str, float]) -> "Mixture":
        """The mixture without a supply, and with the caps that follow from it at this scale."""
        if not self.supply:
            return self
        tokens, limits = scale["tokens"], self.largest_shares(scale)
        for (name, (low, _)), limit in zip(self.bounds.items(), limits, strict=True):
            if low > limit + TOLERANCE:
                what = "fixed share" if name in dict(self.fixed) else "floor"
                raise ValueError(
                    f"{path} needs a {what} of {name!r} that its supply allows, at most {limit:g} in "
                    f"{dict(self.max_epochs)[name]:g} epochs at tokens={tokens:g}, got {low!r}; "
                    "lower it, or raise the supply or max_epochs."
                )
        caps = [min(cap, max(limit, floor)) for floor, cap, limit in zip(self.floors, self.caps, limits, strict=True)]
        mixture = self.with_fields(caps=tuple(caps), supply=(), max_epochs=())
        if mixture.largest_sum < 1 - 1e-12:
            capped = {name: limit for name, limit in zip(self.names, limits, strict=True) if limit < math.inf}
            raise ValueError(
                f"{path} needs caps that sum to at least 1, got {mixture.largest_sum:g} at tokens={tokens:g}, where "
                f"supply * max_epochs / tokens is {capped}; raise a supply or max_epochs, or train on fewer tokens."
            )
        if self.reference is None:
            return mixture
        # max_domains aside, as in the reference itself
        z = self.encode([dict(zip(self.names, self.reference, strict=True))])
        return mixture.with_fields(reference=tuple(mixture.with_fields(max_domains=None).shares(z)[0].tolist()))

    def with_fields(self, **changes: Any) -> "Mixture":
        """A copy with other values of fields; they are not checked."""
        copy: Mixture = object.__new__(Mixture)
        for field in fields(self):
            object.__setattr__(copy, field.name, changes.get(field.name, getattr(self, field.name)))
        return copy

    def to_json(self, value: Mapping[str, float]) -> dict[str, float]:
        return dict(value)


def _weights(z: Array, used: Mask) -> Array:
    """z^3 of the sources in use over the largest of them: n x k. Ones where all are zero."""
    z = np.where(used, z, 0.0)
    largest = z.max(axis=1, keepdims=True)  # n x 1
    # Dividing by the largest keeps z^3 from vanishing.
    weights: Array = np.where(largest > 0, z / np.where(largest > 0, largest, 1.0), used) ** 3
    return weights


def _poured(weights: Array, room: Array, mass: float) -> Array:
    """`mass` shared in proportion to the weights (n x k, the largest 1) as far as there is room, the rest alike."""
    most = np.minimum(room, STRETCH * weights)
    left = np.maximum(mass - most.sum(axis=1), 0.0)  # n
    even = _filled(np.ones_like(room), room - most, left)
    return np.where(left[:, None] > 0, most + even, _filled(weights, room, np.full(len(room), mass)))


def _filled(weights: Array, room: Array, mass: Array) -> Array:
    """min(room, t * weights) with the t for which a row sums to `mass` (n), all room when that is less: n x k.

    Sources are filled up in the order of room / weight. With the first j full, t is what they leave over the weights
    of the others; the first j for which source j + 1 is not full then is the right one.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = np.where(weights > 0, room / weights, np.inf)
        order = np.argsort(ratio, axis=1, kind="stable")
        rows = np.arange(len(order))[:, None]
        ratio, room, weights = ratio[rows, order], room[rows, order], weights[rows, order]
        full = np.zeros_like(room)
        np.cumsum(room[:, :-1], axis=1, out=full[:, 1:])  # of those before
        rest = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
        t = np.where(rest > 0, np.maximum(mass[:, None] - full, 0.0) / rest, 0.0)
        fits = t <= ratio
        first = np.where(fits.any(axis=1), fits.argmax(axis=1), room.shape[1])[:, None]
        t = t[rows, np.minimum(first, room.shape[1] - 1)]
        filled = np.where(np.arange(room.shape[1]) < first, room, np.minimum(room, t * weights))
    shares = np.empty_like(filled)
    shares[rows, order] = filled
    return shares


def _mapping(what: str, given: Mapping[str, float] | None) -> Mapping[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"Mixture needs {what} as a dictionary source -> number, got {given!r}.")
    return given or {}


def _by_name(what: str, names: tuple[str, ...], given: float | Mapping[str, float]) -> dict[str, float]:
    """What is given for all sources or by name, checked, in the order of the sources."""
    named = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    unknown = [name for name in named if name not in names]
    if unknown:
        raise ValueError(
            f"Mixture has a {what} for {unknown}{_nearest(unknown, names)}, which it does not mix; "
            f"its sources are {list(names)}."
        )
    allowed, holds = RANGES[what]
    for name, value in named.items():
        if not is_number(value) or not holds(value):
            raise ValueError(f"The {what} of a source must be a number {allowed}, got {plain(value)!r} for {name!r}.")
    return {name: float(named[name]) for name in names if name in named}


def _nearest(unknown: Sequence[object], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(unknown[0]), names, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
