"""Branches: results that a run hands in for smaller scales are kept, survive whatever happens, and are learned from."""

import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bo import Diverged, Maximize, Minimize, StopTrial, Study, dataset, journal, run
from bo.ports import Branched, History, Proposal, Returned, Stopped
from bo.run import request_stop
from bo.trial import Branch, Trial, results, unfinished
from bo.worker import execute
from integrations.in_process import InProcess
from search_spaces import WSD, Fidelity, Real, Schedule, Space

SPACE = Space(
    lr=Real(1e-4, 1e-1, log=True),
    schedule=Schedule("cosine", warmup=0.0, floor=0.0, wsd={"decay": Real(0.1, 0.5)}),
    fidelity=Fidelity(
        params={"tiny": 1e5, "small": 1e6}, tokens=(1e6, 2e6, 4e6), target={"params": "small", "tokens": 4e6}
    ),
)
CONFIG = {"lr": 1e-3, "schedule": {"family": "wsd", "decay": 0.25}}


def at(**axes):
    return SPACE.fidelity.scale({"params": 1e6, "tokens": 4e6} | axes)


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "study", SPACE, objective=Minimize("loss"), clock=lambda: 0.0) as made:
        yield made


def ask(study, **scale):
    study.enqueue(CONFIG, at(**scale))
    return study.ask(1)[0]


def fly(train, tmp_path, send=lambda message: False, **fields):
    trial = Trial(0, SPACE.validate(CONFIG), at(), 7, "x", **fields)
    return execute(train, trial, tmp_path / "trial", send, log=False)


# ---------------------------------------------------------------------------------------------------- the worker's side


def test_a_branch_has_the_runs_own_scale_but_for_what_is_smaller(tmp_path):
    said = []

    def train(trial):
        trial.branch({"loss": 2.0}, tokens=1e6)
        trial.branch({"loss": 2.5}, tokens=1e6, params=1e5)
        return {"loss": 1.0}

    assert isinstance(fly(train, tmp_path, lambda message: bool(said.append(message)), attempt=3), Returned)
    assert said == [
        Branched(0, 3, at(tokens=1e6), {"loss": 2.0}),
        Branched(0, 3, at(tokens=1e6, params=1e5), {"loss": 2.5}),
    ]


@pytest.mark.parametrize(
    ("axes", "metrics", "message"),
    [
        ({"tokens": 8e6}, {"loss": 1.0}, "needs tokens to be smaller than the run's own 4e\\+06, got 8000000.0"),
        ({"tokens": 4e6}, {"loss": 1.0}, "needs tokens to be smaller than the run's own"),
        ({"tokens": 0}, {"loss": 1.0}, "got 0"),
        ({"tokens": math.nan}, {"loss": 1.0}, "got nan"),
        ({"tokens": "short"}, {"loss": 1.0}, "got 'short'"),
        ({"token": 1e6}, {"loss": 1.0}, r"'token', which is no scale axis; the axes are \['params', 'tokens'\]"),
        ({}, {"loss": 1.0}, "needs a smaller value of a scale axis"),
        ({"tokens": 1e6}, {"loss": "low"}, "one number for metric 'loss', got 'low'"),
        ({"tokens": 1e6}, 1.0, "a dictionary of named numbers, got float"),
    ],
)
def test_what_is_no_branch_is_refused_in_the_training_function(tmp_path, axes, metrics, message):
    def train(trial):
        with pytest.raises(ValueError, match=f"trial.branch .*{message}"):
            trial.branch(metrics, **axes)
        return {"loss": 1.0}

    answer = fly(train, tmp_path, lambda message: pytest.fail("it was sent"))
    assert isinstance(answer, Returned), answer


def test_wanted_branches_are_those_not_handed_in_yet(tmp_path):
    seen = []

    def train(trial):
        seen.append(trial.wanted)
        trial.branch({"loss": 2.0}, tokens=2e6)
        seen.append(trial.wanted)
        return {"loss": 1.0}

    wanted = tuple(at(tokens=tokens) for tokens in (1e6, 2e6))
    fly(train, tmp_path, wanted=wanted)
    fly(train, tmp_path, wanted=wanted, branches=(Branch(wanted[0], {"loss": 3.0}),))
    assert seen == [wanted, wanted[:1], wanted[1:], ()]


def test_a_run_that_is_to_end_ends_at_a_branch(tmp_path):
    def train(trial):
        trial.branch({"loss": 2.0}, tokens=1e6)
        pytest.fail("it went on")

    assert isinstance(fly(train, tmp_path, lambda message: True), Stopped)


# ------------------------------------------------------------------------------------------------------------ the study


