from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bo import Maximize, Minimize, Pareto, Study, WeightedSum
from bo.acquisition.acquisition import ACQUISITIONS
from bo.objective import Function, Objective
from bo.policies import guard, model_choice, posterior
from bo.policies.bayes import Bayes
from bo.policies.design import SHOT
from bo.policies.engine import Engine
from bo.policies.ladder import PROXY, Ladder
from bo.policies.plan import plan
from bo.policies.sobol import Sobol
from bo.ports import POLICIES, History, Limits, Policy, Proposal, load
from bo.surrogates.hyperparameters import NumericalError
from bo.trial import Trial
from search_spaces import Choice, Fidelity, Integer, Mixture, Real, Scale, Schedule, Space
from search_spaces.mixture_schedule import MixtureSchedule

SCALES = Fidelity(
    params={"tiny": 1e5, "small": 4e5, "full": 1.6e6},
    tokens=(1e6, 4e6, 1.6e7),
    target={"params": "full", "tokens": 1.6e7},
)
RICH = Space(
    lr=Real(1e-4, 1e-1, log=True),
    batch_size=Integer(16, 256, log=True),
    schedule=Schedule("cosine", "linear", warmup=0.02, floor=0.0, wsd={"decay": Real(0.05, 0.3)}),
    optimizer=Choice({"adamw": {"beta": Real(0.8, 0.99)}, "sgd": {}}),
    data=Mixture("code", "docs", "prose", floor=0.02),
    fidelity=SCALES,
)
FLAT = Space(x=Real(0, 1), y=Real(0, 1), z=Real(0, 1))
DRIFT = Space(lr=Real(2.0**-12, 1.0, log=True), b=Real(1, 256, log=True), fidelity=SCALES)
Measure = Callable[[Mapping[str, Any], Scale, int], Mapping[str, float] | None]


#: The search over scales takes seconds a proposal; tests of its own look at it each time.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "multi_fidelity" else name for name in POLICIES]


def policies() -> dict[str, Policy]:
    # The knowledge gradient over scales has its own tests, and takes its time.
    settings = {"multi_fidelity": {"acquisition": "ei_cooled"}}
    return {name: load(POLICIES, name, "policy")(**settings.get(name, {})) for name in POLICIES}


def run(
    policy: Policy,
    space: Space,
    objective: Objective,
    measure: Measure,
    limits: Limits = Limits(),  # noqa: B008
    seed: int = 0,
    trials: tuple[Trial, ...] = (),
) -> tuple[History, list[Proposal]]:
    """One trial after the other until the policy has had enough; `measure` gives None for a run that diverges."""
    history, proposals = History(space, objective, trials, limits), []
    while found := policy.propose(history, 1, np.random.default_rng([seed, len(history.trials)])):
        (proposal,) = found
        assert space.validate(proposal.config) == proposal.config
        proposals.append(proposal)
        history = told(history, proposal, measure)
    return history, proposals


def told(history: History, proposal: Proposal, measure: Measure | None) -> History:
    id, space = len(history.trials), history.space
    cost = space.fidelity.relative_cost(proposal.scale) if space.fidelity else 1.0
    trial = Trial(id, proposal.config, proposal.scale, id, proposal.source, cost, predicted=proposal.predicted)
    if measure:
        metrics = measure(proposal.config, proposal.scale, id)
        trial = replace(trial, status="finished" if metrics else "diverged", metrics=metrics)
    return replace(history, trials=(*history.trials, trial), memory=proposal.memory, seen=id + 1)


def bowl(config: Mapping[str, Any], scale: Scale, id: int) -> dict[str, float]:
    return {"loss": 2 + (config["x"] - 0.3) ** 2 + 2 * (config["y"] - 0.8) ** 2 + 0.5 * (config["z"] - 0.1) ** 2}


def drifting(config: Mapping[str, Any], scale: Scale, id: int) -> dict[str, float]:
    """The best learning rate falls by 0.4 octaves for each of parameters, the best batch grows with tokens."""
    n, d = SCALES.log2(scale)
    lr, b = math.log2(config["lr"]) + 7 + 0.4 * n, math.log2(config["b"]) - 5 - 0.3 * d
    noise = 1e-3 * float(np.random.default_rng(id).standard_normal())
    return {"loss": 3 - 0.05 * (n + d) + 0.02 * lr**2 + 0.01 * b**2 + noise}


