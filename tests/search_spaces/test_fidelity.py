import json
import math
import pickle
import re

import numpy as np
import pytest

from search_spaces import (
    Fidelity,
    Integer,
    MeasuredCost,
    Real,
    Scale,
    Space,
    batch_tokens,
    space_from_json,
    space_to_json,
)


def by_steps(scale):
    return 1e3 * scale["steps"]


def free(scale):
    return 0


@pytest.fixture
def fidelity():
    return Fidelity(
        params={"tiny": 1e5, "small": 1e6}, tokens=(1e6, 1e7, 3e7), target={"params": "small", "tokens": 3e7}
    )


def test_a_scale_is_a_hashable_mapping_of_numbers(fidelity):
    scale = fidelity.scale({"params": "tiny", "tokens": 1e7})
    assert dict(scale) == {"params": 1e5, "tokens": 1e7} == scale.to_json()
    assert scale == fidelity.scale({"tokens": 1e7, "params": 1e5}) == Scale({"tokens": 1e7, "params": 1e5})
    assert len({scale, Scale({"params": 1e5, "tokens": 1e7}), fidelity.target}) == 2
    assert pickle.loads(pickle.dumps(scale)) == scale
    assert pickle.loads(pickle.dumps(scale)).label("params") == "tiny"
    with pytest.raises(KeyError):
        scale["steps"]


def test_a_rung_without_a_label_is_called_by_its_number(fidelity):
    assert fidelity.target.label("params") == "small"
    assert fidelity.target.label("tokens") == "3e+07"
    assert repr(fidelity.target) == "Scale(params=small, tokens=3e+07)"


def test_a_scale_without_axes_is_empty():
    assert dict(Scale()) == {}
    assert Scale() == Scale({})


def test_a_scale_read_from_json_has_its_labels_again(fidelity):
    assert fidelity.scale(fidelity.target.to_json()).label("params") == "small"


def test_rungs_are_sorted_and_made_floats():
    axes = Fidelity(params={"big": 10, "small": 1}, tokens=[3, 2], target={"params": "big", "tokens": 3}).axes
    assert [(axis.values, axis.labels) for axis in axes] == [((1.0, 10.0), ("small", "big")), ((2.0, 3.0), ())]
    assert [(axis.low, axis.high, axis.rungs) for axis in axes] == [(1.0, 10.0, True), (2.0, 3.0, True)]


def test_cost_is_six_n_d_and_relative_to_the_top(fidelity):
    assert fidelity.cost({"params": "tiny", "tokens": 1e7}) == 6 * 1e5 * 1e7
    assert fidelity.relative_cost({"params": "tiny", "tokens": 1e7}) == pytest.approx(1 / 30)
    assert fidelity.relative_cost(fidelity.target) == 1


def test_log2_counts_doublings_from_the_target(fidelity):
    expected = [math.log2(0.1), math.log2(1 / 3)]
    np.testing.assert_allclose(fidelity.log2({"params": "tiny", "tokens": 1e7}), expected, rtol=1e-15)


def test_cells_are_all_rungs_up_to_the_top():
    fidelity = Fidelity(params=(1, 2, 4), tokens=(10, 20), target={"params": 2, "tokens": 20})
    assert [tuple(cell.values()) for cell in fidelity.cells()] == [(1, 10), (1, 20), (2, 10), (2, 20)]


def test_cells_of_a_range_are_log_spaced_up_to_the_top():
    fidelity = Fidelity(steps=Real(1, 1e6), target={"steps": 1e3}, cost=by_steps)
    np.testing.assert_allclose([cell["steps"] for cell in fidelity.cells()], [1, 10, 100, 1000])
    whole = Fidelity(steps=Integer(2, 9), target={"steps": 9}, cost=by_steps)
    assert [cell["steps"] for cell in whole.cells()] == [2, 3, 5, 9]
    smallest = Fidelity(steps=Integer(2, 9), target={"steps": 2}, cost=by_steps)
    assert [cell["steps"] for cell in smallest.cells()] == [2]


