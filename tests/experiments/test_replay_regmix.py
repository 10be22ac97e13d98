import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.compare.environments import default_folder
from experiments.compare.methods import Entry, requirements
from experiments.replay import regmix, regmix_drift, regmix_simplex
from experiments.replay.protocol import append, load
from experiments.replay.regmix import Case, Ours, chooser, objectives, regrets
from experiments.replay.regmix_baselines import BASELINES, Question, Regression, by_botorch, law, mixing_law

TABLES = Path(os.environ.get("WINDTUNNEL_TABLES", Path(__file__).parents[3] / "shared" / "tables"))
needs_tables = pytest.mark.skipif(
    not (TABLES / "regmix").exists(), reason=f"there is no {TABLES / 'regmix'}; set WINDTUNNEL_TABLES"
)
K, P = 17, 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables like RegMix's, of runs that follow the mixing law; at the target losses are 0.7 times as large."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    (folder / "regmix").mkdir()
    t = rng.normal(-1, 1, (P, K))
    sets = {"1M_train": rng.dirichlet(np.full(K, 0.5), 60), "1M_test": rng.dirichlet(np.full(K, 0.5), 30)}
    for name, shares in (*sets.items(), ("60M_test", sets["1M_test"])):
        losses = 2 + 3 * np.exp(shares @ t.T)
        rows = np.hstack([shares, losses * (0.7 if name == "60M_test" else 1.0)])
        head = [*(f"mix_{i}" for i in range(K)), *(f"loss_{i}" for i in range(P))]
        lines = [",".join(head), *(",".join(map(str, row)) for row in rows.tolist())]
        (folder / "regmix" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def question(folder):
    return Case(folder, 3, 20, 16, 0).question()


def after(question, *rows):
    """The question when some rows were bought, and nothing is known of the others."""
    return replace(question, bought=rows, losses=question.losses[list(rows)])


# ------------------------------------------------------------------------------------------------------------ the task


def test_the_objectives_are_those_that_the_file_says_were_drawn():
    drawn = np.random.default_rng(20240701).dirichlet(np.full(P, 0.5), 24)
    assert objectives() == pytest.approx(drawn, abs=1e-5)
    assert objectives().sum(1) == pytest.approx(np.ones(24), abs=1e-5)


def test_a_disguise_changes_no_order_of_the_runs(folder):
    plain = regmix.tables(folder)[0]
    question = Case(folder, 5, 30, 16, 1).question()
    assert sorted(question.values) == pytest.approx(sorted(plain[1] @ objectives()[5]))
    assert not np.allclose(question.shares[:, 0], plain[0][:, 0])
    best = plain[0][(plain[1] @ objectives()[5]).argmin()]
    assert sorted(question.shares[question.values.argmin()]) == pytest.approx(sorted(best))


def test_a_target_has_one_pool_and_a_seed_its_proxies_of_which_fewer_are_a_part(folder):
    one, other, fewer = (Case(folder, 2, 20, n, seed).question() for n, seed in ((16, 0), (16, 1), (8, 0)))
    assert np.array_equal(one.shares, other.shares)
    assert not np.array_equal(one.proxies, other.proxies)
    assert np.array_equal(one.proxies[:8], fewer.proxies)
    assert not np.array_equal(one.shares, Case(folder, 3, 20, 16, 0).question().shares)


def test_no_proxy_is_a_mixture_of_the_pool(question):
    gaps = np.abs(question.proxies[:, None] - question.shares[None]).sum(-1)
    assert gaps.min() > 1e-3


def test_a_pool_larger_than_the_table_is_all_of_it_and_is_called_so(folder):
    case = Case(folder, 0, 256, 16, 0)
    assert len(case.question().shares) == 30
    assert case.problem == "objective 0, pool of 30"


# ---------------------------------------------------------------------------------------------------------- a search


def test_a_search_ends_with_the_best_or_at_the_cap(question):
    order = np.argsort(question.values)

    def third_best_first(asked):
        return int(next(row for row in order[[2, 1, 0]] if row not in asked.bought))

    found = regrets(question, third_best_first, 0)
    assert found == pytest.approx(100 * (np.sort(question.values)[[2, 1, 0]] / question.values.min() - 1))
    assert found[-1] == 0
    assert len(regrets(question, lambda asked: asked.best(question.values), 0, cap=6)) == 6


def test_a_method_sees_the_losses_of_what_it_bought_and_no_others(question):
    def checks(asked):
        assert np.array_equal(asked.losses, question.losses[list(asked.bought)])
        return asked.best(np.zeros(len(asked.shares)))

    assert len(regrets(question, checks, 3, cap=8)) <= 8


def test_the_random_start_ends_where_it_has_met_the_best(question):
    start = np.random.default_rng([question.seed, 7]).permutation(20)
    place = int(np.flatnonzero(start == question.values.argmin())[0])
    found = regrets(question, lambda _: pytest.fail("the best was met before"), start=20)
    assert (len(found), found[-1]) == (place + 1, 0)


def test_ours_is_at_the_best_soon_with_proxies_that_have_the_same_order(question):
    assert len(regrets(question, Ours(), 0, cap=6)) <= 3


def test_ours_can_be_told_the_sum_alone(question):
    history, _ = Ours(scalar=True).history(after(question, 4, 7))
    target = [trial for trial in history.trials if trial.scale == history.space.top]
    assert [trial.metrics["m0"] for trial in target] == pytest.approx(question.values[[4, 7]])
    assert len(history.trials) == 18


def test_methods_without_proxies_have_one_setting_and_dear_ones_fewer_seeds(folder):
    keys = [job.key for job in regmix.jobs(folder, ["law", "botorch", "ax"], [20], [8, 16], 2, 5)]
    counts = {method: sum(key.method == method for key in keys) for method in ("law", "botorch", "ax")}
    assert counts == {"law": 20, "botorch": 10, "ax": 2 * regmix.DEAR_SEEDS}
    assert len(set(keys)) == len(keys)


def test_rows_are_made_and_reported(folder, tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    common = ["--tables", str(folder), "--objectives", "2", "--seeds", "1", "--pools", "12", "--rows", str(rows)]
    monkeypatch.setattr(sys, "argv", ["regmix", *common, "--methods", "ours,random", "--proxies", "12"])
    regmix.main()
    made = {(row.method, row.setting, row.cost) for row in load(rows).values()}
    assert made == {("ours", "12 proxies", 0.2), ("random", "no proxies", 0.0)}  # proxies of a sixtieth each
    shown = capsys.readouterr().out
    assert "pool of 12, 12 proxies, target runs to the best" in shown
    assert "random" in shown


# ----------------------------------------------------------------------------------------------------------- baselines


def test_a_question_survives_its_line(question):
    asked = after(question, 1, 5)
    line = json.loads(json.dumps(asked.to_json()))
    back = Question.from_json(line)
    for name, value in vars(asked).items():
        assert np.array_equal(getattr(back, name), value), name
    empty = Question.from_json(json.loads(json.dumps(after(question).to_json())))
    assert empty.losses.shape == (0, P)


def test_the_mixing_law_is_found_again(question):
    rng = np.random.default_rng(0)
    shares, t = rng.dirichlet(np.ones(4), 40), np.array([1.0, -1.0, 0.5, 0.0])
    theta = mixing_law(shares, 2 + 0.8 * np.exp(shares @ t), rng, starts=4)
    fresh = rng.dirichlet(np.ones(4), 50)
    foretold = theta[0] + np.exp(theta[1] + fresh @ theta[2:])
    assert foretold == pytest.approx(2 + 0.8 * np.exp(fresh @ t), abs=0.01)


@pytest.mark.parametrize("scalar", [False, True])
def test_a_regression_is_brought_to_the_level_of_the_target(question, scalar):
    choose, asked = Regression(law, scalar), after(question, 0, 1, 2)
    assert choose(asked) not in asked.bought
    assert choose.values(asked).mean() == pytest.approx(question.values.mean(), rel=0.1)


@pytest.mark.filterwarnings("ignore")  # of shares that are not scaled, and of what the import uses
@pytest.mark.slow
@pytest.mark.parametrize("composite", [False, True])
def test_botorch_chooses_a_row_that_was_not_bought(question, composite):
    asked = after(question, *range(8))
    assert by_botorch(asked, composite) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, each in BASELINES.items() if each.environment])
