"""The study: what is told stays told, is what the journal folds to, and wrong values are refused at the door."""

import errno
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bo import AtMost, Diverged, JournalError, Maximize, Minimize, Pareto, Proposal, Study, WeightedSum, state
from bo import journal as journals
from bo.elsewhere import Run, Runs
from bo.events import to_line
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    layers=Integer(1, 8),
    data=Mixture("code", "prose", floor=0.1),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    optimizer=Choice("adamw", "lion"),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)
CONFIG = {
    "lr": 1e-3,
    "layers": 4,
    "data": {"code": 0.5, "prose": 0.5},
    "schedule": {"family": "wsd", "decay": 0.2},
    "optimizer": "lion",
}
PROXY = {"params": 1e5, "tokens": 1e6}


def config(**changes):
    return CONFIG | changes


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), clock=lambda: 0.0) as made:
        yield made


def ask(study, **changes):
    study.enqueue(config(**changes))
    return study.ask(1)[0]


def test_an_enqueued_config_is_asked_first_and_reaches_the_trial_as_values(study):
    trial = ask(study)

    assert (trial.id, trial.source, trial.status, trial.attempt) == (0, "enqueued", "running", 1)
    assert trial.config["schedule"].factor(0, 100) > 0
    assert trial.config["lr"] == 1e-3
    assert trial.scale["tokens"] == 1e7
    assert trial.cost == 1.0
    assert study.queue == ()


def test_telling_twice_changes_nothing_and_telling_otherwise_is_an_error(study):
    trial = ask(study)
    study.tell(trial.id, {"loss": 1.0, "extra": math.nan})
    before = (study.folder / "journal.jsonl").read_bytes()

    study.tell(trial.id, {"loss": 1.0, "extra": math.nan})

    assert (study.folder / "journal.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"Trial 0 is finished already"):
        study.tell(trial.id, {"loss": 2.0, "extra": math.nan})
    with pytest.raises(ValueError, match=r"Trial 0 is finished already"):
        study.fail(trial.id, "too late")


def test_a_nan_that_the_objective_names_is_a_divergence_and_any_other_is_null(study, caplog):
    one, two = ask(study), ask(study, lr=1e-2)

    study.tell(one.id, {"loss": 1.0, "speed": math.inf})
    study.tell(two.id, {"loss": math.nan, "speed": 3.0})

    assert study.trial(0).status == "finished"
    assert math.isnan(study.trial(0).metrics["speed"])
    assert study.trial(1).status == "diverged"
    assert study.trial(1).error == "Trial 1 reported loss=nan; it is recorded as diverged."
    assert "Trial 0 reported speed=inf; it is stored as null." in caplog.text
    assert '"speed":null' in (study.folder / "journal.jsonl").read_text()


def test_the_best_is_the_told_one_at_the_target_scale(study):
    study.add(config(lr=1e-4), {"loss": 0.1}, scale=PROXY)
    assert study.best() is None

    study.add(config(lr=2e-4), {"loss": 2.0})
    study.add(config(lr=3e-4), {"loss": 1.0})
    study.add(config(lr=4e-4), {"loss": math.nan})

    assert study.best().id == 2
    assert study.spent == 0.0
    assert study.history().proposed == 0


def test_the_best_keeps_every_limit(tmp_path):
    limited = Minimize("loss", subject_to=[AtMost("memory", 80)])
    with Study.create(tmp_path / "study", SPACE, objective=limited) as study:
        study.add(config(lr=1e-3), {"loss": 1.0, "memory": 90.0})
        assert study.best() is None
        study.add(config(lr=2e-3), {"loss": 3.0, "memory": 80.0})
        study.add(config(lr=3e-3), {"loss": 2.0, "memory": 70.0})
        study.add(config(lr=4e-3), {"loss": 0.5, "memory": math.nan})

        assert study.best().id == 2
        assert study.trial(3).status == "diverged"
        assert study.best(Minimize("loss")).id == 0
        with pytest.raises(ValueError, match=r"add needs metric \['memory'\]"):
            study.add(config(), {"loss": 1.0})
    assert Study.open(tmp_path / "study", objective=limited).objective == limited
    with pytest.raises(ValueError, match="The objective differs"):
        Study.open(tmp_path / "study", objective=Minimize("loss"))


def test_a_trial_without_a_limited_metric_is_refused_and_its_study_can_be_forked_under_limits(study, tmp_path):
    study.add(config(lr=1e-3), {"loss": 1.0, "memory": 90.0})
    study.add(config(lr=2e-3), {"loss": 2.0, "memory": 70.0})
    limited = study.fork(tmp_path / "limited", objective=Minimize("loss", subject_to=[AtMost("memory", 80)]))
    assert limited.best().id == 1
    study.add(config(lr=3e-3), {"loss": 2.0})
    with pytest.raises(ValueError, match=r"Trial 2 has no metric \['memory'\]"):
        study.fork(tmp_path / "other", objective=limited.objective)


def test_several_objectives_have_a_front_in_place_of_a_best(tmp_path):
    objective = Pareto("loss", Maximize("speed"), subject_to=[AtMost("memory", 80)], reference=[4.0, 0.0])
    with Study.create(tmp_path / "study", SPACE, objective=objective) as study:
        assert study.front() == ()
        assert study.hypervolume() == 0.0
        for loss, speed, memory in ((2.0, 5.0, 1.0), (3.0, 9.0, 1.0), (3.5, 8.0, 1.0), (1.0, 10.0, 99.0)):
            study.add(config(), {"loss": loss, "speed": speed, "memory": memory})
        study.add(config(), {"loss": 1.0, "speed": 10.0, "memory": 1.0}, PROXY)

        assert [trial.id for trial in study.front()] == [0, 1]
        assert study.hypervolume() == pytest.approx(2 * 5 + 1 * 4)
        assert study.best(Maximize("speed")).id == 3
        with pytest.raises(ValueError, match=r"No trial is the best of 2 objectives; Study.front\(\) gives"):
            study.best()
        again = Study.open(study.folder, objective=objective)
        assert [trial.id for trial in again.front()] == [0, 1]


def test_a_front_of_one_objective_is_the_best_and_its_equals(study):
    for loss in (2.0, 1.0, 1.0):
        study.add(config(), {"loss": loss})
    assert [trial.id for trial in study.front()] == [1, 2]
    assert [trial.id for trial in study.front(Pareto("loss", Maximize("loss")))] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"Only a Pareto objective has a hypervolume"):
        study.hypervolume()


