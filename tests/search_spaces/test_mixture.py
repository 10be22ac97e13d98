import itertools
import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import Fidelity, Mixture, Space, space_from_json, space_to_json

FIDELITY = Fidelity(params=(1,), tokens=(1e-3,), target={"params": 1, "tokens": 1e-3})
COORDINATES = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e-120, 1e-3])


@st.composite
def mixtures(draw):
    """Any mixture: floors, caps, a fixed share, supplies, a limit of sources, a reference."""
    names = [f"s{i}" for i in range(draw(st.integers(2, 8)))]
    weights = draw(st.lists(st.floats(0, 1), min_size=len(names), max_size=len(names)))
    free = draw(st.floats(0.01, 1))
    total = max(sum(weights), 1e-3)
    rules = {"floor": {n: (1 - free) * (w / total) for n, w in zip(names, weights, strict=True)}}
    if len(names) > 2 and draw(st.booleans()):
        rules["fixed"] = {"s0": rules["floor"].pop("s0") + draw(st.sampled_from([0.0, 0.3])) * free}
    if draw(st.booleans()):
        rules["supply"] = draw(st.dictionaries(st.sampled_from(names), st.floats(1, 1e3)))
    if draw(st.booleans()):
        rules["sampling"] = "uniform"
        share = Mixture(*names, **rules).shares(np.full((1, len(names) - len(rules.get("fixed", ()))), 0.5))[0]
        rules["reference"] = dict(zip(names, share.tolist(), strict=True))
    narrow = dict(rules)
    if draw(st.booleans()):
        narrow["cap"] = {
            n: min(1.0, rules["floor"][n] + draw(st.floats(0.01, 1))) for n in names if n in rules["floor"]
        }
    if draw(st.booleans()):
        narrow["max_domains"] = draw(st.integers(1, len(names)))
    try:
        return Mixture(*names, **narrow)
    except ValueError:  # caps or a limit that leave nothing
        return Mixture(*names, **rules)


@st.composite
def mixtures_with_points(draw):
    mixture = draw(mixtures())
    point = st.lists(COORDINATES, min_size=len(mixture.columns("")), max_size=len(mixture.columns("")))
    return mixture, np.array(draw(st.lists(point, min_size=1, max_size=4)))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(mixtures_with_points())
def test_every_point_decodes_to_an_allowed_mixture_that_sums_to_one(case):
    mixture, x = case
    for value in mixture.decode(x):
        assert abs(math.fsum(value.values()) - 1) <= 1e-12
        assert mixture.check("data", value) == value
        assert all(low <= value[name] <= high for name, (low, high) in mixture.bounds.items())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(mixtures_with_points())
def test_shares_come_back_within_1e_9_and_their_columns_are_canonical(case):
    mixture, x = case
    values = mixture.decode(x)
    encoded = mixture.encode(values)
    assert ((encoded >= 0) & (encoded <= 1)).all()
    assert np.allclose((encoded**3).sum(axis=1), 1, rtol=0, atol=1e-12)
    again = mixture.decode(encoded)
    assert all(abs(b[name] - a[name]) <= 1e-9 for a, b in zip(values, again, strict=True) for name in a)
    assert np.allclose(mixture.encode(again), encoded, rtol=0, atol=1e-9)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mixtures_with_points(), st.floats(0, 3))
def test_a_mixture_at_a_scale_keeps_to_its_supply_there(case, magnitude):
    mixture, x = case
    tokens = 10**magnitude
    try:
        there = mixture.at("data", {"tokens": tokens})
    except ValueError as refused:
        assert mixture.supply
        assert str(refused).startswith("data needs ")  # noqa: PT017
        return
    assert there.columns("data") == mixture.columns("data")
    assert there.at("data", {"tokens": tokens}) is there
    for value in there.decode(x):
        assert there.check("data", value) == mixture.check("data", value) == value
        assert all(value[name] * tokens <= 4 * supply * (1 + 1e-9) for name, supply in mixture.supply)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mixtures_with_points())
def test_shares_are_continuous_while_the_same_sources_are_in_use(case):
    mixture, x = case
    mixture = mixture.with_fields(max_domains=None)
    x[:, 0] = np.maximum(x[:, 0], 0.1)  # all at zero is the one point where there is no limit
    for i in range(x.shape[1]):
        moved = x.copy()
        moved[:, i] += np.where(x[:, i] > 0.5, -1e-9, 1e-9)
        assert np.abs(mixture.shares(moved) - mixture.shares(x)).max() < 1e-5


