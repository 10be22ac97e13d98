from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import Minimize, dataset
from bo.acquisition.environment import AveragedBelief, Environments, widened
from bo.acquisition.log_ei import log_ei
from bo.optimize import maximise
from bo.policies.design import reproducible
from bo.policies.engine import Engine
from bo.policies.recommendation import recommend
from bo.ports import History
from bo.surrogates import composite
from bo.surrogates.composite import Belief
from bo.trial import Trial
from search_spaces import Choice, Integer, Real, Scale, Space

SPACE = Space(x=Real(0, 1), data=Choice("a", "b", "c"), seed=Choice(0, 1))
LINE = Space(x=Real(0, 1), data=Choice("a", "b", "c"))
OVER = {"data": {"a": 0.5, "c": 0.25}, "seed": {"0": 3, "1": 1}}
CENTRES = {"a": 0.1, "b": 0.5, "c": 0.9}


def loss(config: dict[str, Any]) -> float:
    """A bowl with another centre on each data set: the average is best where no single one is."""
    return 2 + (config["x"] - CENTRES[config["data"]]) ** 2 + 0.05 * config.get("seed", 0)


def told(space: Space, configs: list[dict[str, Any]]) -> History:
    trials = [
        Trial(i, c, Scale(), 0, "bayes", status="finished", metrics={"loss": loss(c)}) for i, c in enumerate(configs)
    ]
    return History(space, Minimize("loss"), tuple(trials))


def believed(space: Space, n: int = 14) -> Belief:
    history = told(space, space.sample(np.random.default_rng(0), n))
    with reproducible(np.random.default_rng(0)):
        return composite.fit(dataset.from_history(history)).at(space.top)


def points(space: Space, n: int, seed: int = 1) -> Tensor:
    return torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(seed), n)))


def test_environments_are_all_combinations_with_the_product_of_their_weights() -> None:
    environments = Environments.of(SPACE, OVER)
    assert [dict(options) for options in environments.options] == [
        {"data": "a", "seed": 0},
        {"data": "a", "seed": 1},
        {"data": "c", "seed": 0},
        {"data": "c", "seed": 1},
    ]
    assert environments.weights.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 4, 1 / 12])
    config = {"x": 0.3, "data": "b", "seed": 1}
    everywhere = environments.everywhere(torch.as_tensor(SPACE.encode(config)))
    assert SPACE.decode_all(everywhere.numpy()) == [{**config, **options} for options in environments.options]
    assert environments.heaviest == 0


def test_the_average_has_the_moments_of_the_weighted_sum() -> None:
    belief, environments = believed(SPACE), Environments.of(SPACE, OVER)
    averaged, X, Z = AveragedBelief.over(belief, environments), points(SPACE, 5), points(SPACE, 3, 2)
    E, weights = 4, environments.weights
    everything = torch.cat(
        [environments.everywhere(X).reshape(5 * E, -1), environments.everywhere(Z).reshape(3 * E, -1)]
    )
    mean, covariance = belief.joint(everything[None])
    rows = torch.block_diag(*[weights[None]] * 8)  # 8 x 32: averages of what is at the points
    expected, spread = rows @ mean[0], rows @ covariance[0] @ rows.T
    assert torch.allclose(averaged.value(X)[0], expected[:5])
    assert torch.allclose(averaged.value(X)[1].square(), spread.diagonal()[:5])
    assert torch.allclose(averaged.covariance(X, Z), spread[:5, 5:], atol=1e-12)
    joint, between = averaged.joint(torch.cat([X, Z])[None])
    assert torch.allclose(joint[0], expected)
    assert torch.allclose(between[0], spread, atol=1e-12)
    assert float(averaged.noise) == pytest.approx(float(belief.noise * weights.square().sum()))


def test_the_environment_of_a_point_does_not_matter_to_the_average() -> None:
    environments = Environments.of(SPACE, OVER)
    averaged, X = AveragedBelief.over(believed(SPACE), environments), points(SPACE, 6)
    for here, there in zip(averaged.value(X), averaged.value(environments.put(X, 3)), strict=True):
        assert torch.equal(here, there)


