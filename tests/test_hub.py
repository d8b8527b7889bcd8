"""Pushing with the real Hub client to a small Hub of our own; the client runs in processes of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cards import card_faults
from hub_server import HubServer
from safetensors.torch import save_file
from zygote import run_forked

TESTS = Path(__file__).parent
KEPT = {
    "layers.0.attention.heads": [0, 2, 3],
    "layers.1.attention.heads": [1],
    "layers.0.mlp.neurons": [0, 1, 2, 5, 9],
    "layers.1.mlp.neurons": [3, 4, 5, 6, 7, 8, 9],
}
UNITS = {name: 4 if name.endswith("heads") else 12 for name in KEPT}
INPUTS = {"input_ids": [[5, 17, 2, 31, 8]], "attention_mask": [[1, 1, 1, 1, 1]]}
CARD = {"license": "apache-2.0", "datasets": ["glue"], "base_model": "example/dense-bert"}
SECRET = "hf_" + "Secret" * 5


# -- what both sides make ----------------------------------------------------------------------------------------------


def make_model() -> Any:
    """Return a pruned two-layer BERT classifier; every tensor is drawn at random, norms and biases too."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from hf_prune import shrink

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return shrink(model, KEPT)


def make_report(**changes: Any) -> Any:
    """Return a report whose numbers are easy to find again."""
    from hf_prune.report import Measurement, Report

    same = {"macs": None, "batch": 8, "length": 128, "threads": 1}
    fields = {
        "kept": KEPT,
        "units": UNITS,
        "dense": Measurement(
            parameters=2000, nonzero=2000, prunable_macs=1200, size_mb=8.0, latency_ms={"torch": 9.0}, **same
        ),
        "pruned": Measurement(
            parameters=1000, nonzero=1000, prunable_macs=400, size_mb=4.0, latency_ms={"torch": 6.0}, **same
        ),
        "metrics": {"accuracy": {"dense": 0.875, "pruned": 0.8125}, "f1": {"dense": 0.75, "pruned": 0.625}},
        "settings": {
            "seed": 7,
            "hardware": "a test machine",
            "command": f"hf-prune run x --token {SECRET}",
            "recipe_yaml": "name: x\n",
        },
    }
    return Report(**{**fields, **changes})


def logits(model: Any) -> list[list[float]]:
    import torch

    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in INPUTS.items()}).logits.tolist()


# -- what runs in the client's process ---------------------------------------------------------------------------------


def in_client(hub: HubServer, home: Path, call: Callable[..., Any], *args: Any, token: str | None = None) -> Any:
    """Run a function of this file in a fresh process whose Hub client talks to `hub`, and return what it returns."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(TESTS)!r}); import test_hub\n"
        f"result = test_hub.{call.__name__}(*json.loads(sys.argv[1]))\n"
        "print('RESULT ' + json.dumps(result))"
    )
    done = run_forked(code, [json.dumps(args)], hub.environment(home, token), TESTS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (token or "hf_no_token") not in done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def client_push_live(repo_id: str, onnx: str) -> dict[str, Any]:
    from hf_prune import push_pruned

    done = push_pruned(make_model(), repo_id, report=make_report(), onnx=onnx, commit_message="First", card=CARD)
    return {"oid": done.oid, "message": done.commit_message}


def client_train_and_push(repo_id: str, output: str) -> dict[str, Any]:
    """Prune in a real Trainer and let it push; then put our card last, with `push_pruned`."""
    import torch
    from models import training_arguments
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, Trainer

    from hf_prune import HeadPruner, NeuronPruner, PruningCallback, Schedule, Target, push_pruned

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))
    rows = [{"input_ids": torch.randint(1, 40, (5,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    schedule = Schedule(begin=1, end=3, frequency=1)
    callback = PruningCallback([HeadPruner(), NeuronPruner()], schedule, target=Target(0.5))
    arguments = training_arguments(
        Path(output), max_steps=4, push_to_hub=True, hub_model_id=repo_id, hub_strategy="end", save_strategy="no"
    )
    trainer = callback.attach(Trainer(model, arguments, train_dataset=rows))
    trainer.train()
    trainer.push_to_hub()
    pushed = AutoModelForSequenceClassification.from_pretrained(repo_id)
    push_pruned(trainer.model, repo_id, report=callback.report)
    macs_left = callback.report.settings["macs_left"]
    return {"live": logits(model.eval()), "pushed": logits(pushed.eval()), "macs_left": macs_left}


def client_read_back(repo_id: str, cache: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, ModelCard, snapshot_download
    from transformers import AutoModelForSequenceClassification

    import hf_prune  # noqa: F401  (teaches from_pretrained the smaller shape)

    card = ModelCard.load(repo_id)
    snippet: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1], snippet)
    return {
        "files": HfApi().list_repo_files(repo_id),
        "snapshot": snapshot_download(repo_id, cache_dir=cache),
        "logits": logits(AutoModelForSequenceClassification.from_pretrained(repo_id).eval()),
        "snippet": logits(snippet["model"].eval()),
        "metadata": card.data.to_dict(),
        "results": [[r.metric_type, r.metric_value, r.dataset_type, r.task_type] for r in card.data.eval_results],
    }


def client_push(folder: str, repo_id: str, options: dict[str, Any]) -> Any:
    import traceback

    from huggingface_hub import constants

    from hf_prune import PruningError, push_pruned

    constants.DOWNLOAD_CHUNK_SIZE = 1024  # bytes: so that even a small file can break in the middle
    try:
        done = push_pruned(folder, repo_id, **options)
    except PruningError as error:
        kinds = {"type": type(error).__name__, "cause": type(error.__cause__).__name__}
        return {"error": str(error), "log": traceback.format_exc(), **kinds}
    return done if isinstance(done, list) else {"oid": done.oid}


def client_download(repo_id: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return snapshot_download(repo_id)
    except HfHubHTTPError as error:
        return type(error).__name__


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved folder, and beside it ``sharded`` (the same in several files) and ``onnx``."""
    from hf_prune import save_pruned

    home, model = tmp_path_factory.mktemp("saved"), make_model()
    save_pruned(model, home / "sharded", max_shard_size="4KB")
    (home / "onnx").mkdir()
    (home / "onnx" / "model.onnx").write_bytes(bytes(range(256)))
    return save_pruned(model, home / "model")


