"""What is said of folders with something wrong in them."""

import hashlib

import pytest

from bo import Minimize, Study, journal
from integrations.doctor import examine
from search_spaces import Real, Space


@pytest.fixture
def study(tmp_path):
    return Study.create(tmp_path / "study", Space(lr=Real(1e-4, 1.0)), objective=Minimize("loss"), policy="sobol")


def verdicts(study, word):
    return [found.verdict for found in examine(study.folder) if word in found.words]


def test_a_study_that_is_well_has_nothing_bad(study):
    (trial,) = study.ask(1)
    study.tell(trial.id, {"loss": 1.0})
    study.close()
    before = sorted((path, path.read_bytes()) for path in study.folder.iterdir() if path.is_file())
    assert "bad" not in {found.verdict for found in examine(study.folder)}
    assert sorted((path, path.read_bytes()) for path in study.folder.iterdir() if path.is_file()) == before


def test_a_folder_without_a_study_is_bad(tmp_path):
    (found,) = examine(tmp_path)
    assert found.verdict == "bad"
    assert "holds no study" in found.words


def test_a_damaged_line_is_named_and_a_torn_one_is_a_note(study):
    study.ask(3)
    study.close()
    path = study.folder / journal.NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"n":5')
    assert verdicts(study, "torn line of 6 bytes") == ["note"]
    path.write_bytes(whole.replace(b'"proposed"', b'"PROPOSED"', 1))
    assert verdicts(study, "damaged at line 2") == ["bad"]


def test_trials_that_nobody_runs_any_more_are_named(study):
    study.ask(2)
    assert verdicts(study, "driven by pid") == ["ok"]
    study.close()
    assert verdicts(study, "2 trials were left running (0, 1)") == ["note"]


def test_many_failures_are_bad_and_few_are_worth_a_note(study):
    trials = study.ask(4)
    study.fail(trials[0].id, "OSError: gone")
    assert verdicts(study, "1 of 1 ended trials failed, the last, trial 0: OSError: gone") == ["bad"]
    for trial in trials[1:]:
        study.tell(trial.id, {"loss": 1.0})
    assert verdicts(study, "1 of 4 ended trials failed") == ["note"]


def test_a_changed_training_file_is_noticed(study, tmp_path):
    file = tmp_path / "job.py"
    file.write_text("one")
    study.launched_from(str(file), hashlib.sha256(b"one").hexdigest(), ())
    assert verdicts(study, "is as it was") == ["ok"]
    file.write_text("other")
    assert verdicts(study, "has changed since") == ["note"]
    file.unlink()
    assert verdicts(study, "is not on this machine") == ["note"]


def test_a_journal_that_cannot_be_added_to_is_bad(study, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path == study.folder)  # for who is root may write all
    assert verdicts(study, "journal.jsonl cannot be written by you") == ["bad"]


def test_what_every_user_may_change_is_bad(study):
    (study.folder / journal.NAME).chmod(0o666)
    assert verdicts(study, "can be changed by every user") == ["bad"]
