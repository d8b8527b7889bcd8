"""Write the README of a pruned model: metadata for the Hub, dense against pruned, how to load it."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from .files import shipped

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from .report import Report

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

# Head of the model class -> task on the Hub; these heads also have an ``AutoModelFor...``.
_TASKS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "CausalLM": "text-generation",
    "ImageClassification": "image-classification",
    "SemanticSegmentation": "image-segmentation",
    "ObjectDetection": "object-detection",
    "AudioClassification": "audio-classification",
    "CTC": "automatic-speech-recognition",
}


class _Row(NamedTuple):
    what: str
    dense: str
    pruned: str
    change: str


def model_card(
    report: Report | Mapping[str, Any] | None,
    *,
    folder: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    metrics: Sequence[str] = (),
    recipe: str | None = None,
    command: str | None = None,
    license: str | None = None,
    task: str | None = None,
    plot: str | None = None,
    onnx: Sequence[str] = (),
    tokenizer: bool | None = None,
) -> str:
    """Write the README of a pruned model: metadata for the Hub, dense against pruned, how to load, how it was made.

    It tells only what is known: a figure that the report lacks gets no row, and local paths never reach the metadata.
    What is not passed is looked up in ``report.settings``: ``base_model``, ``datasets``, ``command``, ``license``,
    ``task`` and ``recipe_yaml``. "How it was made" lists its ``recipe`` (a name), ``sparsity``, ``seed``, ``hardware``
    and ``versions``.

    Args:
        report: A `Report`, its ``to_dict()``, or ``None`` where nothing was measured.
        folder: The saved model; its config.json tells the class, the base model and who can load it.
        base_model: Hub name of the dense model; by default what the config recorded.
        repo_id: Where the model will live, for the title and the loading snippet.
        tags: In addition to ``pruned`` and ``hf_prune``.
        datasets: Hub names of the training and test data; the first one goes to the model-index.
        metrics: Names for the metadata; by default the report's.
        recipe: The recipe's YAML text.
        command: The command line that made the model.
        license: A license identifier of the Hub, such as ``"apache-2.0"``; none is assumed.
        task: Pipeline tag; by default from the model's class.
        plot: Path in the repository of the picture of kept units.
        onnx: Paths in the repository of the ONNX files.
        tokenizer: Whether the repository has a tokenizer; by default whether the folder has one.

    Returns:
        Markdown with a YAML header.

    Example:
        >>> print(model_card(None, repo_id="me/small-bert"))  # doctest: +ELLIPSIS
        ---
        library_name: transformers
        ...
    """
    told, config = as_dict(report), _config(folder)
    settings, plan = told.get("settings") or {}, config.get("pruning_config") or {}
    architecture = (config.get("architectures") or [""])[0]
    task = task or settings.get("task") or _TASKS.get(_head(architecture))
    base = base_model or settings.get("base_model") or plan.get("base_model")
    datasets = _list(datasets or settings.get("datasets"))
    source = repo_id or "path/to/folder"  # never the folder: a card may be published as it stands
    title = Path(repo_id or folder or "Pruned model").name
    command, recipe = command or settings.get("command"), recipe or settings.get("recipe_yaml")
    metadata = _metadata(told, title, task, base, datasets, license or settings.get("license"), tags, metrics)
    text = _render(
        metadata=metadata,
        title=title,
        source=source,
        base_model=_mention(base),
        loader=_loader(architecture),
        stock=not plan or bool(plan.get("stock")),
        plain=bool(plan.get("stock")),
        tokenizer=_has_tokenizer(folder) if tokenizer is None else tokenizer,
        plot=plot,
        onnx=list(onnx),
        command=command,
        recipe=recipe.strip() if recipe else None,
        making=_making(settings, plan),
        **_numbers(told, plan, "patch" if (task or "").startswith("image") else "token"),
    )
    return without_tokens(text)


def _render(**facts: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    home = FileSystemLoader(shipped("model_cards"))
    # Markdown, not HTML: escaping would spoil YAML and code.
    environment = Environment(loader=home, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("card.md.j2").render(**facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _metadata(
    told: Mapping[str, Any],
    title: str,
    task: str | None,
    base: str | None,
    datasets: Sequence[str],
    license: str | None,
    tags: Sequence[str],
    metrics: Sequence[str],
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        base_model=base if _on_hub(base) else None,
        pipeline_tag=task,
        license=license,
        datasets=[name for name in datasets if _on_hub(name)] or None,
        metrics=list(metrics) or list(told.get("metrics") or {}) or None,
        tags=["pruned", "hf_prune", *tags],
        model_name=title,
        eval_results=_results(told.get("metrics") or {}, task, datasets) or None,
    )
    if data.eval_results is None:
        data.model_name = None  # a key of the model-index only
    return str(data.to_yaml())


def _results(metrics: Mapping[str, Mapping[str, float]], task: str | None, datasets: Sequence[str]) -> list[EvalResult]:
    """Return the model-index; it demands a task and a dataset, so without them there is none."""
    from huggingface_hub import EvalResult

    if task is None or not datasets:
        return []
    name = _mention(datasets[0])
    values = {metric: value["pruned"] for metric, value in metrics.items() if _finite(value.get("pruned"))}
    return [
        EvalResult(task_type=task, dataset_type=name, dataset_name=name, metric_type=metric, metric_value=float(value))
        for metric, value in values.items()
    ]


# -- what the card tells in numbers ------------------------------------------------------------------------------------

_FIGURES = (
    ("Parameters", "parameters", "{:,}"),
    ("Prunable MACs per {per}", "prunable_macs", "{:,}"),
    ("MACs of the whole model at {at}", "macs", "{:,}"),
    ("Weights on disk, MB", "size_mb", "{:.4g}"),
)
_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}


def _numbers(told: Mapping[str, Any], plan: Mapping[str, Any], per: str) -> dict[str, Any]:
    dense, pruned = told.get("dense") or {}, told.get("pruned") or {}
    kept, units = told.get("kept") or {}, told.get("units") or {}
    scores = _score_rows(told.get("metrics") or {})
    timed = _latency_rows(dense.get("latency_ms") or {}, pruned.get("latency_ms") or {})
    zeros = _zeros(pruned) - _zeros(dense)
    counts = {name: f"{len(numbers)} of {units[name]}" for name, numbers in kept.items() if name in units}
    return {
        "rows": [*scores, *_figure_rows(dense, pruned, per), *timed],
        # Counts hold anywhere; only what was run on some input, somewhere, needs its conditions told.
        "conditions": _conditions(pruned or dense, told.get("settings") or {}) if timed else "",
        "timed": bool(timed),
        "scored": bool(scores),
        "removed": bool(dense and pruned and pruned["parameters"] < dense["parameters"]),
        # A few zeros are in every model (fresh biases, the padding row); only what pruning added is worth a warning.
        "zeros": f"{_zeros(pruned):.0%}" if zeros > 0.01 else None,
        "kept": counts or dict(plan.get("kept") or {}),
        "summary": _summary(kept, units),
    }


def _score_rows(metrics: Mapping[str, Mapping[str, float]]) -> list[_Row]:
    rows = []
    for name, value in metrics.items():
        dense, pruned = value.get("dense"), value.get("pruned")
        change = f"{pruned - dense:+.3g}" if _finite(dense) and _finite(pruned) else ""
        rows.append(_Row(name, _cell(dense, "{:.4g}"), _cell(pruned, "{:.4g}"), change))
    return [row for row in rows if row.dense or row.pruned]


def _figure_rows(dense: Mapping[str, Any], pruned: Mapping[str, Any], per: str) -> list[_Row]:
    rows = []
    for what, key, form in _FIGURES:
        before, after = dense.get(key), pruned.get(key)
        change = f"{after / before - 1:+.0%}" if before and after is not None else ""
        rows.append(
            _Row(what.format(per=per, at=_input(pruned or dense)), _cell(before, form), _cell(after, form), change)
        )
    return [row for row in rows if row.dense or row.pruned]


def _latency_rows(dense: Mapping[str, float], pruned: Mapping[str, float]) -> list[_Row]:
    rows = []
    for runtime in dict.fromkeys([*dense, *pruned]):
        before, after = dense.get(runtime), pruned.get(runtime)
        change = f"{before / after:.2f}x speed" if before and after else ""
        what = f"Latency, {_RUNTIMES.get(runtime, runtime)}, ms"
        rows.append(_Row(what, _cell(before, "{:.4g}"), _cell(after, "{:.4g}"), change))
    return rows


def _conditions(measured: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    threads = measured.get("threads")
    parts = [_input(measured)] if measured.get("batch") else []
    parts += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
    parts += [_words(settings["hardware"])] if settings.get("hardware") and parts else []
    return ", ".join(parts)


def _input(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {measured[key]}" for key in ("batch", "length") if measured.get(key))


def _zeros(measured: Mapping[str, Any]) -> float:
    """Share of weights that are zero, in [0, 1]."""
    parameters, nonzero = measured.get("parameters"), measured.get("nonzero")
    return 1 - nonzero / parameters if parameters and nonzero is not None else 0.0


def _summary(kept: Mapping[str, Sequence[int]], units: Mapping[str, int]) -> str:
    """Return such as ``20 of 72 heads and 3,021 of 9,216 neurons``."""
    stay: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for name, numbers in kept.items():
        if name in units:
            unit = name.rsplit(".", 1)[-1].replace("_", " ")
            stay[unit] += len(numbers)
            whole[unit] += units[name]
    return " and ".join(f"{stay[unit]:,} of {whole[unit]:,} {unit}" for unit in whole)


def _making(settings: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, str]:
    told = {"Recipe": settings.get("recipe") or plan.get("recipe")}
    told |= {key.capitalize(): settings.get(key) for key in ("sparsity", "seed", "hardware", "versions")}
    version = plan.get("library_version")
    if version and "hf_prune" not in str(told["Versions"]):
        told["Library"] = f"hf_prune {version}"
    if not any(value not in (None, "", {}) for value in told.values()):
        return {"Tool": "hf_prune"}
    return {what: _words(value) for what, value in told.items() if value not in (None, "", {})}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(_words, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(value: Any, form: str) -> str:
    return form.format(value) if _finite(value) else ""


def _finite(value: Any) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


# -- small look-ups ----------------------------------------------------------------------------------------------------


def as_dict(report: Report | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a report's fields; an empty mapping where there is no report."""
    if report is None or isinstance(report, Mapping):
        return report or {}
    return report.to_dict()


def _config(folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    path = Path(folder or "") / "config.json"
    return dict(json.loads(path.read_text("utf-8"))) if folder is not None and path.is_file() else {}


def _has_tokenizer(folder: str | os.PathLike[str] | None) -> bool:
    return folder is not None and (Path(folder) / "tokenizer_config.json").is_file()


def _head(architecture: str) -> str:
    """Return what follows ``For`` in a class name: ``BertForMaskedLM`` -> ``MaskedLM``."""
    match = re.search(r"For([A-Z]\w+)$", architecture)
    return match[1] if match else ""


def _loader(architecture: str) -> str:
    head = _head(architecture)
    return f"AutoModelFor{head}" if head in _TASKS else architecture or "AutoModel"


def _on_hub(name: str | None) -> bool:
    """Whether a name can be a repository's; folders on this machine must not reach the metadata."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return False
    return not Path(name or "").exists()


def _mention(name: str | None) -> str | None:
    """Return a name for readers: a folder's own name instead of its path."""
    return name if name is None or _on_hub(name) else Path(name).name


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def without_tokens(text: str) -> str:
    """Blank out access tokens; a command line or a setting may carry one, and what is published stays public."""
    return _TOKEN.sub("hf_***", text)
