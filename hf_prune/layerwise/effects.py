"""What a model loses with each part of each layer: as a table, as CSV, as a heat map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..report.display import check_picture, write_picture
from ..tables import aligned, write_csv

WHOLE = 1.0  # the share of a branch or a layer that goes as one
_LAYER = re.compile(r".*\b(?:layers|stages|blocks)\.\d+(?=\.|$)")
_CALLED = {"head": "heads", "kv_group": "KV groups", "neuron": "neurons", "expert": "experts", "channel": "channels"}


@dataclass(frozen=True)
class Effect:
    """What one part is worth.

    Args:
        place: Which attention, feed-forward part or layer: ``"layers.3.attention"``.
        kind: What goes: ``"head"``, ``"kv_group"``, ``"neuron"``, ``"expert"``, ``"channel"``, ``"branch"`` or
            ``"layer"``.
        share: Of the units of the place that was asked for, in (0, 1]; 1: the branch or layer as one.
        removed: How many units went.
        units: Of how many.
        loss: Mean loss without them.
        increase: How much that is above the whole model's.
    """

    place: str
    kind: str
    share: float
    removed: int
    units: int
    loss: float
    increase: float


class Column(NamedTuple):
    """A column of the table: what goes of each layer, and how much of it."""

    part: str
    kind: str
    share: float

    def __str__(self) -> str:
        return f"{self.part} {self.short}".strip()

    @property
    def short(self) -> str:
        """What goes, without where."""
        if self.kind in ("layer", "branch"):
            return "whole" if self.part else "layer"
        return f"{_CALLED[self.kind]} {self.share:.0%}"


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss rises when parts of each layer go, one part at a time.

    Args:
        loss: Mean loss of the whole model.
        effects: One entry for each part that was masked.
        score: By what units were chosen.
        batches: How many batches the losses are means of.
    """

    loss: float
    effects: tuple[Effect, ...]
    score: str
    batches: int

    def table(self) -> str:
        """Return the rise of the loss as an aligned plain-text (Markdown) table: a row for each layer."""
        rows, columns, rises = self._grid()
        lines = [["loss rises by", *_headers(columns)]]
        for row in rows:
            found = (rises.get((row, column)) for column in columns)
            lines.append([row, *("" if rise is None else f"{rise:+.4f}" for rise in found)])
        return "\n".join([self.headline, "", *aligned(lines)])

    @property
    def headline(self) -> str:
        """What was measured, in a line."""
        return f"Loss of the whole model {self.loss:.4f}, mean of {self.batches} batches; units chosen by {self.score}"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return f"<pre>{escape(self.table())}</pre>"

    def to_csv(self, path: str | Path) -> Path:
        """Write one line for each part, with the fields of `Effect`, and return the path."""
        return write_csv(path, Effect, self.effects)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw a heat map, a row for each layer and a column for each part and share, and return the figure.

        Args:
            path: Where to write it; the suffix chooses the format (png, svg, pdf). ``None``: nowhere.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            PruningError: Matplotlib writes no such format.
        """
        check_picture(path)
        figure = _heat_map(*self._grid(), self.headline)
        if path is not None:
            write_picture(figure, path)
        return figure

    def _grid(self) -> tuple[list[str], list[Column], dict[tuple[str, Column], float]]:
        """Return rows, columns, and what is known of them."""
        rises = {_cell(one): one.increase for one in self.effects}
        rows = sorted({row for row, _ in rises}, key=_natural)
        order = [*dict.fromkeys(column.part for _, column in rises if column.part), ""]
        kinds = list(_CALLED)
        columns = sorted(
            {column for _, column in rises},
            key=lambda one: (
                order.index(one.part),
                kinds.index(one.kind) if one.kind in kinds else len(kinds),
                one.share,
            ),
        )
        return rows, columns, rises


def _headers(columns: Sequence[Column]) -> Iterator[str]:
    """Yield what stands over each column; what goes without saying is left out."""
    part = kind = ""
    for column in columns:
        label = column.short if column.kind != kind else f"{column.share:.0%}"
        yield f"{column.part}: {column.short}" if column.part not in ("", part) else label
        part, kind = column.part, column.kind


def _cell(effect: Effect) -> tuple[str, Column]:
    """Say in which row and column an effect stands: its layer, and what is left of its place without it."""
    layer = _LAYER.match(effect.place)
    if layer is None:  # units that layers share: ``encoder.attention``
        row, _, part = effect.place.rpartition(".")
        return row or "model", Column(part, effect.kind, effect.share)
    return layer[0], Column(effect.place[layer.end() :].lstrip("."), effect.kind, effect.share)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort numbers as numbers: layer 10 behind layer 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _heat_map(rows: list[str], columns: list[Column], rises: dict[tuple[str, Column], float], title: str) -> Any:
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    size = (max(6.0, 2.6 + 0.62 * len(columns)), max(3.2, 2.2 + 0.26 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    nothing = float("nan")
    cells = [[rises.get((row, column), nothing) for column in columns] for row in rows]
    largest = _largest(value for line in cells for value in line)
    # a hundred times between heads that hardly matter and a layer that does: what is small must be seen too
    norm = SymLogNorm(largest / 100, vmin=-largest, vmax=largest)
    picture = ax.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto")
    every = -(-len(rows) // 48)
    ax.set_yticks(range(0, len(rows), every), rows[::every], fontsize=8)
    ax.set_xticks(range(len(columns)), [str(one) for one in columns], fontsize=8, rotation=40, ha="right")
    if len(rows) * len(columns) <= 240:
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                dark = abs(norm(value) - 0.5) > 0.35
                text = f"{value:.2g}" if value == value else ""
                ax.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
    figure.colorbar(picture, ax=ax, label="rise of the loss")
    ax.set_title(title, fontsize=9, loc="left")
    return figure


def _largest(values: Iterable[float]) -> float:
    finite = [abs(value) for value in values if abs(value) < float("inf")]
    return max(finite, default=0.0) or 1.0
