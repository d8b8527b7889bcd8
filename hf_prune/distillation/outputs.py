"""What a model hands out, and which of it counts: rows of logits, spans, embeddings; never padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PruningError
from .losses import Top, cosine_loss, divergence, labels_loss, logits_loss, pool, row_mean, top_divergence
from .matching import Columns, transformers_model

TOP = "top"  # what outputs call a `Top`
EMBEDDINGS = ("text_embeds", "image_embeds", "audio_embeds", "embeddings", "sentence_embedding", "last_hidden_state")

_ALL = Columns()


def output_loss(
    model: Any,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    inputs: Mapping[str, Any],
    temperature: float,
    columns: Columns = _ALL,
    labels: Tensor | None = None,
) -> Tensor:
    """Return how far the student's outputs are from the teacher's.

    Args:
        model: The student.
        ours: Its outputs.
        theirs: The teacher's.
        inputs: What the student read.
        temperature: T.
        columns: Which of both are compared.
        labels: The batch's: where it has some, the mean is over what counts of them, else over rows.

    Raises:
        PruningError: There is nothing that both hand out.
    """
    logits = [_logits_of(one) for one in (ours, theirs)]
    if logits[0] is not None and theirs.get(TOP) is not None:
        return _top_words(model, logits[0], theirs[TOP], inputs, temperature, columns, labels)
    if logits[0] is not None and logits[1] is not None:
        return _logits(model, logits[0], logits[1], inputs, temperature, columns, labels)
    if ours.get("start_logits") is not None and theirs.get("start_logits") is not None:
        mask = positions(model, inputs, "", ours["start_logits"].shape)
        spans = (_span(ours[key], theirs[key], mask, temperature) for key in ("start_logits", "end_logits"))
        return sum(spans, torch.zeros((), device=ours["start_logits"].device)) / 2
    shared = [key for key in EMBEDDINGS if ours.get(key) is not None and theirs.get(key) is not None]
    shared = shared if len(shared) == 1 else [key for key in shared if key != "last_hidden_state"]
    if not shared:
        raise PruningError(
            f"Distillation.logits needs outputs named logits, start_logits or {', '.join(EMBEDDINGS)} of both models; "
            f"try logits=0 and hidden=1. Received: {', '.join(ours)} of the student, {', '.join(theirs)} of the teacher"
        )
    terms = [_cosine(model, key, ours[key], theirs[key], inputs) for key in shared]
    return torch.stack(terms).mean()


def loss_rows(model: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits that the loss on labels reads, ``(rows, classes)``: shifted for causal LM, without -100."""
    if logits.ndim == 4:
        return logits.movedim(1, -1).flatten(0, -2)  # of images: classes come second
    if labels is None or logits.ndim != 3 or labels.shape != logits.shape[:2]:
        return logits.flatten(0, -2)
    if shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


def count_items(model: Any, labels: Tensor) -> Tensor:
    """Count what the mean loss averages over: rows, or shifted labels that are not -100."""
    if labels.ndim == 2 and shifts_labels(model):
        labels = labels[:, 1:]
    return labels.ne(-100).sum() if not labels.is_floating_point() else torch.tensor(len(labels), device=labels.device)


