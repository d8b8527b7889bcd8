"""Match every module of a model against the naming conventions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..plan import BLOCK, read_record
from ..structure import Group, Slice
from .attention import AttentionModules, attention_groups, find_attention, residual_norm
from .conventions import BRANCHLESS, INSEPARABLE
from .convolution import convolution_groups, convolution_places
from .feed_forward import expert_groups, feed_forward_groups, find_experts, find_feed_forward, wide_norm
from .layers import layer_groups
from .naming import Names, layer_numbers, order
from .site import STATISTICS, Refusal, Site, setting

ONE_FILE = "Declare its groups in one function under hf_prune.register_architecture(model_type)."


@dataclass
class Found:
    """What a model offers, and what it cannot offer and why."""

    groups: list[Group] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def add(self, found: Group | Refusal) -> None:
        """Sort a result in."""
        if isinstance(found, Group):
            self.groups.append(found)
        else:
            self.refusals.append(found)


def by_convention(model: nn.Module) -> Found:
    """Return the units of every block that follows a convention, and the branches and layers they lie in.

    Raises:
        UnsupportedModelError: Two places would have the same name.
    """
    site, result = Site(model), Found()
    blocks = list(_blocks(site))
    record = read_record(model)
    removed = {name: kept for name, (kept, _) in record.items() if name.rpartition(".")[2] == "layers"}
    names = Names([*(path for path, _ in blocks), *convolution_places(site)], removed)
    places = _places(names, blocks)
    for (path, block), place in zip(blocks, places):
        if isinstance(block, AttentionModules):
            grouped = f"{place}.kv_groups" in record or _grouped(site.config(path), f"{place}.kv_groups")
            units = list(attention_groups(site, block, place, grouped))
        elif block is None:
            units = list(expert_groups(site, path, place))
        else:
            units = list(feed_forward_groups(site, path, block, place))
        for one in (*units, _branch_of(site, path, block, place, units)):
            result.add(one)
    for one in (*convolution_groups(site, names), *layer_groups(site, names, [path for path, _ in blocks])):
        result.add(one)
    result.refusals += _unknown_attentions(site, names, [path for path, _ in blocks])
    instead = {group.place for group in result.groups if group.kind == "channel"}
    result.refusals = [one for one in result.refusals if one.place not in instead]
    _check_names(model, result.groups)
    result.groups = join_tied(model, result)
    result.groups.sort(key=lambda group: order(group.name))
    return result


def _unknown_attentions(site: Site, names: Names, known: list[str]) -> Iterator[Refusal]:
    """Yield modules that call themselves attention, and of which no convention knows the projections."""
    for path, module in site.modules.items():
        if "Attention" not in type(module).__name__ or not layer_numbers(path):
            continue
        around = [one for one in known if one == path or one.startswith(f"{path}.") or path.startswith(f"{one}.")]
        linears = [name for name, child in module.named_children() if site.is_projection(site.child(path, name))]
        if linears and not around:
            place = f"{names.layer(path)}.attention"
            unknown = f"its projections ({', '.join(linears)}) follow no known convention"
            yield Refusal(place, INSEPARABLE.get(type(module).__name__, unknown))


def _blocks(site: Site) -> Iterator[tuple[str, Any]]:
    """Yield the path and the convention of every block inside numbered layers; ``None`` stands for experts."""
    experts = [path for path in site.modules if layer_numbers(path) and find_experts(site, path)]
    inside = tuple(f"{path}." for path in experts)
    for path in site.modules:
        if not layer_numbers(path) or path.startswith(inside):
            continue
        if path in experts:
            yield path, None
            continue
        attention = find_attention(site, path)
        if attention is not None:
            yield path, attention
            continue
        row = find_feed_forward(site, path)
        if row is not None:
            yield path, row


def _places(names: Names, blocks: list[tuple[str, Any]]) -> list[str]:
    """Name every block: ``layers.3.attention``; where a layer has several of a sort, by what they are called there."""
    plain = []
    for path, block in blocks:
        if isinstance(block, AttentionModules):
            sort = "cross_attention" if names.is_cross(path) else "attention"
        else:
            sort = "mlp" if block is not None else "experts"
        plain.append(f"{names.layer(path)}.{sort}")
    named: list[str] = []
    for (path, _), place in zip(blocks, plain):
        inside = names.inside(path)
        if plain.count(place) > 1:
            layer = place.rpartition(".")[0]
            place = f"{layer}.{inside}" if inside else place
            if _other_list(path, [p for (p, _), same in zip(blocks, plain) if same == plain[len(named)]]):
                parts = path.split(".")
                at = layer_numbers(path)[-1]
                place = place.replace("layers.", f"{parts[at - 1]}.", 1)
        named.append(place)
    return named


def _other_list(path: str, same: list[str]) -> bool:
    """Whether a place lies in another list of layers than the first one of the same name."""
    lists = [one.split(".")[: layer_numbers(one)[-1]] for one in (path, same[0])]
    return lists[0] != lists[1]


def _own(site: Site, core: str, output: str) -> list[str]:
    """Return the tensors of a core, without its output projection's."""
    parameters = site.tensors(core, buffers=False)
    names = [site.child(core, name) for name in site.tensors(core) if name in parameters or name.endswith(STATISTICS)]
    return [name for name in names if not (output and name.startswith(f"{output}."))]


