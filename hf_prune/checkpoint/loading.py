"""Loading pruned models, and the hook that lets every `from_pretrained` read them."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from threading import RLock
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..architectures import find_groups
from ..errors import CheckpointError, PruningError, UnsupportedModelError
from ..folders import put_back
from ..given import check_given
from ..plan import BLOCK, close_kept, read_record
from ..removal import cut
from .bounds import bounded_parts
from .legacy import adopt_legacy_heads
from .reading import (
    check_arrived,
    check_config,
    check_files,
    clear_errors,
    hub_arguments,
    refuse_pickle,
    written_config,
)
from .standalone import forget_standalone


def _or_says_where(load: Callable[..., Any]) -> Callable[..., Any]:
    """Say of a name that is neither a folder nor on the Hub that it is not; transformers' errors are of many types."""

    @wraps(load)
    def checked(path_or_repo: Any, **arguments: Any) -> Any:
        check_given("path_or_repo", path_or_repo, (str, Path), "a folder that save_pruned wrote, or a name on the Hub")
        try:
            return load(path_or_repo, **arguments)
        except (OSError, ValueError) as error:
            if isinstance(error, PruningError) or Path(path_or_repo).is_dir():
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"No folder is there, and no model could be read from the Hub: {reason} Received: '{path_or_repo}'"
            ) from error

    return checked


@_or_says_where
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
    put_back(path_or_repo)
    refuse_pickle(path_or_repo)
    config = written_config(path_or_repo, None, from_pretrained_kwargs)
    with clear_errors(path_or_repo) if Path(path_or_repo).is_dir() else nullcontext():
        check_config(path_or_repo, config, from_pretrained_kwargs)
    if model_class is None and (Path(path_or_repo) / "modules.json").is_file():
        raise CheckpointError(
            "A folder of sentence-transformers is loaded by its own class, once hf_prune is imported: "
            f"SentenceTransformer('{path_or_repo}'), CrossEncoder or SparseEncoder; or the model of transformers in it "
            "with model_class=AutoModel. Received: modules.json"
        )
    if model_class is None:
        model_class = _saved_class(path_or_repo, from_pretrained_kwargs)
    with _enabled(), _cut_after_init(model_class):
        load = partial(model_class.from_pretrained, path_or_repo)
        if BLOCK in config:  # the hook checks it
            return load(**from_pretrained_kwargs)
        return _load_checked(load, model_class, path_or_repo, config, from_pretrained_kwargs)


