from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.acquisition.cost import log_cost, term
from search_spaces import Integer, Real, Space

SPACE = Space(layers=Integer(1, 16), lr=Real(1e-4, 1e-2, log=True))
NOWHERE = torch.zeros(0, dtype=torch.float64)


def fitted(seconds: Tensor, X: Tensor) -> Callable[[Tensor], Tensor]:
    n = len(X)
    S, cell = torch.zeros(n, 0, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    return log_cost(SPACE, X, S, cell, seconds, NOWHERE, 0)


def runs(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Encoded configs, and seconds that grow exponentially with layers."""
    rng = np.random.default_rng(seed)
    X = torch.as_tensor(SPACE.encode_all(SPACE.sample(rng, n)))
    return X, 10 * torch.exp(3 * X[:, 0] + 0.05 * torch.as_tensor(rng.standard_normal(n)))


def utility(X: Tensor) -> Tensor:
    return -20 * (X[:, 0] - 0.7).square() - 5 * (X[:, 1] - 0.5).square()


def test_the_logarithm_of_seconds_is_learned() -> None:
    model = fitted(*reversed(runs(20)))
    X, _ = runs(30, 1)
    error = model(X) - (math.log(10) + 3 * X[:, 0])
    assert float(error.abs().median()) < 0.1
    at = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(at).sum(), at)
    assert float(slope[:, 0].median()) == pytest.approx(3, abs=0.8)


def test_doubling_every_cost_halves_the_utility_and_leaves_the_arg_max() -> None:
    X, seconds = runs(15)
    grid = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once, twice = (utility(grid) + term(fitted(factor * seconds, X))(grid) for factor in (1, 2))
    assert torch.allclose(once - twice, torch.full_like(once, math.log(2)), atol=1e-6)
    assert int(once.argmax()) == int(twice.argmax())


def test_cooling_goes_from_per_cost_to_plain_improvement() -> None:
    X, seconds = runs(15)
    model = fitted(seconds, X)
    grid = torch.cartesian_prod(torch.linspace(0, 1, 41, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    best = [float(grid[(utility(grid) + term(model, alpha)(grid)).argmax(), 0]) for alpha in (1.0, 0.5, 0.0)]
    assert best == sorted(best)
    assert best[0] < best[-1] == pytest.approx(0.7, abs=0.02)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        term(model, 1.5)


@pytest.mark.parametrize("n", [0, 1, 4, 12])
def test_few_or_equal_costs_decide_nothing(n: int) -> None:
    X, _ = runs(n)
    there, _ = runs(7, 2)
    predicted = fitted(torch.full((n,), 30.0, dtype=torch.float64), X)(there)
    assert predicted.shape == (7,)
    assert torch.allclose(predicted, torch.full_like(predicted, math.log(30) if n else 0.0))


@pytest.mark.parametrize("wrong", [0.0, -3.0, math.nan, math.inf])
def test_seconds_that_are_none_are_refused(wrong: float) -> None:
    X, seconds = runs(6)
    seconds[2] = wrong
    with pytest.raises(ValueError, match="finite numbers of seconds above zero"):
        fitted(seconds, X)
