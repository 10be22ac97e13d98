"""Finished runs of other systems: read as they are, nothing executed, and what has no result is named."""

import json
import math
import pickle
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bo import AtMost, Maximize, Minimize, Run, Study, WeightedSum
from integrations import prior_files
from integrations.ax_runs import read_ax
from integrations.csv_runs import read_csv
from integrations.optuna_runs import read_optuna
from integrations.ray_runs import read_ray
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Space

SPACE = Space(lr=Real(1e-4, 1e-1, log=True), layers=Integer(2, 8), optimizer=Choice("adamw", "lion"))
AX = Path(__file__).parent / "data" / "ax_client.json"


def by_tokens(scale):
    return scale["tokens"]


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss")) as made:
        yield made


# ----------------------------------------------------------------------------------------------------------------- CSV


def written(tmp_path, text):
    (tmp_path / "sweep.csv").write_text(text, encoding="utf-8")
    return tmp_path / "sweep.csv"


def test_a_csv_file_is_a_run_a_line_known_by_its_number(tmp_path, study):
    path = written(
        tmp_path,
        "\ufefflr,layers,optimizer,loss,tokens\n"
        "1e-3,4,adamw,2.5,1e6\n"
        "1e-2,4.0, lion ,nan,1e6\n"
        "\n"
        "1e-3,4,adamw\n"
        "1e-3,5,adamw,high,1e6\n"
        "1e-3,6,adamw,,1e6\n"
        "1e-3,9,adamw,2.0,1e6\n",
    )
    runs = read_csv(path, metrics=["loss"], axes=["tokens"])
    assert runs.rows[0] == Run(2, {"lr": "1e-3", "layers": "4", "optimizer": "adamw"}, {"loss": 2.5}, {"tokens": 1e6})
    assert runs.left_out == (
        (5, "It has 3 cells where the first line has 5."),
        (6, "Its metrics need to be numbers, got 'high'."),
    )
    prior = study.add_prior(runs)
    assert [(dict(trial.config), trial.status, trial.study) for trial in prior.added] == [
        ({"lr": 1e-3, "layers": 4, "optimizer": "adamw"}, "finished", "CSV sweep.csv"),
        ({"lr": 1e-2, "layers": 4, "optimizer": "lion"}, "diverged", "CSV sweep.csv"),
    ]
    assert prior.left_out[2:] == (
        (7, "It has no metric ['loss'], which the objective names; it has []."),
        (8, "layers must be a whole number in [2, 8], got 9."),
    )
    assert prior.unused == ("tokens",)


def test_columns_of_a_csv_file_may_be_named_anew_and_be_parts_of_a_value(tmp_path):
    path = written(tmp_path, "rate;share of code;data/docs;val;host\n0.01;0.25;0.75;2;a\n0.02;1;0;3;b\n")
    names = {"rate": "lr", "share of code": "data/code", "val": "loss"}
    config = ["lr", "data/code", "data/docs"]
    runs = read_csv(path, metrics=["loss"], names=names, config=config, delimiter=";")
    space = Space(lr=Real(0, 1), data=Mixture("code", "docs"))
    with Study.create(tmp_path / "study", space, objective=Minimize("loss")) as study:
        study.add_prior(runs)
        assert study.trial(0).config == {"lr": 0.01, "data": {"code": 0.25, "docs": 0.75}}
        assert study.trial(1).metrics == {"loss": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr,accuracy\n1,2\n", r"has no column 'loss'; it has \['lr', 'accuracy'\]"),
        ("lr,loss,loss\n1,2,3\n", r"has two columns 'loss'; rename one by names="),
        ("lr,loss\n", r"sweep\.csv holds no finished run$"),
        ("lr,loss\n1\n", r"holds no finished run; the first of 1, 2: It has 1 cells"),
        ("", r"has no column 'loss'; it has \[\]"),
    ],
)
def test_a_csv_file_without_runs_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_csv(written(tmp_path, text), metrics=["loss"])


# ------------------------------------------------------------------------------------------------------------------ Ax


