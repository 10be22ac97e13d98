"""The snippets on the page of the integrations run as printed."""

import re
from pathlib import Path

import pytest

import integrations
from bo import Minimize, RunningTrial, StopTrial, Study, Trial, run
from search_spaces import Cosine, Scale

FOLDER = Path(integrations.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


TRAINING, PRIOR = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def executed(snippet):
    """What it defines."""
    names = {"__name__": "page"}
    exec(compile(snippet, "integrations/README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def page():
    """The training function that uses most of the integrations."""
    return executed(TRAINING)


def test_a_study_tunes_it(page, tmp_path):
    study = Study.create(tmp_path / "study", page["space"], objective=Minimize("loss"), seed=0)
    run(study, page["train"], n_trials=3)
    assert [trial.status for trial in study.trials] == ["finished"] * 3


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.02), ("lion", 0.003)])
def test_a_trial_that_was_interrupted_ends_as_if_it_had_not_been(page, optimizer, lr, tmp_path):
    config = {"optimizer": optimizer, "lr": lr, "schedule": Cosine(warmup=0.1), "data": {"near": 0.3, "far": 0.7}}
    trial = Trial(id=0, config=config, scale=Scale(), seed=7, source="own")
    interrupted = RunningTrial(trial, tmp_path / "interrupted", lambda report: report.step in (20, 30))
    for _ in range(2):
        with pytest.raises(StopTrial):
            page["train"](interrupted)

    whole = page["train"](RunningTrial(trial, tmp_path / "whole", lambda report: False))
    assert page["train"](interrupted) == whole


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("[a-z]*.py")))
def test_every_file_is_on_the_page(file):
    assert f"`{file}`" in PAGE


def test_runs_from_elsewhere_are_taken_and_said_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    executed(PRIOR)
    assert capsys.readouterr().out in re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
