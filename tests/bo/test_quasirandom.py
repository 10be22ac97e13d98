from __future__ import annotations

import numpy as np
import torch

from bo.quasirandom import BLOCK, normal_points, sequence_points, sobol_points


def test_a_sobol_sequence_goes_on_where_it_stopped() -> None:
    whole = sobol_points(3, 12, seed=5)
    assert np.array_equal(whole[4:9], sobol_points(3, 5, seed=5, first=4))


def test_a_sequence_gone_through_bit_by_bit_has_the_same_points() -> None:
    for first, n in ((0, 1), (0, 3), (1, 1), (BLOCK - 2, 5), (BLOCK, 1), (1000, 3 * BLOCK), (99_999, 2)):
        assert np.array_equal(sequence_points(5, n, 7, first), sobol_points(5, n, 7, first))


def test_normal_points_are_finite_and_have_the_moments_of_independent_standard_normals() -> None:
    normal = normal_points(4, 1024, seed=3)
    assert normal.shape == (1024, 4)
    assert torch.isfinite(normal).all()
    assert torch.allclose(normal.mean(0), torch.zeros(4, dtype=torch.float64), atol=0.01)
    assert torch.allclose(normal.T @ normal / len(normal), torch.eye(4, dtype=torch.float64), atol=0.03)