# ------------------------------------------------------------------------------------------- whatever the results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "measure",
    [
        lambda c, s, i: {"loss": float(np.random.default_rng(i).normal())},
        lambda c, s, i: {"loss": float(10.0 ** np.random.default_rng(i).uniform(-3, 12))},
        lambda c, s, i: None,
        lambda c, s, i: None if i % 2 else {"loss": 2.0 + c["lr"]},
        lambda c, s, i: {"loss": 1.0},
        lambda c, s, i: {"loss": 1e12 * (2.0 + c["lr"])},
        lambda c, s, i: {"loss": -1e12 + c["lr"]},
    ],
    ids=["random", "over 15 decades", "all diverged", "every other diverged", "constant", "huge", "huge and negative"],
)
def test_a_policy_survives_any_results(name: str, measure: Measure) -> None:
    history, proposals = run(policies()[name], RICH, Minimize("loss"), measure, Limits(n_trials=16))
    assert len(history.trials) == 16
    for proposal in proposals:
        usual = (None, posterior.COVER, guard.ALONE)
        assert proposal.note in usual or measure(proposal.config, proposal.scale, 1) is None
        if proposal.predicted:
            assert proposal.predicted["low"] <= proposal.predicted["mean"] <= proposal.predicted["high"]
    for scale in (SCALES.target, SCALES.scale({"params": 1e8, "tokens": 1e9}, beyond=True)):
        found = policies()[name].recommend(history, scale, np.random.default_rng(0))
        assert RICH.validate(found.config)
        assert (found.mean is None) == (
            measure(found.config, scale, 0) is None and measure(found.config, scale, 2) is None
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_proposal_is_a_pure_function_of_history_and_generator(name: str) -> None:
    history, _ = run(policies()[name], DRIFT, Minimize("loss"), drifting, Limits(n_trials=27))
    history = replace(history, limits=Limits())
    torch.manual_seed(1)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = policies()[name].propose(history, 2, np.random.default_rng(7))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    assert policies()[name].propose(history, 2, np.random.default_rng(7)) == first
    scale = SCALES.target
    recommendations = [policies()[name].recommend(history, scale, np.random.default_rng(7)) for _ in range(2)]
    assert recommendations[0] == recommendations[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "limits", [Limits(n_trials=5), Limits(budget=3.0), Limits(n_trials=30, budget=4.5), Limits(budget=0.9)]
)
def test_limits_are_never_overrun_and_what_is_allowed_is_used(name: str, limits: Limits) -> None:
    history, _ = run(policies()[name], DRIFT, Minimize("loss"), drifting, limits)
    assert history.spent <= (limits.budget or math.inf) + 1e-9
    assert history.proposed <= (limits.n_trials or math.inf)
    assert history.proposed == limits.n_trials or history.spent > (limits.budget or math.inf) - 1
    assert len(policies()[name].propose(replace(history, trials=(), memory={}), 100, np.random.default_rng(0))) <= 60


@pytest.mark.parametrize("name", ["bayes", "ladder"])
def test_eight_pending_proposals_are_eight_different_ones(name: str) -> None:
    history, _ = run(policies()[name], DRIFT, Minimize("loss"), drifting, Limits(n_trials=24))
    history = replace(history, limits=Limits())
    for step in range(8):  # asked for one by one, as workers become free
        (proposal,) = policies()[name].propose(history, 1, np.random.default_rng(step))
        history = told(history, proposal, None)
    X = DRIFT.encode_all([trial.config for trial in history.trials[-8:]])
    apart = np.abs(X[:, None] - X[None]).max(-1)[~np.eye(8, dtype=bool)]
    assert apart.min() > 5e-3


def test_a_configuration_that_failed_is_not_asked_for_again() -> None:
    history, _ = run(Bayes(), FLAT, Minimize("loss"), bowl, Limits(n_trials=8))
    history = replace(history, limits=Limits())
    seen = []
    for step in range(4):
        (proposal,) = Bayes().propose(history, 1, np.random.default_rng(step))
        history = told(history, proposal, None)
        failed = replace(history.trials[-1], status="failed", error="out of memory")
        history = replace(history, trials=(*history.trials[:-1], failed))
        seen.append(FLAT.encode(proposal.config))
    apart = np.abs(np.array(seen)[:, None] - np.array(seen)[None]).max(-1)[~np.eye(4, dtype=bool)]
    assert apart.min() > 5e-3


def test_a_fit_that_fails_is_replaced_by_a_space_filling_point_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NumericalError("singular")

    history, _ = run(Bayes(), FLAT, Minimize("loss"), bowl, Limits(n_trials=6))
    monkeypatch.setattr(model_choice.composite, "fit", fail)
    (proposal,) = Bayes().propose(replace(history, limits=Limits()), 1, np.random.default_rng(0))
    assert proposal.source == "sobol"
    assert "singular" in str(proposal.note)
    best = min(history.trials, key=lambda trial: trial.metrics["loss"] if trial.metrics else math.inf)
    found = Bayes().recommend(history, Scale(), np.random.default_rng(0))
    assert found.config == best.config
    assert "singular" in str(found.note)


# -------------------------------------------------------------------------------------------------- each by itself


def nothing_finite(metrics: dict[str, float]) -> float:
    return math.nan


@pytest.mark.parametrize("name", POLICIES)
def test_where_no_run_has_a_finite_objective_space_filling_runs_go_on(name: str) -> None:
    policy = load(POLICIES, name, "policy")()
    history = History(FLAT, Function(nothing_finite, metrics=("loss",)), ())
    for i in range(6):
        trial = Trial(
            i, {"x": 0.1 * i, "y": 0.5, "z": 0.5}, FLAT.top, i, "sobol", status="finished", metrics={"loss": 1.0 + i}
        )
        history = replace(history, trials=(*history.trials, trial))
    (proposal,) = policy.propose(history, 1, np.random.default_rng(0))
    assert proposal.source == "sobol"


def test_sobol_trials_depend_on_their_number_alone() -> None:
    all_at_once = Sobol().propose(History(FLAT, Minimize("loss"), ()), 6, np.random.default_rng(3))
    history = History(FLAT, Minimize("loss"), ())
    for i in range(6):
        (proposal,) = Sobol().propose(history, 1, np.random.default_rng(3 + i))
        assert proposal.config == all_at_once[i].config
        history = told(history, proposal, bowl if i % 2 else None)


def test_sobol_runs_where_it_is_told_to() -> None:
    (proposal,) = Sobol(scale={"params": "tiny", "tokens": 1e6}).propose(
        History(RICH, Minimize("loss"), ()), 1, np.random.default_rng(0)
    )
    assert proposal.scale.label("params") == "tiny"
    with pytest.raises(ValueError, match="no fidelity"):
        Sobol(scale={"params": 1.0}).propose(History(FLAT, Minimize("loss"), ()), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match='"target" or a dictionary'):
        Sobol(scale="small")


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="n_init to be a whole number"):
        Bayes(n_init=0)
    with pytest.raises(ValueError, match="proxy_cap to be a finite number"):
        Ladder(proxy_cap=-1.0)


