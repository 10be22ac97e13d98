"""What importing the study costs beside importing numpy alone: the median of interleaved fresh interpreters.

    python -m experiments.import_time

The limit is 0.2 s above numpy, in the same run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

LIMIT = 0.2  # seconds above numpy
RUNS = 15
STATEMENTS = {"numpy": "import numpy", "search_spaces": "import search_spaces", "bo": "import bo"}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(RUNS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    base = median(times["numpy"])
    for name, values in times.items():
        print(
            f"{name:<14} {median(values):.3f} s (range {min(values):.3f} to {max(values):.3f}), "
            f"{median(values) - base:+.3f} s"
        )
    slowest = max(median(values) - base for values in times.values())
    print(f"{'within' if slowest <= LIMIT else 'ABOVE'} the limit of {LIMIT} s above numpy")


if __name__ == "__main__":
    main()
