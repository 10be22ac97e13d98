"""A study as the searcher and the scheduler of Ray Tune: real runs of Tune, on one small cluster."""

import collections
import copy
import json
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from weakref import WeakSet

import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from bo import Function, Maximize, Minimize, Report, Study, WeightedSum, journal
from bo.policies.sobol import Sobol
from integrations.ray_space import to_ray
from integrations.tune_scheduler import StudyScheduler
from integrations.tune_search import StudySearch
from integrations.tune_trials import NAME
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Schedule, Space

LR = Space(lr=Real(0.0, 1.0))
RICH = Space(
    lr=Real(1e-4, 1e-1, log=True),
    data=Mixture("code", "prose"),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "lion": {"momentum": Integer(1, 3)}}),
    fidelity=Fidelity(params={"tiny": 1e5, "small": 1e6}, tokens=(1e6,), target={"params": 1e6, "tokens": 1e6}),
)


@pytest.fixture
def study(tmp_path):
    made = WeakSet()  # a study may be given up within a test

    def make(space=LR, objective=Minimize("loss"), name="study", **settings):  # noqa: B008  # frozen
        study = Study.create(tmp_path / name, space, objective=objective, policy="sobol", **settings)
        made.add(study)
        return study

    yield make
    for each in made:
        each.close()


@pytest.fixture
def fit(cluster, tmp_path):
    """Runs Tune, with actors that are used again, as starting one takes a second."""

    def run(search, train, num_samples, *, param_space=None, max_failures=0, stop=None, **settings):
        config = tune.TuneConfig(search_alg=search, num_samples=num_samples, reuse_actors=True, **settings)
        failure = tune.FailureConfig(max_failures=max_failures)
        where = tune.RunConfig(
            name="tune", storage_path=str(tmp_path / "ray"), verbose=0, failure_config=failure, stop=stop
        )
        return tune.Tuner(train, param_space=param_space, tune_config=config, run_config=where).fit()

    return run


def curve(config):
    for step in range(1, 5):
        tune.report({"loss": config["lr"] + 1 / step})


def endings(study):
    """How often each trial has come to an end by the journal."""
    events, _ = journal.read(study.folder / journal.NAME)
    return collections.Counter(
        event["trial"] for event in events if event["kind"] in ("finished", "diverged", "failed", "stopped")
    )


def result(step, loss, **more):
    return {"training_iteration": step, "loss": loss, "timestamp": int(time.time()) + 60, "pid": 1, **more}


# ----------------------------------------------------------------------------------------------------- runs of Tune


def test_tune_runs_what_the_study_proposes_and_the_study_has_every_result(study, fit):
    def train(config):
        assert config["scale"].label("params") == "small"
        assert config["epochs"] == 2
        assert isinstance(config["seed"], int)
        assert ("beta" in config) == (config["optimizer"] == "adamw")
        factor = config["schedule"].factor(3, 10)
        tune.report({"loss": {"code": config["data"]["code"], "prose": factor}, "note": "text"})

    made = study(RICH, WeightedSum({"loss/code": 0.5, "loss/prose": 0.5}))
    grid = fit(StudySearch(made), train, 4, param_space={"epochs": 2})

    assert grid.num_errors == 0
    assert [trial.status for trial in made.trials] == ["finished"] * 4
    for trial in made.trials:
        expected = {"loss/code": trial.config["data"]["code"], "loss/prose": trial.config["schedule"].factor(3, 10)}
        assert trial.metrics == expected
        assert trial.reports == (Report(1, expected),)
        assert trial.seconds >= 0


@pytest.mark.slow
def test_trials_that_asha_ends_are_stopped_with_their_reports_and_the_others_told(study, fit):
    made = study()
    scheduler = ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2)
    fit(StudySearch(made, steps=4), curve, 8, scheduler=scheduler, metric="loss", mode="min")

    statuses = collections.Counter(trial.status for trial in made.trials)
    assert set(statuses) == {"finished", "stopped"}
    for trial in made.trials:
        lengths = [4] if trial.status == "finished" else [1, 2]
        assert len(trial.reports) in lengths
        assert trial.reports[0].metrics["loss"] == trial.config["lr"] + 1.0
        assert trial.metrics == ({"loss": trial.config["lr"] + 0.25} if trial.told else None)


