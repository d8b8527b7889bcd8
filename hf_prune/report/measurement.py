"""Count and time models, in torch and in ONNX Runtime."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PruningError
from ..given import told
from ..structure import Group
from .subjects import Inputs, Runtime, count_weights, evaluating, onnx_file, onnx_subject, torch_subject, torch_threads
from .timing import steadiest


@dataclass(frozen=True)
class Measurement:
    """What one model costs.

    Args:
        parameters: Numbers in the model, shared ones once (in an ONNX file: in its weights).
        nonzero: How many of them are not zero.
        prunable_macs: Multiply-accumulates per token or patch of the matrices that pruning can cut; ``None`` where
            the architecture is unknown, and for ONNX files.
        size_mb: Megabytes (1e6 bytes) of weights that a saved model has, or of the ONNX file(s).
        macs: Multiply-accumulates of one whole forward at `batch` x `length`, attention counted in full; ``None`` for
            ONNX files.
        latency_ms: Runtime (``"torch"``, ``"onnxruntime"``) -> median milliseconds of one forward.
        batch: Rows per forward.
        length: Tokens per row; ``None`` where the inputs are not text.
        threads: Threads that the forward may use.
    """

    parameters: int
    nonzero: int
    prunable_macs: int | None
    size_mb: float
    macs: int | None
    latency_ms: dict[str, float]
    batch: int
    length: int | None
    threads: int


def measure(
    model: Any,
    inputs: Inputs | None = None,
    *,
    batch: int = 1,
    length: int = 128,
    runtime: Runtime = "torch",
    threads: int = 1,
    repeats: int = 20,
) -> Measurement:
    """Count and time one model. To compare two, use `measure_pair`: machines are noisy, and it times them in turn.

    Args:
        model: A `PreTrainedModel`; for ``onnxruntime`` an .onnx file or a folder with model.onnx.
        inputs: What the forward takes; by default random inputs of `batch` x `length`.
        batch: Rows per forward, at least 1 (taken from `inputs` where given).
        length: Tokens per row, at least 1 (taken from `inputs` where given); images have none.
        runtime: ``"torch"`` or ``"onnxruntime"``.
        threads: Threads of one operator, at least 1; torch's own setting is put back afterwards.
        repeats: Timed forwards; the median counts. Where they scatter they are timed again, three times at most.

    Raises:
        PruningError: Runtime and model do not fit, or inputs for this model cannot be made up.
    """
    is_path = isinstance(model, (str, Path))
    if is_path != (runtime == "onnxruntime"):
        rule = "runtime 'torch' takes a model, 'onnxruntime' the path of an ONNX file"
        raise PruningError(f"{rule}. Received: {told(model)} for '{runtime}'.")
    (measured,) = _measure_in_turn([model], inputs, batch, length, threads, repeats)
    return measured


def measure_pair(
    dense: Any,
    pruned: Any,
    inputs: Inputs | None = None,
    *,
    onnx: tuple[str | Path, str | Path] | None = None,
    batch: int = 1,
    length: int = 128,
    threads: int = 1,
    repeats: int = 20,
) -> tuple[Measurement, Measurement]:
    """Measure a dense and a pruned model, timed in turn; arguments as for `measure`.

    Args:
        dense: The model before, or its ONNX path.
        pruned: The model after, or its ONNX path.
        inputs: What both forwards take.
        onnx: ONNX paths of both; their latencies join those of torch in ``latency_ms``.
        batch: Rows per forward.
        length: Tokens per row.
        threads: Threads of one operator.
        repeats: Timed forwards of each.
    """
    first, second = _measure_in_turn([dense, pruned], inputs, batch, length, threads, repeats)
    if onnx is not None:
        exported = _measure_in_turn([*onnx], inputs, batch, length, threads, repeats)
        for measured, more in zip((first, second), exported, strict=True):
            measured.latency_ms.update(more.latency_ms)
    return first, second


def _measure_in_turn(
    models: list[Any], inputs: Inputs | None, batch: int, length: int, threads: int, repeats: int
) -> list[Measurement]:
    if min(batch, length, threads) < 1:
        raise PruningError(f"batch, length, threads must be at least 1. Received: {batch}, {length}, {threads}.")
    with ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        subjects = []
        for model in models:
            if isinstance(model, (str, Path)):
                subjects.append(onnx_subject(onnx_file(model), inputs, batch, length, threads))
            else:
                stack.enter_context(evaluating(model))
                subjects.append(torch_subject(model, inputs, batch, length))
        counted = [one.count() for one in subjects]
        times, _ = steadiest({str(n): one.clock for n, one in enumerate(subjects)}, repeats=repeats)
    medians = [statistics.median(one) for one in times.values()]
    timed: list[dict[str, float]] = [{one.runtime: median} for one, median in zip(subjects, medians, strict=True)]
    return [
        Measurement(**figures, latency_ms=latency, **one.shape, threads=threads)
        for one, figures, latency in zip(subjects, counted, timed, strict=True)
    ]


def count(model: Any, groups: Sequence[Group] = ()) -> Measurement:
    """Count what needs no forward pass; `macs` is ``None`` and no latency is measured.

    Args:
        model: The model.
        groups: Where its units are, where that is known: else they are found.
    """
    return Measurement(**count_weights(model, groups), macs=None, latency_ms={}, batch=0, length=None, threads=0)
