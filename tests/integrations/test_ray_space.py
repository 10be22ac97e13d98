import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search import sample
from ray.tune.search.variant_generator import generate_variants

from integrations.foreign_space import LARGEST_GRID
from integrations.ray_space import from_ray, to_flat, to_nested, to_ray
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space
from search_spaces.parameter import Fixed


def drawn(param_space, n=20):
    """`n` configs as Ray's own generator of variants draws them."""
    rng = np.random.default_rng(0)
    variants = (spec for _ in range(n) for _, spec in generate_variants({"config": param_space}, random_state=rng))
    return [spec["config"] for spec in variants]


def entry(domain):
    """What one domain becomes."""
    return from_ray({"x": domain, "other": tune.uniform(0, 1)}).parameters["x"]


FIDELITY = Fidelity(params=(1, 2), tokens=(1, 2), target={"params": 2, "tokens": 2})


@pytest.mark.parametrize(
    ("domain", "parameter"),
    [
        (tune.uniform(-1, 1), Real(-1, 1)),
        (tune.loguniform(1e-4, 1e-1), Real(1e-4, 1e-1, log=True)),
        (tune.uniform(2, 2), Fixed(2.0)),
        (tune.randint(3, 10), Integer(3, 9)),
        (tune.randint(0, 1e3), Integer(0, 999)),
        (tune.randint(3, 4), Fixed(3)),
        (tune.lograndint(16, 257), Integer(16, 256, log=True)),
        (tune.qrandint(3, 10, 1), Integer(3, 9)),
        (tune.qlograndint(3, 10, 1), Integer(3, 9, log=True)),
        (tune.qrandint(8, 32, 8), Choice(8, 16, 24, 32, ordered=True)),
        (tune.qrandint(7, 31, 8), Choice(8, 16, 24, ordered=True)),
        (tune.qlograndint(2, 6, 2), Choice(2, 4, 6, ordered=True)),
        (tune.quniform(0, 0.3, 0.1), Choice(0.0, 0.1, 0.2, 3 * 0.1, ordered=True)),
        (tune.qloguniform(0.5, 2, 0.5), Choice(0.5, 1.0, 1.5, 2.0, ordered=True)),
        (tune.choice(["relu", "gelu"]), Choice("relu", "gelu")),
        (tune.choice(np.array([16, 32])), Choice(16, 32)),
        (tune.choice([True]), Fixed(True)),
        (tune.grid_search([1, 2.0, None]), Choice(1, 2.0, None)),
        (sample.Categorical([1, 2]).grid(), Choice(1, 2)),
        (sample.Float(0, 1), Real(0, 1)),
        (np.float64(0.5), Fixed(0.5)),
        ("adam", Fixed("adam")),
        (None, Fixed(None)),
    ],
)
def test_a_domain_becomes_the_parameter_with_the_same_range(domain, parameter):
    assert entry(domain) == parameter


@pytest.mark.parametrize(
    "domain",
    [
        tune.uniform(-1, 1),
        tune.loguniform(1e-4, 1e-1),
        tune.randint(-3, 10),
        tune.lograndint(1, 9),
        tune.quniform(-0.7, 1.4, 0.1),
        tune.qloguniform(0.1, 1.2, 0.3 / 3),
        tune.qrandint(-30, 64, 8),
        tune.qrandint(2, 9, 1),
        tune.qlograndint(3, 100, 7),
        tune.choice([1, "a", None, 2.5, True]),
    ],
)
def test_what_ray_samples_is_in_the_space_and_what_the_space_samples_is_in_the_domain(domain):
    space = from_ray({"x": domain, "other": tune.uniform(0, 1)})
    for value in domain.sample(size=100, random_state=0):
        space.validate({"x": value, "other": 0.5})
    for config in space.sample(np.random.default_rng(0), 100):
        value = config["x"]
        assert domain.is_valid(value) or value - domain.upper < 1e-12  # 12 * 0.1 is a step of Ray's beyond 1.2
        if isinstance(domain, sample.Integer) and not isinstance(domain.sampler, sample.Quantized):
            assert value < domain.upper


def test_every_step_that_ray_draws_is_an_option_and_no_other():
    for domain in (tune.quniform(-0.7, 1.4, 0.1), tune.qrandint(-30, 64, 8), tune.qlograndint(3, 100, 7)):
        assert set(domain.sample(size=5000, random_state=0)) == set(entry(domain).options)


NESTED = {
    "model": {"width": tune.choice([256, 512]), "block": {"dropout": tune.uniform(0, 0.5)}},
    "optimizer": tune.choice(
        [
            {"name": "adamw", "lr": tune.loguniform(1e-4, 1e-1), "betas": {"b2": tune.uniform(0.9, 0.999)}},
            {"name": "sgd", "lr": tune.loguniform(1e-2, 1), "nesterov": tune.choice([True, False])},
            {"name": "none"},
        ]
    ),
    "epochs": 3,
}


