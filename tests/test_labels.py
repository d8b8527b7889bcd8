"""Classes are mapped by the names that a fine-tuned model gave them, or refused with both lists; never guessed."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from models import build_bert, training_arguments
from transformers import AutoConfig, BertConfig, BertTokenizerFast, Trainer

import hf_prune
from hf_prune import PruningError, workflow
from hf_prune.data import DataSettings, load_split
from hf_prune.labels import fit_classes

HEAD = "ForSequenceClassification"
OWN = ["positive", "negative"]  # not in the order of the alphabet
WORDS = {"positive": ["good", "nice"], "negative": ["bad", "dull"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def config_of(names: list[str] | None = None, count: int = 2, head: str = HEAD) -> Any:
    named = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    return BertConfig(architectures=[f"Bert{head}"], **(named or {"num_labels": count}))


def draw_texts(rows: int = 96) -> pd.DataFrame:
    """Make sentences of which one word says the class."""
    names = [OWN[i % 2] for i in range(rows)]
    return pd.DataFrame({"text": [f"{WORDS[name][i % 4 // 2]} film" for i, name in enumerate(names)], "label": names})


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> Path:
    """Train a tiny model until it knows every sentence, with names whose order is not that of the alphabet."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", *WORDS["positive"], *WORDS["negative"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    model = build_bert(num_labels=2)
    model.config.id2label, model.config.label2id = dict(enumerate(OWN)), {name: i for i, name in enumerate(OWN)}
    rows = [{**tokenizer(text), "labels": OWN.index(name)} for text, name in draw_texts().itertuples(index=False)]
    Trainer(model, training_arguments(folder / "run", max_steps=40), train_dataset=rows).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_for(model: Path, folder: Path, frame: pd.DataFrame, **changes: Any) -> Any:
    """Write a recipe that prunes a model as it is: nothing is trained first."""
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        frame.to_parquet(folder / "data" / f"{split}.parquet", index=False)
    plain = {
        "name": "labels",
        "task": "text-classification",
        "model": {"name": str(model)},
        "data": {"name": str(folder / "data"), "text": "text", "max_length": 8},
        "train": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-6},
        "pruners": {"neurons": {"sparsity": 0.05}},
        "schedule": {"kind": "oneshot", "begin": 1, "end": 1},
        "measure": {"length": 8, "repeats": 2},
        "onnx": False,
        "output": str(folder / "out"),
    }
    return hf_prune.Recipe.model_validate({**plain, **changes})


def plain_texts(frame):
    """Return a data set whose labels are strings: datasets 5.0 cannot cast pandas' large_string to classes."""
    return datasets.Dataset.from_pandas(frame).cast_column("label", datasets.Value("string"))


@pytest.mark.parametrize("write", ["text", "other case", "class numbers"])
def test_a_fine_tuned_model_keeps_its_accuracy_through_a_run(write, fine_tuned, tmp_path):
    frame = draw_texts()
    if write == "other case":
        frame = frame.assign(label=frame["label"].str.upper())
    recipe = recipe_for(fine_tuned, tmp_path, frame)
    if write == "class numbers":
        kind = datasets.ClassLabel(names=sorted(OWN))
        table = plain_texts(frame).cast_column("label", kind)
        datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "data")
    report = hf_prune.run(recipe)
    assert report.metrics["accuracy"] == {"dense": 1.0, "pruned": 1.0}
    config = AutoConfig.from_pretrained(tmp_path / "out" / "model")
    assert config.id2label == dict(enumerate(OWN))
    assert config.label2id == {name: i for i, name in enumerate(OWN)}


