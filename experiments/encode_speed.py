"""Encoding and decoding 10,000 configs of a 40-dimensional space with mixtures, schedules, conditions and constraints.

    python -m experiments.encode_speed

The limit is 0.3 s for encode and decode together. Beside it, without a limit, the same with two inequalities: every
config is then tested, and the points that break one, more than half of those in a cube, are pulled inside.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from search_spaces import Choice, Integer, Mixture, Real, Schedule, Space

LIMIT = 0.3  # seconds
CONFIGS = 10_000
RUNS = 7

PARAMETERS = dict(
    **{f"rate{i}": Real(1e-5, 1e-1, log=True) for i in range(5)},
    **{f"share{i}": Real(0, 1) for i in range(5)},
    batch_size=Integer(16, 1024, log=True),
    accumulation=Integer(1, 16),
    layers=Choice(2, 4, 8, 16, ordered=True),
    activation=Choice("relu", "gelu", "silu"),
    data=Mixture(*"abcdefgh", floor=0.01, cap=0.5),
    schedule=Schedule("cosine", "linear", "wsd", "rex"),
    optimizer=Choice(
        {
            "adamw": {"lr": Real(1e-4, 1e-2, log=True), "beta": Real(0.9, 0.999), "decay": Real(0, 0.3)},
            "lion": {"lr": Real(2e-5, 2e-3, log=True), "beta": Real(0.9, 0.99), "decay": Real(0, 3)},
            "sgd": {"lr": Real(1e-2, 10, log=True), "momentum": Real(0, 0.99)},
        }
    ),
)


def padded(**more: object) -> Space:
    """The space with as many further numbers as make it 40-dimensional."""
    missing = 40 - len(Space(**PARAMETERS).columns)
    return Space(**PARAMETERS, **{f"extra{i}": Real(0, 1) for i in range(missing)}, **more)


def measure(space: Space) -> tuple[float, float]:
    """Median seconds to encode and to decode CONFIGS configs."""
    rng = np.random.default_rng(0)
    configs = space.sample(rng, CONFIGS)
    points = rng.random((CONFIGS, len(space.columns)))
    encode, decode = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        space.encode_all(configs)
        middle = time.perf_counter()
        space.decode_all(points)
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    return median(encode), median(decode)


def main() -> None:
    encode, decode = measure(padded())
    verdict = "within" if encode + decode <= LIMIT else "ABOVE"
    print(f"plain        encode {encode:.3f} s  decode {decode:.3f} s  {verdict} the limit of {LIMIT} s")
    encode, decode = measure(padded(constraints=["batch_size * accumulation <= 2048", "share0 + share1 <= 1"]))
    print(f"constrained  encode {encode:.3f} s  decode {decode:.3f} s")


if __name__ == "__main__":
    main()
