"""A study as one HTML page that needs nothing else: what was found, what it cost, and what speaks for it.

Figures are drawn by matplotlib, as SVG in the page; what users named or wrote is escaped by Jinja2. The numbers of
`windtunnel diagnose` are part of it once that has run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bo import Pareto, Study, Trial
from bo.checkpoint import private, whole
from bo.objective import Single
from bo.ports import ELSEWHERE
from integrations.describe import (
    config_line,
    counts_words,
    number,
    objective_name,
    objective_words,
    recipe,
    scale_words,
    value_words,
)
from search_spaces import Curve, Scale, SwitchedMixture

NAME = "report.html"
ROWS = 300  # trials in the table; the journal has them all
PANELS = 12  # parameters with a panel of their own
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
}
INK, BEST, BELOW = "#0f172a", "#c2410c", "viridis"


def write(study: Study, diagnosed: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write the report of a study into its folder, whole or not at all; returns its path.

    diagnosed: what `windtunnel diagnose` stored, one for each objective of a front.
    """
    page = study.folder / NAME
    with whole(page) as partial, open(partial, "w", encoding="utf-8", opener=private) as file:
        file.write(html(study, diagnosed))
    return page


def html(study: Study, diagnosed: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None) -> str:
    """The page as text."""
    found = [diagnosed] if isinstance(diagnosed, Mapping) else list(diagnosed or ())
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("integrations").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    objective = study.objective
    best = None if isinstance(objective, Pareto) else study.best()
    baseline = recipe(study)
    return template.render(
        name=study.folder.resolve().name,
        at=datetime.fromtimestamp(study.now(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
        objective=objective_name(objective),
        policy=study.policy_name,
        cards=_cards(study, best, baseline),
        best=best and _configs(best, baseline),
        front=[_row(study, trial) for trial in study.front()] if isinstance(objective, Pareto) else [],
        compute=_compute(study) if isinstance(objective, Single) else _front(study, objective),
        spend=_spend(study),
        slices=_slices(study) if isinstance(objective, Single) else "",
        predicted=_predicted(study) if isinstance(objective, Single) else "",
        diagnosed=[_diagnosis(each) for each in found],
        trials=[_row(study, trial) for trial in _ranked(study)[:ROWS]],
        left=max(0, len(study.trials) - ROWS),
        failures=[trial for trial in study.trials if trial.status == "failed"][-20:],
    )


# ------------------------------------------------------------------------------------------------------------- words


def _cards(study: Study, best: Trial | None, baseline: Trial | None) -> list[tuple[str, str, str]]:
    """(what, value, more) of the numbers at the top."""
    objective, cards = study.objective, []
    if best is not None and isinstance(objective, Single):
        more = f"trial {best.id}"
        if baseline is not None and baseline.metrics and baseline.status == "finished" and baseline.id != best.id:
            gain = objective.value(baseline.metrics) - objective.value(best.metrics or {})
            how = f"{number(abs(gain))} {'better' if gain > 0 else 'worse'} than"
            more += f", {how} your recipe ({objective_words(study, baseline)})"
        cards.append(("Best at the target", objective_words(study, best), more))
    elif isinstance(objective, Pareto):
        cards.append(("Front", f"{len(study.front())} trials", f"hypervolume {number(study.hypervolume())}"))
    limit = f"of {number(study.limits.budget)} " if study.limits.budget else ""
    proxies = [t for t in study.trials if t.scale != study.top and t.source not in ELSEWHERE]
    share = f"{sum(t.cost for t in proxies):.2f} of it on {len(proxies)} smaller runs" if proxies else ""
    cards.append(("Spent", f"{study.spent:.2f}", f"{limit}target runs{'; ' if share else ''}{share}"))
    cards.append(("Trials", str(len(study.trials)), counts_words(study)))
    return cards


def _configs(best: Trial, baseline: Trial | None) -> dict[str, Any]:
    """The best configuration beside the user's own, with what was expected of it."""
    other = baseline.config if baseline is not None and baseline.id != best.id else None
    rows = [(key, value_words(value), value_words(other[key]) if other and key in other else "")
            for key, value in best.config.items()]  # fmt: skip
    return {"id": best.id, "rows": rows, "recipe": other is not None}


def _row(study: Study, trial: Trial) -> dict[str, Any]:
    return {
        "id": trial.id,
        "objective": objective_words(study, trial) if _has_value(study, trial) else "",
        "status": trial.status,
        "scale": scale_words(trial.scale),
        "source": trial.source,
        "config": config_line(trial.config),
        "cost": number(trial.cost),
        "seconds": "" if trial.seconds is None else number(trial.seconds),
        "note": trial.note or "",
    }


def _has_value(study: Study, trial: Trial) -> bool:
    return trial.status == "finished" and bool(trial.metrics) and not study.objective.missing(trial.metrics or {})


def _ranked(study: Study) -> list[Trial]:
    """All trials: those at the target first, the best of them first, then by the cost of their scale."""

    def rank(trial: Trial) -> tuple[Any, ...]:
        value = study.objective.values(trial.metrics or {})[0] if _has_value(study, trial) else math.inf
        return (trial.scale != study.top, -study.space.cost(trial.scale), value, trial.id)

    return sorted(study.trials, key=rank)


def _diagnosis(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `bo.analysis` found, as words and figures."""
    effects = sorted(found.get("effects", ()), key=lambda effect: -effect["total"])
    drifts = [
        (each["parameter"], each["axis"], each["metric"], f"{each['exponent']:+.2f}",
         f"{each['low']:+.2f} to {each['high']:+.2f}")
        for each in found.get("drifts", ())
    ]  # fmt: skip
    return {
        "coverage": [(f"{each['level']:.0%}", each["inside"], each["runs"]) for each in found.get("coverage", ())],
        "effects": _effects(effects[:PANELS]) if effects else "",
        "drifts": drifts,
        "trust": found.get("trust"),
    }


# ----------------------------------------------------------------------------------------------------------- figures


def _svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element; its identifiers are its own among all of a page."""
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def _colours(study: Study) -> dict[Scale, Any]:
    """A colour for each scale: the target's is ink, the others go from dark to light with their cost."""
    scales = sorted({trial.scale for trial in study.trials if trial.scale != study.top}, key=study.space.cost)
    shades = matplotlib.colormaps[BELOW]
    return {scale: shades(0.25 + 0.6 * i / max(1, len(scales) - 1)) for i, scale in enumerate(scales)} | {
        study.top: INK
    }


def _scored(study: Study) -> list[tuple[Trial, float]]:
    """Finished trials with their objective in the user's sign."""
    objective = study.objective
    assert isinstance(objective, Single)
    pairs = [(t, objective.shown(objective.value(t.metrics or {}))) for t in study.trials if _has_value(study, t)]
    return [(trial, value) for trial, value in pairs if math.isfinite(value)]


def _compute(study: Study) -> str:
    """The objective of every run over what was spent until it ended, and the best at the target so far."""
    objective = study.objective
    assert isinstance(objective, Single)
    values = {trial.id: value for trial, value in _scored(study)}
    colours, spent, found = _colours(study), 0.0, []
    figure, ((axes,),) = _figure(8, 3.6)
    steps: list[tuple[float, float]] = []
    shown: dict[Scale, list[tuple[float, float]]] = {}
    for trial in study.ended:
        spent += 0.0 if trial.source in ELSEWHERE else trial.cost
        if trial.id not in values or trial.source == "prior":
            continue
        shown.setdefault(trial.scale, []).append((spent, values[trial.id]))
        if trial.scale == study.top and objective.feasible(trial.metrics or {}):
            found.append(objective.value(trial.metrics or {}))
            steps.append((spent, objective.shown(min(found))))
    for scale in sorted(shown, key=study.space.cost):
        x, y = zip(*shown[scale], strict=True)
        axes.scatter(x, y, s=18, color=[colours[scale]], label=scale_words(scale) or "runs", linewidths=0, zorder=3)
    if steps:
        x, y = zip(*(*steps, (spent, steps[-1][1])), strict=True)
        axes.step(x, y, where="post", color=BEST, linewidth=1.6, label="best at the target", zorder=2)
    axes.set(xlabel="spent, in target runs", ylabel=objective_name(objective))
    if shown:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return _svg(figure, "compute")


def _front(study: Study, objective: Pareto) -> str:
    """The first two objectives of every run at the target, with the front."""
    first, second = objective.parts[:2]
    at_top = [t for t in study.trials if t.scale == study.top and _has_value(study, t)]
    front = sorted(study.front(), key=lambda t: first.value(t.metrics or {}))
    figure, ((axes,),) = _figure(8, 3.6)
    for trials, style in ((at_top, {"s": 18, "color": "#94a3b8"}), (front, {"s": 26, "color": BEST})):
        points = [[part.shown(part.value(t.metrics or {})) for t in trials] for part in (first, second)]
        axes.scatter(*points, linewidths=0, zorder=3, **style)
    axes.set(xlabel=objective_name(first), ylabel=objective_name(second))
    return _svg(figure, "front")


def _spend(study: Study) -> str:
    """Runs and their cost by scale."""
    own = [trial for trial in study.trials if trial.source not in ELSEWHERE]
    scales = sorted({trial.scale for trial in own}, key=study.space.cost)
    if len(scales) < 2:
        return ""
    colours = _colours(study)
    figure, (panels,) = _figure(8, 0.5 + 0.3 * len(scales), 1, 2)
    for axes, what, amounts in (
        (panels[0], "runs", [sum(t.scale == scale for t in own) for scale in scales]),
        (panels[1], "spent, in target runs", [sum(t.cost for t in own if t.scale == scale) for scale in scales]),
    ):
        names = [scale_words(scale) for scale in scales] if axes is panels[0] else [""] * len(scales)
        axes.barh(range(len(scales)), amounts, color=[colours[scale] for scale in scales], height=0.7, zorder=3)
        axes.set_yticks(range(len(scales)), names)
        axes.set_xlabel(what)
    return _svg(figure, "spend")


def _slices(study: Study) -> str:
    """The objective over each number of the configuration, by scale."""
    scored = [(trial, value, _flat(trial.config)) for trial, value in _scored(study)]
    names = list(dict.fromkeys(name for _, _, flat in scored for name in flat))
    varied = [n for n in names if len({flat[n] for _, _, flat in scored if n in flat}) > 1][:PANELS]
    if not varied:
        return ""
    colours, columns = _colours(study), min(3, len(varied))
    rows = math.ceil(len(varied) / columns)
    figure, panels = _figure(3.2 * columns, 2.3 * rows, rows, columns)
    for axes in panels.flat[len(varied) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, varied, strict=False):
        runs = [(trial, value, flat[name]) for trial, value, flat in scored if name in flat]
        settings = [setting for _, _, setting in runs]
        if all(isinstance(setting, (int, float)) and not isinstance(setting, bool) for setting in settings):
            places = settings
            if min(settings) > 0 and max(settings) / min(settings) > 20:
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
        else:
            options = sorted({str(setting) for setting in settings})
            places = [options.index(str(setting)) for setting in settings]
            axes.set_xticks(range(len(options)), options, rotation=30 if len(options) > 3 else 0)
        axes.scatter(
            places, [v for _, v, _ in runs], s=10, color=[colours[t.scale] for t, _, _ in runs], linewidths=0, zorder=3
        )
        axes.set_title(name, fontsize=9, loc="left", color=INK)
    return _svg(figure, "slices")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by its numbers and words: `data.code`, `schedule`, `schedule.decay`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Curve):
            flat[name] = value.family
            settings = {setting: getattr(value, setting) for setting in value.settings()}
            flat |= {f"{name}.{key}": it for key, it in settings.items() if isinstance(it, (int, float))}
        elif isinstance(value, SwitchedMixture):
            flat |= {f"{name}.{source}": share for source, share in value.first.items()}
            flat[f"{name}.switch"] = value.switch
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{source}": share for source, share in value.items()}
        else:
            flat[name] = value
    return flat


def _predicted(study: Study) -> str:
    """What was expected of runs at the target before they ran, beside what was measured."""
    objective = study.objective
    assert isinstance(objective, Single)
    runs = [(t, v, t.predicted) for t, v in _scored(study) if t.predicted and t.scale == study.top]
    if len(runs) < 2:
        return ""
    figure, ((axes,),) = _figure(8, 2.8)
    for i, (_, _, expected) in enumerate(runs):
        ends = sorted(objective.shown(expected[end]) for end in ("low", "high"))
        axes.plot([i, i], ends, color="#94a3b8", linewidth=4, solid_capstyle="butt", zorder=2)
    axes.scatter(range(len(runs)), [value for _, value, _ in runs], s=20, color=BEST, zorder=3, label="measured")
    axes.plot([], [], color="#94a3b8", linewidth=4, label="expected, with 90%")
    axes.set_xticks(range(len(runs)), [str(trial.id) for trial, _, _ in runs])
    axes.set(xlabel="trial at the target", ylabel=objective_name(objective))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return _svg(figure, "predicted")


def _effects(effects: Sequence[Mapping[str, Any]]) -> str:
    """The share of the variance of each parameter: alone, and with all it interacts with."""
    figure, ((axes,),) = _figure(8, 0.6 + 0.32 * len(effects))
    for i, effect in enumerate(reversed(effects)):
        axes.barh(i, effect["total"], color="#cbd5e1", height=0.7, zorder=2, label="with all it interacts with")
        axes.barh(i, effect["first"], color="#0f766e", height=0.7, zorder=3, label="alone")
    names = [e["parameter"] + (f" (given {e['given']})" if e.get("given") else "") for e in reversed(effects)]
    axes.set_yticks(range(len(effects)), names)
    axes.set(xlabel="share of the variance", xlim=(0, 1))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], loc="lower right", fontsize=8)
    return _svg(figure, "effects")


def load_diagnosed(path: Path) -> Any:
    """What `windtunnel diagnose` stored at `path`, None where it has not run or the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
