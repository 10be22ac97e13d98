from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from bo.scaling.laws import LAWS, BatchRule, Exponents, PowerLaw, StepLaw, Together, WidthRule, parse, scale_lr
from search_spaces.curve import Power

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables"))
BOOTSTRAP = "1004_fitted_lr_bs_scaling_model_parameters.csv"

#: One law of every kind, with nothing left at its default that can be set beside the rest.
EXAMPLES = [
    StepLaw(lr="lr", batch="batch_size", params="N", tokens="D", sequence=2048, sd=0.3),
    PowerLaw(lr="rate", tokens="D", batch="b", grows={"D": 0.5, "N": 0.1}, sd=0.2),
    PowerLaw(batch_tokens=2**22),
    BatchRule(lr="rate", batch="b", grows={"tokens": 0.571}, exponent=1.0, sd=0.1),
    WidthRule(lr="rate", axis="width", width=1.0, sd=0.2),
    Exponents({"lr": {"params": -0.5, "tokens": (0.2, 0.3)}, "batch_size": {"tokens": 0.5}}, sd=0.25),
    Together((WidthRule(), BatchRule(grows={"tokens": 0.5}))),
]


def test_the_step_law_is_as_published() -> None:
    values = StepLaw(lr="lr", batch="batch_size", sequence=1).value({"params": 1e9, "tokens": 1e11})
    assert values["lr"] == pytest.approx(1.63e-3, rel=0.01)
    assert values["batch_size"] == pytest.approx(1.108e6, rel=1e-3)  # tokens
    in_sequences = StepLaw(batch="batch_size", sequence=2048).value({"params": 1e9, "tokens": 1e11})
    assert round(in_sequences["batch_size"]) == 541


def test_the_step_laws_numbers_are_the_average_of_its_published_bootstrap() -> None:
    path = next(TABLES.glob(f"**/{BOOTSTRAP}"), None) if TABLES.exists() else None
    if path is None:
        pytest.skip(f"{BOOTSTRAP} of github step-law/steplaw is not in {TABLES}; set WINDTUNNEL_TABLES")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ("lr_intercept", "lr_coefN", "lr_coefD", "bs_intercept", "bs_coefD")
    intercept, n, d, batch_intercept, batch_d = (np.mean([float(row[name]) for row in rows]) for name in names)
    pairs = StepLaw(lr="lr", batch="b").pairs()
    assert pairs["lr", "params"][0] == pytest.approx(n, abs=1e-3)
    assert pairs["lr", "tokens"][0] == pytest.approx(d, abs=1e-3)
    assert pairs["b", "tokens"][0] == pytest.approx(batch_d, abs=1e-3)
    at_one = StepLaw(lr="lr", batch="b", sequence=1).value({"params": 1.0, "tokens": 1.0})
    assert at_one == pytest.approx({"lr": math.exp(intercept), "b": math.exp(batch_intercept)}, rel=0.01)


def test_every_kind_has_an_example_here() -> None:
    assert {law.kind for law in EXAMPLES} == set(LAWS)
    assert all(LAWS[law.kind] is type(law) for law in EXAMPLES)


@pytest.mark.parametrize("law", EXAMPLES, ids=lambda law: law.kind)
def test_a_law_survives_json(law) -> None:
    assert parse(json.loads(json.dumps(law.to_json()))) == law


@pytest.mark.parametrize("law", EXAMPLES, ids=lambda law: law.kind)
def test_a_law_says_something_of_each_name_it_has_and_of_nothing_else(law) -> None:
    parameters, axes = law.names()
    drift = law.drift([*parameters, "other"], ["another", *axes])
    assert drift
    assert {name for name, _ in drift} == set(parameters)
    assert {axis for _, axis in drift} == set(axes)
    assert all(math.isfinite(mean) and 0 < sd < math.inf for mean, sd in drift.values())


@pytest.mark.parametrize("law", EXAMPLES, ids=lambda law: law.kind)
def test_a_config_moved_along_a_law_and_back_is_the_same(law) -> None:
    parameters, axes = law.names()
    config = dict.fromkeys(parameters, 0.3) | {"optimizer": "adamw"}
    small, large = dict.fromkeys(axes, 1e6), dict.fromkeys(axes, 3e8)
    there = law.moved(config, small, large)
    assert there["optimizer"] == "adamw"
    assert any(there[name] != config[name] for name in parameters)
    assert law.moved(there, large, small) == pytest.approx(config)


def test_a_config_moves_as_the_values_of_the_law_do() -> None:
    law = StepLaw(lr="lr", batch="b", sequence=2048)
    small, large = {"params": 1e8, "tokens": 2e9}, {"params": 1e9, "tokens": 1e11}
    assert law.moved(law.value(small), small, large) == pytest.approx(law.value(large))


def test_a_setting_of_a_policy_is_a_law() -> None:
    law = parse({"kind": "step_law", "lr": "lr", "batch": "batch_size"})
    assert law == StepLaw(lr="lr", batch="batch_size")
    assert law.drift(["lr", "batch_size", "dropout"], ["params", "tokens"]) == {
        ("lr", "params"): (-0.713, 0.15),
        ("lr", "tokens"): (0.307, 0.15),
        ("batch_size", "params"): (0.0, 0.15),
        ("batch_size", "tokens"): (0.571, 0.15),
    }


def test_what_is_not_there_is_none() -> None:
    assert StepLaw(lr="lr", params=None).drift(["lr"], ["tokens"]) == {("lr", "tokens"): (0.307, 0.15)}
    assert StepLaw(lr="lr", params=None).value({"tokens": 1e9}) == {}
    assert StepLaw(lr="lr", batch="b").value({"params": 1e9, "tokens": 1e11}).keys() == {"lr"}  # no tokens of a unit