def test_another_objective_reweighs_what_was_told(tmp_path):
    with Study.create(tmp_path / "a", SPACE, objective=WeightedSum({"x": 1.0, "y": 1.0})) as study:
        study.add(config(lr=1e-4), {"x": 1.0, "y": 5.0})
        study.add(config(lr=1e-3), {"x": 3.0, "y": 1.0})
        study.add(config(lr=1e-3), {"x": math.nan, "y": 1.0}, PROXY)

        assert study.best().id == 1
        assert study.best(objective=Minimize("x")).id == 0
        assert study.best(objective=Maximize("x")).id == 1
        assert study.best(objective=Minimize("z")) is None
        with pytest.raises(ValueError, match=r"Trial 0 has no metric \['z'\], which the new objective names"):
            study.fork(tmp_path / "c", objective=Minimize("z"))
        assert not (tmp_path / "c").exists()
        with study.fork(tmp_path / "b", objective=WeightedSum({"x": 5.0, "y": 1.0})) as fork:
            assert fork.best().id == 0
            assert [t.status for t in fork.trials] == ["finished", "finished", "diverged"]


def test_reports_are_kept_once_and_a_rerun_step_replaces_what_followed(study):
    trial = ask(study)
    study.report(trial.id, 10, {"loss": 3.0})
    study.report(trial.id, 20, {"loss": 2.0})
    study.report(trial.id, 20, {"loss": 2.0})
    assert [(r.step, r.metrics["loss"]) for r in study.trial(0).reports] == [(10, 3.0), (20, 2.0)]

    study.report(trial.id, 10, {"loss": 2.9})
    assert [(r.step, r.metrics["loss"]) for r in study.trial(0).reports] == [(10, 2.9)]


def test_a_failure_teaches_nothing_and_a_divergence_is_a_result(study):
    one, two = ask(study), ask(study)

    study.fail(one.id, "OSError: no data", traceback="Traceback ...")
    study.fail(two.id, "loss is nan", diverged=True)
    study.fail(two.id, "loss is nan", diverged=True)

    assert [t.told for t in study.trials] == [False, True]
    assert study.trial(0).traceback == "Traceback ..."


def test_limits_hold_for_what_is_enqueued_too_and_a_larger_one_extends(study):
    study.limit(n_trials=2, budget=2.0)
    for _ in range(3):
        study.enqueue(CONFIG)
    assert len(study.ask(3)) == 2
    assert study.ask(1) == ()
    study.limit(n_trials=5)
    assert study.ask(1) == (), "the budget still holds"
    study.limit(budget=3.0)
    assert len(study.ask(1)) == 1
    assert (study.limits.n_trials, study.limits.budget) == (5, 3.0)


def test_a_reopened_study_is_the_same_and_opening_changes_nothing(study):
    trial = ask(study)
    study.report(trial.id, 1, {"loss": 2.0})
    study.tell(trial.id, {"loss": 1.0})
    study.limit(n_trials=7)
    study.enqueue(config(lr=0.05), scale=PROXY)
    study.launched_from("train.py", "00", ("--fast",))
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}

    again = Study.open(study.folder)

    assert again.trials == study.trials
    assert again.queue == study.queue
    assert again.limits == study.limits
    assert again.training == {"file": "train.py", "sha256": "00", "args": ["--fast"]}
    assert again.space == SPACE
    assert {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()} == before


def writes(monkeypatch):
    """How often the disk is asked to keep what it was given, from here on."""
    calls, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(descriptor), fsync(descriptor))[1])
    return calls


def test_changes_made_together_are_one_write_and_seen_at_once(study, monkeypatch):
    one, two = ask(study), ask(study)
    calls, size = writes(monkeypatch), (study.folder / "journal.jsonl").stat().st_size
    with study.together():
        study.report(one.id, 1, {"loss": 2.0})
        study.tell(one.id, {"loss": 1.0})
        with study.together():
            study.tell(two.id, {"loss": 3.0})
        assert study.best().id == 0
        assert calls == []
        assert (study.folder / "journal.jsonl").stat().st_size == size
    assert len(calls) == 1
    assert Study.open(study.folder).trials == study.trials
    with study.together():
        study.tell(one.id, {"loss": 1.0})
    assert len(calls) == 1, "nothing has changed"


