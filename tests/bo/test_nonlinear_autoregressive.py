"""A scale as a function of the one below: what it learns, against target-only models and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import gp, nonlinear_autoregressive
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.nonlinear_autoregressive import Chain, Chained, Level
from bo.surrogates.process import Process
from search_spaces import Fidelity, Real, Space

SPACE = Space(
    x=Real(0.0, 1.0),
    fidelity=Fidelity(params=Real(1e4, 1e7), tokens=(1e6,), target={"params": 1e7, "tokens": 1e6}),
)
FEATURES = Features(SPACE)
Curve = Callable[[Tensor], Tensor]
GRID = torch.linspace(0, 1, 101, dtype=torch.float64)


def at(x: Tensor, place: float = 0.0, cell: int = 1) -> Inputs:
    S = torch.tensor([[place, 0.0]], dtype=torch.float64).expand(len(x), -1)
    return FEATURES(x[:, None], S, torch.full((len(x),), cell))


def low(x: Tensor) -> Tensor:
    return torch.sin(8 * math.pi * x)


def high(x: Tensor) -> Tensor:
    """The example of Perdikaris et al. 2017, section 3a, where the scales are uncorrelated."""
    return (x - math.sqrt(2)) * low(x).square()


def other(x: Tensor) -> Tensor:
    return torch.cos(5 * x + 1) + 0.5 * torch.cos(13 * x)


@cache
def told(source: Curve, target: Curve, few: int, many: int = 40, seed: int = 0) -> tuple[Inputs, Tensor]:
    """`many` runs of the source four octaves below the target, and `few` other runs there."""
    x = torch.rand(many + few, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = at(x[:many], -4.0, 0).join(at(x[many:]))
    return inputs, torch.cat([source(x[:many]), target(x[many:])])[:, None]


@cache
def fitted(source: Curve, target: Curve, few: int, seed: int = 0) -> Process:
    made = nonlinear_autoregressive.fit(FEATURES, *told(source, target, few, seed=seed))
    assert isinstance(made, Process)
    return made


def alone(source: Curve, target: Curve, few: int, seed: int = 0) -> GaussianProcess:
    inputs, Y = told(source, target, few, seed=seed)
    return gp.fit(FEATURES, inputs.rows(inputs.cell == 1), Y[inputs.cell == 1])


def error(made: Process | GaussianProcess, truth: Curve) -> float:
    with torch.no_grad():
        return float((made.mean(at(GRID))[0] - truth(GRID)).square().mean().sqrt())


def against_alone(source: Curve, target: Curve, few: int) -> float:
    """Its error over that of the usual process of the target runs, the median over seeds."""
    ratios = [
        error(fitted(source, target, few, seed), target) / error(alone(source, target, few, seed), target)
        for seed in range(5)
    ]
    return float(np.median(ratios))


def chain(made: Process) -> Chain:
    assert isinstance(made, Chained)
    return made.chain


# --------------------------------------------------------------------------------------------------------- learning


def test_a_quadratic_relation_of_uncorrelated_scales_is_learned() -> None:
    assert against_alone(low, high, 14) < 0.5


def test_a_scale_like_the_one_below_is_known_after_few_runs() -> None:
    assert against_alone(other, lambda x: other(x) + 0.3 * x, 3) < 0.3


def test_the_opposite_of_the_scale_below_helps_as_well() -> None:
    assert against_alone(other, lambda x: -other(x), 5) < 0.3


def test_a_scale_that_has_nothing_to_do_with_it_does_no_harm() -> None:
    assert against_alone(low, other, 5) <= 1.05
    assert against_alone(low, other, 10) <= 1.05


def test_a_level_that_is_likelier_without_the_one_below_is_the_usual_process() -> None:
    made, usual = fitted(low, other, 10), alone(low, other, 10)
    assert not chain(made).steps[1].covariance.related
    with torch.no_grad():
        for found, expected in zip(made.posterior(at(GRID)), usual.posterior(at(GRID)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_three_levels_are_learned_one_from_the_other() -> None:
    x = torch.rand(52, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [(other, -6.0, 30), (lambda x: other(x).square(), -3.0, 15), (lambda x: 0.5 - other(x).square(), 0.0, 7)]
    inputs, Y = at(x[:0]), []
    for k, (curve, place, n) in enumerate(parts):
        here, x = x[:n], x[n:]
        inputs = inputs.join(at(here, place, k))
        Y.append(curve(here))
    made = nonlinear_autoregressive.fit(FEATURES, inputs, torch.cat(Y)[:, None])
    assert isinstance(made, Process)
    assert [step.covariance.related for step in chain(made).steps] == [False, True, True]
    assert error(made, parts[-1][0]) < 0.5 * error(gp.fit(FEATURES, at(here), Y[-1][:, None]), parts[-1][0])


def test_without_runs_at_the_target_it_is_as_the_nearest_scale() -> None:
    inputs, Y = told(low, high, 14)
    here = inputs.cell == 1
    moved = inputs.rows(~here).join(at(inputs.F[here, 0], -1.0))
    made = nonlinear_autoregressive.fit(FEATURES, moved, Y)
    assert torch.equal(made.mean(at(GRID, 0.0, 7)), made.mean(at(GRID, -1.0)))


# -------------------------------------------------------------------------------------------------------- posterior


def test_moments_are_those_of_many_draws_through_the_level_below() -> None:
    made = fitted(low, high, 6)
    bottom, top = chain(made).steps
    points = at(torch.tensor([0.02, 0.31, 0.77, 0.99], dtype=torch.float64))
    with torch.no_grad():
        mean, variance = made.posterior(points)
        f, spread, _ = bottom.moments(bottom.covariance.points(points.F, chain(made).nothing(points.F)))
        z = torch.randn(2, 20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        below = f + spread.sqrt() * z[0]
        g, rest, _ = top.moments(top.covariance.points(points.F, below[..., None]))
        drawn = (g + rest.sqrt() * z[1])[0]
    assert mean[0].tolist() == pytest.approx(drawn.mean(0).tolist(), abs=0.03 * float(drawn.std()))
    assert variance[0].tolist() == pytest.approx(drawn.var(0).tolist(), rel=0.1)


def test_covariances_are_about_those_of_joint_draws_through_the_level_below() -> None:
    made = fitted(other, lambda x: other(x).square(), 5)
    bottom, top = chain(made).steps
    assert top.covariance.related
    x = torch.tensor([0.02, 0.05, 0.5, 0.53, 0.97], dtype=torch.float64)
    points = at(x)
    generator = torch.Generator().manual_seed(0)

    def drawn(level: Level, f: Tensor) -> Tensor:
        seen = level.covariance.points(points.F, f)
        mean, _, half = level.moments(seen)
        joint = level.covariance(seen, seen) - half.mT @ half
        root = torch.linalg.cholesky(joint + 1e-9 * torch.eye(5, dtype=torch.float64))
        z = torch.randn(1, 4000, 5, 1, generator=generator, dtype=torch.float64)
        return mean + (root @ z).squeeze(-1)

    with torch.no_grad():
        f = drawn(bottom, chain(made).nothing(points.F))
        sample = torch.cov(drawn(top, f[..., None])[0].T)
        found = made.covariance(points, points)[0]
    sd = sample.diagonal().sqrt()
    torch.testing.assert_close(found.diagonal().sqrt(), sd, rtol=0.1, atol=0)
    torch.testing.assert_close(found, sample, rtol=0, atol=0.05 * float(sd.max()) ** 2)


def test_slopes_in_the_level_below_are_those_of_the_relation() -> None:
    made = fitted(other, lambda x: 1 - 2 * other(x), 7)
    (_, _, nothing), (_, _, slope) = chain(made).through(at(GRID).F)
    assert (nothing == 0).all()
    assert slope[0].tolist() == pytest.approx([-2.0] * len(GRID), abs=0.2)


def test_gradients_through_two_levels_agree_with_differences() -> None:
    made = fitted(low, high, 14)
    x = torch.tensor([0.11, 0.42, 0.83], dtype=torch.float64, requires_grad=True)
    for part in range(2):
        (gradient,) = torch.autograd.grad(made.posterior(at(x))[part].sum(), x)
        with torch.no_grad():
            up, down = (made.posterior(at(x + step))[part][0] for step in (1e-6, -1e-6))
        torch.testing.assert_close(gradient, (up - down) / 2e-6, rtol=1e-3, atol=1e-4)


def test_a_run_believed_below_tells_of_the_target_and_the_other_way_round() -> None:
    made = fitted(other, lambda x: other(x).square(), 5)
    gap, x = torch.tensor([0.0], dtype=torch.float64), told(other, high, 5)[0].F[:40, 0]
    assert (x - gap).abs().min() > 0.005
    with torch.no_grad():
        for place, away in ((0.0, -4.0), (-4.0, 0.0)):
            before = made.posterior(at(gap, place, int(place == 0)))[1]
            after = made.believe(at(gap, away, int(away == 0))).posterior(at(gap, place, int(place == 0)))[1]
            assert float(after) < float(before)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    inputs, Y = told(low, high, 14)
    again = nonlinear_autoregressive.fit(FEATURES, inputs, Y, fitted(low, high, 14).memory())
    with torch.no_grad():
        torch.testing.assert_close(again.mean(at(GRID)), fitted(low, high, 14).mean(at(GRID)), rtol=0, atol=0.02)
