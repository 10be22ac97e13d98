"""Trials as tasks of Ray, on this machine or on a cluster.

A trial is a plain task, so a warm worker process takes the next one. Its last message is the task's return value; what
it reports on the way, and the wish to stop it, go through a small actor. Retries are the driver's, who counts attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bo.ports import Deliver, Lost, Message, Raised, Train, Underway
from bo.trial import Trial
from integrations.shipping import pack, run_packed

KINDS = ("num_cpus", "num_gpus", "memory", "accelerator_type", "resources")
GRACE = 10.0  # seconds for killed workers to be gone, and for a mailbox that was killed to come back
REACH = 5.0  # seconds for a cluster's port to answer; Ray itself tries for minutes

# How a trial is lost, in words that follow "lost by".
CAUSES: dict[type[exceptions.RayError], str] = {
    exceptions.OutOfMemoryError: "running out of its node's memory",
    exceptions.NodeDiedError: "the death of its node",
    exceptions.LocalRayletDiedError: "the death of its node",
    exceptions.WorkerCrashedError: "a crash or kill of its process",
    exceptions.TaskCancelledError: "a cancellation",
}

Resources = Mapping[str, Any] | Callable[[Trial], Mapping[str, Any]]


class RayTasks:
    """An executor on Ray; on several machines the study's folder must lie on a file system that all of them share.

    address: "auto", "host:port" or "ray://host:port" of a running cluster; None takes RAY_ADDRESS, or else starts a
    cluster on this machine that ends with the driver. A process that is connected to Ray already stays with that.
    workers: trials at a time; by default as many as the resources allow.
    resources: what a trial takes by the names of Ray's task options (`KINDS`), or a function of the trial that says so;
    by default one CPU, and where the cluster has GPUs one of those, or an equal share when there are more workers.
    """

    apart = True

    def __init__(
        self, address: str | None = None, workers: int | None = None, resources: Resources | None = None
    ) -> None:
        if workers is not None and (type(workers) is not int or workers < 1):
            raise ValueError(f"RayTasks needs a whole number of workers of at least 1, got {workers!r}.")
        if resources is not None and not callable(resources):
            _check(resources)
        self._address, self._workers, self._resources = address, workers, resources
        self._owner = self._local = False  # whether we connected this process to Ray, and whether we started that Ray
        self._environment = contextlib.ExitStack()
        self._mailbox: Any = None
        self._packed: Any = None
        self._tasks: dict[Any, tuple[Trial, dict[str, float]]] = {}  # by the reference to its end; with its needs

    def open(self, train: Train, folder: Path) -> None:
        packed = pack(train)
        if not ray.is_initialized():
            self._connect()
        if self._resources is None:
            self._resources = _by_default(_present().get("GPU", 0.0), self._workers or 1)
        self._typical = {"CPU": 1.0} if callable(self._resources) else _needs(self._resources)
        self._folder = str(folder)
        self._packed = ray.put(packed)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(_Mailbox)
        forever = {"max_restarts": -1, "max_task_retries": -1}
        self._mailbox = actor.options(num_cpus=0, scheduling_strategy=here, **forever).remote()
        self._reports = self._mailbox.collect.remote()
        if self._owner and not self._local:
            try:  # a cluster with another RAY_AUTH_MODE may fail no earlier than here
                ray.get(self._mailbox.wake.remote())
            except exceptions.RayError as error:
                raise _unusable(self._address or os.environ["RAY_ADDRESS"], error) from error

    def attach(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        return ()

    def capacity(self) -> int:
        if self._workers is not None:
            return self._workers - len(self._tasks)
        # Where trials differ the next one is taken to be like the last, so that at most one waits in Ray's queue.
        free = _present()
        for _, needs in self._tasks.values():
            for kind, amount in needs.items():
                free[kind] = free.get(kind, 0.0) - amount
        room = min((int(free.get(kind, 0.0) // amount) for kind, amount in self._typical.items() if amount), default=1)
        return max(room, 0 if self._tasks else 1)  # an empty cluster may grow once something waits

    def submit(self, trial: Trial) -> None:
        options = self._resources(trial) if callable(self._resources) else self._resources
        assert options is not None
        self._typical = needs = _needs(_check(options))
        if self._local:  # elsewhere a node that fits may be started for it
            present = _present()
            has = {kind: present.get(kind, 0.0) for kind in needs}
            if any(amount > has[kind] for kind, amount in needs.items()):
                raise ValueError(
                    f"Trial {trial.id} needs {needs}, and this machine has {has}; ask for less in `resources`, or use "
                    "a cluster."
                )
        threads = max(1, math.floor(needs["CPU"]))
        environment = {}
        if threads > 1 and "OMP_NUM_THREADS" not in os.environ:  # one thread is what Ray sets by itself
            environment = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}
        task = _run_trial.options(name=f"trial {trial.id}", **options, **environment)
        self._tasks[task.remote(self._packed, trial, self._folder, self._mailbox)] = (trial, needs)

    def wait(self, deliver: Deliver, timeout: float) -> None:
        pending = [*self._tasks, self._reports]
        if not ray.wait(pending, timeout=timeout)[0]:
            return
        ended = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)[0] if self._tasks else []
        if ended:
            self._mailbox.wake.remote()  # a trial's reports were in the mailbox before its end
        if ray.wait([self._reports], timeout=GRACE if ended else 0)[0]:
            reports = ray.get(self._reports)
            if ended:  # and some of them after this collection
                reports += ray.get(self._mailbox.drain.remote())
            self._reports = self._mailbox.collect.remote()
            deliver(reports)
        for task in ended:
            trial, _ = self._tasks.pop(task)
            deliver([_end(trial, task)])

    def stop(self, trial: int) -> None:
        if any(trial == running.id for running, _ in self._tasks.values()):
            self._mailbox.stop.remote(trial)

    def close(self) -> None:
        tasks, self._tasks = list(self._tasks), {}
        if self._mailbox is not None and ray.is_initialized():
            for task in tasks:
                ray.cancel(task, force=True)
            last = [*tasks, self._reports, self._mailbox.wake.remote()]  # Ray would complain of calls left waiting
            ray.wait(last, num_returns=len(last), timeout=GRACE)
            ray.kill(self._mailbox)
        self._mailbox = self._reports = self._packed = None
        if self._owner:
            ray.shutdown()
            self._owner = self._local = False
        self._environment.close()

    def _connect(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            self._environment.enter_context(_private_cluster())
            cpus = 1 if callable(self._resources) or self._resources is None else _needs(self._resources)["CPU"]
            slots = None if self._workers is None else max(math.ceil(self._workers * cpus), os.cpu_count() or 1)
            quiet |= {"include_dashboard": False, "num_cpus": slots}
        else:
            _knock(address)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ImportError, exceptions.RayError) as error:
            raise _unusable(address, error) from error
        self._owner, self._local = True, address == "local"


class _Mailbox:
    """An actor: what runs say, on its way to the driver, and which are to end. A restarted one starts empty."""

    def __init__(self) -> None:
        self._reports: list[Underway] = []
        self._stopping: set[int] = set()
        self._news = asyncio.Event()

    async def post(self, report: Underway) -> bool:
        self._reports.append(report)
        self._news.set()
        return report.trial in self._stopping

    async def collect(self) -> list[Underway]:
        """Everything posted since the last time; waits until there is something, or for `wake`."""
        await self._news.wait()
        return await self.drain()

    async def drain(self) -> list[Underway]:
        """Everything posted since the last time, at once."""
        self._news.clear()
        reports, self._reports = self._reports, []
        return reports

    async def wake(self) -> None:
        self._news.set()

    async def stop(self, trial: int) -> None:
        self._stopping.add(trial)


@ray.remote(max_retries=0)
def _run_trial(packed: bytes, trial: Trial, folder: str, mailbox: Any) -> Message:
    def send(message: Underway) -> bool:
        stop: bool = ray.get(mailbox.post.remote(message))
        return stop

    return run_packed(packed, trial, Path(folder), send)


def _end(trial: Trial, task: Any) -> Message:
    """The last message of a task that has ended, however it ended."""
    try:
        last: Message = ray.get(task)
    except exceptions.TaskCancelledError:
        return Lost(trial.id, trial.attempt, CAUSES[exceptions.TaskCancelledError])
    except exceptions.RayTaskError as error:  # not in the training function, which `run_packed` looks after
        cause = f"{type(error.cause).__name__}: {error.cause}".strip().partition("\n")[0]
        return Raised(trial.id, trial.attempt, f"A worker could not run the trial: {cause}", str(error), diverged=False)
    except exceptions.RayError as error:
        causes = [words for kind, words in CAUSES.items() if isinstance(error, kind)]
        return Lost(trial.id, trial.attempt, causes[0] if causes else type(error).__name__)
    return last


def _check(resources: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(resources, Mapping) or (wrong := set(resources) - set(KINDS)):
        wrong = wrong if isinstance(resources, Mapping) else resources
        raise ValueError(f"resources are a dictionary with keys among {', '.join(KINDS)}, got {wrong!r}.")
    return resources


def _needs(resources: Mapping[str, Any]) -> dict[str, float]:
    """What a trial takes, in the names of a node's resources."""
    named = {"CPU": resources.get("num_cpus", 1), "GPU": resources.get("num_gpus"), "memory": resources.get("memory")}
    return {kind: float(n) for kind, n in {**named, **resources.get("resources", {})}.items() if n is not None}


