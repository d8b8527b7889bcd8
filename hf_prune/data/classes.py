"""Labels: the names of classes, and the numbers that a model has for them, in rows with one class or a list of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

from ..errors import PruningError, shown
from ..labels import Classes
from .settings import DataSettings

IGNORED = -100  # the label that losses and metrics skip
Labels = Literal["classes", "list", "free", "none"]  # one class or float, or a list; lists only; whatever it is; none
_SHOWN = 20  # classes that a message names


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
    names = label_names(dataset, label)
    if names:
        return len(names)
    if "float" in _dtype(dataset, label):
        return 1
    return max(2, int(max(occurring(dataset, label), default=0)) + 1)


def numbers_as_names(dataset: Any, label: str = "label") -> list[int]:
    """Return the whole numbers of a label that do not count from 0, as stars from 1 to 5; empty where it has others."""
    if label_names(dataset, label) or "int" not in _dtype(dataset, label):
        return []
    values = sorted(occurring(dataset, label))
    return values if len(values) > 1 and values != list(range(len(values))) else []


def occurring(dataset: Any, label: str) -> set[Any]:
    """Return the labels that rows have, but for those that are ignored.

    Raises:
        PruningError: A list has a gap.
    """
    found = _values(dataset, label)
    if None in found and is_listed(dataset.features[label]):
        raise PruningError(f"data.label: lists of column '{label}' must hold a class at each place. Received: null")
    return found - {IGNORED} if is_listed(dataset.features[label]) else found


def _values(dataset: Any, label: str) -> set[Any]:
    import pyarrow.compute as pc

    if not is_listed(dataset.features[label]):
        return {*dataset.unique(label)}
    lists = dataset.select_columns([label]).with_format("arrow")[:][label]
    return {*pc.list_flatten(lists).unique().to_pylist()}


def _dtype(dataset: Any, label: str) -> str:
    return str(getattr(element(dataset.features[label]), "dtype", ""))


# one sort of labels
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
        return {label: [_set(row) for row in rows]}

    kept = {name: kind for name, kind in dataset.features.items() if name not in columns}
    features = Features({**kept, label: Sequence(ClassLabel(names=columns))})
    return dataset.map(join, batched=True, remove_columns=[one for one in columns if one != label], features=features)


def _set(flags: Iterable[Any]) -> list[int]:
    """Return which of several classes a row has."""
    return [number for number, said in enumerate(flags) if said]


def as_whole_numbers(splits: list[Any], label: str) -> list[Any]:
    """Return splits whose truth values are 0 and 1, as are lists of them the numbers of the classes that a row has.

    Floats stay what they are (regression), but for those that are 0.0 and 1.0 alone.

    Args:
        splits: That of training first; it decides for all.
        label: The column.
    """
    from datasets import Sequence, Value

    whole, train = Value("int64"), splits[0]
    if is_listed(train.features[label]):
        flags = _are_flags(train, label)
        return [_relabelled(one, label, _set, Sequence(whole)) for one in splits] if flags else splits
    kind = _dtype(train, label)
    if "bool" in kind or ("float" in kind and {*train.unique(label)} == {0.0, 1.0}):
        return [one.cast_column(label, whole) if _are_whole(one, label) else one for one in splits]
    return splits


def _are_whole(dataset: Any, label: str) -> bool:
    numbers = label_names(dataset, label) is None and "string" not in _dtype(dataset, label)
    return numbers and all(float(one).is_integer() for one in dataset.unique(label))


def _are_flags(dataset: Any, label: str) -> bool:
    """Whether each row says 0 or 1 for each class, in place of the numbers of those that it has."""
    if label_names(dataset, label) or "string" in _dtype(dataset, label) or not occurring(dataset, label) <= {0, 1}:
        return False
    rows = dataset[label][:]
    twice = "int" not in _dtype(dataset, label) or any(len({*row}) < len(row) for row in rows)
    return twice and len({len(row) for row in rows}) == 1


# numbers for names
def class_names(train: Any, label: str) -> list[str] | None:
    """Return the names of classes: sorted where labels are texts, a data set's own, or ``None`` for numbers."""
    own = label_names(train, label)
    if own is not None or "string" not in _dtype(train, label):
        return own
    values = occurring(train, label)
    if not all(value.strip() for value in values):
        raise PruningError(f"data.label: column '{label}' must name a class in every row. Received: an empty name")
    if all(re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL) for value in values):
        raise PruningError(
            "data.label: lists of classes must be lists, as in a jsonl or parquet file, not their text. "
            f"Received: {shown(min(values))}"
        )
    return sorted({value.strip() for value in values})


