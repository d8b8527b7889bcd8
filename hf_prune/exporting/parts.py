"""Which graphs a task has, and what torch computes in place of each: a whole model, or an encoder and a decoder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PruningError, UnsupportedModelError, did_you_mean

# Task -> how the names of its model classes end; the first that fits wins, so the plain "Model" comes last.
TASKS: dict[str, tuple[str, ...]] = {
    "text-classification": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "question-answering": ("ForQuestionAnswering",),
    "image-classification": ("ForImageClassification",),
    "fill-mask": ("ForMaskedLM",),
    "text-generation": ("ForCausalLM", "LMHeadModel"),
    "automatic-speech-recognition": ("WhisperForConditionalGeneration",),
    "text2text-generation": ("ForConditionalGeneration", "MTModel", "MarianMTModel"),
    "feature-extraction": ("Model",),
}
SEQ2SEQ = ("text2text-generation", "automatic-speech-recognition")  # two graphs: of an encoder and of a decoder
PAST = "-with-past"  # behind the name of a task that generates, as optimum has it: graphs take a cache and return one
# Axes whose size is free at run time.
AXES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "sequence_length"),
    "token_type_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "pixel_values": ("batch_size",),
    "input_features": ("batch_size",),
}
_DECODER_AXES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch_size", "decoder_sequence_length"),
    "encoder_hidden_states": ("batch_size", "encoder_sequence_length"),
    "encoder_attention_mask": ("batch_size", "encoder_sequence_length"),
}


@dataclass(frozen=True)
class Part:
    """One graph of an export.

    Args:
        name: Of its file, without ``.onnx``; optimum's names.
        module: What computes the same in torch, from inputs of the same names.
        axes: Input -> names of its axes that are free, from the first.
    """

    name: str
    module: nn.Module
    axes: dict[str, tuple[str, ...]]


class _Encoder(nn.Module):
    """An encoder that returns its last hidden state alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()
        self.config = model.config

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(**inputs, return_dict=True).last_hidden_state}


