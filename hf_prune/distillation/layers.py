"""Where layers and attentions are, in dense numbers, and what they hand out during one forward."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..architectures import find_groups, layer_lists
from ..architectures.conventions import QUERY_KEY_VALUE
from ..errors import PruningError
from ..plan import BLOCK, Record, read_record
from ..skipping import is_only_masked
from ..structure import Group, Slice, live_shapes
from .matching import transformers_model

Key = tuple[str, int]  # a list of layers and a dense number, such as ("decoder.layers", 3)
Place = tuple[str, int, str]  # with the attention's name, such as ("decoder.layers", 3, "cross_attention")
_IF_ASKED = re.compile(r"\bif (not )?(self\.)?output_attentions\b")
LayerMap = Literal["uniform", "last", "nearest"] | Mapping[int, int]


@dataclass(frozen=True)
class Attention:
    """One attention: its module, its heads' dense numbers, and the tensor's axis that reads them."""

    module: str
    heads: tuple[int, ...] = ()
    read: Slice | None = None
    per_part: int = 1


@dataclass(frozen=True)
class Vectors:
    """Queries, keys or values of one attention: the module that hands them out, and which entries are whose.

    Args:
        module: Hands them out; one module may hand out all three.
        part: Which of its outputs belong to which heads.
        of: These heads, or groups of them that share keys and values.
    """

    module: str
    part: Slice
    of: Attention


class Anatomy:
    """The layers and attentions that a model has now; looked up again when units have left.

    Args:
        model: A model, not wrapped; of a PeftModel or a sentence-transformer the one inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = transformers_model(model)
        self._seen: object = None
        self._layers: dict[Key, str] = {}
        self._attentions: dict[Place, Attention] = {}
        self._vectors: dict[Place, tuple[Vectors, ...]] = {}
        self.dense: dict[str, int] = {}
        self.widths: dict[str, int] = {}

    def layers(self) -> dict[Key, str]:
        """Return paths of the layers that compute; one that is masked hands its input on, and is none."""
        self._look()
        return {key: path for key, path in self._layers.items() if not self._masked(path)}

    def attentions(self) -> dict[Place, Attention]:
        """Return the attentions of these layers."""
        here = self.layers()
        return {place: one for place, one in self._attentions.items() if place[:2] in here}

    def vectors(self) -> dict[Place, tuple[Vectors, ...]]:
        """Return queries, keys and values of the attentions of these layers within one sequence, where it has such."""
        here = self.layers()
        return {place: one for place, one in self._vectors.items() if one and place[:2] in here}

    def alive(self, attention: Attention) -> list[int]:
        """Return the live numbers of heads that are not masked: their outputs are read."""
        part = attention.read
        if part is None or not attention.heads:
            return []
        weight = self.model.get_parameter(part.parameter).detach()
        index = part.index(torch.arange(len(attention.heads)), attention.per_part).to(weight.device)
        rows = weight.ne(0).movedim(part.dim, 0).flatten(1).any(1)[index]
        return rows.view(len(attention.heads), -1).any(1).nonzero().view(-1).tolist()

    def _masked(self, path: str) -> bool:
        return is_only_masked(self.model.get_submodule(path))

    def _look(self) -> None:
        block = getattr(getattr(self.model, "config", None), BLOCK, None) or {}
        seen = dict(block.get("kept", {}))
        if self._seen == seen:
            return
        self._seen, record, groups = seen, read_record(self.model), find_groups(self.model)
        lists = layer_lists(self.model)
        self.dense = {group.name: record.dense_units(group) for group in lists}
        self._layers = {
            (group.name, number): path
            for group in lists
            for number, path in zip(record.dense_numbers(group), group.modules)
        }
        self.widths |= _widths(self.model, groups, lists)
        branches = {
            (group.name, number, one.place.rpartition(".")[2]): one
            for group in lists
            for number, path in zip(record.dense_numbers(group), group.modules)
            for one in groups
            if one.traits.is_place and one.core.startswith(f"{path}.") and one.place.endswith("attention")
        }
        self._attentions = {place: _attention(one, groups, record) for place, one in branches.items()}
        within = {place: one for place, one in branches.items() if "cross" not in place[2]}
        self._vectors = {place: _vectors(one, groups, record) for place, one in within.items()}


