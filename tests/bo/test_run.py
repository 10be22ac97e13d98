"""The loop: it fills the executor, ends where it was told to, and no bad day costs a result."""

import contextlib
import itertools
import math
import time
from multiprocessing.connection import wait

import pytest

from bo import Diverged, Minimize, StopTrial, Study, StudyInUse, TrainingBroken, run
from bo.ports import Lost, Message, Raised, Returned
from bo.run import request_stop, stop_requested
from bo.trial import Trial
from integrations.in_process import InProcess
from integrations.process_pool import ProcessPool
from search_spaces import Fidelity, Real, Space

SPACE = Space(lr=Real(1e-4, 1e-1, log=True), momentum=Real(0.0, 1.0))


def bowl(trial):
    x = math.log10(trial.config["lr"]) + 2.0
    return {"loss": 1.0 + x * x + (trial.config["momentum"] - 0.7) ** 2}


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), policy="sobol") as made:
        yield made


def test_it_runs_as_many_trials_as_asked_and_a_larger_total_extends_it(study):
    assert run(study, bowl, n_trials=4) == "limits"
    assert len(study.trials) == 4
    assert run(study, bowl) == "limits"
    assert len(study.trials) == 4
    assert run(study, bowl, n_trials=6) == "limits"
    assert [t.status for t in study.trials] == ["finished"] * 6


def test_the_budget_is_kept_in_target_runs(tmp_path):
    space = Space(lr=Real(0.0, 1.0), fidelity=Fidelity(steps=(10, 100), target={"steps": 100}, cost=steps_cost))
    with Study.create(tmp_path / "s", space, objective=Minimize("loss"), policy="sobol") as study:
        study.enqueue({"lr": 0.5}, {"steps": 10})
        assert run(study, lambda trial: {"loss": trial.config["lr"]}, budget=2.5) == "limits"
        assert [t.cost for t in study.trials] == [0.1, 1.0, 1.0]


def steps_cost(scale):
    return scale["steps"]


def test_it_stops_at_a_target_value_after_patience_and_after_hours(study):
    assert run(study, bowl, target=100.0) == "target"
    assert len(study.trials) == 1
    assert run(study, lambda trial: {"loss": 1.0 + trial.id}, patience=3) == "patience"
    assert study.best().id + 3 <= len(study.trials) - 1
    assert run(study, bowl, hours=2.0, clock=ticking(1200)) == "hours"


def ticking(seconds):
    """A clock that every look finds so much later."""
    ticks = itertools.count()
    return lambda: seconds * next(ticks)


def test_hours_are_measured_by_a_clock_that_does_not_run_backwards(tmp_path):
    """The study's own clock tells the time of day, which may be set back; it is in the journal and nowhere else."""
    backwards = itertools.count(2_000_000_000, -3600)
    with Study.create(
        tmp_path / "s", SPACE, objective=Minimize("loss"), policy="sobol", clock=lambda: float(next(backwards))
    ) as study:
        assert run(study, bowl, hours=2.0, clock=ticking(600)) == "hours"
        assert run(study, bowl, n_trials=len(study.trials) + 2, hours=2.0) == "limits"
        assert Study.open(study.folder).trials == study.trials


def test_one_that_raises_is_failed_with_its_traceback_and_the_others_go_on(study):
    def train(trial):
        if trial.id == 1:
            raise RuntimeError("no such file\nsecond line")
        if trial.id == 2:
            raise Diverged("loss 9.1 is above its start 5.5")
        if trial.id == 3:
            return {"loss": math.nan}
        if trial.id == 4:
            return {"los": 1.0}
        if trial.id == 5:
            return 3.0
        if trial.id == 6:
            raise SystemExit(2)
        return bowl(trial)

    run(study, train, n_trials=8)

    assert [t.status for t in study.trials] == [
        "finished",
        "failed",
        "diverged",
        "diverged",
        "failed",
        "failed",
        "failed",
        "finished",
    ]
    assert study.trial(1).error == "RuntimeError: no such file"
    assert "in train" in study.trial(1).traceback
    assert study.trial(2).error == "loss 9.1 is above its start 5.5"
    assert "no metric ['loss']" in study.trial(4).error
    assert "dictionary of named numbers, got float" in study.trial(5).error
    assert study.trial(6).error == "SystemExit: 2"


