import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.curve import (
    FAMILIES,
    REX,
    WSD,
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Piecewise,
    Power,
    Refined,
    Step,
    WSDExponential,
    WSDHalfLife,
    WSDSqrt,
    curve_from_json,
)

EVERY = list(FAMILIES)
WITH_FLOOR = ["linear", "cosine", "wsd", "wsd_sqrt", "wsd_exponential", "rex"]
OWN = {
    "wsd": {"decay": st.floats(0.001, 0.5)},
    "wsd_sqrt": {"decay": st.floats(0.001, 0.5)},
    "wsd_exponential": {"decay": st.floats(0.001, 0.5), "floor": st.floats(1e-9, 1)},
    "wsd_half_life": {"decay": st.floats(0.001, 0.5), "half_life": st.floats(0.001, 1)},
    "rex": {"shape": st.floats(0.01, 1)},
    "power": {"decay": st.floats(0.001, 0.5), "b": st.floats(-1, -0.1), "batch_tokens": st.floats(1e3, 1e8)},
    "onecycle": {"div": st.floats(1, 100), "final_div": st.floats(1, 1e6)},
    "step": {"gamma": st.floats(0.01, 1), "milestones": st.sampled_from([(), (0.5,), (0.3, 0.6, 0.9)])},
    "exponential": {"time_constant": st.floats(0.01, 2)},
    "piecewise": {"levels": st.lists(st.floats(0, 1), min_size=1, max_size=4)},
    "refined": {"weights": st.lists(st.floats(0.01, 100), min_size=2, max_size=5)},
}


@st.composite
def curves(draw):
    family = draw(st.sampled_from(EVERY))
    given_ = {"warmup": draw(st.floats(0, 0.5))}
    if "floor" in FAMILIES[family].settings():
        given_["floor"] = draw(st.floats(0, 1))
    return FAMILIES[family](**given_ | {name: draw(values) for name, values in OWN.get(family, {}).items()})


def test_the_table_has_every_family_under_its_own_name():
    assert {name: family.family for name, family in FAMILIES.items()} == {name: name for name in FAMILIES}


# ---------------------------------------------------------------------------------------------------- published values

TABLE = {
    "constant": (Constant(), 0.5, 1),
    "cosine half way": (Cosine(), 0.5, 0.5),
    "cosine half way to a floor": (Cosine(floor=0.1), 0.5, 0.55),
    "linear": (Linear(), 0.3, 0.7),
    "linear with warm-up": (Linear(warmup=0.2), 0.6, 0.5),
    "wsd before its decay": (WSD(decay=0.2), 0.8, 1),
    "wsd half way through its decay": (WSD(decay=0.2), 0.9, 0.5),
    "1-sqrt where its decay begins": (WSDSqrt(decay=0.1), 0.9, 1),
    "1-sqrt at a quarter": (WSDSqrt(decay=0.2), 0.85, 0.5),
    "1-sqrt at its end": (WSDSqrt(decay=0.2), 1, 0),
    "multi-power-law, half way from 3e-4 to 3e-5": (WSDExponential(decay=0.2), 0.9, math.sqrt(3e-4 * 3e-5) / 3e-4),
    "multi-power-law, as printed": (WSDExponential(decay=0.2), 0.9, 9.486832980505138e-5 / 3e-4),
    "MiniCPM after one half-life": (WSDHalfLife(decay=0.1, half_life=0.05), 0.95, 0.5),
    "MiniCPM after two": (WSDHalfLife(decay=0.1, half_life=0.05), 1, 0.25),
    "exponential after one time constant": (Exponential(time_constant=0.25), 0.25, math.exp(-1)),
    "inverse square root at four times warm-up": (InverseSqrt(warmup=0.1), 0.4, 0.5),
    "step before its first milestone": (Step(), 0.299, 1),
    "step at 30%": (Step(), 0.3, 0.1),
    "step at 60%": (Step(), 0.6, 0.01),
    "step at 90%": (Step(), 0.9, 0.001),
    "onecycle at its start": (OneCycle(), 0, 1 / 25),
    "onecycle at its end": (OneCycle(), 1, 1 / (25 * 1e4)),
    "rex half way": (REX(), 0.5, 2 / 3),
    "the port of rex half way": (REX(shape=0.1), 0.5, 0.5 / 0.55),
    "piecewise, equal stages": (Piecewise(levels=(1, 0.5, 0.2, 0.1)), 0.5, 0.2),
    "piecewise, own stages": (Piecewise(levels=(1, 0.5), boundaries=(0.7,)), 0.5, 1),
    "refined from constant norms": (Refined(), 0.3, 0.7),
}


