from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bo import AtMost, Minimize, Study
from bo.objective import Objective, Pareto
from bo.policies.recommendation import best_measured, candidates, recommend
from bo.policies.sobol import Sobol
from bo.ports import History, Recommendation
from bo.trial import Trial
from integrations.command_line import main
from search_spaces import Fidelity, Real, Scale, Space

LINE = Space(x=Real(0, 1))
FIDELITY = Fidelity(params=(1e5, 4e5), tokens=(1e6,), target={"params": 4e5, "tokens": 1e6})
SCALED = Space(x=Real(0, 1), fidelity=FIDELITY)
SMALL, TOP = FIDELITY.cells()


def bowl(x: float) -> float:
    return 2 + 0.5 * (x - 0.3) ** 2


def history(
    xs: Sequence[float],
    losses: Mapping[int, float] | None = None,
    space: Space = LINE,
    scale: Scale | None = None,
    objective: Objective | None = None,
) -> History:
    """Runs at these values; `losses` of some in place of the bowl's."""
    trials = []
    for i, x in enumerate(xs):
        loss = (losses or {}).get(i, bowl(x) + 0.01 * float(np.random.default_rng(i).standard_normal()))
        trials.append(
            Trial(i, {"x": x}, scale or space.top, i, "bayes", status="finished", metrics={"loss": loss, "gb": 100 * x})
        )
    return History(space, objective or Minimize("loss"), tuple(trials))


def found(told: History, scale: Scale | None = None, **settings: Any) -> Recommendation:
    return recommend(told, scale or told.space.top, np.random.default_rng(0), **settings)


def test_the_luckiest_value_is_not_recommended() -> None:
    grid = [i / 10 for i in range(11) for _ in range(3)]
    lucky = 24  # the first run at 0.8, whose replicates are as bad as they should be
    told = history(grid, {lucky: 1.97})
    assert min(told.trials, key=lambda trial: trial.metrics["loss"]).id == lucky  # type: ignore[index]
    for tried in (False, True):
        config = found(told, tried=tried).config
        assert config["x"] == pytest.approx(0.3, abs=0.11)


def test_the_best_of_those_tried_is_one_that_ran_and_says_which() -> None:
    told = history([0.0, 0.2, 0.45, 0.7, 1.0], dict(enumerate(map(bowl, [0.0, 0.2, 0.45, 0.7, 1.0]))))
    tried, free = found(told, tried=True), found(told)
    assert tried.trial == 1
    assert tried.config == told.trials[1].config
    assert tried.mean == pytest.approx(bowl(0.2), abs=0.01)
    assert tried.low is not None
    assert tried.high is not None
    assert tried.low < tried.mean < tried.high  # type: ignore[operator]
    assert free.trial is None
    assert abs(free.config["x"] - 0.3) < 0.05


def test_runs_of_one_config_under_other_seeds_are_replicates_of_one_point() -> None:
    xs = [0.0, 0.3, 1.0, 0.3, 0.6, 0.3]
    one, other = (history(xs, {1: 2.0 + a, 3: 2.0 - a, 5: 2.0, 0: 2.045, 2: 2.245, 4: 2.045}) for a in (0.02, -0.02))
    first, second = found(one, tried=True), found(other, tried=True)
    assert first.trial == second.trial == 1
    assert first.note == second.note == "It ran 3 times, also as trial 3, trial 5."
    assert first.mean == pytest.approx(second.mean)
    assert first.mean == pytest.approx(2.0, abs=0.02)


def test_of_those_tried_only_runs_at_the_scale_count_where_there_are_any() -> None:
    small, top = history([0.3, 0.5, 0.1], None, SCALED, SMALL).trials, history([0.9, 0.6], None, SCALED, TOP).trials
    both = tuple(replace(trial, id=i) for i, trial in enumerate([*small, *top]))
    assert found(History(SCALED, Minimize("loss"), both), tried=True).trial == 4
    below = found(History(SCALED, Minimize("loss"), both[:3]), tried=True)
    assert below.trial in (0, 1, 2)
    assert "No run has finished at this scale" in (below.note or "")


def test_what_breaks_a_limit_or_is_not_allowed_at_the_scale_is_no_candidate() -> None:
    limited = Minimize("loss", subject_to=[AtMost("gb", 50)])
    told = history([0.2, 0.4, 0.6, 0.9], {1: math.inf})
    assert [trial.id for trial in candidates(told.trials, limited, Scale(), LINE)] == [0]
    space = Space(x=Real(0, 1), constraints=["x <= 1e5 / params"], fidelity=FIDELITY)
    ran = history([0.2, 0.4, 0.9], None, space, SMALL)
    assert [trial.id for trial in candidates(ran.trials, Minimize("loss"), TOP, space.at(TOP))] == [0]
    none = found(History(space, Minimize("loss"), ran.trials[1:]), tried=True)
    assert none.trial is None
    assert none.config["x"] <= 0.25
    assert "was not tried" in (none.note or "")


