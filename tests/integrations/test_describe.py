"""What the terminal says of limits and fronts."""

import io
import json

import pytest

from bo import AtMost, Function, Maximize, Minimize, Pareto, Study, WeightedSum, run
from integrations.command_line import main
from integrations.describe import best_words, objective_words, status, summary
from integrations.progress import Progress
from search_spaces import Real, Space

SPACE = Space(lr=Real(0.0, 1.0))
LIMIT = AtMost("memory", 80)


def study_of(folder, objective, *told):
    study = Study.create(folder, SPACE, objective=objective, policy="sobol")
    for i, metrics in enumerate(told):
        study.enqueue({"lr": 0.1 * i})
        (trial,) = study.ask(1)
        study.tell(trial.id, metrics)
    return study


def test_a_result_beyond_a_limit_says_which_and_is_not_the_best(tmp_path):
    told = ({"loss": 1.0, "memory": 93.0}, {"loss": 2.0, "memory": 70.0})
    with study_of(tmp_path / "a", Minimize("loss", subject_to=[LIMIT]), *told) as study:
        assert objective_words(study, study.trial(0)) == "1.0000 (memory 93 > 80)"
        assert "best    2.0000 by trial 1" in status(study, None)
        assert "Best: 2.0000, trial 1" in summary(study)
        assert "Yours: 1.0000 (memory 93 > 80), trial 0, breaks the limits." in summary(study)


def test_while_nothing_keeps_the_limits_that_is_what_is_said(tmp_path):
    objective = Minimize("loss", subject_to=[LIMIT])
    with study_of(tmp_path / "a", objective, {"loss": 1.0, "memory": 93.0}) as study:
        assert "best    none within the limits yet" in status(study, None)
        assert "No best trial: none within the limits yet." in summary(study)
        assert "no best trial: none within the limits yet" in best_words(study)


def test_several_objectives_show_a_front_in_place_of_a_best(tmp_path, capsys):
    objective = Pareto("loss", Maximize("speed"), reference=[4.0, 0.0])
    told = ({"loss": 3.0, "speed": 9.0}, {"loss": 2.0, "speed": 5.0}, {"loss": 3.5, "speed": 8.0})
    with study_of(tmp_path / "a", objective, *told) as study:
        assert "front   2 trials, hypervolume 14" in status(study, None)
        front = ["  2.0000 / 5.0000  trial 1  lr 0.1", "  3.0000 / 9.0000  trial 0  lr 0"]
        head = "Front (minimize loss / maximize speed), hypervolume 14:"
        assert "\n".join([head, *front]) in summary(study)
        assert "\n".join(front) in best_words(study)
    assert main(["best", str(study.folder), "--json"]) == 0
    assert [trial["trial"] for trial in json.loads(capsys.readouterr().out)] == [0, 1]
    assert main(["recommend", str(study.folder)]) == 1
    assert "No configuration is the best of 2 objectives" in capsys.readouterr().err


def test_an_empty_front_is_said_to_be_one(tmp_path):
    with study_of(tmp_path / "a", Pareto("loss", WeightedSum({"loss": 1.0, "time": 0.5}))) as study:
        assert "front   none told at the target scale yet" in status(study, None)
        assert "has no front: none told at the target scale yet" in best_words(study)
        assert "No front" in summary(study)


def test_the_end_of_a_run_shows_the_measured_best_and_the_one_that_is_believed_best(tmp_path):
    """Five configurations, four runs of each, one of which was lucky."""
    with Study.create(tmp_path / "a", SPACE, objective=Maximize("accuracy"), policy="sobol") as study:
        for i in range(20):
            x = i % 5 / 4
            noise = 0.03 * (-1) ** (i // 5)
            study.add({"lr": x}, {"accuracy": 0.8 - (x - 0.5) ** 2 + noise + (0.1 if i == 3 else 0)})
        study.limit(n_trials=20)
        words = summary(study)
        found = study.recommend(tried=True)
    assert "Best: 0.8675, trial 3" in words
    assert found.trial == 2
    assert f"Recommended: trial 2; the model expects {-found.mean:.4f}" in words
    assert f"windtunnel recommend {study.folder}" in words


def test_a_best_that_the_model_believes_in_is_not_shown_twice(tmp_path):
    with Study.create(tmp_path / "a", SPACE, objective=Minimize("loss"), policy="sobol") as study:
        for i in range(9):
            study.add({"lr": i / 8}, {"loss": 1 + (i / 8 - 0.5) ** 2})
        words = summary(study)
        found = study.recommend(tried=True)
    assert "Best: 1.0000, trial 4" in words
    assert f"Recommended: the same trial; the model expects {found.mean:.4f}" in words
    assert words.count("  lr  ") == 1


def test_a_front_is_not_followed_by_advice_to_ask_for_one_recommendation(tmp_path):
    objective = Pareto("loss", "time")
    with study_of(tmp_path / "a", objective, {"loss": 3.0, "time": 9.0}) as study:
        study.limit(n_trials=4)
        assert "windtunnel recommend" not in summary(study)
        assert f"windtunnel best {study.folder}" in summary(study)


def test_several_objectives_are_diagnosed_each_by_itself(tmp_path, capsys):
    objective = Pareto("loss", Maximize("speed"), subject_to=[AtMost("memory", 3.0)])
    told = [{"loss": 1 + (i / 10 - 0.4) ** 2, "speed": 1 + i / 10, "memory": i / 10} for i in range(6)]
    study_of(tmp_path / "a", objective, *told).close()
    assert main(["diagnose", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert shown.index("Minimize(metric='loss'): 6 runs") < shown.index("Maximize(metric='speed'): 6 runs")
    assert len(json.loads((tmp_path / "a" / "diagnostics.json").read_text())) == 2


def product(metrics):
    return metrics["loss"] * metrics["time"]


def test_status_is_told_without_the_function_that_is_the_objective(tmp_path, capsys):
    objective = Function(product, metrics=("loss", "time"))
    study_of(tmp_path / "a", objective, {"loss": 3.0, "time": 9.0}).close()
    assert main(["status", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "1 trials (1 finished)" in shown
    assert "best    unknown, the objective" in shown
    assert main(["best", str(tmp_path / "a")]) == 1
    assert "needs functions of its training file" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Pareto("loss", "time"), "front of 1"),
        (Minimize("loss", subject_to=[AtMost("time", 0.5)]), "no result within the limits yet"),
    ],
    ids=["front", "limits"],
)
def test_the_moving_line_of_a_run_shows_the_front_or_waits_for_the_limits(tmp_path, objective, words):
    terminal = Terminal()
    with Study.create(tmp_path / "a", SPACE, objective=objective, policy="sobol") as study:
        progress = Progress(study, terminal)
        run(study, lambda trial: {"loss": 1.0 + trial.id, "time": 1.0}, n_trials=2, watch=progress)
        progress.close()
    assert words in terminal.getvalue()
