"""What pages of the site hold that nobody writes by hand, and links that mean a file in the repository."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import hf_prune
from hf_prune.listing import listed

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "notebook.ipynb"  # of examples/
OF_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # file of the repository -> page
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
HYPHENATED = re.compile(r"(?<![^\s])[^\s&]{0,12}-[^\s&]{1,24}(?![^\s])")
PAPER = re.compile(r"(?:((?:[A-Z][\w'-]+(?:,| &| and| et al\.)? )+\d{4}),? \(?)?arXiv:(\d{4}\.\d{4,5})")


# mkdocs calls these
def on_files(files: Any, config: Any) -> Any:
    """Add pages that are files of the repository's root, and the notebook: as a page, and as the file itself."""
    for name, page in OF_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    notebook = (ROOT / "examples" / NOTEBOOK).read_text("utf-8")
    files.append(File.generated(config, f"tutorials/{NOTEBOOK}", content=notebook))
    files.append(File.generated(config, "tutorials/notebook.md", content=_page_of(json.loads(notebook))))
    return files


def _page_of(notebook: dict[str, Any]) -> str:
    """Return a notebook's cells as a page, whose first paragraph says where the file is."""
    cells = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in notebook["cells"]]
    first, *others = [f"```python\n{text}\n```" if is_code else text for text, is_code in cells]
    here = f"This page is a notebook: [download it]({NOTEBOOK}), and run it in Jupyter or Colab."
    return "\n\n".join([first, here, *others])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Write what is generated, and mend what GitHub reads in another way."""
    if "\n## " not in markdown:
        page.meta["hide"] = ["toc"]  # its place is the page's
    markdown = re.sub(r"<!-- setup\n.*?-->\n*", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^<!-- (list|api|papers)(?:: (.+?))? -->$", _generated, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^\|.*$", lambda row: _without_escapes(row[0]), markdown, flags=re.MULTILINE)
    return _with_links_inside(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep words with hyphens whole in code inside of sentences: browsers break lines behind each hyphen."""
    return re.sub(r"<code>([^<]*)</code>", lambda code: f"<code>{HYPHENATED.sub(_whole, code[1])}</code>", html)


def _whole(word: re.Match[str]) -> str:
    return f'<span class="whole">{word[0]}</span>'


# what is generated
def _generated(marker: re.Match[str]) -> str:
    return MAKERS[marker[1]](marker[2] or "")


def _list(what: str) -> str:
    rows = listed(what)
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def _api(names: str) -> str:
    """Return directives for public names; ``*``: for all that no other marker of the page names."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    told = {name for marker in re.findall(r"^<!-- api: (.+?) -->$", page, re.MULTILINE) for name in marker.split()}
    wanted = (
        [name for name in hf_prune.__all__ if name not in {*told, "__version__"}] if names == "*" else names.split()
    )
    return "\n\n".join(f"::: {_home(name)}" for name in wanted) or "None."


def _home(name: str) -> str:
    """Return where a public name is defined, as mkdocstrings reads sources."""
    thing = getattr(hf_prune, name)
    own = getattr(thing, "__name__", "") == name and thing.__module__.startswith("hf_prune")
    return f"{thing.__module__ if own else f'hf_prune.{hf_prune._PUBLIC[name]}'}.{name}"  # else an alias


def _papers(_: str) -> str:
    """Return a table of every paper that a score or a docstring names, the oldest first."""
    names, places = dict[str, str](), defaultdict[str, set[str]](set)
    for who, number, where in [*_papers_of_scores(), *_papers_of_sources()]:
        names[number] = names.get(number) or who
        places[number].add(where)
    rows = sorted(names, key=lambda number: (names[number][-4:] or f"20{number[:2]}", number))
    link = "[{0}](https://arxiv.org/abs/{0})"
    cells = [[names[one] or "as named there", link.format(one), ", ".join(sorted(places[one]))] for one in rows]
    return _table(["paper", "arXiv", "used by"], cells)


def _papers_of_scores() -> Iterator[tuple[str, str, str]]:
    for row in listed("scores"):
        for who, number in PAPER.findall(row["paper"]):
            yield who, number, f"score `{row['score']}`"


def _papers_of_sources() -> Iterator[tuple[str, str, str]]:
    for path in sorted((ROOT / "hf_prune").rglob("*.py")):
        if path.name != "scores.py":
            for who, number in PAPER.findall(" ".join(path.read_text("utf-8").split())):
                yield who, number, f"`{path.relative_to(ROOT).as_posix()}`"


MAKERS: dict[str, Callable[[str], str]] = {"list": _list, "api": _api, "papers": _papers}


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text, n) for n, text in enumerate(row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str, number: int) -> str:
    """Return a name as code, and all else as text with its papers as links."""
    plain = text.replace("``", "`").replace("|", "\\|")
    if number == 0 and re.fullmatch(r"[\w.:-]+", text):
        return f"`{plain}`"
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)


# what GitHub reads in another way
def _without_escapes(row: str) -> str:
    """Python-Markdown shows the backslash of a pipe inside code."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row)


def _with_links_inside(markdown: str, here: str) -> str:
    """Turn links to files of the repository's root into links to their pages, and those from there into docs/."""
    up = "../" * here.count("/")
    beside = "" if here in OF_ROOT.values() else f"{up}../"
    for name, page in OF_ROOT.items():
        markdown = markdown.replace(f"]({beside}{name}", f"]({up}{page}")
    return markdown.replace("](docs/", "](") if here in OF_ROOT.values() else markdown
