"""The table of what a run has logged: kills and resumes leave each row in it once."""

from __future__ import annotations

import pytest

from hf_prune.training_log import TrainingLog


def test_rows_behind_the_resumed_step_and_one_cut_off_are_dropped(tmp_path):
    path = tmp_path / "out" / "log.csv"
    log = TrainingLog(path)
    log.begin(0)
    for step in (1, 2, 3):
        log.add({"step": step, "loss": step / 2})
    with path.open("a", encoding="utf-8") as file:
        file.write("4,1.")  # killed while it wrote
    log = TrainingLog(path)
    log.begin(2)
    log.add({"step": 3, "loss": 7.0})
    assert path.read_text(encoding="utf-8").splitlines() == ["step,loss", "1,0.5", "2,1.0", "3,7.0"]


def test_a_number_that_comes_later_gets_a_column(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 0.5})
    log.add({"step": 2, "loss": 0.25, "distillation_logits": 0.125})
    log.add({"step": 3, "loss": 0.25})
    lines = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["step,loss,distillation_logits", "1,0.5,", "2,0.25,0.125", "3,0.25,"]


def test_another_run_in_the_folder_begins_anew(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 0.5})
    log.begin(0)
    assert (tmp_path / "log.csv").read_text(encoding="utf-8") == ""


def test_a_disk_that_is_full_for_a_while_costs_rows_and_one_warning(tmp_path, caplog):
    path = tmp_path / "log.csv"
    log = TrainingLog(path)
    log.begin(0)
    log.add({"step": 1, "loss": 0.5})
    for full in (lambda: path.symlink_to("/dev/full"), path.mkdir):
        path.unlink()
        full()
        for step in (2, 3):
            log.columns = ["step", "loss"]
            log.add({"step": step, "loss": 0.5})
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        log.add({"step": 4, "loss": 0.25})
    assert path.read_text(encoding="utf-8").splitlines() == ["step,loss", "4,0.25"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.csv"]


def test_a_row_that_was_torn_by_a_full_disk_is_dropped(tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 0.5})
    with log.path.open("a", encoding="utf-8") as file:
        file.write("2,0.")
    log.columns = []  # as after a failure
    log.add({"step": 3, "loss": 0.25})
    assert log.path.read_text(encoding="utf-8").splitlines() == ["step,loss", "1,0.5", "3,0.25"]


@pytest.mark.parametrize("old", [b"\xff\xfe\x00step", b"step,loss\n1,0\x00.5\n", b"step\n" + b"x" * 200_000 + b"\n"])
def test_an_older_log_that_is_no_table_is_moved_aside(old, tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    log.path.write_bytes(old)
    log.begin(5)
    log.add({"step": 6, "loss": 0.5})
    assert log.path.read_text(encoding="utf-8").splitlines()[-1] == "6,0.5"
    aside = tmp_path / "log.unreadable.csv"
    assert not aside.exists() or aside.read_bytes() == old


@pytest.mark.parametrize("old", ["step,loss\n1,0.5\nx,0.5\n2.5,1\n,\n3,1,2,3\n", "loss\n0.5\n", "\n\n", "1,2\n1,2\n"])
def test_rows_without_a_step_are_dropped(old, tmp_path):
    log = TrainingLog(tmp_path / "log.csv")
    log.path.write_text(old)
    log.begin(5)
    log.add({"step": 6, "loss": 0.5})
    rows = log.path.read_text(encoding="utf-8").splitlines()
    assert rows == ["step,loss", *(["1,0.5"] if "1,0.5" in old else []), "6,0.5"]
