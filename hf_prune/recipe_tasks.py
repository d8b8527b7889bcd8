"""What a recipe's task means: which class its models are of, and how rows become batches; one row a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    default_data_collator,
)

from .data import (
    Labels,
    prepare_answers,
    prepare_images,
    prepare_language,
    prepare_pairs,
    prepare_seq2seq,
    prepare_sounds,
    prepare_speech,
    prepare_text,
    prepare_texts,
    prepare_tokens,
)
from .errors import CheckpointError, PruningError, RecipeError, shown
from .evidence import Loss
from .files import no_model
from .metrics import Problem, Texts
from .recipe import Recipe
from .similarity import Sentences, SimilarityTrainer, cosines, modules_folder, similarity_loss
from .speech import FrameTrainer, Listener, load_extractor, load_processor, set_language, texts_of


class RecipeTask(NamedTuple):
    """The class of a task's models, and how rows become batches."""

    reads: str  # for whoever has data
    auto_class: Any
    processor: Callable[[Recipe], Any]
    rows: Callable[[Any, Any, Recipe, Any], Any]  # from a split, the processor, the recipe and the model
    collator: Callable[[Any, Any], Callable[[list[Any]], dict[str, Any]]]  # from the processor and the model
    problem: Callable[[Any], Problem]  # from the model
    labels: Labels = "classes"
    outputs: tuple[str, ...] = ("logits",)  # of the model, which metrics read
    answers: tuple[str, ...] = ("labels",)  # of a batch, which they are compared with
    beside: tuple[str, ...] = ()  # of a batch, which the model does not read
    hears: bool = False  # its sounds cannot be made up, to time a model on
    options: Mapping[str, Any] = {}  # of the model's config
    trainer: Any = Trainer
    loss: Loss | None = None  # where it is not the model's own
    predict: Callable[[Mapping[str, Any], Mapping[str, Any]], torch.Tensor] | None = None  # from outputs and a batch
    texts: Callable[[Any], Texts] | None = None  # from the processor, where metrics are of texts
    cached: Literal["rows", "words"] | None = None  # what a cache can keep of a teacher: an answer a row, or a word

    @property
    def has_classes(self) -> bool:
        """Whether its models have classes that must be those of the data."""
        return self.labels in ("classes", "list")

    @property
    def head(self) -> str:
        """How the names of its models' classes end."""
        return str(self.auto_class.__name__).removeprefix("AutoModel")

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a batch the model reads."""
        return {name: value for name, value in batch.items() if name not in (*self.answers, *self.beside)}


def _tokenizer(recipe: Recipe) -> Any:
    if recipe.model.name is None:
        raise RecipeError("model.name must say where the tokenizer is for a task with texts. Received: a config alone")
    try:
        return AutoTokenizer.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    except RecursionError:
        raise CheckpointError(
            f"The tokenizer's files must not be nested so deeply. Received: '{recipe.model.name}'"
        ) from None


def read_by(model: Any, processor: Any) -> Any:
    """Return the processor, whose tokenizer makes only what the model reads.

    One that somebody has trained makes ``token_type_ids`` whatever its model is, and T5 refuses them.
    """
    reads = inspect.signature(type(model).forward).parameters
    for one in (processor, getattr(processor, "tokenizer", None)):
        names = getattr(one, "model_input_names", None) or []
        if isinstance(one, PreTrainedTokenizerBase) and "input_ids" in reads:
            one.model_input_names = [name for name in names if name in reads]
    return processor


def _padding_tokenizer(recipe: Recipe) -> Any:
    """Return a tokenizer that can pad; those of language models often have no token for it."""
    tokenizer = _tokenizer(recipe)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _image_processor(recipe: Recipe) -> Any:
    """Return the model's own image processor, or none for arrays and for models that have none."""
    if recipe.model.name is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    except (OSError, ValueError):
        return None


