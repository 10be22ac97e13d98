import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.codec import space_from_json, space_to_json
from search_spaces.curve import (
    FAMILIES,
    REX,
    WSD,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Piecewise,
    Power,
    Refined,
    curve_from_json,
)
from search_spaces.mixture_schedule import SwitchedMixture
from search_spaces.parameter import Real
from search_spaces.schedule import PROGRESS, Schedule, stable_until
from search_spaces.space import Space

EVERY = list(FAMILIES)
SCHEDULES = {
    "every family": Schedule(*EVERY),
    "one family, nothing varies": Schedule("cosine", floor=0.0, warmup=0.02),
    "shared, own and fixed": Schedule(
        "cosine", "linear", warmup=Real(0, 0.1), wsd={"decay": Real(0.1, 0.3)}, rex={"floor": 0.0}
    ),
    "items": Schedule(
        "constant",
        piecewise={"levels": (1, Real(0.1, 1, log=True), 0.1), "boundaries": (Real(0.2, 0.5), Real(0.6, 0.9))},
        step={"milestones": (0.3, Real(0.5, 0.9)), "gamma": 0.1},
        refined={"weights": (Real(0.5, 2), 1.0, Real(0.5, 2))},
    ),
}


def points(schedule, n, seed=0):
    return np.random.default_rng(seed).random((n, len(schedule.columns("s"))))


def names(schedule):
    return [column.name for column in schedule.columns("s")]


# -------------------------------------------------------------------------------------------------------------- columns


def test_a_setting_that_is_left_out_varies_over_its_familys_range():
    schedule = Schedule("wsd")
    assert names(schedule) == ["s.decay", "s.warmup", "s.floor"]
    assert schedule.decode(np.zeros((1, 3))) == [WSD(decay=0.05, warmup=0, floor=0)]
    assert schedule.decode(np.ones((1, 3))) == [WSD(decay=0.5, warmup=0.1, floor=0.2)]


def test_a_number_fixes_a_setting_and_a_real_gives_another_range():
    schedule = Schedule("wsd", warmup=0.02, decay=Real(0.1, 0.2))
    assert names(schedule) == ["s.decay", "s.floor"]
    assert schedule.decode(np.ones((1, 2))) == [WSD(decay=0.2, warmup=0.02, floor=0.2)]


def test_settings_without_a_range_stay_at_their_default():
    assert names(Schedule("power")) == ["s.decay", "s.warmup", "s.floor"]
    assert names(Schedule("step")) == ["s.gamma", "s.warmup"]
    assert names(Schedule("onecycle")) == ["s.warmup"]
    assert names(Schedule("refined")) == []
    assert names(Schedule("piecewise")) == ["s.levels.1", "s.levels.2", "s.warmup"]


@pytest.mark.parametrize("family", EVERY)
def test_the_default_of_every_family_lies_in_its_default_range(family):
    assert Schedule(family).check("s", FAMILIES[family]()) == FAMILIES[family]()


def test_a_setting_that_varies_alike_for_every_family_is_one_column_and_any_other_one_a_family():
    schedule = Schedule("cosine", "linear", warmup=Real(0, 0.1), wsd={"decay": Real(0.1, 0.3)}, floor=0.1)
    assert names(schedule) == ["s", "s.warmup", "s.wsd.decay"]
    assert [column.when for column in schedule.columns("s")] == [(), (), ((0, 2),)]
    part = Schedule("cosine", "linear", floor=Real(0, 0.1), warmup=0.02, rex={"floor": 0.0, "shape": 0.5})
    assert names(part) == ["s", "s.cosine.floor", "s.linear.floor"]


def test_default_ranges_that_every_family_has_are_one_column():
    assert names(Schedule("cosine", "linear")) == ["s", "s.warmup", "s.floor"]
    some = Schedule("cosine", "constant", "onecycle")
    assert names(some) == ["s", "s.cosine.warmup", "s.cosine.floor", "s.constant.warmup", "s.onecycle.warmup"]


def test_every_column_of_a_schedule_says_so():
    for schedule in SCHEDULES.values():
        assert {column.schedule for column in schedule.columns("a.b")} <= {"a.b"}
        assert {column.parameter for column in schedule.columns("a.b")} <= {"a.b"}


def test_items_of_a_list_that_vary_are_columns():
    assert names(SCHEDULES["items"]) == [
        "s",
        "s.constant.warmup",
        "s.piecewise.levels.1",
        "s.piecewise.boundaries.0",
        "s.piecewise.boundaries.1",
        "s.piecewise.warmup",
        "s.step.milestones.1",
        "s.step.warmup",
        "s.refined.weights.0",
        "s.refined.weights.2",
    ]


