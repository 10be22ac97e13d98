"""Secrets kept out of what is written down: command lines, URLs, errors and their tracebacks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "***"
SHORTEST = 8  # a value of fewer characters would be found in ordinary words

_NAMES = re.compile(
    r"(token|secret|password|passwd|passphrase|credentials?|(api|access|secret|private|auth|account)[-_]?key(_id)?)$"
    r"|^-*key$",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"(bos|eos|pad|unk|mask|sep|cls|stop|start|end|special|per)[-_]?token$", re.IGNORECASE)
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,31}://)(?P<user>[^\s/@]*@|[^\s@:/]*:[^\s@]*@)?(?P<rest>[^\s?#'\"]*)", re.I
)
_QUERY = re.compile(r"(?<=[^\s?#'\"])[?#][^\s'\"]+")


def masked_urls(text: str) -> str:
    """`text` with user, password, query and fragment of every URL in it hidden."""
    shown, end = [], 0
    for found in _URL.finditer(text):
        if found.start() < end:
            continue
        shown += [text[end : found.start()], found["scheme"], f"{HIDDEN}@" if found["user"] else "", found["rest"]]
        end = found.end()
        if query := _QUERY.match(text, end):
            shown.append(f"?{HIDDEN}")
            end = query.end()
    return "".join(shown) + text[end:]


def masked(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` without the secrets in URLs, nor the values of environment variables that are named like secrets."""
    values = os.environ if environ is None else environ
    secrets = [value for name, value in values.items() if len(value) >= SHORTEST and _is_secret(name)]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return masked_urls(text)


def masked_words(words: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """The words of a command line, with the values of options that are named like secrets hidden as well."""
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = _is_secret(name) and (name.startswith("-") or bool(equals))
        if secret and equals:
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(HIDDEN if hide else masked(word, environ))
        hide = secret and not equals and not hide
    return shown


def secrets_among(words: Sequence[str]) -> list[str]:
    """The words of a command line that hold a secret, as they may be shown."""
    return [shown for word, shown in zip(words, masked_words(words), strict=True) if shown != word]


def _is_secret(name: str) -> bool:
    return bool(_NAMES.search(name)) and not _HARMLESS.search(name)
