"""Parameters of which every process holds a part (FSDP2's DTensors): reading, writing and choosing across processes.

What is decided needs whole tensors, which are gathered one at a time; what is kept are local shards, plain tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import PruningError
from .ranking import nth_of_bits, ordered_bits

T = TypeVar("T")
Axis = tuple[str, int]  # of a tensor: its name, and which


def unwrap(model: nn.Module, accelerator: Any = None) -> nn.Module:
    """Return the model inside DDP, torch.compile or accelerate's wrappers."""
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    inner = getattr(model, "_orig_mod", model)
    inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    return model if inner is model else unwrap(inner)  # either may be around the other


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what only sharded training needs."""
    return hasattr(tensor, "placements")


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether any of these tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors)


def bare_class(module: nn.Module) -> Any:
    """Return a module's class, before which FSDP2 puts one of its own."""
    kinds = type(module).__mro__
    return kinds[2] if len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" else kinds[0]


def check_whole(model: nn.Module) -> None:
    """Raise before anything waits for other processes: perhaps only one of them has called.

    Raises:
        PruningError: Parameters are sharded.
    """
    if any_sharded(model.parameters()):
        raise PruningError(
            "Shrinking and saving need whole tensors. Under FSDP, Pruning.finish() gathers them: use its `model` then; "
            "or load the full state dict into a plain model. Received: sharded parameters"
        )


def local(tensor: Any) -> Tensor:
    """Return the part that this process holds, sharing its memory; of a plain tensor all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor in every process: a call that all processes must make."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def bounds(tensor: Any) -> tuple[int, int, int] | None:
    """Return (axis, start, stop) of the local part of a tensor; ``None``: this process has all of it.

    Raises:
        PruningError: It is sharded along several axes at once.
    """
    sharded = [(i, one) for i, one in enumerate(tensor.placements if is_sharded(tensor) else ()) if one.is_shard()]
    if not sharded:
        return None
    if len(sharded) > 1:
        raise PruningError(f"Parameters must be sharded along one axis, as FSDP2 does. Received: {tensor.placements}")
    ((mesh_dim, placement),) = sharded
    size, mesh = tensor.shape[placement.dim], tensor.device_mesh
    chunk = -(-size // mesh.size(mesh_dim))  # as torch.chunk
    start = min(size, mesh.get_local_rank(mesh_dim) * chunk)
    return placement.dim, start, min(size, start + chunk)


def part_of(full: Tensor, like: Any) -> Tensor:
    """Return of a whole tensor what lies in this process' part of another of its shape."""
    there = bounds(like)
    return full if there is None else full.narrow(there[0], there[1], there[2] - there[1]).clone()