def test_nested_dictionaries_become_names_and_go_back_to_what_the_trainable_knows():
    space = from_ray(NESTED)
    assert list(space.parameters) == ["model/width", "model/block/dropout", "optimizer/name", "epochs"]
    assert list(space.parameters["optimizer/name"].subspaces["adamw"]) == ["optimizer/lr", "optimizer/betas/b2"]
    for config in space.sample(np.random.default_rng(0), 20):
        nested = to_nested(config)
        assert set(nested) == set(NESTED)
        assert to_flat(nested) == config
    for nested in drawn(NESTED):
        assert to_nested(space.validate(to_flat(nested))) == nested


def test_dictionaries_to_choose_from_go_to_ray_and_come_back():
    space = from_ray(NESTED)
    assert from_ray(to_ray(space)) == space
    for nested in drawn(to_ray(space)):
        space.validate(to_flat(nested))


def test_choices_of_dictionaries_nest():
    def inner(*names):
        return tune.choice([{"kind": name, f"of_{name}": tune.uniform(0, 1)} for name in names])

    given = {"o": tune.choice([{"name": "a", "s": inner("x", "y")}, {"name": "b", "s": inner("y", "z")}])}
    space = from_ray(given)
    assert from_ray(to_ray(space)) == space
    for nested in drawn(given, 10) + drawn(to_ray(space), 10):
        assert to_nested(space.validate(to_flat(nested))) == nested


def test_one_dictionary_to_choose_from_is_that_dictionary():
    assert from_ray({"o": tune.choice([{"lr": tune.uniform(0, 1)}])}) == from_ray({"o": {"lr": tune.uniform(0, 1)}})


def test_constraints_and_a_fidelity_can_be_added():
    space = from_ray({"a": tune.uniform(0, 1), "b": tune.uniform(0, 1)}, constraints=["a <= b"], fidelity=FIDELITY)
    assert space == Space(a=Real(0, 1), b=Real(0, 1), constraints=["a <= b"], fidelity=FIDELITY)


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3)
bounds = st.floats(-1e3, 1e3, width=32)
positive = st.floats(2**-20, 1e3, width=32)
wholes = st.integers(-(2**30), 2**30)
leaves = st.one_of(
    scalars,
    st.tuples(bounds, bounds).filter(lambda b: b[1] - b[0] > 1e-3).map(lambda b: Real(*b)),
    st.tuples(positive, positive).filter(lambda b: b[1] / b[0] > 1.001).map(lambda b: Real(*b, log=True)),
    st.tuples(wholes, wholes).filter(lambda b: b[0] < b[1]).map(lambda b: Integer(*b)),
    st.tuples(wholes, wholes).filter(lambda b: 1 <= b[0] < b[1]).map(lambda b: Integer(*b, log=True)),
    st.lists(scalars, min_size=2, max_size=5, unique_by=lambda s: (type(s), s)).map(Choice),
    st.builds(
        lambda first, step, n: Choice([step * (first + i) for i in range(n)], ordered=True),
        st.integers(-5, 5),
        st.integers(2, 9),
        st.integers(2, 9),
    ),
)


def entries(prefix, depth):
    plain = st.dictionaries(st.sampled_from([prefix + letter for letter in "pqrs"]), leaves, max_size=3)
    if depth == 0:
        return plain
    options = st.dictionaries(st.sampled_from("abc"), entries(f"{prefix}o/", depth - 1), min_size=2)
    choice = options.map(lambda subspaces: {f"{prefix}o/name": Choice(subspaces)})
    inner = entries(f"{prefix}d/", depth - 1)
    return st.builds(lambda some, one, other: {**some, **one, **other}, plain, choice, inner)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(entries("", 2).map(lambda parameters: Space(**parameters)))
def test_a_space_that_ray_can_express_comes_back_and_holds_what_ray_samples(space):
    param_space = to_ray(space)
    assert from_ray(param_space) == space
    for nested in drawn(param_space, 3):
        config = to_flat(nested)
        assert space.validate(config) == config
        assert to_nested(config) == nested


@pytest.mark.parametrize(
    ("space", "drop", "kept"),
    [
        (Space(x=Real(0, 1), fidelity=FIDELITY), ("fidelity",), Space(x=Real(0, 1))),
        (Space(x=Real(0, 1), constraints=["x <= 0.5"]), ("constraints",), Space(x=Real(0, 1))),
        (Space(x=Choice("s", "m", "l", ordered=True)), ("order",), Space(x=Choice("s", "m", "l"))),
    ],
)
def test_what_may_be_dropped_is_dropped_only_on_demand(space, drop, kept):
    assert from_ray(to_ray(space, drop=drop)) == kept
    with pytest.raises(ValueError, match=re.escape(f"drop=({drop[0]!r},)")):
        to_ray(space)


def beside(**entries):
    return {"other": tune.uniform(0, 1), **entries}


class Custom(sample.Uniform):
    pass


