"""Saving pruned models as plain folders that anyone can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..errors import PruningError
from ..plan import BLOCK, read_record
from ..stock import write_record
from .reading import write_digests


def save_pruned(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    stock: Literal["auto", "never", "require"] = "auto",
    digest: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model as a plain folder: safetensors, and config.json with the plan.

    ``model.save_pretrained(path)`` writes the same folder; this adds the tokenizer and the choice of `stock`.

    Args:
        model: A transformers model, pruned or not.
        path: The folder; it is made where it does not exist.
        tokenizer: A tokenizer, processor or image processor to save beside it.
        stock: ``"auto"`` writes a config that stock transformers can build wherever one can say the small shape
            (uniform feed-forward widths; uniform KV groups); ``"never"`` always states the dense shape and the plan;
            ``"require"`` raises where no stock config can say it.
        digest: Write the SHA-256 of each tensor into config.json; loading then checks them.
        max_shard_size: Largest file, as in `save_pretrained`.

    Returns:
        The folder.

    Raises:
        PruningError: `stock` is unknown, or required and not possible.
    """
    if stock not in ("auto", "never", "require"):
        raise PruningError(f"stock must be 'auto', 'never' or 'require'. Received: {stock!r}")
    record = read_record(model)
    write_record(model, record, stock=stock != "never")
    if stock == "require" and record and not getattr(model.config, BLOCK)["stock"]:
        uneven = ", ".join(list(record)[:4])
        raise PruningError(
            f"No stock {type(model.config).__name__} can say this shape, because units are removed unevenly or config "
            f"has no number for them. Received: cuts in {uneven}"
        )
    try:
        model.save_pretrained(path, max_shard_size=max_shard_size)
    finally:
        write_record(model, record)
    if digest:
        write_digests(Path(path))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return Path(path)