def test_rivals_answer_in_their_environments(question, name):
    environment = BASELINES[name].environment
    assert requirements(environment).is_file()
    if Entry(name, "", environment, 0.0).python(default_folder()) is None:
        pytest.skip(f"the environment {environment} is not built")
    choose = chooser(name)
    assert choose(after(question, *range(6))) >= 6
    assert choose.cpu > 0


def test_a_rival_without_its_environment_says_how_to_build_it(question, tmp_path, monkeypatch):
    monkeypatch.setenv("WINDTUNNEL_CACHE", str(tmp_path))
    regmix.process.cache_clear()
    with pytest.raises(SystemExit, match=r"lightgbm is absent; build it: .* lightgbm"):
        chooser("lightgbm")


# --------------------------------------------------------------------------------------------- simplex and drift


def test_mixtures_to_be_scored_are_mixtures(question):
    drawn = regmix_simplex.mixtures(question, np.random.default_rng(0), 500)
    assert drawn.shape == (500, K)
    assert drawn.sum(1) == pytest.approx(np.ones(500))
    assert (drawn >= 0).all()


def test_proxies_and_the_emulator_share_no_run():
    given, behind = regmix_simplex.halves(60)
    assert sorted([*given, *behind]) == list(range(60))


def test_rows_keep_their_distances(tmp_path):
    made = regmix_simplex.Found("objective 0, simplex", "law", "64 proxies", 0, (2.0, 1.0), 64, distances=(0.25, 0.5))
    append(tmp_path / "rows.jsonl", made)
    assert regmix_simplex.load(tmp_path / "rows.jsonl") == {made.key: made}


