"""The whole story: from a recipe to a smaller, faster model that anyone can load, with its card and its numbers."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import set_seed

from .callback import PruningCallback
from .card import RECIPE, REPORT, inherited_license, write_card
from .checkpoint import load_pruned, save_pruned
from .data import DIGITS, Splits, check_tokens, data_revision, is_listed, label_names, load_split
from .errors import CheckpointError, PruningError, RecipeError, visible
from .exporting import check_exportable, check_wanted, export, export_onnx, measure_exports, open_exported
from .files import write_text
from .hub import push_pruned
from .job import Job, batches_of, evaluate, evaluate_graph, metrics_of, steps_of, trainer_of
from .labels import Classes, fit_classes
from .page import LATENCY
from .plan import annotate, read_block
from .recipe import Recipe, load_recipe
from .recipe_tasks import RECIPE_TASKS, dense_config, dense_model, read_by, saved_model
from .report import Report, check_reads, environment, evaluating, measure_pair, random_inputs, torch_subject
from .report.machine import command_line
from .rewinding import check_rewinding, rewind
from .run_folder import RUN, check_run_folder
from .session import Pruning
from .targets import Target

SAME = 1e-5  # of the largest logit: a reloaded model computes what the saved one did
_NAMED = 20  # classes in a message
_CALIBRATION = 16  # batches that a score needs after each round of rewinding
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def run(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Report:
    """Run a recipe from beginning to end.

    Everything that can be wrong with the settings is found before any training.

    Args:
        recipe: A shipped recipe's name, a YAML file, or a `Recipe`.
        overrides: ``key=value`` each, such as ``target.macs=0.5``.

    Returns:
        What was kept, measured and scored; the same is in ``output/report.json``.

    Raises:
        PruningError: A setting, the data, the model or the output folder does not do.

    Example:
        >>> print(run("quickstart", ["train.epochs=1"]).table())  # doctest: +SKIP
    """
    recipe = load_recipe(recipe, overrides)
    set_seed(recipe.seed)
    job = prepare(recipe)
    for stage in (check, train_dense):
        stage(job)
    if make_small(job):
        print(job.report)
    return job.report


def validate(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> Job:
    """Check a recipe with its model and data as `run` would, and neither train nor write.

    Args:
        recipe: As in `run`.
        overrides: ``key=value`` each.

    Returns:
        Model, rows and settings as a run would begin with them.

    Raises:
        PruningError: What `run` would say.
    """
    told = load_recipe(recipe, overrides)
    set_seed(told.seed)
    job = prepare(told)
    check_settings(job)
    return job


# the stages, in order
def make_small(job: Job) -> bool:
    """Go from the dense model to a small one: trained, scored, saved, exported, measured, written down.

    Returns:
        Whether this process was the one that told the whole story: of several, the first.
    """
    for name in (REPORT, LATENCY):  # of an earlier run here: its log and its models are written over from now on
        (job.output / name).unlink(missing_ok=True)
    prune_and_distil(job)
    score(job)  # processes share the rows
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return False
    for stage in (save_and_compare, export_both, measure_both, score_exports, write_down, publish):
        stage(job)
    return True


def prepare(recipe: Recipe) -> Job:
    """Load data and model, and make them fit each other."""
    say(f"Recipe {recipe.name}: loading data and model")
    task = RECIPE_TASKS[recipe.task]
    config, fitted = dense_config(recipe), list[Classes]()
    if recipe.dense is None and recipe.distillation is not None:
        _warn_of_a_new_head(recipe, config)

    def fit(classes: Any, **told: Any) -> Classes:
        fitted.append(fit_classes(config, classes, head=task.head, retrain=recipe.dense is not None, **told))
        return fitted[0]

    splits = load_split(recipe.data, fit if task.has_classes else None, task.labels)
    options = _class_options(recipe, splits, fitted[0]) if fitted else task.options
    model = dense_model(recipe, task.auto_class, options)
    processor = read_by(model, task.processor(recipe))
    train, evaluation = (task.rows(split, processor, recipe, model) for split in splits)
    check_tokens(model, [train, evaluation])
    job = Job(recipe, model, processor, train, evaluation, task.collator(processor, model))
    target = recipe.target
    if target is not None and _waits_for_a_size(target) and model.main_input_name == "pixel_values":
        side = _real_inputs(job, 1)["pixel_values"].shape[-1]  # a config may name another than its processor cuts
        job.recipe = recipe.model_copy(update={"target": replace(target, image_size=side)})
    return job


def _warn_of_a_new_head(recipe: Recipe, config: Any) -> None:
    """Say that a teacher knows nothing: its head is drawn at random, and nothing trains it first."""
    task, made = RECIPE_TASKS[recipe.task], [str(one) for one in getattr(config, "architectures", None) or ()]
    if task.has_classes and not any(one.endswith(task.head) for one in made):
        say(
            f"Warning: dense is null, and distillation learns from a head that is drawn at random: model is "
            f"{', '.join(made) or 'new'}, no {task.head}. dense: {{epochs: 3}} trains it first, distillation: null "
            "learns from the labels alone"
        )


def _waits_for_a_size(target: Target) -> bool:
    """Whether a target is one of time that does not say how large images are."""
    return target.budget[0] == "time" and target.image_size is None


def _real_inputs(job: Job, batch: int) -> dict[str, Any]:
    """Return one row of the data, so many times."""
    return job.task.inputs(job.collator([job.evaluation[0]] * batch))


def _class_options(recipe: Recipe, splits: Splits, fitted: Classes) -> dict[str, Any]:
    """Return what the model must be told of its classes, and say where numbers of the data are their names."""
    label = recipe.data.label_column
    several = recipe.task != "token-classification" and is_listed(splits.train.features[label])
    names = label_names(splits.train, label) or []
    if all(re.fullmatch(r"-?\d+", name) for name in names) and names != list(map(str, range(len(names)))):
        told = ", ".join([*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])])
        say(f"The labels {told} are the classes 0 to {len(names) - 1}, and these their names")
    return {**fitted.options, **({"problem_type": "multi_label_classification"} if several else {})}


def check(job: Job) -> None:
    """Find out now what would otherwise fail after hours, and make the run's folder."""
    check_settings(job)
    job.output.mkdir(parents=True, exist_ok=True)
    write_text(job.output / RUN, "")
    write_text(job.output / RECIPE, job.recipe.yaml())


