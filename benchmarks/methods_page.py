"""Write docs/methods.md: each method of the registries, its paper, a recipe, and what results/methods.json has of it.

    python benchmarks/methods_page.py

Run it when `methods.py` has added records, or when a method was registered; a test compares the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_args, get_type_hints

import yaml
from common import load_records

from hf_prune import Rewinding
from hf_prune.allocation import ALLOCATIONS
from hf_prune.evidence import EVIDENCE
from hf_prune.rules import RULES
from hf_prune.schedules import SCHEDULES
from hf_prune.scores import SCORES, Score
from hf_prune.session import GUARDS, REGULARISERS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
YEAR = re.compile(r" ?\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")  # what a docstring says of where a method comes from
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
LATE = {"kind": "oneshot", "begin": 0.6, "end": 0.6}
CONSTANT = {"kind": "constant", "begin": 10, "end": 0.75, "frequency": 30}
PHASES = {"steps": [[50, 1], [150, 0], [250, 1], [300, 0], [350, 1]]}
STRENGTHS = {"l1": 0.05, "group_lasso": 2.0, "sensitivity": 20.0, "growing": 200.0}
NOTHING = "not measured"

Record = dict[str, Any]

INTRO = """---
hide: [toc]
---

# All methods

<!-- `python benchmarks/methods_page.py` writes this page from the registries and benchmarks/results/methods.json -->

Everything that the library itself registers: what it does, where it comes from, a part of a recipe that uses it, and
what was measured. [Scores](scores.md), [Learned scores](learned.md) and [Masks that move](dynamic.md) explain;
[Papers](papers.md) has all papers.

**Trained**: all-MiniLM-L6, fine-tuned on 16,000 sentences of SST-2, then one epoch more while it is pruned and learns
from its dense self: units to a fifth of the encoder's MACs, layers to a fifth of their number, single weights to 80 %
zeros. Accuracy in %, cross-entropy and KL to the dense model in nats, on validation and test together. A row tells of
its recipe, not of the key alone.

