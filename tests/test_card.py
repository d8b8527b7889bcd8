"""The README of a pruned model: only what is known, three ways to load, and never over a hand's work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_cards import card_faults, front_matter
from hub_server import HubServer
from models import build_bert
from test_hub import client_push, in_client, make_model, make_report

LICENSED = "---\nlicense: other\nlicense_name: own-terms\nlicense_link: LICENSE\n---\n# Dense\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_prune import save_pruned

    return save_pruned(make_model(), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A run's folder as `hf-prune run` leaves it: model, its ONNX export and the report side by side."""
    shutil.copytree(saved, tmp_path / "run" / "model")
    (tmp_path / "run" / "onnx").mkdir()
    (tmp_path / "run" / "onnx" / "model.onnx").write_bytes(b"onnx")
    (tmp_path / "run" / "report.json").write_text(json.dumps(make_report().to_dict()))
    return tmp_path / "run"


def changed_config(saved: Path, folder: Path, **changes: Any) -> Path:
    """Write a folder with a config only, in which some keys are others."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((saved / "config.json").read_text()) | changes))
    return folder


# -- what it tells -----------------------------------------------------------------------------------------------------


def test_table_has_exactly_the_figures_of_the_report() -> None:
    from hf_prune import model_card

    rows = [line for line in model_card(make_report()).splitlines() if line.startswith("| ") and "`" not in line]
    assert rows == [
        "| | dense | pruned | change |",
        "| accuracy | 0.875 | 0.8125 | -0.0625 |",
        "| f1 | 0.75 | 0.625 | -0.125 |",
        "| Parameters | 2,000 | 1,000 | -50% |",
        "| Prunable MACs per token | 1,200 | 400 | -67% |",
        "| Weights on disk, MB | 8 | 4 | -50% |",
        "| Latency, PyTorch, ms | 9 | 6 | 1.50x speed |",
        "| group | kept |",
    ]


def test_card_tells_conditions_kept_units_and_making() -> None:
    from hf_prune import model_card

    text = model_card(make_report(), recipe="prune: {heads: 0.5}", plot="kept.png")
    assert "Latency is the median of repeated runs at batch 8, length 128, 1 thread, a test machine." in text
    assert "4 of 8 heads and 12 of 24 neurons are kept" in text
    assert "| `layers.0.attention.heads` | 3 of 4 |" in text
    assert "![Kept units per layer](kept.png)" in text
    assert "````yaml\nprune: {heads: 0.5}\n````" in text
    assert "- Seed: 7" in text


def test_card_without_a_report_invents_nothing() -> None:
    from hf_prune import model_card

    text = model_card(None, repo_id="me/tiny")
    assert card_faults(text) == ([], [])
    assert "Dense against pruned" not in text
    assert "model-index" not in text
    assert "license" not in text
    assert "None" not in text
    assert "stock" not in text


def test_counts_without_timing_claim_no_conditions() -> None:
    from dataclasses import replace

    from hf_prune import model_card

    report = make_report()
    text = model_card(make_report(dense=None, pruned=replace(report.pruned, latency_ms={})))
    assert "| Parameters |  | 1,000 |  |" in text
    assert "atency" not in text
    assert "thread" not in text
    text = model_card(make_report(dense=None, pruned=replace(report.pruned, macs=5000)))
    assert "| MACs of the whole model at batch 8, length 128 |  | 5,000 |  |" in text


def test_only_zeroed_weights_bring_the_warning_about_zeros() -> None:
    from dataclasses import replace

    from hf_prune import model_card

    report = make_report()
    assert "zeros" not in model_card(report)
    zeroed = replace(report.dense, nonzero=400)  # same shapes, 1,600 of 2,000 weights zero
    text = model_card(make_report(pruned=zeroed))
    assert "80% of the weights are zeros" in text
    assert "zeros alone bring no speed" in text
    assert "gone from the weights" not in text


def test_only_shapes_stock_cannot_say_ask_for_hf_prune(saved: Path, tmp_path: Path) -> None:
    from hf_prune import model_card

    assert "import hf_prune" in model_card(None, folder=saved)
    config = json.loads((saved / "config.json").read_text())
    config["pruning_config"]["stock"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "import hf_prune" not in model_card(None, folder=tmp_path)


def test_local_paths_stay_out_of_the_metadata(tmp_path: Path) -> None:
    from hf_prune import model_card

    data = tmp_path / "my-data"
    text = model_card(
        make_report(), task="text-classification", base_model=str(tmp_path / "dense"), datasets=[str(data)]
    )
    header = text.split("---")[1]
    assert card_faults(text) == ([], [])
    assert str(tmp_path) not in text
    assert "datasets" not in header
    assert "base_model" not in header
    assert "name: my-data" in header  # the model-index names it, by its last part only


def test_the_title_is_the_models_and_not_that_of_a_recipe_used_again() -> None:
    from hf_prune import model_card

    told = make_report(settings={"recipe": "minilm_sst2", "base_model": "me/own-bert"})
    assert "\n# own-bert, pruned\n" in model_card(told)
    assert "\n# small\n" in model_card(told, repo_id="me/small")
    assert "\n# minilm_sst2\n" in model_card(make_report(settings={"recipe": "minilm_sst2"}))


def test_loss_is_no_metric_and_the_split_and_the_hubs_revision_are_told() -> None:
    from hf_prune import model_card

    told = {
        "splits": {"train": "train", "evaluation": ["validation", "test"]},
        "rows": {"train": 9, "evaluation": 2693},
    }
    told |= {"data_revision": {"nyu-mll/glue": "a" * 40}, "data_config": "sst2", "recipe_yaml": "name: x"}
    report = make_report(settings=told | {"datasets": ["nyu-mll/glue"], "task": "text-classification"})
    report.metrics["loss"] = {"dense": 0.3, "pruned": 0.4}
    text = model_card(report, base_model="example/dense")
    header = front_matter(text)
    assert card_faults(text) == ([], [])
    assert header["metrics"] == ["accuracy", "f1"]
    assert header["base_model_relation"] == "finetune"
    dataset = {"name": "nyu-mll/glue", "type": "nyu-mll/glue", "config": "sst2", "split": "validation+test"}
    assert header["model-index"][0]["results"][0]["dataset"] == dataset | {"revision": "a" * 40}
    assert "Scores are on 2,693 rows (validation and test), the same for both models." in text
    assert f"  - nyu-mll/glue: `{'a' * 40}`" in text


def test_what_was_only_cut_is_no_finetune() -> None:
    from hf_prune import model_card

    assert "base_model_relation" not in model_card(make_report(settings={}), base_model="example/dense")


def test_sparsity_tag_is_of_macs_or_of_zeros_and_is_not_invented() -> None:
    from dataclasses import replace

    from hf_prune import model_card

    dense = make_report().dense
    reports = [make_report(), make_report(pruned=replace(dense, nonzero=400)), make_report(pruned=dense), None]
    tags = [front_matter(model_card(report))["tags"][2:] for report in reports]
    assert tags == [["sparsity-67"], ["sparsity-80"], [], []]


def test_a_folder_with_its_own_code_is_loaded_without_us(saved: Path, tmp_path: Path) -> None:
    from hf_prune import model_card

    mapped = {"AutoModelForSequenceClassification": "modeling_pruned.PrunedBertForSequenceClassification"}
    folder = changed_config(saved, tmp_path / "standalone", auto_map=mapped)
    assert "trust_remote_code" not in model_card(None, folder=folder, repo_id="me/tiny")  # there is no such file
    (folder / "modeling_pruned.py").write_text("")
    text = model_card(None, folder=folder, repo_id="me/tiny")
    snippet = text.split("```python\n")[1].split("```")[0]
    assert 'AutoModelForSequenceClassification.from_pretrained("me/tiny", trust_remote_code=True)' in snippet
    assert "import hf_prune" not in snippet
    assert "pip install" not in text


def test_an_unknown_fact_is_an_error() -> None:
    from hf_prune import model_card

    with pytest.raises(TypeError, match="licence"):
        model_card(None, licence="mit")


# -- the dense model's license -----------------------------------------------------------------------------------------


def test_license_of_a_local_dense_model_is_inherited_without_its_local_link(saved: Path, tmp_path: Path) -> None:
    from hf_prune.card import inherited_license, write_card

    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "README.md").write_text(LICENSED)
    assert inherited_license(str(tmp_path / "dense")) == {"license": "other", "license_name": "own-terms"}
    folder = changed_config(saved, tmp_path / "model")
    header = front_matter(write_card(folder, base_model=str(tmp_path / "dense")).read_text())
    assert (header["license"], header["license_name"]) == ("other", "own-terms")
    assert inherited_license(str(saved)) == {}
    assert inherited_license(None) == {}


def test_license_of_a_dense_model_on_the_hub_is_inherited(saved: Path, tmp_path: Path) -> None:
    folder = changed_config(saved, tmp_path / "dense")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with HubServer() as hub:
        ask = (hub, tmp_path / "home", client_push)
        in_client(*ask, str(folder), "tester/dense", {"verify": False}, token=hub.token)
        options = {"card": {"base_model": "tester/dense"}}
        in_client(*ask, str(saved), "tester/small", options, token=hub.token)
        assert front_matter(hub.files("tester/small")["README.md"].decode())["license"] == "mit"


# -- writing it again --------------------------------------------------------------------------------------------------


def test_a_card_is_written_from_the_report_beside_and_again(run: Path) -> None:
    from hf_prune.card import is_ours, write_card

    card = write_card(run / "model", repo_id="me/tiny", license="apache-2.0")
    first = card.read_text()
    assert is_ours(first)
    assert is_ours(first.replace("\n", "\r\n"))
    assert "| accuracy | 0.875 | 0.8125 | -0.0625 |" in first
    assert "![Kept units per layer](kept.png)" in first
    assert (run / "model" / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert front_matter(write_card(run / "model").read_text())["license"] == "apache-2.0"  # known from the first


def test_a_report_beside_that_speaks_of_another_model_is_not_told(run: Path) -> None:
    from hf_prune.card import write_card

    report = json.loads((run / "report.json").read_text())
    report["kept"]["layers.0.mlp.neurons"] = [0, 1, 2, 5, 10]
    (run / "report.json").write_text(json.dumps(report))
    assert "Dense against pruned" not in write_card(run / "model").read_text()


@pytest.mark.parametrize("by_hand", ["# Mine\n", None])
def test_what_a_hand_wrote_is_replaced_only_by_force(run: Path, by_hand: str | None) -> None:
    from hf_prune import PruningError
    from hf_prune.card import write_card

    card = write_card(run / "model")
    by_hand = by_hand or card.read_text().replace("## Limits", "## My own section\n\n## Limits")
    card.write_text(by_hand)
    with pytest.raises(PruningError, match=r"changed by hand; --force .* Received: .*README\.md"):
        write_card(run / "model")
    assert card.read_text() == by_hand
    assert "My own" not in write_card(run / "model", force=True).read_text()


def test_a_card_needs_a_model(tmp_path: Path) -> None:
    from hf_prune import CheckpointError
    from hf_prune.card import write_card

    with pytest.raises(CheckpointError, match=r"config\.json. Received: "):
        write_card(tmp_path)


def test_the_commands_card_and_push_take_a_runs_folder(run: Path, tmp_path: Path) -> None:
    """What `hf-prune run` leaves goes up whole: model, ONNX, card with the Hub's name, report, plot and recipe."""
    with HubServer() as hub:

        def command(*words: Any) -> str:
            line = [sys.executable, "-m", "hf_prune.cli", *map(str, words)]
            environment = hub.environment(tmp_path / "home", hub.token)
            done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
            assert hub.token not in done.stdout + done.stderr
            return done.stdout + done.stderr

        assert "Written: " in command("card", run / "model", "--license", "mit")
        planned = command("push", run / "model", "tester/tiny", "--dry-run")
        assert hub.requests == []
        said = command("push", run / "model", "tester/tiny", "--private")
        files = hub.files("tester/tiny")
        command("push", run / "model", "tester/tiny", "--revision", "other", "--no-verify")
    assert "downloaded again, every file and tensor equal" in said
    assert hub.repos["tester/tiny"].private
    assert {"onnx/model.onnx", "report.json", "recipe.yaml", "kept.png", "README.md"} < set(files)
    assert all(name in planned for name in files)
    card = files["README.md"].decode()
    assert 'from_pretrained("tester/tiny")' in card
    assert "`onnx/model.onnx`" in card
    assert "license: mit" in card
    assert "other" in hub.repos["tester/tiny"].branches


