"""What the kept numbers of `compare_policies` say: a table, and a figure of what was found, spent and learned.

`python -m experiments.compare_policies --report` makes both again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from bo.checkpoint import whole
from integrations.describe import number, quantity
from integrations.report import BEST, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Curve = list[tuple[float, float, float | None]]

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget
GREY = "#64748b"
#: The name of an arm, its colour, its line, and the band of its range: told apart without colours too.
LOOK: Mapping[str, tuple[str, str, Any, Mapping[str, Any]]] = {
    "sobol": ("Sobol search", GREY, (0, (1, 1.2)), {"facecolor": "none", "hatch": "....", "edgecolor": "#cbd5e1"}),
    "bayes": ("Gaussian process", INK, (0, (5, 2)), {"color": INK, "alpha": 0.12}),
    "ladder": ("ladder", BEST, "-", {"color": BEST, "alpha": 0.25}),
}


# ---------------------------------------------------------------------------------------------------------- the numbers


def load(path: Path) -> dict[str, Any]:
    """The numbers of a campaign."""
    note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return note


def scale_of(row: Row) -> tuple[float, tuple[float, ...]]:
    """The cost of a run at a row's scale, and the scale."""
    return row["cost"], tuple(row["scale"].values())


def at_target(row: Row) -> bool:
    return bool(row["cost"] == 1.0)  # all smaller scales cost less


def progress(rows: Sequence[Row]) -> Curve:
    """After each trial: target runs spent, seconds trained, the best target loss so far."""
    best: float | None = None
    spent, seconds = 0.0, 0.0
    curve: Curve = []
    for each in rows:
        spent, seconds = spent + each["cost"], seconds + (each["seconds"] or 0.0)
        if at_target(each) and each["loss"] is not None:
            best = each["loss"] if best is None else min(best, each["loss"])
        curve.append((spent, seconds, best))
    return curve


def best_after(curve: Curve, most: float, column: int) -> float:
    """The best loss once `most` target runs (column 0) or seconds (1) are spent; infinite where there was none."""
    told = [step[2] for step in curve if step[:2][column] <= most + 1e-9]
    return told[-1] if told and told[-1] is not None else math.inf


# ------------------------------------------------------------------------------------------------------------ the table


def table(note: Mapping[str, Any]) -> str:
    """Each arm's best loss, and by how much the ladder is ahead of it on the same seeds: medians, with ranges."""
    by = {(result["arm"], result["seed"]): progress(result["trials"]) for result in note["results"]}
    seeds, budget = sorted({seed for _, seed in by}), note["budget"]
    arms = list(dict.fromkeys(arm for arm, _ in by))
    lines = [f"{'':<20}{'':<8}{'best target loss':<28}{'behind the ladder':<31}ladder ahead"]
    for share in (*SHARES, None):
        name = f"{share:.0%} of the budget" if share else "equal seconds"
        best: dict[str, list[float]] = {}
        for arm in arms:
            best[arm] = []
            for seed in seeds:
                seconds = by["ladder", seed][-1][1]
                curve = by[arm, seed]
                best[arm].append(best_after(curve, budget * share, 0) if share else best_after(curve, seconds, 1))
            behind = [mine - ladder for mine, ladder in zip(best[arm], best["ladder"], strict=True)]
            compared = (
                "" if arm == "ladder" else f"{spread(behind, '+'):<31}{sum(gap > 0 for gap in behind)} of {len(seeds)}"
            )
            lines.append(f"{name:<20}{arm:<8}{spread(best[arm]):<28}{compared}".rstrip())
            name = ""
    return "\n".join([*lines, "", *spent(note), "", *said(note)])


