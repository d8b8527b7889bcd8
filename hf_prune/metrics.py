"""Metrics that work offline, as `evaluate.Metric` objects; every other name goes to the Hub's `evaluate` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from .errors import PruningError, did_you_mean

Problem = Literal["classification", "regression", "causal_lm"]
Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
IGNORED = -100  # the label that losses and metrics skip: padding, and tokens that are not asked for


def _accuracy(predictions: Numbers, references: Numbers) -> float:
    return float((predictions == references).mean())


def _f1(predictions: Numbers, references: Numbers, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average=average))


def _matthews(predictions: Numbers, references: Numbers) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def _pearson(predictions: Numbers, references: Numbers) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(predictions, references)[0])


def _spearman(predictions: Numbers, references: Numbers) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predictions, references)[0])


def _perplexity(predictions: Numbers, references: Numbers) -> float:
    return math.exp(float(predictions[references != IGNORED].mean()))


# name in `evaluate` -> (function of flat predictions and references, type of predictions, of references)
_SHIPPED: dict[str, tuple[Callable[..., float], str, str]] = {
    "accuracy": (_accuracy, "int64", "int64"),
    "f1": (_f1, "int64", "int64"),
    "matthews_correlation": (_matthews, "int64", "int64"),
    "pearsonr": (_pearson, "float64", "float64"),
    "spearmanr": (_spearman, "float64", "float64"),
    "perplexity": (_perplexity, "float64", "int64"),
}
SHIPPED = tuple(_SHIPPED)


@cache
def _metric_class() -> type:
    """Define the class on first use: importing evaluate takes seconds."""
    import evaluate
    from datasets import Features, Value

    class ShippedMetric(evaluate.Metric):  # type: ignore[misc]
        def __init__(self, name: str, **options: Any) -> None:
            self.function, *self.dtypes = _SHIPPED[name]
            self.shipped_name, self.options = name, options
            super().__init__(keep_in_memory=True)

        def _info(self) -> Any:
            features = Features(dict(zip(("predictions", "references"), map(Value, self.dtypes), strict=True)))
            text = f"{self.shipped_name}, computed offline by hf_prune"
            return evaluate.MetricInfo(description=text, citation="", features=features)

        def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
            arrays = np.asarray(predictions), np.asarray(references)
            return {self.shipped_name: self.function(*arrays, **{**self.options, **options})}

    return ShippedMetric


def load_metric(name: str, **kwargs: Any) -> Any:
    """Return an `evaluate.Metric`: shipped and offline where we have it, from the Hub otherwise.

    Args:
        name: ``accuracy``, ``f1``, ``matthews_correlation``, ``pearsonr``, ``spearmanr`` (the definitions and result
            keys of the Hub's metrics), or ``perplexity``: predictions are losses per token in nats, references the
            labels, where -100 is skipped. Any other name goes to `evaluate.load`.
        kwargs: For a shipped metric what its `compute` takes (``average="macro"`` for f1, which is ``"binary"`` by
            default); for others whatever `evaluate.load` takes.

    Returns:
        A metric with `add_batch` and `compute`; one metric's `compute` gives ``{name: float}``.

    Raises:
        PruningError: The name is not shipped, and the Hub has no such metric or cannot be reached.

    Example:
        >>> load_metric("accuracy").compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
        {'accuracy': 0.75}
    """
    if name in _SHIPPED:
        return _metric_class()(name, **kwargs)
    import evaluate

    try:
        return evaluate.load(name, **kwargs)
    except Exception as error:  # offline, unknown, or a missing dependency: each library raises its own type
        raise PruningError(
            f"metrics: '{name}' is not shipped ({', '.join(SHIPPED)}), and evaluate.load could not get it: "
            f"{_first_line(error)} Received: '{name}'.{did_you_mean(name, SHIPPED)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return what each next token cost, in nats; give it to Trainer as ``preprocess_logits_for_metrics``.

    Trainer keeps what this returns for the whole evaluation set: one number a token instead of one a word of the
    vocabulary.

    Args:
        logits: ``(rows, length, vocabulary)``, or a tuple that starts with it.
        labels: ``(rows, length)``, not shifted; -100 is skipped.

    Returns:
        ``(rows, length - 1)``, 0 where the label is skipped.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    scores = scores[:, :-1].float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(scores, labels[:, 1:], reduction="none", ignore_index=IGNORED)


def compute_metrics_for(
    names: Iterable[str] | Mapping[str, Mapping[str, Any]], problem: Problem = "classification"
) -> Callable[[Any], dict[str, float]]:
    """Return the `compute_metrics` that a Trainer takes; the metrics are loaded now, so that a bad name fails first.

    Args:
        names: Names for `load_metric`, or names with their options: ``{"f1": {"average": "macro"}}``.
        problem: ``classification`` takes the best class (of a row, or of a token where the label is not -100),
            ``regression`` the single output, ``causal_lm`` the loss of each next token.

    Raises:
        PruningError: A metric cannot be loaded, or perplexity is asked for anything but a causal language model.
    """
    options = names if isinstance(names, Mapping) else {name: {} for name in names}
    for name in options:
        if (name == "perplexity") != (problem == "causal_lm"):
            raise PruningError(f"metrics: perplexity goes with causal_lm, others don't. Received: '{name}', {problem}.")
    metrics = [load_metric(name, **keywords) for name, keywords in options.items()]

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        predictions, references = _flatten(evaluation, problem)
        results: dict[str, float] = {}
        for metric in metrics:
            results.update(metric.compute(predictions=predictions, references=references))
        return results

    return compute_metrics


def _flatten(evaluation: Any, problem: Problem) -> tuple[Numbers, Numbers]:
    """Turn Trainer's ``(logits, labels)`` into flat predictions and references, without what is ignored."""
    logits, labels = evaluation.predictions, np.asarray(evaluation.label_ids)
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if problem == "regression":
        return logits.reshape(-1), labels.reshape(-1)
    if problem == "causal_lm":
        losses = token_losses(*map(torch.as_tensor, (logits, labels))).numpy() if logits.ndim == 3 else logits
        return losses.reshape(-1), labels[:, 1:].reshape(-1)
    asked = labels != IGNORED
    return logits.argmax(-1)[asked], labels[asked]
