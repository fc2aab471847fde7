"""Mistral: Llama, whose first version looks back at a window of tokens."""

from dataclasses import replace

from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Mistral -> `ModelSpec`."""
    dense = config.dense_decoder("mistral", config.head_dim(), num_kv_heads=config.count("num_key_value_heads", 8))
    return replace(dense, window=config.window(dense, default=4096))


MISTRAL = Family("mistral", ("MistralForCausalLM", "MistralForSequenceClassification"), translate)
