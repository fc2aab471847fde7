"""Gemma 3 (text): local layers between global ones, norms around every block, a scaled embedding that is also the head."""

from dataclasses import replace

from megarl.errors import WeightMapError
from megarl.models.hf_config import Family, HfConfig
from megarl.models.spec import ModelSpec, Window


def translate(config: HfConfig) -> ModelSpec:
    """config.json of a Gemma 3 text model -> `ModelSpec`."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("use_bidirectional_attention", False)
    config.refuse_unless("attn_logit_softcapping", None)
    config.refuse_unless("final_logit_softcapping", None)
    config.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    num_kv_heads = config.count("num_key_value_heads", 4)
    dense = config.dense_decoder("gemma3_text", config.count("head_dim", 256), num_kv_heads, qk_norm=True, default_theta=1e6)
    return replace(
        dense,
        tied=config.flag("tie_word_embeddings", True),
        window=_window(config, dense.num_layers),
        activation="gelu_tanh",
        zero_centered_norms=True,
        output_norms=True,
        embedding_scale=dense.hidden_size**0.5,
        softmax_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
    )


def _window(config: HfConfig, num_layers: int) -> Window:
    """The local layers, by name or else all but every sixth, and their rotary base."""
    every = config.count("sliding_window_pattern", 6)
    layers = tuple((layer + 1) % every > 0 for layer in range(num_layers))
    if names := config.values.get("layer_types"):
        layers = tuple(names[layer : layer + 1] == ["sliding_attention"] for layer in range(num_layers))
    parameters = (config.values.get("rope_parameters") or {}).get("sliding_attention") or {}
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise WeightMapError(f"{config.where}: rope_parameters.sliding_attention is of type {kind!r}; megarl computes 'default' there")
    theta = parameters.get("rope_theta") or config.number("rope_local_base_freq", 10000.0)
    return Window(config.count("sliding_window", 4096), layers, float(theta))


GEMMA3 = Family("gemma3_text", ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"), translate)
