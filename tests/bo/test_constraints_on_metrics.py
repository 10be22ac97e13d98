"""Limits on metrics in the search: the probability that they are kept, and runs that come to keep them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bo import AtLeast, AtMost, Minimize, dataset
from bo.acquisition.constrained import likely_feasible, log_feasible
from bo.objective import Objective
from bo.policies import posterior
from bo.ports import History
from bo.quasirandom import sobol_points
from bo.surrogates import composite
from bo.surrogates.composite import Composite
from bo.trial import Trial
from search_spaces import Fidelity, Real, Space

SPACE = Space(x=Real(0, 1), y=Real(0, 1))
#: The loss falls towards x = 1, the memory allows x + y <= 1, and accuracy wants y >= 0.2.
LIMITED = Minimize("loss", subject_to=[AtMost("memory", 10.0), AtLeast("acc", 0.2)])


def measure(config: dict[str, float]) -> dict[str, float]:
    x, y = config["x"], config["y"]
    return {"loss": 2 - x + 0.3 * math.sin(3 * y), "memory": 5 * (x + y) ** 2 + 5, "acc": y}


def told(points: np.ndarray, space: Space = SPACE) -> tuple[Trial, ...]:
    configs = [space.decode(x) for x in points]
    return tuple(
        Trial(i, config, space.top, 0, "sobol", status="finished", metrics=measure(config))
        for i, config in enumerate(configs)
    )


def fitted(trials: tuple[Trial, ...], objective: Objective = LIMITED, space: Space = SPACE) -> Composite:
    return composite.fit(dataset.from_history(History(space, objective, trials)))


def test_where_runs_were_made_it_is_known_which_limits_they_keep() -> None:
    trials = told(sobol_points(2, 25, 0))
    mask = likely_feasible(fitted(trials), SPACE.top, torch.as_tensor(sobol_points(2, 25, 0)))
    clear = [min(abs(t.metrics["memory"] - 10), 10 * abs(t.metrics["acc"] - 0.2)) > 0.2 for t in trials if t.metrics]
    kept = torch.tensor([LIMITED.feasible(trial.metrics or {}) for trial in trials])
    assert sum(clear) > 15
    assert 0 < int(kept.sum()) < 25
    assert torch.equal(mask[clear], kept[clear])


def test_the_probability_is_that_of_draws_of_the_metrics() -> None:
    model = fitted(told(sobol_points(2, 8, 1)))
    X = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    belief, outcome = model.at(SPACE.top), model.data.outcome
    mean, variance = belief.surrogate.posterior(belief.inputs(X))
    normal = torch.randn(20000, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = mean + variance.sqrt() * normal
    level = outcome.level(model.data.place(SPACE.top))
    # By way of the user's own units: what is beyond the limits there.
    beyond = torch.stack([outcome.backward(drawn[:, :, i], level)[0][:, 1:] for i in range(20)], dim=-1)
    share = (beyond <= 0).all(1).double().mean(0)
    assert torch.allclose(log_feasible(model, SPACE.top)(X).exp(), share, atol=0.02)


def test_the_probability_has_a_finite_gradient_where_it_underflows() -> None:
    model = fitted(told(sobol_points(2, 20, 0)))
    X = torch.tensor([[1.0, 1.0], [0.4, 0.3], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = log_feasible(model, SPACE.top)(X)
    (gradient,) = torch.autograd.grad(value.sum(), X)
    assert value[0].item() < -10
    assert torch.isfinite(gradient).all()
    step = 1e-6
    nearby = log_feasible(model, SPACE.top)(X.detach() + torch.tensor([step, 0.0], dtype=torch.float64))
    assert torch.allclose((nearby - value.detach()) / step, gradient[:, 0], rtol=1e-3, atol=1e-3)


def test_a_limit_changes_nothing_that_is_believed_of_the_objective() -> None:
    trials = told(sobol_points(2, 12, 2))
    always = Minimize("loss", subject_to=[AtMost("memory", 1e3)])
    free, limited = fitted(trials, Minimize("loss")), fitted(trials, always)
    X = torch.as_tensor(sobol_points(2, 30, 7))
    for one, other in zip(free.at(SPACE.top).value(X), limited.at(SPACE.top).value(X), strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-3)
    joint = (model.at(SPACE.top).joint(X.reshape(10, 3, 2)) for model in (free, limited))
    for one, other in zip(*joint, strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-3)
    predicted = [model.predict(X[0], SPACE.top) for model in (free, limited)]
    assert predicted[0].mean == pytest.approx(predicted[1].mean, rel=1e-2)
    assert predicted[0].high == pytest.approx(predicted[1].high, rel=1e-2)
    assert torch.equal(log_feasible(free, SPACE.top)(X), torch.zeros(30, dtype=torch.float64))
    assert (log_feasible(limited, SPACE.top)(X) > -0.01).all()


def test_the_limit_is_learned_from_small_runs_too() -> None:
    fidelity = Fidelity(tokens=(1e6, 1e8), cost=lambda scale: scale["tokens"], target={"tokens": 1e8})
    space = Space(x=Real(0, 1), y=Real(0, 1), fidelity=fidelity)
    small = fidelity.scale({"tokens": 1e6})
    trials = tuple(
        Trial(i, space.decode(x), small, 0, "sobol", status="finished", metrics=measure(space.decode(x)))
        for i, x in enumerate(sobol_points(2, 16, 3))
    )
    model = fitted(trials, space=space)
    X = torch.tensor([[0.2, 0.4], [0.9, 0.9]], dtype=torch.float64)
    within, beyond = log_feasible(model, space.top)(X).tolist()
    assert within > beyond + 1


def test_the_search_comes_to_the_best_point_that_keeps_the_limits() -> None:
    # The optimum lies in the corner of two limits: y = 0.2 and x = 0.8.
    rng = np.random.default_rng(0)
    trials = told(np.array([[0.9, 0.9], [0.7, 0.8], [0.9, 0.5], [0.8, 0.9]]))  # none keeps them
    kept = []
    for _ in range(16):
        (proposal,) = posterior.propose(History(SPACE, LIMITED, trials), 1, rng, "bayes")
        config = proposal.config
        trial = Trial(len(trials), config, SPACE.top, 0, "bayes", status="finished", metrics=measure(config))
        trials += (trial,)
        if LIMITED.feasible(trial.metrics or {}):
            kept.append(LIMITED.value(trial.metrics or {}))
    optimum = LIMITED.value(measure({"x": 0.8, "y": 0.2}))
    assert len(kept) >= 6
    assert optimum - 1e-9 <= min(kept) <= optimum + 0.02
