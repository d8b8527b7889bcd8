"""What a newcomer reads when something is wrong: which line, which option, which name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from datasets import Dataset
from test_guessing import classes, save

from hf_prune import PruningError, cli
from hf_prune.data import DataSettings, load_split
from hf_prune.files import no_folder, no_model
from hf_prune.guessing import Wish, guess
from hf_prune.inspecting import load
from hf_prune.measuring import measure_models
from hf_prune.workflow import validate


# a run without a recipe
@pytest.mark.parametrize("told", [{"data": "reviews.csv"}, {"model": "bert"}, {"model": "bert", "data": "reviews.csv"}])
def test_a_recipe_beside_a_model_or_data_is_named(told):
    with pytest.raises(PruningError, match="model.name=FOLDER or data.name=FILE do. Received: the recipe quickstart"):
        cli.run("quickstart", **told)
    with pytest.raises(PruningError, match="Give a recipe, or both.* --data missing"):
        cli.run("train.epochs=1", model="bert")


def test_the_table_of_guesses_shows_what_is_said(tmp_path):
    model, data = classes(tmp_path)

    def rows(*overrides: str) -> dict[str, tuple[str, str]]:
        return {key: (value, because) for key, value, because in guess(Wish(model, data), overrides).reasons}

    guessed = rows()
    assert "steps of 16 rows" in guessed["train.epochs"][1]
    said = rows("train.epochs=1", "target.macs=0.3", "seed=3")
    assert said["train.epochs"] == ("1", "you say so")
    assert said["target"] == ("macs=0.3", "you say so")
    assert said["seed"] == ("3", "you say so")
    assert said["task"] == guessed["task"]
    assert rows("target.macs=null", "target.speedup=2")["target"] == ("speedup=2", "you say so")
    assert rows("train={epochs: 2}")["train"] == ("{epochs: 2}", "you say so")
    assert "train.epochs" not in rows("train={epochs: 2}")
    assert rows("train.batch_size=8")["train.epochs"] == (guessed["train.epochs"][0], "to prune in small steps")


# the time of a model
def measured(*models: str, **settings) -> tuple[list[int], list[str]]:
    """Return the lengths that were timed, and what was told."""
    told: list[str] = []
    grid = measure_models(models, load, repeats=1, tell=told.append, **settings)
    return [one.length for one in grid.timings], [one for one in told if "unsteady" not in one]


def test_the_length_of_a_measurement_is_what_the_model_reads(tmp_path):
    bert = save(tmp_path / "bert", "BertModel")  # reads 32
    roberta = save(tmp_path / "roberta", "RobertaModel", "RobertaConfig", pad_token_id=1, max_position_embeddings=30)
    llama = save(tmp_path / "llama", "LlamaModel", "LlamaConfig", num_key_value_heads=4)  # turns its positions
    assert measured(bert) == ([32], ["32 tokens in a row, as 'bert' reads no more; --length says another number"])
    assert measured(bert, roberta)[0] == [28, 28]
    assert measured(llama) == ([128], [])
    assert measured(bert, lengths=[8]) == ([8], [])
    with pytest.raises(PruningError, match="--length must be at most 32, as 'bert' reads no more tokens. Received: 64"):
        measured(bert, llama, lengths=[8, 64])


# rows of files
def refused(path: Path, text: str, **settings) -> str:
    path.write_text(text)
    with pytest.raises(PruningError) as error:
        load_split(DataSettings(name=str(path), test_size=0.5, **{"text": "text", **settings}))
    return str(error.value)


ROWS = [("good film", "pos"), ("bad play", "neg")] * 6


@pytest.mark.parametrize("blank", [0, 2])
def test_empty_cells_are_named_by_their_line(tmp_path, blank):
    lines = ["text,label", *(f"{text},{label}" for text, label in ROWS)]
    lines[4] = "good film,"
    lines[2:2] = [""] * blank
    told = refused(tmp_path / "reviews.csv", "\n".join(lines))
    assert told.endswith(f"Received: 1 empty rows of 12: line {5 + blank} of 'reviews.csv'")
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    lines[2] = lines[5] = lines[7] = lines[8] = '{"text": "good", "label": null}'
    told = refused(tmp_path / "reviews.jsonl", "\n".join(["\n" * blank, *lines] if blank else lines))
    first = 3 + blank + (blank > 0)
    assert told.endswith(f"4 empty rows of 12: lines {first}, {first + 3}, {first + 5}, … of 'reviews.jsonl'")


def test_empty_cells_are_named_by_their_row_where_a_line_is_none(tmp_path):
    lines = ["text,label", *(f'"{text}\nand more",{label}' for text, label in ROWS)]
    lines[4] = "good film,"
    assert refused(tmp_path / "reviews.csv", "\n".join(lines)).endswith("of 12: row 4, counted from 1")
    Dataset.from_dict({"text": ["a", "b", "c"], "label": ["x", None, "y"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(PruningError, match="1 empty rows of 3: row 2, counted from 1"):
        load_split(DataSettings(name=str(tmp_path / "rows.parquet"), text="text", test_size=0.5))


def test_words_without_a_tag_are_named_by_their_line(tmp_path):
    rows = [{"text": ["Ada", "in", "Rome"], "label": ["B", "O", "B"]} for _ in range(6)]
    rows[3]["label"] = ["B"]
    data = tmp_path / "names.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    told = (
        "as many labels as words. Received: 1 labels of 3 words, .*'Ada', 'in', 'Rome'.*, in line 4 of 'names.jsonl'$"
    )
    with pytest.raises(PruningError, match=told):
        load_split(DataSettings(name=str(data), text="text", test_size=0.5), labels="list")


def test_broken_lines_are_named_as_lines_of_the_file(tmp_path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    cut = [*lines[:7], "", lines[7][:20], *lines[8:]]
    told = refused(tmp_path / "cut.jsonl", "\n".join(cut))
    assert "cannot be loaded: line 9 is not valid JSON (cut off?): " in told
    assert told.endswith(f"Received: '{tmp_path / 'cut.jsonl'}'.")
    told = refused(tmp_path / "list.json", f"[\n{lines[0]},\n{lines[2][:9]}")
    assert "line 3 is not valid JSON (cut off?)" in told


def test_a_quote_that_is_not_closed_is_named_by_its_line(tmp_path):
    lines = ["text,label", *(f"{text},{label}" for text, label in ROWS)]
    lines[1], lines[6] = '"good\nfilm",pos', '"bad play,neg'
    told = refused(tmp_path / "quote.csv", "\n".join(lines))
    assert "cannot be loaded: the quote that line 8 opens is not closed (a text with the separator in it" in told
    assert told.endswith(f"Received: '{tmp_path / 'quote.csv'}'.")


# models that are not there
def test_a_mistyped_model_is_told_with_the_folder_beside_it(tmp_path, monkeypatch):
    _, data = classes(tmp_path)
    save(tmp_path / "my-bert", "BertModel")
    (tmp_path / "my-bertti").mkdir()  # holds no model
    monkeypatch.chdir(tmp_path)
    told = (
        r"must be a Hub name or a local folder: no such folder here. Did you mean 'my-bert'\? Received: 'my-bertt' \("
    )
    with pytest.raises(PruningError, match=f"^--model {told}") as error:
        guess(Wish("my-bertt", data))
    assert "…" not in str(error.value)
    recipe = guess(Wish("my-bert", data)).recipe
    asked = []
    ask = transformers.configuration_utils.cached_file
    monkeypatch.setattr(
        transformers.configuration_utils, "cached_file", lambda *a, **k: asked.append(a) or ask(*a, **k)
    )
    with pytest.raises(PruningError, match=f"^model.name {told}"):
        validate(recipe, ["model.name=my-bertt", f"output={tmp_path / 'run'}"])
    assert len(asked) == 1
    with pytest.raises(PruningError, match=r"Did you mean 'my-bert'\? Received: 'my-bertt'$"):
        load("my-bertt")
    assert no_folder("my-bert") == ""
    assert no_folder("elsewhere/x/y") == "no such folder here."
    long = no_model("MODEL", "x", OSError("see " + "https://huggingface.co/" + "a" * 400 + "\nmore"))
    assert "(see …)" in long
