"""Tiny random models of every type that the installed transformers can build without a network.

`build` starts from a type's default config, shrinks what it knows by name, and draws every tensor at random: a norm, a
bias or a running statistic that still has its initial value hides wrong cuts. Try all of them, one line for each:

    python tests/zoo.py [--task TASK ...] [--only TYPE ...] [--tree FILE]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

TASKS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech_seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio_classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "tower": "MODEL_MAPPING_NAMES",
}
# Whole dual models and their towers; the mapping lists many other base models, which have tasks of their own.
TOWERS = re.compile(
    r"(clip|siglip2?|chinese_clip|altclip|metaclip_2|xclip|aimv2|tipsv2|groupvit|owlvit|owlv2|clipseg|align|mlcd|clap)"
    r"(_text_model|_vision_model)?|blip|blip_2_qformer|flava|bridgetower|videoprism|"
    r"dinov3_vit|dinov3_convnext|vit_mae|videomae|vivit|timesformer|vjepa2|vitdet|pixio|deit|vit|dinov2|yolos"
)

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, DECODER_FFN, EXPERT_FFN, EXPERTS = 32, 4, 2, 16, 48, 40, 24, 4
VOCAB, POSITIONS, LENGTH, FIRST_TOKEN, LABELS = 99, 64, 12, 50, 5
IMAGE, LARGE_IMAGE, PATCH = 32, 64, 8

QUERY_HEADS = re.findall(
    r"\w+",
    """
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
    num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads
    num_cross_attention_heads num_self_attention_heads speech_encoder_attention_heads swa_num_attention_heads
    pred_num_attention_heads mit_num_attention_heads prompt_num_attention_heads""",
)
# A size, and what configs call it. The sizes differ where they may, so that a cut of the wrong axis is an error.
NAMES: list[tuple[int, str]] = [
    (HIDDEN, "hidden_size d_model n_embd dim embed_dim emb_dim decoder_hidden_size out_hidden_size"),
    (HIDDEN, "encoder_hidden_size text_hidden_size word_embed_proj_dim audio_hidden_size vision_hidden_size"),
    (HIDDEN, "backbone_hidden_size hidden_size_global cross_hidden_size"),
    (FFN, "intermediate_size ffn_dim encoder_ffn_dim d_ff d_inner n_inner ffn_hidden_size mlp_dim dim_feedforward"),
    (FFN, "encoder_intermediate_size dff dim_ff speech_encoder_intermediate_size shared_experts_intermediate_size"),
    (DECODER_FFN, "decoder_ffn_dim decoder_intermediate_size mit_intermediate_size"),
    (EXPERT_FFN, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size expert_dim"),
    (EXPERT_FFN, "moe_shared_expert_intermediate_size shared_intermediate_size ffn_expert_hidden_size"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (POSITIONS, "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len"),
    (POSITIONS, "context_length text_seq_length max_pos_emb"),
    (VOCAB, "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size unpadded_vocab_size"),
    (24, "projection_dim q_lora_rank projection_size head_hidden_size mit_hidden_size"),
    (20, "kv_lora_rank"),
    (16, "v_head_dim sliding_window local_attention num_mel_bins linear_key_head_dim classifier_proj_size"),
    (16, "output_channels swa_head_dim downsample_hidden_size nemo_conv_channels attention_window_size"),
    (12, "qk_nope_head_dim linear_value_head_dim o_lora_rank"),
    (10, "mamba_dt_rank time_step_rank"),
    (8, "qk_rope_head_dim d_kv mamba_d_state ssm_state_size state_size index_head_dim hidden_size_per_layer_input"),
    (8, "mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_head mamba_headdim n_mamba_heads mamba_chunk_size"),
    (8, "linear_head_dim dim_head num_conv_pos_embeddings conv_channels subsampling_conv_channels"),
    (8, "xpath_unit_hidden_size"),
    (4, "linear_num_value_heads linear_num_heads num_conv_pos_embedding_groups num_filters"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts n_groups mamba_n_groups"),
    (2, "mamba_ngroups o_groups swa_num_key_value_heads linear_num_key_heads encoder_sparse_step window_size"),
    (2, "decoder_sparse_step"),
    (1, "n_group topk_group num_expert_group topk_groups first_k_dense_replace num_dense_layers"),
    (1, "num_sparse_encoder_layers num_sparse_decoder_layers"),
]
SIZES = {name: size for size, names in NAMES for name in names.split()} | dict.fromkeys(QUERY_HEADS, HEADS)
LAYERS = re.findall(
    r"\w+",
    """
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
    depth l_layers x_layers r_layers speech_encoder_layers decoder_num_hidden_layers decoder_num_layers num_blocks
    encoder_num_layers layers pred_num_hidden_layers""",
)
STAGES: dict[str, list[int]] = {
    "hidden_sizes": [16, 24, 32, 48, 64, 72, 80],
    "embed_dims": [16, 24, 32, 48, 64, 72, 80],
    "encoder_hidden_sizes": [16, 24, 32, 48],
    "num_heads": [2, 2, 4, 4],
    "num_attention_heads": [2, 2, 4, 4],
}

# Where the names are not enough. Values may be nested like the config itself.
V5 = int(transformers.__version__.split(".")[0]) >= 5
NO_KERNELS = {} if V5 else {"use_mamba_kernels": False}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
SMALL_EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320, "image_size": 64}
PHI4_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ALL_128 = {"hidden_size": 128}
CHANGES: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": SMALL_EFFICIENTNET,
    "audio-spectrogram-transformer": {"max_length": 40, "frequency_stride": 4, "time_stride": 4},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # what its sparse attention becomes for inputs as short as these
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bit": {"hidden_sizes": [32, 64, 96, 128], "embedding_size": 16, "num_groups": 8},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 50},
    "bridgetower": {**ALL_128, "text_config": ALL_128, "vision_config": ALL_128},
    "bros": {"hidden_size": 64},
    "clap_audio_model": {"num_mel_bins": 64, "patch_embeds_hidden_size": 16, "hidden_size": 128},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "cvt": {"embed_dim": (16, 24, 32), "num_heads": (2, 2, 4), "depth": (2, 2, 3)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            **({"hidden_size": 32} if V5 else {}),
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dia": {"delay_pattern": [0, 1, 2]},
    "dia_decoder": {
        "num_channels": 3,
        "cross_num_attention_heads": 4,
        "cross_head_dim": 8,
        "cross_num_key_value_heads": 2,
        "cross_hidden_size": 32,
    },
    "distilbert": {"hidden_dim": 48},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "efficientformer": {"dim": 48, "key_dim": 8, "resolution": 2, "image_size": 64, "num_hidden_layers": 5},
    "efficientnet": SMALL_EFFICIENTNET,
    "esm": {"vocab_size": 99, "mask_token_id": 5},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 24},
    "gemma4_unified_text": {"global_head_dim": 24},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech_encoder": {"hidden_dim": 32, "input_dim": 16, "output_dim": 12, "context_size": 16},
    "granite_speech_plus_encoder": {"hidden_dim": 32, "input_dim": 16, "output_dim": 12, "context_size": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] if V5 else ["mamba", "attention"]},
    "hgnet_v2": {
        "hidden_sizes": [32, 48, 64, 72],
        "stem_channels": (3, 16, 24),
        "stage_in_channels": (24, 32, 48, 64),
        "stage_mid_channels": (8, 12, 16, 24),
        "stage_out_channels": (32, 48, 64, 72),
        "stage_num_blocks": (1, 1, 2, 1),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        **NO_KERNELS,
    },
    "kyutai_speech_to_text": {"num_codebooks": 3, "codebook_vocab_size": 30},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "levit": {"patch_size": 16, "key_dim": (8, 8, 8)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "intermediate_size": 56},
    "luke": {"entity_vocab_size": 30, "entity_emb_size": 20},
    "lxmert": {"visual_feat_dim": 20},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "markuplm": {"max_depth": 5},
    "mega causal_lm": {"bidirectional": False},
    "mimi": {"upsample_groups": 32, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16},
    "ministral": {"head_dim": 16},
    "mistral4": {"qk_nope_head_dim": 8, "head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1], **({} if V5 else {"rope_scaling": {"rope_type": "default"}})},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"image_size": 64, "neck_hidden_sizes": (16, 16, 24, 32, 40, 48, 56), "hidden_sizes": (16, 24, 32)},
    "mobilevitv2": {"image_size": 64, "base_attn_unit_dims": (16, 24, 32), "n_attn_blocks": (2, 2, 2)},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16},
    "perceiver": {"num_latents": 10, "d_latents": 24, "num_self_attends_per_block": 2},
    "phi4_multimodal": {} if V5 else {"vision_config": PHI4_VISION},
    "phi4_multimodal_audio": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32},
    "pp_lcnet": {"scale": 0.25, "class_expand": 40},
    "qwen3_asr_encoder": {"output_dim": 32},
    "qwen3_audio_encoder": {"output_dim": 32},
    "qwen4_exp_text": {**INDEXER, "indexer_compress_ratio": 2, "hc_lowrank": 12, "ple_embed_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 40, "attention_window_size": 8},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [4, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 99,
        "shape_vocab_size": 99,
        "pronunciation_embed_dim": 12,
        "shape_embed_dim": 20,
    },
    "seamless_m4t": {"feature_projection_input_dim": 20, "t2u_encoder_layers": 2, "t2u_decoder_layers": 2},
    "seamless_m4t_v2": {"feature_projection_input_dim": 20, "t2u_encoder_layers": 2, "t2u_decoder_layers": 2},
    "shieldgemma2": {"yes_token_index": 30, "no_token_index": 40},
    "siglip_text_model": {"projection_size": 32},
    "siglip2_text_model": {"projection_size": 32},
    "siglip2_vision_model": {"num_patches": 16},
    "speech_to_text": {"input_feat_per_channel": 16},
    "textnet": {"stem_out_channels": 16},
    "transfo-xl": {"cutoffs": [30, 60], "tie_projs": [False, True, True], "d_embed": 32, "d_head": 8, "mem_len": 8},
    "vit_hybrid": {
        "image_size": 64,
        "backbone_featmap_shape": [1, 96, 4, 4],
        "backbone_config": {"hidden_sizes": [32, 64, 96], "embedding_size": 16, "num_groups": 8},
    },
    "vjepa2": {"hidden_size": 64, "pred_hidden_size": 48, "crop_size": 32, "frames_per_clip": 4},
    "wav2vec2-bert": {"feature_projection_input_dim": 20},
    "xclip_vision_model": {
        "mit_hidden_size": 24,
        "mit_intermediate_size": 40,
        "mit_num_attention_heads": 4,
        "num_frames": 2,
    },
    "xclip": {"prompt_num_attention_heads": 4},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "xmod": {"languages": ("en_XX", "de_DE"), "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": None if V5 else ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        **NO_KERNELS,
    },
}
# Why some types cannot be built here.
SKIPPED: dict[str, str] = {
    "timm_wrapper": "needs timm",
    "timm_backbone": "needs timm",
    "gemma3n": "needs timm",
    "dinat": "needs natten",
    "nat": "needs natten",
    "qdqbert": "needs pytorch-quantization",
    "gemma4_assistant": "drafts for another model, and reads its keys and values",
    "gemma4_unified_assistant": "drafts for another model, and reads its keys and values",
    "layoutlmv2": "needs detectron2",
    "encoder-decoder": "is a pair of other types, and has no default config",
    "speech-encoder-decoder": "is a pair of other types, and has no default config",
    "speech_to_text_2": "does not run in this version: its positions have no weight",
    "transfo-xl": "does not run in this version: it calls type_as without a tensor",
    "vit_hybrid": "does not run in this version: it initializes a mask token that it lacks",
    **({} if V5 else dict.fromkeys(("musicgen", "musicgen_melody"), "has no default config")),
    **({} if V5 else {"fsmt": "does not run in this version: its decoder lacks a config"}),
}


def instances() -> list[tuple[str, str]]:
    """Return every pair of a model type and a task that the installed transformers lists."""
    pairs = []
    for task, mapping in TASKS.items():
        for model_type in getattr(modeling_auto, mapping):
            if model_type not in configuration_auto.CONFIG_MAPPING_NAMES:
                continue
            if task != "tower" or TOWERS.fullmatch(model_type):
                pairs.append((model_type, task))
    return pairs


def model_class(model_type: str, task: str) -> type[PreTrainedModel]:
    """Find the class by its name; some are missing from the package's top level."""
    name = getattr(modeling_auto, TASKS[task])[model_type]
    name = name if isinstance(name, str) else name[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    module = configuration_auto.model_type_to_module_name(model_type)
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def kinds_of_layers(config: PretrainedConfig, layers: int) -> list[int]:
    """Pick which of the default layers to keep, so that each kind of layer is there."""
    depth = default_depth(config)
    lists = [v for v in vars(config).values() if is_per_layer(v, depth)]
    kinds: dict[str, int] = {}
    for index, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(kind), index)
    picked = sorted(kinds.values())[: max(layers, 4)]
    rest = [index for index in range(max(depth, layers)) if index not in picked]
    return sorted(picked + rest[: max(0, layers - len(picked))])


