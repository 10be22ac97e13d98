import math
import pickle
import re

import numpy as np
import pytest

from search_spaces import Fidelity, Integer, Real, Scale


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


def make(target=None, **axes):
    return lambda: Fidelity(cost=by_steps, target=target or {"steps": 2}, **axes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Fidelity(target={}), "Fidelity needs at least one axis, for example tokens=(1e6, 1e7)."),
        (
            lambda: Fidelity(steps=(1, 2), target={"steps": 2}),
            "Fidelity knows the cost of a run only when its axes are params and tokens, got ['steps']; "
            "pass cost=, a function of the scale.",
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
        (make({"steps": 3}, steps=(1, 2)), "target needs steps to be one of 1, 2, got 3."),
        (make({"steps": "c"}, steps={"a": 1, "b": 2}), "target needs steps to be one of a=1, b=2, got 'c'."),
        (make({"steps": 3}, steps=Real(1, 2)), "target needs steps to be a number in [1, 2], got 3."),
        (make({"steps": 1.5}, steps=Integer(1, 2)), "target needs steps to be a whole number in [1, 2], got 1.5."),
        (make({"step": 1}, steps=(1, 2)), "target has no value for ['steps']; it needs ['steps']."),
        (make({"steps": 1, "x": 1}, steps=(1, 2)), "target has a value for ['x']; the axes are ['steps']."),
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
            "cost must be a function of a scale, got 7.",
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
        (lambda: Scale({"steps": 0}), "A scale needs a positive number for steps, got 0."),
    ],
)
def test_a_wrong_fidelity_is_refused_when_it_is_made(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
