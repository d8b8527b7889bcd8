"""Where a model's units are: `find_groups`, from naming conventions (data) or a family's own function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from torch import nn

from ..errors import PruningError, UnsupportedModelError, did_you_mean
from ..registry import Registry, load_entry_points
from ..structure import Counter, Group, Kind, Shapes, Slice, matrix_entries
from .conventions import (
    ATTENTIONS,
    CROSS_ATTENTIONS,
    FEED_FORWARDS,
    HEAD_COUNTS,
    HEAD_SIZES,
    HEAD_WIDTHS,
    HEADS_PER_KV,
    KV_COUNTS,
    TOWERS,
    WIDE_NORMS,
    Attention,
    FeedForward,
)

ARCHITECTURES: Registry[Callable[[nn.Module], list[Group]]] = Registry("architecture")
FinderFunction = Callable[[nn.Module], list[Group]]


def register_architecture(*model_types: str) -> Callable[[FinderFunction], FinderFunction]:
    """Say where the units of these model types are, where the naming conventions do not.

    Args:
        *model_types: Values of ``config.model_type``.

    Returns:
        A decorator for a function from the model to its groups, with parameter names as in
        ``model.named_parameters()``.

    Example:
        >>> @register_architecture("my_model")
        ... def groups_of_my_model(model):
        ...     slices = (Slice("up.weight", 0, 1), Slice("down.weight", 1, 1))
        ...     return [Group("layers.0.mlp.neurons", "neuron", 4, slices)]
    """

    def register(function: FinderFunction) -> FinderFunction:
        for model_type in model_types:
            ARCHITECTURES.add(model_type, function)
        return function

    return register


def find_groups(model: nn.Module, kinds: Sequence[Kind] | None = None) -> list[Group]:
    """Find the units of a model that can be removed exactly.

    Args:
        model: A transformers model, dense or already shrunk, on any device (``meta`` too).
        kinds: Only groups of these kinds; ``None`` for all. An attention with fewer key/value heads than query heads
            offers both ``kv_group`` and ``head`` groups.

    Returns:
        Groups in layer order, attention before feed-forward.

    Raises:
        UnsupportedModelError: Nothing was found: says what was looked for, and the one file to write.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1))
        >>> [(group.name, group.units) for group in find_groups(model)]
        [('layers.0.attention.heads', 12), ('layers.0.mlp.neurons', 3072)]
    """
    for kind in kinds or ():
        if kind not in get_args(Kind):
            hint = did_you_mean(kind, get_args(Kind))
            raise PruningError(f"kinds must be among {', '.join(get_args(Kind))}.{hint} Received: '{kind}'.")
    load_entry_points()
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    found = ARCHITECTURES[model_type](model) if model_type in ARCHITECTURES else _by_convention(model)
    found = [group for group in found if kinds is None or group.kind in kinds]
    if not found:
        raise UnsupportedModelError(_nothing_found(model, kinds))
    return found


def live_shapes(model: nn.Module) -> Shapes:
    """Return the shape of every parameter and buffer by name."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def prunable_macs(model: nn.Module) -> int:
    """Count multiply-accumulates per token in all matrices that pruning can cut.

    Those are the projections and feed-forward parts. Attention's own products (queries with keys) depend on the
    length, and are left out.
    """
    return matrix_entries(find_groups(model), live_shapes(model))


