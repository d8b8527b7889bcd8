"""The page itself: what stands in it, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import PruningError
from ..files import write_text
from ..report import Report
from ..report.display import short, table_rows
from .pictures import COLOURS, DARK, Bar, Picture, kept_pictures, latency_picture, scatter_picture, training_picture
from .runs import RunFolder, read_run, runs_in
from .weights import weight_pictures

_OURS = '<meta name="generator" content="hf_prune report">'
_TIMED = {"dense": "torch", "model": "torch", "onnx-dense": "onnxruntime", "onnx": "onnxruntime"}  # a run's own folders
_RUNTIMES = {"torch": "PyTorch", "torch compiled": "PyTorch, compiled", "onnxruntime": "ONNX Runtime"}
_FACTS = ("command", "task", "seed", "base_model", "datasets", "data_config", "hardware")


class Tile(NamedTuple):
    """One number of the headline."""

    what: str
    value: str
    beside: str


@dataclass
class Shown:
    """What the template is told of one run."""

    run: RunFolder
    tiles: list[Tile]
    rows: list[tuple[str, str, str, str]]
    files: list[tuple[str, str, str, str]]
    pictures: dict[str, list[Picture]]
    timings: list[tuple[str, ...]]
    facts: dict[str, str]
    versions: dict[str, str]


def write_page(runs: Sequence[str | Path], output: str | Path | None = None) -> tuple[Path, list[Path]]:
    """Write one self-contained HTML file about one run or several, and its pictures as PNG beside it.

    Args:
        runs: Folders that `hf-prune run` wrote, at least one; that of `hf-prune search` stands for its trials.
        output: The file, ``.html`` where it has no suffix; by default report.html in the run's folder, of several in
            the current one. The pictures go into a folder of its name with ``_pictures`` behind.

    Returns:
        The page's path, and those of the pictures.

    Raises:
        PruningError: A folder is no run, or something that is not such a page lies where it would be written.

    Example:
        >>> write_page(["runs/quickstart"])  # doctest: +SKIP
    """
    if not runs:
        raise PruningError("A report needs at least one run. Received: none")
    output = Path(output).expanduser() if output else Path(runs[0] if len(runs) == 1 else ".") / "report.html"
    output = output if output.suffix or output.is_dir() else output.with_name(f"{output.name}.html")
    _check_output(output)
    read = _named([read_run(one) for run in runs for one in runs_in(run)])
    shown = [_shown(run) for run in read]
    together = [one for one in [_compared(read)] if one is not None]
    page = _render(shown, together)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.stem}_pictures")
    saved = []
    for home, pictures in [(folder, together), *((_home(folder, one, shown), _all(one)) for one in shown)]:
        for picture in pictures:
            home.mkdir(parents=True, exist_ok=True)
            saved.append(picture.save(home))
    return write_text(output, page), saved


def _home(folder: Path, shown: Shown, every: Sequence[Shown]) -> Path:
    return folder if len(every) == 1 else folder / shown.run.name.replace("/", "-")


def _all(shown: Shown) -> list[Picture]:
    return [picture for pictures in shown.pictures.values() for picture in pictures]


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise PruningError(f"--output must be a file, such as report.html. Received: '{output}', a folder")
    if output.exists() and _OURS not in output.read_text("utf-8", errors="replace")[:2000]:
        raise PruningError(
            f"--output must be a new file, or a page that hf-prune report wrote. Received: '{output}', which is neither"
        )


def _named(runs: list[RunFolder]) -> list[RunFolder]:
    """Give each run a name of its own: its folder's, with its parent's where several share it."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            whole = run.folder.resolve()
            run.name = f"{whole.parent.name}/{whole.name}"
    taken: dict[str, int] = {}
    for run in runs:
        taken[run.name] = taken.get(run.name, 0) + 1
        run.name += f" ({taken[run.name]})" if taken[run.name] > 1 else ""
    return runs


def _shown(run: RunFolder) -> Shown:
    training, latency = training_picture(run.log), latency_picture(_latency_bars(run))
    pictures = {
        "kept": list(kept_pictures(run.report)),
        "training": [training] if training else [],
        "weights": list(weight_pictures(run.folder)),
        "latency": [latency] if latency else [],
    }
    tiles, rows = list(_tiles(run)), list(table_rows(run.report))
    facts, versions = _facts(run.report.settings)
    return Shown(run, tiles, rows, list(_files(run)), pictures, list(_timing_rows(run)), facts, versions)


# --- the headline ----------------------------------------------------------------------------------------------------


def main_metric(report: Report) -> tuple[str, float, float] | None:
    """Return the first metric that both models have: its name, dense, pruned; a loss only where there is no other."""
    both = [
        (name, one["dense"], one["pruned"]) for name, one in report.metrics.items() if {"dense", "pruned"} <= {*one}
    ]
    return min(both, key=lambda one: one[0] == "loss", default=None)


def speed_up(report: Report) -> tuple[str, float] | None:
    """Return the runtime in which the pruned model runs fastest, and how many times the dense one's speed that is."""
    dense, pruned = report.dense, report.pruned
    if dense is None or pruned is None:
        return None
    both = [name for name, time in pruned.latency_ms.items() if time > 0 and dense.latency_ms.get(name)]
    fastest = min(both, key=lambda name: pruned.latency_ms[name], default=None)
    return fastest and (fastest, dense.latency_ms[fastest] / pruned.latency_ms[fastest])  # type: ignore[return-value]


