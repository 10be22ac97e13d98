from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import gp, sparse_axes
from bo.surrogates.ensemble import Ensemble
from bo.surrogates.features import Features, Inputs
from bo.surrogates.hyperparameters import Layout
from bo.surrogates.sparse_axes import SparseLayout
from search_spaces import Choice, Fidelity, Mixture, Real, Space

WIDE = Space(**{f"x{i}": Real(0, 1) for i in range(24)})
MIXED = Space(
    lr=Real(1e-4, 1e-2, log=True),
    kind=Choice({"a": {"b": Real(0, 1)}, "c": {}}),
    data=Mixture("p", "q", "r"),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6,), target={"params": 1e6, "tokens": 1e6}),
)


def drawn(space: Space, n: int, seed: int = 0, scales: int = 1) -> Inputs:
    """Points dealt in turn to the largest scales."""
    X = torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(seed), n)))
    m = len(space.fidelity.axes) if space.fidelity else 0
    cell = torch.arange(n) % scales
    S = torch.zeros(n, m, dtype=torch.float64)
    if m:
        S[:, 0] = -math.log2(10) * cell
    return Features(space)(X, S, cell)


def of_three(inputs: Inputs) -> Tensor:
    """A metric that three of the coordinates bear on, of about unit spread: n x 1."""
    x = inputs.F
    return (torch.sin(5 * x[:, 2]) - 8 * (x[:, 7] - 0.3).square() + 2 * torch.cos(4 * x[:, 2] * x[:, 20]))[:, None] / 2


def log_density(model: Ensemble | gp.GaussianProcess, at: Inputs, truth: Tensor) -> float:
    mean, variance = model.posterior(at)
    variance = variance.T + model.noise
    return float((-0.5 * (mean.T - truth).square() / variance - 0.5 * (2 * math.pi * variance).log()).mean())


@pytest.mark.parametrize("seed", range(3))
def test_few_coordinates_that_matter_are_found_and_foretell_better_than_all_of_them(seed: int) -> None:
    inputs, at = drawn(WIDE, 40, seed), drawn(WIDE, 300, seed + 10)
    Y, truth = of_three(inputs), of_three(at)
    model = sparse_axes.fit(Features(WIDE), inputs, Y)
    usual = gp.fit(Features(WIDE), inputs, Y)
    matter = torch.zeros(24, dtype=torch.bool)
    matter[[2, 7, 20]] = True
    lengthscale = model.lengthscale[0]
    assert lengthscale[~matter].min() > 3 * lengthscale[matter].max()
    assert log_density(model, at, truth) > log_density(usual, at, truth) + 0.3


def test_the_prior_of_a_lengthscale_is_that_of_a_half_cauchy_inverse_square() -> None:
    inputs = drawn(WIDE, 5)
    usual = Layout.of(Features(WIDE), inputs, across=False)
    for tau in (0.01, 1.0):
        layout = SparseLayout.sparse(usual, tau)
        grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        theta = torch.as_tensor(layout.vector()).repeat(4001, 1)
        theta[:, 0] = grid
        density = layout.log_prior(theta).exp()
        density = density / torch.trapezoid(density, grid)
        inverse = torch.exp(-2 * grid)
        cauchy = 2 / math.pi / (tau * (1 + (inverse / tau).square())) * 2 * inverse
        torch.testing.assert_close(density, cauchy, rtol=1e-3, atol=1e-6)
        value, gradient = layout.log_prior_and_gradient(theta[:3].numpy())
        assert value == pytest.approx(float(layout.log_prior(theta[:3]).sum()))
        assert gradient.shape == theta[:3].shape
        assert layout.centre()[0] == pytest.approx(float(grid[density.argmax()]), abs=0.01)


def test_the_ensemble_is_the_mixture_of_its_members() -> None:
    inputs, at = drawn(WIDE, 20), drawn(WIDE, 6, 1)
    Y = torch.cat([of_three(inputs), inputs.F[:, 3:4]], dim=-1)
    model = sparse_axes.fit(Features(WIDE), inputs, Y, iterations=15)
    torch.testing.assert_close(model.weight.sum(-1), torch.ones(2, dtype=torch.float64))
    mean, variance = model.posterior(at)
    joint_mean, joint = model.joint(at, 3)
    torch.testing.assert_close(joint_mean.reshape(2, -1), mean)
    torch.testing.assert_close(joint.diagonal(dim1=-2, dim2=-1).reshape(2, -1), variance, rtol=1e-6, atol=1e-8)
    whole = model.covariance(at, at)
    torch.testing.assert_close(whole[:, :3, :3], joint[:, 0], rtol=1e-6, atol=1e-8)
    first = [member.posterior(at) for member in model.members]
    second = sum(w * (v[0] + m[0].square()) for w, (m, v) in zip(model.weight[0], first, strict=True))
    torch.testing.assert_close(variance[0], second - mean[0].square(), rtol=1e-6, atol=1e-8)
    left_mean, left_variance = model.leave_one_out()
    assert left_mean.shape == left_variance.shape == Y.shape
    assert (left_variance > 0).all()


