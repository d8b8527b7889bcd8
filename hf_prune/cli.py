"""The command `hf-prune`: everything the library does, from a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import PruningError, did_you_mean, visible

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Make any Hugging Face transformer smaller and really faster, "
    "and publish a checkpoint that anyone can load.\n\n"
    "Start with [bold]hf-prune run quickstart[/]: offline, a few minutes on two cores.",
)
# paths, names and errors are text: what looks like markup or an emoji's name in them is neither
console = Console(markup=False, emoji=False)
MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or name on the Hub.")]


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe's name (see [bold]hf-prune list recipes[/]) or a YAML file.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
) -> None:
    """Run a recipe: train, prune, distil, save, reload, export, measure, card.

    Examples: [bold]hf-prune run quickstart target.macs=0.25[/], [bold]hf-prune run minilm_sst2 seed=1[/]
    """
    from .workflow import run as run_recipe

    run_recipe(recipe, overrides or [])


@app.command()
def inspect(
    model: MODEL,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try it on copies: does removing random units equal masking them?")
    ] = False,
) -> None:
    """Show which units of a model can be removed, which cannot and why, and what a pruned one has lost.

    Example: [bold]hf-prune inspect bert-base-uncased --verify[/]
    """
    from .architectures import inspect_model, prunable_macs
    from .plan import read_record
    from .structure import live_shapes, unit_cost

    loaded = _load(model)
    record, shapes, found = read_record(loaded), live_shapes(loaded), inspect_model(loaded)
    table = Table("group", "kind", "units", "of", "MACs per unit")
    for group in found.groups:
        cost = unit_cost(group, found.groups, shapes)
        table.add_row(group.name, group.kind, str(group.units), str(record.dense_units(group)), f"{cost:,.0f}")
    console.print(table)
    for refusal in found.refusals:
        console.print(visible(f"not offered: {refusal.place}, because {refusal.reason}"), highlight=False)
    console.print(f"{type(loaded).__name__}: {prunable_macs(loaded):,} prunable multiply-accumulates per token")
    if verify:
        _verify(loaded)


def _verify(model: Any) -> None:
    """Show how far masked and shrunk copies are apart, and exit with 1 where they are too far."""
    from .report import random_inputs
    from .selfcheck import verify

    found = verify(model, random_inputs(model, 2, 16))
    table = Table("kind", "masked against shrunk", "effect on the output", "verdict")
    for kind, difference in found.differences.items():
        verdict = "equal" if difference <= found.tolerance else "DIFFERENT"
        table.add_row(kind, f"{difference:.1e}", f"{found.effects[kind]:.1e}", verdict)
    for kind, reason in found.failures.items():
        table.add_row(kind, "", "", f"FAILED: {reason}")
    console.print(table)
    console.print("This model can be pruned exactly." if found.passed else "Do not prune what is not equal.")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a target, whose key changes between trials.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    max_drop: Annotated[float, typer.Option(help="How much of the metric may be lost, absolute.")] = 0.01,
    metric: Annotated[str | None, typer.Option(help="By default the recipe's first.")] = None,
    trials: Annotated[int, typer.Option(help="How many end at most, of all processes together.")] = 8,
    storage: Annotated[str | None, typer.Option(help="Database for several processes: sqlite:///… or another.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; by default the recipe's, with -search.")] = None,
) -> None:
    """Search for the smallest model that is good enough: run a recipe with one target after the other.

    The dense model is trained once, and trials go on from the last good model. Killed, it goes on where it was when
    the same command is given again. Needs the extra [bold]search[/].

    Example: [bold]hf-prune search quickstart --max-drop 0.02 --trials 6[/]
    """
    from .searching import search as search_for

    found = search_for(
        recipe, overrides or [], max_drop=max_drop, metric=metric, trials=trials, storage=storage, output=output
    )
    typer.echo(found.table())
    if found.best:
        console.print(f"The smallest: {visible(str(found.best.folder))}", highlight=False, soft_wrap=True)


@app.command()
def sensitivity(
    what: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or with --data a folder or Hub name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to a recipe.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Of a model: data set on the Hub, folder, file or digits.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Column with the text; twice for pairs.")] = None,
    image: Annotated[str | None, typer.Option(help="Column with image arrays.")] = None,
    label: Annotated[str, typer.Option(help="Column with the label; language models need none.")] = "label",
    split: Annotated[str, typer.Option(help="Split of --data.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure the loss on, drawn at random.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one batch.")] = 32,
    share: Annotated[list[float] | None, typer.Option(help="Of a layer's units that go; several times.")] = None,
    score: Annotated[str, typer.Option(help="What chooses them: see [bold]hf-prune list scores[/].")] = "taylor",
    csv: Annotated[Path | None, typer.Option(help="Write every loss to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure how much the loss rises when parts of each layer go: heads, neurons, whole branches, whole layers.

    Nothing is trained or changed; a recipe that trains its dense model first does that once.

    Examples: [bold]hf-prune sensitivity quickstart --plot map.png[/],
    [bold]hf-prune sensitivity my-bert --data sst2.parquet --text sentence[/]
    """
    from . import layerwise
    from .batches import Told, model_and_batches

    told = Told(data, text or (), image, label, split, rows, batch_size)
    model, batches = model_and_batches(what, overrides or [], told)
    found = layerwise.sensitivity(model, batches, shares=share or layerwise.SHARES, score=score, batches=len(batches))
    typer.echo(found.table())
    for path, write in ((csv, found.to_csv), (plot, found.plot)):
        if path is not None:
            write(path)
            console.print(f"Written: {visible(str(path))}", highlight=False, soft_wrap=True)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="scores, schedules, allocations, architectures or recipes.")],
) -> None:
    """List what can be named in a recipe."""
    lists = {
        "scores": _scores,
        "schedules": lambda: _functions("schedules", "SCHEDULES"),
        "allocations": lambda: _functions("allocation", "ALLOCATIONS"),
        "architectures": _architectures,
        "recipes": _recipes,
    }
    if what not in lists:
        raise PruningError(f"Lists are {', '.join(lists)}.{did_you_mean(what, lists)} Received: '{what}'")
    console.print(lists[what]())


