"""Write the README of a pruned model, and know later whether a hand has changed it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, PruningError
from ..files import shipped
from .facts import (
    CARD,
    PLOT,
    RECIPE,
    SOMEWHERE,
    TASKS,
    CardFacts,
    Known,
    as_dict,
    find_report,
    head_of,
    inherited_license,
    mention,
    read_config,
    without_tokens,
)
from .metadata import metadata
from .numbers import numbers, words

if TYPE_CHECKING:
    from ..report import Report

_TRAINERS = "generated automatically according to the information the Trainer had access to"
_MARK = re.compile(r"\n<!-- hf_prune card ([0-9a-f]{64}) -->\n?$")
_MACHINE = ("cpu", "cores", "gpu", "date")  # of `environment`: told elsewhere, or not a version


def model_card(
    report: Report | Mapping[str, Any] | None, *, folder: str | os.PathLike[str] | None = None, **facts: Any
) -> str:
    """Write the README of a pruned model: metadata for the Hub, dense against pruned, how to load, how it was made.

    It tells only what is known: a figure that the report lacks gets no row, and local paths never reach the metadata.
    What is not said is looked up in ``report.settings``: ``base_model``, ``datasets``, ``command``, ``license``,
    ``task`` and ``recipe_yaml``. "How it was made" lists its ``recipe`` (a name), ``rows``, ``splits``,
    ``data_revision``, ``sparsity``, ``seed``, ``hardware`` and ``versions``.

    Args:
        report: A `Report`, its ``to_dict()``, or ``None`` where nothing was measured.
        folder: The saved model; its config.json tells the class, the base model and who can load it.
        facts: Fields of `CardFacts`: ``repo_id``, ``base_model``, ``tags``, ``datasets``, ``metrics``, ``recipe``,
            ``command``, ``license``, ``license_name``, ``license_link``, ``task``, ``plot``, ``onnx``, ``tokenizer``.

    Returns:
        Markdown with a YAML header; its last line, which no reader sees, tells `is_ours` whether a hand changed it.

    Raises:
        TypeError: A fact that `CardFacts` does not have.

    Example:
        >>> print(model_card(None, repo_id="me/small-bert"))  # doctest: +ELLIPSIS
        ---
        library_name: transformers
        ...
    """
    place = Path(folder) if folder is not None else None
    known = Known(CardFacts(**facts), as_dict(report), read_config(place), place)
    recipe = known.said.recipe or known.settings.get("recipe_yaml")
    text = _render(
        metadata=metadata(known),
        title=known.title,
        source=known.said.repo_id or SOMEWHERE,  # never the folder: a card may be published as it stands
        base_model=mention(known.base_model),
        plot=known.said.plot,
        onnx=list(known.said.onnx),
        command=known.said.command or known.settings.get("command"),
        recipe=recipe.strip() if recipe else None,
        making=_making(known),
        revisions=known.settings.get("data_revision") or {},
        seed=known.settings.get("seed"),
        **_loading(known),
        **numbers(known),
    )
    text = without_tokens(text)
    return f"{text}\n<!-- hf_prune card {_digest(text)} -->\n"


def write_card(
    folder: str | os.PathLike[str],
    report: Report | Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    **facts: Any,
) -> Path:
    """Write README.md and the plot of kept units into a saved model's folder.

    License, base model and data that an earlier card of ours named stay, where nothing newer is known.

    Args:
        folder: A saved model.
        report: By default report.json in the folder, or beside it where a run has written it.
        force: Replace a README.md that somebody wrote or changed by hand.
        facts: As in `model_card`.

    Returns:
        The path of the README.md.

    Raises:
        CheckpointError: The folder holds no saved model.
        PruningError: There is a README.md that is not ours any more, and `force` is not set.

    Example:
        >>> write_card("runs/quickstart/model", repo_id="me/digits")  # doctest: +SKIP
    """
    folder = Path(folder)
    card = folder / CARD
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"A card needs a saved model with its config.json. Received: '{folder}'.")
    older = card.read_text("utf-8") if card.is_file() else ""
    if older and not force and not may_replace(older):
        raise PruningError(
            f"README.md was written or changed by hand; --force (force=True) replaces it. Received: '{card}'"
        )
    told = as_dict(report) or find_report(folder) or {}
    said = {**_files_told(folder, told), **earlier_facts(older), **{k: v for k, v in facts.items() if v}}
    card.write_text(model_card(told, folder=folder, **_licensed(said, told, folder)), "utf-8")
    return card


def may_replace(text: str) -> bool:
    """Whether no hand has a part in a card: it is ours, or Trainer's, whose comment an editor is asked to remove."""
    return is_ours(text) or _TRAINERS in text