**One shot**: the same model on STS-B, without training: Spearman (times 100) with 3/4 and 1/2 of the MACs left, of
single weights with half of them left; dense {dense}. `greedy` and `loss_without`, which ask about each unit by itself,
stand [with heads and layers](#heads-or-layers-by-themselves).

**A language model**, at the end: stories260k, fine-tuned on WikiText-2, then as many steps again.

What says *{nothing}* has no record yet: `python benchmarks/methods.py` goes on where they end.
"""


@dataclass(frozen=True)
class Method:
    """One row: what the registry says of a method, what uses it, and the names of its records, the best one first."""

    name: str
    what: str
    paper: str
    use: dict[str, Any] | str
    trained: Sequence[str] = ()
    one_shot: str | None = None


# what there is
def methods() -> dict[str, list[Method]]:
    """Return all methods by the heading that they stand under."""
    return {
        "Scores of units and layers": [of_units(name, score) for name, score in scores("unit")],
        "Scores of single weights": [of_weights(name, score) for name, score in scores("weight")],
        "Regularisations": [regularisation(name) for name in ours(REGULARISERS)],
        "Rules: what may come back": [rule(name) for name in ours(RULES)],
        "Schedules": [schedule(name) for name in ours(SCHEDULES)],
        "Allocations": [allocation(name) for name in ours(ALLOCATIONS)],
        "Guards": [guard(name) for name in ours(GUARDS)],
        "Rewinding": [rewinding(what) for what in get_args(get_type_hints(Rewinding)["what"])],
    }


def ours(registry: Any) -> list[str]:
    """Return names that the library itself has registered, not what a script or a test has added."""
    made = {name: getattr(registry[name], "function", registry[name]) for name in registry}
    return [name for name, one in made.items() if one.__module__.startswith("hf_prune.")]


def scores(of: str) -> Iterator[tuple[str, Score]]:
    """Yield scores of units, or of weights; a unit's is the sum over its weights where there is none of its own."""
    for name in sorted(SCORES):
        forms = SCORES[name]
        summed = of == "unit" and "unit" not in forms and all(_sums(need) for need in forms["weight"].needs)
        score = forms["weight"] if summed else forms.get(of)
        if score is not None and score.function.__module__ == "hf_prune.scores":
            yield name, score


def _sums(need: str) -> bool:
    """Whether evidence of single weights is there for all weights of a unit."""
    return EVIDENCE[need].takes == "gradients" and not EVIDENCE[need].heavy


def of_units(name: str, score: Score) -> Method:
    needs = [EVIDENCE[need] for need in score.needs]
    told: dict[str, Any] = {"score": name}
    use: dict[str, Any] | str = units(told, schedule=LATE) if any(one.late for one in needs) else units(told)
    trained = [f"units, {name}", f"units, {name}, cubic"]
    if any(one.takes == "data" for one in needs):
        use = f'prune(model, HeadPruner(sparsity=0.25, score="{name}"), data=batches)'
    elif name == "block_influence":
        use, trained = {"pruners": {"layers": {"score": name, "sparsity": 0.8}}}, [f"layers, {name}"]
    what = _what(score.function)
    what += ", summed over a unit" if score.of == "weight" and "unit" not in what else ""
    return Method(name, what, score.paper, use, trained, f"units, {name}")


def of_weights(name: str, score: Score) -> Method:
    trained = [f"weights, {name}", f"weights, {name}, cubic"]
    return Method(name, _what(score.function), score.paper, weights(score=name), trained, f"weights, {name}")


def regularisation(name: str) -> Method:
    use = units({"score": "l1"}, schedule=LATE, regularisation={"kind": name, "strength": STRENGTHS[name]})
    weaker = f", {STRENGTHS[name]:g}" if name in ("l1", "group_lasso") else ""
    return documented(name, REGULARISERS[name].function, use, [f"units, regularised by {name}{weaker}"])


def rule(name: str) -> Method:
    told, exchanges = RULES[name], bool(RULES[name].also)
    score = {"score": "l1", "rule": name, **({"allocation": "uniform"} if exchanges else {})}
    when = {"schedule": CONSTANT} if exchanges else {"schedule": PHASES} if told.from_zero else {}
    trained = {"from_zero": "weights, AC/DC", "final": "weights, l1, cubic", "anew": "weights, movement"}
    use = weights(**({"score": "movement", "rule": name} if name == "anew" else score)) | when
    return documented(name, told.function, use, [trained.get(name, f"weights, {name}")])


def schedule(name: str) -> Method:
    use = units({"score": "taylor"}, schedule={"kind": name})
    if name == "constant":  # for what drops and grows
        use = weights(score="l1", rule="rigl", allocation="uniform") | {"schedule": CONSTANT}
    trained = ["weights, rigl"] if name == "constant" else [f"units, taylor, {name}"]
    return documented(name, SCHEDULES[name], use, trained)


def allocation(name: str) -> Method:
    trained = {"global": "units, taylor, cubic", "uniform": "units, taylor, even widths"}.get(name, f"units, {name}")
    return documented(name, ALLOCATIONS[name], units({"score": "taylor", "allocation": name}), [trained])


def guard(name: str) -> Method:
    use = units(guard={"metric": name}) | {"shrink_during_training": False}
    return documented(name, GUARDS[name], use, [f"units, guarded by {name}"])


def rewinding(what: str) -> Method:
    told = re.search(rf'``"{what}"``: (.+?)\.(?=\s+``"|\n\n)', Rewinding.__doc__ or "", re.DOTALL)
    text = " ".join((told[1] if told else "").split())
    use = weights(score="l1") | {"rewinding": {"rounds": 2, "to": 0.1, "what": what}}
    return Method(what, YEAR.sub("", text), _paper(text), use, [f"weights, rewinding {what}"])


def documented(name: str, thing: Any, use: dict[str, Any], trained: Sequence[str] = ()) -> Method:
    """Return a method of which a docstring says all, its paper in parentheses."""
    return Method(name, _what(thing), _paper(thing.__doc__ or ""), use, trained)


def units(told: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"pruners": {"heads": dict(told or {}), "neurons": dict(told or {})}, "target": {"macs": 0.2}, **more}


def weights(**told: Any) -> dict[str, Any]:
    return {"pruners": {"weights": {"sparsity": 0.8, **told}}}


def _what(thing: Any) -> str:
    return YEAR.sub("", (thing.__doc__ or "").strip().split("\n")[0]).rstrip(".")


def _paper(text: str) -> str:
    found = YEAR.search(text.strip().split("\n")[0])
    return found[1] if found else ""


# what was measured
def trained(names: Sequence[str], records: list[Record]) -> str:
    """Return accuracy, cross-entropy and KL by the first of these names that has records, the mean over seeds."""
    for name in names:
        found = [one for one in records if (one["what"], one["method"]) == ("training", name) and "accuracy" in one]
        if found:
            accuracy, loss, kl = (
                mean(one[key] for one in found) for key in ("accuracy", "cross_entropy", "kl_to_dense")
            )
            seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
            return f"{100 * accuracy:.2f}, {loss:.3f}, {kl:.3f}{seeds}"
    return NOTHING


def one_shot(name: str | None, records: list[Record]) -> str:
    """Return the correlations without training, that of the larger model first; the mean over seeds."""
    by_size: dict[str, list[float]] = {}
    for one in records:
        if (one["what"], one["method"]) == ("scores", name):
            if "refused" in one:
                return "refused"
            by_size.setdefault(one["left"], []).append(one["spearman"])
    wanted = ("3/4", "1/2") if "3/4" in by_size else tuple(by_size)
    return ", ".join(f"{mean(by_size[one]):.2f}" if one in by_size else "?" for one in wanted) or NOTHING


# the page
def page(records: list[Record]) -> str:
    """Return the page as it has to be."""
    parts, shown = [INTRO.format(nothing=NOTHING, dense=one_shot("dense", records))], set[str]()
    for title, rows in methods().items():
        columns = {
            "method": [f"`{one.name}`" for one in rows],
            "what": [one.what for one in rows],
            "trained": [trained(one.trained, records) for one in rows],
            "one shot": [one_shot(one.one_shot, records) if one.one_shot else "" for one in rows],
            "paper": [one.paper for one in rows],
            "recipe": [_used(one.use) for one in rows],
        }
        told = {name: column for name, column in columns.items() if any(column)}
        parts.append(f"## {title}\n\n{_table([*told], [*zip(*told.values())])}\n")
        shown |= {name for one in rows for name in one.trained}
    others = dict.fromkeys(one["method"] for one in records if one["what"] == "training" and one["method"] not in shown)
    if others:
        parts.append(f"## Other runs\n\n{_table(['run', 'trained'], [[n, trained([n], records)] for n in others])}\n")
    few, spoken = few_units(records), [one for one in records if one["what"] == "lm"]
    return "\n".join([*parts, *([few] if few else []), *([language_model(spoken)] if spoken else [])])


def few_units(records: list[Record]) -> str:
    """Return the table of heads and layers that leave by themselves; the best at layers first."""
    rows: dict[str, dict[str, float]] = {}
    for one in records:
        of, _, score = one["method"].partition(", ")
        if one["what"] == "scores" and of in ("heads", "layers") and "spearman" in one:
            rows.setdefault(score, {})[f"{of} {one['left']}"] = one["spearman"]
    columns = ("heads 3/4", "layers 2/3", "layers 1/2")
    cells = [[f"`{name}`", *(f"{row[one]:.2f}" if one in row else "" for one in columns)] for name, row in rows.items()]
    cells.sort(key=lambda row: float(row[-1] or 0), reverse=True)
    told = (
        "The model of the column *one shot*, calibrated with 64 pairs: a quarter of its 72 heads leaves, or "
        "two or three of its six layers. Spearman, times 100; what is missing was refused.\n\n"
    )
    header = ["score", "18 heads less", "2 layers less", "3 layers less"]
    return "## Heads or layers by themselves\n\n" + told + _table(header, cells) + "\n" if cells else ""


def language_model(records: list[Record]) -> str:
    """Return the table of the causal language model: losses, the mean over seeds."""
    losses: dict[str, dict[str, list[float]]] = {}
    for one in records:
        losses.setdefault(one["method"], {}).setdefault(one["left"], []).append(one["loss"])
    dense = losses.pop("dense")["1"]
    rows = [[name, *(f"{mean(cell[left]):.3f}" for left in ("3/4", "1/2"))] for name, cell in losses.items()]
    told = (
        "stories260k (Llama, 5 layers of 64, 8 heads on 4 KV groups) on WikiText-2: 250 steps of fine-tuning, then 250 "
        "more while KV groups, heads and neurons leave and the fine-tuned model teaches. Loss in nats a token, mean "
        f"over {len(dense)} seeds; dense {mean(dense):.3f}.\n\n"
    )
    return "## A language model\n\n" + told + _table(["score", "3/4 of the MACs", "1/2"], rows) + "\n"


def _used(use: dict[str, Any] | str) -> str:
    text = use if isinstance(use, str) else yaml.safe_dump(use, default_flow_style=True, width=10**6, sort_keys=False)
    return f"`{text.strip()}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    plain = text.replace("``", "`").replace("|", "\\|")
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", plain)


if __name__ == "__main__":
    PAGE.write_text(page(load_records("methods")), encoding="utf-8")
