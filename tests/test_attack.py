"""What a second attack, and a newcomer, brought down: each fault's kind, with the right outcome."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from models import (
    UNEVEN,
    UNEVEN_LLAMA,
    assert_same_outputs,
    build_bert,
    build_llama,
    draw_batch,
    draw_rows,
    training_arguments,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_prune import (
    CheckpointError,
    Distillation,
    DistillationMixin,
    HeadPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    load_pruned,
    prune,
    push_pruned,
    save_pruned,
    shrink,
)
from hf_prune.resume import read_state

UNITS = [HeadPruner(), NeuronPruner()]
DENSE = "bert.encoder.layer.1.attention.output.dense.weight"


@pytest.fixture
def folder(tmp_path):
    return save_pruned(shrink(build_bert(), UNEVEN), tmp_path / "m")


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update({"bert." + DENSE: one[DENSE] * 7}),
        lambda one: one.update({DENSE.removeprefix("bert."): one[DENSE] * 7}),
        lambda one: one.update({"bert.embeddings.LayerNorm.gamma": one["bert.embeddings.LayerNorm.weight"] * 7}),
        lambda one: one.update({DENSE: one[DENSE].long()}),
        lambda one: one.update({DENSE: one[DENSE] > 0}),
        lambda one: one.update({DENSE: one[DENSE].half()}),
        lambda one: one.update({DENSE: one[DENSE].double()}),
    ],
)
def test_a_tensor_that_takes_anothers_place_or_is_of_another_type_is_refused(folder, change):
    assert_same_outputs(shrink(build_bert(), UNEVEN), load_pruned(folder, dtype=torch.float32))
    edit(folder, change)
    with pytest.raises(CheckpointError):
        load_pruned(folder, dtype=torch.float32)


def edit_config(folder, change):
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


@pytest.mark.parametrize("load", [load_pruned, transformers.AutoModelForSequenceClassification.from_pretrained])
@pytest.mark.parametrize(
    "choice",
    [
        {"attn_implementation": "a-stranger/kernel"},
        {"_attn_implementation_internal": "a-stranger/kernel@main:run"},
        {"_attn_implementation": {"": "eager", "text_config": "a-stranger/kernel"}},
        {"text_config": {"attn_implementation": "flash|a-stranger/kernel"}},
    ],
)
def test_a_config_does_not_choose_code_of_the_hub(folder, load, choice):
    edit_config(folder, lambda config: {**config, **choice})
    with pytest.raises(CheckpointError, match="must not choose code"):
        load(folder)


@pytest.mark.parametrize("load", [load_pruned, transformers.AutoModelForCausalLM.from_pretrained])
def test_code_beside_a_model_replaces_generate_only_where_it_is_trusted(tmp_path, load):
    folder = save_pruned(shrink(build_llama(), UNEVEN_LLAMA), tmp_path / "m")
    (folder / "custom_generate").mkdir()
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w').close()\ndef generate(model, *args, **kwargs): return 'mine'\n"
    (folder / "custom_generate" / "generate.py").write_text(text)
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load(folder)
    assert not ran.exists()
    assert load(folder, trust_remote_code=True).generate(input_ids=torch.tensor([[3]])) == "mine"


@pytest.mark.parametrize("stated", ["tf", "flax", "evil"])
def test_weights_of_another_framework_are_refused_in_words(folder, stated):
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": stated})
    with pytest.raises(CheckpointError, match=f"must be torch's.*Received: format '{stated}' in model.safetensors"):
        load_pruned(folder)


@pytest.mark.parametrize("content", [[1, 2], "x", 3, None])
def test_a_config_that_is_no_mapping_is_refused(folder, content):
    edit_config(folder, lambda config: content)
    with pytest.raises(CheckpointError, match="config.json"):
        load_pruned(folder)


def test_saving_leaves_files_that_only_look_like_an_older_saves(folder):
    others = ["model.safetensors.bak", "model-backup.safetensors", "modelzoo.safetensors", "pytorch_model-best.bin"]
    others += ["model.fp16.safetensors", "tf_model.h5", "pytorch_model.bin.bak"]
    for name in others:
        (folder / name).write_text("precious")
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for name in stale:
        (folder / name).write_text("older")
    save_pruned(build_bert(), folder)
    assert [(folder / name).read_text() for name in others] == ["precious"] * len(others)
    assert not any((folder / name).exists() for name in stale)


@pytest.mark.parametrize("loss", [lambda model, batch: model(**batch).loss * 0, None])
def test_scores_that_say_nothing_cut_nothing(loss):
    model = build_bert()
    batch = draw_batch(model)
    if loss is None:
        for parameter in model.classifier.parameters():
            parameter.data.zero_()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(PruningError, match="must not all be zero"):
        prune(model, NeuronPruner(sparsity=0.5), data=[batch], loss=loss)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


class Own(transformers.Trainer):
    """A Trainer whose loss takes by name what transformers hands over so."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class Taught(DistillationMixin, Own):
    pass


