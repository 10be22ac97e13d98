"""The training job: it repeats, resumes exactly, does what its configuration says, and says when it diverged."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bo import checkpoint
from bo.ports import Branched, Message, Raised, Reported, Returned, Stopped, Underway
from bo.trial import Branch, Trial
from bo.worker import execute
from search_spaces import WSD, Cosine, Linear, Scale

ROOT = Path(__file__).parents[2]
NAME = "experiments.language_model"
STEPS = 20

Load = Callable[..., ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports the file as the command line does: its arguments are in sys.argv, as seen from its import."""

    def load(*args: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", ["language_model.py", *args])
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        return importlib.import_module(NAME)

    return load


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(load: Load, own_text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("WINDTUNNEL_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return load("--corpus", str(own_text))


def fly(
    job: ModuleType,
    folder: Path,
    send: Callable[[Underway], bool] = lambda message: False,
    seed: int = 0,
    steps: int = STEPS,
    wanted: Sequence[int] = (),
    branches: tuple[Branch, ...] = (),
    **changes: Any,
) -> Message:
    """Runs the smallest model for a few steps on the baseline with `changes`; wanted: steps of branches."""
    config = job.space.validate(job.baseline) | changes
    shorter = tuple(smallest(job, short) for short in wanted)
    trial = Trial(0, config, smallest(job, steps), seed, "enqueued", wanted=shorter, branches=branches)
    return execute(job.train, trial, folder, send, log=True)


def smallest(job: ModuleType, steps: int) -> Scale:
    """The scale of so many steps of the smallest model."""
    label, shape = next(iter(job.RECIPE.shapes.items()))
    tokens = steps * job.baseline["batch"] * job.RECIPE.context
    return Scale({"params": shape.parameters, "tokens": tokens}, {"params": label})


def losses(message: Message) -> dict[str, float]:
    assert isinstance(message, Returned), message
    return {name: value for name, value in message.metrics.items() if name != "tokens_per_second"}


def test_importing_the_file_loads_no_torch() -> None:
    program = f"import sys; sys.argv = ['x']; import {NAME}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False"]


@pytest.mark.parametrize("scale", ["small", "full"])
def test_parameters_are_counted_as_the_model_has_them_and_fit_their_labels(load: Load, scale: str) -> None:
    from experiments.transformer import Transformer

    for label, shape in load("--scale", scale).RECIPE.shapes.items():
        model = Transformer(shape.width, shape.depth, shape.heads, context=8, seed=0)
        assert shape.parameters == sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
        assert shape.parameters == pytest.approx(float(label[:-1]) * 1e6, rel=0.1)
        assert shape.width // shape.heads % 2 == 0  # rotary positions turn pairs


@pytest.mark.parametrize("scale", ["small", "full"])
def test_the_baseline_is_in_the_space_and_the_target_is_the_largest_rung(load: Load, scale: str) -> None:
    job = load("--scale", scale)
    assert job.space.validate(job.baseline)["schedule"] == Cosine(warmup=job.WARMUP)
    assert len(job.space.fidelity.cells()) == 16
    assert job.space.fidelity.relative_cost(job.space.fidelity.target) == 1
    assert job.space.fidelity.target.label("params") == list(job.RECIPE.shapes)[-1]


def test_a_model_sees_no_later_byte() -> None:
    import torch

    from experiments.transformer import Transformer

    model = Transformer(width=16, depth=2, heads=2, context=12, seed=0)
    text = torch.arange(12).reshape(1, 12)
    changed = text.clone()
    changed[0, 7:] = 99
    with torch.no_grad():
        before, after = model(text), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_same_seed_gives_the_same_run_bit_for_bit(job: ModuleType, tmp_path: Path) -> None:
    runs = [fly(job, tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])


@pytest.mark.parametrize("lost_at", [1, 3])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(job: ModuleType, tmp_path: Path, lost_at: int) -> None:
    import torch

    class WorkerDies(BaseException):
        pass

    steps: dict[str, list[int]] = {"whole": [], "halves": []}

    def die(report: Reported) -> bool:
        steps["halves"].append(report.step)
        if len(steps["halves"]) == lost_at:
            raise WorkerDies
        return False

    def note(run: str) -> Callable[[Reported], bool]:
        return lambda report: bool(steps[run].append(report.step))

    whole = fly(job, tmp_path / "whole", note("whole"))
    with pytest.raises(WorkerDies):
        fly(job, tmp_path / "halves", die)
    resumed = fly(job, tmp_path / "halves", note("halves"))

    assert losses(resumed) == losses(whole)
    assert steps["halves"] == sorted([*steps["whole"], steps["whole"][lost_at - 1]])  # only the lost part is done again
    ends = [checkpoint.load(tmp_path / run) for run in ("whole", "halves")]
    assert all(torch.equal(ends[0]["model"][name], ends[1]["model"][name]) for name in ends[0]["model"])
    moments = [end["optimizer"]["state"] for end in ends]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])


