"""Labels: the names of classes, and the numbers that a model has for them, in rows with one class or a list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ..errors import PruningError
from ..labels import Classes
from .settings import DataSettings

Labels = Literal["classes", "list", "free", "none"]  # one class or float, or a list; lists only; whatever it is; none


def element(feature: Any) -> Any:
    """Return the type of a label, or of each where a row has a list of them."""
    return getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)


def is_listed(feature: Any) -> bool:
    """Whether a row has a list of labels, not one."""
    return hasattr(feature, "feature") or isinstance(feature, list)


def label_names(dataset: Any, label: str = "label") -> list[str] | None:
    """Return the names of the classes, or ``None`` where the label is a bare number."""
    return getattr(element(dataset.features[label]), "names", None)


def label_count(dataset: Any, label: str = "label") -> int:
    """Return how many outputs a model needs for this label column: the classes, or 1 for a float (regression)."""
    feature = element(dataset.features[label])
    if getattr(feature, "names", None):
        return len(feature.names)
    if "float" in feature.dtype:
        return 1
    values = dataset[label][:]
    flat = values if not is_listed(dataset.features[label]) else [one for row in values for one in row]
    return max(2, int(np.max(flat, initial=0)) + 1)


def joined(dataset: Any, settings: DataSettings) -> Any:
    """Return the rows with several columns of 0 and 1 as one list of classes, which are named like the columns."""
    from datasets import ClassLabel, Features, Sequence

    columns, label = settings.label_columns, settings.label_column
    if isinstance(settings.label, str):
        return dataset
    for column in columns:
        values = set(dataset.unique(column))
        if not values <= {0, 1}:
            raise PruningError(
                f"data.label: column '{column}' of several must hold 0 and 1. Received: {sorted(values)}"
            )

    def join(batch: dict[str, list[Any]]) -> dict[str, Any]:
        rows = zip(*(batch[column] for column in columns))
        return {label: [[number for number, said in enumerate(row) if said] for row in rows]}

    kept = {name: kind for name, kind in dataset.features.items() if name not in columns}
    features = Features({**kept, label: Sequence(ClassLabel(names=columns))})
    return dataset.map(join, batched=True, remove_columns=[one for one in columns if one != label], features=features)


def class_names(train: Any, label: str) -> list[str] | None:
    """Return the sorted names where labels are strings, else ``None``."""
    feature = train.features[label]
    if "string" not in getattr(element(feature), "dtype", ""):
        return None
    if not is_listed(feature):
        return sorted(train.unique(label))
    return sorted({name for row in train[label][:] for name in row})


def with_classes(dataset: Any, split: str, label: str, names: list[str] | None) -> Any:
    """Return the split with numbers for string labels, having checked that every row has a class."""
    feature = dataset.features[label]
    if names is not None:
        unknown = set(class_names(dataset, label) or ()) - set(names)
        if unknown:
            raise PruningError(
                f"data.label: split '{split}' must have the classes of training: {', '.join(names)}. "
                f"Received others: {', '.join(sorted(unknown))}"
            )
        number = {name: at for at, name in enumerate(names)}
        return _mapped(dataset, label, number.__getitem__, names)
    if not is_listed(feature) and "int" in feature.dtype and min(dataset.unique(label), default=0) < 0:
        raise PruningError(
            f"data.label: split '{split}' has labels below 0: a public test set without labels? "
            f"Received: {min(dataset.unique(label))}"
        )
    return dataset


def numbers_as_names(dataset: Any, label: str = "label") -> list[int]:
    """Return the whole numbers of a label that do not begin at 0, as stars from 1 to 5; empty where it has others."""
    feature = dataset.features[label]
    if is_listed(feature) or getattr(feature, "names", None) or "int" not in feature.dtype:
        return []
    values = sorted(dataset.unique(label))
    return values if len(values) > 1 and values[0] > 0 else []


def renumbered(splits: list[Any], label: str, fit: Callable[..., Classes], *, numbered: bool) -> list[Any]:
    """Return splits with the numbers and the names that a model has for these classes."""
    values = numbers_as_names(splits[0], label)
    if values and all(min(one.unique(label), default=1) > 0 for one in splits):
        return _named_by_number(splits, label, values, fit(values))
    fitted = fit(label_names(splits[0], label) or max(label_count(one, label) for one in splits), numbered=numbered)
    if fitted.names is None or fitted.names == label_names(splits[0], label):
        return splits
    return [_mapped(one, label, fitted.numbers.__getitem__, fitted.names) for one in splits]


def _named_by_number(splits: list[Any], label: str, values: list[int], fitted: Classes) -> list[Any]:
    """Return splits in which numbers are names of classes, where the model does not take them as they are."""
    if fitted.names is None:
        return splits
    unknown = {value for one in splits for value in one.unique(label)} - set(values)
    if unknown:
        raise PruningError(
            f"data.label: all splits must have the classes of training: {', '.join(map(str, values))}. "
            f"Received others: {', '.join(map(str, sorted(unknown)))}"
        )
    number = dict(zip(values, fitted.numbers))
    return [_mapped(one, label, number.__getitem__, fitted.names) for one in splits]


def _mapped(dataset: Any, label: str, number: Callable[[Any], int], names: list[str]) -> Any:
    """Return rows with another number for each label; other columns, which may be images, are not read."""
    from datasets import ClassLabel, Features, Sequence, concatenate_datasets

    several = is_listed(dataset.features[label])
    kind = Sequence(ClassLabel(names=names)) if several else ClassLabel(names=names)

    def change(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {label: [[number(one) for one in row] if several else number(row) for row in batch[label]]}

    changed = dataset.select_columns([label]).map(change, batched=True, features=Features({label: kind}))
    return concatenate_datasets([dataset.remove_columns([label]), changed], axis=1)
