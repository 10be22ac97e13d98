"""A study from elsewhere runs nothing, and what a study writes is its owner's and holds no secrets."""

import json
import os
import stat
import subprocess
import sys

import pytest

from bo import JournalError, Minimize, Study, run
from bo.events import event, to_line
from bo.journal import NAME, read
from integrations.journal_mirror import Mirror, restore
from integrations.masking import masked
from integrations.process_pool import ProcessPool
from integrations.store import Store
from search_spaces import Real, Space

EVIL = """
from pathlib import Path
Path({ran!r}).touch()

def cost(scale):
    return 1.0

def metric(metrics):
    return metrics["loss"]

from bo import Function
from search_spaces import Fidelity, Real, Space
space = Space(lr=Real(0.0, 1.0), fidelity=Fidelity(tokens=(1.0, 2.0), target={{"tokens": 2.0}}, cost=cost))
objective = Function(metric, metrics=["loss"])

def train(trial):
    return {{"loss": 1.0}}
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A study from elsewhere: its cost, objective and training file are an evil module that could be imported."""
    (tmp_path / "code").mkdir()
    ran = tmp_path / "ran"
    module = tmp_path / "code" / "evil_module.py"
    module.write_text(EVIL.format(ran=str(ran)))
    monkeypatch.syspath_prepend(tmp_path / "code")
    import evil_module

    with Study.create(tmp_path / "evil", evil_module.space, objective=evil_module.objective, policy="sobol") as study:
        (trial,) = study.ask(1)
        study.tell(trial.id, {"loss": 1.0})
        study.launched_from(str(module), __import__("hashlib").sha256(module.read_bytes()).hexdigest(), ())
    del sys.modules["evil_module"]
    ran.unlink()
    (tmp_path / "evil" / "training_file.py").write_bytes(module.read_bytes())
    (tmp_path / "evil" / "sitecustomize.py").write_bytes(module.read_bytes())
    return tmp_path / "evil"


def command(*words, code):
    return subprocess.run(
        [sys.executable, "-m", "integrations.command_line", *map(str, words)],
        env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{code}"},
        capture_output=True,
        text=True,
    )


def test_opening_a_study_imports_nothing_that_its_journal_names(evil, tmp_path):
    study = Study.open(evil)
    assert study.trials[0].metrics == {"loss": 1.0}
    with pytest.raises(ValueError, match="is not at hand"):
        study.best()
    with pytest.raises(ValueError, match="hand"):
        study.ask(1)
    study.close()

    assert "evil_module" not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("constraint", "refused"),
    [
        ("__import__('pathlib').Path({ran!r}).touch() or lr <= 1", True),
        ("lr.__class__.__mro__[1].__subclasses__() <= 1", True),
        ("lr <= 0.9", False),
    ],
)
def test_a_constraint_in_a_journal_is_arithmetic_or_refused(tmp_path, constraint, refused):
    with Study.create(
        tmp_path / "study", Space(lr=Real(0.0, 1.0), constraints=["lr <= 0.5"]), objective=Minimize("loss")
    ):
        pass
    (header,), _ = read(tmp_path / "study" / NAME)
    text = json.dumps(header).replace("lr <= 0.5", json.dumps(constraint.format(ran=str(tmp_path / "ran")))[1:-1])
    crafted = json.loads(text)
    del crafted["n"], crafted["at"]
    (tmp_path / "study" / NAME).write_bytes(to_line(1, 0.0, crafted))
    if refused:
        with pytest.raises(ValueError, match="constraint"):
            Study.open(tmp_path / "study")
    else:
        assert Study.open(tmp_path / "study").space.constraints
    assert not (tmp_path / "ran").exists()


