"""Which files of a folder are a model's, and so go up: known names only; whatever else lies there stays at home."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..card import CARD, PLOT, RECIPE, REPORT
from ..checkpoint import own_code
from ..errors import CheckpointError, PruningError, RecipeError
from ..files import is_inside, read_json
from ..recipe import Recipe
from ..secrets import without_secrets, without_tokens
from ..settings import read_yaml

# what transformers writes, with variants (`model.fp16.safetensors`)
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.\w+)?\.json")
_CONFIGS = ("config.json", "generation_config.json")
_PROCESSORS = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.json", "chat_template.jinja"),
)
# every tokenizer's `vocab_files_names` in transformers 4 and 5, and the common files; no pickles
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json"),
    *("merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "tekken.json"),
    *("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model"),
    *("source.spm", "target.spm", "tokenizer.model", "tiktoken.model", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json"),
)
_SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "config_setfit.json")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_TOLD = (CARD, REPORT, RECIPE, PLOT, *(f"{name}{end}" for name in _TERMS for end in ("", ".txt", ".md", ".rst")))
_ONNX = ("*.onnx", "*.onnx_data", "*.onnx.data", "ort_config.json")
_PARTS = re.compile(
    r"\d+_[A-Z]\w*|qformer_tokenizer"
)  # modules of sentence-transformers, InstructBLIP's second tokenizer
_INSIDE = {
    "": (*_CONFIGS, *_PROCESSORS, *_TOKENIZERS, *_SENTENCES, *_TOLD, *_ONNX),
    "onnx": (*_CONFIGS, *_PROCESSORS, *_TOKENIZERS, *_ONNX, "export.json"),  # which transformers 5 writes
    "additional_chat_templates": ("*.jinja",),
    "PART": (*_CONFIGS, *_PROCESSORS, *_TOKENIZERS, "sentence_*_config.json"),
}
_NEEDED = (*_CONFIGS[:1], "tokenizer_config.json")  # without which what goes up would be another model
_TEXT = (".json", ".txt", ".md", ".rst", ".yaml", ".py", ".jinja", ".codes", "")


class Chosen(NamedTuple):
    """What of a folder goes up, and what stays with the reason."""

    files: dict[str, Path]
    left: dict[str, str]


def choose(folder: Path, prefix: str = "") -> Chosen:
    """Choose the files of a model's folder that are published.

    Args:
        folder: The model's folder; for a folder of ONNX files give its prefix too.
        prefix: ``""``, or the place in the repository of a folder of ONNX files: ``"onnx/"``.

    Returns:
        Name in the repository -> file; and name -> why it stays.

    Raises:
        CheckpointError: A file that the model cannot do without is a link out of the folder.
        PruningError: There is no such folder.
    """
    if not folder.is_dir():
        raise PruningError(f"The files to push must lie in a folder. Received: {folder}.")
    files: dict[str, Path] = {}
    left: dict[str, str] = {}
    code = set() if prefix else _code(folder)
    for path, within in _candidates(folder, prefix):
        name = prefix + path.relative_to(folder).as_posix()
        if not _allowed(path.name, within) and not (not within and path.name in code):
            left[name + "/" * path.is_dir()] = "not a model's file"
        elif not is_inside(folder, path):
            left[name] = "a link that leads out of the folder" if path.is_symlink() else "not a file"
        elif not _allowed(path.resolve().name, within) and path.is_symlink() and not _in_cache(path):
            left[name] = "a link to a file that is not a model's"
        elif _WEIGHTS.fullmatch(path.name) and path.suffix == ".safetensors" and not _is_safetensors(path):
            left[name] = "not a safetensors file"
        elif path.name == RECIPE and not _is_recipe(path):
            left[name] = "not a recipe, or one with a secret"
        else:
            files[name] = path
    gone = [name for name in left if Path(name).name in _NEEDED or _WEIGHTS.fullmatch(name)]
    if gone:
        raise CheckpointError(
            f"What a model needs must lie in its own folder, for what is published must be all of it. "
            f"Received: {gone[0]}, {left[gone[0]]}"
        )
    return Chosen(files, left)


def refuse_tokens(files: dict[str, Path]) -> None:
    """Refuse to publish a text that holds an access token.

    Raises:
        PruningError: One does; the token is not repeated.
    """
    for name, path in sorted(files.items()):
        texts = _readings(path.read_bytes()) if path.suffix in _TEXT and path.stat().st_size < 2**28 else ()
        if any(without_tokens(text) != text for text in texts):
            raise PruningError(
                f"A file to push must hold no access token: remove it there first. Received: {name} with one"
            )


def _readings(data: bytes) -> Iterator[str]:
    """Yield what a file says to those who read it: its characters may be written in several ways."""
    text = data.decode("utf-8", errors="replace")
    yield text
    if "\\u" in text:
        yield re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    if b"\0" in data:
        yield data.replace(b"\0", b"").decode("utf-8", errors="replace")  # of two or four bytes each


def without_foreign_code(folder: Path, name: str) -> dict[str, Any] | None:
    """Return a JSON file of a folder without ``auto_map`` entries to others' code; ``None``: it has no such entry."""
    told = read_json(folder / name)
    own = own_code(told, folder)
    return None if own == told else own


def _candidates(folder: Path, prefix: str) -> Iterator[tuple[Path, str]]:
    """Yield the entries of a folder, and of those of its folders that a model may have, with the rule for each."""
    for path in sorted(folder.iterdir()):
        known = "PART" if _PARTS.fullmatch(path.name) else path.name
        if path.is_dir() and not path.is_symlink() and known in _INSIDE and not prefix:
            yield from ((inner, known) for inner in sorted(path.iterdir()))
        else:
            yield path, prefix.rstrip("/")


def _allowed(name: str, within: str) -> bool:
    if within in ("", "PART") and _WEIGHTS.fullmatch(name):
        return True
    return any(fnmatchcase(name, pattern) for pattern in _INSIDE.get(within, ()))


def _code(folder: Path) -> set[str]:
    """Return the Python files that the model's own configs name, and those that these import from beside them."""
    found: set[str] = set()
    new = {file for name in (*_CONFIGS, *_PROCESSORS, *_TOKENIZERS[:2]) for file in _named_code(folder, name)}
    while new:
        found |= new
        new = {file for name in new for file in _imported(folder / name)} - found
    return found


def _named_code(folder: Path, name: str) -> Iterator[str]:
    if not name.endswith(("_config.json", "config.json")) or not is_inside(folder, folder / name):
        return
    stated = own_code(read_json(folder / name), folder).get("auto_map", {})
    for value in stated.values():
        for one in value if isinstance(value, list) else [value]:
            if one:
                yield f"{one.split('.')[0]}.py"


def _imported(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text("utf-8")) if is_inside(path.parent, path) else ast.Module([], [])
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [one.name for one in node.names]:
                if (path.parent / f"{name}.py").is_file():
                    yield f"{name}.py"


def _in_cache(path: Path) -> bool:
    """Whether a link leads into the Hub's cache, where files are named by their content."""
    return path.resolve().parent.name == "blobs"


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = str(file.metadata() or {})
            return without_tokens(told) == told
    except (OSError, SafetensorError):
        return False


def _is_recipe(path: Path) -> bool:
    """Whether a file is a recipe as a run writes it; it may be anything that somebody named so."""
    try:
        text = path.read_text("utf-8")
        told = read_yaml(text, RECIPE)
    except (OSError, UnicodeDecodeError, RecipeError):
        return False
    keys = set(told) if isinstance(told, dict) else set()
    return {"name"} <= keys <= set(Recipe.model_fields) and without_secrets(text) == text
