"""What a card can tell: what the caller says, the report, the saved folder, and the dense model's own card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.reading import states_plan
from ..errors import CheckpointError, RecipeError
from ..files import is_inside, read_json
from ..plan import BLOCK, decode_units
from ..settings import read_yaml
from .escaping import one_line
from .sound import sound

if TYPE_CHECKING:
    from ..report import Report

CARD, REPORT, RECIPE, PLOT = "README.md", "report.json", "recipe.yaml", "kept.png"
SOMEWHERE = "path/to/folder"  # stands for a folder that nobody else has
_TERM = {
    "license": re.compile(r"[\w.+-]{1,60}"),
    "license_name": re.compile(r"[\w.+() -]{1,100}"),
    "license_link": re.compile(r"[^\s<>\"'`]{1,300}"),
}
_TERMS = tuple(_TERM)
_LARGEST_TEXT = 2**22  # bytes of a README or recipe
# Head of the model class -> task on the Hub; these heads also have an ``AutoModelFor...``.
HUB_TASKS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "CausalLM": "text-generation",
    "ImageClassification": "image-classification",
    "SemanticSegmentation": "image-segmentation",
    "ObjectDetection": "object-detection",
    "AudioClassification": "audio-classification",
    "CTC": "automatic-speech-recognition",
}
_HUB_NAMES = {  # of recipes' tasks that the Hub calls otherwise
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq": "text2text-generation",
    "speech-recognition": "automatic-speech-recognition",
    "speech-recognition-ctc": "automatic-speech-recognition",
}


@dataclass(frozen=True)
class CardFacts:
    """What the caller says; everything else is looked up in ``report.settings`` and in the folder's config.json.

    Args:
        repo_id: Where the model will live, for the title and the loading snippet.
        base_model: Hub name of the dense model; by default what the config recorded.
        tags: In addition to ``pruned``, ``hf_prune`` and, where known, ``sparsity-<percent>``.
        datasets: Hub names of the training and test data; the first one goes to the model-index.
        metrics: Names for the metadata; by default the report's.
        recipe: The recipe's YAML text.
        command: The command line that made the model.
        license: A license identifier of the Hub, such as ``"apache-2.0"``; none is assumed.
        license_name: Its name, where `license` is ``"other"``.
        license_link: Where its text stands, where `license` is ``"other"``.
        task: Pipeline tag; by default from the model's class.
        plot: Path in the repository of the picture of kept units.
        onnx: Paths in the repository of the ONNX files.
        tokenizer: Whether the repository has a tokenizer; by default whether the folder has one.
    """

    repo_id: str | None = None
    base_model: str | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    metrics: Sequence[str] = ()
    recipe: str | None = None
    command: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    task: str | None = None
    plot: str | None = None
    onnx: Sequence[str] = ()
    tokenizer: bool | None = None


@dataclass(frozen=True)
class Known:
    """Everything that one card is written from."""

    said: CardFacts
    told: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """How the run was done, as its report says."""
        return dict(self.told.get("settings", {}))

    @property
    def plan(self) -> Mapping[str, Any]:
        """What the config says about pruning."""
        plan = self.config.get(BLOCK)
        return plan if isinstance(plan, Mapping) else {}

    @property
    def pruned(self) -> bool:
        """Whether a plan or a report says that it was, or there are no files to say so."""
        reported = self.told.get("kept") or self.told.get("pruned")
        return states_plan(self.config) or bool(reported) or not self.config

    @property
    def architecture(self) -> str:
        """The model's class."""
        named = self.config.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else ""
        return name if name.isidentifier() else ""

    @property
    def title(self) -> str:
        """The repository's name, else the dense model's, else the recipe's, else the folder's."""
        named, base = self.said.repo_id, self.base_model
        if base and not named:
            return one_line(f"{Path(base).name}, pruned")
        named = named or self.settings.get("recipe") or self.plan.get("recipe")
        return one_line(Path(str(named or self.folder or "Pruned model")).name)

    @property
    def task(self) -> str | None:
        """The Hub's pipeline tag."""
        stated = self.said.task or self.settings.get("task")
        known = isinstance(stated, str) and re.fullmatch(r"[a-z0-9-]{1,60}", stated)
        return _HUB_NAMES.get(str(stated), stated) if known else HUB_TASKS.get(head_of(self.architecture))

    @property
    def base_model(self) -> str | None:
        """Name or folder of the dense model."""
        found = self.said.base_model or self.settings.get("base_model") or self.plan.get("base_model")
        return one_line(found) if isinstance(found, (str, os.PathLike)) and str(found) else None

    @property
    def datasets(self) -> list[str]:
        """Names or folders of the data."""
        found = self.said.datasets or self.settings.get("datasets") or ()
        names = [found] if isinstance(found, str) else found if isinstance(found, (list, tuple)) else []
        return [one_line(name) for name in names[:20] if isinstance(name, (str, os.PathLike))]

    @property
    def terms(self) -> dict[str, str]:
        """License, and its name and link where it is not one of the Hub's list."""
        source: Mapping[str, Any] = vars(self.said) if self.said.license else self.settings
        return sound_terms(source)

    @property
    def metrics(self) -> dict[str, Mapping[str, float]]:
        """Scores that compare models; a loss does not, its scale is the training's own."""
        return {name: value for name, value in self.told.get("metrics", {}).items() if name != "loss"}


