from __future__ import annotations

import csv
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest

from bo.scaling import level
from bo.scaling.level import Level

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables")) / "steplaw"
Z90 = 1.645
#: Noise of a run, as a share of its loss.
NOISE = 0.001


def surfaces(count, bend):
    """Chinchilla laws with drawn constants: places of 3 to 6 cells and the target last, and noisy results.

    The cells are anywhere below the target, on a grid, or on a line. `bend`: how far the truth is off the law.
    """
    seed = 0
    while count:
        seed += 1
        rng = np.random.default_rng([seed, 7])
        alpha, beta = rng.uniform(0.12, 0.6, 2)
        floor, by_params, by_tokens = rng.uniform(0.3, 2.5), rng.uniform(0.1, 1.5), rng.uniform(0.1, 2.0)
        target = 10 ** rng.uniform(6.0, 9.5)
        params, tokens = math.log2(target / 1e8), math.log2(target * 10 ** rng.uniform(0.8, 2.2) / 1e9)
        S = np.append(-rng.uniform(0.5, 5, (int(rng.integers(3, 7)), 2)), np.zeros((1, 2)), axis=0)
        if seed % 3 == 1:
            S[:, 0] = S[:, 1]
        elif seed % 3 == 2:
            S = np.append(np.unique(np.round(S[:-1] / 2) * 2, axis=0), np.zeros((1, 2)), axis=0)
        y = floor + by_params * 2 ** (-alpha * (params + S[:, 0])) + by_tokens * 2 ** (-beta * (tokens + S[:, 1]))
        y = y * np.exp(bend * np.sin(S @ rng.standard_normal(2) / 3 + rng.uniform(0, 6)))
        if (
            y.max() < 10 and len(S) > 3 and S[:-1].sum(axis=1).max() < 0
        ):  # no loss is above the logarithm of a vocabulary
            count -= 1
            yield (S[:, 1:] if seed % 3 == 1 else S), y * np.exp(NOISE * rng.standard_normal(len(y)))


def held(S, y, seen, target):
    """Whether the 90% interval from the cells `seen` holds the result of another."""
    mean, sd = Level.fit(S[seen], y[seen], NOISE * np.abs(y[seen])).predict(S[target])
    return abs(y[target] - mean) <= Z90 * math.hypot(sd, NOISE * y[target])


def published(name, axes, shape):
    """A surface for each model shape of the published runs: log2 of the scales of its cells, and their best losses."""
    if not (TABLES / name).exists():
        pytest.skip(f"there is no {TABLES / name}; set WINDTUNNEL_TABLES")
    best: dict[tuple[str, ...], dict[tuple[float, ...], float]] = {}
    with (TABLES / name).open() as file:
        for row in csv.DictReader(file):
            cells = best.setdefault(tuple(row[column] for column in shape), {})
            cell = tuple(math.log2(float(row[axis])) for axis in axes)
            cells[cell] = min(cells.get(cell, math.inf), float(row["loss"]))
    return [(np.array(list(cells)), np.array(list(cells.values()))) for cells in best.values()]


@pytest.mark.parametrize("bend", [0.0, 0.01, 0.02])
def test_intervals_cover_the_target_on_laws_and_off_them(bend) -> None:
    assert 0.8 <= np.mean([held(S, y, slice(-1), -1) for S, y in surfaces(120, bend)]) <= 0.99


def test_intervals_cover_the_largest_cells_of_the_published_runs() -> None:
    dense = published("dense.csv", ("params_nonemb", "tokens"), ())
    experts = published("moe.csv", ("tokens",), ("top_k", "experts"))
    hits = []
    for S, y in dense + experts:
        compute, cells = S.sum(axis=1), range(len(y))
        for count in range(3, 7):
            every = 1 if len(y) < 12 else 97  # some of the many subsets of a full table
            for seen in itertools.islice(itertools.combinations(cells, count), 0, None, every):
                larger = [cell for cell in cells if compute[cell] > compute[list(seen)].max() + 1e-9]
                hits += [held(S, y, list(seen), cell) for cell in larger]
    assert len(hits) > 100
    assert 0.8 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("bend", [0.0, 0.02])