def test_bayes_beats_sobol() -> None:
    wins = 0
    for seed in range(8):
        best = []
        for policy in (Bayes(), Sobol()):
            history, _ = run(policy, FLAT, Minimize("loss"), bowl, Limits(n_trials=14), seed)
            best.append(min(trial.metrics["loss"] for trial in history.trials if trial.metrics))
        wins += best[0] < best[1]
    assert wins >= 7  # a one-sided sign test: P(>= 7 of 8 by chance) = 0.035


def test_bayes_reaches_the_optimum() -> None:
    history, _ = run(Bayes(), FLAT, Minimize("loss"), bowl, Limits(n_trials=20))
    assert min(trial.metrics["loss"] for trial in history.trials if trial.metrics) < 2.001
    found = Bayes().recommend(history, Scale(), np.random.default_rng(0))
    assert found.config["x"] == pytest.approx(0.3, abs=0.05)
    assert found.config["y"] == pytest.approx(0.8, abs=0.05)


def test_maximising_is_minimising_the_negative() -> None:
    limits, negative = Limits(n_trials=9), lambda c, s, i: {"loss": -bowl(c, s, i)["loss"]}
    _, up = run(Bayes(), FLAT, Maximize("loss"), negative, limits)
    _, down = run(
        Bayes(), FLAT, WeightedSum({"loss": 1.0}), lambda c, s, i: {"loss": -negative(c, s, i)["loss"]}, limits
    )
    history, _ = run(Bayes(), FLAT, Maximize("loss"), negative, Limits(n_trials=16))
    assert max(trial.metrics["loss"] for trial in history.trials if trial.metrics) > -2.02
    assert [p.source for p in up] == [p.source for p in down]


