"""The command `windtunnel`, as a person meets it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bo import Study, journal, ports
from integrations.command_line import main

FILE = """
import argparse, time
from bo import Minimize
from search_spaces import Fidelity, Mixture, Real, Schedule, Space

parser = argparse.ArgumentParser()
parser.add_argument("--slow", type=float, default=0.0)
slow = parser.parse_args().slow

space = Space(
    lr=Real(1e-4, 1e-1, log=True),
    data=Mixture("code", "prose"),
    schedule=Schedule("cosine", "linear", warmup=0.0, floor=0.0),
    fidelity=Fidelity(params={"small": 1e5, "large": 1e6}, tokens=(1e5, 1e6),
                      target={"params": "large", "tokens": 1e6}),
)
objective = Minimize("loss")
baseline = {"lr": 1e-2, "data": {"code": 0.5, "prose": 0.5}, "schedule": {"family": "cosine"}}
n_trials = 6

def train(trial):
    import math
    loss = 2.0 + (math.log10(trial.config["lr"]) + 2.5) ** 2 + trial.config["data"]["code"] / 10
    for step in range(4):
        trial.report(step, {"loss": loss + 1.0})
        time.sleep(slow)
    print("trained", trial.id)
    return {"loss": loss}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.py"
    path.write_text(FILE)
    return path


def windtunnel(*words):
    return main(["run", "job.py", "--executor", "in-process", "--policy", "sobol", *words])


def test_a_run_shows_each_result_and_sums_up(file, capsys):
    assert windtunnel() == 0

    out = capsys.readouterr().out
    assert "A new study in studies/job." in out
    assert "enqueued" in out
    assert "The limits are reached." in out
    assert "== studies/job ===" in out
    assert "lr " in out
    assert "better than your recipe" in out
    assert "windtunnel resume studies/job --trials 9" in out
    study = Study.open("studies/job")
    assert [t.status for t in study.trials] == ["finished"] * 6
    assert study.trials[0].source == "enqueued"
    assert (study.folder / "runs.jsonl").read_text().count("\n") == 1


def test_running_again_goes_on_and_resume_extends(file, capsys):
    windtunnel("--trials", "2")
    assert windtunnel("--trials", "3") == 0
    assert "Going on with studies/job, which has 2 trials." in capsys.readouterr().out
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "4"]) == 0
    assert len(Study.open("studies/job").trials) == 4


def test_what_a_resume_has_to_repeat_is_said(file, capsys):
    windtunnel("--trials", "2", "--store", "a store")
    store = f"--executor in-process --store '{Path.cwd()}/a store'"
    assert f"windtunnel resume studies/job --trials 3 {store}   searches on" in capsys.readouterr().out
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "3"]) == 0
    said = f"The last run had --store, this one has not; as before: windtunnel resume studies/job {store}\n"
    assert said in capsys.readouterr().out
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "4"]) == 0
    assert "The last run had" not in capsys.readouterr().out


def test_a_plan_looks_at_the_study_in_the_store_and_fetches_nothing(file, capsys):
    run_it = ("run", "job.py", "--executor", "in-process", "--store", "store")
    assert main([*run_it, "--trials", "2"]) == 0
    shutil.rmtree("studies")
    before = sorted(Path().rglob("*"))
    capsys.readouterr()

    assert main([*run_it, "--trials", "9", "--plan"]) == 0
    assert "Plan:" in capsys.readouterr().out
    assert main([*run_it, "--seed", "5", "--plan"]) == 0
    assert sorted(Path().rglob("*")) == before


