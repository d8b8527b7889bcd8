"""A Hub that fails in the middle: tried again, or a clear error, and never anything half-published or sent twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from test_hub import client_push, in_client, make_model

CHUNK = 4096  # bytes
REPO = "tester/tiny"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(chunk_size=CHUNK) as server:
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_prune import save_pruned

    return save_pruned(make_model(), tmp_path_factory.mktemp("saved") / "model")


def push(hub: HubServer, home: Path, folder: Path, **options: Any) -> Any:
    return in_client(hub, home, client_push, str(folder), REPO, options, token=hub.token)


def commits(hub: HubServer) -> list[str]:
    return [commit.message for commit in hub.repos[REPO].branches["main"]]


def statuses(hub: HubServer, method: str, fragment: str) -> list[int]:
    return [request.status for request in hub.requests if request.method == method and fragment in request.path]


def test_large_files_go_up_in_parts_and_come_back_equal(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    push(hub, tmp_path, saved, commit_message="In parts")
    weights = (saved / "model.safetensors").read_bytes()
    parts = -(-len(weights) // CHUNK)
    assert parts > 3
    assert hub.count("PUT", "/lfs/") == parts
    assert hub.count("POST", "/objects/complete/") == 1
    assert hub.files(REPO)["model.safetensors"] == weights
    assert commits(hub) == ["initial commit", "In parts"]
    assert hub.count("GET", "/lfs/") == 1  # read back and compared


def test_parts_that_fail_are_sent_again(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.fail("PUT", "/1", 500)
    hub.fail("PUT", "/2", how="break")
    hub.fail("PUT", "/3", 503)
    hub.fail("POST", "/objects/complete/", 500)
    hub.fail("POST", "/preupload/", 429, Retry_After="1")
    assert "oid" in push(hub, tmp_path, saved, commit_message="At last")
    assert {500, 503, 0, 200} == set(statuses(hub, "PUT", "/lfs/"))
    assert 429 in statuses(hub, "POST", "/preupload/")
    assert commits(hub) == ["initial commit", "At last"]
    assert hub.files(REPO)["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_a_commit_whose_answer_is_lost_is_not_sent_twice(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", 500)
    hub.fail("POST", "/commit/", how="break")
    hub.fail("POST", "/commit/", how="lose")
    done = push(hub, tmp_path, saved, commit_message="Once")
    assert commits(hub) == ["initial commit", "Once"]
    assert done["oid"] == hub.repos[REPO].branches["main"][-1].oid


def test_a_lost_answer_of_a_silent_hub_is_found_later(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    """The Hub neither answers the commit nor what became of it; the next try is refused, and its cause is seen."""
    hub.fail("POST", "/commit/", how="lose")
    hub.fail("GET", f"/api/models/{REPO}/tree/", 403)
    done = push(hub, tmp_path, saved, commit_message="Once")
    assert commits(hub) == ["initial commit", "Once"]
    assert statuses(hub, "POST", "/commit/") == [200, 412]
    assert done["oid"] == hub.repos[REPO].branches["main"][-1].oid


def test_a_hub_that_stays_broken_gives_a_clear_error(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", 503, times=99)
    told = push(hub, tmp_path, saved)
    assert told["error"].startswith(f"Pushing to '{REPO}' failed; files go up in one commit, so nothing is half-publ")
    assert "503" in told["error"]
    assert commits(hub) == ["initial commit"]
    assert hub.count("POST", "/commit/") >= 4


def test_somebody_elses_commit_is_not_overwritten(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    push(hub, tmp_path, saved)
    hub.overtaking = {"model.safetensors": b"theirs"}
    sharded = tmp_path / "other"
    sharded.mkdir()
    for path in saved.iterdir():
        (sharded / path.name).write_bytes(path.read_bytes())
    (sharded / "NOTICE.txt").write_text("new")
    told = push(hub, tmp_path, sharded)
    assert "412" in told["error"]
    assert commits(hub)[-1] == "Somebody else's"
    assert hub.files(REPO)["model.safetensors"] == b"theirs"


def test_a_download_that_breaks_goes_on_where_it_broke(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    hub.fail("GET", "/resolve/", 500)
    hub.fail("GET", "/lfs/", 503)
    hub.fail("GET", "/lfs/", how="break")
    assert "oid" in push(hub, tmp_path, saved)
    assert statuses(hub, "GET", "/lfs/") == [503, 200, 206]  # the last is a range
    assert commits(hub)[1:] == ["Upload a model pruned with hf_prune"]


@pytest.mark.parametrize(("where", "name"), [("/lfs/", "model.safetensors"), ("/config.json", "config.json")])
def test_what_comes_back_different_is_an_error(
    hub: HubServer, saved: Path, tmp_path: Path, where: str, name: str
) -> None:
    hub.fail("GET", where, how="spoil", times=9)
    told = push(hub, tmp_path, saved)
    assert told["type"] == "CheckpointError"
    assert f"must hold the files that were sent. Received: others for {name}" in told["error"]


def test_without_verification_nothing_is_read_back(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    push(hub, tmp_path, saved, verify=False)
    assert hub.count("GET", "/lfs/") + hub.count("GET", "/resolve/") == 0
    assert len(commits(hub)) == 2


def test_the_same_push_again_makes_no_second_commit(hub: HubServer, saved: Path, tmp_path: Path) -> None:
    first, second = (push(hub, tmp_path, saved) for _ in range(2))
    assert first == second
    assert len(commits(hub)) == 2


@pytest.mark.parametrize("token", ["an-unusual.token/of-mine", "hf_AnotherTokenAnotherToken\nX"])
def test_a_token_is_in_no_error_and_no_chained_error(hub: HubServer, saved: Path, tmp_path: Path, token: str) -> None:
    """The second cannot stand in a header, and the client's own error would show it."""
    told = in_client(hub, tmp_path, client_push, str(saved), REPO, {"token": token})
    assert "failed" in told["error"]
    for text in (told["error"], told["log"]):
        assert token not in text
        assert "AnotherToken" not in text
