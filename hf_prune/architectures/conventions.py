"""Naming conventions as data: which child names form an attention or a feed-forward block, and what counts its units.

A model that shares one of these conventions needs nothing else. A new convention is one row; a family that is odd in
another way is one file beside this one, with one function under `register_architecture`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..kinds import KINDS

# --- attention: three projections of one core module -----------------------------------------------------------------
QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, BART, OPT, CLIP and kin; ViT on transformers 5
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),  # Kyutai
    ("query", "key", "value"),  # BERT and kin; ViT on transformers 4
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "k", "v"),  # T5, MPNet
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2, ProphetNet
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),  # conformers
    ("project_q", "project_k", "project_v"),  # CPM-Ant
    ("projection_query", "projection_key", "projection_value"),  # CvT
    ("Wq", "Wk", "Wv"),  # CTRL
    ("q_head", "k_head", "v_head"),  # Funnel
)
# latent attention: a projection of queries, and one that makes keys and values of all heads from a latent vector
LATENT = (("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"))  # DeepSeek and kin
Layout = Literal["blocks", "per_head", "per_group", "latent"]
# one projection of all three: first all queries, then all keys, then all values; or all three of each head in turn; or
# for each KV group its queries, its key and its value
FUSED: tuple[tuple[str, Layout], ...] = (
    ("qkv_proj", "blocks"),  # Phi-3
    ("qkv", "blocks"),  # BEiT-like vision models
    ("Wqkv", "blocks"),  # MPT, DBRX, ModernBERT
    ("c_attn", "blocks"),  # GPT-2, transposed
    ("att_proj", "blocks"),  # Bark
    ("in_proj", "per_head"),  # DeBERTa
    ("query_key_value", "per_head"),  # BLOOM, GPT-NeoX; Falcon says by its own switches
)
# where the output projection is: inside the core, or in the module around it
OUTPUT_INSIDE = (
    "o_proj",
    "o_proj.linear",
    "out_proj",
    "out_lin",
    "o",
    "dense",
    "Wo",
    "proj",
    "projection",
    "projection_layer",
    "c_proj",
    "linear_out",
    "to_out",
    "to_out.0",
    "attention_out",
    "output",
    "post_proj",
)
BESIDE = {"in_proj": "q_bias"}  # a fused projection of so plain a name counts only beside this one
OUTPUT_AROUND = ("output.dense", "output", "out_proj", "o_proj", "proj", "dense", "out", "post")
CONFIG_SIZES = ("head_dim", "d_head")  # of a config: one head's size
HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim", "dim_head", "d_head")
HEAD_COUNTS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_head",
    "heads",
    "num_attn_heads",
)  # of query heads
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")  # of key/value heads
HEADS_PER_KV = ("num_key_value_groups", "n_rep")  # query heads per key/value head
HEAD_WIDTHS = (  # heads x head size, where the code reshapes by it
    "all_head_size",
    "head_size",
    "inner_dim",
    "embed_dim",
    "hidden_size",
    "attention_hidden_size",
    "split_size",
    "d_model",
    "dim",
    "hidden_dim",
    "attn_dim",
    "n_embd",
    "hidden_size_output",
    "d_model_size",
)
CROSS_ATTENTIONS = ("crossattention", "encoder_attn", "cross_attn", "EncDecAttention", "cross_attention")
# tensors of an attention beside its projections that belong to heads: name -> (axis, entries: one or the head's size)
PER_HEAD: dict[str, tuple[int, Literal["one", "size"]]] = {
    "r_w_bias": (0, "one"),  # Funnel
    "r_r_bias": (0, "one"),
    "r_s_bias": (0, "one"),
    "r_kernel": (1, "one"),
    "seg_embed": (1, "one"),
    "pos_proj.weight": (0, "size"),  # DeBERTa
    "pos_q_proj.weight": (0, "size"),
    "pos_q_proj.bias": (0, "size"),
    "w2e_query.weight": (0, "size"),  # LUKE: queries between words and entities
    "w2e_query.bias": (0, "size"),
    "e2w_query.weight": (0, "size"),
    "e2w_query.bias": (0, "size"),
    "e2e_query.weight": (0, "size"),
    "e2e_query.bias": (0, "size"),
    "conv.weight": (0, "one"),  # Nystromformer, YOSO: a depthwise convolution over heads
    "sinks": (0, "one"),  # GPT-OSS
    "relative_position_bias_table": (1, "one"),  # Swin, BEiT
    "relative_attention_bias.weight": (1, "one"),  # UMT5: a table in each layer
    "logit_scale": (0, "one"),  # Swin v2
    "continuous_position_bias_mlp.2.weight": (0, "one"),
    "gru_rel_pos_const": (1, "one"),  # WavLM
    "rel_attn_embed.weight": (1, "one"),
    "pos_bias_u": (0, "one"),  # conformers
    "pos_bias_v": (0, "one"),
    "bias_u": (0, "one"),
    "bias_v": (0, "one"),
    "linear_pos.weight": (0, "size"),
    "relative_k_proj.weight": (0, "size"),
    "gate_proj.weight": (0, "size"),  # a gate on what heads return
    "gate_proj.bias": (0, "size"),
    "g_proj.weight": (0, "size"),
    "g_proj.bias": (0, "size"),
    "gate_bias": (0, "one"),
    "query_global.weight": (0, "size"),  # Longformer, LED: a second set of projections
    "query_global.bias": (0, "size"),
    "key_global.weight": (0, "size"),
    "key_global.bias": (0, "size"),
    "value_global.weight": (0, "size"),
    "value_global.bias": (0, "size"),
    "q_bias": (0, "size"),
    "v_bias": (0, "size"),
}
# the same, in the module around the attention
PER_HEAD_AROUND = {"relative_position_bias.relative_position_bias_table": 1}  # BEiT on transformers 5
# tensors that are as wide as one head whatever the number of heads, or serve all heads alike
ANY_HEAD = (
    "k_rope_only_layernorm.weight",
    "distance_embedding.weight",  # BERT's relative positions
    "gru_rel_pos_linear.weight",  # WavLM
    "gru_rel_pos_linear.bias",
    "rel_pos_h",  # SAM
    "rel_pos_w",
    "emb_rel_k",  # VITS
    "emb_rel_v",
    "continuous_position_bias_mlp.0.weight",
    "continuous_position_bias_mlp.0.bias",
    "per_dim_scale",
    "layernorm1.weight",  # Perceiver: norms of what it reads
    "layernorm1.bias",
    "layernorm2.weight",
    "layernorm2.bias",
    "q_a_proj.weight",  # latent attention: what comes before heads
    "q_a_proj.bias",
    "q_a_layernorm.weight",
    "kv_a_proj_with_mqa.weight",
    "kv_a_proj_with_mqa.bias",
    "kv_a_layernorm.weight",
)
ANY_HEAD_MODULES = ("indexer",)  # DeepSeek's choice of tokens

# what a model computes once for the heads of all its attentions: core class -> argument of its forward, and where heads
# lie in it
HEAD_ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "BloomAttention": (("alibi", "batch"),),
    "FalconAttention": (("alibi", "batch"),),
    "MptAttention": (("position_bias", "0"),),
    "MPNetSelfAttention": (("position_bias", "1"),),
    "LayoutLMv3SelfAttention": (("position_bias", "1"), ("rel_pos", "1"), ("rel_2d_pos", "1")),
    "ProphetNetAttention": (("attention_mask", "1"),),
    "XLMProphetNetAttention": (("attention_mask", "1"),),
    "CpmAntAttention": (("position_bias", "1"),),
    "BeitAttention": (("attention_mask", "1"),),  # on transformers 5 the shared position bias is added to it
    "BeitSelfAttention": (("relative_position_bias", "1"),),
    "BeitSdpaSelfAttention": (("relative_position_bias", "1"),),
    "Data2VecVisionSelfAttention": (("relative_position_bias", "1"),),
    "Data2VecVisionSdpaSelfAttention": (("relative_position_bias", "1"),),
}
# stands among a core's arguments where its code reshapes what heads return to the width of the hidden states: this is
# how such code looks (CLIP and most of its kin on transformers 4, BLIP, TimeSformer, TrOCR)
RESHAPE = ("", "reshape")
RESHAPES = r"(?s)\b(\w+) = \w+\.(?:size\(\)|shape)\n.*?\.(?:reshape|view)\([^()\n]*, \1(?: // self\.num_heads)?\)"
# core classes whose heads cannot be removed, because of what their code does
INSEPARABLE: dict[str, str] = {
    "PegasusXGlobalLocalAttention": "its code reshapes what heads return to the hidden size",
    "Gemma3nTextAttention": "later layers read the keys and values of earlier ones",
    "Gemma3nTextMLP": "which neurons are active follows from the mean and deviation of all",
    "WavLMAttention": "its gate on the position bias views the hidden states as all heads",
    "GroupViTAssignAttention": "its heads say which group each patch goes to",
    "Zamba2Attention": "transformers 4 shares its tensors between layers only after loading",
    "MultiheadAttention": "torch's own code asserts that heads fill the width of its input",
}
# a setting of a core with which its heads cannot be removed: attribute, value, why
INSEPARABLE_WITH = (
    ("position_embeddings_type", "rotary", "its code turns the hidden states, viewed as all heads, before projections"),
)
# core classes whose whole branch cannot be skipped
BRANCHLESS: dict[str, str] = {
    "BltCrossAttention": "its code adds its input itself",
    "LiltSelfAttention": "it computes two streams at once",
    "PegasusXGlobalLocalAttention": "it computes two streams at once",
    "Gemma3nTextAttention": "later layers read its keys and values",
    "HrmTextAttention": "its layers run several times for one token",
    "HYV4Attention": "later layers read which tokens it chose",
    "LongcatFlashDecoderLayer": "its layers hold two attentions each",
    "XLMProphetNetAttention": "its layers read what it returns beside",
    "XLMProphetNetNgramSelfAttention": "its layers read what it returns beside",
    "XLMProphetNetEncoderLayer": "its layers return tuples of their own",
    "XLMProphetNetDecoderLayer": "its layers return tuples of their own",
    "LiltLayer": "it computes two streams at once",
    "RwkvBlock": "it hands on a state of its own",
    "ZambaMambaDecoderLayer": "which layers are hybrid follows from numbers in the config",
    "Zamba2MambaDecoderLayer": "which layers are hybrid follows from numbers in the config",
    "OpenLlamaDecoderLayer": "its layers hand on caches of their own",
    "ErnieMEncoderLayer": "its layers hand on attention maps",
    "ErnieMSelfAttention": "its layers hand on attention maps",
    "FalconH1DecoderLayer": "its cache counts layers itself",
    "SwitchTransformersBlock": "its model needs layers with experts",
    "SqueezeBertModule": "its layers return a dictionary",
    "LocalSelfAttention": "it returns a record of its own",
    "LSHSelfAttention": "it returns a record of its own",
    "ReformerLayer": "its layers are reversible: each hands on two streams",
    "IBertSelfAttention": "it hands on scales of its own quantization",
    "GroupViTAssignAttention": "nothing else says which group each patch goes to",
    "GroupViTMixerMLP": "it computes the tokens of groups, and adds them to nothing: without it all are the same",
}

# --- feed-forward ----------------------------------------------------------------------------------------------------


class FeedForward(NamedTuple):
    """Paths of a feed-forward block's projections; two `up` paths are a gated block, as is one of double width."""

    up: tuple[str, ...]
    down: str
    between: tuple[str, ...] = ()  # modules that work on each neuron alone: depthwise convolutions


