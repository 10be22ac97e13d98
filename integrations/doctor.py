"""What is wrong with a study's folder, or would stop its next run, in one line each; changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from bo import JournalError, Study, journal
from bo.ports import ELSEWHERE

ROOM = 1e9  # bytes of a disk that a sweep should find free
WRONG = 0.5  # share of ended trials that failed, from which on it is the code and not a configuration


@dataclass(frozen=True)
class Finding:
    """ok: as it should be; note: worth knowing; bad: a run would stop, or has lost something."""

    verdict: Literal["ok", "note", "bad"]
    words: str


def examine(folder: Path) -> list[Finding]:
    """Everything that was looked at, in the order in which a run would meet it."""
    return list(_examine(folder))


def _examine(folder: Path) -> Iterator[Finding]:
    path = folder / journal.NAME
    try:
        study = Study.open(folder)
        whole = journal.read(path)[1]
    except (JournalError, ValueError) as error:
        yield Finding("bad", str(error))
        return
    if torn := path.stat().st_size - whole:
        yield Finding("note", f"{path} ends in a torn line of {torn} bytes, which the next change drops.")
    yield Finding("ok", f"{path} is whole: {len(study.trials)} trials, {whole} bytes.")
    yield from _access(folder)
    yield from _driver(folder, study)
    yield from _trials(folder, study)
    yield from _training(folder, study)
    yield from _versions()


def _access(folder: Path) -> Iterator[Finding]:
    if not os.access(folder, os.W_OK):
        yield Finding("bad", f"{folder} cannot be written by you; a run needs a folder you own.")
    elif not os.access(folder / journal.NAME, os.W_OK):
        yield Finding("bad", f"{folder / journal.NAME} cannot be written by you; a run needs to add to it.")
    free = shutil.disk_usage(folder).free
    room = "" if free >= ROOM else "; checkpoints may not fit"
    yield Finding("note" if room else "ok", f"Its disk has {free / 1e9:.1f} GB free{room}.")
    for each in (folder, folder / journal.NAME):
        if each.stat().st_mode & stat.S_IWOTH:
            words = f"{each} can be changed by every user of this machine; take that right away (chmod o-w)."
            yield Finding("bad", words)


def _driver(folder: Path, study: Study) -> Iterator[Finding]:
    if journal.in_use(folder):
        yield Finding("ok", f"It is driven by {journal.holder(folder)}.")
    elif study.running:
        ids = ", ".join(str(trial.id) for trial in study.running[:5])
        yield Finding("note", f"No driver, and {len(study.running)} trials were left running ({ids}); resume goes on.")
    else:
        yield Finding("ok", "No driver, and no trial was left running.")


def _trials(folder: Path, study: Study) -> Iterator[Finding]:
    ended = [trial for trial in study.ended if trial.source not in ELSEWHERE]
    failed = [trial for trial in ended if trial.status == "failed"]
    diverged = [trial for trial in ended if trial.status == "diverged"]
    if failed:
        bad = len(failed) > WRONG * len(ended)
        words = (
            f"{len(failed)} of {len(ended)} ended trials failed, the last, trial {failed[-1].id}: {failed[-1].error}"
        )
        yield Finding("bad" if bad else "note", words)
    if len(diverged) > WRONG * max(1, len(ended)):
        yield Finding("note", f"{len(diverged)} of {len(ended)} ended trials diverged; the space may be too wide.")
    lost = sum(trial.attempt - 1 for trial in study.trials)
    if lost:
        yield Finding("note", f"Workers were lost {lost} times; their trials went on from their checkpoints.")
    if (folder / "trials").is_dir():
        size = sum(each.stat().st_size for each in (folder / "trials").rglob("*") if each.is_file())
        yield Finding("ok", f"Checkpoints and logs of its trials take {size / 1e9:.2f} GB.")


def _training(folder: Path, study: Study) -> Iterator[Finding]:
    if study.training is None:
        return
    file = Path(study.training["file"])
    if not file.is_file():
        yield Finding("note", f"Its training file {file} is not on this machine; put it there to resume.")
    elif hashlib.sha256(file.read_bytes()).hexdigest() != study.training["sha256"]:
        yield Finding("note", f"Its training file {file} has changed since; resume needs --accept-changes.")
    else:
        yield Finding("ok", f"Its training file {file} is as it was.")


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each; "absent" where there is none."""
    found = dict.fromkeys(packages, "absent")
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _versions() -> Iterator[Finding]:
    found = [" ".join(each) for each in versions("windtunnel", "torch", "botorch", "ray").items()]
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    yield Finding(
        "ok", f"{', '.join(found)}; RAY_AUTH_MODE {mode}, RAY_ADDRESS {os.environ.get('RAY_ADDRESS', 'not set')}."
    )
