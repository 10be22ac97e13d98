import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import methods, problems, report, run
from experiments.compare.methods import METHODS, Entry
from experiments.compare.problems import PROBLEMS, SHARES, space_filling
from experiments.compare.protocol import LEAST, Axis, Task, flat, flatten, unflatten

FUNCTIONS = [name for name, problem in PROBLEMS.items() if not problem.tables and name != "digits"]
MIXED = (
    Axis("rate", "real", 1e-4, 1.0, log=True),
    Axis("depth", "integer", 1, 12),
    Axis("kind", "choice", names=("a", "b")),
    Axis("data", "mixture", names=("x", "y", "z")),
)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", [0, 7])
def test_no_point_is_better_than_the_least_value(name, seed):
    instance = PROBLEMS[name].make(seed)
    regrets = [instance.regret(config) for config in space_filling(instance.axes, seed, 2000)]
    assert min(regrets) >= -1e-9
    assert np.median(regrets) > 0.05


@pytest.mark.parametrize("name", ["branin", "levy-4", "rosenbrock-4", "ackley-5", "hartmann-6", "levy-20"])
def test_the_least_value_is_reached_inside_of_the_box(name):
    def least(seed: int) -> tuple[float, np.ndarray]:
        instance, rng = PROBLEMS[name].make(seed), problems.draws(seed, name.split("-")[0])
        d = len(instance.axes)
        problems.ortho_group.rvs(d, random_state=rng)
        place = rng.uniform(0.2, 0.8, d)
        return instance.regret({axis.name: x for axis, x in zip(instance.axes, place.tolist(), strict=True)}), place

    (regret, here), (_, there) = least(3), least(4)
    assert abs(regret) < 1e-9
    assert np.abs(here - there).max() > 0.01


def test_a_function_in_60_coordinates_depends_on_six():
    instance = PROBLEMS["hartmann-6-in-60"].make(1)
    (config,) = space_filling(instance.axes, 1, 1)
    moved = [instance.regret({**config, axis.name: 1 - config[axis.name]}) for axis in instance.axes]
    assert sum(value != instance.regret(config) for value in moved) == 6


def test_the_kind_decides_how_the_best_rate_goes_with_the_depth():
    instance = PROBLEMS["mixed-4"].make(0)
    rates = np.geomspace(1e-4, 1, 60).tolist()

    def best_rate(kind: str, depth: int) -> float:
        return min(
            rates,
            key=lambda rate: min(
                instance.regret({"rate": rate, "share": share / 20, "depth": depth, "kind": kind})
                for share in range(21)
            ),
        )

    drifts = {kind: math.log10(best_rate(kind, 9) / best_rate(kind, 4)) for kind in "abc"}
    assert max(drifts.values()) - min(drifts.values()) > 0.2


