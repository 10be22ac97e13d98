"""Do small runs help? Mixtures of RedPajama's seven sources, 70M to 410M parameters, replayed from published tables.

    python -m experiments.replay.mixing_laws --tables DIR [--seeds 12] [--workers 2] [--results FILE]

DIR/mixinglaws has 20 to 42 runs a size (Data Mixing Laws, arXiv 2403.16952). A target is a size with two smaller ones
and one of two objectives, the mean of 22 losses or a weighted one, as an emulator over the simplex; all smaller sizes
are its cells. With so few runs behind an emulator this shows what is made of its surface, hardly what is so of
RedPajama. Regret is noise-free and in percent above the least loss. See searches.py for the settings, the methods and
the other options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.replay import searches

SIZES = ("70M", "160M", "305M", "410M")
CHEAPER = 2
OBJECTIVES = ("mean_loss", "weighted_loss")


@dataclass(frozen=True)
class Target:
    objective: str
    sizes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"RedPajama {self.objective} {self.sizes[-1]}"

    def inner(self, blackbox: Any) -> Any:
        found = blackbox._mixlaw("RedPajama", self.objective, sizes=self.sizes, pool=False)
        found.name = self.name  # what a disguise is drawn from
        return found


def targets(blackbox: Any, most: int | None) -> Sequence[Target]:
    families = {each: [Target(each, SIZES[:n]) for n in range(1 + CHEAPER, len(SIZES) + 1)] for each in OBJECTIVES}
    return searches.spread(families, most)


if __name__ == "__main__":
    searches.run(__doc__, "replay_mixing_laws.jsonl", targets)