def spread(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    return f"{median(values):{sign}.{digits}f} ({min(values):{sign}.{digits}f} to {max(values):{sign}.{digits}f})"


def spent(note: Mapping[str, Any]) -> Iterator[str]:
    """Runs, compute and processor seconds of an arm, away from the target and at it."""
    yield f"{'':<8}{'':<10}{'runs':<20}{'target runs spent':<28}{'seconds':<34}diverged"
    for arm in dict.fromkeys(result["arm"] for result in note["results"]):
        name = arm
        for where in ("proxies", "target"):
            parts = [
                [each for each in result["trials"] if at_target(each) == (where == "target")]
                for result in note["results"]
                if result["arm"] == arm
            ]
            if not any(parts):
                continue
            runs = spread([len(part) for part in parts], digits=0)
            cost = spread([sum(each["cost"] for each in part) for part in parts], digits=2)
            seconds = spread([sum(each["seconds"] or 0.0 for each in part) for part in parts], digits=0)
            ended = sum(each["status"] == "diverged" for part in parts for each in part)
            yield f"{name:<8}{where:<10}{runs:<20}{cost:<28}{seconds:<34}{ended}"
            name = ""


def said(note: Mapping[str, Any]) -> Iterator[str]:
    """What each ladder expected of its first target run and got, and what it says of the scales at the end."""
    for result in note["results"]:
        if result["arm"] != "ladder":
            continue
        yield f"seed {result['seed']}: smaller scales are {result['trust'] or 'not there'}"
        if (first := next((each for each in result["trials"] if at_target(each)), None)) and "predicted" in first:
            expected = "expected {mean:.4f} ({low:.4f} to {high:.4f})".format(**first["predicted"])
            got = first["status"] if first["loss"] is None else f"measured {first['loss']:.4f}"
            yield f"  the first target run: {expected}, {got}"
        for drift in result["drifts"]:
            yield "  {metric}: best {parameter} ~ {axis} ^ {exponent:+.2f} ({low:+.2f} to {high:+.2f})".format(**drift)


# ----------------------------------------------------------------------------------------------------------- the figure


def draw(note: Mapping[str, Any], path: Path) -> Path:
    """Write the figure of a campaign's numbers as a PNG."""
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK}):
        figure = Figure(figsize=(8, 6.6), layout="constrained")
        panels = figure.subplot_mosaic([["found", "found"], ["spent", "best"]])
        draw_found(panels["found"], note)
        draw_spent(panels["spent"], note)
        draw_rate(panels["best"], note)
        with whole(path) as partial:
            figure.savefig(partial, format="png", dpi=150)
    return path


def draw_found(axes: Axes, note: Mapping[str, Any]) -> None:
    """The best loss at the target so far over what was spent: medians and ranges over the seeds."""
    budget = note["budget"]
    curves = {arm: [progress(result["trials"]) for result in searches(note, arm)] for arm in LOOK}
    proxies = [result["trials"] for result in searches(note, "ladder")]
    before = median([sum(row["cost"] for row in rows if not at_target(row)) for rows in proxies])
    count = median([sum(not at_target(row) for row in rows) for rows in proxies])
    axes.axvspan(0, before, color="#e2e8f0", linewidth=0)
    axes.text(before / 2, 0.97, f"{count:g} proxies", transform=axes.get_xaxis_transform(), rotation=90,
              ha="center", va="top", color=GREY, fontsize=8)  # fmt: skip
    axes.axvline(budget, color=GREY, linewidth=0.8)
    axes.text(budget, 0.97, " budget", transform=axes.get_xaxis_transform(), va="top", color=GREY, fontsize=8)
    for arm, (name, colour, line, band) in LOOK.items():
        x = np.unique([step[0] for curve in curves[arm] for step in curve])
        y = np.array([[best_after(curve, most, 0) for most in x] for curve in curves[arm]])  # seeds x steps
        there = np.isfinite(y).all(axis=0)
        x, y = x[there], y[:, there]
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), step="post", linewidth=0, **band)
        axes.step(x, np.median(y, axis=0), where="post", color=colour, linestyle=line, linewidth=1.8, label=name)
        spent, best = [], []
        for curve, ladder in zip(curves[arm], curves["ladder"], strict=True):
            spent.append(max((step[0] for step in curve if step[1] <= ladder[-1][1]), default=0.0))
            best.append(best_after(curve, ladder[-1][1], 1))
        axes.plot(median(spent), median(best), "o", color=colour, markersize=6, markeredgecolor="white", zorder=4)
    axes.plot([], [], "o", color=GREY, markersize=6, markeredgecolor="white", label="after the ladder's seconds")
    axes.set_xlim(0, None)
    axes.set(xlabel="compute spent, in target runs", ylabel="best loss at the target (nats a byte)")
    axes.set_title(f"Found: median and range of {len(proxies)} seeds")
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93), fontsize=8, reverse=True)