def _tiles(run: RunFolder) -> Iterator[Tile]:
    report, metric, faster = run.report, main_metric(run.report), speed_up(run.report)
    if metric:
        name, dense, pruned = metric
        yield Tile(name, f"{pruned:.4f}", f"{pruned - dense:+.4f} against dense {dense:.4f}")
    if faster and report.pruned:
        runtime, times = faster
        measured = report.pruned
        at = f"batch {measured.batch}" + (f" x {measured.length} tokens" if measured.length else "")
        threads = f"{measured.threads} thread{'s' * (measured.threads > 1)}"
        yield Tile("measured speed-up", f"{times:.2f}x", f"{_RUNTIMES.get(runtime, runtime)}, {at}, {threads}")
    yield from _aimed(report.settings)
    if report.dense and report.pruned and report.dense.size_mb and report.pruned.size_mb:
        before, after = report.dense.size_mb, report.pruned.size_mb
        yield Tile("size", f"{after:,.3g} MB", f"{after / before:.0%} of {before:,.3g} MB")
        left = report.pruned.parameters / max(report.dense.parameters, 1)
        counts = f"{short(report.dense.parameters)} to {short(report.pruned.parameters)}"
        yield Tile("parameters left", f"{left:.0%}", counts)


def _aimed(told: Mapping[str, Any]) -> Iterator[Tile]:
    """Yield the time that was aimed at, where it was measured."""
    asked, predicted, measured = (told.get(f"{name}_ms") for name in ("asked", "predicted", "measured"))
    if all(isinstance(one, (int, float)) for one in (asked, predicted, measured)):
        beside = f"asked for {asked:.4g} ms; the table predicted {predicted:.4g} ms"
        yield Tile("time that was aimed at", f"{measured:.4g} ms", beside)


# --- tables ----------------------------------------------------------------------------------------------------------


def _files(run: RunFolder) -> Iterator[tuple[str, str, str, str]]:
    """Yield folder, format, megabytes and the latency that the report says it has."""
    exported = {row.get("folder"): row.get("latency_ms") for row in run.report.exports}
    for file in run.files:
        measured = run.report.dense if file.dense else run.report.pruned
        runtime = _TIMED.get(file.name)
        time = measured.latency_ms.get(runtime) if measured and runtime else None
        time = exported.get(file.name) if time is None else time  # `onnx` may be one of a recipe's exports alone
        known = isinstance(time, (int, float))
        yield file.name, file.format, f"{file.size_mb:,.2f}", f"{time:.4g}" if known else ""


def _latency_bars(run: RunFolder) -> dict[str, list[Bar]]:
    groups: dict[str, list[Bar]] = {}
    for one in run.timings:
        what = f"{_RUNTIMES.get(one.runtime, one.runtime)}, {one.shape}"
        groups.setdefault(what, []).append(
            Bar(one.model, one.median_ms, one.p90_ms, _colour(one.model), "" if one.steady else " (unsteady)")
        )
    if not groups:
        for name, measured in (("dense", run.report.dense), ("pruned", run.report.pruned)):
            for runtime, time in (measured.latency_ms if measured else {}).items():
                groups.setdefault(_RUNTIMES.get(runtime, runtime), []).append(Bar(name, time, None, _colour(name)))
    return groups


def _colour(model: str) -> str:
    return "muted" if "dense" in model else "blue"


def _timing_rows(run: RunFolder) -> Iterator[tuple[str, ...]]:
    for one in run.timings:
        memory = f"{one.peak_mb:,.0f}" if one.peak_mb else ""
        steady = "" if one.steady else f"unsteady: +{one.spread:.0%}"
        where = (
            f"{_RUNTIMES.get(one.runtime, one.runtime)}, {one.device}, {one.threads} thread{'s' * (one.threads > 1)}"
        )
        yield one.model, where, one.shape, f"{one.median_ms:.4g}", f"{one.p90_ms:.4g}", memory, steady


def _facts(settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return how the run was done, and with which versions."""
    told = {name.replace("_", " "): _words(settings.get(name)) for name in _FACTS}
    rows, splits = settings.get("rows") or {}, settings.get("splits") or {}
    for what, key in (("trained on", "train"), ("evaluated on", "evaluation")):
        if rows.get(key):
            told[what] = f"{rows[key]:,} rows" + (f" of {_words(splits[key])}" if splits.get(key) else "")
    versions = settings.get("versions")
    found = {str(key): _words(value) for key, value in versions.items()} if isinstance(versions, Mapping) else {}
    return {key: value for key, value in told.items() if value}, {key: value for key, value in found.items() if value}


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return "" if value is None or isinstance(value, Mapping) else str(value)


# --- several runs ----------------------------------------------------------------------------------------------------


def _compared(runs: Sequence[RunFolder]) -> Picture | None:
    """Draw each run's metric over its speed-up, where all have the same metric."""
    metrics = [main_metric(run.report) for run in runs]
    names = {one[0] for one in metrics if one}
    points = [
        (run.name, faster[1], metric[2])
        for run, metric in zip(runs, metrics, strict=True)
        if metric and (faster := speed_up(run.report))
    ]
    return scatter_picture(points, "measured speed-up", names.pop()) if len(names) == 1 else None


def _render(shown: Sequence[Shown], together: Sequence[Picture]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, **options)
    environment.filters["svg"] = lambda picture: Markup(picture.svg())  # matplotlib has escaped its text
    template = environment.get_template("report.html.j2")
    names = [one.run.name for one in shown]
    title = f"{names[0]}: pruning report" if len(names) == 1 else f"{len(names)} pruning runs"
    return template.render(
        runs=shown, together=together, title=title, ours=Markup(_OURS), colours=COLOURS, dark=DARK, version=__version__
    )
