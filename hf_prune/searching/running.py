"""The search itself: a dense model once, and then one run after the other, each from the last good model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import set_seed

from ..errors import PruningError, did_you_mean
from ..files import write_text
from ..job import evaluate
from ..metrics import METRICS
from ..recipe import Recipe, load_recipe
from ..recipe_tasks import saved_model
from ..workflow import check, make_small, prepare, say, train_dense
from .aims import TIMES, Aim, aim_of
from .result import Candidate, SearchResult

_LOWER = ("loss", "perplexity", "wer", "cer")  # of these, less is better
_ROUNDING = 1e-9


def search(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    max_drop: float = 0.01,
    metric: str | None = None,
    trials: int = 8,
    storage: str | None = None,
    output: str | Path | None = None,
) -> SearchResult:
    """Search for the smallest model that is good enough: runs of a recipe, each with another target.

    The dense model is trained once. The first trial takes the recipe's own target; while models are good enough the
    next is half as large, then always the middle between a good one and one that is not. A trial goes on from the
    smallest good model that is denser than it, or from the dense one. A search that was killed goes on where it was:
    what has ended is not run again. Several processes may work at one search, with the same `storage` and `output`.

    Args:
        recipe: As in `run`; it has a target, whose key changes between trials.
        overrides: ``key=value`` each.
        max_drop: How much worse than the dense model's the metric may be, absolute, in [0, 1): 0.01 is a point.
        metric: Name of a metric, or ``"loss"``; ``None``: the recipe's first.
        trials: How many end at most, in all processes and runs of this search, 1 or more.
        storage: URL of a database that Optuna can use; ``None``: a file in `output`.
        output: Folder of the search; ``None``: the recipe's output with ``-search`` behind it.

    Returns:
        All models, the front of them and the smallest good one. The same is in ``search.json``, ``trials.csv`` and
        ``front.png`` in the folder, with the models below ``trials``.

    Raises:
        PruningError: A setting does not do, or no trial was good enough: names the best one.

    Example:
        >>> print(search("quickstart", max_drop=0.02, trials=5))  # doctest: +SKIP
    """
    _check_settings(max_drop, trials)
    told, metric = _with_metric(load_recipe(recipe, overrides), metric)
    told = told.model_copy(update={"output": Path(output or f"{told.output}-search"), "push": None})
    one = Search(told, aim_of(told), metric, max_drop, storage)
    one.run(trials)
    found = one.write()
    if found.best is None:
        raise PruningError(_none_was_good(found))
    return found


class Search:
    """One process' part in a search.

    Args:
        recipe: Of all trials; its output is the folder of the search.
        aim: What changes.
        metric: Which decides.
        max_drop: How much of it may be lost.
        storage: URL; ``None``: a file in the folder.

    Raises:
        PruningError: Data, model or folder do not do, or the storage holds a search of another recipe.
    """

    def __init__(self, recipe: Recipe, aim: Aim, metric: str, max_drop: float, storage: str | None) -> None:
        from .trials import Trials

        self.recipe, self.aim, self.metric, self.max_drop = recipe, aim, metric, max_drop
        set_seed(recipe.seed)
        self.job = prepare(recipe)
        check(self.job)
        folder = recipe.output.absolute()
        url = storage or f"sqlite:///{folder / 'trials.db'}"
        directions = ["minimize" if metric in _LOWER else "maximize", "minimize", "minimize"]
        self.trials = Trials(folder, url, f"hf_prune: {recipe.name}", aim, directions, self._is_good)
        self._check_same()

    def run(self, most: int) -> None:
        """Run trials until there is nothing left to find, or as many as asked for have ended."""
        self._take_dense()
        while True:
            for number in self.trials.release_killed():
                say(f"Trial {number} was killed: it is run again")
            if len(self.trials.ended) + len(self.trials.running) >= most:
                return
            if self._cannot_shrink():
                return
            if self.aim.next(self.trials.tried()) is None:
                say("Nothing is left to find between the models that are good enough and those that are not")
                return
            self.trials.run(self._trial)

    def _cannot_shrink(self) -> bool:
        """Say so where the smallest target has brought no smaller model: floors let no more units go."""
        good = [one for one in self.trials.complete if self._is_good(one)]
        good.sort(key=lambda one: self.aim.size(self.trials.asked(one)))
        last = [one.user_attrs["pruned"]["parameters"] for one in good[:2]]
        if len(last) < 2 or last[0] < last[1]:
            return False
        say("The model cannot get smaller: min_kept, multiple_of, include and exclude let no more units go")
        return True

    def _take_dense(self) -> None:
        """Train the dense model, or take that of whoever was first, and evaluate it once for all."""
        from filelock import FileLock

        folder = self.job.output / "dense"
        if self.recipe.dense is not None:
            with FileLock(self.job.output / "locks" / "dense.lock"):
                if not (folder / "config.json").is_file():
                    train_dense(self.job)
            self.job.model = saved_model(self.recipe, folder)
        if "dense" not in self.trials.study.user_attrs:
            found = evaluate(self.job, self.job.model)
            if self.metric not in found:
                raise PruningError(
                    f"metric must be one that the recipe's metrics give: {', '.join(found)}."
                    f"{did_you_mean(self.metric, found)} Received: '{self.metric}'"
                )
            self.trials.remember("dense", found)
        say(f"Dense model: {self.metric} {self.dense_metric:.4f}")

    @property
    def dense_metric(self) -> float:
        """The metric of the dense model."""
        return float(self.trials.study.user_attrs["dense"][self.metric])

    def drop(self, trial: Any) -> float:
        """Return how much worse a trial's model is than the dense one."""
        lost = self.dense_metric - float(trial.values[0])
        return -lost if self.metric in _LOWER else lost

    def _is_good(self, trial: Any) -> bool:
        return bool(self.drop(trial) <= self.max_drop + _ROUNDING)

    # one trial
    def _trial(self, number: int, value: float) -> tuple[list[float], dict[str, Any]]:
        """Run the recipe with this target, and say so where no model comes of it: no table has such a trial."""
        try:
            return self._run(number, value)
        except PruningError as error:
            say(f"Trial {number} has no model, and counts as one that lost too much: {error}")
            raise

    def _run(self, number: int, value: float) -> tuple[list[float], dict[str, Any]]:
        """Run the recipe with this target, and return what is compared, and what is told of it."""
        begun_from, place = self._begin(value), self.trials.place(number)
        start = "the dense model" if begun_from is None else f"trial {begun_from}"
        say(f"Trial {number}: target.{self.aim.key}={value:g}, from {start}")
        settings = {"target": self.aim.of(self.recipe, value), "output": self.job.output / "trials" / place.name}
        model = None if begun_from is None else self.trials.place(begun_from) / "model"
        job = dataclasses.replace(self.job, recipe=self.recipe.model_copy(update=settings), start=model)
        set_seed(self.recipe.seed)
        check(job)
        make_small(job)
        report = job.report
        assert report.dense is not None
        assert report.pruned is not None
        runtime = next(one for one in ("onnxruntime", "torch") if one in report.pruned.latency_ms)
        dense, pruned = (_figures(one, runtime) for one in (report.dense, report.pruned))
        metric = report.metrics[self.metric]["pruned"]
        say(f"Trial {number}: {self.metric} {metric:.4f}, the dense model's {self.dense_metric:.4f}")
        facts = {"metrics": {name: both["pruned"] for name, both in report.metrics.items()}, "begun_from": begun_from}
        # in turn with the dense model: from one trial to the next a machine may have other things to do
        cost = pruned["latency_ms"] / dense["latency_ms"] if self.aim.key in TIMES else pruned["macs"]
        return [metric, cost, pruned["size_mb"]], {**facts, "runtime": runtime, "dense": dense, "pruned": pruned}

    def _begin(self, value: float) -> int | None:
        """Return the trial whose model comes next above this target and is good; ``None``: the dense model."""
        size = self.aim.size(value)
        denser = [
            (self.aim.size(self.trials.asked(one)), one.number)
            for one in self.trials.complete
            if self._is_good(one) and (self.trials.place(one.number) / "model").is_dir()
        ]
        return min((one for one in denser if one[0] > size), default=(0.0, None))[1]

    # what was found
    def result(self) -> SearchResult:
        """Return what all trials that ended have found.

        Raises:
            PruningError: None has.
        """
        complete, front = self.trials.complete, self.trials.front()
        if not complete:
            raise PruningError(f"No trial has ended with a model. {self._last_error() or 'Others are still running'}")
        last = complete[-1].user_attrs
        dense_ms = median(one.user_attrs["dense"]["latency_ms"] for one in complete)
        figures = {**last["dense"], "latency_ms": dense_ms}
        dense = Candidate(None, None, self.dense_metric, 0.0, True, False, **figures, folder=self.job.output / "dense")
        candidates = [self._candidate(one, one.number in front, dense_ms) for one in complete]
        names = self.recipe.name, self.aim.key, self.metric, self.metric in _LOWER
        return SearchResult(*names, self.max_drop, dense, tuple(candidates), last["runtime"])

    def _candidate(self, trial: Any, front: bool, dense_ms: float) -> Candidate:
        told, took = trial.user_attrs, trial.duration
        share = told["pruned"]["latency_ms"] / told["dense"]["latency_ms"]
        return Candidate(
            trial.number,
            self.trials.asked(trial),
            trial.values[0],
            self.drop(trial),
            self._is_good(trial),
            front,
            **{**told["pruned"], "latency_ms": share * dense_ms},
            folder=self.job.output / "trials" / self.trials.place(trial.number).name / "model",
            begun_from=told["begun_from"],
            seconds=took.total_seconds() if took else 0.0,
        )

    def write(self) -> SearchResult:
        """Write what was found into the folder, and return it."""
        found, folder = self.result(), self.job.output
        write_text(folder / "search.json", json.dumps(found.to_dict(), indent=2) + "\n")
        found.to_csv(folder / "trials.csv")
        found.plot(folder / "front.png")
        return found

    def _last_error(self) -> str:
        told = [one.user_attrs["error"] for one in self.trials.ended if "error" in one.user_attrs]
        return f"The last one: {told[-1]}" if told else ""

    def _check_same(self) -> None:
        """Check that what is stored are trials of the same recipe, by the same metric."""
        plain = self.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output", "report_to"})
        mine = json.loads(json.dumps({**plain, "metric": self.metric}))
        stored = self.trials.remember("recipe", mine)
        other = [key for key in {**mine, **stored} if mine.get(key) != stored.get(key)]
        if other:
            raise PruningError(
                "The search that is stored must be of the same recipe and metric: give another output or storage, or "
                f"give the recipe another name. Received: other {', '.join(other)}"
            )


