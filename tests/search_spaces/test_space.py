import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces import (
    FAMILIES,
    Choice,
    Cosine,
    Fidelity,
    Integer,
    Mixture,
    MixtureSchedule,
    Real,
    Schedule,
    Space,
    space_from_json,
    space_to_json,
)

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3)


@st.composite
def schedules(draw):
    families = draw(st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=4, unique=True))
    setting = st.sampled_from([0.1, Real(0.01, 0.2), Real(0.01, 0.2, log=True)])
    plain = ("warmup", "floor", "decay", "shape", "half_life", "time_constant", "gamma")
    tunable = {family: [s for s in FAMILIES[family].settings() if s in plain] for family in families}
    shared = draw(st.dictionaries(st.sampled_from(sorted({s for some in tunable.values() for s in some})), setting))
    own = {family: {s: draw(setting) for s in draw(st.sets(st.sampled_from(some)))} for family, some in tunable.items()}
    return Schedule(**shared, **own)


NATURAL = {"a": 0.7, "b": 0.2, "c": 0.1}
MIXTURES = [
    Mixture("a", "b", "c"),
    Mixture("a", "b", "c", floor=0.05, cap={"a": 0.5}),
    Mixture("a", "b", "c", fixed={"b": 0.125}, max_domains=2),
    Mixture("a", "b", "c", reference=NATURAL, cap=0.75),
    Mixture("x", "y", floor={"x": 0.5}),
]
SOURCES = {name for mixture in MIXTURES for name in mixture.names}  # no parameter is called so
NUMBERS = Real | Integer

leaves = st.one_of(
    scalars,
    st.sampled_from([Real(-2, 3), Real(1e-5, 1e-1, log=True), Integer(-3, 40), Integer(2, 2**40, log=True)]),
    st.builds(
        lambda options, ordered: Choice(*options, ordered=ordered),
        st.lists(scalars, min_size=2, max_size=5, unique_by=lambda s: (type(s), s)),
        st.booleans(),
    ),
    st.sampled_from(MIXTURES),
    st.builds(MixtureSchedule, st.sampled_from(MIXTURES[:4]), st.sampled_from(MIXTURES[:4])),
    schedules(),
)


def entries(prefix, depth):
    """Dictionaries of parameters; the options of one choice share names, as they may."""
    names = st.sampled_from([prefix + letter for letter in "pqrs"])
    if depth == 0:
        return st.dictionaries(names, leaves, max_size=3)
    inner = entries(f"{prefix}i", depth - 1)
    branching = st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, min_size=2).map(Choice)
    plain = st.dictionaries(names, leaves, max_size=4)
    return st.builds(lambda some, choice: {**some, f"{prefix}o": choice}, plain, branching)


@st.composite
def spaces(draw):
    """Half of those with numbers outside options have inequalities between them, which the lower corner satisfies."""
    parameters = draw(entries("", 2))
    named = [name for name, parameter in parameters.items() if isinstance(parameter, NUMBERS)]
    pairs = draw(st.lists(st.tuples(*[st.sampled_from(named)] * 2), max_size=2)) if named else []
    shares = draw(st.lists(st.sampled_from([0.5, 0.05]), min_size=len(pairs), max_size=len(pairs)))
    constraints = []
    for (one, other), share in zip(pairs, shares, strict=True):
        bounds = [parameters[one].low + parameters[other].low, parameters[one].high + parameters[other].high]
        constraints.append(f"{one} + {other} <= {bounds[0] + share * (bounds[1] - bounds[0])!r}")
    return Space(constraints=constraints, **parameters)


@st.composite
def spaces_with_points(draw):
    space = draw(spaces())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.random((6, len(space.columns)))
    x[4], x[5] = 0.0, 1.0
    return space, x


