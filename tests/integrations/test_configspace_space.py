import re

import ConfigSpace as CS
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integrations.configspace_space import from_configspace
from search_spaces import Choice, Fidelity, Integer, Real, Space


def space_of(*items):
    cs = CS.ConfigurationSpace(seed=0)
    cs.add(*items)
    return cs


def same_configs(cs, space, n=30):
    """Each takes what the other samples, names and values alike."""
    for config in cs.sample_configuration(n):
        space.validate(dict(config))
    for config in space.sample(np.random.default_rng(0), n):
        CS.Configuration(cs, values=config).check_valid_configuration()
    space.validate(dict(cs.get_default_configuration()))


OPT = CS.Categorical("opt", ["adamw", "lion", "sgd"])
LR = CS.Float("lr", (1e-5, 1e-1), log=True)
MOMENTUM = CS.Float("momentum", (0.0, 0.99))
NESTEROV = CS.Categorical("nesterov", ["yes", "no"])
DAMPENING = CS.Float("dampening", (0.0, 1.0))


def test_hyperparameters_become_parameters_with_the_same_range():
    cs = space_of(
        CS.Float("a", (-1.5, 2.0)),
        CS.Float("b", (1e-5, 1e-1), log=True),
        CS.Integer("c", (-3, 9)),
        CS.Integer("d", (1, 1024), log=True),
        CS.Categorical("e", [True, False]),
        CS.Categorical("f", [1, 2, 5], weights=[0.5, 0.5, 0.5]),
        CS.Categorical("g", ["only"]),
        CS.OrdinalHyperparameter("h", ["tiny", "small", "large"]),
        CS.OrdinalHyperparameter("i", tuple(np.array([8, 64]))),
        CS.Constant("j", 3),
        CS.Constant("k", "text"),
    )
    space = from_configspace(cs)
    assert space == Space(
        a=Real(-1.5, 2),
        b=Real(1e-5, 1e-1, log=True),
        c=Integer(-3, 9),
        d=Integer(1, 1024, log=True),
        e=Choice(True, False),
        f=Choice(1, 2, 5),
        g="only",
        h=Choice("tiny", "small", "large", ordered=True),
        i=Choice(8, 64, ordered=True),
        j=3,
        k="text",
    )
    same_configs(cs, space)


def test_children_become_parameters_of_the_options_they_need():
    cs = space_of(
        OPT,
        LR,
        MOMENTUM,
        CS.Float("beta2", (0.9, 0.999)),
        CS.EqualsCondition(MOMENTUM, OPT, "sgd"),
        CS.InCondition(CS.Float("beta2", (0.9, 0.999)), OPT, ["adamw", "lion"]),
    )
    space = from_configspace(cs)
    assert space == Space(
        lr=Real(1e-5, 1e-1, log=True),
        opt=Choice(
            {
                "adamw": {"beta2": Real(0.9, 0.999)},
                "lion": {"beta2": Real(0.9, 0.999)},
                "sgd": {"momentum": Real(0, 0.99)},
            }
        ),
    )
    same_configs(cs, space)


def test_children_of_children_nest_also_when_they_name_all_their_ancestors():
    both = CS.AndConjunction(
        CS.EqualsCondition(DAMPENING, OPT, "sgd"), CS.NotEqualsCondition(DAMPENING, NESTEROV, "yes")
    )
    cs = space_of(OPT, NESTEROV, DAMPENING, CS.InCondition(NESTEROV, OPT, ["sgd", "lion"]), both)
    space = from_configspace(cs)
    assert space == Space(
        opt=Choice(
            {
                "adamw": {},
                "lion": {"nesterov": Choice("yes", "no")},
                "sgd": {"nesterov": Choice({"yes": {}, "no": {"dampening": Real(0, 1)}})},
            }
        )
    )
    same_configs(cs, space)


def test_a_condition_on_a_single_value_holds_or_the_child_is_refused():
    only = CS.Categorical("only", ["a"])
    fixed = CS.Constant("fixed", 3)
    cs = space_of(only, fixed, LR, MOMENTUM, CS.EqualsCondition(LR, only, "a"), CS.EqualsCondition(MOMENTUM, fixed, 3))
    space = from_configspace(cs)
    assert space == Space(fixed=3, only="a", lr=Real(1e-5, 1e-1, log=True), momentum=Real(0, 0.99))
    same_configs(cs, space)
    message = "lr depends on ['only'], but no value of that allows it; write this part of the space by hand."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_configspace(space_of(only, LR, MOMENTUM, CS.NotEqualsCondition(LR, only, "a")))


