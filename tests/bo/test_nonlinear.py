"""Objectives that are no sum of metrics: moments by samples, the transform undone on them, and searches by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import Function, Largest, Minimize, Study, WeightedSum, dataset
from bo.acquisition.log_ei import log_ei
from bo.objective import Objective
from bo.ports import History
from bo.surrogates import composite, nonlinear
from bo.surrogates.composite import Belief, Composite
from bo.surrogates.nonlinear import NonlinearBelief, normals
from bo.trial import Trial
from search_spaces import Real, Space

SQUARE = Space(x=Real(0, 1), y=Real(0, 1))
#: Where the larger of `bowls` is least, by a grid of 2000 x 2000.
LEAST = 1.12023


def bowls(config: Mapping[str, float]) -> dict[str, float]:
    x, y = config["x"], config["y"]
    return {"a": 1 + (x - 0.2) ** 2 + (y - 0.3) ** 2, "b": 1 + (x - 0.8) ** 2 + 2 * (y - 0.6) ** 2}


def speedy(config: Mapping[str, float]) -> dict[str, float]:
    x, y = config["x"], config["y"]
    return {"loss": 1 + (x - 0.3) ** 2 + 0.5 * (y - 0.5) ** 2, "speed": math.exp(2 * x + y)}


def per_speed(metrics: dict[str, float]) -> float:
    return (metrics["loss"] - 0.9) / metrics["speed"]


def other(metrics: dict[str, float]) -> float:
    return metrics["loss"] / metrics["speed"]


def both(metrics: dict[str, float]) -> float:
    return metrics["a"] + 3 * metrics["b"]


def rooted(metrics: dict[str, float]) -> float:
    return math.sqrt(metrics["a"] - 1.1)


def history(objective: Objective, metrics: Callable[[Mapping[str, float]], dict[str, float]], n: int) -> History:
    configs = SQUARE.sample(np.random.default_rng(1), n)
    trials = [Trial(i, c, SQUARE.top, 0, "sobol", status="finished", metrics=metrics(c)) for i, c in enumerate(configs)]
    return History(SQUARE, objective, tuple(trials))


def fitted(objective: Objective, metrics: Any = bowls, n: int = 10) -> Composite:
    return composite.fit(dataset.from_history(history(objective, metrics, n)))


def correlated(model: Composite, by: float = 0.6) -> Composite:
    p = len(model.correlation)
    return replace(model, correlation=torch.full((p, p), by, dtype=torch.float64).fill_diagonal_(1.0))


def somewhere(b: int, seed: int = 0) -> Tensor:
    return torch.rand(b, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(belief: NonlinearBelief, X: Tensor, s: int = 40_000) -> Tensor:
    """Draws of the objective at b points, larger is better, by brute force: s x b."""
    mean, variance = belief.surrogate.posterior(belief.inputs(X))
    rng = np.random.default_rng(7)
    normal = torch.as_tensor(rng.multivariate_normal(np.zeros(len(mean)), belief.correlation.numpy(), (s, len(X))))
    u, _ = belief.outcome.backward(mean.T + variance.sqrt().T * normal, belief.level)
    value = nonlinear.objective(belief.outcome)(u)
    return -belief.size * dataset.compress((value - belief.least) / belief.size, belief._reach)


def nonlinear_belief(model: Composite) -> NonlinearBelief:
    belief = model.at(SQUARE.top)
    assert isinstance(belief, NonlinearBelief)
    return belief


# -------------------------------------------------------------------------------------------------------- moments


def test_normals_have_exactly_the_moments_they_stand_for() -> None:
    correlation = torch.tensor([[1.0, 0.7, 0.1], [0.7, 1.0, -0.2], [0.1, -0.2, 1.0]], dtype=torch.float64)
    normal = normals(64, correlation)
    assert torch.allclose(normal.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(normal.T @ normal / len(normal), correlation, atol=1e-12)
    assert len(normals(64, torch.eye(40, dtype=torch.float64))) == 256


def test_of_a_sum_samples_say_exactly_what_adding_up_says() -> None:
    model = correlated(fitted(WeightedSum({"a": 0.3, "b": 2.0})))
    far = replace(model.data.outcome, cap=torch.full((2,), 1e9, dtype=torch.float64), reach=torch.tensor(1e9))
    data = replace(model.data, outcome=far)
    summed, sampled = (replace(model, data=data, additive=additive).at(SQUARE.top) for additive in (True, False))
    assert type(summed) is Belief
    assert isinstance(sampled, NonlinearBelief)
    X, Z = somewhere(6), somewhere(3, 1)
    shift = sampled.value(X)[0] - summed.value(X)[0]
    assert torch.allclose(shift, shift[0].expand(6), atol=1e-9)
    assert torch.allclose(sampled.value(X)[1], summed.value(X)[1], rtol=1e-9)
    for one, other_ in (
        (sampled.joint(X.reshape(3, 2, 2))[1], summed.joint(X.reshape(3, 2, 2))[1]),
        (sampled.covariance(X, Z), summed.covariance(X, Z)),
        (sampled.noise, summed.noise),
    ):
        assert torch.allclose(one, other_, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("objective", "metrics"),
    [
        (Largest("a", "b"), bowls),
        (Largest("a", "b", weights={"b": 0.8}), bowls),
        (Largest("loss", "speed", weights={"speed": -0.2}), speedy),
        (Function(per_speed, ("loss", "speed")), speedy),
    ],
    ids=["largest", "weighted", "turned", "ratio"],
)
def test_moments_are_those_of_many_draws(objective: Objective, metrics: Any) -> None:
    belief = nonlinear_belief(correlated(fitted(objective, metrics)))
    X = somewhere(8)
    mean, sd = belief.value(X)
    draws = drawn(belief, X)
    assert torch.allclose(sd, draws.std(0), rtol=0.08)
    assert ((mean - draws.mean(0)).abs() < 0.04 * draws.std(0)).all()


def test_expected_improvement_of_the_moments_is_near_the_true_one_where_it_counts() -> None:
    belief = nonlinear_belief(fitted(Largest("a", "b"), n=8))
    X = somewhere(40)
    mean, sd = belief.value(X)
    best = mean.max()
    true = (drawn(belief, X, 40_000) - best).clamp_min(0).mean(0)
    ours = log_ei(mean, sd, best).exp()
    leading = true > 0.2 * true.max()
    assert leading.sum() >= 3
    ratio = ours[leading] / true[leading]
    assert ratio.min() > 0.8
    assert ratio.max() < 1.5
    assert true[ours.argmax()] > 0.8 * true.max()


@pytest.mark.parametrize("objective", [Largest("a", "b"), Function(both, ("a", "b"))], ids=["largest", "function"])
def test_gradients_are_those_of_differences(objective: Objective) -> None:
    belief = nonlinear_belief(correlated(fitted(objective)))
    X = somewhere(3).requires_grad_()
    for part in (0, 1):
        (gradient,) = torch.autograd.grad(belief.value(X)[part].sum(), X)
        for i, j in ((0, 0), (1, 1), (2, 0)):
            step = torch.zeros_like(X)
            step[i, j] = 1e-5
            with torch.no_grad():
                slope = (belief.value(X + step)[part] - belief.value(X - step)[part])[i] / 2e-5
            assert float(gradient[i, j]) == pytest.approx(float(slope), rel=2e-3, abs=1e-5)


def test_what_is_believed_jointly_is_one_covariance_with_the_right_diagonal() -> None:
    belief = nonlinear_belief(correlated(fitted(Largest("a", "b"), n=6)))
    X = somewhere(5)
    mean, covariance = belief.joint(X[None])
    alone, sd = belief.value(X)
    assert torch.allclose(mean[0], alone)
    assert torch.allclose(covariance[0].diagonal(), sd.square(), rtol=1e-9)
    assert torch.linalg.eigvalsh(covariance[0]).min() > -1e-9 * covariance.max()
    apart = belief.covariance(X[:2], X[2:])
    assert torch.allclose(apart, covariance[0, :2, 2:], rtol=1e-9)
    near = torch.stack([X[0], X[0] + 1e-4])
    _, close = belief.joint(near[None])
    assert float(close[0, 0, 1] / close[0, 0, 0]) == pytest.approx(1, abs=1e-2)


def test_believing_a_run_shrinks_the_deviation_there() -> None:
    belief = nonlinear_belief(fitted(Largest("a", "b"), n=6))
    X = somewhere(2)
    after = belief.believe(X[:1])
    assert isinstance(after, NonlinearBelief)
    assert after.value(X)[1][0] < 0.5 * belief.value(X)[1][0]


def test_expanding_undoes_compressing() -> None:
    excess = torch.tensor([-30.0, -1.0, 0.0, 0.5, 2.0, 400.0], dtype=torch.float64)
    cap = torch.tensor(1.0, dtype=torch.float64)
    assert torch.allclose(dataset.expand(dataset.compress(excess, cap), cap), excess)


# ------------------------------------------------------------------------------------------------ sums of compressed


def domains(explode: float) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Ten domains that are all but alike, of which the first explodes for small x."""

    def metrics(config: Mapping[str, float]) -> dict[str, float]:
        usual = 2 + 0.2 * (config["x"] - 0.4) ** 2 + 0.1 * config["y"]
        first = usual + explode * max(0.0, 0.25 - config["x"])
        return {"d0": first, **{f"d{i}": usual + 0.02 * config["x"] * i / 10 for i in range(1, 10)}}

    return metrics


