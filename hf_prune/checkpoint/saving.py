"""Saving pruned models as plain folders that anyone can load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..adapters import adapted
from ..architectures import find_groups
from ..errors import PruningError, shown
from ..folders import whole_folder
from ..given import check_given, check_model
from ..parts import of_sentence_transformers
from ..plan import BLOCK, Record, pruned_parts, read_record
from ..sharding import check_whole
from ..skipping import is_only_masked
from ..stock import write_record
from ..stock.padding import pad_to_stock
from .classes import register_code
from .reading import CONFIG, write_digests
from .standalone import FILE, drop_strange_code, forget_standalone, state_standalone
from .telling import CARD

ADAPTER = "adapter_config.json"  # of PEFT; from_pretrained loads what it names
# what an older save wrote and this one may not: a single file beside shards would be loaded instead of them
_STALE = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json", FILE),
)


def save_pruned(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    stock: Literal["auto", "never", "require"] = "auto",
    digest: bool = False,
    standalone: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model as a plain folder: safetensors, and config.json with the plan.

    ``model.save_pretrained(path)`` writes the same folder; this adds the tokenizer, the choice of `stock`, and that a
    folder is written whole or not at all: a process that is killed, or a disk that is full, leaves the one that was
    there as it was. Its other files stay, and an older save's weights leave.

    Args:
        model: A transformers model, pruned or not; or a SentenceTransformer, CrossEncoder or SparseEncoder, which its
            own class loads.
        path: The folder; it is made where it does not exist.
        tokenizer: A tokenizer, processor or image processor to save beside it.
        stock: ``"auto"`` writes a config that stock transformers can build wherever one can say the small shape
            (uniform feed-forward widths; uniform KV groups); ``"never"`` always states the dense shape and the plan;
            ``"require"`` adds units of zeros (in the folder; the model stays as it is) until one can, or raises.
        digest: Write the SHA-256 of each tensor into config.json; loading then checks them.
        standalone: Where stock transformers could not load the folder, write a short Python file into it with which
            ``trust_remote_code=True`` can, in an environment without hf_prune.
        max_shard_size: Largest file, as in `save_pretrained`.

    Returns:
        The folder.

    Raises:
        PruningError: `stock` is unknown, or required and not possible; layers or experts are masked and not removed
            yet; or the folder cannot be written.
    """
    check_model(model)
    _check_place(path)
    if stock not in ("auto", "never", "require"):
        raise PruningError(f"stock must be 'auto', 'never' or 'require'. Received: {stock!r}")
    if of_sentence_transformers(model):
        return _save_sentence_transformers(model, path, stock, standalone=standalone, digest=digest)
    _check_masks(model)
    register_code(model)
    record = read_record(model)
    _check_parts(model, record)
    write_record(model, record, stock=stock != "never")
    fits = not record or getattr(model.config, BLOCK)["stock"]
    written = pad_to_stock(model) if stock == "require" and not fits else model
    try:
        code = state_standalone(written) if standalone else ""
        with _or_as_it_was(path), whole_folder(path, stale=_STALE) as folder:
            written.save_pretrained(folder, max_shard_size=max_shard_size)
            (folder / CARD).unlink(missing_ok=True)  # the folder may have a card already, and `write_card` writes one
            _add_files(folder, written, code, tokenizer, digest)
    finally:
        if standalone:
            forget_standalone(model)
        write_record(model, record)
    return Path(path)


def _check_place(path: Any) -> None:
    """Refuse a path that no system can take, and a folder whose adapters would be put on top of what is saved.

    Raises:
        PruningError: It is such a one.
    """
    check_given("path", path, (str, Path), "a folder")
    try:
        adapter = (Path(path).resolve() / ADAPTER).is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero in it, links in a circle
        raise PruningError(
            f"path must be a folder that can be written. Received: {shown(str(path))} ({error})"
        ) from None
    if not str(path):
        raise PruningError("path must be a folder: '.' is the one that you are in. Received: ''")
    if adapter:
        raise PruningError(
            f"path must not hold adapters: from_pretrained would put those of {ADAPTER} on top of what is saved. Take "
            f"another folder. Received: {shown(str(path))}"
        )


def _add_files(folder: Path, model: Any, code: str, tokenizer: Any, digest: bool) -> None:
    if code:
        (folder / FILE).write_text(code, "utf-8")
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    drop_strange_code(folder, model)
    if digest:  # of all that was written
        write_digests(folder)


def _save_sentence_transformers(model: Any, path: str | Path, stock: str, *, standalone: bool, digest: bool) -> Path:
    """Write a folder that SentenceTransformer, CrossEncoder or SparseEncoder loads; tokenizer and card come with it."""
    if stock == "require" or standalone or digest:
        raise PruningError(
            f"stock='require', standalone and digest are for models of transformers. Received: {type(model).__name__}"
        )
    _check_masks(model)
    record = read_record(model)
    write_record(model, record, stock=stock != "never")
    try:
        with _or_as_it_was(path), whole_folder(path, stale=_STALE) as folder:
            model.save_pretrained(str(folder))
    finally:
        write_record(model, record)
    return Path(path)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer or processor; transformers 4 does not know the name that 5 gives its general tokenizer."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        text = config.read_text("utf-8")
        config.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), "utf-8")


def _check_masks(model: Any) -> None:
    """Refuse a model of which a part is skipped by a mask that no file can hold: loaded again, it would run."""
    check_whole(model)
    masked = [name for name, module in model.named_modules() if is_only_masked(module)]
    if masked:
        raise PruningError(
            "Masked layers and experts can be saved once they are removed: call hf_prune.shrink(model), or finish() of "
            f"the Pruning session, first. Received, masked: {', '.join(masked[:4])}"
        )
    if adapted(model):
        raise PruningError(
            "A model with adapters is saved in two parts, or whole once they are merged: call "
            f"hf_prune.merge_adapters(model) and save what it returns. Received: {type(model).__name__}"
        )
    torch_masked = [name for name, _ in model.named_buffers() if name.endswith("_mask") and _is_torchs(model, name)]
    if torch_masked:
        raise PruningError(
            "Masks of torch.nn.utils.prune rename weights: call hf_prune.adopt_torch_masks(model) first. "
            f"Received: {', '.join(torch_masked[:4])}"
        )


def _check_parts(model: Any, record: Record) -> None:
    """Refuse a composite whose pruned parts lost what no group of the whole is called like: it would not load."""
    unknown = record.keys() - {group.name for group in find_groups(model)} if [*pruned_parts(model)] else set()
    if unknown:
        raise PruningError(
            f"What parts of a composite lost before must have a name in the whole: save the parts of this "
            f"{type(model).__name__} one by one, and compose them again. Received: {sorted(unknown)[:4]}"
        )


def _is_torchs(model: Any, mask: str) -> bool:
    path, _, name = mask.removesuffix("_mask").rpartition(".")
    return f"{name}_orig" in dict(model.get_submodule(path).named_parameters(recurse=False))


@contextmanager
def _or_as_it_was(path: str | Path) -> Iterator[None]:
    """Say of a write that failed what is left there; writers in Rust raise types of their own."""
    config = Path(path) / CONFIG
    was_there = config.is_file()
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        left = "what was there before is untouched" if config.is_file() == was_there else "it is incomplete now"
        raise PruningError(
            f"The folder '{path}' could not be written; {left}. Received: {type(error).__name__}: {error}"
        ) from error