def test_runs_of_another_scale_choose_one_run_in_place_of_the_space_filling_start() -> None:
    small = SCALES.scale({"params": "small", "tokens": 4e6})
    configs = DRIFT.sample(np.random.default_rng(0), 12)
    added = tuple(
        Trial(i, config, small, 0, "added", 0.1, "finished", metrics=drifting(config, small, i))
        for i, config in enumerate(configs)
    )
    (proposal,) = Bayes().propose(History(DRIFT, Minimize("loss"), added), 1, np.random.default_rng(0))
    assert proposal.source == SHOT
    assert proposal.scale == SCALES.target


# -------------------------------------------------------------------------------------------------------- the ladder


def test_the_plan_spans_the_axes_within_its_cap() -> None:
    planned = plan(DRIFT, Limits(), 1.0).proxies
    cells = set(planned)
    assert len(cells) >= 3
    assert len({cell["params"] for cell in cells}) >= 2
    assert len({cell["tokens"] for cell in cells}) >= 2
    assert SCALES.target not in cells
    assert sum(SCALES.relative_cost(scale) for scale in planned) <= 1.0


def test_the_plan_leaves_enough_of_the_limits_to_the_target() -> None:
    spent = [SCALES.relative_cost(scale) for scale in plan(DRIFT, Limits(budget=0.5), 1.0).proxies]
    assert 0 < sum(spent) <= 0.25
    assert 0 < len(plan(DRIFT, Limits(n_trials=40), 1.0).proxies) <= 26
    assert plan(DRIFT, Limits(n_trials=8), 1.0).proxies == ()


def test_a_target_run_stays_affordable_beside_a_recipe_of_the_users() -> None:
    for budget in (1.3, 1.8, 2.2, 2.5, 3.0):
        recipe = Proposal({"lr": 0.5, "b": 2.0}, SCALES.target, "enqueued")
        history = told(History(DRIFT, Minimize("loss"), (), Limits(budget=budget)), recipe, drifting)
        history, proposals = run(Ladder(), DRIFT, Minimize("loss"), drifting, history.limits, trials=history.trials)
        at_target = sum(proposal.scale == SCALES.target for proposal in proposals)
        assert at_target >= (1 if budget >= 2 else 0)
        assert history.spent <= budget


def test_no_proxies_are_planned_where_they_do_not_pay() -> None:
    dear = Fidelity(params=(1e6, 2e6), tokens=(1e6,), target={"params": 2e6, "tokens": 1e6})
    assert plan(Space(x=Real(0, 1), fidelity=dear), Limits(), 1.0).proxies == ()
    assert plan(DRIFT, Limits(), 0.0).proxies == ()
    assert plan(FLAT, Limits(), 1.0).proxies == ()
    _, proposals = run(Ladder(proxy_cap=0.0), DRIFT, Minimize("loss"), drifting, Limits(n_trials=6))
    assert {proposal.scale for proposal in proposals} == {SCALES.target}
    assert [proposal.source for proposal in proposals][:3] == ["sobol"] * 3


