"""Arguments and options that several commands of `hf-prune` share."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_ARGUMENT = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or name on the Hub.")]
MODEL = Annotated[str | None, typer.Option("--model", "-m", help="Folder, or name on the Hub.")]
DATA = Annotated[
    str | None,
    typer.Option("--data", "-d", help="csv, tsv, json(l), parquet, txt; folder of them, images, sounds; a Hub name."),
]
CONFIG = Annotated[str | None, typer.Option("--data-config", help="Configuration of the data on the Hub.")]
TASK = Annotated[str | None, typer.Option(help="See [bold]hf-prune list tasks[/]; left out, it is guessed.")]
TEXT = Annotated[list[str] | None, typer.Option(help="Column with the text; twice for pairs.")]
IMAGE = Annotated[str | None, typer.Option(help="Column with the images.")]
AUDIO = Annotated[str | None, typer.Option(help="Column with the sounds.")]
LABEL = Annotated[list[str] | None, typer.Option(help="Column with the label; several of 0 and 1.")]
MACS = Annotated[float | None, typer.Option(help="Share of the multiply-accumulates that remains. [0.5]")]
SPEEDUP = Annotated[float | None, typer.Option(help="How many times as fast: 2, measured on this machine.")]
JSON = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
TEACHER = Annotated[str, typer.Option(help="self: the dense model teaches the small one; none.")]
OVERRIDES = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]
