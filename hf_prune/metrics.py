"""Metrics that work offline, as `evaluate.Metric` objects; every other name goes to the Hub's `evaluate` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from .errors import PruningError, did_you_mean

Problem = Literal[
    "classification",
    "regression",
    "multi_label",
    "tokens",
    "answers",
    "causal_lm",
    "masked_lm",
    "seq2seq",
    "speech",
    "ctc",
]
LANGUAGE: tuple[Problem, ...] = ("causal_lm", "masked_lm", "seq2seq")  # whose metric is what each token costs
SPOKEN: tuple[Problem, ...] = ("speech", "ctc")  # whose metric is how many words are wrong
Texts: TypeAlias = Callable[[Any, Any], tuple[list[str], list[str]]]
Numbers: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
_LONGEST = 2**20  # tokens: a span's first and last one are written as one number
IGNORED = -100  # the label that losses and metrics skip: padding, and tokens that are not asked for


def _accuracy(predictions: Numbers, references: Numbers) -> float:
    return float((predictions == references).mean())


def _f1(predictions: Numbers, references: Numbers, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average=average))


def _f1_macro(predictions: Numbers, references: Numbers) -> float:
    return _f1(predictions, references, average="macro")


def _span_f1(predictions: Numbers, references: Numbers) -> float:
    """Return the mean F1 of the tokens of a span, as of the words of an answer in SQuAD."""
    (a, b), (c, d) = (np.divmod(spans, _LONGEST) for spans in (predictions, references))
    shared = np.clip(np.minimum(b, d) - np.maximum(a, c) + 1, 0, None)
    return float(np.mean(2 * shared / ((b - a + 1) + (d - c + 1))))


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


def _word_errors(predictions: Numbers, references: Numbers) -> float:
    return _errors([(found.split(), wanted.split()) for found, wanted in zip(predictions, references)])


def _letter_errors(predictions: Numbers, references: Numbers) -> float:
    return _errors([*zip(predictions, references)])


def _errors(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Return how many words must be put in, taken out or exchanged, for each that was said."""
    return sum(_edits(*pair) for pair in pairs) / max(1, sum(len(wanted) for _, wanted in pairs))


def _edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Return Levenshtein's distance."""
    row = list(range(len(wanted) + 1))
    for at, one in enumerate(found, 1):
        before, row = row, [at]
        for there, other in enumerate(wanted, 1):
            row.append(min(before[there] + 1, row[-1] + 1, before[there - 1] + (one != other)))
    return row[-1]


# name in `evaluate` -> (function of flat predictions and references, type of predictions, of references)
_SHIPPED: dict[str, tuple[Callable[..., float], str, str]] = {
    "accuracy": (_accuracy, "int64", "int64"),
    "f1": (_f1, "int64", "int64"),
    "f1_macro": (_f1_macro, "int64", "int64"),
    "matthews_correlation": (_matthews, "int64", "int64"),
    "pearsonr": (_pearson, "float64", "float64"),
    "spearmanr": (_spearman, "float64", "float64"),
    "perplexity": (_perplexity, "float64", "int64"),
    "span_exact": (_accuracy, "int64", "int64"),
    "span_f1": (_span_f1, "int64", "int64"),
    "wer": (_word_errors, "string", "string"),
    "cer": (_letter_errors, "string", "string"),
}
_ENTITIES = "entity_f1"  # of rows as a whole, not of single tokens
SHIPPED = tuple(_SHIPPED)
METRICS = {  # that recipes can name, offline
    "accuracy": "share of rows (tokens, labels of several) that are right",
    "f1": "of class 1; of several labels a row, over all of them together",
    "f1_macro": "mean of each class' F1",
    "matthews_correlation": "of two classes of unequal size",
    "pearsonr": "linear correlation, for regression",
    "spearmanr": "correlation of ranks, for regression",
    "perplexity": "of language models and texts to write; smaller is better",
    "span_exact": "share of answers whose first and last token are right",
    "span_f1": "how much the tokens of answers overlap",
    "wer": "word error rate of texts that were said; smaller is better",
    "cer": "the same of single letters; smaller is better",
    _ENTITIES: "of whole entities, as CoNLL counts them",
}


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
            labels, where -100 is skipped. Also ``f1_macro``; ``wer`` and ``cer`` of texts; ``span_exact`` and
            ``span_f1`` of answers, which `compute_metrics_for` hands spans of tokens. Any other name goes to
            `evaluate.load`.
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
    return label_losses(scores[:, :-1], labels[:, 1:])


def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return what the label of each position cost, in nats: as `token_losses`, where labels stand in their place.

    Args:
        logits: ``(rows, length, vocabulary)``, or a tuple that starts with it.
        labels: ``(rows, length)``; -100 is skipped.

    Returns:
        ``(rows, length)``, 0 where the label is skipped.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    scores = scores.float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(scores, labels, reduction="none", ignore_index=IGNORED)


