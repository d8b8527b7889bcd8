"""What a Trainer asks of the student while it computes its loss, and what the student answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import bare

FUSED = "fused_lm_head"  # TRL asks its models so for log-probabilities of labels, and gets no logits
BESIDE = {FUSED, "labels", "shift_labels", "num_items_in_batch"}


@dataclass
class Forward:
    """One forward with gradients.

    Args:
        inputs: What the model read, by the names of its arguments.
        outputs: What it returned.
        inside: What was collected inside it.
        backbone: What the model without its head returned; only where the head was fused.
    """

    inputs: dict[str, Any]
    outputs: Any
    inside: Any
    backbone: Any = None


@contextmanager
def hear(model: nn.Module, student: nn.Module, collect: Callable[[ExitStack], Any]) -> Iterator[list[Forward]]:
    """Collect the forwards with gradients that a model runs: a Trainer may run several, and others for figures only.

    Args:
        model: The student, possibly wrapped.
        student: The same, not wrapped.
        collect: Starts to listen inside the student until the stack closes; returns what will hold it.

    Yields:
        The forwards, in their order, filled as the model runs.
    """
    names = list(inspect.signature(type(bare(student)).forward).parameters)[1:]
    forwards: list[Forward] = []
    running = ExitStack()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        running.close()
        forwards[:] = [one for one in forwards if one.outputs is not None]  # one that failed, and is tried again
        given = dict(zip(names, args), **kwargs)  # sentence-transformers write their results into what they are given
        given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
        forward = Forward(given, None, collect(running))
        forwards.append(forward)
        if given.get(FUSED):
            base: Any = bare(student)
            running.callback(base.base_model.register_forward_hook(lambda *seen: _keep(forward, seen[2])).remove)

    def after(_: nn.Module, __: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() and forwards:
            forwards[-1].outputs = outputs
            running.close()

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield forwards
    finally:
        running.close()
        for handle in handles:
            handle.remove()


def _keep(forward: Forward, outputs: Any) -> None:
    forward.backbone = outputs


def answers(student: Any, forward: Forward) -> Mapping[str, Any]:
    """Return a forward's outputs by name, with logits where the model has a head that was fused."""
    outputs = forward.outputs
    if forward.backbone is not None and forward.inputs.get(FUSED):
        with _standing_in(bare(student).base_model, forward.backbone):
            outputs = student(**{key: value for key, value in forward.inputs.items() if key not in BESIDE})
    return by_name(student, outputs)


@contextmanager
def _standing_in(backbone: Any, outputs: Any) -> Iterator[None]:
    """Let a model without its head return what it has computed already, so that the head alone runs again."""
    own = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: outputs
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


def by_name(model: Any, outputs: Any) -> Mapping[str, Any]:
    """Return outputs by name; of a tuple (``return_dict=False``) by their place, its loss left out."""
    if isinstance(outputs, Mapping):
        return outputs
    values = [value for value in outputs if torch.is_tensor(value) and value.ndim > 0]
    inside: Any = bare(model)
    if "QuestionAnswering" in type(inside).__name__:
        return dict(zip(("start_logits", "end_logits"), values))
    return {"last_hidden_state" if getattr(inside, "base_model", None) is inside else "logits": values[0]}


def loss_of(outputs: Any) -> torch.Tensor | None:
    """Return the loss among a model's outputs; ``None``: there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0]
    return first if torch.is_tensor(first) and first.ndim == 0 else None


def flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with those that come as one dict beside the others, as sentence-transformers hand them over."""
    nested = [value for value in inputs.values() if isinstance(value, dict)]
    return {**inputs, **{key: value for one in nested for key, value in one.items()}}
