"""Metrics against sklearn, scipy and numbers worked out by hand, all offline."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from transformers import EvalPrediction

from hf_prune.errors import PruningError
from hf_prune.metrics import SHIPPED, compute_metrics_for, load_metric, token_losses


def test_accuracy_of_three_in_four():
    assert load_metric("accuracy").compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1]) == {"accuracy": 0.75}


def test_f1_by_hand():
    # 2 true positives, 1 false positive, 1 false negative: 2 * 2 / (2 * 2 + 1 + 1) = 2/3
    result = load_metric("f1").compute(predictions=[1, 1, 1, 0, 0], references=[1, 1, 0, 1, 0])
    assert result["f1"] == pytest.approx(2 / 3)


def test_f1_average_from_load_or_from_compute():
    predictions, references = [0, 2, 1, 1, 2, 0], [0, 1, 1, 2, 2, 0]
    expected = sk.f1_score(references, predictions, average="macro")
    assert expected == pytest.approx(2 / 3)  # classes: 1, 1/2, 1/2
    assert load_metric("f1", average="macro").compute(predictions=predictions, references=references)["f1"] == expected
    assert load_metric("f1").compute(predictions=predictions, references=references, average="macro")["f1"] == expected


def test_matthews_by_hand():
    # tp 2, tn 1, fp 1, fn 1: (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2) = 1/6
    result = load_metric("matthews_correlation").compute(predictions=[1, 1, 1, 0, 0], references=[1, 1, 0, 1, 0])
    assert result["matthews_correlation"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(("name", "reference"), [("pearsonr", stats.pearsonr), ("spearmanr", stats.spearmanr)])
def test_correlations_are_those_of_scipy(name, reference):
    first, second = [1.0, 2.0, 3.0, 10.0], [1.5, 1.0, 4.0, 5.0]
    result = load_metric(name).compute(predictions=first, references=second)
    assert result[name] == pytest.approx(reference(first, second)[0], abs=1e-12)


def test_spearman_sees_ranks_only():
    assert load_metric("spearmanr").compute(predictions=[1, 2, 300], references=[1.0, 2.0, 3.0])["spearmanr"] == 1.0


def test_perplexity_skips_ignored_tokens():
    # mean of log 2 and log 8 is log 4; the third token does not count
    losses = [math.log(2), math.log(8), 100.0]
    result = load_metric("perplexity").compute(predictions=losses, references=[3, 4, -100])
    assert result["perplexity"] == pytest.approx(4.0)


def test_batches_add_up():
    metric = load_metric("accuracy")
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add_batch(predictions=[0, 0], references=[0, 0])
    assert metric.compute() == {"accuracy": 0.75}


def test_shipped_metrics_are_evaluate_metrics():
    import evaluate

    assert all(isinstance(load_metric(name), evaluate.Metric) for name in SHIPPED)


def test_unknown_name_offline_names_what_is_shipped(monkeypatch):
    import datasets
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PruningError, match=r"matthews_correlation.*Received: 'acuracy'\. Did you mean 'accuracy'\?"):
        load_metric("acuracy")


def test_classification_takes_the_best_class():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 3.0]])
    compute = compute_metrics_for(["accuracy", "f1"])
    result = compute(EvalPrediction(predictions=(logits, "hidden states"), label_ids=np.array([1, 0, 0])))
    assert result == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}


def test_token_classification_skips_padding():
    logits = np.eye(3)[[[0, 1, 2], [2, 2, 0]]]
    labels = np.array([[0, 1, -100], [2, 1, -100]])
    result = compute_metrics_for({"accuracy": {}, "f1": {"average": "micro"}})(EvalPrediction(logits, labels))
    assert result == {"accuracy": 0.75, "f1": 0.75}


def test_regression_takes_the_only_output():
    prediction = EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([2.0, 4.0, 8.0]))
    result = compute_metrics_for(["pearsonr", "spearmanr"], "regression")(prediction)
    assert result == {"pearsonr": pytest.approx(1.0), "spearmanr": pytest.approx(1.0)}


def test_causal_lm_from_logits_or_from_token_losses():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(0, 7, (2, 5), generator=generator)
    labels[1, 3:] = -100
    chosen = [(row, at) for row in range(2) for at in range(4) if labels[row, at + 1] != -100]
    nats = [-logits[row, at].log_softmax(-1)[labels[row, at + 1]].item() for row, at in chosen]
    expected = math.exp(sum(nats) / len(nats))
    compute = compute_metrics_for(["perplexity"], "causal_lm")
    kept_by_trainer = token_losses(logits, labels)
    assert kept_by_trainer.shape == (2, 4)
    for predictions in (logits, kept_by_trainer):
        result = compute(SimpleNamespace(predictions=predictions.numpy(), label_ids=labels.numpy()))
        assert result["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "problem"), [("perplexity", "classification"), ("accuracy", "causal_lm")])
def test_a_metric_that_does_not_fit_the_problem(name, problem):
    with pytest.raises(PruningError, match=f"Received: '{name}', {problem}"):
        compute_metrics_for([name], problem)


def test_importing_metrics_does_not_import_evaluate():
    code = "import sys, hf_prune.metrics; sys.exit('evaluate' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