def test_what_ax_saved_is_read_without_ax(study):
    """The file is what Ax 1.3.1 wrote for six trials, without its settings of how to go on."""
    runs = read_ax(AX, names={"speed": "steps"})
    assert runs.name == "Ax lr sweep"
    assert [run.id for run in runs.rows] == ["0_0", "1_0", "4_0"]
    for run in runs.rows:
        expected = (math.log10(run.config["lr"]) + 2.5) ** 2 + 0.1 * run.config["layers"]
        assert run.metrics["loss"] == pytest.approx(expected, abs=1e-9)
    assert [run.metrics["steps"] for run in runs.rows] == [3.0, 4.0, 7.0]
    assert runs.left_out == (
        ("2_0", "Its trial is failed."),
        ("3_0", "Its trial is abandoned."),
        ("5_0", "Its trial is running."),
    )
    assert len(study.add_prior(runs).added) == 3


def ax_data(*rows):
    """A table as Ax writes it: (arm, metric, mean, step) a row."""
    columns = ("arm_name", "metric_name", "mean", "step")
    table = {name: {str(i): row[k] for i, row in enumerate(rows)} for k, name in enumerate(columns)}
    return {"__type": "Data", "df": {"__type": "DataFrame", "value": json.dumps(table)}}


def test_of_ax_the_last_step_and_the_latest_data_count_and_a_batch_has_several_arms(tmp_path):
    saved = json.loads(AX.read_text())
    trial = saved["experiment"]["trials"]["0"]
    arms = [{"name": "0_0", "parameters": {"lr": 1e-3}}, {"name": "0_1", "parameters": {"lr": 1e-2}}]
    del trial["generator_run"]
    trial["generator_run_structs"] = [{"generator_run": {"arms": [arm]}, "weight": 1.0} for arm in arms]
    old = ax_data(("0_0", "loss", 9.0, None), ("0_1", "loss", 3.0, 2.0), ("0_1", "loss", 7.0, 1.0))
    new = ax_data(("0_0", "loss", 2.0, None))
    saved["experiment"]["data_by_trial"]["0"]["value"] = [[5, new], [4, old]]
    (tmp_path / "ax.json").write_text(json.dumps(saved["experiment"]))
    runs = read_ax(tmp_path / "ax.json", axes=["lr"])
    assert runs.rows[:2] == (
        Run("0_0", {}, {"loss": 2.0}, {"lr": 1e-3}),
        Run("0_1", {}, {"loss": 3.0}, {"lr": 1e-2}),
    )


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"__type": "Experiment", "trials": {"0": {}}}'])
def test_a_file_that_ax_did_not_write_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no client or experiment that Ax saved as JSON"):
        read_ax(tmp_path / "other.json")


# ------------------------------------------------------------------------------------------------------------ Ray Tune


