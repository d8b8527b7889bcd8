"""What a command line names, a recipe or a model and its data, and how much the parts of its layers are worth there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import PruningError, did_you_mean
from .guessing import Wish, guess
from .job import Job, batches_of
from .layerwise import SHARES, Sensitivity, sensitivity
from .recipe import Recipe, load_recipe, shipped_recipes
from .recipe_tasks import saved_model
from .workflow import check, prepare, say, train_dense

_READS = ("task", "data.text", "data.image", "data.audio", "data.label", "columns left out")  # of what is guessed


@dataclass(frozen=True)
class Told:
    """Which data a command line names, and how much of it is used.

    Args:
        wish: The model, its data and columns; ``None``: a recipe says them.
        split: The split to take rows from; ``None``: the one to train on.
        rows: How many rows, drawn at random.
        batch_size: Rows in one batch.
    """

    wish: Wish | None = None
    split: str | None = None
    rows: int = 256
    batch_size: int = 32


def sensitivity_of(
    what: str, overrides: Sequence[str], told: Told, shares: Sequence[float] | None = None, score: str = "taylor"
) -> Sensitivity:
    """Measure how much the loss rises without parts of each layer.

    Args:
        what: A recipe, or with ``told.wish`` a model: a folder or a name on the Hub.
        overrides: ``key=value`` each, of the recipe.
        told: The data, and how much of it.
        shares: As in `sensitivity`.
        score: As in `sensitivity`.

    Returns:
        What each part is worth. Where a recipe trains its dense model first, it is that of an earlier run, or is
        trained now.

    Raises:
        PruningError: There is no such recipe, model or data, or they do not fit each other.
    """
    if told.wish is not None and overrides:
        raise PruningError(f"KEY=VALUE changes a recipe; a model with --data has none. Received: {overrides[0]}")
    recipe = _recipe(what, overrides) if told.wish is None else _guessed(told.wish, told)
    job = prepare(recipe)
    if recipe.dense is not None:
        _take_dense(job)
    batches = _batches(job, told)
    settings: dict[str, Any] = {"shares": shares or SHARES, "score": score, "loss": job.task.loss}
    return sensitivity(job.model, batches, batches=len(batches), **settings)


def _recipe(what: str, overrides: Sequence[str]) -> Recipe:
    if Path(what).is_dir() or not (Path(what).is_file() or what in shipped_recipes()):
        hint = did_you_mean(what, shipped_recipes())
        raise PruningError(
            f"Give a recipe, or a model with --data: rows to measure the loss on.{hint} Received: '{what}', no --data"
        )
    return load_recipe(what, overrides)


def _guessed(wish: Wish, told: Told) -> Recipe:
    """Guess as for a run without a recipe, but hold nothing out.

    Raises:
        PruningError: The model would have to be trained first.
    """
    guessed = guess(wish)
    because = {key: why for key, _, why in guessed.reasons}
    reads = [one for one in guessed.reasons if one[0] in _READS]
    say(f"Guessed, and --task, --text, --image, … say another:\n{replace(guessed, reasons=reads).table()}")
    if guessed.recipe.dense is not None:
        raise PruningError(
            "MODEL must be trained for its data, or its loss tells nothing: hf-prune run trains it. "
            f"Received: '{wish.model}', and {because['dense']}"
        )
    split = json.dumps(told.split or guessed.recipe.data.train)
    data = {"train": split, "evaluation": f"[{split}]", "test_size": "null", "train_limit": told.rows}
    return load_recipe(guessed.recipe, [f"data.{key}={value}" for key, value in data.items()])


def _take_dense(job: Job) -> None:
    """Take the dense model of an earlier run, or train it."""
    folder = job.output / "dense"
    if (folder / "config.json").is_file():
        say(f"The dense model is that of an earlier run: {folder}")
        job.model = saved_model(job.recipe, folder)
        return
    check(job)
    train_dense(job)


def _batches(job: Job, told: Told) -> list[dict[str, Any]]:
    """Return batches of rows to train on, drawn at random."""
    numbers = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.recipe.seed)).tolist()
    return batches_of(job, job.train, numbers[: told.rows], told.batch_size)