SUM = WeightedSum({f"d{i}": 0.1 for i in range(10)})


def test_a_sum_is_added_up_until_a_bad_run_looks_good_in_it() -> None:
    assert fitted(SUM, domains(0.0), 16).additive
    model = fitted(SUM, domains(60.0), 16)
    assert not model.additive
    X = model.data.X
    told = torch.tensor([SUM.value(domains(60.0)({"x": float(x), "y": float(y)})) for x, y in X], dtype=torch.float64)
    near = float(nonlinear_belief(model)._reach * told.min())  # how far from the best a run counts as good
    bad = told > told.min() + 2 * near
    assert bad.any()
    belief = nonlinear_belief(model)
    added = Belief(belief.surrogate, belief.place, belief.cell, belief.weight, belief.correlation)
    honest, wrong = belief.value(X)[0], added.value(X)[0]
    assert wrong.max() - wrong[bad].max() < near
    assert honest.max() - honest[bad].max() > near


@pytest.mark.parametrize(("objective", "metrics"), [(SUM, domains(60.0)), (Largest("a", "b"), bowls)])
def test_to_add_up_what_is_no_sum_is_refused(objective: Objective, metrics: Any) -> None:
    model = fitted(objective, metrics, 16)
    with pytest.raises(ValueError, match="no sum of its metrics as they are modelled"):
        replace(model, additive=True)


