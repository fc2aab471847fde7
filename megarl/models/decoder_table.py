"""The rows of a dense decoder's weight table: what Llama, Qwen2 and Qwen3 share, and the parts to build another from. Pure: no torch.

A family lists its rows for layer `{layer}`; rows of a Megatron tensor that no entry names (padding of the vocabulary) mean nothing.
"""

from megarl.models.spec import ModelSpec, Role, Rows, WeightTable


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