def test_as_many_proxies_are_planned_as_save_more_than_they_cost() -> None:
    def priced(r: float) -> Space:
        def price(scale: Scale) -> float:
            return 1.0 if scale["params"] == 4e6 and scale["tokens"] == 2.0 else r

        scales = Fidelity(params=(1e6, 2e6, 4e6), tokens=(1.0, 2.0), target={"params": 4e6, "tokens": 2.0}, cost=price)
        return Space(lr=Real(1e-4, 1e-1, log=True), b=Real(1, 64, log=True), fidelity=scales)

    plans = [plan(priced(r), Limits(), 3.0) for r in (1 / 500, 1 / 70, 1 / 30, 1 / 15)]
    counts = [len(each.proxies) for each in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 50
    assert counts[2] >= 18
    for each in plans[:3]:
        assert each.saved >= 2 * each.cost > 0
        assert each.why is None
    assert plans[3].proxies == ()
    assert "would not pay" in (plans[3].why or "")


def test_the_plan_says_how_many_target_runs_the_limits_leave() -> None:
    made = plan(DRIFT, Limits(budget=4.0), 1.0)
    assert made.cost == pytest.approx(sum(SCALES.relative_cost(scale) for scale in made.proxies))
    assert made.targets == math.floor(4.0 - made.cost)
    assert plan(DRIFT, Limits(n_trials=40), 1.0).targets == 40 - len(plan(DRIFT, Limits(n_trials=40), 1.0).proxies)
    assert plan(DRIFT, Limits(), 1.0).targets is None
    assert plan(FLAT, Limits(n_trials=9), 1.0).targets == 9


def test_proxies_that_failed_are_made_again_but_not_for_ever() -> None:
    history = History(DRIFT, Minimize("loss"), ())
    planned = Ladder().plan(history).proxies
    for proposal in Ladder().propose(history, len(planned), np.random.default_rng(0)):
        history = told(history, proposal, drifting)
    lost = [replace(t, status="failed", metrics=None) if t.id in (1, 4) else t for t in history.trials]
    again = Ladder().propose(replace(history, trials=tuple(lost)), 9, np.random.default_rng(0))
    assert sorted(map(str, (p.scale for p in again))) == sorted(map(str, (lost[1].scale, lost[4].scale)))
    assert all(proposal.config not in [trial.config for trial in lost] for proposal in again)
    most = [replace(t, status="failed", metrics=None) if t.id % 3 else t for t in history.trials]
    (proposal,) = Ladder().propose(replace(history, trials=tuple(most)), 1, np.random.default_rng(0))
    assert proposal.source == "ladder/target"


def test_runs_of_another_study_take_the_place_of_no_proxy() -> None:
    planned = Ladder().plan(History(DRIFT, Minimize("loss"), ())).proxies
    configs = DRIFT.sample(np.random.default_rng(0), len(planned))
    added = tuple(
        Trial(i, config, scale, i, "added", status="finished", metrics=drifting(config, scale, i))
        for i, (config, scale) in enumerate(zip(configs, planned, strict=True))
    )
    theirs = tuple(replace(trial, source="prior", study="other") for trial in added)
    for trials, source in ((added, "ladder/target"), (theirs, PROXY)):
        given = History(DRIFT, Minimize("loss"), trials)
        (proposal,) = Ladder().propose(given, 1, np.random.default_rng(0))
        assert proposal.source == source


def test_the_ladder_climbs_from_proxies_to_predicted_target_runs() -> None:
    history, proposals = run(Ladder(), DRIFT, Minimize("loss"), drifting, Limits(budget=4.0))
    planned = plan(DRIFT, Limits(budget=4.0), 1.0).proxies
    assert tuple(proposal.scale for proposal in proposals[: len(planned)]) == planned
    later = proposals[len(planned) :]
    assert len(later) == 3
    for proposal, trial in zip(later, history.trials[len(planned) :], strict=True):
        assert proposal.source == "ladder/target"
        assert proposal.predicted is not None
        assert proposal.predicted["low"] < (trial.metrics or {})["loss"] < proposal.predicted["high"]


def test_the_ladder_waits_for_most_proxies_before_it_pays_for_a_target_run() -> None:
    history = History(DRIFT, Minimize("loss"), ())
    planned = plan(DRIFT, Limits(), 1.0).proxies
    for proposal in Ladder().propose(history, len(planned), np.random.default_rng(0)):
        history = told(history, proposal, None)
    assert Ladder().propose(history, 1, np.random.default_rng(0)) == ()
    trials = [
        replace(trial, status="finished", metrics=drifting(trial.config, trial.scale, trial.id))
        if trial.id % 4
        else trial
        for trial in history.trials
    ]
    (proposal,) = Ladder().propose(replace(history, trials=tuple(trials)), 1, np.random.default_rng(0))
    assert proposal.source == "ladder/target"


def test_the_first_target_run_after_proxies_beats_random_ones_where_the_optimum_drifts() -> None:
    wins = 0
    target = SCALES.target
    for seed in range(6):
        history, _ = run(Ladder(), DRIFT, Minimize("loss"), drifting, Limits(budget=2.0), seed)
        first = next(trial.metrics["loss"] for trial in history.trials if trial.scale == target and trial.metrics)
        drawn = DRIFT.sample(np.random.default_rng(100 + seed), 5)
        wins += first < min(drifting(config, target, id)["loss"] for id, config in enumerate(drawn))
    assert wins >= 5  # of 6, against the best of five random runs each: P(by chance) = 0.0007


def test_the_first_target_run_is_the_posteriors_best_point_beside_a_recipe_of_the_users_too() -> None:
    recipe = Proposal({"lr": 0.5, "b": 2.0}, SCALES.target, "enqueued")
    history = told(History(DRIFT, Minimize("loss"), (), Limits(budget=3.5)), recipe, drifting)
    history, proposals = run(Ladder(), DRIFT, Minimize("loss"), drifting, history.limits, trials=history.trials)
    first = next(i for i, proposal in enumerate(proposals) if proposal.source == "ladder/target")
    before = replace(history, trials=history.trials[: first + 1], memory=proposals[first - 1].memory)

    best = Ladder().recommend(before, SCALES.target, np.random.default_rng(0))

    assert proposals[first].predicted is not None
    assert best.mean is not None
    assert proposals[first].predicted["mean"] == pytest.approx(best.mean, rel=1e-3)


def test_a_recommendation_follows_the_drift_beyond_the_scales_that_were_run() -> None:
    history, _ = run(Ladder(), DRIFT, Minimize("loss"), drifting, Limits(budget=5.0))
    beyond = SCALES.scale({"params": 6.4e6, "tokens": 1.6e7}, beyond=True)
    here, there = (Ladder().recommend(history, scale, np.random.default_rng(0)) for scale in (SCALES.target, beyond))
    assert math.log2(here.config["lr"]) == pytest.approx(-7.0, abs=0.4)
    assert math.log2(there.config["lr"]) < math.log2(here.config["lr"]) - 0.2
    assert here.note is None
    assert "extrapolated" in str(there.note)
    assert there.high - there.low > here.high - here.low  # type: ignore[operator]


# ------------------------------------------------------------------------------------------- within what is allowed

SUPPLY = {"code": 2e6, "docs": 1.2e6}  # at most 4 epochs of each: half and 30% of the target's tokens
SCARCE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    batch_size=Integer(16, 256, log=True),
    steps=Integer(1, 64),
    data=Mixture("code", "docs", "web", supply=SUPPLY, max_epochs=4, reference={"code": 0.2, "docs": 0.1, "web": 0.7}),
    constraints=["batch_size * steps <= 1024", "1000 * batch_size <= tokens / 8"],
    fidelity=SCALES,
)
BEYOND = SCALES.scale({"params": 1e7, "tokens": 6.4e7}, beyond=True)