class _TextEncoder(_Encoder):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class _SpeechEncoder(_Encoder):
    def forward(self, input_features: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(input_features=input_features)


class _Decoder(nn.Module):
    """A decoder and its head, given what the encoder has computed."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        from transformers.modeling_outputs import BaseModelOutput

        mask = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        encoded = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        output = self.model(
            encoder_outputs=encoded, decoder_input_ids=input_ids, use_cache=False, return_dict=True, **mask
        )
        return {"logits": output.logits}


class _SpeechDecoder(_Decoder):
    """One without a mask: all of the speech is read, and silence is part of it."""

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(input_ids, encoder_hidden_states)


def choose_task(model: Any, task: str) -> str:
    """Return the task that was asked for, or the one of the model's class.

    Raises:
        PruningError: There is no such task.
        UnsupportedModelError: It cannot be exported with this model.
    """
    name = type(model).__name__
    if task == "auto":
        task = next((known for known, endings in TASKS.items() if name.endswith(endings)), f"auto, for {name}")
    generates = [one + PAST for one in ("text-generation", *SEQ2SEQ)]
    if task not in (*TASKS, *generates):
        known = [*TASKS, *generates]
        raise PruningError(f"task must be one of {', '.join(known)}. Received: {task}.{did_you_mean(task, known)}")
    if task.endswith(PAST) and not model.can_generate():
        raise UnsupportedModelError(f"Past is for models that generate. Received: {name} for {task}.")
    asked, task = task, task.removesuffix(PAST)
    if model.main_input_name not in AXES or (model.main_input_name == "input_features" and task not in SEQ2SEQ):
        rule = "Only models that read text or images, and Whisper, can be exported so far"
        raise UnsupportedModelError(f"{rule}. Received: {name}, which reads {model.main_input_name}.")
    if model.config.is_encoder_decoder != (task in SEQ2SEQ):
        rule = f"Models with an encoder and a decoder are exported for {' or '.join(SEQ2SEQ)}, and only they"
        raise UnsupportedModelError(f"{rule}. Received: {name} for {task}.")
    if task in SEQ2SEQ and (task == SEQ2SEQ[1]) != (model.main_input_name == "input_features"):
        raise UnsupportedModelError(
            f"text2text-generation is for encoders that read text, automatic-speech-recognition for Whisper. "
            f"Received: {name}, which reads {model.main_input_name}, for {task}."
        )
    return asked


def check_exportable(model: Any) -> None:
    """Check that a model's own task can be exported, before anybody trains it for that.

    Raises:
        UnsupportedModelError: It cannot.
    """
    try:
        choose_task(model, "auto")
    except PruningError as error:
        raise UnsupportedModelError(f"A recipe of this model needs onnx=false, and no export. {error}") from None


def split(model: Any, task: str) -> list[Part]:
    """Return the graphs that an export for a task has."""
    if task not in SEQ2SEQ:
        names = _inputs_of(model, task)
        return [Part("model", model, {name: AXES[name] for name in names})]
    speech = model.main_input_name == "input_features"
    encoder: _Encoder = _SpeechEncoder(model) if speech else _TextEncoder(model)
    decoder: _Decoder = _SpeechDecoder(model) if speech else _Decoder(model)
    return [
        Part("encoder_model", encoder, {name: AXES[name] for name in _parameters(encoder)}),
        Part("decoder_model", decoder, {name: _DECODER_AXES[name] for name in _parameters(decoder)}),
    ]


def _parameters(module: Any) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _inputs_of(model: Any, task: str) -> list[str]:
    """Return the inputs that a graph of a whole model has: for text the same that optimum gives."""
    if model.main_input_name == "pixel_values":
        return ["pixel_values"]
    wanted = {
        "input_ids": True,
        "attention_mask": True,
        "token_type_ids": (getattr(model.config, "type_vocab_size", 0) or 0) > 1,
        "position_ids": task == "text-generation",
    }
    return [name for name in _parameters(model) if wanted.get(name)]


def draw_inputs(part: Part, config: Any, names: Sequence[str], batch: int, length: int) -> dict[str, Tensor]:
    """Return random inputs by name; the second row of a text is padded on the right, the third on the left.

    Args:
        part: The graph; a decoder reads a text that is shorter than what its encoder has read.
        config: The model's.
        names: Of inputs.
        batch: Rows.
        length: Tokens.

    Raises:
        UnsupportedModelError: Nothing is known of such an input.
    """
    text, draw = config.get_text_config(), torch.Generator().manual_seed(batch)
    length, pad = min(length, _most_tokens(text)), getattr(text, "pad_token_id", None) or 0
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, length - length // 3 :] = 0
    mask[2:3, : length // 3] = 0
    drawn: dict[str, Tensor] = {}
    for name in names:
        if name == "input_ids" and part.name == "decoder_model":
            drawn[name] = torch.randint(text.vocab_size, (batch, length // 2 + 1), generator=draw)
        elif name == "input_ids":
            drawn[name] = torch.randint(text.vocab_size, mask.shape, generator=draw).masked_fill(mask == 0, pad)
        elif name in ("attention_mask", "encoder_attention_mask"):
            drawn[name] = mask
        elif name == "token_type_ids":
            drawn[name] = torch.randint(text.type_vocab_size, mask.shape, generator=draw)
        elif name == "position_ids":
            drawn[name] = (mask.cumsum(-1) - 1).clamp(min=0)
        elif name == "encoder_hidden_states":
            rows = text.max_source_positions if hasattr(text, "max_source_positions") else length
            drawn[name] = torch.randn(batch, rows, text.hidden_size, generator=draw)
        elif name in ("pixel_values", "input_features"):
            drawn[name] = torch.randn(batch, *_shape_of(name, config), generator=draw)
        else:
            known = ", ".join({**AXES, **_DECODER_AXES})
            raise UnsupportedModelError(f"Inputs can be {known}. Received: {name}.")
    return drawn


def draw_prompt(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Return what generation begins with; the second row of a text is padded on the left."""
    draw = torch.Generator().manual_seed(batch)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, *_shape_of("input_features", model.config), generator=draw)}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, : length // 3] = 0
    return {
        "input_ids": torch.randint(1, model.config.get_text_config().vocab_size, mask.shape, generator=draw),
        "attention_mask": mask,
    }


def _most_tokens(config: Any) -> int:
    """Return how many tokens fit; RoBERTa's table of positions starts counting after the padding token."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    behind = positions - 1 - (getattr(config, "pad_token_id", None) or 0)
    return behind if behind > 0 else positions  # GPT-2 pads with token 50256, and counts from 0


def _shape_of(name: str, config: Any) -> tuple[int, ...]:
    """Return the shape of one image, or of one piece of speech."""
    if name == "input_features":
        return config.num_mel_bins, 2 * config.max_source_positions
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