def losses_of(problem: Problem) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return what to give to Trainer as ``preprocess_logits_for_metrics``; ``None``: logits are what metrics read."""
    if problem not in LANGUAGE:
        return None
    return token_losses if problem == "causal_lm" else label_losses


def compute_metrics_for(
    names: Iterable[str] | Mapping[str, Mapping[str, Any]],
    problem: Problem = "classification",
    classes: Sequence[str] = (),
    texts: Texts | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Return the `compute_metrics` that a Trainer takes; the metrics are loaded now, so that a bad name fails first.

    Args:
        names: Names for `load_metric`, or names with their options: ``{"f1": {"average": "macro"}}``.
        problem: ``classification`` takes the best class (of a row, or of a token where the label is not -100),
            ``tokens`` the same, ``regression`` the single output, ``multi_label`` each class by itself, ``answers`` the
            likeliest span, ``causal_lm``, ``masked_lm`` and ``seq2seq`` the loss of each token, ``speech`` and ``ctc``
            the `texts`.
        classes: Names by number, of ``tokens``: ``entity_f1`` reads them (B-PER, I-PER, O).
        texts: Of ``speech`` and ``ctc``: makes texts of predicted and right tokens.

    Raises:
        PruningError: A metric cannot be loaded, or does not go with the problem.
    """
    options = names if isinstance(names, Mapping) else {name: {} for name in names}
    for name in options:
        _check_problem(name, problem)
    metrics = [load_metric(name, **keywords) for name, keywords in options.items() if name != _ENTITIES]

    def compute_metrics(evaluation: Any) -> dict[str, float]:
        predictions, references = (
            _flatten(evaluation, problem) if texts is None else texts(evaluation.predictions, evaluation.label_ids)
        )
        results: dict[str, float] = {}
        for metric in metrics:
            results.update(metric.compute(predictions=predictions, references=references))
        if _ENTITIES in options:
            results[_ENTITIES] = _entity_f1(evaluation, classes)
        return {name: results[name] for name in [*options, *results] if name in results}

    return compute_metrics


def _check_problem(name: str, problem: Problem) -> None:
    wanted: dict[str, tuple[Problem, ...]] = {
        "perplexity": LANGUAGE,
        _ENTITIES: ("tokens",),
        "span_exact": ("answers",),
        "span_f1": ("answers",),
        "wer": SPOKEN,
        "cer": SPOKEN,
    }
    own = [one for one in wanted if problem in wanted[one]] if problem in (*LANGUAGE, *SPOKEN, "answers") else []
    if problem not in wanted.get(name, (problem,)) or (own and name not in own):
        rule = f"{problem} has {', '.join(own)}" if own else f"{name} goes with {', '.join(wanted[name])}"
        raise PruningError(f"metrics: {rule}, others don't. Received: '{name}', {problem}.")


def _entity_f1(evaluation: Any, classes: Sequence[str]) -> float:
    """Return F1 of whole entities, as CoNLL counts them: of one type, from the first to the last word."""
    labels = np.asarray(evaluation.label_ids)
    best = np.asarray(_first(evaluation.predictions)).argmax(-1)
    found, wanted = set[tuple[int, str, int, int]](), set[tuple[int, str, int, int]]()
    for row, (ours, theirs) in enumerate(zip(best, labels)):
        asked = theirs != IGNORED
        for entities, numbers in ((found, ours[asked]), (wanted, theirs[asked])):
            entities |= {(row, *one) for one in _entities([classes[number] for number in numbers])}
    return 2 * len(found & wanted) / max(1, len(found) + len(wanted))


def _entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return type, first and last word of each entity; tags without B- and I- are types themselves."""
    entities: list[tuple[str, int, int]] = []
    before = "O"
    for at, tag in enumerate(tags):
        begins, kind = tag.startswith("B-"), tag[2:] if tag[:2] in ("B-", "I-") else tag
        if tag != "O":
            goes_on = not begins and kind == before and bool(entities)
            entities[-1:] = [(kind, entities[-1][1], at)] if goes_on else [*entities[-1:], (kind, at, at)]
        before = "O" if tag == "O" else kind
    return entities


def _first(outputs: Any) -> Any:
    """Return logits, where a model hands out more."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _spans(evaluation: Any) -> tuple[Numbers, Numbers]:
    """Return the likeliest span of each row, and the right one: the first token in front of the last as one number."""
    starts, ends = (np.asarray(one, dtype=np.float64) for one in evaluation.predictions[:2])
    starts, ends = (np.where(one == IGNORED, -np.inf, one) for one in (starts, ends))  # Trainer's padding
    best = np.array([_best_span(a, b) for a, b in zip(starts, ends)])
    a, b = (np.asarray(one).reshape(-1).astype(np.int64) for one in evaluation.label_ids[:2])
    return best, a * _LONGEST + b


def _best_span(starts: Numbers, ends: Numbers) -> int:
    both = np.where(np.tri(len(starts), k=-1, dtype=bool), -np.inf, starts[:, None] + ends[None])  # no end before
    first, last = divmod(int(both.argmax()), len(starts))
    return first * _LONGEST + last


def _flatten(evaluation: Any, problem: Problem) -> tuple[Numbers, Numbers]:
    """Turn Trainer's ``(logits, labels)`` into flat predictions and references, without what is ignored."""
    if problem == "answers":
        return _spans(evaluation)
    logits, labels = np.asarray(_first(evaluation.predictions)), np.asarray(evaluation.label_ids)
    if problem == "multi_label":
        return (logits > 0).astype(np.int64).reshape(-1), labels.astype(np.int64).reshape(-1)
    if problem in ("masked_lm", "seq2seq"):
        return logits.reshape(-1), labels.reshape(-1)
    if problem == "regression":
        return logits.reshape(-1), labels.reshape(-1)
    if problem == "causal_lm":
        losses = token_losses(*map(torch.as_tensor, (logits, labels))).numpy() if logits.ndim == 3 else logits
        return losses.reshape(-1), labels[:, 1:].reshape(-1)
    asked = labels != IGNORED
    return logits.argmax(-1)[asked], labels[asked]
