"""What every executor promises, whichever runs the trials."""

import math
import os
import signal
import time
from dataclasses import replace

import pytest

from bo import Diverged, Minimize, StopTrial, Study, Trial, ports, run
from bo.ports import Branched, Lost, Proposal, Raised, Reported, Returned, Stopped, Underway
from bo.study import trial_folder
from search_spaces import Fidelity, Real, Scale, Space

# In process there is no worker beside the driver: what kills one kills both, and there is one trial at a time.
IN_DRIVER = {"in-process"}
SECONDS = 120.0


@pytest.fixture(params=sorted(ports.EXECUTORS))
def name(request):
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param


@pytest.fixture(params=sorted(ports.EXECUTORS.keys() - IN_DRIVER))
def remote_name(request):
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return request.param


@pytest.fixture
def opened(tmp_path):
    """Makes executors of two workers where there are workers, and closes them."""
    made = []

    def make(name, train):
        executor = ports.load(ports.EXECUTORS, name, "executor")(**({} if name in IN_DRIVER else {"workers": 2}))
        made.append(executor)
        executor.open(train, tmp_path)
        return executor

    yield make
    for executor in made:
        executor.close()


def trial(id=0, attempt=1, **config):
    return Trial(id=id, config=config, scale=Scale({"params": 1e5}), seed=7, source="sobol", attempt=attempt)


def messages(executor, *trials, on_message=lambda message: None):
    """Everything the executor says until each trial has had its last message."""
    said = []

    def deliver(messages):
        for message in messages:
            said.append(message)
            on_message(message)

    for each in trials:
        executor.submit(each)
    deadline = time.monotonic() + SECONDS
    while sum(not isinstance(message, Underway) for message in said) < len(trials):
        assert time.monotonic() < deadline, said
        executor.wait(deliver, 0.2)
    return said


def test_what_train_returns_is_told(name, opened):
    def train(trial):
        assert (trial.seed, trial.attempt, trial.scale["params"]) == (7, 1, 1e5)
        return {"loss": trial.config["lr"] + trial.id}

    (said,) = messages(opened(name, train), trial(id=3, lr=0.5))

    assert said == Returned(3, 1, {"loss": 3.5}, said.seconds)
    assert said.seconds >= 0.0


def test_reports_arrive_in_order_and_before_the_end(name, opened):
    def train(trial):
        for step in range(30):
            trial.report(step, {"loss": 1.0 / (step + 1)})
        return {"loss": 0.0}

    said = messages(opened(name, train), trial())

    assert said[:-1] == [Reported(0, 1, step, {"loss": 1.0 / (step + 1)}) for step in range(30)]
    assert isinstance(said[-1], Returned)


def test_branches_arrive_among_the_reports_as_they_were_handed_in(name, opened):
    def train(trial):
        for step, wanted in enumerate(trial.wanted):
            trial.report(step, {"loss": 3.0})
            trial.branch({"loss": float(step), "norm": math.inf}, params=wanted["params"])
        return {"loss": float(len(trial.wanted))}

    wanted = tuple(Scale({"params": params}) for params in (1e3, 1e4))
    said = messages(opened(name, train), replace(trial(attempt=2), wanted=wanted))

    assert said[:-1] == [
        message
        for step, scale in enumerate(wanted)
        for message in (
            Reported(0, 2, step, {"loss": 3.0}),
            Branched(0, 2, scale, {"loss": float(step), "norm": math.inf}),
        )
    ]
    assert isinstance(said[-1], Returned)
    assert said[-1].metrics == {"loss": 0.0}, "none is wanted any more"


def test_a_run_that_is_asked_to_stop_ends_at_a_branch(name, opened):
    def train(trial):
        for _ in range(10_000):
            trial.branch({"loss": 1.0}, params=1e4)
            time.sleep(0.005)
        return {"loss": 1.0}

    executor = opened(name, train)
    said = messages(executor, trial(), on_message=lambda message: executor.stop(0))

    assert 1 <= len(said) < 10_000
    assert isinstance(said[-1], Stopped)


