from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from bo.scaling.optima import fit

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables"))
DENSE = TABLES / "steplaw" / "dense.csv"
SPANNING = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [4.0, 2.0], [4.0, 4.0]])


def bowls(places, slope, each, seed=0, noise=0.0005):
    """Runs in bowls over two parameters; the best value of the first drifts by `slope`."""
    rng = np.random.default_rng(seed)
    S, cells = np.repeat(places, each, axis=0), np.repeat(np.arange(len(places)), each)
    x, b = rng.uniform(-4, 4, (2, len(S)))
    excess = 0.006 * ((x - 1 - S @ slope) ** 2 + (b - 0.5 * S[:, -1]) ** 2)
    losses = 2 * np.exp(-0.05 * S.sum(axis=1)) * (1 + excess + noise * rng.standard_normal(len(S)))
    return x, S, losses, cells


@pytest.fixture(scope="module")
def dense():
    """log2 of the rate, of the batch in tokens, of N and D, the losses, and the cell of each published run."""
    if not DENSE.exists():
        pytest.skip(f"there is no {DENSE}; set WINDTUNNEL_TABLES")
    with DENSE.open() as file:
        rows = list(csv.DictReader(file))
    names = ("lr", "batch_tokens", "params_nonemb", "tokens", "loss")
    lr, batch, n, d, loss = (np.array([float(row[name]) for row in rows]) for name in names)
    _, cells = np.unique(np.stack([n, d], axis=1), axis=0, return_inverse=True)
    return np.log2(lr), np.log2(batch), np.log2(np.stack([n, d], axis=1)), loss, cells


def test_of_no_axis_there_is_no_exponent() -> None:
    found = fit([1.0, 3.0, 9.0], np.zeros((3, 0)), [2.0, 2.001, 3.0], [0, 0, 0], ())
    assert (found.exponents, found.rank, found.runs) == ({}, 0, 2)
    assert found.at({}) == pytest.approx(2.0**2)


def test_it_is_the_step_laws_fit_to_its_published_runs(dense) -> None:
    lr, batch, places, loss, cells = dense
    if len(np.unique(cells)) < 17:
        pytest.skip(f"{DENSE} has {len(np.unique(cells))} of the 17 published cells")
    rate = fit(lr, places, loss, cells, ("params", "tokens"))
    size = fit(batch, places[:, 1:], loss, cells, ("tokens",))
    assert rate.runs == 129
    assert rate.intercept * np.log(2) == pytest.approx(4.353, abs=1e-3)
    assert rate.exponents["params"].value == pytest.approx(-0.766, abs=1e-3)
    assert rate.exponents["tokens"].value == pytest.approx(0.197, abs=1e-3)
    assert size.intercept * np.log(2) == pytest.approx(-1.568, abs=1e-3)
    assert size.exponents["tokens"].value == pytest.approx(0.613, abs=1e-3)


def test_it_is_least_squares_on_the_best_runs_of_each_cell(dense) -> None:
    lr, _, places, loss, cells = dense
    best = np.concatenate(
        [np.flatnonzero((cells == c) & (loss <= 1.0025 * loss[cells == c].min())) for c in np.unique(cells)]
    )
    design = np.column_stack([np.ones(len(best)), places[best]])
    intercept, n, d = np.linalg.lstsq(design, lr[best])[0]
    found = fit(lr, places, loss, cells, ("params", "tokens"), resamples=50)
    assert (found.runs, found.cells) == (len(best), len(np.unique(cells)))
    assert found.intercept == pytest.approx(intercept)
    assert found.exponents["params"].value == pytest.approx(n)
    assert found.exponents["tokens"].value == pytest.approx(d)
    assert found.at({"params": 1e9, "tokens": 1e11}) == pytest.approx(1e9**n * 1e11**d * 2**intercept)


def test_optima_on_a_line_give_its_exponents_exactly() -> None:
    slope = np.array([-0.7, 0.3])
    x = 3 + SPANNING @ slope
    found = fit(x, SPANNING, np.ones(6), range(6), ("params", "tokens"), resamples=20)
    for axis, power in zip(("params", "tokens"), slope, strict=True):
        exponent = found.exponents[axis]
        assert (exponent.value, exponent.low, exponent.high) == pytest.approx((power, power, power))
    assert found.rank == 2
    assert found.at({"params": 2.0**5, "tokens": 2.0**7}) == pytest.approx(2 ** (3 - 0.7 * 5 + 0.3 * 7))


def test_exponents_along_directions_that_no_cell_spans_are_not_reported() -> None:
    along = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 3.0]])  # N and D grow together
    x = 1 + along @ [-0.5, 0.3, 0.2]
    found = fit(x, along, np.ones(4), range(4), ("params", "tokens", "experts"), resamples=20)
    assert found.exponents.keys() == {"experts"}
    assert found.exponents["experts"].value == pytest.approx(0.2)
    assert found.rank == 2
    assert np.linalg.matrix_rank([[1, 1, 0], [0, 0, 1], *found.directions]) == 2  # just what the cells span
    assert found.at({"params": 8.0, "tokens": 8.0, "experts": 1.0}) == pytest.approx(2 ** (1 - 0.2 * 3))


def test_one_cell_tells_of_no_drift() -> None:
    found = fit([1.0, 3.0], [[4.0], [4.0]], [2.0, 2.001], [0, 0], ("tokens",))
    assert (found.rank, found.exponents, found.runs) == (0, {}, 2)
    assert found.at({"tokens": 1e9}) == pytest.approx(4.0)


def test_runs_that_diverged_count_for_nothing() -> None:
    x, S, losses, cells = bowls(SPANNING, np.array([-0.5, 0.25]), 20)
    more = np.append(losses, [np.inf, np.inf])
    with_them = fit([*x, 9.0, 9.0], [*S, [0.0, 0.0], [20.0, 20.0]], more, [*cells, 0, 6], ("n", "d"), resamples=30)
    assert with_them == fit(x, S, losses, cells, ("n", "d"), resamples=30)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = []
    for seed in range(40):
        slope = np.random.default_rng(seed).normal(0, 0.4, 2)
        found = fit(*bowls(SPANNING, slope, 12, seed), ("n", "d"), resamples=100)
        intervals = (found.exponents["n"], found.exponents["d"])
        held += [e.low <= truth <= e.high for e, truth in zip(intervals, slope, strict=True)]
    assert 0.8 <= np.mean(held) <= 0.99


def test_equal_seeds_give_equal_intervals() -> None:
    runs = bowls(SPANNING, np.array([-0.5, 0.25]), 12)
    first, again, other = (fit(*runs, ("n", "d"), resamples=30, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.exponents["n"].value == other.exponents["n"].value
    assert first.exponents["n"].low != other.exponents["n"].low


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": [[1.0, 2.0], [2.0, 2.0]]}, "n x 1 places"),
        ({"cells": [0]}, "got the shapes"),
        ({"losses": [1.0, np.nan]}, "losses > 0, infinite where a run diverged"),
        ({"losses": [1.0, -1.0]}, "losses > 0"),
        ({"losses": [np.inf, np.inf]}, "at least one run with a finite loss"),
        ({"parameter": [1.0, np.inf]}, "finite parameters"),
        ({"tolerance": -0.1}, "tolerance must be"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(change, message) -> None:
    given = {"parameter": [1.0, 2.0], "places": [[1.0], [2.0]], "losses": [1.0, 2.0], "cells": [0, 1], "axes": ("n",)}
    with pytest.raises(ValueError, match=message):
        fit(**(given | change))
    with pytest.raises(ValueError, match=r"got none for \['n'\]"):
        fit(**given).at({"tokens": 1.0})
