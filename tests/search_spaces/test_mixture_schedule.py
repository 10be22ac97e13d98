import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import Fidelity, Mixture, Real, Space, space_from_json, space_to_json
from search_spaces.mixture_schedule import MixtureSchedule, SwitchedMixture

FIDELITY = Fidelity(params=(1,), tokens=(1e-6,), target={"params": 1, "tokens": 1e-6})
COORDINATES = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e-3])


@st.composite
def parts(draw, names, **rules):
    """A mixture of these names with some floors, caps and perhaps a fixed share."""
    rules["floor"] = {n: draw(st.sampled_from([0.0, 0.05, 0.8 / len(names)])) for n in names}
    if len(names) > 2 and draw(st.booleans()):
        rules["fixed"] = {names[-1]: rules["floor"].pop(names[-1])}
    caps = {n: draw(st.sampled_from([1.0, 0.6, 0.9])) for n in names}
    return Mixture(*names, cap=caps if sum(caps.values()) > 1.5 else 1.0, **rules)


@st.composite
def schedules(draw, supplied):
    names = [f"s{i}" for i in range(draw(st.integers(2, 6)))]
    supply = draw(st.dictionaries(st.sampled_from(names), st.floats(0.05, 2))) if supplied else None
    first = draw(parts(names, supply=supply, max_epochs=1 if supply else 4))
    switch = draw(st.sampled_from([Real(0.7, 0.95), Real(0.1, 0.5), 0.5, 0.98, 0.03]))
    return MixtureSchedule(first, draw(parts(names)), switch)


@st.composite
def schedules_at_a_scale(draw):
    """One whose supply is scarce at the scale, and points to read."""
    schedule = draw(schedules(supplied=True))
    tokens = 1.0
    while True:
        try:
            there = schedule.at("data", {"tokens": tokens})
            break
        except ValueError:
            tokens /= 1.25
    point = st.lists(COORDINATES, min_size=len(there.columns("")), max_size=len(there.columns("")))
    return schedule, tokens, there, np.array(draw(st.lists(point, min_size=1, max_size=4)))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schedules_at_a_scale())
def test_every_point_decodes_to_shares_that_keep_to_the_supply_on_average(case):
    schedule, tokens, there, x = case
    for value in there.decode(x):
        assert there.check("data", value) == schedule.check("data", value) == value
        assert abs(math.fsum(value.first.values()) - 1) <= 1e-12
        assert abs(math.fsum(value.last.values()) - 1) <= 1e-12
        for name, supply in schedule.first.supply:
            used = value.switch * value.first[name] + (1 - value.switch) * value.last[name]
            assert used * tokens <= supply * (1 + 1e-12)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schedules_at_a_scale())
def test_values_come_back_within_1e_9(case):
    _, _, there, x = case
    values = there.decode(x)
    encoded = there.encode(values)
    assert ((encoded >= 0) & (encoded <= 1)).all()
    again = there.decode(encoded)
    for a, b in zip(values, again, strict=True):
        assert a.switch == pytest.approx(b.switch, rel=1e-12)
        assert all(abs(a.first[n] - b.first[n]) <= 1e-9 and abs(a.last[n] - b.last[n]) <= 1e-9 for n in a.first)
    assert np.allclose(there.encode(again), encoded, rtol=0, atol=1e-9)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(schedules_at_a_scale())
def test_shares_are_continuous_in_every_column(case):
    _, _, there, x = case
    at_zero = [i for i, c in enumerate(there.columns("data")) if c.kind == "share" and c.name.endswith("s0")]
    x[:, at_zero] = np.maximum(x[:, at_zero], 0.1)  # all at zero is the one point where there is no limit

    def shares(points):
        return np.array([[*value.first.values(), *value.last.values()] for value in there.decode(points)])

    for i in range(x.shape[1]):
        moved = x.copy()
        moved[:, i] += np.where(x[:, i] > 0.5, -1e-9, 1e-9)
        assert np.abs(shares(moved) - shares(x)).max() < 1e-4