def test_a_run_lost_after_its_last_step_only_validates_again(job: ModuleType, tmp_path: Path) -> None:
    first = fly(job, tmp_path)
    again = fly(job, tmp_path, send=lambda report: pytest.fail("trained again"))
    assert losses(again) == losses(first)
    assert isinstance(again, Returned)
    assert "tokens_per_second" not in again.metrics


def test_a_checkpoint_of_another_corpus_is_refused(job: ModuleType, tmp_path: Path) -> None:
    fly(job, tmp_path)
    state = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, state | {"corpus": "another"})
    answer = fly(job, tmp_path)
    assert isinstance(answer, Raised)
    assert not answer.diverged
    assert "was trained on corpus another" in answer.error


def test_reports_on_the_way_carry_every_validation_loss(job: ModuleType, tmp_path: Path) -> None:
    reports: list[Reported] = []
    result = fly(job, tmp_path, lambda report: bool(reports.append(report)))
    assert [report.step for report in reports] == [
        job.baseline["batch"] * job.RECIPE.context * step for step in (4, 8, 12, 16)
    ]
    assert all(report.metrics.keys() == {*losses(result), "train_loss"} for report in reports)
    assert reports[-1].metrics["train_loss"] < reports[0].metrics["train_loss"] < math.log(256) + 1


def test_a_run_that_is_told_to_stop_stops(job: ModuleType, tmp_path: Path) -> None:
    assert isinstance(fly(job, tmp_path, send=lambda report: True), Stopped)


def test_training_on_a_domain_lowers_its_own_loss(job: ModuleType, tmp_path: Path) -> None:
    mixtures = {
        name: {other: 0.9 if other == name else 0.05 for other in job.ARGS.domains} for name in job.ARGS.domains
    }
    after = {
        name: losses(fly(job, tmp_path / name, lr=1e-2, steps=60, data=mixture)) for name, mixture in mixtures.items()
    }
    for name in job.ARGS.domains:
        assert min(after, key=lambda trained_on: after[trained_on][f"loss/{name}"]) == name


def test_the_learning_rate_follows_the_schedule(
    job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    used: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (used.extend({g["lr"] for g in self.param_groups}), step(self))[1]
    )
    schedule = WSD(decay=0.3, warmup=job.WARMUP)
    fly(job, tmp_path, lr=2e-3, schedule=schedule)
    assert used == [2e-3 * schedule.factor(now, STEPS) for now in range(STEPS)]


def trunk(job: ModuleType, folder: Path, **more: Any) -> tuple[Message, list[Branched]]:
    """A run of STEPS steps that holds its peak up to a fifth before its end, and what it handed in for others."""
    said: list[Underway] = []
    last = fly(job, folder, lambda message: bool(said.append(message)), **{"schedule": STABLE} | more)
    return last, [message for message in said if isinstance(message, Branched)]


STABLE = WSD(decay=0.2, warmup=0.1)  # two of 20 steps


def test_a_branch_is_bit_for_bit_the_shorter_run_that_warms_up_in_as_many_steps(
    job: ModuleType, tmp_path: Path
) -> None:
    _, branches = trunk(job, tmp_path / "trunk", wanted=(15, 10, 5))
    assert [branch.scale for branch in branches] == [smallest(job, steps) for steps in (5, 10, 15)]
    for branch, steps in zip(branches, (5, 10, 15), strict=True):
        schedule = WSD(decay=0.2, warmup=2 / steps)
        assert branch.metrics == losses(fly(job, tmp_path / f"{steps}", steps=steps, schedule=schedule))


