"""Parts of pruned folders, composites of pruned halves, siblings of one config, and loads that overlap in threads."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_prune import CheckpointError, PruningError, find_groups, load_pruned, save_pruned, shrink, verify
from hf_prune.checkpoint import loading
from hf_prune.parts import split_tower

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
VISION: dict[str, Any] = {
    **{name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 16,
    "patch_size": 8,
}
KEPT = {"layers.0.attention.heads": [0, 2], "layers.0.mlp.neurons": [1, 5, 7], "layers.1.mlp.neurons": [0, 2]}
IDS = torch.arange(3, 19).view(2, 8)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def drawn(model: Any, seed: int = 0) -> Any:
    """Draw every tensor of a model at random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def kept_of(folder: Path) -> Any:
    """Return the plan in a folder's config."""
    return json.loads((folder / "config.json").read_text())["pruning_config"]["kept"]


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Compare outputs."""
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_model_that_is_pruned_leaves_its_siblings_of_one_config_alone(tmp_path: Path):
    config = transformers.BertConfig(**SIZES)
    before, (one, other) = config.to_dict(), [drawn(transformers.AutoModel.from_config(config)) for _ in range(2)]
    expected, generation = other(IDS)[0], copy.deepcopy(getattr(other, "generation_config", None))
    shrink(one, KEPT)
    shrink(one, {"layers": [1]})
    save_pruned(one, tmp_path / "one", standalone=True)
    assert config.to_dict() == before
    assert other.config is config
    assert one.config is one.encoder.config
    assert getattr(other, "generation_config", None) == generation
    assert_same(load_pruned(save_pruned(other, tmp_path / "other")).eval()(IDS)[0], expected)
    assert_same(load_pruned(tmp_path / "one").eval()(IDS)[0], one(IDS)[0])


def test_configs_of_parts_stay_one_object_inside_a_model_and_others_outside():
    config = transformers.CLIPConfig(text_config=dict(SIZES, projection_dim=8), vision_config=VISION, projection_dim=8)
    one, other = (drawn(transformers.CLIPModel(config)) for _ in range(2))
    before = config.to_dict()
    shrink(one, {"vision.layers": [1], "text.layers.0.mlp.neurons": [3]})
    assert config.to_dict() == before
    assert one.config.vision_config is one.vision_model.config
    assert one.config.vision_config.num_hidden_layers == 1
    assert other.config.vision_config.num_hidden_layers == 2


WHOLES: list[Any] = [
    ("T5EncoderModel", lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), "encoder", IDS),
    (
        "UMT5EncoderModel",
        lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
        "encoder",
        IDS,
    ),
    ("CLIPVisionModel", "clip", "vision_model", PIXELS),
    ("CLIPTextModel", "clip", "text_model", IDS),
    ("SiglipVisionModel", "siglip", "vision_model", PIXELS),
    ("SiglipTextModel", "siglip", "text_model", IDS),
]


def whole(make: Any) -> Any:
    """Build the whole model of a row."""
    if callable(make):
        return drawn(make())
    text = dict(SIZES, projection_dim=8, eos_token_id=2, bos_token_id=1, pad_token_id=0, projection_size=16)
    name = {"clip": "CLIP", "siglip": "Siglip"}[make]
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=VISION)
    return drawn(getattr(transformers, f"{name}Model")(config))


@pytest.mark.parametrize(
    ("part", "make", "path", "inputs"), WHOLES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_part_of_a_pruned_folder_loads_and_loads_again(part: str, make: Any, path: str, inputs: Any, tmp_path: Path):
    model = whole(make)
    groups = [group for group in find_groups(model) if group.kind in ("head", "neuron")]
    shrink(model, {group.name: list(range(1 + i % 2, group.units)) for i, group in enumerate(groups)})
    kind = getattr(transformers, part)
    expected = model.get_submodule(path)(inputs)[0]
    loaded = kind.from_pretrained(save_pruned(model, tmp_path / "whole")).eval()
    assert_same(loaded(inputs)[0], expected)
    again = save_pruned(loaded, tmp_path / "part")
    tower = path.split("_")[0]
    assert kept_of(again) == {
        name.removeprefix(f"{tower}."): text
        for name, text in kept_of(tmp_path / "whole").items()
        if name.startswith(f"{tower}.")
    }
    assert_same(load_pruned(again).eval()(inputs)[0], expected)
    assert_same(kind.from_pretrained(again).eval()(inputs)[0], expected)


def test_a_part_knows_the_layers_that_its_tower_has_lost(tmp_path: Path):
    model = whole("clip")
    shrink(model, {"vision.layers": [1], "text.layers": [0], "vision.layers.1.mlp.neurons": [3, 4]})
    save_pruned(model, tmp_path)
    loaded = transformers.CLIPVisionModel.from_pretrained(tmp_path).eval()
    assert loaded.config.pruning_config["kept"] == {"layers": "1 of 2", "layers.1.mlp.neurons": "3-4 of 24"}
    assert_same(loaded(PIXELS)[0], model.vision_model(PIXELS)[0])


def test_an_audio_classifier_takes_whispers_pruned_encoder(tmp_path: Path):
    sizes = {**SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 20}
    ids = {"bos_token_id": 1, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = drawn(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**{**sizes, **ids})))
    shrink(model, {"encoder.layers.0.mlp.neurons": [1, 5], "decoder.layers.1.attention.heads": [2]})
    sounds = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    save_pruned(model, tmp_path)
    loaded = transformers.WhisperForAudioClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert_same(loaded.encoder(sounds)[0], model.model.encoder(sounds)[0])


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_a_group_that_the_whole_does_not_have_is_refused_in_a_part_too(kind: str, tmp_path: Path):
    model = drawn(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)))
    file = save_pruned(shrink(model, {"encoder.layers.0.mlp.neurons": [1, 3]}), tmp_path) / "config.json"
    config = json.loads(file.read_text())
    config["pruning_config"]["kept"]["decoder.layers.7.mlp.neurons"] = "0 of 24"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.7"):
        getattr(transformers, kind).from_pretrained(tmp_path)


def test_what_is_no_part_of_the_saved_model_is_refused(tmp_path: Path):
    model = drawn(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)))
    save_pruned(shrink(model, {"encoder.layers.0.mlp.neurons": [1, 3]}), tmp_path)
    with pytest.raises(CheckpointError):
        transformers.BertModel.from_pretrained(tmp_path)


def halves(composite: str, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a composite of two folders of pruned models, and inputs."""
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    shrink(drawn(decoder, 1), {"layers.0.mlp.neurons": [1, 2], "layers.1.attention.heads": [3]})
    if composite == "VisionEncoderDecoderModel":
        encoder, inputs = transformers.ViTModel(transformers.ViTConfig(**VISION)), {"pixel_values": PIXELS}
    elif composite == "SpeechEncoderDecoderModel":
        sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
        extra = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
        position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        encoder = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **extra, **position))
        inputs = {"input_values": torch.randn(2, 60, generator=torch.Generator().manual_seed(0))}
    else:
        encoder, inputs = transformers.BertModel(transformers.BertConfig(**SIZES)), {"input_ids": IDS}
    save_pruned(shrink(drawn(encoder), KEPT), tmp_path / "encoder")
    save_pruned(decoder, tmp_path / "decoder")
    make = getattr(transformers, composite).from_encoder_decoder_pretrained
    return make(tmp_path / "encoder", tmp_path / "decoder").eval(), {**inputs, "decoder_input_ids": IDS}