def test_with_runnable_the_target_may_lie_beyond_the_axes():
    fidelity = Fidelity(
        params=(1e5, 1e6),
        tokens=(1e7,),
        runnable={"params": 1e6, "tokens": 1e7},
        target={"params": 1e9, "tokens": 2e10},
    )
    assert fidelity.top == fidelity.runnable == Scale({"params": 1e6, "tokens": 1e7})
    assert fidelity.cost(fidelity.target) == 6 * 1e9 * 2e10
    assert fidelity.relative_cost(fidelity.top) == 1
    assert fidelity.top in fidelity.cells()


def test_a_scale_beyond_the_axes_must_be_asked_for(fidelity):
    far = {"params": 1e9, "tokens": 2e10}
    assert dict(fidelity.scale(far, beyond=True)) == far
    with pytest.raises(ValueError, match="scale needs params to be one of tiny=100000, small=1e"):
        fidelity.scale(far)


def test_equal_fidelities_are_equal_and_hash_alike():
    first, second = (Fidelity(steps=(1, 2), target={"steps": 2}, cost=by_steps) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Fidelity(steps=(1, 2), target={"steps": 1}, cost=by_steps)
    assert first != Fidelity(steps=(1, 2), target={"steps": 2}, cost=free)
    assert pickle.loads(pickle.dumps(Fidelity(params=(1,), tokens=(1, 2), target={"params": 1, "tokens": 2}))).top


RUNNABLE = "; a target that is never run needs runnable=, the largest scale that is."


def make(target=None, **axes):
    return lambda: Fidelity(cost=by_steps, target=target or {"steps": 2}, **axes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Fidelity(target={}), "Fidelity needs at least one axis, for example tokens=(1e6, 1e7)."),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}),
            "Fidelity knows the cost of a run only when its axes are params and tokens, got ['steps']; "
            "pass cost=, a function of the scale or a MeasuredCost.",
        ),
        (
            make(steps=3),
            "Fidelity axis steps needs rungs (a tuple of numbers or a dictionary name -> number) "
            "or a range (Real or Integer), got 3.",
        ),
        (make(steps=(0, 2)), "Fidelity axis steps needs finite numbers > 0, got 0."),
        (make(steps=(True, 2)), "Fidelity axis steps needs finite numbers > 0, got True."),
        (make(steps=(2, 2)), "Fidelity axis steps has a rung twice, got [2.0, 2.0]; each may be there once."),
        (make(steps={1: 2}), "Fidelity axis steps needs texts as names of its rungs, got 1."),
        (make(steps=Real(0, 2)), "Fidelity axis steps needs values > 0, got low=0.0."),
        (make({"steps": 3}, steps=(1, 2)), "target needs steps to be one of 1, 2, got 3" + RUNNABLE),
        (make({"steps": "c"}, steps={"a": 1, "b": 2}), "target needs steps to be one of a=1, b=2, got 'c'."),
        (make({"steps": 3}, steps=Real(1, 2)), "target needs steps to be a number in [1, 2], got 3" + RUNNABLE),
        (
            make({"steps": 1.5}, steps=Integer(1, 2)),
            "target needs steps to be a whole number in [1, 2], got 1.5" + RUNNABLE,
        ),
        (make({"steps": 1}, steps=(1, 2), n=(1, 2)), "target has no value for ['n']; it needs ['steps', 'n']."),
        (
            make({"steps": 1, "x": 1}, steps=(1, 2)),
            "target has a value for ['x'], which is no axis; the axes are ['steps'].",
        ),
        (make({"stesp": 1}, steps=(1, 2)), "target has a value for ['stesp'], which is no axis; did you mean 'steps'?"),
        (make(2, steps=(1, 2)), "target must be a dictionary axis -> value, got 2."),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 9}, runnable={"steps": 3}, cost=by_steps),
            "runnable needs steps to be one of 1, 2, got 3.",
        ),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": -9}, runnable={"steps": 2}, cost=by_steps),
            "target needs steps to be a positive number, got -9.",
        ),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}, cost=7),
            "The cost function must be a function, got 7.",
        ),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}, cost=eval("lambda scale: 1.0")),
            f"The cost function {__name__}:<lambda> has no source file, so a study could not tell whether it changed; "
            "define it in a file.",
        ),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}, cost=free).cost({"steps": 1}),
            "The cost function must return a finite number > 0, got 0 at Scale(steps=1).",
        ),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}, cost=MeasuredCost(1, {"tokens": 1})),
            "The measured cost has the axes ['tokens'] and the fidelity ['steps']; they must be the same.",
        ),
        (lambda: Scale({"steps": 0}), "A scale needs a positive number for steps, got 0."),
    ],
)
def test_a_wrong_fidelity_is_refused_when_it_is_made(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


FAR = {"params": 1e7, "tokens": 1e8}
GRID = [{"params": n, "tokens": d} for n in (1e5, 3e5, 1e6) for d in (1e6, 3e6, 1e7)]


def law(scale, overhead=0.0):
    return overhead + 2e-12 * scale["params"] ** 0.9 * scale["tokens"] ** 1.05


def timed(seconds, scatter=0.05, busy=0):
    """Runs of every scale of GRID, twice; every `busy`-th of them took ten times as long."""
    noise = np.random.default_rng(0).normal(size=2 * len(GRID))
    return [
        (scale, seconds(scale) * math.exp(scatter * z) * (10 if busy and i % busy == 0 else 1))
        for i, (scale, z) in enumerate(zip(GRID * 2, noise, strict=True))
    ]


@pytest.mark.parametrize("busy", [0, 5], ids=["quiet", "a fifth on a busy machine"])
def test_a_measured_cost_foretells_a_power_law_far_beyond_its_runs(busy):
    cost = MeasuredCost.fit(timed(law, busy=busy))
    assert cost.exponents == pytest.approx({"params": 0.9, "tokens": 1.05}, abs=0.03)
    assert cost.at(FAR) == pytest.approx(law(FAR), rel=0.1)


def test_a_fixed_overhead_is_foretold_near_the_runs_and_underestimates_far_ones():
    smallest = law(GRID[0])
    cost = MeasuredCost.fit(timed(lambda scale: law(scale, overhead=0.5 * smallest)))
    assert cost.at(GRID[-1]) == pytest.approx(law(GRID[-1], 0.5 * smallest), rel=0.15)
    assert 0.6 * law(FAR) < cost.at(FAR) < law(FAR)


@pytest.mark.parametrize(
    ("runs", "exponents"),
    [
        ([({"params": 1e5, "tokens": 1e6}, 3.0)], {"params": (1, 1), "tokens": (1, 1)}),
        ([({"params": n, "tokens": 1e6}, 3.0) for n in (1e5, 2e5)], {"params": (0.1, 0.5), "tokens": (1, 1)}),
        ([({"params": n, "tokens": 1e6}, n**-0.1) for n in (1e5, 1e6, 1e7)], {"params": (0, 0), "tokens": (1, 1)}),
    ],
    ids=["one run", "two near scales that took equally long", "larger runs that were a little faster"],
)
def test_few_or_odd_runs_give_sensible_exponents(runs, exponents):
    cost = MeasuredCost.fit(runs)
    for axis, (low, high) in exponents.items():
        assert low - 1e-12 <= cost.exponents[axis] <= high + 1e-12
    if len(runs) == 1:
        assert cost.at(runs[0][0]) == pytest.approx(3.0)


def test_the_order_of_axes_and_of_runs_does_not_change_a_measured_cost():
    runs = timed(law)
    turned = [(dict(reversed(scale.items())), seconds) for scale, seconds in reversed(runs)]
    one, other = MeasuredCost.fit(runs), MeasuredCost.fit(turned)
    assert other.exponents == pytest.approx(one.exponents, rel=1e-9)
    assert other.at(FAR) == pytest.approx(one.at(FAR), rel=1e-9)


def test_a_measured_cost_is_data_that_a_space_keeps():
    cost = MeasuredCost.fit(timed(law))
    fidelity = Fidelity(cost=cost, params=(1e5, 1e6), tokens=Real(1e6, 1e7), target={"params": 1e6, "tokens": 1e7})
    space = Space(x=Real(0, 1), fidelity=fidelity)
    again = space_from_json(json.loads(json.dumps(space_to_json(space), sort_keys=True)))
    assert again == space
    assert again.fidelity.cost(FAR) == cost.at(FAR) == eval(repr(cost)).at(FAR)
    assert again.fidelity.relative_cost(fidelity.target) == 1
    assert hash(fidelity) == hash(again.fidelity)
    assert pickle.loads(pickle.dumps(cost)) == cost
    with pytest.raises(ValueError, match=r"This space counts costs in measured seconds, so there is no cost"):
        space_from_json(space_to_json(space), cost=by_steps)


def test_a_share_of_the_data_is_a_scale_axis_like_any_other():
    fidelity = Fidelity(cost=MeasuredCost(60, {"share": 1}), share=(0.1, 0.3, 1.0), target={"share": 1.0})
    assert [cell["share"] for cell in fidelity.cells()] == [0.1, 0.3, 1.0]
    assert fidelity.relative_cost({"share": 0.1}) == pytest.approx(0.1)
    assert fidelity.target.label("share") == "1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeasuredCost.fit([]), "MeasuredCost.fit needs at least one run at a scale with axes, got none."),
        (
            lambda: MeasuredCost.fit([({}, 1.0)]),
            "MeasuredCost.fit needs at least one run at a scale with axes, got none.",
        ),
        (
            lambda: MeasuredCost.fit([({"steps": 1}, 1.0), ({"tokens": 1}, 1.0)]),
            "MeasuredCost.fit needs runs with the same axes, got ['steps'] and ['tokens'].",
        ),
        (
            lambda: MeasuredCost.fit([({"steps": 1}, 0.0)]),
            "MeasuredCost.fit needs a finite number of seconds > 0, got 0.0 at Scale(steps=1).",
        ),
        (lambda: MeasuredCost.fit([({"steps": -1}, 1.0)]), "A scale needs a positive number for steps, got -1."),
        (lambda: MeasuredCost(0, {"steps": 1}), "MeasuredCost needs a finite number of seconds > 0, got 0."),
        (lambda: MeasuredCost(1, {"steps": -1}), "MeasuredCost needs a finite exponent >= 0 for steps, got -1."),
        (lambda: MeasuredCost(1, {}), "MeasuredCost needs a dictionary axis -> exponent, got {}."),
    ],
)
def test_a_wrong_measured_cost_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_a_scale_knows_its_flops_its_tokens_per_parameter_and_its_steps(fidelity):
    scale = fidelity.scale({"params": "tiny", "tokens": 1e7})
    assert scale.flops == 6e12 == fidelity.cost(scale)
    assert scale.tokens_per_param == 100
    assert [scale.steps(batch) for batch in (1, 3e6, 4e6, 7e6, 1e7)] == [10**7, 3, 3, 1, 1]
    assert scale.steps(np.int64(1000)) == 10_000
    assert dict(scale) == {"params": 1e5, "tokens": 1e7}


