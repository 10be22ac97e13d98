from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from bo.scaling.loss import DELTA, FORMS, compute_optimal, fit_loss

#: Hoffmann et al. 2022, section 3.3.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
OVERTRAINED = {"E": 1.8, "a": 30.0, "b": 140.0, "eta": 0.12}
POWER = {"E": 0.7, "A": 25.0, "alpha": 0.2}


def chinchilla(n, d):
    c = CHINCHILLA
    return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]


def overtrained(n, d):
    c, compute, multiplier = OVERTRAINED, 6 * n * d, d / n
    return c["E"] + (c["a"] * multiplier ** c["eta"] + c["b"] * multiplier ** -c["eta"]) * compute ** -c["eta"]


def power(x):
    return POWER["E"] + POWER["A"] / x ** POWER["alpha"]


def scales(n, seed=0):
    rng = np.random.default_rng(seed)
    return {"params": 10 ** rng.uniform(7.5, 10, n), "tokens": 10 ** rng.uniform(9, 11.5, n)}


@pytest.mark.parametrize(
    ("form", "truth", "numbers"),
    [
        ("chinchilla", lambda s: chinchilla(s["params"], s["tokens"]), CHINCHILLA),
        ("overtrained", lambda s: overtrained(s["params"], s["tokens"]), OVERTRAINED),
        ("power", lambda s: power(s["flops"]), POWER),
    ],
)
def test_each_law_is_recovered_from_exact_losses(form, truth, numbers) -> None:
    runs = scales(12) if form != "power" else {"flops": np.geomspace(1e4, 1e9, 8)}
    found = fit_loss(form, runs, truth(runs), resamples=0)
    assert found.constants == pytest.approx(numbers, rel=1e-6)
    far = dict.fromkeys(runs, 1e13)
    assert found.predict(far).value == pytest.approx(truth(far))
    assert found.scatter < 1e-9


def test_every_law_is_tried_here() -> None:
    assert set(FORMS) == {"chinchilla", "overtrained", "power"}


def test_the_over_training_law_is_a_chinchilla_law_with_equal_exponents() -> None:
    runs = scales(12)
    found = fit_loss("chinchilla", runs, overtrained(runs["params"], runs["tokens"]), resamples=0).constants
    eta, six = OVERTRAINED["eta"], 6 ** OVERTRAINED["eta"]  # a M^eta C^-eta = a 6^-eta N^-2 eta
    assert (found["alpha"], found["beta"]) == pytest.approx((2 * eta, 2 * eta))
    assert (found["A"], found["B"]) == pytest.approx((OVERTRAINED["a"] / six, OVERTRAINED["b"] / six))


def test_intervals_hold_the_truth_under_noise() -> None:
    held = []
    for seed in range(5):
        runs = scales(30, seed)
        noise = 0.003 * np.random.default_rng(seed).standard_normal(30)
        found = fit_loss("chinchilla", runs, chinchilla(**named(runs)) * np.exp(noise), resamples=30, seed=seed)
        target = found.predict({"params": 7e10, "tokens": 1.4e12})
        held += [low <= CHINCHILLA[name] <= high for name, (low, high) in found.intervals.items()]
        held.append(target.low <= chinchilla(7e10, 1.4e12) <= target.high)
        assert target.value == pytest.approx(chinchilla(7e10, 1.4e12), rel=0.02)
        assert found.scatter == pytest.approx(0.003, rel=0.5)
    assert 0.7 <= np.mean(held) <= 1.0


def named(runs):
    return {"n": runs["params"], "d": runs["tokens"]}


def test_nothing_near_the_fit_has_a_lower_huber_loss() -> None:
    runs = scales(25, 3)
    losses = chinchilla(**named(runs)) * np.exp(0.003 * np.random.default_rng(3).standard_normal(25))
    found = fit_loss("chinchilla", runs, losses, resamples=0)

    def huber(theta):
        e, a, b, alpha, beta = theta
        log_loss = np.log(math.exp(e) + np.exp(a) / runs["params"] ** alpha + np.exp(b) / runs["tokens"] ** beta)
        z = np.abs(log_loss - np.log(losses)) / DELTA
        return np.where(z < 1, z**2 / 2, z - 0.5).sum()

    start = np.array(found.theta)
    assert minimize(huber, start, method="Nelder-Mead").fun >= huber(start) * (1 - 1e-4)
    published = np.array([math.log(1.69), math.log(406.4), math.log(410.7), 0.34, 0.28])
    assert huber(start) < huber(published)