def plain_processor(config: Any) -> Any:
    """Return what scales images to a model's size, and their values to [-1, 1]: for a model without a processor."""
    made = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor  # 5 wants torchvision
    side, channels = getattr(config, "image_size", None) or 224, getattr(config, "num_channels", None) or 3
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    halves = [0.5] * channels
    return made(size={"height": height, "width": width}, image_mean=halves, image_std=halves)


def _images(split: Any, processor: Any, recipe: Recipe, model: Any) -> Any:
    processor = processor or plain_processor(model.config)
    return prepare_images(split, recipe.data, processor, num_labels=model.config.num_labels)


def _sounds(split: Any, extractor: Any, recipe: Recipe, model: Any) -> Any:
    return prepare_sounds(split, extractor, recipe.data, num_labels=model.config.num_labels)


def _texts(split: Any, tokenizer: Any, recipe: Recipe, model: Any) -> Any:
    return prepare_text(split, tokenizer, recipe.data, num_labels=model.config.num_labels)


def _sentences(recipe: Recipe) -> Sentences:
    return Sentences(_tokenizer(recipe), modules_folder(str(recipe.model.name), recipe.model.revision))


def _spoken(split: Any, processor: Any, recipe: Recipe, model: Any) -> Any:
    set_language(model, recipe)
    return prepare_speech(split, processor, recipe.data, recipe.data.max_length)


def _same_masks(tokenizer: Any, model: Any) -> Any:
    return _SameMasks(tokenizer)