@pytest.fixture(scope="module")
def pushed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, dict[str, Any]]]:
    """A live model pushed once, and read back by another process with an empty cache."""
    home = tmp_path_factory.mktemp("client")
    with HubServer() as server:
        onnx = str(saved.parent / "onnx")
        push = in_client(server, home / "one", client_push_live, "tester/tiny", onnx, token=server.token)
        writes = len(server.writes())
        told = in_client(server, home / "two", client_read_back, "tester/tiny", str(home / "cache"))
        yield server, {**push, **told, "writes": writes}


# -- push --------------------------------------------------------------------------------------------------------------


def test_push_is_one_commit_with_everything(pushed: tuple[HubServer, dict[str, Any]]) -> None:
    hub, told = pushed
    commits = hub.repos["tester/tiny"].branches["main"]
    assert hub.count("POST", "/commit/") == 1
    assert [commit.message for commit in commits] == ["initial commit", "First"]
    assert told["oid"] == commits[-1].oid
    assert set(hub.files("tester/tiny")) == {
        "config.json",
        "recipe.yaml",
        "model.safetensors",
        "README.md",
        "report.json",
        "kept.png",
        "onnx/model.onnx",
    }
    assert set(told["files"]) == {*hub.files("tester/tiny"), ".gitattributes"}