def test_tokens_a_step_are_the_product_of_what_the_config_and_the_model_say():
    config = {"batch_size": 8, "accumulation": np.int64(4), "optimizer": "lion"}
    assert batch_tokens(config, "batch_size", "accumulation", 1024) == 32768
    assert Scale({"tokens": 32768 * 10}).steps(batch_tokens(config, "batch_size", "accumulation", 1024)) == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Scale({"steps": 10}).flops,
            "flops needs a scale with the axis params; the axes of this one are ['steps'].",
        ),
        (
            lambda: Scale({"params": 10}).tokens_per_param,
            "tokens_per_param needs a scale with the axis tokens; the axes of this one are ['params'].",
        ),
        (
            lambda: Scale({"steps": 10}).steps(2),
            "steps needs a scale with the axis tokens; the axes of this one are ['steps'].",
        ),
        (lambda: Scale({"tokens": 10}).steps(0), "steps needs a finite number of tokens a step > 0, got 0."),
        (
            lambda: Scale({"tokens": 10}).steps(16),
            "One step of 16 tokens is more than the 10 tokens of the run; constrain the batch size, for example by "
            "constraints=['1024 * batch_size <= tokens / 100'].",
        ),
        (
            lambda: batch_tokens({"batch": 8}, "batch_size", 1024),
            "batch_tokens needs 'batch_size', which the config does not have; it has ['batch'].",
        ),
        (
            lambda: batch_tokens({"batch": "big"}, "batch"),
            "batch_tokens needs finite numbers > 0, got 'big' for 'batch'.",
        ),
    ],
)
def test_a_derived_quantity_says_what_it_lacks(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