@pytest.mark.parametrize("kind", ["EncoderDecoderModel", "VisionEncoderDecoderModel", "SpeechEncoderDecoderModel"])
def test_a_composite_of_pruned_halves_is_saved_and_loaded(kind: str, tmp_path: Path):
    model, inputs = halves(kind, tmp_path)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "plain")
    save_pruned(model, tmp_path / "ours")
    assert kept_of(tmp_path / "ours")["decoder.layers.1.attention.heads"] == "3 of 4"
    for folder in (tmp_path / "plain", tmp_path / "ours"):
        assert_same(load_pruned(folder).eval()(**inputs).logits, expected)
        assert_same(getattr(transformers, kind).from_pretrained(folder).eval()(**inputs).logits, expected)


def test_a_composite_of_pruned_halves_is_pruned_further_in_dense_numbers(tmp_path: Path):
    model, inputs = halves("EncoderDecoderModel", tmp_path)
    shrink(model, {"encoder.layers.0.mlp.neurons": [1, 7], "decoder.layers.1.mlp.neurons": [0, 1]})
    folder = save_pruned(model, tmp_path / "small")
    kept = kept_of(folder)
    assert kept["encoder.layers.0.mlp.neurons"] == "1,7 of 24"
    assert kept["encoder.layers.0.attention.heads"] == "0,2 of 4"
    assert kept["decoder.layers.0.mlp.neurons"] == "1-2 of 24"
    assert_same(load_pruned(folder).eval()(**inputs).logits, model(**inputs).logits)


