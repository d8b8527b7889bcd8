"""The table of what a run has logged: kills and resumes leave each row in it once."""

from __future__ import annotations

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
