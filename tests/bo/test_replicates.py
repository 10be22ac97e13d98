from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bo import Minimize, dataset
from bo.acquisition import noisy_ei
from bo.acquisition.acquisition import Situation
from bo.policies.design import reproducible
from bo.policies.replicates import worth_repeating
from bo.ports import History
from bo.surrogates import composite
from bo.trial import Trial
from search_spaces import Integer, Scale, Space

GRID = Space(x=Integer(0, 9))


def situation(noise: float, xs: list[int]) -> Situation:
    trials = []
    for i, x in enumerate(xs):
        loss = 2 + 0.02 * (x - 4) ** 2 + noise * float(np.random.default_rng([i, 1]).standard_normal())
        trials.append(Trial(i, {"x": x}, Scale(), i, "bayes", status="finished", metrics={"loss": loss}))
    data = dataset.from_history(History(GRID, Minimize("loss"), tuple(trials)))
    with reproducible(np.random.default_rng(0)):
        belief = composite.fit(data).at(Scale())
    return Situation(GRID, belief, belief, data.X, data.X[:0], len(xs), 1.0, np.random.default_rng(0))


def point(x: int) -> torch.Tensor:
    return torch.as_tensor(GRID.encode({"x": x}))


ALL_BUT_ONE = [0, 1, 2, 3, 4, 5, 6, 7, 8] * 2


def test_under_noise_a_leader_is_run_again_before_what_cannot_be_the_best() -> None:
    here = situation(0.1, ALL_BUT_ONE)
    index = worth_repeating(here, point(9))
    assert index is not None
    assert index < 9  # the first run of a config stands for it
    assert abs(ALL_BUT_ONE[index] - 4) <= 3
    again, new = noisy_ei.make_evaluated(here)(torch.stack([here.tried[index], point(9)])).tolist()
    assert again > new


def test_a_new_config_that_may_well_be_the_best_comes_first() -> None:
    assert worth_repeating(situation(0.05, [0, 1, 2, 6, 7, 8, 9]), point(4)) is None


def test_without_noise_nothing_is_run_again() -> None:
    assert worth_repeating(situation(0.0, ALL_BUT_ONE), point(9)) is None


def test_what_runs_now_is_not_run_again_at_once() -> None:
    here = situation(0.1, ALL_BUT_ONE)
    index = worth_repeating(here, point(9))
    assert index is not None
    pending = here.tried[index][None]
    there = replace(here, believed=here.belief.believe(pending), pending=pending)
    next_one = worth_repeating(there, point(9))
    assert next_one is None or ALL_BUT_ONE[next_one] != ALL_BUT_ONE[index]


@pytest.mark.parametrize("n", [0, 1])
def test_there_is_nothing_to_choose_among_fewer_than_two(n: int) -> None:
    here = situation(0.1, ALL_BUT_ONE)
    assert worth_repeating(replace(here, tried=here.tried[:n]), point(9)) is None
