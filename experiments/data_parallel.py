"""A worked example: proxies on one process, the target on two that train together (torch.distributed).

    windtunnel run experiments/data_parallel.py --budget 3 [--ray auto]

A small network learns a function of eight inputs. At the target the batch is shared by two ranks, each in a bundle of
its own, which on a cluster may lie on two nodes; gradients are averaged by DistributedDataParallel. With GPUs, give
each bundle one and `backend="nccl"`. Rank 0 reports and saves; a rank that is lost takes the trial back to its
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.nn.parallel import DistributedDataParallel

from bo import Minimize
from bo.trial import Trial
from integrations.data_parallel import data_parallel
from search_spaces import Fidelity, Real, Space

BATCH = 64
space = Space(
    lr=Real(1e-4, 1e-1, log=True),
    decay=Real(1e-5, 1e-1, log=True),
    fidelity=Fidelity(
        lambda scale: scale["width"] ** 2 * scale["steps"],
        width=(16, 32, 64),
        steps=(100, 200, 400),
        target={"width": 64, "steps": 400},
    ),
)
objective = Minimize("loss")
budget = 3


def resources(trial: Trial) -> dict[str, Any]:
    """One process for a proxy, two for the target, wherever there is room."""
    if trial.scale["width"] < 64:
        return {"num_cpus": 1}
    return {"bundles": [{"CPU": 1}, {"CPU": 1}], "strategy": "SPREAD"}


def examples(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 8, generator=generator)
    return x, (x.sin().prod(dim=1, keepdim=True) + x[:, :1].abs()).tanh()


def train(trial: Any) -> Mapping[str, float]:
    return data_parallel(train_rank, trial)


def train_rank(trial: Any, rank: int) -> Mapping[str, float]:
    """What every rank does: the same weights, its own part of each batch."""
    torch.manual_seed(trial.seed)
    width, steps, ranks = int(trial.scale["width"]), int(trial.scale["steps"]), get_world_size()
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.config["lr"], weight_decay=trial.config["decay"])
    first = 0
    if (state := trial.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    held_out = examples(512, torch.Generator().manual_seed(0))

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(model.module(held_out[0]), held_out[1]))

    for step in range(first, steps):
        x, y = examples(BATCH // ranks, torch.Generator().manual_seed(1 + step * ranks + rank))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            if rank == 0:
                trial.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            trial.report(step + 1, {"loss": loss()})
    return {"loss": loss(), "ranks": ranks}
