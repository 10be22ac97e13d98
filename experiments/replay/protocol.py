"""How replays are counted: rows that are kept, runs to a tolerance, and intervals over targets.

A row is one search. Seeds are paired: all methods have the same proxies and the same first runs at one seed. What is
inferred about is the target (`Row.problem`): 90% intervals are of a bootstrap over targets, of all families together,
and then over the seeds of each. A search that has not got there after `cap` target runs counts cap + 1, which favours
the worse of two methods; how many these are is always said. `cost` is all that was paid, in target runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Statistic: TypeAlias = Callable[[Array], Array]
"""Means over targets (... x k quantities) -> what is asked of them (...)."""

RESAMPLES, LEVEL = 2000, 0.90
CHUNK = 100
Quantity = Literal["runs", "cost"]


@dataclass(frozen=True)
class Key:
    """What tells one search from all others. problem: the target. setting: which proxies there are, at what price."""

    problem: str
    method: str
    setting: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One search. regrets: of the best so far after each target run, in a unit that the tolerance shares.

    It may end before the cap where it is below every tolerance that is ever asked for. proxies: their number; cost:
    what they cost in target runs; seconds: CPU time of the search.
    """

    problem: str
    method: str
    setting: str
    seed: int
    regrets: tuple[float, ...]
    proxies: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "regrets", tuple(map(float, self.regrets)))
        if any(later > earlier for earlier, later in zip(self.regrets, self.regrets[1:], strict=False)):
            raise ValueError(f"regrets must be of the best so far and never grow, got {self.regrets}.")

    @property
    def key(self) -> Key:
        return Key(self.problem, self.method, self.setting, self.seed)

    def runs(self, tolerance: float, cap: int) -> int:
        """Target runs until the regret is at most `tolerance`; cap + 1 where that takes more than `cap`."""
        reached = next((i for i, regret in enumerate(self.regrets[:cap], 1) if regret <= tolerance), None)
        if reached is None and len(self.regrets) < cap:
            ended = f"{self.key} ends after {len(self.regrets)} runs above {tolerance:g}"
            raise ValueError(f"{ended}; it should go on to the cap, {cap}.")
        return reached or cap + 1

    def total(self, tolerance: float, cap: int) -> float:
        """What the search cost until there, proxies included, in target runs."""
        return self.runs(tolerance, cap) + self.cost


# -------------------------------------------------------------------------------------------------- rows that are kept


def load(*files: Path) -> dict[Key, Row]:
    """The rows of all files that exist; of two with one key the first counts. A line that a kill cut short is none."""
    rows: dict[Key, Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                row = Row(**json.loads(line))
            except json.JSONDecodeError:
                continue
            rows.setdefault(row.key, row)
    return rows


def append(file: Path, row: Row) -> None:
    """One write of one line, after the end of a line that a kill cut short."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    short = {name: _short(value) for name, value in asdict(row).items()}
    with file.open("a", encoding="utf-8") as end:
        end.write(("\n" if torn else "") + json.dumps(short, separators=(",", ":")) + "\n")


def _short(value: object) -> object:
    if isinstance(value, tuple):
        return [_short(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Job(Protocol):
    """A search that may be made. Hashable by its fields and picklable: a frozen dataclass at the top of a module."""

    @property
    def key(self) -> Key: ...

    def __call__(self) -> Row: ...


AnyJob = TypeVar("AnyJob", bound=Job)


def make(jobs: Iterable[AnyJob], file: Path, known: Mapping[Key, Row], workers: int = 1) -> Iterator[Row]:
    """Make the jobs that have no row yet, in their order, and append each row to the file as it comes.

    Each worker is a process with one thread; it keeps what its jobs cache. Can be stopped at any time.
    """
    missing = [job for job in jobs if job.key not in known]
    if workers == 1:
        single()
        for job in missing:
            row = job()
            append(file, row)
            yield row
    elif missing:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=single) as pool:
            for done in as_completed([pool.submit(job) for job in missing]):
                append(file, done.result())
                yield done.result()


def single() -> None:
    """One thread in this process."""
    import torch

    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- what they say


@dataclass(frozen=True)
class Contender:
    """A method under a setting, as a line of a table; target-only methods have one setting for all comparisons."""

    method: str
    setting: str
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.method


@dataclass(frozen=True)
class Interval:
    """A value with its 90% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(rows: Mapping[Key, Row], contenders: Sequence[Contender], read: Callable[[Row], float]) -> dict[str, Array]:
    """Problem -> seeds x contenders: what `read` says of the rows of the seeds that all contenders have there."""
    seeds: dict[str, list[set[int]]] = {}
    for place, contender in enumerate(contenders):
        for key in rows:
            if (key.method, key.setting) == (contender.method, contender.setting):
                seeds.setdefault(key.problem, [set() for _ in contenders])[place].add(key.seed)
    shared = {problem: sorted(set.intersection(*sets)) for problem, sets in seeds.items()}
    return {
        problem: np.array(
            [[read(rows[Key(problem, c.method, c.setting, seed)]) for c in contenders] for seed in shared[problem]]
        )
        for problem in sorted(shared)
        if shared[problem]
    }


def resampled(values: Mapping[str, Array], resamples: int = RESAMPLES) -> Array:
    """resamples x k means over targets, each redrawn, of means over their seeds, each redrawn; values: S_t x k each.

    The generator is seeded, so that equal rows give equal intervals.
    """
    rng, tables = np.random.default_rng(0), list(values.values())
    counts = np.array([len(table) for table in tables])
    padded = np.zeros((len(tables), counts.max(), tables[0].shape[1]))  # targets x seeds x k
    for place, table in enumerate(tables):
        padded[place, : len(table)] = table
    parts = []
    for start in range(0, resamples, CHUNK):
        targets = rng.integers(len(tables), size=(min(CHUNK, resamples - start), len(tables)))
        limit = counts[targets][..., None]
        drawn = rng.integers(limit, size=(*targets.shape, counts.max()))  # all of them below the limit
        kept = (np.arange(counts.max()) < limit) / limit
        parts.append(np.einsum("rtsk,rts->rk", padded[targets[..., None], drawn], kept) / len(tables))
    return np.concatenate(parts)


def interval(values: Mapping[str, Array], statistic: Statistic, drawn: Array | None = None) -> Interval:
    """A statistic of the means over targets, with its interval; `drawn` is `resampled(values)` where it is at hand."""
    plain = np.mean([table.mean(axis=0) for table in values.values()], axis=0)
    found = statistic(resampled(values) if drawn is None else drawn)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(plain[None])[0]), float(low), float(high))


