from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr
from scipy.stats import norm
from torch import Tensor

from bo import AtMost, Largest, Maximize, Minimize, Pareto, Study, WeightedSum
from bo.acquisition import knowledge_gradient
from bo.acquisition.max_value_entropy import log_information
from bo.acquisition.multi_fidelity import (
    UTILITIES,
    Run,
    across,
    improvement,
    log_gain_of_several,
    log_information_between,
)
from bo.objective import Objective
from bo.policies.bayes import Bayes
from bo.policies.multi_fidelity import NEXT, START, MultiFidelity, View, passed
from bo.ports import History, Limits
from bo.trial import Branch, Trial
from search_spaces import Fidelity, Real, Scale, Space


def steps(scale: Scale) -> float:
    return 0.05 + scale["s"]


def twice_the_steps(scale: Scale) -> float:
    return 2 * steps(scale)


def nothing_but_one(scale: Scale) -> float:
    return 1.0


RUNGS = (0.05, 0.25, 1.0)
PLANE = Space(x=Real(0, 1), y=Real(0, 1), fidelity=Fidelity(s=RUNGS, target={"s": 1.0}, cost=steps))
GRID = Space(
    x=Real(0, 1),
    y=Real(0, 1),
    fidelity=Fidelity(params=(1e5, 4e5, 1.6e6), tokens=(1e6, 4e6, 1.6e7), target={"params": 1.6e6, "tokens": 1.6e7}),
)
EVERY = PLANE.fidelity.cells() if PLANE.fidelity else ()
SMALL, MIDDLE, TOP = EVERY


def loss(config: Mapping[str, Any], scale: Scale) -> float:
    """A bowl with a wave, whose optimum is moved a little by the scale."""
    s = scale["s"] if "s" in scale else scale["params"] / 1.6e6
    x, y = config["x"] - 0.4 - 0.05 * (1 - s), config["y"] - 0.6
    return float(2 + x**2 + 2 * y**2 + 0.05 * math.sin(9 * config["x"]) + 0.1 * (1 - s))


def told(
    space: Space = PLANE,
    n: int = 12,
    scales: tuple[Scale, ...] = (),
    objective: Objective = Minimize("loss"),  # noqa: B008 - a frozen value
    noise: float = 0.01,
    seed: int = 0,
) -> History:
    """n runs, one after the other at each of the scales (by default all but the top)."""
    rng = np.random.default_rng(seed)
    cells = scales or space.fidelity.cells()[:-1] if space.fidelity else (space.top,)
    trials = []
    for i, config in enumerate(space.sample(rng, n)):
        scale = cells[i % len(cells)]
        value = loss(config, scale) + noise * rng.standard_normal()
        metrics = {"loss": value, "other": 3 + value * config["x"], "size": config["x"]}
        trials.append(Trial(i, config, scale, 0, START, space.cost(scale), "finished", metrics=metrics))
    return History(space, objective, tuple(trials))


def view(history: History, **settings: Any) -> View:
    return View.of(history, MultiFidelity(proxy_cap=None, **settings), np.random.default_rng(0))


@pytest.fixture(scope="module")
def now() -> View:
    """After six runs at each scale."""
    return view(told(n=18, scales=EVERY))


def afresh(now: View, **changes: Any) -> View:
    return replace(now, rng=np.random.default_rng(3), **changes)


def searched(
    policy: MultiFidelity | Bayes,
    space: Space,
    limits: Limits,
    seed: int = 0,
    measure: Callable[[Mapping[str, Any], Scale], float] = loss,
) -> History:
    """One trial after the other until the policy has had enough."""
    history = History(space, Minimize("loss"), (), limits)
    while found := policy.propose(history, 1, np.random.default_rng([seed, len(history.trials)])):
        (proposal,), id = found, len(history.trials)
        trial = Trial(
            *(id, proposal.config, proposal.scale, id, proposal.source, space.cost(proposal.scale), "finished"),
            metrics={"loss": measure(proposal.config, proposal.scale)},
        )
        history = replace(history, trials=(*history.trials, trial), memory=proposal.memory)
    return history


def points(n: int, seed: int = 1) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).random((n, 2)))


# ------------------------------------------------------------------------------------------- what a run elsewhere tells


def test_a_run_at_the_target_is_worth_what_the_plain_knowledge_gradient_says(now: View) -> None:
    X = points(30)
    plain = knowledge_gradient.make_discrete(afresh(now).situation)
    ours = UTILITIES["knowledge_gradient"](afresh(now).situation)(Run((now.beliefs[TOP],)))
    assert torch.allclose(ours(X), plain(X), rtol=0, atol=1e-6)