def test_of_changes_made_together_all_or_none_are_on_the_disk(study, monkeypatch):
    one, two = ask(study), ask(study)
    before = (study.folder / "journal.jsonl").read_bytes(), tuple(study.trials)
    whole = os.pwrite

    def full(descriptor, data, offset):
        if len(data) > 100:
            return whole(descriptor, data[:100], offset)  # into the second line
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device"), study.together():  # noqa: PT012
        study.tell(one.id, {"loss": 1.0})
        study.tell(two.id, {"loss": 2.0})
    assert ((study.folder / "journal.jsonl").read_bytes(), tuple(study.trials)) == before
    monkeypatch.undo()

    study.tell(two.id, {"loss": 2.0})
    assert Study.open(study.folder).trials == study.trials


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_changed_together_before_an_error_stays(study, error):
    one, two = ask(study), ask(study)
    with pytest.raises(error), study.together():  # noqa: PT012
        study.tell(one.id, {"loss": 1.0})
        raise error
    assert [trial.status for trial in study.trials] == ["finished", "running"]
    study.tell(two.id, {"loss": 2.0})
    assert Study.open(study.folder).trials == study.trials


@pytest.mark.parametrize("place", ["ftruncate", "pwrite", "fsync", "apply"])
@pytest.mark.parametrize("before", [True, False])
def test_after_ctrl_c_anywhere_in_a_change_the_study_is_what_the_disk_holds_and_goes_on(
    study, monkeypatch, place, before
):
    module = state if place == "apply" else os
    real = getattr(module, place)

    def interrupted(*arguments):
        monkeypatch.undo()
        if not before:
            real(*arguments)
        raise KeyboardInterrupt

    ask(study)
    monkeypatch.setattr(module, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.tell(0, {"loss": 1.0})

    assert Study.open(study.folder).trials == study.trials
    study.tell(ask(study).id, {"loss": 2.0})
    again = Study.open(study.folder)
    assert again.trials == study.trials
    assert len(again.ended) == len({trial.id for trial in again.ended})


def test_after_ctrl_c_before_a_group_is_written_nothing_of_it_is_written_later(study, monkeypatch):
    ask(study)
    commit = study._journal.commit
    monkeypatch.setattr(study._journal, "commit", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), study.together():
        study.tell(0, {"loss": 1.0})
    monkeypatch.setattr(study._journal, "commit", commit)

    assert study.trial(0).status == "running"
    study.tell(0, {"loss": 2.0})
    assert [trial.metrics for trial in Study.open(study.folder).ended] == [{"loss": 2.0}]


changes = st.sampled_from(
    ["enqueue", "ask", "tell", "nan", "fail", "report", "branch", "retry", "stop", "add", "limit"]
)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(changes, st.integers(0, 5)), max_size=25))
def test_a_study_is_the_fold_of_its_journal_after_any_changes(steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fold") / "study"
    with Study.create(folder, SPACE, objective=Minimize("loss")) as study:
        for what, number in steps:
            running = study.running[number % len(study.running)].id if study.running else None
            match what:
                case "enqueue":
                    study.enqueue(config(layers=1 + number))
                case "ask" if study.queue:
                    study.ask(1)
                case "add":
                    study.add(CONFIG, {"loss": float(number)}, PROXY if number % 2 else None)
                case "limit":
                    study.limit(n_trials=100 + number)
                case "tell" if running is not None:
                    study.tell(running, {"loss": float(number)})
                case "nan" if running is not None:
                    study.tell(running, {"loss": math.inf})
                case "fail" if running is not None:
                    study.fail(running, f"error {number}", diverged=number % 2 == 0)
                case "report" if running is not None:
                    study.report(running, number, {"loss": 1.0})
                case "branch" if running is not None:
                    shorter = {"tokens": 1e6} if number % 2 else PROXY
                    study.branch(running, shorter, {"loss": math.nan if number == 5 else float(number)})
                case "retry" if running is not None:
                    study.retry(running, "node lost")
                case "stop" if running is not None:
                    study.stop(running)
        again = Study.open(folder)

        assert repr(again.trials) == repr(study.trials)  # by text: NaN is equal to itself there
        assert (again.queue, again.limits, again.spent) == (study.queue, study.limits, study.spent)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.ask(0), "ask needs a whole number of at least 1, got 0"),
        (lambda s: s.ask(True), "got True"),
        (lambda s: s.tell(9, {"loss": 1.0}), "has no trial 9; it has none yet"),
        (lambda s: s.tell(ask(s).id, {"los": 1.0}), r"Trial 0 has no metric \['loss'\].*it has \['los'\]"),
        (lambda s: s.tell(ask(s).id, {"loss": "low"}), "one number for metric 'loss', got 'low'"),
        (lambda s: s.tell(ask(s).id, 1.0), "dictionary of named numbers, got float"),
        (lambda s: s.enqueue(config(lr=5.0)), "lr"),
        (lambda s: s.enqueue({k: v for k, v in CONFIG.items() if k != "lr"}), r"Config has no value for \['lr'\]"),
        (lambda s: s.enqueue(config(learning_rate=1.0)), "learning_rate"),
        (lambda s: s.enqueue(CONFIG, {"params": 1e6}), "tokens"),
        (lambda s: s.enqueue(CONFIG, {"params": 3e5, "tokens": 1e7}), "params"),
        (lambda s: s.add(CONFIG, {"acc": 1.0}), r"add needs metric \['loss'\]"),
        (lambda s: s.limit(n_trials=0), "n_trials must be a whole number of at least 1, got 0"),
        (lambda s: s.limit(budget=-1.0), "budget must be a finite number above 0"),
        (lambda s: s.report(ask(s).id, "x", {"loss": 1.0}), "Trial 0 needs a whole step of at least 0, got 'x'"),
        (lambda s: s.fail(ask(s).id, RuntimeError("boom")), "fail needs a text that says what went wrong"),
        (lambda s: s.tell(ask(s).id, {"loss": 1.0}, seconds=math.nan), "seconds must be a finite number"),
        (lambda s: s.report(3, 1, {"loss": 1.0}), "has no trial 3"),
        (lambda s: s.retry(s.add(CONFIG, {"loss": 1.0}).id, "x"), "is finished already and cannot be retried"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence_and_change_nothing_told(study, call, message):
    with pytest.raises(ValueError, match=message):
        call(study)
    assert all(t.status == "running" or t.source == "added" for t in study.trials)
    Study.open(study.folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "loss"}, r"needs an objective such as Minimize\('loss'\), got 'loss'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"policy": "genetic"}, "no policy named 'genetic'; there are bayes, ladder"),
        ({"settings": {"nope": 1}}, r"The policy 'ladder' has settings \['surrogate'.*'trunks'\], got \['nope'\]"),
        ({"settings": {"proxy_cap": -1}}, "proxy_cap to be a finite number of at least 0, got -1"),
        ({"space": {"lr": 1}}, "needs a Space, got dict"),
        ({"space": Space(lr=Real(0, 1)), "policy": "ladder"}, "give the space a fidelity="),
        ({"objective": Pareto("loss", "time"), "policy": "trust_region"}, "needs one best run, and a Pareto"),
        ({"policy": "bayes", "settings": {"prior": {"lrr": {"centre": 1e-3, "spread": 2}}}}, "did you mean 'lr'"),
        ({"policy": "bayes", "settings": {"average_over": {"lr": {"a": 1}}}}, "average_over names 'lr'"),
        ({"policy": "bayes", "settings": {"options": {"foo": 1}}}, r"options \[\], got \['foo'\]"),
        ({"policy": "sobol", "settings": {"scale": {"params": 7, "tokens": 1e6}}}, "params to be one of"),
    ],
)
def test_wrong_arguments_make_no_study(tmp_path, arguments, message):
    given = {"space": SPACE, "objective": Minimize("loss")} | arguments
    space = given.pop("space")
    with pytest.raises(ValueError, match=message):
        Study.create(tmp_path / "study", space, **given)
    assert not (tmp_path / "study").exists()