@st.composite
def trees(draw):
    """Hyperparameters, each a child of some options of an earlier categorical one or of none."""
    cs = CS.ConfigurationSpace(seed=draw(st.integers(0, 99)))
    parents = []
    for number in range(draw(st.integers(4, 8))):
        if draw(st.booleans()):
            hp = CS.Categorical(f"h{number}", ["a", "b", "c"][: draw(st.integers(1, 3))])
        else:
            hp = draw(st.sampled_from([CS.Float, CS.Integer]))(f"h{number}", (1, 9), log=draw(st.booleans()))
        cs.add(hp)
        if parents and draw(st.booleans()):
            parent = draw(st.sampled_from(parents))
            values = draw(st.lists(st.sampled_from(parent.choices), min_size=1, unique=True))
            cs.add(CS.InCondition(hp, parent, values))
        if isinstance(hp, CS.CategoricalHyperparameter):
            parents.append(hp)
    cs.add(CS.Float("other", (0.0, 1.0)))
    return cs


@settings(max_examples=150, derandomize=True, deadline=None)
@given(trees())
def test_both_spaces_have_the_same_configs(cs):
    same_configs(cs, from_configspace(cs), n=5)


def test_forbidden_clauses_are_left_out_only_on_demand():
    a, b = CS.Integer("a", (1, 9)), CS.Integer("b", (1, 9))
    cs = space_of(a, b, CS.ForbiddenGreaterThanRelation(a, b))
    message = (
        "The forbidden clauses ['Forbidden: a > b'] have no counterpart; write them as constraints= and pass "
        "drop=('forbidden',)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_configspace(cs)
    fidelity = Fidelity(params=(1, 2), tokens=(1, 2), target={"params": 2, "tokens": 2})
    space = from_configspace(cs, constraints=["a <= b"], fidelity=fidelity, drop=("forbidden",))
    assert space == Space(a=Integer(1, 9), b=Integer(1, 9), constraints=["a <= b"], fidelity=fidelity)
    for config in space.sample(np.random.default_rng(0), 20):
        CS.Configuration(cs, values=config).check_valid_configuration()


ORDINAL = CS.OrdinalHyperparameter("size", ["s", "m"])
FLAG = CS.Categorical("flag", [True, False])
SIBLING = CS.Categorical("sibling", ["x", "y"])
WIDTH = CS.Integer("width", (1, 9))
NEEDS_TEXTS = "and only options that are texts can have parameters of their own; make {} a categorical hyperparameter"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [CS.NormalFloatHyperparameter("n", mu=0, sigma=1, lower=-3, upper=3)],
            "n is a NormalFloatHyperparameter, which has no counterpart; make it uniform,",
        ),
        (
            [CS.BetaIntegerHyperparameter("n", alpha=2, beta=2, lower=0, upper=9)],
            "n is a BetaIntegerHyperparameter, which has no counterpart",
        ),
        (
            [CS.Categorical("c", ["a", "b"], weights=[1, 3])],
            "c has the weights (1, 3), and options of a Choice have none; remove them.",
        ),
        (
            [CS.Categorical("c", [(1, 2), (3, 4)])],
            "c has the option (1, 2), which is no text, finite number, bool or None",
        ),
        ([CS.Constant("c", (1, 2))], "c has the option (1, 2), which is no text, finite number, bool or None"),
        (
            [CS.Integer("n", (0, 2**50))],
            "n cannot be taken over: Integer needs whole numbers up to 2**44 as bounds, got high=1125899906842624.",
        ),
        (
            [CS.Float("fidelity", (0.0, 1.0))],
            "'fidelity' is an argument of Space and cannot name a parameter; rename it.",
        ),
        (
            [ORDINAL, LR, CS.EqualsCondition(LR, ORDINAL, "s")],
            f"lr is there where lr | size == 's', {NEEDS_TEXTS.format('size')}",
        ),
        (
            [FLAG, LR, CS.EqualsCondition(LR, FLAG, True)],
            f"lr is there where lr | flag == True, {NEEDS_TEXTS.format('flag')}",
        ),
        (
            [WIDTH, LR, CS.InCondition(LR, WIDTH, [1, 2])],
            f"lr is there where lr | width in {{1, 2}}, {NEEDS_TEXTS.format('width')}",
        ),
        (
            [WIDTH, LR, CS.GreaterThanCondition(LR, WIDTH, 3)],
            "lr is there where lr | width > 3, a GreaterThanCondition, which has no counterpart; use EqualsCondition,",
        ),
        (
            [
                OPT,
                SIBLING,
                LR,
                CS.OrConjunction(CS.EqualsCondition(LR, OPT, "sgd"), CS.EqualsCondition(LR, SIBLING, "x")),
            ],
            "lr is there where (lr | opt == 'sgd' || lr | sibling == 'x'), a OrConjunction, which has no counterpart;",
        ),
        (
            [
                OPT,
                SIBLING,
                LR,
                CS.AndConjunction(CS.EqualsCondition(LR, OPT, "sgd"), CS.EqualsCondition(LR, SIBLING, "x")),
            ],
            "lr depends on ['opt', 'sibling'], none of which depends on the others; write this part",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(items, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_configspace(space_of(*items))


def test_only_forbidden_clauses_can_be_dropped():
    with pytest.raises(ValueError, match=r"^drop= may hold 'forbidden', got 'weights'\.$"):
        from_configspace(space_of(LR), drop=("weights",))
