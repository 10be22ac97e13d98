from __future__ import annotations

import numpy as np
import torch

from bo.quasirandom import normal_points, sobol_points


def test_a_sobol_sequence_goes_on_where_it_stopped() -> None:
    whole = sobol_points(3, 12, seed=5)
    assert np.array_equal(whole[4:9], sobol_points(3, 5, seed=5, first=4))


def test_normal_points_are_finite_and_have_the_moments_of_independent_standard_normals() -> None:
    normal = normal_points(4, 1024, seed=3)
    assert normal.shape == (1024, 4)
    assert torch.isfinite(normal).all()
    assert torch.allclose(normal.mean(0), torch.zeros(4, dtype=torch.float64), atol=0.01)
    assert torch.allclose(normal.T @ normal / len(normal), torch.eye(4, dtype=torch.float64), atol=0.03)
