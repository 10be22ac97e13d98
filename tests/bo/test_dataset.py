from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bo import AtLeast, AtMost, Maximize, Minimize, Pareto, WeightedSum, dataset
from bo.dataset import Dataset, compress, fit_outcome
from bo.objective import Objective, undominated
from bo.ports import History
from bo.trial import Trial
from search_spaces import Choice, Fidelity, Mixture, Real, Scale, Space

SPACE = Space(
    lr=Real(1e-4, 1e-2, log=True),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {"momentum": Real(0.0, 0.9)}}),
    data=Mixture("code", "prose"),
    fidelity=Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7}),
)
SMALL = SPACE.fidelity.scale({"params": 1e5, "tokens": 1e6})
TARGET = SPACE.fidelity.target


def told(id: int, scale: Scale, status: str = "finished", **metrics: float) -> Trial:
    x = [0.1 * (id % 10) + 0.02, 0.25, 0.5, 0.5, 0.8, 0.3]
    return Trial(id, SPACE.decode(x), scale, 0, "sobol", status=status, metrics=metrics or None)  # type: ignore[arg-type]


def data(*trials: Trial, objective: Objective = Minimize("loss")) -> Dataset:  # noqa: B008
    return dataset.from_history(History(SPACE, objective, trials))


def oriented(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(len(values), -1)


def every(u: Tensor) -> Tensor:
    return torch.ones(len(u), dtype=torch.bool)


def test_larger_is_better_whatever_the_objective_says() -> None:
    losses = data(*(told(i, TARGET, loss=2 + 0.01 * i) for i in range(5)))
    assert (losses.Y[:, 0].diff() < 0).all()
    scores = data(*(told(i, TARGET, acc=0.5 + 0.01 * i) for i in range(5)), objective=Maximize("acc"))
    assert (scores.Y[:, 0].diff() > 0).all()


def test_every_cell_is_centred_at_its_own_best_in_one_unit() -> None:
    losses = [2.0, 2.02, 2.05]
    both = data(
        *(told(i, TARGET, loss=loss) for i, loss in enumerate(losses)),
        *(told(3 + i, SMALL, loss=1.5 * loss) for i, loss in enumerate(losses)),
    )
    assert torch.allclose(both.Y[:3], both.Y[3:], atol=1e-12)
    assert torch.allclose(both.S[3:], torch.as_tensor(SPACE.fidelity.log2(SMALL)).expand(3, 2))


@given(st.lists(st.floats(0.5, 1e6), min_size=1, max_size=12), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_the_transform_keeps_the_order_within_a_cell(values: list[float], shift: int) -> None:
    u = oriented(values) - (0, 5.0, 1e5)[shift]
    cell = torch.zeros(len(u), dtype=torch.long)
    outcome = fit_outcome(
        u, cell, torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), every(u)
    )
    y = outcome.forward(u, cell)[:, 0]
    order = torch.argsort(u[:, 0])
    assert torch.isfinite(y).all()
    assert (y[order].diff() <= 1e-9).all()


def test_the_transform_is_affine_below_its_cap_and_can_be_inverted() -> None:
    u = oriented([2.0, 2.01, 2.03, 2.06, 9.0, 2.04])
    cell = torch.zeros(6, dtype=torch.long)
    outcome = fit_outcome(
        u, cell, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), every(u)
    )
    y = outcome.forward(u, cell)
    shift, gain = outcome.affine(outcome.level(torch.zeros(2, dtype=torch.float64)))
    near = outcome.excess(u, cell)[:, 0] <= outcome.cap
    assert near.sum() >= 3
    assert torch.allclose((shift - gain * y)[near], u[near], rtol=1e-12)
    level = outcome.level(torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(torch.stack([outcome.backward(row, level)[0] for row in y]), u, rtol=1e-12)
    assert not torch.allclose((shift - gain * y)[4], u[4], rtol=0.1)


def test_compression_has_no_kink_at_the_cap() -> None:
    cap = torch.tensor(0.05, dtype=torch.float64)
    for side in (0.05 - 1e-9, 0.05 + 1e-9):
        x = torch.tensor(side, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(compress(x, cap), x)
        assert float(slope) == pytest.approx(1.0, abs=1e-6)


def test_a_metric_that_is_sacrificed_at_the_best_mixture_stays_linear() -> None:
    # The best objective lies where "b" is 40% above its own best, as with mixtures.
    u = oriented([[1.0, 2.8], [1.02, 2.79], [1.5, 2.6], [2.0, 2.4], [4.0, 2.0]])
    cell = torch.zeros(5, dtype=torch.long)
    weight = torch.tensor([1.0, 0.2], dtype=torch.float64)
    outcome = fit_outcome(u, cell, torch.zeros(1, 0, dtype=torch.float64), weight[None], every(u))
    best = (u @ weight).argmin()
    assert (outcome.excess(u, cell)[best] <= outcome.cap).all()


def test_diverged_runs_are_the_worst_of_what_was_seen() -> None:
    runs = data(
        told(0, TARGET, loss=2.0),
        told(1, TARGET, loss=50.0),
        told(2, SMALL, loss=3.0),
        told(3, TARGET, "diverged"),
        told(4, TARGET, loss=math.inf),
    )
    assert runs.diverged.tolist() == [False, False, False, True, True]
    assert float(runs.Y[3, 0]) == float(runs.Y[4, 0]) == float(runs.Y[:3, 0].min())


@pytest.mark.parametrize(
    "trials",
    [
        (),
        (told(0, TARGET, loss=2.0),),
        (told(0, TARGET, loss=2.0), told(1, TARGET, loss=2.0), told(2, SMALL, loss=2.0)),
        (told(0, TARGET, "diverged"), told(1, SMALL, "diverged")),
        (told(0, TARGET, loss=0.0), told(1, TARGET, loss=-1e12)),
    ],
    ids=["nothing", "one", "ties", "all diverged", "zero and huge"],
)
def test_odd_histories_become_finite_tensors(trials: tuple[Trial, ...]) -> None:
    runs = data(*trials)
    assert runs.X.shape == (len(trials), 6)
    assert runs.S.shape == (len(trials), 2)
    assert runs.Y.shape == (len(trials), 1)
    assert torch.isfinite(runs.Y).all()
    assert runs.finite == sum(trial.metrics is not None for trial in trials)


def test_open_trials_are_kept_apart_and_failed_ones_do_not_run() -> None:
    runs = data(
        told(0, TARGET, loss=2.0), told(1, TARGET, "running"), told(2, TARGET, "failed"), told(3, SMALL, "running")
    )
    assert len(runs.Y) == 1
    assert len(runs.taken(TARGET)) == 3
    assert len(runs.underway(TARGET)) == 1
    assert len(runs.taken(SMALL)) == 1


def test_metrics_are_weighted_by_the_objective_and_others_are_ignored() -> None:
    objective = WeightedSum({"a": 0.25, "b": -2.0})
    runs = data(*(told(i, TARGET, a=1.0 + i, b=5.0 - i * i, c=math.nan) for i in range(3)), objective=objective)
    assert runs.outcome.weight.tolist() == [0.25, 2.0]
    assert runs.finite == 3
    assert (runs.Y.diff(dim=0) < 0).all()


def test_the_level_of_an_unseen_scale_is_extrapolated_with_a_wide_deviation() -> None:
    middle = SPACE.fidelity.scale({"params": 1e5, "tokens": 1e7})
    runs = data(told(0, SMALL, loss=4.0), told(1, middle, loss=3.5))
    unseen = runs.outcome.level(runs.place(TARGET))
    assert 2.0 < float(unseen.best) < 3.6
    assert float(unseen.sd) > 0.1
    assert float(runs.outcome.level(runs.place(SMALL)).best) == 4.0
    assert float(runs.outcome.level(runs.place(SMALL)).sd) == 0.0


def test_what_is_foretold_of_an_unseen_scale_goes_by_the_law_of_the_others_and_leaves_limits_alone() -> None:
    axis = Fidelity(params=(1e6,), tokens=Real(1e6, 1e10), target={"params": 1e6, "tokens": 1e10})
    space, trials = Space(x=Real(0, 1), fidelity=axis), []
    for k in range(5):  # so steep a fall and so high a floor that no line on the logarithm does
        at = axis.scale({"params": 1e6, "tokens": 1e6 * 8.0**k})
        for x in (0.1, 0.5, 0.9):
            metrics = {"loss": 2.0 + 3.0 * 8.0 ** (-0.5 * k) + abs(x - 0.5), "gb": 1.0}
            trials.append(Trial(len(trials), {"x": x}, at, 0, "added", status="finished", metrics=metrics))
    objective = Minimize("loss", subject_to=[AtMost("gb", 2.0)])
    runs = dataset.from_history(History(space, objective, tuple(trials)))
    place = runs.place(space.top)
    by_line, by_law = runs.outcome.level(place), runs.outcome.foretold(place)
    assert abs(float(by_law.best[0]) - 2.03) < 0.1 < abs(float(by_line.best[0]) - 2.03)
    assert by_law.sd[0] < by_line.sd[0]
    assert by_law.best[1] == by_law.sd[1] == 0.0
    seen = runs.place(trials[0].scale)
    assert torch.equal(runs.outcome.foretold(seen).best, runs.outcome.level(seen).best)


def test_a_run_that_may_not_be_made_here_does_not_set_what_the_others_are_measured_by() -> None:
    tokens = Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7})
    space = Space(data=Mixture("code", "prose", supply={"code": 1e6}, max_epochs=4), fidelity=tokens)

    def run(id: int, code: float, loss: float, source: str = "added") -> Trial:
        data = {"code": code, "prose": 1 - code}
        return Trial(id, {"data": data}, tokens.target, 0, source, status="finished", metrics={"loss": loss})

    own = [run(i, 0.1 * i, 2.0 + 0.01 * i) for i in range(4)]
    forbidden = run(4, 0.9, 1.0)
    alone, both = (dataset.from_history(History(space, Minimize("loss"), tuple(t))) for t in (own, [*own, forbidden]))
    assert both.outcome.best.tolist() == alone.outcome.best.tolist() == [[2.0]]
    assert both.Y[4] == both.Y[:4].max()
    assert both.Y[:4].std() > 0.5


