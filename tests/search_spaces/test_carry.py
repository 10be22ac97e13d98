"""Configs go over to a changed space unchanged, or are left out with a reason, or the pair of spaces is refused."""

import re

import pytest

from search_spaces import (
    Carried,
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
    assert carried == Carried((ADAMW, SGD), (0, 1), ())
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
            "beta belongs to an option of the new space that is not chosen.",
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
    assert carry([ADAMW, ADAMW | {"layers": 2}], OLD, new) == Carried((ADAMW | {"layers": 2},), (1,), ((0, reason),))


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
    with pytest.raises(ValueError, match=r"no value for 'eps', which the new one needs; .* defaults=\{'eps': \.\.\.\}"):
        carry([ADAMW], OLD, new, defaults={"clip": 1.0})
    assert carry([SGD], OLD, new, defaults={"clip": 1.0}).indices == (0,), "the option with eps is not chosen"


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


def test_rungs_of_the_scale_axes_may_differ():
    assert carry([ADAMW], scaled(tokens=(1, 2)), scaled(tokens=(4, 8))).indices == (0,)


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
            "Configs of the old space have no value for 'clip', which the new one needs; say what those runs did by "
            "defaults={'clip': ...}.",
        ),
        (OLD, changed(clip=Real(0, 1)), {"defaults": {"clip": 2.0}}, "clip must be a number in [0.0, 1.0], got 2.0."),
        (OLD, OLD, {"defaults": {"clap": 2.0}}, "defaults names 'clap', which the new space does not have; it has ["),
        (
            OLD,
            changed("layers"),
            {},
            "The old space varied 'layers', which the new one does not have, so its runs are not comparable; keep it, "
            "or count them as equal by drop=['layers'].",
        ),
        (OLD, OLD, {"drop": ["layer"]}, "drop names 'layer', which the old space does not have; it has ["),
        (OLD, OLD, {"drop": "layers"}, "drop must be a list of names, got 'layers'; write ['layers']."),
        (
            scaled(tokens=(1, 2)),
            OLD,
            {},
            "Only the old space has the scale axis 'tokens', so runs of the two cannot be compared; both need the same "
            "axes, got ['tokens'] and [].",
        ),
        (scaled(tokens=(1, 2)), scaled(tokens=(1, 2), steps=(1,)), {}, "Only the new space has the scale axis 'steps'"),
        (Space(lr=Real(0, 1)), OLD, {}, "Config has a value for 'layers', which the space does not know"),
    ],
)
def test_spaces_that_are_not_comparable_are_refused_by_the_name_of_what_differs(old, new, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        carry([ADAMW], old, new, **options)
