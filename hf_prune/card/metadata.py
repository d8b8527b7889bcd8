"""The YAML header of a card: only keys that the Hub knows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .escaping import one_line
from .facts import Known, mention, on_hub
from .numbers import finite, removed_share

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_COMMIT = re.compile(r"[0-9a-f]{40}")


def metadata(known: Known) -> str:
    """Return the header's YAML, without the ``---`` around it."""
    from huggingface_hub import ModelCardData

    results = _results(known)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=known.task,
        datasets=[name for name in known.datasets if on_hub(name)] or None,
        metrics=[one_line(name)[:100] for name in known.said.metrics or known.metrics] or None,
        tags=list(
            dict.fromkeys(
                [*["pruned"] * known.pruned, "hf_prune", *_sparsity_tag(known), *map(one_line, known.said.tags)]
            )
        ),
        **_origin(known),
        **known.terms,
        # a key of the model-index only
        **({"model_name": known.title, "eval_results": results} if results else {}),
    )
    return str(data.to_yaml())


def _origin(known: Known) -> dict[str, Any]:
    """Return base model and relation.

    Of the Hub's relations (adapter, merge, quantized, finetune) one fits what a recipe trained, none what was only cut.
    """
    if not on_hub(known.base_model):
        return {}
    trained = {"base_model_relation": "finetune"} if known.settings.get("recipe_yaml") else {}
    return {"base_model": known.base_model, **trained}


def _sparsity_tag(known: Known) -> list[str]:
    share = removed_share(known.told)
    return [f"sparsity-{share:.0%}".rstrip("%")] if share else []


def _results(known: Known) -> list[EvalResult]:
    """Return the model-index; it demands a task and a dataset, so without them there is none."""
    from huggingface_hub import EvalResult

    if known.task is None or not known.datasets:
        return []
    name, settings = mention(known.datasets[0]), known.settings
    splits = (settings.get("splits") or {}).get("evaluation")
    revision = (settings.get("data_revision") or {}).get(name, "")
    where: dict[str, Any] = {
        "task_type": known.task,
        "dataset_type": name,
        "dataset_name": name,
        "dataset_config": one_line(settings["data_config"]) if settings.get("data_config") else None,
        "dataset_split": one_line("+".join(splits)) if splits else None,
        "dataset_revision": revision if _COMMIT.fullmatch(revision) else None,
    }
    values = {metric: value["pruned"] for metric, value in known.metrics.items() if finite(value.get("pruned"))}
    return [
        EvalResult(metric_type=one_line(metric)[:100], metric_value=float(value), **where)
        for metric, value in values.items()
    ]