def column(i: int) -> Statistic:
    return lambda means: means[..., i]


def ratio(i: int, j: int) -> Statistic:
    return lambda means: means[..., i] / means[..., j]


def difference(i: int, j: int) -> Statistic:
    return lambda means: means[..., i] - means[..., j]


@dataclass(frozen=True)
class Line:
    """What is said of a contender next to the reference, of the targets and seeds that both have.

    p90, censored and spent (what proxies cost) weigh targets equally. over: how many times the reference's runs (or
    cost) it takes; more: how many more; behind: how many more the reference takes, at most (nine of ten resamples are
    below). These are None for the reference itself.
    """

    contender: Contender
    mean: Interval
    p90: float
    censored: float
    spent: float
    over: Interval | None
    more: Interval | None
    behind: float | None
    targets: int
    searches: int


def compare(
    rows: Mapping[Key, Row],
    contenders: Sequence[Contender],
    reference: Contender,
    tolerance: float,
    cap: int,
    quantity: Quantity = "runs",
) -> list[Line]:
    """A line for each contender that has rows, paired with the reference. quantity: target runs, or the whole cost."""

    def read(row: Row) -> float:
        return row.total(tolerance, cap) if quantity == "cost" else row.runs(tolerance, cap)

    lines = []
    for contender in contenders:
        alone = contender == reference
        pair = [contender] if alone else [contender, reference]
        values = paired(rows, pair, read)
        if not values:
            continue
        censored = paired(rows, pair, lambda row: row.runs(tolerance, cap) > cap)
        spent = paired(rows, pair, lambda row: row.cost)
        drawn = resampled(values)
        lines.append(
            Line(
                contender=contender,
                mean=interval(values, column(0), drawn),
                p90=quantile([table[:, 0] for table in values.values()], 0.9),
                censored=float(np.mean([table[:, 0].mean() for table in censored.values()])),
                spent=float(np.mean([table[:, 0].mean() for table in spent.values()])),
                over=None if alone else interval(values, ratio(0, 1), drawn),
                more=None if alone else interval(values, difference(0, 1), drawn),
                behind=None if alone else float(np.quantile(difference(1, 0)(drawn), LEVEL)),
                targets=len(values),
                searches=sum(map(len, values.values())),
            )
        )
    return lines


def quantile(groups: Sequence[Array], level: float) -> float:
    """The least value below or at which lies `level` of the weight, all groups weighing the same."""
    weighed = sorted((value, 1 / len(group) / len(groups)) for group in groups for value in group.tolist())
    below = np.cumsum([weight for _, weight in weighed])
    return float(weighed[min(int(np.searchsorted(below, level - 1e-9)), len(weighed) - 1)][0])


def text(title: str, lines: Sequence[Line], reference: Contender, quantity: Quantity = "runs") -> str:
    """The lines as a table in plain text."""
    head = ["", f"mean {quantity}", "P90", "censored", "proxies cost"]
    head += [f"/ {reference}", f"- {reference}", f"{reference} behind, at most", "n"]
    body = [
        [
            str(line.contender),
            str(line.mean),
            f"{line.p90:.1f}",
            f"{line.censored:.1%}",
            f"{line.spent:.2f}",
            str(line.over or ""),
            str(line.more or ""),
            "" if line.behind is None else f"{line.behind:.2f}",
            f"{line.targets} x {line.searches / line.targets:.3g}",
        ]
        for line in lines
    ]
    widths = [max(map(len, cells)) for cells in zip(head, *body, strict=True)]
    shown = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *body]]
    return "\n".join([title, *("  " + row for row in shown)])
