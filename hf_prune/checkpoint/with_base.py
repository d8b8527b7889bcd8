"""Adapters are saved with the base that they were trained on, once pruning has changed it: the dense one is not it."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import bare, is_adapted, is_changed
from ..errors import PruningError
from ..plan import BLOCK
from ..sharding import any_sharded
from .reading import CONFIG
from .saving import ADAPTER, save_pruned

logger = logging.getLogger(__name__)
BASE = "pruned_base"  # the folder beside the adapters
_NAME, _BEGUN = "base_model_name_or_path", "init_lora_weights"


def save_base_with_adapters(owner: Any) -> None:
    """Let a class's `save_pretrained` write the pruned base beside the adapters, and name it in their config."""
    stock = owner.save_pretrained

    @wraps(stock)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(stock).bind(self, save_directory, *args, **kwargs).arguments
        result = stock(self, save_directory, *args, **kwargs)
        if told.get("is_main_process", True) and is_changed(self) and _saves_adapters(self):
            _save_base(self, Path(save_directory))
        return result

    owner.save_pretrained = save_pretrained


def _saves_adapters(model: Any) -> bool:
    return hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False)


def _save_base(model: Any, folder: Path) -> None:
    if any_sharded(model.parameters()):
        logger.warning(
            f"The adapters in {folder} belong to a pruned base that is sharded, and was not saved with them: after "
            "finish(), save merge_adapters(pruning.model) with save_pruned."
        )
        return
    with _without_adapters(bare(model)) as base:
        save_pruned(base, folder / BASE)
    for path in (*folder.glob(ADAPTER), *folder.glob(f"*/{ADAPTER}")):
        plain = {**json.loads(path.read_text("utf-8")), _NAME: str(folder / BASE)}
        if isinstance(plain.get(_BEGUN), str):  # PiSSA takes from the base what adapters begin with: ours has lost that
            plain[_BEGUN] = True
        path.write_text(json.dumps(plain, indent=2, sort_keys=True), "utf-8")


@contextmanager
def _without_adapters(base: Any) -> Iterator[Any]:
    """Take a model's adapters out of it for a moment; no tensor is copied."""
    swapped: dict[str, tuple[nn.Module, nn.Module]] = {}
    for path, module in base.named_modules():
        inner = None if path.startswith(tuple(f"{done}." for done in swapped)) else _inside(module)
        if inner is not None:
            swapped[path] = module, inner
    native = vars(base).get("_hf_peft_config_loaded")
    base._hf_peft_config_loaded = False
    try:
        for path, (_, module) in swapped.items():
            _put(base, path, module)
        yield base
    finally:
        for path, (module, _) in swapped.items():
            _put(base, path, module)
        del base._hf_peft_config_loaded
        if native is not None:
            base._hf_peft_config_loaded = native


def _inside(module: Any) -> Any:
    """Return what an adapter, or one of PEFT's trained copies, lies around; ``None``: it is neither."""
    if is_adapted(module):
        while is_adapted(module):  # of stacked experts each tensor has one around the other
            module = module.base_layer
        return module
    original = getattr(module, "original_module", None)
    return original if isinstance(original, nn.Module) else None


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def find_base_with_adapters(owner: Any) -> None:
    """Let a class's `from_pretrained` of adapters' settings name the base beside them, wherever that is now."""
    stock = owner.__dict__["from_pretrained"].__func__

    @wraps(stock)
    def from_pretrained(cls: Any, path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        config = stock(cls, path, subfolder, **kwargs)
        if Path(str(getattr(config, _NAME, None) or "")).name == BASE:
            base = _beside(path, subfolder, kwargs)
            setattr(config, _NAME, str(base) if base is not None else getattr(config, _NAME))
        return config

    owner.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]


def _beside(path: Any, subfolder: str | None, told: dict[str, Any]) -> Path | None:
    """Return the pruned base beside adapters, of a folder or of the Hub; ``None``: there is none."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        known = {key: told[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in told}
        folder = Path(snapshot_download(str(path), allow_patterns=f"{BASE}/*", **known))
    places = [folder / (subfolder or "") / BASE, folder / BASE, folder.parent / BASE]
    return next((place for place in places if (place / CONFIG).is_file()), None)


def check_base_of_adapters(owner: Any, settings: Any) -> None:
    """Let a class's `from_pretrained` refuse a base from which less was removed than from the adapters' own."""
    stock = owner.__dict__["from_pretrained"].__func__

    @wraps(stock)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        place = Path(str(getattr(settings.from_pretrained(model_id, **_hub(kwargs)), _NAME, None) or ""))
        if place.name == BASE and (place / CONFIG).is_file():
            _check_same(model, place)
        return stock(cls, model, model_id, *args, **kwargs)

    owner.from_pretrained = classmethod(from_pretrained)


def _hub(told: dict[str, Any]) -> dict[str, Any]:
    known = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
    return {key: told[key] for key in known if told.get(key) is not None}


def _check_same(model: Any, place: Path) -> None:
    saved = json.loads((place / CONFIG).read_text("utf-8")).get(BLOCK) or {}
    live = getattr(getattr(model, "config", None), BLOCK, None) or {}
    if any((saved.get(key) or {}) != (live.get(key) or {}) for key in ("kept", "weights")):
        raise PruningError(
            f"These adapters belong to the pruned base beside them: load it with hf_prune.load_pruned('{place}'), or "
            f"both at once with AutoPeftModel. Received: {type(model).__name__} of another plan"
        )


def teach_peft(peft_model: Any) -> None:
    """Teach PEFT all of it; `import hf_prune` does so once its module is imported."""
    from peft.config import PeftConfigMixin

    find_base_with_adapters(PeftConfigMixin)
    save_base_with_adapters(peft_model.PeftModel)
    check_base_of_adapters(peft_model.PeftModel, peft_model.PeftConfig)
