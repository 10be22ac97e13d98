"""One trial on several processes, in bundles of a real Ray."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from bo.ports import Lost, Raised, Reported, Returned, Stopped, Underway
from bo.trial import Trial
from integrations.data_parallel import data_parallel
from integrations.ray_runner import RayRunner
from search_spaces import Scale

SECONDS = 120.0
BUNDLES = {"bundles": [{"CPU": 1}, {"CPU": 1}], "strategy": "PACK"}


@pytest.fixture
def said_of(cluster, tmp_path):
    """What is said of a trial of a function of (trial, rank) by its end."""
    made = []

    def run(train, on_message=lambda executor, message: None, attempt=1):
        executor = RayRunner(resources=lambda trial: BUNDLES)
        made.append(executor)
        executor.open(lambda trial: data_parallel(train, trial), tmp_path)
        executor.attach(())
        executor.submit(Trial(id=0, config={"lr": 0.5}, scale=Scale(), seed=3, source="sobol", attempt=attempt))
        said = []

        def deliver(messages):
            for message in messages:
                said.append(message)
                on_message(executor, message)

        deadline = time.monotonic() + SECONDS
        while not said or isinstance(said[-1], Underway):
            assert time.monotonic() < deadline, said
            executor.wait(deliver, 0.2)
        executor.close()
        return said

    yield run
    for executor in made:
        executor.close()


def test_ranks_train_together_and_the_first_speaks_for_all(said_of):
    def train(trial, rank):
        total = torch.tensor([trial.config["lr"] * (1 + rank)])
        torch.distributed.all_reduce(total)
        trial.report(0, {"loss": total.item()})
        return {"loss": total.item(), "ranks": torch.distributed.get_world_size(), "rank": rank, "seed": trial.seed}

    reported, returned = said_of(train)
    assert reported == Reported(0, 1, 0, {"loss": 1.5})
    assert returned == Returned(0, 1, {"loss": 1.5, "ranks": 2, "rank": 0, "seed": 3}, returned.seconds)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("error", [KeyError("no such domain"), RuntimeError("shapes cannot be multiplied")])
def test_an_error_of_a_rank_is_the_trials_and_not_the_lost_connection_that_follows(said_of, wrong, error):
    def train(trial, rank):
        if rank == wrong:
            raise error
        torch.distributed.barrier()
        return {"loss": 0.0}

    (raised,) = said_of(train)
    assert isinstance(raised, Raised)
    assert raised.error == f"{type(error).__name__}: {error}"


def test_a_killed_rank_is_a_lost_trial_that_goes_on_from_its_checkpoint(said_of):
    def train(trial, rank):
        if trial.load() is None:
            if rank == 0:
                trial.save({"step": 7})
            torch.distributed.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        step = torch.tensor([trial.load()["step"]])
        torch.distributed.all_reduce(step)
        return {"loss": float(step)}

    (lost,) = said_of(train)
    assert isinstance(lost, Lost)
    (returned,) = said_of(train, attempt=2)
    assert returned.metrics == {"loss": 14.0}


@pytest.mark.slow
def test_a_stop_at_a_report_ends_every_rank(said_of, tmp_path):
    def train(trial, rank):
        (tmp_path / f"{rank}.pid").write_text(str(os.getpid()))
        for step in range(10_000):
            torch.distributed.barrier()
            trial.report(step, {"loss": 1.0})
            time.sleep(0.01)
        return {"loss": 1.0}

    said = said_of(train, on_message=lambda executor, message: executor.stop(0))
    assert isinstance(said[-1], Stopped)
    other = int((tmp_path / "1.pid").read_text())
    deadline = time.monotonic() + 30
    while (command := Path(f"/proc/{other}/cmdline")).exists() and "ray::_Rank" in command.read_text():
        assert time.monotonic() < deadline, "rank 1 outlives the trial"
        time.sleep(0.1)
