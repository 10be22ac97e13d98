"""The journal: lines are durable when they are acknowledged, and damage is named or mended, never guessed at."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bo import events, journal
from bo.journal import Journal, JournalError, StudyInUse


def limits(n):
    return events.event("limits", n_trials=n, budget=None)


def written(folder, n=3):
    made = Journal(folder, 0, lambda: 0.0)
    made.append([limits(i + 1) for i in range(n)])
    made.close()
    return folder / journal.NAME


def test_what_was_appended_is_read_back(tmp_path):
    path = written(tmp_path)

    happened, end = journal.read(path)

    assert [(e["n"], e["n_trials"]) for e in happened] == [(1, 1), (2, 2), (3, 3)]
    assert end == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


def test_each_line_is_one_json_object_that_any_tool_reads(tmp_path):
    for line in written(tmp_path).read_text().splitlines():
        assert json.loads(line)["kind"] == "limits"


def test_a_tail_torn_at_any_byte_loses_only_that_line_and_is_mended_by_the_next_append(tmp_path, caplog):
    path = written(tmp_path)
    data = path.read_bytes()
    start = len(data) - len(data.splitlines(keepends=True)[-1])
    for cut in range(start, len(data)):
        path.write_bytes(data[:cut])
        assert len(journal.read(path)[0]) == 2
        assert path.stat().st_size == cut, "reading changes no byte"
        again = Journal(tmp_path, 2, lambda: 0.0)
        again.append([limits(3)])
        again.close()
        assert path.read_bytes() == data


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_refused_with_the_number_of_its_line(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("journal"))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))  # without its newline the last line is a torn one
    changed = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    content[place] = changed
    path.write_bytes(content)

    with pytest.raises(JournalError, match=r"damaged at line [1-4]: "):
        journal.read(path)


def test_a_line_of_a_newer_version_is_refused_by_its_kind(tmp_path):
    path = written(tmp_path)
    line = events.to_line(4, 0.0, {"kind": "teleported"})
    path.write_bytes(path.read_bytes() + line + line)

    with pytest.raises(
        JournalError, match=r"line 4: it is of an unknown kind 'teleported', written by a newer version"
    ):
        journal.read(path)


def test_an_event_has_exactly_its_members():
    with pytest.raises(ValueError, match="An event 'limits' has members"):
        events.event("limits", n_trials=3)
    with pytest.raises(ValueError, match="An event 'limits' has members"):
        events.event("limits", n_trials=3, budget=None, colour="red")


def test_a_second_writer_is_refused_by_name_and_the_first_goes_on(tmp_path):
    first = Journal(tmp_path, 0, lambda: 0.0)
    first.append([limits(1)])

    with pytest.raises(StudyInUse, match=rf"is in use by pid {os.getpid()} on .+; one study has one driver"):
        Journal(tmp_path, 1, lambda: 0.0).append([limits(2)])

    first.append([limits(2)])
    first.close()
    assert len(journal.read(tmp_path / journal.NAME)[0]) == 2


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from bo.journal import Journal; from bo.events import event\n"
        "Journal(Path(sys.argv[1]), 0, time.time).append([event('limits', n_trials=1, budget=None)])\n"
        "print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=".")
    with process:
        assert process.stdout.readline() == "written\n"
        assert journal.in_use(tmp_path)
        with pytest.raises(StudyInUse, match=f"pid {process.pid} on"):
            Journal(tmp_path, 1, lambda: 0.0).append([limits(2)])
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not journal.in_use(tmp_path)
    Journal(tmp_path, 1, lambda: 0.0).append([limits(2)])


def test_a_journal_that_grew_since_it_was_read_is_not_written(tmp_path):
    stale = Journal(tmp_path, 0, lambda: 0.0)
    written(tmp_path)

    with pytest.raises(StudyInUse, match="changed by another process since it was opened"):
        stale.append([limits(9)])


def test_a_full_disk_is_an_error_and_nothing_is_lost(tmp_path, monkeypatch):
    made = Journal(tmp_path, 0, lambda: 0.0)
    made.append([limits(1)])
    whole = os.pwrite

    def full(descriptor, data, offset):
        """A disk with room for ten more bytes."""
        if len(data) > 10:
            return whole(descriptor, data[:10], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device"):
        made.append([limits(2)])
    monkeypatch.undo()
    made.append([limits(2)])
    made.close()

    assert [e["n_trials"] for e in journal.read(tmp_path / journal.NAME)[0]] == [1, 2]


def test_a_real_full_disk_is_an_error_and_nothing_is_lost(tmp_path):
    """A file-size limit makes the kernel itself refuse the write, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from bo.journal import Journal, JournalError\n"
        "from bo.events import event\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "made = Journal(Path(sys.argv[1]), 0, lambda: 0.0)\n"
        "made.append([event('limits', n_trials=1, budget=None)])\n"
        "size = (Path(sys.argv[1]) / 'journal.jsonl').stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))\n"
        "try: made.append([event('limits', n_trials=2, budget=None)])\n"
        "except JournalError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "made.append([event('limits', n_trials=3, budget=None)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=".")

    assert "cannot be written (File too large)" in done.stdout, done.stderr
    assert [e["n_trials"] for e in journal.read(tmp_path / journal.NAME)[0]] == [1, 3]


def test_a_journal_that_is_damaged_is_never_written_however_often_it_is_tried(tmp_path):
    path = written(tmp_path)
    opened = Journal(tmp_path, 3, lambda: 0.0)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)

    for _ in range(3):
        with pytest.raises(JournalError, match="damaged at line"):
            opened.append([limits(4)])
    assert path.read_bytes() == data
    assert not journal.in_use(tmp_path)


def test_ctrl_c_in_a_write_leaves_a_journal_that_has_to_be_opened_again(tmp_path, monkeypatch):
    opened = Journal(tmp_path, 0, lambda: 0.0)
    opened.append([limits(1)])
    fsync = os.fsync

    def interrupted(descriptor):
        fsync(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened.append([limits(2)])
    monkeypatch.undo()

    with pytest.raises(StudyInUse, match="changed by another process since it was opened; open it again"):
        opened.append([limits(3)])
    assert [e["n_trials"] for e in journal.read(tmp_path / journal.NAME)[0]] == [1, 2]


def test_a_reader_that_looks_for_a_driver_does_not_keep_one_from_starting(tmp_path):
    written(tmp_path)
    stop = threading.Event()
    readers = [threading.Thread(target=lambda: [journal.in_use(tmp_path) for _ in iter(stop.is_set, True)])]
    for reader in readers:
        reader.start()
    try:
        for _ in range(200):
            os.close(journal.take_lock(tmp_path))
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_a_lock_on_a_full_disk_is_let_go_again(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device"):
        Journal(tmp_path, 0, lambda: 0.0).append([limits(1)])
    monkeypatch.undo()
    Journal(tmp_path, 0, lambda: 0.0).append([limits(1)])


def test_a_folder_without_working_locks_is_refused(tmp_path, monkeypatch):
    """No such mount can be made in a test; the error is the one that such a mount gives."""

    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", no_locks)
    with pytest.raises(JournalError, match="file system without working locks"):
        Journal(tmp_path, 0, lambda: 0.0).append([limits(1)])


def test_a_folder_whose_locks_do_not_exclude_is_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(journal.fcntl, "flock", lambda descriptor, how: None)
    Journal(tmp_path, 0, lambda: 0.0).append([limits(1)])

    assert "locks do not exclude" in caplog.text
