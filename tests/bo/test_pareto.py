"""The search for a front: boxes above it, expected volume against sampling, and a known front reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from bo import AtMost, Maximize, Pareto, dataset
from bo.acquisition import hypervolume
from bo.acquisition.acquisition import Situation
from bo.acquisition.hypervolume import boxes, log_between, padded
from bo.objective import Objective, reference_point
from bo.objective import hypervolume as volume
from bo.optimize import maximise
from bo.ports import History
from bo.quasirandom import sobol_points
from bo.surrogates import composite
from bo.surrogates.composite import Composite
from bo.trial import Trial
from search_spaces import Real, Space

SPACE = Space(x=Real(0, 1), y=Real(0, 1))
Measure = Callable[[Mapping[str, float]], dict[str, float]]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def beaten(front: Tensor, reference: Tensor) -> float:
    """Volume that n x k points (larger is better) beat."""
    return volume([tuple(row) for row in (-front).tolist()], tuple((-reference).tolist()))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_boxes_are_disjoint_and_make_up_what_is_above_the_front(k: int) -> None:
    front, reference = rand(7, k), torch.full((k,), 0.2, dtype=torch.float64)
    low, high = boxes(front, reference)
    points = 1.2 * rand(4000, k, seed=1)
    held = ((points[:, None] >= low) & (points[:, None] < high)).all(-1).sum(-1)
    beyond = (points >= reference).all(-1) & ~(points[:, None] <= front).all(-1).any(-1)
    assert torch.equal(held, beyond.long())
    assert k != 2 or len(low) <= 8


def test_fronts_without_a_point_above_the_reference_leave_one_open_box() -> None:
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64)
    low, high = boxes(torch.tensor([[0.1, 0.9]], dtype=torch.float64), reference)
    assert low.tolist() == [[0.5, 0.5]]
    assert high.tolist() == [[math.inf, math.inf]]


def test_the_length_between_bounds_is_that_of_draws_and_its_logarithm_does_not_underflow() -> None:
    mean, low, high = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1.0, -1.0], 0.3, [0.5, 0.8, math.inf]))
    sd = torch.tensor(0.7, dtype=torch.float64)
    drawn = mean + sd * torch.randn(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (torch.minimum(drawn, high) - low).clamp_min(0).mean(0)
    assert torch.allclose(log_between(mean, sd, low, high).exp(), expected, rtol=0.02)

    far = torch.tensor([-1e3, 50.0], dtype=torch.float64, requires_grad=True)
    value = log_between(far, sd, torch.tensor(0.0), torch.tensor([1.0, 2.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), far)
    assert -1.1e6 < value[0].item() < -1e5
    assert value[1].item() == pytest.approx(math.log(2.0))
    assert float(gradient[0]) > 0
    assert torch.isfinite(gradient).all()


def test_empty_boxes_fill_up_shorter_lists_and_weigh_nothing() -> None:
    reference = torch.zeros(2, dtype=torch.float64)
    made = [boxes(rand(n, 2, seed=n), reference) for n in (1, 6)]
    low, high = padded(made)

    def expected(low: Tensor, high: Tensor) -> Tensor:
        each = [log_between(torch.tensor(0.7), torch.tensor(0.2), low[:, k], high[:, k]) for k in range(2)]
        return (each[0] + each[1]).logsumexp(0)

    assert low.shape == (2, max(len(corner) for corner, _ in made), 2)
    assert torch.allclose(expected(low[0].double(), high[0].double()), expected(*made[0]))


# ---------------------------------------------------------------------------------------------- with a model


def branin_currin(config: Mapping[str, float]) -> dict[str, float]:
    a, b, x, y = 15 * config["x"] - 5, 15 * config["y"], config["x"], config["y"]
    branin = (b - 5.1 * a * a / (4 * math.pi**2) + 5 * a / math.pi - 6) ** 2
    branin += 10 * (1 - 1 / (8 * math.pi)) * math.cos(a) + 10
    currin = (1 - math.exp(-1 / (2 * y)) if y > 0 else 1.0) * (2300 * x**3 + 1900 * x**2 + 2092 * x + 60)
    currin /= 100 * x**3 + 500 * x**2 + 4 * x + 20
    return {"branin": branin, "currin": currin}


def told(points: np.ndarray, **more: float) -> tuple[Trial, ...]:
    configs = [SPACE.decode(x) for x in points]
    return tuple(
        Trial(i, config, SPACE.top, 0, "sobol", status="finished", metrics=branin_currin(config) | more)
        for i, config in enumerate(configs)
    )


def fitted(trials: tuple[Trial, ...], objective: Objective) -> Composite:
    return composite.fit(dataset.from_history(History(SPACE, objective, trials)))


def situation(model: Composite, believed: Composite, pending: Tensor, seed: int = 0) -> Situation:
    at, rng = SPACE.top, np.random.default_rng(seed)
    return Situation(SPACE, model.at(at), believed.at(at), model.data.X, pending, len(model.data.X), 1.0, rng)


NONE = torch.zeros(0, 2, dtype=torch.float64)
BOTH = Pareto("branin", "currin", reference=[18.0, 6.0])


def test_the_beliefs_are_of_the_objectives_in_their_own_units() -> None:
    trials = told(sobol_points(2, 20, 0))
    model = fitted(trials, Pareto("branin", Maximize("currin"), reference=[18.0, 6.0]))
    values = torch.tensor([[-t.metrics["branin"], t.metrics["currin"]] for t in trials if t.metrics]).double()
    mean = torch.stack([b.value(model.data.X)[0] for b in hypervolume.objectives(model, SPACE.top)], dim=-1)
    reference = hypervolume.reference(model, SPACE.top)
    assert reference is not None
    # Up to one shift, near the front, where nothing is compressed.
    near = (model.data.outcome.excess(-values, model.data.cell) <= model.data.outcome.cap).all(-1)
    assert int(near.sum()) >= 5
    shift = torch.tensor([-18.0, 6.0], dtype=torch.float64) - reference
    assert torch.allclose(mean[near] + shift, values[near], atol=0.5)


def test_the_expected_volume_equals_that_of_joint_draws() -> None:
    trials = told(sobol_points(2, 6, 1))
    model = fitted(trials, BOTH)
    beliefs, reference = hypervolume.objectives(model, SPACE.top), hypervolume.reference(model, SPACE.top)
    assert reference is not None
    acquisition = hypervolume.make(situation(model, model, NONE), beliefs=beliefs, reference=reference, samples=256)
    X = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.55, 0.35]], dtype=torch.float64)
    for x, found in zip(X, acquisition(X).exp().tolist(), strict=True):
        draws = []
        for k, belief in enumerate(beliefs):
            mean, covariance = belief.joint(torch.cat([model.data.X, x[None]])[None])
            root = torch.linalg.cholesky(covariance[0] + 1e-9 * covariance[0].diagonal().max() * torch.eye(7))
            draws.append(mean[0] + torch.randn(3000, 7, generator=torch.Generator().manual_seed(k)).double() @ root.T)
        drawn = torch.stack(draws, dim=-1)  # s x (n + 1) x k
        gains = [beaten(front, reference) - beaten(front[:-1], reference) for front in drawn]
        assert found == pytest.approx(float(np.mean(gains)), abs=1e-3 + 4 * float(np.std(gains)) / math.sqrt(3000))


def test_the_gradient_is_that_of_finite_differences() -> None:
    model = fitted(told(sobol_points(2, 12, 2)), BOTH)
    beliefs = hypervolume.objectives(model, SPACE.top)
    acquisition = hypervolume.make(
        situation(model, model, NONE), beliefs=beliefs, reference=hypervolume.reference(model, SPACE.top)
    )
    X = rand(6, 2, seed=3).requires_grad_()
    value = acquisition(X)
    (gradient,) = torch.autograd.grad(value.sum(), X)
    step = 1e-6
    for j in range(2):
        way = step * torch.eye(2, dtype=torch.float64)[j]
        with torch.no_grad():
            slope = (acquisition(X + way) - acquisition(X - way)) / (2 * step)
        assert torch.allclose(slope, gradient[:, j], rtol=1e-3, atol=1e-3)


def test_a_pending_run_leaves_little_to_gain_beside_it() -> None:
    model = fitted(told(sobol_points(2, 12, 2)), BOTH)
    x = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    believed = model.believe(x, model.data.place(SPACE.top)[None])
    values = []
    for at, pending in ((model, NONE), (believed, x)):
        beliefs = hypervolume.objectives(at, SPACE.top)
        reference = hypervolume.reference(model, SPACE.top)
        made = hypervolume.make(situation(model, at, pending), beliefs=beliefs, reference=reference)
        values.append(float(made(x + 1e-3)))
    assert values[1] < values[0] - 2


def test_without_a_reference_the_front_of_the_means_gives_one() -> None:
    model = fitted(told(sobol_points(2, 12, 2)), Pareto("branin", "currin"))
    beliefs = hypervolume.objectives(model, SPACE.top)
    mean = torch.stack([belief.value(model.data.X)[0] for belief in beliefs], dim=-1).detach()
    expected = reference_point([tuple(row) for row in (-mean[dataset.undominated(-mean)]).tolist()])
    assert hypervolume.reference(model, SPACE.top) is None
    assert (-hypervolume.inferred(mean)).tolist() == pytest.approx(expected)
    assert torch.isfinite(hypervolume.make(situation(model, model, NONE), beliefs=beliefs)(rand(5, 2))).all()


def test_before_any_run_counts_the_balanced_sum_is_followed() -> None:
    model = fitted(
        told(sobol_points(2, 12, 2), memory=90.0), Pareto("branin", "currin", subject_to=[AtMost("memory", 80)])
    )
    made = hypervolume.make(
        situation(model, model, NONE), beliefs=hypervolume.objectives(model, SPACE.top), points=NONE
    )
    X = rand(5, 2)
    assert torch.equal(made(X), model.at(SPACE.top).value(X)[0])


def test_leaders_are_the_points_of_the_front_first() -> None:
    model = fitted(told(sobol_points(2, 20, 2)), BOTH)
    beliefs, X = hypervolume.objectives(model, SPACE.top), model.data.X
    mean = torch.stack([belief.value(X)[0] for belief in beliefs], dim=-1)
    front = X[dataset.undominated(-mean)]
    led = hypervolume.leaders(beliefs, X, len(front))
    assert {tuple(x) for x in led.tolist()} == {tuple(x) for x in front.tolist()}


def test_wrong_settings_are_refused() -> None:
    model = fitted(told(sobol_points(2, 6, 1)), BOTH)
    beliefs = hypervolume.objectives(model, SPACE.top)
    with pytest.raises(ValueError, match="samples to be a whole number of at least 1, got 0"):
        hypervolume.make(situation(model, model, NONE), beliefs=beliefs, samples=0)


def search(objective: Pareto, measure: Measure, start: int, total: int, q: int, seed: int) -> list[Trial]:
    """`total` runs, of which the first `start` fill the space and later ones are proposed q at a time."""
    rng = np.random.default_rng(seed)
    trials: list[Trial] = []

    def tell(points: np.ndarray) -> None:
        for config in map(SPACE.decode, points):
            metrics = measure(config)
            trials.append(Trial(len(trials), config, SPACE.top, 0, "bayes", status="finished", metrics=metrics))

    tell(sobol_points(2, start, seed))
    while len(trials) < total:
        model = fitted(tuple(trials), objective)
        believed, pending, X = model, NONE, model.data.X
        for _ in range(min(q, total - len(trials))):
            beliefs = hypervolume.objectives(believed, SPACE.top)
            reference = hypervolume.reference(model, SPACE.top)
            now = situation(model, believed, pending, seed=int(rng.integers(2**31)))
            acquisition = hypervolume.make(now, beliefs=beliefs, reference=reference)
            taken = torch.cat([X, pending])
            x = maximise(acquisition, SPACE, hypervolume.leaders(beliefs, taken), taken, rng).x[None]
            believed, pending = believed.believe(x, torch.zeros(1, 0, dtype=torch.float64)), torch.cat([pending, x])
        tell(pending.numpy())
    return trials


def bowls(config: Mapping[str, float]) -> dict[str, float]:
    """Their front is the straight line between the two centres, where the roots of both add up to the distance."""
    x, y = config["x"], config["y"]
    return {"one": (x - 0.2) ** 2 + (y - 0.3) ** 2, "two": (x - 0.8) ** 2 + (y - 0.6) ** 2}


@pytest.mark.parametrize("reference", [(0.6, 0.6), None], ids=["reference", "none"])
def test_two_bowls_are_known_along_their_whole_front_after_a_few_runs(reference: tuple[float, float] | None) -> None:
    t = np.linspace(0, 1, 201)
    largest = volume([(0.45 * a * a, 0.45 * (1 - a) ** 2) for a in t], (0.6, 0.6))
    trials = search(Pareto("one", "two", reference=reference), bowls, 6, 16, 5, seed=0)
    found, start = (
        volume([tuple((r.metrics or {}).values()) for r in part], (0.6, 0.6)) for part in (trials, trials[:6])
    )
    assert start < 0.8 * largest
    assert found > 0.93 * largest


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("reference", "noise"), [((18.0, 6.0), 0.0), (None, 0.0), ((18.0, 6.0), 0.1)])
def test_the_volume_is_reached_in_60_runs(seed: int, reference: tuple[float, float] | None, noise: float) -> None:
    rng = np.random.default_rng(seed)

    def measure(config: Mapping[str, float]) -> dict[str, float]:
        return {name: value + noise * rng.standard_normal() for name, value in branin_currin(config).items()}

    trials = search(Pareto("branin", "currin", reference=reference), measure, 6, 60, 4, seed)
    found = volume([tuple(branin_currin(trial.config).values()) for trial in trials], (18.0, 6.0))
    # The largest volume, 59.36, is that of botorch.test_functions.BraninCurrin. Without a reference the ends of the
    # front are anyone's guess: two of three seeds reach 91% and 94%.
    assert found >= (0.95 if reference else 0.9) * 59.36011874867746