def as_dict(report: Report | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a report's fields; an empty mapping where there is no report."""
    if report is None or isinstance(report, Mapping):
        return report or {}
    return report.to_dict()


def read_config(folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the folder's config.json; empty where there is none."""
    path = Path(folder or "") / "config.json"
    return read_json(path) if folder is not None and path.is_file() else {}


def read_text(folder: Path, name: str) -> str:
    """Return a text of the folder itself; empty where there is none, or a link to somebody's file elsewhere."""
    path = folder / name
    if not is_inside(folder, path) or path.stat().st_size > _LARGEST_TEXT:
        return ""
    return path.read_text("utf-8", errors="replace")


def find_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a saved model: from its folder, or from beside it, where a run writes it.

    The one beside may speak of another folder (of the dense model, say); it counts where it names the same kept units.
    """
    for path in (folder / REPORT, folder.absolute().parent / REPORT):
        if is_inside(path.parent, path):
            told = read_json(path)
            if path.parent == folder or _same_plan(told, read_config(folder).get(BLOCK)):
                return told
    return None


def _same_plan(told: Mapping[str, Any], plan: Mapping[str, Any] | None) -> bool:
    """Whether a report and a config speak of the same kept units."""
    if plan is None:
        return False
    kept = sound(told)["kept"]
    try:
        planned = {name: decode_units(name, text)[0] for name, text in (plan.get("kept") or {}).items()}
    except (CheckpointError, AttributeError):
        return False
    return all(kept.get(name) == units for name, units in planned.items())


def inherited_license(base: str | None, *, token: str | None = None, revision: str | None = None) -> dict[str, str]:
    """Return the license that the dense model's own card names; empty where it names none or cannot be read.

    Args:
        base: A folder with a README.md, or a name on the Hub.
        token: For a private repository; by default the one of the login.
        revision: Branch, tag or commit on the Hub.

    Returns:
        ``license``, and ``license_name`` and ``license_link`` where given.
    """
    from huggingface_hub import HfApi

    if not base or not isinstance(base, str):
        return {}
    try:
        if Path(base).is_dir():
            data = header(read_text(Path(base), CARD))
        else:
            found = HfApi(token=token).model_info(base, revision=revision, timeout=10).card_data
            data = found.to_dict() if found is not None else {}
    except Exception:  # offline, unknown, private, malformed: the card then says nothing about a license
        return {}
    return {key: value for key, value in sound_terms(data).items() if _readable_elsewhere(key, value)}


def header(text: str) -> dict[str, Any]:
    """Return the metadata of a card that may be anybody's; empty where there is none that can be read."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        told = read_yaml(match[1], "The metadata") if match else None
    except RecipeError:
        return {}
    return told if isinstance(told, dict) else {}


def sound_terms(source: Mapping[str, Any]) -> dict[str, str]:
    """Return license, name and link as short texts; what cannot be one is left out."""
    stated = {key: source.get(key) for key in _TERMS}
    texts = {key: one_line(value) for key, value in stated.items() if isinstance(value, str)}
    return {key: value for key, value in texts.items() if _TERM[key].fullmatch(value)}


def _readable_elsewhere(key: str, value: str) -> bool:
    """Whether a term means something in another repository; a link to a file beside the old card does not."""
    return key != "license_link" or value.startswith(("https://", "http://"))


def head_of(architecture: str) -> str:
    """Return what follows ``For`` in a class name: ``BertForMaskedLM`` -> ``MaskedLM``."""
    match = re.search(r"For([A-Z]\w+)$", architecture)
    return match[1] if match else ""


def on_hub(name: str | None) -> bool:
    """Whether a name can be a repository's; folders on this machine must not reach the metadata."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return False
    return not Path(name or "").exists()


def mention(name: str | None) -> str | None:
    """Return a name for readers: a folder's own name instead of its path."""
    return name if name is None or on_hub(name) else Path(name).name
