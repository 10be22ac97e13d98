"""From scales to the target: what the model of several scales reports, extrapolates and trusts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bo import AtMost, Minimize, dataset
from bo.analysis import diagnose
from bo.policies import guard, model_choice, posterior
from bo.policies.bayes import Bayes
from bo.policies.design import SHOT, reproducible
from bo.policies.engine import Engine
from bo.policies.ladder import Ladder
from bo.policies.optimum import sampled
from bo.ports import History, Limits
from bo.surrogates import drift
from bo.surrogates.scale_shift import ScaleShiftGP
from bo.surrogates.surrogate import DRIFTING, SURROGATES
from bo.trial import Trial
from search_spaces import Choice, Fidelity, Real, Scale, Space

SCALES = Fidelity(params=(1e6, 2e6, 4e6, 8e6), tokens=(1e8, 2e8, 4e8), target={"params": 8e6, "tokens": 4e8})
SPACE = Space(lr=Real(1e-4, 1e-1, log=True), depth=Real(0.0, 1.0), fidelity=SCALES)
EXPONENTS = {"params": -0.5, "tokens": 0.25}


def loss(config: Any, scale: Scale, away: float = 0.0) -> float:
    """A bowl about 0.01 (8e6 / N)^0.5 (D / 4e8)^0.25 for lr, and 0.4 for depth, on a level that falls with scale."""
    place = SCALES.log2(scale)
    best = math.log2(0.01) + EXPONENTS["params"] * place[0] + EXPONENTS["tokens"] * place[1] + away
    level = 2.0 + 1.5 * 2.0 ** (-0.3 * (place[0] + 3)) + 1.0 * 2.0 ** (-0.3 * (place[1] + 2))
    return float(level + 0.03 * (math.log2(config["lr"]) - best) ** 2 + 0.2 * (config["depth"] - 0.4) ** 2)


def ran(cells: list[Scale], each: int, seed: int = 0, study: str | None = None, **given: Any) -> tuple[Trial, ...]:
    configs = SPACE.sample(np.random.default_rng(seed), each * len(cells))
    source = "added" if study is None else "prior"
    return tuple(
        Trial(i, config, cell, 0, source, 0.0, "finished", metrics={"loss": loss(config, cell, **given)}, study=study)
        for i, (config, cell) in enumerate(zip(configs, [c for c in cells for _ in range(each)], strict=True))
    )


def cell(params: float, tokens: float) -> Scale:
    return SCALES.scale({"params": params, "tokens": tokens})


SPANNING = [cell(1e6, 1e8), cell(2e6, 1e8), cell(1e6, 2e8), cell(2e6, 2e8)]


def history(trials: tuple[Trial, ...], **given: Any) -> History:
    return History(SPACE, Minimize("loss"), trials, seen=len(trials), **given)


def fitted(trials: tuple[Trial, ...]) -> ScaleShiftGP:
    model, _ = model_choice.fit(dataset.from_history(history(trials)), SPACE.top)
    assert isinstance(model.gp, ScaleShiftGP)
    return model.gp


# ------------------------------------------------------------------------------------------------------------- drift


def test_the_exponents_of_the_optimum_are_found_with_their_intervals() -> None:
    gp = fitted(ran(SPANNING, 10))
    with reproducible(np.random.default_rng(0)):
        found = {(e.parameter, e.axis): e for e in drift.exponents(gp, drift.drawn(gp, 24))}
    for axis, true in EXPONENTS.items():
        one = found["lr", axis]
        assert one.low - 0.1 < true < one.high + 0.1
        assert one.high - one.low < 0.8
    assert found["lr", "params"].high < 0 < found["lr", "tokens"].mean
    assert abs(found["depth", "params"].mean) < 0.5


def test_along_directions_that_the_scales_do_not_span_no_drift_is_reported() -> None:
    places = torch.tensor([[-3.0, -2.0], [-2.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert drift.spanned(places) == [False, False]  # on one line: neither axis by itself
    assert drift.spanned(places * torch.tensor([1.0, 0.0])) == [True, False]
    assert drift.spanned(torch.cat([places, places[:1] + torch.tensor([[1.0, 0.0]])])) == [True, True]
    gp = fitted(ran([cell(1e6, 1e8), cell(2e6, 1e8), cell(4e6, 1e8)], 5))
    with reproducible(np.random.default_rng(0)):
        assert {e.axis for e in drift.exponents(gp, drift.drawn(gp, 2))} == {"params"}


def test_cells_that_are_off_a_line_by_rounding_alone_span_no_more_than_the_line() -> None:
    params = torch.tensor([101_000.0, 998_000.0, 9_980_000.0], dtype=torch.float64)
    tokens = (20 * params / 65536).round() * 65536
    places = torch.stack([(params / 1e9).log2(), (tokens / 2e10).log2()], dim=-1)
    on, off = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert drift.spanned(places) == [False, False]
    assert drift.leads(places, on)
    assert not drift.leads(places, off)
    assert drift.leads(places, places[0])
    assert drift.leads(torch.stack([off, on]), 3 * off + 0.01)  # no scale is as it was meant to be
    assert not drift.leads(on[None], off)


def test_the_model_without_drifts_decides_where_it_foretells_large_runs_better() -> None:
    def changing(trial: Trial) -> Trial:  # what counts is the rate at small scales, the depth at large ones
        octaves = float(SCALES.log2(trial.scale).sum())
        large = 1 / (1 + 4 ** -(octaves + 4))
        lr, depth = math.log10(trial.config["lr"]) + 2.5, trial.config["depth"] - 0.8
        value = 3 - 0.1 * octaves + 0.1 * ((1 - large) * lr**2 + large * 4 * depth**2)
        return replace(trial, metrics={"loss": value})

    drifting = ran(SPANNING, 12)
    for trials, without in ((drifting, False), (tuple(map(changing, drifting)), True)):
        data = dataset.from_history(history(trials))
        model, memory = model_choice.fit(data, SPACE.top)
        assert isinstance(model.gp, ScaleShiftGP) != without
        near = data.S.sum(-1) >= data.S.sum(-1).median()
        density = {
            name: model_choice.log_density(model_choice.fit(data, SPACE.top, engine=Engine(name))[0])
            for name in ("scale_shift", "joint_input")
        }
        gain = float((density["joint_input"] - density["scale_shift"])[near].sum())
        assert memory["joint_input"] == pytest.approx(gain, abs=1e-3)
        assert (gain > 0) == without
        found = diagnose(history(trials), None, np.random.default_rng(0))
        assert found.treatment is not None
        better = "without" if without else "with"
        assert found.treatment.startswith(f"Of the models over scales, the one {better} drifts foretells")
        assert found.drifts


def test_a_law_moves_the_optimum_where_runs_say_nothing_and_gives_way_where_they_do() -> None:
    one_cell = history(ran([SPANNING[0]], 12))
    wrong = Engine(law={"kind": "exponents", "exponents": {"lr": {"params": 1.0, "tokens": 1.0}}})
    place = SCALES.log2(SPANNING[0])
    best = {}
    for name, engine in {"none": Engine(), "law": wrong}.items():
        model, _ = model_choice.fit(dataset.from_history(one_cell), SPACE.top, engine=engine)
        X = torch.as_tensor(SPACE.at(SPACE.top).encode_all(SPACE.sample(np.random.default_rng(1), 3000)))
        best[name] = math.log2(SPACE.decode(X[model.at(SPACE.top).mean(X).argmax()])["lr"])
    assert best["law"] - best["none"] > 0.4 * -place.sum()
    gp = fitted(ran(SPANNING, 12))
    model, _ = model_choice.fit(dataset.from_history(history(ran(SPANNING, 12))), SPACE.top, engine=wrong)
    assert isinstance(model.gp, ScaleShiftGP)
    believed = model.gp.hyper.drift[0, 0] - gp.hyper.drift[0, 0]
    assert believed.abs().max() < 0.5


def test_a_law_of_something_that_the_space_does_not_have_is_refused() -> None:
    law = {"kind": "exponents", "exponents": {"rate": {"params": 1.0}}}
    with pytest.raises(ValueError, match="rate"):
        Bayes(law=law).check(SPACE, Minimize("loss"))
    with pytest.raises(ValueError, match="kind"):
        Ladder(law={"lr": 1.0}).check(SPACE, Minimize("loss"))


@pytest.mark.parametrize("name", [name for name in SURROGATES if name != "hamiltonian_network"])  # it takes long
def test_a_law_counts_in_the_models_that_have_drifts_and_is_refused_for_the_others(name: str) -> None:
    law = {"kind": "exponents", "exponents": {"lr": {"params": (-1.0, 0.001)}}}
    data = dataset.from_history(history(ran(SPANNING[:2], 5)))
    X, means = torch.tensor([[0.5, 0.5], [0.2, 0.1]], dtype=torch.float64), []
    for engine in (Engine(surrogate=name), Engine(surrogate=name, law=law)):
        with reproducible(np.random.default_rng(0)):
            means.append(model_choice.fit(data, SPACE.top, None, engine)[0].at(SPACE.top).mean(X))
    if name in DRIFTING:
        engine.check(SPACE, Minimize("loss"))
        assert not torch.equal(*means)
    else:
        with pytest.raises(ValueError, match="does not have"):
            engine.check(SPACE, Minimize("loss"))
        assert torch.equal(*means)


# ---------------------------------------------------------------------------------------------------- extrapolation


def test_a_recommendation_beyond_all_runs_has_intervals_and_says_that_it_guesses() -> None:
    found = Ladder().recommend(history(ran(SPANNING, 10)), SPACE.top, np.random.default_rng(0))
    assert found.guess is not None
    assert "params is 2.0 octaves beyond every run" in found.guess
    low, high = found.intervals["lr"]
    assert low < 0.01 < high
    assert high / low < 30
    assert found.mean is not None
    assert found.low is not None
    assert found.high is not None
    best = loss({"lr": 0.01, "depth": 0.4}, SPACE.top)
    assert found.low < best < found.high
    assert found.high - found.low < 1.0
    at = Ladder().recommend(history(ran(SPANNING, 10)), SPANNING[0], np.random.default_rng(0))
    assert at.guess is None
    assert at.intervals["lr"][1] / at.intervals["lr"][0] < high / low


def test_samples_of_the_optimum_are_nearer_to_it_the_more_is_known() -> None:
    truth = torch.as_tensor(SPACE.encode({"lr": 0.01, "depth": 0.4}))
    spreads = []
    for each in (4, 16):
        model, _ = model_choice.fit(dataset.from_history(history(ran(SPANNING, each))), SPACE.top)
        with reproducible(np.random.default_rng(0)):
            best = sampled(model, SPACE.top, truth, np.random.default_rng(0))
        spreads.append(float((best.points - truth)[:, 0].abs().mean()))
        assert (best.shortfall >= 0).all()
        cover = best.cover(truth, 3, np.random.default_rng(0), best.points[:0])
        assert torch.equal(cover[0], truth)
        assert len(torch.unique(cover, dim=0)) == 3
    assert spreads[1] < spreads[0]


def test_what_covers_the_optimum_of_a_few_options_has_each_but_once_and_none_that_was_tried() -> None:
    space = Space(kind=Choice(["a", "b", "c"]), fidelity=SCALES)
    trials = tuple(
        Trial(i, {"kind": "abc"[i % 3]}, SPANNING[0], 0, "added", 0.0, "finished", metrics={"loss": 2.0 + i % 5})
        for i in range(9)
    )
    given = History(space, Minimize("loss"), trials)
    found = Ladder(proxy_cap=0.0).propose(given, 5, np.random.default_rng(0))
    covering = [proposal.config["kind"] for proposal in found if proposal.source == SHOT]
    assert sorted(covering) == ["a", "b", "c"]
    lost = Trial(9, {"kind": covering[1]}, space.top, 0, "bayes", 1.0, "failed")
    again = Ladder(proxy_cap=0.0).propose(replace(given, trials=(*trials, lost)), 5, np.random.default_rng(0))
    assert covering[1] not in [proposal.config["kind"] for proposal in again if proposal.source == SHOT]


def test_a_recipe_of_the_users_at_the_target_leaves_a_batch_that_covers_where_the_best_may_lie() -> None:
    recipe = Trial(50, {"lr": 1e-3, "depth": 0.8}, SPACE.top, 0, "enqueued", 1.0, "finished", metrics={"loss": 3.0})
    two = ran(SPANNING[:2], 6)
    for trials in (two, (*two, recipe)):
        found = Ladder(proxy_cap=0.0).propose(history(trials), 3, np.random.default_rng(0))
        assert [proposal.note for proposal in found] == [posterior.COVER] * 3


# ------------------------------------------------------------------------------------------------------- other studies


def test_runs_of_another_study_are_cells_of_their_own_with_a_level_of_their_own() -> None:
    trials = ran([SPACE.top], 6) + tuple(
        Trial(
            100 + t.id,
            t.config,
            t.scale,
            0,
            "prior",
            0.0,
            "finished",
            metrics={"loss": 5.0 + loss(t.config, t.scale)},
            study="other",
        )
        for t in ran([SPACE.top], 8, seed=1)
    )
    data = dataset.from_history(history(trials))
    assert data.studies == (None, "other")
    assert int(data.at(SPACE.top).sum()) == 6
    assert data.S.shape[1] == 3
    assert data.place(SPACE.top).tolist() == [0.0, 0.0, 0.0]
    assert data.S[-1].tolist() == [0.0, 0.0, 1.0]
    assert float(data.outcome.level(data.place(SPACE.top)).best[0]) == min(t.metrics["loss"] for t in trials[:6])
    assert data.reached == [SPACE.top]


def test_one_scale_or_another_study_has_one_shot_and_then_the_target_is_searched_as_without() -> None:
    for trials in (ran([SPANNING[0]], 12), ran(SPANNING, 8, study="other")):
        (first,) = Bayes().propose(history(trials), 1, np.random.default_rng(0))
        assert first.source == SHOT
        shot = Trial(200, first.config, SPACE.top, 0, SHOT, 1.0, "finished", metrics={"loss": 9.0})
        later = Bayes().propose(history((*trials, shot)), 2, np.random.default_rng(0))
        assert [proposal.source for proposal in later] == ["sobol", "sobol"]
        assert all(proposal.config != first.config for proposal in later)


def test_proxies_that_span_the_axes_are_trusted_until_the_target_refutes_them() -> None:
    trials = ran(SPANNING, 8)
    (first,) = Ladder(proxy_cap=0.0).propose(history(trials), 1, np.random.default_rng(0))
    assert first.source == "ladder/target"
    as_foretold, far_worse = (
        Trial(200, first.config, SPACE.top, 0, "ladder/target", 1.0, "finished", metrics={"loss": value})
        for value in (loss(first.config, SPACE.top), 40.0)
    )
    for told, trusted in ((as_foretold, True), (far_worse, False)):
        now = history((*trials, told))
        assert guard.spanning(dataset.from_history(now), now).trusted is trusted


def test_proxies_are_refuted_by_a_second_run_at_the_target_that_diverged_while_none_has_finished() -> None:
    trials, chosen = ran(SPANNING, 8), []
    for i, trusted in enumerate((True, False)):
        (first,) = Ladder(proxy_cap=0.0).propose(history((*trials, *chosen)), 1, np.random.default_rng(i))
        assert first.source == "ladder/target"
        chosen.append(Trial(200 + i, first.config, SPACE.top, 0, "ladder/target", 1.0, "diverged"))
        now = history((*trials, *chosen))
        assert guard.spanning(dataset.from_history(now), now).trusted is trusted
    (later,) = Ladder(proxy_cap=0.0).propose(now, 1, np.random.default_rng(2))
    assert later.source == "sobol"
    assert "all 2 runs that they chose there diverged" in (
        Ladder().recommend(now, SPACE.top, np.random.default_rng(0)).trust or ""
    )
    done = replace(chosen[0], id=202, status="finished", metrics={"loss": loss(chosen[0].config, SPACE.top)})
    now = history((*trials, *chosen, done))
    assert guard.spanning(dataset.from_history(now), now).trusted, "beside one as good as was foretold"


def test_what_breaks_a_limit_at_the_target_does_not_hide_that_proxies_misled() -> None:
    def with_memory(trials: tuple[Trial, ...], gb: float) -> tuple[Trial, ...]:
        return tuple(replace(t, metrics={**(t.metrics or {}), "gb": gb}) for t in trials)

    chosen = tuple(
        Trial(200 + i, {"lr": 1e-3, "depth": 0.5}, SPACE.top, 0, "ladder/target", 1.0, "finished", metrics=metrics)
        for i, metrics in enumerate(({"loss": 40.0, "gb": 10.0}, {"loss": 1.0, "gb": 90.0}))
    )
    limited = Minimize("loss", subject_to=[AtMost("gb", 80.0)])
    for told, trusted in ((chosen, False), (chosen[1:], True)):
        now = History(SPACE, limited, (*with_memory(ran(SPANNING, 8), 10.0), *told))
        assert guard.spanning(dataset.from_history(now), now).trusted is trusted


def test_beside_proxies_of_its_own_a_study_leaves_out_another_that_does_not_foretell_them() -> None:
    own, (first, *rest) = ran(SPANNING, 6), ran(SPANNING, 6, seed=1, study="faithful")
    values = [t.metrics["loss"] for t in (first, *rest) if t.metrics]
    negated = tuple(
        replace(t, study="negated", metrics={"loss": max(values) + min(values) - value})
        for t, value in zip((first, *rest), values, strict=True)
    )
    theirs = (first, *rest, *negated)
    both = history((*own, *theirs))
    assert guard.misled(both, Engine()) == ("negated",)
    assert guard.misled(history(theirs), Engine()) == ()  # nothing of its own to judge them by
    (alone,), (beside,) = (
        Ladder(proxy_cap=0.0).propose(history(trials), 1, np.random.default_rng(0))
        for trials in (own, (*own, *negated))
    )
    assert alone.config == beside.config
    found = Ladder().recommend(both, SPACE.top, np.random.default_rng(0))
    assert "without negated, by which the runs of this study are foretold worse" in (found.trust or "")


def test_a_source_that_foretells_the_target_comes_back_in() -> None:
    elsewhere = ran([cell(4e6, 2e8)], 24)
    here = ran([SPACE.top], 5, seed=3)
    now = history((*elsewhere, *here))
    verdict = guard.verdict(dataset.from_history(now), now, Engine())
    assert verdict.trusted
    assert "nats better" in verdict.why
    rng = np.random.default_rng(0)
    values = rng.permutation([t.metrics["loss"] for t in elsewhere])
    useless = tuple(
        Trial(t.id, t.config, t.scale, 0, "added", 0.0, "finished", metrics={"loss": float(v)})
        for t, v in zip(elsewhere, values, strict=True)
    )
    now = history((*useless, *here))
    assert not guard.verdict(dataset.from_history(now), now, Engine()).trusted


def test_the_limits_hold_whatever_is_trusted() -> None:
    trials = ran([SPANNING[0]], 12)
    for left in (0, 1, 2):
        own = tuple(
            Trial(
                300 + i,
                {"lr": 1e-3 * (i + 1), "depth": 0.1 * i},
                SPACE.top,
                0,
                "sobol",
                1.0,
                "finished",
                metrics={"loss": 5.0},
            )
            for i in range(3)
        )
        now = history((*trials, *own), limits=Limits(budget=3.0 + left))
        assert len(Bayes().propose(now, 5, np.random.default_rng(0))) <= left


# ------------------------------------------------------------------------------------------------- ranges of scales


def test_where_every_run_is_alone_at_its_scale_levels_follow_a_trend() -> None:
    fidelity = Fidelity(params=Real(1e6, 8e6), tokens=Real(1e8, 4e8), target={"params": 8e6, "tokens": 4e8})
    space = Space(lr=Real(1e-4, 1e-1, log=True), depth=Real(0.0, 1.0), fidelity=fidelity)
    rng = np.random.default_rng(0)
    trials = []
    for i, config in enumerate(space.sample(rng, 40)):
        scale = fidelity.scale({"params": 1e6 * 8 ** rng.uniform(), "tokens": 1e8 * 4 ** rng.uniform()})
        trials.append(Trial(i, config, scale, 0, "added", 0.1, "finished", metrics={"loss": loss(config, scale)}))
    now = History(space, Minimize("loss"), tuple(trials), seen=40)
    data = dataset.from_history(now)
    assert data.outcome.trend is not None
    assert len(data.scales) == 40
    assert float(data.Y.std(0, correction=0)) == pytest.approx(1.0, abs=0.05)  # of excesses: they are not all zero
    model, _ = model_choice.fit(data, space.top)
    X = torch.as_tensor(space.encode_all(space.sample(np.random.default_rng(1), 1000)))
    best = space.decode(X[model.at(space.top).mean(X).argmax()])
    assert abs(math.log2(best["lr"] / 0.01)) < 1.2
    assert abs(best["depth"] - 0.4) < 0.25
