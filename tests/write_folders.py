"""Write the folders that every later version must load: `python tests/write_folders.py`, once a format, on each lane.

What lies under `tests/folders` stands for what people have on their disks. It is added to, and never written again.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import zoo
from models import PLANS, build_bert, build_llama, build_vit, draw_batch, logits_of
from safetensors.torch import save_file

from hf_prune import save_pruned, shrink
from hf_prune.plan import FORMAT

FOLDERS = Path(__file__).parent / "folders"
LANE = f"transformers{version('transformers').split('.')[0]}"
EMPTY_BRANCH = {"layers.0.attention.branch": [], "layers.1.mlp.neurons": [1, 5]}
EXPERTS = {"layers.0.experts": [0, 2], "layers.1.experts": [1, 2, 3]}


def write(name: str, model: Any, save: Any) -> None:
    """Write a folder, and beside its weights what the model computes."""
    folder = FOLDERS / name
    folder.mkdir(parents=True)
    save(model, folder)
    batch = draw_batch(model)
    save_file({**batch, "expected": logits_of(model, batch)}, folder / "expected.safetensors")


def prune_heads(model: Any, heads: dict[int, list[int]]) -> Any:
    """Prune heads as transformers 4 does it: config.json then has the key `pruned_heads`."""
    model.prune_heads(heads)
    return model


def main() -> None:
    now = f"format{FORMAT}-{LANE}"
    plain = lambda model, folder: model.save_pretrained(folder)  # noqa: E731
    write(f"{now}-bert", shrink(build_bert(), PLANS["bert"]), lambda *a: save_pruned(*a, digest=True))
    write(f"{now}-llama", shrink(build_llama(), PLANS["llama"]), lambda *a: save_pruned(*a, max_shard_size="5KB"))
    write(f"{now}-vit", shrink(build_vit(), EMPTY_BRANCH), plain)
    small = {"hidden_size": 16, "vocab_size": 60, "pad_token_id": 0}
    write(f"{now}-mixtral", shrink(zoo.build("mixtral", "causal_lm", **small), EXPERTS), plain)
    if LANE == "transformers4":
        write("pruned_heads-bert", prune_heads(build_bert(), {0: [1, 2], 1: [0]}), plain)
        small = {"n_embd": 16, "n_head": 4, "vocab_size": 60}
        write("pruned_heads-gpt2", prune_heads(zoo.build("gpt2", "causal_lm", **small), {1: [0, 3]}), plain)


if __name__ == "__main__":
    main()
