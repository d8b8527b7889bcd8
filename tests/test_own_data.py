"""A stranger's own data: read right, or refused by an error that says what to change; never read wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from hearing import RATE, of_classes, save_wav2vec2, with_texts, write_sound
from PIL import Image
from scipy.io import wavfile
from test_guessing import save, sentence, tokenizer, write
from transformers import BertConfig
from typer.testing import CliRunner

from hf_prune import PruningError, cli, workflow
from hf_prune.data import DataSettings, label_names, load_source, load_split, prepare_answers, prepare_tokens
from hf_prune.data.sources import local_files
from hf_prune.guessing import Wish, guess
from hf_prune.labels import fit_classes

HEAD = "ForSequenceClassification"
TEXTS = ["a good film", "a bad film", "not so good", "quite bad indeed", "good in parts", "bad from end to end"]
new_head = partial(fit_classes, None, head=HEAD)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("bert"), "BertModel")


def read(path: Path, text: str, encoding: str = "utf-8") -> Dataset:
    path.write_bytes(text.encode(encoding))
    return load_source(DataSettings(name=str(path)))["train"]


def splits_of(folder: Path, **labels: list) -> DataSettings:
    """Write a parquet file for each split, with these labels."""
    for split, values in labels.items():
        rows = {"text": [TEXTS[n % 6] for n in range(len(values))], "label": values}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return DataSettings(name=str(folder), text="text", evaluation=[one for one in labels if one != "train"] or ["x"])


# the first line
def test_a_name_like_a_class_is_a_name_where_the_others_are_names(bert, tmp_path):
    rows = [f"{' '.join(sentence())},{('spam', 'ham')[n % 2]}" for n in range(12)]
    data = tmp_path / "mails.csv"
    data.write_text("\n".join(["text,spam", *rows]))
    recipe = guess(Wish(bert, str(data))).recipe
    assert (recipe.data.text, recipe.data.label) == ("text", "spam")
    data.write_text("\n".join(rows))
    with pytest.raises(PruningError, match="looks like data, .*where they are names, say --text and --label"):
        guess(Wish(bert, str(data)))


def test_a_name_above_numbers_says_that_the_first_line_has_names(bert, tmp_path):
    data = tmp_path / "mails.csv"
    data.write_text("\n".join(["spam,count,mail", *(f"{('spam', 'ham')[n % 2]},{n},hello" for n in range(8))]))
    assert guess(Wish(bert, str(data), text=["mail"], task="text-classification")).recipe.data.label == "spam"


def test_a_first_line_that_stands_again_is_refused(tmp_path):
    text = "text,label\na good film,pos\ntext,label\na bad film,neg\n"
    with pytest.raises(PruningError, match="first line of 'two.csv' must stand in it once.*'text', 'label'"):
        read(tmp_path / "two.csv", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label,text,label\npos,a,b\n", "must name each column once. Received: 'label' twice"),
        ("text,label\na, well, film,1\nbad,0\n", "Received: 2 names, and 4 columns in the next line"),
        ("text,label\ngood,1\na, well, film,0\n", 'Error tokenizing data.*stands in "quotes"'),
        ("", "cannot be loaded"),
        ("text,label\n", "must have rows|cannot be loaded"),
    ],
)
def test_lines_that_do_not_fit_the_first_are_refused(text, words, tmp_path):
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(PruningError, match=words):
        load_split(DataSettings(name=str(tmp_path / "wrong.csv"), text="text", test_size=0.5))


WAY_OUT = "Of a CoNLL file, .* docs/howto/own_csv.md has lines that make a jsonl file. Received: .*/{}'$"
NAMES = "-DOCSTART- -X- O\n\nAda NNP B-PER\nin IN O\n\nRome NNP B-LOC \n. . O\n"


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.conll", "data/train.txt", "data/test.bio"])
@pytest.mark.parametrize(
    "text", [NAMES, "Ada\tB-PER\nin\tO\n\nNew York\tB-LOC\nis\tO", "Ada NNP\r\nin IN\r\n\r\nRome NNP\r\n. .\r\n"]
)
def test_words_with_their_tags_are_no_texts(name, text, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(PruningError, match=WAY_OUT.format(name)):
        load_source(DataSettings(name=str(tmp_path / ("data" if "/" in name else name))))


@pytest.mark.parametrize(
    "text",
    [
        "GOOD FILM\n\nBAD PLAY\n",
        "GOOD FILM\nIN ROME IN\n\nBAD PLAY\n",
        "good film\n\nbad play\n",
        "GOOD\n\nBAD\n",
        "Ada I\nBob A\n",
        "O\n",
        "\n",
    ],
)
def test_texts_are_no_words_with_their_tags(text, tmp_path):
    assert read(tmp_path / "a.txt", text)["text"][:] == text.removesuffix("\n").split("\n")


# what separates columns
@pytest.mark.parametrize(
    "text",
    [
        '"text, or so";label\n"good, bad";1\nplain, this;0\n',
        "text, or so|label\ngood, bad|1\nplain, this|0\n",
        "text, or so\tlabel\ngood, bad\t1\nplain, this\t0\n",
        '"text, or so",label\n"good, bad",1\n"plain, this",0\n',
        '"text, or so", label\n"good, bad", 1\n"plain, this", 0\n',
        '"text, or so";"label"\r\n"good, bad";1\r\n"plain, this";0\r\n',
    ],
)
def test_separators_within_quotes_do_not_count(text, tmp_path):
    rows = read(tmp_path / "rows.csv", text)
    assert rows.to_dict() == {"text, or so": ["good, bad", "plain, this"], "label": [1, 0]}


def test_decimal_commas_and_line_breaks_in_quotes(tmp_path):
    rows = read(tmp_path / "a.csv", 'id;text;wert\n1;"eins\nzwei; drei";0,5\n2;vier;0,75\n')
    assert rows["text"][:] == ["eins\nzwei; drei", "vier"]
    assert rows["wert"][:] == ["0,5", "0,75"]


def test_a_text_longer_than_what_is_looked_at(tmp_path):
    long = "good, film; " * 30_000
    rows = read(tmp_path / "long.csv", f'text,label\n"{long}",1\nshort,0\n')
    assert rows["text"][:] == [long, "short"]


def test_quotes_between_tabs_that_are_not_closed_are_part_of_the_text(tmp_path):
    rows = read(tmp_path / "a.tsv", 'text\tlabel\n"Oh\t1\nno" he said\t0\n"all quoted"\t1\n')
    assert rows["text"][:] == ['"Oh', 'no" he said', '"all quoted"']
    quoted = read(tmp_path / "b.tsv", '"text"\t"label"\n"a\tb"\t1\n"c"\t0\n')
    assert quoted["text"][:] == ["a\tb", "c"]


def test_each_split_has_its_own_separator(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\na, b;x\nc;y\n")
    (tmp_path / "test.csv").write_text('text,label\n"a, b",x\n')
    train, test = load_split(DataSettings(name=str(tmp_path), text="text", evaluation=["test"]))
    assert (train["text"][:], test["text"][:]) == (["a, b", "c"], ["a, b"])


# what spreadsheets leave in a file
def test_marks_line_ends_empty_rows_and_spaces_of_spreadsheets(tmp_path, caplog):
    text = "\ufefftext , label,\r\ngood film, a,\r\n\r\n,,\r\nbad film, b,\r\n,,\r\n"
    rows = read(tmp_path / "sheet.csv", text)
    assert rows.select_columns(["text", "label"]).to_dict() == {"text": ["good film", "bad film"], "label": ["a", "b"]}
    assert "2 empty rows of 'sheet.csv' are left out" in caplog.text
    split = load_split(DataSettings(name=str(tmp_path / "sheet.csv"), text="text", test_size=0.5))
    assert len(split.train) == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_refused_with_the_way_out(suffix, encoding, tmp_path):
    row = {
        "csv": "text,label\ncafé,1\n",
        "jsonl": json.dumps({"text": "café"}, ensure_ascii=False) + "\n",
        "txt": "café",
    }
    with pytest.raises(PruningError, match=f"must be in UTF-8.* iconv -f {encoding} -t utf-8"):
        read(tmp_path / f"rows.{suffix}", row[suffix], encoding)


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    assert read(tmp_path / "a.txt", "\ufeffgood\r\nbad\r\n")["text"][:] == ["good", "bad"]
    assert read(tmp_path / "a.jsonl", '\ufeff{"text": "good"}\r\n{"text": "bad"}\r\n').column_names == ["text"]


def test_cells_that_pandas_takes_for_empty_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\ngood film,None\nbad film,x\nfilm,y\n")
    with pytest.raises(PruningError, match="NA, NULL, None and NaN of a csv file count as empty.*1 empty rows of 3"):
        load_split(DataSettings(name=str(tmp_path / "a.csv"), text="text", test_size=0.4))


def test_numbers_that_are_none_are_refused(tmp_path):
    settings = splits_of(tmp_path, train=[0.5, float("nan"), 0.7], test=[0.1])
    with pytest.raises(PruningError, match="column 'label' of split 'train' must be filled.*1 empty rows of 3"):
        load_split(settings)


def test_nested_fields_are_named(tmp_path):
    write(tmp_path / "a.jsonl", [{"data": {"text": "good", "label": 1}, "label": n} for n in range(4)])
    with pytest.raises(PruningError, match="column 'data' .* must hold text. Received: fields text, label"):
        load_split(DataSettings(name=str(tmp_path / "a.jsonl"), text="data", test_size=0.5))


# numbers of classes
def test_training_alone_says_which_classes_there_are(tmp_path):
    settings = splits_of(tmp_path, train=[1, 2, 3, 4, 5], test=[0, 1, 2, 3, 4])
    with pytest.raises(PruningError, match="'test' must have the classes of training: 1, 2, 3, 4, 5. .* others: 0"):
        load_split(settings, new_head)
    settings = splits_of(tmp_path, train=[0, 1, 2], test=[1, 2, 3])
    with pytest.raises(PruningError, match="classes of training: 0, 1, 2. Received others: 3"):
        load_split(settings, new_head)
    settings = splits_of(tmp_path, train=[1, 2, 3], test=[3, 2, 2])
    train, test = load_split(settings, new_head)
    assert (train["label"][:], test["label"][:]) == ([0, 1, 2], [2, 1, 1])


@pytest.mark.parametrize("values", [[0, 1000], [-1, 1], [-1, 0, 1], [3, 7, 9]])
def test_the_numbers_that_occur_are_the_names_of_classes(values, tmp_path):
    settings = splits_of(tmp_path, train=values, test=values[::-1])
    fitted = []
    train, test = load_split(settings, lambda *told, **how: fitted.append(new_head(*told, **how)) or fitted[0])
    assert label_names(train) == [str(one) for one in values]
    assert test["label"][:] == list(range(len(values)))[::-1]
    assert fitted[0].options["num_labels"] == len(values)


def test_numbers_below_0_are_no_outputs_of_a_model():
    config = BertConfig(num_labels=3, architectures=[f"Bert{HEAD}"])
    with pytest.raises(PruningError, match=r"classes \['-1', '1'\]"):
        fit_classes(config, [-1, 1], head=HEAD)
    named = BertConfig(id2label={0: "-1", 1: "1"}, architectures=[f"Bert{HEAD}"])
    assert fit_classes(named, [-1, 1], head=HEAD).numbers == [0, 1]


def test_regression_takes_whole_numbers_that_training_has_not_seen(tmp_path):
    one = partial(fit_classes, BertConfig(num_labels=1, architectures=[f"Bert{HEAD}"]), head=HEAD)
    train, test = load_split(splits_of(tmp_path, train=[0, 3, 10], test=[4, 11]), one)
    assert (train["label"][:], test["label"][:]) == ([0, 3, 10], [4, 11])


@pytest.mark.parametrize("labels", [[3, 3, 3], [True] * 3, ["a", " a", "a "]])
def test_a_single_class_is_refused(labels, tmp_path):
    with pytest.raises(PruningError, match="column 'label' must have two classes or more"):
        load_split(splits_of(tmp_path, train=labels, test=labels))


@pytest.mark.parametrize("labels", [[True, False, True], [1.0, 0.0, 1.0]])
def test_truth_values_are_two_classes(labels, tmp_path):
    train, test = load_split(splits_of(tmp_path, train=labels, test=labels[:2]), new_head)
    assert (train["label"][:], test["label"][:]) == ([1, 0, 1], [1, 0])


def test_spaces_around_a_class_are_not_part_of_its_name(tmp_path):
    train, test = load_split(splits_of(tmp_path, train=["very good", " bad", "bad"], test=["bad ", "very good"]))
    assert label_names(train) == ["bad", "very good"]
    assert (train["label"][:], test["label"][:]) == ([1, 0, 0], [0, 1])


def test_a_class_without_a_name_is_refused(tmp_path):
    with pytest.raises(PruningError, match="must name a class in every row"):
        load_split(splits_of(tmp_path, train=["a", "b", " "], test=["a"]))


def test_splits_that_number_their_classes_otherwise_are_mapped_by_name(tmp_path):
    def named(names, labels):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels}, features=features)

    splits = {"train": named(["neg", "pos"], [0, 1, 0]), "test": named(["pos", "neg"], [0, 1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    settings = DataSettings(name=str(tmp_path / "saved"), text="text", evaluation=["test"])
    assert load_split(settings, new_head).evaluation["label"][:] == [1, 0]
    DatasetDict({**splits, "test": named(["pos", "new"], [0, 1])}).save_to_disk(tmp_path / "other")
    with pytest.raises(PruningError, match="classes of training: neg, pos. Received others: new"):
        load_split(settings.model_copy(update={"name": str(tmp_path / "other")}), new_head)


@pytest.mark.parametrize("kind", [float, int, bool])
def test_a_list_of_0_and_1_for_each_class_says_which_ones_a_row_has(kind, tmp_path):
    rows = [[1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    labels = [[kind(one) for one in row] for row in rows]
    train, _ = load_split(splits_of(tmp_path, train=labels, test=labels), new_head)
    assert train["label"][:] == [[0, 2], [1, 2], [], [0, 1]]


def test_lists_of_class_numbers_stay_what_they_are(tmp_path):
    labels = [[0], [0, 1], [], [1]]
    assert load_split(splits_of(tmp_path, train=labels, test=labels), new_head).train["label"][:] == labels
    gaps = [[0], [0, 1000], [], [1000]]
    train, _ = load_split(splits_of(tmp_path, train=gaps, test=gaps), new_head)
    assert (label_names(train), train["label"][:]) == (["0", "1000"], labels)
    with pytest.raises(PruningError, match="must hold classes, or 0 and 1 for each class. Received: float"):
        load_split(splits_of(tmp_path, train=[[0.5, 0.2]] * 3, test=[[0.5, 0.2]]), new_head)


def test_ignored_words_stay_ignored(tmp_path):
    rows = {"text": [["a", "b"], ["c", "d"]], "label": [[-100, 5], [7, 5]]}
    Dataset.from_dict(rows, features=Features({"text": Sequence(Value("string")), "label": Sequence(Value("int64"))}))
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    settings = DataSettings(name=str(tmp_path), text="text", test_size=0.5)
    train, test = load_split(settings, partial(fit_classes, None, head="ForTokenClassification"), "list")
    assert sorted(train["label"][:] + test["label"][:]) == [[-100, 0], [1, 0]]


# splits
def labelled(folder: Path, suffix: str = "csv", **splits: list) -> str:
    folder.mkdir()
    for name, labels in splits.items():
        rows = [{"text": " ".join(sentence()), "label": one} for one in labels]
        write(folder / f"{name}.{suffix}", [{"text": row["text"]} for row in rows] if None in labels else rows)
    return str(folder)


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_public_test_set_without_labels_is_not_evaluated_on(hidden, bert, tmp_path):
    guessed = guess(Wish(bert, labelled(tmp_path / "a", train=[0, 1] * 10, test=[hidden] * 4)))
    assert guessed.recipe.data.test_size == 0.2
    assert guessed.table().count("test has no labels") == 1
    others = labelled(tmp_path / "b", train=[0, 1] * 10, test=[hidden] * 4, dev=[1, 0])
    assert guess(Wish(bert, others)).recipe.data.evaluation == ["dev"]
    meant = labelled(tmp_path / "c", train=[-1, 1] * 10, test=[1, -1])
    assert guess(Wish(bert, meant)).recipe.data.evaluation == ["test"]


def test_one_dataset_saved_to_disk_and_one_with_a_format(bert, tmp_path):
    rows = Dataset.from_dict({"text": [TEXTS[n % 6] for n in range(20)], "label": [n % 2 for n in range(20)]})
    rows.save_to_disk(tmp_path / "one")
    settings = DataSettings(name=str(tmp_path / "one"), text="text", test_size=0.5)
    assert len(load_split(settings).train) == 10
    DatasetDict(train=rows.with_format("numpy"), valid=rows).save_to_disk(tmp_path / "two")
    recipe = guess(Wish(bert, str(tmp_path / "two"))).recipe
    assert recipe.data.evaluation == ["valid"]
    assert all(isinstance(one, int) for one in load_split(recipe.data, new_head).train["label"][:])


def test_the_only_file_of_a_folder_is_read_as_a_file(tmp_path):
    (tmp_path / "reviews.csv").write_text("text;label\na, b;1\nc;0\n")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert load_source(DataSettings(name=str(tmp_path)))["train"].column_names == ["text", "label"]


# scores
def test_whole_numbers_of_pairs_are_scores(bert, tmp_path):
    for name in ("score", "similarity"):
        rows = [{"sentence1": "good film", "sentence2": " ".join(sentence()), name: n % 6} for n in range(30)]
        data = write(tmp_path / f"{name}.csv", rows)
        recipe = guess(Wish(bert, data)).recipe
        assert (recipe.task, recipe.data.label, recipe.data.full_score) == ("sentence-similarity", name, 5.0)
        assert guess(Wish(bert, data, task="text-classification")).recipe.data.label == name
    rows = [{"sentence1": "good film", "sentence2": " ".join(sentence()), "label": n % 3} for n in range(30)]
    assert guess(Wish(bert, write(tmp_path / "nli.csv", rows))).recipe.task == "text-classification"
    tuned = save(tmp_path / "tuned", f"Bert{HEAD}", num_labels=6)
    assert guess(Wish(tuned, str(tmp_path / "score.csv"))).recipe.task == "text-classification"


# folders of files
@pytest.fixture(scope="module")
def ears(tmp_path_factory) -> str:
    return save_wav2vec2(tmp_path_factory.mktemp("ears") / "model")


def test_hidden_files_are_no_sounds(tmp_path):
    of_classes(tmp_path / "a", 6)
    for name in ("low/._0.wav", ".hidden/x.wav", "low/Thumbs.db", ".DS_Store"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"Mac OS X")
    rows = load_source(DataSettings(name=str(tmp_path / "a")))["train"]
    assert (len(rows), {*rows["label"][:]}) == (6, {"low", "high"})


@pytest.mark.parametrize("kind", ["empty", "damaged", "silent"])
def test_sounds_that_cannot_be_read_are_named_before_training(kind, ears, tmp_path):
    data, wrong = of_classes(tmp_path / "a"), tmp_path / "a" / "low" / "wrong.wav"
    if kind == "silent":
        wavfile.write(wrong, RATE, np.zeros(0, np.int16))
    else:
        wrong.write_bytes(b"" if kind == "empty" else b"RIFFxxxxWAVEfmt ")
    recipe = guess(Wish(ears, data, output=tmp_path / "run")).recipe
    words = {"empty": "the file is empty: take such files out", "damaged": "damaged", "silent": "has no samples"}[kind]
    with pytest.raises(PruningError, match=f"data.audio: .*{words}.*wrong.wav'$"):
        workflow.validate(recipe)


@pytest.mark.parametrize("kind", ["empty", "no image", "truncated"])
def test_images_that_cannot_be_read_are_named_before_training(kind, tmp_path):
    draw = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "a" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    (path.parent / "._1.jpg").write_bytes(b"Mac OS X")
    vit = save(tmp_path / "vit", "ViTModel", "ViTConfig", image_size=8, patch_size=4)
    recipe = guess(Wish(vit, str(tmp_path / "a"), output=tmp_path / "run"), ["onnx=false"]).recipe
    assert len(workflow.validate(recipe).train) == 16
    path.write_bytes({"empty": b"", "no image": b"<html>", "truncated": whole[: len(whole) // 2]}[kind])
    words = {"empty": "the file is empty", "no image": "is no image, or damaged", "truncated": "truncated"}[kind]
    with pytest.raises(PruningError, match=f"data.image: .*{words}.*19.jpg'$"):
        workflow.validate(recipe)


def test_files_without_labels_are_told_how_they_get_some(ears, tmp_path):
    for number in range(4):
        write_sound(tmp_path / "flat" / f"{number}.wav", "ab")
    with pytest.raises(PruningError, match=r"folder of its own, or write a metadata.csv .* file_name and label"):
        guess(Wish(ears, str(tmp_path / "flat")))
    with pytest.raises(PruningError, match=r"no column 'label'.*write a metadata.csv"):
        load_split(DataSettings(name=str(tmp_path / "flat"), audio="audio", test_size=0.5))
    names = write(tmp_path / "names.csv", [{"file": "0.wav", "label": n % 2} for n in range(4)])
    with pytest.raises(PruningError, match=r"data.audio: column 'file' .* column file_name has these names"):
        load_split(DataSettings(name=names, audio="file", test_size=0.5))
    with pytest.raises(PruningError, match=r"data.text: column 'file' .*file_name has these names.*'0.wav'"):
        guess(Wish(ears, names))  # nobody has said that these are sounds


def test_sounds_may_be_named_on_the_command_line(ears, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = with_texts(tmp_path / "a", ["ab", "c"] * 10)
    words = ["init", "--model", ears, "--data", data, "--audio", "audio", "--label", "text"]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == 0, told.output
    assert "audio: audio" in Path("recipe.yaml").read_text()


def test_one_metadata_file_for_sounds_of_several_splits(tmp_path):
    lines = ["file_name,text"]
    for split, texts in {"train": "abc", "test": "ab"}.items():
        for number, text in enumerate(texts):
            write_sound(tmp_path / split / f"{number}.wav", text)
            lines.append(f"{split}/{number}.wav,{text}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    splits = load_source(DataSettings(name=str(tmp_path)))
    assert {name: rows["text"][:] for name, rows in splits.items()} == {"train": [*"abc"], "test": [*"ab"]}


def test_a_category_of_pandas_is_a_class(tmp_path):
    frame = pd.DataFrame({"text": TEXTS, "label": pd.Categorical(["pos", "neg"] * 3)})
    frame.to_parquet(tmp_path / "train.parquet")
    train, _ = load_split(DataSettings(name=str(tmp_path), text="text", test_size=0.5), new_head)
    assert label_names(train) == ["neg", "pos"]


def pictures(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / name)
    return str(folder)


def test_only_whole_names_of_folders_are_splits(tmp_path):
    names = ["cat/1.png", "cat/my test.png", "dog/3.png", "test strips/4.png", "test strips/val_5.png"]
    found = load_source(DataSettings(name=pictures(tmp_path / "pets [1]", *names)))
    assert [*found] == ["train"]
    assert sorted(found["train"]["label"][:]) == ["cat", "cat", "dog", "test strips", "test strips"]


def test_pictures_of_a_public_test_set_have_no_class(tmp_path):
    names = ["train/cat/1.png", "train/dog/2.png", "test/a.png", "test/b.png"]
    found = load_source(DataSettings(name=pictures(tmp_path / "pets", *names)))
    assert found["train"]["label"][:] == ["cat", "dog"]
    assert found["test"].column_names == ["image"]


def test_classes_that_are_called_like_splits_are_refused(tmp_path):
    images = pictures(tmp_path / "images", "train/1.png", "test/2.png", "dogs/3.png")
    for number, name in enumerate(("train", "test", "dogs")):
        write_sound(tmp_path / "sounds" / name / f"{number}.wav", "ab")
    for folder in (images, str(tmp_path / "sounds")):
        with pytest.raises(PruningError, match=r"a folder that is called test or train is a split, and must have a"):
            load_source(DataSettings(name=folder))


def sounds(folder: Path, *names: str) -> str:
    for name in names:
        write_sound(folder / name, "ab")
    return str(folder)


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("Training", "Testing", "test"),
        ("TRAIN", "Val", "val"),
        ("Train", "Validation", "validation"),
        ("training", "Valid", "valid"),
        ("train", "DEV", "dev"),
        ("train", "evaluation", "eval"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_folders_of_splits_are_known_by_their_usual_names(train, test, split, kind, tmp_path):
    make, suffix = (pictures, "png") if kind == "image" else (sounds, "wav")
    names = [f"{place}/{name}.{suffix}" for place in (train, test) for name in ("cat/1", "dog/2")]
    found = load_source(DataSettings(name=make(tmp_path / "classes", *names)))
    assert {name: rows["label"][:] for name, rows in found.items()} == {"train": ["cat", "dog"], split: ["cat", "dog"]}
    told = make(tmp_path / "told", f"{train}/1.{suffix}", f"{train}/2.{suffix}", f"{test}/3.{suffix}")
    lines = [f"{train}/1.{suffix},x", f"{test}/3.{suffix},x", f"{train}/2.{suffix},y"]
    (Path(told) / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    found = load_source(DataSettings(name=told))
    assert {name: rows["label"][:] for name, rows in found.items()} == {"train": ["x", "y"], split: ["x"]}


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAINING", "testing"), ("train", "Test")])
def test_files_of_splits_are_known_by_their_usual_names(train, test, bert, tmp_path):
    for name, number in ((train, 12), (test, 6)):
        write(tmp_path / f"{name}.csv", [{"text": f"good film {n}", "label": n % 2} for n in range(number)])
    settings = DataSettings(name=str(tmp_path), text="text", evaluation=["test"])
    assert [len(rows) for rows in load_split(settings)] == [12, 6]
    assert [path.stem for path in local_files(settings)] == sorted([train, test])
    assert guess(Wish(bert, str(tmp_path))).recipe.data.evaluation == ["test"]
    write(tmp_path / "train.csv", [{"text": "a play", "label": n % 2} for n in range(4)])
    assert len(load_split(settings).train) == 4


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_files_that_are_in_no_split_are_told(kind, tmp_path, caplog):
    make, suffix = (pictures, "png") if kind == "image" else (sounds, "wav")
    names = [f"train/cat/1.{suffix}", f"train/dog/2.{suffix}", f"Test/cat/3.{suffix}"]
    beside = [f"cow/4.{suffix}", f"cow/5.{suffix}", f"loose.{suffix}"]
    folder = make(tmp_path / "a", *names)
    load_source(DataSettings(name=folder))
    assert caplog.text == ""
    make(tmp_path / "a", *beside)
    assert len(load_source(DataSettings(name=folder))["train"]) == 2
    assert (
        f"3 files of '{folder}' are in no split, as they lie beside Test, train: 'cow', 'loose.{suffix}'" in caplog.text
    )
    with pytest.raises(PruningError, match="into a folder called train. Received: 3 files of .* beside Test: 'cow', "):
        load_source(DataSettings(name=make(tmp_path / "b", names[2], *beside)))
    with pytest.raises(PruningError, match="one folder must be called as each split. Received: Test, testing, train"):
        load_source(DataSettings(name=make(tmp_path / "a", f"testing/cat/6.{suffix}")))


def test_folders_of_pictures_are_no_numbers_of_a_model_without_names(tmp_path):
    sizes = {"image_size": 8, "patch_size": 4}
    model = save(tmp_path / "vit", "ViTForImageClassification", "ViTConfig", **sizes)
    data = pictures(tmp_path / "pets", *(f"{('cat', 'dog')[n % 2]}/{n}.png" for n in range(10)))
    assert guess(Wish(model, data)).recipe.dense is not None


def test_answers_that_are_cut_off_are_no_rows_without_an_answer(tmp_path, caplog):
    rows = [
        ("good film", {"text": ["film"], "answer_start": [5]}),
        ("good film " * 20, {"text": ["film"], "answer_start": [195]}),
        ("good film", {"text": [" Film "], "answer_start": [4]}),
        ("good film", {"text": [], "answer_start": []}),
    ]
    settings = DataSettings(name="x", text=["question", "context"], label="answers", max_length=12)
    made = [{"question": "play", "context": context + " ", "answers": answers} for context, answers in rows]
    prepared = prepare_answers(Dataset.from_list(made), tokenizer(), settings)
    assert [*zip(prepared["start_positions"][:], prepared["end_positions"][:])] == [(4, 4), (4, 4), (0, 0)]
    assert "1 of 4 answers are cut off by data.max_length=12, and left out" in caplog.text
    with pytest.raises(PruningError, match="must leave answers in their contexts. Received: 1 of 1"):
        prepare_answers(Dataset.from_list(made[1:2]), tokenizer(), settings)
    made[0]["answers"] = {"text": ["film"], "answer_start": [4]}
    with pytest.raises(PruningError, match="must stand in its context .* Received: 'film' at 4, where there is ' fil'"):
        prepare_answers(Dataset.from_list(made[:1]), tokenizer(), settings)
    made[0]["question"] = "good play " * 12
    with pytest.raises(PruningError, match="must leave room for a context behind the longest question. Received: 12"):
        prepare_answers(Dataset.from_list(made[:1]), tokenizer(), settings)


@pytest.mark.parametrize("labels", [[0], [0, 1, 0]])
def test_rows_with_more_or_fewer_labels_than_words_are_refused(labels):
    rows = Dataset.from_list([{"tokens": ["good", "film"], "tags": labels}])
    with pytest.raises(PruningError, match=rf"as many labels as words. Received: {len(labels)} labels of 2 words"):
        prepare_tokens(rows, tokenizer(), DataSettings(name="x", text="tokens", label="tags"))
