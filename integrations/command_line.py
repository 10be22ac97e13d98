"""The command `windtunnel`: run a training file, resume a study, look at one, stop one."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bo import Function, JournalError, Pareto, Study, TrainingBroken, Trial, journal, ports, run
from bo.checkpoint import private, whole
from bo.events import metrics_to_json
from bo.ports import Executor
from bo.retention import RULES
from bo.run import request_stop
from integrations import doctor, prior_files
from integrations.describe import best_words, config_table, number, open_words, plan_words, scale_words, status, summary
from integrations.masking import masked_words, secrets_among
from integrations.progress import Progress
from integrations.training_file import Loaded, TrainingFile

if TYPE_CHECKING:
    from integrations.store import Store

DIAGNOSED = "diagnostics.json"  # what `windtunnel diagnose` found, in the study's folder
KEPT = "training_file.py"  # the training file as it was run, in the study's folder
RUNS = "runs.jsonl"  # how each run was started, in the study's folder
REASONS = {
    "limits": "The limits are reached.",
    "hours": "The hours are over.",
    "target": "The target is reached.",
    "patience": "No improvement for as long as was asked.",
    "stopped": "Stopped on request.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when it did what was asked, 1 for a problem named on stderr, 2 for wrong usage, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = words[words.index("--") + 1 :] if "--" in words else []
    options = parser().parse_args(words[: words.index("--")] if "--" in words else words)
    options.args = tuple(args)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, JournalError, TrainingBroken) as error:
        print(f"windtunnel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("windtunnel", description="Tune large training runs by flying small ones first.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, what: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what)
        made.set_defaults(command=command)
        return made

    start = add("run", "run a sweep of FILE, which defines space, objective and train; -- ARGS go to FILE", _run)
    start.add_argument("file", metavar="FILE", type=Path)
    start.add_argument("--study", metavar="DIR", type=Path, help="the study's folder (default: studies/<name of FILE>)")
    start.add_argument("--seed", type=int, default=None, help="of a new study (default: 0)")
    start.add_argument("--policy", choices=sorted(ports.POLICIES), help="of a new study (default: ladder with scales)")
    start.add_argument(
        "--prior",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="a finished study to learn from, ours or of Optuna, Ax, Ray Tune or CSV; may be given again",
    )
    start.add_argument("--plan", action="store_true", help="print what would be run where, and run nothing")
    again = add("resume", "go on with the study in DIR from where it is", _resume)
    again.add_argument("dir", metavar="DIR", type=Path)
    again.add_argument("--file", metavar="FILE", type=Path, help="the training file, where it is not where it was")
    for command in (start, again):
        command.add_argument("--trials", type=int, metavar="N", help="total number of trials, at every scale together")
        command.add_argument("--budget", type=float, metavar="B", help="total compute, in runs at the target scale")
        command.add_argument("--hours", type=float, metavar="H", help="start no trial later than this")
        command.add_argument("--target", type=float, metavar="V", help="stop when the objective is this good")
        command.add_argument(
            "--patience", type=int, metavar="N", help="stop after N target results without a better one"
        )
        command.add_argument("--workers", type=int, metavar="N", help="trials at a time (default: one a core)")
        command.add_argument("--executor", choices=sorted(ports.EXECUTORS), default="ray", help="(default: ray)")
        command.add_argument(
            "--ray",
            metavar="ADDRESS",
            help="a running Ray cluster (default: RAY_ADDRESS, else a local one for this run)",
        )
        command.add_argument(
            "--store", metavar="URL", help="keep checkpoints and a copy of the journal there (s3://...)"
        )
        command.add_argument(
            "--keep", choices=sorted(RULES), default="target", help="whose checkpoints stay at their end"
        )
        command.add_argument("--isolate", action="store_true", help="with ray: a process of its own for every trial")
        command.add_argument("--accept-changes", action="store_true", help="go on although FILE has changed")

    for name, what, command_of in (
        ("status", "where the study in DIR stands", _status),
        ("best", "the best told configuration, or the front of several objectives", _best),
        ("recommend", "the configuration that the model believes best, tried or not", _recommend),
        ("diagnose", "how well the model of the study in DIR predicts, and what matters", _diagnose),
        ("report", "write what the study in DIR found and cost as one HTML page", _report),
        ("doctor", "look for what is wrong with the study in DIR, or would stop it", _doctor),
        ("stop", "end the driver of the study in DIR, or one of its trials", _stop),
    ):
        command = add(name, what, command_of)
        command.add_argument("dir", metavar="DIR", type=Path)
        if name not in ("stop", "doctor"):
            command.add_argument("--file", metavar="FILE", type=Path, help="run FILE for the functions that DIR needs")
        if name in ("best", "recommend"):
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "recommend":
            command.add_argument("--tried", action="store_true", help="the best of those that ran, by the model")
        if name in ("recommend", "diagnose"):
            command.add_argument("--at", metavar="AXIS=VALUE,...", help="a scale, such as params=1e9,tokens=2e10")
        if name == "stop":
            command.add_argument("--trial", type=int, metavar="ID", help="end this trial alone, at its next report")
    return top


# ------------------------------------------------------------------------------------------------------- run, resume


def _run(options: argparse.Namespace) -> int:
    file = TrainingFile(options.file, options.args)
    if hidden := secrets_among(file.args):
        raise ValueError(
            f"The arguments of {file.path} hold what looks like a secret ({' '.join(hidden)}), and the journal would "
            "keep them; hand it to the training function in an environment variable."
        )
    loaded = file.load()
    folder = options.study or Path("studies") / options.file.stem
    executor = _executor(options, loaded)
    with tempfile.TemporaryDirectory() as aside:
        # What the store has is looked at there: a study that is only planned, or refused, leaves nothing behind.
        fetched = _fetch(options, folder, Path(aside) / "study")
        at = Path(aside) / "study" if fetched else folder
        there = Study.open(at) if journal.exists(at) else None
        try:
            if there and there.training is not None:
                _check_unchanged(file, at, there.training, options)
            seed = options.seed if options.seed is not None else there.seed if there else 0
            policy = options.policy or (there.policy_name if there else loaded.policy)
            limits = _limits(options, loaded, there.limits if there else ports.Limits())
            baseline = None if loaded.baseline is None else loaded.space.validate(loaded.baseline)
            # Settings are those of the file's policy; another one from the command line has none.
            settings = loaded.settings if policy == loaded.policy else None
            if options.plan:
                return _plan(loaded, policy, settings, there, limits, baseline)
            made = partial(
                Study.open_or_create,
                space=loaded.space,
                objective=loaded.objective,
                seed=seed,
                policy=policy,
                settings=settings,
                stopping=loaded.stopping,
            )
            if fetched:
                made(at)
        except (ValueError, journal.JournalError) as error:
            if not fetched:
                raise
            why = str(error).replace(str(at), "it")
            raise ValueError(f"{_store(options)} holds a study that this would go on with. {why}") from error
    if _fetch(options, folder, folder):
        print(f"{folder} is fetched from {_store(options)}.")
    with made(folder) as study:
        study.lock()
        print(
            f"Going on with {folder}, which has {len(study.trials)} trials." if there else f"A new study in {folder}."
        )
        for path in options.prior:
            print(study.add_prior(prior_files.read(path, study.space, study.objective)).words())
        return _drive(study, file, executor, limits, options, baseline)


def _plan(
    loaded: Loaded,
    policy: str | None,
    settings: Mapping[str, Any] | None,
    there: Study | None,
    limits: ports.Limits,
    baseline: Mapping[str, Any] | None,
) -> int:
    """Print what a run would do; nothing is written, so the study is one in a folder that is thrown away."""
    if there is not None:
        with_space = Study.open(there.folder, space=loaded.space, objective=loaded.objective)
        planned = with_space.plan(limits)
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            Study.create(
                Path(folder) / "study", loaded.space, objective=loaded.objective, policy=policy, settings=settings
            ) as study,
        ):
            if baseline is not None:
                study.enqueue(baseline)
            planned = study.plan(limits)
    print("This policy makes no plan." if planned is None else plan_words(planned))
    return 0


def _resume(options: argparse.Namespace) -> int:
    if options.args:
        raise ValueError("resume takes no -- ARGS; the study remembers those it was launched with.")
    if _fetch(options, options.dir, options.dir):
        print(f"{options.dir} is fetched from {_store(options)}.")
    recorded = Study.open(options.dir).training
    if recorded is None:
        raise ValueError(f"{options.dir} was not launched by `windtunnel run FILE`; run it with its FILE and --study.")
    path = options.file or Path(recorded["file"])
    if not path.is_file():
        raise ValueError(f"The training file {path} is not on this machine; say where it is by --file FILE.")
    file = TrainingFile(path, tuple(recorded["args"]))
    _check_unchanged(file, options.dir, recorded, options)
    loaded = file.load()
    executor = _executor(options, loaded)
    with Study.open(options.dir, space=loaded.space, objective=loaded.objective) as study:
        limits = _limits(options, loaded, study.limits)
        study.lock()
        return _drive(study, file, executor, limits, options, None)


def _drive(
    study: Study,
    file: TrainingFile,
    executor: Executor,
    limits: ports.Limits,
    options: argparse.Namespace,
    baseline: Mapping[str, Any] | None,
) -> int:
    """Run a study that this process drives already."""
    study.launched_from(str(file.path), file.sha256, file.args)
    with open(study.folder / KEPT, "wb", opener=private) as kept:
        kept.write(file.source)
    _remind(study.folder, options)
    _note_run(study.folder, file.path, _how(options))
    if baseline is not None and not study.trials and not study.queue:
        study.enqueue(baseline)
    if (prepare := file.load().prepare) is not None:
        prepare()
    if (planned := study.plan(limits)) is not None:
        print(plan_words(planned))
    progress = Progress(study)
    try:
        with contextlib.ExitStack() as mirrored, terminable() as dismissed:
            mirror = None
            if store := _store(options):
                from integrations.journal_mirror import Mirror

                mirror = mirrored.enter_context(Mirror(study.folder, store))
            reason = run(
                study,
                file.train,
                executor=executor,
                n_trials=limits.n_trials,
                budget=limits.budget,
                hours=options.hours,
                target=options.target,
                patience=options.patience,
                watch=progress,
                keep=options.keep,
                forget=None if mirror is None else mirror.forget,
                leave=dismissed,
            )
    except KeyboardInterrupt:
        progress.close()
        print(
            f"\nInterrupted; every result is safe. windtunnel resume {study.folder}{_how(options, ends=True)} goes on."
        )
        return 130
    finally:
        progress.close()
    print(REASONS[reason])
    print(summary(study, _how(options)))
    return 0


@contextlib.contextmanager
def terminable() -> Iterator[Callable[[], bool]]:
    """SIGTERM, which schedulers send some time before they kill, is as Ctrl-C; yields what says whether it came."""

    came: list[int] = []

    def dismiss(number: int, _: object) -> None:
        came.append(number)  # what is raised may come out of a library as another KeyboardInterrupt
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where nobody may handle signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, dismiss)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _limits(options: argparse.Namespace, loaded: Loaded, was: ports.Limits) -> ports.Limits:
    """The study's totals: what is asked for now, else what it had, else what the file says."""
    asked = ports.Limits(options.trials, options.budget)
    if asked == was == ports.Limits():
        asked = ports.Limits(loaded.n_trials, loaded.budget)
    ends = (options.hours, options.target, options.patience)
    if asked == was == ports.Limits() and all(end is None for end in ends):
        raise ValueError("A sweep needs an end: give --trials, --budget, --hours, --target or --patience.")
    return asked


