"""Hidden states, attention maps and outputs of every task: by hand, without padding, by dense layer numbers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import (
    PLANS,
    build_llama,
    build_vit,
    draw_batch,
    draw_rows,
    randomize,
    training_arguments,
)
from torch import Tensor, tensor
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_prune import (
    Distillation,
    DistillationMixin,
    DistillationTrainer,
    HeadPruner,
    LayerPruner,
    NeuronPruner,
    PruningCallback,
    PruningError,
    RecipeError,
    Schedule,
    Target,
    load_pruned,
    mask_units,
    save_pruned,
    shrink,
    workflow,
)
from hf_prune.distillation.layers import map_layers
from hf_prune.distillation.losses import attention_loss, hidden_loss, labels_loss, logits_loss
from hf_prune.distillation.trainer import Lesson
from hf_prune.recipe import load_recipe


def build_bert(head: str = "ForSequenceClassification", seed: int = 0, **changes: Any) -> Any:
    """Return a tiny BERT that hands out maps: in transformers 4 it cannot be told later."""
    return models.build_bert(head, seed, **{"attn_implementation": "eager", **changes})


BUILDERS = {"bert": build_bert, "llama": build_llama}
ALL = {"logits": 0.5, "hidden": 1.0, "attention": 1.0}
TERMS = ("logits", "hidden", "attention")


def make_trainer(folder: Path, model: Any, teacher: Any = "self", rows: Any = None, **changes: Any) -> Any:
    settings = changes.pop("distillation", Distillation(**ALL))
    arguments = training_arguments(folder, **{"max_steps": 1, "max_grad_norm": 1e9, **changes})
    rows = draw_rows(model, 16) if rows is None else rows
    return DistillationTrainer(model, arguments, train_dataset=rows, teacher=teacher, distillation=settings)


def terms_of(student: Any, teacher: Any, batch: Any, **settings: Any) -> dict[str, float]:
    """Return each term on one batch, without dropout."""
    lesson = Lesson(student, teacher, Distillation(**{**ALL, **settings}))
    weights = {"hard": 1.0, **dict.fromkeys(TERMS, 1.0)}
    return {name: value.item() for name, value in lesson.terms(student, batch, [], weights)[1].items()}


# by hand
def test_unit_vectors_by_hand():
    """A right angle is 2 apart, opposites 4; the padded position does not count, and rows weigh the same."""
    student = tensor([[[3.0, 0.0], [1.0, 0.0]], [[5.0, 0.0], [1.0, 0.0]]])
    teacher = tensor([[[0.0, 0.1], [-2.0, 0.0]], [[2.0, 0.0], [1.0, 0.0]]])
    assert hidden_loss(student, teacher, None).item() == pytest.approx((2 + 4 + 0 + 0) / 4)
    assert hidden_loss(student, teacher, tensor([[1, 0], [1, 1]])).item() == pytest.approx((2 + 0) / 2)


def test_attention_by_hand():
    """KL of (1/2, 1/2) to (1/4, 3/4) is ln(2)/2 + ln(2/3)/2; what the student's dropout hid is nobody's."""
    half, other = tensor([0.5, 0.5]).view(1, 1, 1, 2), tensor([0.25, 0.75]).view(1, 1, 1, 2)
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert attention_loss(other, half, None).item() == pytest.approx(kl)
    dropped = tensor([0.5, 1.5, 0.0]).view(1, 1, 1, 3)
    assert attention_loss(dropped, tensor([0.1, 0.1, 0.8]).view(1, 1, 1, 3), None).item() == pytest.approx(kl)
    both = [torch.cat([one, half], 2) for one in (other, half)]
    assert attention_loss(*both, None).item() == pytest.approx(kl / 2)
    assert attention_loss(*both, tensor([[True, False]])).item() == pytest.approx(kl)


def test_attention_that_is_all_zero_has_a_gradient_without_nan():
    student = torch.zeros(1, 1, 2, 2, requires_grad=True)
    attention_loss(student, torch.full((1, 1, 2, 2), 0.5), None).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_labels_that_do_not_exclude_one_another_by_hand():
    """Each label is a distribution (p, 1 - p): as two classes with the logits (x, 0)."""
    student, teacher = tensor([[0.0, 1.0]]), tensor([[math.log(3), 1.0]])
    pair = logits_loss(tensor([[0.0, 0.0]]), tensor([[math.log(3), 0.0]]), 2.0)
    assert labels_loss(student, teacher, 2.0).item() == pytest.approx(pair.item() / 2)


@pytest.mark.parametrize(
    ("setting", "ours", "dense", "theirs", "teachers", "expected"),
    [
        ("uniform", [0, 1, 2], 3, range(6), 6, {0: 1, 1: 3, 2: 5}),
        ("uniform", [0, 2], 3, range(6), 6, {0: 1, 2: 5}),  # the second layer is gone: the third keeps its teacher
        ("uniform", [1, 3], 4, range(4), 4, {1: 1, 3: 3}),
        ("uniform", [1, 2], 4, [0, 3], 4, {1: 0, 2: 0}),  # the teacher has lost its second and third
        ("uniform", [0, 1, 2, 3], 4, range(2), 2, {0: 0, 1: 0, 2: 0, 3: 1}),
        ("last", [0, 2], 4, range(6), 6, {2: 5}),
        ({0: 1, 2: 5, 3: 5}, [0, 2], 4, range(6), 6, {0: 1, 2: 5}),
        ("uniform", [], 4, range(6), 6, {}),
    ],
)
def test_layers_are_mapped_by_dense_numbers(setting, ours, dense, theirs, teachers, expected):
    assert map_layers(setting, ours, dense, list(theirs), teachers) == expected


def test_weights_follow_progress():
    settings = Distillation(hidden=(1.0, 0.0), logits=[0, 2])
    assert [settings.weight("hidden", progress) for progress in (0, 0.25, 1)] == [1.0, 0.75, 0.0]
    assert [settings.weight("logits", progress) for progress in (0, 0.5)] == [0.0, 1.0]
    assert settings.weight("hard", 0.9) == 0.5
    assert settings.uses("logits")
    assert not settings.uses("attention")


@pytest.mark.parametrize("weight", [-1, (0.5, -1), (1, 2, 3), "much", True, float("nan")])
def test_a_weight_is_one_number_or_two(weight):
    with pytest.raises(PruningError, match=r"hidden.*Received"):
        Distillation(hidden=weight)


# what counts
@pytest.mark.parametrize("name", BUILDERS)
def test_terms_are_what_transformers_own_outputs_say(name):
    student, teacher = BUILDERS[name](), BUILDERS[name](seed=1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    batch = draw_batch(student)
    mask = batch["attention_mask"].bool()
    outputs = [m(**batch, output_hidden_states=True, output_attentions=True) for m in (student, teacher)]
    first = [output.hidden_states[1] for output in outputs]  # Llama's last has gone through the norm
    cosine = functional.cosine_similarity(*first, dim=-1)
    hidden = torch.stack([(2 - 2 * row[keep]).mean() for row, keep in zip(cosine, mask)]).mean()
    mean = [output.attentions[0].mean(1) for output in outputs]
    kl = torch.where(mean[1] > 0, mean[1] * (mean[1] / mean[0]).log(), 0).sum(-1)
    attention = torch.stack([row[keep].mean() for row, keep in zip(kl, mask)]).mean()
    terms = terms_of(student, teacher, batch, layer_map={0: 0})
    assert terms["hidden"] == pytest.approx(hidden.item(), rel=1e-4)
    assert terms["attention"] == pytest.approx(attention.item(), rel=1e-4)
    assert min(terms.values()) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_the_student_itself_has_nothing_to_teach(name):
    student = BUILDERS[name]()
    terms = terms_of(student, copy.deepcopy(student), draw_batch(student))
    assert terms == dict.fromkeys(TERMS, pytest.approx(0, abs=1e-5))


@pytest.mark.parametrize("name", [*BUILDERS, "qa", "embeddings"])
def test_padding_does_not_count(name):
    heads = {"qa": "ForQuestionAnswering", "embeddings": "Model"}
    build = BUILDERS.get(name) or (lambda seed=0: build_bert(heads[name], seed, num_labels=2))
    student, teacher = build(), build(seed=1)
    batch = draw_batch(student)
    batch = batch if name in BUILDERS else {key: batch[key] for key in ("input_ids", "attention_mask")}
    fill = {"input_ids": 7, "labels": -100, "attention_mask": 0}
    longer = {
        key: functional.pad(value, (0, 3), value=fill[key]) if value.ndim == 2 else value
        for key, value in batch.items()
    }
    terms = terms_of(student, teacher, batch)
    assert terms_of(student, teacher, longer) == pytest.approx(terms, rel=1e-3)
    assert min(terms.values()) > 1e-4


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("heads", ["mean", "kept"])
def test_masked_learns_what_shrunk_does(name, heads):
    """Masked heads are no part of the mean, and a layer that is masked or gone learns nothing."""
    plan = {**PLANS[name], **{f"layers.2.{key[9:]}": units for key, units in PLANS[name].items() if "layers.1" in key}}
    plan = {"layers": [0, 2], **{key: units for key, units in plan.items() if "layers.1" not in key}}
    plan["layers.2.attention.branch"] = []
    plan = {key: units for key, units in plan.items() if "layers.2.attention" not in key or key.endswith("branch")}
    teacher = BUILDERS[name](num_hidden_layers=3)
    masked, shrunk = mask_units(copy.deepcopy(teacher), plan), shrink(copy.deepcopy(teacher), plan)
    batch = draw_batch(teacher)
    terms = terms_of(masked, teacher, batch, heads=heads)
    assert terms_of(shrunk, teacher, batch, heads=heads) == pytest.approx(terms, rel=1e-4, abs=1e-6)
    assert terms["hidden"] > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_kept_heads_learn_from_themselves(name):
    """In the first layer nothing is lost before attention: what its heads see is what they always saw."""
    teacher = BUILDERS[name]()
    student = shrink(copy.deepcopy(teacher), PLANS[name])
    batch, first = draw_batch(student), {"layer_map": {0: 0}}
    assert terms_of(student, teacher, batch, heads="kept", **first)["attention"] == pytest.approx(0, abs=1e-5)
    assert terms_of(student, teacher, batch, heads="mean", **first)["attention"] > 1e-4


def test_the_last_layer_left_learns_from_the_teachers_last():
    teacher = build_bert(num_hidden_layers=3)
    student = shrink(copy.deepcopy(teacher), {"layers": [0, 1]})
    batch = draw_batch(student)
    by_hand = terms_of(student, teacher, batch, layer_map={1: 2})
    assert terms_of(student, teacher, batch, layer_map="last") == pytest.approx(by_hand)
    assert terms_of(student, teacher, batch, layer_map={0: 0, 1: 1})["hidden"] == pytest.approx(0, abs=1e-6)


# the same gradient, however a batch is cut up
@pytest.mark.parametrize("name", BUILDERS)
def test_gradient_norm_does_not_depend_on_accumulation(name, tmp_path):
    """14 rows of uneven lengths fall into 4 + 4 + 4 + 2; the teacher is wider."""

    def norms(**changes: Any) -> tuple[float, float]:
        student, teacher = BUILDERS[name](), BUILDERS[name](seed=1, hidden_size=32)
        settings = Distillation(hard=0.3, logits=0.5, hidden=1.0, attention=2.0)
        trainer = make_trainer(tmp_path, student, teacher, draw_rows(student, 14), distillation=settings, **changes)
        before = trainer.lesson.projections["layers"].weight.detach().clone()
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
        return entry["grad_norm"], (trainer.lesson.projections["layers"].weight - before).norm().item()

    whole = norms(per_device_train_batch_size=16)
    assert norms(per_device_train_batch_size=4, gradient_accumulation_steps=4) == pytest.approx(whole, rel=1e-3)
    assert min(whole) > 0.01


# every task, every Trainer
def build_bart(seed: int = 0) -> Any:
    sizes = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
    }
    config = BartConfig(vocab_size=60, d_model=16, max_position_embeddings=40, dropout=0.0, pad_token_id=0, **sizes)
    return randomize(BartForConditionalGeneration(config), seed)


def spans(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return {**rest, "start_positions": batch["labels"], "end_positions": batch["labels"] + 1}


def tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)}


def words(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def as_numbers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": batch["labels"].float()}


def several(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": functional.one_hot(batch["labels"], 3).float()}


TASKS: dict[str, tuple[Any, Any]] = {
    "tokens": (lambda seed=0: build_bert("ForTokenClassification", seed), tokens),
    "spans": (lambda seed=0: build_bert("ForQuestionAnswering", seed, num_labels=2), spans),
    "regression": (lambda seed=0: build_bert(seed=seed, num_labels=1), as_numbers),
    "several labels": (lambda seed=0: build_bert(seed=seed, problem_type="multi_label_classification"), several),
    "embeddings": (lambda seed=0: build_bert("Model", seed), unlabelled),
    "no labels": (build_bert, unlabelled),
    "images": (build_vit, lambda batch: batch),
    "sequences": (build_bart, words),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_from_its_teacher(task, tmp_path):
    """All terms are logged, their sum falls; four accumulated batches give the gradient of one."""
    build, change = TASKS[task]
    student, teacher = build(), build(seed=1)
    batch = change(draw_batch(student, 16))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    names = ["start_positions", "end_positions"] if task == "spans" else ["labels"]
    common = {"rows": rows, "learning_rate": 3e-3, "label_names": names, "distillation": Distillation(hard=0.1, **ALL)}
    parts = make_trainer(
        tmp_path, copy.deepcopy(student), teacher, gradient_accumulation_steps=4, max_steps=1, **common
    )
    parts.train()
    whole = make_trainer(tmp_path, student, teacher, per_device_train_batch_size=16, max_steps=12, **common)
    whole.train()
    logs = [[entry for entry in one.state.log_history if "grad_norm" in entry] for one in (parts, whole)]
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-3)
    first, last = logs[1][0], logs[1][-1]
    expected = {f"distillation_{term}" for term in (*TERMS, *(["hard"] if set(names) & set(batch) else []))}
    assert {key for key in first if key.startswith("distillation_")} == expected
    assert last["loss"] < first["loss"]
    assert all(entry[f"distillation_{term}"] > 0 for term in TERMS for entry in (first, last))


class CountedSeq2Seq(DistillationMixin, Seq2SeqTrainer):
    """A mixin before any Trainer class."""


def test_evaluation_by_generation_does_not_call_the_teacher(tmp_path):
    student, teacher = build_bart(), build_bart(1)
    calls: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = words(draw_batch(student, 8))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=6,
        disable_tqdm=True,
    )
    trainer = CountedSeq2Seq(
        student, arguments, train_dataset=rows, eval_dataset=rows, teacher=teacher, distillation=Distillation(**ALL)
    )
    trainer.train()
    assert len(calls) == 2
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape[0] == 8
    assert len(calls) == 2


def test_trls_trainer_distils(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    class Distilled(DistillationMixin, trl.SFTTrainer):
        pass

    student, teacher = build_llama(), build_llama(seed=1)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(60)}, unk_token="w1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    rows = Dataset.from_list(
        [{"input_ids": row["input_ids"][row["attention_mask"] == 1]} for row in draw_rows(student, 8)]
    )
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        max_length=16, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Distilled(
        student, arguments, train_dataset=rows, processing_class=tokenizer, teacher=teacher,
        distillation=Distillation(**ALL),
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    assert all(entry[f"distillation_{term}"] > 0 for term in ("hard", *TERMS))


# while units, heads and layers leave
@pytest.mark.parametrize("shrinking", [False, True])
def test_layers_heads_and_neurons_leave_while_it_learns(shrinking, tmp_path):
    student = build_bert(num_hidden_layers=4)
    callback = PruningCallback(
        [HeadPruner(min_kept=0), NeuronPruner(), LayerPruner()],
        Schedule(begin=1, end=6, frequency=1),
        target=Target(macs=0.3),
        shrink_during_training=shrinking,
    )
    trainer = make_trainer(tmp_path, student, max_steps=8, distillation=Distillation(heads="kept", **ALL))
    callback.attach(trainer).train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["distillation_hidden"] == pytest.approx(0, abs=1e-4)
    assert logs[-1]["distillation_hidden"] > 1e-3
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert callback.report.settings["macs_left"] <= 0.3


# the teacher, and what is learned beside the model
def test_projections_are_learned_and_resumed_but_are_no_part_of_the_model(tmp_path):
    def run(**resume: Any) -> Any:
        student, teacher = build_bert(), build_bert(seed=1, hidden_size=32)
        trainer = make_trainer(
            tmp_path, student, teacher, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2
        )
        trainer.train(**resume)
        return trainer

    whole = run()
    weight = whole.lesson.projections["layers"].weight
    assert weight.shape == (32, 16)
    assert any(one is weight for group in whole.optimizer.param_groups for one in group["params"])
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.lesson.projections["layers"].weight, weight)
    assert torch.equal(resumed.model.classifier.weight, whole.model.classifier.weight)
    save_pruned(whole.model, tmp_path / "final")
    assert load_pruned(tmp_path / "final").state_dict().keys() == build_bert().state_dict().keys()


@pytest.mark.parametrize("given", [True, False])
def test_a_teacher_computes_in_the_type_that_is_asked_for(given, tmp_path):
    teacher = build_vit(seed=1)
    path = save_pruned(teacher, tmp_path / "teacher")
    trainer = make_trainer(
        tmp_path, build_vit(), teacher if given else path, distillation=Distillation(teacher_dtype="bfloat16", **ALL)
    )
    trainer.train()
    assert {one.dtype for one in trainer.teacher.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in teacher.parameters()} == {torch.float32}
    assert all(one.requires_grad for one in teacher.parameters())


def test_a_folder_of_another_family_teaches(tmp_path):
    config = transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4, hidden_dim=24, num_labels=3)
    randomize(transformers.DistilBertForSequenceClassification(config)).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path, build_bert(), str(tmp_path / "teacher"), max_steps=2)
    trainer.train()
    assert trainer.teacher.config.model_type == "distilbert"
    assert trainer.state.log_history[0]["distillation_hidden"] > 0


def test_dropout_is_the_students_alone(tmp_path):
    """The teacher gives the same answer twice; the maps of a student with dropout are finite to learn from."""
    student = build_bert(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3)
    trainer = make_trainer(tmp_path, student, "self", max_steps=3)
    trainer.train()
    batch = unlabelled(draw_batch(student))
    assert torch.equal(trainer.teacher(**batch).logits, trainer.teacher(**batch).logits)
    assert trainer.state.log_history[0]["distillation_hidden"] > 1e-3
    assert all(math.isfinite(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry)


def test_attention_is_eager_only_while_it_trains(tmp_path):
    student, teacher = build_llama(), build_llama(seed=1)
    for model in (student, teacher):
        model.set_attn_implementation("sdpa")
    make_trainer(tmp_path, student, teacher).train()
    assert {model.config._attn_implementation for model in (student, teacher)} == {"sdpa"}


def test_adapters_learn_from_the_dense_model(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "output.dense"], r=2)
    student = peft.get_peft_model(build_bert(), adapters)
    trainer = make_trainer(tmp_path, student, build_bert(seed=1))
    assert not trainer.lesson.projections
    trainer.train()
    entry = trainer.state.log_history[0]
    assert all(entry[f"distillation_{term}"] > 0 for term in ("hard", *TERMS))


def test_a_recipe_says_all_of_it(tmp_path):
    """Weights of two numbers, maps of layers and types come through YAML; attention is eager from the start."""
    keys = ["hidden=[1.0, 0.0]", "attention=0.5", "layer_map={0: 1}", "heads=kept", "teacher_dtype=bfloat16"]
    recipe = load_recipe("quickstart", [f"output={tmp_path}", *(f"distillation.{key}" for key in keys)])
    expected = Distillation(hidden=(1.0, 0.0), attention=0.5, layer_map={0: 1}, heads="kept", teacher_dtype="bfloat16")
    assert recipe.distillation == expected
    (tmp_path / "again.yaml").write_text(recipe.yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").distillation == expected
    assert workflow.prepare(recipe).model.config._attn_implementation == "eager"
    with pytest.raises(RecipeError, match=r"distillation.hidden.*Received"):
        load_recipe("quickstart", ["distillation.hidden=[1]"])


# what cannot be
def test_a_map_names_layers_that_are_there(tmp_path):
    for layer_map in ({2: 0}, {0: 5}):
        with pytest.raises(PruningError, match=r"layer_map.*Received"):
            make_trainer(tmp_path, build_bert(), distillation=Distillation(hidden=1.0, layer_map=layer_map))


def test_the_student_cannot_be_its_own_teacher(tmp_path):
    model = build_bert()
    with pytest.raises(PruningError, match="self"):
        make_trainer(tmp_path, model, model)


def test_a_teacher_without_such_layers_or_heads_is_refused(tmp_path):
    with pytest.raises(PruningError, match="layers called 'decoder.layers'"):
        make_trainer(tmp_path, build_bart(), build_llama())
    other = build_bert(num_attention_heads=2)
    with pytest.raises(PruningError, match=r"heads='kept'.*Received"):
        make_trainer(tmp_path, build_bert(), other, distillation=Distillation(heads="kept", **ALL)).train()


def test_reentrant_checkpointing_is_refused_where_it_loses_gradients(tmp_path):
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(PruningError, match="use_reentrant"):
        make_trainer(tmp_path, build_llama(), **changes).train()
    changes["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    plain, checkpointed = (make_trainer(tmp_path, build_llama(), build_llama(seed=1), **more) for more in ({}, changes))
    norms = []
    for trainer in (plain, checkpointed):
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
