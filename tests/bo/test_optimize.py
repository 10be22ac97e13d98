from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.optimize import maximise, neighbours, settle, sobol_points
from search_spaces import Choice, Integer, Mixture, Real, Space

SPACE = Space(
    lr=Real(1e-4, 1e-2, log=True),
    layers=Integer(1, 12),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}, "lion": {}}),
    data=Mixture("code", "docs", "prose"),
)
NAMES = [column.name for column in SPACE.columns]
NONE = torch.zeros(0, len(NAMES), dtype=torch.float64)


def toy(X: Tensor) -> Tensor:
    """Best at lr 10^-3.2, 7 layers, sgd with momentum 0.6, no docs and code:prose as 0.3:0.7; b x d -> b."""
    at = {name: X[:, i] for i, name in enumerate(NAMES)}
    option = (at["optimizer"] * 3).floor().clamp(max=2)
    z = X[:, [i for i, column in enumerate(SPACE.columns) if column.kind == "share"]]
    w = (z + 1e-9).pow(3) / (z + 1e-9).pow(3).sum(-1, keepdim=True)
    momentum = torch.where(option == 1, -(at["optimizer.sgd.momentum"] * 0.9 - 0.6).square(), -0.5)
    mixture = -(w[:, 0] - 0.3).square() - w[:, 1] - (w[:, 2] - 0.7).square()
    return momentum + mixture - (at["lr"] - 0.4).square() - (at["layers"] - 6.5 / 12).square()


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_known_optimum_is_found_over_a_mixture_a_choice_and_an_integer() -> None:
    config = SPACE.decode(maximise(toy, SPACE, NONE, NONE, rng()).x)
    assert config["optimizer"] == "sgd"
    assert config["momentum"] == pytest.approx(0.6, abs=1e-2)
    assert config["lr"] == pytest.approx(10**-3.2, rel=1e-2)
    assert config["layers"] == 7
    assert config["data"]["docs"] == 0.0
    assert config["data"]["code"] == pytest.approx(0.3, abs=1e-2)


def test_an_option_no_raw_point_favours_is_reached_by_a_single_change() -> None:
    space = Space(x=Real(0, 1), option=Choice(*[f"o{i}" for i in range(40)]))

    def acquisition(X: Tensor) -> Tensor:
        # Option 17 is better only in a sliver that raw points miss, and no slope leads there from the others.
        inside = ((X[:, 1] * 40).floor() == 17).to(torch.float64)
        return -(X[:, 0] - 0.777).square() + 3 * inside * torch.exp(-((X[:, 0] - 0.777) / 0.004).square())

    found = maximise(
        acquisition, space, torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.float64), rng()
    )
    assert space.decode(found.x)["option"] == "o17"


def test_what_is_taken_is_never_returned() -> None:
    taken = NONE
    for _ in range(5):
        found = maximise(toy, SPACE, taken, taken, rng())
        assert found.new
        assert not len(taken) or float((taken - found.x).abs().max(-1).values.min()) >= 1e-3
        taken = torch.cat([taken, found.x[None]])


def test_an_exhausted_space_gives_its_best_point_again_and_says_so() -> None:
    space = Space(a=Choice("x", "y"), b=Integer(1, 2))
    everything = torch.tensor([[a, b] for a in (0.25, 0.75) for b in (0.25, 0.75)], dtype=torch.float64)
    none = torch.zeros(0, 2, dtype=torch.float64)
    found = maximise(lambda X: X.sum(-1), space, none, everything, rng())
    assert not found.new
    assert found.x.tolist() == [0.75, 0.75]
    left = maximise(lambda X: X.sum(-1), space, none, everything[1:], rng())
    assert left.new
    assert left.x.tolist() == [0.25, 0.25]


def test_what_is_found_is_a_fixed_point_of_decode_and_encode() -> None:
    found = maximise(toy, SPACE, NONE, NONE, rng())
    assert np.allclose(SPACE.encode(SPACE.decode(found.x)), found.x, atol=1e-12)


def test_the_same_generator_finds_the_same_point_bit_for_bit() -> None:
    assert torch.equal(maximise(toy, SPACE, NONE, NONE, rng()).x, maximise(toy, SPACE, NONE, NONE, rng()).x)


def test_neighbours_change_one_active_choice_or_integer() -> None:
    x = torch.as_tensor(
        SPACE.encode({"lr": 1e-3, "layers": 5, "optimizer": "lion", "data": {"code": 1, "docs": 0, "prose": 0}})
    )
    configs = SPACE.decode_all(neighbours(SPACE, x).numpy())
    assert {config["layers"] for config in configs if config["optimizer"] == "lion"} >= {4, 6}
    assert {config["optimizer"] for config in configs if config["layers"] == 5} == {"adamw", "sgd"}
    assert torch.equal(settle(SPACE, x[None])[0], x)


def test_a_sobol_sequence_goes_on_where_it_stopped() -> None:
    whole = sobol_points(3, 12, seed=5)
    assert np.array_equal(whole[4:9], sobol_points(3, 5, seed=5, first=4))
