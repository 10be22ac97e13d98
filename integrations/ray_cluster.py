"""The way to a Ray cluster: joining one that runs, or starting one on this machine that nobody else can reach."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import ray
from ray import exceptions

REACH = 5.0  # seconds for a cluster's port to answer; Ray itself tries for minutes
LOCAL = "local"
# Ray Client can drive a sweep, and take one up. But beside a driver that is busy the next may not get through to it
# (ray-project/ray issues 63202 and 60316), and half a minute without a network ends a driver's connection for good.
CLIENT = "ray://"


@contextlib.contextmanager
def connected(address: str, cpus: int | None) -> Iterator[None]:
    """This process on the Ray at `address`; "local" starts one with `cpus`, which ends with the block.

    Raises ConnectionError that says what is wrong.
    """
    if address.startswith(CLIENT):
        raise ConnectionError(
            f"{address} is for Ray Client, on which no sweep can rely; run it on a node of the cluster, by `ray exec` "
            "or `ray job submit`, with the address auto, or give the head's own address, HOST:6379."
        )
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with private_cluster() if address == LOCAL else contextlib.nullcontext():
        if address == LOCAL:
            quiet |= {"include_dashboard": False, "num_cpus": cpus}
        else:
            _knock(address)
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ImportError, exceptions.RayError) as error:
            raise unusable(address, error) from error
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own in its place writes a stack and aborts
        try:
            yield
        finally:
            ray.shutdown()


def unusable(address: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if address == LOCAL:
        return ConnectionError(f"Ray did not start on this machine: {reason}.")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return ConnectionError(
        f"Ray at {address} cannot be used: {reason}; RAY_AUTH_MODE is {mode} here, and it and the token must be the "
        "same on every node and in this shell."
    )


def _knock(address: str) -> None:
    """ConnectionError at once when nothing answers at a `host:port`, where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except OSError as error:
        raise ConnectionError(f"Nothing answers at {address} ({error}); is Ray running there?") from error


@contextlib.contextmanager
def private_cluster() -> Iterator[None]:
    """The settings of a cluster for this process alone; afterwards they are as before.

    It listens on the loopback address only. Ray would listen on all of them, as on Macs it does not. Ray would also
    write a token to ~/.ray, which changes how clusters started later by hand behave (2.59 and later).
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # older Rays warn when it is unset
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & before.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for Ray's own processes, and for this one:
    constants: Any = import_module("ray._private.ray_constants")
    elsewhere = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = elsewhere
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(before)
        with contextlib.suppress(ImportError, AttributeError):  # Ray keeps what it has read for the life of the process
            raylet = import_module("ray._raylet")
            raylet.AuthenticationTokenLoader.instance().reset_cache()
            raylet.Config.initialize("")