def test_a_branch_is_kept_once_and_a_later_one_for_its_scale_counts(study):
    trial = ask(study)
    study.branch(trial.id, {"tokens": 1e6}, {"loss": 3.0})
    study.branch(trial.id, {"params": "tiny", "tokens": 1e6}, {"loss": 4.0})
    before = (study.folder / "journal.jsonl").read_bytes()
    study.branch(trial.id, {"tokens": 1e6}, {"loss": 3.0})
    assert (study.folder / "journal.jsonl").read_bytes() == before

    study.retry(trial.id, "node lost")
    study.branch(trial.id, {"tokens": 1e6}, {"loss": 2.9})
    study.tell(trial.id, {"loss": 2.0})

    tiny, own = at(params=1e5, tokens=1e6), at(tokens=1e6)
    assert study.trial(0).branches == (Branch(tiny, {"loss": 4.0}), Branch(own, {"loss": 2.9}))
    assert study.trial(0).branches[0].scale.label("params") == "tiny"
    again = Study.open(study.folder)
    assert again.trials == study.trials
    assert again.best().metrics == {"loss": 2.0}


@pytest.mark.parametrize(
    ("scale", "metrics", "message"),
    [
        ({"tokens": 4e6}, {"loss": 1.0}, "Trial 0 needs a smaller value of a scale axis"),
        ({"tokens": 3e6}, {"loss": 1.0}, "scale needs tokens to be one of .*, got 3000000.0"),
        ({"tokens": 8e6}, {"loss": 1.0}, "scale needs tokens to be one of .*, got 8000000.0"),
        ({"token": 1e6}, {"loss": 1.0}, "token"),
        ({"tokens": 1e6}, {"los": 1.0}, r"Trial 0 has a branch without \['loss'\], which the objective needs"),
        ({"tokens": 1e6}, {"loss": "low"}, "one number for metric 'loss', got 'low'"),
    ],
)
def test_what_is_no_branch_is_refused_by_the_study(study, scale, metrics, message):
    ask(study, tokens=4e6)
    with pytest.raises(ValueError, match=message):
        study.branch(0, scale, metrics)
    assert study.trial(0).branches == ()


def test_only_a_running_trial_with_scales_branches(study, tmp_path):
    with pytest.raises(ValueError, match="has no trial 0"):
        study.branch(0, {"tokens": 1e6}, {"loss": 1.0})
    small = ask(study, params=1e5, tokens=1e6)
    with pytest.raises(ValueError, match="needs params to be smaller than the run's own 100000, got 1000000"):
        study.branch(small.id, {"params": "small"}, {"loss": 1.0})
    study.tell(small.id, {"loss": 1.0})
    with pytest.raises(ValueError, match="Trial 0 is finished already and branches no more"):
        study.branch(small.id, {"tokens": 1e6}, {"loss": 1.0})
    flat = Study.create(tmp_path / "flat", Space(lr=Real(0, 1)), objective=Minimize("loss"), policy="sobol")
    flat.ask(1)
    with pytest.raises(ValueError, match="Trial 0 has no scale axes to branch at"):
        flat.branch(0, {"tokens": 1e6}, {"loss": 1.0})


def test_a_wanted_branch_is_journaled_and_paid_for_by_its_decay(study):
    shorter = (at(tokens=1e6), at(tokens=2e6))
    proposal = Proposal(SPACE.validate(CONFIG), at(), "ladder/proxy", wanted=shorter)
    assert proposal.cost(SPACE) == pytest.approx(1 + 0.25 * (0.25 + 0.5))
    cosine = replace(proposal, config=SPACE.validate({"lr": 1e-3, "schedule": {"family": "cosine"}}))
    assert cosine.cost(SPACE) == pytest.approx(1 + 0.25 + 0.5)

    study.limit(budget=2.3)
    assert study.history().affordable([proposal, proposal]) == 1
    assert study.history().affordable([proposal, at(), at()]) == 2
    (trial,) = study._propose([proposal])
    assert (trial.wanted, trial.awaited) == (shorter, shorter)
    assert study.spent == trial.cost == proposal.cost(SPACE)

    study.branch(trial.id, {"tokens": 2e6}, {"loss": 2.0})
    assert study.trial(0).awaited == shorter[:1]
    assert Study.open(study.folder).trials == study.trials


def test_a_trial_that_wants_no_branches_is_written_as_before_there_were_any(study):
    ask(study)
    assert b"wanted" not in (study.folder / "journal.jsonl").read_bytes()


def test_a_cost_is_not_learned_from_the_time_of_a_trunk(study):
    for branched in (True, False):
        trial = ask(study)
        if branched:
            study.branch(trial.id, {"tokens": 1e6}, {"loss": 3.0})
        study.tell(trial.id, {"loss": 2.0}, seconds=90.0 if branched else 40.0)
    assert study.measured_cost().at(at()) == pytest.approx(40.0)