@settings(max_examples=300, derandomize=True, deadline=None)
@given(mixtures())
def test_a_mixture_is_a_value(mixture):
    for again in (eval(repr(mixture)), pickle.loads(pickle.dumps(mixture))):
        assert again == mixture
        assert hash(again) == hash(mixture)
    stored = json.loads(json.dumps(space_to_json(Space(data=mixture, fidelity=FIDELITY)), sort_keys=True))
    assert space_from_json(stored).parameters["data"] == mixture


def test_a_repr_shows_only_what_was_asked_for():
    assert repr(Mixture("a", "b")) == "Mixture('a', 'b')"
    assert repr(Mixture("a", "b", floor=0.1, cap={"b": 0.5})) == "Mixture('a', 'b', floor=0.1, cap={'b': 0.5})"
    whole = Mixture("a", "b", "c", fixed={"c": 0.1}, supply={"a": 5}, max_domains=2)
    assert repr(whole) == "Mixture('a', 'b', 'c', fixed={'c': 0.1}, supply={'a': 5.0}, max_domains=2)"
    assert "max_epochs={'a': 2.0}" in repr(Mixture("a", "b", supply={"a": 5}, max_epochs=2))


def test_a_mixture_is_written_as_it_was_before_there_was_more_than_floors():
    space = Space(data=Mixture("a", "b", floor={"a": 0.1}))
    written = {"kind": "mixture", "names": ["a", "b"], "floors": [0.1, 0.0]}
    assert space_to_json(space)["parameters"] == [["data", written]]
    assert space_from_json({"parameters": [["data", written]], "fidelity": None}).parameters == space.parameters


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


def test_sources_at_their_caps_leave_the_rest_to_the_others_in_proportion():
    mixture = Mixture("a", "b", "c", cap=0.5)
    (value,) = mixture.decode(np.cbrt([[0.8, 0.1, 0.1]]))
    assert value == {"a": 0.5, "b": pytest.approx(0.25, abs=1e-15), "c": pytest.approx(0.25, abs=1e-15)}
    (value,) = mixture.decode(np.cbrt([[0.88, 0.09, 0.03]]))
    assert value == {"a": 0.5, "b": pytest.approx(0.375, abs=1e-15), "c": pytest.approx(0.125, abs=1e-15)}


def test_what_sources_at_their_caps_leave_goes_to_those_at_zero_alike():
    mixture = Mixture("a", "b", "c", cap={"a": 0.5, "b": 0.2})
    assert mixture.decode(np.array([[1.0, 0.0, 0.0]])) == [{"a": 0.5, "b": 0.2, "c": pytest.approx(0.3, abs=1e-15)}]
    assert mixture.decode(np.zeros((1, 3))) == [{"a": pytest.approx(0.4), "b": 0.2, "c": pytest.approx(0.4)}]


def test_a_source_is_left_at_nothing_while_others_can_hold_everything():
    mixture = Mixture("a", "b", "c", cap=0.6)
    assert mixture.decode(np.array([[1.0, 0.2, 0.0]])) == [{"a": 0.6, "b": pytest.approx(0.4), "c": 0.0}]


def test_only_the_largest_sources_are_in_use():
    mixture = Mixture("a", "b", "c", "d", floor={"d": 0.1}, max_domains=2)
    assert mixture.decode(np.array([[0.3, 0.9, 0.5, 0.0]])) == [{"a": 0.0, "b": 1.0 - 0.1, "c": 0.0, "d": 0.1}]


