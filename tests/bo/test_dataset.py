from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bo import Maximize, Minimize, WeightedSum, dataset
from bo.dataset import Dataset, compress, fit_outcome
from bo.objective import Objective
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
    outcome = fit_outcome(u, cell, torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64), every(u))
    y = outcome.forward(u, cell)[:, 0]
    order = torch.argsort(u[:, 0])
    assert torch.isfinite(y).all()
    assert (y[order].diff() <= 1e-9).all()


def test_the_transform_is_affine_below_its_cap_and_can_be_inverted() -> None:
    u = oriented([2.0, 2.01, 2.03, 2.06, 9.0, 2.04])
    cell = torch.zeros(6, dtype=torch.long)
    outcome = fit_outcome(u, cell, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), every(u))
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
    outcome = fit_outcome(u, cell, torch.zeros(1, 0, dtype=torch.float64), weight, every(u))
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
    assert len(runs.started(TARGET)) == 2
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
