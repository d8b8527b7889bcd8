"""The teacher: a model, a folder, a name on the Hub, or the student as it is now; in evaluation mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import PruningError


def load_teacher(teacher: Any, student: Any, dtype: str | None = None, *, maps: bool = False) -> Any:
    """Return a teacher in evaluation mode: the student's weights as they are, a folder, a Hub name or a model.

    It learns nothing; a model that was handed over can learn again later.

    Args:
        teacher: ``"self"``, a folder, a name, or a model, of another width or family too.
        student: Says what the teacher's outputs must be like.
        dtype: What the teacher is to compute in; a model that has another is copied.
        maps: Whether one that is loaded here must hand out maps of its attention.

    Raises:
        PruningError: Its outputs have another width than the student's, or it is the student.
    """
    wanted = getattr(torch, dtype) if dtype else None
    options = {"dtype": wanted} if wanted else {}
    options |= {"attn_implementation": "eager"} if maps else {}
    if isinstance(teacher, (str, Path)) and teacher != "self":
        teacher = _read(teacher, student, options).requires_grad_(False)
    elif isinstance(teacher, str):
        teacher = copy.deepcopy(student).requires_grad_(False)
    elif teacher is student:
        raise PruningError(
            'The teacher must be another object than the model that learns. Received: itself. Try "self"'
        )
    theirs, ours = (_outputs(model) for model in (teacher, student))
    if theirs != ours:
        raise PruningError(f"The teacher's outputs must be as many as the student's {ours}. Received: {theirs}")
    if wanted is not None and any(one.dtype != wanted for one in teacher.parameters() if one.is_floating_point()):
        teacher = copy.deepcopy(teacher).to(wanted)
    return teacher.eval()


def teacher_inputs(teacher: Any, inputs: Mapping[str, Any], labels: Collection[str]) -> dict[str, Any]:
    """Return what the teacher reads of a batch: no labels, but for decoders that make their inputs of them.

    Args:
        teacher: The teacher.
        inputs: The student's batch.
        labels: Names of labels.
    """
    parameters = inspect.signature(teacher.forward).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    keep = {"labels"} if getattr(teacher.config, "is_encoder_decoder", False) else set()
    given = {key: value for key, value in inputs.items() if key in keep or key not in {*labels, "labels"}}
    given = {key: value for key, value in given.items() if takes_all or key in parameters}
    dtype = next(one.dtype for one in teacher.parameters() if one.is_floating_point())
    return {key: _cast(value, dtype) if key not in keep else value for key, value in given.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _read(path: str | Path, student: Any, options: dict[str, Any]) -> Any:
    """Load with the student's class, or the checkpoint's own where it is of another family."""
    import transformers

    base = student.get_base_model() if hasattr(student, "get_base_model") else student  # PEFT
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


def _outputs(model: Any) -> int | None:
    """Return how many outputs a model has: words of a language model, else labels."""
    words = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(model.config, "num_labels", None) if words is None else len(words.weight)