def test_what_trainer_wrote_makes_room_for_our_card(run: Path) -> None:
    from models import build_bert, training_arguments
    from transformers import Trainer

    from hf_prune.card import is_ours, write_card

    Trainer(build_bert(), training_arguments(run / "model")).create_model_card()
    assert "Trainer" in (run / "model" / "README.md").read_text()
    assert is_ours(write_card(run / "model").read_text())


def test_a_hands_card_goes_up_as_it_is(run: Path) -> None:
    from hf_prune import push_pruned

    (run / "model" / "README.md").write_text("# Mine\n")
    assert ("README.md", 7) in push_pruned(run / "model", "me/tiny", dry_run=True)


# -- the page in the repository ----------------------------------------------------------------------------------------


def test_the_committed_page_is_what_its_report_gives() -> None:
    """Every number on the page comes from the run's report, and the metadata is valid."""
    from hf_prune.card import is_ours, model_card

    home = Path(__file__).parent.parent / "model_cards" / "minilm_sst2"
    text = (home / "README.md").read_text("utf-8")
    told = json.loads((home / "report.json").read_text("utf-8"))
    assert is_ours(text)
    assert card_faults(text) == ([], [])
    rows = [line for line in model_card(told).splitlines() if line.startswith("| ") and "`" not in line]
    assert len(rows) > 7
    assert all(row in text for row in rows)
    assert all(path.stat().st_size < 300_000 for path in home.iterdir())


