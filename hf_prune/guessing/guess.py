"""From a model and its data to a recipe: task, columns, splits, metrics, training and pruners."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from ..architectures import find_groups
from ..data import (
    DataSettings,
    evaluation_splits,
    headless,
    is_listed,
    label_count,
    label_names,
    load_source,
    load_split,
    numbers_as_names,
)
from ..errors import PruningError, RecipeError, UnsupportedModelError, did_you_mean, shown
from ..files import no_model
from ..labels import fit_classes
from ..pruners import PRUNERS, UnitPruner
from ..recipe import METRICS_OF, Recipe, recipe_of
from ..recipe_tasks import RECIPE_TASKS, RecipeTask
from ..similarity import modules_folder
from ..tables import aligned
from .columns import FINDERS, Asked, can_evaluate, is_whole_score, names_two_texts, unread
from .wording import labels_told, not_found, single_row, splits_told, target_told, two_texts, with_said

_HELD_OUT = 0.2
_STEPS, _FEWEST, _MOST = 600, 2, 20  # optimizer steps that pruning wants; epochs at least and at most
_BATCH = 16
_LENGTHS = {"question-answering": 384, "causal-lm": 256, "speech-recognition": 225}  # else 128
_NO_TOKENS = ("image-classification", "audio-classification", "speech-recognition-ctc")
_PRUNED = ("heads", "neurons", "channels")  # what is removed where a model has it
_FINE = 256  # neurons of a layer from which on widths that are a multiple of 8 cost nothing


@dataclass(frozen=True)
class Wish:
    """What a person says; all else is guessed.

    Args:
        model: Folder, or name on the Hub.
        data: File, folder, name on the Hub, or ``"digits"``.
        config: Of the data set on the Hub.
        task: One of the recipes' tasks.
        text: Columns with the text.
        image: The column with images.
        label: Columns with the label.
        audio: The column with sounds.
        target: As in `Target`: ``{"macs": 0.5}``.
        teacher: ``"self"``: the dense model teaches; ``"none"``: nobody does.
        output: Folder of the run.
    """

    model: str
    data: str
    config: str | None = None
    task: str | None = None
    text: Sequence[str] = ()
    image: str | None = None
    label: Sequence[str] = ()
    audio: str | None = None
    target: Mapping[str, float] = field(default_factory=lambda: {"macs": 0.5})
    teacher: Literal["self", "none"] = "self"
    output: Path | None = None

    def __post_init__(self) -> None:
        """Refuse another teacher: it would be none."""
        if self.teacher not in ("self", "none"):
            raise PruningError(f"--teacher must be self or none. Received: '{self.teacher}'")


@dataclass(frozen=True)
class Guess:
    """A recipe, and why it is so.

    Args:
        recipe: The recipe.
        reasons: Key of the recipe, its value, and where it comes from.
    """

    recipe: Recipe
    reasons: list[tuple[str, str, str]]

    def table(self) -> str:
        """Return what was guessed, as a Markdown table that is aligned for plain text."""
        return "\n".join(aligned([("key", "value", "because"), *self.reasons], words=True))


def guess(wish: Wish, overrides: Sequence[str] = ()) -> Guess:
    """Make a recipe of a model and its data.

    Args:
        wish: What a person says.
        overrides: ``key=value`` each, which change the recipe.

    Returns:
        The recipe, and where its keys come from.

    Raises:
        PruningError: There is no such model or data, no task fits both, or nothing of the model can be removed.

    Example:
        >>> print(guess(Wish("my-bert", "reviews.csv")).table())  # doctest: +SKIP
    """
    return _Guesser(wish).guess(overrides)


class _Guesser:
    """Collects keys of a recipe, each with its reason."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.reasons: list[tuple[str, str, str]] = []
        self.config = _config_of(wish.model)
        self.own = _own_task(self.config, wish.model)
        self.settings = DataSettings(name=wish.data, config=wish.config)
        self.splits = load_source(self.settings)

    def say(self, key: str, value: Any, because: str) -> None:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        self.reasons.append((key, text, because))

    def guess(self, overrides: Sequence[str]) -> Guess:
        wish = self.wish
        train = self._train()
        name, columns = self._task(self.splits[train])
        splits = {"train": train, **self._evaluation(train, columns)}
        task = RECIPE_TASKS[name]
        data = {"name": wish.data, "config": wish.config, **splits, **columns, **self._limits(name, splits, columns)}
        data = {key: value for key, value in data.items() if value is not None}
        settings = DataSettings(**data)
        dense, train_rows = self._dense(name, task, settings)
        training = self._training(train_rows)
        plain = {
            "name": _name_of(wish),
            "task": name,
            "model": {"name": wish.model},
            "data": data,
            **({"dense": dict(training)} if dense else {}),
            "train": training,
            "pruners": self._pruners(task),
            "target": self._target(data),
            **({"distillation": {}} if wish.teacher == "self" else {}),
            "shrink_during_training": True,
            **self._metrics(name, settings),
            **self._outputs(name, data),
            "output": str(wish.output or Path("runs") / _name_of(wish)),
        }
        recipe = recipe_of(plain, overrides, source=_name_of(wish))
        return Guess(recipe, with_said(self.reasons, overrides, plain["target"]))

    # data
    def _train(self) -> str:
        train = "train" if "train" in self.splits else next(iter(self.splits))
        if len(self.splits[train]) == 1:
            raise PruningError(single_row(self.splits[train]))
        self.say("data.train", train, f"{len(self.splits[train]):,} rows")
        return train

    def _evaluation(self, train: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is evaluated on: the first split whose rows have what the task reads, or a part of training."""
        others = [name for name in evaluation_splits(self.splits) if name != train]
        useful = [name for name in others if can_evaluate(self.splits[name], self.splits[train], columns)]
        if useful:
            self.say("data.evaluation", useful[0], f"{len(self.splits[useful[0]]):,} rows")
            return {"evaluation": useful[:1]}
        why = splits_told(others, [name for name in self.splits if name != train])
        self.say("data.test_size", _HELD_OUT, f"{why}: a part of {train} is held out, the same in every run")
        return {"test_size": _HELD_OUT}

    def _task(self, rows: Any) -> tuple[str, dict[str, Any]]:
        wish = self.wish
        asked = Asked(rows, wish.text, wish.image, wish.label, wish.audio)
        if (wish.task or self.own) == "causal-lm" and names_two_texts(asked):  # else a classifier would come of it
            raise PruningError(two_texts([*wish.text, *wish.label]))
        tried = {name: columns for name in self._candidates() if (columns := FINDERS[name](asked)) is not None}
        found = {name: columns for name, columns in tried.items() if self._fits(columns)}
        self._check_header(rows, next(iter(found.values()), {}))
        if not found:
            raise PruningError(not_found(wish.task, rows))
        name, columns = next(iter(found.items()))
        if name != self.own and "sentence-similarity" in found and is_whole_score(asked, columns):
            name, columns = "sentence-similarity", found["sentence-similarity"]
        self.say("task", name, self._why(name))
        for key, value in columns.items():
            self.say(f"data.{key}", value, "you say so" if getattr(wish, key) else "by its name and type")
        if left := unread(rows, columns):
            self.say("columns left out", left, f"{name} reads the others")
        return name, columns

    def _check_header(self, rows: Any, columns: Mapping[str, Any]) -> None:
        """Refuse a file whose first line would be lost: names that nobody has said, and that are a row of data."""
        said = {*self.wish.text, *self.wish.label, self.wish.image, self.wish.audio}
        used = {name for one in columns.values() for name in ([one] if isinstance(one, str) else one)}
        hint = headless(self.settings, rows, (used or {*rows.column_names}) - said)
        if hint:
            raise PruningError(f"{hint}. Received columns: {', '.join(map(shown, rows.column_names))}")

    def _fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether a task reads what a person has named, and not only something else."""
        used = {key: {one} if isinstance(one, str) else {*one} for key, one in columns.items()}
        labels, wish = used.get("label", set()), self.wish
        files = used.get("image", set()) | used.get("audio", set())
        texts = used.get("text", set()) | labels  # two texts may be named in turn
        named = (wish.text, texts), (wish.label, labels), ([one for one in (wish.image, wish.audio) if one], files)
        return all(set(said) <= there for said, there in named)

    def _candidates(self) -> list[str]:
        """Return the tasks that may be meant, the likeliest first."""
        if self.wish.task is not None:
            if self.wish.task not in RECIPE_TASKS:
                hint = did_you_mean(self.wish.task, RECIPE_TASKS)
                raise PruningError(f"task must be one of {', '.join(RECIPE_TASKS)}.{hint} Received: '{self.wish.task}'")
            return [self.wish.task]
        own, writes = self.own, "seq2seq" if getattr(self.config, "is_encoder_decoder", False) else None
        reads = "causal-lm" if own == "causal-lm" else "masked-lm"
        language = ("seq2seq", "causal-lm", "masked-lm")
        likely = (writes, reads) if own in (None, *language) else ()  # a classifier would lose what it has learned
        strange = "speech-recognition-ctc" if writes else "speech-recognition"
        others = [one for one in FINDERS if one != strange and (one not in language or one in likely)]
        return list(dict.fromkeys([*([own] if own not in (None, "masked-lm") else []), *others]))

    def _why(self, name: str) -> str:
        if self.wish.task:
            return "you say so"
        return "what the model was made for" if self.own == name else "by the columns"

    def _limits(self, name: str, splits: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return keys of the data that are no columns."""
        limits: dict[str, Any] = {}
        if name == "sentence-similarity":
            scores = np.array(self.splits[splits["train"]][columns["label"]][:], dtype=float)
            if not np.isfinite(scores).all():
                raise PruningError(
                    f"--label must name a column with a number in each row. Received: '{columns['label']}', which has "
                    f"none in {int((~np.isfinite(scores)).sum())} of {len(scores)} rows"
                )
            limits["full_score"] = max(1.0, float(scores.max()))
            self.say("data.full_score", limits["full_score"], "the largest score, which is a cosine of 1")
        if name == "speech-recognition" and _knows_languages(self.wish.model):
            limits["language"] = "english"
            self.say("data.language", "english", "a guess: data.language=german says another")
        if name not in _NO_TOKENS:
            limits["max_length"] = min(_LENGTHS.get(name, 128), _longest(self.config))
        return limits

    # model
    def _dense(self, name: str, task: RecipeTask, settings: DataSettings) -> tuple[bool, int]:
        """Return whether the model must be trained first, and how many rows there are to train on."""
        new = partial(fit_classes, None, head=task.head) if task.has_classes and self.own != name else None
        splits = load_split(settings, new, task.labels)
        made = ", ".join(self.config.architectures or ["a config alone"])
        if self.own != name:
            self.say("dense", "trained first", f"{name} is new to the model, which is {made}")
            return True, len(splits.train)
        if task.has_classes:
            try:
                load_split(settings, partial(fit_classes, self.config, head=task.head), task.labels)
            except PruningError:
                self.say("dense", "trained first", "the model has learned other classes than the data's")
                return True, len(splits.train)
        known = [self.config.id2label[one] for one in range(self.config.num_labels)] if task.has_classes else []
        classes = f", its classes are the data's: {', '.join(known[:6])}" if known else ""
        self.say("dense", "null", f"the model is fine-tuned ({made}){classes}")
        return False, len(splits.train)

    def _training(self, rows: int) -> dict[str, Any]:
        steps = math.ceil(rows / _BATCH)
        epochs = min(_MOST, max(_FEWEST, math.ceil(_STEPS / steps)))
        self.say("train.epochs", epochs, f"{epochs * steps:,} steps of {_BATCH} rows, to prune in small steps")
        return {"epochs": epochs, "batch_size": _BATCH}

    def _pruners(self, task: RecipeTask) -> dict[str, Any]:
        try:
            with torch.device("meta"):
                groups = find_groups(task.auto_class.from_config(self.config))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"The model must be one for {task.head}. Received: {self.wish.model} ({str(error)[:200]})"
            ) from error
        kinds = {group.kind: group.units for group in groups}
        made: dict[str, Any] = {}
        for name in _PRUNED:
            pruner = PRUNERS[name].made(**PRUNERS[name].settings)
            if isinstance(pruner, UnitPruner) and set(pruner.kinds(groups)) & set(kinds):
                made[name] = {"multiple_of": 8} if name == "neurons" and kinds["neuron"] >= _FINE else {}
        if not made:
            raise UnsupportedModelError(
                f"The model must have heads, neurons or channels: hf-prune inspect {self.wish.model} says what it has. "
                f"Received: {', '.join(kinds) or 'none'}"
            )
        self.say("pruners", list(made), "what the model has")
        return made

    def _target(self, data: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = dict(self.wish.target)
        if {"speedup", "latency_ms"} & set(told):
            told["length"] = data.get("max_length", 128)
            told["runtime"] = "onnxruntime" if find_spec("onnxruntime") else "torch"
        self.say("target", ", ".join(f"{key}={value}" for key, value in told.items()), target_told(told))
        return told

    # the rest
    def _metrics(self, name: str, settings: DataSettings) -> dict[str, Any]:
        """Return metrics, where they are not those that the task has anyway."""
        if not RECIPE_TASKS[name].has_classes:
            self.say("metrics", METRICS_OF[name], f"usual for {name}")
            return {}
        splits = load_split(settings, labels=RECIPE_TASKS[name].labels)
        names = label_names(splits.train, settings.label_column) or []
        if not (names or self._is_regression(name)):
            names = [str(number) for number in numbers_as_names(splits.train, settings.label_column)]
        feature = splits.train.features[settings.label_column]
        if name == "token-classification":
            metrics = (
                ["entity_f1", "accuracy"] if any(one.startswith("B-") for one in names) else ["accuracy", "f1_macro"]
            )
        elif is_listed(feature):
            metrics = ["f1", "accuracy"]
        elif label_count(splits.train, settings.label_column) == 1 or (self._is_regression(name) and not names):
            metrics = ["pearsonr", "spearmanr"]
        else:
            metrics = ["accuracy"]
        self.say("metrics", metrics, labels_told(names, feature))
        return {"metrics": metrics}

    def _is_regression(self, name: str) -> bool:
        return self.own == name and self.config.num_labels == 1

    def _outputs(self, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
        task = RECIPE_TASKS[name]
        measure = {"length": data["max_length"]} if "max_length" in data and not task.hears else {}
        if task.hears and name != "speech-recognition":
            self.say("onnx", False, "of models that hear, only Whisper is exported so far")
            return {"measure": measure, "onnx": False}
        if find_spec("onnxruntime") is None:
            self.say("onnx", False, "ONNX Runtime is not installed: pip install 'hf_prune[onnx]'")
            return {"measure": measure, "onnx": False}
        return {"measure": measure}


def _config_of(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RecipeError(no_model("--model", model, error)) from error


def _own_task(config: Any, model: str) -> str | None:
    """Return the task that the model's class is for."""
    made = [str(one) for one in config.architectures or ()]
    if {*made} & {*MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}:
        return "speech-recognition"
    if any(one.endswith("Model") for one in made) and modules_folder(model) is not None:
        return "sentence-similarity"
    heads: dict[str, tuple[str, ...]] = {name: (task.head,) for name, task in RECIPE_TASKS.items() if task.head}
    heads |= {"causal-lm": ("ForCausalLM", "LMHeadModel"), "seq2seq": ("ForConditionalGeneration",)}
    return next((name for name, ends in heads.items() if any(one.endswith(ends) for one in made)), None)


def _longest(config: Any) -> int:
    """Return how many tokens a model reads at most."""
    names = ("max_position_embeddings", "max_target_positions")
    positions = next((found for name in names if (found := getattr(config, name, None))), 512)
    padded = str(config.model_type) in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
    return int(positions) - (2 if padded else 0)  # these count positions from behind the padding


def _knows_languages(model: str) -> bool:
    """Whether a model that writes what it hears must be told the language."""
    try:
        return bool(getattr(GenerationConfig.from_pretrained(model), "is_multilingual", False))
    except (OSError, ValueError):
        return False


def _name_of(wish: Wish) -> str:
    parts = [Path(one).expanduser().name.split(".")[0] or "here" for one in (wish.model, wish.data)]
    return "-".join(re.sub(r"[^\w.-]+", "-", one) for one in parts)
