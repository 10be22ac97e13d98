"""Objectives: weights of a minimised sum, with the user's sign outside."""

import math

import pytest

from bo import Maximize, Minimize, WeightedSum
from bo.objective import from_json, to_json


@pytest.mark.parametrize(
    "objective", [Minimize("loss"), Maximize("acc"), WeightedSum({"a": 0.25, "b": -2.0})], ids=repr
)
def test_an_objective_survives_json(objective):
    assert from_json(to_json(objective)) == objective


def test_values_are_minimised_and_shown_in_the_users_sign():
    assert Minimize("loss").value({"loss": 2.0}) == 2.0
    assert Maximize("acc").value({"acc": 0.9}) == -0.9
    assert Maximize("acc").shown(-0.9) == 0.9
    assert WeightedSum({"a": 0.5, "b": 2.0}).value({"a": 1.0, "b": 3.0, "c": 9.0}) == 6.5


def test_a_metric_that_is_not_a_number_makes_the_value_not_finite():
    assert not math.isfinite(WeightedSum({"a": 0.5, "b": 2.0}).value({"a": math.nan, "b": 3.0}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Minimize(""), "Minimize needs the name of a metric, got ''"),
        (lambda: Maximize(3), "Maximize needs the name of a metric, got 3"),
        (lambda: WeightedSum({}), "at least one metric"),
        (lambda: WeightedSum(["a"]), "dictionary"),
        (lambda: WeightedSum({"a": 0.0}), "finite weight other than 0 for 'a', got 0.0"),
        (lambda: WeightedSum({"a": math.inf}), "got inf"),
        (lambda: WeightedSum({"a": True}), "got True"),
        (lambda: Minimize("loss").value({"los": 1.0}), r"no metric \['loss'\].*it has \['los'\]"),
        (lambda: from_json({"kind": "median", "terms": "x"}), "Unknown kind of objective 'median'"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
