"""Local files, the embedded digits and what must fail before any training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from hf_prune.data import (
    DataSettings,
    data_revision,
    headless,
    label_count,
    label_names,
    load_source,
    load_split,
    prepare_images,
    prepare_text,
)
from hf_prune.errors import PruningError

SENTENCES = ["good film", "bad film", "good", "bad", "a good bad film", "film film"]
LABELS = [1, 0, 1, 0, 1, 0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    frame = pd.DataFrame({"sentence": SENTENCES, "label": LABELS})
    for split, rows in {"train": frame, "validation": frame[:2], "test": frame[2:5]}.items():
        rows.to_parquet(tmp_path / f"{split}.parquet", index=False)
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a"]
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32, model_input_names=names
    )


def settings_for(folder, **changes):
    return DataSettings(**{"name": str(folder), "text": "sentence", **changes})


# --- loading ---


def test_a_folder_of_split_files(folder):
    train, evaluation = load_split(settings_for(folder))
    assert (train["sentence"][:], train["label"][:]) == (SENTENCES, LABELS)
    assert evaluation["sentence"][:] == SENTENCES[:2]


def test_the_revision_of_local_data_is_each_files_digest(folder):
    import hashlib

    settings = DataSettings(name=str(folder), text="sentence", evaluation=["test"])
    found = data_revision(settings, load_split(settings).train)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}
    assert found == {name: f"sha256:{digests[name]}" for name in ("test.parquet", "train.parquet")}
    one = data_revision(DataSettings(files={"train": str(folder / "train.parquet")}), None)
    assert list(one) == ["train.parquet"]


def test_the_revision_of_the_hubs_data_is_the_commit_that_names_its_cache(folder):
    """`datasets` keeps what it downloads in a folder named by the commit."""
    from datasets import Dataset

    cache = folder / "owner___name" / "default" / "0.0.0" / ("0123456789" * 4)
    Dataset.from_dict({"label": LABELS}).save_to_disk(cache)
    loaded = Dataset.from_file(str(cache / "data-00000-of-00001.arrow"))
    assert data_revision(DataSettings(name="owner/name"), loaded) == {"owner/name": "0123456789" * 4}
    digits = DataSettings(name="digits", evaluation=["test"], image="image")
    assert data_revision(digits, load_split(digits).train) == {}


def test_several_evaluation_splits_are_one(folder):
    _, evaluation = load_split(settings_for(folder, evaluation=["validation", "test"]))
    assert evaluation["sentence"][:] == SENTENCES[:5]


def test_splits_may_differ_in_types_and_other_columns(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"sentence": SENTENCES[:2], "id": ["a", "b"], "label": pa.array([0, 1], pa.int8())})
    pq.write_table(table, folder / "test.parquet")
    _, evaluation = load_split(settings_for(folder, evaluation=["validation", "test"]))
    assert evaluation["label"][:] == [1, 0, 0, 1]
    assert evaluation.column_names == ["sentence", "label"]


def test_a_folder_may_hold_files_with_other_columns(folder):
    pd.DataFrame({"title": ["x"]}).to_csv(folder / "extra.csv")
    assert len(load_split(settings_for(folder)).train) == 6


def test_a_dataset_saved_to_disk(folder, tmp_path_factory):
    from datasets import DatasetDict

    train, evaluation = load_split(settings_for(folder))
    saved = tmp_path_factory.mktemp("saved")
    DatasetDict(train=train, validation=evaluation).save_to_disk(str(saved))
    assert load_split(settings_for(saved)).evaluation["sentence"][:] == SENTENCES[:2]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl", "parquet"])
def test_files_by_split(tmp_path, suffix):
    frame = pd.DataFrame({"sentence": SENTENCES, "label": LABELS})
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(suffix.split(".")[0])
    paths = [tmp_path / f"part{number}.{suffix}" for number in range(2)]
    for path in paths:
        write(path, index=False) if write else frame.to_json(path, orient="records", lines=True)
    files = {"train": [str(path) for path in paths], "validation": str(paths[0])}
    train, evaluation = load_split(DataSettings(files=files, text="sentence"))
    assert (len(train), len(evaluation)) == (12, 6)
    assert evaluation["label"][:] == LABELS


def test_one_file_and_test_size(folder):
    settings = settings_for(folder / "train.parquet", test_size=1 / 3)
    train, evaluation = load_split(settings)
    assert (Counter(train["label"][:]), Counter(evaluation["label"][:])) == ({0: 2, 1: 2}, {0: 1, 1: 1})
    assert sorted(train["sentence"][:] + evaluation["sentence"][:]) == sorted(SENTENCES)
    assert load_split(settings).evaluation["sentence"][:] == evaluation["sentence"][:]


def test_train_limit_draws_the_rows_that_pandas_draws(folder):
    frame = pd.DataFrame({"sentence": SENTENCES})
    for seed in (0, 1):
        train, evaluation = load_split(settings_for(folder, train_limit=3, train_seed=seed))
        assert train["sentence"][:] == frame.sample(3, random_state=seed)["sentence"].tolist()
        assert len(evaluation) == 2
    assert len(load_split(settings_for(folder, train_limit=100)).train) == 6


def test_digits_hold_out_the_same_third_of_each_digit():
    settings = DataSettings(name="digits", evaluation=["test"], image="image")
    train, evaluation = load_split(settings)
    assert (len(train), len(evaluation)) == (1257, 540)
    counts = Counter(evaluation["label"][:])
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 3  # 174 to 183 of each digit are in the whole set
    assert evaluation["label"][:] == load_split(settings).evaluation["label"][:]
    assert (label_count(train), label_names(train)) == (10, list("0123456789"))


# --- labels ---


def test_string_labels_become_classes_in_the_order_of_names(folder):
    names = ["pos" if label else "neg" for label in LABELS]
    for split in ("train", "validation"):
        pd.DataFrame({"sentence": SENTENCES, "label": names}).to_parquet(folder / f"{split}.parquet")
    train, evaluation = load_split(settings_for(folder))
    assert (label_names(train), label_count(train)) == (["neg", "pos"], 2)
    assert evaluation["label"][:] == LABELS


@pytest.mark.parametrize(("labels", "count"), [([0, 1, 2], 3), ([1, 1, 0], 2), ([0.5, 2.0, 5.0], 1), ([0, 0, 0], 2)])
def test_label_count(labels, count):
    from datasets import Dataset

    dataset = Dataset.from_dict({"label": labels})
    assert (label_count(dataset), label_names(dataset)) == (count, None)


def test_a_class_that_training_never_saw(folder):
    for split, names in {"train": ["neg", "pos"], "validation": ["neg", "new"]}.items():
        pd.DataFrame({"sentence": SENTENCES[:2], "label": names}).to_parquet(folder / f"{split}.parquet")
    with pytest.raises(
        PruningError,
        match="data.label: split 'validation' must have the classes of training: neg, pos. Received others: new",
    ):
        load_split(settings_for(folder))


def test_a_public_test_set_without_labels(folder):
    pd.DataFrame({"sentence": SENTENCES[:2], "label": [-1, -1]}).to_parquet(folder / "test.parquet")
    with pytest.raises(PruningError, match="split 'test' has labels below 0"):
        load_split(settings_for(folder, evaluation=["test"]))


def test_a_file_without_a_header_is_recognised(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("a good film,1\na bad film,0\na nice film,1\n")
    with pytest.raises(
        PruningError, match="first line of 'reviews.csv' looks like data, .*such as text,label above it"
    ):
        load_split(DataSettings(name=str(path), text="text", test_size=0.4))
    named = DataSettings(name=str(path), text="a good film", label="1", test_size=0.5)  # who says so means it
    assert len(load_split(named).train) == 1


@pytest.mark.parametrize(
    ("text", "columns", "found"),
    [
        ("good film,pos\nbad film,neg\nnice film,pos\nfine film,pos\n", ["good film", "pos"], True),
        ("good film,pos\nbad film,neg\nnice film,pos\nfine film,pos\n", ["good film"], False),
        ("0.5,good\n0.7,bad\n", ["0.5"], True),
        ("text,2019\ngood,3\nbad,4\n", ["text"], False),
        ("0,1\n3,good\n4,bad\n", ["0", "1"], False),  # what pandas writes for columns without names
        ("text,label\ngood,1\nbad,1\n", ["text", "label"], False),
    ],
)
def test_what_looks_like_a_row_and_what_like_names(text, columns, found, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    settings = DataSettings(name=str(path))
    assert bool(headless(settings, load_source(settings)["train"], columns)) is found


# --- preparing ---


def test_prepare_text_leaves_inputs_and_labels(folder, tokenizer):
    settings = settings_for(folder, max_length=4)
    prepared = prepare_text(load_split(settings).train, tokenizer, settings)
    assert set(prepared.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert prepared["labels"][:] == LABELS
    assert prepared["input_ids"][0] == [2, 4, 6, 3]
    assert prepared["input_ids"][2] == [2, 4, 3]
    assert prepared["input_ids"][4] == [2, 7, 4, 3]  # cut to 4


def test_prepare_text_pairs_and_regression(tmp_path, tokenizer):
    pairs = pd.DataFrame({"first": ["good film"], "second": ["bad"], "score": [3.5]})
    for split in ("train", "validation"):
        pairs.to_parquet(tmp_path / f"{split}.parquet")
    settings = DataSettings(name=str(tmp_path), text=["first", "second"], label="score")
    train = load_split(settings).train
    row = prepare_text(train, tokenizer, settings)[0]
    assert label_count(train, "score") == 1
    assert (row["input_ids"], row["labels"]) == ([2, 4, 6, 3, 5, 3], 3.5)
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_whole_numbers_are_floats_for_a_single_output(folder, tokenizer):
    settings = settings_for(folder)
    labels = prepare_text(load_split(settings).train, tokenizer, settings, num_labels=1)["labels"][:]
    assert labels == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert all(isinstance(label, float) for label in labels)


def test_prepare_images_gives_what_a_vit_takes():
    from transformers import ViTConfig, ViTForImageClassification, default_data_collator

    settings = DataSettings(name="digits", evaluation=["test"], image="image", train_limit=8)
    train = load_split(settings).train
    prepared = prepare_images(train, settings)
    batch = default_data_collator([prepared[row] for row in range(8)])
    assert batch["pixel_values"].shape == (8, 1, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(batch["pixel_values"].numpy(), np.asarray(train["image"][:], dtype="float32") * 2 - 1)
    assert (batch["pixel_values"].min(), batch["pixel_values"].max()) == (-1, 1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes))
    assert model(**batch).loss.isfinite()


# --- what must fail before any training ---


def test_a_missing_column_names_key_split_and_columns(folder):
    with pytest.raises(PruningError) as error:
        load_split(settings_for(folder, text="sentense"))
    assert str(error.value) == (
        "data.text: no column 'sentense' in split 'train'; there are: sentence, label. "
        "Received: 'sentense'. Did you mean 'sentence'?"
    )


def test_a_column_missing_in_one_split_only(folder):
    pd.DataFrame({"sentence": SENTENCES, "labels": LABELS}).to_parquet(folder / "test.parquet")
    with pytest.raises(PruningError, match=r"data\.label: no column 'label' in split 'test'.*Did you mean 'labels'"):
        load_split(settings_for(folder, evaluation=["test"]))


def test_a_text_column_that_holds_numbers(folder):
    pd.DataFrame({"sentence": [3, 4], "label": [1, 0]}).to_parquet(folder / "train.parquet")
    with pytest.raises(PruningError, match=r"data\.text: column 'sentence' .* must hold text\. Received: int64"):
        load_split(settings_for(folder))


def test_empty_cells(folder):
    pd.DataFrame({"sentence": ["good", None], "label": [1, 0]}).to_parquet(folder / "train.parquet")
    with pytest.raises(
        PruningError, match="column 'sentence' of split 'train' must be filled .*Received: 1 empty rows"
    ):
        load_split(settings_for(folder))


def test_a_missing_split(folder):
    with pytest.raises(PruningError, match=r"split 'validatoin'.*test, train, validation.*Did you mean 'validation'"):
        load_split(settings_for(folder, evaluation=["validatoin"]))
    with pytest.raises(PruningError, match=r"data\.evaluation: no split 'validation' \(data\.test_size .* are: train"):
        load_split(settings_for(folder / "train.parquet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "./no/such/folder"}, r"data\.name: no such file or folder\. Received: './no/such/folder'"),
        ({"name": "missing.csv"}, r"data\.name: no such file or folder\. Received: 'missing.csv'"),
        ({"name": None, "files": {"train": "missing.csv"}}, r"data\.files: no such file\. Received: 'missing.csv'"),
    ],
)
def test_missing_files_name_key_and_path(changes, message):
    with pytest.raises(PruningError, match=message):
        load_split(DataSettings(**{"text": "sentence", **changes}))


def test_files_of_an_unknown_type(tmp_path):
    (tmp_path / "train.xyz").write_text("?")
    with pytest.raises(PruningError, match=r"data\.name: files must all be of one type of \.parquet"):
        load_split(DataSettings(name=str(tmp_path / "train.xyz"), text="sentence"))


def test_a_hub_name_offline(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PruningError, match=r"data\.name: cannot be loaded: .*Received: \('nobody/nothing', 'en'\)"):
        load_split(DataSettings(name="nobody/nothing", config="en", text="sentence"))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"name": "digits", "files": {"train": "x.csv"}},
        {"name": "digits", "test_size": 0.2, "evaluation": ["test"]},
        {"name": "digits", "test_size": 1.5},
        {"name": "digits", "evaluation": []},
        {"name": "digits", "text": ["a", "b", "c"]},
        {"name": "digits", "train_limit": 0},
        {"name": "digits", "train_limits": 10},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValidationError):
        DataSettings(**wrong)


def test_preparing_needs_its_column(tokenizer):
    settings = DataSettings(name="digits", evaluation=["test"])
    train = load_split(settings).train
    with pytest.raises(PruningError, match=r"data\.text must name"):
        prepare_text(train, tokenizer, settings)
    with pytest.raises(PruningError, match=r"data\.image must name"):
        prepare_images(train, settings)