@pytest.mark.parametrize(("curve", "at", "value"), TABLE.values(), ids=TABLE)
def test_a_schedule_has_its_published_value(curve, at, value):
    total = 1000
    assert curve.factor(round(at * total), total) == pytest.approx(value, abs=1e-12)


def test_power_follows_its_published_law():
    total, batch, tokens = 100_000, 1024, 2.0**22
    curve = Power(a=4.0, b=-0.51, batch_tokens=tokens, lr_max=0.02, decay=0.1)
    step = np.array([0, 100, 50_000, 89_999])
    law = batch * 4.0 * ((step + 1) * tokens) ** -0.51
    np.testing.assert_allclose(0.02 * curve.factor(step, total), np.minimum(0.02, law), rtol=1e-12)
    assert curve.factor(step, total)[:2].tolist() == [1, 1]
    ends = Power(decay=0.1, floor=0.25).factor([90_000, 100_000], total) / Power(decay=1e-9).factor(
        [90_000, 99_999], total
    )
    np.testing.assert_allclose(ends, [1, 0.25], rtol=1e-4)
    half = (math.exp(-0.5) - math.exp(-1)) / (1 - math.exp(-1))
    assert curve.factor(95_000, total) * 0.02 == pytest.approx(
        batch * 4.0 * (95_001 * tokens) ** -0.51 * half, rel=1e-12
    )


def test_powers_warmup_leads_to_the_law_in_the_units_of_dolomite():
    total, warm, tokens, a, b = 1000, 100, 1e6, 3.0, -0.51
    curve = Power(a=a, b=b, batch_tokens=tokens, sequence_tokens=1e3, lr_max=10.0, decay=0.1, warmup=0.1)

    def dolomite(step):
        cap = min(1, a * 1e3 / 10.0 * (warm * tokens) ** b)
        return cap / warm * step if step <= warm else min(1, a * 1e3 / 10.0 * (step * tokens) ** b)

    assert dolomite(warm) < 1
    t = np.arange(900)
    np.testing.assert_allclose(curve.factor(t, total), [dolomite(step + 1) for step in t], rtol=1e-12)


@pytest.mark.parametrize("family", WITH_FLOOR)
@pytest.mark.parametrize("floor", [0.01, 0.25])
def test_a_schedule_with_a_floor_starts_at_the_peak_and_ends_there(family, floor):
    curve = FAMILIES[family](warmup=0.1, floor=floor)
    assert curve.factor(9, 100) == 1.0
    assert curve.factor(10, 100) == 1.0
    assert curve.factor(100, 100) == pytest.approx(floor, abs=1e-15)