FEED_FORWARDS = (
    FeedForward(("gate_proj", "up_proj"), "down_proj"),  # Llama and kin
    FeedForward(("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    FeedForward(("up_proj",), "down_proj"),  # Nemotron
    FeedForward(("intermediate_query.dense",), "output_query.dense"),  # Q-Formers: of the queries; the text's stays
    FeedForward(("intermediate.dense",), "output.dense"),  # BERT, ViT on transformers 4
    FeedForward(("fc1",), "fc2", between=("dwconv.dwconv",)),  # SegFormer on transformers 5
    FeedForward(("fc1",), "fc2"),  # BART, OPT, CLIP, ViT on transformers 5
    FeedForward(("lin1",), "lin2"),  # DistilBERT
    FeedForward(("c_fc",), "c_proj"),  # GPT-2
    FeedForward(("dense_h_to_4h",), "dense_4h_to_h"),  # BLOOM, GPT-NeoX
    FeedForward(("wi_0", "wi_1"), "wo"),  # T5 1.1
    FeedForward(("wi",), "wo"),  # T5
    FeedForward(("w1", "w3"), "w2"),  # Mixtral
    FeedForward(("Wi",), "Wo"),  # ModernBERT
    FeedForward(("linear1",), "linear2"),
    FeedForward(("linear_1",), "linear_2"),
    FeedForward(("weights_in",), "weights_out"),  # DINOv2 on transformers 4
    FeedForward(("linear_fc1",), "linear_fc2"),
    FeedForward(("intermediate_dense",), "output_dense"),  # wav2vec 2
    FeedForward(("ffn",), "ffn_output"),  # ALBERT
    FeedForward(("layer_1",), "layer_2"),  # XLNet
    FeedForward(("fc_in",), "fc_out"),  # GPT-J
    FeedForward(("input_linear",), "output_linear"),  # Granite
    FeedForward(("pwconv1",), "pwconv2"),  # ConvNeXt
    FeedForward(("pointwise_conv1",), "pointwise_conv2"),
    FeedForward(("dense1",), "dense2", between=("dwconv.dwconv",)),  # SegFormer
    FeedForward(("dense1",), "dense2"),
    FeedForward(("in_proj",), "out_proj"),  # Bark
    FeedForward(("intermediate",), "output"),
    FeedForward(("linear_h_to_4h",), "linear_4h_to_h"),
    FeedForward(("conv_1",), "conv_2"),  # VITS
    FeedForward(("key",), "value"),  # RWKV
    FeedForward(("output.conv1",), "output.conv2"),  # PoolFormer
    FeedForward(("ffn.conv1.convolution",), "ffn.conv2.convolution"),  # MobileViT v2
    FeedForward(("linear_up.linear",), "linear_down.linear", between=("linear_up.batch_norm",)),  # LeViT
    FeedForward(("in_dense",), "out_dense", between=("depth_wise",)),  # VAN
    FeedForward(("convolution1",), "convolution2", between=("batchnorm_before",)),  # EfficientFormer
)
FEED_FORWARD_BESIDE = {"key": "receptance"}  # RWKV: so plain a name counts only beside this one
FEED_FORWARD_WIDTHS = ("intermediate_size", "intermediate_dim", "ffn_dim")  # attributes equal to the number of neurons
WIDE_NORMS = ("ffn_layernorm", "ffn_sub_norm", "grn")  # over all neurons: removing one would change the others

# --- experts ---------------------------------------------------------------------------------------------------------
ROUTERS = ("gate", "router", "router.layer", "router.classifier", "gate.wg", "gate.classifier", "gating")
EXPERT_COUNTS = KINDS["expert"].config_counts  # modules call it the same
CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "experts_per_token", "num_selects")

# --- names -----------------------------------------------------------------------------------------------------------
SUBLISTS = ("ffn", "experts", "norms")  # lists inside a layer: their numbers are not layer numbers

# --- config attributes -----------------------------------------------------------------------------------------------
# that state how many layers a tower has; what states a count for every layer alike is in the table of `KINDS`
LAYER_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
    "": (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "depths",
        "num_self_attends_per_block",
    ),
}
LAYER_LISTS = (  # that state something for each layer in turn
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_layers",
    "layers_block_type",
    "block_types",
    "layer_block_types",
)
