"""Recipes: overrides, round trips, and errors that name the key, the rule and what was received."""

import time

import pytest
import yaml

from hf_prune import Recipe, RecipeError
from hf_prune.recipe import PrunerSettings, load_recipe, shipped_recipes
from hf_prune.settings import read_yaml


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


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        (["pruners={weights: {sparsity: 0.5, score: l1}}", "target=null", "rewinding={rounds: 2}"], True),
        (["pruners={heads: {score: l0}, neurons: {score: l0}}"], True),
        (["pruners={weights: {sparsity: 0.5, schedule: {kind: linear}}}", "target=null"], True),
        (["pruners={heads: {score: l0}, neurons: {score: taylor}}"], False),
        ([], False),
    ],
)
def test_no_schedule_is_taken_where_something_else_says_when(overrides, taken):
    if taken:
        recipe = load_recipe("quickstart", ["schedule=null", *overrides])
        assert recipe.pruning.schedule is None
        assert load_recipe(recipe).yaml() == recipe.yaml()
        return
    with pytest.raises(RecipeError, match="schedule: null needs rewinding, .*Received: .*taylor"):
        load_recipe("quickstart", ["schedule=null", *overrides])


def test_keys_with_points_missing_ones_and_values_for_mappings_are_explained(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: text-classification\nmodel.config: {num_labels: 10}\ndata: book.txt\npruners: {heads.score: l1}\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe)
    for part in (
        "name: must be given. Received: task, model.config, data, pruners",
        "unknown key 'model.config'. In YAML it is model: {config: …}. Known: ",
        "unknown key 'pruners.heads.score'. In YAML it is heads: {score: …}. Known: ",
        "data: must be a mapping with keys of name, config, ",
        "Received: 'book.txt'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_what_a_recipe_lacks_is_told_without_what_nobody_wrote(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: {task}\nmodel: {{name: gpt2}}\ndata: {{text: a}}\npruners: {{heads: {{}}}}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe)
    assert "name: must be given. Received: task, model, data, pruners;" in str(error.value)
    assert "data: give either name, of a file, a folder or a data set on the Hub, or files" in str(error.value)


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
    names = ["heads", "kv_groups", "neurons", "layers", "branches", "experts", "channels", "weights"]
    assert set(names) <= set(PrunerSettings.model_fields)
    chosen = PrunerSettings(**{name: {"sparsity": 0.5} for name in names}).chosen
    assert [type(pruner).__name__.removesuffix("Pruner") for pruner in chosen] == [
        "Head", "Head", "Neuron", "Layer", "Layer", "Expert", "Channel", "Weight",
    ]  # fmt: skip
    assert [pruner.unit for pruner in chosen if hasattr(pruner, "unit")] == ["auto", "kv_group", "layer", "branch"]


def alias_bomb(start: str = "[x,x,x,x,x,x,x,x,x]") -> str:
    """Return a few hundred characters that are nine to the ninth values."""
    lines = [f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")]
    return f"a: &a {start}\n{''.join(lines)}"


MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        alias_bomb() + "name: *i\n",
        alias_bomb() + "name: x\nmodel: {config: {model_type: vit, more: *i}}\n",
        alias_bomb("{x: y}"),
        MERGES,
        "a: &a [*a]\n",
        "a: &a {<<: *a}\n",
        "[" * 10_000,
        "[" * 200 + "]" * 200,
        "- " * 10_000,
        "? " * 10_000,
        "x: " + "y" * 2**19,
        "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 10_000,
        "seed: 1" + ":59" * 50_000,
        "seed: 1" + ":59" * 50_000 + ".5",
        "seed: 2024-99-99\n",
        "seed: !!int ''\n",
        "seed: !!timestamp x\n",
        "seed: !!python/object/apply:os.system ['true']\n",
        "? [a]\n: b\n",
        "".join(f"key{i}: {i}\n" for i in range(5000)),
        "\x00",
    ],
    ids=range(22),
)
def test_a_strangers_yaml_is_refused_quickly_and_shortly(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert time.perf_counter() - start < 10  # a second or so where nothing else runs
    assert len(str(error.value)) < 10_000


@pytest.mark.parametrize("value", ["{a: &a [*a]}", "[" * 5000, "!!int ''", "&a [*a, *a]"])
def test_a_strangers_override_is_refused(value):
    with pytest.raises(RecipeError):
        load_recipe("quickstart", [f"seed={value}"])


def test_aliases_that_multiply_nothing_are_fine():
    text = "dense: &t {epochs: 1}\ntrain: {<<: *t, batch_size: 8}\n"
    assert read_yaml(text, "x") == {"dense": {"epochs": 1}, "train": {"epochs": 1, "batch_size": 8}}


def test_an_export_may_stand_alone_or_in_a_list():
    """Each file is written once, and has a folder of its own."""
    alone = load_recipe("quickstart", ["export.quantize=dynamic"])
    assert [one.folder for one in alone.exports] == ["onnx", "onnx-int8"]
    several = load_recipe("quickstart", ["onnx=false", "export=[{}, {quantize: static}, {dtype: fp16}, {dtype: fp16}]"])
    assert [one.folder for one in several.exports] == ["onnx", "onnx-int8-static", "onnx-fp16"]
    assert load_recipe("quickstart", ["export=null", "onnx=false"]).exports == []
    assert Recipe.model_validate(yaml.safe_load(several.yaml())) == several


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.quantise=dynamic", r"quantise.*Did you mean 'quantize'"),
        ("export.quantize=int8", r"export.*quantize.*'dynamic'.*Received: 'int8'"),
        ("export={quantize: dynamic, dtype: fp16}", r"either quantize or dtype.*Received: 'dynamic' and 'fp16'"),
    ],
)
def test_a_wrong_export_is_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])
