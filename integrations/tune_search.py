"""A study as the searcher of Ray Tune: Tune runs the trials, the study decides which, and keeps what came of them.

    study = Study.open_or_create("studies/lm", space, objective=Minimize("loss"))
    search = StudySearch(study, steps=100)
    tuner = tune.Tuner(train, tune_config=tune.TuneConfig(search_alg=search, num_samples=64))
    tuner.fit()

The study is written through: what Tune has been told about a trial is in its journal before Tune goes on. A restored
run (`Tuner.restore`) therefore finds every result, also those that Tune's own snapshots had not held yet, and a new
`Tuner` over the same study goes on with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher, sample

from bo import Proposal, Study, Trial
from bo.study import Draft
from integrations.ray_space import from_ray
from integrations.tune_trials import STEP, TuneStudy, check_direction, refuse_scale, tune_config
from search_spaces import Space

HINT = 4  # trials that Tune ended while none came to its own end, after which the log says what that may mean
BLINK = 0.05  # seconds that Tune's loop waits for a proposal while other trials run
log = logging.getLogger("windtunnel")


class StudySearch(Searcher):
    """Proposes the trials of a study to Tune and tells it their results, those that were stopped early as stopped.

    study: a study, or its folder. steps: how many times a whole run reports. Tune does not say whether a run came to
    its end or was ended: one that returned by itself is told, one that Tune ended is told from `steps` reports on and
    is stopped before, and counts towards the budget by the share that it made. It is needed with HyperBand, class
    trainables and stop criteria, which end every run.

    `tune_trials.tune_config` says what a config holds. `num_samples` counts what Tune itself remembers: a limit of the
    study (`study.limit(n_trials=64)`) counts every trial, also those that Tune forgot with its driver.

    A policy thinks in a thread of its own, so that reports and ends of other trials do not wait for it.
    """

    def __init__(self, study: Study | str | os.PathLike[str], steps: int | None = None) -> None:
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(f"StudySearch needs steps to be a whole number of at least 1, got {steps!r}.")
        super().__init__()  # without a metric: Tune would demand it in every report
        self.shared, self.steps = TuneStudy(study), steps
        refuse_scale(self.shared.study.space)
        self._begin({})

    def _begin(self, live: Mapping[str, int]) -> None:
        self._live = dict(live)  # what Tune has not ended: its id -> the trial's
        self._seen: dict[str, int] = {}  # Tune's id -> the last step that it went on after
        self._since = time.time()
        self._ended = 0
        self._thought: _Thought | None = None
        self._nothing = False  # whether the policy had nothing to propose since the last end of a trial

    @property
    def study(self) -> Study:
        """The study as it is now."""
        return self.shared.study

    def __getstate__(self) -> dict[str, Any]:
        return {"shared": self.shared, "steps": self.steps}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.shared, self.steps = state["shared"], state["steps"]
        self._begin({})

    # ------------------------------------------------------------------------------------------------ Tune's calls

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        """Check what Tune is given against the study; it calls this when it has a param_space."""
        check_direction(self.study.objective, metric, mode)
        _check_space(self.study.space, config)
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next configuration: of a trial that a killed driver left, else a new one; None while there is none."""
        self.study.lock()  # also where nothing but a name is written
        trial = self._left_behind() or self._next()
        if trial is None:
            return None if self._live else Searcher.FINISHED  # what runs may bring more, once it is told
        self.shared.name(trial_id, trial.id)
        self._live[trial_id] = trial.id
        return tune_config(trial.config, trial.scale, trial.seed)

    def _left_behind(self) -> Trial | None:
        """A trial that runs by the study and that Tune does not know: its driver died before it had told anyone."""
        known = set(self._live.values())
        return next((trial for trial in self.study.running if trial.id not in known), None)

    def _next(self) -> Trial | None:
        """A new trial, None while the policy thinks, or when it has nothing."""
        if self.study.queue:
            return next(iter(self.study.ask(1)), None)
        if self._thought is None:
            draft = None if self._nothing else self.study.draft(1)
            if draft is None:
                return None
            self._thought = _Thought(draft)
        thought = self._thought
        thought.join(BLINK if self._live else None)
        if thought.is_alive():
            return None
        self._thought = None
        trials = self.study.adopt(thought.draft, thought.answer())
        if trials is None:  # others were made in the meantime
            return self._next()
        self._nothing = not trials
        return next(iter(trials), None)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A report, after which the trial goes on."""
        if self.shared.report(trial_id, result) is not None:
            self._seen[trial_id] = result[STEP]

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial, whoever ended it; a second end, of a trial that Tune ran again, is dropped."""
        trial, seen = self.shared.trial(trial_id), self._seen.pop(trial_id, None)
        self._live.pop(trial_id, None)
        self._nothing = False
        if trial is None:
            return
        step = (result or {}).get(STEP)
        silent = result is not None and step is None
        if error or silent:
            what = (
                "returned and had reported nothing" if silent else "failed; its folder has an error.txt that says why"
            )
            if trial.status == "running":
                self.study.fail(trial.id, f"Tune's trial {trial_id} {what}.")
            return
        if step is None:  # ended while it was paused
            reported = trial.reports[-1] if trial.reports else None
            metrics = dict(reported.metrics) if reported else {}
            whole = reported is not None and self._is_whole(reported.step)
        else:
            assert result is not None
            metrics = self.shared.metrics(result)
            # A trial that returns makes Tune show its last report once more; after a restore, one from before it.
            returned = step == seen or (seen is None and result.get("timestamp", math.inf) < int(self._since))
            whole = returned or self._is_whole(step)
            if not returned:
                self.shared.report(trial_id, result)
        seconds = (result or {}).get("time_total_s")
        if trial.status == "running" and whole:
            self._tell(trial, metrics, seconds)
        elif trial.status == "running":
            reports = self.study.trial(trial.id).reports
            made = step or (reports[-1].step if reports else 0)
            self.study.stop(trial.id, seconds, made / self.steps if self.steps and made else None)
            self._hint(step)
        elif trial.status == "failed" and whole and not self.study.objective.missing(metrics):
            # It failed, and Tune ran it again: the result is kept as that of a run made elsewhere.
            self.shared.name(trial_id, self.study.add(trial.config, metrics, trial.scale).id)

    def _is_whole(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def _tell(self, trial: Trial, metrics: Mapping[str, float], seconds: float | None) -> None:
        if absent := self.study.objective.missing(metrics):
            has = f"it has {sorted(metrics)}"
            self.study.fail(trial.id, f"The last report has no metric {absent}, which the objective needs; {has}.")
        else:
            self.study.tell(trial.id, metrics, seconds)

    def _hint(self, step: int | None) -> None:
        self._ended += 1
        if self._ended == HINT and self.steps is None and not any(t.status == "finished" for t in self.study.trials):
            log.warning(
                "Tune has ended %d trials of %s, the last after %s reports, and none returned by itself: they are kept "
                "as stopped, without a result. If that is a whole run, say so by StudySearch(..., steps=%s).",
                HINT,
                self.study.folder,
                step,
                step,
            )

    def add_evaluated_point(
        self,
        parameters: Mapping[str, Any],
        value: float,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """A run made elsewhere, by its configuration (a "scale" in it is its scale) and the objective's one metric.

        One that is there already is not added again, one that failed or was pruned has no result and is left out.
        ValueError when the objective has several metrics (`study.add` takes them), or the space refuses the parameters.
        """
        study = self.study
        if len(study.objective.metrics) > 1:
            raise ValueError(
                f"An evaluated point has one value, and {study.objective} needs {list(study.objective.metrics)}; add "
                "the run by study.add(config, metrics)."
            )
        if error or pruned:
            log.info("A point that %s is left out: it has no result.", "failed" if error else "was pruned")
            return
        config = _flat(study.space, parameters)
        metrics = {study.objective.metrics[0]: float(value)}
        at = study.top
        if study.space.fidelity is not None and "scale" in parameters:
            at = study.space.fidelity.scale(parameters["scale"], beyond=True)
        written = study.space.to_json(study.space.validate(config))
        for other in study.trials:
            same = other.source == "added" and other.scale == at and repr(other.metrics) == repr(metrics)
            if same and study.space.to_json(other.config) == written:
                return
        study.add(config, metrics, at)

    def save(self, checkpoint_path: str) -> None:
        """What a restored run needs to find the study, as JSON: it is read back without unpickling anything."""
        study = {"study": str(self.shared.folder), "identity": self.shared.identity}
        Path(checkpoint_path).write_text(json.dumps({**study, "live": self._live}))

    def restore(self, checkpoint_path: str) -> None:
        """Go on with the study as it is now, and with the trials that Tune knew when it saved."""
        saved = json.loads(Path(checkpoint_path).read_bytes())
        self.shared.check(saved["identity"])
        live: dict[str, int] = saved["live"]
        self._begin({tune: id for tune, id in live.items() if self.study.trial(id).status == "running"})


class _Thought(threading.Thread):
    """A policy's answer in the making; a daemon, so that it holds up nobody who ends."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(name="proposal", daemon=True)
        self.draft = draft
        self._proposals: tuple[Proposal, ...] = ()
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._proposals = self.draft.proposals()
        except Exception as error:
            self._error = error

    def answer(self) -> tuple[Proposal, ...]:
        if self._error is not None:
            raise self._error
        return self._proposals


def _flat(space: Space, nested: Mapping[str, Any]) -> dict[str, Any]:
    """What a config of Tune holds of the parameters of a space."""
    flat: dict[str, Any] = {}
    for name in {place.name for place in space.placed}:
        value: Any = nested
        for part in name.split("/"):
            value = value[part] if isinstance(value, Mapping) and part in value else _ABSENT
        if value is not _ABSENT:
            flat[name] = value
    return flat


_ABSENT = object()


def _check_space(space: Space, config: Mapping[str, Any]) -> None:
    """ValueError unless a param_space holds constants of its own, and what the study searches as the study does."""
    for key, entry in config.items():
        domains = isinstance(entry, sample.Domain) or (isinstance(entry, Mapping) and _has_domain(entry))
        names = {place.name for place in space.placed if place.name == key or place.name.startswith(f"{key}/")}
        if not domains and names:
            raise ValueError(
                f"param_space fixes {key!r}, which the study searches; leave it out, or make it a new study."
            )
        if not domains:
            continue  # a constant, which the trainable gets beside what is proposed
        if not names:
            raise ValueError(
                f"param_space searches {key!r}, which the study's space does not have; it has "
                f"{[place.name for place in space.placed]}. Leave param_space out, or make a study with "
                "integrations.ray_space.from_ray(param_space)."
            )
        given = from_ray({key: entry}).parameters
        for name, parameter in given.items():
            if space.parameters.get(name) != parameter:
                raise ValueError(
                    f"param_space has {name!r} as {parameter}, and the study as {space.parameters.get(name)}; leave it "
                    "out of param_space."
                )


def _has_domain(entry: Mapping[str, Any]) -> bool:
    return "grid_search" in entry or any(
        isinstance(value, sample.Domain) or (isinstance(value, Mapping) and _has_domain(value))
        for value in entry.values()
    )
