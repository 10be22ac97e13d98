from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import gp, inducing, scale_shift
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Layout
from bo.surrogates.inducing import InducingGP
from search_spaces import Choice, Fidelity, Mixture, Real, Space

FLAT = Space(**{f"x{i}": Real(0, 1) for i in range(4)})
MIXED = Space(
    lr=Real(1e-4, 1e-2, log=True), kind=Choice({"a": {"b": Real(0, 1)}, "c": {}}), data=Mixture("p", "q", "r")
)
SPACES = pytest.mark.parametrize("space", [FLAT, MIXED], ids=["flat", "mixed"])


def drawn(space: Space, n: int, seed: int = 0) -> Inputs:
    return seen(space, torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(seed), n))))


def seen(space: Space, X: Tensor) -> Inputs:
    return Features(space)(X, torch.zeros(len(X), 0, dtype=torch.float64), torch.zeros(len(X), dtype=torch.long))


def outcomes(inputs: Inputs, seed: int = 0) -> Tensor:
    """Two smooth metrics with a little noise: n x 2."""
    x = inputs.F
    truth = torch.stack([-(x[:, 0] - 0.4).square() * 8 + x[:, 1], torch.sin(4 * x[:, 0]) - x[:, -1]], dim=-1)
    return truth + 0.05 * torch.as_tensor(np.random.default_rng(seed).standard_normal(truth.shape))


@SPACES
def test_with_every_run_an_inducing_point_it_is_the_exact_process(space: Space) -> None:
    inputs, at = drawn(space, 60), drawn(space, 12, 1)
    Y, features = outcomes(inputs), Features(space)
    exact = gp.fit(features, inputs, Y)
    sparse = InducingGP.given(features, exact.layout, exact.theta, inputs, inputs, Y, 60)
    for mine, its in (
        (sparse.posterior(at), exact.posterior(at)),
        (sparse.joint(at, 3), exact.joint(at, 3)),
        (sparse.leave_one_out(), exact.leave_one_out()),
        ((sparse.covariance(at, inputs),), (exact.covariance(at, inputs),)),
        (sparse.believe(at).posterior(at), exact.believe(at).posterior(at)),
        (sparse.believe(at.rows(torch.arange(3))).joint(at, 4), exact.believe(at.rows(torch.arange(3))).joint(at, 4)),
    ):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@SPACES
def test_what_is_left_open_of_a_run_is_noise_of_its_own(space: Space) -> None:
    inputs, at = drawn(space, 50), drawn(space, 9, 1)
    Y, features = outcomes(inputs), Features(space)
    exact = gp.fit(features, inputs, Y)
    hyper, layout, points = exact.hyper, exact.layout, inputs.rows(torch.arange(0, 50, 4))
    sparse = InducingGP.given(features, layout, exact.theta, points, inputs, Y, 50)
    cross, K = (scale_shift.kernel(points, other, hyper, layout) for other in (inputs, points))
    K = K + inducing.JITTER * hyper.amplitude[:, None, None] * torch.eye(len(points), dtype=torch.float64)
    low_rank = cross.mT @ torch.linalg.solve(K, cross)
    open = scale_shift.diagonal(inputs, hyper, layout) - low_rank.diagonal(dim1=-2, dim2=-1)
    inverse = torch.linalg.inv(low_rank + torch.diag_embed(open + hyper.noise[:, None]))
    to = scale_shift.kernel(points, at, hyper, layout).mT @ torch.linalg.solve(K, cross)
    torch.testing.assert_close(
        sparse.posterior(at)[0], (to @ inverse @ Y.T[..., None]).squeeze(-1), rtol=1e-5, atol=1e-6
    )
    variance = scale_shift.diagonal(at, hyper, layout) - ((to @ inverse) * to).sum(-1)
    torch.testing.assert_close(sparse.posterior(at)[1], variance, rtol=1e-5, atol=1e-6)
    share = inverse.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(sparse.leave_one_out()[1], (1 / share).T, rtol=1e-5, atol=1e-6)
    left_out = Y - ((inverse @ Y.T[..., None]).squeeze(-1) / share).T
    torch.testing.assert_close(sparse.leave_one_out()[0], left_out, rtol=1e-5, atol=1e-6)


def test_points_can_be_asked_with_gradients_believed_or_not() -> None:
    inputs = drawn(FLAT, 80)
    model = inducing.fit(Features(FLAT), inputs, outcomes(inputs), inducing=20, subset=40)
    at = drawn(FLAT, 4, 1)
    for each in (model, model.believe(drawn(FLAT, 2, 2)).believe(drawn(FLAT, 1, 3))):

        def value(F: Tensor, each: InducingGP = each) -> Tensor:
            points = replace(at, F=F)
            mean, variance = each.posterior(points)
            return torch.stack([mean.sum(), variance.sum(), each.joint(points, 2)[1].sum()])

        assert torch.autograd.gradcheck(value, at.F.clone().requires_grad_(), atol=1e-6)


