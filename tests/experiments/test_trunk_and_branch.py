"""The experiment on trunks: it makes each run once, spends alike on both arms, and its tables say what was measured."""

import math
from pathlib import Path

import numpy as np
import pytest

from bo import Minimize
from bo.policies import trunks
from bo.policies.design import sobol
from bo.trial import Diverged
from bo.worker import RunningTrial
from experiments import trunk_and_branch as experiment
from integrations.training_file import Loaded
from search_spaces import Mixture, Real, Space

SIZES = ("0.03M", "0.1M")


def train(trial: RunningTrial) -> dict[str, float]:
    """A bowl in the learning rate that diverges at the highest; a branch is off by 0.1."""
    if trial.config["lr"] > 0.09:
        raise Diverged("too fast")
    loss = (math.log10(trial.config["lr"]) + 2.5) ** 2 + 0.01 * trial.seed
    for scale in trial.wanted:
        trial.branch({"loss": loss + 1e5 / scale["tokens"] + 0.1}, tokens=scale["tokens"])
    return {"loss": loss + 1e5 / trial.scale["tokens"]}


@pytest.fixture
def job() -> Loaded:
    real = experiment.JOB.load()
    assert real.space.fidelity is not None
    space = Space(lr=Real(1e-4, 1e-1, log=True), data=Mixture("a", "b"), fidelity=real.space.fidelity)
    return Loaded(space, Minimize("loss"), train)


def test_every_run_is_made_once_and_comes_back_as_it_was(job: Loaded, tmp_path: Path) -> None:
    space = experiment.job_space(job, SIZES, 0.05)
    long, short = (space.fidelity.scale({"params": "0.03M", "tokens": tokens}) for tokens in (200e3, 50e3))
    (config,) = sobol(space, 0, 1, 1)
    made = experiment.Runs.open(job, tmp_path).fly("one", space, config, long, 3, [short])
    lines = (tmp_path / "runs.jsonl").read_text()
    again = experiment.Runs.open(job, tmp_path).fly("one", space, config, long, 3, [short])
    assert again == made
    assert (tmp_path / "runs.jsonl").read_text() == lines
    assert (made.scale, made.branches[0].scale, made.config) == (long, short, config)
    assert made.cost == pytest.approx(space.cost(long) + config["schedule"].decay * space.cost(short))


def test_a_diverged_run_is_kept_as_one(job: Loaded, tmp_path: Path) -> None:
    space = experiment.job_space(job, SIZES, 0.05)
    config = sobol(space, 0, 1, 1)[0] | {"lr": 0.095}
    made = experiment.Runs.open(job, tmp_path).fly("hot", space, config, space.top, 0)
    assert (made.status, made.metrics) == ("diverged", None)


def test_both_arms_spend_what_they_are_given_and_trunks_give_more_results(job: Loaded, tmp_path: Path) -> None:
    space, runs = experiment.job_space(job, SIZES, 0.05), experiment.Runs.open(job, tmp_path)
    made = {arm: experiment.proxies(runs, space, arm, 0, 2.0) for arm in experiment.ARMS}
    spent = {arm: sum(trial.cost for trial in trials) for arm, trials in made.items()}
    assert 1.7 < min(spent.values()) < max(spent.values()) < 2.1
    results = {arm: sum(len(trunks.covered(trial)) for trial in trials) for arm, trials in made.items()}
    assert results["trunks"] > 1.3 * results["single"]
    assert len(made["trunks"]) < len(made["single"])


def test_the_table_of_results_shows_the_bias_of_branches_and_the_luck_they_share(job: Loaded, tmp_path: Path) -> None:
    found = experiment.compare_results(experiment.Runs.open(job, tmp_path), SIZES)
    assert len(found) == len(experiment.WARMUPS) * experiment.CONFIGS * experiment.LUCKS * 2
    assert all(row["branch"] - row["alone"] == pytest.approx(0.1) for row in found)
    lines = experiment.table_of_results(found).splitlines()[1:]
    assert len(lines) == 4
    assert all("+0.1000 (+0.1000 to +0.1000)" in line and line.endswith("1.00") for line in lines)
    seeds = np.std(0.01 * np.arange(experiment.LUCKS), ddof=1)
    assert all(f"{seeds:.4f}" in line for line in lines)
