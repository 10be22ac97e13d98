import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from bo import Minimize
from bo.policies.bayes import Bayes
from bo.policies.ladder import Ladder
from bo.policies.sobol import Sobol
from bo.ports import History
from experiments.compare.problems import blackbox
from experiments.replay import baselines, mixing_laws, protocol, schedules, searches, steplaw
from experiments.replay.baselines import Frozen, Process, negative_log_posterior
from experiments.replay.problem import Problem, proxies, search
from experiments.replay.protocol import Contender, Key, Row
from search_spaces import Mixture, Real, Space

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables"))
needs_tables = pytest.mark.skipif(
    not (TABLES / "blackbox.py").exists(), reason=f"there is no {TABLES / 'blackbox.py'}; set WINDTUNNEL_TABLES"
)
left_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file, by blackbox.py
A, B = Contender("a", "alone"), Contender("b", "alone")


# ------------------------------------------------------------------------------------------------------- the protocol


def row(method: str, problem: str, seed: int, runs: int, cost: float = 0.0) -> Row:
    """A search that gets to a regret of 0 in its run number `runs`."""
    return Row(problem, method, "alone", seed, (*[1.0] * (runs - 1), 0.0), cost=cost)


def rows(*made: Row) -> dict[Key, Row]:
    return {each.key: each for each in made}


def test_runs_are_counted_to_the_first_that_is_good_enough_and_to_one_beyond_the_cap():
    curve = Row("p", "a", "alone", 0, (2.0, 0.25, 0.1), cost=1.5)
    assert (curve.runs(0.25, 3), curve.runs(0.1, 3), curve.runs(0.05, 3)) == (2, 3, 4)
    assert curve.runs(0.1, 2) == 3
    assert curve.total(0.25, 3) == 3.5


def test_a_search_that_ended_early_without_getting_there_is_refused():
    with pytest.raises(ValueError, match=r"ends after 2 runs above 0\.25; it should go on to the cap, 3"):
        Row("p", "a", "alone", 0, (2.0, 1.0)).runs(0.25, 3)


def test_the_regret_of_the_best_so_far_does_not_grow():
    with pytest.raises(ValueError, match="never grow"):
        Row("p", "a", "alone", 0, (1.0, 2.0))


@dataclass(frozen=True)
class Counted:
    """A job that notes each time it is done, by a file."""

    key: Key
    folder: Path

    def __call__(self) -> Row:
        with (self.folder / "calls").open("a") as file:
            file.write(".")
        return Row(self.key.problem, self.key.method, self.key.setting, self.key.seed, (1.0 / (1 + self.key.seed),))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_are_kept_and_never_made_again(tmp_path, workers):
    file, jobs = tmp_path / "rows.jsonl", [Counted(Key("p", "a", "alone", seed), tmp_path) for seed in range(3)]
    first = list(protocol.make(jobs[:2], file, {}, workers))
    file.write_bytes(file.read_bytes() + b'{"problem": "p", "met')  # a kill in the middle of a line
    second = list(protocol.make(jobs, file, protocol.load(file), workers))
    assert [len(first), len(second)] == [2, 1]
    assert (tmp_path / "calls").read_text() == "..."
    kept = protocol.load(file, tmp_path / "none.jsonl")
    assert kept == {job.key: replace(job(), regrets=(float(f"{1 / (1 + job.key.seed):.6g}"),)) for job in jobs}
    assert len([line for line in file.read_text().splitlines() if line.endswith("}")]) == 3


def test_the_first_of_two_files_counts(tmp_path):
    for name, runs in (("one", 2), ("two", 5)):
        protocol.append(tmp_path / name, row("a", "p", 0, runs))
    (only,) = protocol.load(tmp_path / "one", tmp_path / "two").values()
    assert only.runs(0.0, 9) == 2
    assert set(json.loads((tmp_path / "one").read_text())) == set(Row.__dataclass_fields__)


def test_only_seeds_that_both_methods_have_are_compared():
    known = rows(*[row("a", "p", seed, 2) for seed in range(4)], *[row("b", "p", seed, 4) for seed in (1, 3, 5)])
    known |= rows(row("a", "q", 0, 9))
    (line, reference) = protocol.compare(known, [A, B], B, 0.0, 20)
    assert (line.targets, line.searches, reference.searches) == (1, 2, 3)
    assert str(line.over) == "0.50 (0.50 to 0.50)"
    assert str(line.more) == "-2.00 (-2.00 to -2.00)"
    assert line.behind == pytest.approx(2.0)


