"""Damaged folders, drawn at random: what one mutation makes of a sound one, and what loading must then do."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from models import BUILD, PLANS, draw_batch, logits_of
from torch import Tensor

from hf_prune import CheckpointError, load_pruned, save_pruned, shrink

WHOLE = {f"layers.{i}.mlp.neurons": range(8) for i in range(2)}
BASES = {  # name -> model, plan, arguments of save_pruned
    "uneven": ("bert", PLANS["bert"], {}),
    "sharded": ("llama", PLANS["llama"], {"max_shard_size": "5KB"}),
    "stock": ("bert", WHOLE, {"stock": "require"}),
    "branch": ("vit", {"layers.0.attention.branch": [], "layers.1.mlp.neurons": [1, 5]}, {}),
    "digests": ("bert", PLANS["bert"], {"digest": True}),
}
SHAPES = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
    "type_vocab_size",
    "image_size",
    "patch_size",
    "num_channels",
]
ODD = ["", "0 of 0", "0-23 of 24", " of 4", "0-9999999 of 9999999", "../../x", "stock", "kept", "format", "F16", "I32"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(ODD),
    st.lists(st.integers(-3, 40), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(-3, 40), max_size=2),
)


@dataclass(frozen=True, repr=False)
class Sound:
    """A folder that loads: its files, and what its model computes."""

    files: dict[str, bytes]
    batch: dict[str, Tensor]
    logits: Tensor

    def __repr__(self) -> str:
        return f"<{len(self.files)} files>"


def sound_folders(scratch: Path) -> dict[str, Sound]:
    """Write every base folder once, and return it as bytes."""
    found = {}
    for name, (kind, plan, settings) in BASES.items():
        model = shrink(BUILD[kind](), plan)
        folder = save_pruned(model, scratch / name, **settings)
        batch = draw_batch(model)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        found[name] = Sound(files, batch, logits_of(model, batch))
    return found


@dataclass(frozen=True, repr=False)
class Damage:
    """A damaged folder: of which sound one it was made, and by what."""

    name: str
    steps: tuple[str, ...]
    files: dict[str, bytes]

    def __repr__(self) -> str:
        config = self.files.get("config.json", b"")
        at = max(config.find(b'"pruning_config"'), 0)
        sizes = {name: len(data) for name, data in self.files.items()}
        return f"{self.name} {' '.join(self.steps)} {sizes} {config[at : at + 300]!r}"


@st.composite
def damaged(draw: Any, folders: dict[str, Sound]) -> Damage:
    """Draw a folder with one to three things changed."""
    name = draw(st.sampled_from(sorted(folders)))
    files, steps = dict(folders[name].files), []
    for _ in range(draw(st.integers(1, 3))):
        if not files:  # all removed
            break
        mutate = draw(st.sampled_from([_block, _block, _texts, _shapes, _header, _header, _bytes, _index, _files]))
        files = mutate(draw, files, name)
        steps.append(mutate.__name__)
    return Damage(name, tuple(steps), files)


def load(sound: Sound, damage: Damage, folder: Path) -> str:
    """Load a folder; return ``"refused"`` or ``"equal"``.

    Raises:
        AssertionError: It loads, and computes something else.
        Exception: Anything else than a `CheckpointError`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in damage.files.items():
        (folder / name).write_bytes(data)
    try:
        model = load_pruned(folder, dtype=torch.float32)
    except CheckpointError:
        return "refused"
    torch.testing.assert_close(logits_of(model, sound.batch), sound.logits, rtol=0, atol=0)
    return "equal"


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a container and a key for everything inside a JSON value."""
    for key in [*value] if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _nodes(value[key])


def _change_node(draw: Any, value: Any) -> Any:
    """Replace, remove, rename or add something in a JSON value."""
    nodes = list(_nodes(value)) if isinstance(value, (dict, list)) else []
    if not nodes or draw(st.integers(0, 20)) == 0:
        return draw(LEAVES)
    holder, key = draw(st.sampled_from(nodes))
    what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "copy"]))
    if what == "replace":
        holder[key] = draw(LEAVES)
    elif what == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        other = draw(st.one_of(st.text(max_size=8), st.sampled_from([str(one) for _, one in nodes])))
        holder[other] = holder[key] if what == "copy" else holder.pop(key)
    return value


def _config(files: dict[str, bytes]) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(files.get("config.json", b""))
    return None


def _block(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    config = _config(files)
    if not isinstance(config, dict) or "pruning_config" not in config:
        return files
    block = config["pruning_config"]
    return {**files, "config.json": json.dumps({**config, "pruning_config": _change_node(draw, block)}).encode()}


def _texts(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Change a few characters of one group's text."""
    config = _config(files)
    kept = (config or {}).get("pruning_config") if isinstance(config, dict) else None
    kept = kept.get("kept") if isinstance(kept, dict) else None
    texts = [key for key, text in kept.items() if isinstance(text, str)] if isinstance(kept, dict) else []
    if not texts:
        return files
    key = draw(st.sampled_from(texts))
    text = list(kept[key])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from([*"0123456789,- of", "", "99999", "-1"]))
    kept[key] = "".join(text)
    return {**files, "config.json": json.dumps(config).encode()}


def _shapes(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """State another shape in the config itself."""
    config = _config(files)
    shapes = [*SHAPES, "num_attention_heads"] if name == "digests" else SHAPES  # no shape speaks of heads
    keys = [key for key in shapes if isinstance(config, dict) and key in config]
    if not keys:
        return files
    key = draw(st.sampled_from(keys))
    absurd = st.sampled_from([10**5, 10**9, None, "4", 4.0, [4]])
    config[key] = draw(absurd if key == "image_size" else st.one_of(st.integers(-2, 70), absurd))  # 17 is 16 in patches
    return {**files, "config.json": json.dumps(config).encode()}


def _weights(draw: Any, files: dict[str, bytes]) -> str | None:
    names = [name for name in files if name.endswith(".safetensors") and len(files[name]) > 8]
    return draw(st.sampled_from(names)) if names else None


def _header(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Change the JSON header of a weight file, and its length along or not."""
    file = _weights(draw, files)
    if file is None:
        return files
    data = files[file]
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return files
    text = json.dumps(_change_node(draw, header)).encode()
    told = len(text) if draw(st.integers(0, 4)) else draw(st.integers(0, 2**64 - 1))
    return {**files, file: told.to_bytes(8, "little") + text + data[8 + size :]}


def _bytes(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Cut a file short, lengthen it, or change bytes of it; weights themselves only where digests guard them."""
    file = draw(st.sampled_from(sorted(files)))
    data = bytearray(files[file])
    weights = file.endswith(".safetensors") and name != "digests"
    header = 8 + int.from_bytes(data[:8], "little") if weights and len(data) > 8 else len(data)
    what = draw(st.sampled_from(["cut", "append", "flip"]))
    if what == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif what == "append":
        data += draw(st.binary(min_size=1, max_size=9))
    elif data and not file.endswith(".json"):  # of JSON files any byte may be a setting of the model
        data[draw(st.integers(0, min(header, len(data)) - 1))] ^= 1 << draw(st.integers(0, 7))
    return {**files, file: bytes(data)}


def _index(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    file = "model.safetensors.index.json"
    with contextlib.suppress(ValueError):
        return {**files, file: json.dumps(_change_node(draw, json.loads(files.get(file, b"")))).encode()}
    return files


def _files(draw: Any, files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Remove a file, or let two change places."""
    names = sorted(files)
    first, second = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    if draw(st.booleans()):
        return {key: data for key, data in files.items() if key != first}
    return {**files, first: files[second], second: files[first]}
