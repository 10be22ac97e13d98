"""Points that fill a space evenly at any number of them: scrambled Sobol sequences, and normal numbers made of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_spaces.parameter import Array

#: Sobol points may lie on the faces of the cube, where a normal quantile is infinite.
EDGE = 1e-12
#: Points of a sequence that are made at a time.
BLOCK = 512


def sobol_points(d: int, n: int, seed: int, first: int = 0) -> Array:
    """Points number first .. first + n - 1 of a scrambled Sobol sequence: n x d in [0, 1].

    Owen-scrambled points lie uniformly in each coordinate and fill it evenly at any length.
    """
    sobol: Any = torch.quasirandom.SobolEngine  # without types
    engine = sobol(d, scramble=True, seed=seed)
    engine.fast_forward(first)
    points: Array = engine.draw(n, dtype=torch.float64).clamp(0, 1).numpy()
    return points


def sequence_points(d: int, n: int, seed: int, first: int) -> Array:
    """`sobol_points` (n > 0) of a sequence that is gone through bit by bit: each costs the same however late it is."""
    blocks = [_block(d, seed, number) for number in range(first // BLOCK, (first + n - 1) // BLOCK + 1)]
    start = first % BLOCK
    points: Array = np.concatenate(blocks)[start : start + n]
    return points


@lru_cache(maxsize=4)
def _block(d: int, seed: int, number: int) -> Array:
    return sobol_points(d, BLOCK, seed, number * BLOCK)


def normal_points(k: int, s: int, seed: int) -> Tensor:
    """s points of k independent standard normals, by the quantiles of `sobol_points`: s x k. s: a power of two."""
    normal: Tensor = torch.special.ndtri(torch.as_tensor(sobol_points(k, s, seed)).clamp(EDGE, 1 - EDGE))
    return normal
