"""One trial on several processes: data-parallel training with torch.distributed, on the bundles of a trial on Ray.

A trial whose `resources` have bundles runs its training function in the first of them; `data_parallel` starts a process
in each of the others and lets all of them train together. The trial is rank 0: it alone reports, saves and is stopped.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed
from ray import exceptions
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bo.worker import RunningTrial
from integrations.shipping import pack, unpack
from search_spaces import Scale

LOOK = 1.0  # seconds between looks at the other ranks
LAST = 10.0  # seconds for the others to say what went wrong with them


@dataclass(frozen=True)
class Peer:
    """What ranks above 0 get for a trial: the same to train, and nobody to report to.

    What they report or save is dropped, since rank 0 does; `load` is what rank 0 loaded.
    """

    id: int
    config: Mapping[str, Any]
    scale: Scale
    seed: int
    attempt: int
    state: Any = None

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def save(self, state: Any) -> None:
        pass

    def load(self) -> Any:
        return self.state


def data_parallel(
    train: Callable[[Any, int], Mapping[str, float]],
    trial: RunningTrial,
    *,
    backend: str = "gloo",
    timeout: float = 1800.0,
) -> Mapping[str, float]:
    """`train(trial, rank)` in each bundle of the trial at the same time, in one process group; what rank 0 returns.

    Call it from the training function of a trial whose `resources` have `bundles`; without them it is the only rank.
    backend: of torch.distributed, "nccl" with GPUs. timeout: seconds that a collective operation may take.

    A rank that raises while others wait for it ends them all with its error; one that is killed, or whose node is lost,
    ends the process of the trial, which is then retried from its checkpoint. Ranks above 0 end with rank 0, so a stop
    at a report ends all; what they raise after the last operation that all take part in is not heard. On machines whose
    own name resolves to a loopback address, gloo needs GLOO_SOCKET_IFNAME (`env` of the trial's resources).
    """
    group: Any = get_current_placement_group() if ray.is_initialized() else None
    bundles: list[Mapping[str, float]] = group.bundle_specs if group else [{}]
    if len(bundles) == 1:
        with _group(backend, ("127.0.0.1", _free_port()), 0, 1, timeout):
            return train(trial, 0)
    place = str(get_node_ip_address()), _free_port()  # type: ignore[no-untyped-call]
    peer = Peer(trial.id, trial.config, trial.scale, trial.seed, trial.attempt, trial.load())
    packed = pack(lambda rank: train(peer, rank))
    actor: Any = ray.remote(_Rank)
    ranks = [
        actor.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank, bundle in enumerate(bundles)
        if rank
    ]
    ends = [
        each.run.remote(packed, backend, place, rank, len(bundles), timeout) for rank, each in enumerate(ranks, start=1)
    ]
    done = threading.Event()
    threading.Thread(target=_watch, args=(ends, done), daemon=True).start()
    try:
        with _group(backend, place, 0, len(bundles), timeout):
            return train(trial, 0)
    except RuntimeError as error:
        if _is_echo(error) and (other := _first_error(ends)) is not None:
            raise (other.cause if isinstance(other.cause, Exception) else other) from other
        raise
    finally:
        done.set()
        for each in ranks:
            ray.kill(each)


class _Rank:
    """A rank above 0."""

    def run(self, packed: bytes, backend: str, place: tuple[str, int], rank: int, ranks: int, timeout: float) -> None:
        train = unpack(packed)
        with _group(backend, place, rank, ranks, timeout):  # left also by an error, which frees those that wait for us
            train(rank)


def _is_echo(error: BaseException) -> bool:
    """Whether an error is a lost connection, behind which there is one of another rank that says more."""
    return (
        isinstance(error, torch.distributed.DistError)
        or re.search("gloo|nccl|connection", str(error), re.I) is not None
    )


def _first_error(ends: list[Any]) -> Any:
    """What another rank raised that is no echo, None where there is no such."""
    ended, _ = ray.wait(ends, num_returns=len(ends), timeout=LAST)
    for end in ended:
        try:
            ray.get(end)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if not (isinstance(cause, RuntimeError) and _is_echo(cause)):
                return error
    return None


def _watch(ends: list[Any], done: threading.Event) -> None:
    """End this process when another rank is gone: nobody may be waited for who will not come."""
    while ends and not done.is_set():
        ended, ends = ray.wait(ends, timeout=LOOK)
        for end in ended:
            try:
                ray.get(end)
            except exceptions.RayTaskError:
                pass  # an error of the training function, which the others hear of by their lost connection
            except exceptions.RayError:
                if not done.is_set():
                    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _group(backend: str, place: tuple[str, int], rank: int, ranks: int, timeout: float) -> Iterator[None]:
    torch.distributed.init_process_group(
        backend,
        init_method=f"tcp://{place[0]}:{place[1]}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
