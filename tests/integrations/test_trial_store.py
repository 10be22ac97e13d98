"""Trials on machines that share no folder: their checkpoints go through a store."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile

import pytest

from bo import Minimize, StopTrial, Study, Trial, checkpoint
from bo.ports import Lost, Raised, Returned, Stopped
from bo.study import trial_folder
from integrations import trial_store
from integrations.shipping import pack, run_packed
from integrations.store import Store, StoreError
from integrations.trial_store import TrialStore, forget, scratch
from search_spaces import Real, Scale, Space

PLACE = "trials/00003"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, for these tests alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def ran(store, tmp_path, temporary):
    """Runs one attempt of trial 3 where the study's folder cannot be seen, and gives its last message."""

    def run(train, attempt=1, study=None):
        trial = Trial(id=3, config={}, scale=Scale(), seed=0, source="sobol", attempt=attempt)
        return run_packed(pack(train, store), trial, study or tmp_path / "elsewhere", lambda message: False)

    return run


def stored(store):
    return [name.removeprefix(f"{PLACE}/") for name in store.names(PLACE) if "log" not in name]


def steps(upto):
    """A training function that goes on from its checkpoint and is ended at a step."""

    def train(trial):
        start = trial.load() or 0
        print("from", start)
        for step in range(start + 1, upto + 1):
            trial.save(step)
        raise StopTrial

    return train


def test_an_attempt_goes_on_from_what_the_last_one_stored(ran, store, temporary, tmp_path):
    assert isinstance(ran(steps(3)), Stopped)
    assert stored(store) == ["checkpoint-001-000002.zip", "checkpoint-001-000003.zip"]
    assert isinstance(ran(steps(4), attempt=2), Stopped)
    assert ran(lambda trial: {"start": trial.load()}, attempt=3).metrics == {"start": 4.0}

    assert stored(store) == ["checkpoint-001-000003.zip", "checkpoint-002-000004.zip"]
    for attempt, start in (1, 0), (2, 3):
        store.get(f"{PLACE}/log-00{attempt}.txt", tmp_path / "log")
        assert (tmp_path / "log").read_text() == f"from {start}\n"
    assert list(temporary.iterdir()) == []  # what was on the worker's disk is gone
    assert not (tmp_path / "elsewhere").exists()


def test_the_same_attempt_on_another_machine_adds_to_what_is_stored(ran, store):
    """A driver that comes back goes on with the attempt it had."""
    ran(steps(2))
    ran(steps(3))
    assert ran(lambda trial: {"start": trial.load()}).metrics == {"start": 3.0}
    assert stored(store)[-1] == "checkpoint-001-000003.zip"


def test_an_earlier_attempt_that_is_still_alive_spoils_nothing(ran, store, tmp_path):
    """Its machine was cut off, and is back after a later attempt has gone far."""
    ran(steps(2))
    ran(steps(5), attempt=2)
    old = Trial(id=3, config={}, scale=Scale(), seed=0, source="sobol", attempt=1)
    for step in range(7):
        TrialStore(store, old).keep(checkpoint.save(tmp_path / "cut off", -step))

    assert ran(lambda trial: {"start": trial.load()}, attempt=3).metrics == {"start": 5.0}
    assert stored(store) == ["checkpoint-002-000004.zip", "checkpoint-002-000005.zip"]


