"""The rows of a decoder's weight table: what the families share, and the parts to build another from. Pure: no torch.

A family lists its rows for layer `{layer}`; rows of a Megatron tensor that no entry names (padding of the vocabulary) mean nothing.
"""

from dataclasses import dataclass

from megarl.models.spec import ModelSpec, Role, Rows, WeightTable

Shapes = dict[str, tuple[int, ...]]
Entries = dict[str, tuple[Rows, ...]]


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


IN_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the parts of a mixture: `block` below a layer, and below an expert its three projections."""

    block: str
    gate: str
    up: str
    down: str


def dense_decoder(spec: ModelSpec, role: Role) -> WeightTable:
    """The table that dense families share; switches of the spec add query-key-value biases, query-key norms and norms of outputs."""
    mlp, hidden, ffn = LAYER + "mlp.", spec.hidden_size, spec.ffn_size
    shapes = {
        mlp + "gate_proj.weight": (ffn, hidden),
        mlp + "up_proj.weight": (ffn, hidden),
        mlp + "down_proj.weight": (hidden, ffn),
    }
    entries = {
        IN_LAYERS + "mlp.linear_fc1.weight": stacked((mlp + "gate_proj.weight", ffn), (mlp + "up_proj.weight", ffn)),
        IN_LAYERS + "mlp.linear_fc2.weight": whole(mlp + "down_proj.weight", hidden),
    }
    return _decoder(spec, role, shapes, entries)


def sparse_decoder(spec: ModelSpec, role: Role, names: ExpertNames) -> WeightTable:
    """The table of a decoder whose layers are all mixtures, with one tensor for each expert, as checkpoints on disk have them."""
    assert spec.mixture is not None
    hidden, ffn, count = spec.hidden_size, spec.ffn_size, spec.mixture.num_experts
    router, expert = f"{LAYER}{names.block}.gate.weight", f"{LAYER}{names.block}.experts.{{expert}}."
    gate, up, down = (f"{expert}{name}.weight" for name in (names.gate, names.up, names.down))
    shapes: Shapes = {router: (count, hidden)}
    for index in range(count):
        for name, shape in ((gate, (ffn, hidden)), (up, (ffn, hidden)), (down, (hidden, ffn))):
            shapes[name.replace("{expert}", str(index))] = shape
    experts = IN_LAYERS + "mlp.experts.experts."
    entries = {
        IN_LAYERS + "mlp.router.weight": whole(router, count),
        experts + "linear_fc1.weight": stacked((gate, ffn), (up, ffn)),
        experts + "linear_fc2.weight": whole(down, hidden),
    }
    return _decoder(spec, role, shapes, entries)


def _decoder(spec: ModelSpec, role: Role, ffn_shapes: Shapes, ffn_entries: Entries) -> WeightTable:
    hidden = spec.hidden_size
    query_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = LAYER + "self_attn."
    q, k, v = (f"{attention}{name}_proj" for name in "qkv")
    ffn_input_norm = "pre_feedforward_layernorm.weight" if spec.output_norms else "post_attention_layernorm.weight"
    layer_shapes = {
        LAYER + "input_layernorm.weight": (hidden,),
        LAYER + ffn_input_norm: (hidden,),
        q + ".weight": (query_rows, hidden),
        k + ".weight": (kv_rows, hidden),
        v + ".weight": (kv_rows, hidden),
        attention + "o_proj.weight": (hidden, query_rows),
    } | ffn_shapes
    ffn_norm = IN_LAYERS + "mlp.linear_fc1.layer_norm_weight"
    entries = {
        "embedding.word_embeddings.weight": whole(EMBEDDING, spec.vocab_size),
        "decoder.final_layernorm.weight": whole("model.norm.weight", hidden),
        IN_LAYERS + "self_attention.linear_qkv.layer_norm_weight": whole(LAYER + "input_layernorm.weight", hidden),
        IN_LAYERS + "self_attention.linear_qkv.weight": grouped_qkv(spec, q + ".weight", k + ".weight", v + ".weight"),
        IN_LAYERS + "self_attention.linear_proj.weight": whole(attention + "o_proj.weight", hidden),
        ffn_norm: whole(LAYER + ffn_input_norm, hidden),
    } | ffn_entries
    if spec.qkv_bias:
        layer_shapes |= {q + ".bias": (query_rows,), k + ".bias": (kv_rows,), v + ".bias": (kv_rows,)}
        entries[IN_LAYERS + "self_attention.linear_qkv.bias"] = grouped_qkv(spec, q + ".bias", k + ".bias", v + ".bias")
    if spec.qk_norm:
        for head in "qk":
            name = f"{attention}{head}_norm.weight"
            layer_shapes[name] = (spec.head_dim,)
            entries[f"{IN_LAYERS}self_attention.{head}_layernorm.weight"] = whole(name, spec.head_dim)
    if spec.output_norms:
        for projection, norm in (("self_attention.linear_proj", "post_attention"), ("mlp.linear_fc2", "post_feedforward")):
            name = f"{LAYER}{norm}_layernorm.weight"
            layer_shapes[name] = (hidden,)
            entries[f"{IN_LAYERS}{projection}.output_norm.weight"] = whole(name, hidden)
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
    # Transformer Engine fuses this norm into a dense layer's first projection, but leaves it alone before a mixture
    aliases = {IN_LAYERS + "pre_mlp_layernorm.weight": ffn_norm}
    return WeightTable(spec.num_layers, shapes, entries, aliases, new_norm=0.0 if spec.zero_centered_norms else 1.0)
