"""Loading pruned models, and the hook that lets every `from_pretrained` read them."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from threading import Lock, RLock
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, PruningError
from ..files import no_folder
from ..folders import put_back
from ..given import check_given
from ..plan import BLOCK
from .applying import apply_plan, apply_plans
from .bounds import bounded_parts
from .classes import refuse_generate_code, saved_class
from .legacy import adopt_legacy_heads
from .reading import (
    check_arrived,
    check_config,
    check_files,
    check_places,
    clear_errors,
    hub_arguments,
    refuse_pickle,
    states_plan,
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
            hint = no_folder(path_or_repo).partition(".")[2]  # a folder beside it
            raise CheckpointError(
                f"No folder is there, and no model could be read from the Hub: {reason}{hint} "
                f"Received: '{path_or_repo}'"
            ) from error

    return checked


@_or_says_where
def load_pruned(path_or_repo: str | Path, *, model_class: Any = None, **from_pretrained_kwargs: Any) -> Any:
    """Load a pruned model as the class that was saved; `AutoModelFor….from_pretrained` does the same.

    Args:
        path_or_repo: A folder, or a name on the Hub.
        model_class: Another class, such as a base model or another head; ``None`` takes ``config.architectures``.
        **from_pretrained_kwargs: Passed on: ``dtype``, ``device_map``, ``revision``, ``token`` …; a class whose code
            lies in the folder needs ``trust_remote_code=True``, as it does everywhere.

    Returns:
        The small model.

    Raises:
        CheckpointError: The plan does not fit the model, or the config names no class; or the class' code lies in
            the folder, and is not trusted.
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
        model_class = saved_class(path_or_repo, from_pretrained_kwargs)
    with _enabled(), _loading, _cut_after_init(model_class):
        load = partial(model_class.from_pretrained, path_or_repo)
        if states_plan(config):  # the hook checks it
            return load(**from_pretrained_kwargs)
        return _load_checked(load, model_class, path_or_repo, config, from_pretrained_kwargs)


_loading = RLock()  # one at a time: transformers 4 patches torch for all threads while it builds a model
_lock, _loads = Lock(), Counter[type]()


@contextmanager
def _cut_after_init(model_class: Any) -> Iterator[None]:
    """Cut models of this class when their constructor ends: on transformers 4 a few never call `post_init`.

    However loads overlap in threads, the class is wrapped once, and the last one to leave unwraps it.
    """
    with _lock:
        _loads[model_class] += 1
        if _loads[model_class] == 1:
            _wrap_init(model_class)
    try:
        yield
    finally:
        with _lock:
            _loads[model_class] -= 1
            if not _loads[model_class]:
                del _loads[model_class]
                model_class.__init__.unwrap()


def _wrap_init(model_class: Any) -> None:
    own, stock = "__init__" in vars(model_class), model_class.__init__

    @wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        stock(self, *args, **kwargs)
        if _stock_post_init is not None and type(self) is model_class:
            _finish(self, sys._getframe(1))

    def unwrap() -> None:
        if own:
            model_class.__init__ = stock
        else:
            del model_class.__init__

    __init__.unwrap = unwrap  # type: ignore[attr-defined]
    model_class.__init__ = __init__


def _finish(model: Any, frame: FrameType | None) -> None:
    """Cut a model that is whole now to its plan: the root, or a part that brings a plan of its own."""
    if getattr(model, _CUT, False):
        return
    around = [*_builders(model, frame)]
    if not around:
        adopt_legacy_heads(model)
        apply_plans(model, _folder.get())
        _check_room(model)
    elif all(getattr(one.config, BLOCK, None) is None for one in around):
        apply_plan(model)
    if getattr(model.config, BLOCK, None) is not None:
        setattr(model, _CUT, True)


# the hooks: right after the root model is built, and before any weight arrives, it is cut to its config's plan; what
# from_pretrained reads for such a config is checked before and after
_stock_post_init: Callable[[Any], None] | None = None
_stock_from_pretrained: Any = None
_room: ContextVar[float] = ContextVar("parameters of the model that is being loaded", default=math.inf)
_folder: ContextVar[dict[str, Any] | None] = ContextVar("the config of the folder that is being loaded", default=None)
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
        _finish(self, sys._getframe(1))

    @wraps(stock_load.__func__)
    def from_pretrained(cls: Any, path: Any, *args: Any, **arguments: Any) -> Any:
        load = partial(stock_load.__func__, cls, path, *args)
        config = written_config(path, arguments.get("config"), arguments)
        if not states_plan(config):
            with _reading(None):
                return load(**arguments)
        with _loading, _reading(config), _cut_after_init(cls):
            return _load_checked(load, cls, path, config, arguments)

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
    refuse_generate_code(path, arguments)
    with clear_errors(path), _bounded(*check_files(path, config, arguments)):
        if _room.get() < math.inf:
            _try_to_build(model_class, path, arguments)
        model, info = load(output_loading_info=True, **arguments)
        check_arrived(model, saved, info, vars(model.config))
        check_places(model, path, config, arguments)
    if getattr(model.config, BLOCK, None) is not None:
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
def _reading(config: dict[str, Any] | None) -> Iterator[None]:
    token = _folder.set(config)
    try:
        yield
    finally:
        _folder.reset(token)


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


def _builders(model: nn.Module, frame: FrameType | None) -> Iterator[Any]:
    """Yield the models whose constructors are building this one.

    Reading the stack keeps no state, so that a constructor that raised cannot disturb later ones.
    """
    kind = sys.modules["transformers.modeling_utils"].PreTrainedModel
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(owner, kind) and owner is not model and hasattr(owner, "config"):
            yield owner
        frame = frame.f_back