def test_a_study_is_not_made_over_another(study):
    with pytest.raises(JournalError, match="already holds a study"):
        Study.create(study.folder, SPACE, objective=Minimize("loss"))


def test_a_folder_without_a_study_says_so(tmp_path):
    with pytest.raises(JournalError, match="holds no study"):
        Study.open(tmp_path)


def test_a_script_that_is_started_again_goes_on(study):
    ask(study)
    study.close()

    with Study.open_or_create(study.folder, SPACE, objective=Minimize("loss")) as again:
        assert again.trials == study.trials
    with pytest.raises(ValueError, match="was made with seed 0, not 1; use a new folder"):
        Study.open_or_create(study.folder, SPACE, objective=Minimize("loss"), seed=1)
    with pytest.raises(ValueError, match="was made with policy 'ladder', not 'sobol'"):
        Study.open_or_create(study.folder, SPACE, objective=Minimize("loss"), policy="sobol")


def test_a_fork_keeps_the_policy_and_does_not_repeat_proxies(study, tmp_path):
    planned = study.ask(4)
    for trial in planned:
        study.tell(trial.id, {"loss": 1.0 + trial.id, "other": 2.0})

    with study.fork(tmp_path / "fork", objective=Minimize("other")) as fork:
        assert (fork.policy_name, fork.seed) == (study.policy_name, study.seed)
        again = fork.ask(2)
    assert {trial.source for trial in planned} == {"ladder/proxy"}
    assert [trial.source for trial in again] == ["ladder/proxy"] * 2
    assert [t.scale for t in again] == [t.scale for t in study.ask(2)]


def runs_cost(scale):
    return scale["params"]


def test_a_cost_function_is_known_by_its_source_and_not_by_where_it_was_found(tmp_path):
    space = Space(lr=Real(0, 1), fidelity=Fidelity(runs_cost, params=(1.0, 8.0), target={"params": 8.0}))
    with Study.create(tmp_path / "s", space, objective=Minimize("loss")):
        pass
    runs_cost.__module__, was = "elsewhere", runs_cost.__module__
    try:
        moved = Space(lr=Real(0, 1), fidelity=Fidelity(runs_cost, params=(1.0, 8.0), target={"params": 8.0}))
        assert Study.open(tmp_path / "s", space=moved).space == space
    finally:
        runs_cost.__module__ = was
    with pytest.raises(ValueError, match="hand it in as cost="):
        Study.open(tmp_path / "s").ask(1)


def even(config):
    return config["a"] % 2 == 0


def test_a_predicate_is_known_by_its_source_and_not_by_where_it_was_found(tmp_path):
    made = Space(a=Integer(1, 9), constraints=["a <= 8", even])
    Study.create(tmp_path / "s", made, objective=Minimize("loss")).close()
    even.__module__, was = "elsewhere", even.__module__
    try:
        moved = Space(a=Integer(1, 9), constraints=["a <= 8", even])
    finally:
        even.__module__ = was
    assert Study.open(tmp_path / "s", space=moved).space == made
    other = Space(a=Integer(1, 9), constraints=["a <= 7", even])
    with pytest.raises(ValueError, match=r"constraints\.0 was 'a <= 8' and is 'a <= 7'"):
        Study.open(tmp_path / "s", space=other)


