"""Time models over a grid of inputs, in several runtimes: medians, 90th percentiles, and whether to trust them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import PruningError, shown, visible
from .machine import environment
from .measurement import Measurement
from .memory import peak_bytes
from .subjects import (
    Subject,
    check_reads,
    config_beside,
    evaluating,
    onnx_file,
    onnx_subject,
    random_inputs,
    torch_subject,
    torch_threads,
)
from .timing import STEADY, spread_of, steadiest

logger = logging.getLogger(__name__)
COMPILED = "torch compiled"
_TYPES: dict[str, type | tuple[type, ...]] = {"model": str, "runtime": str, "device": str, "steady": bool}
_NONE = {"length", "peak_mb"}  # these may be unknown


@dataclass(frozen=True)
class Timing:
    """How long one forward of one model takes, in one runtime on one input.

    Args:
        model: Its name.
        runtime: ``"torch"``, ``"torch compiled"`` or ``"onnxruntime"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch: Rows per forward.
        length: Tokens per row; ``None`` where the inputs are not text.
        threads: Threads of one operator.
        median_ms: Milliseconds.
        p90_ms: Milliseconds that nine of ten forwards stay below.
        spread: How far that lies above the median, as a share of it.
        rounds: How often the cell was measured, because it was unsteady.
        steady: Whether `spread` is small enough to trust the figures.
        peak_mb: Megabytes (1e6 bytes) of weights, and of what a forward makes beside them; ``None`` where the
            runtime does not tell.
    """

    model: str
    runtime: str
    device: str
    batch: int
    length: int | None
    threads: int
    median_ms: float
    p90_ms: float
    spread: float
    rounds: int
    steady: bool
    peak_mb: float | None = None

    @property
    def shape(self) -> str:
        """The input in words: ``8 x 128 tokens``."""
        return f"{self.batch} x {self.length} tokens" if self.length else f"batch of {self.batch}"

    @classmethod
    def from_dict(cls, row: Any) -> Timing:
        """Return what a file says, which may be a stranger's.

        Raises:
            PruningError: A key is missing, or its value is of another type.
        """
        known = {one.name: row[one.name] for one in fields(cls) if one.name in row} if isinstance(row, Mapping) else {}
        for name in (one.name for one in fields(cls)):
            value, kinds = known.get(name), _TYPES.get(name, (int, float))
            unsound = not isinstance(value, kinds) or (isinstance(value, float) and not 0 <= value < 1e12)
            if unsound and not (value is None and name in _NONE):
                raise PruningError(
                    f"A timing's '{name}' must be as `hf-prune measure --json` writes it. Received: {shown(value)}"
                )
        return cls(**known)


@dataclass
class Grid:
    """What was measured over a grid.

    Args:
        timings: One for each model, runtime and input.
        counted: Model -> what was counted of it; its latency is that of the first input.
        environment: On what.
    """

    timings: list[Timing] = field(default_factory=list)
    counted: dict[str, Measurement] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def unsteady(self) -> list[Timing]:
        """The figures that are not to be trusted."""
        return [one for one in self.timings if not one.steady]

    def to_dict(self) -> dict[str, Any]:
        """Return it in types that JSON knows."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield model, runtime, input, median, 90th percentile, speed against the first model, peak memory, a note."""
        first: dict[Any, float] = {}
        for one in self.timings:
            base = first.setdefault((one.runtime, one.batch, one.length), one.median_ms)
            speed = "" if base is one.median_ms else f"{base / one.median_ms:.2f}x speed"
            memory = f"{one.peak_mb:,.1f}" if one.peak_mb else "-"
            note = "" if one.steady else f"unsteady: +{one.spread:.0%}"
            figures = f"{one.median_ms:.4g}", f"{one.p90_ms:.4g}"
            yield one.model, f"{one.runtime}, {one.device}", one.shape, *figures, speed, memory, note