def test_of_one_metric_whatever_explodes_the_transform_keeps_the_order() -> None:
    assert fitted(Minimize("d0"), domains(60.0), 16).additive


# -------------------------------------------------------------------------------------------------- functions


def test_metrics_that_are_always_positive_are_modelled_by_their_logarithm() -> None:
    past = history(Function(per_speed, ("loss", "speed")), speedy, 8)
    outcome = dataset.from_history(past).outcome
    assert outcome.columns is not None
    assert outcome.columns.logs == (True, True)
    data = dataset.from_history(past)
    u, _ = outcome.backward(data.Y, outcome.level(data.place(SQUARE.top)))
    values = nonlinear.objective(outcome)(u)
    told = [per_speed(trial.metrics) for trial in past.trials if trial.metrics]
    assert values.tolist() == pytest.approx(told, rel=1e-9)


def test_a_run_of_which_the_function_makes_no_number_counts_as_diverged() -> None:
    past = history(Function(rooted, ("a", "b")), bowls, 12)
    data = dataset.from_history(past)
    expected = [trial.metrics is not None and trial.metrics["a"] < 1.1 for trial in past.trials]
    assert 0 < sum(expected) < 12
    assert data.diverged.tolist() == expected
    belief = nonlinear_belief(composite.fit(data.measured()))
    X = somewhere(20).requires_grad_()
    mean, sd = belief.value(X)
    (gradient,) = torch.autograd.grad((mean + sd).sum(), X)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("objective", "metrics"),
    [(Largest("a", "b"), bowls), (Function(per_speed, ("loss", "speed")), speedy)],
    ids=["largest", "ratio"],
)
def test_intervals_of_predictions_hold_what_is_measured(objective: Any, metrics: Any) -> None:
    model = fitted(objective, metrics, 12)
    inside = 0
    for config in SQUARE.sample(np.random.default_rng(5), 40):
        found = model.predict(torch.as_tensor(SQUARE.encode(config)), SQUARE.top)
        assert found.low <= found.mean <= found.high
        inside += found.low <= objective.value(metrics(config)) <= found.high
    assert inside >= 32


