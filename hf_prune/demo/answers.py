"""What models are asked and what they answer, for each head that the page knows; one row a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import PruningError
from ..recipe_tasks import plain_processor

_MOST = 5  # classes or words of each model that are shown
_NEW = 24  # tokens that a language model goes on for
_WORD = re.compile(r"\w+|[^\w\s]")


class Cell(NamedTuple):
    """What one model says: words, and how probable it thinks them."""

    said: str
    share: float | None = None


class Row(NamedTuple):
    """What is asked, what each model says of it, and whether it is remarkable where they differ."""

    what: str
    cells: dict[str, Cell]
    marked: bool = False

    @property
    def differs(self) -> bool:
        """Whether models do not say the same words."""
        return self.marked and len({cell.said for cell in self.cells.values()}) > 1


@dataclass
class Asked:
    """One question: the models by name, what they are given, and what they have computed from it."""

    models: Mapping[str, Any]
    processor: Any
    inputs: Any
    logits: Mapping[str, Tensor]  # of each model, of the one row

    @property
    def config(self) -> Any:
        """What the pruned model says of its classes, which are those of the dense one."""
        return self.models["pruned"].config

    def shares(self, at: Any = slice(None)) -> dict[str, Tensor]:
        """Return probabilities of each model, somewhere in its row."""
        return {name: one[at].softmax(-1) for name, one in self.logits.items()}


class Head(NamedTuple):
    """How a kind of model is asked.

    Args:
        ending: How the names of its classes end.
        asks: What people give.
        prepare: From the processor, the model and what people gave to what the model reads.
        answer: From a question to rows.
        example: From the processor and the model to what the page begins with.
    """

    ending: tuple[str, ...]
    asks: Literal["text", "texts", "image"]
    prepare: Callable[..., Any]
    answer: Callable[[Asked], Iterator[Row]]
    example: Callable[[Any, Any], Any]


# what is given
def _encode(tokenizer: Any, model: Any, *texts: Any, **how: Any) -> Any:
    """Tokenise one row, cut to what the model can read."""
    most = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 2048)
    return tokenizer(*texts, truncation=True, max_length=most, return_tensors="pt", **how)


def _text(tokenizer: Any, model: Any, text: str, second: str = "") -> Any:
    _check(text)
    return _encode(tokenizer, model, *filter(None, (text, second)))


def _words(tokenizer: Any, model: Any, text: str) -> Any:
    _check(text)
    return _encode(tokenizer, model, _WORD.findall(text), is_split_into_words=True)


def _masked(tokenizer: Any, model: Any, text: str) -> Any:
    _check(text)
    if tokenizer.mask_token is None or tokenizer.mask_token not in text:
        raise PruningError(f"The text must have {tokenizer.mask_token} where a word is to be found. Received: none")
    return _encode(tokenizer, model, text)


def _check(text: str) -> None:
    if not (text or "").strip():
        raise PruningError("There must be a text to ask about. Received: an empty one")


def _image(processor: Any, model: Any, image: Any) -> Any:
    if image is None:
        raise PruningError("There must be an image to ask about. Received: none")
    array = np.asarray(image.convert("L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"))
    array = array[..., None] if array.ndim == 2 else array
    return processor([array], return_tensors="pt", input_data_format="channels_last")


# what is answered
def _of_classes(asked: Asked) -> Iterator[Row]:
    config, logits = asked.config, asked.logits
    if config.num_labels == 1:
        yield Row("value", {name: Cell(f"{float(one[0]):.4f}") for name, one in logits.items()})
        return
    several = config.problem_type == "multi_label_classification"
    shares = {name: one.sigmoid() for name, one in logits.items()} if several else asked.shares()
    yield from _highest(shares, lambda number: str(config.id2label[number]))


def _of_words(asked: Asked) -> Iterator[Row]:
    words, before = asked.inputs.word_ids(0), None
    ids = asked.inputs["input_ids"][0].tolist()
    spans = {word: [one for one, of in zip(ids, words) if of == word] for word in words if word is not None}
    for at, word in enumerate(words):
        if word is not None and word != before:
            found = {name: one.max(-1) for name, one in asked.shares(at).items()}
            cells = {
                name: Cell(asked.config.id2label[int(one.indices)], float(one.values)) for name, one in found.items()
            }
            yield Row(asked.processor.decode(spans[word]).strip(), cells, marked=True)
        before = word


def _best(shares: Tensor, names: Mapping[int, str]) -> Cell:
    number = int(shares.argmax())
    return Cell(str(names[number]), float(shares[number]))


def _of_masks(asked: Asked) -> Iterator[Row]:
    places = (asked.inputs["input_ids"][0] == asked.processor.mask_token_id).nonzero().flatten().tolist()
    for number, at in enumerate(places, 1):
        of = f", word {number}" if len(places) > 1 else ""
        yield from _highest(asked.shares(at), lambda token: f"{asked.processor.decode([token]).strip()}{of}")  # noqa: B023


def _of_language(asked: Asked) -> Iterator[Row]:
    tokenizer, given = asked.processor, asked.inputs["input_ids"].shape[1]
    how = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    written = {name: model.generate(**asked.inputs, **how)[0, given:] for name, model in asked.models.items()}
    texts = {name: Cell(tokenizer.decode(one, skip_special_tokens=True)) for name, one in written.items()}
    yield Row("goes on", texts, marked=True)
    yield from _highest(asked.shares(-1), lambda token: f"next: {tokenizer.decode([token])!r}")


def _highest(shares: Mapping[str, Tensor], name_of: Callable[[int], str]) -> Iterator[Row]:
    """Yield the classes that a model thinks most probable, the first model's first."""
    numbers = dict.fromkeys(int(number) for one in shares.values() for number in one.topk(min(_MOST, len(one))).indices)
    for number in list(numbers)[: _MOST + 2]:
        yield Row(name_of(number), {name: Cell("", float(one[number])) for name, one in shares.items()})