def test_what_is_told_of_the_large_scale_makes_the_model_better_than_a_copy():
    rng = np.random.default_rng(1)
    shares, t = rng.dirichlet(np.full(5, 0.7), 40), rng.normal(0, 1, (2, 2, 5))
    small, large = (1 + np.exp(shares @ each.T) for each in (t[0], t[0] + 0.5 * t[1]))  # the optimum drifts
    errors = regmix_drift.foretold(shares, small, large, 20, 0)
    assert errors["model"] < errors["copied, slope"] < errors["copied, level"] + 1e-9


def test_the_best_of_equal_tables_is_the_same_at_both_scales(folder):
    (_, large), _, (_, small) = regmix.tables(folder)
    found = regmix_drift.among_runs(small, large)
    assert found["the best is the same"] == 1
    assert found["copying costs, %"] == [0, 0]


def test_the_drift_in_the_simplex_stands_beside_what_a_second_search_at_one_scale_says(monkeypatch):
    best = {("1M", 0): [0.5, 0.5], ("60M", 0): [0.7, 0.3], ("60M", 1): [0.6, 0.4]}

    def lowest(folder, number, scale, everything, again=0):
        return np.array(best[scale, again]), 2.0 + 0.02 * again

    emulator = SimpleNamespace(losses=lambda X: np.full((1, 1), 2.1))
    monkeypatch.setattr(regmix_drift, "lowest", lowest)
    monkeypatch.setattr(regmix_drift, "emulator", lambda folder, everything: emulator)
    monkeypatch.setattr(regmix_drift, "objectives", lambda: np.ones((3, 1)))
    assert regmix_drift.in_the_simplex(Path(), ["a", "b"]) == {
        "apart": "0.20 (0.20 to 0.20)",
        "two searches at 60M apart": "0.10 (0.10 to 0.10)",
        "copying costs, %": "5.00 (5.00 to 5.00)",
        "the other search costs, %": "1.00 (1.00 to 1.00)",
        "shares that move": {"a": "0.20 (0.20 to 0.20)", "b": "-0.20 (-0.20 to -0.20)"},
    }


@needs_tables
def test_the_tables_have_equal_mixtures_at_both_scales():
    (shares, large), (_, small), (again, _) = regmix.tables(TABLES)
    assert np.array_equal(shares, again)
    assert large.shape[1] == small.shape[1] == P


@needs_tables
@pytest.mark.slow
def test_the_emulator_is_least_where_it_is_said_to_be():
    judge = regmix_simplex.emulator(TABLES)
    mixture, least = regmix_simplex.lowest(TABLES, 0)
    rng = np.random.default_rng(5)
    near = 0.95 * mixture + 0.05 * rng.dirichlet(np.ones(K), 200)
    assert (judge.losses(near) @ objectives()[0]).min() > least * (1 - 1e-4)
    assert judge.distance(judge.runs[3]) == 0
