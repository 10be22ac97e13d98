"""Checkpoints: what goes in comes out, whole, or the one before it does."""

import io
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bo import checkpoint

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
states = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(state=states)
def test_plain_data_comes_back_equal_and_of_the_same_types(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, state)

    loaded = checkpoint.load(folder)

    assert loaded == state
    assert repr(loaded) == repr(state)


def test_arrays_and_tensors_come_back_bit_for_bit(tmp_path):
    state = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.float32(1.5),
        "weights": [torch.randn(3, 2, dtype=torch.bfloat16), torch.tensor([math.nan, math.inf])],
        3: {"nan": math.nan},
    }
    checkpoint.save(tmp_path, state)

    loaded = checkpoint.load(tmp_path)

    assert loaded["a"].dtype == np.int16
    assert (loaded["a"] == state["a"]).all()
    assert loaded["scalar"] == np.float32(1.5)
    assert torch.equal(loaded["weights"][0], state["weights"][0])
    assert torch.equal(loaded["weights"][1], state["weights"][1]) is False  # NaN
    assert loaded["weights"][1].isnan().tolist() == [True, False]
    assert math.isnan(loaded[3]["nan"])


def test_an_optimizer_goes_on_from_its_saved_state(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, optimizer.state_dict())

    again = torch.optim.AdamW([weight])
    again.load_state_dict(checkpoint.load(tmp_path))

    assert torch.equal(again.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_no_checkpoint_loads_as_none(tmp_path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "absent") is None


def test_what_cannot_be_stored_is_refused_by_its_path_and_leaves_the_last_one(tmp_path):
    checkpoint.save(tmp_path, {"step": 1})

    with pytest.raises(TypeError, match=r"state\['model'\]\[0\], a object"):
        checkpoint.save(tmp_path, {"model": [object()]})

    assert checkpoint.load(tmp_path) == {"step": 1}


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, keep):
    checkpoint.save(tmp_path, {"step": 1})
    newest = checkpoint.save(tmp_path, {"step": 2, "weights": np.ones(100)})
    data = newest.read_bytes()
    newest.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])

    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoint.load(tmp_path) == {"step": 1}


def test_only_the_newest_two_are_kept_and_only_for_their_owner(tmp_path):
    for step in range(5):
        path = checkpoint.save(tmp_path, {"step": step})

    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT
    assert path.stat().st_mode & 0o777 == 0o600
    assert checkpoint.load(tmp_path) == {"step": 4}


def test_a_later_attempts_checkpoints_are_the_newer_ones_whatever_an_earlier_one_still_writes(tmp_path):
    for step in range(4):
        checkpoint.save(tmp_path, {"step": step}, attempt=1)
    checkpoint.save(tmp_path, {"step": 9}, attempt=2)
    checkpoint.save(tmp_path, {"step": 10}, attempt=2)
    for step in range(4, 8):
        checkpoint.save(tmp_path, {"step": step}, attempt=1)

    assert checkpoint.load(tmp_path) == {"step": 10}
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT


def test_checkpoints_from_before_names_had_attempts_are_read_and_older_than_all_others(tmp_path):
    checkpoint.save(tmp_path, {"step": 1}).rename(tmp_path / "checkpoint-000007.zip")
    assert checkpoint.load(tmp_path) == {"step": 1}
    assert checkpoint.save(tmp_path, {"step": 2}).name == "checkpoint-001-000008.zip"
    assert checkpoint.load(tmp_path) == {"step": 2}


def test_a_checkpoint_that_an_earlier_attempt_removes_while_it_is_looked_for_gives_way_to_a_newer_one(
    tmp_path, monkeypatch
):
    checkpoint.save(tmp_path, {"step": 1})
    listed = checkpoint._there

    def slowly(folder, kind):
        names = listed(folder, kind)
        monkeypatch.setattr(checkpoint, "_there", listed)
        for step in range(2, 4):
            checkpoint.save(tmp_path, {"step": step}, attempt=1)
        return names

    monkeypatch.setattr(checkpoint, "_there", slowly)
    assert checkpoint.load(tmp_path) == {"step": 3}


def kept(folder, attempt, text):
    fresh = checkpoint.begin_files(folder, attempt)
    (fresh / "weights").write_text(text)
    return checkpoint.keep_files(folder, fresh, attempt)


