"""The page, by Gradio: served to this machine alone, and asking no other host for anything."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import PruningError, visible
from ..page.pictures import COLOURS, DARK, Picture, kept_pictures
from ..page.writing import speed_up
from ..report import Report
from ..report.display import html_table
from .answers import Cell, Row
from .comparing import Pair, load_pair

_HERE = Path(__file__).parent
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_ASKS = {"text": ("Text",), "texts": ("Text", "Second text, for a model of pairs")}
Asgi = Callable[..., Awaitable[None]]


class OwnHostOnly:
    """What lets a browser ask no host but the page's own, whatever Gradio puts into it."""

    def __init__(self, app: Asgi) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer as the app does, with a policy in every head."""

        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def open_demo(folder: str | Path, *, dense: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Show a pruned model beside its dense one in the browser, until Ctrl-C.

    Args:
        folder: A run's folder, or that of a saved model.
        dense: Folder or Hub name of the dense model; by default what the folder's files say.
        port: Of this machine, 1 to 65535; by default the first free one from 7860 on.
        share: Whether Gradio makes a public address for three days at most, through its own server.

    Raises:
        PruningError: Gradio is missing, the port is taken, or the folder's models cannot be shown.
    """
    _check_gradio()
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    pair = load_pair(folder, dense)
    for note in pair.notes:
        console.print(visible(note), soft_wrap=True)
    blocks, address = serve(pair, port=port, share=share)
    console.print(f"Look at {address} (Ctrl-C ends it)", soft_wrap=True)
    blocks.block_thread()


def serve(pair: Pair, *, port: int | None = None, share: bool = False) -> tuple[Any, str]:
    """Serve the page from a thread.

    Returns:
        Gradio's app, whose ``close`` ends it, and the page's address.

    Raises:
        PruningError: Gradio is missing, or the port is taken.
    """
    gradio = _check_gradio()
    from starlette.middleware import Middleware

    blocks = _blocks(gradio, pair)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, local, public = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            theme=gradio.themes.Default(primary_hue="blue", **fonts),
            css=_style(),
            footer_links=[],
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        )
    except OSError as error:
        raise PruningError(f"--port must be a free one, such as 7861. Received: {port} ({error})") from error
    return blocks, public or local


def _check_gradio() -> Any:
    """Return Gradio, which must tell nobody that it is used."""
    if find_spec("gradio") is None:
        raise PruningError("The demo needs Gradio: pip install 'hf_prune[demo]'. Received: no package gradio")
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio

    return gradio


def _blocks(gradio: Any, pair: Pair) -> Any:
    def compare(*given: Any) -> tuple[str, str]:
        try:
            return _compared(pair, *given)
        except PruningError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    title, example = f"{_short(pair.folder)}, pruned", pair.example()
    first_answers, first_costs = _compared(pair, example)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gradio.HTML(_head(pair))
        with gradio.Row(equal_height=False):
            with gradio.Column():
                asked = _questions(gradio, pair.head.asks, example)
                button = gradio.Button("Compare", variant="primary")
                answers = gradio.HTML(first_answers)
            with gradio.Column():
                costs = gradio.HTML(first_costs)
        gradio.HTML(_kept(pair.report))
        triggers = [button.click, *(one.submit for one in asked if hasattr(one, "submit"))]
        gradio.on(triggers, compare, asked, [answers, costs], api_name="compare", concurrency_limit=1)
    return blocks


def _questions(gradio: Any, asks: str, example: Any) -> list[Any]:
    if asks == "image":
        return [gradio.Image(example, type="pil", label="Image", sources=["upload", "clipboard"], height=260)]
    first, *others = _ASKS[asks]
    return [gradio.Textbox(example, label=first, lines=2), *(gradio.Textbox(label=label) for label in others)]


# what stands in it
def _compared(pair: Pair, *given: Any) -> tuple[str, str]:
    found = pair.compare(*given)
    return _answers(found.rows), _costs(found.report)


def _style() -> str:
    """Return the colours of pictures, light and dark, and the page's own rules."""
    light, dark = ("".join(f"--{name}: {value}; " for name, value in one.items()) for one in (COLOURS, DARK))
    return f":root {{ {light}}}\n.dark {{ {dark}}}\n{(_HERE / 'page.css').read_text('utf-8')}"


def _short(folder: str | Path) -> str:
    return "/".join(Path(folder).parts[-2:])


def _head(pair: Pair) -> str:
    dense = f"beside its dense model <code>{escape(_short(pair.dense))}</code>" if pair.dense else "alone"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in pair.notes)
    return f"<h1><code>{escape(_short(pair.folder))}</code> {dense}</h1>{notes}"


def _answers(rows: list[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name in rows[0].cells) if rows else ""
    lines = "".join(map(_line, rows))
    return f'<table class="answers"><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _line(row: Row) -> str:
    cells = "".join(map(_cell, row.cells.values()))
    return f'<tr class="{"differs" if row.differs else ""}"><td>{escape(row.what)}</td>{cells}</tr>'


def _cell(cell: Cell) -> str:
    if cell.share is None:
        return f"<td>{escape(cell.said)}</td>"
    bar = f'<span class="bar" style="--share: {cell.share:.4f}"></span>'
    return f"<td>{escape(cell.said)} {cell.share:.1%}{bar}</td>"


def _costs(report: Report) -> str:
    faster = speed_up(report)
    headline = f"<h2>{faster[1]:.2f} times as fast on this input</h2>" if faster else ""
    return f'{headline}<div class="wide">{html_table(report)}</div>'


def _kept(report: Report) -> str:
    pictures = "".join(map(_figure, kept_pictures(report)))
    return f'<div class="kept">{pictures}</div>' if pictures else ""


def _figure(one: Picture) -> str:
    picture = f'<div class="wide" role="group" aria-label="{escape(one.says)}">{one.svg()}</div>'
    return f"<div><h2>{escape(one.title)}</h2>{picture}</div>"