def custom_sampler():
    domain = sample.Float(0, 1)
    domain.set_sampler(Custom())
    return domain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_ray([1]), "A param_space of Ray Tune is a dictionary, got [1]."),
        (
            lambda: from_ray({"model": {"depth": tune.sample_from(lambda config: 3)}}),
            "model/depth is drawn by a function (sample_from), whose range is unknown; give its range, and compute "
            "what depends on other parameters in the training function.",
        ),
        (
            lambda: from_ray({"x": tune.randn(0, 1)}),
            "x is normally distributed, without bounds; give its range by uniform or loguniform.",
        ),
        (
            lambda: from_ray({"x": tune.qrandn(0, 1, 0.1)}),
            "x is normally distributed, without bounds; give its range by uniform or loguniform.",
        ),
        (
            lambda: from_ray({"x": custom_sampler()}),
            "x is drawn by Custom, which has no counterpart; use uniform, loguniform, randint, lograndint or choice.",
        ),
        (
            lambda: from_ray({"x": sample.Domain()}),
            "x is a Domain, which has no counterpart; use a domain of ray.tune.",
        ),
        (
            lambda: from_ray({"x": sample.Float(0, None)}),
            "x cannot be taken over: Real needs finite numbers as bounds, got high=inf.",
        ),
        (
            lambda: from_ray({"x": tune.uniform(2, 1)}),
            "x cannot be taken over: Real needs low < high, got low=2.0, high=1.0; a fixed value needs no Real.",
        ),
        (
            lambda: from_ray({"x": tune.randint(0.5, 3)}),
            "x needs whole numbers, got 0.5; a range of other numbers is one of reals.",
        ),
        (
            lambda: from_ray({"x": tune.quniform(0, 1, 1e-3)}),
            f"x has 1001 steps and only {LARGEST_GRID} can be options; make it a range without steps and round in the "
            "training function.",
        ),
        (lambda: from_ray({"x": tune.qrandint(9, 15, 8)}), "x has no step within its range; widen it."),
        (
            lambda: from_ray({"x": sample.Float(None, 1).quantized(0.5)}),
            "x needs finite bounds, got -inf.",
        ),
        (
            lambda: from_ray({"x": tune.choice([1, 1, 2])}),
            "x cannot be taken over: Choice has the option 1 twice; each may be there once.",
        ),
        (
            lambda: from_ray({"layers": tune.choice([[64], [64, 64]])}),
            "layers has the option [64], which is no text, finite number, bool or None; name the options by texts and "
            "look up in the training function what they stand for.",
        ),
        (
            lambda: from_ray({"x": tune.choice([{"a": 1}, 2])}),
            "x chooses between dictionaries and other values, got [{'a': 1}, 2]; make them all alike.",
        ),
        (
            lambda: from_ray({"x": tune.grid_search([{"a": 1}, {"a": 2}])}),
            "x chooses between dictionaries that have no name; give each a key such as 'name' with a text of its own, "
            "got [{'a': 1}, {'a': 2}].",
        ),
        (
            lambda: from_ray(beside(x=[tune.uniform(0, 1)])),
            "x must be a domain of Ray Tune, a dictionary of them or a constant",
        ),
        (lambda: from_ray(beside(x={})), "x must be a domain of Ray Tune, a dictionary of them or a constant"),
        (lambda: from_ray(beside(x=math.nan)), "x must be a domain of Ray Tune, a dictionary of them or a constant"),
        (
            lambda: from_ray({"x": {"eval": "1 + 1"}}),
            "x is computed by eval; compute it in the training function instead.",
        ),
        (lambda: from_ray({"a": {3: 1}}), "a/3 must be a text to name a parameter, got 3."),
        (
            lambda: from_ray({"a": {"b/c": 1}}),
            "'a/b/c' has a '/' in a key, which joins the keys of nested dictionaries; rename it.",
        ),
        (
            lambda: from_ray(beside(fidelity=3)),
            "'fidelity' is an argument of Space and cannot name a parameter; rename it.",
        ),
        (
            lambda: to_ray(Space(x=Real(0, 1)), drop=("mixture",)),
            "drop= may hold ['constraints', 'fidelity', 'order'], ",
        ),
        (
            lambda: to_ray(Space(data=Mixture("a", "b"))),
            "data is a Mixture, which Ray Tune's param_space cannot express; make it a fixed value, or search this "
            "space with a policy of Windtunnel.",
        ),
        (lambda: to_ray(Space(s=Schedule("cosine", "rex"))), "s is a Schedule, which Ray Tune's param_space cannot"),
        (
            lambda: to_ray(Space(o=Choice({"a": {"lr": Real(0, 1)}, "b": {}}))),
            "o has sub-spaces whose parameters lie beside it, and Ray Tune can only choose between dictionaries; "
            "rename it and them to begin alike, as in 'o/name' and 'o/lr'.",
        ),
        (
            lambda: to_ray(Space(**{"a/grid_search": Real(0, 1)})),
            "a/grid_search has a part that Ray Tune takes for a keyword, one of ['eval', 'grid_search']; rename it.",
        ),
        (
            lambda: to_ray(Space(**{"a/b": Real(0, 1), "a": Real(0, 1)})),
            "'a' cannot be a value and hold 'a/b' as well; rename one of them.",
        ),
        (
            lambda: to_ray(Space(**{"o/name": Choice({"a": {"o/lr": Real(0, 1)}, "b": {}}), "o/x": Real(0, 1)})),
            "'o' cannot be a value and hold 'o/x' as well; rename one of them.",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()
