"""The invariant over every model type that the installed transformers can build tiny: masked = shrunk = reloaded.

python benchmarks/architectures.py [--only TYPE ...] [--every] [--onnx]      run, in the lane of this interpreter
python benchmarks/architectures.py --table                         write docs/architectures.md from both lanes' results

Every tensor of every instance is drawn at random. Kind by kind and for all kinds together a random plan is masked and
shrunk; the shrunk model is saved and loaded again. Tolerances are shares of the largest output, in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

SHRUNK, RELOADED, SECONDS = 2e-4, 2e-5, 240
NAMED = """
bert roberta distilbert electra albert mpnet deberta deberta-v2 modernbert xlm-roberta camembert longformer big_bird
roformer xlnet gpt2 gpt_neo gpt_neox gptj opt bloom falcon mpt llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe
gemma gemma2 gemma3_text phi phi3 olmo2 olmoe starcoder2 stablelm cohere granite smollm3 t5 mt5 bart mbart pegasus
marian m2m_100 blenderbot whisper vit deit beit dinov2 swin clip siglip wav2vec2 hubert wavlm resnet convnext
""".split()  # noqa: SIM905
EXPORTED = """
bert roberta distilbert electra albert mpnet deberta-v2 xlm-roberta camembert gpt2 gpt_neox opt llama mistral qwen2 vit
deit beit dinov2 swin convnext resnet
""".split()  # noqa: SIM905
LANE = "optimum" if version("transformers").startswith("4.") else "v5"


def check(instance: tuple[str, str], onnx: bool) -> dict[str, Any]:
    """Build one instance and run everything on it; whatever goes wrong is part of the result."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {"type": instance[0], "task": instance[1]}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    start = time.monotonic()
    try:
        import zoo

        try:
            model = zoo.build(*instance)
            batch = zoo.inputs(model)
            zoo.outputs(model, batch)
        except Exception as error:
            return record | {"built": False, "reason": _short(error)}
        record["built"] = True
        record |= _invariant(model, batch)
        if onnx and instance[0] in EXPORTED:
            record["onnx"] = _onnx(model)
    except Exception as error:
        record["error"] = _short(error)
    finally:
        signal.alarm(0)
    return record | {"seconds": round(time.monotonic() - start, 1)}


def _invariant(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    import copy

    from hf_prune import UnsupportedModelError, find_groups, shrink, verify
    from hf_prune.architectures import inspect_model
    from hf_prune.selfcheck import random_plan

    refusals = {one.place: one.reason for one in inspect_model(model).refusals}
    try:
        groups = find_groups(model)
    except UnsupportedModelError as error:
        return {"kinds": {}, "refusals": refusals, "error": _short(error)}
    found = verify(model, batch)
    kinds = {kind: sum(group.kind == kind for group in groups) for kind in dict.fromkeys(g.kind for g in groups)}
    record = {"kinds": kinds, "groups": {group.name: group.units for group in groups}, "refusals": refusals}
    record |= {
        "shrunk": found.differences,
        "effects": found.effects,
        "failures": {kind: text[:200] for kind, text in found.failures.items()},
    }
    if found.failures:
        return record
    small = shrink(copy.deepcopy(model), random_plan(model, groups, 0))
    record["reloaded"] = _reloaded(small, batch)
    if record["reloaded"] > RELOADED:  # is it us? Some dense models do not come back from their own folder either
        record["dense_reloaded"] = _reloaded(model, batch)
    return record | {"native": [name for name, plan in _uniform(model, groups) if _is_stock(model, plan)]}


def _reloaded(model: Any, batch: dict[str, Any]) -> float:
    """Return how far a saved and loaded model is from the live one; 1e9 where it cannot be loaded."""
    import torch

    from hf_prune import load_pruned, save_pruned
    from hf_prune.selfcheck import output_of, relative_difference

    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder)
        try:
            again = load_pruned(folder, model_class=type(model), dtype=torch.float32)
        except Exception as error:
            print(f"{type(model).__name__} does not load: {_short(error)}", flush=True)
            return 1e9
        return relative_difference(output_of(model, batch), output_of(again, batch))