def scarce(config: Mapping[str, Any], scale: Scale, id: int) -> dict[str, float]:
    """Best with code and docs alone, and with large batches: against everything that is scarce."""
    loss = 3 + config["data"]["web"] + 0.1 * (math.log10(config["lr"]) + 2) ** 2
    return {"loss": loss - 0.1 * math.log(config["batch_size"]) - 0.1 * math.log(config["steps"])}


def assert_allowed(space: Space, config: Mapping[str, Any], scale: Scale) -> None:
    assert space.at(scale).validate(config) == config
    assert space.at(scale).satisfies([config]).all()
    for name, tokens in SUPPLY.items():
        assert config["data"][name] * scale["tokens"] <= 4 * tokens * (1 + 1e-9)
    assert config["batch_size"] * config["steps"] <= 1024
    assert 8000 * config["batch_size"] <= scale["tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_no_scale_is_asked_for_more_than_there_is_for_it(name: str) -> None:
    limits = Limits(n_trials=28 if name == "ladder" else 18, budget=5.0)
    history, proposals = run(policies()[name], SCARCE, Minimize("loss"), scarce, limits, seed=1)
    assert len({proposal.scale for proposal in proposals}) >= (3 if name == "ladder" else 1)
    for proposal in proposals:
        assert_allowed(SCARCE, proposal.config, proposal.scale)
    for scale in (*SCALES.cells()[:2], SCALES.target, BEYOND):
        assert_allowed(SCARCE, policies()[name].recommend(history, scale, np.random.default_rng(0)).config, scale)


def test_what_is_scarce_is_used_up_to_its_cap() -> None:
    history, _ = run(Ladder(), SCARCE, Minimize("loss"), scarce, Limits(budget=3.0))
    config = Ladder().recommend(history, SCALES.target, np.random.default_rng(0)).config
    assert config["data"] == pytest.approx({"code": 0.5, "docs": 0.3, "web": 0.2}, abs=0.02)
    assert config["batch_size"] * config["steps"] > 900


def test_a_mixture_that_switches_is_shown_no_more_than_there_is_over_the_whole_run() -> None:
    names = ("code", "docs", "web")
    data = MixtureSchedule(Mixture(*names, supply=SUPPLY, max_epochs=4), Mixture(*names))
    space = Space(lr=Real(1e-4, 1e-1, log=True), data=data, fidelity=SCALES)

    def measure(config: Mapping[str, Any], scale: Scale, id: int) -> dict[str, float]:
        return {"loss": 3 + config["data"].average["web"] + 0.3 * config["data"].last["web"]}

    history, proposals = run(Ladder(), space, Minimize("loss"), measure, Limits(budget=3.0))
    recommended = [
        (Ladder().recommend(history, scale, np.random.default_rng(0)).config, scale)
        for scale in (SCALES.target, BEYOND)
    ]
    for config, scale in [*((proposal.config, proposal.scale) for proposal in proposals), *recommended]:
        assert space.at(scale).validate(config) == config
        for name, tokens in SUPPLY.items():
            assert config["data"].average[name] * scale["tokens"] <= 4 * tokens * (1 + 1e-9)
    assert recommended[0][0]["data"].last["web"] < 0.05


@pytest.mark.parametrize("policy", [Sobol(), Bayes(), Ladder()], ids=["sobol", "bayes", "ladder"])
def test_a_study_starts_from_the_reference_of_its_mixture(policy: Policy) -> None:
    history = History(SCARCE, Minimize("loss"), (), Limits(n_trials=40))
    first, *others = policy.propose(history, 3, np.random.default_rng(0))
    assert first.config["data"] == pytest.approx({"code": 0.2, "docs": 0.1, "web": 0.7})
    for other in others:
        assert abs(other.config["data"]["code"] - 0.2) > 1e-6


def test_a_reference_there_is_too_little_for_is_moved_within_the_caps() -> None:
    data = Mixture("code", "web", supply={"code": 1e6}, max_epochs=4, reference={"code": 0.6, "web": 0.4})
    space = Space(data=data, fidelity=SCALES)
    (first,) = Sobol().propose(History(space, Minimize("loss"), ()), 1, np.random.default_rng(0))
    assert first.config["data"] == pytest.approx({"code": 0.25, "web": 0.75})


def test_trials_of_a_constrained_design_depend_on_their_number_and_scale_alone() -> None:
    history = History(SCARCE, Minimize("loss"), (), Limits(n_trials=60))
    at_once = Ladder().propose(history, 9, np.random.default_rng(3))
    for i in range(9):
        (proposal,) = Ladder().propose(history, 1, np.random.default_rng(3 + i))
        assert (proposal.config, proposal.scale) == (at_once[i].config, at_once[i].scale)
        history = told(history, proposal, scarce)


def small_batch(config: Mapping[str, Any]) -> bool:
    return bool(config["x"] + config["y"] <= 0.7)


def test_the_middle_of_a_space_that_a_predicate_forbids_is_not_recommended() -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1), constraints=[small_batch])
    found = Bayes().recommend(History(space, Minimize("loss"), ()), Scale(), np.random.default_rng(0))
    assert small_batch(found.config)