def test_one_run_that_went_wrong_bends_the_law_little() -> None:
    runs = scales(30)
    losses = chinchilla(**named(runs)) * np.exp(0.001 * np.random.default_rng(0).standard_normal(30))
    spoilt = losses.copy()
    spoilt[7] *= 1.3
    at = {"params": 3e10, "tokens": 6e11}
    clean, bent = (fit_loss("chinchilla", runs, y, resamples=0).predict(at).value for y in (losses, spoilt))
    assert bent == pytest.approx(clean, rel=0.003)


def test_units_do_not_matter() -> None:
    runs = scales(15, 1)
    losses = chinchilla(**named(runs)) * np.exp(0.002 * np.random.default_rng(1).standard_normal(15))
    plain = fit_loss("chinchilla", runs, losses, resamples=5)
    billions = fit_loss("chinchilla", {axis: value / 1e9 for axis, value in runs.items()}, losses, resamples=5)
    there, again = plain.predict({"params": 1e11, "tokens": 1e12}), billions.predict({"params": 1e2, "tokens": 1e3})
    assert there == pytest.approx(again, rel=1e-4)


def test_the_best_use_of_compute_is_the_laws_minimum() -> None:
    runs = scales(12)
    found = fit_loss("chinchilla", runs, chinchilla(**named(runs)), resamples=0)
    flops = 5.76e23
    best = compute_optimal(found, flops)
    assert 6 * best["params"] * best["tokens"] == pytest.approx(flops)
    least = minimize_scalar(lambda log_n: chinchilla(math.exp(log_n), flops / 6 / math.exp(log_n)), (20.0, 25.0))
    assert math.log(best["params"]) == pytest.approx(least.x, abs=1e-3)
    with pytest.raises(ValueError, match="needs a fit of 'chinchilla', got one of 'power'"):
        compute_optimal(fit_loss("power", {"x": [1.0, 2.0, 3.0]}, [3.0, 2.0, 1.5], resamples=0), 1e20)
    with pytest.raises(ValueError, match="operations > 0"):
        compute_optimal(found, 0.0)


@pytest.mark.parametrize(
    ("form", "runs", "losses", "message"),
    [
        ("chinchila", {"x": [1.0]}, [1.0], "did you mean 'chinchilla'"),
        ("chinchilla", {"params": [1e6], "data": [1e9]}, [1.0], r"has the axes \['params', 'tokens'\]"),
        ("power", {"x": [1.0, 2.0], "y": [1.0, 2.0]}, [2.0, 1.0], "has the axes"),
        ("power", {"x": [1.0, 2.0, 3.0]}, [2.0, 1.0], "a finite loss > 0 for each of the 3 runs"),
        ("power", {"x": [1.0, 2.0, 3.0]}, [2.0, 1.0, math.nan], "a finite loss > 0"),
        ("power", {"x": [1.0, 2.0, 0.0]}, [2.0, 1.0, 1.0], "finite values > 0 on the axes"),
        ("power", {"x": [1.0, 2.0, 2.0]}, [2.0, 1.0, 1.0], "has 3 numbers and needs runs at as many scales, got 2"),
        ("chinchilla", {"params": [1.0], "tokens": [1.0, 2.0]}, [1.0], "as many values on each axis"),
    ],
)
def test_runs_that_make_no_sense_are_refused(form, runs, losses, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit_loss(form, runs, losses)


def test_a_delta_or_a_scale_that_makes_no_sense_is_refused() -> None:
    runs, losses = {"x": [1.0, 2.0, 3.0]}, [3.0, 2.0, 1.5]
    with pytest.raises(ValueError, match="delta must be"):
        fit_loss("power", runs, losses, delta=0.0)
    with pytest.raises(ValueError, match="has the axes"):
        fit_loss("power", runs, losses, resamples=0).predict({"y": 1.0})
