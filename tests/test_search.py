"""A search between runs: what is tried next, a real kill and what happens after it, judging again, what is refused."""

import csv
import json
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from types import SimpleNamespace

import pytest
from models import TINY_RECIPE
from typer.testing import CliRunner

from hf_prune import PruningError, Target, cli, load_pruned, search, workflow
from hf_prune.recipe import load_recipe
from hf_prune.searching.aims import Aim, Tried, aim_of
from hf_prune.searching.trials import Trials

TINY = [
    *TINY_RECIPE,
    "pruners={heads: {score: random}, neurons: {score: random, multiple_of: 8}}",
    "dense={epochs: 8, batch_size: 16, learning_rate: 0.003}",
    "train={epochs: 1, learning_rate: 1.0e-6}",  # nothing is won back: each target loses more than the one above it
    "schedule={kind: oneshot, begin: 2, end: 2}",
    "measure.repeats=2",
    "onnx=false",
]


# which value is tried next
def found_by(aim, limit, most=20):
    """Return what a search tries where every model of at least this size is good."""
    tried = []
    while len(tried) < most and (value := aim.next([Tried(aim.size(one), aim.size(one) >= limit) for one in tried])):
        tried.append(value)
    return tried


def test_the_recipes_own_target_comes_first_then_halves_then_middles():
    assert found_by(Aim("macs", 0.5), 0.2, most=6) == [0.5, 0.25, 0.125, 0.1768, 0.2102, 0.1928]


@pytest.mark.parametrize(("key", "first"), [("macs", 0.4), ("speedup", 2.0), ("size_mb", 40.0), ("latency_ms", 7.0)])
@pytest.mark.parametrize("limit", [0.11, 0.35, 0.8])
def test_any_key_comes_within_a_few_percent_of_the_smallest_good_model(key, first, limit):
    aim = Aim(key, first)
    limit *= 1 if aim.dense else first / 0.4
    tried = found_by(aim, limit)
    sizes = [aim.size(one) for one in tried]
    assert len(tried) < 12
    assert limit <= min(one for one in sizes if one >= limit) <= 1.05 * limit
    assert all(aim.range[0] <= one <= aim.range[1] for one in tried)


def test_a_target_near_the_dense_model_that_is_not_good_ends_the_search():
    assert found_by(Aim("macs", 0.5), 1.1)[-1] > 0.95


def test_what_runs_elsewhere_is_not_tried_again():
    aim = Aim("macs", 0.5)
    assert aim.next([Tried(0.5, None)]) == 0.25
    assert aim.next([Tried(0.5, True), Tried(0.25, False), Tried(0.3, None)]) == 0.3873


def test_the_key_is_that_of_the_target():
    assert aim_of(SimpleNamespace(target=Target(latency_ms=3))) == Aim("latency_ms", 3.0)
    assert aim_of(load_recipe("quickstart")) == Aim("macs", 0.33)
    with pytest.raises(PruningError, match="Received: target=None"):
        aim_of(SimpleNamespace(target=None))


def test_two_processes_try_different_values_and_store_what_both_found(tmp_path):
    storage, asked = f"sqlite:///{tmp_path / 'x.db'}", {}
    one, two = (
        Trials(tmp_path, storage, "x", Aim("macs", 0.5), ["maximize", "minimize"], lambda trial: trial.values[0] > 0.5)
        for _ in range(2)
    )

    def make(number, value):
        asked[number] = value
        if number == 0:
            assert two.release_killed() == []  # the first one is at work
            two.run(make)
        return [value, value], {"told": number}

    one.run(make)
    assert asked == {0: 0.5, 1: 0.25}
    assert [(trial.number, trial.values, trial.user_attrs["told"]) for trial in one.complete] == [
        (0, [0.5, 0.5], 0),
        (1, [0.25, 0.25], 1),
    ]
    assert two.front() == {0, 1}
    assert one.running == []


def test_a_trial_without_a_model_counts_as_not_good_and_is_not_run_again(tmp_path):
    trials = Trials(tmp_path, f"sqlite:///{tmp_path / 'x.db'}", "x", Aim("macs", 0.5), ["maximize"], lambda one: True)

    def refused(number, value):
        raise PruningError("no such model")

    trials.run(refused)
    (ended,) = trials.ended
    assert ended.user_attrs["error"] == "no such model"
    assert trials.tried() == [Tried(0.5, False)]

    def interrupted(number, value):
        raise KeyboardInterrupt  # the signal itself is ignored in what a shell runs in the background

    with pytest.raises(KeyboardInterrupt):
        trials.run(interrupted)
    assert len(trials.ended) == 1
    assert trials.running == []