def test_a_run_made_at_a_scale_where_nothing_is_allowed_is_learned_from_all_the_same() -> None:
    tokens = Fidelity(params=(1e5, 1e6), tokens=(1e6, 1e7), target={"params": 1e6, "tokens": 1e7})
    space = Space(data=Mixture("code", "prose", supply={"code": 5e6, "prose": 5e6}), fidelity=tokens)
    beyond = tokens.scale({"params": 1e6, "tokens": 1e9}, beyond=True)
    data = {"code": 0.5, "prose": 0.5}
    run = Trial(0, {"data": data}, beyond, 0, "added", status="finished", metrics={"loss": 1.5})
    assert dataset.from_history(History(space, Minimize("loss"), (run,))).outcome.best.tolist() == [[1.5]]


def test_a_limit_is_a_column_without_weight_and_kept_from_a_known_threshold_on() -> None:
    objective = Minimize("loss", subject_to=[AtMost("memory", 80), AtLeast("acc", 0.5)])
    memory, acc = [10.0, 79.9, 80.0, 80.1, 1e6], [0.9, 0.49, 0.5, 0.1, 0.51]
    runs = data(
        *(
            told(i, TARGET, loss=2 + 0.01 * i, memory=m, acc=a)
            for i, (m, a) in enumerate(zip(memory, acc, strict=True))
        ),
        objective=objective,
    )
    assert runs.Y.shape == (5, 3)
    assert runs.outcome.weight.tolist() == [1.0, 0.0, 0.0]
    kept = runs.Y[:, 1:] >= runs.outcome.threshold - 1e-12
    assert kept[:, 0].tolist() == [True, True, True, False, False]
    assert kept[:, 1].tolist() == [True, False, True, False, True]
    assert (runs.Y[:4, 1].diff() < 0).all()