def test_as_the_batch_drifts_so_does_the_rate() -> None:
    for exponent in (0.0, 0.5, 1.0):
        fixed = BatchRule(grows={"tokens": 0.6}, exponent=exponent).pairs()
        searched = BatchRule(batch="b", grows={"tokens": 0.6}, exponent=exponent)
        assert fixed == {("lr", "tokens"): (pytest.approx(0.6 * exponent), 0.15)}
        assert searched.couplings == {("lr", "b"): exponent}
        assert searched.pairs()["lr", "tokens"] == pytest.approx((0.6 * exponent, 0.15 * math.hypot(1, exponent)))
        assert searched.pairs()["b", "tokens"] == (0.6, 0.15)


def test_the_step_law_implies_nearly_the_square_root_rule() -> None:
    pairs = StepLaw(lr="lr", batch="b").pairs()
    assert pairs["lr", "tokens"][0] / pairs["b", "tokens"][0] == pytest.approx(0.54, abs=0.005)


def test_the_power_law_is_the_schedule_of_that_name() -> None:
    batch, step, total = 2**20, 59_999, 100_000
    factor = Power(batch_tokens=batch).factor(step, total)
    law = PowerLaw(batch_tokens=batch)
    assert law.value({"tokens": (step + 1) * batch}) == pytest.approx({"lr": 0.02 * factor})
    assert law.value({"tokens": 1.0}) == {"lr": 0.02}
    assert law.pairs() == {("lr", "tokens"): (-0.51, 0.15)}
    assert PowerLaw(grows={"tokens": 0.5}).pairs()["lr", "tokens"] == pytest.approx((-0.01, 0.15))


def test_the_width_rule_takes_the_rate_down_with_width() -> None:
    assert WidthRule().pairs() == {("lr", "params"): (-0.5, 0.15)}
    assert WidthRule(axis="width", width=1.0).moved({"lr": 8e-3}, {"width": 64}, {"width": 512}) == {"lr": 1e-3}


def test_rates_scale_with_batches_by_each_rule() -> None:
    assert scale_lr(1e-3, 64, 256) == pytest.approx(2e-3, rel=1e-15)
    assert scale_lr(1e-3, 64, 256, 1.0) == pytest.approx(4e-3, rel=1e-15)
    assert scale_lr(1e-3, 64, 256, 0.0) == 1e-3


def test_two_laws_may_not_say_the_same() -> None:
    with pytest.raises(ValueError, match="Two laws say how 'lr' goes with 'tokens'"):
        Together((StepLaw(lr="lr"), BatchRule(grows={"tokens": 0.5})))


def test_a_name_that_the_study_does_not_have_is_refused() -> None:
    law = StepLaw(lr="lr", batch="batch_size")
    with pytest.raises(
        ValueError, match=r"names 'batch_size', which is no number to search; did you mean 'batchsize'\?"
    ):
        law.drift(["lr", "batchsize"], ["params", "tokens"])
    with pytest.raises(ValueError, match="names 'tokens', which is no scale axis; there are"):
        law.drift(["lr", "batch_size"], ["params"])
    with pytest.raises(ValueError, match="names 'batch', which is no number to search"):
        BatchRule(batch="batch", grows={"tokens": 0.5}).drift(["lr"], ["tokens"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "lr"}, "a dictionary with a kind"),
        ({"kind": "step_low", "lr": "lr"}, "did you mean 'step_law'"),
        ({"kind": "step_law", "bach": "b"}, "has no setting 'bach'; did you mean 'batch'"),
        ({"kind": "step_law"}, "needs the name of the learning rate"),
        ({"kind": "step_law", "lr": "lr", "params": None, "tokens": None}, "needs the name of an axis"),
        ({"kind": "step_law", "lr": 3}, "needs a name as lr, got 3"),
        ({"kind": "step_law", "lr": "x", "batch": "x"}, "has a name twice"),
        ({"kind": "step_law", "lr": "lr", "sd": 0}, "a number > 0 as sd, got 0.0"),
        ({"kind": "step_law", "lr": "lr", "sequence": "2048"}, "a finite number as sequence, got '2048'"),
        ({"kind": "power", "batch": "b"}, "power needs grows"),
        ({"kind": "power", "batch_tokens": 1e6, "grows": {"tokens": 0.5}}, "leave batch and grows away"),
        ({"kind": "batch_rule"}, "needs grows"),
        ({"kind": "batch_rule", "grows": [0.5]}, "a dictionary axis -> exponent as grows"),
        ({"kind": "batch_rule", "grows": {"tokens": float("nan")}}, "a finite number as grows"),
        ({"kind": "batch_rule", "grows": {"tokens": 0.5}, "exponent": True}, "a finite number as exponent, got True"),
        ({"kind": "width_rule", "width": -1}, "a number > 0 as width"),
        ({"kind": "exponents"}, "The law 'exponents' needs 'exponents'"),
        ({"kind": "exponents", "exponents": {}}, "a dictionary parameter -> axis -> exponent"),
        ({"kind": "exponents", "exponents": {"lr": -0.5}}, "a dictionary axis -> exponent for 'lr'"),
        ({"kind": "exponents", "exponents": {"lr": {"params": [1, 2, 3]}}}, "to be a number, or two with its spread"),
        ({"kind": "together", "laws": []}, "needs a list of laws"),
        ({"kind": "together", "laws": [{"kind": "width_rul"}]}, "did you mean 'width_rule'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse(settings)


def test_a_scale_that_lacks_an_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a scale with the axis 'tokens'"):
        StepLaw(lr="lr").value({"params": 1e9})
    with pytest.raises(ValueError, match="needs a number > 0 as lr"):
        WidthRule().moved({"lr": 0.0}, {"params": 1e6}, {"params": 1e7})
