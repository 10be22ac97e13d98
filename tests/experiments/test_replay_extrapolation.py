"""Drawn problems have the optimum that they say, and what is counted as held is."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.replay import extrapolation
from experiments.replay.extrapolation import Case, Drawn, Said, append, load, report

SAID = Said(
    family="law",
    problem="draw 0",
    setting="6 in 3",
    steps=1,
    seed=0,
    octaves=1.5,
    low=2.0,
    high=2.2,
    mean=2.1,
    value=2.05,
    least=2.04,
    size=2.0,
    lows=(0.2, 0.5),
    highs=(0.4, 0.9),
    best=(0.3, 0.95),
    ranges=(6.0, 8.0),
    good=(True, True),
    edge=(False, False),
    guess=True,
    seconds=1.0,
)


def test_the_optimum_of_a_drawn_problem_moves_by_its_exponents_and_its_level_falls_with_scale():
    box = Drawn(3, 0.001, 0.0)
    have, target = box.drawn, len(box.fidelities) - 1
    assert have.cells[target] == (1.0, 1.0)
    rng = np.random.default_rng(0)
    levels = []
    for cell, (params, tokens) in enumerate(have.cells):
        best = have.best + have.drift @ np.log2([params, tokens]) / have.ranges
        around = best + 0.1 * rng.standard_normal((50, 2))
        levels.append(float(box.losses(best[None], cell)[0]))
        assert (box.losses(around, cell) >= levels[-1]).all()
    assert levels[-1] == min(levels)


def test_noise_is_of_a_run_and_bent_problems_are_off_their_law():
    box, quiet = Drawn(3, 0.01, 0.2), Drawn(3, 0.0, 0.0)
    config, fidelity = {"x0": 4.0, "x1": 8.0}, box.fidelities[0]
    assert box.evaluate(config, fidelity, 1) == box.evaluate(config, fidelity, 1)
    assert box.evaluate(config, fidelity, 1) != box.evaluate(config, fidelity, 2)
    assert quiet.evaluate(config, fidelity, 1) == quiet.evaluate(config, fidelity)
    assert not np.allclose(box.drawn.off, 0)
    assert np.allclose(quiet.drawn.off, 0)


def test_an_interval_holds_what_lies_in_it_and_the_report_counts_coordinates_alike(tmp_path):
    assert SAID.held
    assert not replace(SAID, value=2.3).held
    assert SAID.strict == (True, False)
    append(tmp_path / "rows.jsonl", SAID)
    rows = load(tmp_path / "rows.jsonl")
    assert rows == {SAID.key: SAID}
    (line,) = (line for line in report(list(rows.values())).splitlines() if line.startswith("  all"))
    assert line.split()[1:8:2] == ["100.0%", "50.0%", "100.0%", "10.00%"]
    assert "1.20 3.20" in line


def test_a_recommendation_for_a_drawn_problem_comes_with_intervals_next_to_the_truth(tmp_path):
    found = Case(tmp_path, "quiet", None, "6 in 3", 1, 0)()
    assert found.key == ("quiet", "draw 0", "6 in 3", 1, 0)
    assert found.least <= found.value < 1.05 * found.least
    assert found.low < found.mean < found.high
    assert found.octaves > 0
    assert all(0 <= low < high <= 1 for low, high in zip(found.lows, found.highs, strict=True))
    have = Drawn(0, 0.0, 0.0).drawn
    assert found.best == pytest.approx(have.best, abs=1 / (extrapolation.GRID - 1))
    assert found.size == pytest.approx(found.least, rel=1e-9)
