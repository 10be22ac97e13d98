import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import Choice, Integer, Real
from search_spaces.parameter import LARGEST_INTEGER, Fixed

ends = st.floats(-1e12, 1e12, allow_nan=False)


@st.composite
def reals(draw):
    log = draw(st.booleans())
    bound = st.floats(1e-200, 1e200) if log else ends
    low, high = sorted(draw(st.tuples(bound, bound).filter(lambda pair: pair[0] != pair[1])))
    return Real(low, high, log)


@st.composite
def integers(draw):
    log = draw(st.booleans())
    bound = st.integers(1 if log else -LARGEST_INTEGER, LARGEST_INTEGER) | st.integers(1, 40)
    low, high = sorted(draw(st.tuples(bound, bound).filter(lambda pair: pair[0] != pair[1])))
    return Integer(low, high, log)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(reals(), st.floats(0, 1), st.floats(0, 1))
def test_a_real_decodes_inside_its_range_and_back_within_1e_12(real, x, share):
    (value,) = real.decode(np.array([[x]]))
    assert real.low <= value <= real.high
    given_value = min(max(real.low + share * (real.high - real.low), real.low), real.high)
    (again,) = real.decode(real.encode([given_value]))
    scale = given_value if real.log else real.high - real.low
    assert abs(again - given_value) <= 1e-12 * scale


@settings(max_examples=100, derandomize=True, deadline=None)
@given(reals())
def test_the_ends_of_a_real_are_exact(real):
    assert real.decode(np.array([[0.0], [1.0]])) == [real.low, real.high]
    assert real.encode([real.low, real.high]).tolist() == [[0.0], [1.0]]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(integers(), st.floats(0, 1), st.floats(0, 1))
def test_an_integer_decodes_inside_its_range_and_back_exactly(integer, x, share):
    (value,) = integer.decode(np.array([[x]]))
    assert type(value) is int
    assert integer.low <= value <= integer.high
    given_values = [integer.low, integer.high, value, integer.low + int(share * (integer.high - integer.low))]
    points = integer.encode(given_values)
    assert ((points > 0) & (points < 1)).all()
    assert integer.decode(points) == given_values


def test_every_integer_of_a_linear_axis_has_the_same_mass():
    integer = Integer(3, 7)
    values = integer.decode(np.linspace(0, 1, 5000, endpoint=False)[:, None])
    assert [values.count(v) for v in range(3, 8)] == [1000] * 5


def test_every_octave_of_a_log_axis_has_the_same_mass():
    values = np.array(Integer(1, 1023, log=True).decode(np.linspace(0, 1, 100_000, endpoint=False)[:, None]))
    counts = [((values >= 2**k) & (values < 2 ** (k + 1))).sum() for k in range(10)]
    assert np.allclose(counts, 10_000, atol=2)
    assert {*values} == {*range(1, 1024)}


def test_a_choice_tells_options_apart_by_type():
    choice = Choice(True, 1, 1.0, "1", None, False, 0)
    assert choice.decode(choice.encode(choice.options)) == list(choice.options)
    assert list(map(type, choice.decode(choice.encode(choice.options)))) == list(choice.types)
    assert Choice(True, False) != Choice(1, 0)
    assert Fixed(True) != Fixed(1)


def test_the_three_ways_to_write_a_choice_agree():
    assert Choice("a", "b") == Choice(["a", "b"]) == Choice(("a", "b"))
    assert Choice({"a": {}, "b": {"x": 1}}).options == ("a", "b")
    assert eval(repr(Choice({"a": {"x": Real(0, 1)}, "b": {}})), {"Choice": Choice, "Real": Real}).options == ("a", "b")


def test_numpy_scalars_pass_as_what_they_stand_for():
    assert Choice(1, 2).check("k", np.int64(2)) == 2
    assert type(Integer(1, 3).check("n", np.int32(2))) is int
    assert type(Real(0, 1).check("lr", np.float32(0.5))) is float
    with pytest.raises(ValueError, match="lr must be a number"):
        Real(0, 0.1).check("lr", np.float32(0.1))  # 0.1000000015 in double precision


def test_a_real_takes_whole_numbers_as_floats():
    assert Real(1, 10) == Real(1.0, 10.0)
    assert type(Real(1, 10).check("x", 3)) is float


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Real(0, 1, log=True), "Real on a log scale needs low > 0, got low=0.0."),
        (lambda: Real(2, 1), "Real needs low < high, got low=2.0, high=1.0; a fixed value needs no Real."),
        (lambda: Real(True, 2), "Real needs finite numbers as bounds, got low=True."),
        (lambda: Real("1", 2), "Real needs finite numbers as bounds, got low='1'."),
        (lambda: Real(0, math.inf), "Real needs finite numbers as bounds, got high=inf."),
        (lambda: Real(-1e308, 1e308), "Real needs high - low to fit a float, got low=-1e+308, high=1e+308."),
        (lambda: Real(1, 2, log="yes"), "Real needs log=True or log=False, got log='yes'."),
        (lambda: Integer(1.0, 3), "Integer needs whole numbers up to 2**44 as bounds, got low=1.0."),
        (lambda: Integer(1, 2**45), "Integer needs whole numbers up to 2**44 as bounds, got high=35184372088832."),
        (lambda: Integer(3, 3), "Integer needs low < high, got low=3, high=3; a fixed value needs no Integer."),
        (lambda: Integer(0, 3, log=True), "Integer on a log scale needs low >= 1, got low=0."),
        (lambda: Integer(1, 3, log=1), "Integer needs log=True or log=False, got log=1."),
        (lambda: Choice("a"), "Choice needs at least two options, got ['a']; a fixed value needs no Choice."),
        (lambda: Choice(), "Choice needs at least two options, got []; a fixed value needs no Choice."),
        (lambda: Choice({"a": {}}), "Choice needs at least two options, got ['a']; a fixed value needs no Choice."),
        (lambda: Choice("a", "b", "a"), "Choice has the option 'a' twice; each may be there once."),
        (lambda: Choice(1, [2]), "A Choice option must be text, a finite number, a bool or None, got [2]."),
        (lambda: Choice(1, math.nan), "A Choice option must be text, a finite number, a bool or None, got nan."),
        (
            lambda: Choice({"a": 1, "b": 2}),
            "Choice option 'a' needs a dictionary of parameters ({} for none), got 1; "
            "for plain options write Choice('a', 'b').",
        ),
        (lambda: Choice({1: {}, 2: {}}), "An option with a sub-space needs a text as its name, got 1."),
        (
            lambda: Choice({"a": {"x": [1]}, "b": {}}),
            "x must be a parameter (Real, Integer, Choice, Mixture, Schedule) or a fixed value "
            "(text, a finite number, a bool, None), got [1].",
        ),
        (lambda: Fixed(math.inf), "A fixed value must be text, a finite number, a bool or None, got inf."),
    ],
)
def test_a_wrong_parameter_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
