"""Every Trainer keeps its own loss: untouched with nothing from the teacher, else the teacher's terms are added."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import build_bert, build_llama, draw_batch, draw_rows, training_arguments
from test_distillation_terms import build_bart, words
from torch import Tensor, tensor
from torch.nn import functional
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_prune import Distillation, DistillationMixin, DistillationTrainer, PruningError
from hf_prune.distillation.losses import cosine_loss, divergence, logits_loss, row_mean

QUIET = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True,
         "disable_tqdm": True, "logging_steps": 1, "seed": 0, "max_grad_norm": 1e9,
         "per_device_train_batch_size": 16}  # fmt: skip


def classifier(seed: int = 0) -> Any:
    return build_bert(seed=seed)


WEIGHTS = tensor([0.2, 1.0, 3.0])


class Weighted(Trainer):
    """A Trainer with a loss of its own, which takes the labels out before the model sees them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that divides by the count that the Trainer hands over, as those of transformers do."""
    losses = functional.cross_entropy(outputs.logits, labels, reduction="none") ** 2
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


@dataclass
class Case:
    """A Trainer: how to make it, and the teacher's term on its rows, written down once more."""

    trainer: type
    build: Callable[..., Any]
    make: Callable[..., dict[str, Any]]
    term: Callable[[Any, Any, Any], Tensor]


def plain(model: Any, folder: Path, rows: int = 12, **changes: Any) -> dict[str, Any]:
    return {"args": training_arguments(folder, **{**QUIET, **changes}), "train_dataset": draw_rows(model, rows)}