def test_trials_that_hyperband_pauses_and_ends_are_told_as_what_they_are(study, fit):
    def train(config):
        checkpoint = tune.get_checkpoint()
        first = json.loads((Path(checkpoint.path) / "step").read_text()) if checkpoint else 0
        for step in range(first + 1, 5):
            Path("here").mkdir(exist_ok=True)
            Path("here/step").write_text(json.dumps(step))
            tune.report({"loss": config["lr"] + 1 / step}, checkpoint=tune.Checkpoint.from_directory("here"))

    made = study()
    scheduler = HyperBandScheduler(max_t=4, reduction_factor=2)
    fit(StudySearch(made, steps=4), train, 8, scheduler=scheduler, metric="loss", mode="min")

    assert {trial.status for trial in made.trials} == {"finished", "stopped"}
    for trial in made.trials:
        assert (trial.reports[-1].step >= 4) == trial.told
        assert trial.metrics in (None, {"loss": trial.config["lr"] + 0.25})
    assert set(endings(made).values()) == {1}


@pytest.mark.slow
def test_a_concurrency_limiter_is_kept_to_and_a_limit_of_the_study_ends_the_run(study, fit):
    made, most = study(), 0
    made.limit(n_trials=5)

    class Watched(StudySearch):
        def suggest(self, trial_id):
            nonlocal most
            given = super().suggest(trial_id)
            most = max(most, len(self.study.running))
            return given

    grid = fit(ConcurrencyLimiter(Watched(made), max_concurrent=2), curve, 100)

    assert len(grid) == 5
    assert most == 2
    assert [trial.status for trial in made.trials] == ["finished"] * 5


def test_failures_divergence_and_retries_are_told_as_what_they_are(study, fit, tmp_path):
    def train(config):
        checkpoint = tune.get_checkpoint()
        tried = int((Path(checkpoint.path) / "tried").read_text()) if checkpoint else 0
        if config["lr"] == 0.1:
            raise ValueError("no such data")
        (folder := tmp_path / str(config["seed"])).mkdir(exist_ok=True)
        (folder / "tried").write_text(str(tried + 1))
        tune.report(
            {"loss": math.nan if config["lr"] == 0.2 else 1.0}, checkpoint=tune.Checkpoint.from_directory(folder)
        )
        if config["lr"] == 0.3 and not tried:
            raise OSError("the disk was busy")

    made = study()
    for lr in (0.1, 0.2, 0.3):
        made.enqueue({"lr": lr})
    fit(StudySearch(made), train, 3, max_failures=1)

    assert [trial.status for trial in made.trials] == ["failed", "diverged", "finished"]
    assert "error.txt" in made.trials[0].error
    assert [report.step for report in made.trials[2].reports] == [1, 2]
    assert set(endings(made).values()) == {1}


def test_the_rule_of_the_study_ends_trials_of_tune(study, fit):
    made = study(stopping={"name": "halving", "first": 2, "last": 4, "peers": 2})
    search = StudySearch(made)
    for lr in (0.1, 0.2, 0.3, 0.4, 0.05, 0.5):
        made.enqueue({"lr": lr})
    fit(search, curve, 6, scheduler=StudyScheduler(search), max_concurrent_trials=1)

    assert [trial.status for trial in made.trials] == [*["finished"] * 2, *["stopped"] * 2, "finished", "stopped"]
    assert [len(trial.reports) for trial in made.trials] == [4, 4, 2, 2, 4, 2]


