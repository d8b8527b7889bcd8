"""Images and sounds that cannot be read, and tokens that a model has not: found before training, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PruningError

_CURE = "take such files out of the folder, or copy them again"


def check_each(values: Iterable[Mapping[str, Any]], key: str, read: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
    """Read each file once: training would find a damaged one after hours, and not say which.

    Args:
        values: ``path`` and ``bytes`` of each.
        key: Of the data's settings.
        read: What raises a `PruningError` where a file cannot be read.

    Returns:
        What was read of each.

    Raises:
        PruningError: Files are empty or damaged; says how many, and what is wrong with the first.
    """
    found, wrong = [], []
    for value in values:
        path = Path(value.get("path") or "")
        try:
            if value.get("bytes") is None and path.is_file() and not path.stat().st_size:
                raise PruningError(f"the file is empty: {_CURE}. Received: '{path}'")
            found.append(read(value))
        except PruningError as error:
            wrong.append(str(error).removeprefix(f"{key}: "))
    if wrong:
        others = f", and {len(wrong) - 1} other files" if len(wrong) > 1 else ""
        raise PruningError(f"{key}: {wrong[0]}{others}")
    return found


def check_images(dataset: Any, column: str) -> None:
    """Read each image that is a file of its own once, as small as its type lets us.

    Args:
        dataset: Rows with images; those that a data set holds itself have come whole.
        column: Of them.

    Raises:
        PruningError: Files are empty or damaged.
    """
    from datasets import Image

    undecoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    check_each((row[column] for row in undecoded if row[column]["bytes"] is None), "data.image", _open_image)


def _open_image(value: Mapping[str, Any]) -> None:
    from PIL import Image, UnidentifiedImageError

    path = value["path"]
    try:
        with Image.open(path) as image:
            image.draft("L", (8, 8))  # a JPEG is decoded to an eighth, which still needs all of its bytes
            image.load()
    except UnidentifiedImageError:
        raise PruningError(f"a file is no image, or damaged: {_CURE}. Received: '{path}'") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's readers raise
        raise PruningError(f"an image cannot be read ({error}): {_CURE}. Received: '{path}'") from None


def check_tokens(model: Any, splits: Sequence[Any]) -> None:
    """Refuse tokens that a model has no row for, which would end its training in a library's words.

    Args:
        model: The model.
        splits: Its rows; those without tokens are not looked at.
    """
    import pyarrow.compute as pc

    for split in splits:
        if "input_ids" not in split.column_names:
            continue
        largest = pc.max(pc.list_flatten(split.with_format("arrow")[:]["input_ids"], recursive=True)).as_py()
        known = len(model.get_input_embeddings().weight)
        if largest is not None and largest >= known:
            raise PruningError(
                f"model.name: the tokenizer must make tokens of the model's, from 0 to {known - 1}; where it has "
                f"learned others, model.resize_token_embeddings(len(tokenizer)) comes before. Received: token {largest}"
            )
