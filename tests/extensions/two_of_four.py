"""2:4, for which GPUs have kernels (Mishra et al. 2021, arXiv:2104.08378): two of four leave, in ever more blocks."""

from __future__ import annotations

import torch

from hf_prune import register_pattern


@register_pattern("2:4")
def two_of_four(values, keep):
    """Let the two smallest of four leave, first where they are worth least."""
    blocks = {name: value.reshape(-1, 4) for name, value in values.items()}
    smallest = {name: block.topk(2, largest=False) for name, block in blocks.items()}
    worth = torch.cat([found.values.sum(1) for found in smallest.values()])
    chosen = torch.zeros(len(worth), dtype=torch.bool)
    chosen[worth.argsort(stable=True)[: (4 * len(worth) - keep) // 2]] = True
    masks = {}
    for (name, found), mine in zip(smallest.items(), chosen.split([len(block) for block in blocks.values()])):
        gone = torch.zeros_like(blocks[name], dtype=torch.bool).scatter_(1, found.indices, mine[:, None].expand(-1, 2))
        masks[name] = ~gone.view_as(values[name])
    return masks