def default_depth(config: PretrainedConfig) -> int:
    """Return how many layers the default config has; 0 if it does not say so."""
    found = [v for k, v in vars(config).items() if k in LAYERS and isinstance(v, int)]
    return found[0] if found else 0


def is_per_layer(value: Any, depth: int) -> bool:
    """Tell whether a value of a config lists something for each layer."""
    return isinstance(value, (list, tuple)) and depth > 4 and len(value) == depth and not isinstance(value[0], dict)


def shrink(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """Return the constructor's arguments for a tiny config of the same class."""
    depth, keep = default_depth(config), kinds_of_layers(config, layers)
    tokens = iter(range(5, FIRST_TOKEN))
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and config.model_type == "dbrx":
            continue  # its parts take few arguments; the table of changes has them
        elif isinstance(value, PretrainedConfig):
            small[name] = {"model_type": value.model_type, **unlike_default(value), **shrink(value, layers)}
        elif name == "depths" and isinstance(value, (list, tuple)):
            small[name] = type(value)([max(2, layers)] * len(value))
        elif name in ("conv_dim", "tdnn_dim") and isinstance(value, (list, tuple)):
            small[name] = type(value)(max(8, size // 16) for size in value)
        elif name in ("embed_dim", "patch_embeds_hidden_size") and "depths" in vars(config):
            small[name] = 16
        elif name in LAYERS and type(value) is int:
            small[name] = len(keep) if value == depth else layers
        elif name in STAGES and isinstance(value, (list, tuple)):
            small[name] = type(value)(STAGES[name][: len(value)])
        elif is_per_layer(value, depth) and name in SIZES:
            small[name] = type(value)([SIZES[name]] * len(keep))
        elif is_per_layer(value, depth):
            small[name] = type(value)(value[index] for index in keep)
        elif name == "num_key_value_heads":
            small[name] = KV_HEADS if value not in (None, query_heads(config)) else None if value is None else HEADS
        elif name in ("head_dim", "attention_head_dim", "kv_channels") and isinstance(value, int):
            small[name] = small_head(config, value)
        elif name == "embedding_size" and type(value) is int:
            small[name] = HIDDEN if value == getattr(config, "hidden_size", None) else 24
        elif name in SIZES and type(value) is int and value > 0:
            small[name] = min(SIZES[name], value) if SIZES[name] < 3 else SIZES[name]
        elif re.search(r"_token_(id|index)$|^(image|video|audio)_token$", name):
            small |= token(name, value, tokens)
        elif name == "image_size":
            small |= image(config, value)
        elif name == "patch_size":
            small[name] = patch(config, value)
        elif re.search(r"drop", name) and type(value) is float:
            small[name] = 0.0
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = rope(value, small_head(config, old_head(config)) / (old_head(config) or 1))
    return merge(small, CHANGES.get(config.model_type, {}))


def unlike_default(config: PretrainedConfig) -> dict[str, Any]:
    """Return the plain values that an outer config has set in an inner one."""
    plain = vars(type(config)())
    simple = (bool, str, int, float)
    return {k: v for k, v in vars(config).items() if k[0] != "_" and isinstance(v, simple) and plain.get(k) != v}


def query_heads(config: PretrainedConfig) -> int | None:
    """Return the default number of query heads, whatever it is called."""
    return next((vars(config)[name] for name in QUERY_HEADS if name in vars(config)), None)


def old_head(config: PretrainedConfig) -> int:
    """Return how wide a head is by default."""
    heads, hidden = query_heads(config), vars(config).get("hidden_size")
    return vars(config).get("head_dim") or (hidden // heads if isinstance(heads, int) and hidden else HEAD)


def small_head(config: PretrainedConfig, value: int) -> int:
    """Keep heads as wide as the hidden size asks for, where the default has it so."""
    if value == getattr(config, "qk_rope_head_dim", None):
        return SIZES["qk_rope_head_dim"]
    heads, hidden = query_heads(config), vars(config).get("hidden_size")
    return HIDDEN // HEADS if heads and hidden and heads * value == hidden else HEAD


def token(name: str, value: Any, tokens: Iterator[int]) -> dict[str, Any]:
    """Bring a special token inside the vocabulary, and out of the range that inputs are drawn from."""
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if isinstance(value, (list, tuple)) and value:
        return {name: type(value)([fixed.get(name, 2)])}
    if value is None:
        return {name: 0} if name == "pad_token_id" else {}
    if type(value) is int and value >= FIRST_TOKEN:
        return {name: fixed.get(name) if name in fixed else next(tokens)}
    return {}


def image(config: PretrainedConfig, value: Any) -> dict[str, Any]:
    """Shrink the image's side; where stages halve it, it starts larger."""
    side = LARGE_IMAGE if any(hasattr(config, name) for name in ("depths", "num_stages")) else IMAGE
    return {"image_size": side if isinstance(value, int) else type(value)([side] * len(value)) if value else value}


def patch(config: PretrainedConfig, value: Any) -> Any:
    """Shrink patches of plain vision transformers; those of stages are small already."""
    staged = "depths" in vars(config)
    return min(value, PATCH) if isinstance(value, int) and not staged else value


def rope(value: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Fit what a rotary embedding says about sizes to heads that have shrunk by a ratio."""
    value = {k: rope(v, ratio) if isinstance(v, dict) else v for k, v in value.items()}
    if "mrope_section" in value:
        sections = [int(size * ratio) for size in value["mrope_section"]]
        sections[0] += round(sum(value["mrope_section"]) * ratio) - sum(sections)
        value["mrope_section"] = sections
    return value


def tiny_config(model_type: str, task: str, layers: int, changes: dict[str, Any]) -> PretrainedConfig:
    """Make the tiny config of a type, for a task."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    small = shrink(config_class(), layers)
    if task in ("sequence_classification", "token_classification", "image_classification", "audio_classification"):
        small["num_labels"] = LABELS
    if task == "causal_lm" and "is_decoder" in vars(config_class()):
        small["is_decoder"] = True
    small |= CHANGES.get(f"{model_type} {task}", {})
    config = config_class(**merge(small, changes))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    wanted = model_class(model_type, task).config_class
    inner = [value for value in vars(config).values() if type(value) is wanted]
    return inner[0] if inner and not isinstance(config, wanted) else config


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge nested changes into a config's arguments."""
    nested = {k: merge(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return old | new | nested


def build(model_type: str, task: str, *, layers: int = 2, seed: int = 0, **config_changes: Any) -> PreTrainedModel:
    """Build a tiny model in float32, in evaluation, with every tensor drawn at random.

    There are more than `layers` layers where the type has more kinds of them.
    """
    implementation = config_changes.pop("attn_implementation", None)
    config = tiny_config(model_type, task, layers, config_changes)
    if implementation:
        config._attn_implementation = implementation
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = model_class(model_type, task)(config).float()
    randomize(model.eval(), seed)
    calibrate(model, seed)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what builders say about odd configs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter and every running statistic."""
    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__:  # computed, not learned: loading computes it again
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.data.copy_(random_like(module, name, parameter.data, draw))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_var":
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))
            elif is_statistic(module, name, buffer):
                buffer.add_(torch.randn(buffer.shape, generator=draw) * 0.2)


def calibrate(model: PreTrainedModel, seed: int) -> None:
    """Bring batch norms' statistics near to those of some inputs, or what flows through many of them fades away."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    draw = torch.Generator().manual_seed(seed)

    def measure(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (value,) = arguments
        rest = [axis for axis in range(value.ndim) if axis != 1]
        scale, noise = value.std(rest).clamp(min=0.01), torch.randn(len(norm.running_mean), generator=draw)
        norm.running_mean.copy_(value.mean(rest) + 0.2 * scale * noise)
        norm.running_var.copy_(scale**2 * (0.5 + torch.rand(len(scale), generator=draw)))

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms if norm.running_mean is not None]
    if hooks:
        outputs(model, inputs(model, seed=99, rows=16))
    for hook in hooks:
        hook.remove()


def is_statistic(module: nn.Module, name: str, buffer: Tensor) -> bool:
    """Tell whether checkpoints have this buffer and its initial value is only a start: one number everywhere."""
    saved = name not in module._non_persistent_buffers_set
    return saved and buffer.is_floating_point() and buffer.numel() > 1 and bool((buffer == buffer.flatten()[0]).all())


def random_like(module: nn.Module, name: str, value: Tensor, draw: torch.Generator) -> Tensor:
    """Draw one tensor; matrices keep the scale of what flows through them, vectors stay around where they start."""
    noise = torch.randn(value.shape, generator=draw)
    if value.ndim < 2:
        start = value if bool((value.isfinite() & (value.abs() < 10)).all()) else torch.zeros_like(value)
        return start + 0.2 * noise
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    if isinstance(module, nn.Linear) or "Conv" in type(module).__name__:
        inputs = value[0].numel() if type(module).__name__ != "Conv1D" else len(value)
    else:
        inputs = max(value.shape[-2:])
    return noise * min(0.5, 1.2 / inputs**0.5)


def inputs(model: PreTrainedModel, seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    """Draw what the model's forward needs."""
    draw = torch.Generator().manual_seed(1000 + seed)
    wanted = inspect.signature(model.forward).parameters
    whole = not re.search(r"For[A-Z]|LMHead|MTModel", type(model).__name__)  # a dual model needs both its inputs
    batch: dict[str, Tensor] = {}
    if "input_ids" in wanted:
        batch |= text(model, wanted, rows, draw)
    if whole or "input_ids" not in wanted:
        batch |= images(model, wanted, rows, draw) | sounds(model, wanted, rows, draw)
    if "decoder_input_ids" in wanted and model.config.is_encoder_decoder and not classifies(model):
        channels = (model.config.decoder_config.num_channels,) if model.config.model_type == "dia" else ()
        shape = (rows, LENGTH - 3, *channels)
        batch["decoder_input_ids"] = torch.randint(FIRST_TOKEN, vocabulary(model), shape, generator=draw)
    return batch | special(model, rows, draw)


def classifies(model: PreTrainedModel) -> bool:
    """Tell whether an encoder-decoder reads the same text twice."""
    return bool(re.search(r"SequenceClassification|QuestionAnswering", type(model).__name__))


def vocabulary(model: PreTrainedModel) -> int:
    """Return the size of the vocabulary."""
    return getattr(model.config.get_text_config(), "vocab_size", None) or VOCAB


def text(model: PreTrainedModel, wanted: Any, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Draw a text, and what some models want to know of each token."""
    ids = torch.randint(FIRST_TOKEN, vocabulary(model), (rows, LENGTH), generator=draw)
    if classifies(model) and isinstance(getattr(model.config, "eos_token_id", None), int):
        ids[:, -1] = model.config.eos_token_id  # encoder-decoders classify by the end-of-text token
    batch = {"input_ids": ids}
    if "attention_mask" in wanted:
        batch["attention_mask"] = torch.ones_like(ids)
    if "bbox" in wanted:
        batch["bbox"] = torch.randint(0, 20, (rows, LENGTH, 4), generator=draw).sort(-1).values
    return batch


def images(model: PreTrainedModel, wanted: Any, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Draw images, or a video."""
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
    side = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or LARGE_IMAGE
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    shape = (getattr(vision, "num_channels", None) or getattr(vision, "in_chans", None) or 3, *sides)
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None)
    if "pixel_values_videos" in wanted:
        return {"pixel_values_videos": torch.randn(rows, frames, *shape, generator=draw)}
    if "pixel_values" not in wanted:
        return {}
    if "spatial_shapes" in wanted:
        patches = torch.randn(rows, vision.num_patches, 3 * vision.patch_size**2, generator=draw)
        grid = torch.full((rows, 2), round(vision.num_patches**0.5))
        mask = torch.ones(rows, vision.num_patches, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grid}
    moving = re.search("VideoMAE|Timesformer|Vivit|XCLIPModel", type(model).__name__)
    lead = (rows, frames) if frames and moving else (rows,)
    batch = {"pixel_values": torch.randn(*lead, *shape, generator=draw)}
    if "noise" in wanted:
        batch["noise"] = torch.rand(rows, (side // vision.patch_size) ** 2, generator=draw)
    return batch


def sounds(model: PreTrainedModel, wanted: Any, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Draw waves, or their spectrograms: some models have the frequencies in the last place, some before it."""
    config = model.config
    if "input_values" in wanted:
        spectrogram = (config.max_length, config.num_mel_bins) if hasattr(config, "frequency_stride") else (1600,)
        return {"input_values": torch.randn(rows, *spectrogram, generator=draw)}
    if "input_features" not in wanted:
        return {}
    encoder = getattr(config, "encoder_config", None) or getattr(config, "audio_config", None) or config
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    bins = next(getattr(encoder, name) for name in names if hasattr(encoder, name))
    if config.model_type == "whisper":
        return {"input_features": torch.randn(rows, bins, 2 * config.max_source_positions, generator=draw)}
    lead = (rows, 1) if config.model_type.startswith("clap") else (rows,)
    return {"input_features": torch.randn(*lead, 64, bins, generator=draw)}


def special(model: PreTrainedModel, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Draw what only one type of model needs."""
    config = model.config
    if config.model_type == "lxmert":
        boxes = torch.rand(rows, 6, config.visual_pos_dim, generator=draw)
        return {"visual_feats": torch.randn(rows, 6, config.visual_feat_dim, generator=draw), "visual_pos": boxes}
    if config.model_type == "blip_2_qformer":
        seen = torch.randn(rows, 5, config.encoder_hidden_size, generator=draw)
        return {"query_embeds": torch.randn(rows, 3, config.hidden_size, generator=draw), "encoder_hidden_states": seen}
    if config.model_type == "longformer" and "QuestionAnswering" in type(model).__name__:
        ids = torch.randint(FIRST_TOKEN, VOCAB, (rows, LENGTH), generator=draw)
        ids[:, [4, 5, -1]] = config.sep_token_id  # it tells the question by them
        return {"input_ids": ids}
    if config.model_type == "kyutai_speech_to_text":
        return {"input_ids": torch.randint(config.codebook_vocab_size, (rows, LENGTH, 4), generator=draw)}
    if config.model_type in ("musicgen_decoder", "musicgen_melody_decoder"):
        ids = torch.randint(FIRST_TOKEN, VOCAB, (rows * config.num_codebooks, LENGTH), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones(rows, LENGTH, dtype=torch.long)}
    if config.model_type == "voxtral_realtime":
        frames = LENGTH * config.downsample_factor * 2
        return {"input_features": torch.randn(rows, config.audio_config.num_mel_bins, frames, generator=draw)}
    return {}


def outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the main output as one tensor."""
    with torch.no_grad(), quiet():
        result = model(**batch)
    if getattr(result, "start_logits", None) is not None:
        return torch.stack([result.start_logits, result.end_logits])
    for name in ("logits", "logits_per_image", "logits_per_audio", "prediction_logits", "last_hidden_state"):
        if isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)
    return next(value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point())


def check(model_type: str, task: str) -> PreTrainedModel:
    """Build and run one instance; raise an error that says what is wrong with it."""
    model = build(model_type, task)
    first = outputs(model, inputs(model))
    if not bool(first.isfinite().all()):
        raise ArithmeticError("the output is not finite")
    if not torch.equal(first, outputs(model, inputs(model))):
        raise ArithmeticError("a second forward gives another output")
    other = outputs(model, inputs(model, seed=1))
    if first.shape == other.shape and torch.allclose(first, other, atol=1e-4):
        raise ArithmeticError("the output does not depend on the inputs")
    if first.std() < 1e-3:
        raise ArithmeticError("the output is all but constant")
    again = build(model_type, task).state_dict()
    for name, value in model.state_dict().items():
        if not torch.equal(value, again[name]):
            raise ArithmeticError(f"{name} differs from build to build")
        if value.is_floating_point() and value.numel() > 1 and value.std() == 0:
            raise ArithmeticError(f"{name} is constant")
    return model


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Interrupt what takes too long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def scalars(module: nn.Module) -> str:
    """Write a module's own plain attributes in one line; of PyTorch's own modules only what shapes do not tell."""
    plain = {k: v for k, v in vars(module).items() if type(v) in (bool, int, float) and k[0] != "_" and k != "training"}
    if type(module).__module__.startswith("torch."):
        plain = {k: v for k, v in plain.items() if k in ("groups", "num_heads", "num_groups") and v != 1}
    return " ".join(f"{k}={v}" for k, v in plain.items())


def tree(model: nn.Module) -> str:
    """Write a model's parameters, with one layer for each list of layers, and the scalars of its modules."""
    lines: list[str] = []

    def walk(module: nn.Module, path: str, indent: int) -> None:
        own = list(module.named_parameters(recurse=False)) + [
            (f"({name})", value) for name, value in module.named_buffers(recurse=False)
        ]
        tensors = " ".join(f"{name}{list(value.shape)}" for name, value in own)
        lines.append(f"{'  ' * indent}{path}: {type(module).__name__} {tensors} {scalars(module)}".rstrip())
        children = list(module.named_children())
        shapes: set[str] = set()
        for name, child in children:
            if isinstance(module, nn.ModuleList):
                shape = str([(k, tuple(v.shape)) for k, v in child.named_parameters()]) + type(child).__name__
                if shape in shapes:
                    continue
                shapes.add(shape)
                name = f"{name} of {len(children)}"
            walk(child, name, indent + 1)

    walk(model, type(model).__name__, 0)
    return "\n".join(lines)


def main() -> None:
    """Try the chosen instances one by one, and say how each went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="*", default=None, metavar="TYPE")
    parser.add_argument("--tree", metavar="FILE", help="write each type's modules, once, to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    counts = {"ran": 0, "failed": 0, "skipped": 0}
    trees: dict[str, str] = {}
    for model_type, task in instances():
        if task not in options.task or (options.only and model_type not in options.only):
            continue
        if model_type in SKIPPED:
            counts["skipped"] += 1
            print(f"{model_type} {task} SKIPPED {SKIPPED[model_type]}")
            continue
        start = time.monotonic()
        try:
            with limited(20):
                model = check(model_type, task)
        except Exception as error:
            counts["failed"] += 1
            where = inspect.trace()[-1]
            text = " ".join(str(error).split())[:200]
            print(f"{model_type} {task} {type(error).__name__}: {text} ({where.filename[-40:]}:{where.lineno})")
        else:
            counts["ran"] += 1
            took = time.monotonic() - start
            count = sum(parameter.numel() for parameter in model.parameters())
            print(f"{model_type} {task} OK {count}" + (f" SLOW {took:.1f} s" if took > 5 else ""))
            trees.setdefault(model_type, f"=== {model_type} {task}\n{tree(model)}\n" if options.tree else "")
        sys.stdout.flush()
    if options.tree:
        with open(options.tree, "w", encoding="utf-8") as file:
            file.write("\n".join(trees.values()))
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"; {len(trees)} types ran")


if __name__ == "__main__":
    main()
