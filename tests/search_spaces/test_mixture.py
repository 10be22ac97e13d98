import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import Mixture


@st.composite
def mixtures(draw):
    k = draw(st.integers(2, 8))
    weights = draw(st.lists(st.floats(0, 1), min_size=k, max_size=k))
    free = draw(st.floats(0.01, 1))
    total = sum(weights) or 1.0
    names = [f"s{i}" for i in range(k)]
    return Mixture(*names, floor={n: (1 - free) * w / total for n, w in zip(names, weights, strict=True)})


@st.composite
def mixtures_with_points(draw):
    mixture = draw(mixtures())
    coordinate = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-300, 1e-120])
    return mixture, np.array([draw(st.tuples(*[coordinate] * len(mixture.names)))])


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mixtures_with_points())
def test_every_point_decodes_to_shares_above_their_floors_that_sum_to_one(case):
    mixture, x = case
    (value,) = mixture.decode(x)
    assert abs(math.fsum(value.values()) - 1) <= 1e-12
    assert all(value[name] >= floor for name, floor in zip(mixture.names, mixture.floors, strict=True))
    assert mixture.check("data", value) == value


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mixtures_with_points())
def test_shares_come_back_within_1e_9(case):
    mixture, x = case
    (value,) = mixture.decode(x)
    encoded = mixture.encode([value])
    assert ((encoded >= 0) & (encoded <= 1)).all()
    (again,) = mixture.decode(encoded)
    assert all(abs(again[name] - value[name]) <= 1e-9 for name in mixture.names)


def test_a_share_of_nothing_is_reached_exactly():
    mixture = Mixture("a", "b", "c")
    corner = {"a": 0.0, "b": 1.0, "c": 0.0}
    assert mixture.encode([corner]).tolist() == [[0.0, 1.0, 0.0]]
    assert mixture.decode(np.array([[0.0, 1.0, 0.0], [0.0, 0.3, 0.0]])) == [corner, corner]


def test_all_zero_coordinates_mean_equal_shares():
    assert Mixture("a", "b").decode(np.zeros((1, 2))) == [{"a": 0.5, "b": 0.5}]


def test_a_coordinate_is_the_cube_root_of_the_free_share():
    mixture = Mixture("a", "b", floor=0.1)
    assert np.allclose(mixture.encode([{"a": 0.2, "b": 0.8}]), np.cbrt([[0.1 / 0.8, 0.7 / 0.8]]), rtol=1e-14)


def test_uniform_numbers_become_uniform_on_the_simplex():
    mixture = Mixture("a", "b", "c", "d")
    u = np.random.default_rng(0).random((40_000, 4))
    w = mixture.quantile(u) ** 3
    assert np.allclose(w.sum(axis=1), 1, atol=1e-12)
    # A Dirichlet(1, 1, 1, 1): E w = 1/4, E w^2 = 2/20, E w_a w_b = 1/20, P(w > 1/2) = (1/2)^3.
    assert np.allclose(w.mean(axis=0), 1 / 4, atol=0.005)
    assert np.allclose((w**2).mean(axis=0), 1 / 10, atol=0.005)
    assert np.allclose((w[:, 0] * w[:, 1]).mean(), 1 / 20, atol=0.002)
    assert np.allclose((w > 0.5).mean(axis=0), 1 / 8, atol=0.01)


def test_the_ends_of_the_uniform_numbers_are_allowed():
    z = Mixture("a", "b").quantile(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    assert np.allclose(z**3, [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])


def test_a_share_that_misses_its_floor_by_rounding_is_accepted():
    mixture = Mixture("a", "b", floor=0.02)
    value = mixture.check("data", {"a": 0.02 - 1e-12, "b": 0.98 + 1e-12})
    (again,) = mixture.decode(mixture.encode([value]))
    assert abs(again["a"] - 0.02) < 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture("a"), "Mixture needs at least two sources, got ['a']; one source needs no shares."),
        (lambda: Mixture("a", 3), "A Mixture names its sources by texts, got 3."),
        (lambda: Mixture("a", "a"), "Mixture has the source 'a' twice; each may be there once."),
        (lambda: Mixture("a", "b", floor=-0.1), "A floor of a Mixture must be a number in [0, 1), got -0.1."),
        (lambda: Mixture("a", "b", floor=True), "A floor of a Mixture must be a number in [0, 1), got True."),
        (
            lambda: Mixture("a", "b", floor=0.5),
            "Floors of a Mixture must leave at least 1e-6 to share, got a sum of 1.",
        ),
        (
            lambda: Mixture("a", "b", floor={"c": 0.1}),
            "Mixture has a floor for ['c'], which it does not mix; its sources are ['a', 'b'].",
        ),
    ],
)
def test_a_wrong_mixture_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "data must be a dictionary with a share for each of ['a', 'b'], got 0.5."),
        ({"a": 1.0}, "data has no share for ['b']; it needs exactly ['a', 'b']."),
        ({"a": 0.5, "b": 0.5, "c": 0.0}, "data has a share for ['c']; it needs exactly ['a', 'b']."),
        ({"a": -0.5, "b": 1.5}, "data needs shares that are numbers >= 0, got a=-0.5."),
        ({"a": math.nan, "b": 0.5}, "data needs shares that are numbers >= 0, got a=nan."),
        ({"a": True, "b": 0.5}, "data needs shares that are numbers >= 0, got a=True."),
        ({"a": 0.05, "b": 0.95}, "data needs a >= 0.1, its floor, got a=0.05."),
        ({"a": 0.5, "b": 0.75}, "data needs shares that sum to 1 (within 1e-9), got a sum of 1.25; divide them by it."),
    ],
)
def test_wrong_shares_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Mixture("a", "b", floor=0.1).check("data", value)