def _figures(measured: Any, runtime: str) -> dict[str, float]:
    figures = {"macs": measured.prunable_macs, "parameters": measured.parameters, "size_mb": measured.size_mb}
    return {**figures, "latency_ms": measured.latency_ms[runtime]}


def _check_settings(max_drop: float, trials: int) -> None:
    if not 0 <= max_drop < 1:
        hint = f" Did you mean {max_drop / 100:g}?" if 1 <= max_drop < 100 else ""
        raise PruningError(f"max_drop must be in [0, 1): 0.01 is a point. Received: {max_drop:g}.{hint}")
    if trials < 1:
        raise PruningError(f"trials must be 1 or more. Received: {trials}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PruningError(
            "search runs a trial in one process: start it several times with one --storage and --output, each with its "
            f"own CUDA_VISIBLE_DEVICES. Received: WORLD_SIZE={os.environ['WORLD_SIZE']}"
        )
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise PruningError(f"search needs Optuna: pip install 'hf_prune[search]'. Received: {error}") from error


def _with_metric(recipe: Recipe, metric: str | None) -> tuple[Recipe, str]:
    """Return the recipe, which computes the metric, and the metric's name."""
    metric = metric or [*recipe.metrics, "loss"][0]
    if metric in (*recipe.metrics, "loss"):
        return recipe, metric
    if metric not in METRICS:
        known = [*dict.fromkeys([*recipe.metrics, *METRICS, "loss"])]
        raise PruningError(
            f"metric must be one of {', '.join(known)}, or in the recipe's metrics.{did_you_mean(metric, known)} "
            f"Received: '{metric}'"
        )
    return recipe.model_copy(update={"metrics": [*recipe.metrics, metric]}), metric


def _none_was_good(found: SearchResult) -> str:
    best = min(found.candidates, key=lambda one: one.drop)
    return (
        f"No trial was good enough: none lost at most {found.max_drop:g} of the dense model's {found.metric} "
        f"({found.dense.metric:.4f}). The best was trial {best.trial}, target.{found.key}={best.asked:g}, which lost "
        f"{best.drop:.4f}; train longer, allow more, or run more trials. Received: max_drop={found.max_drop:g}"
    )
