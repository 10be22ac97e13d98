"""A search space to look at: samples of every parameter, drawn to one HTML page and a PNG image a parameter.

    python -m experiments.show_space                     # a space with every kind of parameter
    python -m experiments.show_space FILE [-- ARGS]      # the space of your own training file
    python -m experiments.show_space --out DIR --samples 60 --seed 0

Schedules are drawn by family, mixtures as stacked shares, a sample a bar, numbers and options as histograms.
"""

from __future__ import annotations

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from integrations.describe import number
from integrations.training_file import TrainingFile
from search_spaces import (
    FAMILIES,
    Choice,
    Fidelity,
    Integer,
    Mixture,
    MixtureSchedule,
    Real,
    Schedule,
    Space,
)
from search_spaces.parameter import Fixed, Parameter
from search_spaces.region import counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 1000
BLUE = "#1f6fb2"
MOST_LABELS = 24  # of the options of a Choice
NATURAL = {"web": 0.62, "code": 0.15, "books": 0.12, "papers": 0.08, "dialogue": 0.03}

SHOWN = Space(
    batch_size=Integer(16, 1024, log=True),
    accumulation=Choice(1, 2, 4, 8, ordered=True),
    schedule=Schedule(*FAMILIES),
    data=Mixture(*NATURAL),
    natural=Mixture(*NATURAL, reference=NATURAL),
    capped=Mixture(*NATURAL, floor={"web": 0.2}, cap=0.5, fixed={"dialogue": 0.05}, max_domains=4),
    upsampled=MixtureSchedule(Mixture(*NATURAL, reference=NATURAL), Mixture(*NATURAL)),
    optimizer=Choice(
        {
            "adamw": {"lr": Real(1e-4, 1e-2, log=True), "weight_decay": Real(0, 0.3)},
            "lion": {"lr": Real(2e-5, 2e-3, log=True)},
        }
    ),
    constraints=["batch_size * accumulation <= 2048"],
    fidelity=Fidelity(params=(1e6, 1e7), tokens=(1e8, 1e9), target={"params": 1e7, "tokens": 1e9}),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733 }
h1 { font-size: 1.5rem }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem; border-top: 1px solid #dde3ea; padding-top: 1.2rem }
p, li { color: #44505e }
code { background: #f2f5f8; padding: .05rem .3rem; border-radius: 3px; overflow-wrap: anywhere }
div { overflow-x: auto }
img { max-width: 100% }
"""


def draw_schedules(figure: Figure, values: Sequence[Any], names: Sequence[str]) -> None:
    """One panel a family: the factor over the run, a line a sample."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure.set_size_inches(11, 0.5 + 1.75 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    steps = np.arange(STEPS)
    for panel, name in zip(panels, names, strict=False):
        mine = [value for value in values if value.family == name]
        alpha = min(0.35, 12 / max(len(mine), 1))  # many lines still show where they are dense
        for value in mine:
            panel.plot(steps / STEPS, value.factor(steps, STEPS), color=BLUE, alpha=alpha, linewidth=1)
        panel.set_title(f"{name}  ({len(mine)})", fontsize=9, loc="left")
        panel.set_ylim(-0.03, 1.08)
        panel.grid(alpha=0.25)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(names) - columns) : len(names)]:  # the lowest of their columns
        panel.tick_params(labelbottom=True)
    figure.supxlabel("share of the steps", fontsize=9)
    figure.supylabel("learning rate / peak", fontsize=9)


def draw_shares(figure: Figure, rows: Sequence[tuple[str, Sequence[dict[str, float]]]]) -> None:
    """Stacked bars, a sample a bar, sorted by the first source; a row of them for each list of mixtures."""
    from matplotlib import colormaps

    names = list(rows[0][1][0])
    colors = [f"C{i}" for i in range(10)] if len(names) <= 10 else colormaps["turbo"](np.linspace(0, 1, len(names)))
    figure.set_size_inches(11, 0.6 + max(2.1, 0.17 * len(names)) * len(rows))  # as high as its legend
    panels = figure.subplots(len(rows), 1, squeeze=False).ravel()
    for panel, (title, values) in zip(panels, rows, strict=True):
        shares = np.array(sorted(([value[name] for name in names] for value in values), reverse=True))
        bottom = np.zeros(len(shares))
        for index, name in enumerate(names):
            panel.bar(
                range(len(shares)), shares[:, index], bottom=bottom, width=1, label=label(name), color=colors[index]
            )
            bottom += shares[:, index]
        panel.set(xlim=(-0.5, len(shares) - 0.5), ylim=(0, 1), xticks=[])
        panel.set_ylabel(title or "share", fontsize=9)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False, reverse=True)


