"""Recipes: YAML to typed settings and back, overrides from the command line, errors that name the key."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator

from .data import DataSettings
from .distillation import Distillation
from .errors import RecipeError, did_you_mean, shown
from .evidence import EVIDENCE
from .files import shipped
from .metrics import METRICS
from .pruners import PRUNERS, Pruner
from .recipe_outputs import CardSettings, ExportSettings, MeasureSettings, RecipeSettings, as_list
from .registry import load_entry_points
from .rewinding import Rewinding
from .schedules import Schedule
from .session import AccuracyGuard, PruningSettings, Regularisation
from .settings import problems_of, read_yaml
from .targets import Target

Task = Literal[
    "text-classification",
    "image-classification",
    "token-classification",
    "question-answering",
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "audio-classification",
    "speech-recognition",
    "speech-recognition-ctc",
    "sentence-similarity",
]
METRICS_OF = {  # what a recipe has where it names none; else accuracy
    "token-classification": ["accuracy", "f1_macro"],
    "question-answering": ["span_exact", "span_f1"],
    "causal-lm": ["perplexity"],
    "masked-lm": ["perplexity"],
    "seq2seq": ["perplexity"],
    "speech-recognition": ["wer"],
    "speech-recognition-ctc": ["wer"],
    "sentence-similarity": ["spearmanr", "pearsonr"],
}
_LONGEST = 2**20  # characters; `read_yaml` refuses fewer


class ModelSettings(RecipeSettings):
    """Where the dense model comes from: a Hub name or folder, or a config to train from scratch.

    Args:
        name: Hub name or local folder.
        config: Settings of a new model, with its `model_type`.
        revision: Branch, tag or commit on the Hub.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.name is None) == (self.config is None):
            raise ValueError(
                "give either name, of a model that is there, or config, of a new one; classes are those of the data. "
                f"Received: name={shown(self.name)}, config={shown(self.config)}"
            )
        return self


class TrainSettings(RecipeSettings):
    """One training: AdamW, linear decay after a warm-up.

    Args:
        epochs: Passes over the data, above 0.
        batch_size: Rows in one step on one device.
        learning_rate: Its highest value.
        warmup: Fraction of the steps that the learning rate rises, in [0, 1).
        weight_decay: As in AdamW.
        group_by_length: Put rows of like length into one batch: less padding.
        disable_dropout: Train without the model's dropout: what learns from a teacher may follow it more closely.
        evaluations: How many times it is evaluated on the way, for curves of the metrics; 0: not at all.
    """

    epochs: float = Field(default=3, gt=0, le=1e6)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    group_by_length: bool = False
    disable_dropout: bool = False
    evaluations: int = Field(default=0, ge=0)


def _every_pruner() -> dict[str, Any]:
    """Return a key for every registered pruner; settings that go with its name are defaults (branches: unit=branch)."""
    load_entry_points()
    sorts = {name: PRUNERS[name] for name in PRUNERS}
    with_ = {name: BeforeValidator(partial(_with, sort.settings)) for name, sort in sorts.items()}
    return {name: (Annotated[sort.made | None, with_[name]], None) for name, sort in sorts.items()}


def _with(settings: Mapping[str, Any], given: Any) -> Any:
    return {**settings, **given} if isinstance(given, Mapping) else given


class PrunerSettings(create_model("Named", __base__=RecipeSettings, **_every_pruner())):  # type: ignore[misc]
    """What to remove; at least one of the registered pruners."""

    @property
    def chosen(self) -> list[Pruner]:
        """The pruners that the recipe names, in the order in which they are registered."""
        named = [getattr(self, name) for name in type(self).model_fields]
        return [pruner for pruner in named if pruner is not None]

    @model_validator(mode="after")
    def _any(self) -> PrunerSettings:
        if not self.chosen:
            raise ValueError(
                f"name at least one of {', '.join(type(self).model_fields)}; `heads: {{}}` takes the defaults. "
                "Received: none"
            )
        return self