def check_settings(job: Job) -> None:
    """Check pruners, target, schedule, metrics and output folder against the model; nothing is written."""
    recipe, steps = job.recipe, steps_of(job, job.recipe.train)
    optimizer = torch.optim.SGD(job.model.parameters())  # never steps: regularisation asks for one
    told: dict[str, Any] = {"total_steps": steps, "epoch_steps": steps / recipe.train.epochs, "optimizer": optimizer}
    Pruning(job.model, recipe.pruning, **told).close()
    if recipe.rewinding is not None:
        check_rewinding(recipe.pruning)
    if recipe.distillation is not None:
        _check_lesson(recipe, job.model)
    metrics_of(job, job.model)
    if recipe.exports:
        check_exportable(job.model)
    for wanted in recipe.exports:
        check_wanted(job.model, wanted.format, wanted.quantize)
    if job.model.main_input_name == "input_ids":  # as in `measure_both`, which comes behind the training
        with evaluating(job.model):
            check_reads(torch_subject(job.model, None, recipe.measure.batch, recipe.measure.length), "measure.length")
    check_run_folder(job.output)


def _check_lesson(recipe: Recipe, model: Any) -> None:
    """Refuse what a teacher like the model itself could not teach, or what of it could not be kept."""
    from .distillation.kept import form_of
    from .distillation.lesson import Lesson
    from .distillation.memory import writable_cache

    told, cached = recipe.distillation, RECIPE_TASKS[recipe.task].cached
    assert told is not None
    if told.cache is not None and cached != ("rows" if told.top_k is None else "words"):
        ways = {None: "cannot be kept: leave it out", "rows": "goes without top_k", "words": "needs top_k, such as 50"}
        raise RecipeError(
            f"distillation.cache of {recipe.task} {ways[cached]}. Received: cache={told.cache!r}, top_k={told.top_k}"
        )
    if told.cache is not None:
        writable_cache(told.cache)
    form_of(told, model, model)
    Lesson(model, model, told)