def test_a_policy_named_by_a_journal_comes_from_our_table_or_not_at_all(tmp_path):
    with Study.create(tmp_path / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol"):
        pass
    (header,), _ = read(tmp_path / "study" / NAME)
    crafted = {**header, "policy": "os:system"}
    del crafted["n"], crafted["at"]
    (tmp_path / "study" / NAME).write_bytes(
        to_line(1, 0.0, event("created", **{k: crafted[k] for k in crafted if k != "kind"}))
    )
    with Study.open(tmp_path / "study") as study, pytest.raises(ValueError, match="no policy named 'os:system'"):
        study.ask(1)


def test_restoring_a_study_from_a_store_runs_nothing_of_it(evil, tmp_path):
    with Mirror(evil, Store(tmp_path / "store")):
        pass
    restore(Store(tmp_path / "store"), tmp_path / "restored")
    assert (tmp_path / "restored" / "training_file.py").exists()
    assert not (tmp_path / "ran").exists()


def test_names_in_a_store_that_reach_outside_are_not_taken(tmp_path):
    """A mirror is read by the names of segments, which have one form."""
    store = Store(tmp_path / "store")
    (tmp_path / "x").write_text("x")
    for name in ("journal/../../out", "journal/000000001-000000001-0123456789abcdef.jsonl.sh", "journal/x"):
        store.put(tmp_path / "x", name)
    with pytest.raises(JournalError, match="holds no journal"):
        restore(store, tmp_path / "deep" / "er" / "study")


def private(folder):
    """Whatever in `folder` others may look into."""
    return [
        f"{path.relative_to(folder)} {stat.filemode(path.stat().st_mode)}"
        for path in [folder, *folder.rglob("*")]
        if path.stat().st_mode & 0o077
    ]


def test_what_a_worker_writes_is_its_owners_alone(tmp_path):
    def train(trial):
        print("hello")
        trial.save({"step": 1})
        with trial.checkpoint_dir() as folder:
            (folder / "weights").touch(0o600)
        return {"loss": 1.0}

    before = os.umask(0o022)
    try:
        with Study.create(
            tmp_path / "study", Space(lr=Real(0.0, 1.0)), objective=Minimize("loss"), policy="sobol"
        ) as study:
            run(study, train, executor=ProcessPool(1, store=Store(tmp_path / "store")), n_trials=1)
        with Mirror(study.folder, Store(tmp_path / "store")):
            pass
    finally:
        os.umask(before)
    folder = study.folder / "trials" / "00000"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-001-000001.zip",
        "files-001-000001",
        "log.txt",
    ]
    assert private(folder) == []
    assert private(tmp_path / "store") == []
    for name in (NAME, "lock"):
        assert (study.folder / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["status", "best"])
def test_looking_at_a_study_from_elsewhere_runs_none_of_its_files(evil, tmp_path, name):
    looked = command(name, evil, code=tmp_path / "code")
    assert looked.returncode == (0 if name == "status" else 1), looked.stderr
    assert "Traceback" not in looked.stderr
    assert not (tmp_path / "ran").exists()

    named = command(name, evil, "--file", tmp_path / "code" / "evil_module.py", code=tmp_path / "code")
    assert named.returncode == 0, named.stderr
    assert (tmp_path / "ran").exists()


FILE = """
import sys
from bo import Minimize
from search_spaces import Real, Space

space = Space(lr=Real(0.0, 1.0))
objective = Minimize("loss")
n_trials, policy = 1, "sobol"

def train(trial):
    import os
    assert "HF_TOKEN" in os.environ, "no token"
    raise RuntimeError("401 with " + os.environ["HF_TOKEN"])
"""


def test_a_sweep_writes_no_secret_and_nothing_for_others_eyes(tmp_path, monkeypatch):
    (tmp_path / "job.py").write_text(FILE)
    folder = tmp_path / "studies" / "job"
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    before = os.umask(0o022)
    try:
        start = ("run", tmp_path / "job.py", "--study", folder, "--executor", "pool", "--workers", "1")
        for words in ["--password", "pa55"], ["hf_0123456789"], ["sftp://me:pa55@host/x"]:
            refused = command(*start, "--", *words, code=tmp_path)
            assert "hold what looks like a secret (" in refused.stderr
            assert "pa55" not in refused.stderr
        ran = command(*start, "--prior", "hf_0123456789.csv", code=tmp_path)
        assert ran.returncode == 1
        ran = command(*start, code=tmp_path)
    finally:
        os.umask(before)
    assert ran.returncode == 0, ran.stderr
    assert Study.open(folder).trials[0].error == "RuntimeError: 401 with ***"
    assert private(folder) == []
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_0123456789" not in path.read_bytes() + ran.stdout.encode(), path


@pytest.mark.parametrize("text", ["x" * 200_000, "a1.-" * 50_000, "://" * 50_000])
def test_long_text_of_any_shape_is_left_as_it_is(text):
    assert masked(text) == text  # it took minutes where time grew with the square


def test_a_url_is_masked_whatever_stands_before_it():
    for before in ("", "9", "-", "x" * 100, "--store-"):
        assert "pw" not in masked(f"{before}s3://user:pw@bucket/x")
