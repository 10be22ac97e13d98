"""A study's journal in a store: it follows, it holds nobody up, and the study goes on from it elsewhere."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from bo import JournalError, Minimize, Study
from bo.journal import NAME
from integrations.journal_mirror import ABOUT, Forked, Mirror, fetched, restore
from integrations.store import Store, StoreError
from search_spaces import Real, Space

SPACE = Space(lr=Real(0.0, 1.0))
FAST = 0.02  # seconds between looks

# A sweep in a process of its own. A trial saves each of its steps, waits at its second until it may go on, and says
# where it started; it is given fewer trials than it may run, so that some are running when it is killed.
SWEEP = """
import sys, time
from pathlib import Path
from bo import Minimize, Study, run
from integrations.journal_mirror import Mirror, restore
from integrations.process_pool import ProcessPool
from integrations.store import Store
from search_spaces import Real, Space

folder, go, store = Path(sys.argv[1]), Path(sys.argv[2]), Store(sys.argv[3])

def train(trial):
    start = (trial.load() or {"step": 0})["step"]
    for step in range(start + 1, 5):
        trial.save({"step": step})
        trial.report(step, {"loss": trial.config["lr"]})
        while step == 2 and trial.id >= 2 and not go.exists():
            time.sleep(0.01)
    return {"loss": trial.config["lr"], "start": float(start)}

if not (folder / "journal.jsonl").exists() and len(sys.argv) > 4:
    restore(store, folder)
study = Study.open_or_create(folder, Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol")
with study, Mirror(folder, store, interval=0.02):
    run(study, train, executor=ProcessPool(2, store=store), n_trials=6)
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), policy="sobol") as made:
        yield made


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="windtunnel")
    return lambda: [record.getMessage() for record in caplog.records]


def lines(study):
    return (getattr(study, "folder", study) / NAME).read_bytes()


def journals(store):
    return store.names("journal")


def test_a_restored_journal_is_the_same_byte_for_byte_and_the_training_file_comes_with_it(study, store, tmp_path):
    (study.folder / "training_file.py").write_text("train = 1\n")
    with Mirror(study.folder, store, FAST):
        for _ in range(10):
            study.ask(1)
            time.sleep(FAST / 2)

    assert restore(store, tmp_path / "new" / "study") == 11
    assert lines(tmp_path / "new" / "study") == lines(study)
    assert (tmp_path / "new" / "study" / "training_file.py").read_text() == "train = 1\n"
    assert (tmp_path / "new" / "study" / NAME).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new" / "study").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in (tmp_path / "new" / "study").iterdir()) == [NAME, "training_file.py"]


def test_what_is_in_the_store_at_any_moment_is_a_beginning_of_the_journal(study, store, tmp_path, until):
    with Mirror(study.folder, store, FAST) as mirror:
        for number in range(5):
            study.ask(3)
            until(lambda: mirror.mirrored > 3 * number)  # noqa: B023
            restore(store, tmp_path / str(number))
            assert lines(study).startswith(lines(tmp_path / str(number)))


def test_segments_stay_few_while_the_journal_grows_line_by_line(study, store):
    mirror = Mirror(study.folder, store)
    mirror.start()
    written = []
    put = Store.put
    try:
        for _ in range(32):
            study.ask(1)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(
                    Store, "put", lambda self, path, name: (written.append(path.stat().st_size), put(self, path, name))
                )
                mirror._look(last=True)
    finally:
        mirror.close()

    assert mirror.mirrored == 33
    assert len(journals(store)) <= 6
    assert sum(written) < 6 * len(lines(study))


def test_a_mirror_goes_on_where_the_last_one_was_killed(study, store, tmp_path):
    study.ask(3)
    with Mirror(study.folder, store, FAST):
        pass
    study.ask(3)
    shutil.copytree(store.url, tmp_path / "before")
    with Mirror(study.folder, store, FAST):
        pass
    # killed after it had put the merged segment, before it had removed what it merged:
    for name in os.listdir(tmp_path / "before" / "journal"):
        shutil.copy(tmp_path / "before" / "journal" / name, f"{store.url}/journal/{name}")
    study.ask(1)
    assert restore(store, tmp_path / "middle") == 7
    with Mirror(study.folder, store, FAST):
        pass

    assert restore(store, tmp_path / "new") == 8
    assert len(journals(store)) <= 3


