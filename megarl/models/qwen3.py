"""Qwen3 (dense): no biases, RMSNorm of every query and key head, a head size of its own."""

from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a dense Qwen3 -> `ModelSpec`."""
    config.refuse_unless("attention_bias", False)
    head_dim = config.count("head_dim", 128)
    return config.dense_decoder("qwen3", head_dim, num_kv_heads=config.count("num_key_value_heads"), qk_norm=True)


QWEN3 = Family("qwen3", ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"), translate)
