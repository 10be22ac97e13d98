"""Checkpoints: what goes in comes out, whole, or the one before it does."""

import math

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