def test_what_is_believed_of_one_environment_changes_no_mean_and_shrinks_the_variance_of_the_average() -> None:
    averaged, X = AveragedBelief.over(believed(SPACE, 6), Environments.of(SPACE, OVER)), points(SPACE, 1)
    after = averaged.believe(X)
    assert float(after.value(X)[0]) == pytest.approx(float(averaged.value(X)[0]), rel=1e-6)
    assert float(after.value(X)[1]) < float(averaged.value(X)[1])


def test_what_a_run_explains_of_the_average_equals_conditioning_on_it() -> None:
    belief, environments = believed(SPACE, 6), Environments.of(SPACE, OVER)
    averaged, X = AveragedBelief.over(belief, environments), points(SPACE, 3)
    found = averaged.explained(X)
    for b, at in enumerate(environments.everywhere(X)):
        K = belief.joint(at[None])[1][0].numpy()
        w = environments.weights.numpy()
        for e in range(len(w)):
            after = K - np.outer(K[:, e], K[e]) / (K[e, e] + float(belief.noise))
            assert float(found[b, e]) == pytest.approx(w @ K @ w - w @ after @ w, rel=1e-6)


def test_the_next_run_is_in_the_environment_that_tells_most_per_cost() -> None:
    history = told(LINE, [{"x": x, "data": data} for x in (0.0, 0.3, 0.6, 0.9) for data in ("a", "b")])
    with reproducible(np.random.default_rng(0)):
        belief = composite.fit(dataset.from_history(history)).at(Scale())
    averaged = AveragedBelief.over(belief, Environments.of(LINE, {"data": {"a": 1, "b": 1, "c": 1}}))
    x = torch.as_tensor(LINE.encode({"x": 0.4, "data": "a"}))
    assert LINE.decode(averaged.most_telling(x))["data"] == "c"
    dear = torch.tensor([1.0, 2.0, 1e9], dtype=torch.float64)
    assert LINE.decode(averaged.most_telling(x, dear))["data"] == "a"


def test_runs_in_single_environments_find_the_best_average() -> None:
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    best = sum(weight * CENTRES[data] for data, weight in weights.items())  # 0.4, the best of no single one
    rng = np.random.default_rng(0)
    configs = LINE.sample(rng, 4)
    environments = Environments.of(LINE, {"data": weights})
    with reproducible(rng):
        while len(configs) < 14:
            data = widened(dataset.from_history(told(LINE, configs)))
            averaged = AveragedBelief.over(composite.fit(data).at(Scale()), environments)
            incumbent = averaged.value(data.X)[0].max()
            found = maximise(lambda X, b=averaged, i=incumbent: log_ei(*b.value(X), i), LINE, data.X, data.X, rng)
            configs.append(LINE.decode(averaged.most_telling(found.x)))
    assert {config["data"] for config in configs} == set(weights)
    found = recommend(
        told(LINE, configs), Scale(), np.random.default_rng(0), engine=Engine(average_over={"data": weights})
    )
    assert found.config["x"] == pytest.approx(best, abs=0.03)
    assert found.config["data"] == "a"
    assert "most weight, data=a" in (found.note or "")
    truth = sum(weight * loss({"x": found.config["x"], "data": data}) for data, weight in weights.items())
    assert found.low is not None
    assert found.high is not None
    assert found.low < truth < found.high


@pytest.mark.parametrize(
    ("over", "wrong"),
    [
        ({}, "dictionary"),
        ({"x": {"a": 1}}, "Choice of plain values"),
        ({"nothing": {"a": 1}}, "Choice of plain values"),
        ({"data": {"d": 1}}, "options of 'data'"),
        ({"data": {"a": -1}}, "at least 0"),
        ({"data": {"a": math.nan}}, "finite"),
        ({"data": {"a": 0}}, "above 0"),
    ],
)
def test_what_cannot_be_averaged_over_is_refused(over: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Environments.of(SPACE, over)


def test_a_choice_of_sub_spaces_is_no_environment_and_something_must_be_left_to_choose() -> None:
    space = Space(optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {}}), layers=Integer(1, 4))
    with pytest.raises(ValueError, match="plain values"):
        Environments.of(space, {"optimizer": {"adamw": 1}})
    with pytest.raises(ValueError, match="nothing to choose"):
        Environments.of(Space(data=Choice("a", "b")), {"data": {"a": 1, "b": 1}})