def close(one, other, slack=5e-12):
    """Equal but for rounding: of reals by 1e-12 of their range, at most 5 wide here, of shares by 1e-9."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name, value in one.items():
            close(value, other[name], 1e-9 if name in SOURCES else slack)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            close(mine, its, slack)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-12, abs=slack)
    else:
        assert one == other


@settings(max_examples=500, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_decode_of_encode_gives_the_config_back(case):
    space, x = case
    configs = space.decode_all(x) + space.sample(np.random.default_rng(0), 4)
    for config, again in zip(configs, space.decode_all(space.encode_all(configs)), strict=True):
        assert space.validate(config) == config
        close(space.to_json(config), space.to_json(again))
    assert space.satisfies(configs).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_repair_moves_only_what_it_says_and_a_repaired_point_stays(case):
    space, x = case
    repaired = space.repair(x)
    still = [i for i in range(len(space.columns)) if i not in space.repaired]
    np.testing.assert_array_equal(repaired[:, still], x[:, still])
    np.testing.assert_allclose(space.repair(repaired), repaired, rtol=0, atol=1e-9)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_points_settle_bit_for_bit_where_their_configs_are_encoded(case):
    space, x = case
    np.testing.assert_array_equal(space.settle(x), space.encode_all(space.decode_all(x)))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_one_config_and_many_encode_alike(case):
    space, x = case
    configs = space.decode_all(x)
    np.testing.assert_array_equal(space.encode_all(configs), [space.encode(config) for config in configs])
    assert [space.decode(point) for point in x] == configs


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_inactive_coordinates_are_ignored_and_encoded_as_the_middle(case):
    space, x = case
    on = space.active(x)
    assert space.decode_all(np.where(on, x, 0.123)) == space.decode_all(x)
    encoded = space.encode_all(space.decode_all(x))
    np.testing.assert_array_equal(space.active(encoded), on)
    assert (encoded[~on] == 0.5).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_configs_come_back_from_json_bit_for_bit(case):
    space, x = case
    for config in space.decode_all(x):
        text = json.dumps(space.to_json(config), allow_nan=False, sort_keys=True)
        again = space.from_json(json.loads(text))
        assert again == config
        assert repr(again) == repr(config)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(spaces())
def test_spaces_come_back_from_json(space):
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False, sort_keys=True)))
    assert again == space
    assert space_to_json(again) == space_to_json(space)
    assert pickle.loads(pickle.dumps(space)) == space


@settings(max_examples=50, derandomize=True, deadline=None)
@given(spaces_with_points())
def test_quantiles_are_points_of_the_cube_with_the_middle_where_inactive(case):
    space, u = case
    x = space.quantile(u)
    assert ((x >= 0) & (x <= 1)).all()
    assert (x[~space.active(x)] == 0.5).all()


CONTRACT = Space(
    batch_size=Integer(16, 256, log=True),
    schedule=Schedule("cosine", "linear", warmup=0.02, floor=0.0, wsd={"decay": Real(0.05, 0.3)}, rex={"shape": 0.5}),
    data=Mixture("code", "docs", "prose", floor=0.02),
    optimizer=Choice(
        {"adamw": {"lr": Real(1e-4, 1e-2, log=True), "eps": 1e-8}, "lion": {"lr": Real(2e-5, 2e-3, log=True)}}
    ),
    weight_decay=0.1,
    fidelity=Fidelity(
        params={"tiny": 1e5, "small": 1e6}, tokens=(1e6, 1e7, 3e7), target={"params": "small", "tokens": 3e7}
    ),
)
CONFIG = {
    "batch_size": 64,
    "schedule": Cosine(warmup=0.02),
    "data": {"code": 0.5, "docs": 0.25, "prose": 0.25},
    "optimizer": "adamw",
    "lr": 1e-3,
    "eps": 1e-8,
    "weight_decay": 0.1,
}


def test_columns_say_where_they_come_from_and_when_they_count():
    columns = {column.name: column for column in CONTRACT.columns}
    assert list(columns) == [
        "batch_size",
        "schedule",
        "schedule.wsd.decay",
        "data.code",
        "data.docs",
        "data.prose",
        "optimizer",
        "optimizer.adamw.lr",
        "optimizer.lion.lr",
    ]
    assert columns["batch_size"].levels == 241
    assert columns["batch_size"].octaves == 4
    assert columns["schedule"].kind == "choice"
    assert columns["schedule.wsd.decay"].when == ((1, 2),)
    assert columns["data.docs"].kind == "share"
    assert columns["data.docs"].floor == 0.02
    assert columns["optimizer.lion.lr"].when == ((6, 1),)
    assert columns["optimizer.lion.lr"].parameter == "optimizer"
    assert columns["optimizer.lion.lr"].octaves == pytest.approx(math.log2(100))


def test_a_nested_choice_counts_only_where_all_its_parents_are_chosen():
    space = Space(
        a=Choice(
            {
                "x": {
                    "b": Choice(
                        {
                            "y": {
                                "s": Schedule("rex", warmup=0.0, floor=0.0, shape=0.5, wsd={"decay": Real(0.1, 0.2)})
                            },
                            "z": {},
                        }
                    )
                },
                "w": {},
            }
        )
    )
    assert space.columns[-1].name == "a.x.b.y.s.wsd.decay"
    assert space.columns[-1].when == ((0, 0), (1, 0), (2, 1))


def test_validate_puts_the_config_in_order_and_fills_in_fixed_values():
    given_config = {name: CONFIG[name] for name in reversed(CONFIG) if name not in ("weight_decay", "eps")}
    checked = CONTRACT.validate(given_config)
    assert checked == CONFIG
    assert list(checked) == list(CONFIG)


def test_validate_turns_whole_numbers_and_numpy_into_plain_floats():
    space = Space(lr=Real(0, 2), data=Mixture("a", "b"))
    checked = space.validate({"lr": np.float64(1), "data": {"a": 1, "b": np.float32(0)}})
    assert repr(checked) == "{'lr': 1.0, 'data': {'a': 1.0, 'b': 0.0}}"


def test_options_of_one_choice_may_share_a_name_for_different_things():
    space = Space(
        kind=Choice(
            {"a": {"v": Real(0, 1)}, "b": {"v": Schedule("rex", warmup=0.0, floor=0.0, shape=0.5)}, "c": {"v": 3}}
        )
    )
    for config in space.sample(np.random.default_rng(0), 20):
        assert space.from_json(json.loads(json.dumps(space.to_json(config)))) == config


def test_the_order_of_parameters_is_part_of_a_space():
    assert Space(a=Real(0, 1), b=Real(0, 1)) != Space(b=Real(0, 1), a=Real(0, 1))
    assert Space(a=Real(0, 1), b=True) != Space(a=Real(0, 1), b=1)


def test_equal_spaces_and_schedules_have_equal_hashes():
    def make():
        return Space(lr=Real(0, 1), s=Schedule("cosine", wsd={"decay": Real(0.1, 0.2)}), constraints=["lr <= 0.5"])

    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make(), Space(lr=Real(0, 1))}) == 2


def test_samples_are_the_same_for_the_same_seed():
    first, second = (CONTRACT.sample(np.random.default_rng(3), 5) for _ in range(2))
    assert first == second
    assert all(CONTRACT.validate(config) == config for config in first)


def test_samples_choose_all_options_and_families_alike():
    configs = CONTRACT.sample(np.random.default_rng(0), 4000)
    families = [config["schedule"].family for config in configs]
    assert all(abs(families.count(family) / 4000 - 0.25) < 0.03 for family in ("cosine", "linear", "wsd", "rex"))
    assert abs(sum(config["optimizer"] == "lion" for config in configs) / 4000 - 0.5) < 0.03
    assert abs(np.mean([config["data"]["code"] for config in configs]) - 1 / 3) < 0.01


def test_a_parameter_may_be_called_anything():
    space = Space(**{"self": Real(0, 1), "optim.lr": Real(0, 1), "class": Real(0, 1)})
    assert list(space.decode([0, 0.5, 1])) == ["self", "optim.lr", "class"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": ...}, "Config has no value for ['batch_size']; the space needs it."),
        ({"batch_size": ..., "lr": ...}, "Config has no value for ['batch_size', 'lr']; the space needs them."),
        ({"optimizer": ...}, "Config has no value for ['optimizer']; the space needs it."),
        (
            {"bach_size": 3},
            "Config has a value for 'bach_size', which the space does not know; did you mean 'batch_size'?",
        ),
        (
            {"zzz": 3},
            "Config has a value for 'zzz', which the space does not know; its names are "
            "['batch_size', 'schedule', 'data', 'optimizer', 'lr', 'eps', 'weight_decay'].",
        ),
        ({"optimizer": "lion"}, "Config has values for ['eps'], which belong to options not chosen; leave them out."),
        ({"optimizer": "sgd"}, "optimizer must be one of ['adamw', 'lion'], got 'sgd'."),
        ({"optimizer": ["lion"]}, "optimizer must be one of ['adamw', 'lion'], got ['lion']."),
        ({"lr": 1}, "lr must be a number in [0.0001, 0.01], got 1."),
        ({"lr": math.nan}, "lr must be a number in [0.0001, 0.01], got nan."),
        ({"lr": "0.001"}, "lr must be a number in [0.0001, 0.01], got '0.001'."),
        ({"batch_size": True}, "batch_size must be a whole number in [16, 256], got True."),
        ({"batch_size": 64.0}, "batch_size must be a whole number in [16, 256], got 64.0."),
        ({"batch_size": 8}, "batch_size must be a whole number in [16, 256], got 8."),
        ({"weight_decay": 0.2}, "weight_decay is fixed at 0.1 in this space, got 0.2."),
        ({"weight_decay": "0.1"}, "weight_decay is fixed at 0.1 in this space, got '0.1'."),
    ],
)
def test_a_wrong_config_is_refused(changes, message):
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    for take in (CONTRACT.validate, CONTRACT.encode, CONTRACT.to_json, CONTRACT.from_json):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            take(config)


def shared(name):
    return (
        f"The name {name!r} stands for two parameters of the same config; "
        "only options of one Choice may share a name, so rename one of them."
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Space(), "Space has nothing to search; give it at least one parameter that is not fixed."),
        (lambda: Space(a=1), "Space has nothing to search; give it at least one parameter that is not fixed."),
        (lambda: Space(a=Real(0, 1), fidelity=3), "fidelity must be a Fidelity, got 3."),
        (
            lambda: Space(a=math.nan),
            "a must be a parameter (Real, Integer, Choice, Mixture, Schedule) or a fixed value "
            "(text, a finite number, a bool, None), got nan.",
        ),
        (lambda: Space(lr=Real(0, 1), o=Choice({"a": {"lr": Real(0, 1)}, "b": {}})), shared("lr")),
        (lambda: Space(o=Choice({"a": {"o": Real(0, 1)}, "b": {}})), shared("o")),
        (lambda: Space(o=Choice({"a": {"v": 1}, "b": {}}), p=Choice({"a": {"v": 2}, "b": {}})), shared("v")),
        (
            lambda: Space(o=Choice({"a": {"v": 1, "p": Choice({"x": {"v": 2}, "y": {}})}, "b": {}})),
            shared("v"),
        ),
        (lambda: Space(o=Choice({"a": {3: 1}, "b": {}})), "A parameter needs a text as its name, got 3."),
        (lambda: CONTRACT.validate([1]), "A config must be a dictionary name -> value, got [1]."),
        (lambda: CONTRACT.decode([0.5] * 3), "Points of this space have 9 coordinates, got shape (1, 3)."),
        (lambda: CONTRACT.decode_all([0.5] * 9), "Points of this space have 9 coordinates, got shape (9,)."),
        (lambda: CONTRACT.decode([2.0] * 9), "Points must lie in the unit cube, got values from 2.0 to 2.0."),
        (lambda: CONTRACT.active([[math.nan] * 9]), "Points must lie in the unit cube, got values from nan to nan."),
    ],
)
def test_a_wrong_space_or_point_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
