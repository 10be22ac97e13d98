"""A function of the user's as it can be stored: where it is defined and the hash of its source, never its code."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StoredFunction:
    """Equal when the sources are. What is stored is never run: the function itself has to be handed in again."""

    reference: str = field(compare=False)
    """module:function"""
    sha256: str
    function: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)
    """None when read from JSON and not handed in."""

    @classmethod
    def of(cls, function: object, what: str) -> "StoredFunction":
        """`what` it is, for errors: "The cost function", say."""
        if not inspect.isfunction(function):
            raise ValueError(f"{what} must be a function, got {function!r}.")
        reference = f"{function.__module__}:{function.__qualname__}"
        try:
            source = inspect.getsource(function)
        except OSError:
            raise ValueError(
                f"{what} {reference} has no source file, so a study could not tell whether it changed; "
                "define it in a file."
            ) from None
        return cls(reference, hashlib.sha256(source.encode()).hexdigest(), function)
