"""What `hf-prune inspect` shows: the units of a model, and whether removing them equals masking them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .architectures import inspect_model, prunable_macs
from .checkpoint import load_pruned
from .errors import PruningError, visible
from .files import no_model
from .plan import read_record
from .report import random_inputs
from .selfcheck import verify
from .structure import live_shapes, unit_cost


def load(model: str) -> Any:
    """Load a model in float32 as the class it was saved as; of sentence-transformers' folders the encoder in it.

    Raises:
        PruningError: There is none.
    """
    from transformers import AutoModel

    try:
        part = AutoModel if (Path(model) / "modules.json").is_file() else None
        return load_pruned(model, model_class=part, dtype=torch.float32)
    except OSError as error:
        raise PruningError(no_model("MODEL", model, error)) from error


def lane() -> str:
    """Say which way of exporting to ONNX is installed."""
    if find_spec("optimum") and find_spec("optimum.exporters"):
        return "optimum: ONNX export by optimum"
    if find_spec("onnxscript"):
        return "v5: ONNX export by transformers"
    return "no ONNX export: install an extra, optimum or onnx"


def show_model(model: Any, console: Console) -> None:
    """Show which units can be removed, which cannot and why, and what a pruned model has lost."""
    record, shapes, found = read_record(model), live_shapes(model), inspect_model(model)
    table = Table("group", "kind", "units", "of", "MACs per unit")
    for group in found.groups:
        cost = unit_cost(group, found.groups, shapes)
        table.add_row(group.name, group.kind, str(group.units), str(record.dense_units(group)), f"{cost:,.0f}")
    console.print(table)
    for refusal in found.refusals:
        console.print(visible(f"not offered: {refusal.place}, because {refusal.reason}"), highlight=False)
    console.print(f"{type(model).__name__}: {prunable_macs(model):,} prunable multiply-accumulates per token")


def show_proof(model: Any, console: Console) -> bool:
    """Show how far masked and shrunk copies are apart, and return whether that is near enough."""
    found = verify(model, random_inputs(model, 2, 16))
    table = Table("kind", "masked against shrunk", "effect on the output", "verdict")
    for kind, difference in found.differences.items():
        verdict = "equal" if difference <= found.tolerance else "DIFFERENT"
        table.add_row(kind, f"{difference:.1e}", f"{found.effects[kind]:.1e}", verdict)
    for kind, reason in found.failures.items():
        table.add_row(kind, "", "", f"FAILED: {reason}")
    console.print(table)
    console.print("This model can be pruned exactly." if found.passed else "Do not prune what is not equal.")
    return bool(found.passed)
