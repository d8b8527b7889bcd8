"""No change while the accuracy is too low; back to the model of before the last change where it stays so."""

from __future__ import annotations

from hf_prune import Guard, register_guard


@register_guard("accuracy_floor")
class FloorGuard(Guard):
    """Wait below a floor, and go back after so many evaluations there."""

    goes_back = True

    def __init__(self, floor=0.8, patience=2):
        self.floor, self.patience, self.bad = floor, patience, 0

    def observe(self, metrics):
        self.bad = 0 if metrics["eval_accuracy"] >= self.floor else self.bad + 1

    def verdict(self):
        return "go" if not self.bad else "back" if self.bad > self.patience else "wait"

    def state_dict(self):
        return {"bad": self.bad}

    def load_state_dict(self, state):
        self.bad = state["bad"]
