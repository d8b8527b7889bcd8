"""Models of the loading matrix: how each is built, cut, and asked through a pipeline, tokenizers and all, offline."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zoo
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_prune import PruningError, WeightPruner, find_groups, prune, shrink
from hf_prune.selfcheck import random_plan

KINDS = {
    "heads": ("head", "kv_group"),
    "neurons": ("neuron",),
    "layers": ("layer",),
    "branches": ("branch",),
    "all": ("head", "kv_group", "neuron", "expert", "channel", "branch", "layer"),
    "weights": (),  # zeros in dense shapes
}
WIDTHS = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 512}
DECODER = {**WIDTHS, "num_key_value_heads": 4, "head_dim": 16}
WHISPER_WIDTHS = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 8) | dict.fromkeys(
    ["encoder_ffn_dim", "decoder_ffn_dim"], 512
)
LETTERS = [chr(code) for code in range(33, 127)]
WHISPER = {"vocab_size": len(LETTERS) + 3, "max_source_positions": 50}  # one second of sound


@dataclass(frozen=True)
class Entry:
    """One model of the matrix: its task, its pipeline, and what makes it large enough for 1 MB shards."""

    task: str
    auto: str
    pipeline: str
    wide: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


CAUSAL = ("causal_lm", "AutoModelForCausalLM", "text-generation")
MODELS = {
    "bert": Entry("sequence_classification", "AutoModelForSequenceClassification", "text-classification", WIDTHS),
    "roberta": Entry("token_classification", "AutoModelForTokenClassification", "token-classification", WIDTHS),
    "gpt2": Entry(*CAUSAL, {"n_embd": 128, "n_head": 8, "n_inner": 512}),
    "llama": Entry(*CAUSAL, DECODER),
    "qwen3": Entry(*CAUSAL, DECODER),
    "t5": Entry(
        "seq2seq_lm",
        "AutoModelForSeq2SeqLM",
        "text2text-generation",
        {"d_model": 128, "num_heads": 8, "d_kv": 16, "d_ff": 512},
    ),
    "vit": Entry("image_classification", "AutoModelForImageClassification", "image-classification", WIDTHS),
    "whisper": Entry(
        "speech_seq2seq",
        "AutoModelForSpeechSeq2Seq",
        "automatic-speech-recognition",
        {"d_model": 128, **WHISPER_WIDTHS},
        WHISPER,
    ),
    "mixtral": Entry(*CAUSAL, DECODER),
}


def build(name: str, *, wide: bool) -> Any:
    """Build a dense model, every tensor random: 4 layers of width 128 (3 to 13 MB), or the tests' smallest."""
    entry = MODELS[name]
    layers = {"layers": 4 if wide else 2}
    return zoo.build(name, entry.task, **layers, **(entry.wide if wide else {}), **entry.changes)


def cut(model: Any, kind: str) -> str:
    """Prune a model in place by a random plan of this kind; say why where it cannot be."""
    if kind == "weights":
        prune(model, [WeightPruner(sparsity=0.5, score="l1")])
        return ""
    groups = [group for group in find_groups(model) if group.kind in KINDS[kind]]
    plan = next((plan for seed in range(50) if (plan := random_plan(model, groups, seed))), None)
    if not groups or plan is None:
        return f"{type(model).__name__} offers no {kind}" + (" that its config can do without" if groups else "")
    try:
        shrink(model, plan)
    except PruningError as error:
        return str(error)
    return ""


def processors(name: str, model: Any) -> dict[str, Any]:
    """Make what a pipeline needs beside the model: keyword -> tokenizer, image processor or feature extractor."""
    if name == "vit":
        side = model.config.image_size
        return {"image_processor": transformers.ViTImageProcessor(size={"height": side, "width": side})}
    if name == "whisper":
        bins = model.config.num_mel_bins
        extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
        return {"tokenizer": _letter_tokenizer(), "feature_extractor": extractor}
    words = ["[PAD]", "<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(4, model.config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return {
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="[UNK]",
            model_input_names=["input_ids", "attention_mask"],
        )
    }


def _letter_tokenizer() -> Any:
    names = [*LETTERS, "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return transformers.WhisperTokenizer.from_pretrained(folder)


def ask(name: str, pipe: Any) -> list[Any]:
    """Run a pipeline on fixed inputs; return what it answers as a flat list of texts and numbers.

    The two lanes scale images and put spaces into texts differently: images have the model's own size, and generated
    tokens are compared, not their text.
    """
    draw = np.random.default_rng(0)
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if name == "vit":
        side = pipe.model.config.image_size
        return flat(pipe(Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8))))
    if name == "whisper":
        return flat(pipe(draw.standard_normal(16000).astype(np.float32), generate_kwargs=length))
    text = "w55 w71 w60 w93"
    return flat(pipe(text, return_tensors=True, **length) if "generation" in pipe.task else pipe(text))


def flat(value: Any) -> list[Any]:
    """Flatten lists, tensors and mappings to their texts and numbers, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in flat(part)]
    return [value if isinstance(value, str) else float(value)] if value is not None else []
