"""Trials in the driver's own process; what every executor promises is in test_executors.py."""

import pytest

from bo import Trial
from bo.ports import Reported, Returned
from integrations.in_process import InProcess
from search_spaces import Scale

TRIAL = Trial(id=0, config={}, scale=Scale(), seed=0, source="sobol")


def opened(train, folder, **settings):
    executor = InProcess(**settings)
    executor.open(train, folder)
    return executor


def test_the_trial_runs_in_this_very_process(tmp_path):
    seen = []
    executor = opened(lambda trial: seen.append(trial) or {"loss": 0.0}, tmp_path)
    executor.submit(TRIAL)
    assert seen == []
    executor.wait(lambda message: None, 0.0)
    assert seen[0].folder == tmp_path / "trials" / "00000"


def test_reports_are_delivered_while_it_runs(tmp_path):
    delivered, seen = [], []

    def train(trial):
        trial.report(0, {"loss": 1.0})
        seen.extend(delivered)
        return {"loss": 0.0}

    executor = opened(train, tmp_path)
    executor.submit(TRIAL)
    executor.wait(delivered.extend, 0.0)

    assert seen == [Reported(0, 1, 0, {"loss": 1.0})]


def test_what_it_prints_stays_on_the_terminal(tmp_path, capsys):
    executor = opened(lambda trial: print("hello") or {"loss": 0.0}, tmp_path)
    executor.submit(TRIAL)
    executor.wait(lambda message: None, 0.0)
    assert capsys.readouterr().out == "hello\n"


def test_ctrl_c_passes_through_and_frees_the_slot(tmp_path):
    def train(trial):
        raise KeyboardInterrupt

    executor = opened(train, tmp_path)
    executor.submit(TRIAL)
    with pytest.raises(KeyboardInterrupt):
        executor.wait(lambda message: None, 0.0)
    assert executor.capacity() == 1


def test_a_driver_that_cannot_take_a_report_is_not_the_training_functions_error(tmp_path):
    def train(trial):
        for step in range(5):
            try:
                trial.report(step, {"loss": 1.0})
            except OSError:
                pytest.fail("the training function sees an error of the driver")
        return {"loss": 0.0}

    def deliver(messages):
        raise OSError("disk full")

    executor = opened(train, tmp_path)
    executor.submit(TRIAL)
    with pytest.raises(OSError, match="disk full"):
        executor.wait(deliver, 0.0)


def test_a_second_trial_is_refused_while_one_waits(tmp_path):
    executor = opened(lambda trial: {"loss": 0.0}, tmp_path)
    executor.submit(TRIAL)
    with pytest.raises(RuntimeError, match="InProcess runs one trial at a time and has trial 0"):
        executor.submit(TRIAL)


def test_the_clock_is_the_one_it_was_given(tmp_path):
    executor, said = opened(lambda trial: {"loss": 0.0}, tmp_path, clock=iter([10.0, 12.5]).__next__), []
    executor.submit(TRIAL)
    executor.wait(said.extend, 0.0)
    assert said == [Returned(0, 1, {"loss": 0.0}, 2.5)]