def test_branches_leave_their_trunk_as_it_was(job: ModuleType, tmp_path: Path) -> None:
    import torch

    branched, branches = trunk(job, tmp_path / "branched", wanted=(5, 10))
    alone, none = trunk(job, tmp_path / "alone")
    assert (len(branches), len(none)) == (2, 0)
    assert losses(branched) == losses(alone)
    ends = [checkpoint.load(tmp_path / run)["model"] for run in ("branched", "alone")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("said_before", [1, 2, 3, 4])
def test_an_interrupted_trunk_hands_in_each_branch_once_and_the_same(
    job: ModuleType, tmp_path: Path, said_before: int
) -> None:
    class WorkerDies(BaseException):
        pass

    heard: list[Underway] = []

    def die(message: Underway) -> bool:
        heard.append(message)
        if len(heard) == said_before:
            raise WorkerDies
        return False

    _, whole = trunk(job, tmp_path / "whole", wanted=(5, 10))
    with pytest.raises(WorkerDies):
        fly(job, tmp_path / "halves", die, wanted=(5, 10), schedule=STABLE)
    first = [message for message in heard if isinstance(message, Branched)]
    kept = tuple(Branch(message.scale, message.metrics) for message in first)
    _, rest = trunk(job, tmp_path / "halves", wanted=(5, 10), branches=kept)
    assert [*first, *rest] == whole


def test_a_branch_that_no_one_heard_of_is_handed_in_again(job: ModuleType, tmp_path: Path) -> None:
    _, first = trunk(job, tmp_path, wanted=(5, 10))
    _, again = trunk(job, tmp_path, wanted=(5, 10))
    assert len(first) == 2
    assert again == first


def test_a_schedule_without_a_stable_phase_gives_no_branches(job: ModuleType, tmp_path: Path) -> None:
    answer, branches = trunk(job, tmp_path, wanted=(5, 10), schedule=Linear(warmup=job.WARMUP))
    assert isinstance(answer, Returned)
    assert branches == []


def test_schedules_lead_to_different_models(job: ModuleType, tmp_path: Path) -> None:
    linear, wsd = (
        losses(fly(job, tmp_path / schedule.family, schedule=schedule))
        for schedule in (Linear(warmup=job.WARMUP), WSD(decay=0.1, warmup=job.WARMUP))
    )
    assert linear != wsd


def test_domains_are_drawn_in_the_proportions_of_the_mixture(job: ModuleType) -> None:
    sources = [np.full(1000, domain, np.uint8) for domain in range(3)]
    shares = np.array([0.55, 0.05, 0.4])
    drawn = np.stack([job.training_windows(sources, shares, 8, 64, seed=1, step=step)[:, 0] for step in range(400)])
    counts = np.stack([(drawn == domain).sum(axis=1) for domain in range(3)], axis=1)  # steps x domains
    assert (np.abs(counts - 8 * shares) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0) / 8, shares, atol=0.01)


def test_training_windows_are_pieces_of_the_text_and_reach_both_ends(job: ModuleType) -> None:
    sources = [np.arange(80, dtype=np.uint8)]
    windows = np.concatenate(
        [job.training_windows(sources, np.ones(1), 8, 64, seed=0, step=step) for step in range(60)]
    )
    assert (np.diff(windows.astype(int), axis=1) == 1).all()
    assert (windows.min(), windows.max()) == (0, 79)


def test_validation_windows_do_not_overlap_in_what_they_predict(job: ModuleType) -> None:
    windows = job.validation_windows(np.arange(200, dtype=np.uint8), 64)
    assert windows.shape == (3, 65)
    assert len(np.unique(windows[:, 1:])) == 3 * 64
    assert job.validation_windows(np.zeros(100_000, np.uint8), 64).shape == (job.WINDOWS, 65)


def test_a_run_with_an_absurd_learning_rate_is_diverged(job: ModuleType, tmp_path: Path) -> None:
    answer = fly(job, tmp_path, lr=1e4)
    assert isinstance(answer, Raised)
    assert answer.diverged
    assert "The training loss is" in answer.error


@pytest.mark.parametrize("lr", [1e-4, 1e-1])
def test_no_learning_rate_of_the_space_diverges_in_the_smallest_run(job: ModuleType, tmp_path: Path, lr: float) -> None:
    assert isinstance(fly(job, tmp_path, lr=lr, steps=60), Returned)


def test_the_log_says_which_corpus_was_used(job: ModuleType, tmp_path: Path) -> None:
    fly(job, tmp_path)
    assert checkpoint.load(tmp_path)["corpus"] in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_weights_say_what_counts(load: Load, own_text: Path) -> None:
    assert load().objective.weights == {"loss/headers": 0.5, "loss/reference": 0.5}
    chosen = load("--corpus", str(own_text), "--weights", "code=0.7,prose=0.3").objective
    assert chosen.weights == {"loss/code": 0.7, "loss/prose": 0.3}
    alike = load("--corpus", str(own_text)).objective.weights
    assert alike == pytest.approx({"loss/code": 1 / 3, "loss/prose": 1 / 3, "loss/tables": 1 / 3})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--weights", "poetry=1"), r"names the domain 'poetry'; the corpus has \['python', "),
        (("--weights", "python"), "needs DOMAIN=NUMBER,..., got 'python'"),
        (("--weights", "python=-1"), "needs a number above 0 for python, got -1"),
        (("--weights", "python=nan"), "needs a number above 0 for python, got nan"),
        (("--corpus", "no/such/folder"), "no/such/folder is not a folder"),
    ],
)
def test_bad_arguments_are_refused_at_import(load: Load, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(*args)