def test_a_run_at_another_scale_moves_the_target_by_what_conditioning_on_it_explains() -> None:
    """Of one metric believing a run without noise shrinks the variance at any other point by its squared slope."""
    now = view(told(scales=EVERY), surrogate="product")
    target, other = now.beliefs[TOP], now.beliefs[SMALL]
    A, x = points(8, seed=2), points(1, seed=3)
    slope = across(other, target, x, A)[0, :-1] / (other.value(x)[1].square()).sqrt()
    surrogate = other.believe(x).surrogate
    shrunk = target.value(A)[1].square() - replace(target, surrogate=surrogate).value(A)[1].square()
    assert torch.allclose(slope.square(), shrunk, rtol=0.05, atol=1e-3 * float(target.value(A)[1].max()) ** 2)
    assert float(slope.square().max()) > 0.02 * float(target.value(A)[1].square().max())


def test_what_several_scales_tell_is_the_expected_maximum_over_all_their_outcomes() -> None:
    rng = np.random.default_rng(0)
    a, B = torch.as_tensor(rng.standard_normal((3, 20))), torch.as_tensor(rng.standard_normal((3, 20, 3)))
    B[..., 0] *= 0.3
    found = log_gain_of_several(a, B, a.max(-1).values.min()).exp()
    Z = torch.as_tensor(rng.standard_normal((200_000, 3)))
    for row in range(3):
        most = (a[row] + Z @ B[row].T).amax(-1) - a.max(-1).values.min()
        assert float(found[row]) == pytest.approx(float(most.mean()), abs=4 * float(most.std()) / 200_000**0.5 + 0.02)


@pytest.mark.parametrize("name", sorted(UTILITIES))
def test_trace_observations_do_not_lower_what_a_run_is_worth(name: str, now: View) -> None:
    X = points(40)
    utility = UTILITIES[name](afresh(now).situation)
    alone = utility(Run((now.beliefs[TOP],)))(X).exp()
    with_one = utility(Run((now.beliefs[TOP], now.beliefs[SMALL])))(X).exp()
    with_two = utility(Run((now.beliefs[TOP], now.beliefs[MIDDLE], now.beliefs[SMALL])))(X).exp()
    slack = 0.01 * float(alone.max())  # of the quadrature
    assert (with_one >= alone - slack).all()
    assert (with_two >= with_one - slack).all()
    assert float((with_two - alone).max()) > slack


@pytest.mark.parametrize("name", sorted(UTILITIES))
def test_worth_is_positive_and_its_slopes_are_those_of_differences(name: str, now: View) -> None:
    for run in (Run((now.beliefs[SMALL],)), Run((now.beliefs[TOP], now.beliefs[MIDDLE]))):
        utility = UTILITIES[name](afresh(now).situation)(run)
        X = points(12, seed=4).requires_grad_()
        value = utility(X)
        assert torch.isfinite(value).all()
        (slope,) = torch.autograd.grad(value.sum(), X)
        counted = value.detach() > value.max() - 9  # of less, differences are rounding errors
        with torch.no_grad():
            for i in range(2):
                step = torch.zeros(2, dtype=torch.float64)
                step[i] = 1e-4
                expected = (utility(X + step) - utility(X - step)) / 2e-4
                # Of several outcomes the directions are held while a slope is taken.
                near = 0.1 if len(run.beliefs) > 1 and name == "knowledge_gradient" else 0.02
                assert torch.allclose(slope[counted, i], expected[counted], rtol=near, atol=near)


def test_a_scale_that_tells_nothing_is_worth_nothing(now: View) -> None:
    stranger = replace(now.beliefs[SMALL], place=torch.tensor([-60.0], dtype=torch.float64), cell=99)
    X = points(10)
    utility = UTILITIES["knowledge_gradient"](afresh(now).situation)
    assert float((utility(Run((stranger,)))(X) - utility(Run((now.beliefs[SMALL],)))(X)).max()) < -2


# ------------------------------------------------------------------------------------------------------- information


