"""Classes by name: what a data set calls them, and the numbers that a fine-tuned model gave them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import PruningError

logger = logging.getLogger(__name__)
_NO_NAME = re.compile(r"LABEL_\d+")  # what transformers calls a class that nobody named


class Classes(NamedTuple):
    """How a model numbers the classes of a data set.

    Args:
        names: By the model's number; ``None`` where nobody named them.
        numbers: From the data's number to the model's.
        options: For ``from_pretrained``: empty where the model's own head stays as it is.
        scores: Whether the model has one output for all: its numbers are scores (regression), not classes.
    """

    names: list[str] | None
    numbers: list[int]
    options: dict[str, Any]
    scores: bool = False


def fit_classes(
    config: Any,
    classes: Sequence[str] | Sequence[int] | int,
    *,
    head: str,
    retrain: bool = False,
    numbered: bool = True,
) -> Classes:
    """Map the classes of a data set to those that a fine-tuned model has learned, by name.

    Args:
        config: The model's; ``None``, or one whose ``architectures`` have another head: the head will be new, and the
            data's numbers count.
        classes: The data's names by number; or how many numbers without names there are, 1 for regression; or these
            numbers, where they do not count from 0 (stars from 1 to 5; -1 and 1): then they are names.
        head: How the model's class ends, such as ``"ForSequenceClassification"``.
        retrain: Whether a head that does not fit may be replaced by a new one, as it is trained now.
        numbered: Whether the data's numbers mean something; false: they are the order of the alphabet.

    Returns:
        Names, numbers, and options for ``from_pretrained``. The first number is that of the first of `classes`.

    Raises:
        PruningError: The model has learned other classes: names those of the data and of the model.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig(id2label={0: "bad", 1: "good"}, architectures=["BertForSequenceClassification"])
        >>> fit_classes(config, ["GOOD", "BAD"], head="ForSequenceClassification").numbers
        [1, 0]
    """
    values, named = _values_and_names(classes)
    if not any(str(name).endswith(head) for name in getattr(config, "architectures", None) or ()):
        return _as_the_data(named)
    own = _own_names(config)
    fitted = _by_value(own, values) or _by_name(own, named) or _by_number(own, named, numbered)
    if fitted is not None:
        return fitted
    if not retrain:
        raise PruningError(_misfit(own, named, numbered))
    logger.warning(f"{_misfit(own, named, numbered)} The model is trained first, so it gets the data's classes.")
    fresh = _as_the_data(named)
    return fresh._replace(options={**fresh.options, "ignore_mismatched_sizes": True})


def _values_and_names(classes: Sequence[str] | Sequence[int] | int) -> tuple[list[int], Sequence[str] | int]:
    """Return the numbers that are names, if they are, and the names, or how many there are without any."""
    if isinstance(classes, int):
        return [], classes
    return [one for one in classes if isinstance(one, int)], [str(one) for one in classes]


def _as_the_data(classes: Sequence[str] | int) -> Classes:
    count = classes if isinstance(classes, int) else len(classes)
    if isinstance(classes, int):
        return Classes(None, list(range(count)), {"num_labels": count}, scores=count == 1)
    return Classes(list(classes), list(range(count)), {"num_labels": count, **_named(classes)})


def _named(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _own_names(config: Any) -> list[str]:
    """Return the model's names by number; of two mappings the one that was filled in.

    Raises:
        PruningError: Both were, and contradict each other.
    """
    by_number = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    by_name = {int(number): str(name) for name, number in (config.label2id or {}).items()}
    told = [one for one in (by_number, by_name) if one and not _are_nameless(list(one.values()))]
    if len(told) == 2 and told[0] != told[1]:
        raise PruningError(
            "The model's config must say once which class is which. Received: "
            f"id2label={dict(sorted(by_number.items()))}, label2id={config.label2id}"
        )
    names = told[0] if told else by_number
    return [names.get(number, f"LABEL_{number}") for number in range(config.num_labels)]


def _are_nameless(names: Sequence[str]) -> bool:
    return all(_NO_NAME.fullmatch(name) for name in names)


def _by_value(own: list[str], values: Sequence[int]) -> Classes | None:
    """Map by the number that a name begins with, as ``1 star``; else leave numbers that the model has outputs for."""
    if not values:
        return None
    leading = [match[0] if (match := re.match(r"-?\d+\b", name)) else name for name in own]
    fitted = _by_name(leading, [str(value) for value in values])
    if fitted is not None:
        return fitted._replace(names=own)
    scores = len(own) == 1
    fits = scores or (min(values) >= 0 and max(values) < len(own))
    return Classes(None, list(values), {}, scores) if fits else None


def _by_name(own: list[str], classes: Sequence[str] | int) -> Classes | None:
    """Map by name; by name whatever the case where that says one class each."""
    if isinstance(classes, int):
        return None
    for plain in (str, str.casefold):
        known, wanted = [plain(name) for name in own], [plain(name) for name in classes]
        if len({*known}) == len(known) and len({*wanted}) == len(wanted) and {*wanted} <= {*known}:
            return Classes(own, [known.index(name) for name in wanted], {})
    return None


def _by_number(own: list[str], classes: Sequence[str] | int, numbered: bool) -> Classes | None:
    """Take the data's numbers as they are, where only one side has names and no more classes than the model."""
    if isinstance(classes, int):
        regression = len(own) == 1
        fits = regression or 1 < classes <= len(own)
        names = None if _are_nameless(own) else own
        return Classes(names, list(range(classes)), {}, regression) if fits else None
    if not numbered or not _are_nameless(own) or len(classes) != len(own):
        return None
    return Classes(list(classes), list(range(len(own))), _named(classes))


def _misfit(own: list[str], classes: Sequence[str] | int, numbered: bool) -> str:
    if isinstance(classes, int):
        what = "numbers for regression" if classes == 1 else f"{classes} classes without names"
    else:
        what = f"the classes {list(classes)}"
    told = "has not named its classes" if _are_nameless(own) else "has learned others"
    mend = "write the names into the model's id2label and label2id, in the order that it was trained with"
    if isinstance(classes, int) or numbered:
        mend = "take the data that the model was trained on, or train the model on these first (in a recipe: dense)"
    return f"The data has {what}, and the model {told}: {mend}. Received, of the model: {own}."