def test_believing_shrinks_variances_and_changes_no_mean() -> None:
    inputs, at = drawn(FLAT, 120), drawn(FLAT, 6, 1)
    model = inducing.fit(Features(FLAT), inputs, outcomes(inputs), inducing=15, subset=60)
    believed = model.believe(at.rows(torch.arange(2))).believe(at.rows(torch.arange(2, 3)))
    (mean, variance), (same, less) = model.posterior(at), believed.posterior(at)
    assert torch.equal(mean, same)
    assert (less <= variance + 1e-12).all()
    assert (less[:, :3] < 0.02 * variance[:, :3].clamp_min(model.noise[:, None])).all()
    assert (less[:, 3:] > 0.05 * variance[:, 3:]).all()


def test_many_runs_through_few_points_are_better_than_few_runs() -> None:
    inputs, at = drawn(FLAT, 1500), drawn(FLAT, 300, 1)
    Y = outcomes(inputs) + 0.5 * torch.as_tensor(np.random.default_rng(5).standard_normal((1500, 2)))
    features = Features(FLAT)
    model = inducing.fit(features, inputs, Y, inducing=80, subset=150)
    few = gp.fit(features, inputs.rows(torch.arange(150)), Y[:150])
    truth = outcomes(at, 7)
    errors = [(each.posterior(at)[0] - truth.T).square().mean().sqrt() for each in (model, few)]
    assert errors[0] < 0.75 * errors[1]


def test_runs_of_several_scales_are_seen_through_points_of_several_scales() -> None:
    space = Space(
        lr=Real(2.0**-10, 1.0, log=True),
        b=Real(0, 1),
        fidelity=Fidelity(params=(1e5, 4e5, 1.6e6), tokens=(1e6,), target={"params": 1.6e6, "tokens": 1e6}),
    )
    rng = np.random.default_rng(0)
    X, cell = torch.as_tensor(space.encode_all(space.sample(rng, 240))), torch.arange(240) % 3
    S = torch.stack([2.0 * (cell - 2.0), torch.zeros(240)], dim=-1).to(torch.float64)
    inputs = Features(space)(X, S, cell)
    Y = -(X[:, :1] - 0.5 + 0.03 * S[:, :1]).square() * 10 + X[:, 1:]
    model = inducing.fit(Features(space), inputs, Y, inducing=60, subset=90)
    assert model.layout.across
    assert float((model.posterior(inputs)[0].T - Y).square().mean().sqrt()) < 0.1 * float(Y.std())


def test_a_warm_start_with_hardly_more_runs_keeps_the_hyperparameters() -> None:
    inputs = drawn(FLAT, 210)
    Y, features = outcomes(inputs), Features(FLAT)
    first = inducing.fit(features, inputs.rows(torch.arange(200)), Y[:200], inducing=20, subset=50)
    memory = json.loads(json.dumps(first.memory()))
    again = inducing.fit(features, inputs.rows(torch.arange(205)), Y[:205], memory, inducing=20, subset=50)
    torch.testing.assert_close(again.theta, first.theta, rtol=0, atol=1e-6)
    assert again.runs == 200
    assert inducing.fit(features, inputs, Y, memory, inducing=20, subset=50).runs == 210


def test_inducing_points_are_the_best_runs_and_others_that_tell_most() -> None:
    inputs = drawn(FLAT, 100)
    Y = outcomes(inputs)
    order = inducing.leading(Y, 40)
    assert len(set(order.tolist())) == 40
    assert order[:10].tolist() == torch.argsort(Y.sum(-1), descending=True)[:10].tolist()
    layout = Layout.of(Features(FLAT), inputs, across=False)
    hyper = layout.hyper(torch.as_tensor(layout.vector()[None]))
    chosen = inducing.spread(inputs, hyper, layout, 30)
    assert len(set(chosen.tolist())) == 30
    K = scale_shift.kernel(inputs, inputs, hyper, layout)[0]

    def open(rows: Tensor) -> float:
        return float((K.diagonal() - (K[:, rows] @ torch.linalg.solve(K[rows][:, rows], K[rows])).diagonal()).sum())

    assert open(chosen) < open(torch.arange(30))


def test_copies_of_one_run_are_one_inducing_point() -> None:
    inputs = drawn(FLAT, 30)
    copies = inputs.rows(torch.arange(30).repeat(4))
    model = inducing.fit(Features(FLAT), copies, outcomes(copies), inducing=60, subset=50)
    assert len(model.points) <= 30
    assert torch.isfinite(torch.cat(model.posterior(inputs))).all()


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e12])
def test_outcomes_of_any_size_and_ties_give_finite_answers(factor: float) -> None:
    inputs = drawn(FLAT, 60)
    model = inducing.fit(Features(FLAT), inputs, factor * outcomes(inputs), inducing=20, subset=40)
    for found in (*model.posterior(inputs), *model.leave_one_out()):
        assert torch.isfinite(found).all()
