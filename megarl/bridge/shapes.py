"""What the ranks of large clusters would hold and want, from a family's table and two layouts: the planner's input without a model.

`tests/rollout/test_bridge_execution.py` compares both with what Megatron and vLLM say of real models.
"""

from collections.abc import Mapping, Sequence

from megarl.bridge.boxes import Box, TargetBox
from megarl.models.spec import ModelSpec, Role, Rows, WeightTable, padded_vocab, stage_layers
from megarl.parallel.layout import ParallelLayout

Pieces = Sequence[tuple[str, Box]]

PADDED = ("word_embeddings.weight", "output_layer.weight")
SPLIT_BY_ROWS = (*PADDED, "linear_qkv.weight", "linear_qkv.bias")
SPLIT_BY_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
GATE_AND_UP = "mlp.linear_fc1.weight"  # each of the two halves is split by rows
VOCABULARY_STEP = 64  # vLLM pads vocabularies to multiples of it


def held(spec: ModelSpec, layout: ParallelLayout, role: Role = "actor", chunks: int = 1) -> list[Pieces]:
    """The pieces of a model on every rank of the layout's world. Ranks that hold the same share one list.

    `chunks` of layers a stage take turns (`parallel.virtual_pipeline`).
    """
    table = spec.table(role)
    known: dict[tuple[int, int, int], Pieces] = {}
    result = []
    for rank in range(layout.world_size):
        at = layout.at(rank)
        place = (at.tp_rank, at.pp_rank, at.ep_rank)
        if place not in known:
            known[place] = [
                piece
                for key, indices in _tensors(spec, table, at, role, chunks)
                for piece in _pieces(spec, at, key, table.segments(key, indices), table.hf_shapes)
            ]
        result.append(known[place])
    return result


def layers_on(spec: ModelSpec, pipeline: int, stage: int, chunks: int = 1) -> tuple[int, ...]:
    """The layers of one stage, whose chunks lie `pipeline` chunks apart."""
    counts = stage_layers(spec.num_layers, pipeline * chunks)
    own = range(stage, pipeline * chunks, pipeline)
    return tuple(sum(counts[:chunk]) + layer for chunk in own for layer in range(counts[chunk]))


def _tensors(spec: ModelSpec, table: WeightTable, at: ParallelLayout, role: Role, chunks: int) -> list[tuple[str, tuple[int, ...]]]:
    """(Megatron's key, indices) of the tensors on this rank, of which it may hold a part only."""
    keys = table.entries
    found = []
    if at.is_first_stage or (at.is_last_stage and spec.tied and role == "actor"):
        found.append(("embedding.word_embeddings.weight", ()))
    for layer in layers_on(spec, at.pipeline, at.pp_rank, chunks):
        for key in (key for key in keys if key.startswith("decoder.layers.")):
            if ".experts." in key:
                share = spec.mixture.num_experts // at.expert
                found += [(key, (layer, expert)) for expert in range(at.ep_rank * share, (at.ep_rank + 1) * share)]
            else:
                found.append((key, (layer,)))
    if at.is_last_stage:
        found += [(key, ()) for key in keys if not key.startswith(("decoder.layers.", "embedding."))]
    return found


def _pieces(
    spec: ModelSpec, at: ParallelLayout, key: str, rows: Sequence[Rows], shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Box]]:
    """The parts of one Megatron tensor that lie on this rank."""
    num_rows = max(part.row + part.num_rows for part in rows)
    first_columns = None
    shares = [(0, num_rows)]
    if ".experts." not in key:
        if key.endswith(SPLIT_BY_ROWS) and num_rows > 1:  # a scalar head is whole on every rank
            if key.endswith(PADDED):
                num_rows = padded_vocab(spec.vocab_size, at.tensor)
            share = num_rows // at.tensor
            shares = [(at.tp_rank * share, share)]
        elif key.endswith(GATE_AND_UP):
            share = num_rows // 2 // at.tensor
            shares = [(half * num_rows // 2 + at.tp_rank * share, share) for half in (0, 1)]
        elif key.endswith(SPLIT_BY_COLUMNS):
            first_columns = at.tp_rank
    found = []
    for start, count in shares:
        for part in rows:
            low, high = max(start, part.row), min(start + count, part.row + part.num_rows)
            if low < high:
                columns = [(0, size) for size in shapes[part.hf_name][1:]]
                if first_columns is not None:
                    share = columns[0][1] // at.tensor
                    columns = [(first_columns * share, share)]
                found.append((part.hf_name, ((part.hf_row + low - part.row, high - low), *columns)))
    return found


def wanted(spec: ModelSpec, tensor: int, num_replicas: int) -> list[Sequence[TargetBox]]:
    """What vLLM takes on every rank of `num_replicas` replicas of `tensor` ranks. Equal ranks share one list."""
    shapes = spec.table("actor").hf_shapes
    one = [[_target(spec, tensor, rank, name, shape) for name, shape in shapes.items()] for rank in range(tensor)]
    return one * num_replicas


def _target(spec: ModelSpec, tensor: int, rank: int, name: str, shape: tuple[int, ...]) -> TargetBox:
    """The one box that tensor-parallel rank `rank` of `tensor` takes of a Hugging Face tensor, and its place."""
    size, kv_rows = spec.head_dim, max(1, spec.num_kv_heads // tensor) * spec.head_dim
    query_rows = spec.num_heads // tensor * size
    rows, columns, start = (0, shape[0]), [(0, count) for count in shape[1:]], 0
    block, _, last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    parameter, suffix, leading = name, name.rpartition(".")[2], []
    if last in ("embed_tokens", "lm_head"):
        share = -(-shape[0] // VOCABULARY_STEP) * VOCABULARY_STEP // tensor
        rows = (rank * share, min(shape[0], (rank + 1) * share) - rank * share)
    elif last == "q_proj":
        rows, parameter = (rank * query_rows, query_rows), f"{block}.qkv_proj.{suffix}"
    elif last in ("k_proj", "v_proj"):
        head = rank * spec.num_kv_heads // tensor
        rows, parameter = (head * size, kv_rows), f"{block}.qkv_proj.{suffix}"
        start = query_rows + (kv_rows if last == "v_proj" else 0)
    elif last in ("gate_proj", "up_proj"):
        share = shape[0] // tensor
        rows, parameter = (rank * share, share), f"{block}.gate_up_proj.{suffix}"
        start = share if last == "up_proj" else 0
    elif last in ("o_proj", "down_proj"):
        share = shape[1] // tensor
        columns = [(rank * share, share)]
    if ".experts." in name:
        experts, _, number = block.rpartition(".")
        parameter = f"{experts}.routed_experts.{'w2' if last == 'down_proj' else 'w13'}_weight"
        leading = [(int(number), 1)]
    inner = (*leading, (start, rows[1]), *((0, count) for _, count in columns))
    return TargetBox(name, (rows, *columns), parameter, inner)
