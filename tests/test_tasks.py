"""Tasks of recipes that hear, and of sentence embeddings: what is guessed, read, computed and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hearing import RATE, of_classes, save_wav2vec2, save_whisper, tones, with_texts, write_sound
from scipy.io import wavfile
from test_guessing import classes, pairs, write
from test_sentence_transformers import TEXTS, build
from typer.testing import CliRunner

from hf_prune import PruningError, cli, workflow
from hf_prune.card import model_card
from hf_prune.data import DataSettings, load_split, prepare_pairs, prepare_speech
from hf_prune.data.sounds import read_sound
from hf_prune.errors import RecipeError, UnsupportedModelError
from hf_prune.exporting.parity import Graph
from hf_prune.guessing import Wish, guess
from hf_prune.job import evaluate, evaluate_graph
from hf_prune.metrics import compute_metrics_for, load_metric
from hf_prune.similarity import Sentences, cosines, modules_folder, similarity_loss
from hf_prune.speech import FrameTrainer, Listener, texts_of

SPOKEN = ["abc", "ca", "bb", "acab", "cc", "ab", "ba", "abca", "bc", "ac"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Hold one of each model and data, which tests only read."""
    folder = tmp_path_factory.mktemp("home")
    save_wav2vec2(folder / "wav2vec2")
    save_wav2vec2(folder / "letters", "Wav2Vec2ForCTC")
    save_whisper(folder / "whisper")
    of_classes(folder / "commands", 20)
    with_texts(folder / "recordings", SPOKEN)
    build("sentence", folder / "plain").save(str(folder / "sentences"))
    return folder


