"""Configs go over to a changed space unchanged, or are left out with a reason, or the pair of spaces is refused."""

import re

import pytest

from search_spaces import (
    Choice,
    Cosine,
    Fidelity,
    Integer,
    Mixture,
    MixtureSchedule,
    Real,
    Schedule,
    Space,
    SwitchedMixture,
    carry,
    carry_scales,
)

PARAMETERS = {
    "lr": Real(1e-4, 1e-2, log=True),
    "layers": Integer(2, 8),
    "norm": Choice("layer", "rms"),
    "data": Mixture("code", "docs", "web"),
    "schedule": Schedule("cosine", "linear", warmup=Real(0.0, 0.1), floor=0.0),
    "optimizer": Choice({"adamw": {"beta": Real(0.9, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9), "nesterov": True}}),
    "dropout": 0.1,
}
OLD = Space(**PARAMETERS)
ADAMW = {
    "lr": 1e-3,
    "layers": 4,
    "norm": "rms",
    "data": {"code": 0.5, "docs": 0.5, "web": 0.0},
    "schedule": Cosine(warmup=0.05, floor=0.0),
    "optimizer": "adamw",
    "beta": 0.95,
    "dropout": 0.1,
}
SGD = {name: value for name, value in ADAMW.items() if name != "beta"} | {
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "data": {"code": 0.2, "docs": 0.3, "web": 0.5},
}


def changed(*without, **parameters):
    return Space(**{name: p for name, p in {**PARAMETERS, **parameters}.items() if name not in without})


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        changed(lr=Real(1e-5, 1.0)),
        changed(layers=Integer(1, 64, log=True)),
        changed(norm=Choice("none", "rms", "layer", ordered=True)),
        changed(schedule=Schedule("cosine", "linear", "wsd", warmup=Real(0.0, 0.2), floor=Real(0.0, 0.5))),
        changed(dropout=Real(0.0, 0.5)),
        changed(dropout=Choice(0.0, 0.1)),
        changed(
            optimizer=Choice(
                {
                    "lion": {"lion_beta": Real(0.9, 0.99)},
                    "sgd": {"momentum": Real(0.0, 0.99), "nesterov": Choice(True, False)},
                    "adamw": {"beta": Real(0.5, 0.999)},
                }
            )
        ),
    ],
    ids=["equal", "range", "log", "options", "families", "fixed to range", "fixed to options", "conditional"],
)
def test_a_widened_space_takes_every_config_as_it_is(new):
    carried = carry([ADAMW, SGD], OLD, new)
    assert (carried.configs, carried.indices, carried.left_out) == ((ADAMW, SGD), (0, 1), ())
    assert (set(carried.matched), carried.unused) == (set(PARAMETERS) | {"beta", "momentum", "nesterov"}, ())
    new.encode_all(carried.configs)


@pytest.mark.parametrize(
    ("new", "left", "reason"),
    [
        (changed(lr=Real(1e-4, 5e-4, log=True)), (0, 1), "lr must be a number in [0.0001, 0.0005], got 0.001."),
        (changed(layers=7), (0, 1), "layers is fixed at 7 in this space, got 4."),
        (changed(norm=Choice("layer", "none")), (0, 1), "norm must be one of ['layer', 'none'], got 'rms'."),
        (changed(schedule=Schedule("linear", "wsd")), (0, 1), "schedule must be of a family in ['linear', 'wsd'], got"),
        (
            changed(data=Mixture("code", "docs")),
            (1,),
            "data has a share 0.5 of 'web', which the new space does not mix.",
        ),
        (
            changed(data=Mixture("code", "docs", "web", floor=0.1)),
            (0,),
            "data needs web >= 0.1, its floor, got web=0.0.",
        ),
        (
            changed(optimizer=Choice({"adamw": {"beta": Real(0.9, 0.99)}, "lion": {}})),
            (1,),
            "optimizer must be one of ['adamw', 'lion'], got 'sgd'.",
        ),
        (
            changed(
                optimizer=Choice(
                    {"sgd": {"beta": Real(0.9, 0.99), "nesterov": True, "momentum": Real(0, 1)}, "adamw": {}}
                )
            ),
            (0,),
            "It has 'beta' beside an option without it.",
        ),
    ],
)
def test_a_config_outside_is_left_out_with_the_reason(new, left, reason):
    carried = carry([ADAMW, SGD], OLD, new, defaults={"beta": 0.95})
    assert tuple(index for index, _ in carried.left_out) == left
    assert carried.left_out[0][1].startswith(reason)
    assert carried.indices == tuple(index for index in (0, 1) if index not in left)
    new.encode_all(carried.configs)


