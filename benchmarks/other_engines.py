"""Stock folders in another engine: llama.cpp generates from a pruned Llama what transformers generates.

    python benchmarks/other_engines.py MODEL --converter LLAMA_CPP/convert_hf_to_gguf.py

MODEL is the folder of a small Llama. It is pruned by depth and by uniform feed-forward widths, saved with
``stock="require"``, converted by llama.cpp's own script, and read by llama.cpp; nothing there knows hf_prune. Needs a
virtualenv with this library, `llama-cpp-python` and `sentencepiece`; the converter is in the source distribution of
llama-cpp-python, under `vendor/llama.cpp`. Prompts go in as token ids: llama.cpp has no merges of a tokenizer with byte
fallback, only scores, and converted ones say nothing of their order. What comes out is turned into text by both. Keys
and values are kept in float32, as in transformers: llama.cpp's default of float16 decides near ties otherwise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import LayerPruner, NeuronPruner, prune, save_pruned

TOKENS = 64
PROMPTS = ("Once upon a time, there was a little girl named", "The dog ran to the", "Tom and his mom went")
LAYERS = LayerPruner(sparsity=0.2, score="l1")
NEURONS = NeuronPruner(sparsity=0.25, score="l1", allocation="uniform")
CASES = {"dense": [], "depth": [LAYERS], "neurons": [NEURONS], "neurons and depth": [NEURONS, LAYERS]}


def stock_folder(model_folder: Path, pruners: list[Any], folder: Path) -> Any:
    """Prune the model, write it where stock transformers and converters can read it, and return it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if pruners:
        prune(model, pruners)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    save_pruned(model, folder, tokenizer=tokenizer, stock="require")
    return model


def convert(folder: Path, converter: Path) -> Path:
    """Run llama.cpp's converter on a folder."""
    target = folder / "model.gguf"
    command = [sys.executable, str(converter), str(folder), "--outfile", str(target), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return target


def by_transformers(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def by_llama_cpp(engine: Any, prompt: list[int]) -> list[int]:
    engine.reset()
    tokens = engine.generate(prompt, temp=0.0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(TOKENS)]


def compare(model: Any, engine: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return, for each prompt, both texts and whether they are the same."""
    found = []
    for text in PROMPTS:
        prompt = tokenizer(text)["input_ids"]
        ours, theirs = by_transformers(model, prompt), by_llama_cpp(engine, prompt)
        told = tokenizer.decode(ours, skip_special_tokens=True), engine.detokenize(theirs).decode(errors="replace")
        same = told[0].strip() == told[1].strip()
        found.append({"prompt": text, "tokens": len(ours), "same_ids": ours == theirs, "same_text": same})
        found[-1] |= {"transformers": told[0]} | ({} if same else {"llama_cpp": told[1]})
    return found


def run(name: str, model_folder: Path, converter: Path) -> dict[str, Any]:
    """Prune, save, convert and compare; return the record of one case."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as place:
        model = stock_folder(model_folder, CASES[name], Path(place))
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
        engine = llama_cpp.Llama(str(convert(Path(place), converter)), n_ctx=256, verbose=False, **exact)
        texts = compare(model, engine, AutoTokenizer.from_pretrained(place))
    config = model.config
    return {
        "case": name,
        "engine": f"llama.cpp, as in llama-cpp-python {llama_cpp.__version__}",
        "layers": config.num_hidden_layers,
        "neurons": config.intermediate_size,
        "parameters": sum(one.numel() for one in model.parameters()),
        "equal": sum(one["same_ids"] and one["same_text"] for one in texts),
        "texts": texts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a small Llama")
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    chosen = parser.parse_args()
    for case in CASES:
        add_record("other_engines", run(case, chosen.model, chosen.converter), key=("case",))
