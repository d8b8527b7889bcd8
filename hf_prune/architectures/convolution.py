"""Channels inside the blocks of convolutional models: filters, their batch norms, and what reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..plan import read_record
from ..structure import Group, Slice
from .naming import Names, layer_numbers
from .site import CONVOLUTIONS, Refusal, Site


class Chain(NamedTuple):
    """Children of a block in the order in which they run, each a convolution with its norm, a norm, or a gate.

    Between two convolutions lie channels. What the first one reads and the last one gives is the residual stream.
    """

    steps: tuple[str, ...]
    depthwise: tuple[str, ...] = ()  # steps that convolve each channel alone
    gathers: str = ""  # reads what every step before it gives, one after another, behind the block's own input
    needs: int = 99  # how many of the first steps must be there, if not all


_N = range(32)
_LIGHT = tuple(f"layers.{i}.conv{n}" for i in _N for n in (1, 2))
_SEPARABLE = ("depthwise_convolution", "squeeze_excitation_module", "pointwise_convolution")

CHAINS = (
    Chain(("layer.0", "layer.1", "layer.2", "layer.3"), needs=2),  # ResNet, RegNet
    Chain(("expand_1x1", "conv_3x3", "reduce_1x1"), depthwise=("conv_3x3",)),  # MobileNet v2, MobileViT
    Chain(  # EfficientNet
        (
            "expansion.expand_conv",
            "expansion.expand_bn",
            "depthwise_conv.depthwise_conv",
            "depthwise_conv.depthwise_norm",
            "squeeze_excite",
            "projection.project_conv",
        ),
        depthwise=("depthwise_conv.depthwise_conv",),
    ),
    Chain(tuple(map(str, _N)), depthwise=tuple(map(str, _N[::2])), needs=4),  # MobileNet v1: the list of layers itself
    Chain(  # PP-LCNet, within one of its blocks
        tuple(f"{i}.{name}" for i in _N for name in _SEPARABLE),
        depthwise=tuple(f"{i}.{_SEPARABLE[0]}" for i in _N),
        needs=6,
    ),
    Chain(
        (*(f"layers.{i}" for i in _N), "aggregation.0", "aggregation.1"), gathers="aggregation.0", needs=1
    ),  # HGNet v2
    Chain((*_LIGHT, "aggregation.0", "aggregation.1"), _LIGHT[1::2], gathers="aggregation.0", needs=2),
    Chain(("norm1", "conv1", "norm2", "conv2", "norm3", "conv3")),  # BiT
    Chain(("conv_kxk", "conv_1x1")),  # MobileViT
    Chain(("conv_projection", "fusion"), gathers="fusion"),
    Chain(("point_wise_conv1", "point_wise_conv2")),  # SwiftFormer
    Chain(  # VAN's large kernels
        (
            "pre_projection",
            "attention_layer.attention.depth_wise",
            "attention_layer.attention.depth_wise_dilated",
            "attention_layer.attention",
            "post_projection",
        ),
        depthwise=("attention_layer.attention.depth_wise", "attention_layer.attention.depth_wise_dilated"),
    ),
    Chain(("pointwise_conv1", "depthwise_conv", "batch_norm", "pointwise_conv2"), depthwise=("depthwise_conv",)),
    Chain(
        ("pointwise_conv1", "depthwise_conv", "norm", "pointwise_conv2"), depthwise=("depthwise_conv",)
    ),  # conformers
    Chain(
        ("pointwise_conv1", "depthwise_conv", "depthwise_layer_norm", "pointwise_conv2"), depthwise=("depthwise_conv",)
    ),
)
FILTERS = ("convolution", "conv")  # what a module calls its convolution, and the norm after it
NORMS = ("normalization", "batch_norm", "norm")
# what a gate calls the convolution that reads all channels, and the one that gives a factor for each
GATES = (
    ("attention.0", "attention.2"),  # RegNet
    ("reduce", "expand"),  # EfficientNet
    ("convolutions.0", "convolutions.2"),  # PP-LCNet
    ("point_wise", "point_wise"),  # VAN
)
WHOLE = "conv_groups"  # what units are called that are groups of a grouped convolution
STANDARDIZED = ("WeightStandardizedConv2d",)
WHOLE_STREAM = ("main_conv",)  # TextNet: a child of layers that compute the stream itself, with no block around it


@dataclass
class Filters:
    """A convolution that computes channels, and what then works on each of them alone."""

    convolution: str
    step: str
    alone: list[str] = field(default_factory=list)
    gates: list[tuple[str, str]] = field(default_factory=list)


def convolution_groups(site: Site, names: Names) -> Iterator[Group | Refusal]:
    """Yield the channels between two convolutions of a block."""
    places: dict[str, list[Group | Refusal]] = {}
    recorded = read_record(site.root)
    for path, chain in find_chains(site):
        links = _links(site, path, chain)
        for number in range(len(links) - 1):
            place = names_of(names, _around(site, path, links[number].step))
            one = _between(site, chain, links, number, f"{place}.{WHOLE}.channels" in recorded)
            places.setdefault(place, []).extend([one] if one else [])
    for place, found in places.items():
        groups = [one for one in found if isinstance(one, Group)]
        for number, group in enumerate(groups):
            what = group.name or (f"conv{number + 1}" if len(groups) > 1 else "")
            yield replace(group, name=".".join(filter(None, (place, what, "channels"))))
        yield from [Refusal(place, one.reason) for one in found if isinstance(one, Refusal)][:1]
    for path in site.modules:
        if layer_numbers(path) and any(site.child(path, name) in site.modules for name in WHOLE_STREAM):
            yield Refusal(names_of(names, path), "its convolutions compute the stream between layers, nothing inside")


def convolution_places(site: Site) -> list[str]:
    """Return the path of every layer, or block in it, that holds channels."""
    return [_around(site, path, _links(site, path, chain)[0].step) for path, chain in find_chains(site)]


def names_of(names: Names, path: str) -> str:
    """Name the place of a block: its layer, and what it is called there."""
    inside = names.inside(path)
    return f"{names.layer(path)}.{inside}" if inside else names.layer(path)


def find_chains(site: Site) -> Iterator[tuple[str, Chain]]:
    """Yield the path of each block in a numbered layer with each convention that its children follow."""
    convolutions = [path for path, module in site.modules.items() if isinstance(module, CONVOLUTIONS)]
    around = {path[:end] for path in convolutions for end, letter in enumerate(f"{path}.") if letter == "."} | {""}
    for path in site.modules:
        for chain in CHAINS if path in around else ():
            there = [_is_there(site, site.child(path, step)) for step in chain.steps]
            if not all(there[: chain.needs]) or not all(_alone(site, site.child(path, one)) for one in chain.depthwise):
                continue
            links = _links(site, path, chain)
            if len(links) > 1 and layer_numbers(_around(site, path, links[0].step)):
                yield path, chain


def _is_there(site: Site, path: str) -> bool:
    """Whether a step is known, or stands for nothing."""
    return bool(_parts(site, path)) or type(site.modules.get(path)).__name__ == "Identity"


def _around(site: Site, path: str, step: str) -> str:
    """Return the layer or block around a step: the element where the block is itself a list of layers."""
    number = step.split(".")[0]
    return site.child(path, number) if number.isdigit() else path


def _parts(site: Site, path: str) -> list[str]:
    """Return what a step consists of: a convolution and a norm after it, a norm alone, a gate, or nothing."""
    module = site.modules.get(path)
    if module is None:
        return []
    if isinstance(module, CONVOLUTIONS) or _is_norm(module):
        return [path]
    filters = [one for name in FILTERS if isinstance(site.modules.get(one := site.child(path, name)), CONVOLUTIONS)]
    norms = [one for name in NORMS if _is_norm(site.modules.get(one := site.child(path, name)))]
    return filters[:1] + norms[:1] if filters else [path] * (_gate(site, path) is not None)


def _is_norm(module: Any) -> bool:
    """Whether a module is a norm with a weight for each channel (an activation or an identity is none)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1


