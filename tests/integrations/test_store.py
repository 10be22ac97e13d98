"""Stores: files that appear whole or not at all, under a URL whose secrets nobody sees."""

import os
import pickle
import threading
import uuid
from dataclasses import replace

import pytest

from bo import Minimize, Study
from integrations.journal_mirror import Mirror, restore
from integrations.masking import masked, masked_words, secrets_among
from integrations.shipping import pack, run_packed
from integrations.store import Absent, Store, StoreError
from integrations.trial_store import forget
from search_spaces import Real, Space


@pytest.fixture(params=["folder", "file://", "memory://"])
def store(request, tmp_path):
    url = {"folder": str(tmp_path / "store"), "file://": f"file://{tmp_path}/store"}
    return Store(url.get(request.param, f"memory://{uuid.uuid4().hex}/deep"))


@pytest.fixture
def written(tmp_path):
    def write(text, name="source"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_what_is_put_is_listed_and_comes_back(store, written, tmp_path):
    assert store.names() == store.names("trials") == []
    store.put(written("one"), "trials/00001/a")
    store.put(written("two"), "trials/00002/b")
    store.put(written("three"), "c")
    store.put(written("1"), "trials/00001/a")

    assert store.names() == ["c", "trials/00001/a", "trials/00002/b"]
    assert store.names("trials/00001") == ["trials/00001/a"]
    store.get("trials/00001/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "1"
    store.remove("trials/00001/a", "never/there")
    assert store.names("trials") == ["trials/00002/b"]
    with pytest.raises(Absent, match="cannot read trials/00001/a: there is no such file"):
        store.get("trials/00001/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "1"


def test_files_and_folders_of_a_store_on_a_disk_are_their_owners_alone(tmp_path, written):
    store = Store(tmp_path / "store")
    store.put(written("secret"), "trials/00001/a")
    store.get("trials/00001/a", tmp_path / "copy")

    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    for path in (tmp_path / "store").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_a_reader_never_sees_a_part_of_a_file(tmp_path):
    store, size = Store(tmp_path / "store"), 3_000_000
    (tmp_path / "source").write_bytes(b"x" * size)
    store.put(tmp_path / "source", "a")
    ended = threading.Event()

    def write():
        for _ in range(10):
            store.put(tmp_path / "source", "a")
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert store.names() == ["a"]
        assert (tmp_path / "store" / "a").stat().st_size == size
    writer.join()


def test_a_file_system_that_is_no_object_store_gets_files_moved_into_place(monkeypatch, written):
    from fsspec.implementations.memory import MemoryFileSystem

    moved = []
    monkeypatch.setattr("integrations.store.WHOLE", frozenset())
    before = MemoryFileSystem.mv
    monkeypatch.setattr(MemoryFileSystem, "mv", lambda self, *names: (moved.append(names), before(self, *names)))
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.put(written("text"), "a/b")

    ((source, target),) = moved
    assert source.rpartition("/")[2].startswith(".b.")
    assert target.endswith("/a/b")
    assert store.names() == ["a/b"]


def test_a_store_travels_to_workers(store):
    assert pickle.loads(pickle.dumps(store)) == store


def test_a_relative_folder_is_the_same_one_for_workers_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("kept").url == str(tmp_path / "kept")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "A store is a folder or a URL such as s3://bucket/folder, got ''"),
        (7, "A store is a folder or a URL"),
        ("gopher://u:secret@host/x", r"no store of the kind 'gopher', got gopher://\*\*\*@host/x; give a folder"),
    ],
)
def test_what_is_no_store_is_refused(url, message):
    with pytest.raises(ValueError, match=message) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    def absent(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("integrations.store.get_filesystem_class", absent)
    with pytest.raises(
        ValueError, match=r"s3://bucket/x\?\*\*\* needs a package that is not here \(Install s3fs to access S3\)"
    ):
        Store("s3://bucket/x?key=1").names()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_of_someone_else_is_named(tmp_path, written):
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="store gives no permission to store a"):
        Store(tmp_path / "store").put(written("x"), "a")


