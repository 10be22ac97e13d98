from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bo import Maximize, Minimize
from bo.objective import Objective
from bo.ports import POLICIES, History, Policy, Proposal, load
from bo.trial import Trial
from search_spaces import Choice, Integer, Real, Space

FLAT = Space(x=Real(0, 1), y=Real(0, 1))
MIXED = Space(lr=Real(1e-5, 1.0, log=True), layers=Integer(1, 8), optimizer=Choice(["adamw", "sgd", "lion"]))
SEEDED = Space(lr=Real(1e-5, 1.0, log=True), width=Integer(1, 64, log=True))
Measure = Callable[[Mapping[str, Any]], Mapping[str, float]]


def bayes() -> Policy:
    policy: Policy = load(POLICIES, "bayes", "policy")()
    return policy


def trial(
    space: Space, id: int, config: Mapping[str, Any], metrics: Mapping[str, float] | None, source: str = "bayes"
) -> Trial:
    """A trial as the study keeps it: one whose loss is not finite has diverged; without metrics it runs."""
    if metrics is None:
        return Trial(id, config, space.top, id, source, 1.0)
    status = "finished" if math.isfinite(metrics["loss"]) else "diverged"
    return Trial(id, config, space.top, id, source, 1.0, status=status, metrics=metrics)


def given(space: Space, n: int, measure: Measure, objective: Objective | None = None, seed: int = 0) -> History:
    """n told trials at random configs."""
    configs = space.sample(np.random.default_rng(seed), n)
    trials = tuple(trial(space, i, config, measure(config)) for i, config in enumerate(configs))
    return History(space, objective or Minimize("loss"), trials, seen=n)


def go_on(history: History, n: int, measure: Measure | None) -> tuple[History, list[Proposal]]:
    """n more trials, one after the other, told by `measure`, left running without one."""
    made = []
    for _ in range(n):
        id = len(history.trials)
        (proposal,) = bayes().propose(history, 1, np.random.default_rng([5, id]))
        assert history.space.validate(proposal.config) == proposal.config
        made.append(proposal)
        metrics = measure(proposal.config) if measure else None
        ended = trial(history.space, id, proposal.config, metrics, proposal.source)
        history = replace(history, trials=(*history.trials, ended), memory=proposal.memory, seen=id + 1)
    return history, made


def by_the_model(proposals: list[Proposal]) -> bool:
    """Whether the model made them all: what stands in for it is of source "sobol". It may repeat a run on purpose."""
    return all(p.source == "bayes" and (p.note is None or "on purpose" in p.note) for p in proposals)


def bowl(config: Mapping[str, Any]) -> float:
    return float((config["x"] - 0.3) ** 2 + (config["y"] - 0.6) ** 2)


def test_points_told_many_times_do_not_stop_the_model() -> None:
    noise = np.random.default_rng(0)
    history = given(FLAT, 6, lambda c: {"loss": bowl(c)})
    again = [
        trial(FLAT, 6 + i, history.trials[i % 6].config, {"loss": bowl(history.trials[i % 6].config) + noise.normal()})
        for i in range(24)
    ]
    for extra in (again, [replace(t, metrics=history.trials[t.id % 6].metrics) for t in again]):
        _, made = go_on(replace(history, trials=(*history.trials, *extra)), 3, lambda c: {"loss": bowl(c)})
        assert by_the_model(made)


@pytest.mark.parametrize("space", [FLAT, MIXED], ids=["numbers", "mixed"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5e300, 5e-324], ids=["zero", "one", "huge", "denormal"])
def test_constant_outcomes_do_not_stop_the_model(space: Space, value: float) -> None:
    history, made = go_on(given(space, 8, lambda c: {"loss": value}), 4, lambda c: {"loss": value})
    assert by_the_model(made)
    X = space.encode_all([t.config for t in history.trials[-4:]])
    apart = np.abs(X[:, None] - X[None]).max(-1)[~np.eye(4, dtype=bool)]
    assert apart.min() > 1e-3
    assert space.validate(bayes().recommend(history, space.top, np.random.default_rng(0)).config)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shift", [1.0, 0.0, -2.0], ids=["positive", "from zero", "negative"])
def test_the_unit_of_the_loss_changes_nothing(scale: float, shift: float) -> None:
    """The optimum is found in any unit, and it is the same trials that find it."""

    def measure(unit: float) -> Measure:
        return lambda config: {"loss": unit * (bowl(config) + shift)}

    history, made = go_on(given(FLAT, 5, measure(scale)), 10, measure(scale))
    assert by_the_model(made)
    assert min(bowl(t.config) for t in history.trials) < 2e-3
    found = bayes().recommend(history, FLAT.top, np.random.default_rng(0))
    assert bowl(found.config) < 2e-3
    assert found.mean == pytest.approx(scale * shift, abs=0.05 * scale)
    plain, _ = go_on(given(FLAT, 5, measure(1.0)), 1, measure(1.0))
    first = history.trials[5].config
    assert [first["x"], first["y"]] == pytest.approx([plain.trials[5].config[k] for k in "xy"], abs=0.02)


@pytest.mark.parametrize("objective", [Minimize("loss"), Maximize("loss")], ids=["min", "max"])
def test_every_number_of_results_from_none_on_gives_a_proposal(objective: Objective) -> None:
    history = History(MIXED, objective, ())
    sources = []
    for n in range(7):
        assert MIXED.validate(bayes().recommend(history, MIXED.top, np.random.default_rng(0)).config), n
        history, (proposal,) = go_on(history, 1, lambda c: {"loss": -math.log(c["lr"])})
        sources.append(proposal.source)
        assert proposal.note is None
    assert sources[-1] == "bayes"


