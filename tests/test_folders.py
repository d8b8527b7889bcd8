"""Saving is whole or not at all: kills, full disks, folders that must stay, and what else lies in a folder."""

from __future__ import annotations

import os
import shutil
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