DRIVER = """
import os, sys, time
from pathlib import Path
import ray
from ray import tune
from bo import Minimize, Study
from integrations.tune_scheduler import StudyScheduler
from integrations.tune_search import StudySearch
from search_spaces import Real, Space

folder, address = Path(sys.argv[1]), sys.argv[2]
ray.init(address, log_to_driver=False, logging_level="ERROR")

def train(config):
    for step in range(1, 4):
        time.sleep(0.1)
        tune.report({"loss": config["lr"] + 1 / step})
    with open(folder / "runs", "a") as file:
        file.write(f"{config['seed']}\\n")

path = str(folder / "ray" / "tune")
if tune.Tuner.can_restore(path):
    tuner = tune.Tuner.restore(path, trainable=train)
else:
    study = Study.create(folder / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
    study.limit(n_trials=int(sys.argv[3]))
    search = StudySearch(study)
    scheduler = StudyScheduler(search) if sys.argv[4] == "with" else None
    config = tune.TuneConfig(
        search_alg=search, scheduler=scheduler, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
    )
    where = tune.RunConfig(name="tune", storage_path=str(folder / "ray"), verbose=0)
    tuner = tune.Tuner(train, tune_config=config, run_config=where)
print(len(tuner.fit()))
"""


def sweep_with_kills(folder, until, kills, trials, scheduler):
    (folder / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "driver.py", str(folder), ray.get_runtime_context().gcs_address, str(trials), scheduler]
    path, runs, told, done, drivers = folder / "study" / journal.NAME, folder / "runs", [], 0, []

    def driver():
        with open(folder / "log", "a") as file:
            drivers.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file))
        return drivers[-1]

    def ends():
        return path.read_bytes().count(b'"finished"') if any(folder.glob("ray/tune/experiment_state*")) else 0

    try:
        for _ in range(kills):
            killed, before = driver(), ends()
            until(lambda: killed.poll() is not None or ends() >= before + 2, 180.0)  # noqa: B023
            time.sleep(random.uniform(0.0, 1.0))
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            told = [trial for trial in Study.open(folder / "study").trials if trial.told]
            until(lambda: len(runs.read_text().split()) >= len(told), 180.0)  # noqa: B023
            done = len(runs.read_text().split())
        assert driver().wait(300) == 0, (folder / "log").read_text()
    finally:
        for each in drivers:
            each.kill()
            each.wait()

    after = Study.open(folder / "study")
    assert len(told) >= 2
    assert [after.trial(trial.id) for trial in told] == told
    assert [trial.status for trial in after.trials] == ["finished"] * trials
    assert set(endings(after).values()) == {1}
    seeds = [int(line) for line in runs.read_text().split()]
    assert set(seeds) == {trial.seed for trial in after.trials}
    return set(seeds[done:]) & {trial.seed for trial in told}


def test_a_driver_killed_and_restored_loses_no_result_tells_none_twice_and_repeats_none(cluster, tmp_path, until):
    assert not sweep_with_kills(tmp_path, until, kills=1, trials=6, scheduler="with")


@pytest.mark.slow
def test_a_driver_killed_eight_times_loses_no_result_and_tells_none_twice(cluster, tmp_path, until):
    sweep_with_kills(tmp_path, until, kills=8, trials=60, scheduler="without")


# ------------------------------------------------------------------------------------- what Tune calls, without Tune


def test_a_run_that_returns_is_told_and_one_that_tune_ends_is_stopped(study):
    made = study()
    search = StudySearch(made)
    for id in "abcd":
        assert search.suggest(id)["lr"] == made.trials[-1].config["lr"]
    for id in "abc":
        search.on_trial_result(id, result(1, 0.5))
    search.on_trial_complete("a", result(1, 0.5, done=True, time_total_s=3.0))  # as after its own end
    search.on_trial_complete("b", result(2, 0.4, done=True))  # as ended by a scheduler at that report
    search.on_trial_complete("c")  # as ended while it was paused
    search.on_trial_complete("d", {"done": True, "trial_id": "d"})

    assert [trial.status for trial in made.trials] == ["finished", "stopped", "stopped", "failed"]
    assert (made.trials[0].metrics, made.trials[0].seconds) == ({"loss": 0.5}, 3.0)
    assert [len(trial.reports) for trial in made.trials] == [1, 2, 1, 0]
    assert "had reported nothing" in made.trials[3].error