# -- what strangers wrote ----------------------------------------------------------------------------------------------
HOSTILE = (
    "<script>alert(1)</script>",
    "x\n\n<img src=x onerror=alert(1)>\n\n# Title",
    "| a | b |\n|---|---|\n| <iframe src=x> |",
    "`</code><script>alert(1)</script>``` `",
    "\n```\n````\n`````\n<script>alert(1)</script>\n~~~\n",
    "![picture](https://evil.example/x.png) [here](javascript:alert(1)) https://evil.example www.evil.example",
    "<https://evil.example> <me@evil.example> me@evil.example",
    "[x]: https://evil.example\n[x]",
    "</details><script>alert(1)</script><details>",
    "x\r\n---\r\nlicense: mit\r\ntags: [stolen]\r\n---\r\n",
    "x\u2028---\u2028license: mit\u202e\x1b[31m\x00\ud800",
    "-->\n<!-- <script> -->",
    "{{ 7 * 7 }} {% raw %} ${x} \\\\<b>",
    "&lt;script&gt; &#60;script>",
    "<a href=x\n>y</a>\t<svg/onload=x>",
)


def elements(text: str) -> set[str]:
    """Return the HTML elements of a card's body, as GitHub's and the Hub's readers would make them at worst."""
    from html.parser import HTMLParser

    from markdown_it import MarkdownIt

    found: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.add(tag)
            found.update(name for name, _ in attrs if name.startswith(("on", "href", "src")))

    body = text.split("\n---\n", 1)[1]
    Reader().feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))
    return found


