"""What the Hub checks about a card's metadata, as far as our cards could fail it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

REPO_NAME = re.compile(r"([\w.-]+/)?[\w.-]{1,96}")
# every key of the Hub's metadata that a card of ours may have
KEYS = {
    *("base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_name"),
    *("license_link", "metrics", "model-index", "pipeline_tag", "tags"),
}
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def card_faults(content: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings of a card's metadata, the checks of the Hub that our cards could fail."""
    data = front_matter(content)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    named = [*_listed(data.get("base_model")), *_listed(data.get("datasets"))]
    errors = [f"not a valid repository name: {name!r}" for name in named if not REPO_NAME.fullmatch(str(name))]
    for key in ("tags", "metrics", "datasets"):
        if key in data and not all(isinstance(item, str) for item in _listed(data[key])):
            errors.append(f'"{key}" must be strings')
    errors += [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag") if _odd(data, key)]
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    unknown = [f'"{key}" is not a key of the Hub' for key in data if key not in KEYS]
    return errors + _index_faults(data.get("model-index", [])), unknown


def _index_faults(index: list[dict[str, Any]]) -> list[str]:
    faults = []
    for where, model in enumerate(index):
        faults += [] if isinstance(model.get("name"), str) else [f'"model-index[{where}].name" is required']
        for result in model.get("results", []):
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            faults += [f'"{a}.{b}" is required' for a, b in wanted if not result.get(a, {}).get(b)]
            values = [metric.get("value") for metric in result.get("metrics", [])]
            faults += [] if values and None not in values else ['"metrics[].value" is required']
    return faults


def _odd(data: Mapping[str, Any], key: str) -> bool:
    return key in data and not isinstance(data[key], str)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def front_matter(content: str) -> Any:
    """Return a card's YAML header as Python's types; ``None`` where there is none."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None
