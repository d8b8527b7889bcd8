"""Sensitivity: what it says is the loss of a masked model, and the model is untouched whatever happens."""

import copy
import csv
import json

import pytest
import torch
from models import BUILD, build_bert, build_llama, draw_batch
from test_guessing import images, language, masked, pairs, save, tokenizer, tokens, write, written
from transformers import BertTokenizerFast, ViTImageProcessor
from typer.testing import CliRunner

from hf_prune import (
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningError,
    cli,
    find_groups,
    mask_units,
    prune,
    sensitivity,
)
from hf_prune.guessing import Wish, guess
from hf_prune.workflow import prepare

ALL = ["bert", "vit", "llama", "llama_mha"]


def batches_for(model, count=2):
    return [draw_batch(model, seed=seed) for seed in range(count)]


def loss_of(model, batches):
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)


def state_of(model):
    own = {
        path: {k: vars(one).get(k) for k in ("forward", "qconfig", "training")} for path, one in model.named_modules()
    }
    return copy.deepcopy(model.state_dict()), own, [one.grad for one in model.parameters()]


def assert_untouched(model, before):
    weights, own, gradients = before
    assert all(torch.equal(weights[name], one) for name, one in model.state_dict().items())
    assert state_of(model)[1:] == (own, gradients)


@pytest.mark.parametrize("name", ALL)
def test_each_loss_is_that_of_the_model_without_the_part(name):
    model = BUILD[name]()
    batches, before = batches_for(model), state_of(model)
    found = sensitivity(model, batches)
    assert_untouched(model, before)
    assert found.loss == loss_of(model, batches)
    kinds = {effect.kind for effect in found.effects}
    assert kinds == {"kv_group" if name == "llama" else "head", "neuron", "branch", "layer"}
    for effect in found.effects:
        assert effect.increase == effect.loss - found.loss
    for group in find_groups(model):
        if group.kind not in ("branch", "layer"):
            continue
        for unit in range(group.units):
            others = [one for one in range(group.units) if one != unit]
            place = group.place if group.kind == "branch" else f"layers.{unit}"
            (effect,) = [one for one in found.effects if (one.place, one.kind) == (place, group.kind)]
            assert effect.loss == loss_of(mask_units(copy.deepcopy(model), {group.name: others}), batches)


@pytest.mark.parametrize(("pruner", "kind"), [(HeadPruner, "head"), (NeuronPruner, "neuron")])
def test_a_share_is_what_one_shot_pruning_would_choose(pruner, kind):
    model = build_bert()
    batches = batches_for(model)
    found = [one for one in sensitivity(model, batches, shares=[0.5]).effects if one.kind == kind]
    assert [one.place.split(".")[1] for one in found] == ["0", "1"]
    for one in found:
        masked = copy.deepcopy(model)
        prune(masked, pruner(sparsity=0.5, include=[f"{one.place}.*"]), data=batches, shrink=False)
        assert one.loss == pytest.approx(loss_of(masked, batches), abs=1e-6)
        assert (one.removed, one.units) == ((2, 4) if kind == "head" else (12, 24))


def test_the_score_and_the_loss_of_ones_own_decide():
    model = build_bert()
    found = sensitivity(model, iter(batches_for(model, 5)), score="l1", batches=3, loss=lambda m, b: m(**b).loss * 2)
    assert (found.score, found.batches) == ("l1", 3)
    assert found.loss == pytest.approx(2 * loss_of(model, batches_for(model, 3)))


@pytest.mark.parametrize("failing", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 4, 14, 18])
def test_an_interrupted_model_is_bit_for_bit_what_it_was(failing, at):
    model, calls = build_bert().train(), []

    def loss(model, batch):
        calls.append(model)
        if len(calls) == at + 2:
            raise failing("now")
        return model(**batch).loss

    before = state_of(model)
    with pytest.raises(failing, match="now"):
        sensitivity(model, batches_for(model, 1), loss=loss)
    assert len(calls) == at + 2
    assert_untouched(model, before)