def with_classes(dataset: Any, split: str, train: Any, label: str, names: list[str] | None) -> Any:
    """Return the split with the numbers of training's classes, having checked that every row has one.

    Args:
        dataset: The split's rows.
        split: Its name.
        train: Training's rows: what they have is what the others must have.
        label: The column.
        names: Training's classes; ``None``: they are numbers.
    """
    own, text, found = label_names(dataset, label), "string" in _dtype(dataset, label), occurring(dataset, label)
    if text and names is None:
        raise PruningError(f"data.label: split '{split}' must have numbers as training has. Received: {_few(found)}")
    if "int" in _dtype(dataset, label):
        meant = own is None and names is None and min(occurring(train, label), default=0) < 0
        _check_labelled(split, min(found, default=0), meant)
    if names is None or own == names:
        return dataset
    by_number, number = own or names, {name: at for at, name in enumerate(names)}

    def name_of(value: Any) -> Any:
        if isinstance(value, str):
            return value.strip()
        return by_number[value] if value < len(by_number) else value

    _check_known({name_of(one) for one in found}, names, split)
    return _mapped(dataset, label, lambda value: number[name_of(value)], names)


def _check_labelled(split: str, lowest: int, meant: bool) -> None:
    """Refuse a public test set, whose labels are all -1; unless training has numbers below 0, which are classes."""
    if lowest < 0 and not meant:
        raise PruningError(
            f"data.label: split '{split}' has labels below 0: a public test set without labels? Evaluate on another "
            f"split, or hold out a part of training (data.test_size). Received: {lowest}"
        )


def renumbered(
    splits: list[Any], split_names: list[str], label: str, fit: Callable[..., Classes], *, numbered: bool
) -> list[Any]:
    """Return splits with the numbers and the names that a model has for these classes.

    Args:
        splits: That of training first: it alone says which classes there are.
        split_names: For messages.
        label: The column.
        fit: From the data's classes to the model's.
        numbered: Whether the data's numbers mean something.
    """
    train, values = splits[0], numbers_as_names(splits[0], label)
    names = label_names(train, label)
    fitted = fit(values) if values else fit(names or label_count(train, label), numbered=numbered)
    if names is None and not fitted.scores:
        known = values or sorted(occurring(train, label))
        for one, name in zip(splits, split_names, strict=True):
            _check_known(occurring(one, label), known, name)
    if fitted.names is None or fitted.names == names:
        return splits
    number = dict(zip(values or range(len(fitted.numbers)), fitted.numbers))
    return [_mapped(one, label, number.__getitem__, fitted.names) for one in splits]


def _check_known(found: set[Any], known: list[Any], split: str) -> None:
    others = found - {*known}
    if others:
        raise PruningError(
            f"data.label: split '{split}' must have the classes of training: {_few(known)}. "
            f"Received others: {_few(others)}"
        )


def _few(values: Iterable[Any]) -> str:
    told = sorted(values, key=lambda one: (isinstance(one, str), one))
    return ", ".join([*map(str, told[:_SHOWN]), *(["…"] if len(told) > _SHOWN else [])])


def _mapped(dataset: Any, label: str, number: Callable[[Any], int], names: list[str]) -> Any:
    """Return rows with another number for each label, and with the names of classes."""
    from datasets import ClassLabel, Sequence, Value

    if not is_listed(dataset.features[label]):
        return _relabelled(dataset, label, number, ClassLabel(names=names))
    kind = (
        Value("int64") if IGNORED in _values(dataset, label) else ClassLabel(names=names)
    )  # which would refuse such a number

    def change(row: list[Any]) -> list[int]:
        return [one if one == IGNORED else number(one) for one in row]

    return _relabelled(dataset, label, change, Sequence(kind))


def _relabelled(dataset: Any, label: str, change: Callable[[Any], Any], kind: Any) -> Any:
    """Return rows with other labels; other columns, which may be images, are not read."""
    from datasets import Features, concatenate_datasets

    def each(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {label: [change(one) for one in batch[label]]}

    changed = dataset.select_columns([label]).map(each, batched=True, features=Features({label: kind}))
    return concatenate_datasets([dataset.remove_columns([label]), changed], axis=1)
