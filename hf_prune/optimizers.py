"""All that is known of optimizers: which state belongs to which entries, and whether a step was really taken."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PruningError

_BY_COLUMN = ("col", "_c")  # ends of names of factored moments that have lost the rows; others have lost the columns
_FRAMES = 12  # how far above an optimizer's step a GradScaler may be


def bare_optimizer(optimizer: Any) -> Any:
    """Return torch's optimizer inside accelerate's or Lightning's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def moments(optimizer: Any, parameter: Tensor) -> list[Tensor]:
    """Return the optimizer's state tensors that have the parameter's shape."""
    state = _state(optimizer, parameter).values()
    return [one for one in state if torch.is_tensor(one) and one.shape == parameter.shape]


def moments_along(optimizer: Any, parameter: Tensor, dim: int) -> list[tuple[Tensor, int]]:
    """Return the state tensors that have an axis for one of the parameter's, and which of theirs it is.

    Factored second moments (Adafactor: Shazeer and Stern 2018, arXiv:1804.04235) have lost one of the last two axes.
    """
    return [(one, axis) for _, one, axis in _along(optimizer, parameter, dim)]


def cut_moments(
    optimizer: Any, parameter: Tensor, dim: int, index: Tensor, select: Callable[[Tensor, int, Tensor], Tensor]
) -> None:
    """Keep these entries along an axis of a parameter in its state; call it while the parameter has its old shape."""
    for key, one, axis in list(_along(optimizer, parameter, dim)):
        _state(optimizer, parameter)[key] = select(one, axis, index)


def check_state(optimizer: Any) -> None:
    """Refuse an optimizer whose state we could neither cut nor zero: before anything is pruned.

    Raises:
        PruningError: Its moments are packed, projected, or lie in lists.
    """
    for parameter, state in getattr(optimizer, "state", {}).items():
        for key, one in state.items() if torch.is_tensor(parameter) and isinstance(state, Mapping) else ():
            if not _is_known(key, one, parameter):
                got = f"{key} of shape {tuple(one.shape)}, {one.dtype}" if torch.is_tensor(one) else f"{key}, a list"
                raise PruningError(
                    "Pruning changes an optimizer's moments with its parameters, so each must have the parameter's "
                    f"shape, or Adafactor's rows and columns: use another optimizer, such as adamw_torch. Received: "
                    f"{type(bare_optimizer(optimizer)).__name__} with {got} for a parameter of "
                    f"shape {tuple(parameter.shape)}"
                )


def swaps_weights(optimizer: Any) -> bool:
    """Whether an optimizer keeps weights in its state too, and swaps them for evaluation, as schedule-free ones do."""
    inner = bare_optimizer(optimizer)
    return all(callable(getattr(inner, name, None)) for name in ("train", "eval"))


class StepWatch:
    """Whether an optimizer has really stepped: a GradScaler leaves out steps whose gradients have overflowed.

    Hooks on the optimizer tell: they run only in a step that is taken, and see what a loop would have to say.

    Args:
        optimizer: The optimizer, or a wrapper around it; ``None``, or one without hooks: every step counts as taken.
        before: Called just before a step that is taken, with the factor that gradients still have; not where a closure
            computes them inside the step, as Lightning's does.

    Attributes:
        in_closure: Whether a step with a closure is under way: gradients are complete when the loop says so.
    """

    def __init__(self, optimizer: Any, before: Callable[[float], None]) -> None:
        self.before, self.scale, self.scaled = before, 1.0, False
        self._taken, self.in_closure = False, False
        inner = bare_optimizer(optimizer)
        self._handles: list[Any] = []
        with contextlib.suppress(AttributeError):  # a wrapper that only looks like an optimizer of torch
            self._handles.append(inner.register_step_pre_hook(torch.compiler.disable(self._before)))  # type: ignore[no-untyped-call]
            self._handles.append(inner.register_step_post_hook(torch.compiler.disable(self._after)))  # type: ignore[no-untyped-call]
        self.watching = len(self._handles) == 2

    def took(self) -> bool:
        """Whether a step was taken since this was last asked."""
        taken, self._taken = self._taken, False
        return taken or not self.watching

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        scaler = _scaler_above(sys._getframe(1))
        self.scaled = scaler is not None and scaler.is_enabled()
        self.scale = float(scaler.get_scale()) if scaler is not None and self.scaled else 1.0
        self.in_closure = any(map(callable, (*args, kwargs.get("closure"))))
        if not (self.in_closure or _overflowed(optimizer)):
            left = getattr(optimizer, "grad_scale", None)  # what a fused optimizer will divide by itself
            self.before(1.0 if left is None else float(left))

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._taken, self.in_closure = self._taken or not _overflowed(optimizer), False


def _overflowed(optimizer: Any) -> bool:
    """Whether a fused optimizer, which a GradScaler always calls, is about to do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _scaler_above(frame: Any) -> Any:
    """Return the GradScaler that is taking this step: in a loop of one's own nobody else tells the loss scale."""
    for _ in range(_FRAMES):
        if frame is None:
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.amp.GradScaler):
            return owner
        frame = frame.f_back
    return None


def _state(optimizer: Any, parameter: Tensor) -> Any:
    return optimizer.state.get(parameter, {}) if optimizer is not None else {}


def _along(optimizer: Any, parameter: Tensor, dim: int) -> Iterator[tuple[str, Tensor, int]]:
    for key, one in _state(optimizer, parameter).items():
        axis = _axes(key, one, parameter.shape).get(dim) if torch.is_tensor(one) else None
        if axis is not None:
            yield key, one, axis


def _axes(key: str, one: Tensor, shape: Sequence[int]) -> dict[int, int]:
    """Return which axis of a state tensor follows which of the parameter's; empty for what holds for all of it."""
    n = len(shape)
    if one.shape == tuple(shape):
        return {axis: axis for axis in range(n)}
    if one.ndim == n:  # torch's Adafactor: the other axis has length 1
        fits = all(mine in (1, theirs) for mine, theirs in zip(one.shape, shape))
        return {axis: axis for axis in range(n) if one.shape[axis] == shape[axis]} if fits else {}
    rows, columns = tuple(shape[:-1]), (*shape[:-2], *shape[-1:])
    if n > 1 and one.shape == columns and (rows != columns or key.endswith(_BY_COLUMN)):
        return {**{axis: axis for axis in range(n - 2)}, n - 1: n - 2}
    return {axis: axis for axis in range(n - 1)} if n > 1 and one.shape == rows else {}


def _is_known(key: str, one: Any, parameter: Tensor) -> bool:
    """Whether we can say which entries of a part of the state belong to which of the parameter's."""
    if isinstance(one, (list, tuple, dict)):
        return not any(torch.is_tensor(part) for part in (one.values() if isinstance(one, dict) else one))
    if not torch.is_tensor(one) or (one.numel() <= 1 and type(one) in (Tensor, torch.nn.Parameter)):
        return True
    plain = type(one) in (Tensor, torch.nn.Parameter) or hasattr(one, "placements")
    return plain and one.is_floating_point() and bool(_axes(key, one, parameter.shape))
