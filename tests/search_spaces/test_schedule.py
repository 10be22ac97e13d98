import json
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import FAMILIES, REX, WSD, Cosine, Linear, Real, Schedule, Space, curve_from_json


@st.composite
def curves(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    settings_ = {"warmup": draw(st.floats(0, 0.5)), "floor": draw(st.floats(0, 1))}
    if family == "wsd":
        settings_["decay"] = draw(st.floats(0.001, 0.5))
    return FAMILIES[family](**settings_)


def test_the_table_has_every_family_under_its_own_name():
    assert {name: family.family for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_cosine_is_at_the_mean_of_peak_and_floor_half_way(floor):
    assert Cosine(floor=floor).factor(50, 100) == pytest.approx((1 + floor) / 2, abs=1e-15)


def test_rex_is_at_two_thirds_half_way():
    assert REX().factor(50, 100) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_every_family_starts_at_the_peak_and_ends_at_its_floor(family, floor):
    curve = FAMILIES[family](warmup=0.1, floor=floor)
    assert curve.factor(9, 100) == 1.0
    assert curve.factor(10, 100) == 1.0
    assert curve.factor(100, 100) == pytest.approx(floor, abs=1e-15)


def test_families_equal_their_closed_forms_after_warmup():
    t, total, warm, floor = np.arange(40, 401), 400, 40, 0.1
    u = (t - warm) / (total - warm)
    forms = {
        "cosine": floor + 0.5 * (1 - floor) * (1 + np.cos(np.pi * u)),
        "linear": floor + (1 - floor) * (1 - u),
        "wsd": floor + (1 - floor) * np.where(t < 300, 1.0, (400 - t) / 100),
        "rex": floor + (1 - floor) * (1 - u) / (0.5 + 0.5 * (1 - u)),
    }
    assert set(forms) == set(FAMILIES)
    for family, expected in forms.items():
        own = {"decay": 0.25} if family == "wsd" else {}
        curve = FAMILIES[family](warmup=0.1, floor=floor, **own)
        np.testing.assert_allclose(curve.factor(t, total), expected, rtol=0, atol=1e-14)


def test_warmup_gives_the_first_step_one_part_and_the_last_the_peak():
    assert Linear(warmup=0.04).factor(np.arange(5), 100).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warmup_lasts_a_rounded_number_of_steps():
    assert Linear(warmup=0.3).factor([0, 1], 9).tolist() == [1 / 3, 2 / 3]  # 2.7 -> 3
    assert Linear(warmup=0.3).factor(0, 1) == 1.0  # 0.3 -> 0
    assert Linear(warmup=0.9).factor([0, 1, 2], 2).tolist() == [0.5, 1.0, 1.0]  # warm-up takes the whole run


@settings(max_examples=200, derandomize=True, deadline=None)
@given(curves(), st.integers(1, 10_000), st.floats(0, 1))
def test_every_factor_lies_between_nothing_and_the_peak(curve, total, share):
    step = int(share * total)
    factor = curve.factor(step, total)
    assert type(factor) is float
    assert 0 <= factor <= 1
    assert curve.factor(np.array([step]), total).tolist() == [factor]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(curves(), st.integers(1, 500))
def test_a_schedule_rises_in_warmup_and_never_after(curve, total):
    factors = curve.factor(np.arange(total + 1), total)
    warm = round(curve.warmup * total)
    assert (np.diff(factors[:warm]) > 0).all()
    assert (np.diff(factors[warm:]) <= 1e-15).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(curves())
def test_a_curve_comes_back_from_json(curve):
    assert curve_from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_a_curve_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Cosine().floor = 0.5


def test_total_steps_may_be_a_whole_float():
    assert Cosine().factor(3, 3e7 // 65536) == Cosine().factor(3, 457)


def torch_factors(make_scheduler, steps):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = make_scheduler(torch.optim.lr_scheduler, optimizer)
    factors = []
    for _ in range(steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_equal_those_of_torch_where_they_coincide(floor):
    steps = 50
    t = np.arange(steps)
    cosine = torch_factors(lambda s, o: s.CosineAnnealingLR(o, T_max=steps, eta_min=floor), steps)
    np.testing.assert_allclose(Cosine(floor=floor).factor(t, steps), cosine, rtol=0, atol=1e-12)
    linear = torch_factors(lambda s, o: s.LinearLR(o, 1.0, floor, total_iters=steps), steps)
    np.testing.assert_allclose(Linear(floor=floor).factor(t, steps), linear, rtol=0, atol=1e-12)

    def trapezoid(s, o):
        stable = s.ConstantLR(o, factor=1.0, total_iters=1)
        return s.SequentialLR(o, [stable, s.LinearLR(o, 1.0, floor, total_iters=10)], milestones=[40])

    np.testing.assert_allclose(
        WSD(decay=0.2, floor=floor).factor(t, steps), torch_factors(trapezoid, steps), atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_curve_drives_lambda_lr(family):
    curve = FAMILIES[family](warmup=0.1, floor=0.1)
    driven = torch_factors(lambda s, o: s.LambdaLR(o, lambda step: curve.factor(step, 30)), 30)
    np.testing.assert_allclose(driven, curve.factor(np.arange(30), 30), rtol=0, atol=1e-15)


def test_a_setting_for_every_family_is_one_column_and_any_other_one_a_family():
    schedule = Schedule("cosine", "linear", warmup=Real(0, 0.1), wsd={"decay": Real(0.1, 0.3)}, floor=0.1)
    names = ["schedule", "schedule.warmup", "schedule.wsd.decay"]
    assert [column.name for column in schedule.columns("schedule")] == names
    assert [column.when for column in schedule.columns("schedule")] == [(), (), ((0, 2),)]
    part = Schedule("cosine", "linear", floor=Real(0, 0.1), rex={"floor": 0.0})
    assert [column.name for column in part.columns("s")] == ["s", "s.cosine.floor", "s.linear.floor"]


def test_one_family_needs_no_column_of_its_own():
    assert Schedule("wsd", decay=Real(0.1, 0.3)).columns("s")[0].name == "s.decay"
    assert Schedule("cosine", warmup=0.02).columns("s") == ()
    assert Schedule("cosine", warmup=0.02).decode(np.empty((2, 0))) == [Cosine(warmup=0.02)] * 2


def test_own_settings_go_before_those_for_all():
    schedule = Schedule("cosine", warmup=0.1, rex={"warmup": 0.0})
    assert schedule.decode(np.array([[0.2], [0.8]])) == [Cosine(warmup=0.1), REX(warmup=0.0)]


def test_a_schedule_in_json_need_not_repeat_what_is_fixed():
    space = Space(schedule=Schedule("cosine", warmup=0.02, wsd={"decay": Real(0.05, 0.3)}))
    config = space.validate({"schedule": {"family": "wsd", "decay": 0.1}})
    assert config == {"schedule": WSD(decay=0.1, warmup=0.02)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup=1), "Schedule cosine needs warmup in [0, 1), a fraction of the steps, got warmup=1.0."),
        (lambda: Cosine(floor=-1), "Schedule cosine needs floor in [0, 1], a fraction of the peak, got floor=-1.0."),
        (lambda: Cosine(warmup="x"), "Schedule cosine needs a number for warmup, got 'x'."),
        (lambda: WSD(decay=0), "Schedule wsd needs decay in (0, 1], a fraction of the steps, got decay=0.0."),
        (lambda: WSD(0.6, 0.5), "Schedule wsd needs warmup + decay <= 1, got warmup=0.5, decay=0.6."),
        (lambda: REX().factor(11, 10), "step must be in [0, total_steps=10], got 11."),
        (lambda: REX().factor([3, -1], 10), "step must be in [0, total_steps=10], got -1."),
        (lambda: REX().factor(float("nan"), 10), "step must be in [0, total_steps=10], got nan."),
        (lambda: REX().factor(0, 0), "total_steps must be a whole number >= 1, got 0."),
        (lambda: REX().factor(0, 1.5), "total_steps must be a whole number >= 1, got 1.5."),
        (
            lambda: curve_from_json({"family": "cos"}),
            "A schedule needs a family, one of ['cosine', 'linear', 'wsd', 'rex'], got family='cos'.",
        ),
        (
            lambda: curve_from_json({"family": "rex", "decay": 0.1}),
            "Schedule rex has no setting ['decay']; it has ['warmup', 'floor'].",
        ),
        (lambda: Schedule(), "Schedule needs at least one family; there are ['cosine', 'linear', 'wsd', 'rex']."),
        (lambda: Schedule("cos"), "'cos' is no schedule family; there are ['cosine', 'linear', 'wsd', 'rex']."),
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
        (
            lambda: Schedule("wsd", warmup=0.5, decay=Real(0.1, 0.6)),
            "Schedule wsd needs warmup + decay <= 1, got warmup=0.5, decay=0.6.",
        ),
    ],
)
def test_wrong_schedules_and_steps_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cosine", "s must be a schedule such as Cosine(warmup=0.02), got 'cosine'."),
        (REX(), "s must be of a family in ['cosine', 'wsd'], got REX(warmup=0.0, floor=0.0)."),
        (Cosine(warmup=0.1), "s.warmup is fixed at 0.02 in this space, got 0.1."),
        (WSD(0.5, 0.02), "s.decay must be a number in [0.05, 0.3], got 0.5."),
        ({"family": "wsd"}, "s has no value for ['decay']; schedule wsd needs it in this space."),
        (
            {"family": []},
            "A schedule needs a family, one of ['cosine', 'linear', 'wsd', 'rex'], got family=[].",
        ),
    ],
)
def test_a_schedule_outside_the_parameter_is_refused(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Schedule("cosine", warmup=0.02, wsd={"decay": Real(0.05, 0.3)}).check("s", value)
