"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Qwen2 -> `ModelSpec`."""
    head_dim = config.head_dim()
    return config.dense_decoder("qwen2", head_dim, num_kv_heads=config.count("num_key_value_heads"), qkv_bias=True)


QWEN2 = Family("qwen2", ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"), translate)