def with_function(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    return {**plain(model, folder, **changes), "compute_loss_func": focal}


def smoothed(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    return plain(model, folder, label_smoothing_factor=0.2, **changes)


def sequences(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    batch = words(draw_batch(model, 12))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(12)]
    return {"args": Seq2SeqTrainingArguments(str(folder), **{**QUIET, **changes}), "train_dataset": rows}


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(60)}, unk_token="w1"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w1")


def texts(rows: int, seed: int = 0) -> list[str]:
    ids = draw_rows(build_llama(), rows, seed)
    return [" ".join(f"w{int(i)}" for i in row["input_ids"] if i) for row in ids]


def of_trl(name: str, columns: dict[str, int], **fixed: Any) -> Callable[..., dict[str, Any]]:
    def make(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
        import trl
        from datasets import Dataset

        settings = {**QUIET, "bf16": False, "max_length": 16, "gradient_checkpointing": False, **fixed, **changes}
        rows = Dataset.from_dict({column: texts(12, seed) for column, seed in columns.items()})
        options = {"args": getattr(trl, f"{name}Config")(str(folder), **settings), "train_dataset": rows}
        options |= {"ref_model": build_llama(2)} if name == "DPO" else {}
        return {**options, "processing_class": tokenizer()}

    return make


def of_sentences(name: str, loss: str | None = None) -> Callable[..., dict[str, Any]]:
    def make(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
        from datasets import Dataset

        kind = getattr(of_package(name), f"{name}TrainingArguments")
        labels: list[Any] = [0, 1, 2] if name == "CrossEncoder" else [0.1, 0.5, 0.9]
        if loss == "MSELoss":  # towards embeddings that were computed before
            labels = [[0.1 * number, *[0.5] * 15] for number in range(3)]
        columns = {"one": texts(12), "other": texts(12, 1), "label": labels * 4}
        options = {"args": kind(str(folder), **{**QUIET, **changes}), "train_dataset": Dataset.from_dict(columns)}
        losses = importlib.import_module(f"{of_package(name).__name__}.losses")
        return options if loss is None else {**options, "loss": getattr(losses, loss)(model)}

    return make


def of_package(name: str) -> Any:
    return pytest.importorskip(f"sentence_transformers{'.cross_encoder' if name == 'CrossEncoder' else ''}")


def sentence_model(name: str) -> Callable[[int], Any]:
    def build(seed: int = 0) -> Any:
        import tempfile

        import sentence_transformers

        head = "ForSequenceClassification" if name == "CrossEncoder" else "Model"
        with tempfile.TemporaryDirectory() as folder:
            build_bert(head, seed).save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            return getattr(sentence_transformers, name)(folder, device="cpu")

    return build


def reward_model(seed: int = 0) -> Any:
    return build_llama(seed, "ForSequenceClassification", num_labels=1)


def of_rows(student: Any, teacher: Any, batch: Any) -> Tensor:
    """Logits of whole texts."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    return logits_loss(student(**given).logits, teacher(**given).logits, 2.0)


def of_words(student: Any, teacher: Any, batch: Any) -> Tensor:
    """Logits of words that are learned; of an encoder-decoder's unshifted."""
    shift = 0 if student.config.is_encoder_decoder else 1
    labels = batch["labels"][:, shift:]
    ours, theirs = (one(**batch).logits[:, : labels.shape[1]][labels != -100] for one in (student, teacher))
    return logits_loss(ours, theirs, 2.0)


def of_completions(student: Any, teacher: Any, batch: Any) -> Tensor:
    """Logits of the words of completions: the mean over each, then over them."""
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (one(**given).logits[:, :-1] for one in (student, teacher))
    return row_mean(divergence(ours, theirs, 2.0), batch["completion_mask"][:, 1:])


def of_embeddings(student: Any, teacher: Any, batch: Any) -> Tensor:
    """One minus the cosine of embeddings, the mean over both columns."""
    losses = []
    for column in ("one", "other"):
        given = {key: batch[f"{column}_{key}"] for key in ("input_ids", "attention_mask")}
        ours, theirs = (one(dict(given))["sentence_embedding"] for one in (student, teacher))
        losses.append(cosine_loss(ours, theirs))
    return torch.stack(losses).mean()


def of_pairs(student: Any, teacher: Any, batch: Any) -> Tensor:
    """Scores of pairs of texts."""
    given = student.preprocess(list(zip(batch["one"], batch["other"])))
    ours, theirs = (one(dict(given))["scores"] for one in (student, teacher))
    return logits_loss(ours, theirs, 2.0)


def trl_trainer(name: str) -> type:
    return getattr(pytest.importorskip("trl"), f"{name}Trainer")


def sentence_trainer(name: str) -> type:
    return getattr(of_package(name), f"{name}Trainer")


DPO = {"prompt": 0, "chosen": 1, "rejected": 2}
CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(Trainer, classifier, plain, of_rows),
    "plain, language model": lambda: Case(Trainer, build_llama, plain, of_words),
    "label smoothing": lambda: Case(Trainer, classifier, smoothed, of_rows),
    "label smoothing, language model": lambda: Case(Trainer, build_llama, smoothed, of_words),
    "own compute_loss": lambda: Case(Weighted, classifier, plain, of_rows),
    "compute_loss_func": lambda: Case(Trainer, classifier, with_function, of_rows),
    "Seq2Seq": lambda: Case(Seq2SeqTrainer, build_bart, sequences, of_words),
    "SFT": lambda: Case(trl_trainer("SFT"), build_llama, of_trl("SFT", {"text": 0}), of_words),
    "DPO": lambda: Case(trl_trainer("DPO"), build_llama, of_trl("DPO", DPO), of_completions),
    "Reward": lambda: Case(
        trl_trainer("Reward"), reward_model, of_trl("Reward", {"chosen": 1, "rejected": 2}), of_rows
    ),
    "SentenceTransformer": lambda: Case(
        sentence_trainer("SentenceTransformer"), sentence_model("SentenceTransformer"),
        of_sentences("SentenceTransformer"), of_embeddings,
    ),
    **{
        f"SentenceTransformer, {loss}": lambda loss=loss: Case(
            sentence_trainer("SentenceTransformer"), sentence_model("SentenceTransformer"),
            of_sentences("SentenceTransformer", loss), of_embeddings,
        )
        for loss in ("CosineSimilarityLoss", "MSELoss")
    },
    "CrossEncoder": lambda: Case(
        sentence_trainer("CrossEncoder"), sentence_model("CrossEncoder"), of_sentences("CrossEncoder"), of_pairs
    ),
}  # fmt: skip


def make_trainer(case: Case, folder: Path, distil: Any = None, teacher: Any = None, **changes: Any) -> Any:
    """Return the Trainer as it is, or with the mixin before it."""
    model = case.build(0)
    options = case.make(model, folder, **changes)
    if distil is None:
        return case.trainer(model=model, **options)
    kind = type(f"Distilled{case.trainer.__name__}", (DistillationMixin, case.trainer), {})
    return kind(model=model, **options, teacher=teacher or case.build(1), distillation=distil)


def one_step(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """Train one step, and return its loss and all gradients before the optimizer reads them."""
    gradients: dict[str, Tensor] = {}

    class Reads(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Reads())
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), gradients


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    assert max(value.abs().max() for value in other.values()) > 1e-4
    for name in other:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_without_a_teachers_terms_nothing_changes(name, tmp_path):
    """Loss and gradient are those without the mixin, bit by bit, accumulation as upstream has it included."""
    case, changes = CASES[name](), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    alone, with_it = (
        one_step(make_trainer(case, tmp_path, distil, **changes)) for distil in (None, Distillation(hard=1.0, logits=0))
    )
    assert with_it[0] == alone[0]
    assert_same(with_it[1], alone[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_teachers_term_is_added(name, tmp_path):
    """The step's loss and gradient are 0.3 of the Trainer's own plus 0.7 of the term by hand."""
    case = CASES[name]()
    loss, gradients = one_step(make_trainer(case, tmp_path))
    trainer = make_trainer(case, tmp_path, Distillation(hard=0.3, logits=0.7))
    reached = one_step(trainer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    student, teacher = case.build(0), case.build(1)
    term = case.term(student, teacher, batch)
    term.backward()
    theirs = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    expected = {key: 0.3 * value + 0.7 * theirs.get(key, torch.zeros_like(value)) for key, value in gradients.items()}
    assert reached[0] == pytest.approx(0.3 * loss + 0.7 * term.item(), rel=1e-3, abs=2e-4)
    assert_same(reached[1], expected, rtol=1e-3, atol=1e-5)
    entry = next(entry for entry in trainer.state.log_history if "distillation_hard" in entry)
    assert entry["distillation_hard"] == pytest.approx(loss, rel=1e-3, abs=2e-4)
    assert entry["distillation_logits"] == pytest.approx(term.item(), rel=1e-3, abs=2e-4)


# what contrasts the rows of a batch, and what weighs its classes, is another mean in parts
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("SentenceTransformer", "own compute_loss")])
def test_the_step_is_the_same_in_parts(name, tmp_path):
    case, settings = CASES[name](), Distillation(hard=0.3, logits=0.7)
    whole = one_step(make_trainer(case, tmp_path, settings, per_device_train_batch_size=12))
    parts = one_step(
        make_trainer(case, tmp_path, settings, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-3, abs=2e-4)
    assert_same(parts[1], whole[1], rtol=1e-3, atol=1e-5)


# a Trainer's own ways
def test_every_forward_is_compared_and_metrics_are_not(tmp_path):
    """A loss of two forwards, and one without gradients beside them, as TRL runs for its figures."""

    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                model(**inputs)
            one = model(inputs["input_ids"], inputs["attention_mask"])
            other = model(input_ids=inputs["input_ids"].flip(0), attention_mask=inputs["attention_mask"].flip(0))
            return (one.logits + 2 * other.logits).square().mean()

    def both(student: Any, teacher: Any, batch: Any) -> Tensor:
        back = {key: value.flip(0) for key, value in batch.items()}
        return (of_rows(student, teacher, batch) + of_rows(student, teacher, back)) / 2

    case = Case(Twice, classifier, plain, both)
    loss, gradients = one_step(make_trainer(case, tmp_path))
    trainer = make_trainer(case, tmp_path, Distillation(hard=1.0, logits=1.0))
    reached, mixed = one_step(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    term = both(classifier(0), classifier(1), batch)
    assert reached == pytest.approx(loss + term.item(), rel=1e-3)
    assert any(not torch.allclose(mixed[name], gradients[name]) for name in mixed)


def test_a_number_of_items_means_what_it_means_to_the_trainer(tmp_path):
    """Handed over by hand, outside of a step."""
    model, batch = build_llama(), draw_batch(build_llama())
    options = {"args": training_arguments(tmp_path), "train_dataset": [], "model": model}
    trainer = DistillationTrainer(**options, teacher="self", distillation=Distillation(hard=1.0, logits=0.5))
    for number in (None, tensor(7), tensor(50)):
        expected = Trainer(**options).compute_loss(model.train(), dict(batch), num_items_in_batch=number)
        reached = trainer.compute_loss(model, dict(batch), num_items_in_batch=number)
        assert reached.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("terms", [{"logits": 1.0}, {"logits": 0.0, "hidden": 1.0}])
def test_a_part_without_items_adds_nothing(terms, tmp_path):
    """A batch whose labels are all -100 beside one that has some: their mean would be that of nothing."""
    rows = draw_rows(build_llama(), 8)
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    norms = []
    for size in (8, 4):
        arguments = training_arguments(
            tmp_path, **{**QUIET, "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        )
        trainer = DistillationTrainer(
            build_llama(), arguments, train_dataset=rows, teacher=build_llama(1),
            distillation=Distillation(hard=0.5, **terms),
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        norms.append(one_step(trainer))
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-3)
    assert_same(norms[1][1], norms[0][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForQuestionAnswering", "Model", "ForTokenClassification"]
)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_tuples_teach_as_named_outputs_do(head, which, tmp_path):
    batch = draw_batch(build_bert())
    batch = {key: value for key, value in batch.items() if key != "labels"}
    if head == "ForSequenceClassification":
        batch["labels"] = tensor([0, 1, 2, 0])
    losses: list[float] = []
    for named in (True, False):
        student, teacher = (build_bert(head, seed, num_labels=3 if "Classif" in head else 2) for seed in (0, 1))
        student.config.return_dict = named or which == "teacher"
        teacher.config.return_dict = named or which == "student"
        trainer = DistillationTrainer(
            student, training_arguments(tmp_path), teacher=teacher, distillation=Distillation(hidden=1.0)
        )
        losses.append(trainer.compute_loss(student.train(), dict(batch)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 1e-3


def test_evaluation_and_a_saved_model_stay_the_trainers_own(tmp_path):
    class Mine(DistillationMixin, Weighted):
        pass

    model = classifier()
    rows, options = draw_rows(model, 8), {"args": training_arguments(tmp_path)}
    expected = Weighted(copy.deepcopy(model), eval_dataset=rows, **options).evaluate()["eval_loss"]
    trainer = Mine(model, eval_dataset=rows, teacher="self", distillation=Distillation(hard=0.1), **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


# what cannot be
REFUSED = {
    "GRPO": ("trl", "SFTTrainer"),
    "RLOO": ("trl", "SFTTrainer"),
    "Distillation": ("trl", "teacher of its own"),
    "experimental.gkd.GKD": ("trl", "teacher of its own"),
    "experimental.online_dpo.OnlineDPO": ("trl", "SFTTrainer"),
    "": ("setfit", "Received: Between, Trainer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name):
    """Before the Trainer itself begins: none of its arguments is needed."""
    package, hint = REFUSED[name]
    pytest.importorskip(package)
    place, _, kind = f"{package}.{name}Trainer".rpartition(".")
    other = getattr(importlib.import_module(place), kind)
    mixed = type("Mine", (DistillationMixin, type("Between", (other,), {})), {})
    with pytest.raises(PruningError, match=hint) as error:
        mixed(None, None, teacher="self")
    assert kind in str(error.value)


def test_a_loss_above_the_mixin_is_refused(tmp_path):
    """The teacher would not be asked."""

    class Above(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Trainer.compute_loss(self, model, inputs, return_outputs)

    model = classifier()
    trainer = Above(model, training_arguments(tmp_path), train_dataset=draw_rows(model, 4), teacher="self")
    with pytest.raises(PruningError, match=r"put the mixin before"):
        trainer.train()
    assert torch.equal(model.classifier.weight, classifier().classifier.weight)


def test_a_loss_that_asks_another_model_is_refused(tmp_path):
    class Other(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model.classifier.weight.sum()

    kind = type("Mine", (DistillationMixin, Other), {})
    model = classifier()
    trainer = kind(model, training_arguments(tmp_path), train_dataset=draw_rows(model, 4), teacher="self")
    with pytest.raises(PruningError, match=r"calls the model that it is given.*Mine"):
        trainer.train()


@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_says_how_it_is_scaled_is_believed(scaled, tmp_path):
    """One divides by the rows of the step itself; the other's mean is what Trainer would divide by the parts."""

    class Said(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            losses = functional.cross_entropy(model(**inputs).logits, labels, reduction="none")
            return losses.sum() / 12 if scaled else losses.mean()

    case, settings = Case(Said, classifier, plain, of_rows), Distillation(hard=0.3, logits=0.7)
    whole = one_step(make_trainer(case, tmp_path, settings, per_device_train_batch_size=12))
    parts = one_step(
        make_trainer(case, tmp_path, settings, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    )
    assert parts[0] == pytest.approx(whole[0], rel=1e-3)
    assert_same(parts[1], whole[1], rtol=1e-3, atol=1e-5)


def test_a_cached_loss_of_sentences_is_refused(tmp_path):
    """It runs the model with gradients only while it goes back: nothing could be compared."""
    losses = pytest.importorskip("sentence_transformers.losses")
    case = CASES["SentenceTransformer"]()
    trainer = make_trainer(case, tmp_path, Distillation())
    trainer.train_dataset = trainer.train_dataset.remove_columns("label")
    trainer.loss = losses.CachedMultipleNegativesRankingLoss(trainer.model)
    with pytest.raises(PruningError, match="with gradients, before it returns"):
        trainer.train()