def test_download_gives_the_same_bytes(pushed: tuple[HubServer, dict[str, Any]], saved: Path) -> None:
    hub, told = pushed
    snapshot = Path(told["snapshot"])
    for name, data in hub.files("tester/tiny").items():
        assert (snapshot / name).read_bytes() == data, name
    assert (snapshot / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (snapshot / "onnx" / "model.onnx").read_bytes() == bytes(range(256))


def test_from_pretrained_through_the_hub_equals_the_local_model(pushed: tuple[HubServer, dict[str, Any]]) -> None:
    assert pushed[1]["logits"][0] == pytest.approx(logits(make_model())[0], rel=1e-6)
    assert pushed[1]["snippet"] == pushed[1]["logits"]  # the card's own code, run as it stands


def test_card_metadata_is_valid_and_tells_the_reports_numbers(pushed: tuple[HubServer, dict[str, Any]]) -> None:
    hub, told = pushed
    metadata = told["metadata"]
    assert hub.count("POST", "/api/validate-yaml") == 1  # the client asks before it commits
    assert card_faults(hub.files("tester/tiny")["README.md"].decode()) == ([], [])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["base_model"] == "example/dense-bert"
    assert metadata["license"] == "apache-2.0"
    assert metadata["tags"] == ["pruned", "hf_prune", "sparsity-67"]  # a third of the MACs is left
    assert metadata["metrics"] == ["accuracy", "f1"]
    where = ["glue", "text-classification"]
    assert told["results"] == [["accuracy", 0.8125, *where], ["f1", 0.625, *where]]
    assert metadata["model-index"][0]["name"] == "tiny"


def test_report_travels_along_without_tokens(pushed: tuple[HubServer, dict[str, Any]]) -> None:
    hub, _ = pushed
    files = hub.files("tester/tiny")
    assert json.loads(files["report.json"])["metrics"]["accuracy"] == {"dense": 0.875, "pruned": 0.8125}
    assert b"--token hf_***" in files["README.md"]
    for secret in (SECRET, hub.token):
        assert not any(secret.encode() in data for data in files.values())
        assert not any(secret.encode() in request.body for request in hub.requests)
    assert files["kept.png"].startswith(b"\x89PNG")


def test_private_repository_needs_the_token(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    in_client(hub, tmp_path / "a", client_push, str(saved), "tester/secret", {"private": True}, token=hub.token)
    assert hub.repos["tester/secret"].private
    assert in_client(hub, tmp_path / "b", client_download, "tester/secret") == "RepositoryNotFoundError"
    path = in_client(hub, tmp_path / "c", client_download, "tester/secret", token=hub.token)
    assert (Path(path) / "config.json").is_file()

    before = hub.files("tester/secret")
    refused = in_client(hub, tmp_path / "d", client_push, str(saved), "tester/secret", {})
    assert refused["error"].startswith("Pushing to 'tester/secret' failed")
    assert "401" in refused["error"]
    assert hub.files("tester/secret") == before


def test_private_push_to_a_public_repository_is_refused(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    in_client(hub, tmp_path, client_push, str(saved), "tester/open", {}, token=hub.token)
    told = in_client(hub, tmp_path, client_push, str(saved), "tester/open", {"private": True}, token=hub.token)
    assert "is public, and nothing was uploaded" in told["error"]
    assert hub.count("POST", "/commit/") == 1


def test_dry_run_sends_no_request_and_lists_the_files(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    options = {"dry_run": True, "onnx": str(saved.parent / "onnx")}
    plan = dict(in_client(hub, tmp_path, client_push, str(saved), "tester/tiny", options, token=hub.token))
    assert hub.requests == []
    assert set(plan) == {"README.md", "config.json", "model.safetensors", "onnx/model.onnx"}
    assert plan["onnx/model.onnx"] == 256
    assert plan["model.safetensors"] == (saved / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("method", "where", "status"), [("POST", "/commit/", 403), ("PUT", "/lfs/", 403)])
def test_a_failure_in_the_middle_publishes_nothing(
    hub: HubServer, saved: Path, tmp_path: Path, method: str, where: str, status: int
) -> None:
    hub.fail(method, where, status)
    told = in_client(hub, tmp_path, client_push, str(saved), "tester/tiny", {}, token=hub.token)
    assert told["error"].startswith("Pushing to 'tester/tiny' failed; files go up in one commit")
    assert told["cause"] in ("HfHubHTTPError", "RuntimeError")
    assert hub.files("tester/tiny") == {}
    assert "oid" in in_client(hub, tmp_path, client_push, str(saved), "tester/tiny", {}, token=hub.token)
    assert "model.safetensors" in hub.files("tester/tiny")


def test_a_later_push_replaces_older_weights_and_onnx_files(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    old = saved.parent / "sharded"
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "decoder_model.onnx").write_bytes(b"older")
    both = [(str(old), str(tmp_path / "onnx")), (str(saved), str(saved.parent / "onnx"))]
    for folder, onnx in both:
        in_client(hub, tmp_path / "home", client_push, folder, "tester/tiny", {"onnx": onnx}, token=hub.token)
    names = [name for name in hub.files("tester/tiny") if "model" in name]
    assert sorted(names) == ["model.safetensors", "onnx/model.onnx"]
    assert hub.count("POST", "/commit/") == 2


def test_a_branch_and_a_name_without_namespace(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    in_client(hub, tmp_path, client_push, str(saved), "tiny", {"revision": "third"}, token=hub.token)
    assert hub.files("tester/tiny") == {}
    assert b'from_pretrained("tester/tiny")' in hub.files("tester/tiny", "third")["README.md"]


def test_a_bad_card_is_refused_before_any_upload(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: [not, a, string]\n---\nby hand\n")
    told = in_client(hub, tmp_path, client_push, str(folder), "tester/tiny", {}, token=hub.token)
    assert '"license" must be a string' in told["error"]
    assert hub.count("PUT", "/lfs/") == 0


def test_training_leftovers_and_a_card_of_ones_own(saved: Path, tmp_path: Path) -> None:
    from hf_prune import push_pruned

    for name in ("checkpoint-5/model.safetensors", "runs/events", "training_args.bin", ".git/HEAD", "optimizer.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    plan = push_pruned(tmp_path, "me/x", dry_run=True)
    assert plan == [("README.md", 4), ("config.json", (saved / "config.json").stat().st_size)]


PRIVATE = (
    *("final/training_args.bin", "_incomplete-checkpoint-5/trainer_state.json", "checkpoint-9/optimizer.pt"),
    *("checkpoint-9/model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.pt", "training_args.bin"),
    *("pruning_state.safetensors", "pruning_log.csv", "trainer_state.json", "rng_state.pth", "pytorch_model.bin"),
    *(
        "wandb/settings",
        "wandb/run-1/files/config.yaml",
        "runs/events.out.tfevents",
        "logs/runs/events",
        "mlruns/0/meta",
    ),
    *(".env", ".git/config", ".netrc", "id_rsa", "id_ed25519.pub", "secrets.json", "credentials.json", "token"),
    *("notes.txt", "data/train.csv", "predictions.json", "model.safetensors.bak", "config.json~", "config.json.swp"),
    *("onnx/notes.md", "onnx/calibration.npz", "onnx/deeper/model.onnx", "1_Pooling/data.csv", "modeling_mine.py"),
    *("core.1234", "nohup.out", "all_results.json", "eval.ipynb", "additional_chat_templates/x.key", "recipe.yml"),
)
OPEN = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("tekken.json", "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
    *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json", "NOTICE.md", "configuration_own.py", "helping.py"),
)


def private_folder(saved: Path, home: Path) -> Path:
    """Fill a model's folder with what may go and what may not; every private file holds a token."""
    folder = shutil.copytree(saved, home / "model")
    for name in (*PRIVATE, *OPEN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"api_key: {SECRET}" if name in PRIVATE else "{}")
    save_file({"weight": torch.zeros(2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "configuration_own.py").write_text("from .helping import x\nfrom .gone import y\n")
    told = {"auto_map": {"AutoTokenizer": ["configuration_own.Own", None], "AutoX": "me/evil--modeling_theirs.Y"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def test_thirty_kinds_of_private_files_stay_at_home(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    folder = private_folder(saved, tmp_path)
    done = in_client(hub, tmp_path / "home", client_push, str(folder), "tester/x", {}, token=hub.token)
    assert "oid" in done, done
    files = hub.files("tester/x")
    assert set(files) == {*OPEN, "README.md", "config.json", "model.safetensors"}
    assert not any(SECRET.encode() in content for content in files.values())
    assert b"evil" not in files["tokenizer_config.json"]
    assert b"configuration_own.Own" in files["tokenizer_config.json"]


def test_a_dry_run_says_what_stays_and_why(saved: Path, tmp_path: Path) -> None:
    from hf_prune import push_pruned

    plan = push_pruned(private_folder(saved, tmp_path), "me/x", dry_run=True)
    tops = {name.split("/")[0] + "/" * ("/" in name) for name in PRIVATE}
    inside = {name for name in PRIVATE if name.startswith(("onnx/", "1_Pooling", "additional"))}
    assert {name for name in plan.left if name.split("/")[0] + "/" in tops or name in PRIVATE} >= {".env", "wandb/"}
    assert inside - {"onnx/deeper/model.onnx"} | {"onnx/deeper/"} <= set(plan.left)
    assert plan.left["id_rsa"] == "not a model's file"


def test_links_out_of_the_folder_stay_at_home_or_are_refused(saved: Path, tmp_path: Path) -> None:
    from hf_prune import CheckpointError, push_pruned

    folder, secret = shutil.copytree(saved, tmp_path / "model"), tmp_path / "secret"
    secret.mkdir()
    for name in ("token", "model.onnx", "tool.jinja"):
        (secret / name).write_text("mine")
    for name in ("vocab.txt", "README.md", "report.json", "recipe.yaml", "kept.png", "LICENSE"):
        (folder / name).symlink_to(secret / "token")
    for name in ("onnx", "additional_chat_templates", "1_Pooling"):
        (folder / name).symlink_to(secret)
    (folder / "merges.txt").symlink_to("config.json")  # inside of the folder
    plan = push_pruned(folder, "me/x", dry_run=True)
    assert {file.path for file in plan} == {"README.md", "config.json", "model.safetensors", "merges.txt"}
    assert plan.left["vocab.txt"] == "a link that leads out of the folder"
    (folder / "model.safetensors").rename(secret / "model.safetensors")
    (folder / "model.safetensors").symlink_to(secret / "model.safetensors")
    with pytest.raises(CheckpointError, match="must lie in its own folder.* Received: model.safetensors, a link"):
        push_pruned(folder, "me/x", dry_run=True)


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("token", [SECRET, "ghp_" + "a" * 36, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----\nx"])
def test_a_token_in_a_file_that_would_go_is_refused(name: str, token: str, saved: Path, tmp_path: Path) -> None:
    from hf_prune import PruningError, push_pruned

    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).write_text(json.dumps({"x": token}))
    with pytest.raises(PruningError, match="must hold no access token.* Received: .* with one") as error:
        push_pruned(folder, "me/x", dry_run=True)
    assert token not in str(error.value)


@pytest.mark.parametrize(
    "text", ["api_key: abcdefgh12", "name: x\ndata: {password: abcdefgh12}", "name: x\nother: 1", "[", "&a [*a]"]
)
def test_what_is_no_recipe_or_report_of_ours_stays(text: str, saved: Path, tmp_path: Path) -> None:
    from hf_prune import push_pruned

    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "recipe.yaml").write_text(text)
    assert "recipe.yaml" in push_pruned(folder, "me/x", dry_run=True).left
    (folder / "recipe.yaml").write_text("name: x\nseed: 3\n")
    assert "recipe.yaml" not in push_pruned(folder, "me/x", dry_run=True).left


def test_a_token_in_the_place_of_a_name_is_not_repeated(saved: Path) -> None:
    from hf_prune import PruningError, push_pruned

    token = "hf_" + "a" * 34
    with pytest.raises(PruningError, match="Received: an access token") as error:
        push_pruned(saved, token)
    assert token not in str(error.value)


def test_every_name_of_a_tokenizers_file_is_known() -> None:
    """Each `vocab_files_names` of transformers may go up, but for pickles and what only converters read."""
    import transformers

    from hf_prune.hub.choosing import _TOKENIZERS

    home = Path(transformers.__file__).parent
    sources = [*home.glob("models/*/tokenization*.py"), *home.glob("tokenization*.py")]
    found: set[str] = set()
    for path in sources:
        for table in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            found |= set(re.findall(r':\s*"([\w.-]+\.\w+)"', table))
    assert len(found) > 10
    assert {name for name in found if not name.endswith((".pkl", ".bin"))} <= set(_TOKENIZERS)


def test_bad_names_and_folders_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    from hf_prune import CheckpointError, PruningError, push_pruned

    with pytest.raises(PruningError, match=r"repo_id must be 'namespace/name'. Received: 'a/b/c'"):
        push_pruned(saved, "a/b/c", dry_run=True)
    with pytest.raises(CheckpointError, match=r"saved model. Received: .*nothing': there is no such folder"):
        push_pruned(tmp_path / "nothing", "me/x", dry_run=True)
    with pytest.raises(PruningError, match=r"must lie in a folder. Received: .*nothing"):
        push_pruned(saved, "me/x", onnx=tmp_path / "nothing", dry_run=True)


def test_a_trainer_that_prunes_pushes_the_small_model_and_our_card_comes_last(tmp_path):
    with HubServer() as hub:
        asked = ("tester/trained", str(tmp_path))
        done = in_client(hub, tmp_path / "home", client_train_and_push, *asked, token=hub.token)
        files = hub.files("tester/trained")
    # equal but for the last bit: which kernel adds up odd widths depends on where loaded tensors lie in memory
    assert done["pushed"] == [pytest.approx(row, rel=1e-6) for row in done["live"]]
    assert done["macs_left"] < 0.6
    assert b"Dense against pruned" in files["README.md"]
    assert "pruning_config" in json.loads(files["config.json"])