def test_errors_are_one_sentence_without_the_secrets_of_the_url_or_the_environment(monkeypatch):
    secret = "s3cr3t-and-long"
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)

    def fail(url):
        raise RuntimeError(f"cannot connect to {url} with {secret}\nmore")

    monkeypatch.setattr("integrations.store.url_to_fs", fail)
    store = Store("memory://user:password@host/x?signature=abc")
    with pytest.raises(StoreError) as caught:
        store.names("trials")

    assert str(caught.value) == (
        "memory://***@host/x?*** cannot list trials: RuntimeError: cannot connect to memory://***@host/x?*** with ***."
    )
    assert repr(store) == "Store('memory://***@host/x?***')"
    assert caught.value.__suppress_context__


def test_what_is_forbidden_says_where_to_look(monkeypatch):
    def refuse(url):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("integrations.store.url_to_fs", refuse)
    with pytest.raises(StoreError, match=r"gives no permission to list it \(PermissionError: Access Denied\); see to"):
        Store("memory://x").names()


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("sftp://me:pa/ss@host/x", "sftp://***@host/x"),
        ("sftp://me@host/x", "sftp://***@host/x"),
        ("https://h/x?sig=1#f and y", "https://h/x?*** and y"),
        ("'http://a:b@c/', 'http://d'", "'http://***@c/', 'http://d'"),
        ("what? no://", "what? no://"),
        ("loss 0.5 at step 3", "loss 0.5 at step 3"),
    ],
)
def test_urls_lose_users_passwords_and_queries(word, shown):
    assert masked(word, {}) == shown


def test_words_of_a_command_line_lose_their_secrets():
    words = [
        "run",
        "f.py",
        "--store",
        "s3://k:v@b",
        "--hf-token",
        "abc",
        "--api_key=1",
        "--tokens",
        "3",
        "HF_TOKEN=z",
        "--eos-token",
        "e",
    ]
    environ = {"AWS_SECRET_ACCESS_KEY": "0123456789", "SHORT_TOKEN": "run", "HOME": "f.py"}
    assert masked_words([*words, "x0123456789"], environ) == [
        *("run", "f.py", "--store", "s3://***@b", "--hf-token", "***", "--api_key=***"),
        *("--tokens", "3", "HF_TOKEN=***", "--eos-token", "e", "x***"),
    ]
    assert secrets_among(["--lr", "3", "--password", "x"]) == ["***"]


def _check_a_study_on(store, folder):
    """Its journal is mirrored and restored, and a trial goes on from what another machine stored."""
    with Study.create(folder / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol") as study:
        (trial,) = study.ask(1)
        with Mirror(study.folder, store, 0.1):
            study.report(trial.id, 1, {"loss": 1.0})
    assert restore(store, folder / "new") == 3

    def train(trial):
        with trial.checkpoint_dir() as files:
            step = (trial.load() or 0) + len(list(files.iterdir()))
            (files / str(trial.attempt)).touch()
        trial.save(step)
        return {"step": step}

    packed = pack(train, store, study.folder)
    attempts = [replace(trial, attempt=attempt) for attempt in (1, 2, 3)]
    steps = [run_packed(packed, each, folder / "elsewhere", lambda message: False).metrics["step"] for each in attempts]
    assert steps == [0, 1, 3]
    forget(store, [trial.id])
    assert store.names("trials") == [f"trials/00000/log-00{attempt}.txt" for attempt in (1, 2, 3)]
    store.remove(*store.names())


@pytest.mark.slow
def test_a_bucket_is_a_store(tmp_path, written, monkeypatch):
    """Against a server that speaks S3; needs s3fs and moto[server], which are no dependencies of ours."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing-testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        with pytest.raises(StoreError, match="s3://sweeps/lm cannot store c: there is no such file or bucket"):
            Store("s3://sweeps/lm").put(written("x"), "c")
        from fsspec import filesystem

        filesystem("s3").mkdir("sweeps")
        for url in ("s3://sweeps/lm", "s3://sweeps"):
            test_what_is_put_is_listed_and_comes_back(Store(url), written, tmp_path)
            (tmp_path / "copy").unlink()
            store = Store(url)
            store.remove(*store.names())
            _check_a_study_on(store, tmp_path / url.rpartition("/")[2])
    finally:
        server.stop()
    with pytest.raises(StoreError, match="s3://sweeps/lm cannot list it") as caught:
        Store("s3://sweeps/lm").names()
    assert "testing-testing" not in str(caught.value)