@settings(max_examples=100, derandomize=True, deadline=None)
@given(schedules(supplied=True) | schedules(supplied=False))
def test_a_schedule_of_mixtures_is_a_value(schedule):
    for again in (eval(repr(schedule)), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
    stored = json.loads(json.dumps(space_to_json(Space(data=schedule, fidelity=FIDELITY)), sort_keys=True))
    assert space_from_json(stored).parameters["data"] == schedule


SCHEDULE = MixtureSchedule(
    Mixture("web", "code", "books", fixed={"books": 0.1}), Mixture("web", "code", "books", floor={"code": 0.3})
)
VALUE = SwitchedMixture({"web": 0.7, "code": 0.2, "books": 0.1}, {"web": 0.2, "code": 0.6, "books": 0.2}, 0.8)


def test_columns_are_the_switch_and_two_simplices():
    assert [(c.name, c.kind, c.mixture, c.floor) for c in SCHEDULE.columns("data")] == [
        ("data.switch", "real", "", 0.0),
        ("data.first.web", "share", "data.first", 0.0),
        ("data.first.code", "share", "data.first", 0.0),
        ("data.last.web", "share", "data.last", 0.0),
        ("data.last.code", "share", "data.last", 0.3),
        ("data.last.books", "share", "data.last", 0.0),
    ]
    fixed = MixtureSchedule(SCHEDULE.first, SCHEDULE.last, 0.9)
    assert [c.name for c in fixed.columns("data")] == [c.name for c in SCHEDULE.columns("data")][1:]
    assert {value.switch for value in fixed.decode(np.random.default_rng(0).random((5, 5)))} == {0.9}


@settings(max_examples=50, derandomize=True, deadline=None)
@given(schedules_at_a_scale())
def test_points_settle_bit_for_bit_where_their_values_are_encoded(case):
    _, _, there, x = case
    np.testing.assert_array_equal(there.settled(x), there.encode(there.decode(x)))


def test_without_a_supply_the_two_mixtures_are_independent():
    x = np.random.default_rng(0).random((20, 6))
    values = SCHEDULE.decode(x)
    assert [value.first for value in values] == SCHEDULE.first.decode(x[:, 1:3])
    assert [value.last for value in values] == SCHEDULE.last.decode(x[:, 3:])
    assert SCHEDULE.at("data", {"tokens": 1e12}) is SCHEDULE
    assert SCHEDULE.scale_axes == ()
    assert not SCHEDULE.limited


def test_the_supply_is_shared_by_both_parts_and_the_first_is_served_first():
    first = Mixture("web", "code", supply={"code": 0.2}, max_epochs=1)
    there = MixtureSchedule(first, Mixture("web", "code", floor={"code": 0.1}), 0.5).at("data", {"tokens": 1})
    greedy, modest = there.decode(np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]))
    assert greedy.first["code"] == pytest.approx(0.3)  # 0.5 * 0.1 is kept for the floor of the last part
    assert greedy.last["code"] == pytest.approx(0.1)
    assert modest.first["code"] == 0
    assert modest.last["code"] == pytest.approx(0.4)
    assert greedy.average["code"] == pytest.approx(0.2)
    assert modest.average["code"] == pytest.approx(0.2)


def test_the_first_part_leaves_what_caps_make_the_last_one_need():
    first = Mixture("web", "code", supply={"web": 0.5}, max_epochs=1)
    there = MixtureSchedule(first, Mixture("web", "code", cap={"code": 0.4}), 0.5).at("data", {"tokens": 1})
    (value,) = there.decode(np.array([[1.0, 0.0, 1.0, 0.0]]))
    assert value.first == pytest.approx({"web": 0.4, "code": 0.6})  # the last needs 0.6 of web, so 0.3 of the supply
    assert value.last == pytest.approx({"web": 0.6, "code": 0.4})


