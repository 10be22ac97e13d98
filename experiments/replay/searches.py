"""Which searches are made of a list of targets, and what is said of them: the same for every table.

Settings. "alone": no proxies; such searches stand for their method under every setting. "12 in 5", "6 in 3": so many
space-filling proxies in each of so many cells, the cheapest, of which nothing is charged: a diagnosis of the model.
"paid", "paid 1/15", ...: the default policy with its own plan and the default cap, proxies charged by the operations
they take, or at that price each; the plan may be to make none.

Methods. "sobol"; "target alone": the engine without proxies; "frozen": the baseline of baselines.py; "ours": the
default model given the proxies, or the default policy where they are paid; and the alternatives, models of all scales
with the same transform and the same rule for the first run.

    --tables DIR      folder with blackbox.py and the tables; it is only read
    --results FILE    rows are appended here; a search that has a row here, or in a file given by --and, is not repeated
    --methods, --settings, --seeds, --targets, --secrets    what is made; names with commas between
    --label TEXT      set behind the name of "ours" in the rows, so that several versions can be kept
    --workers N       processes, a thread each; --report makes nothing and prints what there is
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bo.policies.bayes import Bayes
from bo.policies.ladder import Ladder
from bo.policies.sobol import Sobol
from bo.ports import Policy
from bo.surrogates.surrogate import SURROGATES
from experiments.compare.problems import blackbox
from experiments.replay import protocol
from experiments.replay.baselines import Frozen
from experiments.replay.problem import Problem, proxies, search
from experiments.replay.protocol import Array, Contender, Interval, Key, Row

#: Regret in percent that claims are made at, and one at which all is over; below it runs differ by luck.
TOLERANCE, ENOUGH = 0.25, 0.1
CAP = 20
PRICES = (Fraction(1, 15), Fraction(1, 70), Fraction(1, 500))


@dataclass(frozen=True)
class Setting:
    """each, cells: proxies that are there. planned: the policy makes its own. price: of each, None by operations."""

    name: str
    each: int = 0
    cells: int = 0
    planned: bool = False
    price: float | None = None


ALONE = Setting("alone")
FREE = (Setting("12 in 5", 12, 5), Setting("6 in 3", 6, 3))
PAID = (Setting("paid", planned=True), *(Setting(f"paid {r}", planned=True, price=float(r)) for r in PRICES))
SETTINGS = {each.name: each for each in (ALONE, *FREE, *PAID)}

OURS = "ours"
BY_THEMSELVES: dict[str, Callable[[], Policy]] = {"sobol": Sobol, "target alone": Bayes, "frozen": Frozen}
ALTERNATIVES = ("product", "multi_task", "autoregressive", "joint_input", "ranking_ensemble")


def policy(method: str, setting: Setting) -> Policy:
    if method in BY_THEMSELVES:
        return BY_THEMSELVES[method]()
    if method in ALTERNATIVES:
        return Bayes(surrogate=method)
    return Ladder() if setting.planned else Bayes()


def settings(method: str) -> tuple[Setting, ...]:
    """Under which a method has searches."""
    if method in BY_THEMSELVES:
        return (ALONE,)
    return (*FREE, *PAID) if method == OURS else FREE


class Target(Protocol):
    """What a table has to say of one target: hashable and picklable, a frozen dataclass at the top of a module."""

    @property
    def name(self) -> str: ...

    def inner(self, blackbox: Any) -> Any:
        """The problem as it is published: its fidelities are the cells, from the cheapest to the target."""


@cache
def published(tables: Path, target: Target) -> Any:
    return target.inner(blackbox(tables))


@cache
def problem(tables: Path, target: Target, secret: str) -> Problem:
    return Problem(blackbox(tables).disguise(published(tables, target), secret))


@dataclass(frozen=True)
class Search:
    """A search to be made. secret: of the disguise. label: what the rows of our own method have behind its name."""

    tables: Path
    target: Target
    method: str
    setting: Setting
    seed: int
    secret: str
    cap: int
    label: str = ""

    @property
    def key(self) -> Key:
        return Key(self.target.name, named(self.method, self.label), self.setting.name, self.seed)

    def __call__(self) -> Row:
        at, setting, key = problem(self.tables, self.target, self.secret), self.setting, self.key
        space, luck = at.space(setting.price), drawn(key)
        given = proxies(at, space, setting.each, setting.cells, luck)
        done = search(at, space, policy(self.method, setting), given, self.cap, luck, ENOUGH)
        return Row(key.problem, key.method, key.setting, key.seed, done.regrets, done.proxies, done.cost, done.seconds)


def drawn(key: Key) -> int:
    """What all is drawn from: the same for every method, another for every target, whose luck is then its own."""
    return int.from_bytes(sha256(f"{key.problem}/{key.seed}".encode()).digest()[:4], "little") % 2**31


def named(method: str, label: str) -> str:
    return f"{method} {label}" if method == OURS and label else method


def searches(
    tables: Path,
    targets: Sequence[Target],
    methods: Sequence[str],
    chosen: Sequence[Setting],
    seeds: int,
    secrets: Sequence[str],
    cap: int,
    label: str,
) -> list[Search]:
    """Seed after seed, so that what is there at any time is balanced; each seed has its secret."""
    return [
        Search(tables, target, method, setting, seed, secrets[seed % len(secrets)], cap, label)
        for seed in range(seeds)
        for target in targets
        for method in methods
        for setting in settings(method)
        if setting in chosen
    ]


# ------------------------------------------------------------------------------------------------------------- reports


def report(rows: Mapping[Key, Row], label: str, cap: int) -> str:
    """What the rows say: target runs with proxies free, then total cost with proxies paid."""
    ours = named(OURS, label)
    alone = [Contender(name, ALONE.name) for name in BY_THEMSELVES]
    frozen = Contender("frozen", ALONE.name)
    parts = []
    for tolerance in (TOLERANCE, ENOUGH):
        lines = protocol.compare(rows, alone, frozen, tolerance, cap)
        parts.append(protocol.text(f"No proxies: target runs to {tolerance:g}% (cap {cap})", lines, frozen))
        for setting in FREE:
            title = f"{setting.name}, proxies free: target runs to {tolerance:g}% (cap {cap})"
            mine = Contender(ours, setting.name, OURS)
            others = [Contender(name, setting.name) for name in ALTERNATIVES]
            parts.append(table(title, rows, mine, [*alone, *others], tolerance, cap, "runs"))
    for setting in PAID:
        title = f"{setting.name}: target runs and proxies to {TOLERANCE:g}%, in target runs (cap {cap})"
        parts.append(table(title, rows, Contender(ours, setting.name, OURS), alone, TOLERANCE, cap, "cost"))
    return "\n\n".join(filter(None, [*parts, prices(rows, ours, cap), targets(rows, ours, cap)]))


def table(
    title: str,
    rows: Mapping[Key, Row],
    mine: Contender,
    others: Sequence[Contender],
    tolerance: float,
    cap: int,
    quantity: protocol.Quantity,
) -> str:
    """Of our own method next to all others that have rows for the same seeds; nothing where it has none."""
    lines = protocol.compare(rows, [mine, *others], mine, tolerance, cap, quantity)
    return protocol.text(title, lines, mine, quantity) if lines else ""


def prices(rows: Mapping[Key, Row], ours: str, cap: int) -> str:
    """At what price of a proxy, in target runs, what was saved is what the proxies cost."""
    shown = []
    for setting in (*FREE, *PAID):
        pair = [Contender("target alone", ALONE.name), Contender(ours, setting.name)]
        runs = protocol.paired(rows, pair, lambda row: row.runs(TOLERANCE, cap))
        made = protocol.paired(rows, pair, lambda row: row.proxies)
        values = {name: np.concatenate([runs[name], made[name][:, 1:]], axis=1) for name in runs}
        if not values or not any(each[:, 2].any() for each in values.values()):
            continue

        def even(means: Array) -> Array:
            return np.asarray((means[..., 0] - means[..., 1]) / means[..., 2])

        found = protocol.interval(values, even)
        count = float(np.mean([each[:, 2].mean() for each in values.values()]))
        shown.append(f"  {setting.name:12s} {count:5.1f} proxies pay up to a price of {price(found)} each")
    return "\n".join(["Break-even with target alone", *shown]) if shown else ""


def price(found: Interval) -> str:
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def targets(rows: Mapping[Key, Row], ours: str, cap: int) -> str:
    """Mean target runs by target, every method beside each other; of the paid settings with what proxies cost."""
    kinds = sorted({(key.method, key.setting) for key in rows if key.method in (ours, *BY_THEMSELVES, *ALTERNATIVES)})
    names = sorted({key.problem for key in rows})
    if not kinds:
        return ""
    lines = [f"Mean cost to {TOLERANCE:g}% by target: target runs + proxies"]
    for method, setting in kinds:
        cells = []
        for name in names:
            found = [
                row for key, row in rows.items() if (key.problem, key.method, key.setting) == (name, method, setting)
            ]
            paid = sum(row.cost for row in found) / len(found) if found else 0.0
            mean = sum(row.runs(TOLERANCE, cap) for row in found) / len(found) if found else float("nan")
            cells.append(f"{mean:5.1f}" + (f" + {paid:4.2f}" if paid else " " * 7))
        lines.append(f"  {method:18s} {setting:11s} " + "  ".join(cells))
    head = "  ".join(f"[{i}]".ljust(12) for i in range(1, len(names) + 1))
    legend = "; ".join(f"[{i}] {name}" for i, name in enumerate(names, 1))
    return "\n".join([lines[0], f"  {'':30s} {head}", *lines[1:], f"  {legend}"])


# ----------------------------------------------------------------------------------------------------------- a command


def spread(groups: Mapping[str, Sequence[Any]], most: int | None) -> list[Any]:
    """At most `most` of the members, as evenly as they go over the groups, and within a group over its ranks.

    Members are sorted by cost. Each group in turn gets a place until none are left or wanted; of its members it keeps
    those at equally spaced ranks, the dearest always.
    """
    places = dict.fromkeys(groups, 0)
    total = sum(map(len, groups.values()))
    while sum(places.values()) < min(total, total if most is None else most):
        name = min((n for n in groups if places[n] < len(groups[n])), key=places.__getitem__)
        places[name] += 1
    chosen = []
    for name, members in groups.items():
        ranks = np.linspace(len(members) - 1, 0, places[name]).round().astype(int) if places[name] else []
        chosen += [members[rank] for rank in sorted(set(map(int, ranks)))]
    return chosen


def run(doc: str | None, file: str, listed: Callable[[Any, int | None], Sequence[Target]]) -> None:
    """The command of a script. listed: blackbox.py and the most targets that are wanted -> targets."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*BY_THEMSELVES, *(name for name in ALTERNATIVES if name in SURROGATES), OURS]
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / file)
    parser.add_argument("--and", type=Path, nargs="*", default=[], dest="others", metavar="FILE")
    parser.add_argument("--methods", default=",".join(methods))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--targets", type=int)
    parser.add_argument("--secrets", default="first,second,third")
    parser.add_argument("--cap", type=int, default=CAP)
    parser.add_argument("--label", default="")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    for what, given, known in (("method", args.methods, methods), ("setting", args.settings, list(SETTINGS))):
        if unknown := [name for name in given.split(",") if name not in known]:
            parser.error(f"There is no {what} {unknown[0]!r}; there are {', '.join(known)}.")
    tables = args.tables.resolve()
    known = protocol.load(args.results, *args.others)
    chosen = listed(blackbox(tables), args.targets)
    print(f"{len(chosen)} targets: {'; '.join(target.name for target in chosen)}", flush=True)
    if not args.report:
        for target in chosen:  # what has to be fitted to the tables is kept before several processes want it
            published(tables, target)
        asked = [SETTINGS[name] for name in args.settings.split(",")]
        jobs = searches(
            tables, chosen, args.methods.split(","), asked, args.seeds, args.secrets.split(","), args.cap, args.label
        )
        for row in protocol.make(jobs, args.results, known, args.workers):
            last = f"{len(row.regrets)} runs, {row.regrets[-1]:.3f}%, proxies {row.cost:.2f}, {row.seconds:.1f} s"
            print(f"{row.problem}, {row.method}, {row.setting}, seed {row.seed}: {last}", flush=True)
        known = protocol.load(args.results, *args.others)
    names = {target.name for target in chosen}
    print(report({key: row for key, row in known.items() if key.problem in names}, args.label, args.cap))
