"""Neurons of feed-forward blocks that follow a naming convention, and experts with their routers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..structure import Group, Slice
from .conventions import (
    BRANCHLESS,
    CHOSEN,
    EXPERT_COUNTS,
    FEED_FORWARD_BESIDE,
    FEED_FORWARD_WIDTHS,
    FEED_FORWARDS,
    INSEPARABLE,
    ROUTERS,
    WIDE_NORMS,
    FeedForward,
)
from .site import Refusal, Site, first_number, setting, source_of


def find_feed_forward(site: Site, path: str) -> FeedForward | None:
    """Return the convention that this module's children follow, with paths from the base model."""
    for row in FEED_FORWARDS:
        beside = FEED_FORWARD_BESIDE.get(row.up[0])
        if beside and site.child(path, beside) not in site.modules:
            continue
        up, down = tuple(site.child(path, name) for name in row.up), site.child(path, row.down)
        between = tuple(name for one in row.between if (name := site.child(path, one)) in site.modules)
        if len(between) == len(row.between) and all(site.is_projection(one) for one in (*up, down)):
            return FeedForward(up, down, between)
    return None


def feed_forward_groups(site: Site, path: str, row: FeedForward, place: str) -> Iterator[Group | Refusal]:
    """Yield the neurons of one feed-forward block."""
    reason = INSEPARABLE.get(type(site.modules[path]).__name__)
    if reason:
        yield Refusal(place, reason)
        return
    units, widths = site.reads(row.down), {site.width(one) for one in row.up}
    if widths == {2 * units} and len(row.up) == 1 and units:
        rows = [part for half in (0, units) for part in site.rows(row.up[0], 1, half)]  # gate and up, one after another
    elif widths == {units}:
        rows = [part for one in row.up for part in site.rows(one, 1)]
    else:
        yield Refusal(place, f"{row.down} reads {units} neurons, {', '.join(row.up)} give {sorted(widths)}")
        return
    for one in row.between:
        rows += list(site.rows(one, 1))
    wide = wide_norm(site, path)
    if wide:
        yield Refusal(
            place, f"{wide.rpartition('.')[2]} is a norm over all neurons: removing one would change the others"
        )
        return
    strange = _strange(site, path, row, units)
    if strange:
        yield Refusal(place, f"{strange} is not known to belong to neurons")
        return
    told = site.counters((path,), FEED_FORWARD_WIDTHS, units)
    least = int(type(site.modules[path]).__name__ in BRANCHLESS)
    yield Group(f"{place}.neurons", "neuron", units, (*rows, site.columns(row.down, 1)), tuple(told), least=least)


def wide_norm(site: Site, path: str) -> str | None:
    """Return the norm over all neurons of a feed-forward block that has one."""
    return next((one for name in WIDE_NORMS if _has_weight(site, one := site.child(path, name))), None)


def _strange(site: Site, path: str, row: FeedForward, units: int) -> str | None:
    """Return a tensor as wide as the neurons that no convention names; only where the module is nothing else."""
    if path.rpartition(".")[2].isdigit() or not units:
        return None
    known = tuple(f"{one}." for one in (*row.up, row.down, *row.between))
    tensors = {site.child(path, name): tensor for name, tensor in site.tensors(path).items()}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(known)}
    return next((name for name, tensor in others.items() if units in tensor.shape or 2 * units in tensor.shape), None)


def find_experts(site: Site, path: str) -> bool:
    """Whether a module holds experts: a list of feed-forward blocks, or tensors that stack them."""
    module = site.modules[path]
    if isinstance(module, nn.ModuleList):
        return path.rpartition(".")[2] == "experts" and len(module) > 0
    stacked = [tensor for tensor in module.parameters(recurse=False) if tensor.ndim == 3]
    return len(stacked) >= 2 and path.rpartition(".")[2] == "experts"


def expert_groups(site: Site, path: str, place: str) -> Iterator[Group | Refusal]:
    """Yield the neurons that all experts of one block share the number of, and the experts with their router rows.

    Args:
        site: The model.
        path: Of the experts.
        place: Name of the experts' place, ``layers.0.experts``.
    """
    module = site.modules[path]
    experts: tuple[str, ...] = ()
    slices: list[Slice] = []
    if isinstance(module, nn.ModuleList):
        experts, neurons = tuple(f"{site.prefix}{path}.{i}" for i in range(len(module))), _listed(site, path)
    else:
        neurons, slices = _stacked(site, path)
    if neurons is None:
        yield Refusal(place, "its experts follow no known convention")
    else:
        units, of_neurons, told, outputs = neurons
        multiple = ALIGNED if units % ALIGNED == 0 else units
        yield Group(
            f"{place}.neurons", "neuron", units, of_neurons, told, outputs=outputs, multiple=multiple, least=ALIGNED
        )
    yield _experts(site, path, place, experts, slices)


