"""What the longer commands do: a run without a recipe, a recipe with comments, a recipe that is only checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .card import CARD
from .errors import PruningError
from .files import write_text
from .guessing import Guess, Wish, guess
from .hub import Plan
from .interrupting import kept_of_run, kept_of_search, or_say_what_was_kept
from .job import Job
from .recipe import Recipe, load_recipe
from .reference import commented
from .searching import SearchResult, search
from .workflow import run, say, validate


def wish_of(
    model: str | None, data: str | None, budgets: dict[str, float | None], recipe: str | None = None, **told: Any
) -> Wish:
    """Return what a command line says of a run without a recipe.

    Args:
        model: ``--model``.
        data: ``--data``.
        budgets: What remains, of which one is said at most: ``{"macs": 0.5, "speedup": None}``.
        recipe: The first word beside the options; a ``KEY=VALUE`` is none.
        **told: The others of `Wish`; ``None`` is its default.

    Raises:
        PruningError: Model or data is missing, a recipe is given beside them, or several budgets are said.
    """
    if recipe is not None and "=" not in recipe:
        given = [f"--model {model}"] * (model is not None) + [f"--data {data}"] * (data is not None)
        raise PruningError(
            "--model and --data go without a recipe, which names its own: KEY=VALUE changes it, as model.name=FOLDER "
            f"or data.name=FILE do. Received: the recipe {recipe} beside {' and '.join(given)}"
        )
    if model is None or data is None:
        raise PruningError(
            "Give a recipe, or both --model and --data. "
            f"Received: --model {model or 'missing'}, --data {data or 'missing'}"
        )
    said = {key: value for key, value in budgets.items() if value is not None}
    if len(said) > 1:
        named = ", ".join(f"--{key.replace('_', '-')}" for key in said)
        raise PruningError(f"Only one of --macs, --speedup and --max-drop can decide. Received: {named}")
    if "max_drop" in said:
        said = {}  # the search begins with the half
    others = {key: value for key, value in told.items() if value is not None}
    return Wish(model, data, target=said or {"macs": 0.5}, **others)


def wish_beside(model: str, data: str | None, **told: Any) -> Wish | None:
    """Return what a command line says of a model and its data; nothing where it names a recipe in place of a model.

    Raises:
        PruningError: Beside a recipe, options say something.
    """
    if data is None:
        _refuse_beside_a_recipe(told)
        return None
    return wish_of(model, data, {}, **told)


def _refuse_beside_a_recipe(told: Mapping[str, Any]) -> None:
    """Refuse options that go with a model and its data: a recipe would run as if nobody had said them."""
    said = [key for key, value in told.items() if value not in (None, "self")]  # a teacher is there by default
    if said:
        named = ", ".join("--data-config" if key == "config" else f"--{key.replace('_', '-')}" for key in said)
        raise PruningError(
            "These options go with --data: KEY=VALUE changes a recipe, as target.macs=0.25, data.text=COLUMN or "
            f"output=FOLDER do, and hf-prune search takes --max-drop. Received: {named}"
        )


def run_guessed(wish: Wish, overrides: Sequence[str], max_drop: float | None = None) -> None:
    """Run what is guessed of a model and its data; with `max_drop`, search for the smallest that is good enough."""
    recipe = _told(guess(wish, overrides))
    if max_drop is None:
        run_told(recipe)
        return
    found = search_told(recipe, max_drop=max_drop, output=recipe.output)
    print(found.table())


def run_told(recipe: Recipe | str, overrides: Sequence[str] = (), **beside: Any) -> None:
    """Run a recipe; Ctrl-C ends it with a word on what was kept. What is said `beside` it is refused."""
    _refuse_beside_a_recipe(beside)
    told = load_recipe(recipe, overrides)
    with or_say_what_was_kept(lambda since: kept_of_run(told.output, since)):
        run(told)


def search_told(recipe: Recipe | str, overrides: Sequence[str] = (), **settings: Any) -> SearchResult:
    """Search for the smallest model that is good enough; Ctrl-C ends it with a word on what was kept."""
    told = load_recipe(recipe, overrides)
    folder = Path(settings.get("output") or f"{told.output}-search")
    with or_say_what_was_kept(lambda since: kept_of_search(folder)):
        return search(told, **settings)


def write_recipe(wish: Wish, overrides: Sequence[str], output: Path, *, force: bool = False) -> Path:
    """Write a recipe with comments, and return its path.

    Raises:
        PruningError: A file is there, or as for `guess`.
    """
    if output.exists() and not force:
        raise PruningError(f"A file is there: --force replaces it, --output writes another. Received: '{output}'")
    recipe = _told(guess(wish, overrides))
    output.parent.mkdir(parents=True, exist_ok=True)
    return write_text(output, commented(recipe))


def _told(guessed: Guess) -> Recipe:
    """Say what was guessed, and return the recipe."""
    say(f"Guessed, and KEY=VALUE changes it:\n{guessed.table()}")
    return guessed.recipe


def facts_of(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Check a recipe with its model and data, and return what a run would begin with.

    Raises:
        PruningError: It cannot run: says all that `run` would.
    """
    job = validate(recipe, overrides)
    return {
        "recipe": job.recipe.name,
        "task": job.recipe.task,
        "model": type(job.model).__name__,
        "parameters": sum(one.numel() for one in job.model.parameters()),
        "classes": _classes(job),
        "rows": {"train": len(job.train), "evaluation": len(job.evaluation)},
        "metrics": job.recipe.metrics,
        "units": _units(job),
        "target": job.recipe.target and job.recipe.target.said,
        "output": str(job.output),
    }


def _classes(job: Job) -> list[str]:
    config = job.model.config
    named = job.problem in ("classification", "multi_label", "tokens")
    return [config.id2label[number] for number in range(config.num_labels)] if named else []


def _units(job: Job) -> dict[str, int]:
    """Count what the recipe's pruners choose from, of each kind."""
    from .architectures import find_groups
    from .pruners import UnitPruner

    groups, counted = find_groups(job.model), Counter[str]()
    for pruner in job.recipe.pruners.chosen:
        for group in pruner.choose(groups) if isinstance(pruner, UnitPruner) else ():
            counted[group.kind] += group.units
    return dict(counted)


def told_of_plan(plan: Plan) -> str:
    """Return what a push would do: the repository, each file with its size, what stays, and the card."""
    total = sum(file.size_bytes for file in plan)
    files = [f"{file.size_bytes / 1e6:10.3f} MB  {file.path}" for file in plan]
    left = [f" stays here   {name}: {why}" for name, why in plan.left.items()]
    head = (
        f"Nothing is sent. To https://huggingface.co/{plan.repo_id} would go {len(plan)} files, {total / 1e6:.3f} MB:"
    )
    return "\n".join([head, *files, *left, "", f"Its card, {CARD}:", "", plan.card])