def test_a_loss_that_takes_the_count_by_name_is_kept(tmp_path):
    model = build_bert()
    settings = Distillation(hard=1.0, logits=0.5)
    rows = draw_rows(model, 8)
    trainer = Taught(
        model, training_arguments(tmp_path, max_steps=1), train_dataset=rows, teacher="self", distillation=settings
    )
    batch = draw_batch(model)
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx(2 * model(**batch).loss.item(), rel=1e-5)  # the teacher agrees with itself
    trainer.train()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run's model, folder of checkpoints and callback settings."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


def train(folder, resume=None):
    model = build_bert()
    arguments = training_arguments(folder, max_steps=8, save_strategy="steps", save_steps=4)
    callback = PruningCallback(UNITS, Schedule(begin=2, end=7, frequency=1), target=Target(macs=0.5))
    trainer = transformers.Trainer(model, arguments, train_dataset=draw_rows(model, 24))
    callback.attach(trainer).train(resume_from_checkpoint=resume)


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, _: tensors.pop("evidence.gate/means/gate_square/layers.0.attention.heads"),
        lambda tensors, _: tensors.update({"evidence.gate/means/gate/layers.0.mlp.neurons": torch.zeros(3)}),
        lambda _, metadata: metadata.update(state="null"),
        lambda _, metadata: metadata.update(state="{}"),
        lambda _, metadata: metadata.update(state='{"clock": {"steps": 4, "skipped": 0, "position": 4}}'),
        lambda _, metadata: metadata.update(state='{"clock": {"steps": 4}, "live": {"record": [1]}}'),
        lambda _, metadata: metadata.update(state="[" * 5000 + "]" * 5000),
    ],
)
def test_a_pruning_state_that_lacks_something_is_not_resumed(run, tmp_path, change):
    import shutil

    checkpoint = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    rewrite(checkpoint / "pruning_state.safetensors", change)
    with pytest.raises(PruningError):
        train(tmp_path, resume=str(checkpoint))


def test_a_pipe_for_a_pruning_state_does_not_wait_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pruning_state.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        read_state(tmp_path / "pruning_state.safetensors")


TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"a": "\\u0068\\u0066_' + TOKEN[3:].encode() + b'"}'),
        ("LICENSE", TOKEN.encode("utf-16")),
        ("LICENSE", f"TOKEN_{TOKEN}".encode()),
        ("bpe.codes", TOKEN.encode()),
        ("LICENSE", b"-----BEGIN PGP PRIVATE KEY BLOCK-----\nabc\n-----END PGP PRIVATE KEY BLOCK-----"),
        ("LICENSE.md", b"sk_live_" + b"a1" * 12),
    ],
)
def test_a_token_in_other_clothes_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(PruningError, match="no access token"):
        push_pruned(str(folder), "me/x", dry_run=True)


def test_names_that_only_look_like_a_models_stay_at_home(folder):
    (folder / ".env").write_text("SECRET=1")
    for name in ("LICENSE.env", "LICENSE~", "NOTICE.key", "model-00001-of-00001.safetensors"):
        if not name.startswith("model"):
            (folder / name).write_text("private")
    (folder / "NOTICE").symlink_to(folder / ".env")
    plan = push_pruned(str(folder), "me/x", dry_run=True)
    assert {file.path for file in plan} == {"README.md", "config.json", "model.safetensors"}
    assert {"LICENSE.env", "LICENSE~", "NOTICE.key", "NOTICE", ".env"} <= plan.left.keys()


def test_what_is_no_weight_file_is_not_sent_as_one(folder):
    (folder / "model-00001-of-00001.safetensors").write_text("a secret")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        push_pruned(str(folder), "me/x", dry_run=True)
