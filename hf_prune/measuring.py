"""What `hf-prune measure` does: find the models that were named, and time them over a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .card import REPORT
from .errors import PruningError
from .files import read_json
from .report import Grid, Measurement, Report, measure_grid
from .report.display import markdown_table, table_rows

_WIDTH = 140  # of tables, in characters
_LENGTH = 128  # tokens in a row, where nobody says
_COLUMNS = ("model", "runtime", "input", "median, ms", "90th percentile", "speed", "peak, MB", "")


def numbers_of(text: str, what: str) -> list[int]:
    """Return the numbers of ``1,8,32``.

    Raises:
        PruningError: They are no numbers from 1 on.
    """
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise PruningError(
            f"{what} must be numbers from 1 on with commas between them, such as 1,8. Received: '{text}'"
        )
    return found


def find_models(words: Sequence[str]) -> dict[str, str]:
    """Return name -> folder of every model that was named; a run's folder names all it holds, dense ones first."""
    found: dict[str, str] = {}
    for word in words:
        folder = Path(word).expanduser()
        is_run = (folder / REPORT).is_file() and not (folder / "config.json").is_file()
        names = _of_a_run(folder) if is_run else {folder.name or word: word}
        for name, place in names.items():
            found[name if name not in found else place] = place
    return found


def _of_a_run(folder: Path) -> dict[str, str]:
    torch = [folder / name for name in ("dense", "model") if (folder / name / "config.json").is_file()]
    onnx = sorted(path.parent for path in folder.glob("*/model.onnx"))
    onnx.sort(key=lambda path: "dense" not in path.name)
    return {path.name: str(path) for path in [*torch, *onnx]}


def measure_models(
    words: Sequence[str],
    load: Callable[[str], Any],
    *,
    lengths: Sequence[int] | None = None,
    tell: Callable[[str], None] = print,
    **settings: Any,
) -> Grid:
    """Time the models of these folders or names over a grid.

    Args:
        words: Folders of models, ONNX exports or runs, or names on the Hub.
        load: Loads a model of torch.
        lengths: Tokens in a row; by default 128, or the most that all models read.
        tell: Is told where it is fewer, and what is measured again.
        settings: As in `measure_grid`.

    Raises:
        PruningError: A run's folder holds no model, a model cannot be read or timed, or a length is more than
            it reads.
    """
    places = find_models(words)
    if not places:
        raise PruningError(f"measure needs a folder with a model in it. Received: {', '.join(words)}")
    models = {name: _model(place, load) for name, place in places.items()}
    for name, place in places.items():
        if not isinstance(models[name], Path) and (saved := _saved_in(place)) != "float32":
            tell(f"'{name}' is saved in {saved}, and measured in float32: its file is smaller than its size here")
    read = {name: most for name, model in models.items() if (most := _most_tokens(model)) is not None}
    least = min(read, key=lambda name: read[name], default="")
    if lengths is None:
        lengths = [min(_LENGTH, read.get(least, _LENGTH))]
        if lengths[0] < _LENGTH:
            tell(f"{lengths[0]} tokens in a row, as '{least}' reads no more; --length says another number")
    elif read and max(lengths) > read[least]:
        raise PruningError(
            f"--length must be at most {read[least]}, as '{least}' reads no more tokens. Received: {max(lengths)}"
        )
    return measure_grid(models, lengths=lengths, tell=tell, **settings)


def _saved_in(place: str) -> str:
    """Return what a folder's config says of its numbers, ``"bfloat16"`` for example; of a name on the Hub nothing."""
    file = Path(place).expanduser() / "config.json"
    told = read_json(file) if file.is_file() else {}
    said = told.get("dtype") or told.get("torch_dtype") or "float32"  # the latter up to transformers 4.55
    return said if said in ("bfloat16", "float16") else "float32"


def _most_tokens(model: Any) -> int | None:
    """Return how many tokens a model reads at most, by its table of positions; ``None``: it has none, or is a file."""
    config = getattr(model, "config", None)
    said = getattr(getattr(config, "text_config", None) or config, "max_position_embeddings", None)
    for name, module in model.named_modules() if isinstance(said, int) else ():
        is_table = isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        if is_table and 0 <= module.num_embeddings - said <= 2:  # two rows more in families that leave two free
            return said if module.padding_idx is None else said - module.padding_idx - 1  # counted from behind padding
    return None  # positions are turned, or distances: they end nowhere


def _model(place: str, load: Callable[[str], Any]) -> Any:
    path = Path(place).expanduser()
    weights = path.is_dir() and any(path.glob("*.safetensors"))
    is_onnx = path.suffix == ".onnx" or ((path / "model.onnx").is_file() and not weights)
    return path if is_onnx else load(place).eval()


def told(grid: Grid, threads: int) -> str:
    """Return what was measured as text: counts of the first two models of torch, the grid, what is unsteady."""
    live = {name: one for name, one in grid.counted.items() if one.macs is not None}
    counts = [_counts(dict([*live.items()][:2]))] if live else []
    grid_table = markdown_table(_COLUMNS, list(grid.rows()), left=3, width=_WIDTH)
    here = f"{threads} thread{'s' * (threads > 1)} in every runtime on {grid.environment['cpu']}; each in turn."
    unsteady = len(grid.unsteady)
    warning = f"\n{unsteady} of {len(grid.timings)} figures are unsteady: something else runs here." if unsteady else ""
    return "\n\n".join([*counts, f"{grid_table}\n{here}{warning}"])


def _counts(models: Mapping[str, Measurement]) -> str:
    """Return what was counted of one model or of two, under their own names: the first may be a pruned one."""
    first, second = (*models.values(), None)[:2]
    rows = [*table_rows(Report(dense=first, pruned=second))]
    if second is None:
        return markdown_table(("", *models), [row[:2] for row in rows], width=_WIDTH)
    return markdown_table(("", *models, "change"), rows, width=_WIDTH)
