"""Function trainables that were written for Ray Tune, under our own runners.

def train(config):
    checkpoint = tune.get_checkpoint()
    ...
    tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(folder))

run(study, from_tune(train), executor="ray", n_trials=64)
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.train._internal import session as sessions
from ray.tune.utils import flatten_dict

from bo import RunningTrial
from integrations.tune_trials import numbers_of, tune_config

FILES, STATE = "files", "tune.json"
log = logging.getLogger("windtunnel")


def from_tune(train: Callable[[dict[str, Any]], Any]) -> FromTune:
    """`train(config)`, which calls `ray.tune.report`, as a training function of `bo.run`.

    Its config is as `tune_trials.tune_config` says, and what Tune fills in by a param_space or `functools.partial` is
    bound by the latter. The numbers it reports are the metrics, nested ones by names joined by "/"; the step is Tune's
    training_iteration, how often it has reported; the last report is the result. A checkpoint that it reports is the
    trial's, and what `tune.get_checkpoint` gives when the trial goes on, also after its worker was lost. Asked to end
    early it does at its next report, by `StopTrial`. `tune.get_context` knows the trial's id, name and folder. It works
    where it was started, not in the trial's folder, and `tune.with_resources` counts for Tune alone.

    ValueError for class trainables, names of registered ones, and functions wrapped by `tune.with_parameters`.
    """
    name = getattr(train, "__name__", None) or repr(train)
    if isinstance(train, type):
        raise ValueError(
            f"{name} is a class, and only function trainables can be run here: write def train(config) that calls "
            "tune.report, or let Tune run the class with integrations.tune_search.StudySearch."
        )
    if not callable(train):
        raise ValueError(f"from_tune needs a function def train(config), got {train!r}.")
    if getattr(train, "__qualname__", "").startswith("with_parameters.<locals>"):
        raise ValueError(
            f"{name} is wrapped by tune.with_parameters, whose values lie in one cluster's memory; bind them by "
            "functools.partial, or load them in the function."
        )
    try:
        inspect.signature(train).bind({})
    except TypeError as error:
        raise ValueError(f"{name} must take one argument, the config, and {error}.") from None
    if hasattr(train, "_resources"):
        log.warning("The resources that tune.with_resources gave %s are Tune's; give the executor its own.", name)
    return FromTune(train)


@dataclass(frozen=True)
class FromTune:
    """A function trainable as a training function; made by `from_tune`."""

    train: Callable[[dict[str, Any]], Any]

    def __call__(self, trial: RunningTrial) -> Mapping[str, float]:
        config = tune_config(trial.config, trial.scale, trial.seed)
        with tempfile.TemporaryDirectory(prefix="tune-") as scratch, _session(trial, Path(scratch)) as session:
            session.trial_resources = getattr(self.train, "_resources", None)
            if inspect.isgeneratorfunction(self.train):
                for output in self.train(config):
                    session.output(output)
            else:
                session.output(self.train(config))
        if not session.last:
            raise ValueError("The function returned and had reported no number; tune.report({'loss': ...}) does.")
        return session.last


class _Session:
    """What `ray.tune.report`, `get_checkpoint` and `get_context` look up while a function trainable runs."""

    # What Tune's own sessions have and functions of Tune find to be None: they are no workers of Ray Train.
    world_rank = local_rank = node_rank = world_size = local_world_size = run_id = None

    def __init__(self, trial: RunningTrial, scratch: Path) -> None:
        self.trial_id = f"{trial.id:05d}"
        self.trial_name = f"trial_{self.trial_id}"
        self.trial_dir = str(trial.folder)
        self.experiment_name = trial.folder.parent.parent.name
        self.trial_resources: Any = None
        self.last: dict[str, float] = {}
        self._trial, self._scratch, self._copies = trial, scratch, 0
        self._iteration = 0
        self._copy = self._copied()
        if self._copy is not None:
            state = json.loads((self._copy / STATE).read_text())
            self._iteration, self.last = state["training_iteration"], state["metrics"]

    def report(self, metrics: Mapping[str, Any], checkpoint: tune.Checkpoint | None = None) -> None:
        self._iteration += 1
        self.last = numbers_of(flatten_dict(dict(metrics))) or self.last
        if checkpoint is not None:
            with self._trial.checkpoint_dir() as folder:
                shutil.rmtree(folder / FILES, ignore_errors=True)
                checkpoint.to_directory(str(folder / FILES))
                state = {"training_iteration": self._iteration, "metrics": self.last}
                (folder / STATE).write_text(json.dumps(state))
            self._copy = None
        self._trial.report(self._iteration, self.last)

    def output(self, output: Any) -> None:
        """What a function returns or yields counts as a report, as with Tune."""
        if isinstance(output, dict) and output:
            self.report(output)
        elif isinstance(output, int | float) and not isinstance(output, bool):
            self.report({"_metric": output})
        elif output is not None and output != {}:
            raise ValueError(f"A function of Tune returns or yields a number or a dictionary, got {output!r}.")

    @property
    def loaded_checkpoint(self) -> Any:
        """A `tune.Checkpoint` of the newest, whose files stay as they are while the function runs; else None."""
        self._copy = self._copy or self._copied()
        return None if self._copy is None else tune.Checkpoint.from_directory(str(self._copy / FILES))

    def _copied(self) -> Path | None:
        self._copies += 1
        copy = self._scratch / str(self._copies)
        with contextlib.suppress(_Unchanged), self._trial.checkpoint_dir() as folder:
            shutil.copytree(folder, copy)
            raise _Unchanged
        return copy if (copy / STATE).exists() else None


class _Unchanged(Exception):
    """Raised in `checkpoint_dir` to leave what is there: a block that raises changes nothing."""


@contextlib.contextmanager
def _session(trial: RunningTrial, scratch: Path) -> Iterator[_Session]:
    """Tune's session of this process, for a while: Tune has no other way to give a function its report."""
    if sessions.get_session() is not None:
        raise RuntimeError("A trial of Tune runs in this process already; run each in a process of its own.")
    session = _Session(trial, scratch)
    sessions._session = session  # type: ignore[assignment]  # Tune asks no more of it than this one has
    try:
        yield session
    finally:
        sessions._session = None
