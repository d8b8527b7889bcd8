"""A score that is learned: how sure a run is of each weight, by an optimizer of its own (L0: arXiv:1712.01312)."""

from __future__ import annotations

import torch

from hf_prune import Evidence, PruningError, register_evidence, register_score


@register_evidence("sure")
class LearnedGates(Evidence):
    """A gate on each weight, whose gradient goes straight through the mask; each open one costs."""

    heavy = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        if self.live.sharded:
            raise PruningError("Learned gates need whole parameters. Received: a model sharded by FSDP")
        self._learn({name: torch.full(self.live.shapes[name], 2.0) for name in self.weights})

    def _learn(self, logits, moments=None):
        self.logits = {name: one.clone().requires_grad_() for name, one in logits.items()}
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=0.1)
        for name, state in (moments or {}).items():
            self.optimizer.state[self.logits[name]] = state

    def of_weight(self, need, name, weight):
        return self.logits[name].detach()

    def read(self, masking, ahead):
        tensors = self.live.tensors
        for name, logit in self.logits.items():
            open_ = torch.sigmoid(logit.detach())
            gain = tensors[name].grad / self.scale * masking.full(name, tensors[name])
            logit.grad = (gain + 1e-3) * open_ * (1 - open_)

    def step(self):
        self.optimizer.step()

    def follow(self, cut):
        super().follow(cut)
        kept = {name: self.optimizer.state[one] for name, one in self.logits.items() if one in self.optimizer.state}
        moments = {cut.names[name]: {"step": one["step"]} for name, one in kept.items() if name in cut.names}
        for key in ("exp_avg", "exp_avg_sq"):
            for name, one in cut.tensors({name: state[key] for name, state in kept.items()}).items():
                moments[name][key] = one
        self._learn(cut.tensors({name: one.detach() for name, one in self.logits.items()}), moments)

    def state_dict(self):
        return {
            "logits": {n: one.detach().clone() for n, one in self.logits.items()},
            "adam": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state):
        self._learn(state["logits"])
        self.optimizer.load_state_dict(state["adam"])


@register_score("sure", needs=("sure",))
def sure(weight, sure):
    """How sure the run is of a weight."""
    return sure
