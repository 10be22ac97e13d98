"""Schedules, checkpoints and the batch rule in a torch training loop."""

import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from bo import checkpoint
from integrations.domain_sampler import DomainSampler
from integrations.torch_training import ScheduledLR, TrainingState, scale_lr
from search_spaces import Schedule
from search_spaces.curve import REX, WSD, Cosine, Linear, OneCycle

CURVES = [Cosine(warmup=0.1, floor=0.1), Linear(), WSD(decay=0.3, warmup=0.2), REX(floor=0.05), OneCycle()]


def sgd(*peaks):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": peak} for peak in peaks])


def rates(optimizer, scheduler, steps):
    """The rates that steps 0 .. steps - 1 are taken with: one list a step."""
    taken = []
    for _ in range(steps):
        taken.append([float(group["lr"]) for group in optimizer.param_groups])
        assert [float(lr) for lr in scheduler.get_last_lr()] == taken[-1]
        optimizer.step()
        scheduler.step()
    return taken


# ------------------------------------------------------------------------------------------------------- the scheduler


@pytest.mark.parametrize("curve", CURVES)
def test_every_step_gets_its_groups_peak_times_the_factor(curve):
    optimizer = sgd(0.3, 0.02)
    scheduler = ScheduledLR(optimizer, curve, 40)

    assert rates(optimizer, scheduler, 40) == [[0.3 * f, 0.02 * f] for f in curve.factor(range(40), 40).tolist()]
    assert scheduler.get_last_lr() == [0.3 * curve.factor(40, 40), 0.02 * curve.factor(40, 40)]


def test_a_group_may_have_a_schedule_of_its_own():
    optimizer = sgd(0.3, 0.02)
    scheduler = ScheduledLR(optimizer, [Linear(), Cosine()], 10)
    assert rates(optimizer, scheduler, 10)[7] == [0.3 * Linear().factor(7, 10), 0.02 * Cosine().factor(7, 10)]


def test_a_rate_held_in_a_tensor_is_changed_in_place():
    rate = torch.tensor(0.25)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=rate)
    scheduler = ScheduledLR(optimizer, Linear(), 4)
    rates(optimizer, scheduler, 3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.0625


def test_it_is_torchs_cosine_where_both_exist():
    ours, theirs = sgd(0.1), sgd(0.1)
    mine = rates(ours, ScheduledLR(ours, Cosine(floor=0.2), 50), 50)
    its = rates(theirs, CosineAnnealingLR(theirs, T_max=50, eta_min=0.02), 50)
    np.testing.assert_allclose(mine, its, rtol=1e-12)


@pytest.mark.parametrize(("make", "key"), [(torch.optim.SGD, "momentum"), (torch.optim.AdamW, "betas")])
def test_it_is_torchs_one_cycle_with_its_momentum(make, key):
    def run(make_scheduler):
        optimizer = make([nn.Parameter(torch.ones(2))], lr=0.1)
        scheduler, momenta = make_scheduler(optimizer), []
        for _ in range(50):
            momenta.append(optimizer.param_groups[0][key])
            optimizer.step()
            momenta.append(optimizer.param_groups[0]["lr"])
            if len(momenta) < 100:
                scheduler.step()
        return [number for each in momenta for number in np.atleast_1d(each)]

    mine = run(lambda optimizer: ScheduledLR(optimizer, OneCycle(), 50, cycle_momentum=True))
    its = run(lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=50))
    np.testing.assert_allclose(mine, its, rtol=1e-12)


def test_momentum_cycles_under_one_cycle_alone():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.7)
    rates(optimizer, ScheduledLR(optimizer, Cosine(), 10, cycle_momentum=True), 5)
    assert optimizer.param_groups[0]["momentum"] == 0.7
    with pytest.raises(ValueError, match="cannot cycle the momentum of Adagrad"):
        ScheduledLR(torch.optim.Adagrad([nn.Parameter(torch.ones(2))]), OneCycle(), 10, cycle_momentum=True)


def test_a_step_beyond_the_run_is_refused_and_changes_nothing():
    optimizer = sgd(1.0)
    scheduler = ScheduledLR(optimizer, Linear(floor=0.5), 3)
    rates(optimizer, scheduler, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="end of its 3 steps"):
            scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
    assert scheduler.last_epoch == 3


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_torchs_deprecated_jump_lands_on_the_curve():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9)
    schedule = OneCycle()
    scheduler = ScheduledLR(optimizer, schedule, 100, cycle_momentum=True)
    for step in (50, 50, 20, 100):
        optimizer.step()
        scheduler.step(step)
        assert scheduler.get_last_lr() == [schedule.factor(step, 100)]
        assert optimizer.param_groups[0]["momentum"] == schedule.momentum(step, 100)
    with pytest.raises(ValueError, match="end of its 100 steps"):
        scheduler.step(101)
    assert scheduler.last_epoch == 100


def test_a_group_that_is_added_later_is_refused():
    optimizer = sgd(1.0)
    scheduler = ScheduledLR(optimizer, Linear(), 10)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})
    with pytest.raises(ValueError, match="made for 1 parameter groups and the optimizer now has 2; add groups before"):
        scheduler.step()
    assert scheduler.last_epoch == 0


