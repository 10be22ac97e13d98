"""Do small runs help? Learning-rate schedules, 25M to 100M parameters, by the published multi-power law.

    python -m experiments.replay.schedules --tables DIR [--seeds 12] [--workers 2] [--results FILE]

The law (arXiv 2503.12811, in blackbox.py of DIR) gives the loss over where the decay starts, how low and with which
power it goes, and a plateau half way. The target is 100M parameters and a number of steps; the cell below it has 25M
parameters and as many steps, at a quarter of the operations. There is one target, so intervals are of seeds alone.
Regret is noise-free and in percent above the least loss that a long random search finds. See searches.py for the
settings, the methods and the other options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.replay import searches

STEPS = (24000,)


@dataclass(frozen=True)
class Target:
    steps: int

    @property
    def name(self) -> str:
        return f"schedule {self.steps // 1000}k"

    def inner(self, blackbox: Any) -> Any:
        return blackbox.Schedule(self.name, totals=(self.steps,))


def targets(blackbox: Any, most: int | None) -> Sequence[Target]:
    return searches.spread({"schedule": [Target(steps) for steps in STEPS]}, most)


if __name__ == "__main__":
    searches.run(__doc__, "replay_schedules.jsonl", targets)