def map_layers(
    setting: LayerMap, ours: Sequence[int], dense: int, theirs: Sequence[int], teachers_dense: int
) -> dict[int, int]:
    """Say which layer of the teacher each layer of the student learns from, all in dense numbers.

    Args:
        setting: As in `Distillation.layer_map`.
        ours: Layers that the student has left, rising.
        dense: How many it had.
        theirs: Layers of the teacher, rising; of one that is gone, the next before it teaches.
        teachers_dense: How many it had.

    Example:
        >>> map_layers("uniform", [0, 2], 3, range(6), 6)
        {0: 1, 2: 5}
    """
    if not ours or not theirs:
        return {}
    if setting == "last":
        return {ours[-1]: theirs[-1]}
    if isinstance(setting, Mapping):
        return {number: setting[number] for number in ours if number in setting}
    wanted = {number: (number + 1) * teachers_dense // dense - 1 for number in ours}
    return {mine: max((one for one in theirs if one <= best), default=theirs[0]) for mine, best in wanted.items()}


def pair_layers(setting: LayerMap, student: Anatomy, teacher: Anatomy) -> dict[Key, Key]:
    """Pair the student's layers with the teacher's, list by list.

    Raises:
        PruningError: The teacher has no such list, or a given map names layers that are not there.
    """
    ours, theirs, pairs = student.layers(), teacher.layers(), dict[Key, Key]()
    for name, dense in student.dense.items():
        if name not in teacher.dense:
            known = ", ".join(teacher.dense) or "none"
            raise PruningError(f"The teacher must have layers called '{name}', as the student has. Received: {known}")
        mine, its = (sorted(number for one, number in layers if one == name) for layers in (ours, theirs))
        if isinstance(setting, Mapping) and not (set(setting) <= {*range(dense)} and set(setting.values()) <= {*its}):
            raise PruningError(
                f"Distillation.layer_map must map layers 0 to {dense - 1} of '{name}' to the teacher's "
                f"{', '.join(map(str, its))}. Received: {dict(setting)}"
            )
        mapped = map_layers(setting, mine, dense, its, teacher.dense[name])
        pairs |= {(name, number): (name, other) for number, other in mapped.items()}
    return pairs


def candidate_layers(setting: LayerMap, student: Anatomy, teacher: Anatomy) -> list[tuple[Key, Key]]:
    """Return pairs of layers that are compared; under ``"nearest"`` all of which some will be, in the layers' order."""
    pairs = pair_layers("uniform" if setting == "nearest" else setting, student, teacher)
    if setting != "nearest":
        return list(pairs.items())
    ours, theirs = (sorted(one.layers()) for one in (student, teacher))
    return [(mine, its) for its in theirs for mine in ours if mine[0] == its[0]]


def nearest_in_order(distances: Tensor) -> list[int]:
    """Return which column each row is matched with, never falling, so that the sum of distances is the least.

    Args:
        distances: ``(layers of the teacher, layers of the student)``.

    Example:
        >>> nearest_in_order(torch.tensor([[3.0, 1.0, 9.0], [1.0, 2.0, 9.0], [9.0, 9.0, 1.0]]))
        [1, 1, 2]
    """
    sums, *rows = distances.tolist()
    ways = list[list[int]]()  # for each row and column, the best column of the row before
    for row in rows:
        best, way = 0, list[int]()
        for column in range(len(row)):
            best = column if sums[column] < sums[best] else best
            way.append(best)
        ways.append(way)
        sums = [sums[before] + cost for before, cost in zip(way, row)]
    path = [sums.index(min(sums))]
    for way in reversed(ways):
        path.append(way[path[-1]])
    return path[::-1]


@contextmanager
def listen(model: nn.Module, paths: Iterable[str], take: Callable[[Any], Tensor | None]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules return while a model runs.

    Args:
        model: The model, not wrapped.
        paths: The modules.
        take: From what a module returns to what is collected (`take_hidden`, `take_map`); ``None`` leaves it out.

    Yields:
        Path to what was taken, filled as the model runs.

    Raises:
        PruningError: The modules run without gradients although the model does not: reentrant gradient checkpointing.
    """
    heard: dict[str, Tensor] = {}
    asked: set[str] = set()
    learning = torch.is_grad_enabled()

    def before_forward(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = _ask_for_map(module, args, kwargs)
        if changed is not None:
            asked.add(path)
            if learning and getattr(model, "is_gradient_checkpointing", False):
                raise PruningError(
                    f"{type(module).__name__} of this transformers hands out no attention map under gradient "
                    "checkpointing: train without it, or with Distillation.attention=0. Received: both"
                )
        return changed

    def after_forward(path: str, _: nn.Module, __: Any, result: Any) -> Any:
        if learning and not torch.is_grad_enabled():
            raise PruningError(
                "Distillation of hidden states or attention needs gradient_checkpointing_kwargs="
                "{'use_reentrant': False} beside gradient_checkpointing. Received: reentrant checkpointing"
            )
        value = take(result)
        if value is not None:
            heard[path] = value
        return tuple(one for one in result if one is not value) if path in asked and value is not None else None

    handles: list[Any] = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(functools.partial(after_forward, path)))
        if take is take_map:
            handles.append(module.register_forward_pre_hook(functools.partial(before_forward, path), with_kwargs=True))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _ask_for_map(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask an attention for its map where it only hands it out when asked; ``None``: there is nothing to change.

    The model around it is not asked: it would look for the maps of branches that are gone.
    """
    names, waits = _waits_to_be_asked(type(module).forward)
    if not waits or dict(zip(names, args), **kwargs).get("output_attentions"):
        return None
    place = names.index("output_attentions")
    if place < len(args):
        return (*args[:place], True, *args[place + 1 :]), kwargs
    return args, {**kwargs, "output_attentions": True}


@functools.cache
def _waits_to_be_asked(forward: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return a forward's arguments, and whether it returns one value more where `output_attentions` is true."""
    forward = inspect.unwrap(forward)
    names = list(inspect.signature(forward).parameters)[1:]
    asked = "output_attentions" in names and _IF_ASKED.search(inspect.getsource(forward)) is not None
    return names, asked


def take_hidden(result: Any) -> Tensor | None:
    """Return a layer's output as ``(rows, positions, width)``; maps of attention may come before it."""
    values = result if isinstance(result, (tuple, list)) else (result,)
    found = [value for value in values if torch.is_tensor(value) and value.ndim in (3, 4)]
    if not found:
        return None
    value = next((one for one in found if one.ndim == 3), found[0])
    return value.movedim(1, -1).flatten(1, -2) if value.ndim == 4 else value


def take_map(result: Any) -> Tensor | None:
    """Return an attention's distributions, ``(rows, heads, queries, keys)``: the last such tensor that it returns."""
    values = result if isinstance(result, (tuple, list)) else ()
    maps = [value for value in values if torch.is_tensor(value) and value.ndim == 4]
    return maps[-1] if maps else None


def use_eager_attention(model: Any) -> str | None:
    """Make attentions hand out their maps; return what the model used before, or ``None`` where it is no other.

    Raises:
        PruningError: The model's attention can only be chosen when it is loaded, as of some in transformers 4.
    """
    before = getattr(model.config, "_attn_implementation", "eager")
    if before in ("eager", None):
        return None
    model.set_attn_implementation("eager")
    if model.config._attn_implementation != "eager":
        raise PruningError(
            f"Distillation.attention needs {type(model).__name__} loaded with attn_implementation='eager'. "
            f"Received: {before!r}"
        )
    return str(before)


def _attention(branch: Group, groups: Sequence[Group], record: Record) -> Attention:
    owned = _owners("head", branch, groups)
    return Attention(branch.core) if owned is None else _owned(branch, *owned, record)


def _owned(branch: Group, group: Group, read: Slice, record: Record) -> Attention:
    return Attention(branch.core, tuple(record.dense_numbers(group)), read, group.per_part)


def _owners(kind: str, branch: Group, groups: Sequence[Group]) -> tuple[Group, Slice] | None:
    """Return the units of an attention of one kind, and where they are read; ``None``: it has none."""
    written = {part.parameter for part in branch.read}
    for group in groups:
        part = next((one for one in group.read if one.parameter in written), None)
        if group.kind == kind and part is not None:
            return group, part
    return None


def _vectors(branch: Group, groups: Sequence[Group], record: Record) -> tuple[Vectors, ...]:
    """Return queries, keys and values of an attention, where three modules hand them out, or one in three blocks."""
    heads = _owners("head", branch, groups)
    if heads is None:
        return ()
    keys = _owners("kv_group", branch, groups) or heads
    parts = [[one for one in group.slices if _is_weight(one)] for group, _ in (heads, keys)]
    found = [*parts[0][:1], *(parts[1][:2] if keys is not heads else parts[0][1:3])]
    modules = [one.module.removesuffix(".base_layer") for one in found]  # PEFT's, around the projection itself
    apart = any(all(one.endswith(f".{name}") for one, name in zip(modules, names)) for names in QUERY_KEY_VALUE)
    in_blocks = len(set(modules)) == 1 and len({one.offset for one in found}) == 3
    if len(found) != 3 or not (apart or in_blocks):
        return ()
    owners = [_owned(branch, *one, record) for one in (heads, keys, keys)]
    return tuple(map(Vectors, modules, found, owners))


def _is_weight(part: Slice) -> bool:
    return part.parameter.endswith(".weight") and not part.adapter


def _widths(model: nn.Module, groups: Sequence[Group], lists: Sequence[Group]) -> dict[str, int]:
    """Return how wide the outputs of each list's layers are: what their output projections write."""
    shapes, widths = live_shapes(model), dict[str, int]()
    for group in lists:
        inside = tuple(f"{path}." for path in group.modules)
        for part in (part for one in groups if not one.modules for part in one.read):
            shape = shapes[part.parameter]
            if part.parameter.startswith(inside) and len(shape) in (2, 4) and part.dim < 2:
                widths.setdefault(group.name, shape[1 - part.dim])
    return widths
