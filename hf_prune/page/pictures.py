"""Pictures of a run: each one as SVG whose colours are the page's, and as PNG in light colours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from ..report import Report
from ..report.display import layer_panels, place_of

# A colour in a picture -> the variable of the page's style sheet that takes its place there.
COLOURS = {
    "ink": "#1f2329",
    "muted": "#68707b",
    "line": "#d3d8de",
    "gone": "#e9ecf0",
    "blue": "#2f6db5",
    "orange": "#d9772b",
    "green": "#3d9a6a",
    "purple": "#8a5bb0",
    "red": "#b8434e",
}
DARK = {  # what those variables are where the page is dark
    "ink": "#e7eaee",
    "muted": "#9aa4b1",
    "line": "#333a44",
    "gone": "#2a3039",
    "blue": "#6ba6ea",
    "orange": "#e9995a",
    "green": "#62bd8c",
    "purple": "#b48bd6",
    "red": "#e07c84",
}
SERIES = ("blue", "orange", "green", "purple", "red")
_WIDTH = 6.6  # inches
_MOST_CELLS = 64  # units of a layer that can be shown one by one
_NUMBERED = re.compile(r' id="[\w.]+_\d+"')


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: Of its file, without suffix.
        title: What stands above it.
        says: What it shows, for those who do not see it.
        figure: A matplotlib figure.
    """

    name: str
    title: str
    says: str
    figure: Any

    def svg(self) -> str:
        """Return an ``<svg>`` element for a page that defines our colours."""
        out = StringIO()
        with style(self.name):
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
        text = _NUMBERED.sub("", text[text.index("<svg") :])
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        return text.replace("<svg", '<svg class="picture" role="img"', 1)

    def save(self, folder: Path) -> Path:
        """Write it as PNG."""
        path = folder / f"{self.name}.png"
        with style(self.name):
            self.figure.savefig(path, dpi=150, facecolor="white")
        return path


def style(name: str) -> AbstractContextManager[Any]:
    """Return how all pictures look; names in them are text, never mathematics."""
    import matplotlib

    ink, muted, line = (COLOURS[one] for one in ("ink", "muted", "line"))
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "text.color": ink,
            "axes.labelcolor": muted,
            "axes.edgecolor": line,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid.axis": "y",
            "grid.color": line,
            "grid.linewidth": 0.6,
            "xtick.color": muted,
            "ytick.color": muted,
            "font.size": 9,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.w_pad": 0.1,
        }
    )


def new_figure(height: float, rows: int = 1, width: float = _WIDTH, **options: Any) -> tuple[Any, list[Any]]:
    """Return a figure of our style, and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, list(figure.subplots(rows, 1, squeeze=False, **options)[:, 0])


# --- what was kept ---------------------------------------------------------------------------------------------------


def kept_pictures(report: Report) -> Iterator[Picture]:
    """Yield a map of layers and units where units can be shown one by one, and bars where there are too many."""
    for number, (place, panel) in enumerate(layer_panels(report).items()):
        kept, whole = (sum(pair[which] for pair in panel.values()) for which in (0, 1))
        if not whole:
            continue
        units = _units_by_layer(report, place)
        colour = SERIES[number % len(SERIES)]
        with style(place):
            figure = _draw_bars(panel, place, colour) if units is None else _draw_map(units, place, colour)
        title = f"{place}: {kept:,} of {whole:,} kept ({kept / whole:.0%})"
        yield Picture(f"kept-{place}", title, f"For each layer what stayed of {place}", figure)


Units = dict[tuple[int, ...], tuple[set[int], int]]  # numbers of stage and layer -> (units that stayed, how many)


def _units_by_layer(report: Report, place: str) -> Units | None:
    """Return what stayed in each layer; ``None`` where that is too much to be shown one by one."""
    found: Units = {}
    for name, units in report.units.items():
        here, layer = place_of(name)
        if here != place:
            continue
        if units > _MOST_CELLS or layer in found:  # several groups of a layer are experts
            return None
        found[layer] = set(report.kept.get(name, range(units))), units
    return dict(sorted(found.items()))


def _draw_map(units: Units, place: str, colour: str) -> Any:
    most = max(number for _, number in units.values())
    size = min(0.22, (_WIDTH - 0.8) / len(units))
    figure, (ax,) = new_figure(max(1.2, 0.75 + size * most))
    for which, shade in ((True, colour), (False, "gone")):
        cells = [
            (column, unit - 0.42)
            for column, (stayed, number) in enumerate(units.values())
            for unit in range(number)
            if (unit in stayed) == which
        ]
        if cells:
            columns, bottoms = zip(*cells, strict=True)
            ax.bar(columns, 0.84, 0.84, bottoms, color=COLOURS[shade], linewidth=0)
    ax.set_xlim(-0.6, max(len(units), (_WIDTH - 0.8) / size) - 0.4)
    ax.set_ylim(most - 0.4, -0.6)
    ax.set_aspect("equal", anchor="NW")
    ax.set_yticks(range(0, most, max(-(-most // 8), math.ceil(0.2 / size))))
    _layer_axis(ax, list(units), place)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return figure


def _draw_bars(panel: dict[tuple[int, ...], tuple[int, int]], place: str, colour: str) -> Any:
    figure, (ax,) = new_figure(2.3)
    kept, whole = ([pair[which] for pair in panel.values()] for which in (0, 1))
    spare = max(0, 12 - len(panel))  # few layers: bars no wider than they need be
    ax.bar(range(len(panel)), whole, 0.78, color=COLOURS["gone"], label="dense")
    ax.bar(range(len(panel)), kept, 0.78, color=COLOURS[colour], label="kept")
    for at, number in enumerate(kept) if len(panel) <= 16 else ():
        ax.annotate(f"{number:,}", (at, number), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xlim(-0.6, len(panel) - 0.4 + spare)
    ax.set_ylim(0, max(whole) * 1.08)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    _layer_axis(ax, list(panel), place)
    return figure


def _layer_axis(ax: Any, layers: Sequence[tuple[int, ...]], place: str) -> None:
    every = -(-len(layers) // 24)
    names = [".".join(map(str, layer)) or "all" for layer in layers]
    ax.set_xticks(range(0, len(layers), every), names[::every], fontsize=8)
    ax.set_xlabel("layer", loc="left")
    ax.set_ylabel(place.rsplit(".", 1)[-1].replace("_", " "))


# --- training --------------------------------------------------------------------------------------------------------


_LOSSES = {"loss": "in training", "eval_loss": "in evaluation"}


def training_picture(log: Sequence[dict[str, float]]) -> Picture | None:
    """Draw sparsity, loss and metrics over the steps; ``None`` where nothing of it was logged."""
    columns = list(dict.fromkeys(name for row in log for name in row))
    metrics = [name for name in columns if name.startswith("eval_") and _is_score(name)]
    wanted: dict[str, list[str]] = {
        "sparsity": [name for name in columns if name.startswith("sparsity")]
        + ["macs_left"] * ("macs_left" in columns),
        "loss": [name for name in ("loss", "eval_loss") if name in columns],
        "distillation": [name for name in columns if name.startswith("distillation_")],
        "metric": metrics,
    }
    rows = {what: names for what, names in wanted.items() if names}
    if len(log) < 2 or not rows:
        return None
    with style("training"):
        figure, axes = new_figure(0.5 + 1.8 * len(rows), len(rows), sharex=True)
        for ax, (what, names) in zip(axes, rows.items(), strict=True):
            _draw_lines(ax, log, names)
            ax.set_ylabel(what)
            if what == "sparsity":
                ax.set_ylim(-0.03, 1.03)
        axes[-1].set_xlabel("step")
    return Picture("training", "Training", f"Over the steps: {', '.join(rows)}", figure)


def _is_score(name: str) -> bool:
    timing = name.endswith(("runtime", "per_second", "_time", "_loss"))
    return not timing


def _draw_lines(ax: Any, log: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in log if name in row]
        label = _LOSSES.get(name) or name.removeprefix("eval_").replace("_", " ")
        told = {"color": COLOURS[SERIES[number % len(SERIES)]], "label": label}
        ax.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.5, **told)
    ax.grid(visible=True)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=4, fontsize=8, columnspacing=1.2)


# --- latency ---------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One model's latency: its name, median and 90th percentile in milliseconds, colour, and what to think of it."""

    model: str
    median: float
    high: float | None
    colour: str
    note: str = ""