def test_a_fork_and_a_prior_take_branches_along_once(study, tmp_path):
    trial = ask(study)
    study.branch(trial.id, {"tokens": 1e6}, {"loss": 3.0})
    study.branch(trial.id, {"tokens": 2e6}, {"loss": 3.0})
    study.tell(trial.id, {"loss": 2.0})
    with study.fork(tmp_path / "fork") as fork:
        assert [(t.scale, t.metrics["loss"]) for t in fork.trials] == [
            (at(), 2.0),
            (at(tokens=1e6), 3.0),
            (at(tokens=2e6), 3.0),
        ]
    with Study.create(tmp_path / "next", SPACE, objective=Minimize("loss")) as other:
        assert len(other.add_prior(study).added) == 3
        assert other.add_prior(study).added == ()
        assert other.add_prior(fork).added == ()


# ------------------------------------------------------------------------------------------------- what a model sees


def told(**fields):
    defaults = {"id": 0, "config": SPACE.validate(CONFIG), "scale": at(), "seed": 0, "source": "x"}
    return Trial(**defaults | fields)


@pytest.mark.parametrize("status", ["running", "finished", "stopped", "failed", "diverged"])
def test_every_branch_is_a_told_run_whatever_became_of_its_trial(status):
    trunk = told(
        status=status,
        metrics={"loss": 2.0} if status == "finished" else None,
        branches=(Branch(at(tokens=1e6), {"loss": 3.0}), Branch(at(tokens=2e6), {"loss": math.nan})),
    )
    others = tuple(told(id=1 + i, scale=at(tokens=1e6), status="finished", metrics={"loss": 3.5}) for i in range(2))
    data = dataset.from_history(History(SPACE, Minimize("loss"), (trunk, *others)))

    own = trunk.told
    assert len(data.Y) == own + 2 + 2
    assert data.at(at(tokens=1e6)).sum() == 3
    assert data.diverged[data.at(at(tokens=2e6))].tolist() == [True]
    assert torch.equal(data.X, data.X[:1].expand_as(data.X))
    best = data.Y[data.at(at(tokens=1e6))].argmax()
    assert best == 0, "the branch of 3.0, the first of its cell"
    assert data.at(at()).sum() == own
    assert len(data.X_pending) == (not own)


def test_without_branches_what_is_learned_from_is_what_is_told():
    trials = [told(id=i, status=status) for i, status in enumerate(("finished", "running", "diverged", "failed"))]
    assert results(trials) == [trials[0], trials[2]]
    assert unfinished(trials) == [trials[1], trials[3]]


def test_a_branch_that_is_still_awaited_is_a_run_underway():
    scales = (at(tokens=1e6), at(tokens=2e6))
    trunk = told(wanted=scales, branches=(Branch(scales[0], {"loss": 3.0}),))
    assert [(trial.scale, trial.status) for trial in unfinished([trunk])] == [(at(), "running"), (scales[1], "running")]
    assert unfinished([replace(trunk, status="finished")]) == []
    assert [trial.scale for trial in unfinished([replace(trunk, status="stopped")])] == [at()]