def test_a_llava_of_a_pruned_tower_and_a_pruned_language_model_is_saved_and_loaded(tmp_path: Path):
    vision = drawn(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    sizes = dict(SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    save_pruned(shrink(vision, KEPT), tmp_path / "vision")
    save_pruned(shrink(text, {"layers.1.attention.kv_groups": [1], "layers.0.mlp.neurons": [1, 2]}), tmp_path / "text")
    parts = {f"{name}_config": transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("vision", "text")}
    config = transformers.LlavaConfig(**parts, image_token_index=59, vision_feature_layer=-1, image_seq_length=4)
    model = drawn(transformers.LlavaForConditionalGeneration(config))
    inputs = {"input_ids": torch.tensor([[59] * 4 + [3, 4, 5]] * 2), "pixel_values": PIXELS}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "plain")
    assert_same(load_pruned(tmp_path / "plain").eval()(**inputs).logits, expected)
    folder = save_pruned(model, tmp_path / "ours")
    assert kept_of(folder)["text.layers.1.attention.kv_groups"] == "1 of 2"
    assert_same(transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()(**inputs).logits, expected)


def test_from_pretrained_loads_classes_that_never_call_post_init_on_transformers_4(tmp_path: Path):
    configs = {
        "ElectraForCausalLM": transformers.ElectraConfig(**SIZES, is_decoder=True, embedding_size=16),
        "XLMRobertaXLForSequenceClassification": transformers.XLMRobertaXLConfig(**SIZES),
    }
    for name, config in configs.items():
        kind = getattr(transformers, name)
        model = shrink(drawn(kind(config)), KEPT)
        save_pruned(model, tmp_path / name)
        assert_same(kind.from_pretrained(tmp_path / name).eval()(IDS).logits, model(IDS).logits)
        assert "__wrapped__" not in vars(kind.__init__)


def test_loads_that_overlap_in_threads_are_right_and_leave_nothing_behind(tmp_path: Path):
    kind = transformers.BertModel
    stock, model, loaded = kind.__init__, shrink(drawn(kind(transformers.BertConfig(**SIZES))), KEPT), list[Any]()
    save_pruned(model, tmp_path)
    threads = [threading.Thread(target=lambda: loaded.append(load_pruned(tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 6
    for one in loaded:
        assert_same(one.eval()(IDS)[0], model(IDS)[0])
    first, second = loading._cut_after_init(kind), loading._cut_after_init(kind)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert kind.__init__ is not stock
    second.__exit__(None, None, None)
    assert kind.__init__ is stock


@pytest.mark.parametrize("kept", [KEPT, {"layers": [1], "layers.1.mlp.neurons": [4, 9, 20]}])
def test_a_model_that_is_pruned_already_is_verified_in_the_numbers_that_it_has(kept: Any):
    model = shrink(drawn(transformers.BertModel(transformers.BertConfig(**SIZES))), kept)
    found = verify(model, {"input_ids": IDS})
    assert found.passed, found
    assert {"head", "neuron"} <= found.differences.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.mlp.neurons", ("", "layers.0.mlp.neurons")),
        ("vision.stages.1.layers.0.attention.heads", ("vision", "stages.1.layers.0.attention.heads")),
        ("encoder.attention.heads", ("encoder", "attention.heads")),
        ("attention.heads", ("", "attention.heads")),
    ],
)
def test_names_say_their_tower(name: str, expected: tuple[str, str]):
    assert split_tower(name) == expected


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class TwinConfig(PretrainedConfig):
    model_type = "twin_of_the_tests"

    def __init__(self, hidden_size=16, intermediate_size=24, num_hidden_layers=2, **others):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**others)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden):
        return hidden + self.fc2(self.fc1(hidden).tanh())


class TwinModel(PreTrainedModel):
    config_class = TwinConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(60, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return (hidden,)
"""


def test_a_class_with_code_of_its_own_is_saved_with_it_and_loaded_where_that_is_trusted(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_twin.py").write_text(CODE)
    told = {"AutoConfig": "modeling_twin.TwinConfig", "AutoModel": "modeling_twin.TwinModel"}
    (source / "config.json").write_text(
        json.dumps({"model_type": "twin_of_the_tests", "architectures": ["TwinModel"], "auto_map": told})
    )
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = drawn(transformers.AutoModel.from_config(config, trust_remote_code=True))
    type(model)._auto_class = None  # as a class that did not come through an Auto class
    shrink(model, {"layers.0.mlp.neurons": [1, 5], "layers.1.mlp.neurons": [2]})
    folder = save_pruned(model, tmp_path / "small")
    assert (folder / "modeling_twin.py").is_file()
    loaded = load_pruned(folder, trust_remote_code=True).eval()
    assert_same(loaded(IDS)[0], model(IDS)[0])
    again = save_pruned(loaded, tmp_path / "again")
    assert_same(transformers.AutoModel.from_pretrained(again, trust_remote_code=True).eval()(IDS)[0], model(IDS)[0])
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load_pruned(folder)
    with pytest.raises(PruningError, match="standalone"):
        save_pruned(model, tmp_path / "alone", standalone=True)
