"""Mixtral: Mistral's attention, and in every layer a mixture of experts."""

from dataclasses import replace

from megarl.models.decoder_table import ExpertNames
from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec

NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Mixtral -> `ModelSpec`."""
    config.refuse_unless("router_jitter_noise", 0)
    head_dim = config.head_dim()
    num_kv_heads = config.count("num_key_value_heads", config.count("num_attention_heads"))
    dense = config.dense_decoder("mixtral", head_dim, num_kv_heads, default_theta=1e6)
    return config.mixture(replace(dense, window=config.window(dense)), dense.ffn_size, True, NAMES)


MIXTRAL = Family("mixtral", ("MixtralForCausalLM", "MixtralForSequenceClassification"), translate)
