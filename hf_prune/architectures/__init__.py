"""Where a model's units are: `find_groups`, from naming conventions (data) or a family's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..adapters import adapted, bare, cut_with_adapters
from ..errors import PruningError, UnsupportedModelError, did_you_mean
from ..given import check_model
from ..kinds import KINDS, Kind
from ..registry import Registry, load_entry_points
from ..structure import Group, live_shapes, matrix_entries, named_tensors
from .big_bird import big_bird
from .codegen import codegen
from .conventions import FEED_FORWARDS, FUSED, QUERY_KEY_VALUE
from .finder import ONE_FILE, Found, by_convention
from .groups import Groups
from .site import Refusal
from .t5 import shared_position_bias
from .xlnet import xlnet

FinderFunction = Callable[[nn.Module], list[Group] | Found]
ARCHITECTURES: Registry[FinderFunction] = Registry("architecture")


def register_architecture(*model_types: str) -> Callable[[FinderFunction], FinderFunction]:
    """Say where the units of these model types are, where the naming conventions do not.

    Args:
        *model_types: Values of ``config.model_type``, or names of classes of your own that have no config.

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


register_architecture("xlnet")(xlnet)
register_architecture("codegen")(codegen)
register_architecture("big_bird", "bigbird_pegasus")(big_bird)
register_architecture(
    "t5", "mt5", "longt5", "pop2piano", "switch_transformers", "udop", "pix2struct", "pix2struct_text_model"
)(shared_position_bias)


def find_groups(model: nn.Module, kinds: Sequence[Kind] | None = None) -> Groups:
    """Find the units of a model that can be removed exactly.

    Args:
        model: A transformers model, dense or already shrunk, on any device (``meta`` too).
        kinds: Only groups of these kinds; ``None`` for all. An attention with fewer key/value heads than query heads
            offers both ``kv_group`` and ``head`` groups; every block is also a ``branch``, every list of layers a
            ``layer`` group.

    Returns:
        A list of groups in layer order, attention before feed-forward; printed, it is a table.

    Raises:
        UnsupportedModelError: Nothing was found: says what was looked for, and the one file to write.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1))
        >>> [(group.name, group.units) for group in find_groups(model, ["head", "neuron"])]
        [('layers.0.attention.heads', 12), ('layers.0.mlp.neurons', 3072)]
    """
    check_model(model)
    for kind in [kinds] if isinstance(kinds, str) else kinds or ():
        if isinstance(kinds, str) or kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            raise PruningError(f"kinds must be among {', '.join(KINDS)}.{hint} Received: '{kind}'.")
    found = Groups(group for group in inspect_model(model).groups if kinds is None or group.kind in kinds)
    if not found:
        raise UnsupportedModelError(_nothing_found(model, kinds))
    return found


def inspect_model(model: nn.Module) -> Found:
    """Return what a model offers, and what it cannot offer with the reasons."""
    load_entry_points()
    base = bare(model)
    found = _inspect(base)
    if base is not model or adapted(base):
        whole = [group for group in found.groups if group.traits.is_module]
        found.refusals += [Refusal(group.name, "adapters lie inside: merge them first") for group in whole]
        found.groups = cut_with_adapters(model, [group for group in found.groups if group not in whole])
    _refuse_computed(model, found)
    return found


def _refuse_computed(model: nn.Module, found: Found) -> None:
    """Take out what owns entries of a tensor that is none of the model's, but is computed from others each time."""
    tensors = named_tensors(model)
    for group in found.groups:
        computed = next((part.parameter for part in group.slices if part.parameter not in tensors), None)
        if computed is not None:
            reason = (
                f"{computed} is computed from other tensors: call hf_prune.adopt_torch_masks (torch.nn.utils.prune) or "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
            found.refusals.append(Refusal(group.name, reason))
    refused = {one.place for one in found.refusals}
    found.groups = [group for group in found.groups if group.name not in refused]


def _inspect(model: nn.Module) -> Found:
    names = (getattr(getattr(model, "config", None), "model_type", ""), type(model).__name__)
    name = next((name for name in names if name in ARCHITECTURES), None)
    if name is None:
        return by_convention(model)
    found = ARCHITECTURES[name](model)
    return found if isinstance(found, Found) else Found(found)


def layer_lists(model: nn.Module) -> list[Group]:
    """Return the lists of layers of a model, to look at: those with adapters inside cannot be cut.

    Args:
        model: A transformers model; of a PeftModel the one inside, whose names count.
    """
    load_entry_points()
    return [group for group in _inspect(bare(model)).groups if group.traits.holds_places]


def prunable_macs(model: nn.Module) -> int:
    """Count multiply-accumulates per token in all matrices that pruning can cut.

    Those are the projections and feed-forward parts. Attention's own products (queries with keys) depend on the
    length, and are left out.
    """
    return matrix_entries(find_groups(model), live_shapes(model))


def _nothing_found(model: nn.Module, kinds: Sequence[Kind] | None) -> str:
    what = "prunable groups" if kinds is None else f"groups of kind {', '.join(kinds)}"
    refusals = inspect_model(model).refusals[:3]
    reasons = "".join(f" {one.place} has none, because {one.reason}." for one in refusals)
    rows = [f"({', '.join(names)})" for names in QUERY_KEY_VALUE] + [f"({name})" for name, _ in FUSED]
    rows += [f"({', '.join(row.up)}, {row.down})" for row in FEED_FORWARDS]
    looked = f"Looked in its numbered layers for children {'; '.join(rows)}."
    return f"{type(model).__name__} has no {what}.{reasons} {looked} {ONE_FILE}"
