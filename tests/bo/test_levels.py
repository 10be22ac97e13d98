from __future__ import annotations

import torch
from torch import Tensor

from bo.surrogates.features import Features, Inputs
from bo.surrogates.levels import Levels
from search_spaces import Fidelity, Real, Space

SPACE = Space(
    x=Real(0.0, 1.0),
    fidelity=Fidelity(params=Real(1e5, 1e7), tokens=Real(1e6, 1e8), target={"params": 1e7, "tokens": 1e8}),
)
FEATURES = Features(SPACE)


def runs(*scales: tuple[int, list[float]]) -> Inputs:
    """So many runs at each place."""
    cell = torch.tensor([k for k, (count, _) in enumerate(scales) for _ in range(count)])
    return FEATURES(torch.full((len(cell), 1), 0.5, dtype=torch.float64), places(*(s for _, s in scales))[cell], cell)


def places(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_few_scales_are_a_level_each_from_small_to_large() -> None:
    inputs = runs((5, [0.0, 0.0]), (5, [-4.0, -1.0]), (5, [-1.0, -2.0]))
    levels = Levels.of(FEATURES, inputs, most=4, least=3)
    assert (len(levels), levels.target) == (3, 2)
    assert levels(inputs).tolist() == [2] * 5 + [0] * 5 + [1] * 5


def test_scales_with_few_runs_join_their_neighbours_and_the_target_stays_by_itself() -> None:
    inputs = runs((2, [-6.0, 0.0]), (9, [-5.0, 0.0]), (9, [-2.0, 0.0]), (1, [-1.5, 0.0]), (1, [0.0, 0.0]))
    levels = Levels.of(FEATURES, inputs, most=4, least=3)
    assert levels(inputs).tolist() == [0] * 11 + [1] * 10 + [2]


def test_there_are_no_more_levels_than_asked_for_where_every_run_has_its_own_scale() -> None:
    inputs = runs(*((1, [-10.0 + k / 4, 0.0]) for k in range(40)), (2, [0.0, 0.0]))
    levels = Levels.of(FEATURES, inputs, most=4, least=3)
    level = levels(inputs)
    assert len(levels) == 4
    assert torch.bincount(level)[:3].min() >= 3
    assert (level.diff() >= 0).all()


def test_without_runs_at_the_target_the_nearest_scale_is_its_level_and_that_of_all_beyond() -> None:
    inputs = runs((5, [-3.0, 0.0]), (5, [-1.0, 0.0]))
    levels = Levels.of(FEATURES, inputs, most=4, least=3)
    assert levels.target == 1
    beyond = FEATURES(torch.zeros(2, 1, dtype=torch.float64), places([0.0, 0.0], [2.0, 0.0]), torch.tensor([5, 6]))
    assert levels(beyond).tolist() == [1, 1]


def test_another_study_at_the_target_scale_comes_below_the_target() -> None:
    inputs = runs((4, [0.0, 0.0, 1.0]), (4, [0.0, 0.0, 0.0]), (4, [-3.0, 0.0, 0.0]))
    levels = Levels.of(FEATURES, inputs, most=4, least=3)
    assert levels(inputs).tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert levels.target == 2
