"""What configs of a space must satisfy together: inequalities between numbers, and functions for everything else.

    Space(..., constraints=["batch_size * accumulation <= 512", "64 * batch_size <= tokens / 1000", fits_in_memory])

An inequality is written as in Python, with the names of numeric parameters and scale axes. It holds for a config that
has all its names; where one belongs to an option that was not chosen it says nothing.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType
from typing import Any

import numpy as np

from search_spaces.parameter import Array
from search_spaces.stored import StoredFunction

#: How far left and right may be on the wrong side, relative to their size, in a config that a user hands in.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Inequality:
    """`left <= right` or `left >= right` between arithmetic expressions (+ - * / ** and parentheses)."""

    text: str
    """As Python writes it: equal texts are equal constraints."""
    names: tuple[str, ...] = field(compare=False)
    """What it speaks of, less what is known."""
    known: tuple[tuple[str, float], ...] = ()
    """Values of scale axes, once the scale is known."""
    low: str = field(default="", compare=False, repr=False)
    """The side that must be less, nothing but arithmetic."""
    high: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        known = ", ".join(f"{name}={value:.12g}" for name, value in self.known)
        return f"{self.text} at {known}" if known else self.text

    @classmethod
    def of(cls, text: str) -> "Inequality":
        """ValueError when the text is no inequality, or holds more than arithmetic."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"The constraint {text!r} is no expression of Python ({error.msg}).") from None
        if not isinstance(tree, ast.Compare):
            raise ValueError(f"The constraint {text!r} compares nothing; write 'left <= right' or 'left >= right'.")
        if len(tree.ops) > 1:
            raise ValueError(f"The constraint {text!r} is a chain; write two constraints.")
        if not isinstance(tree.ops[0], ast.LtE | ast.GtE):
            raise ValueError(
                f"The constraint {text!r} must compare by <= or >=; where two values must be equal, "
                "compute one from the other in the training function."
            )
        names: dict[str, None] = {}
        for side in (tree.left, tree.comparators[0]):
            _collect(text, side, names)
        if not names:
            raise ValueError(f"The constraint {text!r} names no parameter.")
        low, high = ast.unparse(tree.left), ast.unparse(tree.comparators[0])
        if isinstance(tree.ops[0], ast.GtE):
            low, high = high, low
        return cls(ast.unparse(tree), tuple(names), (), low, high)

    def given(self, values: Mapping[str, float]) -> "Inequality":
        """The same constraint once these names have values."""
        known = tuple((name, values[name]) for name in self.names if name in values)
        rest = tuple(name for name in self.names if name not in values)
        return Inequality(self.text, rest, (*self.known, *known), self.low, self.high)

    def sides(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        """(what must be less, what must be more) for a number, or an array, behind each name."""
        everything = {**dict(self.known), **values}
        return eval(_code(self.low), {}, everything), eval(_code(self.high), {}, everything)

    def excess(self, values: Mapping[str, Array]) -> Array:
        """(n,) how much too large the smaller side is, relative to the sides; at most 0 where it holds."""
        with np.errstate(all="ignore"):
            low, high = self.sides(values)
            excess: Array = (low - high) / (np.abs(low) + np.abs(high))
        # 0 <= 0 holds; what cannot be computed (a negative base, an overflow) does not.
        return np.where(low == high, 0.0, np.where(np.isfinite(excess), excess, 1.0))

    def holds(self, config: Mapping[str, Any], tolerance: float = 0.0) -> bool:
        """Whether a config satisfies it, exactly as Python computes it; True where it has not all the names."""
        if not all(name in config for name in self.names):
            return True
        try:
            low, high = self.sides(config)
            return bool(low <= high or low - high <= tolerance * (abs(low) + abs(high)))
        except (ArithmeticError, TypeError):  # a division by zero, an overflow, a root of a negative number
            return False

    def refuse(self, config: Mapping[str, Any]) -> str:
        """What a config that breaks it is told."""
        values = {**{name: config[name] for name in self.names}, **dict(self.known)}
        shown = ", ".join(f"{name}={value:.12g}" for name, value in values.items())
        return f"Config breaks the constraint {self.text} at {shown}."


@dataclass(frozen=True)
class Predicate:
    """A function config -> bool of the user's. It has to hold for every config that the space gives."""

    stored: StoredFunction

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        return self.stored.reference

    def holds(self, config: Mapping[str, Any]) -> bool:
        """ValueError when the function is not at hand, fails, or answers anything but True or False."""
        if self.stored.function is None:
            raise ValueError(f"The constraint {self.text} is not at hand; hand the space in with its functions.")
        try:
            answer = self.stored.function(dict(config))
        except Exception as error:
            raise ValueError(f"The constraint {self.text} raised {error!r} for the config {dict(config)}.") from error
        if not isinstance(answer, bool | np.bool_):
            raise ValueError(f"The constraint {self.text} must return True or False, got {answer!r}.")
        return bool(answer)

    def refuse(self, config: Mapping[str, Any]) -> str:
        return f"Config breaks the constraint {self.text}: {dict(config)}."


def as_constraint(given: object) -> Inequality | Predicate:
    """A constraint as users write it."""
    if isinstance(given, Inequality | Predicate):
        return given
    if isinstance(given, str):
        return Inequality.of(given)
    if callable(given):
        return Predicate(StoredFunction.of(given, "The constraint"))
    raise ValueError(f"A constraint must be a text such as 'a + b <= 1' or a function of a config, got {given!r}.")


def _collect(text: str, node: ast.expr, names: dict[str, None]) -> None:
    """Adds the names of an expression; ValueError for anything that is no arithmetic."""
    match node:
        case ast.Name():
            names[node.id] = None
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and math.isfinite(value):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            _collect(text, node.operand, names)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.Pow()):
            _collect(text, node.left, names)
            _collect(text, node.right, names)
        case _:
            raise ValueError(
                f"The constraint {text!r} holds {ast.unparse(node)!r}; there may be names, numbers and + - * / **, "
                "anything else is written as a function of the config."
            )


@lru_cache(maxsize=256)
def _code(expression: str) -> CodeType:
    """Of an expression that has passed `_collect`; kept apart from the constraint, which then can be pickled."""
    return compile(expression, "<constraint>", "eval")