def test_a_config_that_breaks_a_constraint_of_the_new_space_is_left_out():
    new = Space(**PARAMETERS, constraints=["layers * lr <= 0.003"])
    reason = "Config breaks the constraint layers * lr <= 0.003 at layers=4, lr=0.001."
    carried = carry([ADAMW, ADAMW | {"layers": 2}], OLD, new)
    assert (carried.configs, carried.left_out) == ((ADAMW | {"layers": 2},), ((0, reason),))


def test_a_source_that_is_new_has_no_share_and_one_that_is_gone_had_none():
    new = changed(data=Mixture("web", "math", "docs", "code"))
    (config,) = carry([SGD], OLD, new).configs
    assert list(config["data"].items()) == [("web", 0.5), ("math", 0.0), ("docs", 0.3), ("code", 0.2)]
    (config,) = carry([ADAMW], OLD, changed(data=Mixture("docs", "code"))).configs
    assert config["data"] == {"docs": 0.5, "code": 0.5}


def test_a_mixture_that_changes_during_training_is_carried_part_by_part():
    def switched(*names, **floor):
        return Space(lr=Real(0, 1), data=MixtureSchedule(Mixture(*names), Mixture(*names, floor=floor)))

    value = SwitchedMixture({"code": 0.5, "docs": 0.5}, {"code": 1.0, "docs": 0.0}, 0.8)
    (config,) = carry([{"lr": 0.5, "data": value}], switched("code", "docs"), switched("math", "docs", "code")).configs
    assert config["data"] == SwitchedMixture(
        {"math": 0.0, "docs": 0.5, "code": 0.5}, {"math": 0.0, "docs": 0.0, "code": 1.0}, 0.8
    )
    with pytest.raises(ValueError, match=r"^data\.last needs a share of at least 0\.1 of the new source 'math'"):
        carry([], switched("code", "docs"), switched("code", "docs", "math", math=0.1))


def test_a_new_parameter_gets_its_default_also_inside_an_option():
    inner = {
        "adamw": {"beta": Real(0.9, 0.99), "eps": Real(1e-12, 1e-6)},
        "sgd": PARAMETERS["optimizer"].subspaces["sgd"],
    }
    new = changed(optimizer=Choice(inner), clip=Real(0.1, 10.0), seed=3)
    carried = carry([ADAMW, SGD], OLD, new, defaults={"clip": 1, "eps": 1e-8})
    assert carried.configs == (
        ADAMW | {"clip": 1.0, "eps": 1e-8, "seed": 3},
        SGD | {"clip": 1.0, "seed": 3},
    )
    with pytest.raises(ValueError, match=r"no value for 'eps', which the new .* defaults=\{'eps': \.\.\.\}"):
        carry([ADAMW], OLD, new, defaults={"clip": 1.0})
    assert carry([SGD], OLD, new, defaults={"clip": 1.0}).indices == (0,), "the option with eps is not chosen"
    assert carried.given == {"clip": 1, "eps": 1e-8, "seed": 3}


def test_a_parameter_may_become_a_choice_that_decides_over_it():
    old = Space(lr=Real(1e-4, 1e-2), optimizer="adamw")
    new = Space(optimizer=Choice({"adamw": {"lr": Real(1e-5, 1e-1)}, "lion": {"lr": Real(1e-6, 1e-2)}}))
    assert carry([{"lr": 1e-3}], old, new).configs == ({"optimizer": "adamw", "lr": 1e-3},)


