"""Two clocks of a run: optimizer steps, and how far the schedule is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Clock:
    """Where a run is. Steps always go on; a guard may hold the schedule's position, or send it back.

    Args:
        total_steps: Optimizer steps of the whole run, at least 1.
        steps: Steps that the optimizer has taken.
        skipped: Steps that it has left out, because a GradScaler had found an overflow.
        position: The step at which the schedule is.
    """

    total_steps: int
    steps: int = 0
    skipped: int = 0
    position: int = 0

    def tick(self, taken: bool) -> None:
        """Count a step."""
        self.steps, self.skipped = self.steps + taken, self.skipped + (not taken)
        self.position += taken

    def wait(self) -> None:
        """Let the schedule stand where it was before this step."""
        self.position -= 1

    @property
    def over(self) -> bool:
        """Whether this was the last step of a run that has left some out."""
        return self.skipped > 0 and self.steps + self.skipped >= self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is."""
        return {key: value for key, value in asdict(self).items() if key != "total_steps"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where `state_dict` was taken."""
        self.steps, self.skipped, self.position = state["steps"], state["skipped"], state["position"]


def epoch_steps_of(args: Any, state: Any, batches: Any) -> float | None:
    """Return the optimizer steps of one pass over the data of a Trainer; ``None``: the data have no length.

    Args:
        args: The Trainer's.
        state: The Trainer's.
        batches: Its loader.
    """
    try:
        return float(-(-len(batches) // args.gradient_accumulation_steps))  # what is left over is a step too
    except TypeError:
        return None if args.max_steps > 0 else float(state.max_steps / args.num_train_epochs)
