"""The weights of the models of single scales, what is made of them, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bo.surrogates import gp, ranking_ensemble
from bo.surrogates.features import Features, Inputs
from bo.surrogates.gp import GaussianProcess
from bo.surrogates.ranking_ensemble import RankingEnsemble, misranked, own_losses
from search_spaces import Fidelity, Real, Space

SPACE = Space(
    x=Real(0.0, 1.0),
    fidelity=Fidelity(params=Real(1e4, 1e7), tokens=(1e6,), target={"params": 1e7, "tokens": 1e6}),
)
FEATURES = Features(SPACE)
Curve = Callable[[Tensor], Tensor]


def wave(x: Tensor) -> Tensor:
    return torch.sin(7 * x) + 0.5 * torch.cos(13 * x)


def at(x: Tensor, place: float = 0.0, cell: int = 0) -> Inputs:
    S = torch.tensor([[place, 0.0]], dtype=torch.float64).expand(len(x), -1)
    return FEATURES(x[:, None], S, torch.full((len(x),), cell))


def told(*scales: tuple[Curve, int], seed: int = 0, target: bool = True) -> tuple[Inputs, Tensor]:
    """So many runs of each curve at random points, from small scales to the target, with little noise."""
    rng = torch.Generator().manual_seed(seed)
    inputs, Y = [], []
    for k, (curve, n) in enumerate(scales):
        x = torch.rand(n, generator=rng, dtype=torch.float64)
        inputs.append(at(x, 2.0 * (k - len(scales) + target), k))
        Y.append(curve(x) + 0.01 * torch.randn(n, generator=rng, dtype=torch.float64))
    joined = inputs[0]
    for more in inputs[1:]:
        joined = joined.join(more)
    return joined, torch.cat(Y)[:, None]


def fitted(inputs: Inputs, Y: Tensor) -> RankingEnsemble:
    made = ranking_ensemble.fit(FEATURES, inputs, Y)
    assert isinstance(made, RankingEnsemble)
    return made


def target_weights(made: RankingEnsemble) -> list[float]:
    weights: list[float] = made.weight[0, made.levels.target].tolist()
    return weights


GRID = torch.linspace(0, 1, 101, dtype=torch.float64)


def error(made: RankingEnsemble | GaussianProcess, truth: Curve) -> float:
    with torch.no_grad():
        return float((made.mean(at(GRID))[0] - truth(GRID)).square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------- weights


def test_pairs_in_the_wrong_order_are_counted_both_ways_and_ties_not() -> None:
    y = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    f = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [1.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    assert misranked(f[:, :, None], f[:, None], y).tolist() == [0, 10, 2]


def test_the_own_model_is_judged_by_samples_of_models_without_the_run() -> None:
    inputs, Y = told((wave, 7), seed=3)
    own = gp.fit(FEATURES, inputs, Y + 0.3 * torch.randn(7, 1, generator=torch.Generator().manual_seed(1)).double())
    rng, losses = np.random.default_rng(0), np.zeros(4000)
    for j in range(7):
        rest = np.arange(7) != j
        without = GaussianProcess.given(FEATURES, own.layout, own.theta, own.F[rest], own.Y[torch.as_tensor(rest)], 6)
        mean, covariance = (part[0, 0].numpy() for part in without.joint(inputs, 7))
        f = rng.multivariate_normal(mean, covariance + 1e-10 * np.eye(7), len(losses))
        y = own.Y[:, 0].numpy()
        losses += ((f[:, [j]] < f) != (y[j] < y))[:, rest].sum(1)
    found = own_losses(own, own.Y, seed=0)[0].numpy()
    assert found.mean() == pytest.approx(losses.mean(), abs=4 * losses.std() / np.sqrt(len(found)))
    assert np.quantile(found, [0.1, 0.9]) == pytest.approx(np.quantile(losses, [0.1, 0.9]), abs=3)


def test_a_faithful_scale_takes_the_weight_while_the_target_has_few_runs() -> None:
    weights = target_weights(fitted(*told((wave, 25), (wave, 5))))
    assert weights[0] > 0.7


def test_a_scale_that_says_the_opposite_has_no_weight() -> None:
    weights = target_weights(fitted(*told((lambda x: -wave(x), 25), (wave, 8))))
    assert weights == [0.0, 1.0]


def test_many_useless_scales_dilute_the_own_model_less_thanks_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    useless: list[tuple[Curve, int]] = [(lambda x, k=k: torch.cos((11 + 2 * k) * x + k), 12) for k in range(6)]
    inputs, Y = told(*useless, (wave, 7), seed=1)
    with_guard = target_weights(fitted(inputs, Y))[-1]
    monkeypatch.setattr(ranking_ensemble, "guarded", lambda losses, own: losses)
    assert with_guard > 0.9
    assert target_weights(fitted(inputs, Y))[-1] < 0.8


def test_each_metric_has_weights_of_its_own() -> None:
    inputs, Y = told((wave, 25), (wave, 8))
    small = inputs.cell == 0
    both = torch.cat([Y, torch.where(small[:, None], -Y, Y)], dim=-1)
    weight = fitted(inputs, both).weight[:, 1, 0]
    assert weight[0] > 0.5
    assert weight[1] == 0


@pytest.mark.parametrize("n", [1, 2])
def test_with_too_few_runs_to_rank_the_own_model_is_one_of_all_and_the_rest_is_shared_as_next_to_it(n: int) -> None:
    made = fitted(*told((lambda x: -wave(x), 20), (wave, 20), (wave, n)))
    near, here = made.weight[0, 1], made.weight[0, 2]
    assert near[0] == 0
    assert here[2] == pytest.approx(1 / 3)
    assert here[:2].tolist() == pytest.approx((2 / 3 * near[:2]).tolist(), abs=0.01)


def test_without_runs_at_the_target_the_nearest_scale_speaks_for_it() -> None:
    made = fitted(*told((lambda x: -wave(x), 20), (wave, 20), target=False))
    mean = made.mean(at(GRID, 0.0, cell=7))
    assert torch.equal(mean, made.mean(at(GRID, -2.0, cell=1)))
    assert torch.equal(mean, made.members[1].mean(at(GRID)))


# ---------------------------------------------------------------------------------------------- what is made of them


def test_means_add_up_by_weight_and_covariances_by_its_square() -> None:
    made = fitted(*told((wave, 15), (lambda x: wave(x) + 0.4 * torch.cos(9 * x), 6)))
    points = at(GRID[::20])
    w = made.weight[0, 1]
    assert 0.05 < float(w[0]) < 0.95
    mean, variance = made.posterior(points)
    one, other = (member.posterior(points) for member in made.members)
    torch.testing.assert_close(mean, w[0] * (one[0] + made.shift[0, 1, 0]) + w[1] * other[0])
    torch.testing.assert_close(variance, w[0].square() * one[1] + w[1].square() * other[1])
    covariance = [member.covariance(points, points) for member in made.members]
    expected = w[0].square() * covariance[0] + w[1].square() * covariance[1]
    torch.testing.assert_close(made.covariance(points, points), expected)


def test_a_scale_lends_its_shape_at_the_level_of_the_target() -> None:
    made = fitted(*told((lambda x: wave(x) - 3.0, 25), (wave, 5)))
    assert float(made.shift[0, 1, 0]) == pytest.approx(3 * 5 / 6, abs=0.1)  # as if a sixth run had been as foretold


def test_what_is_believed_at_a_scale_without_weight_tells_nothing_about_the_target() -> None:
    made = fitted(*told((lambda x: -wave(x), 12), (wave, 12)))
    with torch.no_grad():
        before = made.posterior(at(GRID))[1]
        torch.testing.assert_close(made.believe(at(GRID, -2.0)).posterior(at(GRID))[1], before)


def test_it_halves_the_error_with_a_faithful_scale_and_adds_none_with_an_opposite_one() -> None:
    opposite: Curve = lambda x: -wave(x)  # noqa: E731
    ratios = []
    for source in (wave, opposite):
        each = []
        for seed in range(8):
            inputs, Y = told((source, 20), (wave, 6), seed=seed)
            here = inputs.cell == 1
            alone = gp.fit(FEATURES, inputs.rows(here), Y[here])
            each.append(error(fitted(inputs, Y), wave) / error(alone, wave))
        ratios.append(float(np.median(each)))
    assert ratios[0] < 0.5
    assert ratios[1] < 1.05