def test_a_training_function_that_always_fails_ends_the_run_with_its_error(study):
    def train(trial):
        raise FileNotFoundError("corpus.bin")

    with pytest.raises(TrainingBroken, match=r"3 trials failed .* 'FileNotFoundError: corpus.bin'"):
        run(study, train, n_trials=50)
    assert len(study.trials) == 3
    assert run(study, bowl, n_trials=5) == "limits"


def test_an_outage_ends_the_run_before_it_has_burned_the_study(study):
    def train(trial):
        if trial.id >= 2:
            raise OSError("/data is gone")
        return bowl(trial)

    with pytest.raises(TrainingBroken, match="10 trials failed one after another, the last, trial 11, with 'OSError"):
        run(study, train, n_trials=50)
    assert [t.status for t in study.trials].count("finished") == 2
    assert run(study, bowl, n_trials=14) == "limits"


def test_training_code_cannot_change_the_study(study):
    def train(trial):
        trial.config.clear()
        trial.config["lr"] = "spoiled"
        return {"loss": 1.0}

    run(study, train, n_trials=2)
    assert Study.open(study.folder).trials == study.trials


def test_a_folder_for_own_files_starts_as_the_last_one_and_a_block_that_raises_changes_nothing(study):
    def train(trial):
        with trial.checkpoint_dir() as folder:
            (folder / "weights.txt").write_text("one")
        with contextlib.suppress(OSError), trial.checkpoint_dir() as folder:
            (folder / "weights.txt").write_text("two")
            raise OSError("disk")
        with trial.checkpoint_dir() as folder:
            assert (folder / "weights.txt").read_text() == "one"
        return {"loss": 1.0}

    run(study, train, n_trials=1)
    assert study.trial(0).status == "finished", study.trial(0).traceback


def test_a_study_that_another_process_drives_is_left_alone(study):
    """Nothing is trained, and nothing that was asked of its driver is lost."""
    study.limit(n_trials=5)
    study.ask(1)
    request_stop(study.folder)
    second = Study.open(study.folder)

    with pytest.raises(StudyInUse, match="one study has one driver"):
        run(second, lambda trial: pytest.fail("trained"), n_trials=5)

    assert stop_requested(study.folder)


def test_a_stop_from_another_terminal_is_heard_after_the_hours_are_over(study):
    class Slow(InProcess):
        """Hands a trial back unfinished, as a long run in a pool is, until it has been asked for."""

        def wait(self, deliver, timeout):
            request_stop(study.folder)

    assert run(study, bowl, executor=Slow(), hours=1.0, n_trials=1, clock=ticking(600)) == "stopped"
    assert len(study.running) == 1


def test_after_the_hours_nothing_starts_and_what_was_asked_for_stays_so(study):
    study.ask(2)
    assert run(study, bowl, hours=1e-9, clock=ticking(600)) == "hours"
    assert [t.status for t in study.trials] == ["running", "running"]
    assert run(study, bowl, n_trials=2) == "limits"
    assert [t.status for t in study.trials] == ["finished", "finished"]


def test_patience_counts_results_as_they_came_and_ends_a_sweep_without_a_best(study):
    def diverges(trial):
        raise Diverged("above its start")

    assert run(study, diverges, patience=3) == "patience"
    assert len(study.trials) == 3


def test_a_trial_left_running_goes_on_from_its_checkpoint_under_its_own_id(study):
    seen = []

    def train(trial):
        state = trial.load() or {"step": 0}
        seen.append((trial.id, trial.attempt, state["step"]))
        for step in range(state["step"], 4):
            trial.report(step, {"loss": 9.0})
            trial.save({"step": step + 1})
            if step == 1 and len(seen) == 1:
                raise KeyboardInterrupt
        return bowl(trial)

    with pytest.raises(KeyboardInterrupt):
        run(study, train, n_trials=2)
    assert [t.status for t in study.trials] == ["running"]

    run(study, train)

    assert seen == [(0, 1, 0), (0, 1, 2), (1, 1, 0)]
    assert [r.step for r in study.trial(0).reports] == [0, 1, 2, 3]