def test_sources_whose_caps_cannot_hold_everything_make_room_for_larger_ones():
    mixture = Mixture("a", "b", "c", "d", cap={"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.7}, max_domains=2)
    both = np.array([[0.2, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])  # b makes do with d; a needs more than there is
    assert mixture.decode(both) == [
        {"a": 0.0, "b": pytest.approx(0.3), "c": 0.0, "d": pytest.approx(0.7)},
        {"a": 0.0, "b": 0.0, "c": pytest.approx(0.4), "d": pytest.approx(0.6)},
    ]


def test_only_caps_in_reach_and_a_limit_of_sources_move_points():
    assert not Mixture("a", "b", "c", floor=0.2, cap=0.6, max_domains=3).limited
    assert not Mixture("a", "b", supply={"a": 1}).limited
    assert Mixture("a", "b", supply={"a": 1}).at("data", {"tokens": 5}).limited
    assert not Mixture("a", "b", supply={"a": 1}).at("data", {"tokens": 4}).limited
    assert Mixture("a", "b", cap=0.9).limited
    assert Mixture("a", "b", "c", max_domains=2).limited
    assert not Mixture("a", "b", "c", fixed={"c": 0}, max_domains=2).limited


def test_fixed_shares_have_no_column_and_are_part_of_every_value():
    mixture = Mixture("a", "b", "c", floor={"a": 0.1}, fixed={"b": 0.3})
    assert [(c.name, c.floor, c.free, c.mixture) for c in mixture.columns("data")] == [
        ("data.a", 0.1, pytest.approx(0.6), "data"),
        ("data.c", 0.0, pytest.approx(0.6), "data"),
    ]
    assert mixture.decode(np.array([[1.0, 0.0]])) == [{"a": pytest.approx(0.7), "b": 0.3, "c": 0.0}]


def test_columns_do_not_depend_on_caps_so_that_runs_at_small_scales_stay_points():
    mixture = Mixture("a", "b", supply={"a": 1e9})
    value = {"a": 0.9, "b": 0.1}
    there = mixture.at("data", {"tokens": 2e10})
    assert there.caps == (0.2, 1.0)
    assert there.encode([value]).tolist() == mixture.encode([value]).tolist()
    with pytest.raises(ValueError, match=r"^data needs a <= 0\.2, its cap, got a=0\.9\.$"):
        there.check("data", value)


def test_epochs_may_differ_from_source_to_source():
    mixture = Mixture("a", "b", "c", supply={"a": 1e9, "b": 1e9}, max_epochs={"b": 1})
    assert mixture.scale_axes == ("tokens",)
    assert mixture.at("data", {"tokens": 1e10}).caps == (0.4, 0.1, 1.0)
    assert mixture.largest_shares({"tokens": 1e10}) == (0.4, 0.1, math.inf)


def test_a_supply_of_exactly_what_is_needed_leaves_one_mixture():
    shares = (0.1, 0.2, 0.7)
    mixture = Mixture("a", "b", "c", supply=dict(zip("abc", shares, strict=True)), max_epochs=1)
    there = mixture.at("data", {"tokens": 1})
    assert there.shares(np.random.default_rng(0).random((5, 3))).tolist() == [pytest.approx(shares, abs=1e-12)] * 5


def test_the_start_is_the_reference_as_far_as_it_is_allowed():
    x = np.full((2, 3), 0.5)
    assert Mixture("a", "b", "c").start(x) is x
    mixture = Mixture("a", "b", "c", reference={"a": 0.6, "b": 0.3, "c": 0.1}, supply={"a": 1}, max_epochs=1)
    assert np.allclose(mixture.start(x) ** 3, [[0.6, 0.3, 0.1]] * 2)
    there = mixture.at("data", {"tokens": 2})
    assert np.allclose(there.start(x) ** 3, [[0.5, 0.375, 0.125]] * 2)
    assert there.reference == pytest.approx((0.5, 0.375, 0.125))
    two = Mixture("a", "b", "c", reference={"a": 0.6, "b": 0.3, "c": 0.1}, max_domains=2)
    assert np.allclose(two.start(x) ** 3, [[2 / 3, 1 / 3, 0]] * 2)


def test_draws_around_a_reference_have_its_tempered_shares_on_average():
    reference = {"a": 0.64, "b": 0.2, "c": 0.16}  # none so small that 15 times it would refuse anything
    mixture = Mixture("a", "b", "c", reference=reference)
    w = mixture.shares(mixture.quantile(np.random.default_rng(0).random((4000, 3))))
    prior = np.sqrt(list(reference.values()))
    prior /= prior.sum()
    assert np.allclose(w.mean(axis=0), prior, atol=0.02)
    # The variance of a Dirichlet of strength s is p (1 - p) / (s + 1).
    strengths = 0.1 * 50 ** (np.arange(15) / 14)
    assert np.allclose(w.var(axis=0), prior * (1 - prior) * (1 / (strengths + 1)).mean(), atol=0.01)


def test_draws_around_a_reference_are_never_many_times_it_nor_next_to_nothing():
    reference = dict(zip("abcdefgh", [0.4, 0.3, 0.15, 0.1, 0.03, 0.01, 0.006, 0.004], strict=True))
    mixture = Mixture(*reference, reference=reference)
    w = mixture.quantile(np.random.default_rng(0).random((2000, 8))) ** 3
    assert (w <= 15 * np.array(list(reference.values())) + 1e-12).all()
    assert ((w == 0) | (w >= 2e-4 * (1 - 1e-12))).all()
    assert 0.3 < (w == 0).mean() < 0.7
    assert np.allclose(w.sum(axis=1), 1)


def test_draws_around_a_reference_keep_to_floors_caps_and_the_limit_of_sources():
    reference = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    mixture = Mixture(*reference, floor={"a": 0.1}, cap=0.5, max_domains=3, reference=reference)
    values = mixture.decode(mixture.quantile(np.random.default_rng(0).random((200, 4))))
    assert all(mixture.check("data", value) == value for value in values)
    assert sum(value["a"] == 0.5 for value in values) == 0  # drawn again, not moved to the cap


def test_draws_around_a_reference_end_where_nothing_else_is_allowed():
    mixture = Mixture("a", "b", "c", cap=0.3334, reference={"a": 0.3333, "b": 0.3333, "c": 0.3334})
    (value,) = mixture.decode(mixture.quantile(np.full((1, 3), 0.5)))
    assert mixture.check("data", value) == value


def test_a_draw_around_a_reference_is_a_function_of_its_own_numbers_alone():
    mixture = Mixture("a", "b", reference={"a": 0.5, "b": 0.5})
    u = np.random.default_rng(0).random((3, 2))
    assert np.array_equal(mixture.quantile(u)[[2, 0]], mixture.quantile(u[[2, 0]]))
    assert len(np.unique(mixture.quantile(u), axis=0)) == 3


def test_uniform_draws_beyond_a_cap_are_moved_to_it():
    mixture = Mixture("a", "b", cap={"a": 0.25})
    w = mixture.quantile(np.random.default_rng(0).random((1000, 2))) ** 3
    assert (w[:, 0] <= 0.25 + 1e-12).all()
    assert 0.7 < (w[:, 0] > 0.25 - 1e-12).mean() < 0.8


@settings(max_examples=200, derandomize=True, deadline=None)
@given(mixtures_with_points(), st.sampled_from([0.01, 0.05, 0.1, 0.25, 2e-4]))
def test_a_rounded_mixture_is_allowed_and_on_the_grid(case, step):
    mixture, x = case
    (value,) = mixture.decode(x[:1])
    try:
        rounded = mixture.rounded(value, step)
    except ValueError as refused:
        assert "take a finer step" in str(refused)  # noqa: PT017
        return
    assert mixture.check("data", rounded) == rounded
    assert all(abs(share / step - round(share / step)) < 1e-9 for share in rounded.values())


def test_a_rounded_mixture_is_the_nearest_on_the_grid():
    mixture = Mixture("a", "b", "c", floor={"a": 0.05}, cap={"b": 0.42})
    grid = [np.array(g) / 10 for g in itertools.product(range(11), repeat=3) if sum(g) == 10]
    grid = [g for g in grid if g[0] >= 0.05 and g[1] <= 0.42]
    for value in mixture.decode(np.random.default_rng(0).random((100, 3))):
        w = np.array(list(value.values()))
        rounded = np.array(list(mixture.rounded(value, 0.1).values()))
        assert ((rounded - w) ** 2).sum() == pytest.approx(min(((g - w) ** 2).sum() for g in grid))


def test_rounding_gives_whole_decimals_and_keeps_what_is_on_the_grid():
    mixture = Mixture("a", "b", "c", fixed={"c": 0.3})
    third = {"a": 0.7 / 3, "b": 1.4 / 3, "c": 0.3}
    assert mixture.rounded(third) == {"a": 0.23, "b": 0.47, "c": 0.3}
    assert mixture.rounded({"a": 0.07, "b": 0.63, "c": 0.3}) == {"a": 0.07, "b": 0.63, "c": 0.3}


def test_rounding_exchanges_sources_where_caps_on_the_grid_cannot_hold_everything():
    mixture = Mixture("a", "b", "c", cap={"a": 0.5, "b": 0.55}, max_domains=2)
    assert mixture.rounded({"a": 0.46, "b": 0.54, "c": 0.0}, 0.1) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert mixture.rounded({"a": 0.48, "b": 0.52, "c": 0.0}, 0.25) == {"a": 0.5, "b": 0.5, "c": 0.0}
    tight = Mixture("a", "b", "c", cap={"a": 0.48, "b": 0.55}, max_domains=2)
    assert tight.rounded({"a": 0.46, "b": 0.54, "c": 0.0}, 0.1) == {"a": 0.0, "b": 0.5, "c": 0.5}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (0.3, "A mixture is rounded in steps that divide 1, such as 0.01 or 2e-4, got 0.3."),
        (0, "A mixture is rounded in steps that divide 1, such as 0.01 or 2e-4, got 0."),
        (0.25, "No multiple of 0.25 is a share of 'c', which must be in [0.3, 0.3]; take a finer step."),
        (0.1, "No allowed mixture has shares that are all multiples of 0.1; take a finer step."),
    ],
)
def test_rounding_that_is_not_possible_is_refused(step, message):
    mixture = Mixture("a", "b", "c", cap={"a": 0.39, "b": 0.35}, fixed={"c": 0.3})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mixture.rounded({"a": 0.36, "b": 0.34, "c": 0.3}, step)


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
        (lambda: Mixture("a", "b", floor=-0.1), "The floor of a source must be a number in [0, 1), got -0.1 for 'a'."),
        (lambda: Mixture("a", "b", floor=True), "The floor of a source must be a number in [0, 1), got True for 'a'."),
        (
            lambda: Mixture("a", "b", floor=0.5),
            "Floors of a Mixture must leave at least 1e-6 to share, got a sum of 1.",
        ),
        (
            lambda: Mixture("a", "b", floor={"c": 0.1}),
            "Mixture has a floor for ['c'], which it does not mix; its sources are ['a', 'b'].",
        ),
        (
            lambda: Mixture("code", "b", cap={"cod": 0.1}),
            "Mixture has a cap for ['cod'] (did you mean 'code'?), which it does not mix; "
            "its sources are ['code', 'b'].",
        ),
        (lambda: Mixture("a", "b", cap=0), "The cap of a source must be a number in (0, 1], got 0 for 'a'."),
        (lambda: Mixture("a", "b", fixed=0.5), "Mixture needs fixed as a dictionary source -> number, got 0.5."),
        (
            lambda: Mixture("a", "b", "c", fixed={"a": 1.0}),
            "The fixed share of a source must be a number in [0, 1), got 1.0 for 'a'.",
        ),
        (
            lambda: Mixture("a", "b", supply={"a": 0}),
            "The supply of a source must be a number > 0, of tokens, got 0 for 'a'.",
        ),
        (
            lambda: Mixture("a", "b", supply={"a": 1}, max_epochs=-1),
            "The max_epochs of a source must be a number > 0, got -1 for 'a'.",
        ),
        (
            lambda: Mixture("a", "b", max_epochs=2),
            "Mixture has max_epochs=2 and no supply that it could limit; give supply={source: tokens}.",
        ),
        (
            lambda: Mixture("a", "b", supply={"a": 1}, max_epochs={"b": 2}),
            "Mixture has max_epochs for ['b'], of which it has no supply; give their supply.",
        ),
        (
            lambda: Mixture("a", "b", "c", floor=0.2, fixed={"a": 0.1}),
            "Mixture fixes 'a' at 0.1, which is not between its floor 0.2 and its cap 1.0; change one of them.",
        ),
        (
            lambda: Mixture("a", "b", floor={"a": 0.2}, cap={"a": 0.2}),
            "Mixture needs a cap above the floor, got floor 0.2 and cap 0.2 for 'a'; "
            "a share that stays is written fixed={'a': 0.2}.",
        ),
        (
            lambda: Mixture("a", "b", fixed={"a": 0.2}),
            "Mixture needs at least two sources that are not fixed, got ['b']; with fewer there is nothing to search.",
        ),
        (
            lambda: Mixture("a", "b", "c", floor=0.25, fixed={"a": 0.5}),
            "Floors and fixed shares of a Mixture must leave at least 1e-6 to share, got a sum of 1.",
        ),
        (
            lambda: Mixture("a", "b", cap={"a": 0.3, "b": 0.7}),
            "Caps and fixed shares of a Mixture must sum to at least 1 + 1e-6, else there is nothing to choose, "
            "got a sum of 1; raise one of {'a': 0.3, 'b': 0.7}.",
        ),
        (
            lambda: Mixture("a", "b", max_domains=3),
            "max_domains of a Mixture must be a whole number in [1, 2], got 3.",
        ),
        (
            lambda: Mixture("a", "b", max_domains=True),
            "max_domains of a Mixture must be a whole number in [1, 2], got True.",
        ),
        (
            lambda: Mixture("a", "b", "c", floor={"a": 0.1}, max_domains=1),
            "max_domains=1 of a Mixture leaves no place for ['b', 'c'], since ['a'] always have a share; raise it.",
        ),
        (
            lambda: Mixture("a", "b", floor=0.1, max_domains=1),
            "max_domains=1 of a Mixture is too few for ['a', 'b'], which always have a share; raise it.",
        ),
        (
            lambda: Mixture("a", "b", "c", cap=0.4, max_domains=2),
            "max_domains=2 of a Mixture is too few for its caps, which allow so many sources shares that sum to 0.8; "
            "raise it or the caps.",
        ),
        (
            lambda: Mixture("a", "b", cap=0.7, reference={"a": 0.8, "b": 0.2}),
            "The reference of a Mixture needs a <= 0.7, its cap, got a=0.8.",
        ),
        (
            lambda: Mixture("a", "b", reference={"a": 1, "b": 0}),
            "The reference of a Mixture has no share of 'b', so sampling='regmix' would never give it one; "
            "give it a share, or write sampling='uniform'.",
        ),
        (
            lambda: Mixture("a", "b", sampling="regmix"),
            "Mixture with sampling='regmix' draws mixtures around a reference and has none; "
            "give reference={source: share}, or leave sampling= out.",
        ),
        (
            lambda: Mixture("a", "b", sampling="sobol"),
            "sampling of a Mixture must be 'uniform' or 'regmix', got 'sobol'.",
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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 0.7, "b": 0.2, "c": 0.1}, "data needs a <= 0.6, its cap, got a=0.7."),
        ({"a": 0.55, "b": 0.25, "c": 0.2}, "data needs c = 0.1, where it is fixed, got c=0.2."),
        ({"a": 0.5, "b": 0.4, "code": 0.1}, "data has a share for ['code']; it needs exactly ['a', 'b', 'c', 'd']."),
        (
            {"a": 0.5, "b": 0.2, "c": 0.1, "d": 0.2},
            "data needs at most max_domains=3 sources in use, got shares of ['a', 'b', 'c', 'd']; "
            "leave 1 of them at 0.",
        ),
    ],
)
def test_shares_beyond_caps_fixed_shares_and_the_limit_are_refused(value, message):
    mixture = Mixture("a", "b", "c", "d", cap=0.6, fixed={"c": 0.1}, max_domains=3)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mixture.check("data", {"d": 0.0} | value)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            Mixture("a", "b", supply={"a": 10, "b": 5}),
            "data needs caps that sum to at least 1, got 0.6 at tokens=100, where supply * max_epochs / tokens is "
            "{'a': 0.4, 'b': 0.2}; raise a supply or max_epochs, or train on fewer tokens.",
        ),
        (
            Mixture("a", "b", "c", supply={"a": 10, "b": 10, "c": 10}, max_domains=2),
            "data needs caps that sum to at least 1, got 0.8 at tokens=100, where supply * max_epochs / tokens is "
            "{'a': 0.4, 'b': 0.4, 'c': 0.4}; raise a supply or max_epochs, or train on fewer tokens.",
        ),
        (
            Mixture("a", "b", floor={"a": 0.3}, supply={"a": 5}),
            "data needs a floor of 'a' that its supply allows, at most 0.2 in 4 epochs at tokens=100, got 0.3; "
            "lower it, or raise the supply or max_epochs.",
        ),
        (
            Mixture("a", "b", "c", fixed={"a": 0.3}, supply={"a": 5}),
            "data needs a fixed share of 'a' that its supply allows, at most 0.2 in 4 epochs at tokens=100, got 0.3; "
            "lower it, or raise the supply or max_epochs.",
        ),
    ],
)
def test_a_scale_for_which_the_supply_is_too_small_is_refused(mixture, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mixture.at("data", {"tokens": 100})