def _branch_of(site: Site, path: str, block: Any, place: str, units: list[Group | Refusal]) -> Group | Refusal:
    """Return a block's whole branch."""
    name, refused = f"{place}.branch", any(isinstance(one, Refusal) for one in units)
    if block is None:
        return _branch(site, name, path.rpartition(".")[0], None)
    reason = BRANCHLESS.get(type(site.modules[block.core if isinstance(block, AttentionModules) else path]).__name__)
    if reason:
        return Refusal(name, reason)
    if isinstance(block, AttentionModules):
        if residual_norm(site, block.core):
            return Refusal(name, "residual and norm, or pooling, lie inside the attention's own module")
        return _branch(site, name, block.core, block.output)
    if refused and not path.rpartition(".")[2].isdigit():
        return _branch(site, name, path, None)
    own = [one for up in (*block.up, *block.between) for one in _own(site, up, "")]
    return _branch(site, name, wide_norm(site, path) or "", block.down, own)


def _branch(site: Site, name: str, core: str, output: str | None, own: list[str] | None = None) -> Group:
    """Return a whole branch as one unit: everything that computes it, and its output projection with the bias.

    Args:
        site: The model.
        name: Of the group.
        core: Module that is skipped once the branch is gone; empty where empty projections do it.
        output: The output projection; ``None`` where the core hands its result on by itself.
        own: The tensors that compute it; ``None``: all of the core's.
    """
    own = _own(site, core, output or "") if own is None else own
    shapes = {one: site.shape(one) for one in own}
    # stacked experts stay as many, each of them empty: transformers 5 writes them one by one
    axes = {one: 1 if len(shapes[one]) == 3 and not output else site.axis(one) for one in own}
    slices = [Slice(site.prefix + one, axes[one], shape[axes[one]]) for one, shape in shapes.items() if shape]
    left = any(0 not in shape for shape in shapes.values())
    if output is not None:
        bias = getattr(site.modules[output], "bias", None)
        if bias is not None:
            slices.append(Slice(f"{site.prefix}{output}.bias", 0, len(bias)))
        slices.append(site.columns(output, site.reads(output)))
        left = site.reads(output) > 0 or (bias is not None and len(bias) > 0)
    core, outputs = site.prefix + core if core else "", int(output is not None)
    return Group(name, "branch", int(left), tuple(slices), outputs=outputs, least=0, core=core)


def _grouped(config: Any, name: str) -> bool:
    """Whether queries are grouped although as many heads as key/value heads are left here."""
    dense = setting(config, "num_key_value_heads", "num_attention_heads")
    removed = (getattr(config, BLOCK, None) or {}).get("kept", {})
    return dense != setting(config, "num_attention_heads") or name in removed


def join_tied(model: nn.Module, found: Found) -> list[Group]:
    """Return the groups with those joined that lie in the same tensors: they can only lose units together.

    Zamba's layers share their attention; what is skipped in one place would have to be skipped in all, so that no
    branch of these is offered and the last unit stays.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    joined: dict[tuple[object, ...], Group] = {}
    shared = set[str]()
    for group in found.groups:
        own = tuple(id(tensors[part.parameter]) for part in group.slices if part.parameter in tensors)
        key = (group.kind, own) if own else (group.kind, group.name)
        first = joined.get(key)
        if first is None:
            joined[key] = group
        elif group.traits.is_place:
            shared.add(first.name)
            found.refusals.append(Refusal(group.name, f"its tensors are those of {first.name}"))
        else:
            before, reads = len(first.slices) - first.outputs, first.outputs
            other = len(group.slices) - group.outputs
            slices = (*first.slices[:before], *group.slices[:other], *first.read, *group.read)
            told = (*first.counters, *group.counters)
            joined[key] = replace(first, slices=slices, counters=told, outputs=2 * reads, least=1, core="")
    return [group for group in joined.values() if group.name not in shared]


def _check_names(model: nn.Module, groups: list[Group]) -> None:
    names = [group.name for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        places = ", ".join(f"'{group.slices[0].parameter}'" for group in groups if group.name == twice and group.slices)
        raise UnsupportedModelError(
            f"Names must tell all places of {type(model).__name__} apart: give each a name of its own. {ONE_FILE} "
            f"Received: '{twice}' for all of {places}"
        )
