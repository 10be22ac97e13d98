"""What can happen to a study: named kinds of events, and how one becomes a checksummed line of text and back.

Kinds are only ever added: a journal written today is readable by every later version. A line is one JSON object; its
last member is the CRC-32 of everything before it, so a line that was torn or altered is recognised.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

#: kind -> its members beside "n" (line number, from 1), "at" (clock, seconds) and "kind"; "?" marks optional ones.
KINDS: dict[str, tuple[str, ...]] = {
    "created": ("version", "space", "objective", "seed", "policy", "settings", "stopping?"),
    "training": ("file", "sha256", "args"),
    "limits": ("n_trials", "budget"),
    "enqueued": ("config", "scale"),
    "proposed": (
        *("trial", "config", "scale", "seed", "cost", "source", "seen"),
        *("predicted?", "memory?", "note?", "wanted?"),
    ),
    "reported": ("trial", "attempt", "step", "metrics", "behind?"),
    "branched": ("trial", "attempt", "scale", "metrics"),
    "retried": ("trial", "attempt", "cause", "innocent?"),
    "finished": ("trial", "metrics", "seconds?"),
    "diverged": ("trial", "error", "metrics?", "seconds?"),
    "stopped": ("trial", "share?", "seconds?"),  # share of its run that it made; without it, it counts in full
    "failed": ("trial", "error", "traceback?", "seconds?"),
    "added": ("trial", "config", "scale", "metrics", "diverged?", "source?", "note?", "origin?", "study?"),
}

Event = dict[str, Any]


def event(kind: str, /, **members: Any) -> Event:
    """An event of a known kind with exactly its members; optional ones that are None are left out."""
    known = KINDS[kind]
    optional = {name[:-1] for name in known if name.endswith("?")}
    required = set(known) - {f"{name}?" for name in optional}
    if not required <= set(members) <= required | optional:
        raise ValueError(f"An event {kind!r} has members {known}, got {sorted(members)}.")
    return {"kind": kind} | {k: v for k, v in members.items() if not (k in optional and v is None)}


def to_line(n: int, at: float, happened: Event) -> bytes:
    """Line `n` of a journal, with its newline. Raises ValueError for what JSON cannot hold, a bare NaN too."""
    try:
        body = json.dumps({"n": n, "at": at, **happened}, separators=(",", ":"), allow_nan=False)[:-1].encode()
    except TypeError as error:
        raise ValueError(f"An event {happened['kind']!r} holds what JSON cannot: {error}.") from error
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def from_line(line: bytes) -> Event:
    """The event of a whole line, "n" and "at" included; ValueError when it is torn, altered or of an unknown kind."""
    body, mark, tail = line.rpartition(b',"crc":"')
    if not mark or len(tail) != 11 or tail[8:] != b'"}\n' or tail[:8] != b"%08x" % zlib.crc32(body):
        raise ValueError("its checksum does not hold")
    happened: Event = json.loads(body + b"}")
    if happened.get("kind") not in KINDS:
        raise ValueError(f"it is of an unknown kind {happened.get('kind')!r}, written by a newer version")
    return happened


def metrics_to_json(metrics: Mapping[str, float], decisive: tuple[str, ...]) -> dict[str, float | str | None]:
    """Metrics as JSON: what is not finite becomes text ("nan", "inf", "-inf") if decisive, null otherwise."""
    return {
        name: value if math.isfinite(value) else str(value) if name in decisive else None
        for name, value in metrics.items()
    }


def metrics_from_json(metrics: Mapping[str, float | str | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}