def count_rows(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Count the rows of a batch: of what the model mainly reads, else of its first tensor or list."""
    main = inputs.get(getattr(model, "main_input_name", ""))
    values = [main, *inputs.values()]
    first = next((one for one in values if torch.is_tensor(one) and one.ndim > 0), None)
    if first is None:  # texts, which a cross-encoder turns into tensors itself
        return torch.tensor(next((len(one) for one in values if isinstance(one, (list, tuple))), 1))
    return torch.tensor(len(first), device=first.device)


def count(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return how many items and rows a batch has; without labels its rows are its items."""
    labels, rows = inputs.get("labels"), count_rows(model, inputs)
    return (count_items(model, labels).to(rows.device) if torch.is_tensor(labels) else rows), rows


def shifts_labels(model: Any) -> bool:
    """Whether the model's own loss compares position i with label i + 1, as causal language models do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = transformers_model(model)
    name = type(base).__name__
    sees = name.endswith("ForConditionalGeneration") and not getattr(base.config, "is_encoder_decoder", False)
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or sees  # those that see are decoders too


def positions(model: Any, inputs: Mapping[str, Any], tower: str, shape: Any) -> Tensor | None:
    """Return which positions of a tower are not padding.

    Args:
        model: The student.
        inputs: The batch.
        tower: Name of the list of layers, such as ``layers`` or ``decoder.layers``.
        shape: Of what has positions: ``(rows, positions, ...)``.

    Returns:
        ``(rows, positions)``, True where a position counts; ``None``: all do.
    """
    config = getattr(model, "config", None)
    mask = inputs.get("attention_mask")
    if tower.startswith("decoder") and getattr(config, "is_encoder_decoder", False):
        labels = inputs.get("labels")
        mask = inputs.get("decoder_attention_mask", None if labels is None else labels != -100)
    if tower.startswith(("vision", "image")) or not torch.is_tensor(mask) or mask.ndim != 2:
        return None
    if mask.shape[1] != shape[1] and hasattr(
        model, "_get_feature_vector_attention_mask"
    ):  # of sound: frames, not samples
        mask = model._get_feature_vector_attention_mask(shape[1], mask)
    return mask.bool() if tuple(mask.shape) == tuple(shape[:2]) else None


def _logits_of(outputs: Mapping[str, Any]) -> Tensor | None:
    """Return logits, which a cross-encoder calls scores."""
    logits = outputs.get("logits")
    logits = outputs.get("scores") if logits is None else logits
    return logits[:, None] if torch.is_tensor(logits) and logits.ndim == 1 else logits


def _logits(
    model: Any,
    ours: Tensor,
    theirs: Tensor,
    inputs: Mapping[str, Any],
    temperature: float,
    columns: Columns,
    labels: Tensor | None,
) -> Tensor:
    problem = getattr(model.config, "problem_type", None)
    if _by_texts(ours, labels):
        ours, theirs = columns.common(ours, theirs)
        return row_mean(divergence(ours, theirs, temperature), _learned(model, inputs, ours.shape))
    rows = columns.common(*(loss_rows(model, logits, labels) for logits in (ours, theirs)))
    if problem == "regression" and rows[0].shape[-1] > 1:
        return torch.nn.functional.mse_loss(rows[0].float(), rows[1].float())
    loss = labels_loss if problem == "multi_label_classification" else logits_loss
    return loss(rows[0], rows[1], temperature)


def _top_words(
    model: Any,
    ours: Tensor,
    theirs: Top,
    inputs: Mapping[str, Any],
    temperature: float,
    columns: Columns,
    labels: Tensor | None,
) -> Tensor:
    """Compare with a teacher's most probable words, as `_logits` does with all."""
    ours = ours[..., : columns.words]
    if _by_texts(ours, labels):
        return row_mean(top_divergence(ours, theirs, temperature), _learned(model, inputs, ours.shape))
    student, *kept = (loss_rows(model, one, labels) for one in (ours, *theirs))
    terms = top_divergence(student, Top(*kept), temperature)
    return terms[kept[0].isfinite().any(-1)].mean()  # nothing was kept of padding


def _by_texts(logits: Tensor, labels: Tensor | None) -> bool:
    """Whether each text is a row, as no labels of the batch say which tokens count."""
    return logits.ndim == 3 and (labels is None or (labels.ndim == 2 and labels.shape != logits.shape[:2]))


def _learned(model: Any, inputs: Mapping[str, Any], shape: Any) -> Tensor | None:
    """Return which positions count: those that the forward's own labels name, as a completion's, else no padding."""
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or tuple(labels.shape) != tuple(shape[:2]):
        return positions(model, inputs, "", shape)
    learned = labels.ne(-100)
    return torch.nn.functional.pad(learned[:, 1:], (0, 1)) if shifts_labels(model) else learned


def _span(ours: Tensor, theirs: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Compare where a span starts or ends, ``(rows, positions)``: never in the padding."""
    pairs = [logits.float() for logits in (ours, theirs)]
    if mask is not None:
        pairs = [logits.masked_fill(~mask, -1e9) for logits in pairs]
    return logits_loss(pairs[0], pairs[1], temperature)


def _cosine(model: Any, key: str, ours: Tensor, theirs: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    if ours.shape[-1] != theirs.shape[-1]:
        raise PruningError(
            f"The teacher's {key} must be as wide as the student's {ours.shape[-1]}. Received: {theirs.shape[-1]}"
        )
    if ours.ndim == 3:
        ours, theirs = (pool(value, positions(model, inputs, "", value.shape)) for value in (ours, theirs))
    return cosine_loss(ours, theirs)
