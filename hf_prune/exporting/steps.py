"""Generation with past: whether graphs that take a cache and return one compute what torch computes, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lanes import Lane, failing_as_ours
from .parity import Bound, judge
from .parts import draw_prompt

Step = Callable[[Mapping[str, Any], Any], tuple[Tensor, Any]]  # from inputs and a cache to logits and the next cache
_CHECKED, _TOKENS = ((1, 9), (2, 5)), 3  # batch and length of the prompts, and how many tokens follow each
_CACHES = ("past_key_values", "cache")  # transformers renames it


def compare_steps(model: Any, folder: Path, task: str, lane: Lane, bound: Bound) -> tuple[float, float]:
    """Return the largest difference of the logits to torch, over a prompt and the tokens behind it, and what may be.

    Args:
        model: In torch.
        folder: Of the graphs.
        task: Of the export.
        lane: Who exported.
        bound: How far they may be apart.

    Raises:
        PruningError: They are further apart, or the graphs fail.
    """
    found = []
    with failing_as_ours("The exported graphs fail"):
        run = _OPEN[lane](folder, task)
        for shape in _CHECKED:
            prompt = draw_prompt(model, *shape)
            words, draw = model.config.get_text_config(decoder=True).vocab_size, torch.Generator().manual_seed(0)
            tokens = torch.randint(1, words, (_TOKENS, shape[0], 1), generator=draw)
            with torch.no_grad():
                expected = _walk(_in_torch(model), model, prompt, tokens)
            found.append(((_walk(run, model, prompt, tokens) - expected).abs().max(), expected.abs().max()))
    return judge(found, bound, f"{len(_CHECKED)} prompts and {_TOKENS} tokens after each")


def _walk(step: Step, model: Any, prompt: Mapping[str, Tensor], tokens: Iterable[Tensor]) -> Tensor:
    """Return the logits behind a prompt, and behind each of the tokens that follow it."""
    found, past = list[Tensor](), None
    seq2seq, mask = model.config.is_encoder_decoder, prompt.get("attention_mask")
    rows = len(next(iter(prompt.values())))
    ids = torch.full((rows, 1), model.config.decoder_start_token_id) if seq2seq else prompt["input_ids"]
    for token in (ids, *tokens):
        if seq2seq:
            inputs: dict[str, Any] = {**prompt, "decoder_input_ids": token}
        else:
            assert mask is not None
            mask = mask if past is None else torch.cat([mask, torch.ones_like(token)], 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -token.shape[1] :]
            inputs = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        logits, past = step(inputs, past)
        found.append(logits[:, -1])
    return torch.stack(found)


def _in_torch(model: Any) -> Step:
    reads = inspect.signature(model.forward).parameters
    cache = next(name for name in reversed(_CACHES) if name in reads)
    if model.config.is_encoder_decoder:
        model.get_encoder().config.use_cache = False  # optimum has left it switched on, which T5's encoder refuses

    def step(inputs: Mapping[str, Any], past: Any) -> tuple[Tensor, Any]:
        read = {name: value for name, value in inputs.items() if name in reads}
        output = model(**read, **{cache: past}, use_cache=True, return_dict=True)
        return output.logits, output[cache]

    return step


def _open_optimum(folder: Path, task: str) -> Step:
    from optimum import onnxruntime as ort

    seq2seq = {
        "text2text-generation": "ORTModelForSeq2SeqLM",
        "automatic-speech-recognition": "ORTModelForSpeechSeq2Seq",
    }
    model: Any = getattr(ort, seq2seq.get(task, "ORTModelForCausalLM")).from_pretrained(folder, use_cache=True)

    def step(inputs: Mapping[str, Any], past: Any) -> tuple[Tensor, Any]:
        output = model(**inputs, past_key_values=past)
        return output.logits, output.past_key_values

    return step


def _open_native(folder: Path, task: str) -> Step:
    from transformers import DynamicCache
    from transformers.exporters.base import ExportedModel

    first, later = (ExportedModel.from_pretrained(folder).runners[name] for name in ("prefill", "decode"))

    def step(inputs: Mapping[str, Any], past: Any) -> tuple[Tensor, Any]:
        run = first if past is None else later
        reads = run.metadata.kwargs
        cache = next(name for name in reversed(_CACHES) if name in reads)
        read = {name: value for name, value in inputs.items() if name in reads}
        output = run(**read, **{cache: DynamicCache() if past is None else past})
        return output.logits.clone(), output[cache]

    return step


_OPEN: dict[Lane, Callable[[Path, str], Step]] = {"optimum": _open_optimum, "native": _open_native}
