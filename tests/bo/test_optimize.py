from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import optimize
from bo.optimize import Acquisition, ascend, maximise, neighbours, settle
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


def test_an_ascent_that_rounding_takes_out_of_the_cube_is_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As L-BFGS-B was seen to do at a bound, once in thousands of searches: by -4e-19."""
    search = optimize.minimize

    def rounded(loss: Any, start: np.ndarray, **settings: Any) -> Any:
        found = search(lambda x: loss(x - 4e-19), start, **settings)
        found.x = found.x - 4e-19
        return found

    monkeypatch.setattr(optimize, "minimize", rounded)
    space = Space(a=Real(0.0, 1.0), b=Real(0.0, 1.0))
    ends = ascend(lambda X: -X.sum(-1), space, torch.full((2, 2), 0.5, dtype=torch.float64))
    assert torch.equal(ends, torch.zeros(2, 2, dtype=torch.float64))


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


# ----------------------------------------------------------------------------------------- within what is allowed


def on_disc(config: Mapping[str, Any]) -> bool:
    return bool(config["x"] ** 2 + config["y"] ** 2 <= 0.5)


def few_layers_for_sgd(config: Mapping[str, Any]) -> bool:
    return config["optimizer"] != "sgd" or config["layers"] <= 5


def none(space: Space) -> Tensor:
    return torch.zeros(0, len(space.columns), dtype=torch.float64)


def near(*goal: float) -> Acquisition:
    """Best at a point, and worse with the squared distance."""
    return lambda X: -(X - torch.tensor(goal, dtype=torch.float64)).square().sum(-1)


@pytest.mark.parametrize(
    ("constraints", "goal", "best"),
    [
        (["x + 2 * y <= 1"], (0.9, 0.8, 0.3), (0.6, 0.2, 0.3)),
        (["x + y <= 1", "x - y <= 0.2"], (0.95, 0.3, 0.3), (0.6, 0.4, 0.3)),
        (["x + y + z <= 1", "x + y + z >= 0.98"], (0.5, 0.4, 0.6), (1 / 3, 7 / 30, 13 / 30)),
        ([on_disc], (0.9, 0.6, 0.3), (0.58835, 0.39223, 0.3)),
    ],
    ids=["an edge", "a corner", "a slab", "a predicate"],
)
def test_an_optimum_on_the_border_of_what_is_allowed_is_found(
    constraints: list[object], goal: tuple[float, ...], best: tuple[float, ...]
) -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1), z=Real(0, 1), constraints=constraints)
    found = maximise(near(*goal), space, none(space), none(space), rng())
    (least,) = near(*goal)(torch.tensor([best], dtype=torch.float64)).tolist()
    assert found.value == pytest.approx(least, abs=1e-3)
    assert found.x.tolist() == pytest.approx(best, abs=1e-3 if isinstance(constraints[0], str) else 1e-2)
    assert space.satisfies([space.decode(found.x)]).all()


def test_integers_on_a_border_are_as_large_as_they_may_be() -> None:
    space = Space(batch=Integer(1, 256, log=True), steps=Integer(1, 64), constraints=["batch * steps <= 512"])
    config = space.decode(maximise(lambda X: X.sum(-1), space, none(space), none(space), rng()).x)
    assert config["batch"] * config["steps"] == 512


ALLOWED = {
    "inequalities and a predicate": Space(
        lr=Real(1e-4, 1e-2, log=True),
        layers=Integer(1, 12),
        heads=Integer(1, 12, log=True),
        optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
        constraints=["layers * heads <= 20", "lr * layers >= 0.002", few_layers_for_sgd],
    ),
    "caps": Space(lr=Real(0, 1), data=Mixture("a", "b", "c", "d", cap={"a": 0.3, "b": 0.4}, floor={"c": 0.1})),
    "few sources": Space(lr=Real(0, 1), data=Mixture("a", "b", "c", "d", "e", cap=0.5, max_domains=3)),
    "all of it": Space(
        x=Real(0, 1),
        y=Real(0, 1),
        size=Choice("s", "m", "l", ordered=True),
        data=Mixture("a", "b", "c", "d", cap=0.6, fixed={"d": 0.1}, max_domains=3),
        constraints=["x + y <= 0.3", on_disc],
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_whatever_is_asked_for_what_is_found_is_allowed(name: str) -> None:
    space = ALLOWED[name]
    taken = none(space)
    for seed in range(6):
        generator = np.random.default_rng(seed)
        slope = torch.as_tensor(generator.standard_normal(len(space.columns)))
        found = maximise(lambda X, slope=slope: X @ slope, space, taken, taken, generator)
        config = space.decode(found.x)
        assert space.validate(config) == config
        assert space.satisfies([config]).all()
        assert np.allclose(space.encode(config), found.x, atol=1e-7)
        assert found.new
        taken = torch.cat([taken, found.x[None]])


@pytest.mark.parametrize("name", ALLOWED)
def test_the_same_generator_finds_the_same_allowed_point(name: str) -> None:
    space = ALLOWED[name]
    first, second = (maximise(lambda X: X.sum(-1), space, none(space), none(space), rng()).x for _ in range(2))
    assert torch.equal(first, second)


def test_shares_rise_to_their_caps_and_the_rest_goes_where_it_is_worth_most() -> None:
    space = Space(data=Mixture("a", "b", "c", "d", cap={"a": 0.3, "b": 0.4}))

    def acquisition(X: Tensor) -> Tensor:
        w = (X + 1e-9).pow(3) / (X + 1e-9).pow(3).sum(-1, keepdim=True)
        return w @ torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)

    config = space.decode(maximise(acquisition, space, none(space), none(space), rng()).x)
    assert config["data"] == pytest.approx({"a": 0.3, "b": 0.4, "c": 0.3, "d": 0.0}, abs=1e-3)


def test_points_that_are_not_allowed_are_never_asked_about() -> None:
    space = ALLOWED["few sources"]
    asked: list[Tensor] = []

    def acquisition(X: Tensor) -> Tensor:
        asked.append(X.detach())
        return X.sum(-1)

    maximise(acquisition, space, none(space), none(space), rng())
    w = torch.cat(asked)[:, 1:].pow(3)
    assert torch.allclose(w.sum(-1), torch.ones(len(w), dtype=torch.float64))
    assert float(w.max()) < 0.5 + 1e-9
    assert int((w > 0).sum(-1).max()) <= 3


def test_a_small_constrained_space_is_exhausted_and_says_so() -> None:
    space = Space(a=Integer(1, 3), b=Integer(1, 3), constraints=["a * b <= 2"])  # (1, 1), (1, 2), (2, 1)
    taken = none(space)
    for _ in range(3):
        found = maximise(lambda X: X.sum(-1), space, none(space), taken, rng())
        assert found.new
        taken = torch.cat([taken, found.x[None]])
    assert {(c["a"], c["b"]) for c in space.decode_all(taken.numpy())} == {(1, 1), (1, 2), (2, 1)}
    assert not maximise(lambda X: X.sum(-1), space, none(space), taken, rng()).new


def test_a_predicate_that_next_to_nothing_satisfies_is_not_asked_for_hundreds_of_points() -> None:
    asked = []

    def one_in_a_thousand(config: Mapping[str, Any]) -> bool:
        asked.append(config)
        return bool(abs(config["x"] - 0.7) < 5e-4)

    space = Space(x=Real(0, 1), y=Real(0, 1), constraints=[one_in_a_thousand])
    asked.clear()
    found = maximise(near(0.7, 0.2), space, none(space), none(space), rng())
    assert found.x.tolist() == pytest.approx([0.7, 0.2], abs=1e-3)
    assert len(asked) < 250_000  # RAW points of it would take twice as many