def test_others_in_a_chain_multiply_it():
    optimizer = sgd(1.0)
    chain = ChainedScheduler([ScheduledLR(optimizer, Linear(), 10), ExponentialLR(optimizer, 0.9)])
    np.testing.assert_allclose(rates(optimizer, chain, 10), [[(1 - t / 10) * 0.9**t] for t in range(10)], rtol=1e-12)


def test_it_can_follow_another_scheduler():
    optimizer = sgd(1.0)
    first = LinearLR(optimizer, start_factor=0.5, total_iters=4)
    both = SequentialLR(optimizer, [first, ScheduledLR(optimizer, Linear(), 5)], milestones=[4])
    np.testing.assert_allclose(rates(optimizer, both, 9)[4:], [[1.0], [0.8], [0.6], [0.4], [0.2]])


@pytest.mark.parametrize("chained", [False, True])
def test_a_scheduler_resumes_bit_for_bit(chained, tmp_path):
    def make():
        optimizer = sgd(0.3, 0.07)
        ours = ScheduledLR(optimizer, [Cosine(warmup=0.1), WSD(decay=0.4)], 30)
        return optimizer, ChainedScheduler([ours, ExponentialLR(optimizer, 0.99)]) if chained else ours

    optimizer, scheduler = make()
    rates(optimizer, scheduler, 11)
    checkpoint.save(tmp_path, [optimizer.state_dict(), scheduler.state_dict()])
    expected = rates(optimizer, scheduler, 19)

    optimizer, scheduler = make()
    saved = checkpoint.load(tmp_path)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert rates(optimizer, scheduler, 19) == expected


@pytest.mark.parametrize("peak", [0.3, torch.tensor(0.3)])
def test_it_may_be_made_after_its_optimizer_was_restored(peak):
    """Making a scheduler sets the rates of step 0, also in a restored optimizer."""
    optimizer = sgd(peak)
    scheduler = ScheduledLR(optimizer, Cosine(warmup=0.3), 30)
    rates(optimizer, scheduler, 20)
    saved = optimizer.state_dict(), scheduler.state_dict()

    again = sgd(1.0)
    again.load_state_dict(saved[0])
    resumed = ScheduledLR(again, Cosine(warmup=0.3), 30)
    resumed.load_state_dict(saved[1])

    assert rates(again, resumed, 10) == rates(optimizer, scheduler, 10)


def test_it_goes_on_from_a_step_without_a_state_of_its_own():
    optimizer = sgd(0.3)
    expected = rates(optimizer, ScheduledLR(optimizer, Cosine(), 20), 20)

    again = sgd(0.3)
    again.param_groups[0]["initial_lr"] = 0.3
    assert rates(again, ScheduledLR(again, Cosine(), 20, last_epoch=6), 13) == expected[7:]


def test_another_curve_or_total_cannot_take_over_a_saved_state():
    saved = ScheduledLR(sgd(1.0), Cosine(), 10).state_dict()
    with pytest.raises(ValueError, match="total_steps=10 and this one 20"):
        ScheduledLR(sgd(1.0), Cosine(), 20).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"cosine.*this one.*linear"):
        ScheduledLR(sgd(1.0), Linear(), 10).load_state_dict(saved)


@pytest.mark.parametrize("total", [0, 2.5, -3, True, math.nan, None, "100"])
def test_a_total_that_is_no_number_of_steps_is_refused(total):
    with pytest.raises(ValueError, match="total_steps"):
        ScheduledLR(sgd(1.0), Cosine(), total)


def test_schedules_that_do_not_fit_the_groups_are_refused():
    with pytest.raises(ValueError, match="got 1 schedules for 2 parameter groups"):
        ScheduledLR(sgd(1.0, 1.0), [Cosine()], 10)
    for wrong in (["cosine"], "cosine", Schedule("cosine"), None, lambda step: 1.0):
        with pytest.raises(TypeError, match="needs schedules such as Cosine"):
            ScheduledLR(sgd(1.0), wrong, 10)


# ----------------------------------------------------------------------------------------------------- the checkpoints

STEPS, BATCH = 14, 8


class Run:
    """A small training with everything random in it that a training has."""

    def __init__(self):
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        domains = {
            name: TensorDataset(torch.randn(size, 6), torch.randn(size, 1)) for name, size in (("a", 37), ("b", 23))
        }
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.scheduler = ScheduledLR(self.optimizer, Cosine(warmup=0.2), STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.sampler = DomainSampler(domains, {"a": 0.7, "b": 0.3}, STEPS * BATCH, seed=5, block=BATCH)
        self.noise = np.random.default_rng(4)
        self.loader = DataLoader(
            ConcatDataset(domains.values()), batch_size=BATCH, sampler=self.sampler, generator=torch.Generator()
        )
        self.training = TrainingState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            sampler=self.sampler,
            noise=self.noise,
        )
        self.losses = []

    def train(self, until):
        for x, y in self.loader:
            x = x + 0.1 * self.noise.normal() + 0.1 * np.random.normal() + 0.1 * random.random()
            loss = (self.model(x) - y).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.sampler.advance(len(x))
            self.losses.append(loss.item())
            if len(self.losses) == until:
                break

    def state(self):
        return {"losses": list(self.losses), "training": self.training.state()}

    def restore(self, state):
        self.losses = list(state["losses"])
        self.training.restore(state["training"])


