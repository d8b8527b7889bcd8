"""Which two models a folder speaks of: the pruned one in it, and the dense one that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..card import RECIPE, REPORT, find_report, read_config
from ..checkpoint import load_pruned
from ..errors import PruningError, visible
from ..files import is_inside
from ..plan import BLOCK
from ..run_folder import RUN
from ..settings import read_yaml

_CONFIG = "config.json"


class Place(NamedTuple):
    """Where a dense model may be: a folder or a name on the Hub, and who says so."""

    name: str
    told_by: str


def pruned_folder(folder: str | Path) -> Path:
    """Return the folder of the pruned model: of a run its ``model``, of any other saved model itself.

    Raises:
        PruningError: There is none.
    """
    folder = Path(folder).expanduser()
    for place in (folder, folder / "model"):
        if (place / _CONFIG).is_file():
            return place
    why = "whose run has saved no model yet" if (folder / RUN).is_file() else "without one"
    raise PruningError(
        "FOLDER must be one that hf-prune run wrote, or that a model was saved in. "
        f"Received: '{folder}', {why if folder.is_dir() else 'no folder'}"
    )


def dense_places(pruned: Path) -> list[Place]:
    """Return where the dense model of a folder may be, the likeliest first: in its run, else what its files name."""
    found: dict[str, Place] = {}
    for place in _told(pruned):
        found.setdefault(place.name, place)
    return [place for place in found.values() if Path(place.name).resolve() != pruned.resolve()]


def _told(pruned: Path) -> Iterator[Place]:
    run = pruned.resolve().parent
    in_run = is_inside(run, run / REPORT) or (run / RUN).is_file()
    if in_run and (run / "dense" / _CONFIG).is_file():
        yield Place(str(run / "dense"), "the run")
    recipe = next(filter(None, map(_recipe, [run, pruned] if in_run else [pruned])), {})
    model = recipe.get("model")
    if isinstance(model, Mapping) and not recipe.get("dense"):  # a run that trains first begins with another one
        yield from _named(model.get("name"), RECIPE)
    settings, plan = (find_report(pruned) or {}).get("settings"), read_config(pruned).get(BLOCK)
    for told_by, told in ((REPORT, settings), (_CONFIG, plan)):
        if isinstance(told, Mapping):
            yield from _named(told.get("base_model"), told_by)


def _named(name: Any, told_by: str) -> Iterator[Place]:
    if isinstance(name, str) and name:
        yield Place(name, told_by)


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    try:
        told = read_yaml(path.read_text("utf-8"), RECIPE) if is_inside(folder, path) else None
    except (PruningError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def load_dense(place: Place, pruned: Any, *, fetch: bool = False) -> Any:
    """Load a dense model as the class of its pruned one.

    Args:
        place: Where it may be.
        pruned: The pruned model.
        fetch: Whether it may be fetched from the Hub; else only what this machine has of it counts.

    Raises:
        PruningError: It cannot be loaded, or is not what this model was before.
    """
    near = {} if fetch or Path(place.name).is_dir() else {"local_files_only": True}
    told: dict[str, Any] = {"model_class": type(pruned), "dtype": torch.float32, **near}
    try:
        model, info = load_pruned(place.name, output_loading_info=True, **told)
    except (PruningError, OSError) as error:
        raise PruningError(_why_not(place, bool(near), error)) from error
    misfit = _misfit(model, pruned, sorted(info["missing_keys"]))
    if misfit:
        raise PruningError(f"'{place.name}' is not what this model was before: {misfit}")
    return model.eval()


def _why_not(place: Place, near: bool, error: Exception) -> str:
    if near:
        return f"'{place.name}', which {place.told_by} names, is not here (--dense {place.name} asks the Hub for it)"
    return f"'{place.name}' cannot be loaded as the dense model: {visible(str(error)[:300])}"


def _misfit(dense: Any, pruned: Any, missing: list[str]) -> str:
    """Say why two models cannot be compared; empty where they can."""
    if missing:
        return f"it has no {missing[0]}, as a model has none before it is fine-tuned"
    for name in ("num_labels", "id2label", "vocab_size"):
        before, after = (getattr(one.config, name, None) for one in (dense, pruned))
        if before != after:
            return f"its {name} is another one"
    sizes = [sum(one.numel() for one in model.parameters()) for model in (dense, pruned)]
    return "" if sizes[0] >= sizes[1] else f"it has fewer parameters, {sizes[0]:,} of {sizes[1]:,}"