def test_with_the_length_of_a_run_whole_ones_are_told_whoever_ends_them(study):
    made = study()
    search = StudySearch(made, steps=3)
    for id in "abcd":
        search.suggest(id)
    search.on_trial_complete("a", result(3, 0.3))
    search.on_trial_complete("b", result(2, 0.3))
    for id in "cd":
        search.on_trial_result(id, result(3, 0.2))
    search.on_trial_complete("c")
    search.on_trial_complete("d", result(3, 0.2))

    assert [trial.status for trial in made.trials] == ["finished", "stopped", "finished", "finished"]
    assert made.trials[2].metrics == {"loss": 0.2}
    assert [trial.cost for trial in made.trials] == [1.0, 2 / 3, 1.0, 1.0]


def test_a_run_that_tune_ends_counts_by_what_it_made_as_far_as_that_is_known(study):
    made = study()
    search = StudySearch(made, steps=8)
    for id in "abc":
        search.suggest(id)
    search.on_trial_complete("a", result(2, 0.3))
    search.on_trial_result("b", result(4, 0.3))
    search.on_trial_complete("b")  # while it was paused
    search.on_trial_complete("c")  # before it said anything
    assert [trial.cost for trial in made.trials] == [0.25, 0.5, 1.0]

    search = StudySearch(made)  # without the steps of a whole run it is told from those that returned
    for id in "def":
        search.suggest(id)
    search.on_trial_complete("d", result(2, 0.3))
    search.on_trial_result("e", result(10, 0.3))
    search.on_trial_complete("e", result(10, 0.3))
    search.on_trial_complete("f", result(2, 0.3))
    assert [trial.status for trial in made.trials][3:] == ["stopped", "finished", "stopped"]
    assert [trial.cost for trial in made.trials][3:] == [1.0, 1.0, 0.2]


def test_a_last_report_without_what_the_objective_needs_fails_the_trial(study):
    made = study(objective=WeightedSum({"loss": 1.0, "size": 0.1}))
    search = StudySearch(made)
    search.suggest("a")
    search.on_trial_result("a", result(1, 0.5))
    search.on_trial_complete("a", result(1, 0.5))

    assert made.trials[0].error == (
        "The last report has no metric ['size'], which the objective needs; it has ['loss']."
    )


def test_a_second_end_of_a_told_trial_is_dropped_and_one_of_a_failed_trial_is_a_run_made_elsewhere(study):
    made = study()
    search = StudySearch(made)
    search.suggest("a")
    search.suggest("b")
    search.on_trial_result("a", result(1, 0.5))
    search.on_trial_complete("a", result(1, 0.5))
    search.on_trial_complete("b", error=True)
    for _ in range(2):
        for id in "ab":
            search.on_trial_result(id, result(1, 0.7))
            search.on_trial_complete(id, result(1, 0.7))

    assert [(trial.status, trial.source) for trial in made.trials] == [
        ("finished", "sobol"),
        ("failed", "sobol"),
        ("finished", "added"),
    ]
    assert [trial.metrics for trial in made.trials] == [{"loss": 0.5}, None, {"loss": 0.7}]
    assert made.trials[2].config == made.trials[1].config


def test_a_trial_of_another_name_changes_nothing_and_is_named(study, caplog):
    search = StudySearch(study())
    search.on_trial_result("zz", result(1, 0.5))
    search.on_trial_complete("zz", result(1, 0.5))
    assert "Tune's trial zz is none that" in caplog.text
    assert search.study.trials == ()