@app.command()
def measure(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders or Hub names, the dense one first; ONNX folders; or a run's folder."
        ),
    ],
    batch: Annotated[str, typer.Option(metavar="N[,N]...", help="Rows in one forward.")] = "1",
    length: Annotated[str, typer.Option(metavar="N[,N]...", help="Tokens in a row.")] = "128",
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operator, in every runtime.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed forwards of each; the median counts.")] = 20,
    compiled: Annotated[bool, typer.Option("--compile", help="Also time what torch.compile makes of them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for scripts and reports.")] = False,
) -> None:
    """Count parameters and multiply-accumulates, and time the forward pass, of models in turn.

    Figures that scatter are measured again, and marked where they still do.

    Examples: [bold]hf-prune measure bert-base-uncased runs/x/model --batch 1,8 --length 32,128[/];
    [bold]hf-prune measure runs/x --json > runs/x/latency.json[/], which [bold]hf-prune report runs/x[/] then shows.
    """
    from .measuring import measure_models, numbers_of, told

    sizes = {"batches": numbers_of(batch, "--batch"), "lengths": numbers_of(length, "--length")}
    done = measure_models(models, _load, **sizes, threads=threads, repeats=repeats, compiled=compiled, tell=_say)
    typer.echo(json.dumps(done.to_dict(), indent=2) if as_json else told(done, threads))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that [bold]run[/] or [bold]search[/] wrote.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file; by default report.html in the run, of several here."),
    ] = None,
) -> None:
    """Show one run, or compare several, in one HTML file to look at and to send, and its pictures as PNG beside it.

    It needs no network. Latency over a grid of inputs is shown where the run's folder holds latency.json:
    [bold]hf-prune measure RUN --batch 1,8 --json > RUN/latency.json[/].

    Example: [bold]hf-prune report runs/quickstart[/]
    """
    from .page import write_page

    page, pictures = write_page(runs, output)
    console.print(f"{visible(str(page))}, and {len(pictures)} pictures beside it", highlight=False, soft_wrap=True)