def test_a_store_out_of_reach_is_one_warning_and_the_driver_does_not_wait(study, store, monkeypatch, warned, until):
    reached, hang = threading.Event(), threading.Event()

    def put(self, path, name):
        if name != ABOUT:
            reached.set()
            hang.wait(30)
            raise StoreError("the store does not answer")

    monkeypatch.setattr(Store, "put", put)
    monkeypatch.setattr("integrations.journal_mirror.LONGEST", FAST)
    mirror = Mirror(study.folder, store, FAST).start()
    study.ask(1)
    until(reached.is_set)
    start = time.monotonic()
    for _ in range(20):
        study.ask(1)
    assert time.monotonic() - start < 20.0
    hang.set()
    time.sleep(0.5)  # for more tries
    mirror.close()

    assert warned() == [
        "The journal is not mirrored for now, and the sweep goes on: the store does not answer",
        f"The last 22 of 22 lines of {study.folder / NAME} are not mirrored in {store}; they are safe here, and "
        "mirrored when the study is resumed here.",
    ]


def test_a_store_that_hangs_does_not_keep_the_driver_from_ending(study, store, monkeypatch, warned):
    hang = threading.Event()
    mirror = Mirror(study.folder, store, FAST).start()
    monkeypatch.setattr(Store, "names", lambda *_: hang.wait(30) and [])
    start = time.monotonic()
    mirror.close(timeout=0.2)
    assert time.monotonic() - start < 20.0
    assert "The last 1 of 1 lines" in warned()[0]
    hang.set()


def test_after_an_outage_everything_is_mirrored(study, store, monkeypatch, warned, until):
    put = Store.put
    down = threading.Event()

    def flaky(self, path, name):
        if down.is_set():
            raise StoreError("down")
        put(self, path, name)

    monkeypatch.setattr(Store, "put", flaky)
    with Mirror(study.folder, store, FAST) as mirror:
        down.set()
        study.ask(2)
        until(warned)
        down.clear()
        until(lambda: mirror.mirrored == 3)
    assert len(warned()) == 1


def test_lines_that_the_driver_took_back_are_taken_back(study, store, tmp_path):
    """A full disk: what was written of the last lines is cut off again."""
    mirror = Mirror(study.folder, store)
    mirror.start()
    study.ask(2)
    mirror._look(last=True)
    kept = len(lines(study))
    study.ask(1)
    mirror._look(last=True)
    os.truncate(study.folder / NAME, kept)
    mirror._look(last=True)
    mirror.close()

    assert restore(store, tmp_path / "new") == 3


def test_a_line_is_not_mirrored_before_it_has_stood_for_a_moment(study, store):
    mirror = Mirror(study.folder, store, interval=60.0).start()
    study.ask(1)
    mirror._look(last=False)
    assert mirror.mirrored == 1
    mirror._look(last=False)
    assert mirror.mirrored == 2
    mirror.close()


def test_another_study_at_the_same_place_is_refused_by_name(study, store, tmp_path):
    with Mirror(study.folder, store, FAST):
        pass
    with (
        Study.create(tmp_path / "other", SPACE, objective=Minimize("loss"), policy="sobol") as other,
        pytest.raises(
            Forked, match=f"holds another study, mirrored by pid {os.getpid()} on .*; give .* a place of its"
        ),
    ):
        Mirror(other.folder, store).start()


def test_a_second_driver_with_another_history_is_refused_by_name(study, store, tmp_path, warned, until):
    with Mirror(study.folder, store, FAST):
        study.ask(2)
    restore(store, tmp_path / "copy")
    with Study.open(tmp_path / "copy") as copy, Mirror(study.folder, store, FAST) as first:
        study.ask(1)
        until(lambda: first.mirrored == 4)
        with pytest.raises(Forked, match=r"holds lines . to 4 of this study as .*copy does not have them; they were"):
            Mirror(copy.folder, store).start()
        copy.ask(2)
        with pytest.raises(Forked, match=f"mirrored by pid {os.getpid()} on .*One study has one driver"):
            Mirror(copy.folder, store).start()
    assert restore(store, tmp_path / "new") == 4
    assert warned() == []


def test_two_drivers_that_start_from_the_same_line_notice_each_other(study, store, tmp_path, warned, until):
    with Mirror(study.folder, store, FAST):
        study.ask(2)
    restore(store, tmp_path / "copy")
    with (
        Study.open(tmp_path / "copy") as copy,
        Mirror(study.folder, store, FAST) as first,
        Mirror(copy.folder, store, FAST) as second,
    ):
        study.ask(1)
        until(lambda: first.mirrored == 4)
        copy.ask(1)
        until(lambda: second.forked)
    assert "got lines 1 to 4 of this study from another driver" in warned()[0] or "lines 4 to 4" in warned()[0]
    assert len(warned()) == 1
    assert restore(store, tmp_path / "new") == 4


