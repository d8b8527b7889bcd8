"""The command `hf-prune`: everything the library does, from a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import shared_options as shared
from .errors import PruningError, visible

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make any Hugging Face transformer smaller and really faster, "
    "and publish a checkpoint that anyone can load.\n\n"
    "Start with [bold]hf-prune run quickstart[/]: offline, a few minutes on two cores.",
)
# paths, names and errors are text: what looks like markup or an emoji's name in them is neither
console = Console(markup=False, emoji=False)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Hold what goes before every command."""


@app.command()
def run(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe's name (see [bold]hf-prune list recipes[/]) or a YAML file."),
    ] = None,
    overrides: shared.OVERRIDES = None,
    model: shared.MODEL = None,
    data: shared.DATA = None,
    data_config: shared.CONFIG = None,
    task: shared.TASK = None,
    text: shared.TEXT = None,
    image: shared.IMAGE = None,
    audio: shared.AUDIO = None,
    label: shared.LABEL = None,
    macs: shared.MACS = None,
    speedup: shared.SPEEDUP = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Search for the smallest that loses at most so much of the metric: 0.01.")
    ] = None,
    teacher: shared.TEACHER = "self",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
) -> None:
    """Run a recipe: train, prune, distil, save, reload, export, measure, card.

    With --model and --data no recipe is needed: task, columns, splits and metric are guessed, it is said what was
    guessed, and the recipe lies in the run's folder. A fine-tuned model is not trained again.

    Examples: [bold]hf-prune run quickstart target.macs=0.25[/],
    [bold]hf-prune run --model my-bert --data reviews.csv --speedup 2[/]
    """
    from .commands import run_guessed, run_told, wish_of

    told: dict[str, Any] = {"text": text, "image": image, "audio": audio, "label": label, "teacher": teacher}
    told |= {"config": data_config, "task": task, "output": output}
    budgets = {"macs": macs, "speedup": speedup, "max_drop": max_drop}
    if model is None and data is None and recipe is not None:
        run_told(recipe, overrides or [], **told, **budgets)
        return
    run_guessed(wish_of(model, data, budgets, recipe, **told), [*filter(None, [recipe]), *(overrides or [])], max_drop)


@app.command()
def init(
    overrides: shared.OVERRIDES = None,
    model: shared.MODEL = None,
    data: shared.DATA = None,
    data_config: shared.CONFIG = None,
    task: shared.TASK = None,
    text: shared.TEXT = None,
    image: shared.IMAGE = None,
    audio: shared.AUDIO = None,
    label: shared.LABEL = None,
    macs: shared.MACS = None,
    speedup: shared.SPEEDUP = None,
    teacher: shared.TEACHER = "self",
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the recipe that [bold]hf-prune run --model --data[/] would run, with a comment at every key.

    Example: [bold]hf-prune init --model my-bert --data reviews.csv --macs 0.3 -o reviews.yaml[/]
    """
    from .commands import wish_of, write_recipe

    told: dict[str, Any] = {"text": text, "image": image, "audio": audio, "label": label, "teacher": teacher}
    wish = wish_of(model, data, {"macs": macs, "speedup": speedup}, config=data_config, task=task, **told)
    _say(f"Written: {write_recipe(wish, overrides or [], output, force=force)}")


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: shared.OVERRIDES = None,
    as_json: shared.JSON = False,
) -> None:
    """Check a recipe with its model and data: keys, columns, metrics, target, folder. Nothing is trained or written.

    Example: [bold]hf-prune validate reviews.yaml target.macs=0.25[/]
    """
    from .commands import facts_of

    facts = facts_of(recipe, overrides or [])
    lines = [*(f"{name:<12}{value}" for name, value in facts.items()), "This recipe can run."]
    typer.echo(json.dumps(facts, indent=2) if as_json else visible("\n".join(lines)))


@app.command()
def inspect(
    model: shared.MODEL_ARGUMENT,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try it on copies: does removing random units equal masking them?")
    ] = False,
) -> None:
    """Show which units of a model can be removed, which cannot and why, and what a pruned one has lost.

    Example: [bold]hf-prune inspect bert-base-uncased --verify[/]
    """
    from .inspecting import load, show_model, show_proof

    loaded = load(model)
    show_model(loaded, console)
    if verify and not show_proof(loaded, console):
        raise typer.Exit(1)


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe with a target, whose key changes between trials.")],
    overrides: shared.OVERRIDES = None,
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
    from .commands import search_told

    found = search_told(
        recipe, overrides or [], max_drop=max_drop, metric=metric, trials=trials, storage=storage, output=output
    )
    typer.echo(found.table())
    if found.best:
        console.print(f"The smallest: {visible(str(found.best.folder))}", highlight=False, soft_wrap=True)


@app.command()
def sensitivity(
    what: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or with --data a folder or Hub name.")],
    overrides: shared.OVERRIDES = None,
    data: shared.DATA = None,
    data_config: shared.CONFIG = None,
    task: shared.TASK = None,
    text: shared.TEXT = None,
    image: shared.IMAGE = None,
    audio: shared.AUDIO = None,
    label: shared.LABEL = None,
    split: Annotated[str | None, typer.Option(help="Split of --data; by default the one to train on.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure the loss on, drawn at random.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one batch.")] = 32,
    share: Annotated[list[float] | None, typer.Option(help="Of a layer's units that go; several times.")] = None,
    score: Annotated[str, typer.Option(help="What chooses them: see [bold]hf-prune list scores[/].")] = "taylor",
    csv: Annotated[Path | None, typer.Option(help="Write every loss to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure how much the loss rises when parts of each layer go: heads, neurons, whole branches, whole layers.

    Nothing is trained or changed; a recipe that trains its dense model first does that once. With --data, task and
    columns are guessed as by [bold]hf-prune run[/].

    Examples: [bold]hf-prune sensitivity quickstart --plot map.png[/],
    [bold]hf-prune sensitivity my-bert --data sst2.parquet --text sentence[/]
    """
    from .batches import Told, sensitivity_of
    from .commands import wish_beside
    from .report.display import check_picture

    check_picture(plot)
    named: dict[str, Any] = {"task": task, "text": text, "image": image, "audio": audio, "label": label}
    wish = wish_beside(what, data, config=data_config, **named)
    found = sensitivity_of(what, overrides or [], Told(wish, split, rows, batch_size), share, score)
    typer.echo(found.table())
    for path, write in ((csv, found.to_csv), (plot, found.plot)):
        if path is not None:
            write(path)
            console.print(f"Written: {visible(str(path))}", highlight=False, soft_wrap=True)


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="Such as scores; left out, what there is is shown.")] = None,
    as_json: shared.JSON = False,
) -> None:
    """List what can be named in a recipe: scores, schedules, rules, tasks, metrics, recipes, architectures, ….

    Example: [bold]hf-prune list scores[/]
    """
    from .listing import LISTS, listed, show_rows

    rows = [{"list": name} for name in LISTS] if what is None else listed(what)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    show_rows(rows)