def test_a_new_run_of_tune_takes_up_what_a_killed_one_left(study):
    made = study()
    first = StudySearch(made)
    left = first.suggest("a")
    second = StudySearch(made)

    assert second.suggest("b") == left
    assert second.suggest("c") != left
    second.on_trial_complete("b", result(1, 0.5))
    assert len(made.trials) == 2
    assert made.trials[0].status == "stopped"


def test_a_restored_searcher_tells_what_tune_remembers_from_what_it_forgot(study, tmp_path):
    made = study()
    search = StudySearch(made)
    remembered = search.suggest("a")
    search.save(str(tmp_path / "saved.pkl"))
    forgotten = search.suggest("b")
    search.suggest("c")
    search.on_trial_result("c", result(1, 0.1))
    search.on_trial_complete("c", result(1, 0.1))
    made.close()

    again = pickle.loads(pickle.dumps(search))
    again.restore(str(tmp_path / "saved.pkl"))

    assert again.suggest("d") == forgotten
    assert again.suggest("e") not in (remembered, forgotten)
    again.on_trial_result("a", result(1, 0.2))
    again.on_trial_complete("a", result(1, 0.2))
    assert [trial.status for trial in again.study.trials] == ["finished", "running", "finished", "running"]
    assert set(endings(made).values()) == {1}


def test_a_run_that_returned_before_the_restore_and_shows_its_old_report_again_is_told(study, tmp_path):
    search = StudySearch(study())
    search.suggest("a")
    search.suggest("b")
    for id in "ab":
        search.on_trial_result(id, result(2, 0.5))
    search.save(str(tmp_path / "saved.pkl"))
    search.restore(str(tmp_path / "saved.pkl"))
    search.on_trial_complete("a", result(2, 0.5) | {"timestamp": int(time.time()) - 60})
    search.on_trial_complete("b", result(2, 0.5))  # a new report, at which a scheduler ended it

    assert [trial.status for trial in search.study.trials] == ["finished", "stopped"]


def test_pickle_and_snapshot_hold_the_name_of_the_study_and_no_result(study, tmp_path):
    made = study()
    search = StudySearch(made)
    for id in map(str, range(50)):
        search.suggest(id)
        search.on_trial_result(id, result(1, 0.123456789))
        search.on_trial_complete(id, result(1, 0.123456789))
    search.save(str(tmp_path / "saved.pkl"))

    assert len(pickle.dumps(search)) < 600
    assert json.loads((tmp_path / "saved.pkl").read_text()) == {
        "study": str(made.folder),
        "identity": journal.identity(made.folder),
        "live": {},
    }
    assert copy.deepcopy(search).study is made


def weigh(metrics):
    return metrics["loss"]


def even(config):
    return config["layers"] % 2 == 0


def test_functions_of_a_study_travel_with_its_searcher(study):
    made = study(Space(layers=Integer(1, 8), constraints=[even]), Function(weigh, metrics=("loss",)))
    packed = pickle.dumps(StudySearch(made))
    made.close()
    del made
    assert pickle.loads(packed).suggest("a")["layers"] % 2 == 0


def test_another_study_in_the_folder_is_refused(study, tmp_path):
    search = StudySearch(study())
    search.save(str(tmp_path / "saved.pkl"))
    other = StudySearch(study(name="other", seed=1))
    (tmp_path / "saved.pkl").write_text(json.dumps({"study": "x", "identity": "0" * 16, "live": {}}))
    with pytest.raises(ValueError, match=r"holds another study \([0-9a-f]{8}\) than the one .*\(00000000\)"):
        other.restore(str(tmp_path / "saved.pkl"))


def test_a_torn_last_name_is_dropped(study):
    made = study()
    StudySearch(made).suggest("a")
    with open(made.folder / NAME, "ab") as file:
        file.write(b'{"tune": "b", "tr')
    again = StudySearch(made)
    again.suggest("c")
    again.suggest("d")

    lines = (made.folder / NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"tune": "a", "trial": 0},
        {"tune": "c", "trial": 0},
        {"tune": "d", "trial": 1},
    ]
    assert (made.folder / NAME).stat().st_mode & 0o777 == 0o600