def test_what_was_fixed_or_is_named_may_be_dropped():
    assert carry([ADAMW], OLD, changed("dropout")).configs == (
        {name: value for name, value in ADAMW.items() if name != "dropout"},
    )
    carried = carry([ADAMW], OLD, changed("layers"), drop=["layers"])
    assert carried.configs == ({name: value for name, value in ADAMW.items() if name != "layers"},)


def test_configs_given_as_json_become_values():
    written = OLD.to_json(ADAMW)
    assert carry([written], OLD, OLD).configs == (ADAMW,)


def scaled(**axes):
    target = {name: rungs[-1] for name, rungs in axes.items()}
    return Space(**PARAMETERS, fidelity=Fidelity(by_size, target=target, **axes))


def by_size(scale):
    return scale["tokens"]


def test_scales_are_matched_by_axis_and_need_not_be_rungs():
    new = scaled(tokens=(4, 8), steps=(1, 2))
    carried = carry_scales([{"tokens": 1, "steps": 2}, {"tokens": 8, "steps": 0}], new)
    assert [dict(scale) for scale in carried.scales] == [{"tokens": 1.0, "steps": 2.0}]
    assert carried.left_out == ((1, "scale needs steps to be a positive number, got 0."),)
    assert (carried.matched, carried.given, carried.unused) == (("tokens", "steps"), {}, ())


def test_an_axis_that_runs_lack_is_said_for_those_that_lack_it():
    fidelity = Fidelity(by_size, tokens={"few": 4, "many": 8}, steps=(1, 2), target={"tokens": 8, "steps": 2})
    new = Space(**PARAMETERS, fidelity=fidelity)
    carried = carry_scales([{"steps": 1}, {"steps": 2}], new, scale={"tokens": "many"})
    assert [dict(scale) for scale in carried.scales] == [{"tokens": 8.0, "steps": 1.0}, {"tokens": 8.0, "steps": 2.0}]
    assert (carried.matched, carried.given) == (("steps",), {"tokens": "many"})
    some = carry_scales([{"steps": 1}, {"steps": 1, "tokens": 4}], new, scale={"tokens": 8})
    assert [scale["tokens"] for scale in some.scales] == [8.0, 4.0]
    lacking = carry_scales([{"steps": 1}, {"steps": 1, "tokens": 4}], new)
    assert lacking.left_out == ((0, "scale has no value for ['tokens']; it needs ['tokens', 'steps']."),)


def test_of_axes_that_the_space_has_not_the_largest_combination_counts():
    scales = [{"width": 1, "depth": 4}, {"width": 3, "depth": 2}, {"width": 4, "depth": 1}, {"width": 3, "depth": "x"}]
    assert carry_scales(scales, OLD).indices == (1,)
    assert carry_scales(scales, OLD).unused == ("width", "depth")
    assert carry_scales(scales, OLD, drop=["depth"]).indices == (2,), "the widest"
    assert carry_scales(scales, OLD, drop=["width", "depth"]).indices == (0, 1, 2, 3)
    assert carry_scales([{}, {}], OLD).scales == (OLD.top, OLD.top)


