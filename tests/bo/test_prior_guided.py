from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from bo.acquisition.prior_guided import FLOOR, parse, term
from search_spaces import Choice, Integer, Mixture, Real, Space

SPACE = Space(
    lr=Real(1e-5, 1e-1, log=True),
    layers=Integer(1, 8),
    dropout=Real(0.0, 0.5),
    width=Choice(64, 128, 256),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "lion": {}}),
    data=Mixture("code", "docs"),
)
BELIEFS: dict[str, Any] = {
    "lr": {"centre": 3e-4, "spread": 2.0},
    "layers": {"centre": 4, "spread": 1.5},
    "optimizer": {"adamw": 0.8, "lion": 0.2},
    "width": {"128": 0.5},
    "beta": {"centre": 0.9, "spread": 0.02},
}


def encoded(**changes: Any) -> Tensor:
    config = {"lr": 3e-4, "layers": 4, "dropout": 0.1, "width": 128, "optimizer": "adamw", "beta": 0.9}
    config = {**config, "data": {"code": 0.5, "docs": 0.5}, **changes}
    if config["optimizer"] == "lion":
        del config["beta"]
    return torch.as_tensor(SPACE.encode_all([config]))


def test_a_belief_is_densest_at_its_centre_and_falls_by_its_spread() -> None:
    prior = parse(SPACE, {"lr": BELIEFS["lr"]})
    densities = [float(prior.log_density(encoded(lr=lr))) for lr in (3e-4, 6e-4, 1.5e-4, 1.2e-3)]
    assert densities[1] - densities[0] == pytest.approx(-0.5, abs=1e-4)
    assert densities[2] - densities[0] == pytest.approx(-0.5, abs=1e-4)
    assert densities[3] - densities[0] == pytest.approx(-2.0, abs=1e-4)


def test_a_density_on_a_linear_range_is_in_its_units_and_sums_to_one() -> None:
    prior = parse(SPACE, {"dropout": {"centre": 0.1, "spread": 0.1}})
    column = [c.name for c in SPACE.columns].index("dropout")
    X = encoded()

    def density(u: float) -> float:
        X[0, column] = u
        return math.exp(float(prior.log_density(X)))

    assert quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-5)
    assert density(0.2) / density(0.4) == pytest.approx(math.exp(0.5), rel=1e-4)


def test_options_have_their_probabilities_and_those_not_named_share_the_rest() -> None:
    prior = parse(SPACE, {"width": {"128": 0.5}})
    densities = [float(prior.log_density(encoded(width=width))) for width in (64, 128, 256)]
    assert densities == pytest.approx([math.log(0.25 * 3), math.log(0.5 * 3), math.log(0.25 * 3)], abs=1e-5)


def test_a_belief_about_a_parameter_counts_only_where_the_parameter_does() -> None:
    prior = parse(SPACE, {"beta": BELIEFS["beta"]})
    assert float(prior.log_density(encoded(optimizer="lion"))) == 0
    assert float(prior.log_density(encoded(beta=0.9))) > 1
    assert float(prior.log_density(encoded(beta=0.8))) < -3


def test_the_power_of_a_belief_is_beta_over_the_runs_told() -> None:
    prior = parse(SPACE, BELIEFS)
    X = torch.cat([encoded(), encoded(lr=1e-2), encoded(optimizer="lion")])
    density = prior.log_density(X)
    for told, beta in ((1, 10.0), (5, 10.0), (40, 3.0)):
        assert torch.allclose(term(prior, told, beta)(X), beta / told * density)
    assert torch.allclose(term(prior, 0)(X), 10 * density)
    assert torch.allclose(term(prior, 10**9)(X), torch.zeros(3, dtype=torch.float64), atol=1e-6)


def test_a_wrong_belief_is_outvoted() -> None:
    space = Space(lr=Real(1e-5, 1e-1, log=True))
    prior = parse(space, {"lr": {"centre": 1e-5, "spread": 2.0}})
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]

    def log_utility(X: Tensor) -> Tensor:
        return -0.5 * ((X[:, 0] - 0.75) / 0.05).square()

    best = [float(grid[(log_utility(grid) + term(prior, told)(grid)).argmax()]) for told in (1, 10, 100, 1000)]
    assert best[0] < 0.5
    assert best == sorted(best)
    assert best[-1] == pytest.approx(0.75, abs=0.005)


def test_slopes_agree_with_differences_and_no_value_is_ruled_out() -> None:
    prior = parse(SPACE, BELIEFS)
    X = torch.as_tensor(SPACE.encode_all(SPACE.sample(np.random.default_rng(0), 20))).requires_grad_()
    (slope,) = torch.autograd.grad(prior.log_density(X).sum(), X)
    assert torch.isfinite(slope).all()
    step = torch.zeros(X.shape[1], dtype=torch.float64)
    step[0] = 1e-6
    with torch.no_grad():
        expected = (prior.log_density(X + step) - prior.log_density(X - step)) / 2e-6
        assert torch.allclose(slope[:, 0], expected, rtol=1e-4, atol=1e-5)
        far = parse(SPACE, {"lr": {"centre": 1e-5, "spread": 1.01}}).log_density(encoded(lr=1e-1))
    assert float(far) == pytest.approx(math.log(FLOOR))


@pytest.mark.parametrize(
    ("beliefs", "message"),
    [
        ({}, "must be a dictionary from names to beliefs"),
        ({"layer": {"centre": 1, "spread": 2}}, "did you mean 'layers'"),
        ({"data": {"code": 0.5}}, "a Mixture; only numbers and choices"),
        ({"lr": 3e-4}, "must be a dictionary, got"),
        ({"lr": {"centre": 3e-4}}, "needs a centre and a spread"),
        ({"lr": {"centre": 1.0, "spread": 2.0}}, r"must be a number in \[1e-05, 0.1\], got 1.0"),
        ({"lr": {"centre": 3e-4, "spread": 0.5}}, "must be a factor above 1, got 0.5"),
        ({"dropout": {"centre": 0.1, "spread": 0}}, "must be a finite number above 0, got 0"),
        ({"layers": {"centre": 2.5, "spread": 1}}, "must be a whole number"),
        ({"optimizer": {"adam": 0.8}}, "did you mean 'adamw'"),
        ({"optimizer": {"adamw": 0.8, "lion": 0.3}}, "must sum to 1"),
        ({"optimizer": {"adamw": 0.3, "lion": 0.3}}, "must sum to 1"),
        ({"optimizer": {"adamw": 1.0}}, "must leave some of 1 for"),
        ({"optimizer": {"adamw": 0.0}}, "must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_belief_that_the_space_cannot_hold_is_refused(beliefs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(SPACE, beliefs)


def test_a_belief_cannot_weigh_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="needs beta to be a finite number of at least 0"):
        term(parse(SPACE, BELIEFS), 3, beta=-1)
