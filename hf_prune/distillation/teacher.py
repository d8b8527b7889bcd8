"""The teacher: a model, a folder, a name on the Hub, or the student as it is now; in evaluation mode."""

from __future__ import annotations

import copy
import inspect
import logging
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters import bare
from ..errors import PruningError
from .hearing import BESIDE
from .matching import match_outputs

logger = logging.getLogger(__name__)
_NOT_TAUGHT = {*BESIDE, "return_dict", "output_hidden_states", "output_attentions"}
_WORDS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask", "labels": ""}


def load_teacher(teacher: Any, student: Any, dtype: str | None = None, *, maps: bool = False) -> Any:
    """Return a teacher in evaluation mode: the student's weights as they are, a folder, a Hub name or a model.

    It learns nothing; a model that was handed over can learn again later.

    Args:
        teacher: ``"self"``, a folder, a name, or a model, of another width or family too.
        student: Says what the teacher's outputs must be like.
        dtype: What the teacher is to compute in; a model that has another is copied.
        maps: Whether one that is loaded here must hand out maps of its attention.

    Raises:
        PruningError: Its outputs mean something else than the student's, or it is the student.
    """
    wanted = getattr(torch, dtype) if dtype else None
    options = {"dtype": wanted} if wanted else {}
    options |= {"attn_implementation": "eager"} if maps else {}
    if isinstance(teacher, (str, Path)) and teacher != "self":
        teacher = _read(teacher, student, options).requires_grad_(False)
    elif isinstance(teacher, str):
        teacher = _copy(student).requires_grad_(False)
    elif teacher is student:
        raise PruningError(
            'The teacher must be another object than the model that learns. Received: itself. Try "self"'
        )
    columns = match_outputs(student, teacher)
    if columns.sizes is not None:
        logger.warning(
            "The student has %d words and the teacher %d: the first %d are compared, as a distribution of their own",
            *columns.sizes, columns.words,
        )  # fmt: skip
    if wanted is not None and any(one.dtype != wanted for one in teacher.parameters() if one.is_floating_point()):
        teacher = copy.deepcopy(teacher).to(wanted)
    return teacher.eval()


def teacher_inputs(teacher: Any, inputs: Mapping[str, Any], labels: Collection[str]) -> dict[str, Any]:
    """Return what the teacher reads of what the student read: no labels, but for decoders that make inputs of them.

    Args:
        teacher: The teacher.
        inputs: What the student read.
        labels: Names of labels.
    """
    parameters = inspect.signature(type(teacher).forward).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    config = getattr(teacher, "config", None)
    keep = {"labels"} if getattr(config, "is_encoder_decoder", False) else set()
    given = {key: value for key, value in inputs.items() if key in keep or key not in {*labels, *_NOT_TAUGHT}}
    given = {key: value for key, value in given.items() if takes_all or key in parameters}
    if not getattr(config, "return_dict", True):
        given["return_dict"] = True
    dtype = next(one.dtype for one in teacher.parameters() if one.is_floating_point())
    return {key: _cast(value, dtype) if key not in keep else value for key, value in given.items()}


def known_words(inputs: Mapping[str, Any], words: int) -> dict[str, Any]:
    """Return inputs that a teacher of a smaller vocabulary can read: padding that it has no word for becomes word 0.

    Args:
        inputs: What it is to read.
        words: How many words it has.

    Raises:
        PruningError: A text has a word that the teacher does not have.
    """
    result = dict(inputs)
    for name, its_mask in _WORDS.items():
        ids, mask = inputs.get(name), inputs.get(its_mask)
        if not torch.is_tensor(ids) or not (beyond := ids >= words).any():
            continue
        padding = mask == 0 if torch.is_tensor(mask) and mask.shape == ids.shape else torch.zeros_like(beyond)
        if (beyond & ~padding).any():
            raise PruningError(
                f"A teacher of {words} words can read only these: words that were added to the student's vocabulary "
                f"must not be in the texts. Received: {name} with the word {ids.masked_fill(padding, 0).max().item()}"
            )
        result[name] = ids.masked_fill(beyond, 0)
    return result


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(one, dtype) for key, one in value.items()}
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _copy(student: Any) -> Any:
    """Copy a model; a forward that was put on the model itself (TRL's fused head) must not lead back to the student."""
    result = copy.deepcopy(student)
    for mine, its in zip(student.modules(), result.modules()):
        put = vars(its).get("forward")
        for cell in getattr(getattr(put, "__func__", put), "__closure__", None) or ():
            if getattr(cell.cell_contents, "__self__", None) is mine:
                its.forward = types.MethodType(cell.cell_contents.__func__, its)
    return result


def _read(path: str | Path, student: Any, options: dict[str, Any]) -> Any:
    """Load with the student's class, or the checkpoint's own where it is of another family."""
    import transformers

    base: Any = bare(student)
    if not hasattr(base, "from_pretrained"):  # sentence-transformers
        return type(base)(str(path), **({"model_kwargs": options} if options else {}))
    config = transformers.AutoConfig.from_pretrained(path)
    if config.model_type == base.config.model_type:
        return type(base).from_pretrained(path, **options)
    named = (getattr(config, "architectures", None) or ["none"])[0]
    own = getattr(transformers, named, None)
    if own is None:
        raise PruningError(
            f"A teacher of another family must name a class of transformers in its config. Received: {named}"
        )
    return own.from_pretrained(path, **options)
