"""Count and time models, in torch and in ONNX Runtime."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..architectures import prunable_macs
from ..errors import PruningError, UnsupportedModelError
from ..given import told
from ..sharding import local, whole
from ..structure import Group, live_shapes, matrix_entries

Runtime = Literal["torch", "onnxruntime"]
Inputs = Mapping[str, Any]
_MEGABYTE = 1e6


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
        repeats: Timed forwards; the median counts.

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


def compare_latency(
    runs: Mapping[str, Callable[[], object]], *, repeats: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Time several callables in turn (a b a b …) and return each one's median in milliseconds.

    Args:
        runs: Name -> what to time; on an accelerator it must wait until the work is done.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before them that do not count.
    """
    if repeats < 1:
        raise PruningError(f"repeats must be at least 1. Received: {repeats}.")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


def random_inputs(model_or_config: Any, batch: int = 1, length: int = 128, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make up inputs from a config: token ids with a full mask, pixels, or both.

    Args:
        model_or_config: A model, or its config.
        batch: Rows.
        length: Tokens per row of text.
        seed: Of the draw.

    Returns:
        ``input_ids`` and ``attention_mask`` ``(batch, length)`` and ``decoder_input_ids`` where the model is an
        encoder-decoder; ``pixel_values`` ``(batch, channels, height, width)``.

    Raises:
        PruningError: The model reads something else (sound, boxes): pass inputs of your own.
    """
    config = getattr(model_or_config, "config", model_or_config)
    reads = getattr(model_or_config, "main_input_name", "input_ids")
    words = _setting(config, "text_config", "vocab_size")
    side = _setting(config, "vision_config", "image_size")
    if reads not in ("input_ids", "pixel_values") or (words is None and side is None):
        raise PruningError(f"No inputs can be made up for this model: pass inputs. Received: {type(config).__name__}.")
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    if words is not None:
        made["input_ids"] = torch.randint(words, (batch, length), generator=generator)
        made["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = torch.randint(words, (batch, length), generator=generator)
    if side is not None:
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = _setting(config, "vision_config", "num_channels") or 3
        made["pixel_values"] = torch.randn(batch, channels, height, width, generator=generator)
    return made


def _setting(config: Any, part: str, name: str) -> Any:
    """Return a setting of a config, or of its text or vision part."""
    return getattr(config, name, None) or getattr(getattr(config, part, None), name, None)


@dataclass
class _Subject:
    """A model that is ready to be timed, and what was counted about it."""

    runtime: Runtime
    counted: dict[str, Any]
    run: Callable[[], object]
    inputs: Inputs


def _measure_in_turn(
    models: list[Any], inputs: Inputs | None, batch: int, length: int, threads: int, repeats: int
) -> list[Measurement]:
    if min(batch, length, threads) < 1:
        raise PruningError(f"batch, length, threads must be at least 1. Received: {batch}, {length}, {threads}.")
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        subjects = []
        for model in models:
            if isinstance(model, (str, Path)):
                subjects.append(_onnx_subject(_onnx_file(model), inputs, batch, length, threads))
            else:
                stack.enter_context(_evaluating(model))
                subjects.append(_torch_subject(model, inputs, batch, length))
        latency = compare_latency({str(n): one.run for n, one in enumerate(subjects)}, repeats=repeats)
    timed: list[dict[str, float]] = [{one.runtime: latency[str(number)]} for number, one in enumerate(subjects)]
    return [
        Measurement(**one.counted, latency_ms=time_ms, **_shape(one.inputs), threads=threads)
        for one, time_ms in zip(subjects, timed, strict=True)
    ]


def _shape(inputs: Inputs) -> dict[str, Any]:
    text = inputs.get("input_ids")
    return {"batch": len(next(iter(inputs.values()))), "length": None if text is None else text.shape[1]}


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# --- a model in torch ------------------------------------------------------------------------------------------------


def _torch_subject(model: Any, inputs: Inputs | None, batch: int, length: int) -> _Subject:
    made = inputs if inputs is not None else random_inputs(model, batch, length)
    first = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    device = first.device
    placed = {name: _place(value, device, first.dtype) for name, value in made.items()}

    def run() -> None:
        model(**placed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _Subject("torch", _count_torch(model, placed), run, placed)


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move an input to the model's device; floats take its dtype too."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def count(model: Any, groups: Sequence[Group] = ()) -> Measurement:
    """Count what needs no forward pass; `macs` is ``None`` and no latency is measured.

    Args:
        model: The model.
        groups: Where its units are, where that is known: else they are found.
    """
    return Measurement(**_count_weights(model, groups), macs=None, latency_ms={}, batch=0, length=None, threads=0)


def _count_torch(model: Any, inputs: Inputs) -> dict[str, Any]:
    return {**_count_weights(model), "macs": _forward_macs(model, inputs)}


def _count_weights(model: Any, groups: Sequence[Group] = ()) -> dict[str, Any]:
    parameters = list(model.parameters())
    stored = {_memory(tensor): tensor.nbytes for tensor in model.state_dict().values()}
    try:
        cuttable = matrix_entries(groups, live_shapes(model)) if groups else prunable_macs(model)
    except UnsupportedModelError:
        cuttable = None
    return {
        "parameters": sum(one.numel() for one in parameters),
        "nonzero": sum(int(whole(one.detach()).count_nonzero()) for one in parameters),
        "prunable_macs": cuttable,
        "size_mb": sum(stored.values()) / _MEGABYTE,
    }


def _memory(tensor: Any) -> Any:
    """Tell tied tensors from others; of a sharded one by the part that lies here, which may be empty."""
    part = local(tensor)
    return (part.data_ptr(), tensor.shape) if part.numel() or part is tensor else id(tensor)


def _forward_macs(model: Any, inputs: Inputs) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def grouped(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return int(2 * a[0] * b[-2] * b[-1])  # tokens, sorted by expert, each through one matrix

    def recurrent(tokens: Any, inputs: Any, hidden: Any, *args: Any, **kwargs: Any) -> int:
        return int(2 * math.prod(tokens[:-1]) * (math.prod(inputs) + math.prod(hidden)))

    # torch counts neither its CPU kernels of attention and recurrent layers nor the experts' grouped product: so
    # attention is done by plain matrix products here, which are counted, and the others get their formulas
    formulas = {"_grouped_mm": grouped, "mkldnn_rnn_layer": recurrent}
    known = {getattr(torch.ops.aten, name, None): formula for name, formula in formulas.items()}
    counter = FlopCounterMode(display=False, custom_mapping={one: formula for one, formula in known.items() if one})
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return int(counter.get_total_flops()) // 2


# --- a model in ONNX Runtime -----------------------------------------------------------------------------------------

_ONNX_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int32)": np.int32}


def _onnx_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    file = file / "model.onnx" if file.is_dir() else file
    if not file.is_file():
        raise PruningError(f"No such ONNX file, or folder with model.onnx. Received: '{path}'.")
    return file


def _onnx_subject(file: Path, inputs: Inputs | None, batch: int, length: int, threads: int) -> _Subject:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    made = inputs if inputs is not None else random_inputs(_config_beside(file), batch, length)
    fed = _feed(session, dict(made))
    return _Subject("onnxruntime", _count_onnx(file), lambda: session.run(None, fed), fed)


def _config_beside(file: Path) -> Any:
    from transformers import AutoConfig

    if not (file.parent / "config.json").is_file():
        raise PruningError(
            f"No config.json beside the ONNX file says what to feed it: pass inputs. Received: '{file}'."
        )
    return AutoConfig.from_pretrained(str(file.parent))


def _feed(session: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Return exactly what the file asks for, in its types; token types and positions are made from the ids."""
    if "input_ids" in made:
        made.setdefault("token_type_ids", np.zeros_like(made["input_ids"]))
        made.setdefault("position_ids", np.zeros_like(made["input_ids"]) + np.arange(made["input_ids"].shape[1]))
    asked = {one.name: one.type for one in session.get_inputs()}
    missing = sorted(set(asked) - set(made))
    if missing:
        raise PruningError(f"The ONNX file asks for {', '.join(missing)}: pass inputs. Received: {sorted(made)}.")
    return {name: np.asarray(made[name]).astype(_ONNX_TYPES.get(kind, np.int64)) for name, kind in asked.items()}


def _count_onnx(file: Path) -> dict[str, Any]:
    import onnx

    kinds = onnx.TensorProto
    weights = {kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE, kinds.INT8, kinds.UINT8}
    stored = onnx.load(str(file), load_external_data=False).graph.initializer
    beside = {entry.value for one in stored for entry in one.external_data if entry.key == "location"}
    arrays = (onnx.numpy_helper.to_array(one, str(file.parent)) for one in stored if one.data_type in weights)
    counts = [(array.size, np.count_nonzero(array)) for array in arrays]
    return {
        "parameters": sum(size for size, _ in counts),
        "nonzero": sum(int(nonzero) for _, nonzero in counts),
        "prunable_macs": None,
        "size_mb": sum(one.stat().st_size for one in (file, *(file.parent / name for name in beside))) / _MEGABYTE,
        "macs": None,
    }
