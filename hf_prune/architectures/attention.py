"""Heads and KV groups of attentions that follow a naming convention."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..structure import Counter, Group, Slice
from .conventions import (
    ANY_HEAD,
    ANY_HEAD_MODULES,
    BESIDE,
    CONFIG_SIZES,
    FUSED,
    HEAD_ARGUMENTS,
    HEAD_COUNTS,
    HEAD_SIZES,
    HEAD_WIDTHS,
    HEADS_PER_KV,
    INSEPARABLE,
    INSEPARABLE_WITH,
    KV_COUNTS,
    LATENT,
    OUTPUT_AROUND,
    OUTPUT_INSIDE,
    PER_HEAD,
    PER_HEAD_AROUND,
    QUERY_KEY_VALUE,
    RESHAPE,
    RESHAPES,
    Layout,
)
from .site import Refusal, Site, first_number, source_of


@dataclass(frozen=True)
class AttentionModules:
    """Where an attention's projections are.

    Args:
        core: Path of the module that computes heads.
        output: Path of the output projection.
        projections: Paths of query, key and value; one path where they are fused.
        layout: How the fused projection's entries lie; empty where there are three.
    """

    core: str
    output: str
    projections: tuple[str, ...]
    layout: Layout | None = None


def find_attention(site: Site, path: str) -> AttentionModules | None:
    """Return the attention whose core this module is, if it is one."""
    triples = [tuple(site.child(path, name) for name in names) for names in QUERY_KEY_VALUE]
    found: list[tuple[tuple[str, ...], Layout | None]] = [(triple, None) for triple in triples]
    found += [
        ((site.child(path, name),), _layout(site, path, layout)) for name, layout in FUSED if _beside(site, path, name)
    ]
    found += [(tuple(site.child(path, name) for name in names), "latent") for names in LATENT]
    for projections, layout in found:
        if all(site.is_projection(one) for one in projections):
            output = _output(site, path, projections)
            return AttentionModules(path, output, projections, layout) if output else None
    return None


def _beside(site: Site, path: str, name: str) -> bool:
    return name not in BESIDE or hasattr(site.modules[path], BESIDE[name])


def _layout(site: Site, path: str, usual: Layout) -> Layout:
    """Return how a fused projection lies; Falcon and GPT-BigCode have switches for it."""
    core = site.modules[path]
    if getattr(core, "new_decoder_architecture", False):
        return "per_group"
    switch = getattr(core, "multi_query", None)
    return usual if switch is None else "blocks" if switch else "per_head"


def attention_groups(site: Site, found: AttentionModules, place: str, grouped: bool) -> Iterator[Group | Refusal]:
    """Yield the heads of one attention; under grouped queries its KV groups, and the query heads inside them.

    Args:
        site: The model.
        found: The attention.
        place: Its name.
        grouped: Whether queries count as grouped although as many heads as key/value heads are left.
    """
    core = site.modules[found.core]
    settings = (why for name, value, why in INSEPARABLE_WITH if getattr(core, name, None) == value)
    name = type(core).__name__
    qualified = f"{type(core).__module__.split('.')[-2]}.{name}"  # FSMT's class is called just Attention
    reason = INSEPARABLE.get(name) or INSEPARABLE.get(qualified) or next(settings, None)
    if reason:
        yield Refusal(place, reason)
        return
    sizes = _measure(site, found)
    if isinstance(sizes, str):
        yield Refusal(place, sizes)
        return
    extras = _extras(site, found, sizes)
    if isinstance(extras, str):
        yield Refusal(place, extras)
        return
    yield from _groups(site, found, sizes, extras, place, grouped or sizes.heads != sizes.kv_heads)


@dataclass(frozen=True)
class _Sizes:
    """How many heads, and how wide one is in queries and keys, in values, and where the output is read."""

    heads: int
    kv_heads: int
    query: int  # a gated attention's queries hold a gate of the same width too
    size: int
    value: int
    read: int


def _measure(site: Site, found: AttentionModules) -> _Sizes | str:
    """Find an attention's sizes from its own numbers, its shapes and the config; or say why they do not fit."""
    holders = (found.core, found.core.rpartition(".")[0])
    config = site.config(found.core)
    size = site.attribute(holders, HEAD_SIZES) or first_number(config, CONFIG_SIZES)
    heads = site.attribute(holders, HEAD_COUNTS)
    read = site.reads(found.output)
    if found.layout == "latent":
        query, key = (site.width(path) for path in found.projections)
        heads = (heads or _config_count(config) or 0) if query else 0
        value, kv_heads, size = key, heads, query // heads if heads else 1
    elif found.layout is None:
        query, key, value = (site.width(path) for path in found.projections)
        if heads is None or (size and query == size * heads):
            size = size or _config_size(config) or 1
            kv_heads = key // size
            heads = read // max(1, value // kv_heads) if kv_heads else 0
        else:
            kv_heads = _kv_count(site, holders, heads, query, key)
        heads = heads if query else 0
        size = key // kv_heads if heads and kv_heads else size or 1
    else:
        total = site.width(found.projections[0])
        kv_heads = site.attribute(holders, KV_COUNTS) or 0
        heads = heads if total else 0
        if heads is None:
            heads, kv_heads = _config_count(config) or 0, kv_heads or first_number(config, KV_COUNTS) or 0
        kv_heads = heads if found.layout == "per_head" or not kv_heads else kv_heads
        size = total // (heads + 2 * kv_heads) if heads else size or 1
        query, key, value = heads * size, kv_heads * size, kv_heads * size
        if query + 2 * key != total:
            return f"{found.projections[0]} is {total} wide, which is not {heads} + 2 x {kv_heads} heads of {size}"
    if not heads:
        return _Sizes(0, 0, *[max(1, size)] * 4)
    whole = kv_heads and not (query % heads or heads % kv_heads or key % kv_heads or value % kv_heads or read % heads)
    if not whole or (found.layout != "latent" and (query // heads) % (key // kv_heads)):
        return f"widths {query}, {key}, {value} and {read} of {found.core} are not whole heads"
    return _Sizes(heads, kv_heads, query // heads, key // kv_heads, value // kv_heads, read // heads)


def _kv_count(site: Site, holders: tuple[str, ...], heads: int, query: int, key: int) -> int:
    """Return the number of key/value heads: stated, or as many as are as wide as a query head."""
    stated = site.attribute(holders, KV_COUNTS)
    return stated if stated and key % stated == 0 and key else max(1, key * heads // max(1, query))


def _groups(
    site: Site,
    found: AttentionModules,
    sizes: _Sizes,
    extras: tuple[list[Slice], list[Slice]],
    place: str,
    grouped: bool,
) -> Iterator[Group]:
    holders = (found.core, found.core.rpartition(".")[0], found.output.rpartition(".")[0])
    width = sizes.heads * sizes.read
    heads = site.counters(holders, HEAD_COUNTS, sizes.heads) + site.read_counts(
        found.core, ("num_attention_heads", "n_head")
    )
    inner = [one for one in holders if one == found.core or not one.rpartition(".")[2].isdigit()]  # not a layer's own
    asserts = "== self.embed_dim" in source_of(type(site.modules[found.core]))  # Longformer: of what comes in
    named = [name for name in HEAD_WIDTHS if not (asserts and name == "embed_dim")]
    widths = site.counters(inner, named, width, sizes.read) if width else []
    kv_heads = site.counters(holders, KV_COUNTS, sizes.kv_heads) + site.read_counts(
        found.core, ("num_key_value_heads",)
    )
    query, key, value = _project(site, found, sizes)
    of_heads, of_keys = extras
    least = int(residual_norm(site, found.core))  # without any head the module is skipped, and its norm with it
    core = "" if least else site.prefix + found.core
    arguments = HEAD_ARGUMENTS.get(type(site.modules[found.core]).__name__, ()) + _reshapes(site, found.core)
    if not grouped:
        if found.layout == "per_head":
            rows = list(site.rows(found.projections[0], 3 * sizes.size))
        else:
            rows = [*query, *key, *([] if found.layout == "latent" else value)]
        slices = (*rows, *of_heads, *of_keys, site.columns(found.output, sizes.read))
        told = (*heads, *kv_heads, *widths)
        yield Group(f"{place}.heads", "head", sizes.heads, slices, told, least=least, core=core, arguments=arguments)
        return
    per_kv = sizes.heads // sizes.kv_heads if sizes.kv_heads else 1
    queries = [] if found.layout == "per_group" else query  # there the group's own rows hold them
    wide = [replace(one, per_unit=one.per_unit * per_kv) for one in (*queries, *of_heads)]
    slices = (*key, *value, *of_keys, *wide, site.columns(found.output, sizes.read * per_kv))
    told = tuple(
        [*kv_heads, *(replace(c, per_unit=per_kv) for c in heads)]
        + [replace(c, per_unit=c.per_unit * per_kv) for c in widths]
    )
    yield Group(f"{place}.kv_groups", "kv_group", sizes.kv_heads, slices, told, least=least, core=core)
    per_group = site.counters(holders, HEADS_PER_KV, per_kv, of="units_per_part")
    slices = (*query, *of_heads, site.columns(found.output, sizes.read))
    inside: tuple[Counter, ...] = (*heads, *widths, *per_group)
    parts = max(1, sizes.kv_heads)
    core = site.prefix + found.core
    yield Group(f"{place}.heads", "head", sizes.heads, slices, inside, parts, core=core, arguments=arguments)


def _project(site: Site, found: AttentionModules, sizes: _Sizes) -> tuple[list[Slice], list[Slice], list[Slice]]:
    """Return what one head owns of the queries, the keys and the values."""
    if found.layout == "latent":  # keys and values of a head lie side by side
        query, key = found.projections
        return list(site.rows(query, sizes.query)), list(site.rows(key, sizes.value)), []
    if found.layout == "per_group":
        fused, per_kv = found.projections[0], sizes.heads // max(1, sizes.kv_heads)
        inside = list(site.rows(fused, sizes.size, 0, (per_kv + 2) * sizes.size))
        return inside, list(site.rows(fused, (per_kv + 2) * sizes.size)), []
    if found.layout is None:
        query, key, value = found.projections
        offsets = (0, 0, 0)
    else:
        query = key = value = found.projections[0]
        offsets = (0, sizes.heads * sizes.size, (sizes.heads + sizes.kv_heads) * sizes.size)
    return (
        list(site.rows(query, sizes.query, offsets[0])),
        list(site.rows(key, sizes.size, offsets[1])),
        list(site.rows(value, sizes.value, offsets[2])),
    )


def _extras(site: Site, found: AttentionModules, sizes: _Sizes) -> tuple[list[Slice], list[Slice]] | str:
    """Return what query heads and what key/value heads own beside the projections.

    Or, where there is one, which tensor makes heads inseparable.
    """
    known = {f"{path}.{name}" for path in (*found.projections, found.output) for name in ("weight", "bias")}
    of_heads, of_keys = list[Slice](), list[Slice]()
    for name, tensor in site.tensors(found.core).items() if sizes.heads else ():
        full, shape = site.child(found.core, name), tuple(tensor.shape)
        if full in known or _known_for_any_head(name):
            continue
        row = next((row for end, row in PER_HEAD.items() if name == end or name.endswith(f".{end}")), None)
        width = (1 if row[1] == "one" or shape[row[0] : row[0] + 1] == (sizes.heads,) else sizes.read) if row else 0
        if row is not None and len(shape) > row[0] and shape[row[0]] == sizes.heads * width:
            of_heads.append(Slice(site.prefix + full, row[0], width))
        elif _is_residual_norm(name):
            continue
        elif "norm" in name.lower():
            if shape[0] in (sizes.heads, sizes.kv_heads) and len(shape) == 2:
                (of_keys if name.startswith("k") else of_heads).append(Slice(site.prefix + full, 0, 1))
            elif shape[-1] not in (sizes.size, sizes.value, sizes.read):
                return f"{name} is a norm over all heads: removing one would change the others"
        elif shape and max(shape) > 1:
            return f"{name} {shape} is not known to belong to heads"
    around = found.core.rpartition(".")[0]
    for name, axis in PER_HEAD_AROUND.items() if sizes.heads else ():
        path = site.child(around, name)
        if path.rpartition(".")[0] in site.modules:
            of_heads.append(Slice(site.prefix + path, axis, 1))
    return of_heads, of_keys


def residual_norm(site: Site, core: str) -> bool:
    """Whether the core also adds its input and normalises the sum, as ALBERT's does, or pools its queries (Hiera)."""
    pools = (site.attribute((core,), ("query_stride",)) or 1) > 1
    return pools or any(_is_residual_norm(name) for name in site.tensors(core))


def _is_residual_norm(name: str) -> bool:
    return name.rpartition(".")[0] in ("LayerNorm", "layer_norm", "layernorm")


def _known_for_any_head(name: str) -> bool:
    known = any(name == end or name.endswith(f".{end}") for end in ANY_HEAD)
    return known or name.partition(".")[0] in ANY_HEAD_MODULES


def _reshapes(site: Site, core: str) -> tuple[tuple[str, str], ...]:
    """Return whether a core's code reshapes what heads return to the width that it reads off the hidden states."""
    return (RESHAPE,) if _reads_width(inspect.unwrap(type(site.modules[core]).forward)) else ()


@functools.cache
def _reads_width(forward: Any) -> bool:
    return re.search(RESHAPES, source_of(forward)) is not None


def _output(site: Site, core: str, projections: tuple[str, ...]) -> str | None:
    around = core.rpartition(".")[0]
    paths = [site.child(core, name) for name in OUTPUT_INSIDE] + [site.child(around, name) for name in OUTPUT_AROUND]
    return next((path for path in paths if path not in projections and site.is_projection(path)), None)


def _config_count(config: object) -> int | None:
    return first_number(config, ("num_attention_heads", *HEAD_COUNTS))


def _config_size(config: object) -> int | None:
    hidden, heads = first_number(config, ("hidden_size", "d_model", "n_embd", "dim")), _config_count(config)
    return hidden // heads if hidden and heads else None
