"""What goes wrong on real machines: a disk that is full or read-only, trials that fail together or say too much."""

import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc

import pytest

from bo import JournalError, Minimize, Study, TrainingBroken, run
from bo.ports import Raised, Returned
from bo.worker import MOST
from integrations.process_pool import ProcessPool
from search_spaces import Real, Space

SPACE = Space(x=Real(0.0, 1.0), y=Real(1e-4, 1.0, log=True))


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), policy="sobol") as made:
        yield made


class AtOnce:
    """An executor of many workers whose trials have ended when it is next looked at."""

    apart = True

    def __init__(self, workers, end=lambda trial: Returned(trial.id, trial.attempt, {"loss": trial.config["x"]}, 1.0)):
        self.workers, self.end, self.trials = workers, end, []

    def open(self, train, folder):
        pass

    def attach(self, trials):
        return ()

    def capacity(self):
        return self.workers - len(self.trials)

    def submit(self, trial):
        self.trials.append(trial)

    def wait(self, deliver, timeout):
        done, self.trials = self.trials, []
        deliver([self.end(trial) for trial in done])

    def stop(self, trial):
        pass

    def close(self, leave=False):
        self.trials = []


LIMITED = """
import resource, signal, sys
from bo import JournalError, Study, run
sys.path.append({here!r})
from test_faults import AtOnce
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then refuses the write itself
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
study = Study.open(sys.argv[1])
try:
    run(study, print, executor=AtOnce(8), n_trials=500)
except JournalError as error:
    print(error)
assert Study.open(sys.argv[1]).trials == study.trials, "the study is ahead of its journal"
told = [trial.id for trial in study.ended]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run(study, print, executor=AtOnce(8), n_trials=len(told) + 100)
print(told == [trial.id for trial in study.ended][: len(told)])
"""


def test_a_disk_that_fills_up_in_a_sweep_loses_nothing_that_was_told(study):
    code = LIMITED.format(here=os.path.dirname(__file__))
    study.close()
    done = subprocess.run([sys.executable, "-c", code, str(study.folder)], capture_output=True, text=True, cwd=".")

    assert (
        "journal.jsonl cannot be written (File too large); what it holds so far is safe. Free space" in done.stdout
    ), done.stderr
    assert done.stdout.endswith("True\n")
    again = Study.open(study.folder)
    assert len(again.trials) > 100
    assert {trial.status for trial in again.trials} == {"finished"}


READ_ONLY = """
import os, sys
from bo import Study, JournalError
if os.geteuid() == 0:  # whom permissions do not stop
    os.setresuid(65534, 65534, 65534)
study = Study.open(sys.argv[1])
print(len(study.trials), study.best().id)
try:
    study.add({"x": 0.1, "y": 0.1}, {"loss": 2.0})
except JournalError as error:
    print(error)
print(len(study.trials))
"""


def test_a_read_only_study_can_be_read_and_says_so_when_it_is_changed():
    with tempfile.TemporaryDirectory() as top:  # not in tmp_path, which only its owner may enter
        os.chmod(top, 0o755)
        with Study.create(f"{top}/study", SPACE, objective=Minimize("loss"), policy="sobol") as study:
            study.add({"x": 0.5, "y": 0.1}, {"loss": 1.0})
        for path in (study.folder / "journal.jsonl", study.folder / "lock"):
            path.chmod(0o444)
        study.folder.chmod(0o555)
        before = {path.name: path.read_bytes() for path in study.folder.iterdir()}
        done = subprocess.run([sys.executable, "-c", READ_ONLY, str(study.folder)], capture_output=True, text=True)
        study.folder.chmod(0o755)
        assert done.stdout.splitlines()[::2] == ["1 0", "1"], done.stderr
        assert "study cannot be written (Permission denied); choose a folder you own." in done.stdout
        assert {path.name: path.read_bytes() for path in study.folder.iterdir()} == before


