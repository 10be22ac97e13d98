"""What Ray Tune calls a trial and what a study does: the study behind a searcher or a scheduler, and its trials' names.

The trial that Tune knows by an id of its own is one of the study's. Which one stands in `tune_trials.jsonl` in the
study's folder, a line each, on the disk before Tune gets the configuration. It cannot be with Tune, whose snapshots are
older than the study, nor in the journal, which knows no outside names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from bo import Study, Trial
from bo import journal as journals
from bo.checkpoint import sync_folder
from bo.objective import Function, Maximize, Minimize, Objective, WeightedSum
from integrations.ray_runs import OWN
from integrations.ray_space import to_nested
from search_spaces import Scale, Space
from search_spaces.parameter import is_number, plain
from search_spaces.stored import StoredFunction

NAME = "tune_trials.jsonl"
STEP = "training_iteration"
log = logging.getLogger("windtunnel")

#: The studies that this process has at hand, by their folder: a second object would be a second driver.
_AT_HAND: WeakValueDictionary[Path, Study] = WeakValueDictionary()


class TuneStudy:
    """A study as the searcher and the scheduler of one Tune run share it.

    Pickled it is the study's folder and identity, and functions of its space and objective if it has such, which no
    journal holds; it is opened again when it is first used.
    """

    def __init__(self, study: Study | str | os.PathLike[str]) -> None:
        if not isinstance(study, Study):
            study = _AT_HAND.get(Path(study).resolve()) or Study.open(study)
        self.folder = study.folder.resolve()
        self.identity = journals.identity(self.folder)
        self._given = _functions(study)
        self._study: Study | None = study
        _AT_HAND[self.folder] = study
        self._names: dict[str, int] | None = None
        self._end = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (str(self.folder), self.identity, self._given)

    def __deepcopy__(self, memo: Any) -> TuneStudy:
        return self  # it stands for the one study, which has one driver

    @property
    def study(self) -> Study:
        if self._study is None:
            at_hand = _AT_HAND.get(self.folder)
            if at_hand is None:
                _AT_HAND[self.folder] = at_hand = Study.open(self.folder, **self._given)
            self._study = at_hand
            self.check(self.identity)
        return self._study

    def check(self, identity: str) -> None:
        """ValueError unless this is the study of that identity."""
        if (found := journals.identity(self.folder)) != identity:
            raise ValueError(
                f"{self.folder} holds another study ({found[:8]}) than the one this Tune run was started with "
                f"({identity[:8]}); put that study back there, or start a new Tune run."
            )

    @property
    def names(self) -> Mapping[str, int]:
        """Tune's ids -> the study's."""
        if self._names is None:
            try:
                data = (self.folder / NAME).read_bytes()
            except FileNotFoundError:
                data = b""
            self._end = data.rfind(b"\n") + 1  # a torn last line was never acted on
            lines = [json.loads(line) for line in data[: self._end].splitlines()]
            self._names = {line["tune"]: line["trial"] for line in lines}
        return self._names

    def name(self, tune_id: str, trial: int) -> None:
        """Have Tune's `tune_id` stand for a trial from now on; on the disk when it returns."""
        assert self.names is self._names is not None
        line = json.dumps({"tune": tune_id, "trial": trial}).encode() + b"\n"
        descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, self._end)
            os.pwrite(descriptor, line, self._end)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not self._end:
            sync_folder(self.folder)
        self._end += len(line)
        self._names[tune_id] = trial

    def trial(self, tune_id: str) -> Trial | None:
        """The trial that Tune knows by this id; None, with a warning, when it is none of the study."""
        if tune_id not in self.names:
            log.warning(
                "Tune's trial %s is none that %s proposed, so its results are not kept; let Tune resume errored "
                "trials (resume_errored) rather than restart them under new ids.",
                tune_id,
                self.folder,
            )
            return None
        return self.study.trial(self.names[tune_id])

    def metrics(self, result: Mapping[str, Any]) -> dict[str, float]:
        """The numbers among a flat result of Tune that are the user's, or that the objective names."""
        named = self.study.objective.metrics
        return {
            name: value
            for name, value in numbers_of(result).items()
            if name in named or not (name in NOT_METRICS or name.startswith("config/"))
        }

    def report(self, tune_id: str, result: Mapping[str, Any]) -> Trial | None:
        """Record what Tune says a trial reported; gives the trial as it is now, None when it is none of the study."""
        trial = self.trial(tune_id)
        if trial is not None and trial.status == "running" and (metrics := self.metrics(result)):
            self.study.report(trial.id, int(result[STEP]), metrics)
            return self.study.trial(trial.id)
        return trial


NOT_METRICS = OWN | {STEP, "checkpoint_dir_name", "should_checkpoint", "__duplicate__"}


def _again(folder: str, identity: str, given: Mapping[str, Any]) -> TuneStudy:
    made = object.__new__(TuneStudy)
    made.folder, made.identity, made._given = Path(folder), identity, dict(given)
    made._study, made._names, made._end = None, None, 0
    return made


def _functions(study: Study) -> dict[str, Any]:
    """Space and objective where they hold functions, which a study needs handed in when it is opened."""
    given: dict[str, Any] = {}
    cost = None if study.space.fidelity is None else study.space.fidelity.cost_function
    if study.space.predicates or isinstance(cost, StoredFunction):
        given["space"] = study.space
    if any(isinstance(part, Function) for part in study.objective.parts):
        given["objective"] = study.objective
    return given


def numbers_of(flat: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what was reported; Tune takes texts and lists too."""
    return {name: float(plain(value)) for name, value in flat.items() if is_number(plain(value))}


def tune_config(config: Mapping[str, Any], scale: Scale, seed: int) -> dict[str, Any]:
    """A trial's configuration as a function trainable gets it.

    Parameters as in `trial.config`, those of a chosen option beside it, a schedule with its `.factor`, a mixture as a
    dictionary of shares; names joined by "/" are dictionaries within dictionaries. "scale" is the trial's scale where
    the space has a fidelity, and "seed" its seed where the space has no parameter of that name.
    """
    at_scale = {"scale": scale} if len(scale) else {}
    return {"seed": seed} | to_nested(config) | at_scale


def refuse_scale(space: Space) -> None:
    """ValueError when a parameter would hide the scale."""
    if space.fidelity is not None and "scale" in {place.name.partition("/")[0] for place in space.placed}:
        raise ValueError("The space has a parameter 'scale', where Tune's config has the trial's scale; rename it.")


def check_direction(objective: Objective, metric: object, mode: object) -> None:
    """ValueError when Tune is told to look for something else than the study.

    Where the objective is made of several metrics, Tune's may be one that the study does not know: their sum, say.
    """
    if metric is None:
        return
    directions = {
        name: ("min" if weight > 0 else "max")
        for part in objective.parts
        if isinstance(part, Minimize | Maximize | WeightedSum)
        for name, weight in part.weights.items()
    }
    for name, way in zip(_listed(metric), _listed(mode), strict=False):
        if name not in directions and (len(objective.metrics) > 1 or not directions):
            continue
        if name not in directions or way not in (None, "obs", directions[name]):
            wanted = ", ".join(f"metric={name!r}, mode={way!r}" for name, way in directions.items())
            raise ValueError(
                f"Tune is given metric={name!r}, mode={way!r}, and the study has {objective}; give it {wanted}, or "
                "leave both out."
            )


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