def test_one_result_among_many_that_diverged_is_enough_to_say_why_there_is_no_model() -> None:
    history = given(FLAT, 8, lambda c: {"loss": math.nan})
    history = replace(
        history, trials=(replace(history.trials[0], status="finished", metrics={"loss": 1.0}), *history.trials[1:])
    )
    for seed in range(3):
        (proposal,) = bayes().propose(history, 1, np.random.default_rng(seed))
        assert FLAT.validate(proposal.config)
        assert proposal.source == "bayes" or proposal.note
    assert FLAT.validate(bayes().recommend(history, FLAT.top, np.random.default_rng(0)).config)


@pytest.mark.parametrize("space", [FLAT, MIXED], ids=["numbers", "mixed"])
def test_when_all_runs_diverge_the_proposals_keep_filling_the_space_and_say_so(space: Space) -> None:
    history, made = go_on(History(space, Minimize("loss"), ()), 12, lambda c: {"loss": math.nan})
    assert len({str(proposal.config) for proposal in made}) == 12
    assert all(proposal.note for proposal in made[4:])
    assert bayes().recommend(history, space.top, np.random.default_rng(0)).note


def test_a_third_of_the_space_that_always_diverges_is_left_alone() -> None:
    """Runs with x > 2/3 diverge, where the loss would go on falling."""

    def measure(config: Mapping[str, Any]) -> Mapping[str, float]:
        return {"loss": math.nan if config["x"] > 2 / 3 else (config["x"] - 0.9) ** 2 + 0.2 * (config["y"] - 0.4) ** 2}

    history, made = go_on(given(FLAT, 6, measure, seed=1), 16, measure)
    assert by_the_model(made)
    assert sum(t.status == "diverged" for t in history.trials[-16:]) <= 8
    best = min(t.metrics["loss"] for t in history.trials if t.metrics and math.isfinite(t.metrics["loss"]))
    assert best < (2 / 3 - 0.9) ** 2 + 0.03  # it comes closer to the edge step by step
    found = bayes().recommend(history, FLAT.top, np.random.default_rng(0))
    assert found.config["x"] <= 2 / 3 + 0.01


def test_thirty_seeds_of_one_config_do_not_stop_the_model() -> None:
    """Thirty runs of one config differ by their noise; what the noise is, is learned from them."""
    noise = np.random.default_rng(3)
    history = given(SEEDED, 4, lambda c: {"loss": 3 + 0.02 * math.log10(c["lr"] / 3e-3) ** 2 + 0.01 * noise.normal()})
    config = {"lr": 1e-3, "width": 8}
    seeds = [trial(SEEDED, 4 + i, config, {"loss": 3.0 + 0.01 * noise.normal()}) for i in range(30)]
    only = replace(history, trials=tuple(seeds))
    for told in (replace(history, trials=(*history.trials, *seeds)), only):
        history, made = go_on(told, 3, lambda c: {"loss": 3.0 + 0.01 * noise.normal()})
        assert by_the_model(made)
        found = bayes().recommend(history, SEEDED.top, np.random.default_rng(0))
        assert found.mean == pytest.approx(3.0, abs=0.1)


def test_thirty_equal_results_of_one_config_do_not_stop_the_model() -> None:
    seeds = tuple(trial(SEEDED, i, {"lr": 1e-3, "width": 8}, {"loss": 3.0}) for i in range(30))
    _, made = go_on(History(SEEDED, Minimize("loss"), seeds), 3, lambda c: {"loss": 3.0})
    assert by_the_model(made)


def test_a_thousand_pending_trials_leave_room_for_one_more() -> None:
    history = given(FLAT, 12, lambda c: {"loss": bowl(c)})
    waiting = FLAT.sample(np.random.default_rng(9), 1000)
    running = tuple(trial(FLAT, 12 + i, config, None) for i, config in enumerate(waiting))
    _, made = go_on(replace(history, trials=(*history.trials, *running)), 1, None)
    assert by_the_model(made)
    X = FLAT.encode_all([*waiting, made[0].config])
    assert np.abs(X[:-1] - X[-1]).max(-1).min() > 1e-3


@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf])
def test_a_metric_that_the_objective_does_not_name_may_be_anything(other: float) -> None:
    def measure(config: Mapping[str, Any]) -> Mapping[str, float]:
        return {"loss": bowl(config), "seconds": other}

    plain, _ = go_on(given(FLAT, 6, lambda c: {"loss": bowl(c)}), 3, lambda c: {"loss": bowl(c)})
    history, made = go_on(given(FLAT, 6, measure), 3, measure)
    assert by_the_model(made)
    assert [t.config for t in history.trials] == [t.config for t in plain.trials]


@pytest.mark.parametrize("worst", [math.inf, -math.inf, math.nan])
def test_an_infinite_loss_is_a_diverged_run(worst: float) -> None:
    def measure(config: Mapping[str, Any]) -> Mapping[str, float]:
        return {"loss": worst if config["x"] > 0.8 else bowl(config)}

    history, made = go_on(given(FLAT, 8, measure), 4, measure)
    assert {t.status for t in history.trials} == {"finished", "diverged"}
    assert by_the_model(made)
    found = bayes().recommend(history, FLAT.top, np.random.default_rng(0))
    assert found.mean is not None
    assert math.isfinite(found.mean)


def test_one_loss_that_exploded_does_not_hide_the_others() -> None:
    def measure(config: Mapping[str, Any]) -> Mapping[str, float]:
        return {"loss": 1e15 if config["x"] > 0.9 else 1.0 + bowl(config)}

    history, made = go_on(given(FLAT, 8, measure, seed=2), 10, measure)
    assert by_the_model(made)
    assert min(bowl(t.config) for t in history.trials) < 5e-3
