"""Naming conventions as data: which child names form an attention or a feed-forward block, and what counts its units.

A model that shares one of these conventions needs nothing else. A new convention is one row; a family that is odd in
another way is one file beside this one, with one function under `register_architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Paths of an attention's projections below the block that holds them all."""

    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class FeedForward:
    """Paths of a feed-forward block's projections; two `up` paths are a gated block."""

    up: tuple[str, ...]
    down: str


ATTENTIONS = (
    Attention("self.query", "self.key", "self.value", "output.dense"),  # BERT and kin
    Attention("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT and kin, transformers 4
    Attention("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama and kin; ViT on transformers 5
    Attention("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, OPT, CLIP
    Attention("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
)
FEED_FORWARDS = (
    FeedForward(("intermediate.dense",), "output.dense"),  # BERT, ViT on transformers 4
    FeedForward(("gate_proj", "up_proj"), "down_proj"),  # Llama and kin
    FeedForward(("fc1",), "fc2"),  # BART, OPT, CLIP, ViT on transformers 5
    FeedForward(("lin1",), "lin2"),  # DistilBERT
)
HEAD_SIZES = ("attention_head_size", "head_dim", "head_size")  # attributes that hold one head's size
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")  # attributes equal to the number of query heads
HEAD_WIDTHS = ("all_head_size",)  # heads x head size
KV_COUNTS = ("num_key_value_heads", "num_kv_heads")  # number of key/value heads
HEADS_PER_KV = ("num_key_value_groups",)  # query heads per key/value head
CROSS_ATTENTIONS = ("crossattention", "encoder_attn", "cross_attn")  # path components of attention to another sequence
WIDE_NORMS = ("q_norm", "k_norm", "attn_sub_norm", "ffn_sub_norm", "ffn_layernorm")  # separable only if one head wide
TOWERS = {"encoder": "encoder", "decoder": "decoder", "vision_model": "vision", "text_model": "text"}
# config attributes that state a count for every layer alike: where a pruned shape is uniform, stock transformers
# can build it from these
CONFIG_COUNTS = {
    "neuron": ("intermediate_size", "ffn_dim"),
    "head": ("num_attention_heads", "n_heads", "num_key_value_heads"),
    "kv_group": ("num_key_value_heads",),  # after heads: where there are KV groups, they say this one
}