def _alone(site: Site, path: str) -> bool:
    """Whether a step convolves each channel alone, or is not there."""
    for one in _parts(site, path)[:1]:
        module = site.modules[one]
        return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels
    return True


def _gate(site: Site, path: str) -> tuple[str, str] | None:
    """Return the two convolutions of a squeeze-and-excitation module, or the one that is both."""
    for row in GATES:
        first, last = (site.child(path, name) for name in row)
        if isinstance(site.modules.get(first), CONVOLUTIONS) and isinstance(site.modules.get(last), CONVOLUTIONS):
            return first, last
    return None


def _links(site: Site, path: str, chain: Chain) -> list[Filters]:
    """Return the block's convolutions that mix channels, in order, each with what follows it."""
    links: list[Filters] = []
    for step in chain.steps:
        for part in _parts(site, site.child(path, step)):
            gate = _gate(site, part)
            if isinstance(site.modules[part], CONVOLUTIONS) and step not in chain.depthwise:
                links.append(Filters(part, step))
            elif links and gate is not None:
                links[-1].gates.append(gate)
            elif links:  # what comes before the first convolution works on the residual stream
                links[-1].alone.append(part)
    return links


def _between(site: Site, chain: Chain, links: list[Filters], number: int, grouped: bool) -> Group | Refusal | None:
    """Return the channels that one convolution gives; ``None`` where they belong to the group before."""
    here, after = links[number], links[number + 1]
    if _splits(site, here, grouped and number > 0):
        return None
    if _splits(site, after, grouped):
        return _whole_groups(site, links[number : number + 3])
    readers = [(after.convolution, 0)]
    gathers = next((i for i, link in enumerate(links) if link.step == chain.gathers), 0)
    if number < gathers:  # behind the block's own input
        behind = sum(site.width(link.convolution) for link in links[number:gathers])
        offset = site.reads(links[gathers].convolution) - behind
        readers = [one for one in readers if number + 1 < gathers] + [(links[gathers].convolution, offset)]
    width, units = site.width(here.convolution), site.reads(after.convolution)
    if after.step == chain.gathers:
        units = width
    reason = _mixed(site, [here], [one for one, _ in readers]) or _misfit(site, here, units)
    if reason:
        return Refusal("", reason)
    halves = (0, units) if width == 2 * units else (0,)  # a gated linear unit
    rows = [part for half in halves for part in site.rows(here.convolution, 1, half)]
    columns = [Slice(f"{site.prefix}{one}.weight", 1, 1, offset) for one, offset in readers]
    return Group("", "channel", units, (*rows, *_follows(site, here, 1), *columns), outputs=len(columns))