def test_draws_cover_the_target_and_are_narrower_than_a_normal_with_their_deviation(bend) -> None:
    hits, wide = [], []
    for S, y in surfaces(120, bend):
        level = Level.fit(S[:-1], y[:-1], NOISE * y[:-1])
        (mean, sd), draws = level.predict(S[-1]), level.draws(S[-1], 4096)
        assert draws.mean() == pytest.approx(mean, abs=0.1 * sd)
        low, high = np.quantile(draws, [0.05, 0.95])
        hits.append(low <= y[-1] <= high)
        wide.append((high - low) / (2 * Z90 * sd))
    assert 0.8 <= np.mean(hits) <= 0.99
    assert np.median(wide) < 0.95


def test_it_is_what_plain_integration_over_the_prior_gives() -> None:
    S = np.array([[-6.0, -5.0], [-4.0, -5.0], [-5.0, -2.0], [-2.0, -1.0]])
    y = 2 + 0.4 * 2 ** (-0.3 * S[:, 0]) + 0.3 * 2 ** (-0.25 * S[:, 1]) + 0.01 * np.sin(3 * S[:, 0])
    e, at, unit = 0.002 * y, np.array([[0.0, 0.0]]), y.mean()
    rng = np.random.default_rng(0)
    means, variances, logs = [], [], []
    for u in rng.standard_normal((6_000, 3)):
        alpha, amplitude = (
            level.EXPONENT * level.EXPONENT_FACTOR ** u[:2],
            level.DEVIATION * level.DEVIATION_FACTOR ** u[2],
        )
        both = np.append(S, at, axis=0)
        fallen = np.expm1(-math.log(2) * alpha * (both - S.mean(axis=0))) / (alpha * math.log(2))
        r = math.sqrt(5) / level.OCTAVES * np.linalg.norm(both[:, None] - both[None], axis=-1)
        K = 100.0 + fallen @ fallen.T * level.FALL_SD**2 / 2  # a level of 1 give or take 10, and the two falls
        K += amplitude**2 * ((1 + r + r**2 / 3) * np.exp(-r) + level.OWN**2 * np.eye(5))
        prior = fallen.sum(axis=1) * level.FALL / 2
        noisy = K[:4, :4] + np.diag((e / unit) ** 2)
        weights = np.linalg.solve(noisy, K[:4, 4])
        rest = y / unit - prior[:4]
        means.append(prior[4] + weights @ rest)
        variances.append(K[4, 4] - weights @ K[:4, 4])
        logs.append(-0.5 * (rest @ np.linalg.solve(noisy, rest) + np.linalg.slogdet(noisy)[1]))
        below = np.array([1.0, *(-1 / (alpha * math.log(2)))])  # the floor: of the level and the falls
        cross = np.insert(fallen[:4], 0, 1.0, axis=1) * [100.0, level.FALL_SD**2 / 2, level.FALL_SD**2 / 2]
        gain = np.linalg.solve(noisy, cross @ below)
        mean = below[1:].sum() * level.FALL / 2 + gain @ rest
        spread = 100.0 + (below[1:] ** 2).sum() * level.FALL_SD**2 / 2 - gain @ cross @ below
        logs[-1] += math.log(0.5 * math.erfc(-mean / math.sqrt(2 * spread)) + 1e-300)
    weight = np.exp(np.array(logs) - max(logs))
    weight /= weight.sum()
    mean = weight @ means
    sd = math.sqrt(weight @ (variances + (np.array(means) - mean) ** 2))
    found = Level.fit(S, y, e).predict(at[0])
    assert found[0] == pytest.approx(mean * unit, abs=0.1 * sd * unit)
    assert found[1] == pytest.approx(sd * unit, rel=0.1)


def test_a_cell_that_ran_is_known_as_well_as_it_was_measured() -> None:
    S, y = np.array([[-4.0], [-3.0], [-1.0]]), np.array([3.0, 2.8, 2.5])
    for value in (y, y - 5):
        mean, sd = Level.fit(S, value, np.full(3, 1e-4)).predict(S[1])
        assert mean == pytest.approx(value[1], abs=3e-4)
        assert sd < 3e-4


def test_the_uncertainty_grows_with_the_distance_from_what_was_run() -> None:
    S = np.array([[-6.0, -6.0], [-4.0, -6.0], [-6.0, -4.0], [-4.0, -4.0]])
    y = 1.5 + 0.5 * 2 ** (-0.3 * S[:, 0]) + 0.5 * 2 ** (-0.3 * S[:, 1])
    fitted = Level.fit(S, y, NOISE * y)
    spreads = [fitted.predict([s, s])[1] for s in (-3.5, -2.0, 0.0, 2.0, 4.0)]
    assert spreads == sorted(spreads)
    assert spreads[-1] > 5 * spreads[0]


