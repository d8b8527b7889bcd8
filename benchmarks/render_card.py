"""Render a model card the way the Hub shows it, metadata first, and take its picture with headless Chromium.

python benchmarks/render_card.py model_cards/minilm_sst2 --picture model_cards/minilm_sst2/page.png

"""

from __future__ import annotations

import argparse
import html
import subprocess
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

STYLE = """
body { font: 16px/1.6 "DejaVu Sans", sans-serif; color: #1f2937; max-width: 60em; margin: auto; padding: 1.5em; }
h1, h2 { border-bottom: 1px solid #e5e7eb; padding-bottom: .2em; } img { max-width: 100%; }
table { border-collapse: collapse; margin: 1em 0; } th, td { border: 1px solid #e5e7eb; padding: .3em .8em; }
code { background: #f3f4f6; padding: .1em .3em; border-radius: 4px; font-size: .88em; overflow-wrap: anywhere; }
pre { background: #f3f4f6; padding: .8em; border-radius: 6px; white-space: pre-wrap; } pre code { padding: 0; }
.metadata { font-size: .85em; background: #f9fafb; } .metadata td { vertical-align: top; }
"""
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


def page(card: Path) -> str:
    """Return the card as HTML, its metadata as a table above."""
    loaded = ModelCard.load(card)
    metadata = yaml.safe_load(loaded.data.to_yaml())
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{_cell(value)}</td></tr>" for key, value in metadata.items())
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table").render(loaded.text)
    head = f"<!doctype html><meta charset=utf-8><base href='{card.parent.resolve().as_uri()}/'><style>{STYLE}</style>"
    return f"{head}<table class=metadata>{rows}</table>{markdown}"


def _cell(value: object) -> str:
    if isinstance(value, (list, dict)) and not all(isinstance(item, str) for item in value):
        return f"<pre>{html.escape(yaml.safe_dump(value, sort_keys=False))}</pre>"
    return html.escape(", ".join(value) if isinstance(value, list) else str(value))


def photograph(source: Path, picture: Path, height: int) -> None:
    """Take a picture of a local page, with a browser profile that is thrown away."""
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET, f"--user-data-dir={profile}"]
        shot = [f"--screenshot={picture.resolve()}", f"--window-size=1000,{height}", "--hide-scrollbars"]
        subprocess.run(["chromium", *flags, *shot, source.resolve().as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)  # small enough to commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--height", type=int, default=3080, help="pixels")
    parser.add_argument("--open-details", action="store_true", help="unfold what a reader can unfold")
    options = parser.parse_args()
    text = page(options.folder / "README.md")
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "page.html"
        source.write_text(text.replace("<details>", "<details open>") if options.open_details else text, "utf-8")
        photograph(source, options.picture, options.height)


if __name__ == "__main__":
    main()