# ------------------------------------------------------------------------------------------------------- searches


def best_after(path: Any, objective: Any, metrics: Any, n: int, policy: str) -> tuple[float, Study]:
    study = Study.create(path, SQUARE, objective=objective, policy=policy, seed=3)
    for _ in range(n):
        (trial,) = study.ask()
        study.tell(trial.id, metrics(trial.config))
    best = study.best()
    assert best is not None
    return objective.value(best.metrics), study


def test_a_search_for_the_least_largest_metric_finds_it(tmp_path: Any) -> None:
    objective = Largest("a", "b")
    ours, study = best_after(tmp_path / "bayes", objective, bowls, 12, "bayes")
    random, _ = best_after(tmp_path / "sobol", objective, bowls, 12, "sobol")
    assert ours - LEAST < 3e-3
    assert ours - LEAST < 0.2 * (random - LEAST)
    recommended = study.recommend()
    assert recommended.low is not None
    assert recommended.high is not None
    assert objective.value(bowls(recommended.config)) - LEAST < 3e-3
    assert recommended.low < LEAST + 3e-3
    assert recommended.high > LEAST - 1e-3


def test_a_study_of_a_function_survives_its_journal_and_asks_for_the_function(tmp_path: Any) -> None:
    objective = Function(per_speed, ("loss", "speed"))
    best, study = best_after(tmp_path / "s", objective, speedy, 7, "bayes")
    recommended = study.recommend()
    study.close()
    without = Study.open(tmp_path / "s")
    assert without.objective == objective
    assert len(without.trials) == 7
    for use in (without.best, without.recommend, without.ask):
        with pytest.raises(ValueError, match=r"test_nonlinear:per_speed is not at hand; hand it in by Study"):
            use()
    again = Study.open(tmp_path / "s", objective=objective)
    found = again.best()
    assert found is not None
    assert found.metrics is not None
    assert objective.value(found.metrics) == best
    assert again.recommend() == recommended
    for wrong, message in (
        (Function(other, ("loss", "speed")), "The source of Function.*other.* is not the one"),
        (Function(per_speed, ("speed", "loss", "cost")), "The objective differs"),
        (Minimize("loss"), "The objective differs"),
    ):
        with pytest.raises(ValueError, match=message):
            Study.open(tmp_path / "s", objective=wrong)


def test_a_study_of_a_sum_forks_into_one_of_the_largest(tmp_path: Any) -> None:
    _, study = best_after(tmp_path / "s", WeightedSum({"a": 1.0, "b": 1.0}), bowls, 6, "sobol")
    with study.fork(tmp_path / "t", objective=Largest("a", "b"), policy="bayes") as forked:
        (trial,) = forked.ask()
        assert trial.predicted is not None
        assert forked.objective.parts == (Largest("a", "b"),)