def test_a_creation_that_was_torn_can_be_made_again(study):
    study.close()
    path = study.folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:50])

    with Study.create(study.folder, SPACE, objective=Minimize("loss")) as again:
        assert again.trials == ()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda p: Space(**(p | {"lr": Real(1e-4, 1.0, log=True)}), fidelity=SPACE.fidelity),
            "lr.high was 0.1 and is 1.0",
        ),
        (
            lambda p: Space(**(p | {"depth": Integer(1, 2)}), fidelity=SPACE.fidelity),
            "depth is only in the given space",
        ),
        (
            lambda p: Space(**{k: v for k, v in p.items() if k != "layers"}, fidelity=SPACE.fidelity),
            "layers is only in the j",
        ),
        (lambda p: Space(**p), "fidelity was"),
    ],
)
def test_a_space_that_differs_is_refused_by_the_name_of_what_differs(study, other, message):
    with pytest.raises(ValueError, match=message):
        Study.open(study.folder, space=other(SPACE.parameters))


def test_an_objective_that_differs_is_refused(study):
    with pytest.raises(ValueError, match=r"made with \(Minimize\(metric='loss'\)\)"):
        Study.open(study.folder, objective=Minimize("other"))


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JournalError, match="file/study cannot be made"):
        Study.create(blocked / "study", SPACE, objective=Minimize("loss"))


@pytest.fixture
def no_rights(tmp_path):
    """Not being root, and not owning the folder."""
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if user := os.geteuid():
        yield tmp_path
    else:
        os.seteuid(65534)
        yield tmp_path
        os.seteuid(user)


def test_a_folder_without_rights_is_refused_by_name(no_rights):
    with pytest.raises(JournalError, match=r"study cannot be made \(Permission denied\); choose a folder you own"):
        Study.create(no_rights / "study", SPACE, objective=Minimize("loss"))


def test_a_study_open_elsewhere_can_be_read_and_not_changed(study):
    trial = ask(study)
    other = Study.open(study.folder)
    assert other.running == (trial,)
    with pytest.raises(JournalError, match=f"in use by pid {os.getpid()}"):
        other.tell(trial.id, {"loss": 1.0})
    study.close()
    other.tell(trial.id, {"loss": 1.0})
    other.close()


def test_a_bad_inner_line_is_refused_with_its_number_and_the_file_is_left_alone(study):
    ask(study)
    study.close()
    path = study.folder / journals.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"lion", b"lamb"), *lines[2:]]))
    damaged = path.read_bytes()

    with pytest.raises(JournalError, match="damaged at line 2: its checksum does not hold"):
        Study.open(study.folder)
    assert path.read_bytes() == damaged


# ------------------------------------------------------------------------------- what only the scale forbids

SUPPLIED = Space(
    batch_size=Integer(1, 64),
    data=Mixture("code", "prose", supply={"code": 1e6}, max_epochs=4),
    constraints=["1e5 * batch_size <= tokens"],
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)
CODE = {"batch_size": 8, "data": {"code": 0.9, "prose": 0.1}}
LARGE = {"batch_size": 32, "data": {"code": 0.1, "prose": 0.9}}


@pytest.mark.parametrize(
    ("config", "scale", "message"),
    [
        (CODE, None, "data needs code <= 0.4"),
        (
            LARGE,
            PROXY,
            r"Config breaks the constraint 100000.0 \* batch_size <= tokens at batch_size=32, tokens=1000000",
        ),
    ],
)
def test_what_the_scale_forbids_is_refused_at_the_door(tmp_path, config, scale, message):
    with Study.create(tmp_path / "s", SUPPLIED, objective=Minimize("loss")) as study:
        with pytest.raises(ValueError, match=message):
            study.enqueue(config, scale)
        assert study.queue == ()
        study.enqueue(config, PROXY if scale is None else None)
        assert dict(study.ask(1)[0].config) == config


def small(config):
    return config["batch_size"] <= 8


def test_no_configuration_is_taken_while_a_constraint_that_may_forbid_it_is_not_at_hand(tmp_path):
    space = Space(batch_size=Integer(1, 64), constraints=[small])
    Study.create(tmp_path / "s", space, objective=Minimize("loss")).close()
    allowed = Study.create(tmp_path / "prior", space, objective=Minimize("loss"))
    allowed.add({"batch_size": 8}, {"loss": 1.0})
    with Study.open(tmp_path / "s") as study:
        for change in (
            lambda: study.enqueue({"batch_size": 64}),
            lambda: study.add({"batch_size": 64}, {"loss": 1.0}),
            lambda: study.add_prior(allowed),
            lambda: study.ask(1),
        ):
            with pytest.raises(ValueError, match="small is not at hand; hand the space in"):
                change()
        assert study.best() is None
        assert study.trials == study.queue == ()
    with Study.open(tmp_path / "s", space=space) as study:
        study.add_prior(allowed)
        with pytest.raises(ValueError, match=r"breaks the constraint .*:small"):
            study.enqueue({"batch_size": 64})
        study.enqueue({"batch_size": 1})
        assert study.ask(1)[0].config == {"batch_size": 1}


class Careless:
    """A policy that does not look at the scale."""

    def propose(self, history, n, rng):
        return (Proposal(CODE, history.space.top, "careless"),)


def test_a_proposal_that_its_scale_forbids_is_refused(tmp_path):
    with Study.create(tmp_path / "s", SUPPLIED, objective=Minimize("loss")) as study:
        study._loaded_policy = Careless()
        with pytest.raises(ValueError, match=r"data needs code <= 0\.4"):
            study.ask(1)
        assert study.trials == ()