def _executor(options: argparse.Namespace, loaded: Loaded) -> Executor:
    """The executor asked for, with those of the options that it takes."""
    made = ports.load(ports.EXECUTORS, options.executor, "executor")
    takes = inspect.signature(made).parameters
    given: dict[str, Any] = {"address": options.ray, "workers": options.workers, "isolate": options.isolate or None}
    for name, value in given.items():
        if value is not None and name not in takes:
            option = "--ray" if name == "address" else f"--{name}"
            words = option if value is True else f"{option} {value}"
            raise ValueError(f"{words} does not go with --executor {options.executor}.")
    given["store"] = _store(options)
    given["resources"] = loaded.resources
    executor: Executor = made(**{name: value for name, value in given.items() if name in takes})
    return executor


def _store(options: argparse.Namespace) -> Store | None:
    """The store asked for; fsspec is loaded only where there is one."""
    if not options.store:
        return None
    from integrations.store import Store

    return Store(options.store)


def _fetch(options: argparse.Namespace, folder: Path, to: Path) -> bool:
    """Whether the folder has no study and the store has one, which lies in `to` now: it was moved here."""
    if journal.exists(folder) or (store := _store(options)) is None:
        return False
    from integrations.journal_mirror import fetched

    return fetched(store, to)


def _how(options: argparse.Namespace, ends: bool = False) -> str:
    """The options that a resume has to repeat, as words; ends: also those of its end, which no journal has."""
    default = options.executor == "ray"
    words = [
        ("--executor", None if default else options.executor),
        ("--ray", options.ray),
        ("--workers", options.workers),
        ("--store", _store(options)),
        ("--keep", None if options.keep == "target" else options.keep),
        ("--isolate", "" if options.isolate else None),
    ]
    if ends:
        words += [("--hours", options.hours), ("--target", options.target), ("--patience", options.patience)]
    return "".join(
        f" {option} {shlex.quote(str(value))}" if value != "" else f" {option}"
        for option, value in words
        if value is not None
    )