def latency_picture(groups: dict[str, list[Bar]]) -> Picture | None:
    """Draw medians as bars, with a whisker to the 90th percentile.

    Args:
        groups: What was measured together (runtime and input) -> its bars.
    """
    bars = sum(map(len, groups.values()))
    if not bars:
        return None
    with style("latency"):
        figure, axes = new_figure(0.35 + 0.27 * bars + 0.42 * len(groups), len(groups), gridspec_kw=_heights(groups))
        for ax, (what, rows) in zip(axes, groups.items(), strict=True):
            _draw_group(ax, what, rows)
    return Picture("latency", "Latency, milliseconds of one forward", "Median latency, dense and pruned", figure)


def _heights(groups: dict[str, list[Bar]]) -> dict[str, Any]:
    return {"height_ratios": [len(rows) + 0.6 for rows in groups.values()]}


def _draw_group(ax: Any, what: str, rows: Sequence[Bar]) -> None:
    for at, row in enumerate(rows):
        ax.barh(at, row.median, 0.74, color=COLOURS[row.colour])
        if row.high:
            ax.plot([row.median, row.high], [at, at], color=COLOURS["muted"], linewidth=1.2)
        end = max(row.median, row.high or 0), at
        ax.annotate(f"{row.median:.3g}{row.note}", end, (4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), [row.model for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.25 * max(max(row.median, row.high or 0) for row in rows))
    ax.set_title(what)
    ax.set_xticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


# --- several runs ----------------------------------------------------------------------------------------------------


def scatter_picture(points: Sequence[tuple[str, float, float]], across: str, up: str) -> Picture | None:
    """Draw one point for each run.

    Args:
        points: Name, value across, value up.
        across: What the horizontal axis shows.
        up: What the vertical one shows.
    """
    if len(points) < 2:
        return None
    with style("runs"):
        figure, (ax,) = new_figure(3.4)
        names: dict[tuple[float, float], list[str]] = {}  # runs that came out alike share a point and its label
        for name, x, y in points:
            names.setdefault((round(x, 2), round(y, 3)), []).append(name)
        for number, (place, here) in enumerate(names.items()):
            ax.plot(*place, "o", color=COLOURS[SERIES[number % len(SERIES)]], markersize=7)
            ax.annotate(", ".join(here), place, (7, 4), textcoords="offset points", fontsize=8)
        ax.margins(0.18)
        ax.grid(visible=True, axis="both")
        ax.set_xlabel(across)
        ax.set_ylabel(up)
    return Picture("runs", f"{up} over {across}", f"One point a run: {up} over {across}", figure)
