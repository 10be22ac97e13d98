"""The guard's sources are what they are called, searches are paired, and rows say what a source costs."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.replay import guard
from experiments.replay.guard import Ground, Search, Target, source, target_of
from experiments.replay.protocol import Row

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables"))
needs_tables = pytest.mark.skipif(
    not (TABLES / "steplaw" / "moe.csv").exists(),
    reason=f"there are no Step Law tables in {TABLES}; set WINDTUNNEL_TABLES",
)
left_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file, by blackbox.py


def bowl(at):
    """Least, 2, at (1, -1)."""
    return 2.0 + 0.02 * (at[:, 0] - 1) ** 2 + 0.01 * (at[:, 1] + 1) ** 2


GROUND = Ground(bowl, np.array([-3.0, -4.0]), np.array([3.0, 3.0]))
AT = np.random.default_rng(0).uniform(GROUND.low, GROUND.high, (24, 2))


def made(kind, seed=0):
    return GROUND.values(kind, AT, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(3))
def test_a_faithful_source_is_displaced_and_as_faithful_as_is_said(seed):
    found = GROUND.faithful(np.random.default_rng(seed))
    assert GROUND.is_faithful(found)
    best = GROUND.grid[found(GROUND.grid).argmin()]
    assert 0 < np.linalg.norm(best - [1, -1]) <= guard.FARTHEST + 0.1  # and half a step of the grid
    assert found(AT).min() > 2.3


def test_sources_are_not_faithful_that_have_their_best_elsewhere_or_rank_otherwise():
    assert GROUND.is_faithful(bowl)
    assert not GROUND.is_faithful(guard.displaced(bowl, np.array([1.5, 0.0])))
    assert not GROUND.is_faithful(lambda at: bowl(at) + 0.1 * np.sin(20 * at[:, 0]))


def test_a_displaced_source_has_its_best_three_octaves_away_and_inside():
    found = GROUND.displaced(np.random.default_rng(0))
    best = GROUND.grid[found(GROUND.grid).argmin()]
    assert abs(np.linalg.norm(best - [1, -1]) - guard.AWAY) <= guard.FARTHEST + 0.1
    assert ((GROUND.low < best) & (best < GROUND.high)).all()


def test_sources_that_mislead_are_made_of_the_faithful_one():
    faithful, negated, shuffled, useless = (made(kind) for kind in ("faithful", "negated", "shuffled", "useless"))
    assert negated.argsort().tolist() == (-faithful).argsort().tolist()
    assert sorted(shuffled) == sorted(faithful)
    assert (shuffled != faithful).any()
    correlations = [abs(np.corrcoef(made("useless", seed), made("faithful", seed))[0, 1]) for seed in range(200)]
    assert np.mean(correlations) < 0.25, "that of 24 independent values is 0.17"
    assert abs(np.median(useless) - np.median(faithful)) < np.ptp(faithful)


def row(kind, seed, regrets, way="prior"):
    return Row("p", kind, "alone" if kind == "none" else way, seed, regrets, cost=0.0 if kind == "none" else 1.5)


def test_the_report_says_how_many_more_runs_a_source_takes_and_how_few_it_needs_to_the_score_without():
    rows = [row("none", seed, (2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.2, 0.05)) for seed in range(3)]
    rows += [row("faithful", seed, (0.3, 0.05)) for seed in range(3)]
    rows += [row("negated", seed, (*[3.0] * 8, 0.05)) for seed in range(3)]
    assert guard.scores({each.key: each for each in rows}) == {"p": 0.5}
    lines = guard.report({each.key: each for each in rows}).splitlines()
    found = {line.split()[0]: line for line in lines if line}
    assert "7.00 (7.00 to 7.00)" in found["no"]
    assert "-5.00 (-5.00 to -5.00)" in found["faithful"]
    assert "0.17 (0.17 to 0.17)" in found["faithful"]
    assert "2.00 (2.00 to 2.00)        2.00" in found["negated"]
    assert "proxies" in lines, "a way without rows has only its head"


@needs_tables
@left_open
def test_runs_of_a_source_are_at_the_same_configurations_whatever_it_is_and_marked_as_what_they_are():
    cell = guard.cells(TABLES)["moe"][1]
    target = target_of(TABLES, cell)
    given = {(kind, way): source(target, kind, way, 3) for kind in guard.KINDS for way in guard.WAYS}
    configs = [run.config for run in given["faithful", "prior"]]
    assert len(configs) == guard.RUNS
    for (kind, way), runs in given.items():
        assert [run.config for run in runs] == configs
        assert all((run.study is None) == (way == "proxies") for run in runs)
        assert all((run.cost > 0) == (way == "proxies") for run in runs)
        assert all((run.scale == target.problem.space().top) == (way == "prior at the target") for run in runs)
        same = [run.metrics["loss"] for run in given[kind, "prior"]]  # measured again: an emulator is no bit pattern
        assert [run.metrics["loss"] for run in runs] == pytest.approx(same, rel=1e-6)
    small = given["negated", "prior"][0].scale
    assert target.problem.space().fidelity.relative_cost(small) == pytest.approx(1 / 16)


@needs_tables
@left_open
def test_the_ground_of_a_target_is_its_own_undisguised_surface():
    cell = guard.cells(TABLES)["moe"][-1]
    target = Target(TABLES, cell)
    (config,) = target.problem.space().sample(np.random.default_rng(0), 1)
    excess = 100 * (target.ground.loss(target.octaves([config]))[0] / target.problem.least - 1)
    assert target.problem.regret(config) == pytest.approx(excess)
    assert target.ground.on_grid.min() == pytest.approx(target.problem.least, rel=1e-3)


@needs_tables
@left_open
def test_a_search_with_a_source_makes_target_runs_alone_and_is_told_of_its_price():
    cell = guard.cells(TABLES)["moe"][1]
    found = Search(TABLES, cell, "faithful", "proxies", 0)()
    alone = Search(TABLES, cell, "none", "alone", 0)()
    assert (found.proxies, alone.proxies, alone.cost) == (guard.RUNS, 0, 0.0)
    assert found.cost == pytest.approx(guard.RUNS / 16)
    assert found.regrets[0] < 2.0, "what a faithful source says is near"
    assert Search(TABLES, cell, "none", "alone", 0)().regrets == alone.regrets


@needs_tables
@left_open
def test_a_planned_ladder_pays_for_its_own_proxies_and_not_for_the_prior_beside_them():
    cell = guard.cells(TABLES)["moe"][2]
    rows = [Search(TABLES, cell, kind, guard.PLANNED, 0)() for kind in ("none", "alone", "faithful")]
    without, alone, beside = rows
    assert (alone.proxies, alone.cost) == (0, 0.0)
    assert without.proxies == beside.proxies > 0
    assert without.cost == beside.cost == pytest.approx(without.proxies * guard.PRICE)
    lines = guard.report({row.key: row for row in rows}, ("faithful",), (guard.PLANNED,)).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["target", "no", "faithful"]
    assert "more than alone, proxies included" in lines[4]