def test_the_scale_decides_whether_a_value_is_allowed():
    first = Mixture("web", "code", supply={"code": 1e9})
    schedule = MixtureSchedule(first, Mixture("web", "code"))
    value = {"first": {"web": 0.9, "code": 0.1}, "last": {"web": 0.4, "code": 0.6}, "switch": 0.8}
    assert schedule.scale_axes == ("tokens",)
    assert schedule.check("data", value) == schedule.at("data", {"tokens": 2e10}).check("data", value)
    message = (
        "data needs shares of 'code' whose average over the run is <= 0.16, what its supply allows at this scale, "
        "got 0.19999999999999998; lower its first or last share, or move the switch."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schedule.at("data", {"tokens": 2.5e10}).check("data", value)


def test_draws_and_starts_are_where_they_are_read():
    reference = {"web": 0.5, "code": 0.5}
    first = Mixture("web", "code", supply={"code": 0.3}, max_epochs=1, reference=reference)
    there = MixtureSchedule(first, Mixture("web", "code", reference=reference)).at("data", {"tokens": 1})
    for x in (there.quantile(np.random.default_rng(0).random((50, 5))), there.start(np.full((2, 5), 0.5))):
        assert np.allclose(there.encode(there.decode(x)), x, rtol=0, atol=1e-9)
    (value,) = there.decode(there.start(np.full((1, 5), 0.5)))
    assert value.switch == pytest.approx(0.825)
    assert value.average["code"] == pytest.approx(0.3)


def test_a_start_is_the_reference_of_each_part_that_has_one():
    last = Mixture("web", "code", reference={"web": 0.25, "code": 0.75})
    schedule = MixtureSchedule(Mixture("web", "code"), last)
    assert np.allclose(schedule.start(np.full((1, 5), 0.5)), [[0.5, 0.5, 0.5, np.cbrt(0.25), np.cbrt(0.75)]])


def test_the_first_shares_hold_up_to_the_switch():
    assert [VALUE.shares(step, 10)["code"] for step in range(11)] == [0.2] * 8 + [0.6] * 3
    assert VALUE.shares(2, 3)["code"] == 0.6  # round(0.8 * 3) = 2
    assert VALUE.average == pytest.approx({"web": 0.6, "code": 0.28, "books": 0.12})


@pytest.mark.parametrize(
    ("step", "total", "message"),
    [
        (-1, 10, "step must be in [0, total_steps=10], got -1."),
        (11, 10, "step must be in [0, total_steps=10], got 11."),
        (0, 0.5, "total_steps must be a whole number >= 1, got 0.5."),
    ],
)
def test_shares_of_steps_outside_the_run_are_refused(step, total, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VALUE.shares(step, total)


def test_a_switched_mixture_is_a_value_and_comes_back_from_json():
    assert SCHEDULE.check("data", json.loads(json.dumps(SCHEDULE.to_json(VALUE)))) == VALUE
    assert SCHEDULE.check("data", VALUE) == VALUE
    assert pickle.loads(pickle.dumps(VALUE)) == VALUE
    assert eval(repr(VALUE)) == VALUE
    assert len({VALUE, SwitchedMixture(dict(reversed(VALUE.first.items())), VALUE.last, 0.8)}) == 1
    assert SwitchedMixture(VALUE.first, VALUE.last, 0.81) != VALUE


@pytest.mark.parametrize(
    ("first", "last", "switch", "message"),
    [
        (3, {"a": 1}, 0.5, "SwitchedMixture needs a dictionary source -> share as first, got 3."),
        ({"a": 1}, {}, 0.5, "SwitchedMixture needs a dictionary source -> share as last, got {}."),
        ({"a": 1}, {"a": math.nan}, 0.5, "SwitchedMixture needs last shares in [0, 1], got a=nan."),
        (
            {"a": 0.5},
            {"a": 1},
            0.5,
            "SwitchedMixture needs first shares that sum to 1 (within 1e-9), got a sum of 0.5; divide them by it.",
        ),
        ({"a": 1}, {"b": 1}, 0.5, "SwitchedMixture needs the same sources first and last, got ['a'] and ['b']."),
        ({"a": 1}, {"a": 1}, 1, "A switch must be in (0, 1), a fraction of training, got 1."),
    ],
)
def test_a_wrong_switched_mixture_is_refused(first, last, switch, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SwitchedMixture(first, last, switch)


AB = Mixture("a", "b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureSchedule(AB, 3), "MixtureSchedule needs a Mixture as last, got 3."),
        (
            lambda: MixtureSchedule(AB, Mixture("b", "a")),
            "MixtureSchedule needs the same sources in the same order first and last, got ['a', 'b'] and ['b', 'a']; "
            "fix a share at 0 where a source is not used.",
        ),
        (
            lambda: MixtureSchedule(AB, Mixture("a", "b", supply={"a": 1})),
            "MixtureSchedule takes the supply of the whole run from its first mixture, got {'a': 1.0} in the last; "
            "give it to the first.",
        ),
        (
            lambda: MixtureSchedule(Mixture("a", "b", supply={"a": 1}), Mixture("a", "b", max_domains=1)),
            "MixtureSchedule with a supply cannot limit the number of sources, got max_domains=1 in the last mixture; "
            "leave out one of the two.",
        ),
        (
            lambda: MixtureSchedule(AB, AB, Real(0, 0.5)),
            "MixtureSchedule needs a switch within (0, 1), got Real(0.0, 0.5).",
        ),
        (lambda: MixtureSchedule(AB, AB, 1), "A switch must be in (0, 1), a fraction of training, got 1."),
    ],
)
def test_a_wrong_schedule_of_mixtures_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "data must be a SwitchedMixture or a dictionary with first, last and switch, got 3."),
        (
            {"first": {}},
            "data must be a SwitchedMixture or a dictionary with first, last and switch, got {'first': {}}.",
        ),
        (
            {"first": VALUE.first, "last": VALUE.last, "switch": 0.5},
            "data.switch must be a number in [0.7, 0.95], got 0.5.",
        ),
        (
            {"first": VALUE.last, "last": VALUE.last, "switch": 0.8},
            "data.first needs books = 0.1, where it is fixed, got books=0.2.",
        ),
        (
            {"first": VALUE.first, "last": VALUE.first, "switch": 0.8},
            "data.last needs code >= 0.3, its floor, got code=0.2.",
        ),
    ],
)
def test_wrong_values_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SCHEDULE.check("data", value)


