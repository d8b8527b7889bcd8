"""What runs where nothing is left: compilers trace it in one graph, copies run their own modules, int8 leaves it be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from models import build_bert, build_llama, build_vit, draw_batch

from hf_prune import load_pruned, mask_units, save_pruned, shrink
from hf_prune.skipping import close_router, is_skipped, restore

EMPTY = {"layers.0.attention.heads": [], "layers.1.attention.branch": [], "layers.1.mlp.neurons": []}
ALIBI = {"layers.0.attention.branch": [], "layers.1.attention.heads": [0, 3]}
HEADS = {"layers.1.attention.heads": [0, 3]}
DECODER = {"decoder.layers.0.attention.branch": [], "decoder.layers.0.cross_attention.heads": []}


def build_zoo(name: str, task: str) -> Callable[[], Any]:
    return lambda: zoo.build(name, task)


CASES: dict[str, tuple[Callable[[], Any], Callable[..., Any], dict[str, Any]]] = {
    "emptied branches": (build_bert, shrink, EMPTY),
    "emptied branches of images": (build_vit, shrink, EMPTY),
    "a masked layer": (build_bert, mask_units, {"layers": [1]}),
    "shares of ALiBi": (build_zoo("bloom", "causal_lm"), shrink, ALIBI),
    "reshapes by a fixed width": (build_zoo("trocr", "causal_lm"), shrink, HEADS),
    "emptied cross-attention": (build_zoo("bart", "seq2seq_lm"), shrink, DECODER),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Return a model with replaced forwards, inputs, and what it computes as ever."""
    build, change, plan = CASES[request.param]
    model = change(build(), plan).eval()
    model.config.use_cache = False
    assert any(is_skipped(module) for module in model.modules())
    own = build in (build_bert, build_vit)
    inputs = draw_batch(model) if own else zoo.inputs(model)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


@torch.no_grad()
def test_it_is_one_graph(case: Any) -> None:
    """In `torch.compile` without a break, in `torch.export`, and in a trace."""
    model, inputs, expected = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=0)
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, expected, atol=1e-5, rtol=0)
    traced = torch.jit.trace(model, example_kwarg_inputs=inputs, check_trace=False, strict=False)
    torch.testing.assert_close(traced(**inputs)["logits"], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_copy_runs_its_own_modules(case: Any) -> None:
    model, inputs, expected = case
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        replaced = [module for module in again.modules() if is_skipped(module)]
        assert len(replaced) == sum(map(is_skipped, model.modules()))
        own = set(again.modules())
        for module in replaced:
            assert module.forward.module is module
            assert {one for one in vars(module.forward).values() if isinstance(one, torch.nn.Module)} <= own
        assert torch.equal(again(**inputs).logits, expected)
        for parameter in again.parameters():
            parameter.zero_()
        assert not torch.equal(again(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_caches_are_kept_in_one_graph(name: str) -> None:
    """The first layer, which tells a cache's length, has no attention; a text is read in two pieces."""
    plan = {"layers.0.attention.branch": [], "layers.1.mlp.branch": []}
    model = shrink(build_llama() if name == "llama" else zoo.build(name, "causal_lm"), plan)
    ids = torch.randint(3, 50, (2, 9))
    expected = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = transformers.DynamicCache()
    pieces = [compiled(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(5, 1)]
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "bloom"])
def test_folders_with_a_file_of_their_own_are_one_graph(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shrink(build_bert(), EMPTY) if name == "bert" else shrink(zoo.build("bloom", "causal_lm"), HEADS)
    save_pruned(model, tmp_path / "m", standalone=True)
    auto = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    alone = auto.from_pretrained(tmp_path / "m", trust_remote_code=True, dtype=torch.float32).eval()
    assert type(alone) is not type(model)
    ids = torch.randint(3, 50, (2, 9))
    expected = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(alone), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-5, rtol=0)
    int8 = torch.ao.quantization.quantize_dynamic(alone, {torch.nn.Linear}, dtype=torch.qint8)
    assert (int8(ids).logits - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
def test_other_precisions_leave_alone_what_is_empty(tmp_path: Any) -> None:
    model = shrink(build_bert(), EMPTY)
    inputs = {name: value for name, value in draw_batch(model).items() if name != "labels"}
    expected = model(**inputs).logits
    loaded = load_pruned(save_pruned(model, tmp_path), dtype=torch.float32).eval()
    for one in (model, loaded):
        int8 = torch.ao.quantization.quantize_dynamic(copy.deepcopy(one), {torch.nn.Linear}, dtype=torch.qint8)
        kinds = [type(module).__module__ for module in int8.modules() if type(module).__name__ == "Linear"]
        assert any("quantized" in kind for kind in kinds)
        several = {
            "int8": int8(**inputs),
            "bfloat16": copy.deepcopy(one).bfloat16()(**inputs),
            "half": copy.deepcopy(one).half()(**inputs),
        }
        for name, output in several.items():
            assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max(), name


@torch.no_grad()
def test_a_closed_router_is_one_graph() -> None:
    """The router alone: around it, transformers 4 loops over the experts that were chosen."""
    model = mask_units(zoo.build("mixtral", "causal_lm"), {"layers.1.experts": [0, 3]})
    (router,) = [module for module in model.modules() if is_skipped(module)]
    hidden = torch.randn(6, model.config.hidden_size)
    expected = router(hidden)
    compiled = torch.compile(router, backend="eager", fullgraph=True)(hidden)
    for one, other in zip(*(value if isinstance(value, tuple) else (value,) for value in (compiled, expected))):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_masked_linear_router_is_not_quantized_away() -> None:
    """Dynamic int8 puts modules in place of Linears, which would choose what is closed."""
    router = torch.nn.Linear(4, 3)
    close_router(router, [1])
    wrapped = torch.nn.Sequential(router)
    quantize = torch.ao.quantization.quantize_dynamic
    int8 = quantize(wrapped, {torch.nn.Linear}, dtype=torch.qint8)
    assert torch.isneginf(int8(torch.randn(2, 4))[:, 1]).all()
    restore(router)
    assert "quantized" in type(quantize(wrapped, {torch.nn.Linear}, dtype=torch.qint8)[0]).__module__
