"""Loading pruned models, and the hook that lets every `from_pretrained` read them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..architectures import find_groups
from ..errors import CheckpointError, PruningError, UnsupportedModelError
from ..plan import BLOCK, close_kept, read_record
from ..removal import cut


def load_pruned(path_or_repo: str | Path, *, model_class: Any = None, **from_pretrained_kwargs: Any) -> Any:
    """Load a pruned model as the class that was saved; `AutoModelFor….from_pretrained` does the same.

    Args:
        path_or_repo: A folder, or a name on the Hub.
        model_class: Another class, such as a base model or another head; ``None`` takes ``config.architectures``.
        **from_pretrained_kwargs: Passed on: ``dtype``, ``device_map``, ``revision``, ``token`` …

    Returns:
        The small model.

    Raises:
        CheckpointError: The plan does not fit the model, or the config names no class.
    """
    import transformers

    if model_class is None:
        loading = {
            key: from_pretrained_kwargs[key]
            for key in ("revision", "token", "subfolder", "cache_dir")
            if key in from_pretrained_kwargs
        }
        config = transformers.AutoConfig.from_pretrained(path_or_repo, **loading)
        names = config.architectures or ["?"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise CheckpointError(f"config.architectures must name a class of transformers. Received: {names[0]}")
    with _cut_after_init(model_class):
        return model_class.from_pretrained(path_or_repo, **from_pretrained_kwargs)


@contextmanager
def _cut_after_init(model_class: Any) -> Iterator[None]:
    """Cut models of this class when their constructor ends: on transformers 4 a few never call `post_init`."""
    stock = model_class.__init__

    @wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        stock(self, *args, **kwargs)
        if _stock_post_init is not None and type(self) is model_class and not getattr(self, _CUT, False):
            apply_plan(self)

    model_class.__init__ = __init__
    try:
        yield
    finally:
        model_class.__init__ = stock


def apply_plan(model: Any) -> None:
    """Cut a model that was just built dense to the plan in its config; it does nothing twice.

    Raises:
        CheckpointError: The plan names groups or units that this model does not have.
    """
    block = getattr(model.config, BLOCK, None)
    if not block or (isinstance(block, dict) and block.get("stock") is True):
        return
    record = read_record(model)
    if not record:
        return
    try:
        groups = {group.name: group for group in find_groups(model)}
    except UnsupportedModelError as error:
        raise CheckpointError(f"{BLOCK} is for a model with prunable groups. {error}") from error
    unknown = [name for name in record if name not in groups]
    if unknown:
        raise CheckpointError(
            f"{BLOCK}.kept names groups that {type(model).__name__} does not have. Received: {unknown[:4]}"
        )
    live: dict[str, list[int]] = {}
    for name, (units, dense) in record.items():
        if groups[name].units not in (dense, len(units)):
            raise CheckpointError(
                f"{BLOCK}.kept['{name}'] is for {dense} units, {type(model).__name__} has {groups[name].units}. "
                f"Received: {block['kept'][name]!r:.80}"
            )
        if groups[name].units == dense:
            live[name] = units
    try:
        with torch.device("cpu"):  # from_pretrained builds under a meta device, where index arithmetic has no values
            cut(model, list(groups.values()), close_kept(list(groups.values()), live))
    except PruningError as error:
        raise CheckpointError(f"{BLOCK}.kept cannot be applied to {type(model).__name__}: {error}") from error


# the hook: right after the root model is built, and before any weight arrives, it is cut to its config's plan
_stock_post_init: Callable[[Any], None] | None = None
_CUT = "_hf_prune_cut"  # says of a model that its constructor has cut it


def enable_loading(modeling_utils: Any = None) -> None:
    """Teach every `from_pretrained` of this process to read pruned folders; `import hf_prune` does it."""
    global _stock_post_init
    if modeling_utils is None:
        modeling_utils = import_module("transformers.modeling_utils")
    base = modeling_utils.PreTrainedModel
    if _stock_post_init is not None:
        return
    _stock_post_init = stock = base.post_init

    @wraps(stock)
    def post_init(self: Any) -> None:
        stock(self)
        if getattr(self.config, BLOCK, None) and not _is_nested(self, sys._getframe(1)):
            apply_plan(self)
            setattr(self, _CUT, True)

    base.post_init = post_init


def disable_loading() -> None:
    """Undo what `import hf_prune` did to transformers: pruned folders of uneven shape are refused again."""
    global _stock_post_init
    if _stock_post_init is not None:
        import transformers

        transformers.PreTrainedModel.post_init = _stock_post_init
        _stock_post_init = None


def _is_nested(model: nn.Module, frame: FrameType | None) -> bool:
    """Whether another model's constructor is building this one: only the root is cut, once it is whole.

    Reading the stack keeps no state, so that a constructor that raised cannot disturb later ones.
    """
    kind = sys.modules["transformers.modeling_utils"].PreTrainedModel
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(owner, kind) and owner is not model:
            return True
        frame = frame.f_back
    return False