def _saved_class(path: Any, arguments: dict[str, Any]) -> Any:
    import transformers

    loading = {**hub_arguments(arguments), "trust_remote_code": arguments.get("trust_remote_code")}
    with clear_errors(path) if Path(path).is_dir() else nullcontext():
        config = transformers.AutoConfig.from_pretrained(path, **loading)
    names = config.architectures if isinstance(config.architectures, list) else None
    model_class = getattr(transformers, str((names or ["?"])[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.architectures must name a class of transformers. Received: {(names or ['?'])[0]!s:.80}"
        )
    return model_class


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
    """Cut a model that was just built dense to the plan in its config; what already has its size is left alone.

    Raises:
        CheckpointError: The plan names groups or units that this model does not have.
    """
    if getattr(model.config, BLOCK, None) is None:
        return
    record = read_record(model)
    if not record:
        _check_room(model)
        return
    try:
        groups = {group.name: group for group in find_groups(model)}
    except UnsupportedModelError as error:
        raise CheckpointError(f"{BLOCK} is for a model with prunable groups. {error}") from error
    unknown = [name for name in record if name not in groups]
    if unknown:
        raise CheckpointError(
            f"{BLOCK}.kept names groups that {type(model).__name__} does not have. Received: {str(unknown[:4])[:200]}"
        )
    live: dict[str, list[int]] = {}
    stock = getattr(model.config, BLOCK).get("stock", False)
    for name, (units, dense) in record.items():
        if groups[name].units not in ((len(units),) if stock else (dense, len(units))):
            raise CheckpointError(
                f"{BLOCK}.kept['{name}'] is for {dense} units, {type(model).__name__} has {groups[name].units}. "
                f"Received: {getattr(model.config, BLOCK)['kept'][name]!r:.80}"
            )
        if groups[name].units == dense and not stock:
            live[name] = units
    try:
        with torch.device("cpu"):  # from_pretrained builds under a meta device, where index arithmetic has no values
            cut(model, list(groups.values()), close_kept(list(groups.values()), live))
    except PruningError as error:
        raise CheckpointError(f"{BLOCK}.kept cannot be applied to {type(model).__name__}: {error}") from error
    _check_room(model)


# the hooks: right after the root model is built, and before any weight arrives, it is cut to its config's plan; what
# from_pretrained reads for such a config is checked before and after
_stock_post_init: Callable[[Any], None] | None = None
_stock_from_pretrained: Any = None
_room: ContextVar[float] = ContextVar("parameters of the model that is being loaded", default=math.inf)
_CUT = "_hf_prune_cut"  # says of a model, or of a class that does it itself, that its constructor has cut it


def enable_loading(modeling_utils: Any = None) -> None:
    """Teach every `from_pretrained` of this process to read pruned folders; `import hf_prune` does it."""
    global _stock_post_init, _stock_from_pretrained
    if modeling_utils is None:
        modeling_utils = import_module("transformers.modeling_utils")
    base = modeling_utils.PreTrainedModel
    if _stock_post_init is not None:
        return
    _stock_post_init, _stock_from_pretrained = stock, stock_load = base.post_init, base.__dict__["from_pretrained"]

    @wraps(stock)
    def post_init(self: Any) -> None:
        stock(self)
        if getattr(self, _CUT, False) or _is_nested(self, sys._getframe(1)):
            return
        adopt_legacy_heads(self)
        if getattr(self.config, BLOCK, None) is not None:
            apply_plan(self)
            setattr(self, _CUT, True)

    @wraps(stock_load.__func__)
    def from_pretrained(cls: Any, path: Any, *args: Any, **arguments: Any) -> Any:
        load = partial(stock_load.__func__, cls, path, *args)
        config = written_config(path, arguments.get("config"), arguments)
        return _load_checked(load, cls, path, config, arguments) if BLOCK in config else load(**arguments)

    base.post_init, base.from_pretrained = post_init, classmethod(from_pretrained)


def disable_loading() -> None:
    """Undo what `import hf_prune` did to transformers: pruned folders of uneven shape are refused again."""
    global _stock_post_init
    if _stock_post_init is not None:
        import transformers

        transformers.PreTrainedModel.post_init = _stock_post_init
        transformers.PreTrainedModel.from_pretrained = _stock_from_pretrained
        _stock_post_init = None


_borrowed, _switch = 0, RLock()


@contextmanager
def _enabled() -> Iterator[None]:
    """Have `load_pruned` check and cut also after `disable_loading`, which is about everybody else's calls."""
    global _borrowed
    with _switch:
        borrows = _borrowed > 0 or _stock_post_init is None
        _borrowed += borrows
        enable_loading()
    try:
        yield
    finally:
        with _switch:
            _borrowed -= borrows
            if borrows and not _borrowed:
                disable_loading()


def _load_checked(
    load: Callable[..., Any], model_class: Any, path: Any, config: dict[str, Any], arguments: dict[str, Any]
) -> Any:
    """Load a stranger's folder: nothing of it is believed, and no pickle is read."""
    told = arguments.pop("output_loading_info", False)
    arguments.setdefault("use_safetensors", True)
    saved = config.get("architectures")
    with clear_errors(path), _bounded(*check_files(path, config, arguments)):
        if _room.get() < math.inf:
            _try_to_build(model_class, path, arguments)
        model, info = load(output_loading_info=True, **arguments)
        check_arrived(model, saved, info, vars(model.config))
    if BLOCK in config:
        getattr(model.config, BLOCK).pop("digests", None)  # of the files; the live model's tensors will change
    forget_standalone(model)
    return (model, info) if told else model


def _try_to_build(model_class: Any, path: Any, arguments: dict[str, Any]) -> None:
    """Build the model where nothing is allocated: transformers 4 allocates each tensor before it forgets it again.

    Raises:
        CheckpointError: It is too large for its files, or the plan is not this model's.
    """
    import transformers

    if not transformers.__version__.startswith("4."):
        return
    config = arguments.get("config")
    if not isinstance(config, transformers.PretrainedConfig):
        config = model_class.config_class.from_pretrained(config or path, **hub_arguments(arguments))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model_class(copy.deepcopy(config))
    except CheckpointError:
        raise
    except Exception:  # some classes compute with values while they are built
        return


@contextmanager
def _bounded(parameters: float, tensors: int) -> Iterator[None]:
    token = _room.set(parameters)
    try:
        with bounded_parts(tensors):
            yield
    finally:
        _room.reset(token)


def _check_room(model: Any) -> None:
    """Check the size of a model that is built, but not allocated yet, against the files that it will be read from."""
    size = sum(one.numel() for one in model.parameters())
    if size > _room.get():
        raise CheckpointError(
            f"config.json must describe a model that the weight files can fill. Received: one of {size} parameters"
        )


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