def _whole_groups(site: Site, links: list[Filters]) -> Group | Refusal:
    """Return the groups of a grouped convolution: each reads some filters before it, and nobody else does."""
    reason = _mixed(site, links[:2], [link.convolution for link in links[1:]])
    if len(links) < 3 or reason:
        return Refusal("", reason or "nothing in the block reads its grouped convolution")
    before, grouped, after = links
    units = site.modules[grouped.convolution].groups
    sizes = [site.width(link.convolution) // units for link in (before, grouped)]
    slices = [
        part
        for link, size in zip((before, grouped), sizes)
        for part in (*site.rows(link.convolution, size), *_follows(site, link, size))
    ]
    return Group(WHOLE, "channel", units, (*slices, site.columns(after.convolution, sizes[1])))


def _splits(site: Site, link: Filters, grouped: bool) -> bool:
    """Whether a convolution works in groups; one of which a single group is left looks like any other."""
    return grouped or bool(site.modules[link.convolution].groups > 1)


def _follows(site: Site, link: Filters, size: int) -> list[Slice]:
    """Return what a unit of so many channels owns of norms, depthwise convolutions and gates."""
    slices = [part for one in link.alone for part in site.rows(one, size)]
    for first, last in link.gates:
        slices += [site.columns(first, size), *site.rows(last, size)]
    return slices


def _mixed(site: Site, links: list[Filters], readers: list[str]) -> str:
    """Say what makes channels depend on each other; empty where nothing does."""
    standardized = next((one for one in readers if type(site.modules[one]).__name__ in STANDARDIZED), "")
    if standardized:
        return f"{standardized} standardizes each filter over all channels that it reads"
    for link in links:
        for one in link.alone:
            module = site.modules[one]
            if not isinstance(module, CONVOLUTIONS) and "BatchNorm" not in type(module).__name__:
                return f"{one} is a norm over all channels: removing one would change the others"
    return ""


def _misfit(site: Site, link: Filters, units: int) -> str:
    """Say which module has another number of channels than the one that reads them."""
    width = site.width(link.convolution)
    if width not in (units, 2 * units):
        return f"{link.convolution} gives {width} channels, of which {units} are read"
    given = [one for one in link.alone if site.modules[one].weight.shape[0] != units]
    given += [last for first, last in link.gates if not site.width(last) == site.reads(first) == units]
    return f"{given[0]} has not as many channels as are read: {units}" if given else ""