def same(a, b):
    """Equal bit for bit, and of the same types."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def test_a_run_restored_in_a_new_process_goes_on_bit_for_bit(tmp_path):
    whole = Run()
    whole.train(STEPS)
    checkpoint.save(tmp_path / "whole", whole.state())
    half = Run()
    half.train(5)
    checkpoint.save(tmp_path / "half", half.state())

    subprocess.run([sys.executable, __file__, tmp_path / "half", tmp_path / "resumed"], check=True, timeout=120)

    expected, resumed = (checkpoint.load(tmp_path / name) for name in ("whole", "resumed"))
    assert len(expected["losses"]) == STEPS
    assert expected["training"]["parts"]["scaler"]["scale"] > 4.0  # it grew on the way
    for name, part in expected["training"]["parts"].items():
        assert same(part, resumed["training"]["parts"][name]), name
    assert same(expected, resumed)


def test_only_what_was_saved_can_be_restored():
    weight = nn.Linear(2, 2)
    saved = TrainingState(model=weight, optimiser=sgd(1.0)).state()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'optimizer' is only in one of them, did you mean 'optimiser'"):
        TrainingState(model=weight, optimizer=sgd(1.0)).restore(saved)
    with pytest.raises(ValueError, match="'optimiser' is only in one of them; make it with the parts"):
        TrainingState(model=weight).restore(saved)
    with pytest.raises(ValueError, match=r"needs what state\(\) gave, got \['training', 'epoch'\]"):
        TrainingState(model=weight, optimiser=sgd(1.0)).restore({"training": saved, "epoch": 3})
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_no_state_is_refused_by_name():
    with pytest.raises(TypeError, match="cannot keep step, a int"):
        TrainingState(step=3)


def test_generators_go_on_where_they_were(tmp_path):
    generators = {
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.Generator(np.random.Philox(2)),
        "python": random.Random(3),
    }
    training = TrainingState(**generators)

    def draw():
        mine = [torch.rand(1, generator=generators["torch"]).item(), generators["numpy"].random()]
        return [*mine, generators["python"].random(), torch.rand(1).item(), np.random.random(), random.random()]

    checkpoint.save(tmp_path, training.state())
    expected = draw()
    training.restore(checkpoint.load(tmp_path))
    assert draw() == expected


def test_cuda_generators_that_are_not_here_are_told_of(monkeypatch):
    training = TrainingState()
    state = training.state()
    state["random"]["cuda"] = [torch.get_rng_state()]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.warns(UserWarning, match="of 1 CUDA devices and this machine has 0"):
        training.restore(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_go_on_where_they_were(tmp_path):
    training = TrainingState()
    torch.rand(3, device="cuda")
    checkpoint.save(tmp_path, training.state())
    expected = torch.rand(3, device="cuda")
    torch.rand(3, device="cuda")
    training.restore(checkpoint.load(tmp_path))
    assert torch.equal(torch.rand(3, device="cuda"), expected)


# ------------------------------------------------------------------------------------------------------- the batch rule


@pytest.mark.parametrize(("exponent", "expected"), [(0, 3e-3), (0.5, 6e-3), (1, 12e-3), (0.25, 3e-3 * math.sqrt(2))])
def test_the_rate_follows_the_batch_by_the_exponent(exponent, expected):
    assert scale_lr(3e-3, 64, 256, exponent) == pytest.approx(expected, rel=1e-15)
    assert scale_lr(3e-3, 64, 64, exponent) == 3e-3


@pytest.mark.parametrize(
    ("lr", "batch", "new_batch", "exponent", "wrong"),
    [
        (0.0, 64, 128, 1, "lr > 0, got 0.0"),
        (1e-3, 0, 128, 1, "batch > 0, got 0"),
        (1e-3, 64, -1, 1, "new_batch > 0, got -1"),
        (1e-3, 64, math.inf, 1, "new_batch > 0, got inf"),
        (1e-3, 64, 128, math.nan, "exponent, such as 0, 0.5 or 1, got nan"),
        (1e-3, 64, 128, "sqrt", "got 'sqrt'"),
        (True, 64, 128, 1, "got True"),
    ],
)
def test_a_batch_rule_for_nonsense_is_refused(lr, batch, new_batch, exponent, wrong):
    with pytest.raises(ValueError, match=wrong):
        scale_lr(lr, batch, new_batch, exponent)


if __name__ == "__main__":  # the new process of the test above
    source, target = map(Path, sys.argv[1:])
    resumed = Run()
    torch.rand(7), np.random.random(5), random.random()  # whatever happened in it before
    resumed.restore(checkpoint.load(source))
    resumed.train(STEPS)
    checkpoint.save(target, resumed.state())
