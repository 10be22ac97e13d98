"""The campaign on a small job of real studies: what is kept of a search, and what the report makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bo import Study
from experiments import campaign_report, compare_policies

FILE = """
import math
from bo import Minimize
from bo.trial import Diverged
from search_spaces import Fidelity, Real, Space

space = Space(
    lr=Real(1e-4, 1e-1, log=True),
    fidelity=Fidelity(params=(1e4, 1e5, 1e6), tokens=(1e5, 1e6), target={"params": 1e6, "tokens": 1e6}),
)
objective = Minimize("loss")


def train(trial):
    sum(range(200_000))  # some milliseconds of work
    if trial.config["lr"] > 0.08:
        raise Diverged("too fast")
    best = -1.6 - 0.5 * math.log10(trial.scale["params"] / 1e4)
    loss = 2 + (math.log10(trial.config["lr"]) - best) ** 2 + 1e4 / trial.scale["tokens"]
    return {"loss": loss}
"""
BUDGET = 5.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the studies, and the numbers of a campaign of one seed."""
    folder = tmp_path_factory.mktemp("campaign")
    job = folder / "job.py"
    job.write_text(FILE)
    results = [compare_policies.search(arm, 0, folder / "studies", BUDGET, job) for arm in compare_policies.ARMS]
    return folder, {"corpus": "none", "budget": BUDGET, "versions": {}, "results": results}


def test_a_search_keeps_a_row_for_each_trial_and_the_curve_follows_from_them(made: tuple[Path, dict[str, Any]]) -> None:
    folder, note = made
    for result in note["results"]:
        study = Study.open(folder / "studies" / f"{result['arm']}-0")
        curve = campaign_report.progress(result["trials"])
        assert [row["config"]["lr"] for row in result["trials"]] == [trial.config["lr"] for trial in study.trials]
        assert curve[-1][0] == pytest.approx(study.spent)
        assert study.spent <= BUDGET * compare_policies.ARMS[result["arm"]] + 1e-9
        assert (best := study.best()) is not None
        assert best.metrics is not None
        assert curve[-1][2] == best.metrics["loss"]
        assert all((row["loss"] is None) == (row["status"] == "diverged") for row in result["trials"])


def test_a_ladder_keeps_its_drift_and_where_it_has_the_best_rate_of_each_scale(
    made: tuple[Path, dict[str, Any]],
) -> None:
    _, note = made
    ladder = note["results"][0]
    by_axis = {drift["axis"]: drift for drift in ladder["drifts"]}
    assert by_axis["params"]["low"] <= -0.5 <= by_axis["params"]["high"] < 0
    assert by_axis["tokens"]["low"] < 0 < by_axis["tokens"]["high"]
    assert ladder["trust"].startswith("trusted")
    scales = {tuple(row["scale"].values()) for row in ladder["trials"]}
    assert {tuple(each["scale"].values()) for each in ladder["recommended"]} == scales
    target = ladder["recommended"][-1]
    assert target["intervals"]["lr"][0] < 10**-2.6 < target["intervals"]["lr"][1]
    first = next(row for row in ladder["trials"] if campaign_report.at_target(row))
    assert first["predicted"]["low"] < first["loss"] < first["predicted"]["high"]


def test_a_search_that_is_done_comes_back_without_a_run(made: tuple[Path, dict[str, Any]]) -> None:
    folder, note = made
    again = compare_policies.search("sobol", 0, folder / "studies", BUDGET, folder / "job.py")
    assert again == note["results"][-1]


def test_the_file_has_a_line_for_each_trial_and_reports_without_the_studies(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, note = made
    text = compare_policies.to_text(note)
    assert json.loads(text) == note
    assert sum('{"id": ' in line for line in text.splitlines()) == sum(len(each["trials"]) for each in note["results"])
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    compare_policies.main(["--report", "--results", str(kept)])
    shown = capsys.readouterr().out
    assert "equal seconds" in shown
    assert "the first target run: expected" in shown
    assert kept.read_text() == text
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "kept.png"]


def rows(*runs: tuple[float, float, float | None]) -> list[dict[str, Any]]:
    return [
        {"cost": cost, "scale": {"tokens": cost}, "seconds": seconds, "status": "finished" if loss else "diverged",
         "loss": loss}
        for cost, seconds, loss in runs
    ]  # fmt: skip


def test_only_the_target_is_scored_and_proxies_are_paid_for() -> None:
    curve = campaign_report.progress(rows((0.5, 3.0, 1.0), (1.0, 2.0, None), (1.0, 2.0, 4.0), (1.0, 2.0, 5.0)))
    assert curve == [(0.5, 3.0, None), (1.5, 5.0, None), (2.5, 7.0, 4.0), (3.5, 9.0, 4.0)]
    assert campaign_report.best_after(curve, 2.4, 0) == math.inf
    assert campaign_report.best_after(curve, 2.5, 0) == 4.0
    assert campaign_report.best_after(curve, 6.9, 1) == math.inf


def test_the_committed_campaign_can_be_reported_again() -> None:
    assert "5 of 5" in campaign_report.table(campaign_report.load(compare_policies.RESULTS))