def test_one_family_needs_no_column_of_its_own():
    assert names(Schedule("wsd", decay=Real(0.1, 0.3), warmup=0.0, floor=0.0)) == ["s.decay"]
    fixed = Schedule("cosine", floor=0.0, warmup=0.02)
    assert fixed.columns("s") == ()
    assert fixed.decode(np.empty((2, 0))) == [Cosine(warmup=0.02)] * 2


def test_own_settings_go_before_those_for_all():
    schedule = Schedule("cosine", warmup=0.1, floor=0.0, rex={"warmup": 0.0, "shape": 0.1})
    assert schedule.decode(np.array([[0.2], [0.8]])) == [Cosine(warmup=0.1), REX(warmup=0.0, shape=0.1)]


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_point_is_an_allowed_curve_that_comes_back(schedule):
    curves = schedule.decode(points(schedule, 500))
    again = schedule.decode(schedule.encode(curves))
    for curve, back in zip(curves, again, strict=True):
        assert type(curve)(**{name: getattr(curve, name) for name in curve.settings()}) == curve  # passes its checks
        assert schedule.check("s", curve) is curve
        assert schedule.check("s", json.loads(json.dumps(schedule.to_json(curve)))) == curve
        assert back.family == curve.family
        for setting in curve.settings():
            value = getattr(curve, setting)
            assert type(value) in (float, tuple, type(None))
            if value is not None:
                np.testing.assert_allclose(getattr(back, setting), value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_inactive_columns_are_encoded_in_the_middle(schedule):
    x = points(schedule, 200)
    encoded = schedule.encode(schedule.decode(x))
    columns = schedule.columns("s")
    for i, column in enumerate(columns):
        counts = np.ones(len(x), dtype=bool)
        for on, code in column.when:
            counts &= (x[:, on] * columns[on].levels).astype(int) == code
        np.testing.assert_allclose(encoded[~counts, i], 0.5)
        if column.kind == "real":
            np.testing.assert_allclose(encoded[counts, i], x[counts, i], atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_comes_back_from_the_json_of_a_space_and_from_its_repr(schedule):
    space = Space(lr=Real(0, 1), s=schedule)
    again = space_from_json(json.loads(json.dumps(space_to_json(space), sort_keys=True)))
    assert again == space
    assert again.columns == space.columns
    assert space_to_json(again) == space_to_json(space)
    assert eval(repr(schedule)) == schedule


def test_a_schedule_stored_before_a_family_had_a_setting_has_it_fixed():
    families = [["rex", {"floor": 0.0}], ["wsd", {"decay": {"low": 0.1, "high": 0.3, "log": False}, "floor": 0.0}]]
    shared = {"warmup": {"low": 0.0, "high": 0.1, "log": False}}
    stored = [["s", {"kind": "schedule", "families": families, "shared": shared}]]
    space = space_from_json({"parameters": stored, "fidelity": None})
    assert [column.name for column in space.columns] == ["s", "s.warmup", "s.wsd.decay"]
    assert space.parameters["s"].check("s", {"family": "rex", "warmup": 0.1, "floor": 0.0}) == REX(warmup=0.1)


def test_a_schedule_in_json_need_not_repeat_what_is_fixed():
    space = Space(schedule=Schedule("cosine", warmup=0.02, floor=0.0, wsd={"decay": Real(0.05, 0.3)}))
    config = space.validate({"schedule": {"family": "wsd", "decay": 0.1}})
    assert config == {"schedule": WSD(decay=0.1, warmup=0.02)}


# --------------------------------------------------------------------------------------------------------------- curves


def test_progress_looks_closer_at_warmup_and_at_the_decay():
    assert ((PROGRESS > 0) & (PROGRESS <= 1)).all()
    gaps = np.diff(PROGRESS)
    assert (gaps > 0).all()
    assert gaps[PROGRESS[1:] <= 0.1].max() < gaps[(PROGRESS[1:] > 0.1) & (PROGRESS[1:] <= 0.8)].min() / 2
    assert gaps[PROGRESS[1:] > 0.8].max() < gaps[(PROGRESS[1:] > 0.1) & (PROGRESS[1:] <= 0.8)].min() / 2
    assert PROGRESS[-1] == 1


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_curves_of_points_are_those_of_long_runs(schedule):
    total, n = 10**7, 300
    x = points(schedule, n)
    curves = schedule.decode(x)
    tokens = np.full(n, total * 2.0**22)
    factors = schedule.curves(x, tokens)
    assert factors.shape == (n, len(PROGRESS))
    near = np.diff(PROGRESS).max()  # a jump is spread over the part around it
    for curve, row in zip(curves, factors, strict=True):
        jumps = [*getattr(curve, "milestones", ())]
        if curve.family == "piecewise":
            jumps = curve.boundaries or np.arange(1, len(curve.levels)) / len(curve.levels)
        clear = np.array([all(abs(p - jump) > near for jump in jumps) for p in PROGRESS])
        if isinstance(curve, InverseSqrt) and curve.warmup < 1e-4:
            continue
        expected = curve.factor(PROGRESS * total, total)
        np.testing.assert_allclose(row[clear], expected[clear], rtol=0, atol=2e-4, err_msg=repr(curve))


def test_a_jump_is_spread_over_the_part_of_training_it_falls_in():
    schedule = Schedule("piecewise", levels=(1.0, 0.0), boundaries=(Real(0.2, 0.6),), warmup=0.0)
    (row,) = schedule.curves(np.array([[0.5]]), None)  # at 0.4, one of PROGRESS
    np.testing.assert_allclose(row[np.isclose(PROGRESS, 0.4)], 0.5)
    assert set(np.round(row[~np.isclose(PROGRESS, 0.4)], 12)) == {0.0, 1.0}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_curves_are_continuous_in_every_setting(schedule):
    x = points(schedule, 200)
    for i, column in enumerate(schedule.columns("s")):
        if column.kind == "choice":
            continue
        line = np.repeat(x, 2, axis=0)
        line[1::2, i] = np.clip(line[1::2, i] + 1e-9, 0, 1)
        factors = schedule.curves(line, None)
        assert np.abs(factors[1::2] - factors[::2]).max() < 1e-4, column.name


def test_nearly_equal_curves_of_different_families_are_near():
    schedule = Schedule(
        "linear", warmup=Real(0, 0.1), floor=0.0, rex={"shape": Real(0.1, 1)}, wsd={"decay": Real(0.2, 0.9)}
    )
    curves = [Linear(warmup=0.05), REX(shape=0.999, warmup=0.05), WSD(decay=0.9, warmup=0.05), WSD(warmup=0.05)]
    line, rex, wsd, late = schedule.curves(schedule.encode(curves), None)
    assert np.abs(line - rex).max() < 1e-3
    assert np.abs(line - wsd).max() < 0.06
    assert np.abs(line - late).max() > 0.5


def test_a_power_curve_depends_on_the_tokens_of_the_run():
    schedule = Schedule("power", "cosine")
    x = np.tile(schedule.encode([Power(), Cosine()]), (2, 1))
    factors = schedule.curves(x, np.array([1e10, 1e10, 1e13, 1e13]))
    assert (factors[2, 20:-1] < factors[0, 20:-1]).all()
    assert (factors[1] == factors[3]).all()


def test_nothing_and_rows_without_columns_have_curves_too():
    assert Schedule("cosine").curves(np.empty((0, 2)), None).shape == (0, len(PROGRESS))
    rows = Schedule("cosine", floor=0.0, warmup=0.0).curves(np.empty((2, 0)), None)
    np.testing.assert_allclose(rows, np.tile(0.5 * (1 + np.cos(np.pi * PROGRESS)), (2, 1)), atol=1e-15)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(), f"Schedule needs at least one family; there are {EVERY}."),
        (lambda: Schedule("cosin"), "'cosin' is no schedule family; did you mean 'cosine'?"),
        (lambda: Schedule("zz"), f"'zz' is no schedule family; there are {EVERY}."),
        (lambda: Schedule("rex", "rex"), "Schedule has the family 'rex' twice; each may be there once."),
        (lambda: Schedule(wsd=0.2), "Schedule needs a dictionary of settings for wsd, got 0.2."),
        (
            lambda: Schedule("rex", cosin={}),
            "Schedule with the families ['rex'] has no setting 'cosin'; did you mean 'cosine'?",
        ),
        (
            lambda: Schedule("rex", warmpu=0.1),
            "Schedule with the families ['rex'] has no setting 'warmpu'; did you mean 'warmup'?",
        ),
        (lambda: Schedule(wsd={"decya": 0.1}), "Schedule wsd has no setting 'decya'; did you mean 'decay'?"),
        (
            lambda: Schedule(wsd={"zz": 0.1}),
            "Schedule wsd has no setting 'zz'; known are ['decay', 'warmup', 'floor'].",
        ),
        (lambda: Schedule("rex", floor="low"), "Schedule rex needs a number or a Real for floor, got 'low'."),
        (lambda: Schedule("rex", floor=None), "Schedule rex needs a number or a Real for floor, got None."),
        (
            lambda: Schedule("step", milestones=Real(0.1, 0.9)),
            "Schedule step needs a list of numbers or Reals for milestones, got Real(0.1, 0.9).",
        ),
        (
            lambda: Schedule("step", milestones=(0.1, "x")),
            "Schedule step needs a list of numbers or Reals for milestones, got (0.1, 'x').",
        ),
        (
            lambda: Schedule("wsd", warmup=0.5, decay=Real(0.1, 0.6)),
            "Schedule wsd needs warmup + decay <= 1, got warmup=0.5, decay=0.6.",
        ),
        (
            lambda: Schedule("wsd", warmup=0.6),
            "Schedule wsd needs warmup + decay <= 1, got warmup=0.6, decay=0.5.",
        ),
        (
            lambda: Schedule("wsd_exponential", floor=0.0),
            "Schedule wsd_exponential needs floor in (0, 1], a fraction of the peak, got floor=0.0.",
        ),
        (
            lambda: Schedule("step", milestones=(Real(0.2, 0.6), Real(0.5, 0.9))),
            "Schedule step needs milestones that increase within (0, 1), got milestones=(0.6, 0.5).",
        ),
        (
            lambda: Schedule("piecewise", boundaries=(0.5,)),
            "Schedule piecewise needs one boundary fewer than levels, got boundaries=(0.5,), levels=(1.0, 0.1, 0.01).",
        ),
    ],
)
def test_wrong_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cosine", "s must be a schedule such as Cosine(warmup=0.02), got 'cosine'."),
        (REX(), "s must be of a family in ['cosine', 'wsd', 'piecewise'], got REX(shape=0.5, warmup=0.0, floor=0.0)."),
        (Cosine(warmup=0.1), "s.warmup is fixed at 0.02 in this space, got 0.1."),
        (WSD(0.5, 0.02), "s.decay must be a number in [0.05, 0.3], got 0.5."),
        (Piecewise((1, 0.1), warmup=0.02), "s.levels has 3 items in this space, got (1.0, 0.1)."),
        (Piecewise((1, 0.1, 0.1), warmup=0.02), "s.levels.1 must be a number in [0.2, 0.5], got 0.1."),
        (Piecewise((0.9, 0.3, 0.1), warmup=0.02), "s.levels.0 is fixed at 1.0 in this space, got 0.9."),
        (
            Piecewise((1, 0.3, 0.1), (0.3, 0.6), warmup=0.02),
            "s.boundaries is fixed at None in this space, got (0.3, 0.6).",
        ),
        ({"family": "wsd"}, "s has no value for ['decay']; schedule wsd needs it in this space."),
        ({"family": "piecewise"}, "s has no value for ['levels']; schedule piecewise needs it in this space."),
        ({"family": []}, f"s: [] is no schedule family; there are {EVERY}."),
        ({"family": "wsdd", "decay": 0.1}, "s: 'wsdd' is no schedule family; did you mean 'wsd'?"),
        (
            {"family": "wsd", "decay": 0.1, 3: 4},
            "s: Schedule wsd has no setting 3; known are ['decay', 'warmup', 'floor'].",
        ),
        (
            {"family": "wsd", "decay": 0},
            "s: Schedule wsd needs decay in (0, 1], a fraction of the steps, got decay=0.0.",
        ),
    ],
)
def test_a_schedule_outside_the_parameter_is_refused(value, message):
    schedule = Schedule(
        "cosine",
        warmup=0.02,
        floor=0.0,
        wsd={"decay": Real(0.05, 0.3)},
        piecewise={"levels": (1.0, Real(0.2, 0.5), 0.1)},
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schedule.check("s", value)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(EVERY), min_size=1, unique=True), st.integers(0, 2**32 - 1))
def test_any_families_together_round_trip_through_the_cube_and_json(families, seed):
    schedule = Schedule(*families)
    curves = schedule.decode(points(schedule, 20, seed))
    assert [curve_from_json(json.loads(json.dumps(curve.to_json()))) for curve in curves] == curves
    encoded = schedule.encode(curves)
    np.testing.assert_allclose(schedule.encode(schedule.decode(encoded)), encoded, rtol=0, atol=1e-12)


def test_weights_from_gradient_norms_can_stand_in_a_space():
    refined = Refined.from_gradient_norms(np.linspace(3, 1, 200), nodes=5)
    schedule = Schedule("cosine", refined={"weights": refined.weights})
    assert schedule.decode(np.array([[0.9, 0.5, 0.5]])) == [refined]


def test_a_config_is_stable_until_the_first_of_its_parts_depends_on_the_length_of_the_run():
    switched = SwitchedMixture({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, 0.7)
    assert stable_until({"lr": 1e-3, "schedule": WSD(decay=0.2)}) == 0.8
    assert stable_until({"schedule": WSD(decay=0.2), "data": switched}) == 0.7
    assert stable_until({"schedule": WSD(decay=0.2), "weight_decay": Constant(), "data": {"a": 1.0}}) == 0.8
    assert stable_until({"schedule": WSD(decay=0.2), "weight_decay": Cosine()}) is None
    assert stable_until({"lr": 1e-3, "data": switched}) is None, "nothing is known of its learning rate"
