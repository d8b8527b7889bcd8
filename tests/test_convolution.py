"""Channels of convolutional models: names and what a unit owns by hand, masked = shrunk = reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from hf_prune import PruningError, find_groups, load_pruned, mask_units, save_pruned, shrink, verify
from hf_prune.architectures import inspect_model

TASK = "image_classification"
TINY = {"hidden_sizes": [16, 32], "depths": [2, 2], "embedding_size": 16}


def build(name: str, **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Build a tiny model of a stock class with every tensor drawn, and its input."""
    model = getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")(**config))
    draw = torch.Generator().manual_seed(0)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=draw) * 0.3
            if tensor.ndim == 1 and path.endswith(("weight", "running_var")):
                tensor.data = tensor.data.abs() + 0.5
    return model.eval(), {"pixel_values": torch.randn(2, 3, 64, 64, generator=draw)}


CASES = {
    "basic": ("ResNet", {**TINY, "layer_type": "basic"}),
    "grouped": ("RegNet", {**TINY, "groups_width": 8}),
    "one group": ("RegNet", {**TINY, "layer_type": "x", "groups_width": 16}),
    "separable": ("MobileNetV1", {"depth_multiplier": 0.25, "min_depth": 4}),
}
ZOO = ("resnet", "regnet", "mobilenet_v2", "efficientnet", "convnext", "hgnet_v2", "poolformer")


def case(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    if name in CASES:
        return build(CASES[name][0], **CASES[name][1])
    model = zoo.build(name, TASK)
    return model, zoo.inputs(model)


@pytest.mark.parametrize("name", [*CASES, *ZOO])
def test_masked_equals_shrunk_equals_reloaded(name: str, tmp_path: Path) -> None:
    model, batch = case(name)
    report = verify(model, batch)
    assert report.passed, (report.differences, report.failures)
    groups = find_groups(model, ["channel", "neuron"])
    plan = {group.name: list(range(0, group.units, 2)) for group in groups}
    masked = mask_units(copy.deepcopy(model), plan)
    small = shrink(copy.deepcopy(masked))
    reference = zoo.outputs(masked, batch)
    scale = reference.abs().max()
    assert (zoo.outputs(small, batch) - reference).abs().max() <= 2e-4 * scale
    save_pruned(small, tmp_path)
    loaded = load_pruned(tmp_path).eval()
    assert (zoo.outputs(loaded, batch) - zoo.outputs(small, batch)).abs().max() <= 2e-5 * scale
    assert [(g.name, g.units) for g in find_groups(loaded, ["channel", "neuron"])] == [
        (group.name, len(plan[group.name])) for group in groups
    ]


@pytest.mark.parametrize("name", CASES)
def test_last_channel_stays_and_is_found_again(name: str) -> None:
    model, batch = case(name)
    plan = {group.name: [0] for group in find_groups(model, ["channel"])}
    masked = zoo.outputs(mask_units(copy.deepcopy(model), plan), batch)
    small = shrink(model, plan)
    assert (zoo.outputs(small, batch) - masked).abs().max() <= 2e-4 * masked.abs().max()
    assert {group.name: group.units for group in find_groups(small, ["channel"])} == dict.fromkeys(plan, 1)
    with pytest.raises(PruningError, match="At least one unit"):
        shrink(small, {one: [] for one in plan})


def test_what_a_channel_of_mobilenet_v2_owns() -> None:
    model = zoo.build("mobilenet_v2", TASK)
    group = next(group for group in find_groups(model) if group.name == "layers.5.channels")
    block = "mobilenet_v2.layer.5"
    norm = ("weight", "bias", "running_mean", "running_var")
    owned = {(f"{block}.{conv}.convolution.weight", 0) for conv in ("expand_1x1", "conv_3x3")}
    owned |= {(f"{block}.{conv}.normalization.{name}", 0) for conv in ("expand_1x1", "conv_3x3") for name in norm}
    read = (f"{block}.reduce_1x1.convolution.weight", 1)
    assert {(part.parameter, part.dim) for part in group.slices} == owned | {read}
    assert [(part.parameter, part.dim) for part in group.read] == [read]
    assert group.units == model.get_submodule(f"{block}.expand_1x1.convolution").out_channels
    small = shrink(model, {group.name: [1, 2, 5]})
    depthwise = small.get_submodule(f"{block}.conv_3x3.convolution")
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (3, 3, 3)
    assert small.get_submodule(f"{block}.conv_3x3.normalization").num_features == 3


def test_names_in_a_bottleneck_and_with_grouped_convolutions() -> None:
    names = [group.name for group in find_groups(zoo.build("resnet", TASK), ["channel"])]
    assert names[:3] == [
        "stages.0.layers.0.conv1.channels",
        "stages.0.layers.0.conv2.channels",
        "stages.0.layers.1.conv1.channels",
    ]
    model, _ = case("grouped")
    first = find_groups(model, ["channel"])[0]
    assert (first.name, first.units) == ("stages.0.layers.0.conv_groups.channels", 2)
    grouped: Any = shrink(model, {first.name: [1]}).get_submodule(
        "regnet.encoder.stages.0.layers.0.layer.1.convolution"
    )
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (1, 8, 8)


def test_align_names_its_towers() -> None:
    towers = {group.name.split(".")[0] for group in find_groups(zoo.build("align", "tower"))}
    assert towers == {"text", "vision"}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bit", "standardizes each filter over all channels"),
        ("convnextv2", "norm over all neurons"),
        ("textnet", "compute the stream"),
    ],
)
def test_what_is_not_separable_is_refused(model_type: str, reason: str) -> None:
    refusals = inspect_model(zoo.build(model_type, TASK)).refusals
    assert refusals
    assert all(reason in one.reason for one in refusals)


def test_masked_channels_stay_zero_in_training() -> None:
    model, batch = case("basic")
    group = find_groups(model, ["channel"])[0]
    mask_units(model.train(), {group.name: list(range(8))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
    assert find_groups(shrink(model), ["channel"])[0].units == 8
