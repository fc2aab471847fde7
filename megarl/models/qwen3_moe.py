"""Qwen3-MoE: Qwen3's attention, and in every layer a mixture of many small experts."""

from megarl.models.decoder_table import ExpertNames
from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec

NAMES = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Qwen3-MoE whose layers are all mixtures -> `ModelSpec`."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("decoder_sparse_step", 1)
    config.refuse_unless("mlp_only_layers", [])
    head_dim = config.head_dim()
    dense = config.dense_decoder("qwen3_moe", head_dim, num_kv_heads=config.count("num_key_value_heads"), qk_norm=True)
    return config.mixture(dense, config.count("moe_intermediate_size"), config.flag("norm_topk_prob"), NAMES)


QWEN3_MOE = Family("qwen3_moe", ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"), translate)