def join(part: Tensor, like: Any) -> Tensor:
    """Return a whole tensor from all processes' parts, which lie as those of another: every process must call it."""
    if bounds(like) is None:
        return part
    from torch.distributed.tensor import DTensor

    plain = part.to(torch.uint8) if part.dtype == torch.bool else part
    shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
    made = DTensor.from_local(plain, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return made.full_tensor().to(part.dtype)


def fill(tensor: Any, dim: int, index: Tensor, value: float) -> None:
    """Fill entries along an axis, in place; each process does its part."""
    local(tensor).index_fill_(dim, own_entries(tensor, dim, index), value)


def scale_along(tensor: Any, dim: int, index: Tensor, factors: Tensor) -> None:
    """Multiply entries along an axis each by its factor, in place; each process does its part."""
    every = torch.ones(tensor.shape[dim])
    every[index.cpu()] = factors.detach().float().cpu()
    there, part = bounds(tensor), local(tensor)
    if there is not None and there[0] == dim % tensor.ndim:
        every = every[there[1] : there[2]]
    part.mul_(every.to(part.device, part.dtype).view([-1 if axis == dim else 1 for axis in range(part.ndim)]))


def find_any(tensors: Mapping[Axis, Any], entries: Mapping[Axis, Tensor]) -> set[Axis]:
    """Return the axes along which any of these entries is not zero, in the parts that lie here."""
    by_device: dict[torch.device, dict[Axis, Tensor]] = {}
    for (name, dim), tensor in tensors.items():
        own = own_entries(tensor, dim, entries[name, dim])
        by_device.setdefault(tensor.device, {})[name, dim] = local(tensor).index_select(dim, own).any()
    told = [(axes, torch.stack([*axes.values()]).tolist()) for axes in by_device.values()]  # one wait for each GPU
    return {axis for axes, found in told for axis, is_found in zip(axes, found) if is_found}


def own_entries(tensor: Any, dim: int, index: Tensor) -> Tensor:
    """Return which entries along an axis lie here, in the numbers that they have here."""
    there = bounds(tensor)
    if there is not None and there[0] == dim % tensor.ndim:
        index = index[(index >= there[1]) & (index < there[2])] - there[1]
    return index.to(tensor.device)


def select_across(values: Mapping[str, Tensor], tensors: Mapping[str, Any], keep: int) -> tuple[dict[str, Tensor], int]:
    """Keep exactly this many entries over all processes: `allocation.select_weights` of what is nowhere whole.

    The threshold is found by bisection over the bits of its value, exactly: each round counts locally, and sums up.

    Args:
        values: Local parts, larger = keep; of one floating type.
        tensors: Whose parts they are, by the same names; all on one mesh.
        keep: Entries that stay in all.

    Returns:
        Boolean masks of the local parts, and the threshold's bits: the same in every process.
    """
    rank, gather = _collectives(list(tensors.values()))
    ordered = {name: ordered_bits(value) for name, value in values.items()}
    rank_of_threshold = sum(tensor.numel() for tensor in tensors.values()) - keep
    if rank_of_threshold <= 0:
        return {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}, 0
    low = nth_of_bits(ordered.values(), rank_of_threshold, lambda found: int(gather([found]).sum()))
    masks = {name: one > low for name, one in ordered.items()}
    room = keep - int(gather([sum(int(mask.sum()) for mask in masks.values())]).sum())
    equals = gather([int((one == low).sum()) for one in ordered.values()])
    for i, (name, mask) in enumerate(masks.items()):  # among equals the earlier ones: of tensors, then of processes
        before = int(equals[:, :i].sum()) + int(equals[:rank, i].sum())
        equal = (ordered[name] == low).flatten().nonzero().view(-1)
        mask.view(-1)[equal[: max(0, room - before)]] = True
    return masks, low


def _collectives(tensors: list[Any]) -> tuple[int, Callable[[list[int]], Tensor]]:
    """Return this process' place among those that share the tensors, and how they gather numbers: ``(processes, n)``.

    Raises:
        PruningError: Some tensors are sharded and others are not, or over other processes.
    """
    if any(bounds(one) is None or one.device_mesh != tensors[0].device_mesh for one in tensors):
        raise PruningError(
            "Weights that are pruned together must all be sharded over the same processes, or none. Received: a mixture"
        )
    mesh, distributed = tensors[0].device_mesh, torch.distributed
    mesh_dim = next(i for i, placement in enumerate(tensors[0].placements) if placement.is_shard())
    group = mesh.get_group(mesh_dim)

    def gather(numbers: list[int]) -> Tensor:
        mine = torch.tensor(numbers, device=tensors[0].device)
        everyone = [torch.empty_like(mine) for _ in range(mesh.size(mesh_dim))]
        distributed.all_gather(everyone, mine, group=group)
        return torch.stack(everyone).cpu()

    return mesh.get_local_rank(mesh_dim), gather


def total_of(number: int, tensor: Any) -> int:
    """Return the sum of a number over the processes that hold parts of a tensor."""
    return int(_collectives([tensor])[1]([number]).sum()) if bounds(tensor) is not None else number


def whole_copy(model: Any) -> Any:
    """Return a plain copy of a sharded transformers model, on the CPU in every process; ``None``: of another module.

    All processes must call it. Only a config says how to build a module a second time.
    """
    if not (hasattr(model, "config") and hasattr(model, "tie_weights")):
        return None
    with torch.device("meta"):
        plain = bare_class(model)(copy.deepcopy(model.config))
    state = {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for path, module in plain.named_modules():  # what no state holds: buffers, and tensors beside them
        live: Any = model.get_submodule(path)
        for name, tensor in [*module.named_buffers(recurse=False), *vars(module).items()]:
            if torch.is_tensor(tensor) and tensor.is_meta:
                setattr(module, name, getattr(live, name).detach().cpu().clone())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(live.get_parameter(name).requires_grad)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.train(model.training)


def max_over_processes(number: float) -> float:
    """Return the largest of all processes' numbers."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, number)
    return float(max(everyone))


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes: what is measured differs between processes. All of them call it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return make()
    told: list[Any] = [None, ""]
    failed: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            told[0] = make()
        except Exception as error:  # the others wait for what becomes of it
            failed, told[1] = error, str(error) or type(error).__name__
    distributed.broadcast_object_list(told, src=0)
    if told[1]:
        raise failed or PruningError(told[1])
    return told[0]  # type: ignore[no-any-return]


def average_over_processes(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; where there is one, the tensor itself."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