def test_a_new_study_is_refused_a_store_of_another_one_before_its_folder_is_made(file, capsys):
    assert windtunnel("--trials", "1", "--store", "store") == 0
    before = sorted(Path().rglob("*"))
    capsys.readouterr()

    assert windtunnel("--trials", "1", "--store", "store", "--study", "new", "--seed", "5") == 1
    error = capsys.readouterr().err
    assert f"{Path.cwd()}/store holds a study that this would go on with. it was made with seed 0, not 5" in error
    file.write_text(FILE.replace("/ 10", "/ 20"))
    assert windtunnel("--trials", "1", "--store", "store", "--study", "new") == 1
    assert "job.py is not what the study was run with" in capsys.readouterr().err
    shutil.rmtree("store/journal")
    assert windtunnel("--trials", "1", "--store", "store", "--study", "new") == 1
    assert f"holds another study, mirrored by pid {os.getpid()} on" in capsys.readouterr().err
    assert not Path("new").exists()
    assert [path for path in before if not path.is_relative_to("store")] == sorted(
        path for path in Path().rglob("*") if not path.is_relative_to("store")
    )


def test_arguments_after_two_dashes_reach_the_file(file):
    windtunnel("--trials", "1", "--", "--slow", "0.001")
    assert Study.open("studies/job").training["args"] == ["--slow", "0.001"]


def test_a_changed_file_stops_a_resume_and_names_the_difference(file, capsys):
    windtunnel("--trials", "2")
    file.write_text(FILE.replace("/ 10", "/ 20"))

    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "3"]) == 1

    error = capsys.readouterr().err
    assert "is not what the study was run with" in error
    assert '+    loss = 2.0 + (math.log10(trial.config["lr"]) + 2.5) ** 2 + trial.config["data"]["code"] / 20' in error
    assert "--accept-changes" in error
    assert len(Study.open("studies/job").trials) == 2
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "3", "--accept-changes"]) == 0
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "4"]) == 0


def test_a_changed_space_is_refused_by_the_name_of_what_differs(file, capsys):
    windtunnel("--trials", "1")
    file.write_text(FILE.replace("1e-1, log", "1.0, log"))
    assert windtunnel("--trials", "2", "--accept-changes") == 1
    assert "lr.high was 0.1 and is 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "absent.py"], "absent.py"),
        (["run", "job.py", "--executor", "pool", "--ray", "auto"], "--ray auto does not go with --executor pool"),
        (["run", "job.py", "--workers", "0"], "a whole number of workers of at least 1, got 0"),
        (
            ["run", "job.py", "--executor", "in-process", "--workers", "2"],
            "--workers 2 does not go with --executor in-process",
        ),
        (["run", "job.py", "--executor", "in-process", "--trials", "0"], "n_trials must be a whole number"),
        (["resume", "nowhere"], "nowhere holds no study"),
        (["status", "nowhere"], "nowhere holds no study"),
        (["stop", "nowhere"], "nowhere holds no study"),
    ],
)
def test_wrong_words_get_one_sentence_and_status_1(file, capsys, words, message):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("windtunnel: ")
    assert message in error
    assert "Traceback" not in error


def test_another_seed_or_policy_for_an_existing_study_is_refused(file, capsys):
    windtunnel("--trials", "1")
    assert windtunnel("--seed", "5") == 1
    assert "was made with seed 0, not 5" in capsys.readouterr().err


def test_the_settings_of_a_policy_stand_in_the_file(file, capsys):
    words = ["run", "job.py", "--executor", "in-process"]
    settings = {"acquisition": "upper_confidence_bound", "options": {"beta": 1.0}}
    file.write_text(FILE + f"\npolicy = 'bayes'\nsettings = {settings}\n")
    assert main([*words, "--trials", "1"]) == 0
    assert Study.open("studies/job").settings == settings
    assert main([*words, "--trials", "2"]) == 0
    assert windtunnel("--study", "studies/another", "--trials", "1") == 0  # a policy of another name
    assert Study.open("studies/another").settings == {}
    file.write_text(FILE + "\npolicy = 'bayes'\nsettings = {'acquisition': 'none'}\n")
    assert main([*words, "--trials", "1", "--study", "studies/other"]) == 1
    assert "There is no acquisition named 'none'" in capsys.readouterr().err