def draw_spent(axes: Axes, note: Mapping[str, Any]) -> None:
    """Shares of the ladder's compute and of its processor seconds by scale, and its runs: means over the seeds."""
    results = searches(note, "ladder")
    rows = [row for result in results for row in result["trials"]]
    scales = scales_of(rows)
    runs = [sum(scale_of(row) == scale for row in rows) / len(results) for scale in scales]
    for what, offset, name, colour, hatch in (
        ("cost", -0.2, "compute (6 N D)", BEST, ""),
        ("seconds", 0.2, "processor seconds", "white", "/////"),
    ):
        spent = [sum(row[what] or 0.0 for row in rows if scale_of(row) == scale) for scale in scales]
        shares = [part / sum(spent) for part in spent]
        places = [place + offset for place in range(len(scales))]
        bars = axes.barh(places, shares, 0.36, label=name, color=colour, hatch=hatch, edgecolor=BEST, zorder=3)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=7, color=INK)
    names = [f"{count:.3g} runs of {scale_words(values)}" for count, (_, values) in zip(runs, scales, strict=True)]
    axes.set_yticks(range(len(scales)), names)
    axes.invert_yaxis()  # the cheapest on top
    axes.set_xlim(0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="share of what the ladder spent", ylabel="parameters, tokens")
    axes.set_title("Spent by the ladder")
    axes.legend(loc="upper right", fontsize=8)


def draw_rate(axes: Axes, note: Mapping[str, Any]) -> None:
    """Where the model of each ladder has the best learning rate of each scale, with 90% intervals, and its drift."""
    results = searches(note, "ladder")
    scales = scales_of([each for result in results for each in result["recommended"]])
    centres: list[list[float]] = [[] for _ in scales]
    for seed, result in enumerate(results):
        for each in result["recommended"]:
            place = scales.index(scale_of(each))
            x = place + 0.6 * ((seed + 0.5) / len(results) - 0.5)
            axes.plot(
                [x, x],
                each["intervals"].get("lr", [each["config"]["lr"]] * 2),
                color=BEST,
                linewidth=1.2,
                alpha=0.45,
                zorder=2,
            )
            axes.plot(x, each["config"]["lr"], "o", color=BEST, markersize=3.5, zorder=3)
            centres[place].append(each["config"]["lr"])
    for place, rates in enumerate(centres):
        axes.plot([place - 0.36, place + 0.36], [median(rates)] * 2, color=INK, linewidth=1.4, zorder=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: number(rate)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(range(len(scales)), [scale_words(values, "\n") for _, values in scales])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="parameters, tokens", ylabel="best learning rate")
    axes.set_title("Learned: the best rate, 90% intervals")
    words = [rf"rate $\propto$ {axis}$^{{{at:+.2f}}}$ ({low:+.2f} to {high:+.2f})"
             for axis, at, low, high in rate_drifts(results)]  # fmt: skip
    axes.text(0.02, 0.03, "\n".join(words), transform=axes.transAxes, fontsize=8, color=INK)


def rate_drifts(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float, float]]:
    """Each scale axis, the exponent of the best rate and its 90% interval: medians over seeds and metrics."""
    drifts = [drift for result in results for drift in result["drifts"] if drift["parameter"] == "lr"]
    for axis in dict.fromkeys(drift["axis"] for drift in drifts):
        here = [drift for drift in drifts if drift["axis"] == axis]
        at, low, high = (median([drift[end] for drift in here]) for end in ("exponent", "low", "high"))
        yield axis, at, low, high


def searches(note: Mapping[str, Any], arm: str) -> list[Mapping[str, Any]]:
    return [result for result in note["results"] if result["arm"] == arm]


def scales_of(rows: Sequence[Row]) -> list[tuple[float, tuple[float, ...]]]:
    """All scales, the cheapest first."""
    return sorted({scale_of(row) for row in rows})


def scale_words(values: Sequence[float], between: str = ", ") -> str:
    return between.join(quantity(round(value, -3) if value >= 1e3 else value) for value in values)
