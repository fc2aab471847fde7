"""Mixtral: Llama's attention, and in every layer a mixture of experts."""

from megarl.errors import WeightMapError
from megarl.models.decoder_table import ExpertNames
from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec

NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Mixtral -> `ModelSpec`."""
    config.refuse_unless("router_jitter_noise", 0)
    head_dim = config.count("head_dim") if config.values.get("head_dim") else config.even_head_dim()
    num_kv_heads = config.count("num_key_value_heads", config.count("num_attention_heads"))
    dense = config.dense_decoder("mixtral", head_dim, num_kv_heads, default_theta=1e6)
    window = config.values.get("sliding_window")
    if window is not None and window < dense.max_positions:
        raise WeightMapError(f"{config.where}: sliding_window is {window}; megarl computes only full attention, null")
    return config.mixture(dense, dense.ffn_size, True, NAMES)


MIXTRAL = Family("mixtral", ("MixtralForCausalLM", "MixtralForSequenceClassification"), translate)