def _last_how(folder: Path) -> str:
    """The options that a resume of the study in `folder` has to repeat; nothing where they are not known."""
    try:
        return str(json.loads((folder / RUNS).read_text(encoding="utf-8").splitlines()[-1])["resume"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _remind(folder: Path, options: argparse.Namespace) -> None:
    """Say which options the last run had that this one has not: a study may leave its store or cluster unawares."""
    before, now = _last_how(folder), shlex.split(_how(options))
    if lacking := [word for word in shlex.split(before) if word.startswith("--") and word not in now]:
        print(f"The last run had {', '.join(lacking)}, this one has not; as before: windtunnel resume {folder}{before}")


def _check_unchanged(
    file: TrainingFile, folder: Path, recorded: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """A changed training file makes other measurements; going on with it is the user's decision."""
    differences = []
    if file.sha256 != recorded["sha256"]:
        differences.append(_diff(file, folder / KEPT))
    if list(file.args) != list(recorded["args"]):
        differences.append(f"ARGS were {shlex.join(recorded['args'])!r} and are {shlex.join(file.args)!r}")
    if differences and not options.accept_changes:
        raise ValueError(
            f"{file.path} is not what the study was run with: {'; '.join(differences)}\n"
            "Take the change back, or go on with --accept-changes."
        )


def _diff(file: TrainingFile, kept: Path) -> str:
    if not kept.exists():
        return "its content differs"
    was, now = kept.read_text().splitlines(), file.source.decode().splitlines()
    lines = list(difflib.unified_diff(was, now, "as it was run", "as it is now", lineterm="", n=0))
    return "its content differs:\n" + "\n".join(lines[:20])


def _note_run(folder: Path, file: Path, how: str) -> None:
    """Add versions, commit and command line to `runs.jsonl`; not to the journal, since they decide nothing."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        asked = ["git", "-C", str(file.parent), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    note = {
        "at": time.time(),
        "command": [Path(sys.argv[0]).name, *masked_words(sys.argv[1:])],
        "resume": how,
        "commit": commit or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": doctor.versions("windtunnel", "numpy", "torch", "botorch", "ray"),
    }
    with open(folder / RUNS, "a", encoding="utf-8", opener=private) as runs:
        runs.write(json.dumps(note) + "\n")


# ------------------------------------------------------------------------------------- status, best, recommend, stop


def _status(options: argparse.Namespace) -> int:
    driver = journal.holder(options.dir) if journal.in_use(options.dir) else None
    study = Study.open(options.dir)
    if isinstance(study.objective, Function):
        with contextlib.suppress(ValueError):  # where things stand is told without it, too
            study = _with_functions(options)
    print(status(study, driver, _last_how(options.dir)))
    return 0


def _best(options: argparse.Namespace) -> int:
    study = _with_functions(options)

    def plain(trial: Trial) -> dict[str, Any]:
        metrics = metrics_to_json(trial.metrics or {}, ())
        return {"trial": trial.id, "config": study.space.to_json(trial.config), "metrics": metrics}

    if not options.json:
        print(best_words(study))
    elif isinstance(study.objective, Pareto):
        print(json.dumps([plain(trial) for trial in study.front()]))
    else:
        best = study.best()
        print(json.dumps(best and plain(best)))
    return 0


def _recommend(options: argparse.Namespace) -> int:
    study = _with_functions(options)
    if isinstance(study.objective, Pareto):
        many = len(study.objective.parts)
        raise ValueError(
            f"No configuration is the best of {many} objectives; windtunnel best {options.dir} shows the front."
        )
    found = study.recommend(_scale(options.at) if options.at else None, tried=options.tried)
    shown = study.objective.shown
    interval = None if found.low is None or found.high is None else sorted((shown(found.low), shown(found.high)))
    if options.json:
        mean = None if found.mean is None else shown(found.mean)
        answer = {"config": study.space.to_json(found.config), "mean": mean, "interval": interval, "note": found.note}
        more = {"trial": found.trial, "intervals": found.intervals, "options": found.options}
        print(json.dumps({**answer, **more, "guess": found.guess, "trust": found.trust}))
        return 0
    where = scale_words(found.scale)
    which = "" if found.trial is None else f", trial {found.trial}"
    print("Recommended" + which + (f" at {where}" if where else ""))
    print(config_table(found.config))
    if found.mean is not None and interval is not None:
        print(f"  expected  {number(shown(found.mean))} (90% interval {number(interval[0])} to {number(interval[1])})")
    for line in open_words(found):
        print(line)
    for name, words in (("guess", found.guess), ("elsewhere", found.trust), ("note", found.note)):
        if words:
            print(f"  {name:<9} {words}")
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from bo import analysis  # torch, which no other command that only looks needs

    study = _with_functions(options)
    fidelity = study.space.fidelity
    if options.at and fidelity is None:
        raise ValueError(f"--at {options.at} names a scale, but the space of {options.dir} has none; leave it out.")
    scale = fidelity.scale(_scale(options.at), beyond=True) if fidelity and options.at else None
    surrogate = study.settings.get("surrogate", "gp")
    history, objective = study.history(), study.objective
    histories = [history]
    if isinstance(objective, Pareto):  # each by itself, under the limits of all
        alone = [replace(part, subject_to=objective.subject_to) for part in objective.parts]
        histories = [replace(history, objective=part, memory={}) for part in alone]
    found = [analysis.diagnose(each, scale, np.random.default_rng(study.seed), surrogate) for each in histories]
    stored = [each.to_json() for each in found]
    kept = options.dir / DIAGNOSED
    text = json.dumps(stored if isinstance(objective, Pareto) else stored[0], indent=1)
    with whole(kept) as partial, open(partial, "w", encoding="utf-8", opener=private) as file:
        file.write(text + "\n")
    for part, each in zip(objective.parts, found, strict=True):
        print(f"{part}: {each.words()}" if isinstance(objective, Pareto) else each.words())
    print(f"Files: {kept} has every number.")
    return 0


def _report(options: argparse.Namespace) -> int:
    from integrations import report  # draws, which no other command needs

    study = _with_functions(options)
    path = report.write(study, report.load_diagnosed(options.dir / DIAGNOSED))
    print(f"{path} has the report; open it in a browser.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.examine(options.dir)
    for each in found:
        print(f"{each.verdict:<5} {each.words}")
    return 1 if any(each.verdict == "bad" for each in found) else 0


def _with_functions(options: argparse.Namespace) -> Study:
    """The study; functions among its constraints and objectives are those of --file, known by their hash.

    Never of the file that the journal names: whoever made a study could have its reader run anything.
    """
    study = Study.open(options.dir)
    if options.file is None:
        needed = study.space.lacking if options.command is not _best else ()
        if needed or (isinstance(study.objective, Function) and study.objective.lacking):
            where = f", such as {study.training['file']}" if study.training else ""
            raise ValueError(f"{options.dir} needs functions of its training file; name it by --file FILE{where}.")
        return study
    loaded = TrainingFile(options.file, tuple(study.training["args"]) if study.training else ()).load()
    return Study.open(options.dir, space=loaded.space, objective=loaded.objective)


def _scale(text: str) -> dict[str, float | str]:
    scale: dict[str, float | str] = {}
    for part in text.split(","):
        axis, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not value:
            raise ValueError(f"--at needs AXIS=VALUE pairs such as params=1e9,tokens=2e10, got {part!r}.")
        try:
            scale[axis] = float(value)
        except ValueError:
            scale[axis] = value  # the label of a rung
    return scale


def _stop(options: argparse.Namespace) -> int:
    study = Study.open(options.dir)
    if options.trial is not None and study.trial(options.trial).status != "running":
        raise ValueError(f"Trial {options.trial} is {study.trial(options.trial).status} already.")
    if not journal.in_use(options.dir):
        if options.trial is None:
            raise ValueError(f"{options.dir} has no driver now, so there is nothing to stop.")
        with study:
            study.stop(options.trial)
        print(f"Trial {options.trial} is recorded as stopped; a resume does not go on with it.")
        return 0
    request_stop(options.dir, options.trial)
    if options.trial is not None:
        print(f"Trial {options.trial} ends at its next report.")
        return 0
    for _ in range(240):
        if not journal.in_use(options.dir):
            print(f"Stopped; windtunnel resume {options.dir}{_last_how(options.dir)} goes on.")
            return 0
        time.sleep(0.25)
    print(f"Asked to stop; {journal.holder(options.dir)} still ends its work.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