OURS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "code", "pre", "ul", "li"}


def hostile_report(evil: str) -> dict[str, Any]:
    told = make_report().to_dict()
    told["metrics"] = {evil: {"dense": 0.5, "pruned": 0.25}, "accuracy": {"dense": evil, "pruned": 0.5}}
    told["kept"] = {evil: [0, 1], "layers.0.mlp.neurons": [0]}
    told["units"] = {evil: 4, "layers.0.mlp.neurons": 12}
    told["pruned"]["latency_ms"] = {evil: 1.0}
    told["settings"] = {
        **dict.fromkeys(("recipe", "command", "recipe_yaml", "base_model", "license", "license_name", "task"), evil),
        **dict.fromkeys(("license_link", "hardware", "sparsity", "data_config", "seed"), evil),
        "datasets": [evil, "glue"],
        "versions": {evil: evil, "date": evil},
        "data_revision": {evil: evil, "glue": evil},
        "rows": {"train": 5, "evaluation": 7},
        "splits": {"train": evil, "evaluation": [evil]},
    }
    return told


@pytest.mark.parametrize("evil", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_stranger_wrote_is_shown_as_text(evil: str, saved: Path, tmp_path: Path) -> None:
    from hf_prune import model_card

    mapped = {f"AutoModel{evil}": "modeling_pruned.X", "AutoModel": evil}
    changes = {"architectures": [f"BertFor{evil}"], "auto_map": mapped}
    folder = changed_config(saved, tmp_path / "model", **changes)
    block = {"recipe": evil, "base_model": evil, "library_version": evil, "kept": {evil: evil}, "stock": False}
    for told in (hostile_report(evil), {"settings": {"recipe_yaml": evil}}):
        for config in ({}, {"pruning_config": block}):
            (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
            facts = {"repo_id": f"me/{evil}", "tags": [evil], "onnx": [f"{evil}.onnx"]}
            text = model_card(told, folder=folder, **facts)
            assert elements(text) <= OURS
            header = front_matter(text)
            assert header["library_name"] == "transformers"
            assert header.get("license") != "mit"
            assert "stolen" not in header["tags"]
            assert "alert(1)" not in text or "alert(1)" in evil


def test_the_words_of_a_stranger_stay_readable() -> None:
    """What is escaped reads as it was written, and plain words are not touched."""
    from markdown_it import MarkdownIt

    from hf_prune.card.escaping import block, code, text

    for plain in ("f1_macro on 2,693 rows (5 %)", "bert-base-uncased", "Intel Xeon, 2 cores", "1.25x speed"):
        assert text(plain) == plain
    for evil in ("a | b", "<b>", "_x_ *y* [z](w) ~~v~~ `u`", "# t", "- t", "1. t", "&amp;", "c\\\\d", "$x$", "***"):
        assert MarkdownIt("commonmark").render(text(evil)).strip() in {
            f"<p>{evil.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</p>"
        }
    assert code("a`b``c") == "```a`b``c```"
    assert block("x\n````\ny", "yaml") == "`````yaml\nx\n````\ny\n`````"
    assert len(text("x" * 10**7)) < 2000


@pytest.mark.parametrize(
    "told",
    [
        {"kept": [], "units": 5, "metrics": "x", "settings": [], "dense": "x", "pruned": 3},
        {"kept": {"a": "x", "b": [-1], "c": [1.5]}, "units": {"a": "x", "b": None, "c": 10**400}},
        {"dense": {"parameters": "x", "latency_ms": []}, "pruned": {"parameters": -1, "size_mb": "x"}},
        {"metrics": {"a": [], "b": {"dense": float("nan"), "pruned": True}, "c": {"dense": 10**400}}},
        {"settings": {"rows": 5, "splits": [], "data_revision": "x", "datasets": 5, "versions": 7, "recipe_yaml": {}}},
        {"settings": {"base_model": {"a": 1}, "license": ["x"], "recipe": [[[]]], "command": 5, "seed": {}, "task": 1}},
    ],
)
def test_a_report_of_wrong_types_is_no_crash(told: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    from hf_prune import model_card
    from hf_prune.card import write_card

    assert elements(model_card(told, repo_id="me/x")) <= OURS
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "report.json").write_text(json.dumps(told))
    assert "# model" in write_card(folder).read_text()


def test_a_forged_card_of_ours_tells_only_texts(saved: Path, tmp_path: Path) -> None:
    from hf_prune.card import earlier_facts, write_card
    from hf_prune.card.writing import _digest

    bomb = "a: &a [x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh"))
    for header in (
        f"{bomb}license: *h",
        "license: [[[x]]]\ndatasets: {a: b}",
        "license: &a [*a]",
        "license: 2024-99-99",
    ):
        made = f"---\n{header}\n---\n"
        forged = f"{made}\n<!-- hf_prune card {_digest(made)} -->\n"
        folder = shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True)
        (folder / "README.md").write_text(forged)
        assert "license" not in front_matter(write_card(folder).read_text())
        assert len(str(earlier_facts(forged))) < 1000


