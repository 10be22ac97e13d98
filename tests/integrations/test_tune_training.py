"""Functions written for Ray Tune train under our own runners as they are."""

import functools
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from ray import tune
from ray.train._internal import session

from bo import Minimize, Report, Study, run
from bo.run import request_stop
from integrations.process_pool import ProcessPool
from integrations.tune_training import from_tune
from search_spaces import Fidelity, Real, Schedule, Space

LR = Space(lr=Real(0.0, 1.0))


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", LR, objective=Minimize("loss"), policy="sobol") as made:
        yield made


def train(config):
    """As the documentation of Tune has it: it goes on from its checkpoint and saves one at each step."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            start = json.loads((Path(folder) / "state.json").read_text())["step"]
    for step in range(start + 1, 5):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state.json").write_text(json.dumps({"step": step}))
            tune.report(
                {"loss": config["lr"] + 1 / step, "mean": {"accuracy": 0.5}, "note": "text"},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )
        if config.get("die") and step == 2 and not start:
            os.kill(os.getpid(), 9)


EXECUTORS = ["in-process", "pool", pytest.param("ray", marks=pytest.mark.slow)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_function_of_tune_trains_under_every_runner(study, executor):
    run(study, from_tune(train), executor=executor, n_trials=2)

    for trial in study.trials:
        assert trial.metrics == {"loss": trial.config["lr"] + 0.25, "mean/accuracy": 0.5}
        assert [report.step for report in trial.reports] == [1, 2, 3, 4]
        assert trial.reports[0] == Report(1, {"loss": trial.config["lr"] + 1.0, "mean/accuracy": 0.5})


def test_a_worker_that_dies_goes_on_from_the_checkpoint_that_was_reported(study):
    run(study, from_tune(functools.partial(dying, train)), executor=ProcessPool(1), n_trials=1)

    (trial,) = study.trials
    assert (trial.status, trial.attempt) == ("finished", 2)
    assert [report.step for report in trial.reports] == [1, 2, 3, 4]
    assert trial.metrics["loss"] == trial.config["lr"] + 0.25


def dying(function, config):
    function(config | {"die": True})


def test_a_run_with_nothing_left_to_do_gives_its_last_report_again(study):
    (trial,) = study.ask(1)
    attempt = running(study, trial)
    assert from_tune(train)(attempt) == from_tune(train)(attempt)
    assert attempt.steps == [1, 2, 3, 4]


def running(study, trial, stop_at=None):
    from bo.study import trial_folder
    from bo.worker import RunningTrial

    said = []

    def send(message):
        said.append(message.step)
        return message.step == stop_at

    folder = trial_folder(study.folder, trial.id)
    folder.mkdir(parents=True, exist_ok=True)
    made = RunningTrial(trial, folder, send)
    made.steps = said
    return made


def test_a_run_is_ended_early_at_its_report(study):
    def train(config):
        for _ in range(5):
            tune.report({"loss": 1.0})
            request_stop(study.folder, 0)

    run(study, from_tune(train), n_trials=1)
    assert (study.trials[0].status, len(study.trials[0].reports)) == ("stopped", 2)


def test_the_newest_checkpoint_is_there_at_once_and_stays_as_it_is(study):
    def train(config):
        assert tune.get_checkpoint() is None
        kept = []
        for step in range(3):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / f"step-{step}").touch()
                tune.report({"loss": 1.0}, checkpoint=tune.Checkpoint.from_directory(folder))
            kept.append(Path(tune.get_checkpoint().path))
        assert [os.listdir(path) for path in kept] == [["step-0"], ["step-1"], ["step-2"]]

    run(study, from_tune(train), n_trials=1)
    assert study.trials[0].error is None


def test_the_context_knows_the_trial(study):
    def train(config):
        context = tune.get_context()
        assert context.get_trial_id() == "00000"
        assert context.get_trial_name() == "trial_00000"
        assert context.get_experiment_name() == "study"
        assert Path(context.get_trial_dir()).samefile(study.folder / "trials" / "00000")
        tune.report({"loss": 1.0})

    run(study, from_tune(train), n_trials=1)
    assert study.trials[0].error is None


def test_the_config_has_scale_seed_and_schedule(tmp_path):
    space = Space(
        lr=Real(0.0, 1.0),
        schedule=Schedule("cosine"),
        fidelity=Fidelity(params={"tiny": 1e5}, tokens=(1e6,), target={"params": 1e5, "tokens": 1e6}),
    )

    def train(config):
        assert config["scale"].label("params") == "tiny"
        assert isinstance(config["seed"], int)
        tune.report({"loss": config["schedule"].factor(0, 10)})

    with Study.create(tmp_path, space, objective=Minimize("loss"), policy="sobol") as study:
        run(study, from_tune(train), n_trials=1)
        assert study.trials[0].status == "finished"


def returning(config):
    return {"loss": 0.5}


def yielding(config):
    yield {"loss": 1.0}
    yield {"loss": 0.5}


@pytest.mark.parametrize(("function", "reports"), [(returning, 1), (yielding, 2)])
def test_what_a_function_returns_or_yields_is_a_report(study, function, reports):
    run(study, from_tune(function), n_trials=1)
    assert study.trials[0].metrics == {"loss": 0.5}
    assert len(study.trials[0].reports) == reports


def test_nan_and_errors_are_told_as_under_any_runner(study):
    def train(config):
        if config["lr"] < 0.5:
            raise ValueError("no such data")
        tune.report({"loss": math.nan})

    study.enqueue({"lr": 0.1})
    study.enqueue({"lr": 0.9})
    run(study, from_tune(train), n_trials=2)
    assert [trial.status for trial in study.trials] == ["failed", "diverged"]
    assert study.trials[0].error == "ValueError: no such data"
    assert session.get_session() is None


def test_a_function_that_reports_nothing_fails(study):
    run(study, from_tune(lambda config: None), n_trials=1)
    assert "had reported no number" in study.trials[0].error


class Trainable(tune.Trainable):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Trainable, "Trainable is a class, and only function trainables can be run here: write def train"),
        (tune.with_resources(Trainable, {"cpu": 1}), "Trainable is a class"),
        ("train", r"from_tune needs a function def train\(config\), got 'train'"),
        (tune.with_parameters(lambda config, data: None, data=[1]), "is wrapped by tune.with_parameters, whose"),
        (lambda config, reporter: None, "must take one argument, the config, and missing a required argument"),
    ],
)
def test_what_is_no_function_trainable_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        from_tune(given)


def test_resources_for_tune_are_pointed_out(caplog):
    from_tune(tune.with_resources(lambda config: None, {"cpu": 2}))
    assert "The resources that tune.with_resources gave <lambda> are Tune's" in caplog.text