@pytest.mark.parametrize("kind", ["text", "class numbers"])
def test_the_example_for_text_keeps_what_the_model_has_learned(kind, fine_tuned, tmp_path):
    frame = draw_texts(8)
    for split in ("train", "validation"):
        table = plain_texts(frame)
        if kind == "class numbers":
            table = table.cast_column("label", datasets.ClassLabel(names=sorted(OWN)))
        table.to_parquet(tmp_path / f"{split}.parquet")
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "text_classification.py"))
    told = argparse.Namespace(model=str(fine_tuned), dataset=str(tmp_path), text="text", label="label")
    model, train, *_ = example["load_real"](told)
    batch = {key: torch.tensor(train[key]) for key in ("input_ids", "attention_mask")}
    assert train["labels"][:] == [0, 1] * 4
    assert model.eval()(**batch).logits.argmax(-1).tolist() == [0, 1] * 4


def test_numbers_without_names_are_taken_as_they_are(fine_tuned, tmp_path):
    frame = draw_texts()
    job = workflow.prepare(recipe_for(fine_tuned, tmp_path, frame.assign(label=frame["label"].map(OWN.index))))
    assert job.train[:4]["labels"] == [0, 1, 0, 1]
    assert job.model.config.id2label == dict(enumerate(OWN))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda frame: frame.assign(label=frame["label"].str[:3]),
            r"classes \['neg', 'pos'\].*model: \['positive', 'neg",
        ),
        (lambda frame: frame.assign(label=range(len(frame))), "96 classes without names.*of the model: .'positive'"),
        (lambda frame: frame.assign(label=0.5), "numbers for regression.*of the model: .'positive'"),
    ],
)
def test_classes_that_the_model_has_not_are_refused_with_both_lists(change, words, fine_tuned, tmp_path):
    with pytest.raises(PruningError, match=words):
        workflow.prepare(recipe_for(fine_tuned, tmp_path, change(draw_texts())))


def test_a_model_that_is_trained_first_gets_the_datas_classes_and_it_is_said(fine_tuned, tmp_path, caplog):
    frame = draw_texts().assign(label=["one", "two", "three"] * 32)
    job = workflow.prepare(recipe_for(fine_tuned, tmp_path, frame, dense={"epochs": 1}))
    assert job.model.config.id2label == {0: "one", 1: "three", 2: "two"}
    assert job.model.classifier.weight.shape[0] == 3
    assert caplog.text.count("The model is trained first") == 1
    assert "['one', 'three', 'two']" in caplog.text
    assert "['positive', 'negative']" in caplog.text


def test_a_new_head_takes_the_names_in_order(tmp_path):
    frame = draw_texts()
    frame.to_parquet(tmp_path / "train.parquet", index=False)
    settings = DataSettings(name=str(tmp_path), text="text", test_size=0.25)
    train, _ = load_split(settings, lambda classes, numbered: fit_classes(None, classes, head=HEAD, numbered=numbered))
    assert train.features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize(
    ("config", "classes", "numbered", "expected"),
    [
        (config_of(["b", "a", "c"]), ["a", "b"], True, ([1, 0], ["b", "a", "c"], {})),
        (config_of(["b", "a", "c"]), 2, True, ([0, 1], ["b", "a", "c"], {})),
        (config_of(count=3), 3, True, ([0, 1, 2], None, {})),
        (config_of(count=2), ["LABEL_1", "LABEL_0"], False, ([1, 0], ["LABEL_0", "LABEL_1"], {})),
        (config_of(["B", "b"]), ["b", "B"], True, ([1, 0], ["B", "b"], {})),
        (config_of(count=1), 5, True, ([0, 1, 2, 3, 4], None, {})),
        (config_of(["b", "a"], head="ForMaskedLM"), 3, True, ([0, 1, 2], None, {"num_labels": 3})),
    ],
)
def test_numbers_names_and_options(config, classes, numbered, expected):
    fitted = fit_classes(config, classes, head=HEAD, numbered=numbered)
    assert (fitted.numbers, fitted.names, fitted.options) == expected


