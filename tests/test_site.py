"""The docs site: it builds strictly, asks nothing of another host, shows every page, and what stands in it runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
import transformers
import typer
import yaml
from test_guessing import images, language, save, sentence, write
from test_report_page import browser

import hf_prune
from hf_prune import cli
from hf_prune.listing import LISTS
from hf_prune.recipe import load_recipe
from hf_prune.reference import recipe_keys

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in [ROOT / "README.md", *PAGES]}
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}  # an `a` waits for a click


# the site
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site, with every warning an error."""
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build.build(config)
    return folder


class Fetched(HTMLParser):
    """What a browser fetches of a page without being asked."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        if tag in FETCHED and told.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(told.get(FETCHED[tag]) or "")
        self.addresses += re.findall(r"url\(([^)]*)\)", told.get("style") or "")


def test_no_page_asks_another_host_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text("utf-8")
        strange = [one for one in Fetched(html).addresses if re.match(r"\w+:|//", one) and not one.startswith("data:")]
        assert strange == [], page
        assert 'class="mermaid"' not in html  # the theme would fetch what draws it
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", style.read_text("utf-8")), style


def test_the_navigation_holds_every_page_and_the_search_finds_them(site):
    named = set(re.findall(r"[\w/]+\.md\b", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} <= named
    told = (site / "search" / "search_index.js").read_text("utf-8")
    for page in named - {"tasks.md"}:
        assert (site / page).with_suffix(".html").is_file()
        assert f'"{page.removesuffix("md")}html' in told


def test_generated_pages_hold_what_they_promise(site):
    said = {name: (site / f"{name}.html").read_text("utf-8") for name in ("reference/api", "reference/lists", "papers")}
    assert [one for one in hf_prune.__all__ if f'.{one}"' not in said["reference/api"] and one != "__version__"] == []
    markers = TEXTS["docs/reference/lists.md"]
    others = {"keys", "architectures"}  # they have pages of their own
    assert {what for what in LISTS if f"<!-- list: {what} -->" not in markers} == others
    assert "multiple_of" in said["reference/api"]
    assert "<code>block_influence</code>" in said["reference/lists"]
    assert "Sanh, Wolf and Rush 2020" in said["papers"]
    for html in said.values():
        assert "&lt;!--" not in html
        assert "<!-- " not in html


def test_the_search_works_in_a_file_without_a_network(site, tmp_path):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000"]
    address = f"{(site / 'index.html').as_uri()}?q=rigl"
    done = subprocess.run([browser(), *options, address], capture_output=True, text=True, timeout=300)
    assert re.search(r"[1-9]\d* matching document", done.stdout)
    assert "ERR_NAME_NOT_RESOLVED" not in done.stderr


# what stands in it
@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Make the models and files that pages name, tiny."""
    home = tmp_path_factory.mktemp("bench")
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    save(home / "my-bert", "BertForSequenceClassification", **names)
    rows = [{"id": n, "review": " ".join(sentence()), "sentiment": ("neg", "pos")[n % 2]} for n in range(40)]
    write(home / "reviews.csv", rows)
    shutil.move(language(home)[0], home / "my-llama")
    sizes = {"image_size": 8, "patch_size": 4, "id2label": {0: "cat", 1: "dog"}}
    images(home)
    save(home / "my-vit", "ViTForImageClassification", "ViTConfig", **sizes)
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    processor(size={"height": 8, "width": 8}).save_pretrained(home / "my-vit")
    return home


def runnable(text: str) -> list[str]:
    """Return the Python of a page, what prepares it behind the scenes too, in order."""
    return re.findall(r"^(?:<!-- setup|```python)\n(.*?)^(?:-->|```)$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python" in text])
def test_python_runs(page, bench, tmp_path, monkeypatch):
    shutil.copytree(bench, tmp_path / "bench")
    monkeypatch.chdir(tmp_path / "bench")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shown: dict = {"__name__": "page"}
    blocks = runnable(TEXTS[page])
    assert len([one for one in blocks if one]) >= TEXTS[page].count("```python")
    for block in blocks:
        exec(compile(block, page, "exec"), shown)


def commands_of(text: str) -> list[list[str]]:
    """Return the lines of shell blocks as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    return [shlex.split(part) for line in lines for part in re.split(r" && | \| | > \S+", line) if part]


KEYS = {key.path for key in recipe_keys()}
COMMANDS = typer.main.get_command(cli.app)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```bash" in text])
def test_commands_are_understood(page):
    for program, *words in commands_of(TEXTS[page]):
        if program.endswith("hf-prune") and words[0] in COMMANDS.commands:
            parsed = COMMANDS.commands[words[0]].make_context(words[0], words[1:])
            changed = {word.partition("=")[0] for word in parsed.params.get("overrides") or () if "=" in word}
            assert {key for key in changed if key not in KEYS} == set()
        elif program.endswith("hf-prune"):
            assert words == ["--version"]
        elif program.endswith(("python", "torchrun")) and any(word.endswith(".py") for word in words):
            assert (ROOT / next(word for word in words if word.endswith(".py"))).is_file()


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_options_in_sentences_exist(page):
    for told in re.findall(r"`(hf-prune [a-z][^`]*)`", TEXTS[page]):
        _, name, *words = told.replace("[", " ").replace("]", " ").split()
        options = {one for each in COMMANDS.commands[name].params for one in [*each.opts, *each.secondary_opts]}
        assert {word for word in words if word.startswith("--")} <= options, told


OWN = [page for page, text in TEXTS.items() if page.count("/") == 2 and "```yaml" in text]  # others have their own


@pytest.mark.parametrize("page", OWN)
def test_parts_of_recipes_are_recipes(page):
    for block in re.findall(r"^```yaml\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE):
        told = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in yaml.safe_load(block).items()
        ]
        assert load_recipe("quickstart", told).name == "quickstart"


def test_a_wrong_option_would_be_seen():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS.commands["inspect"].make_context("inspect", ["my-bert", "--verifies"])
