"""What a newcomer reads when something is wrong: which line, which option, which name."""

from __future__ import annotations

import pytest
from test_guessing import classes, save

from hf_prune import PruningError, cli
from hf_prune.guessing import Wish, guess
from hf_prune.inspecting import load
from hf_prune.measuring import measure_models


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