class Refused:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def ray_trial(folder, id, config, *results, error=False):
    """A trial's folder as Ray Tune leaves it, with pickles that must not be read."""
    trial = folder / f"train_{id}"
    trial.mkdir(parents=True)
    (trial / "params.json").write_text(json.dumps(config))
    lines = [
        {"training_iteration": i, "trial_id": id, "config": config, "pid": 1, "done": False} | result
        for i, result in enumerate(results, 1)
    ]
    (trial / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("params.pkl", "error.pkl"):
        (trial / name).write_bytes(pickle.dumps(Refused()))
    if error:
        (trial / "error.txt").write_text("RuntimeError")


def test_a_folder_of_ray_tune_is_read_from_its_json_alone(tmp_path, study):
    folder = tmp_path / "sweep"
    config = {"lr": 1e-3, "model": {"layers": 4}, "optimizer": "lion"}
    ray_trial(folder, "a", config, {"loss": 3.0}, {"loss": 2.0, "eval": {"loss": 2.5}, "note": "x"})
    ray_trial(folder, "b", config, {"loss": 3.0})
    ray_trial(folder, "c", config, {"loss": 3.0}, error=True)
    ray_trial(folder, "d", config)
    ray_trial(folder, "e", config, {"loss": math.nan}, {"loss": math.nan})
    (folder / "tuner.pkl").write_bytes(pickle.dumps(Refused()))
    (folder / "train_f").mkdir()
    (folder / "train_f" / "params.json").write_text("{torn")

    runs = read_ray(folder, names={"model/layers": "layers"})
    assert runs.name == "Ray sweep"
    assert runs.rows[0] == Run(
        "a",
        {"lr": 1e-3, "layers": 4, "optimizer": "lion"},
        {"loss": 2.0, "eval/loss": 2.5},
        {"training_iteration": 2},
    )
    assert dict(runs.left_out[:2]) == {"c": "It ended with an error.", "train_d": "It has no result."}
    assert runs.left_out[2][0] == "train_f"
    assert runs.left_out[2][1].startswith("Its files cannot be read: ")

    prior = study.add_prior(runs)
    assert [trial.status for trial in prior.added] == ["finished", "diverged"]
    assert prior.left_out[-1][0] == "b"
    assert prior.left_out[-1][1].startswith(
        "It ran at training_iteration=1; of an axis that the new space does not have"
    )


def test_how_long_trials_of_ray_tune_ran_may_be_an_axis(tmp_path):
    for id, reports in (("a", 1), ("b", 3)):
        ray_trial(tmp_path / "sweep", id, {"lr": 1e-3}, *[{"loss": 1.0}] * reports)
    runs = read_ray(tmp_path / "sweep", names={"training_iteration": "epochs"})
    assert [run.scale for run in runs.rows] == [{"epochs": 1}, {"epochs": 3}]


def diverging(config):
    from ray import tune

    if config["lr"] > 0.05:
        raise RuntimeError("it does not train")
    for step in range(1, 1 + config["layers"]):
        tune.report({"loss": config["lr"] / step})


@pytest.mark.slow
def test_results_of_a_tuner_are_read_from_its_folder(tmp_path, study, monkeypatch):
    import ray
    from ray import tune

    monkeypatch.chdir(tmp_path)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        lr, layers = tune.grid_search([1e-3, 1e-2, 1e-1]), tune.grid_search([2, 3])
        where = tune.RunConfig(name="sweep", storage_path=str(tmp_path), verbose=0)
        found = tune.Tuner(diverging, param_space={"lr": lr, "layers": layers}, run_config=where).fit()
    finally:
        ray.shutdown()
    runs = read_ray(found)
    assert {(run.config["lr"], run.config["layers"]): run.metrics["loss"] for run in runs.rows} == {
        (lr, layers): lr / layers for lr in (1e-3, 1e-2) for layers in (2, 3)
    }
    assert [why for _, why in runs.left_out] == ["It ended with an error."] * 2
    assert len(study.add_prior(runs, defaults={"optimizer": "adamw"}).added) == 2, "those with all three reports"


def test_a_folder_without_trials_of_ray_tune_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; give the path of an experiment's folder"):
        read_ray(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no finished run$"):
        read_ray(tmp_path)


# -------------------------------------------------------------------------------------------------------------- Optuna


def searched(storage=None, **options):
    """An Optuna study of five trials: one pruned, one failed, one waiting."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=storage, study_name="sweep", sampler=optuna.samplers.RandomSampler(seed=0), **options
    )

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        layers = trial.suggest_int("layers", 2, 8)
        trial.suggest_categorical("optimizer", ["adamw", "lion"])
        trial.set_user_attr("tokens", 1e6)
        trial.set_user_attr("host", "a")
        if trial.number == 1:
            raise optuna.TrialPruned
        if trial.number == 2:
            raise RuntimeError
        return (math.log10(lr) + 2.5) ** 2 + 0.1 * layers

    study.optimize(objective, n_trials=4, catch=RuntimeError)
    study.enqueue_trial({"lr": 1e-3})
    return study


def test_complete_trials_of_an_optuna_study_become_a_prior(study):
    runs = read_optuna(searched(), axes=["tokens"], names={"value": "loss"})
    assert (runs.name, [run.id for run in runs.rows]) == ("Optuna sweep", [0, 3])
    for run in runs.rows:
        expected = (math.log10(run.config["lr"]) + 2.5) ** 2 + 0.1 * run.config["layers"]
        assert (run.metrics, run.scale) == ({"loss": expected}, {"tokens": 1e6})
    assert runs.left_out == ((1, "It is pruned."), (2, "It is fail."), (4, "It is waiting."))
    assert len(study.add_prior(runs).added) == 2


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_file_of_optuna_is_read_and_not_changed(tmp_path, kind):
    path = tmp_path / "here & there.db"
    made = searched(f"sqlite:///{path}" if kind == "sqlite" else JournalStorage(JournalFileBackend(str(path))))
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())
    assert read_optuna(path) == read_optuna(made)
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == (before, files)
    with pytest.raises(ValueError, match=r"has no study 'other'; it has \['sweep'\]"):
        read_optuna(path, study="other")
    if kind == "sqlite":
        optuna.create_study(storage=f"sqlite:///{path}", study_name="second")
        with pytest.raises(ValueError, match=r"holds 2 studies, .*; name one by study="):
            read_optuna(f"sqlite:///{path}")
        assert read_optuna(f"sqlite:///{path}", study="sweep") == read_optuna(made)


def test_metrics_of_an_optuna_study_are_called_as_it_calls_them():
    def both(trial):
        return trial.suggest_float("lr", 0, 1), 2.0

    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(both, n_trials=1)
    assert set(read_optuna(study).rows[0].metrics) == {"value_0", "value_1"}
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["loss", "speed"])
    assert read_optuna(study).rows[0].metrics["speed"] == 2.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.db", r"nothing\.db does not exist; give the path of an SQLite or journal file of Optuna"),
        ("mysql://user:secret@host/db", r"^mysql storages are not opened; hand in optuna\.load_study"),
        (__file__, "is no SQLite or journal file of Optuna that this version reads"),
    ],
)
def test_what_is_no_file_of_optuna_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_optuna(source)


def test_a_study_of_optuna_without_a_complete_trial_is_refused():
    study = optuna.create_study()
    study.ask()
    with pytest.raises(ValueError, match=r"holds no finished run; the first of 1, 0: It is running\."):
        read_optuna(study)


# ---------------------------------------------------------------------------------------------------------- any of them


def test_a_path_is_read_by_what_lies_there(tmp_path, study):
    fidelity = Fidelity(by_tokens, tokens=(1e5, 1e6), target={"tokens": 1e6})
    space = Space(**SPACE.parameters, fidelity=fidelity)
    objective = Minimize("loss")
    assert prior_files.read(study.folder, space, objective).folder == study.folder
    ray_trial(tmp_path / "sweep", "a", {"lr": 1e-3}, {"loss": 2.0})
    assert prior_files.read(tmp_path / "sweep", space, objective) == read_ray(tmp_path / "sweep")
    assert prior_files.read(AX, space, objective) == read_ax(AX)
    csv = written(tmp_path, "lr,loss,tokens\n1e-3,2.5,1e6\n")
    assert prior_files.read(csv, space, objective).rows[0].scale == {"tokens": 1e6}
    searched(f"sqlite:///{tmp_path / 'o.db'}")
    (first, _) = prior_files.read(tmp_path / "o.db", space, objective).rows
    assert (list(first.metrics), first.scale) == (["loss"], {"tokens": 1e6})
    several = WeightedSum({"loss": 1.0}, subject_to=[AtMost("tokens", 1e9)])
    assert "value" in prior_files.read(tmp_path / "o.db", SPACE, several).rows[0].metrics
    with pytest.raises(ValueError, match=r"nothing does not exist; give the path of a finished study"):
        prior_files.read(tmp_path / "nothing", space, objective)


def test_what_an_optuna_study_maximises_is_no_loss(tmp_path):
    searched(f"sqlite:///{tmp_path / 'o.db'}", direction="maximize")
    for objective in (Minimize("loss"), WeightedSum({"loss": 2.0})):
        with pytest.raises(ValueError, match=r"o\.db maximizes what it calls no name, so it is not "):
            prior_files.read(tmp_path / "o.db", SPACE, objective)
    assert "accuracy" in prior_files.read(tmp_path / "o.db", SPACE, Maximize("accuracy")).rows[0].metrics