def test_noise_is_that_of_the_trial_s_number():
    instance = PROBLEMS["hartmann-6-noisy"].make(2)
    one, other = space_filling(instance.axes, 2, 2)
    told = [instance.measure(config, 5) - instance.regret(config) for config in (one, other)]
    assert told[0] == pytest.approx(told[1])
    assert instance.measure(one, 5) != instance.measure(one, 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_first_points_are_allowed_and_of_the_seed(seed):
    configs = space_filling(MIXED, seed, 9)
    assert configs == space_filling(MIXED, seed, 20)[:9]
    assert configs != space_filling(MIXED, seed + 1, 9)
    for config in configs:
        assert 1e-4 <= config["rate"] <= 1
        assert config["depth"] in range(1, 13)
        assert config["kind"] in ("a", "b")
        assert math.fsum(config["data"].values()) == pytest.approx(1)


def test_every_problem_recommends_after_its_first_points():
    for problem in PROBLEMS.values():
        assert problem.design < problem.checkpoints[0] < problem.checkpoints[1] < problem.checkpoints[2]
        assert problem.checkpoints[2] == problem.budget


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_survive_their_coordinates(shares):
    config = {"rate": 0.1, "depth": 3, "kind": "b", "data": dict(zip("xyz", shares, strict=True))}
    places = flatten(MIXED, config)
    assert list(places) == [axis.name for axis in flat(MIXED)]
    assert all(LEAST <= value <= 1 for name, value in places.items() if name.startswith("data."))
    back = unflatten(MIXED, places)
    assert back["data"] == pytest.approx(config["data"])
    assert {**back, "data": None} == {**config, "data": None}


def test_a_task_survives_the_line():
    task = Task(MIXED, 3, 40, 6, True)
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


# ------------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def small():
    return replace(PROBLEMS["branin"], budget=12, design=2)


def scripted(tmp_path, body: str) -> list[str]:
    """The command of a method whose file says `body`; `Best` and `Task` are there."""
    file = tmp_path / "method.py"
    file.write_text(
        "import time\nfrom experiments.compare.protocol import Best, Task, serve\n"
        f"class Mine(Best):\n    def __init__(self, task):\n        super().__init__()\n{body}\nserve(Mine)\n"
    )
    return [str(file)]


class Scripted(Entry):
    @property
    def command(self) -> list[str]:
        return [self.file]


def method(tmp_path, suggest: str) -> Entry:
    body = f"    def suggest(self):\n        {suggest}\n    def recommend(self):\n        return self.config\n"
    return Scripted("random", scripted(tmp_path, body)[0], None, 0.01)


def test_a_run_is_told_the_same_first_points_and_recommends_three_times(small):
    line = run.search(METHODS["random"], small, 4, Path(sys.executable))
    instance = small.make(4)
    expected = [instance.regret(config) for config in space_filling(instance.axes, 4, 12)]
    assert line["seen"] == pytest.approx(expected, rel=1e-4)
    assert line["regret"] == pytest.approx([min(expected[:n]) for n in (3, 6, 12)], rel=1e-4)
    assert (line["status"], len(line["cpu"]), len(line["wall"])) == ("done", 10, 10)


def test_what_a_library_prints_does_not_disturb(tmp_path, small):
    line = run.search(method(tmp_path, "print('hello'); return {'x0': 0.5, 'x1': 0.5}"), small, 0, Path(sys.executable))
    assert line["status"] == "done"
    assert len(set(line["seen"][2:])) == 1


@pytest.mark.parametrize(
    ("suggest", "error"),
    [("raise ValueError('no idea')", "ValueError: no idea"), ("raise SystemExit(3)", "ended with 3")],
)
def test_an_error_of_a_method_is_kept(tmp_path, small, suggest, error):
    line = run.search(method(tmp_path, suggest), small, 0, Path(sys.executable))
    assert (line["status"], line["regret"]) == ("error", [])
    assert error in line["error"]


@pytest.mark.parametrize("body", ["time.sleep(60)", "while True: pass"])
def test_a_method_that_takes_too_long_is_stopped(tmp_path, small, body):
    line = run.search(method(tmp_path, body), small, 0, Path(sys.executable), limit=1.0)
    assert (line["status"], line["limit"], line["regret"]) == ("timeout", 1.0, [])


def test_runs_are_kept_and_made_once(tmp_path, capsys, monkeypatch):
    arguments = [
        "run",
        "--methods",
        "random",
        "--problems",
        "branin,step-law",
        "--seeds",
        "2",
        "--results",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    run.main()
    first = (tmp_path / "random.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["seed"] for line in first.splitlines()] == [0, 1]
    assert "left out: step-law" in capsys.readouterr().out
    (tmp_path / "random.jsonl").write_text(first[:-20], encoding="utf-8")  # as a kill leaves it
    run.main()
    assert "1 runs are missing" in capsys.readouterr().out
    again = run.load(tmp_path)
    assert [key[-1] for key in again] == [0, 1]
    run.main()
    assert "0 runs are missing" in capsys.readouterr().out


def test_a_rival_without_its_environment_is_reported(tmp_path, capsys, monkeypatch):
    arguments = ["--methods", "ax", "--environments", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    run.main()
    assert "ax is absent" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report", *arguments[2:]])
    report.main()
    assert "ax is absent" in capsys.readouterr().out


def test_an_error_gives_way_to_a_later_result(tmp_path):
    line = {"method": "tpe", "version": "1", "problem": "branin", "problem_version": 1, "seed": 0}
    for status in ("error", "done", "timeout"):
        run.append(tmp_path, {**line, "status": status})
    assert [kept["status"] for kept in run.load(tmp_path).values()] == ["done"]


def test_cheap_runs_come_first_and_dear_ones_are_not_left_to_the_end():
    runs = run.missing([METHODS["tpe"], METHODS["ax"]], [PROBLEMS["branin"], PROBLEMS["levy-20"]], 20, {})
    names = [(each.entry.name, each.problem.name, each.seed) for each in runs]
    assert names[0] == ("tpe", "branin", 0)
    assert names.index(("ax", "branin", 0)) < names.index(("tpe", "branin", 19))
    assert len(names) == 80


def test_every_rival_pins_its_environment():
    for entry in METHODS.values():
        if entry.environment:
            lines = methods.requirements(entry.environment).read_text(encoding="utf-8").split()
            assert all("==" in line for line in lines)
            assert entry.version == methods.pinned(entry.environment)


def test_comments_make_no_new_version_of_the_engine():
    plain = "def f(x):\n    return x + 1\n"
    told = 'def f(x):\n    """One more."""\n    # why\n    return x + 1\n'
    assert methods.meaning(plain) == methods.meaning(told)
    assert methods.meaning(plain) != methods.meaning(plain.replace("1", "2"))


# ----------------------------------------------------------------------------------------------------------- reporting


def lines(method, values, problem="branin", noise=0.0):
    """A run a value, which it recommends at every checkpoint."""
    return [
        {
            "method": method,
            "version": "1",
            "problem": problem,
            "problem_version": PROBLEMS[problem].version,
            "seed": seed,
            "status": "done",
            "regret": [value] * 3,
            "cpu": [0.5],
            "noise": noise,
        }
        for seed, value in enumerate(values)
    ]


def cells(*groups):
    runs = [line for group in groups for line in group]
    known = {tuple(line[k] for k in ("method", "version", "problem", "problem_version", "seed")): line for line in runs}
    return report.gather(known, report.latest(known, {}))


def test_regret_is_floored_at_random_search_or_the_noise():
    quiet = cells(lines("random", [1.0, 2.0, 3.0]), lines("gp", [1e-9] * 3))
    assert report.floored("branin", "gp", 2, quiet).tolist() == [0.002] * 3
    loud = cells(lines("random", [1.0, 2.0, 3.0], noise=0.1), lines("gp", [1e-9] * 3, noise=0.1))
    assert report.floored("branin", "gp", 2, loud).tolist() == [0.1] * 3


def test_a_run_that_did_not_finish_counts_as_the_worst():
    group = lines("gp", [1.0, 1.0, 1.0])
    group[0] |= {"regret": [1.0], "status": "timeout"}
    cell = cells(group)["gp", "branin"]
    assert cell.at(0).tolist() == [1.0, 1.0, 1.0]
    assert cell.at(2).tolist() == [math.inf, 1.0, 1.0]
    assert cell.unfinished == 1


def test_equal_medians_share_a_rank():
    known = cells(lines("tpe", [2.0]), lines("gp", [1.0]), lines("ax", [2.0]))
    assert report.ranks(["tpe", "gp", "ax"], ["branin"], 2, known).tolist() == [[2.5, 1.0, 2.5]]


def test_the_ratio_is_to_the_best_rival_on_shared_seeds():
    rng = np.random.default_rng(0)
    ours = lines("windtunnel", [3.0, 3.0, 3.0, 900.0])
    known = cells(ours, lines("tpe", [2.0] * 3), lines("gp", [1.0] * 3), lines("random", [0.1] * 4))
    rival, values = report.ratio("windtunnel", "branin", 2, known, rng)
    assert rival == "gp"
    assert set(values) == {3.0}
    assert report.ratio("windtunnel", "branin", 2, cells(ours, lines("gp", [1.0] * 2)), rng) is None


def test_the_ratio_of_two_that_did_not_finish_is_one():
    known = cells(lines("windtunnel", [math.inf] * 3), lines("gp", [math.inf] * 3), lines("tpe", [2.0, 2.0, math.inf]))
    assert report.over([math.inf, math.inf, 3.0], [math.inf, 2.0, 2.0]).tolist() == [1.0, math.inf, 1.5]
    rival, values = report.ratio("windtunnel", "branin", 2, known, np.random.default_rng(0))
    assert rival == "tpe"
    assert values[0] == math.inf
    assert not np.isnan(values).any()


@pytest.mark.parametrize("module", ["replay.searches", "compare_surrogates"])
def test_the_folder_of_tables_is_only_read(module, tmp_path, monkeypatch):
    tables, cache = tmp_path / "tables", tmp_path / "cache"
    tables.mkdir()
    source = "import os\n_CACHE_FILE = os.path.join(os.path.dirname(__file__), 'emulator_cache.json')\n"
    (tables / "blackbox.py").write_text(source + "def fit():\n    open(_CACHE_FILE, 'w').close()\n")
    monkeypatch.setenv("WINDTUNNEL_CACHE", str(cache))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    importlib.import_module(f"experiments.{module}").blackbox(tables).fit()
    assert [path.name for path in tables.iterdir()] == ["blackbox.py"]
    assert (cache / "emulators.json").exists()


def test_runs_are_counted_to_the_goal_and_one_more_than_the_budget_without_it():
    group = lines("gp", [1.0, 1.0], problem="step-law")
    group[0]["seen"], group[1]["seen"] = [0.9, 0.3, 0.2, 0.1], [0.9] * 20
    assert report.runs_to("step-law", "gp", 0.25, cells(group)) == {0: 3, 1: 21}


def test_bootstrap_intervals_hold_the_median_and_narrow_with_seeds():
    rng = np.random.default_rng(0)
    few, many = (report.medians(rng.exponential(size=n), rng) for n in (6, 200))
    for middle, low, high in (few, many):
        assert low <= middle <= high
    assert many[2] - many[1] < few[2] - few[1]


def test_the_report_shows_losses_and_what_is_missing(capsys, tmp_path, monkeypatch):
    for line in lines("windtunnel", [9.0] * 4) + lines("gp", [1.0] * 4) + lines("random", [20.0] * 4):
        run.append(tmp_path, line)
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--seeds", "5"])
    report.main()
    shown = capsys.readouterr().out
    assert "| branin | 100% | gp | 9.00 (9.00 to 9.00) **lost** |" in shown
    assert "gp 1.00 (1.00 to 1.00), windtunnel 2.00" in shown
    assert "gp: seeds missing of 5: branin 1, levy-4 5" in shown
    assert SHARES == (0.25, 0.5, 1.0)