def draw_numbers(panel: Axes, values: Sequence[float], parameter: Real | Integer) -> None:
    """A histogram over the whole range; a bar a number where there are few whole ones."""
    low, high = parameter.low, parameter.high
    if isinstance(parameter, Integer) and high - low < 25:
        panel.hist(values, bins=np.arange(low - 0.5, high + 1), rwidth=0.9, color=BLUE)
        panel.locator_params(axis="x", integer=True)
        return
    panel.hist(values, bins=np.geomspace(low, high, 26) if parameter.log else np.linspace(low, high, 26), color=BLUE)
    if parameter.log:
        panel.set_xscale("log")


def draw_options(panel: Axes, values: Sequence[Any], options: Sequence[Any]) -> None:
    """A bar an option, from top to bottom, so that their names have room."""
    kinds = [(type(value), value) for value in values]  # True, 1 and 1.0 are three options
    panel.barh(range(len(options)), [kinds.count((type(o), o)) for o in options], color=BLUE)
    every = -(-len(options) // MOST_LABELS)
    panel.set_yticks(range(0, len(options), every), [label(str(o)) for o in options[::every]])
    panel.set_ylim(len(options) - 0.5, -0.5)


def label(text: str) -> str:
    """A name as matplotlib shows it: not too long, and without taking dollars for formulas."""
    return (text if len(text) <= 40 else f"{text[:39]}…").replace("$", r"\$")


def draw(figure: Figure, parameter: Parameter, values: Sequence[Any]) -> None:
    """Samples of one parameter."""
    match parameter:
        case Schedule():
            draw_schedules(figure, values, list(parameter.families))
        case Mixture():
            draw_shares(figure, [("", values)])
        case MixtureSchedule():
            draw_shares(figure, [("first", [v.first for v in values]), ("last", [v.last for v in values])])
        case Choice():
            figure.set_size_inches(6, 0.7 + 0.22 * min(len(parameter.options), MOST_LABELS))
            panel = figure.subplots()
            draw_options(panel, values, parameter.options)
            panel.set_xlabel("samples", fontsize=9)
        case Real() | Integer():
            figure.set_size_inches(6, 2)
            panel = figure.subplots()
            draw_numbers(panel, values, parameter)
            panel.set_ylabel("samples", fontsize=9)


def words(parameter: Parameter, values: Sequence[Any], samples: int) -> str:
    """What stands above a picture."""
    where = "" if len(values) == samples else f" Present in {len(values)} of {samples} samples, with its option."
    if isinstance(parameter, MixtureSchedule):
        switches = [value.switch for value in values]
        ends = dict.fromkeys([number(min(switches)), number(max(switches))])  # one where they are equal
        where += f" The second mixture takes over at {' to '.join(ends)} of the run."
    return f"<p><code>{html.escape(repr(parameter))}</code>{where}</p>"


def show(space: Space, out: Path, samples: int, seed: int) -> Path:
    """Draws `samples` configurations at the scale of the target; returns the page, `out/index.html`."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    space, rng = space.at(space.top), np.random.default_rng(seed)
    points = space.draw(lambda _, count: rng.random((count, len(space.columns))), 0, samples)
    configs = np.array(space.decode_all(points), dtype=object)
    parts = []
    for place in space.placed:
        values = [config[place.name] for config in configs[counts(place, points, space.columns)]]
        if isinstance(place.parameter, Fixed) or not values:
            continue
        figure = Figure(layout="constrained", dpi=110)
        draw(figure, place.parameter, values)
        name = space.columns[place.start].name if place.when else place.name
        image = out / f"{name.replace('/', '-')}.png"
        figure.savefig(image)
        data = base64.b64encode(image.read_bytes()).decode()
        least = round(60 * figure.get_figwidth())  # below this the texts in a picture are too small; it then scrolls
        parts.append(
            f"<h2>{html.escape(name)}</h2>{words(place.parameter, values, samples)}"
            f'<div><img style="min-width: {least}px" alt="samples of {html.escape(name)}" '
            f'src="data:image/png;base64,{data}"></div>'
        )
    constraints = "".join(f"<li><code>{html.escape(c.text)}</code></li>" for c in space.constraints)
    scale = f", at {html.escape(repr(space.top))}" if space.fidelity else ""
    head = f"<p>{samples} samples of {len(space.columns)} coordinates{scale}.</p>"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Search space</title><style>{STYLE}</style>"
        f"<h1>Search space</h1>{head}"
        + (f"<p>Every sample satisfies</p><ul>{constraints}</ul>" if constraints else "")
        + "".join(parts)
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a training file; its space is drawn")
    parser.add_argument("args", nargs="*", help="-- ARGS for FILE")
    parser.add_argument("--out", type=Path, default=Path("space"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="configurations to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.samples < 1 or options.seed < 0:
        parser.error(f"--samples must be at least 1 and --seed 0, got {options.samples} and {options.seed}")
    space = SHOWN if options.file is None else TrainingFile(options.file, tuple(options.args)).load().space
    print(f"Open {show(space, options.out, options.samples, options.seed)}")


if __name__ == "__main__":
    main()