@pytest.mark.parametrize("gamma", [-3.0, -0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("rho", [0.05, 0.6, 0.97, 0.9999])
def test_information_about_the_maximum_is_the_entropy_that_knowing_it_takes_away(gamma: float, rho: float) -> None:
    def log_density(u: float) -> float:
        return float(norm.logpdf(u) + log_ndtr((gamma - rho * u) / math.sqrt(1 - rho**2)) - log_ndtr(gamma))

    middle = -rho * math.exp(norm.logpdf(gamma) - log_ndtr(gamma))
    parts = sorted({middle, min(max(gamma / rho, middle - 11), middle + 11)})
    negative, _ = quad(
        lambda u: math.exp(log_density(u)) * log_density(u),
        *(middle - 12, middle + 12),
        points=parts,
        limit=500,
        epsabs=1e-13,
    )
    found = log_information_between(
        torch.tensor([[gamma]], dtype=torch.float64), torch.tensor([rho], dtype=torch.float64)
    ).exp()
    assert float(found) == pytest.approx(0.5 * math.log(2 * math.pi * math.e) + negative, rel=1e-8, abs=1e-12)


def test_information_of_a_run_at_the_target_without_noise_is_that_of_max_value_entropy() -> None:
    gamma = torch.linspace(-2, 12, 40, dtype=torch.float64)[:, None]
    closest = torch.tensor([1 - 1e-9], dtype=torch.float64)
    assert torch.allclose(log_information_between(gamma, closest), log_information(gamma), rtol=0, atol=2e-4)
    rho = torch.linspace(0.01, 0.999, 50, dtype=torch.float64)
    assert (log_information_between(gamma.expand(-1, 50), rho).diff(dim=-1) > 0).all()


def test_an_improvement_is_correlated_most_with_a_run_at_the_target_itself(now: View) -> None:
    X, top = points(30), now.tried[0]
    told_of = [improvement(Run((now.beliefs[cell],)), now.beliefs[TOP], top, X) for cell in (SMALL, TOP)]
    assert torch.equal(told_of[0][0], told_of[1][0])
    assert (told_of[0][2] < told_of[1][2]).double().mean() > 0.8
    assert ((told_of[1][2] > 0) & (told_of[1][2] < 1)).all()


# ------------------------------------------------------------------------------------------------------------- costs


def test_twice_the_cost_is_half_the_utility_and_changes_no_choice() -> None:
    dearer = Space(x=Real(0, 1), y=Real(0, 1), fidelity=Fidelity(s=RUNGS, target={"s": 1.0}, cost=twice_the_steps))
    X, chosen, worth = points(20), [], []
    for space in (PLANE, dearer):
        history = told(space)
        now = view(history)
        worth.append([criterion(X) for criterion in now.criteria(EVERY).values()])
        (proposal,) = MultiFidelity(proxy_cap=None, n_init=2).propose(history, 1, np.random.default_rng(0))
        chosen.append((proposal.config, proposal.scale))
    for cheap, dear in zip(*worth, strict=True):
        assert torch.allclose(cheap - dear, torch.full_like(cheap, math.log(2)), rtol=0, atol=1e-9)
    assert chosen[0][1] == chosen[1][1]
    assert chosen[0][0] == pytest.approx(chosen[1][0], abs=1e-6)


def test_where_cost_is_no_matter_only_the_target_is_run() -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1), fidelity=Fidelity(s=RUNGS, target={"s": 1.0}, cost=nothing_but_one))
    now = view(told(space, n=15, scales=EVERY))
    scale, _ = now.best(EVERY)
    assert scale == TOP


def test_cooling_lets_the_cost_count_less_as_the_limits_are_used_up(now: View) -> None:
    X, picked = points(400), []
    for left in (1.0, 0.5, 0.0):
        later = afresh(now, left=left, policy=replace(now.policy, acquisition="ei_cooled"))
        best = {scale: float(criterion(X).max()) for scale, criterion in later.criteria(EVERY).items()}
        picked.append(steps(max(best, key=best.__getitem__)))
    assert picked == sorted(picked)
    assert picked[0] < picked[-1] == steps(TOP)


def test_what_a_run_tells_beyond_the_smallest_scale_is_less_and_there_it_is_nothing(now: View) -> None:
    plain = afresh(now).criteria(EVERY)
    above = afresh(now, policy=replace(now.policy, avoid_zero=True)).criteria(EVERY)
    X = points(50)
    assert set(above) == {MIDDLE, TOP}
    for scale, criterion in above.items():
        assert (criterion(X) <= plain[scale](X) + 1e-9).all()
        assert float(criterion(X).max()) > -50


def test_a_run_passes_the_smaller_cells_of_its_traces() -> None:
    fidelity = GRID.fidelity
    assert fidelity is not None
    scale = fidelity.scale({"params": 4e5, "tokens": 1.6e7})
    assert passed(GRID, scale, ("tokens",)) == tuple(
        fidelity.scale({"params": 4e5, "tokens": tokens}) for tokens in (4e6, 1e6)
    )
    assert passed(GRID, scale, ()) == ()
    assert len(passed(GRID, GRID.top, ("params", "tokens"))) == 2