def test_an_interrupt_while_weights_are_put_back_is_made_good(monkeypatch):
    from hf_prune.live import temporary

    model, calls, real = build_bert(), [], temporary._put_back

    def interrupted(live, before, own):
        calls.append(live)
        if len(calls) == 6:
            first = next(iter(before))
            real(live, {first: before[first]}, {})
            raise KeyboardInterrupt
        real(live, before, own)

    monkeypatch.setattr(temporary, "_put_back", interrupted)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, batches_for(model, 1))
    assert_untouched(model, before)


def test_a_model_that_was_pruned_before_keeps_its_names():
    model = build_llama(num_hidden_layers=3)
    prune(model, LayerPruner(sparsity=0.3, score="l1"), data=batches_for(model))
    left = [name.rpartition(".")[0] for name in (g.name for g in find_groups(model)) if name.endswith("mlp.branch")]
    layers = sorted({name.removesuffix(".mlp") for name in left})
    assert len(layers) == 2
    found = sensitivity(model, batches_for(model))
    assert sorted(effect.place for effect in found.effects if effect.kind == "layer") == layers
    assert [line.split("|")[1].strip() for line in found.table().splitlines()[4:]] == layers


def test_table_csv_and_heat_map_say_the_same(tmp_path):
    model = build_bert()
    found = sensitivity(model, batches_for(model), shares=[0.5])
    rows = list(csv.DictReader(found.to_csv(tmp_path / "new" / "s.csv").open()))
    assert [float(row["increase"]) for row in rows] == [effect.increase for effect in found.effects]
    header, _, *lines = str(found).splitlines()[2:]
    assert [one.strip() for one in header.split("|")[2:-1]] == [
        "attention: heads 50%",
        "whole",
        "mlp: neurons 50%",
        "whole",
        "layer",
    ]
    (whole,) = [one for one in found.effects if (one.place, one.kind) == ("layers.1", "layer")]
    assert lines[1].split("|")[-2].strip() == f"{whole.increase:+.4f}"
    figure = found.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    picture = figure.axes[0].images[0].get_array()
    assert picture.shape == (2, 5)
    assert sorted(picture.flatten().tolist()) == pytest.approx(sorted(effect.increase for effect in found.effects))
    with pytest.raises(PruningError, match=r"format that matplotlib writes.*Received: 's.foo'"):
        found.plot("s.foo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shares": [50]}, "Did you mean 0.5"),
        ({"shares": [0.0]}, r"\(0, 1\)"),
        ({"batches": 0}, "batches must be 1 or more"),
        ({"data": []}, "at least one batch"),
        ({"data": {"input_ids": torch.ones(1, 2)}}, "several batches"),
        ({"score": "tailor"}, "Did you mean 'taylor'"),
    ],
)
def test_what_does_not_do_is_refused(given, words):
    model = build_bert()
    before = state_of(model)
    with pytest.raises(PruningError, match=words):
        sensitivity(model, **{"data": batches_for(model), **given})
    assert_untouched(model, before)


TINY_RECIPE = [
    "model.config.hidden_size=32",
    "model.config.num_attention_heads=4",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "data.train_limit=64",
    "dense.epochs=1",
]