def test_an_axis_along_which_no_cell_tells_anything_stays_open() -> None:
    S = np.array([[-6.0, 0.0], [-4.0, 0.0], [-2.0, 0.0]])
    y = 2 + 0.3 * 2 ** (-0.3 * S[:, 0])
    fitted = Level.fit(S, y, NOISE * y)
    (_, along), (_, across) = fitted.predict([1.0, 0.0]), fitted.predict([-2.0, 3.0])
    assert across > 5 * along


def test_more_cells_tell_more() -> None:
    S = np.array([[-6.0], [-2.0], [-4.0], [-3.0], [-5.0], [-1.0]])
    y = 2 + 0.3 * 2 ** (-0.3 * S[:, 0])
    spreads = [Level.fit(S[:c], y[:c], NOISE * y[:c]).predict([0.0])[1] for c in (1, 2, 6)]
    assert spreads[0] > 2 * spreads[1] > 4 * spreads[2]


def test_one_cell_gives_the_usual_fall_and_its_spread() -> None:
    mean, sd = Level.fit([[-1.0, -1.0]], [3.0], [0.0]).predict([0.0, 0.0])
    assert 3 * (1 - 1.2 * level.FALL) < mean < 3 * (1 - 0.8 * level.FALL)
    assert sd == pytest.approx(3 * level.FALL_SD, rel=0.2)


def test_nothing_depends_on_the_unit_or_on_where_the_target_lies() -> None:
    rng = np.random.default_rng(0)
    S = rng.uniform(-6, -1, (5, 2))
    y = 2 + 0.3 * 2 ** (-0.3 * S[:, 0])
    mean, sd = Level.fit(S, y, NOISE * y).predict([0.0, 0.0])
    assert Level.fit(S, 1e3 * y, NOISE * 1e3 * y).predict([0.0, 0.0]) == pytest.approx((1e3 * mean, 1e3 * sd))
    assert Level.fit(S + 3, y, NOISE * y).predict([3.0, 3.0]) == pytest.approx((mean, sd))


def test_a_metric_below_zero_is_extrapolated_too() -> None:
    S = np.linspace(-6, -1, 6)[:, None]
    accuracy = 0.8 - 0.1 * 2 ** (-0.3 * S[:, 0])
    mean, sd = Level.fit(S, -accuracy, np.full(6, 1e-3)).predict([0.0])
    assert abs(mean + 0.7) < 2 * sd < 0.04
    assert np.isfinite(Level.fit(S, np.zeros(6), np.zeros(6)).predict([0.0])).all()


def test_every_answer_is_finite_and_equal_cells_give_equal_ones() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        S = np.unique(rng.uniform(-25, 3, (int(rng.integers(1, 12)), int(rng.integers(1, 4)))).round(), axis=0)
        wild = (np.exp(rng.normal(0, 3, len(S))), rng.normal(0, 1, len(S)), 2.0 ** S[:, 0], np.full(len(S), 3.0))
        y = wild[seed % 4]
        sd = rng.choice([0.0, 1e-3, 0.1]) * np.abs(y)
        at = rng.uniform(-10, 10, S.shape[1])
        mean, spread = Level.fit(S, y, sd).predict(at)
        assert math.isfinite(mean)
        assert 0 <= spread < math.inf
        assert (mean, spread) == Level.fit(S, y, sd).predict(at)


@pytest.mark.parametrize(
    ("places", "value", "sd", "message"),
    [
        (np.zeros((0, 1)), [], [], "c x m places"),
        ([0.0], [1.0], [0.1], "c x m places"),
        ([[0.0]], [1.0, 2.0], [0.1, 0.1], "got shapes"),
        ([[0.0]], [math.nan], [0.1], "finite places and values"),
        ([[0.0]], [1.0], [-0.1], "sd >= 0"),
        ([[0.0], [0.0]], [1.0, 1.1], [0.1, 0.1], "one result for each place, got 2 for 1"),
    ],
)
def test_cells_that_make_no_sense_are_refused(places, value, sd, message) -> None:
    with pytest.raises(ValueError, match=message):
        Level.fit(places, value, sd)
    with pytest.raises(ValueError, match="a place of 1 axes"):
        Level.fit([[0.0]], [1.0], [0.1]).predict([0.0, 0.0])
