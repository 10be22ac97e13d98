"""The policy thinks beside the loop: what happens meanwhile is heard, and its proposals are as if it had been asked."""

import itertools
import json
import threading
import time

import numpy as np
import pytest

from bo import Minimize, Study, run
from bo.policies.sobol import Sobol
from bo.ports import Lost, Reported, Returned, Stopped
from bo.run import BACK_OFF, Driver, Ending
from bo.study import Draft
from search_spaces import Real, Space

SPACE = Space(x=Real(0.0, 1.0))


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), policy="sobol") as made:
        yield made


class Elsewhere:
    """An executor whose trials run nowhere: `script` says what has happened at each look, from the running trials."""

    apart = True

    def __init__(self, slots, script):
        self.slots, self.script, self.running, self.started, self.stopped = slots, script, {}, [], []

    def open(self, train, folder):
        pass

    def attach(self, trials):
        return ()

    def capacity(self):
        return self.slots - len(self.running)

    def submit(self, trial):
        self.running[trial.id] = trial
        self.started.append(trial.id)

    def wait(self, deliver, timeout):
        messages = list(self.script(dict(self.running)))
        for message in messages:
            if isinstance(message, Returned | Stopped | Lost):
                self.running.pop(message.trial, None)
        if messages:
            deliver(messages)
        else:
            time.sleep(0.001)

    def stop(self, trial):
        self.stopped.append(trial)

    def close(self, leave=False):
        self.running.clear()


def returned(trial, loss=1.0):
    return Returned(trial.id, trial.attempt, {"loss": loss}, 0.0)


class Slow(Sobol):
    """Sobol's points, but from the second call on only once it may."""

    quick = False

    def __init__(self, may, error=None):
        super().__init__()
        self.__dict__.update(may=may, error=error, calls=0)

    def propose(self, history, n, rng):
        self.__dict__["calls"] += 1
        if self.calls > 1:
            assert self.may.wait(20), "the policy was never allowed to answer"
            if self.error:
                raise self.error
        return super().propose(history, n, rng)


def events(study):
    return [json.loads(line) for line in (study.folder / "journal.jsonl").read_text().splitlines()]


def test_reports_and_results_are_heard_while_the_policy_thinks(study):
    """It answers only once a report and a result that came meanwhile are on the disk; in the loop it never would."""
    may, steps = threading.Event(), itertools.count()
    study._loaded_policy = Slow(may)

    def script(running):
        step = next(steps)
        if step == 0:
            return [returned(running[0])]
        if step in (1, 2):
            return [Reported(1, 1, step, {"loss": 2.0})]
        if step == 3:
            assert [report.step for report in study.trial(1).reports] == [1, 2]
            return [returned(running[1])]
        may.set()
        return [returned(trial) for trial in running.values()]

    assert run(study, print, executor=Elsewhere(3, script), n_trials=6) == "limits"
    assert [trial.status for trial in study.trials] == ["finished"] * 6


def test_a_proposal_is_that_of_the_line_it_looked_at_and_of_the_seed(study):
    may, steps = threading.Event(), itertools.count()
    study._loaded_policy = Slow(may)

    def script(running):
        step = next(steps)
        if step == 0:
            return [returned(running[0])]
        if step == 1:
            return [Reported(1, 1, 1, {"loss": 2.0}), returned(running[1])]
        may.set()
        return [returned(trial) for trial in running.values()] if step > 100 else []

    run(study, print, executor=Elsewhere(3, script), n_trials=6)

    written = events(study)
    late = next(line for line in written if line["kind"] == "proposed" and line["trial"] == 3)
    assert late["seen"] < late["n"] - 1, "lines have come between the question and its answer"
    before = [line for line in written if line["n"] <= late["seen"]]
    (study.folder / "again").mkdir()
    (study.folder / "again" / "journal.jsonl").write_bytes(
        b"".join((study.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)[: len(before)])
    )
    again = Study.open(study.folder / "again")
    draft = again.draft(1)
    assert again.space.to_json(draft.proposals()[0].config) == late["config"]


def test_what_the_policy_raises_comes_out_of_run(study):
    may = threading.Event()
    may.set()
    study._loaded_policy = Slow(may, FloatingPointError("the covariance is not positive definite"))

    with pytest.raises(FloatingPointError, match="not positive definite"):
        run(study, print, executor=Elsewhere(2, lambda running: [returned(running[min(running)])]), n_trials=6)
    assert not any(thread.name.startswith("policy") for thread in threading.enumerate())


def test_ctrl_c_waits_for_the_policy_and_leaves_a_whole_study(study):
    may, steps = threading.Event(), itertools.count()
    study._loaded_policy = Slow(may)

    def script(running):
        step = next(steps)
        if step == 0:
            return [returned(running[0])]
        threading.Timer(0.1, may.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, print, executor=Elsewhere(2, script), n_trials=6)
    assert not any(thread.name.startswith("policy") for thread in threading.enumerate())
    assert Study.open(study.folder).trials == study.trials
    assert len(study.trials) == 2, "an answer that nobody waited for is no trial"


def test_an_answer_is_void_where_other_trials_were_made_meanwhile(study):
    may, steps = threading.Event(), itertools.count()
    study._loaded_policy = Slow(may)

    def script(running):
        step = next(steps)
        if step == 0:
            return [returned(running[0])]
        if step == 1:
            study.add({"x": 0.5}, {"loss": 0.1})
            may.set()
        return [returned(trial) for trial in running.values()] if step > 1 else []

    run(study, print, executor=Elsewhere(2, script), n_trials=5)

    assert [trial.source for trial in study.trials] == ["sobol", "sobol", "added", "sobol", "sobol", "sobol"]
    configs = [study.space.to_json(trial.config)["x"] for trial in study.trials]
    assert len(set(configs)) == 6