def test_a_trial_without_a_model_is_told(tmp_path, monkeypatch, capsys):
    def refused(job):
        raise PruningError("its training has diverged")

    monkeypatch.setattr("hf_prune.searching.running.make_small", refused)
    with pytest.raises(PruningError, match="No trial has ended with a model"):
        search("quickstart", [*TINY, "dense=null"], trials=2, output=tmp_path / "found")
    told = " ".join(capsys.readouterr().err.split())
    assert "Trial 0 has no model, and counts as one that lost too much: its training has diverged" in told


# a search that is killed
def states(folder):
    """Return the numbers of trials by their state, as the database has them."""
    if not (folder / "trials.db").is_file():
        return {}
    with sqlite3.connect(f"file:{folder / 'trials.db'}?mode=ro", uri=True) as database:
        try:
            rows = database.execute("SELECT number, state FROM trials").fetchall()
        except sqlite3.OperationalError:  # it is being made
            return {}
    return {state: [number for number, one in rows if one == state] for _, state in rows}


def kill_in_second_trial(folder):
    """Search in a forked process, which has imported all already, and kill it."""
    child = os.fork()
    if not child:
        try:
            search("quickstart", TINY, trials=2, output=folder)
        finally:
            os._exit(1)
    until = time.monotonic() + 240
    while states(folder).get("RUNNING") != [1] or not (folder / "trials" / "001").is_dir():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def times_in(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Kill a search in its second trial, go on, and go on once more where much more may be lost."""
    folder = tmp_path_factory.mktemp("search") / "found"
    kill_in_second_trial(folder)
    told = SimpleNamespace(folder=folder, killed=states(folder), before=times_in(folder))
    with pytest.raises(PruningError) as told.refusal:
        search("quickstart", TINY, trials=2, output=folder)
    told.resumed, told.after = states(folder), times_in(folder)
    told.judged = search("quickstart", TINY, max_drop=0.95, trials=2, output=folder)
    told.again = times_in(folder)
    told.result = search("quickstart", TINY, max_drop=0.95, trials=3, output=folder)
    return told


def test_after_a_kill_the_killed_trial_is_run_again_and_nothing_else(story):
    assert story.killed == {"COMPLETE": [0], "RUNNING": [1]}
    assert story.resumed == {"COMPLETE": [0, 2], "FAIL": [1]}
    assert len(story.before) == 2  # dense and the first trial's
    assert story.before.items() <= story.after.items()
    assert not (story.folder / "trials" / "001").exists()


def test_where_none_is_good_enough_the_best_is_named(story):
    said = str(story.refusal.value)
    assert "none lost at most 0.01 of the dense model's accuracy" in said
    best = min(story.judged.candidates, key=lambda one: one.drop)
    assert f"trial {best.trial}, target.macs={best.asked:g}, which lost {best.drop:.4f}" in said


def test_what_is_good_enough_can_be_judged_anew_without_a_run(story):
    assert story.again == story.after
    assert [one.trial for one in story.judged.candidates] == [0, 2]
    assert all(one.good for one in story.judged.candidates)
    first, second = story.judged.candidates
    assert first.asked == 0.33
    assert second.asked == pytest.approx((0.33 * 1.0) ** 0.5, abs=1e-3)  # none was good: between the first and dense
    assert story.judged.best.trial == 0


def test_a_trial_goes_on_from_the_smallest_good_model_above_it(story):
    last = story.result.candidates[-1]
    assert (last.asked, last.begun_from) == (0.165, 0)
    report = json.loads((last.folder.parent / "report.json").read_text())
    assert report["settings"]["macs_left"] == pytest.approx(last.macs / story.result.dense.macs)
    assert last.macs < story.result.candidates[0].macs < story.result.candidates[1].macs


def test_every_model_of_the_front_loads_and_gives_its_metric(story):
    job = workflow.prepare(load_recipe("quickstart", [*TINY, f"output={story.folder}"]))
    assert story.result.front
    for one in story.result.front:
        model = load_pruned(one.folder)
        assert sum(parameter.numel() for parameter in model.parameters()) == one.parameters
        assert workflow.evaluate(job, model)["accuracy"] == pytest.approx(one.metric, abs=2e-3)


def test_the_front_holds_what_nothing_beats(story):
    values = {one.trial: (one.metric, -one.macs, -one.size_mb) for one in story.result.candidates}
    beaten = {
        mine
        for mine, ours in values.items()
        for theirs in values.values()
        if all(a >= b for a, b in zip(theirs, ours)) and theirs != ours
    }
    assert {one.trial for one in story.result.front} == set(values) - beaten


def test_times_are_shares_of_the_dense_models_time_beside_them(story):
    """A machine is faster in one trial than in another: what was measured in turn can be compared."""
    runtime, dense = story.result.runtime, story.result.dense.latency_ms
    reports = [json.loads((one.folder.parent / "report.json").read_text()) for one in story.result.candidates]
    for one, report in zip(story.result.candidates, reports, strict=True):
        before, after = (report[which]["latency_ms"][runtime] for which in ("dense", "pruned"))
        assert one.latency_ms / dense == pytest.approx(after / before)
    assert dense == pytest.approx(statistics.median(one["dense"]["latency_ms"][runtime] for one in reports))


def test_table_csv_json_and_picture(story):
    rows = list(csv.DictReader((story.folder / "trials.csv").open()))
    assert [row["trial"] for row in rows] == ["", "0", "2", "3"]
    assert [float(row["metric"]) for row in rows[1:]] == [one.metric for one in story.result.candidates]
    told = json.loads((story.folder / "search.json").read_text())
    assert told["best"] == story.result.best.trial == 3
    assert (story.folder / "front.png").read_bytes().startswith(b"\x89PNG")
    lines = str(story.result).splitlines()
    assert lines[0].endswith("loses at most 0.95 of accuracy: trial 3")
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["dense", "2", "0", "3"]
    assert "smallest" in lines[-1]


def test_the_command_shows_what_there_is(story):
    words = ["search", "quickstart", *TINY, "--max-drop", "0.95", "--trials", "2", "--output", str(story.folder)]
    said = CliRunner().invoke(cli.app, words, env={"COLUMNS": "140"}).output
    assert str(story.result) in said
    assert said.strip().endswith(f"The smallest: {story.folder / 'trials' / '003' / 'model'}")


def test_a_search_of_another_recipe_is_refused(story, tmp_path):
    copied = shutil.copytree(story.folder, tmp_path / "copied")
    with pytest.raises(PruningError, match="Received: other train"):
        search("quickstart", [*TINY, "train.epochs=2"], output=copied)
    with pytest.raises(PruningError, match="Received: other metric"):
        search("quickstart", TINY, metric="loss", output=copied)


@pytest.mark.parametrize(
    ("overrides", "settings", "words"),
    [
        ([], {"metric": "acuracy"}, "Did you mean 'accuracy'"),
        ([], {"max_drop": 1}, "Did you mean 0.01"),
        ([], {"max_drop": -0.1}, r"\[0, 1\)"),
        ([], {"trials": 0}, "trials must be 1 or more"),
        (
            ["target=null", "pruners.heads.sparsity=0.5", "pruners.neurons.sparsity=0.5"],
            {},
            "needs a recipe with a target",
        ),
        ([], {"storage": "nowhere"}, "storage must be the URL"),
        (["data.label=lable"], {}, "Did you mean 'label'"),
    ],
)
def test_what_does_not_do_is_refused_before_anything_is_trained(overrides, settings, words, tmp_path):
    with pytest.raises(PruningError, match=words):
        search("quickstart", [*TINY, *overrides], output=tmp_path / "out", **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PruningError, match=r"pip install 'hf_prune\[search\]'"):
        search("quickstart")


def test_ctrl_c_says_how_many_trials_are_kept(tmp_path, monkeypatch):
    def end_one_and_stop(*told):
        (tmp_path / "trials" / "0000").mkdir(parents=True)
        (tmp_path / "trials" / "0000" / "report.json").write_text("{}")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background has it ignored
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("hf_prune.searching.running.prepare", end_one_and_stop)
    result = CliRunner().invoke(cli.app, ["search", "quickstart", *TINY, "--output", str(tmp_path)])
    assert result.exit_code == 130
    assert f"Kept: 1 trial that ended, in {tmp_path}. The same command goes on" in " ".join(result.output.split())