def test_the_model_learns_from_branches_as_from_runs_of_their_own():
    """The posterior is the same, whether results at smaller scales came as branches or as runs."""
    configs = [{"lr": 10 ** -(1.2 + 0.25 * i), "schedule": WSD(decay=0.2)} for i in range(10)]

    def loss(config, scale):
        return 2 + 0.1 * (math.log10(config["lr"]) + 2.5) ** 2 + 1e5 / scale["tokens"]

    single, branched = [], []
    for config in configs:
        metrics = {tokens: {"loss": loss(config, at(tokens=tokens))} for tokens in (4e6, 1e6, 2e6)}
        scales = {tokens: at(tokens=tokens) for tokens in metrics}
        for tokens in metrics:
            single.append(
                told(id=len(single), config=config, scale=scales[tokens], status="finished", metrics=metrics[tokens])
            )
        branches = tuple(Branch(scales[tokens], metrics[tokens]) for tokens in (1e6, 2e6))
        branched.append(
            told(id=len(branched), config=config, status="finished", metrics=metrics[4e6], branches=branches)
        )
    one, other = (
        dataset.from_history(History(SPACE, Maximize("loss"), tuple(trials))) for trials in (single, branched)
    )
    for name in ("X", "S", "cell", "Y", "diverged"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.scales == other.scales


# ------------------------------------------------------------------------------------------------------------- the loop


def trunk_training(trial):
    """Hands in every smaller number of tokens on the way, and keeps its place."""
    state = trial.load() or {"done": 0}
    shorter = [tokens for tokens in (1e6, 2e6) if tokens < trial.scale["tokens"]]
    for i, tokens in enumerate(shorter):
        if i >= state["done"]:
            trial.branch({"loss": 2 + abs(math.log10(trial.config["lr"]) + 2) + 1e6 / tokens}, tokens=tokens)
            trial.report(i, {"loss": 3.0})
            trial.save({"done": i + 1})
    return {"loss": 2 + abs(math.log10(trial.config["lr"]) + 2)}


def test_branches_are_told_while_a_run_goes_on_and_watched(study):
    moments = []
    study.enqueue(CONFIG)
    run(study, trunk_training, n_trials=1, watch=lambda moment, trial: moments.append((moment, len(trial.branches))))
    assert moments == [
        ("started", 0),
        ("branched", 1),
        ("reported", 1),
        ("branched", 2),
        ("reported", 2),
        ("told", 2),
    ]
    assert [branch.metrics["loss"] for branch in study.trial(0).branches] == [4.0, 3.5]


def test_a_branch_at_no_scale_of_the_space_fails_its_trial_and_no_other(study):
    def train(trial):
        if trial.id == 0:
            trial.branch({"loss": 1.0}, tokens=3e6)
            pytest.fail("it went on")
        return {"loss": 1.0}

    study.enqueue(CONFIG)
    study.enqueue(CONFIG)
    run(study, train, n_trials=2)
    assert [trial.status for trial in study.trials] == ["failed", "finished"]
    assert "tokens to be one of" in study.trial(0).error
    assert "got 3000000.0" in study.trial(0).error


def test_a_branch_without_the_objectives_metric_fails_its_trial(study):
    def train(trial):
        trial.branch({"los": 1.0}, tokens=1e6)
        return {"loss": 1.0}

    study.enqueue(CONFIG)
    run(study, train, n_trials=1)
    assert study.trial(0).status == "failed"
    assert "branch without ['loss']" in study.trial(0).error


def test_a_sweep_can_be_stopped_at_a_branch_and_goes_on_from_it(study):
    def train(trial):
        if trial.attempt == 1 and not trial.load():
            trial.save({"done": 0})
            request_stop(study.folder)
        return trunk_training(trial)

    study.enqueue(CONFIG)
    assert run(study, train, n_trials=1) == "stopped"
    assert (study.trial(0).status, len(study.trial(0).branches)) == ("running", 1)
    run(study, train, n_trials=1)
    assert (study.trial(0).status, len(study.trial(0).branches)) == ("finished", 2)


def test_a_diverged_or_stopped_run_keeps_its_branches(study):
    def train(trial):
        trial.branch({"loss": 3.0}, tokens=1e6)
        raise Diverged("the decay blew up") if trial.id == 0 else StopTrial

    study.enqueue(CONFIG)
    study.enqueue(CONFIG)
    run(study, train, n_trials=2)
    assert [(trial.status, len(trial.branches)) for trial in study.trials] == [("diverged", 1), ("stopped", 1)]
    assert [trial.scale["tokens"] for trial in results(study.trials)] == [4e6, 1e6, 1e6]


# -------------------------------------------------------------------------------------------------- killed and resumed

N_TRIALS, LINES, NEVER = 3, 20, -1
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bo.policies.sobol", "integrations.in_process"])


def drive(folder: Path, kill_at: int) -> None:
    """Make the study or go on with it; die once line `kill_at` is on the disk."""
    path, fsync = folder / journal.NAME, os.fsync

    def deadly(descriptor: int) -> None:
        fsync(descriptor)
        if path.exists() and path.read_bytes().count(b"\n") == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = deadly
    clock = lambda: 0.0  # noqa: E731
    objective = Minimize("loss")
    with Study.open_or_create(folder, SPACE, objective=objective, policy="sobol", seed=3, clock=clock) as study:
        run(study, trunk_training, executor=InProcess(clock=clock), n_trials=N_TRIALS)


def killed(folder: Path, kill_at: int) -> int:
    process = PROCESSES.Process(target=drive, args=(folder, kill_at))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert killed(folder, NEVER) == 0
    written = (folder / journal.NAME).read_bytes()
    assert (written.count(b"\n"), written.count(b'"kind":"branched"')) == (LINES, 2 * N_TRIALS)
    return written


@pytest.mark.parametrize("kill_at", [3, 4, 6, 9, 11, 15, LINES])
def test_a_study_killed_between_branches_goes_on_as_if_it_had_not_been(tmp_path, undisturbed, kill_at):
    assert killed(tmp_path, kill_at) == -signal.SIGKILL
    assert killed(tmp_path, NEVER) == 0
    assert (tmp_path / journal.NAME).read_bytes() == undisturbed