def test_a_fixed_switch_takes_no_other_value():
    message = "data.switch is fixed at 0.9 in this space, got 0.8."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MixtureSchedule(SCHEDULE.first, SCHEDULE.last, 0.9).check("data", VALUE)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (
            Mixture("a", "b", floor={"a": 0.2}, supply={"a": 10}, max_epochs=1),
            AB,
            "data at tokens=100, switch=0.7 needs a supply of 'a' for what floors and fixed shares take, an average "
            "share of 0.14, got one for 0.1; raise it or max_epochs, or lower a floor.",
        ),
        (
            Mixture("a", "b", supply={"a": 10, "b": 60}, max_epochs=1),
            AB,
            "data at tokens=100, switch=0.7 needs average shares that can sum to 1, got caps and supplies that allow "
            "0.7; raise a cap, a supply or max_epochs, or train on fewer tokens.",
        ),
        (
            Mixture("a", "b", cap={"a": 0.5}, supply={"b": 20}, max_epochs=1),
            AB,
            "data at tokens=100, switch=0.7 needs first shares that can sum to 1, got caps and supplies that allow "
            "0.785714; raise a cap, a supply or max_epochs, or train on fewer tokens.",
        ),
        (
            Mixture("a", "b", supply={"b": 1}, max_epochs=1),
            Mixture("a", "b", cap={"a": 0.5}),
            "data at tokens=100, switch=0.7 needs last shares that can sum to 1, got caps and supplies that allow "
            "0.533333; raise a cap, a supply or max_epochs, or train on fewer tokens.",
        ),
    ],
)
def test_a_scale_for_which_the_supply_is_too_small_is_refused(first, last, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MixtureSchedule(first, last).at("data", {"tokens": 100})