def test_a_run_made_elsewhere_against_its_scale_is_learned_from_and_never_the_best(tmp_path):
    with Study.create(tmp_path / "s", SUPPLIED, objective=Minimize("loss")) as study:
        study.add(CODE, {"loss": 1.0})
        assert study.best() is None
        study.add({"batch_size": 8, "data": {"code": 0.3, "prose": 0.7}}, {"loss": 2.0})
        assert study.best().id == 1
        assert [trial.told for trial in study.history().trials] == [True, True]
        assert Study.open(study.folder).trials == study.trials


# ------------------------------------------------------------------------------- what runs took


def test_the_cost_of_runs_is_learned_from_what_they_took(study):
    for scale, seconds in (
        (PROXY, 2.0),
        ({"params": 1e6, "tokens": 1e6}, 20.0),
        ({"params": 1e5, "tokens": 1e7}, 20.0),
    ):
        study.enqueue(CONFIG, scale)
        study.tell(study.ask(1)[0].id, {"loss": 1.0}, seconds=seconds)
    lost = ask(study)
    study.retry(lost.id, "node lost")
    study.tell(lost.id, {"loss": 1.0}, seconds=0.1)
    study.fail(ask(study).id, "too slow", seconds=900.0)
    study.add(CONFIG, {"loss": 1.0})

    cost = study.measured_cost()

    assert cost.at(study.top) == pytest.approx(200.0, rel=0.01)
    again = Space(
        **SPACE.parameters,
        fidelity=Fidelity(cost=cost, tokens=(1, 2), params=(1,), target=study.top, runnable={"tokens": 2, "params": 1}),
    )
    assert again.fidelity.cost(PROXY) == pytest.approx(2.0, rel=0.01)


def test_a_cost_is_not_learned_from_nothing(study, tmp_path):
    study.tell(ask(study).id, {"loss": 1.0})
    with pytest.raises(ValueError, match="study has no finished trial with its run time; run some, or tell them with"):
        study.measured_cost()
    with (
        Study.create(tmp_path / "flat", Space(lr=Real(0, 1)), objective=Minimize("loss")) as flat,
        pytest.raises(ValueError, match=r"no fidelity=, so there are no scales to learn"),
    ):
        flat.measured_cost()


# ------------------------------------------------------------------------------- priors

WIDER = Space(
    **SPACE.parameters | {"lr": Real(1e-6, 1.0, log=True), "clip": Real(0.1, 10.0)},
    fidelity=Fidelity(params=(1e6, 1e7), tokens=(1e7, 1e8), target={"params": 1e7, "tokens": 1e8}),
)
CLIP = {"clip": 1.0}


@pytest.fixture
def proxies(tmp_path):
    """A study with two finished trials, a diverged, a failed, a running and an added one."""
    with Study.create(tmp_path / "proxies", SPACE, objective=Minimize("loss"), seed=1, clock=lambda: 0.0) as made:
        for i in range(5):
            made.enqueue(config(lr=10.0 ** (-3 - i / 10), layers=1 + i), PROXY if i else None)
        for trial in made.ask(5)[:2]:
            made.tell(trial.id, {"loss": 2.0 + trial.id, "speed": math.nan})
        made.tell(2, {"loss": math.nan})
        made.fail(3, "OSError")
        made.add(config(layers=6), {"loss": 3.0}, PROXY)
        yield made


def later(folder):
    return Study.create(folder, WIDER, objective=Minimize("loss"), clock=lambda: 0.0)


def test_a_prior_brings_its_told_trials_into_a_changed_space(proxies, tmp_path):
    proxies.close()
    with later(tmp_path / "later") as study:
        prior = study.add_prior(proxies.folder, defaults=CLIP)

        assert (prior.added, prior.left_out) == (study.trials, ())
        assert prior.matched == ("lr", "layers", "data", "schedule", "optimizer", "params", "tokens")
        assert (prior.given, prior.unused) == (CLIP, ())
        assert {t.study for t in study.trials} == {proxies.runs().name}
        assert [t.source for t in study.trials] == ["prior"] * 4
        assert [t.status for t in study.trials] == ["finished", "finished", "diverged", "finished"]
        assert [t.note for t in study.trials] == [f"Trial {i} of {proxies.folder}." for i in (0, 1, 2, 5)]
        for trial, i in zip(study.trials, (0, 1, 2, 5), strict=True):
            assert trial.config == proxies.trial(i).config | CLIP
            assert trial.scale == proxies.trial(i).scale
        assert [t.metrics["loss"] for t in study.trials[:2]] == [2.0, 3.0]
        assert study.ended == study.trials


def test_a_prior_counts_towards_no_limit_and_is_never_the_best(study, proxies):
    study.add_prior(proxies)
    assert study.trial(0).scale == study.top
    assert study.best() is None
    assert (study.spent, study.history().proposed) == (0.0, 0)

    study.limit(n_trials=1, budget=1.0)
    trial = ask(study)
    study.tell(trial.id, {"loss": 9.0})
    assert study.best().id == trial.id


def test_a_prior_is_added_once_however_it_comes(study, proxies, tmp_path):
    study.add_prior(proxies)
    before = (study.folder / "journal.jsonl").read_bytes()
    assert study.add_prior(proxies.folder).added == ()
    again = Study.open(study.folder).add_prior(proxies.folder)
    assert (again.added, again.left_out) == ((), ())
    assert (study.folder / "journal.jsonl").read_bytes() == before

    proxies.tell(4, {"loss": 4.0})
    assert [trial.note for trial in study.add_prior(proxies).added] == [f"Trial 4 of {proxies.folder}."]

    with Study.create(tmp_path / "third", SPACE, objective=Minimize("loss")) as third:
        assert len(third.add_prior(study).added) == 5
        assert [t.note for t in third.trials] == [t.note for t in study.trials]
        assert third.add_prior(proxies).added == ()
        assert proxies.add_prior(third).added == (), "these are its own"
        assert study.add_prior(study).added == ()


