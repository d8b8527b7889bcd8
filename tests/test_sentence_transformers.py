"""Models of sentence-transformers, and SetFit's Trainer around one: pruned, saved, loaded and resumed as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import BERT_LIKE, assert_same_weights, randomize, units_of
from test_peft import EARLY

from hf_prune import (
    CheckpointError,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    Target,
    find_groups,
    load_pruned,
    prune,
    save_pruned,
)
from hf_prune.architectures import prunable_macs

sentence_transformers = pytest.importorskip("sentence_transformers")
from datasets import Dataset  # noqa: E402
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "nice", "dull", "story"]
TEXTS = ["good film", "bad film", "nice story", "dull story"]
BOTH = [HeadPruner(), NeuronPruner()]


def write_model(folder: Path, head: str) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    config = transformers.BertConfig(**{**BERT_LIKE, "vocab_size": 11, "num_labels": 1})
    randomize(getattr(transformers, f"Bert{head}")(config)).save_pretrained(folder)
    return folder


def build(kind: str, folder: Path) -> Any:
    """Make a small model of each sort."""
    folder.mkdir()
    if kind == "cross":
        return CrossEncoder(str(write_model(folder, "ForSequenceClassification")), device="cpu")
    if kind == "sparse":
        return SparseEncoder(str(write_model(folder, "ForMaskedLM")), device="cpu")
    return SentenceTransformer(str(write_model(folder, "Model")), device="cpu")


def numbers_of(model: Any) -> torch.Tensor:
    """Return scores of pairs, or embeddings."""
    if isinstance(model, CrossEncoder):
        return torch.tensor(model.predict([(one, "film") for one in TEXTS], show_progress_bar=False))
    found = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return found.to_dense() if found.is_sparse else found


def again(model: Any, folder: Path) -> Any:
    return type(model)(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["sentence", "cross", "sparse"])
@pytest.mark.parametrize("pruners", ["inside", "layers"])
def test_a_saved_model_gives_the_same_numbers_in_its_own_class(kind, pruners, tmp_path):
    model = build(kind, tmp_path / "dense")
    dense = numbers_of(model)
    if pruners == "inside":
        prune(model, [HeadPruner(score="l1"), NeuronPruner(score="l1")], target=Target(macs=0.5))
    else:
        prune(model, LayerPruner(sparsity=0.5, score="l1"))
    expected = numbers_of(model)
    assert (expected - dense).abs().max() > 1e-3
    folder = save_pruned(model, tmp_path / "small")
    loaded = again(model, folder)
    torch.testing.assert_close(numbers_of(loaded), expected, atol=1e-5, rtol=0)
    assert units_of(loaded, None) == units_of(model, None)
    model.save_pretrained(str(tmp_path / "theirs"))  # what a Trainer calls
    torch.testing.assert_close(numbers_of(again(model, tmp_path / "theirs")), expected, atol=1e-5, rtol=0)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = build("sentence", tmp_path / "dense")
    save_pruned(model, tmp_path / "small")
    expected = numbers_of(model)
    prune(model, NeuronPruner(sparsity=0.5, score="l1"))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model[1]), "save", fail)
    with pytest.raises(PruningError, match="was there before is untouched"):
        save_pruned(model, tmp_path / "small")
    monkeypatch.undo()
    torch.testing.assert_close(numbers_of(again(model, tmp_path / "small")), expected)


def test_what_is_for_transformers_alone_is_refused(tmp_path):
    model = build("sentence", tmp_path / "dense")
    with pytest.raises(PruningError, match="Received: SentenceTransformer"):
        save_pruned(model, tmp_path / "small", stock="require")
    prune(model, NeuronPruner(sparsity=0.5, score="l1"))
    save_pruned(model, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"SentenceTransformer\('.*small'\)"):
        load_pruned(tmp_path / "small")
    part = load_pruned(tmp_path / "small", model_class=transformers.AutoModel)
    assert prunable_macs(part) == prunable_macs(model)


OTHERS = [text.replace("good", "nice") for text in TEXTS] * 8
COLUMNS: dict[str, dict[str, Any]] = {
    "CosineSimilarityLoss": {"a": TEXTS * 8, "b": OTHERS, "score": [1.0, 0.0] * 16},
    "CoSENTLoss": {"a": TEXTS * 8, "b": OTHERS, "score": [1.0, 0.0] * 16},
    "MSELoss": {"a": TEXTS * 8, "label": [[0.1 * n, *[0.5] * 15] for n in range(4)] * 8},  # embeddings of a teacher
    "MultipleNegativesRankingLoss": {"a": TEXTS * 8, "b": OTHERS},
    "CachedMultipleNegativesRankingLoss": {"a": TEXTS * 8, "b": OTHERS},
}


def train(
    model: Any, folder: Path, live: bool, resume: Path | None = None, name: str = "CosineSimilarityLoss"
) -> PruningCallback:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    rows = COLUMNS[name]
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=8, save_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=8
    )
    loss = getattr(losses, name)(model)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), loss=loss)
    callback = PruningCallback(BOTH, EARLY, target=Target(macs=0.5), shrink_during_training=live)
    callback.attach(trainer).train(resume_from_checkpoint=str(resume) if resume else None)
    return callback


@pytest.mark.parametrize(("live", "place"), [(False, "out"), (True, "out"), (True, "another")])
def test_a_run_goes_on_from_its_checkpoint(live, place, tmp_path):
    first = train(whole := build("sentence", tmp_path / "one"), tmp_path / "out", live)
    second = train(
        resumed := build("sentence", tmp_path / "two"), tmp_path / place, live, tmp_path / "out/checkpoint-4"
    )
    assert first.report.kept == second.report.kept
    assert sum(map(len, first.report.kept.values())) < sum(first.report.units.values())
    assert_same_weights(whole, resumed, atol=1e-6)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", COLUMNS)
def test_each_loss_prunes(name, live, tmp_path):
    model = build("sentence", tmp_path / "dense")
    dense = prunable_macs(model)
    callback = train(model, tmp_path / "out", live, name=name)
    assert 0.4 < prunable_macs(model) / dense <= 0.5
    model.save_pretrained(str(tmp_path / "small"))
    torch.testing.assert_close(numbers_of(again(model, tmp_path / "small")), numbers_of(model), atol=1e-5, rtol=0)
    assert callback.report.settings["macs_left"] <= 0.5


@pytest.mark.parametrize("way", ["callbacks", "attach", "attach inner"])
def test_setfit_prunes_its_body(way, tmp_path):
    setfit = pytest.importorskip("setfit")
    from sklearn.linear_model import LogisticRegression

    body = build("sentence", tmp_path / "dense")
    dense = prunable_macs(body)
    callback = PruningCallback(BOTH, EARLY, target=Target(macs=0.5))
    arguments = setfit.TrainingArguments(output_dir=str(tmp_path), batch_size=4, max_steps=8, report_to="none")
    rows = Dataset.from_dict({"text": TEXTS * 4, "label": [1, 0] * 8})
    model = setfit.SetFitModel(model_body=body, model_head=LogisticRegression(), labels=None)
    given = [callback] if way == "callbacks" else None
    trainer = setfit.Trainer(model, args=arguments, train_dataset=rows, callbacks=given)
    if way != "callbacks":
        assert callback.attach(trainer if way == "attach" else trainer.st_trainer) is not None
    trainer.train()
    assert prunable_macs(body) <= 0.5 * dense
    assert callback.report.pruned.parameters < callback.report.dense.parameters
    save_pruned(body, tmp_path / "small")
    torch.testing.assert_close(numbers_of(again(body, tmp_path / "small")), numbers_of(body), atol=1e-5, rtol=0)


def test_several_models_of_transformers_in_one_are_refused(tmp_path):
    first, second = (build("sentence", tmp_path / name) for name in ("one", "two"))
    model = SentenceTransformer(modules=[first[0], second[0]])
    with pytest.raises(PruningError, match="prune its parts one by one. Received: BertModel, BertModel"):
        prune(model, NeuronPruner(sparsity=0.5, score="l1"))
    assert find_groups(first)
