"""`PruningArguments`: what a script's command line says becomes a callback, and what is wrong is named."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from models import build_bert, draw_rows, training_arguments
from transformers import HfArgumentParser, Trainer

from hf_prune import (
    AccuracyGuard,
    HeadPruner,
    NeuronPruner,
    PruningArguments,
    PruningError,
    Regularisation,
    Schedule,
    Target,
    WeightPruner,
)
from hf_prune.architectures import prunable_macs


def parse(text: str) -> PruningArguments:
    return HfArgumentParser(PruningArguments).parse_args_into_dataclasses(text.split())[0]


def test_a_command_line_becomes_a_callback():
    callback = parse(
        "--prune heads neurons weights --target_macs 0.5 --prune_sparsity 0.8 --prune_begin 0.2 --prune_end 40 "
        "--prune_frequency 5 --prune_schedule linear --prune_score l1 --prune_multiple_of 2 --prune_min_kept 0 "
        "--no_prune_shrink_at_end --prune_shrink_during_training"
    ).callback(seed=3)
    units = {"score": "l1", "multiple_of": 2, "min_kept": 0}
    assert [*callback.settings.pruners] == [
        HeadPruner(**units),
        NeuronPruner(**units),
        WeightPruner(sparsity=0.8, score="l1"),
    ]
    assert callback.settings.schedule == Schedule("linear", begin=0.2, end=40, frequency=5)
    assert callback.settings.target == Target(0.5)
    assert (callback.shrink_at_end, callback.settings.shrink_during_training, callback.settings.seed) == (
        False,
        True,
        3,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", False), ("--prune_reversible true", True), ("--prune_score movement", True)],
)
def test_masks_may_come_back(text, expected):
    callback = parse(f"--target_macs 0.5 {text}").callback()
    assert [pruner.resolve_rule().returns for pruner in callback.settings.pruners] == [expected] * 2


def test_defaults_are_those_of_the_parts():
    callback = parse("--target_macs 0.5").callback()
    assert [*callback.settings.pruners] == [HeadPruner(), NeuronPruner()]
    assert callback.settings.schedule == Schedule()
    assert callback.shrink_at_end
    assert all(field.metadata["help"].endswith(".") for field in fields(PruningArguments))


@pytest.mark.parametrize("name", ["kv_groups", "layers", "branches", "experts", "channels"])
def test_every_sort_has_its_pruner(name):
    (pruner,) = parse(f"--prune {name} --prune_sparsity 0.25").callback().settings.pruners
    assert pruner.sparsity == 0.25
    assert {"kv_groups": "kv_group", "branches": "branch"}.get(name, "") in (getattr(pruner, "unit", ""), "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--prune haeds --target_macs 0.5", r"^prune must name .*Did you mean 'heads'\?.*Received: 'haeds'"),
        ("--target_macs 50", r"^target_macs: .*Received: 50. Did you mean 0.5\?"),
        ("--prune_sparsity 1.5", "^prune_sparsity: .*Received: 1.5"),
        ("--target_macs 0.5 --target_speedup 2", "^either target_macs or target_speedup.*Received"),
        ("--target_speedup 0.5", "^target_speedup: .*Received: 0.5"),
        ("--target_speedup 2 --prune weights --prune_sparsity 0.5", "^target_speedup is for units.*Received: 2"),
        (
            "",
            "^prune_sparsity or prune_threshold must say how much of heads, neurons leaves, or target_macs.*None",
        ),
        (
            "--prune weights heads --target_macs 0.5",
            "^prune_sparsity or prune_threshold must say .*Received: None",
        ),
        ("--prune weights --target_macs 0.5 --prune_sparsity 0.5", "^target_macs is for units.*Received: 0.5"),
        ("--target_macs 0.5 --prune_sparsity 0.5", "^prune_sparsity must be left out.*Received: 0.5"),
        ("--target_macs 0.5 --prune_begin 0.8", "^prune_begin must not be after prune_end. Received: 0.8 and 0.7"),
        ("--target_macs 0.5 --prune_begin 2.5", "^prune_begin must be a fraction .* or a whole step. Received: 2.5"),
        ("--target_macs 0.5 --prune_end -1", "^prune_end: .*Received: -1"),
        ("--target_macs 0.5 --prune_frequency 0", "^prune_frequency: .*Received: 0"),
        ("--target_macs 0.5 --prune_schedule cubc", "^prune_schedule: .*cubic"),
        ("--target_macs 0.5 --prune_score tailor", "^prune_score: .*taylor"),
        ("--target_macs 0.5 --prune_multiple_of 0", "^prune_multiple_of: .*Received: 0"),
    ],
)
def test_what_is_wrong_is_named_when_arguments_are_parsed(text, message):
    with pytest.raises(PruningError, match=message):
        parse(text)


def test_an_error_of_settings_says_which_key_is_wrong():
    with pytest.raises(PruningError) as caught:
        HeadPruner(multiple_of=0, min_kept=-1)
    assert [problem.key for problem in caught.value.problems] == ["multiple_of", "min_kept"]
    assert str(caught.value) == "HeadPruner: " + "; ".join(map(str, caught.value.problems))
    with pytest.raises(PruningError, match="^prune_multiple_of: .*Received: 0; min_kept: .*Received: -1$"):
        PruningArguments(prune_sparsity=0.5, prune_multiple_of=0, prune_min_kept=-1)


def test_a_trainer_prunes_by_arguments(tmp_path):
    model, dense = build_bert(), prunable_macs(build_bert())
    callback = parse("--target_macs 0.6 --prune_frequency 2").callback()
    trainer = Trainer(model, training_arguments(tmp_path, max_steps=6), train_dataset=draw_rows(model, 24))
    callback.attach(trainer).train()
    assert 0.5 < prunable_macs(model) / dense <= 0.6


def test_trl_parser(monkeypatch):
    trl = pytest.importorskip("trl")
    (arguments,) = trl.TrlParser(PruningArguments).parse_args_and_config(["--target_macs", "0.5"])
    assert arguments.target_macs == 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regularisation("l1", math.inf), "Regularisation: strength: .* Received: inf"),
        (lambda: Regularisation("l1", -1.0), "Regularisation: strength: .* Received: -1"),
        (lambda: NeuronPruner(threshold=math.inf), "NeuronPruner: threshold: .* Received: inf"),
        (lambda: AccuracyGuard("accuracy", dense=math.nan), "AccuracyGuard: dense: .* Received: nan"),
        (lambda: AccuracyGuard("accuracy", math.inf), "AccuracyGuard: max_drop: .* Received: inf"),
    ],
)
def test_numbers_that_are_none_are_refused_by_the_name_of_their_key(make, words):
    with pytest.raises(PruningError, match=words):
        make()
