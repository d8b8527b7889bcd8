"""A run from a model and a file: what is guessed, that it runs to the end for every task, and what is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers
import yaml
from models import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from hf_prune import PruningError, cli, load_pruned, workflow
from hf_prune.guessing import Wish, guess
from hf_prune.recipe import load_recipe
from hf_prune.reference import commented, recipe_keys, recipe_table

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "film",
    "play",
    "Ada",
    "Bob",
    "in",
    "Rome",
    "Oslo",
]
TEXT = {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
QUICK = ["train.epochs=1", "train.batch_size=8", "data.train_limit=24", "schedule.frequency=1"]
QUICK += ["measure.repeats=1", "measure.length=8"]
DRAW = random.Random(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def sentence(length: int = 6) -> list[str]:
    return DRAW.choices(WORDS[5:], k=length)


def tokenizer():
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, model_input_names=inputs, **names)


def save(folder: Path, made: str, config: str = "BertConfig", **settings) -> str:
    sizes = SIZES if "T5" not in config else {"d_model": 16, "num_layers": 2, "num_heads": 4, "d_ff": 24, "d_kv": 4}
    text = {} if "ViT" in config else TEXT
    made_config = getattr(transformers, config)(**{**text, **sizes, **settings})
    getattr(transformers, made)(made_config).save_pretrained(folder)
    if text:
        tokenizer().save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]) + "\n")
    return str(path)


def classes(home):
    rows = [{"id": n, "review": " ".join(sentence()), "sentiment": ("neg", "pos")[n % 2]} for n in range(40)]
    return save(home / "bert", "BertModel"), write(home / "reviews.csv", rows)


def stars(home):
    rows = [{"review": " ".join(sentence()), "stars": 1 + n % 5} for n in range(40)]
    return save(home / "bert", "BertModel"), write(home / "stars.csv", rows)


def pairs(home):
    rows = [{"sentence1": "good film", "sentence2": " ".join(sentence()), "score": n / 7} for n in range(40)]
    return save(home / "bert", "BertModel"), write(home / "pairs.tsv", rows)


def several(home):
    rows = [{"comment": " ".join(sentence()), "rude": n % 2, "long": n % 3 // 2} for n in range(40)]
    return save(home / "bert", "BertModel"), write(home / "comments.csv", rows)


def lists(home):
    rows = [{"text": " ".join(sentence()), "labels": [["a"], ["a", "b"], [], ["c"]][n % 4]} for n in range(40)]
    return save(home / "bert", "BertModel"), write(home / "lists.jsonl", rows)


def tokens(home):
    tag = {"Ada": "B-PER", "Bob": "I-PER", "Rome": "B-LOC", "Oslo": "B-LOC"}
    words = [sentence() for _ in range(40)]
    rows = [{"tokens": one, "ner_tags": [tag.get(word, "O") for word in one]} for one in words]
    return save(home / "bert", "BertModel"), write(home / "ner.jsonl", rows)


def language(home):
    model = save(home / "llama", "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2)
    return model, write(home / "book.txt", [{"text": " ".join(sentence(20))} for _ in range(60)])


def masked(home):
    model = save(home / "bert", "BertForMaskedLM")
    return model, write(home / "book.txt", [{"text": " ".join(sentence(20))} for _ in range(40)])


def answers(home):
    rows = []
    for _ in range(40):
        context = " ".join(sentence())
        word = context.split()[2]
        answer = {"text": [word], "answer_start": [context.index(word)]}
        rows.append({"id": "x", "question": "film in", "context": context, "answers": answer})
    return save(home / "bert", "BertModel"), write(home / "squad.jsonl", rows)


def written(home):
    model = save(home / "t5", "T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0)
    strange = ["input_ids", "token_type_ids", "attention_mask"]  # as one's own tokenizer says; T5 has no segments
    transformers.AutoTokenizer.from_pretrained(model, model_input_names=strange).save_pretrained(model)
    rows = [{"document": " ".join(one), "summary": " ".join(one[:2])} for one in (sentence() for _ in range(40))]
    return model, write(home / "news.jsonl", rows)


def images(home):
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(40):
        folder = home / "pets" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        mode = {0: "L", 1: "RGBA"}.get(number, "RGB")
        Image.fromarray(draw.integers(0, 255, (20, 17, 3), dtype=np.uint8)).convert(mode).save(folder / f"{number}.png")
    sizes = {"image_size": 8, "patch_size": 4}
    return save(home / "vit", "ViTModel", "ViTConfig", **sizes), str(home / "pets")


PAIR, ANSWERS = ["sentence1", "sentence2"], {"text": ["question", "context"], "label": "answers"}
SEVERAL, LISTS = {"text": "comment", "label": ["rude", "long"]}, {"text": "text", "label": "labels"}
OF_CLASS, OF_TOKENS = "text-classification", "token-classification"
EXPORTED = ("answers",)  # to ONNX too, which takes long: the file's metrics are the model's
CASES = {  # what makes model and data, the task, what is found, the metrics
    "classes": (classes, OF_CLASS, {"text": "review", "label": "sentiment"}, ["accuracy"]),
    "stars": (stars, OF_CLASS, {"text": "review", "label": "stars"}, ["accuracy"]),
    "regression of pairs": (pairs, OF_CLASS, {"text": PAIR, "label": "score"}, ["pearsonr", "spearmanr"]),
    "several columns": (several, OF_CLASS, SEVERAL, ["f1", "accuracy"]),
    "lists of classes": (lists, OF_CLASS, LISTS, ["f1", "accuracy"]),
    "tokens": (tokens, OF_TOKENS, {"text": "tokens", "label": "ner_tags"}, ["entity_f1", "accuracy"]),
    "causal lm": (language, "causal-lm", {"text": "text"}, ["perplexity"]),
    "masked lm": (masked, "masked-lm", {"text": "text"}, ["perplexity"]),
    "answers": (answers, "question-answering", ANSWERS, ["span_exact", "span_f1"]),
    "texts to write": (written, "seq2seq", {"text": "document", "label": "summary"}, ["perplexity"]),
    "images": (images, "image-classification", {"image": "image", "label": "label"}, ["accuracy"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_and_a_file_become_a_small_model(name, tmp_path):
    make, task, columns, metrics = CASES[name]
    model, data = make(tmp_path)
    output = tmp_path / "run"
    quick = [*QUICK, "dense.epochs=1"] if guess(Wish(model, data)).recipe.dense else QUICK
    guessed = guess(Wish(model, data, output=output), [*quick, f"onnx={name in EXPORTED}"])
    recipe = guessed.recipe
    assert (recipe.task, recipe.metrics) == (task, metrics)
    assert {key: getattr(recipe.data, key) for key in columns} == columns
    assert recipe.data.test_size == 0.2
    assert (recipe.dense is None) == (task in ("causal-lm", "masked-lm", "seq2seq"))
    report = workflow.run(recipe)
    assert report.pruned.prunable_macs < 0.6 * report.dense.prunable_macs
    assert all(np.isfinite(both["pruned"]) for both in report.metrics.values())
    assert set(metrics) <= set(report.metrics)
    for row in report.exports:
        assert row["metrics"] == {one: pytest.approx(report.metrics[one]["pruned"], abs=1e-3) for one in metrics}
    assert len(report.exports) == (2 if name in EXPORTED else 0)  # torch, and the file
    loaded = load_pruned(output / "model")
    assert sum(one.numel() for one in loaded.parameters()) == report.pruned.parameters
    assert load_recipe(output / "recipe.yaml") == recipe
    assert (output / "model" / "README.md").stat().st_size > 0


def test_the_processor_of_images_lies_beside_the_model_only_where_it_was_there(tmp_path):
    from PIL import Image

    model, data = images(tmp_path)
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    told = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": {"height": 12, "width": 12}}
    processor(**told).save_pretrained(model)
    job = workflow.prepare(guess(Wish(model, data, output=tmp_path / "run"), ["target={speedup: 1.5}"]).recipe)
    assert (job.model.config.image_size, job.recipe.target.image_size) == (8, 12)  # as large as it will be asked for
    row, image = job.train[0], job.train.with_format(None)[0]["image"]
    again = transformers.AutoImageProcessor.from_pretrained(model)(Image.fromarray(np.asarray(image.convert("RGB"))))
    assert np.allclose(row["pixel_values"].numpy(), np.asarray(again["pixel_values"][0]), atol=1e-6)
    assert job.model.config.label2id == {"cat": 0, "dog": 1}


def test_a_fine_tuned_model_is_not_trained_again(tmp_path):
    _, data = classes(tmp_path)
    names = {"label2id": {"pos": 0, "neg": 1}, "id2label": {0: "pos", 1: "neg"}}
    fitting = save(tmp_path / "own", "BertForSequenceClassification", **names)
    guessed = guess(Wish(fitting, data))
    assert guessed.recipe.dense is None
    assert "fine-tuned (BertForSequenceClassification), its classes are the data's: pos, neg" in guessed.table()
    other = save(tmp_path / "other", "BertForSequenceClassification", id2label={0: "up", 1: "down"})
    assert guess(Wish(other, data)).recipe.dense is not None


def test_init_writes_a_recipe_that_is_what_was_guessed(tmp_path, monkeypatch):
    model, data = classes(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["init", "--model", model, "--data", data, "--speedup", "2", "seed=3"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    text = Path("recipe.yaml").read_text()
    assert "# Passes over the data, above 0.\n" in text
    recipe = load_recipe("recipe.yaml")
    assert recipe == guess(Wish(model, data, target={"speedup": 2.0}), ["seed=3"]).recipe
    assert recipe.target.speedup == 2
    again = CliRunner().invoke(cli.app, words)
    assert isinstance(again.exception, PruningError)
    assert "--force" in str(again.exception)


@pytest.mark.parametrize("name", ["quickstart", "minilm_sst2"])
def test_comments_change_nothing_and_can_be_taken_away(name, tmp_path):
    recipe = load_recipe(name)
    text = commented(recipe)
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if key := re.fullmatch(r"( *)# (\w+: .*)", line):  # what is written, or the end of a sentence
            others = [*lines[:number], key[1] + key[2], *lines[number + 1 :]]
            assert isinstance(yaml.safe_load("\n".join(others)), dict), line


def test_validate_trains_and_writes_nothing(tmp_path, monkeypatch):
    model, data = classes(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    output = tmp_path / "run"
    recipe.write_text(guess(Wish(model, data, output=output)).recipe.yaml())
    monkeypatch.setattr(workflow, "train_dense", lambda job: pytest.fail("training began"))
    before = sorted(tmp_path.rglob("*"))
    facts = json.loads(CliRunner().invoke(cli.app, ["validate", str(recipe), "--json"]).stdout)
    assert facts["rows"] == {"train": 32, "evaluation": 8}
    assert facts["classes"] == ["neg", "pos"]
    assert facts["units"] == {"head": 8, "neuron": 48}
    for wrong, words in (("data.text=film", "film"), ("target.macs=2", "macs"), ("metrics=[f2]", "f2")):
        with pytest.raises(PruningError, match=words):
            workflow.validate(recipe, [wrong])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_guessed_is_said(tmp_path):
    model, _ = classes(tmp_path)
    numbers = write(tmp_path / "numbers.csv", [{"a": n / 3, "b": n / 7} for n in range(9)])
    with pytest.raises(PruningError, match=r"--text, --image, --audio or --label .* a \(float64\), b \(float64\)"):
        guess(Wish(model, numbers))
    with pytest.raises(PruningError, match="The model must be one for ForImageClassification. Received: .*Bert"):
        guess(Wish(model, "digits"))
    with pytest.raises(PruningError, match="Did you mean 'masked-lm'"):
        guess(Wish(model, numbers, task="maskedlm"))
    with pytest.raises(PruningError, match="--data missing"):
        cli.run(model=model)
    with pytest.raises(PruningError, match="Only one of .* Received: --macs, --speedup"):
        cli.run(model=model, data=numbers, macs=0.5, speedup=2)


def test_options_of_a_model_and_its_data_are_not_lost_beside_a_recipe():
    with pytest.raises(
        PruningError, match="KEY=VALUE changes a recipe, as target.macs=0.25.* Received: --output, --macs$"
    ):
        cli.run("quickstart", macs=0.5, output=Path("runs/mine"))


def test_splits_and_hidden_labels(tmp_path):
    model, _ = classes(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": " ".join(sentence()), "label": n % 3} for n in range(12)]
    for split in ("train", "test", "dev"):
        write(folder / f"{split}.csv", rows)
    recipe = guess(Wish(model, str(folder))).recipe
    assert (recipe.data.train, recipe.data.evaluation, recipe.data.test_size) == ("train", ["dev"], None)
    assert recipe.data.max_length == 32  # the model reads no more


def test_the_page_of_commands_has_every_command_and_every_key():
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page.split("<!-- keys -->\n")[1] == recipe_table() + "\n", "python -m hf_prune.reference writes it"
    commands = [one.name or one.callback.__name__ for one in cli.app.registered_commands]
    examples = re.findall(r"^\| `(\w+)` \| .* \| `hf-prune (\w+) .*` \|$|^\| `doctor`", page, re.MULTILINE)
    assert sorted(commands) == sorted(first or "doctor" for first, _ in examples)
    assert all(first == second for first, second in examples)


def test_every_key_is_explained():
    assert [key.path for key in recipe_keys() if not key.meaning] == []


def test_a_file_without_a_header_is_not_guessed_at(tmp_path):
    model, data = save(tmp_path / "bert", "BertModel"), tmp_path / "reviews.csv"
    data.write_text("".join(f"{' '.join(sentence())},{('pos', 'neg')[n % 2]}\n" for n in range(12)))
    with pytest.raises(
        PruningError, match="first line of 'reviews.csv' looks like data.*Received columns: '.*', 'pos'"
    ):
        guess(Wish(model, str(data)))


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_is_read_by_the_separator_of_its_first_line(tmp_path, separator):
    model, _ = classes(tmp_path)
    rows = [f"good, film{separator}{('neg', 'pos')[n % 2]}" for n in range(8)]
    data = tmp_path / "sheet.csv"
    data.write_text("\n".join([f"text{separator}label", *rows]))
    recipe = guess(Wish(model, str(data))).recipe
    assert (recipe.task, recipe.data.text, recipe.data.label) == (OF_CLASS, "text", "label")


def test_what_would_be_guessed_wrong_is_refused(tmp_path):
    model, data = classes(tmp_path)
    tuned = save(tmp_path / "tuned", "BertForSequenceClassification")
    text = write(tmp_path / "text.csv", [{"text": "good film"}] * 8)
    one = write(tmp_path / "one.csv", [{"text": "good film", "label": "pos"}] * 8)
    for wish, words in (
        (Wish(tuned, text), "must name what a task reads"),  # no masked words: its head would be lost
        (Wish(model, text, text=["text"], label=["text"]), "must be different columns. Received: 'text' twice"),
        (Wish(model, data, text=["review", "sentiment", "id"]), "must name what a task reads"),
        (Wish(model, data, image="review"), "must hold what files hold, not their names"),
        (Wish(model, one), r"two classes or more. Received: \['pos'\]"),
    ):
        with pytest.raises(PruningError, match=words):
            guess(wish)
    with pytest.raises(PruningError, match="--teacher must be self or none. Received: 'selff'"):
        Wish(model, data, teacher="selff")


def test_a_pair_with_a_label_that_is_named_is_no_question_with_answers(tmp_path):
    model = save(tmp_path / "bert", "BertForMaskedLM")
    rows = [{"left": f"good film {n}", "right": "bad play", "kind": ("same", "other")[n % 2]} for n in range(20)]
    recipe = guess(Wish(model, write(tmp_path / "rows.csv", rows), text=["left", "right"], label=["kind"])).recipe
    assert (recipe.task, recipe.data.text, recipe.data.label) == (OF_CLASS, ["left", "right"], "kind")


def test_two_texts_make_no_classifier_of_a_language_model(tmp_path):
    model, _ = language(tmp_path)
    rows = [{"prompt": f"good film {n}", "answer": f"bad play {n}", "score": n / 9, "kind": n % 2} for n in range(20)]
    data = write(tmp_path / "rows.csv", rows)
    two = ["prompt", "answer"]
    for told in ({"text": two}, {"text": two[:1], "label": two[1:]}, {"text": two, "task": "causal-lm"}):
        with pytest.raises(PruningError, match="reads one column of text: .*--task .*--label .*'prompt', 'answer'$"):
            guess(Wish(model, data, **told))
    assert guess(Wish(model, data, text=two[:1])).recipe.task == "causal-lm"
    for told in ({"label": ["kind"]}, {"task": OF_CLASS}):
        assert guess(Wish(model, data, text=two, **told)).recipe.task == OF_CLASS


def test_a_model_of_regression_gets_its_metrics_for_whole_numbers_too(tmp_path):
    model = save(tmp_path / "stars", "BertForSequenceClassification", num_labels=1)
    data = write(tmp_path / "stars.csv", [{"text": "good film", "stars": 1 + n % 5} for n in range(10)])
    assert guess(Wish(model, data)).recipe.metrics == ["pearsonr", "spearmanr"]


def reasons(wish: Wish) -> dict[str, tuple[str, str]]:
    return {key: (value, why) for key, value, why in guess(wish).reasons}


def test_reasons_name_the_classes_the_columns_left_out_and_who_chose_the_target(tmp_path):
    model, data = classes(tmp_path)
    told = reasons(Wish(model, data))
    assert told["metrics"][1] == "labels are 2 classes: 'neg', 'pos'"
    assert told["columns left out"] == ("id", "text-classification reads the others")
    assert told["target"][1] == "--macs, --speedup and --max-drop say another"
    assert reasons(Wish(model, data, target={"macs": 0.3}))["target"][1] == "you say so"
    floats = write(tmp_path / "floats.csv", [{"text": "good film", "stars": 1.0 + n % 5} for n in range(10)])
    assert "written as whole numbers, 4 for 4.0, they would be classes" in reasons(Wish(model, floats))["metrics"][1]


def test_splits_that_begin_like_validation_are_evaluated_on_and_others_are_named(tmp_path):
    model, _ = classes(tmp_path)
    rows = datasets.Dataset.from_list([{"text": "good film", "label": n % 2} for n in range(12)])
    for name, expected in (("validation_matched", "validation_matched"), ("holdout", None)):
        datasets.DatasetDict({"train": rows, name: rows}).save_to_disk(str(tmp_path / name))
        told = reasons(Wish(model, str(tmp_path / name)))
        if expected:
            assert told["data.evaluation"][0] == expected
        else:
            assert told["data.test_size"][1].startswith("of holdout none is called validation, valid, val")


def test_texts_that_most_rows_have_alone_are_no_classes(tmp_path):
    model = save(tmp_path / "bert", "BertForSequenceClassification")
    rows = [{"question": f"film {n}", "context": f"good film {n}", "answer": f"play {n}"} for n in range(20)]
    with pytest.raises(PruningError, match="must name what a task reads: it is not found"):
        guess(Wish(model, write(tmp_path / "flat.csv", rows)))
    kinds = [{**row, "kind": ("long", "short")[n % 2]} for n, row in enumerate(rows)]
    assert guess(Wish(model, write(tmp_path / "kinds.csv", kinds))).recipe.data.label == "kind"


def test_rows_of_rows_are_named_with_the_way_out(tmp_path):
    model, _ = language(tmp_path)
    chat = [{"messages": [{"role": "user", "content": "good film"}]} for _ in range(8)]
    with pytest.raises(PruningError, match=r"Column 'messages' holds lists of \{role, content\}: write a file"):
        guess(Wish(model, write(tmp_path / "chat.jsonl", chat)))
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"version": "1.1", "data": [{"title": "film", "paragraphs": []}]}))
    with pytest.raises(PruningError, match=r"must hold several rows. Column 'data' .*Received: one, with the columns"):
        guess(Wish(model, str(squad)))


def test_a_length_that_the_model_cannot_read_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = guess(Wish(*classes(tmp_path))).recipe
    with pytest.raises(
        PruningError, match=r"measure.length must be one that the model reads.*Received: input_ids \(1, 64\)"
    ):
        workflow.validate(recipe, ["measure.length=64"])


def test_a_teacher_whose_head_is_new_is_told(tmp_path, capsys):
    recipe = guess(Wish(*classes(tmp_path)), ["measure.length=8", f"output={tmp_path / 'run'}"]).recipe
    for change, told in (("dense.epochs=1", False), ("dense=null", True)):
        workflow.validate(recipe, [change])
        assert ("a head that is drawn at random" in capsys.readouterr().err) == told


def test_labels_are_found_in_sheets_as_people_have_them(tmp_path):
    model = save(tmp_path / "bert", "BertModel")
    for number, (columns, label) in enumerate(
        (
            ({"v1": ("ham", "spam"), "v2": (" ".join(WORDS[5:]),), "Unnamed: 2": ("",)}, "v1"),
            (
                {"trust": (0.5, 0.7, 1), "airline_sentiment": ("bad", "good"), "text": ("a good film",)},
                "airline_sentiment",
            ),
        )
    ):
        rows = [{name: values[n % len(values)] for name, values in columns.items()} for n in range(24)]
        assert guess(Wish(model, write(tmp_path / f"{number}.csv", rows))).recipe.data.label == label


def test_rows_of_tokens_are_told_to_be_texts(tmp_path):
    model, _ = classes(tmp_path)
    rows = [{"input_ids": [2, 5, 3], "labels": n % 2} for n in range(8)]
    with pytest.raises(PruningError, match="Recipes read texts, of which they make input_ids themselves"):
        guess(Wish(model, write(tmp_path / "rows.jsonl", rows)))


def test_tokens_that_the_model_has_not_are_refused_before_training(tmp_path):
    model, data = classes(tmp_path)
    recipe = guess(Wish(model, data)).recipe
    save(Path(model), "BertModel", vocab_size=9)
    with pytest.raises(PruningError, match=r"tokens of the model's, from 0 to 8; .* Received: token 13"):
        workflow.validate(recipe, [f"output={tmp_path / 'run'}"])