def _by_convention(model: nn.Module) -> list[Group]:
    """Match every module of the base model against the tables of naming conventions."""
    base = getattr(model, "base_model", model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    modules = dict(base.named_modules())
    blocks = [(path, row) for path in modules for row in (*ATTENTIONS, *FEED_FORWARDS) if _matches(modules, path, row)]
    blocks = [(path, row) for path, row in blocks if any(part.isdigit() for part in path.split("."))]
    many = len({_tower(path) for path, _ in blocks}) > 1
    groups: list[Group] = []
    for path, row in blocks:
        place = _place(path, many)
        if isinstance(row, Attention):
            groups += _attention_groups(modules, prefix, path, row, place)
        else:
            groups += _feed_forward_groups(modules, prefix, path, row, place)
    names = [group.name for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UnsupportedModelError(f"Two places of {type(model).__name__} would both be called '{twice}'. {_ONE_FILE}")
    return sorted(groups, key=lambda group: _order(group.name))


def _matches(modules: dict[str, Any], path: str, row: Attention | FeedForward) -> bool:
    names = (row.query, row.key, row.value, row.output) if isinstance(row, Attention) else (*row.up, row.down)
    return all(isinstance(modules.get(_join(path, name)), nn.Linear) for name in names)


def _attention_groups(modules: dict[str, Any], prefix: str, path: str, row: Attention, place: str) -> Iterator[Group]:
    """Yield the heads of one attention; under grouped queries its KV groups, and the query heads inside them."""
    query, key, value, output = (_join(path, name) for name in (row.query, row.key, row.value, row.output))
    holder = query.rpartition(".")[0]
    size = next((getattr(modules[m], a) for m in (holder, path) for a in HEAD_SIZES if hasattr(modules[m], a)), None)
    if size is None or _has_wide_norm(modules, path, size):
        return
    heads, kv_heads = modules[query].weight.shape[0] // size, modules[key].weight.shape[0] // size
    place += ".cross_attention" if any(part in CROSS_ATTENTIONS for part in path.split(".")) else ".attention"

    def slices(width: int, rows: Sequence[str]) -> tuple[Slice, ...]:
        inputs = [part for name in rows for part in _row_slices(modules, prefix, name, width)]
        return (*inputs, Slice(f"{prefix}{output}.weight", 1, width))

    def counters(attributes: Sequence[str], per_unit: int = 1, of: str = "units") -> list[Counter]:
        holders = [m for m in dict.fromkeys((path, holder)) for a in attributes if hasattr(modules[m], a)]
        return [Counter(prefix + m, a, per_unit, of) for m in holders for a in attributes if hasattr(modules[m], a)]  # type: ignore[arg-type]

    if not (heads != kv_heads or _grouped(modules[""], f"{place}.kv_groups")):
        told = counters(HEAD_COUNTS) + counters(KV_COUNTS) + counters(HEAD_WIDTHS, size)
        yield Group(f"{place}.heads", "head", heads, slices(size, (query, key, value)), tuple(told))
        return
    per_kv = heads // kv_heads
    kv_rows = [part for name in (key, value) for part in _row_slices(modules, prefix, name, size)]
    told = counters(KV_COUNTS) + counters(HEAD_COUNTS, per_kv)
    yield Group(f"{place}.kv_groups", "kv_group", kv_heads, (*kv_rows, *slices(size * per_kv, (query,))), tuple(told))
    told = counters(HEAD_COUNTS) + counters(HEADS_PER_KV, of="units_per_part")
    yield Group(f"{place}.heads", "head", heads, slices(size, (query,)), tuple(told), parts=kv_heads)


def _grouped(base: nn.Module, name: str) -> bool:
    """Whether queries are grouped although as many heads as key/value heads are left here."""
    config = getattr(base, "config", None)
    dense = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    removed = (getattr(config, "pruning_config", None) or {}).get("kept", {})
    return dense != getattr(config, "num_attention_heads", None) or name in removed


def _feed_forward_groups(
    modules: dict[str, Any], prefix: str, path: str, row: FeedForward, place: str
) -> Iterator[Group]:
    """Yield the neurons of one feed-forward block."""
    down = modules[_join(path, row.down)]
    widths = {modules[_join(path, name)].weight.shape[0] for name in row.up} | {down.weight.shape[1]}
    if len(widths) > 1 or _has_wide_norm(modules, path, 0):
        return
    rows = [part for name in row.up for part in _row_slices(modules, prefix, _join(path, name), 1)]
    columns = Slice(f"{prefix}{_join(path, row.down)}.weight", 1, 1)
    told = [Counter(prefix + path, "intermediate_size")] if hasattr(modules[path], "intermediate_size") else []
    yield Group(f"{place}.mlp.neurons", "neuron", widths.pop(), (*rows, columns), tuple(told))


def _row_slices(modules: dict[str, Any], prefix: str, name: str, width: int) -> Iterator[Slice]:
    """Yield the rows, and where there is a bias its entries, that one unit owns of a Linear."""
    yield Slice(f"{prefix}{name}.weight", 0, width)
    if modules[name].bias is not None:
        yield Slice(f"{prefix}{name}.bias", 0, width)


def _has_wide_norm(modules: dict[str, Any], path: str, size: int) -> bool:
    """Whether a norm runs over all units at once: removing one would change the others."""
    norms = [modules.get(_join(path, name)) for name in WIDE_NORMS]
    return any(
        norm is not None and getattr(norm, "weight", None) is not None and norm.weight.numel() != size for norm in norms
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tower(path: str) -> str:
    """Return what comes before the first layer number."""
    parts = path.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])


def _place(path: str, many_towers: bool) -> str:
    """Return our name of the layer: ``layers.3``, ``decoder.layers.3``, ``stages.1.layers.0``."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    layer = ".".join([*(f"stages.{n}" for n in numbers[:-1]), f"layers.{numbers[-1]}"])
    tower = next((ours for theirs, ours in TOWERS.items() if theirs in path.split(".")), "") if many_towers else ""
    return f"{tower}.{layer}" if tower else layer


def _order(name: str) -> tuple[object, ...]:
    """Sort by tower and layer number; attention, then cross-attention, then feed-forward; KV groups before heads."""
    rank = {"attention": 0, "cross_attention": 1, "mlp": 2, "kv_groups": 0}
    return tuple((int(part), "") if part.isdigit() else (rank.get(part, 5), part) for part in name.split("."))


_ONE_FILE = "Declare its groups in one function under hf_prune.register_architecture(model_type)."


def _nothing_found(model: nn.Module, kinds: Sequence[Kind] | None) -> str:
    rows = [f"({row.query}, {row.key}, {row.value}, {row.output})" for row in ATTENTIONS]
    rows += [f"({', '.join(row.up)}, {row.down})" for row in FEED_FORWARDS]
    what = "prunable groups" if kinds is None else f"groups of kind {', '.join(kinds)}"
    looked = f"Looked in its numbered layers for Linear children {'; '.join(rows)}."
    return f"{type(model).__name__} has no {what}. {looked} {_ONE_FILE}"