@app.command()
def measure(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders or Hub names, the dense one first; ONNX folders; or a run."),
    ],
    batch: Annotated[str, typer.Option(metavar="N[,N]...", help="Rows in one forward.")] = "1",
    length: Annotated[str | None, typer.Option(metavar="N[,N]...", help="Tokens in a row; else 128, or fewer.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side; by default the config's.")] = None,
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
    from .inspecting import load
    from .measuring import measure_models, numbers_of, told

    sizes = {"batches": numbers_of(batch, "--batch"), "lengths": numbers_of(length, "--length") if length else None}
    how: dict[str, Any] = {"image_size": image_size, "threads": threads, "repeats": repeats, "compiled": compiled}
    done = measure_models(models, load, **sizes, **how, tell=_say)
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
    model: shared.MODEL_ARGUMENT,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show repository, files and card.")] = False,
) -> None:
    """Publish a pruned model with its card, report, recipe, plot and ONNX files in one commit, and read it back.

    The token is that of [bold]hf auth login[/] or HF_TOKEN.
    """
    from .commands import told_of_plan
    from .hub import Plan, onnx_beside, push_pruned

    settings: dict[str, Any] = {"private": private or None, "revision": revision, "verify": verify, "dry_run": dry_run}
    done = push_pruned(str(folder), repo_id, onnx=onnx or onnx_beside(folder), **settings)
    if isinstance(done, Plan):
        console.print(visible(told_of_plan(done)), highlight=False, soft_wrap=True)
    else:
        compared = "; downloaded again, every file and tensor equal" if verify else ""
        console.print(f"Published: {done.commit_url}{compared}", soft_wrap=True)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved model.")],
    repo_id: Annotated[str | None, typer.Option("--repo", help="Name on the Hub, for title and snippet.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the dense model.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="By default the dense model's own.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that a hand wrote or changed.")] = False,
) -> None:
    """Write a saved model's README.md again, from its config.json and the report.json in or beside the folder."""
    from .card import write_card

    written = write_card(folder, force=force, repo_id=repo_id, base_model=base_model, license=license_)
    console.print(f"Written: {visible(str(written))}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of a saved model.")],
    dense: Annotated[str | None, typer.Option(help="The dense model; by default what DIR's files say.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option(help="Let Gradio's own server make a public address of it.")] = False,
) -> None:
    """Try a pruned model beside its dense one in the browser, on a text or an image of your own.

    It shows what both answer, how long they take on that input, what they weigh and which units were kept. Nothing
    leaves this machine unless you say --share. Needs the extra [bold]demo[/].

    Example: [bold]hf-prune demo runs/quickstart[/]
    """
    from .demo import open_demo

    open_demo(folder, dense=dense, port=port, share=share)


@app.command()
def doctor() -> None:
    """Show versions, the lane, and what works here."""
    from .inspecting import lane
    from .report import environment

    console.print_json(json.dumps({**environment(), "lane": lane()}, default=str))


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


if __name__ == "__main__":
    main()
