"""Llama 1 to 3.3: no biases; Llama 3.1 and later scale the rotary frequencies."""

from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Llama -> `ModelSpec`."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    head_dim = config.head_dim()
    return config.dense_decoder("llama", head_dim, num_kv_heads=config.count("num_key_value_heads", config.count("num_attention_heads")))


LLAMA = Family("llama", ("LlamaForCausalLM", "LlamaForSequenceClassification"), translate)
