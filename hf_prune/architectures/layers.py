"""Lists of whole layers, and which number of a config says how long they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..structure import Group
from .conventions import BRANCHLESS, LAYER_COUNTS
from .naming import Names, layer_numbers
from .site import Refusal, Site, setting


def layer_groups(site: Site, names: Names, paths: list[str]) -> Iterator[Group | Refusal]:
    """Yield each list of layers whose length the config states.

    Args:
        site: The model.
        names: Our names.
        paths: Every place in a layer; lists in which there is none are found by their length alone.
    """
    lists: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        lists.setdefault(".".join(parts[: layer_numbers(path)[-1]]), path)
    known = {names.layers(path) for path in paths}
    lists |= {path.rpartition(".0.")[0]: path for path in _plain_lists(site) if names.layers(path) not in known}
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
        if number and type(module[0]).__name__ in BRANCHLESS:
            yield Refusal(name, BRANCHLESS[type(module[0]).__name__])
        elif any(setting(config, "is_heterogeneous") for config in configs):
            yield Refusal(name, "its config states layers one by one")
        elif stage is not None and len({frozenset(dict(one.named_parameters())) for one in module.children()}) > 1:
            yield Refusal(name, "its layers are not alike: where one changes the size, it cannot be skipped")
        elif number and any(layer_count(config, parts[0], number, stage) for config in configs):
            modules = tuple(f"{site.prefix}{path}.{i}" for i in range(number))
            yield Group(name, "layer", number, (), modules=modules)
        else:
            yield Refusal(name, "no number of the config says how many there are")


LISTS = (nn.ModuleList, nn.Sequential)
INNER_LISTS = ("layers", "blocks", "stage")  # what a stage calls its layers: itself it is none, as it changes the size


def _plain_lists(site: Site) -> Iterator[str]:
    """Yield an example place of each list of equal layers that the config counts, known blocks in them or not."""
    for path, module in site.modules.items():
        alike = isinstance(module, nn.ModuleList) and len({type(one) for one in module}) == 1
        stages = alike and any(isinstance(getattr(module[0], name, None), LISTS) for name in INNER_LISTS)
        if (
            alike
            and not stages
            and not any(part.isdigit() for part in path.split("."))
            and layer_count(site.config(path), "", len(module))
        ):
            yield f"{path}.0.layer"


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
        value = setting(config, name)
        if stage is not None and isinstance(value, (list, tuple)) and stage < len(value) and value[stage] == units:
            return name
        if stage is None and value == units:
            return name
    return None