def test_families_equal_their_closed_forms_after_warmup():
    t, total, warm, floor = np.arange(40, 401), 400, 40, 0.1
    u = (t - warm) / (total - warm)
    v = np.maximum(t - 300, 0) / 100  # with decay 0.25
    forms = {
        "constant": 1 + 0 * t,
        "linear": floor + (1 - floor) * (1 - u),
        "cosine": floor + 0.5 * (1 - floor) * (1 + np.cos(np.pi * u)),
        "wsd": floor + (1 - floor) * (1 - v),
        "wsd_sqrt": floor + (1 - floor) * (1 - np.sqrt(v)),
        "wsd_exponential": floor**v,
        "wsd_half_life": 0.5 ** (np.maximum(t - 300, 0) / (0.03 * total)),
        "rex": floor + (1 - floor) * (1 - u) / (0.5 + 0.5 * (1 - u)),
        "inverse_sqrt": np.sqrt(warm / t),
        "step": 0.1 ** (0 + (t >= 120) + (t >= 240) + (t >= 360)),
        "exponential": np.exp(-u / 0.3),
        "piecewise": np.select([t < 133, t < 267], [1.0, 0.3], 0.1),  # 133.3 and 266.7 are rounded
        "refined": 1 - u,
    }
    assert set(forms) == set(FAMILIES) - {"power", "onecycle"}
    for family, expected in forms.items():
        given_ = {"warmup": 0.1, "floor": floor, "decay": 0.25}
        curve = FAMILIES[family](**{name: v for name, v in given_.items() if name in FAMILIES[family].settings()})
        np.testing.assert_allclose(curve.factor(t, total), expected, rtol=0, atol=1e-12, err_msg=family)