def test_the_run_ends_when_the_study_has_no_more_and_waits_while_something_runs(study):
    made = study()
    made.limit(n_trials=1)
    search = StudySearch(made)
    search.suggest("a")
    assert search.suggest("b") is None
    search.on_trial_complete("a", error=True)
    assert search.suggest("b") == Searcher.FINISHED


class Slow:
    """A policy that thinks until it is let go on."""

    def __init__(self):
        self.go_on, self.calls = threading.Event(), 0

    def propose(self, history, n, rng):
        self.calls += 1
        self.go_on.wait(60)
        return Sobol().propose(history, n, rng) if history.proposed < 2 else ()


def test_reports_and_ends_do_not_wait_for_a_policy_that_thinks(study, until):
    made = study()
    search = StudySearch(made)
    search.suggest("a")
    made._loaded_policy = slow = Slow()
    assert search.suggest("b") is None
    search.on_trial_result("a", result(1, 0.5))
    search.on_trial_complete("a", result(1, 0.5))
    assert made.trials[0].told
    made.enqueue({"lr": 0.25})
    assert search.suggest("c")["lr"] == 0.25
    slow.go_on.set()  # what it has thought is void, as there is another trial now
    until(lambda: search.suggest("d") is None and slow.calls == 2)

    assert search.suggest("d") is None
    assert slow.calls == 2  # nothing has ended since it had nothing
    search.on_trial_complete("c", error=True)
    assert search.suggest("d") == Searcher.FINISHED
    assert slow.calls == 3


