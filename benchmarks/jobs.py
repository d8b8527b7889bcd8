# ruff: noqa: E402 (the tests folder has to be on the path first)
"""Jobs of a stranger, each by one command or at most ten lines, in a folder with tiny models and files.

    python benchmarks/jobs.py [--only 3 9]

Needs the extras `onnx` and `test`. The models are random and the data too: what counts is that a job ends, what it
leaves, and how many lines were typed. Writes results/jobs.json: for each job its lines, exit status, seconds and
whether it left what it should.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "ACCELERATE_USE_CPU": "true"}
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from common import add_record
from hearing import save_whisper, with_texts
from test_guessing import answers, images, language, save, sentence, tokens, write

NOTEBOOK = """
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from hf_prune import HeadPruner, NeuronPruner, PruningCallback, Target
model = AutoModelForSequenceClassification.from_pretrained("my-bert")
tokenizer, ids = AutoTokenizer.from_pretrained("my-bert"), model.config.label2id
data = load_dataset("csv", data_files="reviews.csv")["train"].train_test_split(0.2)
data = data.map(lambda row: {**tokenizer(row["review"]), "label": ids[row["sentiment"]]})
trainer = Trainer(model, TrainingArguments("runs/book"), train_dataset=data["train"], processing_class=tokenizer)
pruning = PruningCallback([HeadPruner(), NeuronPruner()], target=Target(macs=0.5))
pruning.attach(trainer).train(), print(pruning.report)
"""
ONE_SHOT = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_prune import HeadPruner, NeuronPruner, Target, prune, save_pruned
model, tokenizer = AutoModelForCausalLM.from_pretrained("llama"), AutoTokenizer.from_pretrained("llama")
words = tokenizer(open("book.txt").read(), return_tensors="pt").input_ids[0][:640].view(20, 1, 32)
batches = [{"input_ids": window, "labels": window} for window in words]
print(prune(model, [HeadPruner(), NeuronPruner()], target=Target(macs=0.8), data=batches[:16]))
print("perplexity", sum(model(**batch).loss for batch in batches[16:]).div(4).exp())
print(tokenizer.decode(model.generate(words[0][:, :4], max_new_tokens=8)[0]))
save_pruned(model, "runs/text", tokenizer=tokenizer)
"""
SCORE = """
from hf_prune import NeuronPruner, prune, register_score
from transformers import AutoModelForSequenceClassification
@register_score("largest")
def largest(weight):
    return weight.abs() ** 4
print(prune(AutoModelForSequenceClassification.from_pretrained("my-bert"), NeuronPruner(0.5, score="largest")))
"""
RUN = "hf-prune run --model {} --data {} --macs 0.5 --output {}"
JOBS: dict[str, tuple[str, str]] = {  # what is typed (shell, or Python from a line break on), and what it leaves
    "a CSV file and a fine-tuned BERT become int8 ONNX, with plots": (
        RUN.format("my-bert", "reviews.csv", "runs/csv 'export=[{format: onnx, quantize: dynamic}]'")
        + " && hf-prune report runs/csv",
        "runs/csv/report.html",
    ),
    "a DatasetDict, as in a notebook": (NOTEBOOK, "runs/book"),
    "a language model in one shot: perplexity, and what it writes": (ONE_SHOT, "runs/text/config.json"),
    "a score of one's own": (SCORE, "my-bert"),
    "a vision transformer on a folder of images": (RUN.format("vit", "pets", "runs/vit"), "runs/vit/model/config.json"),
    "Whisper on wav files": (RUN.format("my-whisper", "spoken", "runs/spoken"), "runs/spoken/model/config.json"),
    "names in sentences, by a file of one's own": (RUN.format("bert", "ner.jsonl", "runs/names"), "runs/names/model"),
    "answers to questions, by a file of one's own": (RUN.format("bert", "squad.jsonl", "runs/qa"), "runs/qa/model"),
    "a quarter faster, as measured": (
        "hf-prune run --model wide --data reviews.csv --speedup 1.25 --output runs/fast",
        "runs/fast/model/config.json",
    ),
    "two processes": (
        "hf-prune init --model my-bert --data reviews.csv --macs 0.5 --output two.yaml && "
        "torchrun --standalone --nproc_per_node 2 --no-python hf-prune run two.yaml output=runs/two",
        "runs/two/model/config.json",
    ),
    "a push that is only planned, and its card": (
        "hf-prune push runs/csv/model someone/small --dry-run",
        "runs/csv/model/README.md",
    ),
}


def prepare(home: Path) -> None:
    """Write the files and models of strangers."""
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    save(home / "my-bert", "BertForSequenceClassification", **names)
    wide = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 2048}
    save(home / "wide", "BertForSequenceClassification", **names, **wide)
    rows = [{"id": n, "review": " ".join(sentence()), "sentiment": ("neg", "pos")[n % 2]} for n in range(40)]
    write(home / "reviews.csv", rows)
    for make in (language, images, tokens, answers):
        make(home)
    save_whisper(home / "my-whisper")
    with_texts(home / "spoken", ["abc", "cab", "bca", "aab"] * 10)


def do(job: str, home: Path) -> dict[str, object]:
    typed, left = JOBS[job]
    python = typed.startswith("\n")
    command = [sys.executable, "-c", typed] if python else ["bash", "-c", typed]
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.time()
    done = subprocess.run(command, cwd=home, env={**os.environ, "PATH": paths}, capture_output=True, text=True)
    told = {"lines": len(typed.strip().splitlines()) if python else typed.count("&&") + 1, "status": done.returncode}
    told |= {"seconds": round(time.time() - start), "left": (home / left).exists()}
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of jobs, from 1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number, job in enumerate(JOBS, 1):
            if not options.only or number in options.only:
                add_record("jobs", {"job": job, **do(job, Path(folder))}, key=("job",))


if __name__ == "__main__":
    main()
