from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import gp, scale_shift
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess, LogPosterior
from bo.surrogates.hyperparameters import Layout, NumericalError
from bo.surrogates.scale_shift import ScaleShiftGP
from search_spaces import Choice, Mixture, Real, Space

FLAT = Space(**{f"x{i}": Real(0, 1) for i in range(6)})
MIXED = Space(lr=Real(1e-4, 1e-2, log=True), kind=Choice(["a", "b", "c"]), data=Mixture("p", "q", "r", "s"))
SPACES = pytest.mark.parametrize("space", [FLAT, MIXED], ids=["flat", "mixed"])


def drawn(space: Space, n: int, seed: int = 0) -> tuple[Tensor, Inputs, Tensor]:
    """Encoded points, what the kernel sees of them, and two noisy metrics."""
    rng = np.random.default_rng(seed)
    X = torch.as_tensor(space.encode_all(space.sample(rng, n)))
    inputs = seen(space, X)
    return X, inputs, torch.sin(3 * inputs.F[:, :1]) + 0.1 * torch.as_tensor(rng.standard_normal((n, 2)))


def seen(space: Space, X: Tensor) -> Inputs:
    return Features(space)(X, torch.zeros(len(X), 0, dtype=torch.float64), torch.zeros(len(X), dtype=torch.long))


def both(space: Space, n: int = 40) -> tuple[GaussianProcess, ScaleShiftGP]:
    """The closed form, and the model of all scales with the same hyperparameters."""
    _, inputs, Y = drawn(space, n)
    closed = gp.fit(Features(space), inputs, Y)
    return closed, ScaleShiftGP.given(Features(space), closed.layout, closed.theta, inputs, Y)


@SPACES
def test_the_closed_form_of_the_likelihood_and_its_gradient_agree_with_the_model_of_all_scales(space: Space) -> None:
    _, inputs, Y = drawn(space, 40)
    layout = Layout.of(Features(space), inputs, across=False)
    assert layout.bent == (space is MIXED)
    theta = np.tile(layout.vector(), (2, 1))
    theta += 0.3 * np.random.default_rng(1).standard_normal(theta.shape)
    value, gradient = LogPosterior(layout, inputs.F.numpy(), Y.numpy()).loss(theta.reshape(-1))
    raw = torch.tensor(theta, requires_grad=True)
    reference = -scale_shift.Target.of(inputs, Y, layout).log_posterior(raw).sum()
    (slope,) = torch.autograd.grad(reference, raw)
    assert value == pytest.approx(reference.item(), abs=1e-9)
    np.testing.assert_allclose(gradient, slope.numpy().reshape(-1), rtol=1e-8, atol=1e-8)


@SPACES
def test_the_posterior_and_its_gradient_agree_with_the_model_of_all_scales(space: Space) -> None:
    closed, reference = both(space)
    X = drawn(space, 7, 1)[0].requires_grad_()
    weight = torch.as_tensor(np.random.default_rng(2).standard_normal((2, 2, 7)))
    slopes = []
    for model in (closed, reference):
        mean, variance = model.posterior(seen(space, X))
        slopes.append(torch.autograd.grad((weight[0] * mean + weight[1] * variance).sum(), X)[0])
        apart = closed.posterior(seen(space, X.detach()))
        torch.testing.assert_close(mean.detach(), apart[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(variance.detach(), apart[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-9)


@SPACES
def test_what_is_believed_jointly_and_left_out_agrees_with_the_model_of_all_scales(space: Space) -> None:
    closed, reference = both(space)
    Z, others = seen(space, drawn(space, 6, 3)[0]), seen(space, drawn(space, 4, 4)[0])
    for one, other in zip(closed.joint(Z, 3), reference.joint(Z, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(closed.covariance(Z, others), reference.covariance(Z, others), rtol=1e-9, atol=1e-10)
    for one, other in zip(closed.leave_one_out(), reference.leave_one_out(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    believed, expected = closed.believe(Z).believe(others), reference.believe(Z).believe(others)
    for one, other in zip(believed.posterior(Z), expected.posterior(Z), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_hyperparameters_of_many_runs_are_kept_until_there_are_more() -> None:
    _, inputs, Y = drawn(FLAT, 130)
    first = gp.fit(Features(FLAT), inputs.rows(torch.arange(120)), Y[:120])
    kept = gp.fit(Features(FLAT), inputs.rows(torch.arange(122)), Y[:122], first.memory())
    again = gp.fit(Features(FLAT), inputs, Y, first.memory())
    assert torch.allclose(kept.theta, first.theta, atol=1e-5)
    assert kept.runs == 120
    assert again.runs == 130
    assert not torch.allclose(again.theta, first.theta, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_taken_for_short_lengthscales_whatever_was_believed_of_fewer_runs(seed: int) -> None:
    _, inputs, _ = drawn(FLAT, 90, seed)
    noise = 0.8 * torch.as_tensor(np.random.default_rng(seed + 5).standard_normal((90, 1)))
    Y = torch.sin(5 * inputs.F[:, :1]) + noise
    Y = (Y - Y.mean()) / Y.std()
    cold = gp.fit(Features(FLAT), inputs, Y)
    assert float(cold.noise) > 0.2
    fooled = {"metrics": [{"noise": [-8.0], "lengthscale": [-2.0] * 6}], "runs": 60}
    warm = gp.fit(Features(FLAT), inputs, Y, fooled)
    assert warm.log_evidence > cold.log_evidence - 0.1


def test_a_covariance_that_stays_singular_is_an_error_that_says_so() -> None:
    with pytest.raises(NumericalError, match="stayed singular"):
        gp.Factor.of(-np.eye(3), 1.0)


@SPACES
def test_what_is_kept_for_watched_points_and_runs_is_what_would_be_computed_anew(space: Space) -> None:
    X, inputs, Y = drawn(space, 30)
    fitted = gp.fit(Features(space), inputs, Y)
    pool, more = (seen(space, drawn(space, n, seed)[0]) for n, seed in ((50, 1), (5, 2)))
    plain, watching = fitted, fitted.watch(pool)
    for i in range(5):
        one = seen(space, drawn(space, 5, 2)[0][i : i + 1])
        plain, watching = plain.believe(one), watching.believe(one)
    assert watching.watched is not None
    for kept, anew in zip(watching.posterior(pool), plain.posterior(pool), strict=True):
        assert torch.allclose(kept, anew, rtol=1e-6, atol=1e-8)
    assert torch.equal(watching.posterior(more)[1], plain.posterior(more)[1])
    known = seen(space, torch.cat([X, drawn(space, 5, 2)[0]]))
    assert torch.allclose(plain.mean(known), plain.posterior(known)[0], rtol=1e-6, atol=1e-7)
