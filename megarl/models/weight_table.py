"""One mapping, three users: where every row of a Megatron tensor lies in a Hugging Face checkpoint. Pure: no torch.

Keys are Megatron's canonical ones, as `sharded_state_dict` gives them: the same for the local and the Transformer Engine layers,
for every tensor and pipeline layout. Import, export and the bridge to the sampler all read this table.

A family lists its rows for layer `{layer}`; rows of a Megatron tensor that no entry names (padding of the vocabulary) mean nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.errors import WeightMapError
from megarl.models.spec import ModelSpec, Role


@dataclass(frozen=True)
class Rows:
    """Rows [row, row + num_rows) of a Megatron tensor are rows [hf_row, hf_row + num_rows) of `hf_name`; other axes are equal."""

    row: int
    num_rows: int
    hf_name: str
    hf_row: int

    def in_layer(self, indices: Sequence[int]) -> "Rows":
        """The same with `{layer}` in the name filled from the axes Megatron puts in front."""
        return Rows(self.row, self.num_rows, self.hf_name.format(layer=indices[0]) if indices else self.hf_name, self.hf_row)


@dataclass(frozen=True)
class WeightTable:
    """The table of one model in one role.

    `hf_shapes` lists every Hugging Face tensor with its shape; `entries` maps a canonical Megatron key to its rows, with
    `{layer}` in the names of tensors that every layer has.
    """

    num_layers: int
    hf_shapes: dict[str, tuple[int, ...]]
    entries: dict[str, tuple[Rows, ...]]

    def segments(self, megatron_key: str, indices: Sequence[int] = ()) -> list[Rows]:
        """The rows of one Megatron tensor; `indices` are its positions on prepended axes, the global layer first.

        Raises `WeightMapError` for a key the family does not list.
        """
        if megatron_key not in self.entries:
            raise WeightMapError(f"the model holds {megatron_key}, which its family's table does not list; known: {sorted(self.entries)}")
        return [rows.in_layer(indices) for rows in self.entries[megatron_key]]

    def num_parameters(self) -> int:
        """Elements of all Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


def whole(hf_name: str, num_rows: int) -> tuple[Rows, ...]:
    """The Megatron tensor is the Hugging Face tensor."""
    return (Rows(0, num_rows, hf_name, 0),)


def stacked(*parts: tuple[str, int]) -> tuple[Rows, ...]:
    """The Megatron tensor is these (name, rows) one below the other."""
    rows, start = [], 0
    for hf_name, num_rows in parts:
        rows.append(Rows(start, num_rows, hf_name, 0))
        start += num_rows
    return tuple(rows)


def grouped_qkv(spec: ModelSpec, query: str, key: str, value: str) -> tuple[Rows, ...]:
    """Megatron's fused projection: for every key-value head its query heads, then the key head, then the value head."""
    size, queries = spec.head_dim, spec.num_heads // spec.num_kv_heads
    rows, start = [], 0
    for group in range(spec.num_kv_heads):
        for hf_name, heads in ((query, queries), (key, 1), (value, 1)):
            rows.append(Rows(start, heads * size, hf_name, group * heads * size))
            start += heads * size
    return tuple(rows)


LAYER = "model.layers.{layer}."
EMBEDDING = "model.embed_tokens.weight"
VOCABULARY_HEAD = "lm_head.weight"
SCALAR_HEAD = "score.weight"


def dense_decoder(spec: ModelSpec, role: Role) -> WeightTable:
    """The table that Llama, Qwen2 and Qwen3 share; switches of the spec add query-key-value biases and query-key norms."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    query_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    q, k, v = (f"{attention}{name}_proj" for name in "qkv")
    layer_shapes = {
        LAYER + "input_layernorm.weight": (hidden,),
        LAYER + "post_attention_layernorm.weight": (hidden,),
        q + ".weight": (query_rows, hidden),
        k + ".weight": (kv_rows, hidden),
        v + ".weight": (kv_rows, hidden),
        attention + "o_proj.weight": (hidden, query_rows),
        mlp + "gate_proj.weight": (ffn, hidden),
        mlp + "up_proj.weight": (ffn, hidden),
        mlp + "down_proj.weight": (hidden, ffn),
    }
    in_layers = "decoder.layers."
    entries = {
        "embedding.word_embeddings.weight": whole(EMBEDDING, spec.vocab_size),
        "decoder.final_layernorm.weight": whole("model.norm.weight", hidden),
        in_layers + "self_attention.linear_qkv.layer_norm_weight": whole(LAYER + "input_layernorm.weight", hidden),
        in_layers + "self_attention.linear_qkv.weight": grouped_qkv(spec, q + ".weight", k + ".weight", v + ".weight"),
        in_layers + "self_attention.linear_proj.weight": whole(attention + "o_proj.weight", hidden),
        in_layers + "mlp.linear_fc1.layer_norm_weight": whole(LAYER + "post_attention_layernorm.weight", hidden),
        in_layers + "mlp.linear_fc1.weight": stacked((mlp + "gate_proj.weight", ffn), (mlp + "up_proj.weight", ffn)),
        in_layers + "mlp.linear_fc2.weight": whole(mlp + "down_proj.weight", hidden),
    }
    if spec.qkv_bias:
        layer_shapes |= {q + ".bias": (query_rows,), k + ".bias": (kv_rows,), v + ".bias": (kv_rows,)}
        entries[in_layers + "self_attention.linear_qkv.bias"] = grouped_qkv(spec, q + ".bias", k + ".bias", v + ".bias")
    if spec.qk_norm:
        for head in "qk":
            name = f"{attention}{head}_norm.weight"
            layer_shapes[name] = (spec.head_dim,)
            entries[f"{in_layers}self_attention.{head}_layernorm.weight"] = whole(name, spec.head_dim)
    shapes = {EMBEDDING: (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        shapes |= {name.format(layer=layer): shape for name, shape in layer_shapes.items()}
    shapes["model.norm.weight"] = (hidden,)
    if role == "critic":
        shapes[SCALAR_HEAD] = (1, hidden)
        entries["output_layer.weight"] = whole(SCALAR_HEAD, 1)
    elif not spec.tied:
        shapes[VOCABULARY_HEAD] = (spec.vocab_size, hidden)
        entries["output_layer.weight"] = whole(VOCABULARY_HEAD, spec.vocab_size)
    return WeightTable(spec.num_layers, shapes, entries)