def is_ours(text: str) -> bool:
    """Whether a card is exactly as `model_card` wrote it."""
    text = text.replace("\r\n", "\n")  # git may have changed the line ends
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _files_told(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the plot, and return what the folder's files add to the card."""
    from ..report import Report

    found: dict[str, Any] = {"onnx": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))}
    if told.get("kept"):
        Report.from_dict(told).plot(folder / PLOT)
    if (folder / PLOT).is_file():
        found["plot"] = PLOT
    if (folder / RECIPE).is_file():
        found["recipe"] = (folder / RECIPE).read_text("utf-8")
    return found


def earlier_facts(text: str) -> dict[str, Any]:
    """Return what an earlier card of ours knew that nobody can look up."""
    from huggingface_hub import ModelCard

    if not is_ours(text):
        return {}
    data = ModelCard(text, ignore_metadata_errors=True).data
    kept = {key: data.get(key) for key in ("license", "license_name", "license_link", "base_model", "datasets")}
    return {key: value for key, value in kept.items() if value}


def _licensed(said: dict[str, Any], told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add the dense model's license, where none is known yet."""
    known = Known(CardFacts(**said), told, read_config(folder), folder)
    return said if known.terms else {**said, **inherited_license(known.base_model)}


def _render(**facts: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    home = FileSystemLoader(shipped("model_cards"))
    # Markdown, not HTML: escaping would spoil YAML and code.
    environment = Environment(loader=home, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("card.md.j2").render(**facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _loading(known: Known) -> dict[str, Any]:
    """Return which of the three ways loads the folder, and the class that does."""
    head, ours = head_of(known.architecture), known.folder or Path()
    loader = f"AutoModelFor{head}" if head in TASKS else known.architecture or "AutoModel"
    mapped = [name for name in known.config.get("auto_map") or {} if name.startswith("AutoModel")]
    way = "stock" if not known.plan or known.plan.get("stock") else "standalone" if mapped else "import"
    if way == "standalone" and loader not in mapped:
        loader = mapped[0]
    tokenizer = known.said.tokenizer
    return {
        "way": way,
        "plain": bool(known.plan.get("stock")),
        "loader": loader,
        "tokenizer": (ours / "tokenizer_config.json").is_file() if tokenizer is None else tokenizer,
    }


def _making(known: Known) -> dict[str, str]:
    """Return what was run, on what, with which versions."""
    settings, versions = known.settings, known.settings.get("versions")
    packages = {k: v for k, v in versions.items() if k not in _MACHINE} if isinstance(versions, Mapping) else versions
    told: dict[str, Any] = {"Recipe": settings.get("recipe") or known.plan.get("recipe"), **_data(known)}
    told |= {key.capitalize(): settings.get(key) for key in ("sparsity", "seed", "hardware")} | {"Versions": packages}
    told["Date"] = versions.get("date") if isinstance(versions, Mapping) else None
    version = known.plan.get("library_version")
    if version and "hf_prune" not in str(packages):
        told["Library"] = f"hf_prune {version}"
    told = {what: words(value) for what, value in told.items() if value not in (None, "", {})}
    return told or {"Tool": "hf_prune"}


def _data(known: Known) -> dict[str, str]:
    """Return rows, splits and names of the data."""
    rows, splits = known.settings.get("rows") or {}, known.settings.get("splits") or {}
    told = {}
    for what, key in (("Trained on", "train"), ("Evaluated on", "evaluation")):
        if rows.get(key):
            parts = [splits[key]] if isinstance(splits.get(key), str) else splits.get(key) or []
            told[what] = f"{rows[key]:,} rows" + (f" of {' and '.join(parts)}" if parts else "")
    told["Data"] = ", ".join(mention(name) or name for name in known.datasets)
    return told