def test_five_hundred_trials_that_fail_at_once_end_the_sweep_and_are_all_in_the_journal(study):
    def broken(trial):
        return Raised(trial.id, trial.attempt, "OSError: /data is gone", "Traceback ...", False)

    with pytest.raises(
        TrainingBroken, match=r"500 trials failed one after another, the last, trial 499, with 'OSError"
    ):
        run(study, print, executor=AtOnce(500, broken), n_trials=5000)

    lines = [json.loads(line) for line in (study.folder / "journal.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["trial"] for line in lines if line["kind"] == "failed"] == list(range(500))
    assert run(study, print, executor=AtOnce(500), n_trials=600) == "limits"
    assert sum(trial.status == "finished" for trial in study.trials) == 100


def much(trial):
    if trial.id == 0:
        trial.report(1, {f"activation/{i:0189}": 0.5 for i in range(450_000)})  # 100 MB
    if trial.id == 1:
        return {"loss": 1.0, "m" * (MOST + 1): 2.0}
    if trial.id == 2:
        raise RuntimeError("x" * 100_000_000)
    return {"loss": 1.0, **{f"layer/{i}": 0.5 for i in range(10_000)}}


def test_a_trial_that_reports_a_hundred_megabytes_fails_and_the_journal_stays_small(study):
    assert run(study, much, executor=ProcessPool(2), n_trials=4) == "limits"

    assert [trial.status for trial in study.trials] == ["failed", "failed", "failed", "finished"]
    assert study.trial(0).error == (
        "ValueError: trial.report must give metrics of at most 1,000,000 bytes at a time, got 450,000 of about "
        "101,250,000; report what the search goes by, and write the rest to a file in trial.folder."
    )
    assert "The training function must give metrics of at most" in study.trial(1).error
    assert study.trial(2).error.startswith("RuntimeError: xxx")
    assert (study.folder / "journal.jsonl").stat().st_size < 1_000_000


def two_threads(trial):
    def reports(first):
        for step in range(first, 400, 2):
            trial.report(step, {"loss": float(step), "thread": float(first)})

    threads = [threading.Thread(target=reports, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"loss": 1.0}


@pytest.mark.parametrize("executor", ["in-process", "pool"])
def test_a_trial_may_report_from_two_threads(study, executor):
    """Reports come as they were made; one of an earlier step than the last replaces what came after, as on a rerun."""
    heard = []
    run(
        study,
        two_threads,
        executor=ProcessPool(2) if executor == "pool" else executor,
        n_trials=2,
        watch=lambda moment, trial: heard.append(moment),
    )
    assert [trial.status for trial in study.trials] == ["finished"] * 2
    assert heard.count("reported") == 800
    assert Study.open(study.folder).trials == study.trials


def test_a_thread_that_outlives_its_trial_is_not_heard(study):
    late, said = threading.Event(), []

    def train(trial):
        def report():
            late.wait(20)
            try:
                trial.report(1, {"loss": 9.0})
            except Exception as error:
                said.append(str(error))

        if trial.id == 0:
            thread = threading.Thread(target=report)
            thread.start()
            threads.append(thread)
        return {"loss": 1.0}

    threads = []
    run(study, train, n_trials=2)
    late.set()
    threads[0].join()
    assert said == ["Trial 0 was asked to end at step 1."]
    assert study.trial(0).reports == ()


def test_ten_thousand_trials_are_small_in_memory_and_quick_to_open(study):
    run(study, print, executor=AtOnce(500), n_trials=10_000)

    start = time.process_time()
    again = Study.open(study.folder)
    assert time.process_time() - start < 2.0
    assert again.trials == study.trials
    del again
    tracemalloc.start()
    try:
        again = Study.open(study.folder)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(again.trials) < 2_000


def test_what_a_trial_costs_the_driver_does_not_grow_with_their_number(study):
    """By the calls of the later of four thousand trials: looks at all trials, one for each, would be thousands more."""

    def calls(n):
        profile = cProfile.Profile()
        profile.enable()
        run(study, print, executor=AtOnce(10), n_trials=len(study.trials) + n, patience=10**9)
        profile.disable()
        return pstats.Stats(profile).total_calls

    def each():
        few = calls(100)  # with what a run does at its start, once, for all trials that there are
        return (calls(600) - few) / 500

    run(study, print, executor=AtOnce(500), n_trials=500)
    early = each()
    run(study, print, executor=AtOnce(500), n_trials=4_000)
    assert each() < 1.2 * early + 25


def test_a_journal_error_leaves_the_study_as_the_disk_has_it(study, monkeypatch):
    run(study, print, executor=AtOnce(4), n_trials=8)
    fsync = os.fsync

    def refused(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(JournalError, match="Input/output error"):
        run(study, print, executor=AtOnce(4), n_trials=16)
    monkeypatch.setattr(os, "fsync", fsync)
    assert Study.open(study.folder).trials == study.trials
    assert run(study, print, executor=AtOnce(4), n_trials=16) == "limits"
    assert [trial.status for trial in study.trials] == ["finished"] * 16