def measure_grid(
    models: Mapping[str, Any],
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    threads: int = 1,
    image_size: int | None = None,
    repeats: int = 20,
    compiled: bool | str = False,
    tell: Callable[[str], None] = logger.info,
) -> Grid:
    """Time models over batches and lengths; those of one runtime in turn, so that noise falls on all alike.

    A cell whose 90th percentile lies more than 15 % above its median is measured again, three times at most, and the
    steadiest round counts.

    Args:
        models: Name -> a model, or the path of an ONNX file or a folder with model.onnx; the dense one first.
        batches: Rows per forward, each at least 1.
        lengths: Tokens per row, each at least 1; images have none.
        threads: Threads of one operator in every runtime, at least 1.
        image_size: Pixels of an image's side, at least 1; by default what the model's config says, which may be another
            size than its processor cuts (DINOv2: 518 and 224).
        repeats: Timed forwards of each in a round.
        compiled: Whether to time what `torch.compile` makes of each model too; a text names its backend.
        tell: Is told what is measured again.

    Raises:
        PruningError: A number is below 1, no inputs can be made up for a model, or there is no compiler.

    Example:
        >>> measure_grid({"dense": model}, batches=[1, 8], lengths=[16]).timings  # doctest: +SKIP
    """
    sizes = [*batches, *lengths, threads, repeats, *([] if image_size is None else [image_size])]
    if min(sizes) < 1 or not (batches and lengths and models):
        numbers = f"{[*batches]}, {[*lengths]}, {threads}, {repeats}, {image_size}"
        raise PruningError(f"batch, length, threads, repeats, image_size must be at least 1. Received: {numbers}.")
    grid = Grid(environment=environment())
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for model in models.values():
            if not isinstance(model, (str, Path)):
                stack.enter_context(evaluating(model))
        for runtime, chosen in _runtimes(models, compiled):
            cells = dict.fromkeys((batch, length) for batch in batches for length in lengths)
            for cell in cells:
                if runtime == COMPILED:
                    torch.compiler.reset()  # behind a few shapes it would quietly run eagerly
                subjects = {
                    name: _subject(runtime, model, *cell, image_size, threads, compiled)
                    for name, model in chosen.items()
                }
                for name, subject in subjects.items():
                    check_reads(subject, f"{name}: its input")
                _measure_cell(grid, runtime, subjects, models, threads, repeats, tell)
    return grid


def _runtimes(models: Mapping[str, Any], compiled: bool | str) -> Iterator[tuple[str, dict[str, Any]]]:
    files = {name: model for name, model in models.items() if isinstance(model, (str, Path))}
    live = {name: model for name, model in models.items() if name not in files}
    yield from [("torch", live)] if live else []
    yield from [(COMPILED, live)] if live and compiled else []
    yield from [("onnxruntime", files)] if files else []


def _subject(
    runtime: str, model: Any, batch: int, length: int, image_size: int | None, threads: int, compiled: bool | str
) -> Subject:
    source = config_beside(onnx_file(model)) if runtime == "onnxruntime" else model
    inputs = random_inputs(source, batch, length, image_size=image_size)
    if runtime != COMPILED:
        if runtime == "torch":
            return torch_subject(model, inputs, batch, length)
        return onnx_subject(onnx_file(model), inputs, batch, length, threads)
    try:
        backend = compiled if isinstance(compiled, str) else "inductor"
        made: Any = torch.compile(model, dynamic=False, backend=backend)
        subject = torch_subject(model, inputs, batch, length, made)
        subject.run()
    except Exception as error:  # torch's compilers fail in many ways
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise PruningError(
            f"torch.compile needs a model and a C++ compiler that it can use. Received: {visible(why[:200])}"
        ) from error
    return subject


def _measure_cell(
    grid: Grid,
    runtime: str,
    subjects: Mapping[str, Subject],
    models: Mapping[str, Any],
    threads: int,
    repeats: int,
    tell: Callable[[str], None],
) -> None:
    """Add one runtime's figures of one input; of images, which have no length, the first one's."""
    shape = next(iter(subjects.values())).shape
    if any((one.runtime, one.batch, one.length) == (runtime, *shape.values()) for one in grid.timings):
        return
    clocks = {name: one.clock for name, one in subjects.items()}
    times, rounds = steadiest(clocks, repeats=repeats, again=lambda spread: tell(_again(runtime, shape, spread)))
    for name, subject in subjects.items():
        median, high = np.percentile(times[name], [50, 90]).tolist()
        spread = spread_of(times[name])
        peak = peak_bytes(models[name], subject.inputs, subject.run) / 1e6 if runtime == "torch" else None
        told = {"spread": round(spread, 4), "rounds": rounds, "steady": spread <= STEADY, "peak_mb": peak}
        figures = {"median_ms": median, "p90_ms": high, **told}
        grid.timings.append(Timing(name, runtime, subject.device, **shape, threads=threads, **figures))
        if runtime != COMPILED and name not in grid.counted:
            latency: dict[str, float] = {subject.runtime: median}
            grid.counted[name] = Measurement(**subject.count(), latency_ms=latency, **shape, threads=threads)


def _again(runtime: str, shape: Mapping[str, Any], spread: float) -> str:
    at = " x ".join(str(value) for value in shape.values() if value)
    return f"{runtime}, {at}: unsteady (the 90th percentile lies {spread:.0%} above the median), measuring again"
