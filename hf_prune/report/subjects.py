"""Models that are ready to be timed, in torch and in ONNX Runtime, and what is counted about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..architectures import prunable_macs
from ..errors import PruningError, UnsupportedModelError, visible
from ..sharding import local, whole
from ..structure import Group, live_shapes, matrix_entries
from .timing import Clock, event_clock, wall_clock

Runtime = Literal["torch", "onnxruntime"]
Inputs = Mapping[str, Any]
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be timed.

    Args:
        runtime: What runs it.
        device: Where it runs.
        inputs: What it is fed.
        run: One forward.
        clock: One forward, and how long it took.
        count: Counts its weights and operations.
    """

    runtime: Runtime
    device: str
    inputs: Inputs
    run: Callable[[], object]
    clock: Clock
    count: Callable[[], dict[str, Any]]

    @property
    def shape(self) -> dict[str, Any]:
        """Rows, and tokens in a row; ``None`` where the inputs are not text."""
        text = self.inputs.get("input_ids")
        return {"batch": len(next(iter(self.inputs.values()))), "length": None if text is None else text.shape[1]}


def check_reads(subject: Subject, what: str) -> None:
    """Run a model once on what it is to be timed on: tables of positions end somewhere, images have one size.

    Args:
        subject: The model.
        what: What the error calls it.

    Raises:
        PruningError: It cannot; torch and ONNX Runtime say so in types and words of their own.
    """
    try:
        subject.run()
    except torch.cuda.OutOfMemoryError:  # says itself what is wrong
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in subject.inputs.items())
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise PruningError(
            f"{what} must be one that the model reads: no longer than its table of positions, images of its size. "
            f"Received: {shapes} ({visible(why[:200])})"
        ) from error


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch uses so many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def random_inputs(
    model_or_config: Any, batch: int = 1, length: int = 128, seed: int = 0, image_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Make up inputs from a config: token ids with a full mask, pixels, or both.

    Args:
        model_or_config: A model, or its config.
        batch: Rows.
        length: Tokens per row of text.
        seed: Of the draw.
        image_size: Pixels of an image's side; by default what the config says.

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
        side = image_size or side
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = _setting(config, "vision_config", "num_channels") or 3
        made["pixel_values"] = torch.randn(batch, channels, height, width, generator=generator)
    return made


def _setting(config: Any, part: str, name: str) -> Any:
    """Return a setting of a config, or of its text or vision part."""
    return getattr(config, name, None) or getattr(getattr(config, part, None), name, None)


# --- a model in torch ------------------------------------------------------------------------------------------------


def torch_subject(model: Any, inputs: Inputs | None, batch: int, length: int, compiled: Any = None) -> Subject:
    """Return a model that is ready to be timed; `compiled` is what `torch.compile` made of it."""
    made = inputs if inputs is not None else random_inputs(model, batch, length)
    first = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    device = first.device
    placed = {name: _place(value, device, first.dtype) for name, value in made.items()}

    forward = model if compiled is None else compiled

    def run() -> None:
        forward(**placed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def launch() -> None:
        forward(**placed)

    clock = event_clock(launch, device) if device.type == "cuda" else wall_clock(run)
    return Subject("torch", device.type, placed, run, clock, lambda: _count_torch(model, placed))


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move an input to the model's device; floats take its dtype too."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def _count_torch(model: Any, inputs: Inputs) -> dict[str, Any]:
    return {**count_weights(model), "macs": _forward_macs(model, inputs)}


def count_weights(model: Any, groups: Sequence[Group] = ()) -> dict[str, Any]:
    """Count what needs no forward pass."""
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


def onnx_file(path: str | Path) -> Path:
    """Return the file that a path, or a folder with model.onnx, means."""
    file = Path(path).expanduser()
    file = file / "model.onnx" if file.is_dir() else file
    if not file.is_file():
        raise PruningError(f"No such ONNX file, or folder with model.onnx. Received: '{path}'.")
    return file


def onnx_subject(file: Path, inputs: Inputs | None, batch: int, length: int, threads: int) -> Subject:
    """Return an ONNX file that is ready to be timed on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    made = inputs if inputs is not None else random_inputs(config_beside(file), batch, length)
    fed = _feed(session, dict(made))

    def run() -> object:
        return session.run(None, fed)

    return Subject("onnxruntime", "cpu", fed, run, wall_clock(run), lambda: _count_onnx(file))


def config_beside(file: Path) -> Any:
    """Return the config in an ONNX file's folder."""
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