def test_runs_of_another_study_are_candidates_only_where_this_one_has_none() -> None:
    ran = history([0.2, 0.8], space=SCALED, scale=TOP)
    theirs = tuple(replace(trial, id=9, source="prior", study="other") for trial in ran.trials)
    small = replace(ran.trials[0], scale=SMALL)
    for trials, expected in (((*theirs, *ran.trials), [0, 1]), ((*theirs, small), [0]), (theirs, [9, 9])):
        assert [trial.id for trial in candidates(trials, Minimize("loss"), TOP, SCALED.at(TOP))] == expected


def test_scales_on_a_line_to_the_target_tell_how_the_best_moves_there() -> None:
    ranges = Fidelity(params=Real(1e5, 1e8), tokens=Real(1e6, 1e9), target={"params": 1e8, "tokens": 1e9})
    space = Space(x=Real(0, 1), fidelity=ranges)
    cells = [ranges.scale({"params": 1e5 * 4.0**k, "tokens": 1e6 * 4.0**k}) for k in range(5)]
    ran = [trial for cell in cells for trial in history([0.2, 0.5, 0.9], space=space, scale=cell).trials]
    told = replace(history([], space=space), trials=tuple(ran))
    on = ranges.scale({"params": 1e5 * 4.0**4.2, "tokens": 1e6 * 4.0**4.2})
    off = ranges.scale({"params": 1e5 * 4.0**4.2, "tokens": 1e6 * 4.0**3})
    assert found(told, on).guess is None
    assert "no runs tell how the best moves with tokens alone" in (found(told, off).guess or "")


def test_without_a_model_it_is_the_best_run_that_is_allowed() -> None:
    space = Space(x=Real(0, 1), constraints=["x <= 1e5 / params"], fidelity=FIDELITY)
    ran = history([0.9, 0.24, 0.4, 0.1], None, space, SMALL).trials
    assert best_measured(ran, Minimize("loss"), space.at(SMALL)) == ({"x": 0.24}, 1)
    assert best_measured(ran[2:], Minimize("loss"), space.at(SMALL)) == ({"x": 0.4}, 2)
    read, trial = best_measured(ran[2:], Minimize("loss"), space.at(TOP))
    assert read["x"] <= 0.25
    assert trial is None
    within = Minimize("loss", subject_to=[AtMost("gb", 15)])
    assert best_measured(ran, within, space.at(TOP)) == ({"x": 0.1}, 3)


def test_with_nothing_told_it_is_the_middle_of_the_space() -> None:
    nothing = found(history([]), tried=True)
    assert (nothing.config, nothing.mean, nothing.trial) == ({"x": 0.5}, None, None)


def test_what_is_recommended_keeps_the_limits_as_likely_as_not() -> None:
    grid = [i / 10 for i in range(11)]
    limited = Minimize("loss", subject_to=[AtMost("gb", 15)])  # x <= 0.15, where the bowl's middle is not
    told = history(grid, dict(enumerate(map(bowl, grid))), objective=limited)
    free, tried = found(told), found(told, tried=True)
    assert free.config["x"] == pytest.approx(0.15, abs=0.02)
    assert "keeps the limits with a probability of" in (free.note or "")
    assert tried.config["x"] == 0.1


def test_no_config_is_the_best_of_several_objectives() -> None:
    with pytest.raises(ValueError, match="front"):
        found(history([0.1, 0.5, 0.9], objective=Pareto("loss", "gb")))


def test_a_policy_recommends_of_all_or_of_those_tried() -> None:
    told = history([0.0, 0.2, 0.45, 0.7, 1.0])
    assert Sobol().recommend(told, Scale(), np.random.default_rng(0), tried=True).trial is not None
    assert Sobol().recommend(told, Scale(), np.random.default_rng(0)).trial is None


def test_a_study_and_the_command_line_recommend_of_those_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Study.create(tmp_path / "s", LINE, objective=Minimize("loss"), policy="sobol") as study:
        for trial in study.ask(6):
            study.tell(trial.id, {"loss": bowl(trial.config["x"])})
    recommended = study.recommend(tried=True)
    assert recommended.trial is not None
    assert study.trial(recommended.trial).config == recommended.config
    assert study.recommend().trial is None
    assert main(["recommend", str(study.folder), "--tried", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trial"] == recommended.trial
    assert main(["recommend", str(study.folder), "--tried"]) == 0
    assert capsys.readouterr().out.startswith(f"Recommended, trial {recommended.trial}\n")
