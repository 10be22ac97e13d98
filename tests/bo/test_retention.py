"""Which checkpoints stay when a trial has ended."""

from unittest.mock import Mock

import pytest

from bo import Minimize, Pareto, Study, checkpoint
from bo.retention import RULES, Retention
from bo.study import trial_folder
from search_spaces import Fidelity, Real, Space

SPACE = Space(
    lr=Real(0.0, 1.0), fidelity=Fidelity(tokens=(1.0, 2.0), target={"tokens": 2.0}, cost=lambda s: s["tokens"])
)

# How each trial ends: at the top scale but for the proxy.
ENDS = {
    "finished": lambda study, id: study.tell(id, {"loss": 2.0}),
    "better": lambda study, id: study.tell(id, {"loss": 1.0}),
    "proxy": lambda study, id: study.tell(id, {"loss": 0.5}),
    "diverged": lambda study, id: study.fail(id, "loss is nan", diverged=True),
    "failed": lambda study, id: study.fail(id, "broken"),
    "stopped": lambda study, id: study.stop(id),
    "running": lambda study, id: None,
}
STAY = {
    "all": list(ENDS),
    "target": ["finished", "better", "running"],
    "best": ["better", "running"],
    "none": ["running"],
}


def made(path, objective=None):
    study = Study.create(path, SPACE, objective=objective or Minimize("loss"), policy="sobol")
    for name in ENDS:
        study.enqueue({"lr": 0.5}, {"tokens": 1.0 if name == "proxy" else 2.0})
    return study


def with_checkpoint(study, id):
    folder = trial_folder(study.folder, id)
    checkpoint.save(folder, 1)
    fresh = checkpoint.begin_files(folder)
    (fresh / "weights").touch()
    checkpoint.keep_files(folder, fresh)
    (folder / "log.txt").touch()
    (folder / ".checkpoint-000-000002.zip.torn").touch()


def there(study):
    return [
        name
        for id, name in enumerate(ENDS)
        if any(path.name != "log.txt" for path in trial_folder(study.folder, id).iterdir())
    ]


def test_every_rule_is_tested():
    assert STAY.keys() == RULES.keys()


@pytest.mark.parametrize("rule", STAY)
def test_as_trials_end_the_rule_says_which_checkpoints_stay(tmp_path, rule):
    with made(tmp_path) as study:
        forgotten = []
        retention = Retention(study, rule, forgotten.extend)
        for id, (_, end) in enumerate(ENDS.items()):
            study.ask(1)
            with_checkpoint(study, id)
            if end(study, id) is not None:
                retention.ended(study.trial(id))

        assert there(study) == STAY[rule]
        assert sorted(forgotten) == [id for id, name in enumerate(ENDS) if name not in STAY[rule]]
        assert all((trial_folder(study.folder, id) / "log.txt").exists() for id in range(len(ENDS)))


@pytest.mark.parametrize("rule", STAY)
def test_a_whole_study_is_tidied_at_once_and_then_goes_on(tmp_path, rule):
    with made(tmp_path) as study:
        for id, end in enumerate(ENDS.values()):
            study.ask(1)
            with_checkpoint(study, id)
            end(study, id)
        forgotten = []
        retention = Retention(study, rule, forgotten.append)

        assert retention.throughout() == tuple(id for id, name in enumerate(ENDS) if name not in STAY[rule])
        assert there(study) == STAY[rule]
        assert len(forgotten) == (rule != "all")
        last = list(ENDS).index("running")
        study.tell(last, {"loss": 0.9})
        retention.ended(study.trial(last))
        stay = {"best": ["running"], "none": []}
        assert there(study) == stay.get(rule, STAY[rule])


def test_of_several_objectives_the_front_keeps_its_checkpoints(tmp_path):
    with made(tmp_path, Pareto(Minimize("loss"), Minimize("cost"))) as study:
        retention = Retention(study, "best")
        numbers = {0: (2.0, 2.0), 1: (1.0, 3.0), 3: (3.0, 1.0), 4: (1.5, 1.5)}
        for id in range(5):
            study.ask(1)
            with_checkpoint(study, id)
            if id in numbers:
                study.tell(id, dict(zip(("loss", "cost"), numbers[id], strict=True)))
                retention.ended(study.trial(id))
        assert [id for id in range(5) if list(trial_folder(study.folder, id).glob("*.zip"))] == [1, 2, 3, 4]


def test_a_better_run_made_elsewhere_does_not_cost_the_best_one_here_its_checkpoints(tmp_path):
    with made(tmp_path) as study:
        study.add({"lr": 0.1}, {"loss": 0.1})
        retention = Retention(study, "best")
        retention.throughout()
        for id, loss in enumerate((2.0, 1.0, 3.0), start=1):
            study.ask(1)
            with_checkpoint(study, id)
            study.tell(id, {"loss": loss})
            retention.ended(study.trial(id))
            assert list(trial_folder(study.folder, min(id, 2)).glob("*.zip"))
        assert not list(trial_folder(study.folder, 1).glob("*.zip"))
        assert Retention(study, "best").throughout() == (1, 3)


def test_what_keeping_the_best_costs_does_not_grow_with_the_trials(tmp_path, monkeypatch):
    with made(tmp_path) as study:
        retention, looks = Retention(study, "best"), []
        contends = study.contends
        monkeypatch.setattr(study, "contends", lambda trial: looks.append(trial) or contends(trial))
        monkeypatch.setattr(study, "best", Mock(side_effect=AssertionError("looked at every trial")))
        for trial in study.ask(7):
            retention.ended(study.tell(trial.id, {"loss": 1.0}))
        assert len(looks) == 7


def test_checkpoints_that_cannot_be_removed_are_warned_about_and_end_no_sweep(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "remove", Mock(side_effect=PermissionError(13, "Permission denied")))
    with made(tmp_path) as study:
        for _ in range(2):
            trial_folder(study.folder, study.ask(1)[0].id).mkdir(parents=True)
        for id in range(2):
            study.tell(id, {"loss": 1.0})
        assert Retention(study, "none").throughout() == (0, 1)
    assert (
        "Checkpoints of trial 1 cannot be removed ([Errno 13] Permission denied); remove them by hand." in caplog.text
    )


def test_an_unknown_rule_is_refused(tmp_path):
    with made(tmp_path) as study, pytest.raises(ValueError, match=r"one of 'all' \(every trial's\), .*; got 'newest'"):
        Retention(study, "newest")
