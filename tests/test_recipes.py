"""Each shipped recipe runs to the end as it stands, but for a tiny model, a little data and a short training."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hearing import of_classes, save_wav2vec2, save_whisper, with_texts
from test_guessing import answers, images, language, lists, masked, tokens, write, written
from test_sentence_transformers import build

from hf_prune import load_pruned, workflow
from hf_prune.recipe import load_recipe, shipped_recipes
from hf_prune.recipe_tasks import RECIPE_TASKS

DRAW = random.Random(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def sounds(home):
    return save_wav2vec2(home / "wav2vec2"), of_classes(home / "commands")


def speech(home):
    texts = ["".join(DRAW.choices("abc", k=4)) for _ in range(32)]
    return save_whisper(home / "whisper"), with_texts(home / "recordings", texts)


def sentences(home):
    build("sentence", home / "plain").save(str(home / "sentences"))
    words = ["good film", "bad film", "nice story", "dull story"]
    rows = [{"sentence1": words[n % 4], "sentence2": words[n // 4 % 4], "score": n % 5 / 4} for n in range(32)]
    return str(home / "sentences"), write(home / "stsb.csv", rows)


MADE = {  # what makes a model and data of the recipe's columns, and what else must be changed
    "entities": (tokens, []),
    "answers": (answers, []),
    "language_model": (language, []),
    "masked_words": (masked, []),
    "summaries": (written, ["data.text=document"]),
    "image_folder": (images, []),
    "emotions": (lists, []),
    "sounds": (sounds, []),
    "speech": (speech, []),
    "similarity": (sentences, []),
}
QUICK = ["data.max_length=16", "data.config=null", "data.test_size=0.25", "data.train_limit=24"]
QUICK += ["train.epochs=1", "train.batch_size=8", "schedule.begin=0", "schedule.frequency=1"]
QUICK += ["measure.repeats=1", "measure.length=8", "onnx=false"]


def test_every_recipe_is_run():
    elsewhere = {"quickstart", "minilm_sst2"}  # in test_workflow.py
    assert set(MADE) | elsewhere == set(shipped_recipes())


@pytest.mark.parametrize("name", MADE)
def test_a_shipped_recipe_runs(name, tmp_path):
    make, changed = MADE[name]
    model, data = make(tmp_path)
    dense = [] if load_recipe(name).dense is None else ["dense.epochs=1", "dense.batch_size=8"]
    places = [f"model.name={model}", f"data.name={data}", f"output={tmp_path / 'run'}"]
    recipe = load_recipe(name, [*places, *QUICK, *dense, *changed])
    report = workflow.run(recipe)
    share = report.pruned.prunable_macs / report.dense.prunable_macs
    assert recipe.target.macs - 0.2 < share <= recipe.target.macs
    assert set(recipe.metrics) <= set(report.metrics)
    assert all(np.isfinite(both["pruned"]) for both in report.metrics.values())
    small = load_pruned(tmp_path / "run" / "model", model_class=RECIPE_TASKS[recipe.task].auto_class)
    assert sum(one.numel() for one in small.parameters()) == report.pruned.parameters
