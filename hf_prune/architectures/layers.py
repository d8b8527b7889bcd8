"""Lists of whole layers, and which number of a config says how long they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..structure import Group
from .conventions import LAYER_COUNTS
from .naming import Names, layer_numbers
from .site import Refusal, Site


def layer_groups(site: Site, names: Names, paths: list[str]) -> Iterator[Group | Refusal]:
    """Yield each list of layers whose length the config states."""
    lists: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        lists.setdefault(".".join(parts[: layer_numbers(path)[-1]]), path)
    called = [names.layers(example) for example in lists.values()]
    for path, example in lists.items():
        if called.count(names.layers(example)) > 1:
            yield Refusal(names.layers(example), f"its layers lie in several lists, one of them {path}")
            continue
        name, module = names.layers(example), site.modules[path]
        number = len(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else 0
        parts = name.split(".")
        stage = int(parts[parts.index("stages") + 1]) if "stages" in parts else None
        configs = list(configs_of(site.root, site.prefix + path))
        if stage is not None and len({frozenset(dict(one.named_parameters())) for one in module.children()}) > 1:
            yield Refusal(name, "its layers are not alike: where one changes the size, it cannot be skipped")
        elif number and any(layer_count(config, parts[0], number, stage) for config in configs):
            modules = tuple(f"{site.prefix}{path}.{i}" for i in range(number))
            yield Group(name, "layer", number, (), modules=modules)
        else:
            yield Refusal(name, "no number of the config says how many there are")


def configs_of(model: nn.Module, path: str) -> Iterator[Any]:
    """Yield each config object that the modules around a path hold, the nearest first."""
    parts, seen = path.split("."), list[Any]()
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if config is not None and not any(config is other for other in seen):
            seen.append(config)
            yield config


def layer_count(config: Any, tower: str, units: int, stage: int | None = None) -> str | None:
    """Return the attribute of a config that states this number of layers, or ``None``."""
    for name in LAYER_COUNTS.get(tower, ()) + LAYER_COUNTS[""]:
        value = getattr(config, name, None)
        if stage is not None and isinstance(value, (list, tuple)) and stage < len(value) and value[stage] == units:
            return name
        if stage is None and value == units:
            return name
    return None