def test_without_a_model_the_best_run_is_recommended_as_it_is_allowed_at_the_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NumericalError("singular")

    history, _ = run(Sobol(), SCARCE, Minimize("loss"), scarce, Limits(n_trials=4))
    monkeypatch.setattr(model_choice.composite, "fit", fail)
    for scale in (SCALES.target, BEYOND):
        found = Ladder().recommend(history, scale, np.random.default_rng(0))
        assert "singular" in str(found.note)
        assert_allowed(SCARCE, found.config, scale)


def test_a_run_made_elsewhere_that_is_not_allowed_here_is_not_what_is_to_be_improved_on() -> None:
    space = Space(data=Mixture("code", "web", supply={"code": 2e6}, max_epochs=4), fidelity=SCALES)
    trials = tuple(
        Trial(i, {"data": {"code": share, "web": 1 - share}}, SCALES.target, 0, "added", 0.0, "finished")
        for i, share in enumerate((0.9, 0.4, 0.2))
    )
    trials = tuple(replace(trial, metrics={"loss": 2 - trial.config["data"]["code"]}) for trial in trials)
    history = History(space, Minimize("loss"), trials)
    search = posterior.Search.of(history, SCALES.target, Engine(), np.random.default_rng(0))
    shares = [config["data"]["code"] for config in space.decode_all(search.tried.numpy())]
    assert shares == pytest.approx([0.5, 0.4, 0.2])  # half is what the supply allows