def _by_default(gpus: float, workers: int) -> dict[str, float]:
    """What a trial takes where nobody says so: all workers find room, as few as possible of them on one GPU."""
    return {"num_cpus": 1, "num_gpus": 1 / math.ceil(workers / gpus)} if gpus else {"num_cpus": 1}


def _present() -> dict[str, float]:
    """What the cluster has now, free or not."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def _knock(address: str) -> None:
    """ConnectionError at once when nothing answers at a `host:port`, where Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConnectionError(f"Nothing answers at {address} ({error}); is Ray running there?") from error


def _unusable(address: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if address == "local":
        return ConnectionError(f"Ray did not start on this machine: {reason}.")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return ConnectionError(
        f"Ray at {address} cannot be used: {reason}; RAY_AUTH_MODE is {mode} here, and it and the token must be the "
        "same on every node and in this shell."
    )


@contextlib.contextmanager
def _private_cluster() -> Iterator[None]:
    """The environment of a cluster for this process alone; afterwards it is as before.

    Ray would write a token to ~/.ray, which changes how clusters started later by hand behave (2.59 and later).
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # older Rays warn when it is unset
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & before.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(before)
        with contextlib.suppress(ImportError, AttributeError):  # Ray keeps what it has read for the life of the process
            raylet = import_module("ray._raylet")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
            raylet.Config.initialize("")