def test_what_a_run_handed_in_on_its_way_is_learned_from() -> None:
    history = told(n=12, scales=(MIDDLE,))
    branched = tuple(
        replace(trial, branches=(Branch(SMALL, {"loss": loss(trial.config, SMALL)}),)) for trial in history.trials
    )
    now = view(replace(history, trials=branched), traces=["s"])
    assert len(now.model.data.Y) == 24
    assert len(now.run(TOP).beliefs) == 3


# -------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("acquisition", sorted(UTILITIES))
def test_every_criterion_is_used_by_name_and_keeps_the_cap(acquisition: str) -> None:
    history = searched(MultiFidelity(acquisition=acquisition, n_init=2), PLANE, Limits(budget=2.2))
    small = [trial for trial in history.trials if trial.scale != TOP]
    assert 0.4 < sum(trial.cost for trial in small) <= 1.0 + 1e-9
    assert 1 <= sum(trial.scale == TOP for trial in history.trials) <= 2
    assert {trial.source for trial in history.trials} == {START, NEXT}


def test_a_cap_that_is_used_up_leaves_the_target_and_none_leaves_every_scale() -> None:
    history = told()  # for more than two target runs
    assert MultiFidelity().affordable(history, ()) == (TOP,)
    assert MultiFidelity(proxy_cap=2.5).affordable(history, ()) == (SMALL, TOP)
    assert MultiFidelity(proxy_cap=2.5).affordable(history, (SMALL, SMALL)) == (TOP,)
    assert MultiFidelity(proxy_cap=None).affordable(history, ()) == EVERY
    assert MultiFidelity(proxy_cap=None).affordable(replace(history, limits=Limits(budget=2.5)), ()) == (SMALL,)


def test_without_scales_it_searches_as_bayes_does() -> None:
    space = Space(x=Real(0, 1), y=Real(0, 1))

    def bowl(config: Mapping[str, Any], scale: Scale) -> float:
        return float((config["x"] - 0.3) ** 2 + (config["y"] - 0.7) ** 2)

    history = searched(MultiFidelity(), space, Limits(n_trials=10), measure=bowl)
    found = MultiFidelity().recommend(history, space.top, np.random.default_rng(0))
    assert bowl(found.config, space.top) < 2e-3


def test_a_batch_has_no_run_twice_and_counts_what_it_costs() -> None:
    history = replace(told(), limits=Limits(budget=3.0))
    batch = MultiFidelity(proxy_cap=None, n_init=2).propose(history, 6, np.random.default_rng(0))
    spent = history.spent + sum(PLANE.cost(proposal.scale) for proposal in batch)
    assert 2 <= len(batch) <= 6
    assert spent <= 3.0 + 1e-9
    X = PLANE.encode_all([proposal.config for proposal in batch])
    for i, proposal in enumerate(batch):
        for j in range(i):
            assert batch[j].scale != proposal.scale or np.abs(X[i] - X[j]).max() > 1e-3


@pytest.mark.parametrize(
    ("acquisition", "objective"),
    [
        ("knowledge_gradient", WeightedSum({"loss": 1.0, "other": 0.5})),
        ("max_value_entropy", WeightedSum({"loss": 1.0, "other": 0.5})),
        ("ei_cooled", WeightedSum({"loss": 1.0, "other": 0.5})),
        ("knowledge_gradient", Maximize("loss")),
        ("knowledge_gradient", Largest("loss", "other")),
        ("max_value_entropy", Minimize("loss", subject_to=[AtMost("size", 0.5)])),
        ("max_value_entropy", Minimize("loss", subject_to=[AtMost("size", -1.0)])),
    ],
    ids=["a sum", "by entropy", "by improvement", "maximised", "the largest", "a limit", "a limit that nothing keeps"],
)
def test_any_single_objective_can_be_searched(acquisition: str, objective: Objective) -> None:
    history = told(n=12, objective=objective)
    policy = MultiFidelity(acquisition=acquisition, proxy_cap=None, n_init=2)
    (proposal,) = policy.propose(history, 1, np.random.default_rng(0))
    assert proposal.source == NEXT
    assert PLANE.validate(proposal.config) == proposal.config
    assert proposal.predicted is not None


