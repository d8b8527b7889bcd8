"""A guard that lets no more units or weights go than a metric allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ..errors import PruningError, did_you_mean
from ..settings import settings
from .guards import Guard, Verdict, register_guard

_LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "mse", "rmse", "mae", "mape", "wer", "cer", "ter", "brier")
_ROUNDING = 1e-9  # 0.9 - 0.01 is not quite 0.89


@register_guard("accuracy")
@settings()
class AccuracyGuard(Guard):
    """Prune as far as a metric allows, and no further.

    At first the schedule goes on as it would. After an evaluation that is worse than allowed the guard is careful: it
    waits until the metric is back, and lets each change through only when an evaluation has approved the one before.
    Where the metric stays away, weights, moments and masks go back to the last model that was approved, and the next
    change goes half as far. The run ends with the most that was approved; the report says what happened.

    Evaluations are its eyes: it makes no change before the first one, and there should be more of them than changes.
    A high learning rate costs a dense model some of its metric too, and gives it back as it falls. So what the
    evaluations of training before the first change have lost, on average, is allowed for until the end, evenly less and
    less; what a run ends with was approved without it.

    Args:
        metric: As a Trainer names it, with or without ``eval_``: ``"accuracy"``, ``"loss"``.
        max_drop: How much worse than the dense model it may be, 0 or more, in the metric's own units.
        dense: The dense model's; ``None``: the best that is measured before anything is pruned.
        greater_is_better: ``None``: by the metric's name: losses, errors and perplexities are better when lower.
        patience: Evaluations in a row that may be too bad, at least 1, before a change is undone.
        smallest: The smallest part of the way, in (0, 1], that is tried after a change was undone.
        undo: ``False``: nothing is undone. Each change waits until the metric is back from the one before it, or
            `patience` evaluations are spent (iterative pruning with recovery); it also works where units leave
            physically, and under FSDP.

    Example:
        >>> AccuracyGuard("accuracy", max_drop=0.01).lower_is_better
        False
    """

    metric: str = "accuracy"
    max_drop: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    dense: float | None = Field(default=None, allow_inf_nan=False)
    greater_is_better: bool | None = None
    patience: int = Field(default=3, ge=1)
    smallest: float = Field(default=0.02, gt=0, le=1)
    undo: bool = True

    needs_evaluation = True

    def __post_init__(self) -> None:
        """Begin without having seen anything."""
        self.goes_back = self.undo
        self.measured: float | None = self.dense  # of the dense model
        self.value: float | None = None  # of the last evaluation
        self.step: float | None = None  # the part of the way that the next change may go; None: as the schedule says
        self.bad, self.fresh = (
            0,
            False,
        )  # evaluations in a row that were too bad; whether one came since the last change
        self.changes, self.undone_changes, self.others = 0, 0, list[str]()
        self.before = list[float]()  # what evaluations of training have found before the first change

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the metric is a better one."""
        if self.greater_is_better is not None:
            return not self.greater_is_better
        return any(part in _LOWER_IS_BETTER for part in self.metric.lower().replace("-", "_").split("_"))

    @property
    def allowed(self) -> float | None:
        """The worst value that may be; ``None``: the dense model was not measured."""
        drop = self.max_drop if self.lower_is_better else -self.max_drop
        return None if self.measured is None else self.measured + drop

    @property
    def slack(self) -> float:
        """How much the metric may be worse than `allowed` by now, because training itself costs some."""
        if self.measured is None or not self.before:
            return 0.0
        lost = sum(self.before) / len(self.before) - self.measured
        return (1 - self.progress) * max(0.0, lost if self.lower_is_better else -lost)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Compare the metric with the dense model's."""
        name = self.metric.removeprefix("eval_")
        value = metrics.get(f"eval_{name}", metrics.get(name))
        if value is None:
            self.others = sorted({*self.others, *metrics})
            return
        self.value, self.fresh = float(value), True
        if self.dense is None and not self.changes and not math.isnan(self.value):
            best = min if self.lower_is_better else max
            self.measured = self.value if self.measured is None else best(self.measured, self.value)
        if self.progress and not self.changes and not math.isnan(self.value):
            self.before.append(self.value)
        self.bad = 0 if self._is_good(self.value, self.slack) else self.bad + 1
        if self.bad and self.step is None and self.level > self.kept:
            self.step = self.level - self.kept

    def verdict(self) -> Verdict:
        """Go while the metric is good; wait for it, and where it does not come back undo the last change.

        Raises:
            PruningError: Evaluations tell other metrics.
        """
        if self.value is None and self.others:
            raise PruningError(
                f"AccuracyGuard found no metric '{self.metric}' in an evaluation: compute_metrics must return it, or "
                f"name another.{did_you_mean(self.metric, self.others)} Received: {', '.join(self.others)}"
            )
        if self.measured is None:
            return "wait"
        if self.bad >= self.patience:
            return ("back" if self.level > self.kept else "wait") if self.undo else "go"
        careful = self.step is not None or not self.undo
        exhausted = self.undo and self.step is not None and self.step < self.smallest
        unseen = careful and not self.fresh and self.changes > 0
        return "wait" if self.bad or exhausted or unseen else "go"

    def limit(self) -> float:
        """Return how much of the way may be gone after the change that is due."""
        return 1.0 if self.step is None or not self.undo else min(1.0, self.level + self.step)

    def proven(self) -> bool:
        """Say whether an evaluation has approved the model since the last change."""
        return not self.bad and (self.fresh or not self.changes)

    def lasting(self) -> bool:
        """Say whether it was approved without any slack."""
        return self.proven() and (self.value is None or self._is_good(self.value))

    def rests(self) -> bool:
        """Say whether it was approved without any slack, whatever it waits for."""
        return self.lasting()

    def changed(self) -> None:
        """Wait for an evaluation of what was changed."""
        if self.level:  # a schedule's first change may remove nothing yet
            self.changes, self.bad, self.fresh = self.changes + 1, 0, False

    def undone(self) -> None:
        """Go half as far the next time; what was gone back to had been approved."""
        self.undone_changes, self.bad, self.fresh = self.undone_changes + 1, 0, True
        self.step = self.step and self.step / 2

    def facts(self) -> dict[str, Any]:
        """Return what the guard did: metrics, changes that were made and undone, and where it ended."""
        told: dict[str, Any] = {
            "metric": self.metric,
            "dense": self.measured,
            "allowed": self.allowed,
            "last": self.value,
        }
        return {**told, "changes": self.changes, "undone": self.undone_changes, "level": round(self.level, 6)}

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen and done."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])

    def _is_good(self, value: float, slack: float = 0.0) -> bool:
        if self.allowed is None or math.isnan(value):
            return False
        slack += _ROUNDING
        return value <= self.allowed + slack if self.lower_is_better else value >= self.allowed - slack


_STATE = ("measured", "value", "step", "bad", "fresh", "changes", "undone_changes", "others", "before")