@pytest.mark.parametrize("damage", ["torn", "gone", "foreign"])
def test_the_checkpoint_before_a_torn_or_missing_one_is_taken(ran, store, damage):
    ran(steps(3))
    newest = f"{store.url}/{PLACE}/checkpoint-001-000003.zip"
    if damage == "gone":
        os.unlink(newest)
    else:
        size = os.path.getsize(newest)
        with open(newest, "r+b") as file:
            file.truncate(size // 2) if damage == "torn" else file.write(b"x" * size)

    with contextlib.nullcontext() if damage == "gone" else pytest.warns(UserWarning, match="is damaged .* passed over"):
        assert ran(lambda trial: {"start": trial.load()}, attempt=2).metrics == {"start": 2.0}


def test_files_of_own_formats_travel_as_one_archive(ran, store):
    def train(trial):
        with trial.checkpoint_dir() as folder:
            (folder / "deep" / "empty").mkdir(parents=True, exist_ok=True)
            grown = folder / "deep" / "weights.txt"
            grown.write_text((grown.read_text() if grown.exists() else "") + str(trial.attempt))
            return {"grown": float(grown.read_text())}

    assert [ran(train, attempt).metrics["grown"] for attempt in (1, 2, 3)] == [1.0, 12.0, 123.0]
    assert stored(store) == ["files-002-000002.zip", "files-003-000003.zip"]


def test_an_archive_that_reaches_outside_is_passed_over(ran, store, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil", "x")
    store.put(tmp_path / "evil.zip", f"{PLACE}/files-001-000009.zip")

    def train(trial):
        with trial.checkpoint_dir() as folder:
            return {"files": float(len(list(folder.iterdir())))}

    with pytest.warns(UserWarning, match=r"its member '../../evil' would land outside"):
        assert ran(train).metrics == {"files": 0.0}
    assert not list(tmp_path.rglob("evil"))


def test_a_store_out_of_reach_at_the_start_costs_an_attempt_and_blames_nobody(ran, monkeypatch):
    def refuse(*_):
        raise StoreError("s3://b cannot list it: ConnectionError.")

    monkeypatch.setattr(trial_store, "PATIENCE", (0.0, 0.0))
    monkeypatch.setattr(Store, "names", refuse)
    last = ran(lambda trial: pytest.fail("trained"))
    assert last == Lost(3, 1, "a store out of reach (s3://b cannot list it: ConnectionError)", innocent=True)


def test_a_store_that_fails_later_does_not_end_the_run(ran, store, monkeypatch):
    def train(trial):
        def refuse(*_):
            raise StoreError("the store is full.")

        trial.save(1)
        with monkeypatch.context() as patched:
            patched.setattr(Store, "put", refuse)
            trial.save(2)
        assert trial.load() == 2
        return {"loss": 0.0}

    with pytest.warns(UserWarning, match=r"checkpoint-001-000002.zip is on this machine alone: the store is full."):
        assert isinstance(ran(train), Returned)
    assert stored(store) == ["checkpoint-001-000001.zip"]


def test_where_the_study_can_be_seen_its_folder_is_used_and_the_store_as_well(ran, store, tmp_path, temporary):
    (tmp_path / "study").mkdir()
    ran(steps(3), study=tmp_path / "study")
    folder = trial_folder(tmp_path / "study", 3)
    assert sorted(path.name for path in folder.glob("*.zip")) == stored(store)
    assert (folder / "log.txt").read_text() == "from 0\n"

    forget(store, [3])
    assert stored(store) == []
    assert ran(lambda trial: {"start": trial.load()}, study=tmp_path / "study").metrics == {"start": 3.0}
    assert list(temporary.iterdir()) == []


def test_another_study_in_a_folder_of_the_same_path_is_not_touched(store, tmp_path, temporary):
    """The worker's disk has one where the driver's has its own: an old copy, say."""
    space = Space(lr=Real(0.0, 1.0))
    for seed, name in enumerate(("mine", "theirs")):
        Study.create(tmp_path / name, space, objective=Minimize("loss"), seed=seed).close()
    trial = Trial(id=3, config={}, scale=Scale(), seed=0, source="sobol")
    packed = pack(steps(1), store, tmp_path / "mine")

    run_packed(packed, trial, tmp_path / "theirs", lambda message: False)
    assert not (tmp_path / "theirs" / "trials").exists()
    run_packed(packed, trial, tmp_path / "mine", lambda message: False)
    assert (tmp_path / "mine" / "trials").exists()


def test_without_a_store_a_folder_that_cannot_be_seen_is_refused(tmp_path):
    trial = Trial(id=3, config={}, scale=Scale(), seed=0, source="sobol")
    last = run_packed(pack(steps(1)), trial, tmp_path / "elsewhere", lambda message: False)
    assert isinstance(last, Raised)
    assert "share, or the trials' checkpoints in a store" in last.error


def test_a_worker_without_the_stores_package_says_so(tmp_path, monkeypatch):
    packed = pack(steps(1), Store("memory://here"))
    monkeypatch.setattr(
        "integrations.store.get_filesystem_class", lambda protocol: (_ for _ in ()).throw(ImportError("Install x"))
    )
    trial = Trial(id=3, config={}, scale=Scale(), seed=0, source="sobol")
    last = run_packed(packed, trial, tmp_path, lambda message: False)
    assert isinstance(last, Raised)
    assert "A worker cannot take the trial: ValueError: The store memory://here needs a package" in last.error


def test_what_a_run_raises_reaches_the_journal_without_secrets(ran, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")

    def train(trial):
        raise RuntimeError(f"401 for https://me:pw@host/x?sig=1 with {os.environ['HF_TOKEN']}")

    last = ran(train)
    assert last.error == "RuntimeError: 401 for https://***@host/x?*** with ***"
    assert "hf_0123456789" not in last.traceback
    assert "RuntimeError: 401" in last.traceback


def test_what_a_killed_worker_left_is_removed_and_what_another_uses_is_not(temporary):
    hold = (
        "import sys, time, tempfile; tempfile.tempdir = sys.argv[1]; from integrations.trial_store import scratch\n"
        "with scratch('x') as folder:\n    (folder / 'big').touch(); print(folder, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(temporary)], stdout=subprocess.PIPE, text=True)
    theirs = process.stdout.readline().strip()
    with scratch("mine") as mine:
        assert os.path.exists(theirs)
        process.kill()
        process.communicate()
        (temporary / "windtunnel-new").mkdir()
        (temporary / "windtunnel-old").mkdir()
        long_ago = time.time() - 2 * trial_store.FORGOTTEN
        os.utime(temporary / "windtunnel-old", (long_ago, long_ago))
        with scratch("next"):
            assert mine.stat().st_mode & 0o777 == 0o700
            names = {path.name for path in temporary.iterdir()}
    assert not os.path.exists(theirs)
    assert "windtunnel-new" in names
    assert "windtunnel-old" not in names
    assert mine.name in names
    assert [path.name for path in temporary.iterdir()] == ["windtunnel-new"]