def test_a_copy_of_a_study_that_went_on_otherwise_is_another_prior(proxies, study):
    proxies.close()
    copied = proxies.folder.with_name("copied")
    shutil.copytree(proxies.folder, copied)
    study.add_prior(proxies)
    with Study.open(copied) as other:
        assert study.add_prior(other).added == ()
        other.tell(4, {"loss": 7.0})
        proxies.tell(4, {"loss": 8.0})
        assert [t.metrics["loss"] for t in study.add_prior(other).added + study.add_prior(proxies).added] == [7.0, 8.0]


def test_a_fork_keeps_priors_apart_from_its_own_runs(study, proxies, tmp_path):
    study.add_prior(proxies)
    study.tell(ask(study).id, {"loss": 9.0})
    with study.fork(tmp_path / "fork") as fork:
        assert [t.source for t in fork.trials] == ["prior"] * 4 + ["added"]
        assert fork.best().metrics["loss"] == 9.0
        assert fork.add_prior(proxies).added == fork.add_prior(study).added == ()


def test_a_study_killed_while_a_prior_is_added_goes_on_as_if_it_had_not_been(proxies, tmp_path):
    with later(tmp_path / "whole") as whole:
        whole.add_prior(proxies, defaults=CLIP)
        whole.ask(2)
    data = (whole.folder / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord(b"\n")]
    for cut in [*ends[:5], *(end - 20 for end in ends[1:5])]:
        folder = tmp_path / f"killed-{cut}"
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(data[:cut])
        with Study.open(folder, clock=lambda: 0.0) as again:
            again.add_prior(proxies.folder, defaults=CLIP)
            again.ask(2)
        assert (folder / "journal.jsonl").read_bytes() == data


def test_a_prior_needs_its_folder_no_more(study, proxies):
    study.add_prior(proxies)
    proxies.close()
    shutil.rmtree(proxies.folder)
    assert repr(Study.open(study.folder).trials) == repr(study.trials)


def test_trials_that_the_space_does_not_allow_are_left_out_of_a_prior_with_a_warning(proxies, tmp_path, caplog):
    narrow = Space(**SPACE.parameters | {"layers": Integer(2, 5)}, fidelity=SPACE.fidelity)
    with Study.create(tmp_path / "narrow", narrow, objective=Minimize("loss")) as study:
        prior = study.add_prior(proxies)
        assert len(prior.added) == 2
        assert prior.left_out == (
            (0, "layers must be a whole number in [2, 5], got 1."),
            (5, "layers must be a whole number in [2, 5], got 6."),
        )
        assert "2 of 4 runs of" in caplog.text
        assert prior.words().splitlines()[0] == "Runs taken: 2, left out: 2."
        assert prior.words().endswith("\n5: layers must be a whole number in [2, 5], got 6.")


@pytest.mark.parametrize(
    ("space", "objective", "options", "message"),
    [
        (
            SPACE,
            Minimize("accuracy"),
            {},
            r"No run of proxies#\w+ can be learned from; 0: It has no metric \['accuracy'\], which the objective names",
        ),
        (WIDER, Minimize("loss"), {}, "no value for 'clip', which the new space needs"),
        (WIDER, Minimize("loss"), {"defaults": CLIP, "drop": ["x"]}, "drop names 'x'"),
        (SPACE, Minimize("loss"), {"scale": {"params": 1e6}}, "scale names 'params', on which each of those runs has"),
    ],
)
def test_a_prior_that_is_not_comparable_is_refused_before_anything_is_added(
    proxies, tmp_path, space, objective, options, message
):
    with Study.create(tmp_path / "s", space, objective=objective) as study:
        with pytest.raises(ValueError, match=message):
            study.add_prior(proxies.folder, **options)
        assert study.trials == Study.open(study.folder).trials == ()
        with pytest.raises(JournalError, match="holds no study"):
            study.add_prior(tmp_path / "nothing")


def test_prior_runs_name_the_study_they_were_made_for_by_whatever_way_they_come(study, proxies, tmp_path):
    study.tell(ask(study).id, {"loss": 9.0})
    study.add_prior(proxies)
    with Study.create(tmp_path / "third", SPACE, objective=Minimize("loss")) as third:
        third.add_prior(study)
        first, second = proxies.runs().name, study.runs().name
        assert [t.study for t in third.trials] == [second, *[first] * 4]
        assert third.history().studies == (second, first)
        third.add(CONFIG, {"loss": 1.0})
        assert third.history().own == (third.trial(5),)
        assert repr(Study.open(third.folder).trials) == repr(third.trials)
        with third.fork(tmp_path / "fork") as fork:
            assert [t.study for t in fork.trials] == [t.study for t in third.trials]


def test_priors_of_a_journal_that_does_not_name_their_study_are_of_another_one(study, proxies):
    study.add_prior(proxies)
    study.close()
    lines = []
    for n, line in enumerate((study.folder / "journal.jsonl").read_bytes().splitlines(), 1):
        happened = json.loads(line)
        at = happened["at"]
        kept = {name: value for name, value in happened.items() if name not in ("n", "at", "crc", "study")}
        lines.append(to_line(n, at, kept))
    (study.folder / "journal.jsonl").write_bytes(b"".join(lines))
    assert {t.study for t in Study.open(study.folder).trials} == {"another study"}