def _uniform(model: Any, groups: Any) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Yield plans that a stock config may be able to say."""
    from hf_prune.selfcheck import random_plan

    depth = random_plan(model, [group for group in groups if group.kind == "layer"], 0)
    yield "depth", depth
    for kind in ("neuron", "kv_group"):
        mine = [group for group in groups if group.kind == kind and group.units > 1]
        halves = {group.name: group.units // 2 // group.multiple * group.multiple for group in mine}
        yield kind, {group.name: list(range(max(group.least, group.multiple, halves[group.name]))) for group in mine}


def _is_stock(model: Any, plan: dict[str, list[int]]) -> bool:
    import copy

    from hf_prune import shrink

    return bool(plan) and bool(shrink(copy.deepcopy(model), plan).config.pruning_config["stock"])


def _onnx(model: Any) -> str:
    """Export the dense and a shrunk model; say "yes", or why not."""
    import copy

    from hf_prune import PruningError, export_onnx, find_groups, shrink
    from hf_prune.selfcheck import random_plan

    small = shrink(copy.deepcopy(model), random_plan(model, find_groups(model), 0))
    reason = "yes"
    for name, one in (("pruned", small), ("dense", model)):
        try:
            with tempfile.TemporaryDirectory() as folder:
                export_onnx(one, Path(folder) / "onnx", atol=1e-3)
            break
        except PruningError as error:  # is it the cut, or can the exporter not do this type at all?
            reason = f"{name}: {_short(error)}"
    return reason


def passed(record: dict[str, Any]) -> bool:
    """Whether an instance that was built holds the invariant for every kind that it offers."""
    fine = not record.get("error") and not record.get("failures") and record.get("kinds")
    shrunk = all(value <= SHRUNK for value in record.get("shrunk", {"": 1}).values())
    ours = (
        record.get("dense_reloaded", 0) <= RELOADED
    )  # else transformers itself does not load this type's folder rightly
    return bool(fine and shrunk and (record.get("reloaded", 1) <= RELOADED or not ours))


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def result_file(lane: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"architectures_{lane}.json"


def run(only: list[str], onnx: bool, every: bool, workers: int) -> None:
    """Check an instance of every type (or `every` task's), and write the lane's result; `only` replaces records."""
    import zoo

    from hf_prune.report import environment

    wanted = [one for one in zoo.instances() if not only or one[0] in only]
    first = {name: (name, task) for name, task in reversed(wanted)}
    wanted = wanted if every else [one for one in wanted if first[one[0]] == one]
    old = json.loads(result_file(LANE).read_text()) if only and result_file(LANE).is_file() else {}
    records = {(r["type"], r["task"]): r for r in old.get("records", ())}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for record in pool.map(check, wanted, [onnx] * len(wanted)):
            previous = records.get((record["type"], record["task"]), {})
            if "onnx" in previous:
                record.setdefault("onnx", previous["onnx"])
            records[record["type"], record["task"]] = record
            if record["built"] and not passed(record):
                print("FAILED", json.dumps({k: v for k, v in record.items() if k != "groups"})[:600], flush=True)
    command = " ".join(["python", "benchmarks/architectures.py", *sys.argv[1:]])
    told = {"commands": [*old.get("commands", ()), command], "lane": LANE, "seed": 0, "environment": environment()}
    told |= {"summary": summary(list(records.values()))}
    lines = ",\n".join(json.dumps(record) for record in records.values())  # one line each: it stays small
    result_file(LANE).write_text(f'{json.dumps(told, indent=1)[:-2]},\n "records": [\n{lines}\n]}}\n')
    print(json.dumps(told["summary"], indent=1))


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what the result file holds."""
    built = [record for record in records if record["built"]]
    offer = lambda *kinds: sum(any(kind in record.get("kinds", {}) for kind in kinds) for record in built)  # noqa: E731
    named = [record for record in built if record["type"] in NAMED]
    return {
        "instances": len(records),
        "types": len({record["type"] for record in records}),
        "built": len(built),
        "built_types": len({record["type"] for record in built}),
        "passed": sum(map(passed, built)),
        "named_types": len({record["type"] for record in named}),
        "named_failed": sorted({f"{r['type']} {r['task']}" for r in named if not passed(r)}),
        "named_missing": sorted({*NAMED} - {record["type"] for record in named}),
        "offer_heads": offer("head", "kv_group"),
        "offer_neurons": offer("neuron"),
        "offer_layers": offer("layer"),
        "offer_branches": offer("branch"),
        "onnx_types": sorted({record["type"] for record in built if record.get("onnx") == "yes"}),
    }


def write_table() -> None:
    """Write docs/architectures.md from the results of both lanes."""
    files = {lane: result_file(lane) for lane in ("v5", "optimum")}
    lanes = {lane: json.loads(file.read_text()) for lane, file in files.items() if file.is_file()}
    lines = [TABLE_HEAD]
    for told in lanes.values():
        counts, versions = told["summary"], told["environment"]
        lines.append(
            f"On transformers {versions['transformers']}: {counts['built']} "
            f"instances of {counts['built_types']} types were built; {counts['passed']} hold the invariant for "
            f"everything they offer. {counts['offer_heads']} offer heads or KV groups, {counts['offer_neurons']} "
            f"neurons, {counts['offer_layers']} whole layers."
        )
    lines += ["", "| type | offers | lanes | stock config can say | ONNX | not offered |", "|---|---|---|---|---|---|"]
    by_type: dict[str, list[dict[str, Any]]] = {}
    for lane, told in lanes.items():
        for record in told["records"]:
            by_type.setdefault(record["type"], []).append(record | {"lane": lane})
    lines += [_row(name, records) for name, records in sorted(by_type.items()) if any(r["built"] for r in records)]
    (ROOT / "docs" / "architectures.md").write_text("\n".join(lines) + "\n")


TABLE_HEAD = """# Architectures

Every model type that transformers can build from a config, tried by `benchmarks/architectures.py`: a tiny instance,
every tensor drawn at random, a random plan. *Offers* lists the kinds of unit for which masked, shrunk, saved and
reloaded models give the same outputs (within 2e-4 of the largest output for shrinking, 2e-5 for reloading). *Stock
config can say* lists cuts after which the folder loads without hf_prune: depth, equal numbers of neurons or KV groups.
*ONNX* was tried, with a pruned
model, for some of the families that users name most. `hf-prune inspect MODEL --verify` makes the
same check on a model of your own; [add_an_architecture.md](add_an_architecture.md) says what to do where it fails.
"""


def _row(name: str, records: list[dict[str, Any]]) -> str:
    built = [record for record in records if record["built"]]
    good = [record for record in built if passed(record)]
    kinds = list(dict.fromkeys(kind for record in good for kind in record["kinds"]))
    native = list(dict.fromkeys(cut for record in good for cut in record.get("native", ())))
    onnx = [record["onnx"] for record in built if "onnx" in record]
    lanes = [lane + ("" if all(map(passed, mine)) else " (fails)") for lane in ("v5", "optimum")
             if (mine := [record for record in built if record["lane"] == lane])]  # fmt: skip
    reasons: dict[str, str] = {}
    for record in built:
        for place, reason in record.get("refusals", {}).items():
            reasons.setdefault(reason, place.split(".")[-1] if place.split(".")[-1] != "branch" else place)
        if record.get("dense_reloaded", 0) > RELOADED:
            reasons["transformers itself does not load the dense folder of this type as it was saved"] = ""
        if record.get("error"):
            reasons.setdefault(record["error"], "")
    told = "; ".join(f"{place}: {reason}".strip(": ") for reason, place in list(reasons.items())[:3])
    exported = "" if not onnx else "yes" if "yes" in onnx else onnx[0][:100]
    cells = (name, ", ".join(kinds), ", ".join(lanes), ", ".join(native), exported, told.replace("|", "/"))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="model types; their records are replaced")
    parser.add_argument("--onnx", action="store_true", help="also export some families, pruned")
    parser.add_argument("--every", action="store_true", help="every task of a type, not only its first")
    parser.add_argument("--table", action="store_true", help="only write docs/architectures.md")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not options.table:
        run(options.only, options.onnx, options.every, options.workers)
    write_table()


if __name__ == "__main__":
    main()
