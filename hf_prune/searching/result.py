"""What a search has found: each trial's model, the front of them, the smallest that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..report.display import check_picture, write_picture
from ..tables import aligned, write_csv

_GOOD, _BAD, _DENSE = "#2f6db5", "#b8434e", "#5a6470"


@dataclass(frozen=True)
class Candidate:
    """The model of a trial, or the dense one.

    Args:
        trial: Number of the trial; ``None``: the dense model.
        asked: Value of the target's key that was asked for.
        metric: On the rows to evaluate on.
        drop: How much worse than the dense model's metric that is.
        good: Whether it is good enough.
        front: Whether no other trial's model is as good in metric, cost and size and better in one.
        macs: Prunable multiply-accumulates.
        parameters: Their number.
        size_mb: Size of the parameters in 10^6 bytes.
        latency_ms: Of a forward, in milliseconds, as the recipe's `measure` says: the dense model's median over all
            trials, times the share of it that was measured in turn with the dense model.
        folder: Of the model, to load it from.
        begun_from: Number of the trial whose model it was trained on from; ``None``: the dense one.
        seconds: How long the trial took.
    """

    trial: int | None
    asked: float | None
    metric: float
    drop: float
    good: bool
    front: bool
    macs: float
    parameters: float
    size_mb: float
    latency_ms: float
    folder: Path
    begun_from: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class SearchResult:
    """What a search has found, to print, to draw and to write as CSV.

    Args:
        recipe: Its name.
        key: Of the target, which trials changed.
        metric: Name of the metric.
        lower: Whether less of the metric is better.
        max_drop: How much worse than the dense model's it may be.
        dense: The dense model.
        candidates: One entry for each trial that ended, in their order.
        runtime: What latencies were measured in.
    """

    recipe: str
    key: str
    metric: str
    lower: bool
    max_drop: float
    dense: Candidate
    candidates: tuple[Candidate, ...]
    runtime: str

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The models of which none is beaten, the smallest first; each can be loaded from its `folder`."""
        on_it = (one for one in self.candidates if one.front)
        return tuple(sorted(on_it, key=self.cost))

    @property
    def best(self) -> Candidate | None:
        """The smallest model that is good enough; ``None``: none is."""
        good = (one for one in self.candidates if one.good)
        return min(good, key=lambda one: (*self.cost(one), one.drop), default=None)

    def cost(self, one: Candidate) -> tuple[float, float]:
        """Return by what models are compared: latency where the target is a time, else MACs; then the size."""
        return one.latency_ms if self.key in ("speedup", "latency_ms") else one.macs, one.size_mb

    def table(self) -> str:
        """Return all models as an aligned plain-text (Markdown) table, the smallest at the end."""
        titles = ["trial", f"target.{self.key}", self.metric, "drop", "MACs", "parameters", "size, MB"]
        lines = [[*titles, f"{self.runtime}, ms", "verdict"]]
        for one in [self.dense, *sorted(self.candidates, key=self.cost, reverse=True)]:
            lines.append(self._line(one))
        return "\n".join([self.headline, "", *aligned(lines)])

    def _line(self, one: Candidate) -> list[str]:
        name, asked = ("dense", "") if one.trial is None else (str(one.trial), f"{one.asked:g}")
        shares = (
            f"{mine / dense:.1%}"
            for mine, dense in ((one.macs, self.dense.macs), (one.parameters, self.dense.parameters))
        )
        verdict = (
            "" if one.trial is None else "smallest" if one is self.best else "good" if one.good else "lost too much"
        )
        told = f"{verdict}, on the front" if one.front else verdict
        metric = [f"{one.metric:.4f}", f"{one.drop:+.4f}" if one.trial is not None else ""]
        return [name, asked, *metric, *shares, f"{one.size_mb:.2f}", f"{one.latency_ms:.3g}", told]

    @property
    def headline(self) -> str:
        """What was found, in a line."""
        asked = f"{self.recipe}: the smallest model that loses at most {self.max_drop:g} of {self.metric}"
        return f"{asked}: {f'trial {self.best.trial}' if self.best else 'none yet'}"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Show the table in a notebook's cell."""
        return f"<pre>{escape(self.table())}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Return it in types that JSON knows."""
        plain = asdict(self)
        for one in (plain["dense"], *plain["candidates"]):
            one["folder"] = str(one["folder"])
        return {**plain, "candidates": list(plain["candidates"]), "best": self.best.trial if self.best else None}

    def to_csv(self, path: str | Path) -> Path:
        """Write one line for each model, with the fields of `Candidate`, and return the path."""
        return write_csv(path, Candidate, (self.dense, *self.candidates))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the metric over the cost, with the front as a line, and return the figure.

        Args:
            path: Where to write it; the suffix chooses the format (png, svg, pdf). ``None``: nowhere.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            PruningError: Matplotlib writes no such format.
        """
        check_picture(path)
        figure = _drawn(self)
        if path is not None:
            write_picture(figure, path)
        return figure


def _drawn(result: SearchResult) -> Any:
    from matplotlib.figure import Figure

    timed = result.key in ("speedup", "latency_ms")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    ax = figure.subplots()

    def draw(ones: Sequence[Candidate], colour: str, marker: str, label: str) -> None:
        if ones:
            x = [result.cost(one)[0] for one in ones]
            ax.scatter(x, [one.metric for one in ones], color=colour, marker=marker, label=label, zorder=3)

    draw([one for one in result.candidates if one.good], _GOOD, "o", "good enough")
    draw([one for one in result.candidates if not one.good], _BAD, "x", "lost too much")
    draw([result.dense], _DENSE, "s", "dense")
    front = result.front
    ax.plot([result.cost(one)[0] for one in front], [one.metric for one in front], color=_GOOD, lw=1, label="front")
    worst = result.dense.metric + (result.max_drop if result.lower else -result.max_drop)
    ax.axhline(worst, color=_DENSE, lw=0.8, ls="--", label="limit")
    for one in result.candidates:
        ax.annotate(str(one.trial), (result.cost(one)[0], one.metric), xytext=(4, 4), textcoords="offset points")
    ax.set_xscale("log")
    ax.set_xlabel(f"latency in {result.runtime}, ms" if timed else "prunable multiply-accumulates")
    ax.set_ylabel(result.metric)
    ax.set_title(result.headline, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return figure