class Recipe(RecipeSettings):
    """Everything that one run needs.

    Args:
        name: What the run is called.
        task: What the model does.
        model: Where the dense model comes from.
        data: What it is trained and evaluated on.
        dense: How the dense model is trained first; ``null``: it is ready as it is.
        train: How it is trained while it is pruned.
        pruners: What to remove.
        target: How much is to remain over all structured pruners.
        schedule: When to prune; ``null`` where something else says it: `rewinding`, each pruner's own schedule, or
            scores that are learned towards a goal (these are cut as by default).
        regularisation: What drives weights or units to zero until the last change; ``null``: nothing.
        guard: Which metric may drop how far: ``{metric: accuracy, max_drop: 0.01}``; ``null``: none is watched.
        rewinding: How often to train again from an early moment under the mask, instead of a schedule: one pruner of
            weights; ``null``: not at all.
        distillation: How to learn from the dense model; ``null``: not at all.
        shrink_during_training: Remove units at every change, which saves time, in several processes too.
        metrics: Names of metrics; the shipped ones work offline. Left out: the task's.
        measure: How latency is measured.
        onnx: Whether to export both models to ONNX.
        export: Further files of the pruned model, one or a list: ``{format: onnx, quantize: dynamic}``.
        card: What the card cannot find out by itself.
        push: Hub name to publish under; ``null``: nowhere.
        output: Folder of the run.
        report_to: Trackers, as in `TrainingArguments`.
        seed: Of everything.
    """

    name: str
    task: Task
    model: ModelSettings
    data: DataSettings
    dense: TrainSettings | None = None
    train: TrainSettings = TrainSettings()
    pruners: PrunerSettings
    target: Target | None = None
    schedule: Schedule | None = Schedule()
    regularisation: Regularisation | None = None
    guard: AccuracyGuard | None = None
    rewinding: Rewinding | None = None
    distillation: Distillation | None = None
    shrink_during_training: bool = False
    metrics: list[str] = Field(default=["accuracy"])
    measure: MeasureSettings = MeasureSettings()
    onnx: bool = True
    export: Annotated[list[ExportSettings], BeforeValidator(as_list)] = Field(default=[])
    card: CardSettings = CardSettings()
    push: str | None = None
    output: Path
    report_to: list[str] = Field(default=[])
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _metrics_of_the_task(self) -> Recipe:
        if "metrics" not in self.model_fields_set and self.task in METRICS_OF:
            self.metrics = list(METRICS_OF[self.task])
        return self

    @model_validator(mode="after")
    def _says_when(self) -> Recipe:
        if self.schedule is not None or self.rewinding is not None:
            return self
        scores = [pruner.resolve_score() for pruner in self.pruners.chosen if pruner.schedule is None]
        if not all(any(EVIDENCE[need].learns for need in score.needs) for score in scores):
            raise ValueError(
                "schedule: null needs rewinding, a schedule in each pruner, or scores that are learned towards a goal, "
                f"such as l0; left out, it is the default. Received: {', '.join(score.name for score in scores)}"
            )
        return self

    @model_validator(mode="after")
    def _guard_has_eyes(self) -> Recipe:
        """Know each metric before anything trains; those of the Hub say only then what they are called."""
        known = [*self.metrics, "loss"]
        if self.guard is None or not set(self.metrics) <= set(METRICS):
            return self
        name = self.guard.metric.removeprefix("eval_")
        if name not in known:
            raise ValueError(
                f"guard.metric must be one of the recipe's metrics, or loss: {', '.join(known)}."
                f"{did_you_mean(name, known)} Received: {shown(self.guard.metric)}"
            )
        return self

    @property
    def pruning(self) -> PruningSettings:
        """What to remove, when and how much."""
        return PruningSettings(
            self.pruners.chosen,
            self.schedule,
            self.target,
            guards=[self.guard] if self.guard is not None else [],
            shrink_during_training=self.shrink_during_training,
            seed=self.seed,
            regularisation=self.regularisation,
        )

    @property
    def exports(self) -> list[ExportSettings]:
        """Every file to write of the pruned model, each once; the one that `onnx` asks for is the first."""
        wanted = [*([ExportSettings()] if self.onnx else []), *self.export]
        return list({one.folder: one for one in wanted}.values())

    def yaml(self) -> str:
        """Return the recipe with every setting that is not its default, as YAML."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def load_recipe(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, and change keys of it.

    Args:
        recipe: A name from `shipped_recipes`, a path of a YAML file, or a recipe.
        overrides: ``key=value`` each, such as ``train.epochs=1`` or ``target.macs=0.5``; values are YAML.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: No such recipe, an unknown key, a wrong type or a value out of range: names the key path, the rule
            and what was received.

    Example:
        >>> load_recipe("quickstart", ["seed=3"]).seed
        3
    """
    if isinstance(recipe, Recipe):
        source, plain = recipe.name, recipe.model_dump(exclude_unset=True)
    else:
        path = _find(recipe)
        source, plain = str(recipe), _read(path)
    return recipe_of(plain, overrides, source)


def recipe_of(plain: dict[str, Any], overrides: Sequence[str] = (), source: str = "") -> Recipe:
    """Check the plain keys of a recipe; `overrides` and errors are those of `load_recipe`.

    Args:
        plain: Keys and values, as YAML has them.
        overrides: ``key=value`` each.
        source: What errors call it.
    """
    plain = copy.deepcopy(plain)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _override(plain, override)
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        problems = "; ".join(map(str, problems_of(error, known_at=_known_at)))
        raise RecipeError(f"Recipe '{source}': {problems}") from None


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the library: name to path."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def _find(recipe: str | Path) -> Path:
    named = shipped_recipes()
    if str(recipe) in named:
        return named[str(recipe)]
    if not Path(recipe).is_file():
        hint = did_you_mean(str(recipe), named)
        raise RecipeError(
            f"No recipe is named so, and no file is there.{hint} Known: {', '.join(named)}. Received: '{recipe}'"
        )
    return Path(recipe)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST)
    except UnicodeDecodeError as error:
        raise RecipeError(f"Recipe '{path}' is not valid YAML: {error.reason}. Received: no UTF-8") from None
    plain = read_yaml(text, f"Recipe '{path}'")
    if not isinstance(plain, dict):
        raise RecipeError(f"Recipe '{path}' must be a mapping of keys to values. Received: {shown(plain)}")
    return plain


def _override(plain: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in place; a mapping that was null or missing on the way is made."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"An override must be key=value, such as train.epochs=1. Received: {shown(override)}")
    *path, last = key.split(".")
    at = plain
    for part in path:
        if not isinstance(at.get(part), dict):
            at[part] = {}
        at = at[part]
    at[last] = read_yaml(text, f"The value of {key:.80}")


def _known_at(path: tuple[Any, ...]) -> Iterable[str]:
    """Return the keys that exist below a path of the recipe."""
    kind: Any = Recipe
    for part in [one for one in path if not isinstance(one, int)]:  # a place in a list
        annotation = _fields(kind).get(part)
        kinds = [annotation, *get_args(annotation)]
        kind = next((one for one in kinds if isinstance(one, type) and _fields(one)), None)
    return list(_fields(kind))


def _fields(kind: Any) -> dict[str, Any]:
    """Return field names and types of a pydantic model or dataclass."""
    fields = getattr(kind, "model_fields", None) or (
        getattr(kind, "__pydantic_fields__", {}) if is_dataclass(kind) else {}
    )
    return {name: field.annotation for name, field in fields.items()}
