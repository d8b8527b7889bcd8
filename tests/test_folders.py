"""Saving is whole or not at all: kills, full disks, folders that must stay, and what else lies in a folder."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from killing import NOTE, Version, fill_disks, kill_saves, left_overs, names_in, two_versions, without_exchange
from models import UNEVEN, assert_same_weights, build_bert, build_llama

from hf_prune import (
    PruningError,
    adopt_torch_masks,
    folders,
    load_pruned,
    mask_units,
    save_pruned,
    shrink,
)
from hf_prune.folders import whole_folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture(scope="module")
def versions(scratch) -> tuple[Version, Version]:
    return two_versions(scratch)


@pytest.fixture
def folder(versions, tmp_path) -> Path:
    """The first version, saved, with a file of the user's in it and one in a folder of its own."""
    place = tmp_path / "model"
    versions[0].save(place)
    (place / NOTE).write_text("mine")
    (place / "runs").mkdir()
    (place / "runs" / "log").write_text("mine too")
    return place


# a few of benchmarks/kills.py
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_saves_leave_the_old_version_or_the_new_one(exchange, versions, tmp_path):
    if exchange:
        told = kill_saves(versions, tmp_path / "model", 6)
    else:
        with without_exchange():
            told = kill_saves(versions, tmp_path / "model", 6)
    assert told["broken"] == 0
    assert told["old"] + told["new"] == 6
    assert told["old"] > 0


def test_a_full_disk_is_a_clear_error_and_the_old_folder_loads(versions, scratch):
    told = fill_disks(versions, scratch, 5)
    if told is None:
        pytest.skip("this process may not mount a small disk")
    assert told == {"disks": 5, "refused": 4, "saved": 1, "broken": 0}