def flat(tmp_path, *, tokens=1e7, **axes):
    """A study over the tokens alone."""
    fidelity = Fidelity(cost_of_tokens, tokens=(1e6, 1e7), target={"tokens": tokens}, **axes)
    return Study.create(tmp_path / "flat", Space(**SPACE.parameters, fidelity=fidelity), objective=Minimize("loss"))


def cost_of_tokens(scale):
    return scale["tokens"]


def test_an_axis_that_the_prior_lacks_is_what_its_runs_are_said_to_have_had(study, tmp_path):
    with flat(tmp_path) as other:
        other.add(CONFIG, {"loss": 1.0})
        other.add(CONFIG, {"loss": 2.0}, {"tokens": 1e6})
        with pytest.raises(ValueError, match=r"no value on the scale axis 'params', .* by scale={'params': \.\.\.}"):
            study.add_prior(other)
        prior = study.add_prior(other, scale={"params": 3e5})
    assert [dict(t.scale) for t in study.trials] == [{"params": 3e5, "tokens": 1e7}, {"params": 3e5, "tokens": 1e6}]
    assert "tokens" in prior.matched
    assert prior.given == {"params": 3e5}
    assert study.best() is None


def test_of_an_axis_that_only_the_prior_has_its_largest_value_counts(study, tmp_path):
    for params in (1e5, 1e6):
        study.add(CONFIG | {"lr": 1e-3 * params / 1e6}, {"loss": params}, {"params": params, "tokens": 1e7})
    with flat(tmp_path) as other:
        prior = other.add_prior(study)
        assert [t.metrics["loss"] for t in prior.added] == [1e6]
        assert prior.unused == ("params",)
        assert prior.left_out[0][1].startswith("It ran at params=100000.0; of an axis that the new space does not have")
        assert len(other.add_prior(study, drop=["params"]).added) == 1, "of all of them, the other is there already"


def test_runs_of_no_study_are_taken_by_the_names_of_their_values(study):
    row = {"lr": "1e-3", "layers": 4.0, "data/code": "0.25", "data/prose": "0.75", "optimizer": "lion", "host": "a"}
    row |= {"schedule/family": "wsd", "schedule/decay": "0.2"}
    scale = {"params": 1e5, "tokens": 1e6, "epochs": 3}
    rows = (
        Run("a", row, {"loss": 1.0}, scale),
        Run("b", row | {"layers": 9.0}, {"loss": 1.0}, scale),
        Run("c", row, {"speed": 1.0}, scale),
        Run("d", row | {"lr": 2e-3}, {}, scale, diverged=True),
        Run("e", row, {"loss": 1.0}, scale | {"epochs": 1}),
        Run("f", {"lr": 1e-3}, {"loss": 1.0}, scale),
        Run("g", row, {"loss": 1.0}, scale | {"tokens": -1}),
        Run("h", row | {"lr": 3e-3}, {"loss": math.inf}, scale),
    )
    prior = study.add_prior(Runs("elsewhere", rows, left_out=(("z", "It failed."),)))
    assert [(t.study, t.status, t.note) for t in prior.added] == [
        ("elsewhere", "finished", "Run a of elsewhere."),
        ("elsewhere", "diverged", "Run d of elsewhere."),
        ("elsewhere", "diverged", "Run h of elsewhere."),
    ]
    assert prior.added[0].config == study.space.validate(CONFIG | {"data": {"code": 0.25, "prose": 0.75}})
    assert dict(prior.added[0].scale) == PROXY
    assert prior.unused == ("host", "epochs")
    assert dict(prior.left_out) == {
        "z": "It failed.",
        "b": "layers must be a whole number in [1, 8], got 9.",
        "c": "It has no metric ['loss'], which the objective names; it has ['speed'].",
        "e": "It ran at epochs=1; of an axis that the new space does not have only the largest value counts, epochs=3.",
        "f": "It has no value for 'layers'.",
        "g": "scale needs tokens to be a positive number, got -1.",
    }
    assert study.add_prior(Runs("elsewhere", rows)).added == ()


def test_runs_of_no_study_that_differ_in_what_the_space_has_not_are_refused(study):
    def rows(*hosts):
        configs = [CONFIG | {"host": host, "layers": 1 + i} for i, host in enumerate(hosts)]
        return Runs("elsewhere", tuple(Run(i, config, {"loss": 1.0}, PROXY) for i, config in enumerate(configs)))

    with pytest.raises(ValueError, match=r"^Those runs varied 'host', which the new space does not have, so"):
        study.add_prior(rows("a", "b"))
    assert len(study.add_prior(rows("a", "b"), drop=["host"]).added) == 2
    with pytest.raises(ValueError, match="need a text as their name"):
        Runs("", ())


def test_an_added_run_is_written_as_before_there_were_priors(study):
    study.add(CONFIG, {"loss": 1.0})
    line = json.loads((study.folder / "journal.jsonl").read_bytes().splitlines()[-1])
    assert line.keys() == {"n", "at", "kind", "trial", "config", "scale", "metrics", "crc"}
    assert Study.open(study.folder).trial(0).source == "added"


def test_reading_packages_bring_no_torch_ray_or_pandas():
    code = (
        "import sys, bo, search_spaces\n"
        "print(json.dumps(sorted({'torch', 'ray', 'pandas', 'scipy', 'botorch'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True, cwd="."
    )
    assert json.loads(done.stdout) == []


def test_diverged_is_an_exception_of_the_public_names():
    assert issubclass(Diverged, Exception)