def train_dense(job: Job) -> None:
    """Train the dense model first, where the recipe says how."""
    if job.recipe.dense is not None:
        say("Training the dense model")
        trainer = trainer_of(job, job.model, job.recipe.dense)
        trainer.train()
        if trainer.is_world_process_zero():
            save_pruned(job.model, job.output / "dense", tokenizer=job.processor)


def prune_and_distil(job: Job) -> None:
    """Prune a copy gradually while it trains; the dense model teaches, where the recipe says how."""
    recipe = job.recipe
    job.pruned = copy.deepcopy(job.model) if job.start is None else saved_model(recipe, job.start)
    say(f"Pruning with {', '.join(type(pruner).__name__ for pruner in recipe.pruning.pruners)}")
    trainer = trainer_of(job, job.pruned, recipe.train, teacher=job.model, watch=recipe.guard is not None)
    if recipe.rewinding is not None:
        rows = range(min(len(job.train), _CALIBRATION * recipe.train.batch_size))
        batches = batches_of(job, job.train, rows, recipe.train.batch_size)
        job.report = rewind(trainer, replace(recipe.pruning, data=batches, loss=job.task.loss), recipe.rewinding)
        return
    callback = PruningCallback(recipe.pruning)
    callback.attach(trainer).train()
    assert callback.report is not None
    job.report = callback.report


def score(job: Job) -> None:
    """Evaluate both models on the same rows."""
    say("Evaluating")
    metrics = job.report.metrics
    for name, model in (("dense", job.model), ("pruned", job.pruned)):
        for key, value in evaluate(job, model).items():
            metrics.setdefault(key, {})[name] = value
    metrics["loss"] = metrics.pop("loss")  # last: the recipe's metrics are what people look for


def save_and_compare(job: Job) -> None:
    """Save the small model, load it back, and compare what both compute.

    Raises:
        CheckpointError: They differ.
    """
    batch = job.collator([job.evaluation[i] for i in range(min(8, len(job.evaluation)))])

    @torch.no_grad()
    def compute(model: Any) -> torch.Tensor:
        found = model.cpu().eval()(**job.task.inputs(batch))
        return torch.stack([found[name] for name in job.task.outputs])

    before = compute(job.pruned)
    if not before.isfinite().all():
        raise CheckpointError(
            "The pruned model's outputs must be finite: training has diverged, and a lower train.learning_rate helps; "
            f"nothing was written. Received: {float(before[~before.isfinite()][0])}"
        )
    annotate(job.pruned, recipe=job.recipe.name, base_model=_base_of(job))
    folder = save_pruned(job.pruned, job.output / "model", tokenizer=job.processor)
    reloaded = load_pruned(folder, model_class=type(job.pruned), dtype=torch.float32)
    difference = float((before - compute(reloaded)).abs().max())
    say(f"Saved and reloaded: largest difference of the logits {difference:.1e}")
    if difference > SAME * max(1.0, float(before.abs().max())):
        raise CheckpointError(
            f"The reloaded model must compute what the saved one did. Received: a difference of {difference:.2e}"
        )


def export_both(job: Job) -> None:
    """Export as the recipe says, dense and pruned to ONNX by default; each export is compared with torch."""
    if job.recipe.onnx:
        say("Exporting to ONNX")
        job.onnx = job.output / "onnx-dense", job.output / "onnx"
        export_onnx(job.model, job.onnx[0], tokenizer=job.processor)
    for wanted in job.recipe.exports:
        say(f"Exporting the pruned model: {wanted.folder}")
        rows = range(min(len(job.train), wanted.batches * job.recipe.train.batch_size))
        data = batches_of(job, job.train, rows, job.recipe.train.batch_size) if wanted.quantize == "static" else None
        how: dict[str, Any] = {"format": wanted.format, "quantize": wanted.quantize, "dtype": wanted.dtype}
        done = export(job.pruned, job.output / wanted.folder, data=data, tokenizer=job.processor, **how)
        job.exported.append(done)


