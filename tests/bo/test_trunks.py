"""Trunks: which runs can branch, how they cover the cells of a plan, and what that costs."""

from collections import Counter
from dataclasses import replace

import pytest

from bo.policies import trunks
from bo.ports import Proposal
from bo.trial import Branch, Trial
from search_spaces import (
    WSD,
    Cosine,
    Fidelity,
    Integer,
    Mixture,
    MixtureSchedule,
    Real,
    Schedule,
    Space,
    SwitchedMixture,
)

SCALES = Fidelity(
    params={"tiny": 1e5, "small": 4e5, "full": 1.6e6},
    tokens=(1e6, 2e6, 4e6, 1.6e7),
    target={"params": "full", "tokens": 1.6e7},
)
SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    schedule=Schedule("cosine", warmup=0.05, floor=0.0, wsd={"decay": Real(0.1, 0.4)}),
    fidelity=SCALES,
)
STABLE = {"lr": 1e-3, "schedule": WSD(decay=0.2, warmup=0.05)}
FALLING = {"lr": 1e-3, "schedule": Cosine(warmup=0.05)}


def at(params, tokens):
    return SCALES.scale({"params": params, "tokens": tokens})


PLAN = tuple(at(params, tokens) for params in ("tiny", "small") for tokens in (1e6, 2e6, 4e6) for _ in range(2))


def test_a_run_with_a_stable_phase_branches_to_the_shorter_cells_in_line_with_it_once_each():
    cells = (*PLAN, at("full", 1e6), at("tiny", 1.6e7))
    found = trunks.branches(SPACE, STABLE, at("tiny", 4e6), "tokens", cells)
    assert found == (at("tiny", 1e6), at("tiny", 2e6))
    assert trunks.branches(SPACE, STABLE, at("tiny", 1e6), "tokens", cells) == ()
    assert trunks.branches(SPACE, FALLING, at("tiny", 4e6), "tokens", cells) == ()


def test_a_branch_whose_stable_phase_the_trunk_would_spend_warming_up_is_left_out():
    space = Space(schedule=Schedule("wsd", warmup=Real(0, 0.3)), fidelity=SCALES)

    def shorter(warmup, decay):
        config = {"schedule": WSD(decay=decay, warmup=warmup)}
        return [cell["tokens"] for cell in trunks.branches(space, config, at("tiny", 1.6e7), "tokens", PLAN)]

    assert shorter(0.0, 0.4) == [1e6, 2e6, 4e6]
    assert shorter(0.02, 0.1) == [2e6, 4e6]  # 0.32e6 of the 0.9e6 tokens before the first decay would be warm-up
    assert shorter(0.05, 0.1) == [4e6]
    assert shorter(0.05, 0.4) == []


def test_a_mixture_that_switches_ends_what_a_branch_shares_with_its_trunk():
    shares = Mixture("a", "b")
    space = Space(schedule=Schedule("wsd"), data=MixtureSchedule(shares, shares, Real(0.1, 0.9)), fidelity=SCALES)

    def shorter(switch):
        data = SwitchedMixture({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, switch)
        config = {"schedule": STABLE["schedule"], "data": data}
        return [cell["tokens"] for cell in trunks.branches(space, config, at("tiny", 4e6), "tokens", PLAN)]

    assert shorter(0.7) == [1e6, 2e6]
    assert shorter(0.4) == [2e6]
    assert shorter(0.1) == []


def test_a_configuration_that_a_shorter_run_may_not_have_does_not_branch_to_it():
    space = Space(
        batch=Integer(1, 100),
        schedule=Schedule("wsd", warmup=0.0),
        constraints=["10_000 * batch <= tokens"],
        fidelity=Fidelity(tokens=(1e5, 2e5, 1e6), target={"tokens": 1e6}, cost=lambda scale: scale["tokens"]),
    )
    cells = space.fidelity.cells()
    small, large = ({"batch": batch, "schedule": WSD(decay=0.2)} for batch in (10, 15))
    assert [cell["tokens"] for cell in trunks.branches(space, small, cells[2], "tokens", cells)] == [1e5, 2e5]
    assert [cell["tokens"] for cell in trunks.branches(space, large, cells[2], "tokens", cells)] == [2e5]


@pytest.mark.parametrize("axis", [None, "tokens", "params"])
@pytest.mark.parametrize("seed", range(3))
def test_every_cell_of_a_plan_gets_its_results_and_no_more(axis, seed):
    configs = [STABLE, FALLING, STABLE, FALLING, FALLING]
    made = list(trunks.runs(SPACE, PLAN, axis, lambda scale, number: configs[(number + seed) % 5]))
    covered = Counter(cell for _, scale, wanted in made for cell in (scale, *wanted))
    assert covered == Counter(PLAN)
    assert all(config == STABLE or wanted == () for config, _, wanted in made)
    if axis is None:
        assert [scale for _, scale, _ in made] == list(PLAN)
    else:
        assert len(made) < len(PLAN)


def test_trunks_come_line_by_line_the_longest_first():
    made = list(trunks.runs(SPACE, PLAN, "tokens", lambda scale, number: STABLE))
    assert [scale for _, scale, _ in made] == [at("tiny", 4e6)] * 2 + [at("small", 4e6)] * 2
    mixed = trunks.runs(SPACE, PLAN[:6], "tokens", lambda scale, number: (FALLING, STABLE)[number % 2])
    assert [(scale["tokens"], len(wanted)) for _, scale, wanted in mixed] == [(4e6, 0), (4e6, 2), (2e6, 0), (1e6, 0)]


def test_a_trunk_costs_itself_and_its_decays():
    cells = [at("tiny", tokens) for tokens in (1e6, 2e6, 4e6)]
    tiny = SPACE.cost(at("tiny", 1e6))
    assert trunks.price(SPACE, cells, None, [STABLE]) == pytest.approx((7 * tiny, 3))
    assert trunks.price(SPACE, cells, "tokens", [STABLE]) == pytest.approx(((4 + 0.2 * 3) * tiny, 1))
    assert trunks.price(SPACE, cells, "tokens", [FALLING]) == pytest.approx((7 * tiny, 3))
    assert trunks.price(SPACE, cells, "tokens", [STABLE, FALLING]) == pytest.approx(((4.6 + 7) / 2 * tiny, 2))


def test_a_run_serves_its_own_cell_its_branches_and_those_it_still_owes():
    short, middle = at("tiny", 1e6), at("tiny", 2e6)
    trial = Trial(0, STABLE, at("tiny", 4e6), 0, "ladder/proxy", wanted=(short, middle))
    assert trunks.covered(trial) == (trial.scale, short, middle)
    branched = replace(trial, branches=(Branch(short, {"loss": 1.0}),))
    assert trunks.covered(branched) == (trial.scale, short, middle)
    for status in ("finished", "stopped", "diverged", "failed"):
        assert trunks.covered(replace(branched, status=status)) == (trial.scale, short)
    assert Proposal(STABLE, trial.scale, "x", wanted=(short, middle)).cost(SPACE) == pytest.approx(
        SPACE.cost(trial.scale) + 0.2 * (SPACE.cost(short) + SPACE.cost(middle))
    )