def test_luck_that_two_methods_share_does_not_widen_their_difference():
    rng = np.random.default_rng(0)
    luck = rng.integers(1, 30, size=(8, 12))
    known = rows(
        *[row("a", str(t), s, int(luck[t, s])) for t in range(8) for s in range(12)],
        *[row("b", str(t), s, int(luck[t, s]) + 1) for t in range(8) for s in range(12)],
    )
    line = protocol.compare(known, [B], A, 0.0, 40)[0]
    assert line.mean.high - line.mean.low > 2
    assert str(line.more) == "1.00 (1.00 to 1.00)"


def test_intervals_are_as_wide_as_targets_differ_however_many_seeds_there_are():
    known = rows(*[row("a", str(t), s, 1 + 4 * t) for t in range(6) for s in range(50)])
    mean = protocol.compare(known, [A], A, 0.0, 40)[0].mean
    assert mean.value == 11.0
    spread = np.std([1 + 4 * t for t in range(6)]) / math.sqrt(6)
    assert mean.high - mean.low == pytest.approx(2 * 1.645 * spread, rel=0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        centres = rng.normal(10.0, 2.0, 15)
        values = {str(t): centre + rng.normal(0, 3.0, (rng.integers(4, 9), 1)) for t, centre in enumerate(centres)}
        found = protocol.interval(values, protocol.column(0), protocol.resampled(values, 200))
        held += found.low <= 10.0 <= found.high
    assert 0.82 <= held / 200 <= 0.98


def test_targets_weigh_the_same_whatever_their_number_of_seeds():
    known = rows(*[row("a", "p", s, 1) for s in range(20)], *[row("a", "q", s, 30) for s in range(2)])
    line = protocol.compare(known, [A], A, 0.0, 20)[0]
    assert (line.mean.value, line.p90, line.censored) == (11.0, 21.0, 0.5)


def test_what_proxies_cost_is_paid_where_the_whole_cost_is_asked_for():
    known = rows(*[row("a", "p", s, 2, cost=1.5) for s in range(3)], *[row("b", "p", s, 7) for s in range(3)])
    runs, cost = (protocol.compare(known, [B], A, 0.0, 20, quantity)[0] for quantity in ("runs", "cost"))
    assert (runs.over.value, cost.over.value) == (3.5, 2.0)
    shown = protocol.text("title", protocol.compare(known, [A, B], A, 0.0, 20, "cost"), A, "cost").splitlines()
    assert shown[0] == "title"
    assert "3.50 (3.50 to 3.50)" in shown[2]
    assert "2.00 (2.00 to 2.00)" in shown[3]


def test_the_break_even_price_is_what_was_saved_a_proxy():
    known = rows(*[Row("p", "target alone", "alone", s, (1.0,) * 5 + (0.0,)) for s in range(4)])
    known |= rows(*[Row("p", "ours", "12 in 5", s, (1.0, 0.0), proxies=60, cost=3.0) for s in range(4)])
    assert "60.0 proxies pay up to a price of 0.0667 (0.0667 to 0.0667)" in searches.prices(known, "ours", 20)


def test_a_limit_on_targets_spreads_them_over_families_and_costs():
    families = {"x": list(range(10)), "y": [100, 101], "z": [200]}
    assert searches.spread(families, None) == [*range(10), 100, 101, 200]
    assert searches.spread(families, 3) == [9, 101, 200]
    assert searches.spread(families, 7) == [0, 3, 6, 9, 100, 101, 200]


# ------------------------------------------------------------------------------------------------------- the baseline


def random_data(n: int = 9, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    X = rng.random((n, d))
    return X, np.sin(3 * X[:, 0]) + X[:, 1] ** 2 + 0.1 * rng.standard_normal(n)


def test_the_gradient_of_the_baseline_is_that_of_its_posterior():
    X, y = random_data()
    theta = np.array([-0.5, 0.3, -1.2, 0.4, -2.0])
    _, gradient = negative_log_posterior(theta, X, y)
    step = 1e-6 * np.eye(len(theta))
    by_steps = [
        (negative_log_posterior(theta + e, X, y)[0] - negative_log_posterior(theta - e, X, y)[0]) / 2e-6 for e in step
    ]
    np.testing.assert_allclose(gradient, by_steps, rtol=1e-5, atol=1e-6)


def test_the_baseline_is_the_textbook_posterior_of_its_kernel_with_an_unknown_mean():
    X, y = random_data()
    theta = np.array([-0.5, 0.3, -1.2, 0.4, -2.0])
    A = np.random.default_rng(3).random((5, 3))

    def kernel(P, Q):
        r = math.sqrt(5) * np.linalg.norm((P[:, None] - Q) / np.exp(theta[:3]), axis=-1)
        return math.exp(theta[3]) * (1 + r + r**2 / 3) * np.exp(-r)

    inverse = np.linalg.inv(kernel(X, X) + math.exp(theta[4]) * np.eye(9))
    mean = inverse.sum(0) @ y / inverse.sum()
    found, sd = Process.given(X, y, theta)(A)
    np.testing.assert_allclose(found, mean + kernel(A, X) @ inverse @ (y - mean))
    np.testing.assert_allclose(sd**2, math.exp(theta[3]) - np.diag(kernel(A, X) @ inverse @ kernel(X, A)))


def test_the_baseline_stays_what_it_was_when_it_was_measured():
    X, y = random_data()
    process = Process.fit(X, baselines.transform(-y))
    np.testing.assert_allclose(process.theta, [-0.8386, -0.8061, -0.6329, 0.1301, -5.0393], atol=2e-3)
    assert process(np.full((1, 3), 0.5)) == (pytest.approx(-0.00234, abs=2e-3), pytest.approx(0.3750, abs=2e-3))


@pytest.mark.parametrize("mean", [2.0, -0.5, -3.0, -8.0])
def test_log_ei_is_the_logarithm_of_the_integral(mean):
    expected, _ = quad(lambda f: max(f - 1.0, 0.0) * norm.pdf(f, mean, 0.7), 1.0, 12.0, epsabs=0, epsrel=1e-10)
    found = baselines.log_ei(np.array([mean]), np.array([0.7]), 1.0)
    assert found[0] == pytest.approx(math.log(expected), rel=1e-8)


def test_log_ei_goes_on_far_from_the_best():
    values = baselines.log_ei(-np.geomspace(1, 1e8, 400), np.ones(400), 0.0)
    assert np.isfinite(values).all()
    assert (np.diff(values) < 0).all()


def test_a_diverged_run_counts_as_the_worst_and_losses_keep_their_order():
    y = baselines.transform(np.array([3.0, np.nan, 2.0, 2.1, 50.0, np.inf]))
    assert y[1] == y[5] == y[4] == y.min()
    assert list(np.argsort(-y[[0, 2, 3, 4]])) == [1, 2, 0, 3]
    assert (y.mean(), y.std()) == (pytest.approx(0), pytest.approx(1))
    assert not baselines.transform(np.array([2.0, 2.0])).any()


# ------------------------------------------------------------------------------------------------ problems and searches


@dataclass(frozen=True)
class Cell:
    """A cell as blackbox.py shows it."""

    params: float
    tokens: float


@dataclass(frozen=True)
class Shown:
    """A parameter as blackbox.py shows it."""

    name: str
    type: str
    low: float
    high: float
    size: int = 1


@dataclass(frozen=True)
class Bowl:
    """A disguised problem as blackbox.py shows it: a bowl in two logarithms, 3 at least, whose bottom drifts.

    The secret scales are its attributes a and b; noise is a hundredth of a percent.
    """

    a: float = 1.7
    b: float = -0.3
    fidelities: tuple[Cell, ...] = (Cell(1e6, 2e7), Cell(2e6, 4e7), Cell(8e6, 4e7), Cell(4e6, 2e8), Cell(4e6, 8e8))
    params: tuple[Shown, ...] = (Shown("lr", "log", 1e-4, 1e-1), Shown("batch", "log", 8, 512))

    @property
    def inner(self) -> "Bowl":
        return replace(self, a=1.0, b=0.0)

    def optimum(self) -> tuple[None, float]:
        return None, 3 * self.a + self.b

    def evaluate(self, config, cell, seed=None):
        away = math.log2(cell.params * cell.tokens / 3.2e15)
        x = [math.log10(config["lr"]) + 2.2 + 0.05 * away, 0.5 * math.log10(config["batch"] / 60) - 0.03 * away]
        luck = 0.0 if seed is None else np.random.default_rng([seed, int(1e6 * config["lr"])]).standard_normal()
        return self.a * (3 + 0.2 * float(np.square(x).sum()) - 0.05 * away + 0.0003 * luck) + self.b


BOWL = Problem(Bowl())


def test_regret_is_in_percent_of_the_undisguised_least_loss_and_zero_at_the_optimum():
    at_best = {"lr": 10**-2.2, "batch": 60.0}
    assert BOWL.regret(at_best) == pytest.approx(0, abs=1e-10)
    off = {"lr": 10**-1.2, "batch": 60.0}
    assert BOWL.regret(off) == pytest.approx(100 * 0.2 / 3)
    assert Problem(Bowl(a=0.4, b=1.0)).regret(off) == pytest.approx(BOWL.regret(off))


def test_a_space_has_the_cells_of_the_table_and_no_other_combination():
    cells = BOWL.space().fidelity.cells()
    assert [(cell["params"], cell["tokens"]) for cell in cells] == [(c.params, c.tokens) for c in Bowl().fidelities]
    assert BOWL.space().top == cells[-1] == BOWL.cells[-1]
    assert [BOWL.space().cost(cell) for cell in cells] == pytest.approx([1 / 160, 1 / 40, 1 / 10, 1 / 4, 1])


def test_a_proxy_is_charged_its_price():
    space = BOWL.space(1 / 70)
    assert [space.cost(cell) for cell in BOWL.cells] == pytest.approx([1 / 70] * 4 + [1])


@pytest.mark.parametrize("price", [None, 1 / 40])
def test_the_ladder_runs_and_pays_for_proxies_in_the_cells_of_the_table(price):
    space = BOWL.space(price)
    done = search(BOWL, space, Ladder(), [], 1, 1, 0.0)  # a cell that the table has not would be refused
    assert len(done.regrets) == 1
    assert done.proxies >= 4
    assert done.cost <= 1 + 1e-9
    assert price is None or done.cost == pytest.approx(done.proxies * price)


def test_the_ladder_may_plan_to_make_no_proxies():
    done = search(BOWL, BOWL.space(0.9), Ladder(), [], 2, 1, 0.0)
    assert (done.proxies, done.cost) == (0, 0.0)


def test_searches_without_proxies_begin_with_the_same_runs():
    begun = []
    for policy in (Sobol(), Bayes(), Frozen()):
        done = search(BOWL, BOWL.space(), policy, [], 3, 5, 0.0)
        assert (done.proxies, done.cost) == (0, 0.0)
        begun.append(done.regrets)
    assert begun[0] == begun[1] == begun[2]
    assert search(BOWL, BOWL.space(), Sobol(), [], 3, 6, 0.0).regrets != begun[0]


def test_proxies_lie_in_the_cheapest_cells_and_the_same_for_every_method():
    space = BOWL.space()
    given = proxies(BOWL, space, 4, 3, seed=1)
    assert [trial.scale for trial in given] == [cell for cell in BOWL.cells[:3] for _ in range(4)]
    assert given == proxies(BOWL, space, 4, 3, seed=1)
    assert len(proxies(BOWL, space, 4, 9, seed=1)) == 16
    assert {trial.source for trial in given} == {"added"}


def test_a_search_pays_for_the_proxies_that_it_is_given_and_stops_where_it_is_good_enough():
    given = proxies(BOWL, BOWL.space(), 4, 3, seed=1)
    done = search(BOWL, BOWL.space(), Bayes(), given, 12, 1, 0.2)
    assert (done.proxies, done.cost) == (12, pytest.approx(4 * (1 / 160 + 1 / 40 + 1 / 10)))
    assert done.regrets[-1] <= 0.2
    assert all(regret > 0.2 for regret in done.regrets[:-1])


def test_the_baseline_gets_there_sooner_than_space_filling_and_looks_at_no_proxies():
    space, counts = BOWL.space(), {}
    for policy in (Sobol(), Frozen()):
        found = [search(BOWL, space, policy, [], 25, seed, 0.05).regrets for seed in range(5)]
        counts[type(policy)] = np.mean([len(regrets) for regrets in found])
    assert counts[Frozen] < 0.6 * counts[Sobol]
    given = proxies(BOWL, space, 4, 3, seed=0)
    history = History(space, Minimize("loss"), tuple(given), seen=len(given), memory={"sequence": 0})
    (first,) = Frozen().propose(history, 1, np.random.default_rng(0))
    assert first.source == "sobol"


def test_the_baseline_searches_a_mixture_over_its_shares():
    space = Space(data=Mixture("a", "b", "c"), x=Real(0.0, 1.0))
    with pytest.raises(ValueError, match=r"numbers or one mixture, got \['data', 'x'\]"):
        baselines.domain(space)
    where = baselines.domain(Space(data=Mixture("a", "b", "c")))
    points = where.near(where.draw(np.random.default_rng(0)), 0.3, np.random.default_rng(1))
    np.testing.assert_allclose(points.sum(1), 1)
    assert points.min() == 0.0
    config = {"data": {"a": 0.2, "b": 0.0, "c": 0.8}}
    assert where.config(where.point(config)) == config


def test_every_method_has_a_policy_for_all_its_settings():
    for method in (*searches.BY_THEMSELVES, searches.OURS):
        for setting in searches.settings(method):
            assert isinstance(searches.policy(method, setting), (Sobol, Bayes, Frozen, Ladder))
            assert isinstance(searches.policy(method, setting), Ladder) == setting.planned


def test_a_cell_that_covers_too_little_of_the_targets_box_is_left_out():
    whole, shifted, half = (np.array([[a, b], [0.0, 1.0]]) for a, b in ((0.0, 8.0), (2.0, 9.0), (4.0, 12.0)))
    ranges = {(1e6, 1e8): shifted, (1e6, 2e8): half, (2e6, 1.5e8): whole, (4e6, 1e8): whole}
    assert steplaw.below(ranges, (4e6, 1e8), list(ranges)) == [(1e6, 1e8), (2e6, 1.5e8)]


# ------------------------------------------------------------------------------------------------------ on real tables


@needs_tables
@left_open
def test_every_target_of_the_tables_has_enough_cheaper_cells():
    module = blackbox(TABLES)
    found = {script: script.targets(module, None) for script in (steplaw, mixing_laws, schedules)}
    assert all(found.values())
    for target in found[steplaw]:
        cost = [n * d for n, d in target.cells]
        assert sorted(cost) == cost
        assert sum(other < cost[-1] for other in cost) == len(cost) - 1 >= steplaw.CHEAPER
    names = [target.name for listed in found.values() for target in listed]
    assert len(set(names)) == len(names)
    assert len(steplaw.targets(module, 2)) == 2


@needs_tables
@left_open
@pytest.mark.parametrize("script", [steplaw, mixing_laws, schedules])
def test_a_secret_changes_what_is_shown_and_not_the_regret(script):
    target = script.targets(blackbox(TABLES), 1)[0]
    one, two = (searches.problem(TABLES, target, secret) for secret in ("one", "two"))
    config = one.box.inner.sample(np.random.default_rng(0))
    shown = [problem.box._close(config) for problem in (one, two)]
    assert str(shown[0]) != str(shown[1])
    assert one.regret(shown[0]) == pytest.approx(two.regret(shown[1]))
    assert one.regret(shown[0]) > 0


@needs_tables
@left_open
@pytest.mark.parametrize("script", [steplaw, mixing_laws, schedules])
def test_a_search_of_the_tables_makes_a_row(script):
    target = script.targets(blackbox(TABLES), 1)[0]
    for method in ("sobol", "frozen"):
        (job,) = searches.searches(TABLES, [target], [method], [searches.ALONE], 1, ["a"], 5, "new")
        made = job()
        assert made.key == job.key == Key(target.name, method, "alone", 0)
        assert len(made.regrets) == 5 or made.regrets[-1] <= searches.ENOUGH


def test_rows_of_our_own_method_are_kept_by_label():
    target = steplaw.Target("dense", ((1e6, 1e8), (2e6, 1e8)))
    both = searches.searches(Path(), [target], ["sobol", "ours"], list(searches.SETTINGS.values()), 1, ["a"], 5, "x")
    assert {job.key.method for job in both} == {"sobol", "ours x"}
    assert [job.key.setting for job in both] == ["alone", *(each.name for each in (*searches.FREE, *searches.PAID))]