def test_scales_that_were_never_run_are_told_apart() -> None:
    now = view(told(GRID, n=12, scales=GRID.fidelity.cells()[:2] if GRID.fidelity else ()))
    numbers = [belief.cell for belief in now.beliefs.values()]
    assert len(set(numbers)) == len(numbers) == 9


def test_a_target_that_is_never_run_is_what_counts() -> None:
    fidelity = Fidelity(s=RUNGS, target={"s": 4.0}, runnable={"s": 1.0}, cost=steps)
    space = Space(x=Real(0, 1), y=Real(0, 1), fidelity=fidelity)
    history = told(space, n=12)
    now = view(history)
    assert now.goal["s"] == 4.0
    (proposal,) = MultiFidelity(proxy_cap=None, n_init=2).propose(history, 1, np.random.default_rng(0))
    assert proposal.scale["s"] <= 1.0


def test_the_start_is_at_the_cheapest_cell_and_a_step_along_each_axis_within_the_cap() -> None:
    fidelity = GRID.fidelity
    assert fidelity is not None
    planned = MultiFidelity().start(History(GRID, Minimize("loss"), ()))
    assert set(planned) == {
        fidelity.scale(dict(zip(("params", "tokens"), values, strict=True)))
        for values in ((1e5, 1e6), (4e5, 1e6), (1e5, 4e6))
    }
    assert sum(map(GRID.cost, planned)) <= 0.5
    assert MultiFidelity(proxy_cap=0.0).start(History(GRID, Minimize("loss"), ())) == ()


def test_settings_are_stored_with_the_study_and_come_back(tmp_path: Path) -> None:
    settings = {"acquisition": "max_value_entropy", "proxy_cap": None, "traces": ["s"], "avoid_zero": True}
    with Study.create(
        tmp_path / "study", PLANE, objective=Minimize("loss"), policy="multi_fidelity", settings=settings
    ) as study:
        (trial,) = study.ask(1)
        study.tell(trial.id, {"loss": 1.0})
        assert trial.source == START
    assert dict(Study.open(tmp_path / "study").settings) == settings


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"acquisition": "log_ei"}, Minimize("loss"), "has the acquisitions"),
        ({"proxy_cap": -1.0}, Minimize("loss"), "proxy_cap to be None or a finite number"),
        ({"traces": "s"}, Minimize("loss"), "traces to be a list of scale axes"),
        ({"traces": ["tokens"]}, Minimize("loss"), r"the axes are \['s'\]"),
        ({"avoid_zero": 1}, Minimize("loss"), "avoid_zero to be True or False"),
        ({"n_init": 0}, Minimize("loss"), "n_init to be a whole number"),
        ({"surrogate": "magic"}, Minimize("loss"), "There is no surrogate"),
        ({"n_init": 2}, Pareto("loss", "other"), "needs one objective"),
    ],
)
def test_wrong_settings_make_no_study(
    tmp_path: Path, settings: dict[str, Any], objective: Objective, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Study.create(tmp_path / "study", PLANE, objective=objective, policy="multi_fidelity", settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize("acquisition", ["knowledge_gradient", "max_value_entropy"])
def test_a_good_configuration_is_found_for_less_than_by_searching_the_target(acquisition: str) -> None:
    spent: dict[str, list[float]] = {"scales": [], "target": []}
    for seed in range(6):
        for name, policy in (
            ("scales", MultiFidelity(acquisition=acquisition, proxy_cap=None)),
            ("target", Bayes()),
        ):
            spent[name].append(until_good(policy, seed))
    assert np.median(spent["scales"]) < 0.7 * np.median(spent["target"])


def until_good(policy: MultiFidelity | Bayes, seed: int) -> float:
    """What was spent, in target runs, until the recommended configuration is within 0.01 of the best at the target."""
    best = min(loss({"x": x, "y": 0.6}, TOP) for x in np.linspace(0, 1, 1001))
    history = History(PLANE, Minimize("loss"), ())
    while history.spent < 20:
        (proposal,) = policy.propose(history, 1, np.random.default_rng([seed, len(history.trials)]))
        id = len(history.trials)
        trial = Trial(
            *(id, proposal.config, proposal.scale, id, proposal.source, PLANE.cost(proposal.scale), "finished"),
            metrics={"loss": loss(proposal.config, proposal.scale)},
        )
        history = replace(history, trials=(*history.trials, trial), memory=proposal.memory)
        if id >= 3:
            found = policy.recommend(history, TOP, np.random.default_rng(seed))
            if loss(found.config, TOP) < best + 0.01:
                break
    return history.spent