@pytest.mark.parametrize(
    ("scales", "scale", "message"),
    [
        (
            [{}],
            None,
            "Those runs have no value on the scale axis 'tokens', which the new space has; say what",
        ),
        ([{}], {"token": 1}, "scale names 'token', which is no axis of the new space; did you mean 'tokens'?"),
        (
            [{"tokens": 1}],
            {"tokens": 1},
            "scale names 'tokens', on which each of those runs has a value; leave it out.",
        ),
    ],
)
def test_scales_that_cannot_be_placed_are_refused_by_the_name_of_the_axis(scales, scale, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        carry_scales(scales, scaled(tokens=(1, 2)), scale=scale)


def test_configs_of_no_space_are_read_as_what_the_parameters_allow():
    row = {
        "lr": "0.001",
        "layers": "4",
        "norm": "rms",
        "data/code": "0.5",
        "data/docs": 0.5,
        "data/web": "0",
        "schedule": '{"family": "cosine", "warmup": 0.05, "floor": 0.0}',
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": "True",
        "dropout": "0.1",
        "note": "first",
    }
    carried = carry([row], None, OLD)
    assert carried.configs == (SGD | {"data": ADAMW["data"]},)
    assert carried.unused == ("note",)
    choices = Space(layers=Choice(2, 4), on=Choice(True, False), text=Choice("true", "2"))
    assert carry([{"layers": 2.0, "on": "true", "text": "true"}], None, choices).configs == (
        {"layers": 2, "on": True, "text": "true"},
    )


def test_a_row_without_a_value_that_others_have_is_left_out_and_one_value_for_all_may_be_dropped():
    space = Space(lr=Real(0, 1), dropout=Real(0, 1))
    carried = carry([{"lr": 0.1, "dropout": 0.2, "host": "a"}, {"lr": 0.1, "host": "a"}], None, space)
    assert (carried.indices, carried.left_out) == ((0,), ((1, "It has no value for 'dropout'."),))
    with pytest.raises(ValueError, match="varied 'host'"):
        carry([{"lr": 0.1, "dropout": 0.2, "host": host} for host in "ab"], None, space)
    assert carry([{"lr": 0.1}, {"lr": 0.2}], None, space, defaults={"dropout": 0.5}).indices == (0, 1)


@pytest.mark.parametrize("value", ["much", {"code": "most"}, {"code/a": 1}, [1], None, float("nan")])
def test_a_value_of_no_space_that_makes_no_sense_is_left_out(value):
    space = Space(lr=Real(0, 1), data=Mixture("code", "docs"))
    assert carry([{"lr": 0.5, "data": value}], None, space).configs == ()
    assert carry([{"lr": value, "data": {"code": 1, "docs": 0}}], None, space).configs == ()
    assert carry([{"lr": 0.5, "data/code": value, "data/code/more": 1}], None, space).configs == ()


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        (OLD, changed(lr=Choice(1e-3, 1e-2)), {}, "lr was of kind Real and is of kind Choice in the new space; keep"),
        (OLD, changed(layers=Real(1, 8)), {}, "layers was of kind Integer and is of kind Real in the new space"),
        (OLD, changed(data=1), {}, "data was of kind Mixture and is of kind Fixed in the new space"),
        (
            OLD,
            changed(data=Mixture("code", "docs", "web", "math", floor={"math": 0.02})),
            {},
            "data needs a share of at least 0.02 of the new source 'math', and runs of the old space had none",
        ),
        (
            OLD,
            changed(data=Mixture("code", "docs", "web", "math", fixed={"math": 0.3})),
            {},
            "data needs a share of at least 0.3 of the new source 'math'",
        ),
        (
            OLD,
            changed(clip=Real(0, 1)),
            {},
            "Those runs have no value for 'clip', which the new space needs; say what they did by "
            "defaults={'clip': ...}.",
        ),
        (OLD, changed(clip=Real(0, 1)), {"defaults": {"clip": 2.0}}, "clip must be a number in [0.0, 1.0], got 2.0."),
        (OLD, OLD, {"defaults": {"clap": 2.0}}, "defaults names 'clap', which the new space does not have; it has ["),
        (
            OLD,
            changed("layers"),
            {},
            "Those runs varied 'layers', which the new space does not have, so they are not comparable; keep it, or "
            "count them as equal by drop=['layers'].",
        ),
        (OLD, OLD, {"drop": ["layer"]}, "drop names 'layer', which those runs do not have; they have ["),
        (OLD, OLD, {"drop": "layers"}, "drop must be a list of names, got 'layers'; write ['layers']."),
        (Space(lr=Real(0, 1)), OLD, {}, "Config has a value for 'layers', which the space does not know"),
    ],
)
def test_spaces_that_are_not_comparable_are_refused_by_the_name_of_what_differs(old, new, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        carry([ADAMW], old, new, **options)
