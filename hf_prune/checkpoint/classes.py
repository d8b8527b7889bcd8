"""Which class a folder is of: one of transformers, one that the user registered, or code in the folder itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reading import clear_errors, hub_arguments, written_config
from .standalone import FILE


def saved_class(path: Any, arguments: Mapping[str, Any]) -> Any:
    """Return the class that ``config.architectures`` names.

    Args:
        path: A folder or a name on the Hub.
        arguments: Those of `from_pretrained`; code of the folder is run only where ``trust_remote_code`` says so.

    Raises:
        CheckpointError: There is no such class, or it is code that is not trusted.
    """
    import transformers

    trusted, written = bool(arguments.get("trust_remote_code")), written_config(path, None, arguments)
    if not trusted:
        _refuse_code(written)
    names = written.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "?"
    if hasattr(transformers, name) and str(written.get("model_type")) not in transformers.CONFIG_MAPPING:
        return _model_class(getattr(transformers, name), name)  # no Auto class knows it: SigLIP's text tower on 4.57
    loading = {**hub_arguments(arguments), "trust_remote_code": trusted}
    with clear_errors(path) if Path(path).is_dir() else nullcontext():
        config = transformers.AutoConfig.from_pretrained(path, **loading)
    found = _from_folder(path, config, name, arguments) if trusted else None
    found = found or getattr(transformers, name, None) or next(_registered(config, name), None)
    return _model_class(found, name)


def _model_class(found: Any, name: str) -> Any:
    from transformers import PreTrainedModel

    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"config.architectures must name a class of transformers. Received: {name:.80}")
    return found


def register_code(model: Any) -> None:
    """Let a model whose class is code of a folder be saved with that code, however it was loaded.

    transformers copies the code of classes that came through an Auto class only.
    """
    kind = type(model)
    if kind.__module__.startswith("transformers_modules.") and kind._auto_class is None:
        auto = next((auto for auto, _ in _entries(model.config, kind.__name__)), None)
        if auto is not None:
            kind.register_for_auto_class(auto)


def _refuse_code(config: Mapping[str, Any]) -> None:
    """Refuse a folder whose class is not one of transformers, but code in it."""
    import transformers

    told, names = config.get("auto_map"), config.get("architectures")
    entries = dict(told) if isinstance(told, dict) else {}
    name = str(names[0]) if isinstance(names, list) and names else ""
    ours = hasattr(transformers, name) or not any(str(one).endswith(f".{name}") for one in entries.values())
    if not ours or ("AutoConfig" in entries and str(config.get("model_type")) not in transformers.CONFIG_MAPPING):
        raise CheckpointError(
            "The class of this model is code that lies beside its weights: read it, and where you trust it, pass "
            f"trust_remote_code=True. Received: {str(entries)[:200]}"
        )


def refuse_generate_code(path: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a folder that brings a `generate` of its own: transformers 4 runs it untrusted where the folder is local.

    Raises:
        CheckpointError: There is such a file, and ``trust_remote_code`` does not trust it.
    """
    code = Path(str(path), "custom_generate", "generate.py")
    if code.is_file() and not arguments.get("trust_remote_code"):
        raise CheckpointError(
            f"The folder has code that would replace generate(): read custom_generate/{code.name}, and where you trust "
            f"it, pass trust_remote_code=True; or remove it. Received: '{path}'"
        )


def _entries(config: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield each Auto class that leads to a class of this name by the folder's code, and where that is."""
    told = getattr(config, "auto_map", None)
    for auto, place in (told if isinstance(told, dict) else {}).items():
        if isinstance(place, str) and place.endswith(f".{name}") and f"{Path(FILE).stem}." not in place:
            yield str(auto), place


def _from_folder(path: Any, config: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    loading = {key: value for key, value in hub_arguments(arguments).items() if key != "subfolder"}
    if arguments.get("code_revision"):
        loading["code_revision"] = arguments["code_revision"]
    for auto, place in _entries(config, name):
        found: Any = get_class_from_dynamic_module(place, str(path), **loading)
        found.register_for_auto_class(auto)  # or its code would not be saved with it again
        return found
    return None


def _registered(config: Any, name: str) -> Iterator[Any]:
    """Yield classes of this name that `AutoModelFor….register` was told of."""
    import transformers

    for auto in (one for one in dir(transformers) if one.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
        stated = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
        yield from (one for one in (stated if isinstance(stated, tuple) else (stated,)) if one.__name__ == name)
