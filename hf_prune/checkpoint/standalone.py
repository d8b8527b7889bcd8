"""Folders that load where hf_prune is not installed: a short Python file in them cuts the stock class."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..errors import PruningError
from ..files import is_inside, read_json
from ..plan import BLOCK, annotate
from ..stock import cut_table, stock_twin
from ..structure import named_tensors
from . import modeling_pruned

FILE = "modeling_pruned.py"
_WITH_CODE = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
logger = logging.getLogger(__name__)
_EMPTY = (
    "Linear",
    "Conv1D",
    "Embedding",
    "Norm",
)  # ends of names of modules that run without weights


def state_standalone(model: Any) -> str:
    """Let a model's config say what a file of Python must do to load it, and return that file's text.

    Returns:
        The text; empty where stock transformers loads the model as it is.

    Raises:
        PruningError: No Auto class leads to the model's class, or the file could not build this model.
    """
    block = getattr(model.config, BLOCK, None)
    if block is None or (block["stock"] and block["kept"]) or not block["kept"]:
        logger.info("Stock transformers loads this %s: a standalone folder needs no file.", type(model).__name__)
        return ""
    _refuse_code(model)
    table = cut_table(model)
    _check(model, table)
    classes = _auto_classes(model)
    if type(model).__name__ not in classes.values():
        raise PruningError(
            f"A standalone folder is for classes that an Auto class loads. Received: {type(model).__name__}"
        )
    annotate(model, standalone=table)
    auto_map = {auto: f"{Path(FILE).stem}.{name}" for auto, name in classes.items()}
    model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **auto_map}
    return _text(classes)


def _refuse_code(model: Any) -> None:
    import transformers

    if not isinstance(model, getattr(transformers, type(model).__name__, ())):
        raise PruningError(
            "A standalone folder is for classes of transformers; a class with code of its own loads after `import "
            f"hf_prune`: save it without standalone. Received: {type(model).__module__}.{type(model).__name__}"
        )


def forget_standalone(model: Any) -> None:
    """Take back what `state_standalone` wrote into a config, unless the model is of such a file's class.

    That class writes its file whenever it is saved; the stock class does not, and must not speak of one.
    """
    config, stem = model.config, f"{Path(FILE).stem}."
    if hasattr(type(model), "_hf_prune_cut"):
        return
    (getattr(config, BLOCK, None) or {}).pop("standalone", None)
    stated = getattr(config, "auto_map", None)
    ours = stated if isinstance(stated, dict) else {}
    left = {auto: value for auto, value in ours.items() if stem not in str(value)}
    if left:
        config.auto_map = left
    elif ours:
        del config.auto_map


def drop_strange_code(folder: Path, model: Any) -> None:
    """Take out of a written folder's files every ``auto_map`` entry that leads to code which does not lie in it.

    Loading a dense model leaves its entries in the config even where none of that code ran: ``repo--module.Class`` then
    sends whoever trusts our folder to a stranger's repository. Only a class with code of its own brings its files.
    """
    stock = type(model).__module__.startswith("transformers.")
    for path in folder.glob("*.json"):
        if path.name in _WITH_CODE:
            told = read_json(path)
            own = own_code(told, folder, only=FILE if stock and path.name == "config.json" else None)
            if own != told:
                path.write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", "utf-8")


def own_code(config: Mapping[str, Any], folder: Path, *, only: str | None = None) -> dict[str, Any]:
    """Return a written config with those entries of ``auto_map`` whose Python file lies in its folder.

    Args:
        config: Keys of config.json, tokenizer_config.json or a processor's.
        folder: Where the file lies.
        only: The one Python file that counts; ``None``: any in the folder.
    """
    stated = config.get("auto_map")
    if stated is None:
        return dict(config)
    entries = stated if isinstance(stated, dict) else {}
    kept = {auto: _own_entry(value, folder, only) for auto, value in entries.items()}
    kept = {auto: value for auto, value in kept.items() if value}
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    return {**rest, "auto_map": kept} if kept else rest


def _own_entry(value: Any, folder: Path, only: str | None) -> Any:
    """Return an entry without its repository, if the file is here; of a tokenizer's two, those that are."""
    if isinstance(value, (list, tuple)):
        own = [_own_entry(one, folder, only) if isinstance(one, str) else None for one in value]
        return own if any(own) else None
    name = value.rpartition("--")[2] if isinstance(value, str) else ""
    file = f"{name.split('.')[0]}.py"
    there = re.fullmatch(r"\w+\.\w+", name) and only in (None, file) and is_inside(folder, folder / file)
    return name if there else None


_CLASS = """

class {name}(Pruned, transformers.{name}):
    \"\"\"The stock class, cut. Written by hf_prune {version}.\"\"\"

    _auto_class = "{auto}"  # or transformers 4 would not copy this file when the model is saved again
"""


def _text(classes: dict[str, str]) -> str:
    """Return the file's text: the part that cuts, as it stands in this package, and a class for each stock class."""
    text = Path(modeling_pruned.__file__).read_text("utf-8").replace("  # type: ignore[call-arg]", "")
    own = {name: _CLASS.format(name=name, auto=auto, version=__version__) for auto, name in classes.items()}
    return text.replace("import torch\n", "import torch\nimport transformers\n", 1) + "".join(own.values())


def _auto_classes(model: Any) -> dict[str, str]:
    """Return the Auto classes that lead to the model's class, and the one that leads to its base model."""
    import transformers

    name, found = type(model).__name__, {}
    for auto in sorted(one for one in dir(transformers) if one.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
        if mapping is None or type(model.config) not in mapping:
            continue
        stock = mapping[type(model.config)]
        names = [one.__name__ for one in (stock if isinstance(stock, tuple) else (stock,))]
        if name in names or auto == "AutoModel":
            found[auto] = name if name in names else names[0]
    return found


def _check(model: Any, table: dict[str, Any]) -> None:
    """Check that the file's code makes this very model out of a dense one.

    Raises:
        PruningError: It does not.
    """
    twin = stock_twin(model, {})
    modeling_pruned.cut(twin, table)
    mine, theirs = ({name: one.shape for name, one in named_tensors(each).items()} for each in (model, twin))
    odd = next(iter(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))), None)
    reason = f"the shape of {odd}" if odd else next(_unsaid(model, table), None)
    if reason:
        raise PruningError(
            f"A standalone folder cannot say all of this {type(model).__name__}; without standalone, `import hf_prune` "
            f"loads it. Received: {reason}"
        )


def _unsaid(model: nn.Module, table: dict[str, Any]) -> Iterator[str]:
    """Yield what a table cannot say: how a module without weights runs, and code that reshapes by a fixed width."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        empty = [name for name, tensor in own.items() if not tensor.numel() and tensor.ndim]
        if empty and (not type(module).__name__.endswith(_EMPTY) or not {*empty} <= {"weight", "bias"}):
            yield f"{path}.{empty[0]} without entries"
    yield from (f"heads of {path}" for path, (names, *_) in table["arguments"].items() if "" in names)
