"""What the imports of search spaces from other libraries share: ranges and options under the names they came with.

A range or a set of values is carried over exactly, or refused by its name. Of the distribution on it the axis is kept,
linear or logarithmic; how a library treats the ends and the rounding of integers is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from search_spaces import Choice, Fidelity, Integer, Real, Space
from search_spaces.parameter import Scalar, is_number, is_scalar, plain

#: The values of a stepped range that become the options of a Choice.
LARGEST_GRID = 256

#: Names that are arguments of Space, so no parameter can have them.
RESERVED = ("constraints", "fidelity")

_Made = TypeVar("_Made")


def space_of(parameters: Mapping[str, object], constraints: Sequence[object], fidelity: Fidelity | None) -> Space:
    """The space of these parameters; ValueError for a name that is an argument of `Space`."""
    refuse_reserved(parameters)
    return Space(constraints=constraints, fidelity=fidelity, **parameters)


def refuse_reserved(parameters: Mapping[str, object]) -> None:
    for name in RESERVED:
        if name in parameters:
            raise ValueError(f"{name!r} is an argument of Space and cannot name a parameter; rename it.")


def real(name: str, low: float, high: float, log: bool) -> Real | float:
    """A range of real numbers, ends included; the number itself where there is only one."""
    return float(low) if low == high else named(name, lambda: Real(low, high, log))


def whole(name: str, low: object, high: object, log: bool) -> Integer | int:
    """A range of whole numbers, ends included; the number itself where there is only one."""
    least, most = whole_number(name, low), whole_number(name, high)
    return least if least == most else named(name, lambda: Integer(least, most, log))


def whole_number(name: str, value: object) -> int:
    """A whole number, also one written as a float; ValueError for any other."""
    number = plain(value)
    if not is_number(number) or number != number // 1:  # NaN and infinities differ from their floor
        raise ValueError(f"{name} needs whole numbers, got {number!r}; a range of other numbers is one of reals.")
    return int(number)


def options(name: str, values: Iterable[object], *, ordered: bool = False) -> Choice | Scalar:
    """One of these values; the value itself where there is only one."""
    plain_values = [plain(value) for value in values]
    for value in plain_values:
        if not is_scalar(value):
            raise ValueError(
                f"{name} has the option {value!r}, which is no text, finite number, bool or None; name the options by "
                "texts and look up in the training function what they stand for."
            )
    if len(plain_values) == 1:
        only: Scalar = plain_values[0]
        return only
    return named(name, lambda: Choice(plain_values, ordered=ordered))


def grid(name: str, count: int, value: Callable[[int], float]) -> Choice | Scalar:
    """The `count` values of a stepped range, in their order; ValueError when they are too many to be options."""
    if count > LARGEST_GRID:
        raise ValueError(
            f"{name} has {count} steps and only {LARGEST_GRID} can be options; make it a range without steps and round "
            "in the training function."
        )
    if count < 1:
        raise ValueError(f"{name} has no step within its range; widen it.")
    return options(name, map(value, range(count)), ordered=True)


def named(name: str, make: Callable[[], _Made]) -> _Made:
    """What `make` makes; its ValueError then says which parameter it is about."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name} cannot be taken over: {error}") from None