def test_nothing_told_is_recommended_as_nothing_known() -> None:
    found = Bayes().recommend(History(RICH, Minimize("loss"), ()), SCALES.target, np.random.default_rng(0))
    assert RICH.validate(found.config)
    assert (found.mean, found.low, found.high) == (None, None, None)
    assert "No run has finished" in str(found.note)


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"beta": -1.0}, Minimize("loss"), "needs beta to be a finite number of at least 0"),
        ({"acquisition": "thompson", "options": {"draws": 3}}, Minimize("loss"), r"has options \['points'\], got"),
        ({"acquisition": "thompson", "options": {"points": 1}}, Minimize("loss"), "whole number of at least 2, got 1"),
        ({"options": {"beta": 2.0}}, Minimize("loss"), r"'log_ei' has options \[\], got \['beta'\]"),
        ({"prior": {"w": {"centre": 0.5, "spread": 0.1}}}, Minimize("loss"), "which the space does not know"),
        ({"average_over": {"x": {"a": 1}}}, Minimize("loss"), "it may name a Choice of plain values"),
        ({"average_over": {"x": {"a": 1}}}, Pareto("loss", "time"), "average_over needs one objective"),
        ({"acquisition": "thompson"}, Pareto("loss", "time"), "the acquisition is always the hypervolume"),
    ],
)
def test_settings_that_do_not_fit_the_space_or_the_objective_make_no_study(
    tmp_path: Path, settings: dict[str, Any], objective: Objective, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Study.create(tmp_path / "study", FLAT, objective=objective, policy="bayes", settings=settings)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", sorted(ACQUISITIONS))
def test_every_criterion_takes_the_options_that_it_has_and_no_others(name: str) -> None:
    make = load(ACQUISITIONS, name, "acquisition")
    options = {key: value.default for key, value in list(inspect.signature(make).parameters.items())[1:]}
    Engine(acquisition=name, options=options).check(FLAT, Minimize("loss"))
    with pytest.raises(ValueError, match="has options"):
        Engine(acquisition=name, options={**options, "size": 1}).check(FLAT, Minimize("loss"))


def test_a_sobol_search_is_not_made_at_a_scale_that_the_space_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the space has no fidelity"):
        Study.create(
            tmp_path / "study", FLAT, objective=Minimize("loss"), policy="sobol", settings={"scale": {"params": 1e6}}
        )


@pytest.mark.parametrize("space", [FLAT, RICH.at(RICH.top)], ids=["flat", "rich"])
def test_a_batch_of_64_has_no_configuration_twice_and_is_spread(space: Space) -> None:
    rng = np.random.default_rng(0)
    configs = space.sample(rng, 20)
    x = space.encode_all(configs)
    trials = tuple(
        Trial(i, config, space.top, i, "bayes", 1.0, "finished", metrics={"loss": float(np.square(row - 0.4).sum())})
        for i, (config, row) in enumerate(zip(configs, x, strict=True))
    )
    proposals = Bayes().propose(History(space, Minimize("loss"), trials), 64, rng)
    X = torch.as_tensor(np.concatenate([x, space.encode_all([proposal.config for proposal in proposals])]))
    apart = torch.cdist(X, X, p=math.inf)[20:].sort(dim=-1).values[:, 1]
    assert len(proposals) == 64
    assert all(proposal.note is None for proposal in proposals)
    assert float(apart.min()) >= 1e-3
    assert float(apart.median()) > 0.02