STARS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("config", "numbers", "names"),
    [
        (None, [0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"]),
        (config_of(count=5), [0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"]),
        (config_of(["5", "4", "3", "2", "1"]), [4, 3, 2, 1, 0], ["5", "4", "3", "2", "1"]),
        (config_of(["1 star", *(f"{n} stars" for n in STARS[1:])]), [0, 1, 2, 3, 4], None),
        (config_of(["none", "a", "b", "c", "d", "e"]), STARS, None),  # numbers of its own
        (config_of(count=6), STARS, None),  # it was trained on the numbers as they are
        (config_of(count=1), STARS, None),  # regression
    ],
)
def test_stars_are_names_of_classes_unless_the_model_says_otherwise(config, numbers, names):
    fitted = fit_classes(config, STARS, head=HEAD)
    named = names or (None if config.num_labels != 5 else list(config.id2label.values()))
    assert (fitted.numbers, fitted.names) == (numbers, named)


def test_a_model_that_has_learned_other_names_than_stars_is_refused():
    with pytest.raises(
        PruningError, match=r"classes \['1', '2', '3', '4', '5'\].*of the model: \['positive', 'negative'\]"
    ):
        fit_classes(config_of(OWN), STARS, head=HEAD)


@pytest.mark.parametrize(("count", "labels"), [(2, [0, 1, 2]), (4, [1, 2, 3]), (1, [1.0, 2.0, 3.0])])
def test_stars_in_a_recipe(count, labels, fine_tuned, tmp_path, capsys):
    folder = tmp_path / "model"
    build_bert(num_labels=count).save_pretrained(folder)  # two classes: it is trained anew for three
    BertTokenizerFast.from_pretrained(fine_tuned).save_pretrained(folder)
    frame = draw_texts().assign(label=[1, 2, 3] * 32)
    job = workflow.prepare(recipe_for(folder, tmp_path, frame, **({"dense": {"epochs": 1}} if count == 2 else {})))
    assert job.train[:3]["labels"] == labels
    said = "labels 1, 2, 3 are the classes 0 to 2" in " ".join(capsys.readouterr().err.split())
    assert (said, job.model.config.num_labels) == (count == 2, 3 if count == 2 else count)
    assert count != 2 or job.model.config.id2label == {0: "1", 1: "2", 2: "3"}


def test_a_star_that_training_never_saw(tmp_path):
    for split, stars in {"train": [1, 2, 2], "validation": [1, 3, 2]}.items():
        pd.DataFrame({"text": ["a", "b", "c"], "label": stars}).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.raises(PruningError, match="classes of training: 1, 2. Received others: 3"):
        load_split(DataSettings(name=str(tmp_path), text="text"), lambda names: fit_classes(None, names, head=HEAD))


def test_names_of_the_data_stay_where_the_model_has_numbers_alone():
    fitted = fit_classes(config_of(count=2), ["no", "yes"], head=HEAD)
    assert fitted.numbers == [0, 1]
    assert fitted.options == {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


@pytest.mark.parametrize(
    ("config", "classes", "words"),
    [
        (config_of(count=2), ["no", "yes"], "has not named its classes: write the names into the model's id2label"),
        (config_of(["B", "b"]), ["B", "b", "c"], r"\['B', 'b', 'c'\].*\['B', 'b'\]"),
        (config_of(["Yes", "yes"]), ["YES"], r"\['YES'\].*\['Yes', 'yes'\]"),
        (config_of(count=2), 1, "regression"),
    ],
)
def test_what_would_be_a_guess_is_refused(config, classes, words):
    with pytest.raises(PruningError, match=words):
        fit_classes(config, classes, head=HEAD, numbered=False)


def test_a_config_that_contradicts_itself_is_refused_and_a_half_filled_one_is_read():
    config = config_of(["b", "a"])
    config.label2id = {"b": 1, "a": 0}
    with pytest.raises(PruningError, match="must say once which class is which"):
        fit_classes(config, ["a", "b"], head=HEAD)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert fit_classes(config, ["a", "b"], head=HEAD).numbers == [0, 1]