def test_a_run_that_is_asked_to_stop_ends_at_a_report(name, opened):
    def train(trial):
        for step in range(10_000):
            trial.report(step, {"loss": 1.0})
            time.sleep(0.005)
        return {"loss": 1.0}

    executor = opened(name, train)
    executor.stop(0)  # not running yet, so this does nothing
    said = messages(executor, trial(), on_message=lambda message: executor.stop(0))

    assert 1 <= len(said) < 10_000
    assert isinstance(said[-1], Stopped)


def test_a_wish_to_stop_one_run_spares_the_next(name, opened):
    def train(trial):
        for step in range(20):
            trial.report(step, {"loss": 1.0})
            time.sleep(0.005)
        return {"loss": 1.0}

    executor = opened(name, train)
    messages(executor, trial(id=0), on_message=lambda message: executor.stop(0))
    executor.stop(0)
    said = messages(executor, trial(id=1))

    assert isinstance(said[-1], Returned)


def test_an_exception_comes_back_with_its_traceback(name, opened):
    def train(trial):
        raise KeyError("no such domain")

    (said,) = messages(opened(name, train), trial())

    assert isinstance(said, Raised)
    assert said.error == "KeyError: 'no such domain'"
    assert 'raise KeyError("no such domain")' in said.traceback
    assert not said.diverged


def test_diverged_is_no_ordinary_error(name, opened):
    def train(trial):
        raise Diverged("loss is above its start")

    (said,) = messages(opened(name, train), trial())

    assert isinstance(said, Raised)
    assert said.diverged
    assert said.error == "loss is above its start"


def test_stop_trial_passes_through(name, opened):
    def train(trial):
        raise StopTrial

    (said,) = messages(opened(name, train), trial())

    assert isinstance(said, Stopped)


def test_nan_and_infinity_arrive_as_they_are(name, opened):
    (said,) = messages(opened(name, lambda trial: {"loss": math.nan, "norm": math.inf}), trial())

    assert math.isnan(said.metrics["loss"])
    assert said.metrics["norm"] == math.inf


def test_a_result_that_is_no_dictionary_of_numbers_is_an_error(name, opened):
    (said,) = messages(opened(name, lambda trial: {"loss": "low"}), trial())

    assert isinstance(said, Raised)
    assert "must give one number for metric 'loss', got 'low'" in said.error


def test_capacity_counts_what_runs(name, opened):
    executor = opened(name, lambda trial: {"loss": 0.0})
    slots = executor.capacity()
    assert slots == (1 if name in IN_DRIVER else 2)
    for id in range(slots):
        executor.submit(trial(id=id))
        assert executor.capacity() == slots - id - 1
    said = []
    while len(said) < slots:
        executor.wait(said.extend, 0.2)
    assert executor.capacity() == slots


def test_a_study_that_nothing_is_left_of_has_nothing_to_take_up(name, opened):
    executor = opened(name, lambda trial: {"loss": 0.0})
    assert tuple(executor.attach([trial()])) == ()
    (said,) = messages(executor, trial())
    assert isinstance(said, Returned)


def test_wait_comes_back_when_nothing_happens(name, opened):
    executor = opened(name, lambda trial: {"loss": 0.0})
    start = time.monotonic()
    executor.wait(lambda messages: pytest.fail(f"nothing was submitted, but {messages} came"), 0.1)
    assert time.monotonic() - start < 5.0


def test_closing_twice_or_before_opening_is_nothing(name, opened):
    executor = opened(name, lambda trial: {"loss": 0.0})
    executor.close()
    executor.close()
    ports.load(ports.EXECUTORS, name, "executor")().close()


def test_a_study_runs_on_it(name, tmp_path):
    space = Space(lr=Real(1e-4, 1e-1, log=True))
    with Study.create(tmp_path / "study", space, objective=Minimize("loss"), policy="sobol") as study:
        run(study, lambda trial: {"loss": trial.config["lr"]}, executor=name, n_trials=5)
        assert [each.status for each in study.trials] == ["finished"] * 5
        assert all(each.metrics["loss"] == each.config["lr"] for each in study.trials)


# ------------------------------------------------------------------------------------------ where workers are processes