def measure_both(job: Job) -> None:
    """Count and time both models, in turn."""
    say("Measuring latency, dense and pruned in turn")
    dense, pruned = (model.cpu().eval() for model in (job.model, job.pruned))
    settings = job.recipe.measure
    halves = job.problem in ("seq2seq", "speech")  # an encoder's and a decoder's files are not timed
    words = job.model.main_input_name == "input_ids"  # these can be made up; the data know how large images are
    real = None if words else _real_inputs(job, settings.batch)
    told: dict[str, Any] = {**settings.model_dump(), "onnx": None if halves else job.onnx}
    job.report.dense, job.report.pruned = measure_pair(dense, pruned, real, **told)
    if job.exported and not halves:
        inputs = random_inputs(job.pruned, settings.batch, settings.length) if real is None else real
        how = {"threads": settings.threads, "repeats": settings.repeats}
        job.report.exports = measure_exports(job.pruned, job.exported, inputs, **how)


def score_exports(job: Job) -> None:
    """Evaluate every exported file on the rows that the models were evaluated on."""
    for row, done in zip(job.report.exports, [None, *job.exported]):
        if done is None:  # torch
            scores = {name: value["pruned"] for name, value in job.report.metrics.items() if name != "loss"}
        else:
            say(f"Evaluating {done.path.name}")
            scores = evaluate_graph(job, open_exported(done))
        row["metrics"] = scores


def write_down(job: Job) -> None:
    """Write report.json, the recipe, the plot and the card."""
    report = job.report
    report.settings |= _told(job)
    folder = job.output / "model"
    write_text(job.output / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")
    write_text(folder / RECIPE, report.settings["recipe_yaml"])
    try:
        write_card(folder, report)
    except PruningError as kept:  # a hand has written it
        say(f"The card stays as it is: {kept}")
    with contextlib.suppress(OSError):  # Trainer's folder, where it wrote nothing into it
        (job.output / "checkpoints").rmdir()
    say(f"Model, card and picture: {folder}")


def _told(job: Job) -> dict[str, Any]:
    """Return how the run was done, for its report and card."""
    recipe, here, known = job.recipe, environment(), job.recipe.card
    terms = (
        {"license": known.license}
        if known.license
        else inherited_license(recipe.model.name, revision=recipe.model.revision)
    )
    return {
        "recipe": recipe.name,
        "recipe_yaml": _without_paths(recipe, recipe.yaml()),
        "command": _without_paths(recipe, command_line()),
        "task": recipe.task,
        "seed": recipe.seed,
        "base_model": _base_of(job),
        **terms,
        "datasets": known.datasets or [name for name in [_hub_name(recipe.data.name)] if name and name != DIGITS],
        "data_config": recipe.data.config,
        "splits": {"train": recipe.data.train, "evaluation": recipe.data.evaluation},
        "rows": {"train": len(job.train), "evaluation": len(job.evaluation)},
        "data_revision": data_revision(recipe.data, job.train),
        "hardware": here["cpu"],
        "versions": here,
    }


def publish(job: Job) -> None:
    """Push everything in one commit, where the recipe says where."""
    if job.recipe.push:
        onnx = job.onnx[1] if job.onnx else None
        push_pruned(job.output / "model", job.recipe.push, report=job.report, onnx=onnx)
        say(f"Published as {job.recipe.push}")


# what the stages use
def say(text: str) -> None:
    """Tell the person at the terminal where we are."""
    console.print(Text.assemble(("hf-prune", "cyan"), " ", visible(text)), soft_wrap=True)


def _base_of(job: Job) -> str | None:
    """Return the dense model's name on the Hub: the model says it, and of a local copy the recipe, which may be old."""
    name = job.recipe.model.name
    own = (read_block(job.model) or {}).get("base_model")
    return _hub_name(name) or own or (job.recipe.card.base_model if name else None)


def _hub_name(name: str | None) -> str | None:
    """Return a model's or data set's name where it is one of the Hub, not a local folder."""
    return name if name and not Path(name).exists() else None


def _without_paths(recipe: Recipe, text: str) -> str:
    """Shorten this machine's folders to their last part: a card is for everybody."""
    for place in [recipe.output, *(Path(name) for name in (recipe.model.name, recipe.data.name) if name)]:
        outside = place.is_absolute() or ".." in place.parts
        text = text.replace(str(place), place.name) if outside else text
    return text