def test_believing_shrinks_variances_to_noise_and_changes_no_mean() -> None:
    inputs, at = drawn(WIDE, 25), drawn(WIDE, 5, 1)
    model = sparse_axes.fit(Features(WIDE), inputs, of_three(inputs), iterations=15)
    believed = model.believe(at.rows(torch.arange(1))).believe(at.rows(torch.arange(1, 2)))
    (mean, variance), (same, less) = model.posterior(at), believed.posterior(at)
    assert torch.equal(mean, same)
    assert (less <= variance + 1e-12).all()
    assert (less[:, :2] < 0.02 * variance[:, :2]).all()
    assert (less[:, 2:] > 0.1 * variance[:, 2:]).all()
    torch.testing.assert_close(believed.joint(at, 5)[1][:, 0], believed.covariance(at, at), rtol=1e-6, atol=1e-9)


def test_points_can_be_asked_with_gradients_believed_or_not() -> None:
    inputs, at = drawn(WIDE, 15), drawn(WIDE, 4, 1)
    model = sparse_axes.fit(Features(WIDE), inputs, of_three(inputs), iterations=10)
    for each in (model, model.believe(drawn(WIDE, 2, 2))):

        def value(F: Tensor, each: Ensemble = each) -> Tensor:
            points = replace(at, F=F)
            mean, variance = each.posterior(points)
            return torch.stack([mean.sum(), variance.sum(), each.joint(points, 2)[1].sum()])

        assert torch.autograd.gradcheck(value, at.F.clone().requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("scales", [1, 2])
def test_choices_mixtures_and_scales_are_modelled_as_everywhere(scales: int) -> None:
    inputs, at = drawn(MIXED, 40, scales=scales), drawn(MIXED, 40, 1, scales=scales)

    def metric(inputs: Inputs) -> Tensor:
        return 2 * inputs.F[:, :1] + inputs.F[:, 2:3] + inputs.F[:, -1:]

    model = sparse_axes.fit(Features(MIXED), inputs, metric(inputs) - 1.5)
    error = (model.posterior(at)[0].T - metric(at) + 1.5).square().mean().sqrt()
    assert error < 0.25 * metric(at).std()


def test_a_warm_start_with_hardly_more_runs_keeps_the_hyperparameters() -> None:
    inputs = drawn(WIDE, 62)
    Y, features = of_three(inputs), Features(WIDE)
    first = sparse_axes.fit(features, inputs.rows(torch.arange(60)), Y[:60], iterations=10)
    memory = json.loads(json.dumps(first.memory()))
    again = sparse_axes.fit(features, inputs, Y, memory)
    assert again.memory()["runs"] == 60
    for one, other in zip(first.members, again.members, strict=True):
        torch.testing.assert_close(one.theta, other.theta, rtol=0, atol=1e-6)
    assert sparse_axes.fit(features, inputs, Y, {**memory, "runs": 50}, iterations=2).memory()["runs"] == 62
    assert sparse_axes.fit(features, inputs, Y, {"metrics": [{"noise": [0.0]}]}, iterations=2).memory()["runs"] == 62


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e12])
def test_few_runs_copies_ties_and_outcomes_of_any_size_give_finite_answers(n: int, factor: float) -> None:
    inputs = drawn(WIDE, max(1, n // 3))
    inputs = inputs.rows(torch.arange(n) % len(inputs))
    model = sparse_axes.fit(Features(WIDE), inputs, factor * of_three(inputs), iterations=15)
    at = drawn(WIDE, 5, 1)
    for found in (*model.posterior(at), *model.leave_one_out(), *model.believe(at).posterior(at)):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("taus", [(), (0.1, 0.0)])
def test_a_tau_that_is_not_above_zero_is_refused(taus: tuple[float, ...]) -> None:
    inputs = drawn(WIDE, 3)
    with pytest.raises(ValueError, match="tau above 0"):
        sparse_axes.fit(Features(WIDE), inputs, of_three(inputs), taus=taus)