def test_both_histories_in_one_store_are_not_restored(study, store, tmp_path):
    with Mirror(study.folder, store, FAST):
        pass
    study.close()
    (tmp_path / "fork").mkdir()
    shutil.copy(study.folder / NAME, tmp_path / "fork" / NAME)
    for folder in study.folder, tmp_path / "fork":
        with Study.open(folder) as one:
            one.ask(1)
            alone = Store(tmp_path / f"alone-{folder.name}")
            with Mirror(one.folder, alone, FAST):
                pass
            for name in journals(alone):
                shutil.copy(f"{alone.url}/{name}", f"{store.url}/{name}")
    with pytest.raises(JournalError, match="two drivers have mirrored there, or a part is missing"):
        restore(store, tmp_path / "new")
    assert not (tmp_path / "new" / NAME).exists()


def test_a_command_that_begins_or_goes_on_fetches_the_study_where_there_is_none(study, store, tmp_path):
    assert not fetched(store, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with Mirror(study.folder, store, FAST):
        pass
    assert not fetched(store, study.folder)
    assert fetched(store, tmp_path / "new")
    assert lines(tmp_path / "new") == lines(study)


def test_what_cannot_be_restored_says_why_and_leaves_no_journal(study, store, tmp_path):
    with pytest.raises(JournalError, match="holds no journal of a study"):
        restore(store, tmp_path / "new")
    with Mirror(study.folder, store, FAST):
        study.ask(5)
    with pytest.raises(JournalError, match=r"study already holds a study; restore .* into a new folder"):
        restore(store, study.folder)
    (name,) = journals(store)
    data = (tmp_path / "store" / name).read_bytes()
    (tmp_path / "store" / name).write_bytes(data.replace(b"sobol", b"bayes", 1))
    with pytest.raises(JournalError, match="is damaged: its digest does not hold"):
        restore(store, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_checkpoints_of_trials_that_have_ended_are_removed_by_the_mirrors_thread(study, store, tmp_path, until):
    (tmp_path / "x").write_text("x")
    for trial in range(3):
        for name in ("checkpoint-001-000001.zip", "files-001-000001.zip", ".checkpoint-001-000002.zip", "log-001.txt"):
            store.put(tmp_path / "x", f"trials/{trial:05d}/{name}")
    with Mirror(study.folder, store, FAST) as mirror:
        mirror.forget([0, 2])
        until(lambda: len(store.names("trials")) == 5)
        assert len(store.names("trials/00001", partial=True)) == 4
        mirror.forget([1])
        until(lambda: len(store.names("trials", partial=True)) == 3)
    assert store.names("trials/00000", partial=True) == ["trials/00000/log-001.txt"]


def sweep(*args):
    """The sweep in another process; a session of its own, for its workers end with it."""
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
    )


def test_a_study_is_moved(tmp_path, store, until):
    """Its machine is lost in the middle of a sweep; another one resumes it from the store, with what was trained."""
    first, second, go = tmp_path / "machine-1" / "study", tmp_path / "machine-2" / "study", tmp_path / "go"
    driver = sweep(first, go, store.url)
    try:
        waiting = {f"trials/0000{id}/checkpoint-001-000002.zip" for id in (2, 3)}
        until(lambda: waiting <= set(store.names("trials")))
        until(lambda: lines(first).count(b'"step":2') == 4)
        count = len(lines(first).splitlines())
        until(lambda: max(int(name.split("-")[1]) for name in journals(store)) == count)
    finally:
        driver.kill()
        driver.wait()
    was = lines(first)
    told = [trial.metrics for trial in Study.open(first).trials if trial.told]
    shutil.rmtree(tmp_path / "machine-1")

    go.touch()
    assert sweep(second, go, store.url, "restore").wait(120) == 0
    moved = Study.open(second)
    assert lines(moved).startswith(was)
    assert len(told) == 2
    assert [trial.metrics for trial in moved.trials][:2] == told
    assert [trial.status for trial in moved.trials] == ["finished"] * 6
    assert [trial.metrics["start"] for trial in moved.trials] == [0.0, 0.0, 2.0, 2.0, 0.0, 0.0]
    assert json.loads((tmp_path / "store" / ABOUT).read_text())["pid"] != driver.pid
    restore(store, tmp_path / "again")
    assert lines(tmp_path / "again") == lines(moved)
