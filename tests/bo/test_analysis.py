from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bo import Maximize, Minimize, Study, WeightedSum, analysis
from bo.analysis import Diagnostics, design, diagnose, jansen
from bo.objective import Objective, Pareto
from bo.ports import History
from bo.trial import Trial
from integrations.command_line import main
from search_spaces import Choice, Fidelity, Mixture, Real, Scale, Schedule, Space

BOX = Space(a=Real(-1, 1), b=Real(-1, 1), c=Real(-1, 1))
BRANCHED = Space(
    lr=Real(2.0**-10, 2.0**-2, log=True),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
)
Measure = Callable[[dict[str, Any], np.random.Generator], dict[str, float]]


def told(space: Space, objective: Objective, measure: Measure, n: int, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    trials = [
        Trial(i, config, space.top, 0, "added", status="finished", metrics=measure(config, rng))
        for i, config in enumerate(space.sample(rng, n))
    ]
    return History(space, objective, tuple(trials))


def plane(config: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
    return {"loss": 3 + 0.01 * config["a"] + 0.02 * config["b"]}


def noisy_wave(config: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
    smooth = math.sin(2 * config["a"]) + 0.5 * config["b"] * config["c"]
    return {"score": 5 + 0.1 * smooth + 0.02 * rng.standard_normal()}


def found(history: History, scale: Scale | None = None) -> Diagnostics:
    return diagnose(history, scale, np.random.default_rng(0))


def test_the_estimator_gives_the_known_effects_of_ishigami() -> None:
    # f = sin x1 + 7 sin^2 x2 + 0.1 x3^4 sin x1 on [-pi, pi]^3: Saltelli et al. 2010, and in closed form.
    points = (2 * design(BOX, [[0], [1], [2]], (), 0) - 1) * math.pi
    x1, x2, x3 = np.moveaxis(points, -1, 0)
    first, total = jansen(np.sin(x1) + 7 * np.sin(x2) ** 2 + 0.1 * x3**4 * np.sin(x1))
    assert first == pytest.approx([0.3139, 0.4424, 0.0], abs=0.03)
    assert total == pytest.approx([0.5576, 0.4424, 0.2437], abs=0.03)


def test_effects_of_a_plane_are_the_squares_of_its_slopes() -> None:
    effects = found(told(BOX, Minimize("loss"), plane, 24)).effects
    assert [effect.parameter for effect in effects] == ["a", "b", "c"]
    for effect, share in zip(effects, (0.2, 0.8, 0.0), strict=True):
        assert effect.first == pytest.approx(share, abs=0.05)
        assert effect.total == pytest.approx(share, abs=0.05)
        assert effect.first_low <= effect.first <= effect.first_high
        assert effect.total_low <= effect.total <= effect.total_high


def test_with_fewer_runs_less_is_known_about_what_matters() -> None:
    few, many = (found(told(BOX, Maximize("score"), noisy_wave, n)).effects for n in (6, 40))
    assert sum(e.total_high - e.total_low for e in many) < 0.8 * sum(e.total_high - e.total_low for e in few)


def test_parameters_of_an_option_count_given_that_option() -> None:
    def measure(config: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
        loss = 2 + 0.005 * math.log2(config["lr"])
        return {"loss": loss + (0.5 * (config["beta"] - 0.9) if config["optimizer"] == "adamw" else 0.02)}

    effects = {(e.parameter, e.given): e for e in found(told(BRANCHED, Minimize("loss"), measure, 40)).effects}
    assert set(effects) == {
        ("lr", ""),
        ("optimizer", ""),
        ("optimizer.adamw.beta", "optimizer=adamw"),
        ("optimizer.sgd.momentum", "optimizer=sgd"),
    }
    beta, lr = 0.5 * 0.19, 0.005 * 8  # slopes over the range
    assert effects["optimizer.adamw.beta", "optimizer=adamw"].first == pytest.approx(
        beta**2 / (beta**2 + lr**2), abs=0.08
    )
    assert effects["optimizer.sgd.momentum", "optimizer=sgd"].total < 0.08


def test_a_constant_objective_has_no_effects() -> None:
    effects = found(told(BOX, Minimize("loss"), lambda config, rng: {"loss": 1.0}, 8)).effects
    assert all(effect.first == effect.total == 0 for effect in effects)


def test_runs_are_foretold_in_the_users_sign_and_unit() -> None:
    history = told(BOX, Maximize("score"), noisy_wave, 40)
    diagnostics = found(history)
    assert [run.trial for run in diagnostics.left_out] == list(range(40))
    measured = [trial.metrics["score"] for trial in history.trials if trial.metrics]
    assert [run.measured for run in diagnostics.left_out] == pytest.approx(measured)
    assert all(run.low < run.mean < run.high for run in diagnostics.left_out)
    errors = np.array([run.mean - run.measured for run in diagnostics.left_out])
    assert float(errors.std()) < 0.6 * float(np.std(measured))
    half, most, nearly = diagnostics.coverage
    assert [half.level, most.level, nearly.level] == [0.5, 0.8, 0.9]
    assert 12 <= half.inside <= 30
    assert half.inside <= most.inside <= nearly.inside
    assert nearly.inside >= 32
    assert nearly.inside == sum(run.low <= run.measured <= run.high for run in diagnostics.left_out)


def test_diverged_and_open_runs_are_not_foretold() -> None:
    history = told(BOX, Maximize("score"), noisy_wave, 12)
    trials = list(history.trials)
    trials[3] = replace(trials[3], status="diverged", metrics=None)
    trials[5] = replace(trials[5], status="running", metrics=None)
    runs = found(replace(history, trials=tuple(trials))).left_out
    assert [run.trial for run in runs] == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert all(run.measured == pytest.approx(trials[run.trial].metrics["score"]) for run in runs)


def test_kernels_speak_in_units_of_the_user() -> None:
    space = Space(
        lr=Real(2.0**-10, 2.0**-2, log=True),
        decay=Real(0, 0.5),
        size=Choice("s", "m", "l", ordered=True),
        kind=Choice("x", "y"),
        schedule=Schedule("cosine", "linear"),
        data=Mixture("code", "docs"),
    )

    def measure(config: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
        noise = 0.001 * rng.standard_normal()
        return {"l": 2 + 0.01 * math.log2(config["lr"]) + noise, "m": 200 + math.log2(config["lr"]) + 100 * noise}

    kernels = found(told(space, WeightedSum({"l": 1.0, "m": 0.5}), measure, 30)).kernels
    assert [kernel.metric for kernel in kernels] == ["l", "m"]
    scales = {scale.name: scale for scale in kernels[0].lengthscales}
    assert scales["lr"].user == pytest.approx(8 * scales["lr"].encoded)
    assert scales["lr"].unit == "octaves"
    assert scales["decay"].user == pytest.approx(0.5 * scales["decay"].encoded)
    assert scales["size"].unit == "levels"
    assert scales["kind"].user is None
    assert {"schedule, warm-up", "schedule, middle", "schedule, decay"} < set(scales)
    assert len(scales) == len(kernels[0].lengthscales) == 9
    assert kernels[1].noise == pytest.approx(100 * kernels[0].noise, rel=0.5)
    assert 0.0002 < kernels[0].noise < 0.01


def test_runs_of_every_scale_that_the_model_learns_from_are_foretold() -> None:
    fidelity = Fidelity(params=(1e5, 4e5), tokens=(1e6,), target={"params": 4e5, "tokens": 1e6})
    space = Space(lr=Real(2.0**-10, 1.0, log=True), fidelity=fidelity)
    cells = fidelity.cells()
    trials = [
        Trial(
            i, c, cells[i % 2], 0, "sobol", status="finished", metrics={"l": 3 + 0.02 * (math.log2(c["lr"]) + 5) ** 2}
        )
        for i, c in enumerate(space.sample(np.random.default_rng(0), 10))
    ]
    diagnostics = found(History(space, Minimize("l"), tuple(trials)), cells[0])
    assert [run.trial for run in diagnostics.left_out] == list(range(10))
    assert diagnostics.scale == dict(cells[0])


def test_diagnostics_are_json_and_words() -> None:
    diagnostics = found(told(BRANCHED, Minimize("loss"), lambda c, rng: {"loss": 2 + c["lr"]}, 10))
    again = json.loads(json.dumps(diagnostics.to_json(), allow_nan=False))
    assert again["left_out"][3]["trial"] == 3
    assert len(again["effects"]) == 4
    words = diagnostics.words()
    assert "optimizer.adamw.beta if optimizer=adamw" in words
    assert "octaves" in words


def test_too_little_and_too_many_objectives_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 runs"):
        found(told(BOX, Minimize("loss"), plane, 1))
    with pytest.raises(ValueError, match="several objectives"):
        found(replace(told(BOX, Minimize("loss"), plane, 5), objective=Pareto("loss", "time")))


def test_the_command_line_stores_diagnostics_in_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Study.create(tmp_path / "s", BOX, objective=Minimize("loss"), policy="sobol") as study:
        for trial in study.ask(8):
            study.tell(trial.id, plane(dict(trial.config), np.random.default_rng(0)))
    assert main(["diagnose", str(study.folder)]) == 0
    assert "8 runs" in capsys.readouterr().out
    kept = json.loads((study.folder / "diagnostics.json").read_text())
    assert kept == found_again(study.folder)
    assert sorted(path.name for path in study.folder.iterdir() if "diagnostics" in path.name) == ["diagnostics.json"]


def found_again(folder: Path) -> Any:
    study = Study.open(folder)
    return json.loads(json.dumps(analysis.diagnose(study.history(), None, np.random.default_rng(study.seed)).to_json()))
