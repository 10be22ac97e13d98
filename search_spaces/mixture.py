"""Mixture: the shares of named data sources, none below its floor, together one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_spaces.parameter import Array, Column, Parameter, is_number, plain

TOLERANCE = 1e-9
LEAST_FREE = 1e-6  # well above the tolerance: else rounding alone could decide the shares


@dataclass(frozen=True, init=False, repr=False)
class Mixture(Parameter):
    """Shares of `k` sources; a value is a dictionary such as {"code": 0.5, "docs": 0.5}.

    `floor` is the least share, of each source or by name: `Mixture("code", "docs", floor={"code": 0.1})`.

    The chart has one column a source, z = ((w - floor) / (1 - sum of floors))^(1/3), and reads any z back as
    w = floor + (1 - sum of floors) z^3 / sum(z^3), equal shares where all are zero. So every point of the cube is a
    mixture, shares of exactly the floor are reached, and the loss, which changes fastest where a share starts from
    nothing, is smoother in z than in w. Shares are drawn uniformly from the simplex above the floors.
    """

    names: tuple[str, ...]
    floors: tuple[float, ...]

    def __init__(self, *names: str, floor: float | Mapping[str, float] = 0.0) -> None:
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"A Mixture names its sources by texts, got {name!r}.")
            if names.count(name) > 1:
                raise ValueError(f"Mixture has the source {name!r} twice; each may be there once.")
        if len(names) < 2:
            raise ValueError(f"Mixture needs at least two sources, got {list(names)}; one source needs no shares.")
        if isinstance(floor, Mapping):
            unknown = [name for name in floor if name not in names]
            if unknown:
                raise ValueError(
                    f"Mixture has a floor for {unknown}, which it does not mix; its sources are {list(names)}."
                )
            floors = [floor.get(name, 0.0) for name in names]
        else:
            floors = [floor] * len(names)
        for least in floors:
            if not is_number(least) or not 0 <= least < 1:
                raise ValueError(f"A floor of a Mixture must be a number in [0, 1), got {plain(least)!r}.")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "floors", tuple(map(float, floors)))
        if self.free < LEAST_FREE:
            raise ValueError(f"Floors of a Mixture must leave at least 1e-6 to share, got a sum of {sum(floors):g}.")

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.names))
        return f"Mixture({names}, floor={dict(zip(self.names, self.floors, strict=True))})"

    @property
    def free(self) -> float:
        """What the floors leave to be shared."""
        return 1.0 - math.fsum(self.floors)

    def columns(self, path: str) -> tuple[Column, ...]:
        shares = zip(self.names, self.floors, strict=True)
        return tuple(Column(f"{path}.{name}", path, "share", floor=floor) for name, floor in shares)

    def check(self, path: str, value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a dictionary with a share for each of {list(self.names)}, got {value!r}.")
        missing = [name for name in self.names if name not in value]
        unknown = [name for name in value if name not in self.names]
        if missing or unknown:
            wrong = f"no share for {missing}" if missing else f"a share for {unknown}"
            raise ValueError(f"{path} has {wrong}; it needs exactly {list(self.names)}.")
        for name, floor in zip(self.names, self.floors, strict=True):
            share = value[name]
            if not is_number(share) or not math.isfinite(share) or share < 0:
                raise ValueError(f"{path} needs shares that are numbers >= 0, got {name}={plain(share)!r}.")
            if share < floor - TOLERANCE:
                raise ValueError(f"{path} needs {name} >= {floor!r}, its floor, got {name}={plain(share)!r}.")
        shares = {name: float(value[name]) for name in self.names}
        total = math.fsum(shares.values())
        if abs(total - 1.0) > TOLERANCE:
            raise ValueError(
                f"{path} needs shares that sum to 1 (within 1e-9), got a sum of {total!r}; divide them by it."
            )
        return shares

    def encode(self, values: Sequence[Mapping[str, float]]) -> Array:
        w = np.array([[value[name] for name in self.names] for value in values], dtype=np.float64)
        p = np.maximum(w.reshape(-1, len(self.names)) - self.floors, 0.0)  # n x k, a share may miss its floor by 1e-9
        z: Array = np.cbrt(p / p.sum(axis=1, keepdims=True))
        return z

    def decode(self, x: Array) -> list[dict[str, float]]:
        largest = x.max(axis=1, keepdims=True)  # n x 1
        # Dividing by the largest keeps z^3 from vanishing; where all are zero the shares are equal.
        cubes = np.where(largest > 0, x / np.where(largest > 0, largest, 1.0), 1.0) ** 3
        w = np.array(self.floors) + self.free * (cubes / cubes.sum(axis=1, keepdims=True))  # n x k
        return [dict(zip(self.names, shares, strict=True)) for shares in w.tolist()]

    def quantile(self, u: Array) -> Array:
        """Exponential variables over their sum are uniform on the simplex (Devroye 1986, theorem V.2.2)."""
        e = -np.log1p(-np.minimum(u, 1.0 - 2.0**-53))  # n x k
        total = e.sum(axis=1, keepdims=True)
        shares = np.where(total > 0, e / np.where(total > 0, total, 1.0), 1.0 / len(self.names))
        z: Array = np.cbrt(shares)
        return z

    def to_json(self, value: Mapping[str, float]) -> dict[str, float]:
        return dict(value)
