"""Weights before and after, unit by unit: read from the two saved models of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..architectures import find_groups
from ..checkpoint import load_pruned
from ..errors import PruningError
from ..plan import read_record
from ..report.display import place_of
from ..structure import Group, named_tensors
from .pictures import Picture, new_figure, style

_LARGEST = 2e9  # bytes of both models together: more takes too long to read for a picture
_SORTED = 64  # units of a layer above which they are sorted by their dense size, as single columns cannot be told apart
_COLUMNS = 512
_KINDS = ("head", "kv_group", "neuron")
Sizes = dict[str, np.ndarray]  # group -> mean absolute weight of each dense unit; NaN where the unit is gone


def weight_pictures(run: Path) -> Iterator[Picture]:
    """Yield a heat map for each kind of place where the folder holds both models, and both can be read."""
    folders = run / "dense", run / "model"
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    if not all((folder / "config.json").is_file() for folder in folders):
        return
    if not files or sum(file.stat().st_size for file in files) > _LARGEST:
        return
    try:
        dense, pruned = (_sizes(folder) for folder in folders)
    except (PruningError, OSError):  # code of its own, another class: there is still the rest of the page
        return
    for place in dict.fromkeys(place_of(name)[0] for name in dense):
        names = [name for name in dense if place_of(name)[0] == place]
        yield _heat_maps(place, {name: (dense[name], pruned.get(name)) for name in names})


def _sizes(folder: Path) -> Sizes:
    model = load_pruned(folder)
    record, tensors = read_record(model), named_tensors(model)
    found = {}
    for group in find_groups(model):
        if group.kind in _KINDS and not group.modules:
            whole = np.full(record.dense_units(group), np.nan)
            whole[record.dense_numbers(group)] = _of_units(group, tensors)
            found[group.name] = whole
    return found


@torch.no_grad()
def _of_units(group: Group, tensors: Mapping[str, Any]) -> np.ndarray:
    """Return the mean absolute value of what each unit owns in matrices, ``(units,)``."""
    total, count = torch.zeros(group.units), 0
    for part in group.slices:
        weight = tensors[part.parameter]
        if weight.ndim < 2 or part.adapter:
            continue
        along = weight.detach().float().abs().movedim(part.dim, 0).flatten(1).mean(1)
        total += along[part.index(torch.arange(group.units), group.per_part)].view(group.units, -1).mean(1)
        count += 1
    return (total / max(count, 1)).numpy()


def _heat_maps(place: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> Picture:
    rows = [_row(before, after) for before, after in pairs.values()]
    most = max(len(before) for before, _ in rows)
    images = [np.stack([np.pad(row[which], (0, most - len(row[which])), constant_values=np.nan) for row in rows])
              for which in (0, 1)]  # fmt: skip
    images = [_pooled(image) for image in images]
    top = float(np.nanmax(images[0]))
    with style(place):
        figure, axes = new_figure(1.1 + 2 * min(2.2, max(0.7, 0.16 * len(rows))), 2, sharex=True)
        for ax, image, title in zip(axes, images, ("before", "after"), strict=True):
            told = {"vmin": 0, "vmax": top, "extent": (-0.5, most - 0.5, len(rows) - 0.5, -0.5)}
            shown = ax.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest", **told)
            ax.set_title(title)
            ax.set_ylabel("layer")
            ax.yaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel(f"{place}{', sorted by their size before' if most > _SORTED else ''}")
        figure.colorbar(shown, ax=axes, label="mean |weight|", pad=0.02)
    return Picture(f"weights-{place}", f"Weights of {place}", f"Mean absolute weight of {place}", figure)


def _pooled(image: np.ndarray) -> np.ndarray:
    """Return an image of as few columns as a screen shows: neighbours' means, empty where all are gone."""
    parts = np.array_split(image, min(_COLUMNS, image.shape[1]), axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is what is meant
        return np.stack([np.nanmean(part, axis=1) for part in parts], axis=1)


def _row(before: np.ndarray, after: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    gone = np.full(len(before), np.nan)
    after = gone if after is None or len(after) != len(before) else after
    order = np.argsort(-before) if len(before) > _SORTED else np.arange(len(before))
    return before[order], after[order]