def test_what_is_enqueued_while_the_policy_thinks_runs_before_what_it_proposes(study):
    may, steps = threading.Event(), itertools.count()
    study._loaded_policy = Slow(may)

    def script(running):
        step = next(steps)
        if step == 0:
            return [returned(running[0])]
        if step == 1:
            study.enqueue({"x": 0.25})
        if 2 in running:
            may.set()
        assert step < 1000, "it waited for the policy"
        return [returned(trial) for trial in running.values()] if step > 1 and may.is_set() else []

    run(study, print, executor=Elsewhere(2, script), n_trials=3)

    assert [trial.source for trial in study.trials] == ["sobol", "sobol", "enqueued"]


def test_a_policy_that_had_nothing_to_propose_is_not_asked_again_before_something_happened(study):
    class Shy(Sobol):
        quick = False
        asked = 0

        def propose(self, history, n, rng):
            Shy.asked += 1
            return super().propose(history, min(n, 1), rng) if all(t.told for t in history.trials) else ()

    study._loaded_policy = Shy()
    steps = itertools.count()
    run(
        study,
        print,
        executor=Elsewhere(2, lambda running: map(returned, running.values()) if next(steps) % 50 == 49 else ()),
        n_trials=3,
    )
    assert len(study.trials) == 3
    assert Shy.asked <= 6


class Timed:
    """A policy's thread in virtual time."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def start(self, draft, clock):
        self.draft, self.until = draft, self.clock.now + self.seconds

    def ready(self, patience):
        return self.clock.now >= self.until

    def answer(self):
        return self.draft.proposals(), self.seconds

    def close(self, leave=False):
        pass


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Thoughtful(Sobol):
    quick = False


def virtual(study, slots, lasts, thinks, n_trials, **ending):
    """Run a study in virtual time: trials that last so long and up to twice that, a policy that thinks so long."""
    study._loaded_policy = Thoughtful()
    clock, most = Clock(), []

    class Machines(Elsewhere):
        def __init__(self):
            super().__init__(slots, None)
            self.ends = {}

        def submit(self, trial):
            super().submit(trial)
            self.ends[trial.id] = clock.now + lasts * (1 + trial.id % 16 / 16)

        def wait(self, deliver, timeout):
            busy = driver.draft is not None  # then there is something to come before the next end of a trial
            clock.now = clock.now + timeout if busy else min(self.ends.values())
            most.append(len(study.running) - len(self.running))
            done = [id for id, end in self.ends.items() if end <= clock.now]
            for id in done:
                del self.ends[id]
            deliver([returned(self.running.pop(id)) for id in done])

    machines = Machines()
    study.limit(n_trials=n_trials)
    ends = Ending(study, ending.get("hours"), None, ending.get("patience"), clock)
    driver = Driver(study, machines, ends, clock=clock, thinker=Timed(clock, thinks))
    return driver.drive(), max(most)


def test_trials_are_asked_for_ahead_of_demand_where_the_policy_is_slow_and_only_there(study, tmp_path):
    assert virtual(study, 16, 10.0, 2.0, 80) == ("limits", 4)
    for slots, lasts, thinks in ((16, 10.0, 0.001), (3, 10.0, 2.0), (16, 1e6, 2.0)):
        folder = tmp_path / f"{slots}-{lasts}-{thinks}"
        with Study.create(folder, SPACE, objective=Minimize("loss"), policy="sobol") as other:
            assert virtual(other, slots, lasts, thinks, 40) == ("limits", 0), (slots, lasts, thinks)


def test_what_was_asked_for_ahead_stays_so_at_an_ending_and_is_first_in_the_next_run(study):
    reason, ahead = virtual(study, 16, 10.0, 2.0, 400, hours=120 / 3600)
    assert (reason, ahead) == ("hours", 4)
    left = [trial.id for trial in study.running]
    assert 1 <= len(left) <= 4

    machines = Elsewhere(2, lambda running: map(returned, running.values()))
    assert run(study, print, executor=machines, n_trials=len(study.trials) + 2) == "limits"
    assert machines.started[: len(left)] == left
    assert all(trial.status == "finished" for trial in study.trials)


def test_a_lost_trial_waits_longer_each_time_and_holds_nobody_up(study):
    clock, started = Clock(), {}

    def script(running):
        clock.now += 0.5
        for trial in running.values():
            started.setdefault(trial.id, []).append(clock.now)
        return [
            Lost(t.id, t.attempt, "signal 9", innocent=t.attempt < 6) if t.id == 0 and t.attempt < 10 else returned(t)
            for t in running.values()
        ]

    run(study, print, executor=Elsewhere(1, script), n_trials=40, clock=clock)

    pauses = np.diff(started[0])
    assert pauses[0] <= 1.0, "the first machine that was taken away is replaced at once"
    assert all(least <= pause <= least + 2 for least, pause in zip((2, 4, 8, 16, 32), pauses[1:], strict=False))
    assert max(pauses) <= BACK_OFF + 2
    assert started[1][0] < started[0][2], "others start meanwhile"
    assert study.trial(0).status == "failed"
    assert "lost 4 times" in study.trial(0).error


def test_a_draft_answers_the_same_however_often_and_wherever_it_is_asked(study):
    draft = study.draft(3)
    assert isinstance(draft, Draft)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(draft.proposals()))
    thread.start()
    thread.join()
    study.add({"x": 0.5}, {"loss": 0.1})
    assert answers == [draft.proposals()]
    assert len(draft.history.trials) == 0
    assert study.adopt(draft, answers[0]) is None