# what the page begins with
def _example_image(processor: Any, model: Any) -> Any:
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_image

    if getattr(model.config, "num_channels", 3) == 1:
        digit = Image.fromarray((load_digits().images[0] * (255 / 16)).astype(np.uint8))
        return digit.resize((160, 160), Image.Resampling.NEAREST)  # 8 x 8 could hardly be seen
    return Image.fromarray(load_sample_image("flower.jpg"))


def _example_of_masks(tokenizer: Any, model: Any) -> str:
    return f"We found a good {tokenizer.mask_token} in Rome."


HEADS = (
    Head(
        ("ForSequenceClassification",), "texts", _text, _of_classes,
        lambda tokenizer, model: "A good film, and a play that I would see again.",
    ),
    Head(
        ("ForTokenClassification",), "text", _words, _of_words,
        lambda tokenizer, model: "Ada and Bob met in Rome, and wrote home from Oslo.",
    ),
    Head(("ForMaskedLM",), "text", _masked, _of_masks, _example_of_masks),
    Head(
        ("ForCausalLM", "LMHeadModel"), "text", _text, _of_language,
        lambda tokenizer, model: "We went to Rome to see",
    ),
    Head(("ForImageClassification",), "image", _image, _of_classes, _example_image),
)  # fmt: skip


def head_of_model(model: Any) -> Head:
    """Return how a model is asked.

    Raises:
        PruningError: The page does not know its kind.
    """
    name = type(model).__name__
    for head in HEADS:
        if name.endswith(head.ending):
            return head
    offered = ", ".join(head.ending[0] for head in HEADS)
    raise PruningError(f"The page can ask models whose class ends in {offered}. Received: {name}")


def load_processor(head: Head, folders: list[str | Path], model: Any) -> Any:
    """Load the tokenizer or image processor that lies in one of these folders; images have one that does without.

    Raises:
        PruningError: A text's model has none.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    auto: Any = AutoImageProcessor if head.asks == "image" else AutoTokenizer
    for folder in folders:
        if head.asks != "image" and Path(folder).is_dir() and not any(Path(folder).glob("tokenizer*")):
            continue  # transformers 5 would make up an empty one
        try:
            return auto.from_pretrained(folder)
        except (OSError, ValueError, KeyError):
            continue
    if head.asks == "image":
        return plain_processor(model.config)
    tried = " nor ".join(f"'{folder}'" for folder in folders)
    raise PruningError(f"A tokenizer must lie beside the model: save_pruned(…, tokenizer=…). Received: none in {tried}")
