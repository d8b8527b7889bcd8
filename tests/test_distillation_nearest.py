"""A layer map that follows the outputs: each layer of the teacher with the student's nearest, in order."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from models import build_bert, build_llama, draw_batch, draw_rows, training_arguments
from torch import Tensor, tensor

from hf_prune import (
    Distillation,
    DistillationTrainer,
    LayerPruner,
    PruningCallback,
    PruningError,
    Schedule,
    Target,
    mask_units,
    shrink,
)
from hf_prune.distillation.layers import nearest_in_order
from hf_prune.distillation.lesson import Lesson
from hf_prune.distillation.losses import hidden_loss, layer_distances

ALONE = {"hard": 1.0, "hidden": 1.0}


def term_of(student: Any, teacher: Any, batch: dict[str, Tensor], layer_map: Any = "nearest") -> Tensor:
    lesson = Lesson(student, teacher, Distillation(logits=0.0, hidden=1.0, layer_map=layer_map))
    return lesson.terms(student, batch, [], ALONE)[1]["hidden"]


def test_nearest_in_order_by_hand():
    """The second's nearest is the first column, behind the first's: together they are cheapest there."""
    assert nearest_in_order(tensor([[3.0, 1.0, 9.0], [0.5, 4.0, 9.0], [9.0, 9.0, 1.0]])) == [0, 0, 2]
    assert nearest_in_order(tensor([[3.0, 1.0, 9.0], [1.0, 2.0, 9.0], [9.0, 9.0, 1.0]])) == [1, 1, 2]
    assert nearest_in_order(tensor([[1.0, 0.0]])) == [1]
    assert nearest_in_order(tensor([[1.0], [0.0]])) == [0, 0]


def test_no_other_rising_map_is_cheaper():
    torch.manual_seed(0)
    for _ in range(20):
        distances = torch.rand(4, 3)
        found = nearest_in_order(distances)
        sums = {way: sum(distances[row, column].item() for row, column in enumerate(way))
                for way in itertools.combinations_with_replacement(range(3), 4)}  # fmt: skip
        assert sums[tuple(found)] == pytest.approx(min(sums.values()))


def test_distances_are_those_of_the_loss():
    torch.manual_seed(0)
    student, teacher = [torch.randn(2, 5, 4) for _ in range(2)], [torch.randn(2, 5, 4) for _ in range(3)]
    for mask in (None, tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()):
        expected = tensor([[hidden_loss(one, other, mask) for one in student] for other in teacher])
        torch.testing.assert_close(layer_distances(student, teacher, mask), expected)


@pytest.mark.parametrize("build", [build_bert, build_llama])
@pytest.mark.parametrize("cut", [mask_units, shrink])
def test_layers_that_are_there_are_matched(build, cut):
    """Of four layers the third is gone: the term is the least that a rising map can give."""
    teacher = build(num_hidden_layers=4)
    student = cut(copy.deepcopy(teacher), {"layers": [0, 1, 3]})
    batch = draw_batch(student)
    pairs = {
        (mine, its): term_of(student, teacher, batch, {mine: its}).item() for mine in (0, 1, 3) for its in range(4)
    }
    ways = itertools.combinations_with_replacement((0, 1, 3), 4)
    least = min(sum(pairs[mine, its] for its, mine in enumerate(way)) / 4 for way in ways)
    found = term_of(student, teacher, batch)
    assert found.item() == pytest.approx(least, rel=1e-3, abs=1e-6)
    assert found.item() > 1e-4
    found.backward()
    assert any(one.grad is not None and one.grad.abs().max() > 0 for one in student.parameters())


def test_layers_are_matched_behind_the_matrix(tmp_path):
    """While layers leave, the matrix between the widths is learned, and a resumed run goes on as the whole one."""

    def run(**resume: Any) -> Any:
        student = build_bert(num_hidden_layers=3)
        trainer = DistillationTrainer(
            student, training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=3e-3),
            train_dataset=draw_rows(student, 16), teacher=build_bert(seed=1, hidden_size=32, num_hidden_layers=4),
            distillation=Distillation(hidden=1.0, layer_map="nearest"),
        )  # fmt: skip
        PruningCallback([LayerPruner()], Schedule(begin=1, end=2, frequency=1), target=Target(macs=0.7)).attach(trainer)
        trainer.train(**resume)
        return trainer

    whole = run()
    terms = [one["distillation_hidden"] for one in whole.state.log_history if "loss" in one]
    assert all(math.isfinite(one) and one > 1e-3 for one in terms)
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.lesson.projections["layers"].weight, whole.lesson.projections["layers"].weight)


def test_maps_of_attention_are_not_matched_so():
    with pytest.raises(PruningError, match=r"for attention take another map. Received: .*attention=1.0"):
        Distillation(hidden=1.0, attention=1.0, layer_map="nearest")


@pytest.mark.parametrize("layer_map", ["nearest", "last", {0: 1}])
def test_a_map_of_layers_needs_a_term_of_layers(layer_map):
    with pytest.raises(PruningError, match=r"give hidden or attention a weight.* Received: layer_map=.*, hidden=0.0"):
        Distillation(relations=1.0, layer_map=layer_map)