def test_different_families_meet_where_their_settings_make_them_equal():
    t, total = np.arange(1001), 1000
    for one, other in [
        (REX(shape=1, warmup=0.1), Linear(warmup=0.1)),
        (WSD(decay=1, floor=0.1), Linear(floor=0.1)),
        (Refined((3, 3, 3), warmup=0.1), Linear(warmup=0.1)),
        (WSDExponential(decay=1, floor=math.exp(-2)), Exponential(time_constant=0.5)),
        (WSDHalfLife(decay=1, half_life=0.5 * math.log(2)), Exponential(time_constant=0.5)),
        (Step(gamma=0.5, milestones=(0.5, 0.75)), Piecewise(levels=(1, 0.5, 0.25), boundaries=(0.5, 0.75))),
        (Linear(floor=1, warmup=0.1), Constant(warmup=0.1)),
    ]:
        np.testing.assert_allclose(one.factor(t, total), other.factor(t, total), rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- warm-up


def test_warmup_gives_the_first_step_one_part_and_the_last_the_peak():
    assert Linear(warmup=0.04).factor(np.arange(5), 100).tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warmup_lasts_a_rounded_number_of_steps():
    assert Linear(warmup=0.3).factor([0, 1], 9).tolist() == [1 / 3, 2 / 3]  # 2.7 -> 3
    assert Linear(warmup=0.3).factor(0, 1) == 1.0  # 0.3 -> 0
    assert Linear(warmup=0.9).factor([0, 1, 2], 2).tolist() == [0.5, 1.0, 1.0]  # warm-up takes the whole run


def test_warmup_leads_to_the_first_level_or_node():
    assert Piecewise(levels=(0.5, 1), warmup=0.2).factor([0, 1, 2, 5], 10).tolist() == [0.25, 0.5, 0.5, 1]
    curve = Refined(weights=(1, 2, 1), warmup=0.2)  # nodes 3, 2, 0 over their largest
    np.testing.assert_allclose(curve.factor([0, 1, 2, 6, 10], 10), [0.5, 1, 1, 2 / 3, 0], atol=1e-15)


def test_inverse_sqrt_without_warmup_falls_from_the_first_step():
    np.testing.assert_allclose(InverseSqrt(warmup=0).factor([0, 1, 4], 100), [1, 1, 0.5], atol=1e-15)


@pytest.mark.parametrize(
    ("curve", "end"),
    [
        (Constant(warmup=0.1), 1.0),
        (WSD(decay=0.25, warmup=0.1), 0.75),
        (WSDSqrt(decay=0.25), 0.75),
        (WSDExponential(decay=0.25), 0.75),
        (WSDHalfLife(decay=0.25), 0.75),
        (Step(milestones=(0.3, 0.6)), 0.3),
        (Step(milestones=()), 1.0),
        (Piecewise(levels=(1, 0.5, 0.1), boundaries=(0.4, 0.6)), 0.4),
        (Piecewise(levels=(1, 0.5)), 0.5),
        (WSD(decay=0.5, warmup=0.5), None),
        (Step(milestones=(0.3,), warmup=0.4), None),
        *((FAMILIES[name](), None) for name in ("linear", "cosine", "rex", "power", "inverse_sqrt", "onecycle")),
        (Exponential(), None),
        (Refined(), None),
    ],
)
def test_a_stable_phase_ends_where_the_rate_leaves_the_peak(curve, end):
    assert curve.stable_until == end


# ----------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=200, derandomize=True, deadline=None)
@given(curves(), st.integers(10, 500), st.integers(1, 10))
def test_in_its_stable_phase_a_run_is_the_beginning_of_longer_ones_but_for_warm_up(curve, total, times):
    end = int((curve.stable_until or 0.0) * total)
    warm = round(curve.warmup * total * times)
    steps = np.arange(min(warm, end), end)
    assert curve.factor(steps, total).tolist() == curve.factor(steps, times * total).tolist()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(curves(), st.integers(1, 10_000), st.floats(0, 1))
def test_every_factor_lies_between_nothing_and_the_peak(curve, total, share):
    step = int(share * total)
    factor = curve.factor(step, total)
    assert type(factor) is float
    assert 0 <= factor <= 1 + 1e-15
    assert curve.factor(np.array([step]), total).tolist() == pytest.approx([factor], rel=1e-15, abs=0)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(curves(), st.integers(1, 500))
def test_a_schedule_rises_in_warmup_and_never_after(curve, total):
    if isinstance(curve, Piecewise | Refined | OneCycle):
        return  # any levels, any weights; onecycle has torch's steps
    factors = curve.factor(np.arange(total + 1), total)
    warm = round(curve.warmup * total)
    assert (np.diff(factors[:warm]) > 0).all()
    assert (np.diff(factors[warm:]) <= 1e-15).all()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(curves())
def test_a_curve_comes_back_from_json_and_pickle_equal_with_an_equal_hash(curve):
    written = curve.to_json()
    assert json.loads(json.dumps(written)) == written
    for again in (curve_from_json(json.loads(json.dumps(written))), pickle.loads(pickle.dumps(curve))):
        assert again == curve
        assert hash(again) == hash(curve)
        assert repr(again) == repr(curve)


def test_curves_are_equal_by_family_and_settings():
    assert Cosine(warmup=0) == Cosine()
    assert Cosine() != Linear()
    assert WSD() != WSDSqrt()
    assert Step(milestones=[0.5]) == Step(milestones=np.array([0.5])) != Step(milestones=(0.4,))


@pytest.mark.parametrize("family", EVERY)
def test_a_curve_cannot_be_changed(family):
    with pytest.raises(FrozenInstanceError):
        FAMILIES[family]().warmup = 0.5


def test_total_steps_may_be_a_whole_float():
    assert Cosine().factor(3, 3e7 // 65536) == Cosine().factor(3, 457)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(curves())
def test_the_limit_of_many_steps_is_the_factor_of_a_long_run(curve):
    fractions, total, blur = np.array([0.003, 0.021, 0.0877, 0.29, 0.501, 0.77, 0.899, 0.96, 1.0]), 10**9, 1e-7
    if isinstance(curve, InverseSqrt):
        curve = InverseSqrt(warmup=max(curve.warmup, 0.001))  # without, it depends on the number of steps
    batch = curve.batch_tokens if isinstance(curve, Power) else 1.0
    limit = curve.limit(fractions, blur, total * batch)
    steps = np.round(fractions * total)
    np.testing.assert_allclose(limit, curve.factor(steps, total), rtol=0, atol=1e-6)


def test_a_power_of_unknown_tokens_is_that_of_ten_thousand_steps():
    p = np.array([0.1, 0.5, 0.95])
    np.testing.assert_allclose(
        Power(lr_max=1.0).limit(p, 0.01), Power(lr_max=1.0).factor(p * 10_000 - 1, 10_000), rtol=5e-3
    )
    assert (Power(lr_max=1.0).limit(p, 0.01, 1e13) < Power(lr_max=1.0).limit(p, 0.01, 1e12)).all()


# ---------------------------------------------------------------------------------------------------------------- torch


def torch_values(make_scheduler, steps, key="lr"):
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    scheduler = make_scheduler(torch.optim.lr_scheduler, optimizer)
    values = []
    for step in range(steps):
        values.append(optimizer.param_groups[0][key])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return values


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_schedules_equal_those_of_torch_where_they_coincide(steps):
    same = [
        (Cosine(), lambda s, o: s.CosineAnnealingLR(o, T_max=steps)),
        (Cosine(floor=0.1), lambda s, o: s.CosineAnnealingLR(o, T_max=steps, eta_min=0.1)),
        (Linear(floor=0.1), lambda s, o: s.LinearLR(o, 1.0, 0.1, total_iters=steps)),
        (Linear(), lambda s, o: s.PolynomialLR(o, total_iters=steps, power=1.0)),
        (Constant(), lambda s, o: s.ConstantLR(o, factor=1.0, total_iters=steps)),
        (Step(), lambda s, o: s.MultiStepLR(o, [round(m * steps) for m in (0.3, 0.6, 0.9)], gamma=0.1)),
        (Step(0.5, (0.7,)), lambda s, o: s.MultiStepLR(o, [round(0.7 * steps)], gamma=0.5)),
        (Exponential(0.4), lambda s, o: s.ExponentialLR(o, gamma=math.exp(-1 / (0.4 * steps)))),
    ]
    for curve, scheduler in same:
        np.testing.assert_allclose(
            curve.factor(np.arange(steps), steps), torch_values(scheduler, steps), rtol=0, atol=1e-12, err_msg=curve
        )


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_equals_torchs_constant_and_linear_schedules_in_sequence(floor):
    def trapezoid(s, o):
        stable = s.ConstantLR(o, factor=1.0, total_iters=1)
        return s.SequentialLR(o, [stable, s.LinearLR(o, 1.0, floor, total_iters=10)], milestones=[40])

    ours = WSD(decay=0.2, floor=floor).factor(np.arange(50), 50)
    np.testing.assert_allclose(ours, torch_values(trapezoid, 50), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.45])
def test_onecycle_equals_torchs_rate_and_momentum(steps, warmup):
    curve = OneCycle(warmup=warmup, div=10, final_div=100)

    def scheduler(s, o):
        return s.OneCycleLR(o, 1.0, total_steps=steps, pct_start=warmup, div_factor=10, final_div_factor=100)

    t = np.arange(steps)
    np.testing.assert_allclose(curve.factor(t, steps), torch_values(scheduler, steps), rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.momentum(t, steps), torch_values(scheduler, steps, "momentum"), rtol=0, atol=1e-12)
    assert curve.factor(steps, steps) == curve.factor(steps - 1, steps)
    assert type(curve.momentum(0, steps)) is float


def test_onecycle_with_a_warmup_of_one_step_starts_at_its_peak():
    assert OneCycle(warmup=0.1).factor(0, 10) == 1.0  # where torch divides by zero


@pytest.mark.parametrize("family", EVERY)
def test_a_curve_drives_lambda_lr(family):
    curve = FAMILIES[family](warmup=0.1)
    driven = torch_values(lambda s, o: s.LambdaLR(o, lambda step: curve.factor(step, 30)), 30)
    np.testing.assert_allclose(driven, curve.factor(np.arange(30), 30), rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------- areas


def brute_areas(eta, first, momentum):
    """S_1 and S_2 as they are written: a sum, and a double sum over the steps after warm-up."""
    s2 = sum((eta[k - 1] - eta[k]) * momentum ** (i - k) for i in range(len(eta)) for k in range(max(first, 1), i + 1))
    return sum(eta), s2


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_areas_equal_the_double_sum(family, momentum):
    total, warmup = 90, 0.1
    curve = FAMILIES[family](warmup=warmup)
    s1, s2 = brute_areas(curve.factor(np.arange(total), total).tolist(), round(warmup * total), momentum)
    assert curve.s1(total) == pytest.approx(s1, abs=1e-10)
    assert curve.s2(total, momentum) == pytest.approx(s2, abs=1e-10)
    assert type(curve.s1(total)) is type(curve.s2(total)) is float


def test_areas_of_a_straight_line_are_known():
    assert Linear().s1(100) == pytest.approx(50.5, abs=1e-12)
    assert Linear().s2(100, momentum=1.0) == pytest.approx(49.5, abs=1e-12)  # drops of 1/100, kept 99, 98 .. 1 steps
    assert Constant(warmup=0.1).s2(100) == 0
    assert Cosine().s2(1) == 0
    assert Cosine().s1(1) == 1


# -------------------------------------------------------------------------------------------------------------- refined


@pytest.mark.parametrize("total", [1, 2, 10, 997])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_refined_from_constant_norms_is_linear(total, n):
    t = np.arange(total + 1)
    np.testing.assert_allclose(Refined((0.7,) * n).factor(t, total), Linear().factor(t, total), rtol=0, atol=1e-12)
    for optimizer in ("adam", "sgd"):
        curve = Refined.from_gradient_norms([0.3] * 100, optimizer, nodes=n)
        np.testing.assert_allclose(curve.factor(t, total), Linear().factor(t, total), rtol=0, atol=1e-12)


def closed_form(norms, power):
    """eta_t = w_t * tail_(t+1), rescaled to a maximum of one, of the last step none."""
    w = norms**power
    eta = np.append(w[:-1] * np.cumsum(w[::-1])[::-1][1:], 0.0)
    return eta / eta.max()


@pytest.mark.parametrize(("optimizer", "power"), [("adam", -1.0), ("sgd", -2.0)])
def test_refined_has_the_published_form_at_its_nodes(optimizer, power):
    t = np.arange(101)
    norms = 1 + 3 * np.exp(-t / 10) + t / 100
    curve = Refined.from_gradient_norms(norms, optimizer, window=0, nodes=101)
    np.testing.assert_allclose(curve.factor(t, 100), closed_form(norms, power), rtol=0, atol=1e-12)
    assert curve.factor(0, 100) < 1  # its own warm-up


def test_refined_smooths_by_a_running_median_reflected_at_the_ends():
    norms = np.array([9.0, 1, 1, 1, 7, 1, 1, 2, 2, 5])
    smooth = np.array([1.0, 1, 1, 1, 1, 1, 1, 2, 2, 2])
    ours = Refined.from_gradient_norms(norms, window=0.3, nodes=10)
    assert ours == Refined.from_gradient_norms(smooth, window=0, nodes=10)


def test_few_nodes_come_near_the_curve_of_every_step():
    t = np.arange(10_000)
    norms = (1 + 2 * np.exp(-t / 800) + t / 10_000) * np.random.default_rng(0).lognormal(0, 0.2, len(t))
    few, many = (Refined.from_gradient_norms(norms, nodes=n) for n in (50, 1000))
    assert len(few.weights) == 50
    assert np.abs(few.factor(t, 10_000) - many.factor(t, 10_000)).max() < 0.03


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup=1), "Schedule cosine needs warmup in [0, 1), a fraction of the steps, got warmup=1.0."),
        (lambda: Cosine(floor=-1), "Schedule cosine needs floor in [0, 1], a fraction of the peak, got floor=-1.0."),
        (lambda: Cosine(warmup="x"), "Schedule cosine needs a finite number for warmup, got 'x'."),
        (lambda: WSD(decay=0), "Schedule wsd needs decay in (0, 1], a fraction of the steps, got decay=0.0."),
        (lambda: WSD(0.6, 0.5), "Schedule wsd needs warmup + decay <= 1, got warmup=0.5, decay=0.6."),
        (
            lambda: WSDExponential(floor=0),
            "Schedule wsd_exponential needs floor in (0, 1], a fraction of the peak, got floor=0.0.",
        ),
        (
            lambda: WSDHalfLife(half_life=0),
            "Schedule wsd_half_life needs half_life > 0, a fraction of the steps, got half_life=0.0.",
        ),
        (lambda: REX(shape=0), "Schedule rex needs shape in (0, 1], got shape=0.0."),
        (lambda: Power(batch_tokens=0), "Schedule power needs batch_tokens > 0, got batch_tokens=0.0."),
        (lambda: Power(b=0.5), "Schedule power needs b < 0, got b=0.5."),
        (lambda: OneCycle(div=0.5), "Schedule onecycle needs div >= 1, got div=0.5."),
        (lambda: Step(gamma=2), "Schedule step needs gamma in (0, 1], got gamma=2.0."),
        (
            lambda: Step(milestones=(0.6, 0.3)),
            "Schedule step needs milestones that increase within (0, 1), got milestones=(0.6, 0.3).",
        ),
        (lambda: Step(milestones=0.3), "Schedule step needs a list of finite numbers for milestones, got 0.3."),
        (lambda: Power(a=math.inf), "Schedule power needs a finite number for a, got inf."),
        (lambda: Exponential(0), "Schedule exponential needs time_constant > 0, got time_constant=0.0."),
        (lambda: Piecewise(levels=None), "Schedule piecewise needs a list of finite numbers for levels, got None."),
        (lambda: Piecewise(levels=["a"]), "Schedule piecewise needs a list of finite numbers for levels, got ['a']."),
        (
            lambda: Piecewise(levels=(1, 2)),
            "Schedule piecewise needs levels in [0, 1], fractions of the peak, got levels=(1.0, 2.0).",
        ),
        (
            lambda: Piecewise(levels=(1, 0.1), boundaries=(0.2, 0.3)),
            "Schedule piecewise needs one boundary fewer than levels, got boundaries=(0.2, 0.3), levels=(1.0, 0.1).",
        ),
        (
            lambda: Piecewise(boundaries=(0.3, 0.3)),
            "Schedule piecewise needs boundaries that increase within (0, 1), got boundaries=(0.3, 0.3).",
        ),
        (
            lambda: Refined(weights=(1, 0)),
            "Schedule refined needs at least two weights > 0, got weights=(1.0, 0.0).",
        ),
        (
            lambda: Refined.from_gradient_norms([1, 2], "lion"),
            "Refinement knows optimizer=['adam', 'sgd'], got 'lion'.",
        ),
        (
            lambda: Refined.from_gradient_norms([1, 0]),
            "Refinement needs a gradient norm > 0 for each of at least two steps, got [1, 0].",
        ),
        (
            lambda: Refined.from_gradient_norms([1, 2], window=2),
            "Refinement needs window in [0, 1], a fraction of the steps, got 2.",
        ),
        (lambda: Refined.from_gradient_norms([1, 2], nodes=1), "Refinement needs at least two nodes, got 1."),
        (lambda: REX().factor(11, 10), "step must be in [0, total_steps=10], got 11."),
        (lambda: REX().factor([3, -1], 10), "step must be in [0, total_steps=10], got -1."),
        (lambda: REX().factor(float("nan"), 10), "step must be in [0, total_steps=10], got nan."),
        (lambda: REX().factor(0, 0), "total_steps must be a whole number >= 1, got 0."),
        (lambda: REX().s1(1.5), "total_steps must be a whole number >= 1, got 1.5."),
        (lambda: REX().s2(10, momentum=2), "S_2 needs momentum in [0, 1], got 2."),
        (lambda: curve_from_json({"family": "cosin"}), "'cosin' is no schedule family; did you mean 'cosine'?"),
        (lambda: curve_from_json({"warmup": 0.1}), f"None is no schedule family; there are {EVERY}."),
        (
            lambda: curve_from_json({"family": "rex", "flor": 0.1}),
            "Schedule rex has no setting 'flor'; did you mean 'floor'?",
        ),
        (
            lambda: curve_from_json({"family": "rex", "decay": 0.1}),
            "Schedule rex has no setting 'decay'; known are ['shape', 'warmup', 'floor'].",
        ),
    ],
)
def test_wrong_curves_and_steps_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