class _SameMasks(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Hide the same tokens of the same batch each time, so that two models are asked the same."""

    def torch_mask_tokens(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(inputs.sum()))
            return super().torch_mask_tokens(inputs, *args, **kwargs)


def _class_problem(model: Any) -> Problem:
    if model.config.problem_type == "multi_label_classification":
        return "multi_label"
    return "regression" if model.config.num_labels == 1 else "classification"


RECIPE_TASKS = {
    "text-classification": RecipeTask(
        "text, or text: [first, second]; label: a class, a number, or several columns of 0 and 1",
        AutoModelForSequenceClassification,
        _tokenizer,
        _texts,
        lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        _class_problem,
        cached="rows",
    ),
    "image-classification": RecipeTask(
        "image: pictures or arrays; label: a class",
        AutoModelForImageClassification,
        _image_processor,
        _images,
        lambda processor, model: default_data_collator,
        _class_problem,
        cached="rows",
    ),
    "token-classification": RecipeTask(
        "text: a list of words; label: a list of classes, as long",
        AutoModelForTokenClassification,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_tokens(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForTokenClassification(tokenizer),
        lambda model: "tokens",
        "list",
    ),
    "question-answering": RecipeTask(
        "text: [question, context]; label: answers as in SQuAD",
        AutoModelForQuestionAnswering,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_answers(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorWithPadding(tokenizer),
        lambda model: "answers",
        "free",
        ("start_logits", "end_logits"),
        ("start_positions", "end_positions"),
    ),
    "causal-lm": RecipeTask(
        "text, joined and cut into rows of data.max_length",
        AutoModelForCausalLM,
        _padding_tokenizer,
        lambda split, tokenizer, recipe, model: prepare_language(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        lambda model: "causal_lm",
        "none",
        cached="words",
    ),
    "masked-lm": RecipeTask(
        "text, of which tokens are hidden",
        AutoModelForMaskedLM,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_texts(split, tokenizer, recipe.data),
        _same_masks,
        lambda model: "masked_lm",
        "none",
    ),
    "seq2seq": RecipeTask(
        "text; label: the text to write",
        AutoModelForSeq2SeqLM,
        _tokenizer,
        lambda split, tokenizer, recipe, model: prepare_seq2seq(split, tokenizer, recipe.data),
        lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model=model),
        lambda model: "seq2seq",
        "free",
        cached="words",
    ),
    "audio-classification": RecipeTask(
        "audio: sounds, such as a folder of wav files for each class; label: a class",
        AutoModelForAudioClassification,
        load_extractor,
        _sounds,
        lambda extractor, model: Listener(extractor),
        _class_problem,
        hears=True,
        cached="rows",
    ),
    "speech-recognition": RecipeTask(
        "audio: sounds; label: what was said, such as wav files with a metadata.csv; models that write, as Whisper",
        AutoModelForSpeechSeq2Seq,
        load_processor,
        _spoken,
        lambda processor, model: Listener(processor.feature_extractor, processor.tokenizer, model),
        lambda model: "speech",
        "free",
        hears=True,
        trainer=Seq2SeqTrainer,
        texts=lambda processor: texts_of(processor, ctc=False),
        cached="words",
    ),
    "speech-recognition-ctc": RecipeTask(
        "the same, for models that name each frame's letter, as wav2vec 2",
        AutoModelForCTC,
        load_processor,
        lambda split, processor, recipe, model: prepare_speech(split, processor, recipe.data),
        lambda processor, model: Listener(processor.feature_extractor, processor.tokenizer),
        lambda model: "ctc",
        "free",
        hears=True,
        options={"ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
        trainer=FrameTrainer,
        texts=lambda processor: texts_of(processor, ctc=True),
    ),
    "sentence-similarity": RecipeTask(
        "text: [first, second]; label: a score; the model is a plain encoder, or one of sentence-transformers",
        AutoModel,
        _sentences,
        lambda split, sentences, recipe, model: prepare_pairs(split, sentences.tokenizer, recipe.data),
        lambda sentences, model: sentences.collate,
        lambda model: "regression",
        "free",
        ("last_hidden_state",),
        beside=("pooling",),
        trainer=SimilarityTrainer,
        loss=similarity_loss,
        predict=cosines,
    ),
}


# the model that a recipe begins with
def dense_config(recipe: Recipe) -> Any:
    """Return what the dense model says of itself; ``None``: it will be a new one, or cannot be loaded.

    Raises:
        RecipeError: There is no such model.
    """
    try:
        return (
            AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision) if recipe.model.name else None
        )
    except OSError as error:  # at once: the Hub's client tries five times whenever it is asked
        raise RecipeError(no_model("model.name", str(recipe.model.name), error)) from error
    except ValueError:
        return None  # `dense_model` says what is wrong


def dense_model(recipe: Recipe, auto_class: Any, labels: Mapping[str, Any]) -> Any:
    """Load the dense model, or make a new one from the recipe's config.

    Args:
        recipe: Says its name, or its config.
        auto_class: The task's.
        labels: Options that say which classes it has.

    Raises:
        RecipeError: There is no such model.
    """
    settings, options = recipe.model, {**labels, **_attention(recipe)}
    if settings.name is not None:
        try:
            return auto_class.from_pretrained(settings.name, revision=settings.revision, dtype=torch.float32, **options)
        except OSError as error:
            raise RecipeError(no_model("model.name", settings.name, error)) from error
        except ValueError as error:
            if isinstance(error, PruningError):
                raise
            raise RecipeError(
                f"model.name must be a model that can be one for {recipe.task}. Received: '{settings.name}' "
                f"({shown(str(error).splitlines()[0], 120)})"
            ) from error
    config = dict(settings.config or {})
    if "model_type" not in config:
        raise RecipeError(f"model.config needs a model_type, such as vit. Received keys: {', '.join(config) or 'none'}")
    try:
        return auto_class.from_config(AutoConfig.for_model(**config, **options))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"model.config must describe a model for {recipe.task}: {error}. Received: {shown(settings.config)}"
        ) from error


def saved_model(recipe: Recipe, folder: str | Path) -> Any:
    """Load a model that an earlier run of the recipe has saved: its dense one, or a smaller one."""
    auto_class = RECIPE_TASKS[recipe.task].auto_class
    return auto_class.from_pretrained(folder, dtype=torch.float32, **_attention(recipe))


def _attention(recipe: Recipe) -> dict[str, str]:
    """Return how attention must be computed; transformers 4 cannot change that of every model later."""
    eager = recipe.distillation is not None and recipe.distillation.uses("attention")
    return {"attn_implementation": "eager"} if eager else {}
