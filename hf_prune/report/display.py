"""How a report looks: an aligned plain-text table, the same for a notebook, and a picture of what each layer kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from ..errors import PruningError, shown
from ..files import new_file
from .figures import Figures
from .measurement import Measurement

_COLOURS = ("#2f6db5", "#d9772b", "#3d9a6a", "#8a5bb0", "#b8434e")
_OUTLINE, _EMPTY = "#9aa3ad", "#eef0f3"
_LABELLED_LAYERS = 16  # more bars than this have no room for a number on each
_INDEX = re.compile(r"(?:^|(?<=\.))(?:layers|stages)\.(\d+)(?:\.|$)")
_EXPERT = re.compile(r"experts\.\d+")
Panel = dict[tuple[int, ...], tuple[int, int]]  # numbers of stage and layer -> (kept, dense)
Row = tuple[str, str, str, str]  # what, dense, pruned, change


# --- the table -------------------------------------------------------------------------------------------------------


def plain_table(report: Figures) -> str:
    """Return the report as Markdown that is aligned for plain text too, at most 100 columns wide."""
    return markdown_table(("", "dense", "pruned", "change"), list(table_rows(report)))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, width: int = 100) -> str:
    """Return rows as Markdown that is aligned for plain text too.

    Args:
        columns: Names of the columns.
        rows: Cells.
        left: How many columns are text; the others are numbers, at the right.
        width: Most characters of a line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=number >= left)
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    # a console in a notebook, or under FORCE_COLOR, would write elsewhere or more
    alone: dict[str, Any] = {"force_jupyter": False, "force_terminal": False}
    Console(file=out, width=width, no_color=True, markup=False, emoji=False, **alone).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def html_table(report: Figures) -> str:
    """Return the report as a table of HTML that takes its colours from the page around it, light or dark."""
    head = "".join(_html_cell("th", name, number > 0) for number, name in enumerate(("", "dense", "pruned", "change")))
    lines = [
        "".join(_html_cell("td", cell, number > 0) for number, cell in enumerate(row)) for row in table_rows(report)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    above = [headline(report), *([pruned_line(report)] if report.units or report.masked else [])]
    told = "<br/>".join(map(escape, [*above, *map("Warning: {}".format, report.warnings)]))
    caption = f'<caption style="text-align:left">{told}</caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(tag: str, text: str, number: bool) -> str:
    side = "right" if number else "left"
    return f'<{tag} style="text-align:{side};padding:2px 8px;font-variant-numeric:tabular-nums">{escape(text)}</{tag}>'


def table_rows(report: Figures) -> Iterator[Row]:
    """Yield what there is to tell: metrics, units by kind, counts, latencies."""
    for name, values in report.metrics.items():
        yield _difference(name, values.get("dense"), values.get("pruned"))
    for kind, (kept, units) in _kept_by_kind(report).items():
        yield _share(kind.replace("_", " "), units, kept, "{:,.0f}")
    known = report.dense or report.pruned
    if known is not None:
        yield from _cost_rows(report.dense, report.pruned, known)
    yield from _aimed_row(report.settings)


def _cost_rows(dense: Measurement | None, pruned: Measurement | None, known: Measurement) -> Iterator[Row]:
    one_forward = f"{known.batch} x {known.length} tokens" if known.length else f"batch of {known.batch}"
    has_zeros = pruned is not None and pruned.nonzero < 0.95 * pruned.parameters
    figures = [("parameters", "parameters"), *([("parameters that are not 0", "nonzero")] if has_zeros else [])]
    figures += [
        (f"prunable MACs per {'token' if known.length else 'patch' if known.batch else 'position'}", "prunable_macs")
    ]
    figures += [(f"MACs ({one_forward})", "macs")]
    for what, key in figures:
        pair = getattr(dense, key, None), getattr(pruned, key, None)
        if pair != (None, None):
            yield _share(what, *pair)
    yield _share("size, MB", getattr(dense, "size_mb", None), getattr(pruned, "size_mb", None), "{:,.2f}")
    before_ms, after_ms = (one.latency_ms if one else {} for one in (dense, pruned))
    threads = f"{known.threads} thread{'s' * (known.threads > 1)}"
    for runtime in dict.fromkeys([*before_ms, *after_ms]):
        what = f"latency in {runtime}, ms ({one_forward}, {threads})"
        yield _speed(what, before_ms.get(runtime), after_ms.get(runtime))


def _aimed_row(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the time that a target asked for, as it was measured when the units were chosen."""
    dense, asked, measured = (settings.get(f"{name}_ms") for name in ("dense", "asked", "measured"))
    if all(isinstance(one, (int, float)) for one in (dense, asked, measured)):
        yield _speed(f"time that was aimed at, ms (asked for {asked:.4g})", dense, measured)


def _difference(what: str, dense: float | None, pruned: float | None) -> Row:
    change = "" if dense is None or pruned is None else f"{pruned - dense:+.4f}"
    return what, _cell(dense, "{:.4f}"), _cell(pruned, "{:.4f}"), change


def _share(what: str, dense: float | None, pruned: float | None, form: str | None = None) -> Row:
    change = f"{pruned / dense:.1%} left" if dense and pruned is not None else ""
    return what, _cell(dense, form), _cell(pruned, form), change


def _speed(what: str, dense: float | None, pruned: float | None) -> Row:
    change = f"{dense / pruned:.2f}x speed" if dense and pruned else ""
    return what, _cell(dense, "{:.4g}"), _cell(pruned, "{:.4g}"), change


def _cell(value: float | None, form: str | None) -> str:
    if value is None:
        return "-"
    return form.format(value) if form else short(value)


def short(count: float) -> str:
    """Return a count with four figures and its unit.

    Example:
        >>> short(22_713_216), short(384)
        ('22.71 M', '384')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:#.4g} {unit}"
    return f"{count:g}"


def _kept_by_kind(report: Figures) -> dict[str, tuple[int, int]]:
    """Return ``{"heads": (kept, dense), …}`` over all layers."""
    totals: dict[str, tuple[int, int]] = {}
    for name, units in report.units.items():
        kind = name.rsplit(".", 1)[-1]
        kept, whole = totals.get(kind, (0, 0))
        totals[kind] = kept + report.stayed(name), whole + units
    return totals


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(report: Figures) -> Any:
    """Draw one panel for each kind of place (``attention.heads``, ``mlp.neurons``), one bar for each layer."""
    from matplotlib.figure import Figure

    panels = layer_panels(report)
    if not panels:
        raise PruningError("plot needs the dense unit counts of at least one group. Received: units={}.")
    layers = max(len(panel) for panel in panels.values())
    size = (min(max(8.5, 2 + 0.36 * layers), 14.0), 0.7 + 2.3 * len(panels))
    figure: Any = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for number, (ax, (name, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
        _draw_panel(ax, name, panel, _COLOURS[number % len(_COLOURS)])
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False, fontsize=9)
    axes[-1].set_xlabel("layer")
    figure.suptitle(headline(report), fontsize=10)
    return for_notebooks(figure)


def check_picture(path: str | Path | None) -> None:
    """Check, before a picture is drawn, that matplotlib can write what its file's name asks for.

    Args:
        path: Where it is to be written; ``None``: nowhere.

    Raises:
        PruningError: The suffix is of no format that it knows, or a folder is there.
    """
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known, suffix = FigureCanvasBase.get_supported_filetypes(), Path(path).suffix.removeprefix(".").lower()
    if suffix and suffix not in known:
        raise PruningError(
            f"path must end with a format that matplotlib writes: {', '.join(sorted(known))}. "
            f"Received: {shown(str(path))}"
        )
    if Path(path).is_dir():
        raise PruningError(f"path must be a picture's file. Received: the folder {shown(str(path))}")


def write_picture(figure: Any, path: str | Path) -> Path:
    """Write a figure in one step, and return its path, which `check_picture` has seen."""
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")  # as matplotlib would have it
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        figure.savefig(file, dpi=150)
    return path


def for_notebooks(figure: Any) -> Any:
    """Let a notebook show a figure also where pyplot, which would leak one open figure a call, was never imported."""
    figure._repr_png_ = partial(_repr_png_, figure)
    return figure


def _repr_png_(figure: Any) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def layer_panels(report: Figures) -> dict[str, Panel]:
    """Sort the groups into panels by what is left of their names without the numbers; experts of a layer add up."""
    panels: dict[str, Panel] = {}
    for name, units in report.units.items():
        place, layer = place_of(name)
        panel = panels.setdefault(place, {})
        kept, whole = panel.get(layer, (0, 0))
        panel[layer] = kept + report.stayed(name), whole + units
    return {name: dict(sorted(panel.items())) for name, panel in panels.items()}


def place_of(name: str) -> tuple[str, tuple[int, ...]]:
    """Return which kind of place a group is, and the numbers of its stage and layer.

    Example:
        >>> place_of("layers.3.attention.heads")
        ('attention.heads', (3,))
    """
    layer = tuple(int(number) for number in _INDEX.findall(name))
    return _EXPERT.sub("experts", _INDEX.sub("", name)), layer


def _draw_panel(ax: Any, name: str, panel: Panel, colour: str) -> None:
    kept, whole = ([pair[which] for pair in panel.values()] for which in (0, 1))
    places = range(len(panel))
    ax.bar(places, whole, width=0.8, color=_EMPTY, edgecolor=_OUTLINE, linewidth=0.8, label="dense")
    ax.bar(places, kept, width=0.8, color=colour, label="kept")
    ax.set_title(
        f"{name}: {sum(kept):,} of {sum(whole):,} kept ({sum(kept) / sum(whole):.0%})", loc="left", fontsize=10
    )
    ax.set_ylabel(name.rsplit(".", 1)[-1].replace("_", " "))
    ax.set_ylim(0, max(whole) * (1.18 if len(panel) <= _LABELLED_LAYERS else 1.06))
    spare = max(0, 6 - len(panel)) / 2  # few layers: slim bars in the middle
    ax.set_xlim(-0.7 - spare, len(panel) - 0.3 + spare)
    ax.yaxis.get_major_locator().set_params(integer=True)
    every = -(-len(panel) // 40)
    labels = [".".join(map(str, layer)) or "all" for layer in panel]
    ax.set_xticks(list(places)[::every], labels[::every], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    if len(panel) <= _LABELLED_LAYERS:
        for place, (stayed, units) in enumerate(zip(kept, whole, strict=True)):
            ax.text(place, units + max(whole) * 0.02, f"{stayed:,}", ha="center", va="bottom", fontsize=8, color=colour)


def pruned_line(report: Figures) -> str:
    """Say in one line what is gone: units by kind, single weights, and what is left of the multiply-accumulates."""
    kinds = {kind.replace("_", " "): pair for kind, pair in _kept_by_kind(report).items()}
    gone = [f"{of - kept:,} of {of:,} {kind}" for kind, (kept, of) in kinds.items() if kept < of]
    share = report.settings.get("sparsity_weight")
    gone += [f"{share:.1%} of single weights in {len(report.masked)} matrices"] if report.masked and share else []
    dense, pruned = (one.prunable_macs if one else None for one in (report.dense, report.pruned))
    left = f": {pruned / dense:.1%} of the prunable MACs left" if dense and pruned is not None else ""
    return f"pruned {', '.join(gone)}{left}" if gone else "pruned nothing"


def headline(report: Figures) -> str:
    """Say in one line what the pruning did, as far as it is known."""
    dense, pruned, parts = report.dense, report.pruned, []
    if dense and pruned:
        parts.append(f"parameters {short(dense.parameters)} → {short(pruned.parameters)}")
        if dense.prunable_macs and pruned.prunable_macs is not None:
            parts.append(f"prunable MACs {short(dense.prunable_macs)} → {short(pruned.prunable_macs)}")
    for name, values in list(report.metrics.items())[:1]:
        if {"dense", "pruned"} <= set(values):
            parts.append(f"{name} {values['dense']:.4f} → {values['pruned']:.4f}")
    return "   ·   ".join(parts) or "What pruning kept"
