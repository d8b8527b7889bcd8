"""A model and batches with labels for it, as a command line names them: a recipe, or a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, DataCollatorForLanguageModeling

from .checkpoint import load_pruned
from .data import DataSettings, load_rows
from .errors import PruningError, did_you_mean
from .job import Job
from .recipe import Recipe, load_recipe, shipped_recipes
from .recipe_tasks import saved_model
from .workflow import check, prepare, say, train_dense

_TASKS = {"ForSequenceClassification": "text-classification", "ForImageClassification": "image-classification"}


@dataclass(frozen=True)
class Told:
    """Which data a command line names, and how much of it is used.

    Args:
        data: A data set on the Hub, a local folder or file, or ``"digits"``; ``None``: a recipe says it.
        text: Columns with the text, one or two; none: images.
        image: The column with image arrays.
        label: The column with the label; language models need none.
        split: The split to take rows from.
        rows: How many rows, drawn at random.
        batch_size: Rows in one batch.
        max_length: Tokens in a row at most.
    """

    data: str | None = None
    text: Sequence[str] = ()
    image: str | None = None
    label: str = "label"
    split: str = "train"
    rows: int = 256
    batch_size: int = 32
    max_length: int = 128


def model_and_batches(what: str, overrides: Sequence[str], told: Told) -> tuple[Any, list[dict[str, Any]]]:
    """Load a model, and as many batches for it as are told.

    Args:
        what: A recipe, or with ``told.data`` a model: a folder or a name on the Hub.
        overrides: ``key=value`` each, of the recipe.
        told: The data, and how much of it.

    Returns:
        The model, and batches of tensors with labels. Where a recipe trains its dense model first, it is that of an
        earlier run, or is trained now.

    Raises:
        PruningError: There is no such recipe, model or data, or they do not fit each other.
    """
    if told.data is None:
        return _of_recipe(_recipe(what, overrides), told)
    if overrides:
        raise PruningError(f"KEY=VALUE changes a recipe; a model with --data has none. Received: {overrides[0]}")
    made = _architecture(what)
    task = next((task for ending, task in _TASKS.items() if made.endswith(ending)), None)
    if task is not None:
        return _of_recipe(_recipe_of(what, task, told), told)
    if made.endswith(("ForCausalLM", "LMHeadModel")):
        return _of_language_model(what, told)
    offered = ", ".join([*_TASKS, "ForCausalLM"])
    raise PruningError(
        f"--data goes with models of {offered}; others from Python. Received: '{what}', {made or 'none'}"
    )


def _recipe(what: str, overrides: Sequence[str]) -> Recipe:
    if Path(what).is_dir() or not (Path(what).is_file() or what in shipped_recipes()):
        hint = did_you_mean(what, shipped_recipes())
        raise PruningError(
            f"Give a recipe, or a model with --data: rows to measure the loss on.{hint} Received: '{what}', no --data"
        )
    return load_recipe(what, overrides)


def _recipe_of(model: str, task: str, told: Told) -> Recipe:
    """Say as a recipe what the command line says."""
    column = {"image": told.image or "image"} if task.startswith("image") else {"text": list(told.text) or "text"}
    data = {"name": told.data, "train": told.split, "evaluation": [told.split], "label": told.label}
    plain = {
        "name": "sensitivity",
        "task": task,
        "model": {"name": model},
        "data": {**data, **column, "max_length": told.max_length, "train_limit": told.rows},
        "pruners": {"heads": {}},
        "output": ".",
    }
    return load_recipe(Recipe.model_validate(plain))


def _of_recipe(recipe: Recipe, told: Told) -> tuple[Any, list[dict[str, Any]]]:
    job = prepare(recipe)
    if recipe.dense is not None:
        _take_dense(job)
    numbers = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return job.model, _batched([job.train[one] for one in numbers[: told.rows]], job.collator, told)


def _take_dense(job: Job) -> None:
    """Take the dense model of an earlier run, or train it."""
    folder = job.output / "dense"
    if (folder / "config.json").is_file():
        say(f"The dense model is that of an earlier run: {folder}")
        job.model = saved_model(job.recipe, folder)
        return
    check(job)
    train_dense(job)


def _of_language_model(name: str, told: Told) -> tuple[Any, list[dict[str, Any]]]:
    column = [*told.text, "text"][0]
    settings = DataSettings(name=told.data, train=told.split, text=column, train_limit=told.rows)
    model, tokenizer = load_pruned(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    texts = [text for text in load_rows(settings)[column][:] if text.strip()]
    encoded = [tokenizer(text, truncation=True, max_length=told.max_length) for text in texts]
    rows = [{"input_ids": one["input_ids"]} for one in encoded if len(one["input_ids"]) > 1]  # one token predicts none
    if not rows:
        raise PruningError(f"--data must hold texts of two tokens or more. Received: none in '{told.data}'")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, _batched(rows, DataCollatorForLanguageModeling(tokenizer, mlm=False), told)


def _batched(rows: list[Any], collator: Callable[[list[Any]], Any], told: Told) -> list[dict[str, Any]]:
    starts = range(0, len(rows), told.batch_size)
    return [dict(collator(rows[start : start + told.batch_size])) for start in starts]


def _architecture(name: str) -> str:
    try:
        return str((AutoConfig.from_pretrained(name).architectures or [""])[0])
    except (OSError, ValueError) as error:
        raise PruningError(f"MODEL must be a folder or a name on the Hub. Received: '{name}' ({error})") from error
