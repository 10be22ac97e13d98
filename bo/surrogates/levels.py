"""The scales of the runs as a few levels, from small to large: for models that learn from one scale to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs


def below(S: Tensor, axes: int) -> Tensor:
    """Places (... x m) with another study an octave below the target, in place of a step away from it.

    axes: how many of the m are scale axes, which are the first; the others are 0, or 1 on the axis of a study.
    """
    return torch.cat([S[..., :axes], -S[..., axes:]], dim=-1)


@dataclass(frozen=True)
class Levels:
    """Which of L levels each of T places is of. places: T x m. level: T. target: the level of the target scale."""

    places: Tensor
    level: Tensor
    target: int

    @classmethod
    def of(cls, features: Features, inputs: Inputs, most: int, least: int) -> Levels:
        """Up to `most` levels of n runs, each but the target's of at least `least` runs, as far as there are as many.

        Scales are ordered by the octaves of all axes together, which is by the cost of a run where they are parameters
        and tokens; another study counts as an octave smaller. The target scale, or what is nearest to it, is a level by
        itself. Of the others the one with the fewest runs joins the nearer of its neighbours, until all are enough.
        """
        _, which, counts = torch.unique(inputs.cell, return_inverse=True, return_counts=True)
        runs, places = counts.tolist(), inputs.S.new_zeros(len(counts), inputs.S.shape[-1])
        places[which] = inputs.S
        octaves = below(places, len(features.axes)).sum(-1).tolist()
        order = sorted(range(len(places)), key=lambda i: (octaves[i], places[i].tolist()))
        nearest = min(order, key=lambda i: (float(places[i].abs().sum()), -octaves[i]))
        levels = [[i] for i in order]

        def size(level: list[int]) -> int:
            return sum(runs[i] for i in level)

        def middle(level: list[int]) -> float:
            return float(sum(runs[i] * octaves[i] for i in level) / size(level))

        while len(others := [level for level in levels if nearest not in level]) > 1:
            fewest = min(others, key=size)
            if len(levels) <= most and size(fewest) >= least:
                break
            k = others.index(fewest)
            beside = others[max(k - 1, 0) : k] + others[k + 1 : k + 2]
            joined = min(beside, key=lambda level: abs(middle(level) - middle(fewest)))
            joined += fewest
            levels.remove(fewest)
        level = torch.empty(len(places), dtype=torch.long)
        for k, members in enumerate(levels):
            level[members] = k
        return cls(places, level, int(level[nearest]))

    def __len__(self) -> int:
        return int(self.level.max()) + 1

    def __call__(self, at: Inputs) -> Tensor:
        """The level of each of b points, which is that of the nearest place that was run: b."""
        away = torch.cdist(at.S, self.places, p=1)  # b x T
        return self.level[away.argmin(-1)] if len(at) else self.level[:0]