def test_status_best_and_stop_read_a_study_that_no_one_drives(file, capsys):
    windtunnel()
    capsys.readouterr()

    assert main(["status", "studies/job"]) == 0
    assert "6 of 6 trials (6 finished)" in capsys.readouterr().out
    assert main(["best", "studies/job", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["metrics"]["loss"] == Study.open("studies/job").best().metrics["loss"]
    assert main(["best", "studies/job"]) == 0
    assert "schedule" in capsys.readouterr().out
    assert main(["stop", "studies/job"]) == 1
    assert "has no driver now" in capsys.readouterr().err


def test_a_training_function_that_always_raises_ends_with_its_error(file, capsys):
    file.write_text(FILE.replace("    import math", "    raise OSError('no data')"))
    assert windtunnel() == 1
    error = capsys.readouterr().err
    assert "3 trials failed one after another, the last, trial 2, with 'OSError: no data'" in error


def start(*words):
    """A driver in a process of its own, and its study's folder once three trials are there."""
    command = [sys.executable, "-m", "integrations.command_line", "run", "job.py", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    until(lambda: journal.exists(Path("studies/job")) and len(Study.open("studies/job").trials) >= 3)
    return process


def until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


POOL = ("--executor", "pool", "--workers", "2", "--policy", "sobol", "--trials", "500", "--", "--slow", "0.2")


def test_another_terminal_sees_a_running_study_stops_a_trial_and_the_sweep(file, capsys):
    with start(*POOL) as process:
        assert main(["status", "studies/job"]) == 0
        out = capsys.readouterr().out
        assert f"driver  pid {process.pid} on" in out
        assert "runs    trial" in out
        running = Study.open("studies/job").running[-1].id
        assert main(["stop", "studies/job", "--trial", str(running)]) == 0
        until(lambda: Study.open("studies/job").trial(running).status == "stopped")
        assert main(["run", "job.py", *POOL[:6], "--trials", "500", "--", "--slow", "0.2"]) == 1
        assert f"in use by pid {process.pid}" in capsys.readouterr().err
        assert main(["stop", "studies/job"]) == 0
        assert process.wait(30) == 0
        assert "Stopped on request." in process.stdout.read()
    total = str(len(Study.open("studies/job").trials))
    assert main(["resume", "studies/job", "--executor", "pool", "--trials", total]) == 0
    assert Study.open("studies/job").running == ()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", sorted(ports.EXECUTORS))
def test_ctrl_c_and_a_schedulers_word_leave_a_study_that_resumes(file, executor, number):
    workers = () if executor == "in-process" else POOL[2:4]
    with start("--executor", executor, *workers, "--hours", "9", *POOL[4:]) as process:
        process.send_signal(number)
        assert process.wait(30) == 130
        out = process.stdout.read()
    assert "Interrupted; every result is safe. windtunnel resume studies/job" in out
    assert "--hours 9.0 goes on." in out
    assert "Traceback" not in out
    assert main(["resume", "studies/job", "--executor", "in-process", "--trials", "5"]) == 0
    assert Study.open("studies/job").running == ()


def test_a_recommendation_keeps_to_a_function_of_the_training_file(file, capsys):
    rule = "    constraints=[lambda config: config['data']['code'] >= 0.75],\n"
    text = FILE.replace("    fidelity=Fidelity(", f"{rule}    fidelity=Fidelity(")
    file.write_text(text.replace('"code": 0.5, "prose": 0.5', '"code": 0.75, "prose": 0.25'))
    assert windtunnel() == 0
    capsys.readouterr()
    assert main(["recommend", "studies/job", "--json", "--file", "job.py"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["data"]["code"] >= 0.75
    file.write_text(file.read_text().replace(">= 0.75]", ">= 0.5]"))
    assert main(["recommend", "studies/job", "--file", "job.py"]) == 1
    assert "The space differs from the one" in capsys.readouterr().err


def test_a_recommendation_is_for_any_scale_by_number_or_label(file, capsys):
    windtunnel()
    capsys.readouterr()

    assert main(["recommend", "studies/job"]) == 0
    assert "Recommended at large params, 1M tokens" in capsys.readouterr().out
    assert main(["recommend", "studies/job", "--at", "params=1e7,tokens=1e8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert sum(found["config"]["data"].values()) == pytest.approx(1.0)
    assert main(["recommend", "studies/job", "--at", "params=small,tokens=1e5"]) == 0
    assert main(["recommend", "studies/job", "--at", "params"]) == 1
    assert "--at needs AXIS=VALUE pairs" in capsys.readouterr().err


def test_looking_at_a_study_loads_neither_torch_nor_ray(file):
    windtunnel("--trials", "1")
    code = (
        "import sys; from integrations.command_line import main\n"
        "main(['status', 'studies/job']); main(['best', 'studies/job'])\n"
        "print(sorted({'torch', 'ray', 'pandas', 'scipy', 'fsspec', 'matplotlib'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_looks_like_a_secret_stays_out_of_the_record_of_a_run(file, monkeypatch):
    words = ["windtunnel", "run", "job.py", "--", "--hf-token", "abc", "--api-key=def", "--slow", "1"]
    monkeypatch.setattr(sys, "argv", words)
    windtunnel("--trials", "1")
    record = Path("studies/job/runs.jsonl").read_text()
    assert "abc" not in record
    assert "def" not in record
    assert '"--slow", "1"' in record


def test_a_wrong_baseline_and_a_missing_end_are_refused_before_a_study_is_made(file, capsys):
    file.write_text(FILE.replace('"lr": 1e-2', '"lr": 7.0'))
    assert windtunnel() == 1
    assert "lr must be a number in" in capsys.readouterr().err
    file.write_text(FILE.replace("n_trials = 6", ""))
    assert windtunnel() == 1
    assert "give --trials, --budget" in capsys.readouterr().err
    assert not Path("studies").exists()


def test_a_trial_that_no_driver_gets_past_can_be_stopped_without_one(file, capsys):
    windtunnel("--trials", "1")
    with Study.open("studies/job") as study:
        study.limit(n_trials=2)
        study.ask(1)
    assert main(["stop", "studies/job", "--trial", "1"]) == 0
    assert Study.open("studies/job").trial(1).status == "stopped"


def test_without_git_a_sweep_runs_all_the_same(file, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert windtunnel("--trials", "1") == 0


def test_prepare_is_called_once_before_anything_runs(file, capsys):
    file.write_text(FILE + "\ndef prepare():\n    print('corpus is ready')\n")
    windtunnel("--trials", "2")
    out = capsys.readouterr().out
    assert out.count("corpus is ready") == 1
    assert out.index("corpus is ready") < out.index("enqueued")


def test_a_plan_is_printed_and_nothing_is_run(file, capsys):
    assert main(["run", "job.py", "--budget", "40", "--trials", "400", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Plan: ")
    assert "proxies for" in out or "no proxies" in out
    assert not Path("studies").exists()
    assert windtunnel("--plan") == 0
    assert "makes no plan" in capsys.readouterr().out


def test_a_ladder_says_before_it_starts_what_it_will_run(file, capsys):
    assert main(["run", "job.py", "--executor", "in-process", "--trials", "3"]) == 0
    out = capsys.readouterr().out
    assert out.index("Plan: ") < out.index("The limits are reached.")


def test_a_finished_study_can_be_started_from(file, capsys):
    assert windtunnel("--trials", "3", "--study", "studies/first") == 0
    capsys.readouterr()
    assert windtunnel("--trials", "2", "--prior", "studies/first") == 0
    assert "Runs taken: 3" in capsys.readouterr().out
    study = Study.open("studies/job")
    assert [trial.study is not None for trial in study.trials] == [True, True, True, False, False]
    assert windtunnel("--trials", "2", "--prior", "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