def test_a_limited_metric_is_affine_around_its_limit_whatever_one_run_reports() -> None:
    memory = [70.0, 75.0, 78.0, 82.0, 90.0, 1e4]
    runs = data(
        *(told(i, TARGET, loss=2.0 + 0.1 * i, memory=m) for i, m in enumerate(memory)),
        objective=Minimize("loss", subject_to=[AtMost("memory", 80)]),
    )
    y = runs.Y[:, 1]
    slope = y[:5].diff() / torch.tensor(memory[:5], dtype=torch.float64).diff()
    assert torch.allclose(slope, slope[:1].expand(4), rtol=1e-9)
    assert float(y[0] - y[4]) > 0.3, "what is near the limit is told apart"
    level = runs.outcome.level(runs.place(TARGET))
    beyond = [float(runs.outcome.backward(row, level)[0][1]) for row in runs.Y]
    assert beyond == pytest.approx([m - 80 for m in memory])


def test_runs_that_break_a_limit_do_not_set_what_the_others_are_measured_by() -> None:
    losses, memory = [1.0, 2.0, 2.02, 2.05], [90.0, 70.0, 60.0, 50.0]
    trials = [told(i, TARGET, loss=x, memory=m) for i, (x, m) in enumerate(zip(losses, memory, strict=True))]
    limited = Minimize("loss", subject_to=[AtMost("memory", 80)])
    runs = data(*trials, objective=limited)
    assert runs.outcome.best[:, 0].tolist() == [2.0]
    assert runs.outcome.cap[0] == data(*trials[1:], objective=limited).outcome.cap[0]
    assert (runs.Y[:, 0].diff() < 0).all(), "beyond the limit it goes on getting better"
    none_kept = data(*trials[:1], objective=limited)
    assert none_kept.outcome.best[:, 0].tolist() == [1.0]


