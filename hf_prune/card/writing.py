"""Write the README of a pruned model, and know later whether a hand has changed it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import MARK, own_code
from ..errors import CheckpointError, PruningError
from ..files import is_inside, shipped, write_text
from ..secrets import without_secrets
from .escaping import Safe, block, code, text
from .facts import (
    CARD,
    HUB_TASKS,
    PLOT,
    RECIPE,
    SOMEWHERE,
    CardFacts,
    Known,
    as_dict,
    find_report,
    head_of,
    header,
    inherited_license,
    mention,
    read_config,
    read_text,
)
from .metadata import metadata
from .numbers import numbers, words
from .sound import sound

if TYPE_CHECKING:
    from ..report import Report

_TRAINERS = "generated automatically according to the information the Trainer had access to"
_MARK = re.compile(r"\n<!-- hf_prune card ([0-9a-f]{64}) -->\n?$")
_MACHINE = ("cpu", "cores", "gpu", "date")  # of `environment`: told elsewhere, or not a version


def model_card(
    report: Report | Mapping[str, Any] | None, *, folder: str | os.PathLike[str] | None = None, **facts: Any
) -> str:
    """Write the README of a pruned model: metadata for the Hub, dense against pruned, how to load, how it was made.

    What a report, a config or a recipe says may be a stranger's: it is shown as text, whatever markup it holds.

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
    known = Known(CardFacts(**facts), sound(as_dict(report)), read_config(place), place)
    recipe = known.said.recipe or known.settings.get("recipe_yaml")
    made = _render(
        metadata=Safe(metadata(known)),
        title=known.title,
        pruned=known.pruned,
        source=known.said.repo_id or SOMEWHERE,  # never the folder: a card may be published as it stands
        base_model=mention(known.base_model),
        plot=known.said.plot,
        onnx=list(known.said.onnx),
        command=known.said.command or known.settings.get("command"),
        recipe=recipe.strip() if isinstance(recipe, str) else None,
        making=_making(known),
        revisions=known.settings.get("data_revision") or {},
        seed=_seed(known.settings.get("seed")),
        **_loading(known),
        **numbers(known),
    )
    made = without_secrets(made)
    return f"{made}\n<!-- hf_prune card {_digest(made)} -->\n"


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
    older = read_text(folder, CARD)
    if card.is_symlink() and not older and not force:
        raise PruningError(f"README.md is a link out of the folder; --force replaces the link. Received: '{card}'")
    if older and not force and not may_replace(older):
        raise PruningError(
            f"README.md was written or changed by hand; --force (force=True) replaces it. Received: '{card}'"
        )
    told = as_dict(report) or find_report(folder) or {}
    said = {**_files_told(folder, told), **earlier_facts(older), **{k: v for k, v in facts.items() if v}}
    return write_text(card, model_card(told, folder=folder, **_licensed(said, told, folder)))


def may_replace(card: str) -> bool:
    """Whether no hand has a part in a card: it is ours, or has a comment that an editor is asked to remove."""
    return is_ours(card) or _TRAINERS in card or MARK in card


def is_ours(card: str) -> bool:
    """Whether a card is exactly as `model_card` wrote it."""
    card = card.replace("\r\n", "\n")  # git may have changed the line ends
    mark = _MARK.search(card)
    return mark is not None and _digest(card[: mark.start()]) == mark[1]


def _digest(card: str) -> str:
    return sha256(card.encode()).hexdigest()


def sound_report(told: Mapping[str, Any]) -> Report:
    """Return a report that may be a stranger's: of groups that have our names, and with gaps where a figure is missing.

    A picture's text is markup, so that names of other forms are left out.
    """
    from ..report import Report

    known = sound(told)
    known["metrics"] = {name: value for name, value in known["metrics"].items() if name.isidentifier()}
    named = {name: units for name, units in known["units"].items() if re.fullmatch(r"[a-z0-9_.]{1,200}", name)}
    kept = {name: units for name, units in known["kept"].items() if len(units) <= named.get(name, -1)}
    unsaid = {
        "nonzero": 0,
        "prunable_macs": None,
        "size_mb": 0.0,
        "macs": None,
        "batch": 1,
        "length": None,
        "threads": 1,
    }
    measured: dict[str, Any] = {which: {**unsaid, **known[which]} for which in ("dense", "pruned") if which in known}
    return Report.from_dict({**known, **measured, "units": named, "kept": kept})


def draw_plot(told: Mapping[str, Any], path: Path) -> None:
    """Draw what a report says was kept, where it says it."""
    report = sound_report(told)
    if report.kept and all(report.units.values()):
        report.plot(path)


def _files_told(folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the plot, and return what the folder's files add to the card."""
    draw_plot(told, folder / PLOT)
    onnx = [path for place in (folder, folder / "onnx") for path in place.glob("*.onnx") if is_inside(folder, path)]
    found: dict[str, Any] = {"onnx": sorted(path.relative_to(folder).as_posix() for path in onnx)}
    if is_inside(folder, folder / PLOT):
        found["plot"] = PLOT
    recipe = read_text(folder, RECIPE)
    return {**found, "recipe": recipe} if recipe else found


def earlier_facts(card: str) -> dict[str, Any]:
    """Return what an earlier card of ours knew that nobody can look up."""
    if not is_ours(card):
        return {}
    data = header(card)
    kept = {key: data.get(key) for key in ("license", "license_name", "license_link", "base_model", "datasets")}
    return {key: value for key, value in kept.items() if value}


def _seed(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _licensed(said: dict[str, Any], told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add the dense model's license, where none is known yet."""
    known = Known(CardFacts(**said), sound(told), read_config(folder), folder)
    return said if known.terms else {**said, **inherited_license(known.base_model)}


def _render(**facts: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    home = FileSystemLoader(shipped("model_cards"))
    # every value is text for Markdown, unless the template says that it is code: no one can be forgotten
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=home, finalize=text, **options)
    environment.filters |= {"code": code, "block": block, "quoted": _quoted, "as_name": _as_name}
    made = environment.get_template("card.md.j2").render(**facts)
    return re.sub(r"\n{3,}", "\n\n", made).strip() + "\n"


def _quoted(value: str) -> Safe:
    """Return a name as a string of Python, inside a block of code."""
    return Safe(json.dumps(re.sub(r"[^\w./ -]", "_", value)))


def _as_name(value: str) -> Safe:
    """Return an identifier as it stands."""
    return Safe(value if value.isidentifier() else "AutoModel")


def _loading(known: Known) -> dict[str, Any]:
    """Return which of the three ways loads the folder, and the class that does."""
    head, ours = head_of(known.architecture), known.folder or Path()
    loader = f"AutoModelFor{head}" if head in HUB_TASKS else known.architecture or "AutoModel"
    mapped = [name for name in own_code(known.config, ours).get("auto_map", {}) if name.startswith("AutoModel")]
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
