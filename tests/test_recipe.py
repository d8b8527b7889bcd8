"""Recipes: overrides, round trips, and errors that name the key, the rule and what was received."""

import pytest
import yaml

from hf_prune import Recipe, RecipeError
from hf_prune.recipe import PrunerSettings, load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.yaml())
    assert load_recipe(path) == recipe


def test_overrides_are_yaml_and_reach_nested_keys():
    recipe = load_recipe(
        "quickstart",
        ["seed=3", "target.macs=0.25", "pruners.weights.sparsity=0.5", "dense=null", "data.evaluation=[test, test]"],
    )
    assert (recipe.seed, recipe.target.macs, recipe.pruners.weights.sparsity) == (3, 0.25, 0.5)
    assert recipe.dense is None
    assert recipe.data.evaluation == ["test", "test"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("pruners.heads.sparsit=0.5", ["pruners.heads.sparsit", "Did you mean 'sparsity'?"]),
        ("trian.epochs=3", ["trian", "Did you mean 'train'?"]),
        ("pruners.neurons.sparsity=50", ["pruners.neurons.sparsity", "[0, 1)", "Received: 50", "Did you mean 0.5?"]),
        ("target.macs=0", ["target.macs", "(0, 1]", "Received: 0"]),
        ("train.epochs=many", ["train.epochs", "number", "Received: 'many'"]),
        ("train.batch_size=0", ["train.batch_size", "greater than or equal to 1", "Received: 0"]),
        ("task=translation", ["task", "text-classification", "Received: 'translation'"]),
        ("pruners=null", ["pruners", "Received: None"]),
        ("schedule.frequency=0", ["schedule.frequency", "Received: 0"]),
        ("distillation.temperature=0", ["distillation.temperature", "Received: 0"]),
        ("seed", ["key=value", "Received: 'seed'"]),
    ],
)
def test_errors_name_the_key_the_rule_and_what_was_received(override, parts):
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", [override])
    for part in parts:
        assert part in str(error.value)


def test_unknown_recipe_suggests_a_known_one():
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        load_recipe("quickstrat")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(path)


def test_yaml_of_a_recipe_is_plain():
    recipe = load_recipe("quickstart")
    assert isinstance(recipe, Recipe)
    assert yaml.safe_load(recipe.yaml())["target"] == {"macs": recipe.target.macs}


def test_every_pruner_can_be_named():
    chosen = PrunerSettings(**{name: {"sparsity": 0.5} for name in PrunerSettings.model_fields}).chosen
    assert [type(pruner).__name__.removesuffix("Pruner") for pruner in chosen] == [
        "Head", "Neuron", "Layer", "Expert", "Channel", "Weight",
    ]  # fmt: skip