def ask(*words):
    result = CliRunner().invoke(cli.app, ["sensitivity", *map(str, words)], env={"COLUMNS": "140"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_command_takes_a_recipe_and_trains_its_dense_model_once(tmp_path):
    words = ["quickstart", *TINY_RECIPE, f"output={tmp_path / 'run'}", "--rows", 40, "--csv", tmp_path / "s.csv"]
    first = ask(*words, "--plot", tmp_path / "s.png")
    assert "mean of 2 batches" in first
    assert (tmp_path / "s.png").stat().st_size
    written, made = (tmp_path / "s.csv").read_text(), (tmp_path / "run" / "dense" / "config.json").stat().st_mtime_ns
    again = ask(*words)
    assert first.splitlines()[-4] == again.splitlines()[-3]
    assert (tmp_path / "s.csv").read_text() == written
    assert (tmp_path / "run" / "dense" / "config.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_the_command_takes_a_model_and_its_data(name, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very"]
    model = BUILD[name]()
    model.save_pretrained(tmp_path / "model")
    if name == "vit":
        numbers = torch.rand(9, 1, 16, 16).tolist()
        rows = [{"picture": numbers[i], "y": i % 3} for i in range(9)]
        options = ["--image", "picture"]
    else:
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / "model")
        rows = [{"sentence": f"very {word} film", "y": i % 3} for i, word in enumerate(["good", "bad", "good"] * 3)]
        options = ["--text", "sentence"]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    label = [] if name == "llama" else ["--label", "y"]
    given = [tmp_path / "model", "--data", tmp_path / "rows.json", *label]
    said = ask(*given, *options, "--batch-size", 4, "--share", 0.5)
    assert f"mean of {1 if name == 'llama' else 3} batches" in said  # texts of a language model are joined
    assert said.splitlines()[-1].startswith("| layers.1")
    with pytest.raises(PruningError, match="sentence" if options[0] == "--text" else "picture"):
        ask(*given, options[0], "sentense")


def test_the_command_says_what_it_needs(tmp_path):
    build_bert().save_pretrained(tmp_path / "model")
    with pytest.raises(PruningError, match="with --data"):
        ask(tmp_path / "model")
    with pytest.raises(PruningError, match="Did you mean 'quickstart'"):
        ask("quickstrat")
    with pytest.raises(PruningError, match="These options go with --data: KEY=VALUE .* Received: --text, --label"):
        ask("quickstart", "--text", "a", "--label", "b")
    with pytest.raises(PruningError, match="KEY=VALUE changes a recipe"):
        ask(tmp_path / "model", "seed=1", "--data", "digits")
    build_bert("ForTokenClassification").save_pretrained(tmp_path / "tokens")
    with pytest.raises(PruningError, match="must be one for ForImageClassification. .*Bert"):
        ask(tmp_path / "tokens", "--data", "digits")


@pytest.mark.parametrize("make", [masked, language, tokens, pairs, images, written])
def test_task_and_columns_of_a_model_are_guessed_as_for_a_run(make, tmp_path):
    model, data = make(tmp_path)
    recipe = guess(Wish(model, data)).recipe
    if recipe.dense is not None:  # its head is new
        with pytest.raises(PruningError, match=f"must be trained for its data.*'{model}', and {recipe.task} is new to"):
            ask(model, "--data", data)
        model = tmp_path / "trained"
        prepare(recipe).model.save_pretrained(model)
        beside = tokenizer() if make is not images else ViTImageProcessor(size={"height": 8, "width": 8})
        beside.save_pretrained(model)
    said = ask(model, "--data", data, "--share", 0.5, "--rows", 8, "--batch-size", 4)
    assert recipe.task in said
    assert "layers.1 " in said.splitlines()[-1]


def test_rows_are_of_the_split_that_is_named(tmp_path):
    (tmp_path / "rows").mkdir()
    model = save(tmp_path / "trained", "BertForSequenceClassification", id2label={0: "neg", 1: "pos"})
    rows = [{"text": "good film", "label": ("neg", "pos")[n % 2]} for n in range(12)]
    for split, number in (("train", 12), ("dev", 8)):
        write(tmp_path / "rows" / f"{split}.csv", rows[:number])
    for split, number in ((), 3), (("--split", "dev"), 2):
        assert f"mean of {number} batches" in ask(model, "--data", tmp_path / "rows", "--batch-size", 4, *split)
    with pytest.raises(PruningError, match="no split 'test'|no file for split 'test'"):
        ask(model, "--data", tmp_path / "rows", "--split", "test")
