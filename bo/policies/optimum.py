"""Where the best configuration of a scale may lie: samples of it from the posterior."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bo.acquisition.samples import joint, nearby
from bo.optimize import same, settle
from bo.quasirandom import sobol_points
from bo.surrogates.composite import Composite
from bo.surrogates.drift import drawn
from bo.surrogates.scale_shift import ScaleShiftGP
from search_spaces import Scale, Space

#: Drifts that are drawn, and samples of the optimum for each.
DRIFTS, EACH = 24, 8
#: Samples among which a cover is chosen.
COVERED = 64
#: Points at which the objective is sampled: all over the space, then near where the optimum was.
POINTS = 256


@dataclass(frozen=True)
class Optimum:
    """k samples of the best point of a scale (k x d), and how much worse than it one point was in each (k).

    shortfall: in units of the objective, of the point that was asked about. members: the models that were sampled.
    """

    space: Space
    at: Scale
    points: Tensor
    shortfall: Tensor
    members: tuple[Composite, ...]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of the numbers that vary in the best configuration, in user units, by path: `data.code`."""
        values: dict[str, list[float]] = {}
        for config in self.space.decode_all(self.points.numpy()):
            for path, value in leaves(self.space.to_json(config)):
                if not isinstance(value, str):
                    values.setdefault(path, []).append(float(value))
        half = len(self.points) / 2
        found = {path: np.quantile(each, [0.05, 0.95]) for path, each in values.items() if len(each) >= half}
        return {path: (float(low), float(high)) for path, (low, high) in found.items() if low < high}

    def cover(self, x: Tensor, count: int, rng: np.random.Generator, taken: Tensor) -> Tensor:
        """x (d,) and more points, up to count x d, of which the best is expected to be as good as can be.

        Each is the sample that adds most to those before it; none is there twice or among those taken (r x d).
        """
        others = settle(self.space, self.points[torch.as_tensor(rng.permutation(len(self.points))[:COVERED])])
        Z, values = torch.cat([x[None], others]), []
        for member in self.members:
            mean, root = joint(member.at(self.at), Z)
            values.append(mean[:, None] + root @ torch.as_tensor(rng.standard_normal((len(Z), EACH))))
        F = torch.cat(values, dim=-1)  # k x samples
        chosen = [0]
        while len(chosen) < count and (new := ~same(Z, torch.cat([Z[chosen], taken]))).any():
            chosen.append(int(torch.where(new, torch.maximum(F, F[chosen].amax(0)).mean(-1), -torch.inf).argmax()))
        return Z[chosen]

    def options(self) -> dict[str, dict[str, float]]:
        """Of every choice, how likely each option is the best, by the path of the choice."""
        counts: dict[str, Counter[str]] = {}
        for config in self.space.decode_all(self.points.numpy()):
            for path, value in leaves(self.space.to_json(config)):
                if isinstance(value, str):
                    counts.setdefault(path, Counter())[value] += 1
        return {
            path: {option: n / len(self.points) for option, n in each.most_common()} for path, each in counts.items()
        }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float | str]]:
    """The numbers and words of a config as JSON has it, with their paths."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        yield path, value


def sampled(model: Composite, at: Scale, x: Tensor, rng: np.random.Generator) -> Optimum:
    """Samples of the best point of a scale, and how far x (d,) falls short of it.

    Each has a drift of its own where the model has drifts. The objective is sampled over points all over the space,
    then over some nearer to where the best of them were. NumericalError where a covariance cannot be factorised.
    """
    space = model.data.space.at(at)
    members = drawn(model.gp, DRIFTS) if isinstance(model.gp, ScaleShiftGP) and model.gp.layout.across else (model.gp,)
    models = tuple(replace(model, gp=member) for member in members)
    each = DRIFTS * EACH // len(members)
    wide = space.draw(lambda first, n: sobol_points(len(space.columns), n, int(rng.integers(2**31)), first), 0, POINTS)
    normal = rng.standard_normal((2, len(members), 2 * POINTS + 1, each))
    told = model.data.X.numpy()
    centres = np.concatenate([np.tile(x.numpy(), (POINTS // 2, 1)), told[rng.integers(len(told), size=POINTS // 2)]])
    Z = [torch.as_tensor(np.concatenate([wide, allowed(space, nearby(space, centres, rng))]))] * len(members)
    for step in range(2):
        best, short = [], []
        for member, points, draws in zip(models, Z, normal[step], strict=True):
            every = torch.cat([points, x[None]])
            mean, root = joint(member.at(at), every)
            values = mean[:, None] + root @ torch.as_tensor(draws[: len(every)])  # k x each
            top = values.argmax(0)
            best.append(every[top])
            short.append(values.max(0).values - values[-1])
        if step == 0:
            Z = [
                torch.as_tensor(
                    np.concatenate(
                        [wide, allowed(space, nearby(space, tops[rng.integers(len(tops), size=POINTS)].numpy(), rng))]
                    )
                )
                for tops in best
            ]
    return Optimum(space, at, torch.cat(best), torch.cat(short), models)


def allowed(space: Space, points: np.ndarray) -> np.ndarray:
    """The points as the space of one scale reads them; without those that its constraints forbid."""
    points = points.copy()
    points[~space.active(points)] = 0.5
    points = space.repair(points)
    return points[space.satisfies(space.decode_all(points))] if space.constraints else points
