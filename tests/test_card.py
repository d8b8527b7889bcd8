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