def scored(folder: Path, most: float = 5.0) -> str:
    rows = [{"sentence1": TEXTS[n % 4], "sentence2": TEXTS[n // 4], "score": n % 5 / 4 * most} for n in range(16)]
    return write(folder / "sts.csv", rows)


# what is guessed
CASES = {
    "folders of sounds": ("wav2vec2", "commands", "audio-classification", {"audio": "audio", "label": "label"}, True),
    "sounds for a model that writes": ("whisper", "commands", "audio-classification", {"audio": "audio"}, True),
    "what was said": ("whisper", "recordings", "speech-recognition", {"audio": "audio", "label": "text"}, False),
    "letters": ("letters", "recordings", "speech-recognition-ctc", {"audio": "audio", "label": "text"}, False),
    "letters that are new": ("wav2vec2", "recordings", "speech-recognition-ctc", {"label": "text"}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_with_sounds_is_guessed(name, home):
    model, data, task, columns, trained = CASES[name]
    guessed = guess(Wish(str(home / model), str(home / data)))
    recipe = guessed.recipe
    assert recipe.task == task
    assert {key: getattr(recipe.data, key) for key in columns} == columns
    assert recipe.metrics == (["accuracy"] if "classification" in task else ["wer"])
    assert "metrics" in guessed.table()
    assert (recipe.dense is not None) == trained
    assert recipe.onnx == (task == "speech-recognition")
    assert recipe.data.test_size == 0.2


def test_a_pair_with_a_score_is_of_embeddings_where_the_model_is(home, tmp_path):
    data = scored(tmp_path)
    recipe = guess(Wish(str(home / "sentences"), data)).recipe
    assert (recipe.task, recipe.metrics, recipe.dense) == ("sentence-similarity", ["spearmanr", "pearsonr"], None)
    assert (recipe.data.text, recipe.data.label, recipe.data.full_score) == (["sentence1", "sentence2"], "score", 5.0)
    bert, _ = pairs(tmp_path / "bert")
    assert guess(Wish(bert, data)).recipe.task == "text-classification"
    told = guess(Wish(bert, data, task="sentence-similarity")).recipe
    assert (told.task, told.dense is None) == ("sentence-similarity", False)
    _, reviews = classes(tmp_path)
    assert guess(Wish(str(home / "sentences"), reviews)).recipe.task == "text-classification"


def test_splits_are_folders(home, tmp_path):
    of_classes(tmp_path / "split" / "train", 20)
    of_classes(tmp_path / "split" / "test", 4)
    recipe = guess(Wish(str(home / "wav2vec2"), str(tmp_path / "split"))).recipe
    assert (recipe.data.evaluation, recipe.data.test_size) == (["test"], None)
    assert list(map(len, load_split(recipe.data))) == [20, 4]


def test_a_model_of_many_languages_is_told_which(home, tmp_path):
    model = transformers.WhisperForConditionalGeneration.from_pretrained(home / "whisper")
    model.generation_config.is_multilingual = True
    model.save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(home / "whisper").save_pretrained(tmp_path)
    guessed = guess(Wish(str(tmp_path), str(home / "recordings")))
    assert guessed.recipe.data.language == "english"
    assert "a guess: data.language=german says another" in guessed.table()
    with pytest.raises(RecipeError, match="data.language must say what is spoken"):
        workflow.validate(guessed.recipe, ["data.language=null", f"output={tmp_path / 'run'}"])
    with pytest.raises(RecipeError, match="data.language must be one that the model knows.* Received: 'klingon'"):
        workflow.validate(guessed.recipe, ["data.language=klingon", f"output={tmp_path / 'run'}"])


# sounds
@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32", "stereo", "bytes"])
def test_every_sort_of_wav_file_is_the_same_sound(kind, tmp_path):
    whole = tones("abc")
    unit = whole / 32768
    made = {
        "uint8": np.round(unit * 128 + 128).astype(np.uint8),
        "int32": whole.astype(np.int32) * 65536,
        "float32": unit.astype(np.float32),
        "stereo": np.stack([whole, whole // 2], 1),
    }.get(kind, whole)
    wavfile.write(tmp_path / "one.wav", RATE, made)
    path = {"path": str(tmp_path / "one.wav"), "bytes": None}
    value = {"path": None, "bytes": (tmp_path / "one.wav").read_bytes()} if kind == "bytes" else path
    found = read_sound(value, RATE)
    assert found.dtype == np.float32
    assert np.allclose(found, unit * (0.75 if kind == "stereo" else 1), atol=0.01 if kind == "uint8" else 1e-4)


def test_another_rate_is_resampled(tmp_path):
    value = {"path": str(write_sound(tmp_path / "one.wav", "aaaa", rate=8000)), "bytes": None}
    found = read_sound(value, RATE)
    assert len(found) == 0.2 * RATE
    assert np.abs(np.fft.rfft(found)).argmax() * RATE / len(found) == pytest.approx(400, abs=5)


def test_other_files_need_an_extra_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "one.flac").write_bytes(b"fLaC")
    value = {"path": str(tmp_path / "one.flac"), "bytes": None}
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(PruningError, match=r"pip install 'hf_prune\[audio\]'"):
        read_sound(value, RATE)
    with pytest.raises(PruningError, match=r"Received: 'bytes'"):
        read_sound({"path": None, "bytes": b"RIFF"}, RATE)
    with pytest.raises(PruningError, match="a sound cannot be read"):
        read_sound({"path": str(tmp_path / "gone.wav"), "bytes": None}, RATE)


def test_flac_is_read_by_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "one.flac", tones("ab"), RATE)
    value = {"path": str(tmp_path / "one.flac"), "bytes": None}
    assert np.allclose(read_sound(value, RATE), tones("ab") / 32768, atol=1e-4)
    (tmp_path / "broken.flac").write_bytes(b"fLaC")
    with pytest.raises(PruningError, match="a sound cannot be read"):
        read_sound({"path": str(tmp_path / "broken.flac"), "bytes": None}, RATE)


def test_a_data_set_with_sounds_in_it_is_read(home, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Audio, Features, Value

    sound = (home / "recordings" / "0.wav").read_bytes()
    schema = Features({"audio": Audio(), "text": Value("string")}).arrow_schema  # names its types, as the Hub's do
    rows = {"audio": [{"bytes": sound, "path": None}] * 4, "text": ["abc"] * 4}
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "train.parquet")
    settings = DataSettings(name=str(tmp_path), audio="audio", label="text", test_size=0.5)
    processor = transformers.AutoProcessor.from_pretrained(home / "letters")
    row = prepare_speech(load_split(settings, labels="free").train, processor, settings)[0]
    assert np.allclose(row["sound"], tones("abc") / 32768, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,text\n0.wav,a\n", "must have a column file_name"),
        ("file_name,text\n../x.wav,a\n", "a file in its folder"),
    ],
)
def test_metadata_that_names_no_files_is_refused(text, words, tmp_path):
    with_texts(tmp_path / "s", ["a"])
    (tmp_path / "s" / "metadata.csv").write_text(text)
    write_sound(tmp_path / "x.wav", "a")
    with pytest.raises(PruningError, match=words):
        load_split(DataSettings(name=str(tmp_path / "s"), audio="audio", label="text", test_size=0.5), labels="free")


def test_what_does_not_fit_a_task_is_refused_before_training(home, tmp_path):
    recipe = guess(Wish(str(home / "wav2vec2"), str(home / "commands"), output=tmp_path / "run")).recipe
    for wrong, error, words in (
        ("onnx=true", UnsupportedModelError, "needs onnx=false"),
        ("data.audio=label", PruningError, "different columns"),
        ("data.label=audio", PruningError, "different columns"),
        ("metrics=[wer]", PruningError, "wer goes with speech, ctc"),
        (f"model.name={home / 'plain'}", RecipeError, "can be one for audio-classification"),
    ):
        with pytest.raises(error, match=words):
            workflow.validate(recipe, [wrong])
    spoken = guess(Wish(str(home / "letters"), str(home / "recordings"), output=tmp_path / "run")).recipe
    for wrong, words in (("metrics=[accuracy]", "speech|ctc has wer, cer"), ("data.max_seconds=0.01", "that short")):
        with pytest.raises(PruningError, match=words):
            workflow.validate(spoken, [wrong])


# what was said
def test_word_and_letter_errors_by_hand():
    # one word too many, one wrong, one missing, of six
    found, wanted = ["the black cat sat", "it on"], ["the cat sat", "he sat on"]
    assert load_metric("wer").compute(predictions=found, references=wanted) == {"wer": 3 / 6}
    # "kitten" to "sitting": two letters exchanged, one put in, of seven
    assert load_metric("cer").compute(predictions=["kitten"], references=["sitting"]) == {"cer": 3 / 7}
    assert load_metric("wer").compute(predictions=["a b"], references=[""])["wer"] == 2.0


@pytest.mark.parametrize("ctc", [True, False])
def test_tokens_become_texts_again(ctc, home):
    processor = transformers.AutoProcessor.from_pretrained(home / ("letters" if ctc else "whisper"))
    text = "ABBA AB"
    labels = [*processor.tokenizer(text)["input_ids"], -100, -100]
    frames = [token for one in labels[:-2] for token in ((one, one, 0) if ctc else (one,))]
    compute = compute_metrics_for(["wer"], "ctc" if ctc else "speech", texts=texts_of(processor, ctc=ctc))
    same = transformers.EvalPrediction(np.array([[*frames, -100]]), np.array([labels]))
    assert texts_of(processor, ctc=ctc)(*same) == ([text], [text])
    assert compute(same) == {"wer": 0.0}


def test_a_decoder_is_told_what_came_before(home):
    processor = transformers.AutoProcessor.from_pretrained(home / "whisper")
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(home / "whisper")
    rows = [{"sound": tones(text) / 32768, "labels": processor.tokenizer(text)["input_ids"]} for text in ("a", "abc")]
    batch = Listener(processor.feature_extractor, processor.tokenizer, model)(rows)
    assert batch["input_features"].shape == (2, 8, 100)
    letters = [processor.tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in "abc"]
    short, long = [259, letters[0], 256], [259, *letters, 256]  # no timestamps, letters, end
    assert batch["labels"].tolist() == [[*short, -100, -100], long]
    assert batch["decoder_input_ids"].tolist() == [[257, *short, 256], [257, *long[:-1]]]
    alone = model(**{key: value for key, value in batch.items() if key != "decoder_input_ids"}).loss
    assert torch.isclose(alone, model(**batch).loss)


def test_what_is_padding_says_nothing(home, tmp_path):
    processor = transformers.AutoProcessor.from_pretrained(home / "letters")
    model = transformers.AutoModelForCTC.from_pretrained(home / "letters").eval()
    rows = [{"sound": tones(text) / 32768, "labels": [3]} for text in ("ab", "abcab")]
    listener = Listener(processor.feature_extractor, processor.tokenizer)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_names=["labels"])
    trainer = FrameTrainer(model, arguments, data_collator=listener)
    _, best, _ = trainer.prediction_step(model, listener(rows), prediction_loss_only=False)
    alone = model(**{key: value for key, value in listener(rows[:1]).items() if key != "labels"}).logits.argmax(-1)[0]
    assert best[0, : len(alone)].tolist() == alone.tolist()
    assert set(best[0, len(alone) :].tolist()) == {-100}
    assert -100 not in best[1].tolist()


def test_long_ones_are_left_out_and_letters_are_written_as_the_model_has_them(home, caplog):
    settings = DataSettings(name=str(home / "recordings"), audio="audio", label="text", test_size=0.2, max_seconds=0.16)
    processor = transformers.AutoProcessor.from_pretrained(home / "letters")
    rows = load_split(settings, labels="free").train
    short = sum(len(text) < 4 for text in rows["text"][:])
    prepared = prepare_speech(rows, processor, settings)
    assert len(prepared) == short < len(rows)
    assert "left out" in caplog.text
    assert processor.tokenizer.unk_token_id not in prepared[0]["labels"]


# sentences
@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_cosines_are_those_of_sentence_transformers(mode, home, tmp_path):
    from sentence_transformers import SentenceTransformer

    theirs = build("sentence", tmp_path / "plain")
    theirs[1] = type(theirs[1])(16, pooling_mode=mode)
    theirs.save(str(tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    sentences = Sentences(tokenizer, modules_folder(str(tmp_path / "model")))
    pairs_of = [(TEXTS[0], "good nice film"), (TEXTS[1], "story")]
    rows = [{"input_ids": tokenizer(list(one))["input_ids"], "labels": 0.5} for one in pairs_of]
    rows = [{**row, "attention_mask": [[1] * len(one) for one in row["input_ids"]]} for row in rows]
    batch, model = sentences.collate(rows), transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    found = cosines(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch)
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    first, second = (torch.tensor(again.encode([pair[side] for pair in pairs_of])) for side in (0, 1))
    expected = torch.nn.functional.cosine_similarity(first, second)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity_loss(model, batch), (expected - 0.5).square().mean(), atol=1e-5, rtol=0)


def test_a_run_on_a_model_of_sentence_transformers_can_be_loaded_by_them(home, tmp_path):
    from sentence_transformers import SentenceTransformer

    quick = ["train.epochs=1", "train.batch_size=4", "schedule.frequency=1", "measure.repeats=1", "measure.length=8"]
    guessed = guess(Wish(str(home / "sentences"), scored(tmp_path), output=tmp_path / "run"), [*quick, "onnx=false"])
    job = workflow.prepare(guessed.recipe)
    for stage in (workflow.check, workflow.prune_and_distil, workflow.score, workflow.save_and_compare):
        stage(job)
    loaded = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    rows = load_split(guessed.recipe.data, labels="free").evaluation
    first, second = (torch.tensor(loaded.encode(rows[f"sentence{side}"][:])) for side in (1, 2))
    found = torch.nn.functional.cosine_similarity(first, second).numpy()
    expected = load_metric("spearmanr").compute(predictions=found, references=rows["score"][:])["spearmanr"]
    assert job.report.metrics["spearmanr"]["pruned"] == pytest.approx(expected, abs=1e-3)
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "run" / "model")])
    assert shown.exit_code == 0
    assert "layers.0.attention.heads" in shown.output
    # a file that was exported is scored by the same rule
    inputs = ("input_ids", "attention_mask")
    graph = Graph(inputs, torch.no_grad()(lambda batch: dict(job.pruned(**batch))))
    scores = evaluate(job, job.pruned)
    assert evaluate_graph(job, graph) == {one: pytest.approx(scores[one], abs=1e-4) for one in job.recipe.metrics}


def test_parts_that_a_recipe_would_not_train_are_refused(home, tmp_path):
    folder = tmp_path / "model"
    build("sentence", tmp_path / "plain").save(str(folder))
    told = json.loads((folder / "modules.json").read_text())
    for name, place in (("Dense", "2_Dense"), ("Pooling", "../outside")):
        more = [*told, {"idx": 2, "name": "2", "path": place, "type": f"sentence_transformers.models.{name}"}]
        (folder / "modules.json").write_text(json.dumps(more))
        with pytest.raises(RecipeError, match=f"Received: {name}"):
            Sentences(None, modules_folder(str(folder)))


def test_scores_above_the_full_one_are_refused(home, tmp_path):
    settings = DataSettings(name=scored(tmp_path), text=["sentence1", "sentence2"], label="score", test_size=0.5)
    rows = load_split(settings, labels="free").train
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "plain")
    with pytest.raises(PruningError, match="as 5 in STS-B. Received: 1, and a score of"):
        prepare_pairs(rows, tokenizer, settings)
    halves = prepare_pairs(rows, tokenizer, settings.model_copy(update={"full_score": 10.0}))
    assert max(halves["labels"][:]) <= 0.5


def test_the_hub_has_its_own_names_for_tasks():
    card = model_card({"settings": {"task": "speech-recognition-ctc"}})
    assert "pipeline_tag: automatic-speech-recognition" in card


def test_a_pair_without_a_score_is_refused(home, tmp_path):
    data = scored(tmp_path)
    lines = Path(data).read_text().splitlines()
    Path(data).write_text("\n".join([*lines[:-1], lines[-1].rpartition(",")[0] + ","]) + "\n")
    with pytest.raises(PruningError, match="a number in each row. Received: 'score', which has none in 1 of"):
        guess(Wish(str(home / "sentences"), data, task="sentence-similarity"))