def test_one_trial_can_be_ended_early_and_keeps_its_reports(study):
    def train(trial):
        for step in range(10):
            if trial.id == 1 and step == 3:
                request_stop(study.folder, 1)
            trial.report(step, {"loss": 5.0 - step})
        return bowl(trial)

    run(study, train, n_trials=3)

    assert [t.status for t in study.trials] == ["finished", "stopped", "finished"]
    assert study.trial(1).reports[-1].step == 3
    assert study.trial(1).metrics is None


def test_a_stop_request_ends_the_run_and_an_old_one_does_not(study):
    def train(trial):
        if trial.id == 2:
            request_stop(study.folder)
        return bowl(trial)

    assert run(study, train, n_trials=10) == "stopped"
    assert len(study.trials) == 3
    assert run(study, bowl, n_trials=5) == "limits"


class Unlucky:
    """An executor whose worker is lost on each trial's first `losses` attempts; what remains is the real one's."""

    apart = True

    def __init__(self, losses, innocent=False):
        self.losses, self.inner, self.lost, self.innocent = losses, InProcess(), [], innocent

    def attach(self, trials):
        return ()

    def open(self, train, folder):
        self.inner.open(train, folder)

    def capacity(self):
        return 0 if self.lost else self.inner.capacity()

    def submit(self, trial: Trial):
        if trial.attempt <= self.losses:
            self.lost.append(Lost(trial.id, trial.attempt, "signal 9", self.innocent))
        else:
            self.inner.submit(trial)

    def wait(self, deliver, timeout):
        if not self.lost:
            self.inner.wait(deliver, timeout)
            return
        message: Message = self.lost.pop()
        result = Returned(message.trial, message.attempt, {"loss": -1.0}, 0.0)
        raised = Raised(message.trial, message.attempt, "late", "", False)
        deliver([message, message, result, raised])  # late messages of an attempt that is over are dropped

    def stop(self, trial):
        self.inner.stop(trial)

    def close(self, leave=False):
        self.inner.close()


def test_a_lost_worker_is_retried_and_its_late_messages_are_dropped(study):
    run(study, bowl, executor=Unlucky(2), n_trials=3, clock=ticking(60))

    assert [(t.status, t.attempt) for t in study.trials] == [("finished", 3)] * 3
    assert all(t.metrics["loss"] >= 1.0 for t in study.trials)


def test_a_worker_that_is_lost_every_time_fails_its_trial(study):
    with pytest.raises(TrainingBroken, match="Its worker was lost 4 times, the last time by signal 9"):
        run(study, bowl, executor=Unlucky(99), n_trials=3, clock=ticking(60))


def test_a_machine_that_is_taken_away_does_not_count_against_its_trial(study):
    run(study, bowl, executor=Unlucky(9, innocent=True), n_trials=1, clock=ticking(60))

    assert [(t.status, t.attempt, t.losses) for t in study.trials] == [("finished", 10, 0)]
    assert Study.open(study.folder).trials == study.trials


def test_a_lost_trial_that_is_asked_to_end_does_not_start_again(study):
    class Watched(Unlucky):
        def wait(self, deliver, timeout):
            super().wait(deliver, timeout)
            if study.trial(0).attempt == 2:
                request_stop(study.folder, 0)

    run(study, bowl, executor=Watched(1), n_trials=2, clock=ticking(0.1))

    assert [(t.status, t.attempt) for t in study.trials] == [("stopped", 2), ("finished", 2)]