def _experts(site: Site, path: str, place: str, experts: tuple[str, ...], slices: list[Slice]) -> Group | Refusal:
    around = path.rpartition(".")[0]
    number = len(experts) or int(next(iter(site.modules[path].parameters(recurse=False))).shape[0])
    router = next((one for name in ROUTERS if _has_weight(site, one := site.child(around, name))), None)
    if router is None or site.modules[router].weight.shape[0] != number:
        return Refusal(place, "no router with one row for each expert was found")
    if setting(site.config(path), "zero_expert_num"):
        return Refusal(place, "its router also chooses among experts that do nothing")
    rows = [Slice(f"{site.prefix}{router}.weight", 0, 1)]
    for name, tensor in site.tensors(around).items():
        if name.startswith(path.removeprefix(f"{around}.")) or f"{around}.{name}" == f"{router}.weight":
            continue
        if tensor.numel() == number and tensor.shape[-1] == number:
            rows.append(Slice(f"{site.prefix}{around}.{name}", tensor.ndim - 1, 1))
    holders = [around, path, router, router.rpartition(".")[0]]
    chosen = site.attribute(holders, CHOSEN) or first_number(site.config(path), CHOSEN)
    if chosen is None or first_number(site.config(path), ("n_group", "num_expert_group")) not in (None, 1):
        return Refusal(place, "its router chooses among groups of experts")
    told = site.counters(holders, EXPERT_COUNTS, number)
    core = site.prefix + router
    return Group(
        place, "expert", number, (*slices, *rows), tuple(told), outputs=0, least=chosen, core=core, modules=experts
    )


def _listed(site: Site, path: str) -> Any:
    """Return units, slices of the neurons that have the same number in every expert of a list."""
    rows, columns, units = list[Slice](), list[Slice](), set[int]()
    for number in range(len(site.modules[path])):
        one = f"{path}.{number}"
        found = find_feed_forward(site, one)
        if found is None:
            return None
        for group in feed_forward_groups(site, one, found, path):
            if isinstance(group, Refusal):
                return None
            rows += group.slices[:-1]
            columns.append(group.slices[-1])
            units.add(group.units)
    return None if len(units) != 1 else (units.pop(), (*rows, *columns), (), len(columns))


def _stacked(site: Site, path: str) -> tuple[Any, list[Slice]]:
    """Return units and slices of the neurons, and what one expert owns, of tensors that stack all experts."""
    module = site.modules[path]
    tensors = dict(module.named_parameters(recurse=False))
    slices = [Slice(f"{site.prefix}{path}.{name}", 0, 1) for name, tensor in tensors.items() if tensor.ndim > 1]
    up = tensors.get("gate_up_proj", tensors.get("up_proj"))
    down = tensors.get("down_proj")
    if up is None or down is None or set(tensors) - _STACKED:
        return None, slices
    transposed = bool(getattr(module, "is_transposed", _is_transposed(up, down)))
    axis_up, axis_down = (2, 1) if transposed else (1, 2)
    units, double = int(down.shape[axis_down]), "gate_up_proj" in tensors
    names = [name for name in ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias") if name in tensors]
    rows: list[Slice] = []
    for name in names:
        axis = axis_up if tensors[name].ndim == 3 else 1
        full = f"{site.prefix}{path}.{name}"
        if not double:
            rows.append(Slice(full, axis, 1))
        elif "::2" in source_of(type(module)):  # GPT-OSS: gate and up of each neuron side by side
            rows.append(Slice(full, axis, 2))
        else:
            rows += [Slice(full, axis, 1, half) for half in (0, units)]
    told = tuple(site.counters((path,), (*FEED_FORWARD_WIDTHS, "expert_dim", "intermediate_dim"), units))
    return (units, (*rows, Slice(f"{site.prefix}{path}.down_proj", axis_down, 1)), told, 0), slices


ALIGNED = 8  # the kernel for stacked experts wants rows of whole 16 bytes: 8 numbers of bfloat16
_STACKED = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}


def _is_transposed(up: Any, down: Any) -> bool:
    """Whether a stack holds (experts, in, out) rather than (experts, out, in)."""
    return bool((up.shape[1] == down.shape[2] and up.shape[2] != down.shape[1]) or up.shape[2] == 2 * down.shape[1])


def _has_weight(site: Site, path: str) -> bool:
    return getattr(site.modules.get(path), "weight", None) is not None
