"""What a guess says in words: why it is so, and what was looked for and not found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data import SPLITS, element, files_alone, is_listed
from ..errors import shown
from ..recipe_tasks import RECIPE_TASKS

_SHOWN = 6  # classes that a reason names
_SAID = "you say so"


def told_type(feature: Any) -> str:
    """Return what a column holds."""
    return str(getattr(element(feature), "dtype", None) or type(feature).__name__)


def labels_told(names: Sequence[str], feature: Any) -> str:
    """Return what labels are: the names of classes, so that what is none is seen, or numbers."""
    several = ", several a row" if is_listed(feature) else ""
    if names:
        first = ", ".join([*map(shown, names[:_SHOWN]), *(["…"] if len(names) > _SHOWN else [])])
        return f"labels are {len(names)} classes{several}: {first}"
    kind = told_type(feature)
    kind += " (regression; written as whole numbers, 4 for 4.0, they would be classes)" if "float" in kind else ""
    return f"labels are {kind}{several}"


def splits_told(usable: Sequence[str], there: Sequence[str]) -> str:
    """Return why no split is evaluated on, of those that are called so, and of all beside training's."""
    if usable:
        return f"{', '.join(usable)} has no labels, or other columns"
    if there:
        return f"of {', '.join(there)} none is called {', '.join(SPLITS[1:])}"
    return "there is one split"


def target_told(target: Mapping[str, Any]) -> str:
    """Return why the target is so."""
    return "--macs, --speedup and --max-drop say another" if target == {"macs": 0.5} else _SAID


def with_said(
    reasons: Sequence[tuple[str, str, str]], overrides: Sequence[str], target: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Return the reasons with what a person says of a key in the place of what was guessed.

    Args:
        reasons: Key, value and where it comes from.
        overrides: ``key=value`` each.
        target: The guessed one.
    """
    said = {key: text for key, _, text in (one.partition("=") for one in overrides)}
    aims = {key: said.pop(key) for key in [*said] if key.startswith("target.")}
    if aims:
        told = {**target, **{key.removeprefix("target."): text for key, text in aims.items()}}
        said.setdefault("target", ", ".join(f"{key}={value}" for key, value in told.items() if value != "null"))
    others = any(one.startswith(("data.", "train.batch_size", "train.max_steps")) for one in said)
    rows = []
    for key, value, because in reasons:
        if key in said:
            rows.append((key, said.pop(key), _SAID))
        elif not any((one.startswith(f"{key}.") and value == "null") or key.startswith(f"{one}.") for one in said):
            because = because.rpartition(" rows, ")[2] if others and key == "train.epochs" else because  # else untrue
            rows.append((key, value, because))
    return [*rows, *((key, text, _SAID) for key, text in said.items())]


def not_found(task: str | None, rows: Any) -> str:
    """Return that no task, or not the one that is wanted, finds its columns, and what there is.

    Args:
        task: The one that a person has named.
        rows: The split to train on.
    """
    reads = f" ({RECIPE_TASKS[task].reads})" if task else ""
    hint = files_alone(rows) or _nested(rows)
    return (
        f"--text, --image, --audio or --label must name what {task or 'a task'} reads{reads}: it is not found. "
        f"{hint and hint + '. '}Received columns: {_columns(rows)}"
    )


def two_texts(columns: Sequence[str]) -> str:
    """Return what to do where two texts are named for a language model, which reads one."""
    return (
        "A language model reads one column of text: --text names one, of texts that were joined before "
        "(docs/howto/own_csv.md has lines for prompts with answers); --task text-classification with a --label of "
        f"classes makes a classifier of it. Received: two texts, {', '.join(map(shown, columns))}"
    )


def single_row(rows: Any) -> str:
    """Return that a file holds one row, as a json file does that is one object."""
    hint = _nested(rows)
    return f"--data must hold several rows. {hint and hint + '. '}Received: one, with the columns {_columns(rows)}"


def _columns(rows: Any) -> str:
    return ", ".join(f"{name} ({told_type(kind)})" for name, kind in rows.features.items())


def _nested(rows: Any) -> str:
    """Return what to do about rows of rows, such as messages of a chat and SQuAD's own file, and about tokens."""
    nested = [name for name, kind in rows.features.items() if is_listed(kind) and isinstance(element(kind), dict)]
    if "input_ids" in rows.column_names:
        return "Recipes read texts, of which they make input_ids themselves: save the rows as they were before"
    if not nested:
        return ""
    return (
        f"Column '{nested[0]}' holds lists of {{{', '.join(element(rows.features[nested[0]]))}}}: write a file whose "
        "columns hold text (docs/howto/own_csv.md has lines that make one of chats and of SQuAD's json)"
    )