def test_a_run_without_a_finite_limited_metric_is_a_diverged_one() -> None:
    runs = data(
        told(0, TARGET, loss=2.0, memory=70.0),
        told(1, TARGET, loss=1.0, memory=math.nan),
        objective=Minimize("loss", subject_to=[AtMost("memory", 80)]),
    )
    assert runs.diverged.tolist() == [False, True]


def test_the_level_of_an_unseen_scale_leaves_limits_where_they_are() -> None:
    runs = data(told(0, SMALL, loss=4.0, memory=70.0), objective=Minimize("loss", subject_to=[AtMost("memory", 80)]))
    unseen = runs.outcome.level(runs.place(TARGET))
    assert float(unseen.best[1]) == float(unseen.sd[1]) == 0.0
    assert float(unseen.sd[0]) > 0


def test_several_objectives_are_parts_of_shared_columns() -> None:
    objective = Pareto("loss", WeightedSum({"loss": 1.0, "speed": -0.5}), subject_to=[AtMost("memory", 80)])
    runs = data(
        *(told(i, TARGET, loss=2 + 0.01 * i, speed=10.0 + i * i, memory=70.0) for i in range(5)), objective=objective
    )
    assert runs.outcome.parts.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]]
    assert float(runs.outcome.weight[2]) == 0.0
    assert (runs.outcome.weight[:2] > 0).all()
    assert (runs.Y[:, 0].diff() < 0).all()
    assert (runs.Y[:, 1].diff() > 0).all()


def test_metrics_stay_linear_along_the_whole_front() -> None:
    losses, times = [2.0, 2.5, 3.0, 3.5, 3.4], [9.0, 6.0, 4.0, 3.0, 50.0]
    runs = data(
        *(told(i, TARGET, loss=x, time=t) for i, (x, t) in enumerate(zip(losses, times, strict=True))),
        objective=Pareto("loss", "time"),
    )
    excess = runs.outcome.excess(torch.tensor([losses, times], dtype=torch.float64).T, runs.cell)
    assert (excess[:4] <= runs.outcome.cap).all()
    assert float(excess[4, 1]) > float(runs.outcome.cap[1])


@given(st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 2), min_size=1, max_size=10))
@settings(max_examples=40, deadline=None)
def test_the_front_of_tensors_is_that_of_numbers(points: list[tuple[float, ...]]) -> None:
    mask = dataset.undominated(torch.tensor(points, dtype=torch.float64))
    assert mask.nonzero()[:, 0].tolist() == undominated(points)
