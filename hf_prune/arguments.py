"""Pruning as command-line arguments, for scripts that read them with HfArgumentParser or TrlParser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .callback import PruningCallback
from .errors import Problem, PruningError, did_you_mean
from .pruners import PRUNERS, Pruner, UnitPruner, WeightPruner
from .schedules import SCHEDULES, Schedule
from .session import REGULARISERS, AccuracyGuard, PruningSettings, Regularisation
from .targets import Target

_KEYS = {
    "kind": "prune_schedule",
    "macs": "target_macs",
    "speedup": "target_speedup",
}  # of our settings; others have "prune_" before their name


@dataclass
class PruningArguments:
    """What to prune, when and how much: ``--prune heads neurons --target_macs 0.5``.

    Every field says in its help what it does. A value that is wrong is found when arguments are parsed.

    Raises:
        PruningError: A value is out of range, or two contradict each other: names the argument.

    Example:
        >>> PruningArguments(prune=["heads", "neurons"], target_macs=0.5).callback().settings.target
        Target(macs=0.5)
    """

    prune: list[str] = field(
        default_factory=lambda: ["heads", "neurons"], metadata={"help": f"What to remove: {', '.join(PRUNERS)}."}
    )
    target_macs: float | None = field(
        default=None,
        metadata={"help": "Share of the multiply-accumulates that remains, in (0, 1], over all but weights."},
    )
    target_speedup: float | None = field(
        default=None,
        metadata={
            "help": "How many times as fast as the dense model, at least 1, over all but weights: measured in ONNX "
            "Runtime where training begins (one thread, batch 1, 128 tokens)."
        },
    )
    prune_sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of each sort that is removed, in [0, 1); with a target of weights alone."},
    )
    prune_threshold: float | None = field(
        default=None,
        metadata={"help": "Instead of a sparsity: what scores this or less leaves, 0 or more; not with --target_macs."},
    )
    prune_relative: bool = field(
        default=False, metadata={"help": "The threshold, below 1, is a share of the largest score of each place."}
    )
    prune_regularisation: str | None = field(
        default=None,
        metadata={"help": "What drives to zero: l1, group_lasso, sensitivity, growing or a registered name."},
    )
    prune_strength: float = field(
        default=1.0, metadata={"help": "Of the regularisation: a step takes the learning rate times this, above 0."}
    )
    prune_begin: str = field(  # type: ignore[assignment]
        default=0.1,
        metadata={"help": "First change: up to 1 a fraction of all steps, above 1 a step; or '2 epochs', '1 steps'."},
    )
    prune_end: str = field(  # type: ignore[assignment]
        default=0.7,
        metadata={"help": "Last change: up to 1 a fraction of all steps, above 1 a step; or '2 epochs', '1 steps'."},
    )
    prune_frequency: str | None = field(
        default=None,
        metadata={
            "help": "Steps between two changes, at least 1, or '0.5 epochs'; left out, 50, or fewer in short runs."
        },
    )
    prune_schedule: str = field(
        default="cubic",
        metadata={
            "help": "cubic, linear, oneshot, polynomial, exponential, cosine, constant or a registered schedule."
        },
    )
    prune_power: float = field(
        default=3.0, metadata={"help": "Of polynomial schedules the exponent, of exponential ones the rate, above 0."}
    )
    prune_score: str = field(
        default="taylor", metadata={"help": "A registered score, such as taylor, movement, l1 or random."}
    )
    prune_reversible: bool | None = field(
        default=None,
        metadata={"help": "Whether what was masked may come back, for memory; left out, as the score is registered."},
    )
    prune_rule: str | None = field(
        default=None,
        metadata={"help": "Instead of that, a registered rule: of weights rigl, set or from_zero; final or anew."},
    )
    prune_multiple_of: int = field(default=1, metadata={"help": "Units that stay are a multiple of this, at least 1."})
    prune_min_kept: int = field(default=1, metadata={"help": "Units that stay in every place at least, 0 or more."})
    prune_guard: str | None = field(
        default=None,
        metadata={"help": "A metric of evaluations, such as accuracy: prune as far as it allows, and no further."},
    )
    prune_max_drop: float = field(
        default=0.01, metadata={"help": "How much worse than the dense model that metric may be, 0 or more."}
    )
    prune_shrink_at_end: bool = field(default=True, metadata={"help": "Remove units physically when training ends."})
    prune_shrink_during_training: bool = field(
        default=False, metadata={"help": "Remove them at every change, which saves time, in several processes too."}
    )

    def __post_init__(self) -> None:
        """Find what is wrong before a model is loaded."""
        self.callback()

    def callback(self, *, data: Iterable[Mapping[str, Any]] | None = None, seed: int = 0) -> PruningCallback:
        """Return a `PruningCallback`; ``attach`` it to a Trainer.

        Args:
            data: Calibration batches; ``None`` takes scores from the training batches.
            seed: For scores that draw numbers.
        """
        pruners = [self._pruner(name) for name in self.prune]
        self._check(pruners)
        target = _named(Target, **self._wanted) if self._wanted else None
        told: dict[str, Any] = {"guards": self._guards(), "seed": seed, "regularisation": self._regularisation()}
        told["shrink_during_training"] = self.prune_shrink_during_training
        settings = PruningSettings(pruners, self._schedule(), target, data, **told)
        return PruningCallback(settings, shrink_at_end=self.prune_shrink_at_end)

    @property
    def _wanted(self) -> dict[str, Any]:
        """What of a target is said, by its name there."""
        said = {"macs": self.target_macs, "speedup": self.target_speedup}
        return {name: value for name, value in said.items() if value is not None}

    def _pruner(self, name: str) -> Pruner:
        if name not in PRUNERS:
            hint = did_you_mean(name, list(PRUNERS))
            raise PruningError(f"prune must name {', '.join(PRUNERS)}.{hint} Received: '{name}'")
        made, settings = PRUNERS[name].made, PRUNERS[name].settings
        own = made is WeightPruner or not self._wanted
        units: dict[str, Any] = (
            {} if made is WeightPruner else {"multiple_of": self.prune_multiple_of, "min_kept": self.prune_min_kept}
        )
        amount: dict[str, Any] = (
            {"sparsity": self.prune_sparsity, "threshold": self.prune_threshold, "relative": self.prune_relative}
            if own
            else {}
        )
        how = {"score": self.prune_score, "reversible": self.prune_reversible, "rule": self.prune_rule}
        pruner: Pruner = _named(made, key="threshold", **amount, **how, **units, **settings)
        _named(pruner.resolve_rule, key="rule")
        return pruner

    def _regularisation(self) -> Regularisation | None:
        kind = self.prune_regularisation
        if kind is None:
            return None
        _named(lambda: REGULARISERS[kind], key="regularisation")
        made: Regularisation = _named(Regularisation, kind=kind, strength=self.prune_strength)
        return made

    def _guards(self) -> list[AccuracyGuard]:
        made = self.prune_guard and _named(AccuracyGuard, metric=self.prune_guard, max_drop=self.prune_max_drop)
        return [made] if made else []

    def _schedule(self) -> Schedule:
        begin, end = _moment("prune_begin", self.prune_begin), _moment("prune_end", self.prune_end)
        _named(lambda: SCHEDULES[self.prune_schedule], key="kind")
        made: Schedule = _named(
            Schedule,
            kind=self.prune_schedule,
            begin=begin,
            end=end,
            frequency=self.prune_frequency,
            power=self.prune_power,
        )
        alike = type(begin) is type(end) and not isinstance(begin, str)
        if alike and float(begin) > float(end):
            raise PruningError(f"prune_begin must not be after prune_end. Received: {begin} and {end}")
        return made

    def _check(self, pruners: list[Pruner]) -> None:
        units = [isinstance(pruner, UnitPruner) for pruner in pruners]
        if not pruners:
            raise PruningError(f"prune must name at least one of {', '.join(PRUNERS)}. Received: none")
        if len(self._wanted) > 1:
            raise PruningError(f"either target_macs or target_speedup decides. Received: {self._wanted}")
        without = [pruner.sparsity is None and pruner.threshold is None for pruner in pruners]
        if any(none and (not self._wanted or not unit) for none, unit in zip(without, units)):
            raise PruningError(
                f"prune_sparsity or prune_threshold must say how much of {', '.join(self.prune)} leaves"
                f"{', or target_macs or target_speedup how much remains' if all(units) else ''}. Received: None"
            )
        for name, value in self._wanted.items():
            if not any(units):
                raise PruningError(f"target_{name} is for units, not for weights alone. Received: {value:g}")
            said = [key for key in ("prune_sparsity", "prune_threshold") if getattr(self, key) is not None]
            if said and all(units):
                raise PruningError(
                    f"{said[0]} must be left out where target_{name} decides. Received: {getattr(self, said[0]):g}"
                )


def _moment(key: str, value: str | float) -> float | int | str:
    """Return a fraction of all steps as a float, a step as an int, and what has a unit as it is."""
    try:
        number = float(value)
    except ValueError:
        return str(value)
    if number > 1 and number != int(number):
        raise PruningError(f"{key} must be a fraction in [0, 1] or a whole step. Received: {value}")
    return int(number) if number > 1 else number


def _named(make: Callable[..., Any], *, key: str = "", **settings: Any) -> Any:
    """Make something of settings; an error names the argument that a setting came from."""
    try:
        return make(**settings)
    except PruningError as error:
        first, *others = error.problems or (Problem(key, str(error)),)
        named = Problem(_KEYS.get(first.key or key, f"prune_{first.key or key}"), first.text)
        raise PruningError("; ".join(map(str, (named, *others)))) from None