def test_what_goes_wrong_in_a_policy_ends_the_run(study):
    search = StudySearch(study())
    search.study._loaded_policy = type("Broken", (), {"propose": lambda *_: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        search.suggest("a")


def test_runs_that_tune_ends_without_a_result_are_pointed_out(study, caplog):
    search = StudySearch(study())
    for id in "abcdef":
        search.suggest(id)
        search.on_trial_complete(id, result(3, 0.5))
    assert caplog.text.count("say so by StudySearch(..., steps=3)") == 1


# --------------------------------------------------------------------------------------- what Tune is given is checked


@pytest.mark.parametrize(
    ("objective", "metric", "mode", "allowed"),
    [
        (Minimize("loss"), "loss", "min", True),
        (Minimize("loss"), None, None, True),
        (Minimize("loss"), "loss", "max", False),
        (Minimize("loss"), "accuracy", "max", False),
        (Maximize("accuracy"), "accuracy", "max", True),
        (WeightedSum({"a": 1.0, "b": -1.0}), "b", "max", True),
        (WeightedSum({"a": 1.0, "b": -1.0}), "b", "min", False),
        (WeightedSum({"a": 1.0, "b": -1.0}), "sum", "min", True),
    ],
)
def test_metric_and_mode_must_be_those_of_the_study(study, objective, metric, mode, allowed):
    search = StudySearch(study(objective=objective))
    if allowed:
        assert search.set_search_properties(metric, mode, {"epochs": 1}, stop=None)
    else:
        with pytest.raises(ValueError, match=rf"Tune is given metric='{metric}', mode='{mode}', and the study has"):
            search.set_search_properties(metric, mode, {"epochs": 1})


@pytest.mark.parametrize(
    ("param_space", "message"),
    [
        (to_ray(LR), None),
        ({"epochs": 3, "names": ["a"], "more": {"x": 1}}, None),
        ({"lr": 0.1}, "param_space fixes 'lr', which the study searches"),
        ({"lr": tune.uniform(0.0, 2.0)}, "param_space has 'lr' as Real.0.0, 2.0., and the study as Real.0.0, 1.0."),
        ({"width": tune.choice([1, 2])}, "param_space searches 'width', which the study's space does not have"),
        ({"in": {"width": tune.grid_search([1, 2])}}, "param_space searches 'in', which the study's space does not"),
    ],
)
def test_a_param_space_must_not_say_otherwise_than_the_study(study, param_space, message):
    search = StudySearch(study())
    if message is None:
        assert search.set_search_properties(None, None, param_space)
    else:
        with pytest.raises(ValueError, match=message):
            search.set_search_properties(None, None, param_space)


def test_a_searcher_and_a_scheduler_that_cannot_work_are_refused(study):
    made = study()
    with pytest.raises(ValueError, match="steps to be a whole number of at least 1, got 0"):
        StudySearch(made, steps=0)
    with pytest.raises(ValueError, match="needs the StudySearch that proposes the trials, got <Study"):
        StudyScheduler(made)
    scaled = Space(
        scale=Real(0, 1), fidelity=Fidelity(params=(1e5,), tokens=(1e5,), target={"params": 1e5, "tokens": 1e5})
    )
    with pytest.raises(ValueError, match="has a parameter 'scale', where Tune's config has the trial's scale"):
        StudySearch(study(scaled, name="scaled"))


def test_a_trial_that_is_told_already_is_ended_and_a_failed_one_may_be_run_again(study):
    made = study(stopping="halving")
    search = StudySearch(made)
    scheduler = StudyScheduler(search)
    search.suggest("a")
    search.on_trial_result("a", result(1, 0.5))
    search.on_trial_complete("a", result(1, 0.5))
    search.suggest("b")
    search.on_trial_complete("b", error=True)
    named = collections.namedtuple("Trial", "trial_id")

    assert scheduler.on_trial_result(None, named("a"), result(1, 0.5)) == StudyScheduler.STOP
    assert scheduler.on_trial_result(None, named("b"), result(1, 0.5)) == StudyScheduler.CONTINUE
    assert scheduler.set_search_properties("loss", "min")
    with pytest.raises(ValueError, match="Tune is given metric='loss', mode='max'"):
        scheduler.set_search_properties("loss", "max")
    assert "1 trials stopped" in scheduler.debug_string()


def test_points_that_were_evaluated_elsewhere_are_added_once(study, caplog):
    caplog.set_level(logging.INFO, "windtunnel")
    made = study()
    search = StudySearch(made)
    for _ in range(2):
        search.add_evaluated_point({"lr": 0.25, "epochs": 3, "seed": 1}, 0.5)
        search.add_evaluated_point({"lr": 0.5}, math.nan)
    search.add_evaluated_point({"lr": 0.75}, 0.1, pruned=True)
    search.add_evaluated_point({"lr": 0.75}, 0.1, error=True)

    assert [(trial.config["lr"], trial.status, trial.source) for trial in made.trials] == [
        (0.25, "finished", "added"),
        (0.5, "diverged", "added"),
    ]
    assert "A point that was pruned is left out" in caplog.text
    with pytest.raises(ValueError, match="lr must be a number in"):
        search.add_evaluated_point({"lr": 7.0}, 0.1)
    several = StudySearch(study(objective=WeightedSum({"a": 1.0, "b": 1.0}), name="several"))
    with pytest.raises(ValueError, match=r"An evaluated point has one value, and WeightedSum"):
        several.add_evaluated_point({"lr": 0.5}, 0.1)


def test_a_point_may_have_a_scale_and_names_within_names(study):
    space = Space(lr=Real(0.0, 1.0), fidelity=RICH.fidelity, **{"model/width": Integer(1, 8)})
    made = study(space)
    search = StudySearch(made)
    scale = {"params": 1e5, "tokens": 1e6}
    search.add_evaluated_point({"model": {"width": 3}, "lr": 0.5, "scale": scale}, 0.5)

    assert made.trials[0].config == {"model/width": 3, "lr": 0.5}
    assert made.trials[0].scale == made.space.fidelity.scale(scale)
    assert set(search.suggest("a")) == {"model", "lr", "scale", "seed"}