@pytest.mark.parametrize("exchange", [True, False])
def test_other_files_stay_and_stale_weights_leave(exchange, versions, folder, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    (folder / "pytorch_model.bin").write_bytes(b"an old pickle")
    for version in (versions[1], versions[0], versions[0]):
        version.save(folder)
        assert names_in(folder) == version.files | {NOTE, "runs"}
        assert (folder / NOTE).read_text() + (folder / "runs" / "log").read_text() == "minemine too"
        assert not left_overs(folder)
        assert_same_weights(version.model, load_pruned(folder, dtype=torch.float32))


@pytest.mark.parametrize("place", ["child", "itself"])
def test_the_current_folder_stays_the_current_folder(place, versions, folder, monkeypatch):
    monkeypatch.chdir(folder if place == "itself" else folder / "runs")
    node = folder.stat().st_ino
    versions[1].save(folder)
    assert folder.stat().st_ino == node
    assert os.path.samefile(folder if place == "itself" else folder / "runs", ".")
    assert names_in(folder) == versions[1].files | {NOTE, "runs"}
    assert not left_overs(folder)
    assert_same_weights(versions[1].model, load_pruned(folder, dtype=torch.float32))


def test_a_link_stays_a_link_and_permissions_stay(versions, folder, tmp_path):
    folder.chmod(0o750)
    link = tmp_path / "latest"
    link.symlink_to(folder)
    versions[1].save(link)
    assert link.is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert names_in(folder) == versions[1].files | {NOTE, "runs"}


def test_a_writer_that_fails_changes_nothing(versions, folder):
    class Broken:
        def save_pretrained(self, path):
            raise RuntimeError("no tokenizer today")

    with pytest.raises(RuntimeError, match="no tokenizer today"):
        save_pruned(versions[1].model, folder, tokenizer=Broken())
    assert names_in(folder) == versions[0].files | {NOTE, "runs"}
    assert not left_overs(folder)
    assert_same_weights(versions[0].model, load_pruned(folder, dtype=torch.float32))


def test_the_tokenizer_is_in_the_same_step(folder, versions):
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    save_pruned(versions[1].model, folder, tokenizer=processor)  # in a single file, like the first version
    assert names_in(folder) == versions[0].files | {NOTE, "runs", "preprocessor_config.json"}


def test_a_file_in_the_place_is_refused(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(PruningError, match="could not be written; what was there before is untouched. .*not a folder"):
        save_pruned(build_bert(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"


def test_a_folder_that_was_set_aside_is_put_back(versions, folder):
    folder.rename(folder.parent / ".model.previous")  # a kill between two renames
    assert_same_weights(versions[0].model, load_pruned(folder, dtype=torch.float32))
    folder.rename(folder.parent / ".model.previous")
    with pytest.raises(ZeroDivisionError), whole_folder(folder):
        raise ZeroDivisionError
    assert names_in(folder) == versions[0].files | {NOTE, "runs"}


def test_left_overs_of_the_dead_are_removed_and_those_of_the_living_are_not(folder, versions):
    dead = folder.parent / ".model.saving-00000000"
    dead.mkdir()
    with whole_folder(folder) as living:
        assert not dead.exists()
        versions[1].save(folder)  # another save, meanwhile
        assert living.is_dir()
        shutil.copytree(folder, living, dirs_exist_ok=True)
    assert names_in(folder) == versions[1].files | {NOTE, "runs"}
    assert not left_overs(folder)


# masks that no file can hold
def masked_mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=60, num_key_value_heads=2, num_local_experts=4, **sizes)
    return mask_units(transformers.MixtralForCausalLM(config).eval(), {"layers.0.experts": [0, 1, 3]})


@pytest.mark.parametrize("build", [lambda: mask_units(build_bert(), {"layers": [0]}), masked_mixtral])
def test_masked_layers_and_experts_are_saved_once_they_are_removed(build, tmp_path):
    model = build()
    with pytest.raises(PruningError, match=r"can be saved once they are removed: call hf_prune.shrink\(model\)"):
        save_pruned(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_pruned(shrink(model), tmp_path / "model")
    assert_same_weights(model, load_pruned(tmp_path / "model", dtype=torch.float32))


def test_masks_of_torch_are_adopted_first(tmp_path):
    model = build_llama()
    torch.nn.utils.prune.l1_unstructured(model.lm_head, "weight", amount=0.5)
    with pytest.raises(PruningError, match="adopt_torch_masks.*Received: lm_head.weight_mask"):
        save_pruned(model, tmp_path / "model")
    adopt_torch_masks(model)
    save_pruned(model, tmp_path / "model")
    assert_same_weights(model, load_pruned(tmp_path / "model", dtype=torch.float32))


def test_masked_units_are_zeros_that_any_file_can_hold(tmp_path):
    model = mask_units(build_bert(), UNEVEN)
    save_pruned(model, tmp_path)
    assert_same_weights(model, load_pruned(tmp_path, dtype=torch.float32))


# what is not ours: volumes, other processes' files, owners
@pytest.fixture
def mounted(folder, tmp_path):
    """Mount a volume over a place of the folder, and take it away again; bind mounts are of the same device."""
    volume, places = tmp_path / "volume", []
    (volume / "deep").mkdir(parents=True)
    for name in ("precious.bin", "deep/er"):
        (volume / name).write_text("a terabyte")

    def mount(name: str, *, file: bool = False) -> Path:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch() if file else place.mkdir()
        source = volume / "precious.bin" if file else volume
        if subprocess.run(["mount", "--bind", source, place], capture_output=True).returncode:
            pytest.skip("this process may not mount")
        places.append(place)
        return volume

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", ["data", "runs/a b/data", "new\nline"])
def test_a_volume_mounted_inside_keeps_its_files(name, versions, folder, mounted):
    volume, node = mounted(name), folder.stat().st_ino
    versions[1].save(folder)
    versions[0].save(folder)
    assert (volume / "precious.bin").read_text() + (volume / "deep" / "er").read_text() == "a terabyte" * 2
    assert folder.stat().st_ino == node
    assert (folder / name / "precious.bin").is_file()
    assert not left_overs(folder)
    assert_same_weights(versions[0].model, load_pruned(folder, dtype=torch.float32))


def test_a_file_that_is_mounted_over_stays_or_is_refused(versions, folder, mounted):
    volume = mounted("runs/secret", file=True)
    versions[1].save(folder)
    assert (folder / "runs" / "secret").read_text() == "a terabyte"
    mounted("pytorch_model.bin", file=True)  # old weights, by the name
    with pytest.raises(PruningError, match="could not be written; what was there before is untouched. .*mounted over"):
        versions[0].save(folder)
    assert (volume / "precious.bin").read_text() == "a terabyte"
    assert not left_overs(folder)


def test_what_is_mounted_is_never_removed_with_a_left_over(folder, mounted):
    dead = folder.parent / ".model.saving-00000000"
    dead.mkdir()
    volume = mounted("../.model.saving-00000000/data")
    with whole_folder(folder):
        pass
    assert (volume / "precious.bin").is_file()
    assert dead.is_dir()


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_keep_mode_owner_and_links(exchange, versions, folder, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    (folder / "runs" / "closed").mkdir()
    (folder / "runs" / "closed" / "note").write_text("mine")
    (folder / "elsewhere").symlink_to(tmp_path)
    ways = {".": 0o2750, "runs": 0o3770, "runs/closed": 0o500}
    for name in reversed(ways):
        if os.getuid() == 0:
            os.chown(folder / name, 4321, 8765)
        (folder / name).chmod(ways[name])
    (folder / "runs" / "log").chmod(0o600)
    owner = [((folder / name).stat().st_uid, (folder / name).stat().st_gid) for name in ways]
    versions[1].save(folder)
    versions[0].save(folder)
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in ways} == ways
    assert [((folder / name).stat().st_uid, (folder / name).stat().st_gid) for name in ways] == owner
    assert stat.S_IMODE((folder / "runs" / "log").stat().st_mode) == 0o600
    assert (folder / "elsewhere").is_symlink()
    assert (folder / "runs" / "closed" / "note").read_text() == "mine"
    assert not left_overs(folder)


@pytest.mark.parametrize("way", ["exchange", "rename", "copies"])
def test_what_others_write_meanwhile_is_brought_over(way, versions, folder, monkeypatch):
    if way == "rename":
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    if way == "copies":
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "no links here")))
    place = folders._take_place

    def meanwhile(*arguments):
        (folder / "events").write_text("a week")
        (folder / "pytorch_model.bin").write_text("older weights by their name")
        (folder / "new" / "deep").mkdir(parents=True)
        (folder / "new" / "deep" / "one").write_text("1")
        (folder / "new" / "empty").mkdir()
        (folder / "runs" / "more").symlink_to("log")
        (folder / ".note").write_text("written anew")
        os.replace(folder / ".note", folder / NOTE)
        with (folder / "runs" / "log").open("a") as log:
            log.write(", and longer")
        place(*arguments)

    monkeypatch.setattr(folders, "_take_place", meanwhile)
    versions[1].save(folder)
    assert names_in(folder) == versions[1].files | {NOTE, "runs", "new", "events"}
    assert (folder / "events").read_text() + (folder / "new" / "deep" / "one").read_text() == "a week1"
    assert (folder / "new" / "empty").is_dir()
    assert (folder / "runs" / "more").is_symlink()
    assert (folder / NOTE).read_text() == "written anew"
    assert (folder / "runs" / "log").read_text() == "mine too, and longer"
    assert not left_overs(folder)
    assert_same_weights(versions[1].model, load_pruned(folder, dtype=torch.float32))


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="the system does not tell where processes stand")
def test_a_process_that_stands_in_the_folder_goes_on(versions, folder):
    script = "import pathlib, sys; print(flush=True); sys.stdin.readline(); pathlib.Path('late').write_text('here')"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder / "runs", **pipes) as process:
        process.stdout.readline()
        versions[1].save(folder)
        process.communicate(b"\n")
    assert (folder / "runs" / "late").read_text() == "here"


def test_files_go_through_no_link_in_a_folder_that_stays(folder, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text("mine")
    (folder / "notes").symlink_to(outside)
    (folder / "generation_config.json").symlink_to(outside / "key")
    monkeypatch.chdir(folder)
    with whole_folder(folder) as staging:
        (staging / "notes").mkdir()
        (staging / "notes" / "key").write_text("new")
        (staging / "generation_config.json").write_text("{}")
    assert (outside / "key").read_text() == "mine"
    assert (folder / "notes" / "key").read_text() + (folder / "generation_config.json").read_text() == "new{}"
