"""A model as it was, to go back to: for guards, for rewinding, and for a Trainer that begins again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError


class Snapshot:
    """The weights of a model, and perhaps the moments of its optimizer and the state of a session's parts.

    It is held in the CPU's memory.

    Args:
        model: The model, not wrapped.
        optimizer: Its state is kept too; ``None``: what is gone back to starts without moments.
        parts: State of whatever else goes back, by name.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, parts: Mapping[str, Any] | None = None) -> None:
        self.weights = {name: one.detach().cpu().clone() for name, one in _tensors(model).items()}
        self.moments = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self.parts = copy.deepcopy(dict(parts or {}))
        self.forwards = forwards_of(model)

    def restore(self, model: nn.Module, optimizer: Any = None) -> None:
        """Let a model, and its optimizer, be as they were; the parts are for whoever owns them.

        Raises:
            PruningError: The model has lost units since.
        """
        live = _tensors(model)
        smaller = next((name for name, one in self.weights.items() if live[name].shape != one.shape), None)
        if smaller is not None:
            raise PruningError(
                f"What was removed physically cannot come back: masks must stay masks. Received: '{smaller}' of shape "
                f"{tuple(live[smaller].shape)}"
            )
        with torch.no_grad():
            for name, value in self.weights.items():
                live[name].copy_(value)
                live[name].grad = None
        put_forwards(model, self.forwards)
        if optimizer is not None and self.moments is None:
            optimizer.state.clear()
        elif optimizer is not None:
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(copy.deepcopy(self.moments))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate  # it is the schedule's, whose steps go on

    def state_dict(self) -> dict[str, Any]:
        """Return weights, moments and parts."""
        return {"weights": self.weights, "moments": self.moments, "parts": self.parts}

    def load_state_dict(self, state: Mapping[str, Any], forwards: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, with the forwards that modules had of their own then."""
        self.weights, self.moments, self.parts = dict(state["weights"]), state["moments"], state["parts"]
        self.forwards = dict(forwards)


def forwards_of(model: nn.Module) -> dict[str, Any]:
    """Return the forwards that modules have of their own: of what is skipped."""
    return {path: one.__dict__["forward"] for path, one in model.named_modules() if "forward" in one.__dict__ and path}


def put_forwards(model: nn.Module, forwards: Mapping[str, Any]) -> None:
    """Give modules back the forwards that they had: what is skipped since runs again."""
    for path, module in model.named_modules():
        if path:  # an outer forward is a wrapper's, as accelerate sets it
            module.__dict__.pop("forward", None)
            if path in forwards:
                module.__dict__["forward"] = forwards[path]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