# -- links -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("force", [True, False])
def test_no_link_is_written_through_or_read(force: bool, run: Path, tmp_path: Path) -> None:
    from hf_prune import PruningError
    from hf_prune.card import write_card

    keys = tmp_path / "authorized_keys"
    keys.write_text("ssh-ed25519 mine")
    (run / "report.json").rename(run / "model" / "report.json")
    for name in ("README.md", "kept.png", "recipe.yaml"):
        (run / "model" / name).symlink_to(keys)
    if not force:
        with pytest.raises(PruningError, match="README.md is a link out of the folder"):
            write_card(run / "model")
        (run / "model" / "README.md").unlink()
    text = write_card(run / "model", force=force).read_text()
    assert "mine" not in text
    assert keys.read_text() == "ssh-ed25519 mine"
    assert not any((run / "model" / name).is_symlink() for name in ("README.md", "kept.png"))
    (run / "model" / "report.json").unlink()
    (run / "secret.json").write_text(json.dumps({"settings": {"command": "ssh-ed25519"}}))
    (run / "model" / "report.json").symlink_to(run / "secret.json")
    assert "ssh-ed25519" not in write_card(run / "model", force=True).read_text()


def test_a_folder_of_the_hubs_cache_is_read(saved: Path, tmp_path: Path) -> None:
    from hf_prune import model_card, push_pruned

    folder = hub_cache(saved, tmp_path)
    assert "layers.0.attention.heads" in model_card(None, folder=folder)
    plan = push_pruned(folder, "me/x", dry_run=True)
    assert {file.path for file in plan} == {"README.md", "config.json", "model.safetensors"}
    (tmp_path / "secret").write_text("mine")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    (folder.parents[1] / "blobs" / "leads").symlink_to(tmp_path / "secret")
    (folder / "merges.txt").symlink_to("../../blobs/leads")
    plan = push_pruned(folder, "me/x", dry_run=True)
    assert set(plan.left) == {"vocab.txt", "merges.txt"}


def hub_cache(saved: Path, home: Path) -> Path:
    """Lay a folder out as the Hub's client does: links to files that are named by their hashes."""
    blobs, folder = home / "models--me--x" / "blobs", home / "models--me--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(saved.iterdir())):
        shutil.copy(path, blobs / f"hash{number}")
        (folder / path.name).symlink_to(f"../../blobs/hash{number}")
    return folder


def test_a_dense_model_is_not_said_to_be_pruned(tmp_path):
    from hf_prune import WeightPruner, prune, save_pruned
    from hf_prune.card import model_card

    build_bert().save_pretrained(tmp_path / "dense")
    card = model_card(None, folder=tmp_path / "dense")
    assert "Nothing in its files says that it was pruned." in card
    assert "pruned with" not in card
    assert "- pruned\n" not in card
    model = build_bert()
    prune(model, WeightPruner(sparsity=0.5, score="l1"))
    save_pruned(model, tmp_path / "zeros")
    assert "pruned with `hf_prune`" in model_card(None, folder=tmp_path / "zeros")
