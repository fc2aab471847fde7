"""Reads a Hugging Face config.json key by key and refuses what our decoders do not compute. Pure: no torch, no transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megarl.errors import WeightMapError
from megarl.models.decoder_table import ExpertNames, dense_decoder, sparse_decoder
from megarl.models.spec import Mixture, ModelSpec, Window

SCALINGS = {  # of rotary frequencies: kind and its numbers
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Family:
    """One family of models, one file: how its config.json becomes a `ModelSpec`, which brings its weight table along."""

    name: str  # Hugging Face `model_type`
    architectures: tuple[str, ...]
    translate: Callable[["HfConfig"], ModelSpec]


class HfConfig:
    """The keys of one config.json. `where` names the file in messages. Every refusal is a `WeightMapError`."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values = values
        self.where = where

    def number(self, key: str, default: int | float | None = None) -> Any:
        """A positive number; a missing or null key takes `default`, or is refused when there is none."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise WeightMapError(f"{self.where}: {key} is {value!r}; expected a positive number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise WeightMapError(f"{self.where}: {key} is {value!r}; expected a whole number")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def refuse_unless(self, key: str, *accepted: Any) -> None:
        """Refuse the file unless `key` is missing, null or one of `accepted`: nothing here computes anything else."""
        value = self.values.get(key)
        if value is not None and value not in accepted:
            raise WeightMapError(f"{self.where}: {key} is {value!r}; megarl computes only {' or '.join(repr(item) for item in accepted)}")

    def refuse_what_no_family_computes(self) -> None:
        """Refuse remote code, quantised weights, dropout, Qwen's sliding windows, other activations, part-rotary heads."""
        if "auto_map" in self.values:
            raise WeightMapError(f"{self.where}: auto_map asks for code from the model's directory, which megarl never runs")
        if self.values.get("quantization_config"):
            raise WeightMapError(f"{self.where}: quantization_config is set; export the model in bf16 or fp32 first")
        self.refuse_unless("hidden_act", "silu")
        self.refuse_unless("attention_dropout", 0)
        self.refuse_unless("use_sliding_window", False)
        self.refuse_unless("partial_rotary_factor", 1.0)

    def refuse_other_layers(self, spec: ModelSpec) -> None:
        """Refuse the file when its `layer_types` are not those that the family made of it."""
        found = self.values.get("layer_types") or ()
        if found and len(found) != spec.num_layers:
            raise WeightMapError(f"{self.where}: layer_types names {len(found)} layers; num_hidden_layers is {spec.num_layers}")
        for layer, kind in enumerate(found):
            is_local = spec.window is not None and spec.window.layers[layer]
            expected = "sliding_attention" if is_local else "full_attention"
            if kind != expected:
                raise WeightMapError(f"{self.where}: layer_types holds {kind!r} for layer {layer}; megarl computes {expected} there")

    def window(self, dense: ModelSpec, default: int | None = None) -> Window | None:
        """`sliding_window` of all layers, where it is smaller than the model's positions; a missing key takes `default`."""
        if self.values.get("sliding_window", default) is None:
            return None
        size = self.count("sliding_window", default)
        return Window(size, (True,) * dense.num_layers) if size < dense.max_positions else None

    def rope(self, default_theta: float = 10000.0) -> tuple[float, dict[str, Any] | None]:
        """(theta, scaling or None), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
        parameters = self.values.get("rope_parameters")
        key = "rope_parameters" if parameters else "rope_scaling"
        parameters = parameters or self.values.get("rope_scaling") or {}
        if isinstance(parameters, dict) and "full_attention" in parameters:  # of each kind of layer
            key, parameters = f"{key}.full_attention", parameters["full_attention"] or {}
        if not isinstance(parameters, dict):
            raise WeightMapError(f"{self.where}: {key} is {parameters!r}; expected a mapping")
        theta = float(parameters.get("rope_theta") or self.number("rope_theta", default_theta))
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise WeightMapError(f"{self.where}: {key}.partial_rotary_factor is set; megarl rotates whole heads")
        if kind == "default":
            return theta, None
        if kind not in SCALINGS:
            raise WeightMapError(f"{self.where}: {key} is of type {kind!r}; megarl computes 'default', 'linear' and 'llama3'")
        missing = [name for name in SCALINGS[kind] if not isinstance(parameters.get(name), int | float)]
        if missing:
            raise WeightMapError(f"{self.where}: {key} of type {kind} lacks {', '.join(missing)}")
        return theta, {name: parameters[name] for name in SCALINGS[kind]}

    def dense_decoder(
        self,
        family: str,
        head_dim: int,
        num_kv_heads: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        default_theta: float = 10000.0,
    ) -> ModelSpec:
        """The spec of a dense decoder from the keys that the families name alike and the given ones that they do not."""
        num_heads = self.count("num_attention_heads")
        if num_heads % num_kv_heads:
            raise WeightMapError(f"{self.where}: num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}")
        rope_theta, rope_scaling = self.rope(default_theta)
        return ModelSpec(
            family=family,
            num_layers=self.count("num_hidden_layers"),
            hidden_size=self.count("hidden_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_size=self.count("intermediate_size"),
            vocab_size=self.count("vocab_size"),
            norm_eps=float(self.number("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tied=self.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            max_positions=self.count("max_position_embeddings", 2048),
            hf_config=self.values,
            make_table=dense_decoder,
        )

    def mixture(self, dense: ModelSpec, ffn_size: int, norm_topk_prob: bool, names: ExpertNames) -> ModelSpec:
        """The same decoder with a mixture in every layer: experts of width `ffn_size`, called `names`."""
        key = "num_local_experts" if self.values.get("num_experts") is None else "num_experts"  # transformers 5 writes the first
        num_experts, chosen = self.count(key), self.count("num_experts_per_tok")
        if chosen > num_experts:
            raise WeightMapError(f"{self.where}: num_experts_per_tok is {chosen}; expected at most the {num_experts} of {key}")
        if chosen == 1 and norm_topk_prob:
            raise WeightMapError(f"{self.where}: one expert a token with weights that sum to 1 leaves the router nothing to learn from")
        mixture = Mixture(num_experts, chosen, norm_topk_prob)
        return replace(dense, ffn_size=ffn_size, mixture=mixture, make_table=partial(sparse_decoder, names=names))

    def head_dim(self) -> int:
        """`head_dim`, else hidden_size / num_attention_heads, refused when it is not whole."""
        if self.values.get("head_dim"):
            return self.count("head_dim")
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if hidden % heads:
            raise WeightMapError(f"{self.where}: num_attention_heads {heads} does not divide hidden_size {hidden}; set head_dim")
        return hidden // heads