def test_a_killed_worker_is_lost_and_the_next_attempt_finds_its_checkpoint(remote_name, opened):
    def train(trial):
        if trial.attempt == 1:
            trial.report(3, {"loss": 1.0})
            trial.save({"step": 3})
            os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": 0.0, "step": trial.load()["step"]}

    executor = opened(remote_name, train)
    reported, lost = messages(executor, trial())
    assert reported == Reported(0, 1, 3, {"loss": 1.0})
    assert lost == Lost(0, 1, lost.cause)
    assert executor.capacity() == 2

    (said,) = messages(executor, trial(attempt=2))
    assert said == Returned(0, 2, {"loss": 0.0, "step": 3.0}, said.seconds)


def test_the_branches_of_a_killed_worker_are_not_wanted_of_the_next_attempt(remote_name, tmp_path):
    def train(trial):
        for scale in trial.wanted:
            trial.branch({"loss": 10.0 * trial.attempt}, tokens=scale["tokens"])
            if trial.attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": 1.0}

    tokens = Fidelity(lambda scale: scale["tokens"], tokens=(1e5, 2e5, 4e5), target={"tokens": 4e5})
    space = Space(lr=Real(1e-4, 1e-1, log=True), fidelity=tokens)
    with Study.create(tmp_path / "study", space, objective=Minimize("loss"), policy="sobol") as study:
        wanted = tuple(tokens.scale({"tokens": number}) for number in (1e5, 2e5))
        study._propose([Proposal({"lr": 1e-3}, space.top, "sobol", wanted=wanted)])
        run(study, train, executor=remote_name, n_trials=1)
        assert [(trial.status, trial.attempt) for trial in study.trials] == [("finished", 2)]
        assert [(b.scale, b.metrics["loss"]) for b in study.trial(0).branches] == [(wanted[0], 10.0), (wanted[1], 20.0)]


def test_a_process_that_exits_is_lost(remote_name, opened):
    (said,) = messages(opened(remote_name, lambda trial: os._exit(3)), trial())

    assert isinstance(said, Lost)


def test_trials_run_side_by_side(remote_name, opened, tmp_path):
    def train(trial):
        (tmp_path / f"here-{trial.id}").touch()
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / f"here-{1 - trial.id}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return {"loss": float(trial.id)}

    said = messages(opened(remote_name, train), trial(id=0), trial(id=1))

    assert sorted(message.metrics["loss"] for message in said) == [0.0, 1.0]


def test_what_a_trial_prints_is_in_its_log(remote_name, opened, tmp_path, capfd):
    def train(trial):
        print("hello from the trial")
        return {"loss": 0.0}

    messages(opened(remote_name, train), trial(id=4))

    assert "hello from the trial" in (trial_folder(tmp_path, 4) / "log.txt").read_text()
    assert "hello" not in capfd.readouterr().out


def test_closing_ends_what_still_runs(remote_name, opened, tmp_path, pid_in, ended):
    def train(trial):
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(SECONDS)

    executor = opened(remote_name, train)
    executor.submit(trial())
    pid = pid_in(tmp_path / "pid")
    executor.close()

    ended(pid)


def test_a_function_that_cannot_travel_is_refused_at_the_door(remote_name, opened):
    stream = (i for i in range(3))

    with pytest.raises(ValueError, match=r"cannot be sent to a worker process .*generator"):
        opened(remote_name, lambda trial: {"loss": next(stream)})


def test_a_function_that_a_worker_cannot_load_is_an_error_that_says_so(remote_name, opened, tmp_path, monkeypatch):
    (tmp_path / "fleeting.py").write_text("def train(trial):\n    return {'loss': 0.0}\n")
    monkeypatch.syspath_prepend(tmp_path)
    from fleeting import train

    executor = opened(remote_name, train)
    (tmp_path / "fleeting.py").write_text("raise OSError('moved away')\n")
    (said,) = messages(executor, trial())

    assert isinstance(said, Raised)
    assert said.error == "NotLoaded: A worker cannot load the training function: OSError: moved away"


def test_a_worker_that_cannot_see_the_study_folder_says_so(remote_name, opened, tmp_path):
    executor = opened(remote_name, lambda trial: {"loss": 0.0})
    tmp_path.rename(tmp_path.with_name("moved"))
    (said,) = messages(executor, trial())

    assert isinstance(said, Raised)
    assert f"A worker cannot see the study's folder {tmp_path}" in said.error