def test_of_folders_with_own_files_the_newest_of_the_latest_attempt_is_kept(tmp_path):
    kept(tmp_path, 1, "a")
    kept(tmp_path, 2, "b")
    kept(tmp_path, 1, "late")
    (folder,) = tmp_path.iterdir()
    assert (folder / "weights").read_text() == "b"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_attempts_that_write_files_at_once_leave_each_others_alone(tmp_path):
    kept(tmp_path, 1, "a")
    late = checkpoint.begin_files(tmp_path, 1)
    fresh = checkpoint.begin_files(tmp_path, 2)
    assert not late.exists()  # what a killed attempt has begun would lie there for good
    (fresh / "weights").write_text("b")
    kept(tmp_path, 1, "late")
    checkpoint.keep_files(tmp_path, fresh, 2)
    (folder,) = tmp_path.iterdir()
    assert (folder / "weights").read_text() == "b"


def test_files_that_an_earlier_attempt_removes_while_they_are_copied_give_way_to_newer_ones(tmp_path, monkeypatch):
    kept(tmp_path, 1, "a")
    copy = checkpoint.shutil.copytree

    def slowly(source, target):
        monkeypatch.setattr(checkpoint.shutil, "copytree", copy)
        copy(source, target)  # as far as that attempt lets it
        kept(tmp_path, 1, "newer")

    monkeypatch.setattr(checkpoint.shutil, "copytree", slowly)
    assert (checkpoint.begin_files(tmp_path, 2) / "weights").read_text() == "newer"


def test_a_folder_comes_back_from_its_archive_with_all_that_was_in_it(tmp_path):
    folder = tmp_path / "from"
    (folder / "deep" / "empty").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(b"w" * 100)
    checkpoint.archive_folder(folder, tmp_path / "archive.zip")
    checkpoint.unpack_folder(tmp_path / "archive.zip", tmp_path / "to")

    names = lambda root: sorted(str(path.relative_to(root)) for path in root.rglob("*"))  # noqa: E731
    assert names(tmp_path / "to") == names(folder) == ["deep", "deep/empty", "deep/weights"]
    assert (tmp_path / "to" / "deep" / "weights").read_bytes() == b"w" * 100
    assert (tmp_path / "archive.zip").stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------- files made by an enemy


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def crafted(path, tree, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tree.json", tree)
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)


def evil_array(path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(path)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def evil_tensors(path):
    buffer = io.BytesIO()
    torch.save([Evil(path)], buffer)
    return buffer.getvalue()


CRAFTED = {
    "an array of objects": lambda ran: ('["array",0]', {"0_npy": evil_array(ran)}),
    "tensors that are a pickle": lambda ran: ('["tensor",0]', {"tensors_pt": evil_tensors(ran)}),
    "a bare pickle for tensors": lambda ran: ('["tensor",0]', {"tensors_pt": pickle.dumps(Evil(ran), protocol=2)}),
    "a bare pickle for an array": lambda ran: ('["array",0]', {"0_npy": pickle.dumps(Evil(ran))}),
    "an unknown tag": lambda ran: ('["python","os.system"]', {}),
    "a nesting without end": lambda ran: ("[" * 100_000, {}),
    "an index that is none": lambda ran: ('["tensor","x"]', {}),
}


@pytest.mark.parametrize("how", CRAFTED)
def test_nothing_in_a_crafted_checkpoint_runs_and_the_one_before_is_taken(tmp_path, how):
    folder, ran = tmp_path / "trial", tmp_path / "ran"
    checkpoint.save(folder, {"step": 1})
    tree, members = CRAFTED[how](ran)
    crafted(folder / "checkpoint-001-000002.zip", tree, **members)

    with pytest.warns(UserWarning, match="checkpoint-001-000002.zip is damaged"):
        assert checkpoint.load(folder) == {"step": 1}
    assert not ran.exists()


def test_the_crafted_payloads_would_run_if_they_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..", "a\\..\\out"])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("fine", "x")
        archive.writestr(zipfile.ZipInfo(name), "x")
    with pytest.raises(ValueError, match="would land outside"):
        checkpoint.unpack_folder(tmp_path / "evil.zip", tmp_path / "deep" / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.zip"]


def test_a_link_in_an_archive_becomes_a_plain_file(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    checkpoint.unpack_folder(tmp_path / "evil.zip", tmp_path / "to")
    assert not (tmp_path / "to" / "link").is_symlink()
    assert (tmp_path / "to" / "link").read_text() == "/etc/passwd"