@app.command()
def export(
    model: MODEL,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    task: Annotated[str, typer.Option(help="As in `hf_prune.export`; auto takes it from the model.")] = "auto",
    lane: Annotated[str, typer.Option(help="auto, optimum (transformers 4.57) or native (transformers 5).")] = "auto",
    atol: Annotated[
        float | None, typer.Option(min=0, help="Largest difference from torch; by default 1e-4, more for fewer bits.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="dynamic: int8. Static int8 needs data: a recipe's export.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    format: Annotated[str, typer.Option(help="onnx, openvino, executorch (transformers 5).")] = "onnx",
) -> None:
    """Export a model to ONNX, OpenVINO or ExecuTorch, in fp32 or smaller numbers, and compare it with torch."""
    from .exporting import export

    settings: dict[str, Any] = {"format": format, "quantize": quantize, "dtype": dtype, "task": task, "lane": lane}
    done = export(model, output, atol=atol, **settings)
    told = f"{done.task} by lane {done.lane}, {done.size_mb:.1f} MB of {done.dtype}, opset {done.opset}"
    console.print(f"{visible(str(done.path))}: {told}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Name on the Hub: user/model.")],
    onnx: Annotated[
        Path | None, typer.Option(help="Folder of an ONNX export to push along; by default that of the same run.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    verify: Annotated[bool, typer.Option(help="Download it again and compare.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be uploaded.")] = False,
) -> None:
    """Publish a pruned model with its card, report, recipe, plot and ONNX files in one commit, and read it back.

    The token is that of [bold]hf auth login[/] or HF_TOKEN.
    """
    from .hub import Plan, onnx_beside, push_pruned

    settings: dict[str, Any] = {"private": private or None, "revision": revision, "verify": verify, "dry_run": dry_run}
    done = push_pruned(str(folder), repo_id, onnx=onnx or onnx_beside(folder), **settings)
    if isinstance(done, Plan):
        for file in done:
            console.print(f"{file.size_bytes / 1e6:10.3f} MB  {visible(file.path)}", highlight=False, soft_wrap=True)
        for name, why in done.left.items():
            console.print(f" stays here   {visible(name)}: {why}", highlight=False, soft_wrap=True)
    else:
        compared = "; downloaded again, every file and tensor equal" if verify else ""
        console.print(f"Published: {done.commit_url}{compared}", soft_wrap=True)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model.")],
    repo_id: Annotated[str | None, typer.Option("--repo", help="Name on the Hub, for title and snippet.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the dense model.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Identifier; by default the dense model's own.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that a hand wrote or changed.")] = False,
) -> None:
    """Write a saved model's README.md again, from its config.json and the report.json in or beside the folder."""
    from .card import write_card

    written = write_card(folder, force=force, repo_id=repo_id, base_model=base_model, license=license_)
    console.print(f"Written: {visible(str(written))}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show versions, the lane, and what works here."""
    from .report import environment

    found = environment()
    found["lane"] = _lane()
    console.print_json(json.dumps(found, default=str))


def main() -> None:
    """Run the command; an error of ours is one line and exit status 1."""
    try:
        app()
    except PruningError as error:
        said = Text.assemble(("Error:", "red"), " ", visible(str(error)))
        Console(stderr=True, highlight=False).print(said, soft_wrap=True)
        sys.exit(1)


def _say(text: str) -> None:
    Console(stderr=True, markup=False, emoji=False, highlight=False).print(visible(text), soft_wrap=True)


def _load(model: str) -> Any:
    """Load a model in float32 as the class it was saved as."""
    import torch

    from .checkpoint import load_pruned

    try:
        return load_pruned(model, dtype=torch.float32)
    except OSError as error:
        raise PruningError(f"MODEL must be a folder or a name on the Hub. Received: '{model}' ({error})") from error


def _lane() -> str:
    from importlib.util import find_spec

    if find_spec("optimum") and find_spec("optimum.exporters"):
        return "optimum: ONNX export by optimum"
    return (
        "v5: ONNX export by transformers"
        if find_spec("onnxscript")
        else "no ONNX export: install an extra, optimum or onnx"
    )


def _scores() -> Table:
    from .scores import SCORES

    table = Table("score", "of", "needs", "masks", "what", "paper")
    for name in sorted(SCORES):
        for of, score in SCORES[name].items():
            masks = "reversible" if score.reversible else "final"
            table.add_row(name, of, ", ".join(score.needs), masks, _first_line(score.function), score.paper)
    return table


def _functions(module: str, registry: str) -> Table:
    from importlib import import_module

    entries = getattr(import_module(f".{module}", __package__), registry)
    table = Table("name", "what")
    for name in entries:
        table.add_row(name, _first_line(entries[name]))
    return table


def _architectures() -> Table:
    from .architectures import ARCHITECTURES
    from .architectures.conventions import FEED_FORWARDS, FUSED, QUERY_KEY_VALUE

    table = Table("what", "by", "children")
    for names in (*QUERY_KEY_VALUE, *((name,) for name, _ in FUSED)):
        table.add_row("attention", "naming convention", ", ".join(names))
    for block in FEED_FORWARDS:
        table.add_row("feed-forward", "naming convention", f"{', '.join(block.up)}, {block.down}")
    for name in sorted(ARCHITECTURES):
        table.add_row(name, "its own function", _first_line(ARCHITECTURES[name]))
    return table


def _recipes() -> Table:
    from .recipe import shipped_recipes

    table = Table("recipe", "what")
    for name, path in shipped_recipes().items():
        comment = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        table.add_row(name, " ".join(comment))
    return table


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


if __name__ == "__main__":
    main()
