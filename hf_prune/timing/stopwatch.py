"""Times a model without some of its units against the whole one, in turn, in torch or in ONNX Runtime."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PruningError
from ..exporting import keep_sums_apart, quiet, to_int8
from ..plan import close_kept
from ..removal import cut
from ..report import (
    compare_latency,
    onnx_subject,
    random_inputs,
    thread_clock,
    torch_subject,
    torch_threads,
    wall_clock,
)
from ..settings import settings
from ..skipping import plain_copy
from ..structure import Group, Kept

Run = Callable[[], object]
_ROUNDS = 5, 100  # of each comparison at least and at most


@settings(frozen=True)
class Conditions:
    """Under which a time is meant.

    Args:
        runtime: ``"onnxruntime"`` or ``"torch"``.
        device: ``"cpu"``, or for torch ``"cuda"``.
        batch: Rows of a forward, at least 1.
        length: Tokens of a row, at least 1; images have none.
        image_size: Pixels of an image's side, at least 1; by default what the model's config says.
        threads: Threads of one operator, at least 1.
        dtype: ``"fp32"``, or ``"int8"``: weights and activations quantized dynamically, in ONNX Runtime.
    """

    runtime: Literal["onnxruntime", "torch"] = "onnxruntime"
    device: str = "cpu"
    batch: int = 1
    length: int = 128
    image_size: int | None = None
    threads: int = 1
    dtype: Literal["fp32", "int8"] = "fp32"


class Stopwatch:
    """Times what a model would be without some units, against the model as it is now, in fp32.

    It keeps a copy of the model (in ONNX Runtime a session of it) to compare with. Where one thread runs on a CPU,
    times are the processor's, without the turns of other processes.

    Args:
        model: A plain model; random inputs must do for it.
        conditions: Under which.

    Raises:
        PruningError: The model cannot be run so.
    """

    def __init__(self, model: nn.Module, conditions: Conditions) -> None:
        self.conditions = conditions
        self._dense = self._prepare(plain_copy(model), "fp32")
        self.dense_ms = self._time({"dense": self._dense}, 0.4)["dense"]

    def ratio(
        self, model: nn.Module, groups: Sequence[Group], kept: Kept, seconds: float = 0.4, dtype: str | None = None
    ) -> float:
        """Return the time of a model that has only these units, as a share of the dense model's.

        Args:
            model: The model as it is now; it is copied.
            groups: Its groups.
            kept: Group name to the live units that stay; groups that are not named keep all.
            seconds: For which both are timed, about.
            dtype: Of the smaller one; by default as the conditions say.
        """
        smaller = plain_copy(model)
        cut(smaller, groups, close_kept(groups, kept))
        times = self._time(
            {"dense": self._dense, "smaller": self._prepare(smaller, dtype or self.conditions.dtype)}, seconds
        )
        return times["smaller"] / times["dense"]

    def _time(self, runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
        told = self.conditions
        clock = thread_clock if (told.threads, told.device) == (1, "cpu") else wall_clock
        with torch_threads(told.threads), torch.inference_mode():
            once = compare_latency(runs, repeats=3, warmup=2, clock=clock)
            rounds = int(min(max(1000 * seconds / sum(once.values()), _ROUNDS[0]), _ROUNDS[1]))
            return compare_latency(runs, repeats=rounds, warmup=1, clock=clock)

    def _prepare(self, model: Any, dtype: str) -> Run:
        try:
            return self._runnable(model, dtype)
        except PruningError:
            raise
        except Exception as error:
            told, reason = self.conditions, f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]:.200}"
            raise PruningError(
                f"A target of time needs a model that runs on random inputs: {type(model).__name__} does not on "
                f"{told.batch} x {told.length}, in {told.runtime} on {told.device}. Received: {reason}"
            ) from error

    def _runnable(self, model: Any, dtype: str) -> Run:
        told = self.conditions
        model = model.to("cpu").float().eval()
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if getattr(getattr(model, "config", None), name, None):
                setattr(model.config, name, False)
        if told.runtime == "onnxruntime":
            return _in_onnxruntime(model, told, dtype)
        inputs = random_inputs(model, told.batch, told.length, image_size=told.image_size)
        run = torch_subject(model.to(told.device), inputs, told.batch, told.length).run
        with torch.no_grad():
            run()  # what cannot run says so now
        return run


class _Outputs(nn.Module):
    """A model that takes and returns plain tensors, as a trace needs them."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return all tensors that the model returns."""
        found = self.model(**dict(zip(self.names, inputs)))
        return tuple(one for one in found.values() if isinstance(one, Tensor))


def _in_onnxruntime(model: Any, told: Conditions, dtype: str) -> Run:
    """Return a forward of a graph with these very shapes, traced: 2 seconds where a real export takes 20."""
    inputs = random_inputs(model, told.batch, told.length, image_size=told.image_size)
    with torch.no_grad():
        model(**inputs)  # what torch cannot run either says so, and not that it cannot be traced
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        _trace(model, inputs, file)
        keep_sums_apart(file)
        if dtype == "int8":
            with quiet():  # ONNX Runtime advises, for each model again, what a traced one does not need
                to_int8(file)
        return onnx_subject(file, inputs, told.batch, told.length, told.threads).run


def _trace(model: Any, inputs: Mapping[str, Tensor], file: Path) -> None:
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        raise PruningError(
            "A time in ONNX Runtime needs `pip install 'hf_prune[onnx]'` (transformers 4.57: [optimum]); or say "
            "runtime='torch'. Received: runtime='onnxruntime'"
        )
    try:
        with quiet(), _masks_for_traces(), torch.no_grad():
            wrapped = _Outputs(model, list(inputs)).eval()
            torch.onnx.export(wrapped, tuple(inputs.values()), str(file), input_names=list(inputs), dynamo=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]:.200}"
        raise PruningError(
            f"{type(model).__name__} cannot be traced for ONNX Runtime: say runtime='torch'. Received: {reason}"
        ) from error


@contextlib.contextmanager
def _masks_for_traces() -> Iterator[None]:
    """Make decoders' masks as optimum has them made for its exports: torch's tracer fails on those of 4.57 (vmap)."""
    try:
        from optimum.exporters.onnx.model_patcher import eager_mask_without_vmap, sdpa_mask_without_vmap
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    except ImportError:  # transformers 5 makes masks that can be traced
        yield
        return
    traced = {"sdpa": sdpa_mask_without_vmap, "eager": eager_mask_without_vmap}
    before = {name: MASKS[name] for name in traced}
    try:
        for name, mask in traced.items():
            MASKS.register(name, mask)
        yield
    finally:
        for name, mask in before.items():
            MASKS.register(name, mask)