class Cursed:
    """An executor of two slots that loses trial 0 again and again; in every other the training function raises."""

    apart = True

    def __init__(self):
        self.running = []

    def attach(self, trials):
        return ()

    def open(self, train, folder):
        pass

    def capacity(self):
        return 2 - len(self.running)

    def submit(self, trial):
        self.running.append(trial)

    def wait(self, deliver, timeout):
        running, self.running = self.running, []
        for trial in running:
            lost = Lost(trial.id, trial.attempt, "signal 9")
            deliver([lost if trial.id == 0 else Raised(trial.id, trial.attempt, "OSError: gone", "", False)])

    def stop(self, trial):
        pass

    def close(self, leave=False):
        pass


def test_a_hopeless_run_ends_although_a_lost_trial_waits_for_its_next_attempt(study):
    with pytest.raises(TrainingBroken, match="3 trials failed one after another, the last, trial 3"):
        run(study, bowl, executor=Cursed(), n_trials=50, clock=ticking(60))
    assert [t.id for t in study.running] == [0]
    run(study, bowl, n_trials=5)
    assert study.trial(0).attempt == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "run needs an end: give n_trials="),
        ({"n_trials": 0}, "n_trials must be a whole number of at least 1, got 0"),
        ({"budget": math.nan}, "budget must be a finite number above 0"),
        ({"hours": -1}, "hours must be a finite number above 0, got -1"),
        ({"target": math.inf}, "target must be a finite value of the objective, got inf"),
        ({"patience": 1.5}, "patience must be a whole number of at least 1, got 1.5"),
        ({"n_trials": 1, "executor": "slurm"}, "no executor named 'slurm'; there are in-process, pool, ray"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(study, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(study, bowl, **arguments)
    assert study.trials == ()


def test_a_training_function_must_be_one(study):
    with pytest.raises(ValueError, match="run needs a training function, got str"):
        run(study, "train.py", n_trials=1)


def test_stop_trial_is_not_swallowed_as_an_error(study):
    def train(trial):
        raise StopTrial("enough")

    run(study, train, n_trials=1)
    assert study.trial(0).status == "stopped"


def test_results_that_are_there_when_ctrl_c_comes_are_kept(study, tmp_path):
    def train(trial):
        while trial.id == 1 and not (tmp_path / "go").exists():
            time.sleep(0.01)
        return bowl(trial)

    pool = ProcessPool(2)

    def interrupt(moment, trial):
        if (moment, trial.id) == ("told", 0):
            (tmp_path / "go").touch()
            assert wait([worker.connection for worker in pool._busy.values()], 60.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, train, executor=pool, n_trials=4, watch=interrupt)
    assert [t.status for t in Study.open(study.folder).trials][:2] == ["finished"] * 2
    assert len([t for t in study.trials if t.told]) == 2


def test_results_that_are_being_written_when_ctrl_c_comes_are_kept(study):
    class Interrupted(dict):
        """Metrics in the midst of which Ctrl-C comes, once."""

        def items(self):
            if not came:
                came.append(True)
                raise KeyboardInterrupt
            return super().items()

    came = []

    class Together(InProcess):
        """Three slots whose trials end at the same moment."""

        def open(self, train, folder):
            self.trials = []

        def capacity(self):
            return 3 - len(self.trials)

        def submit(self, trial):
            self.trials.append(trial)

        def wait(self, deliver, timeout):
            kinds = (dict, Interrupted, dict)
            deliver([Returned(t.id, 1, kind(loss=1.0), 0.0) for t, kind in zip(self.trials, kinds, strict=True)])

    with pytest.raises(KeyboardInterrupt):
        run(study, bowl, executor=Together(), n_trials=3)
    assert came
    assert [t.status for t in Study.open(study.folder).trials] == ["finished"] * 3


def test_after_ctrl_c_no_trial_is_trained_in_the_drivers_own_process(study):
    trained = []

    def train(trial):
        trained.append(trial.id)
        return bowl(trial)

    def interrupt(moment, trial):
        if moment == "started":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, train, n_trials=1, watch=interrupt)
    assert trained == []
    assert [t.status for t in study.trials] == ["running"]
