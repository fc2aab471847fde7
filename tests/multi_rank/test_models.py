"""Our models against transformers under tensor, sequence, pipeline and data parallelism: outputs, every gradient, every weight's place."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig
from tests.ranks import run_ranks
from tests.tiny_hf import KINDS, load_oracle, save_oracle, save_tiny

NUM_SEQUENCES, NUM_TOKENS = 4, 12
TOLERANCE = 1e-4

LAYOUTS = {
    1: [ParallelConfig(recompute="full")],
    2: [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(recompute="selective")],
    4: [
        ParallelConfig(tensor=2, pipeline=2),
        ParallelConfig(tensor=2, pipeline=2, sequence=True, recompute="full"),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(tensor=4),  # more tensor-parallel ranks than key-value heads
        ParallelConfig(pipeline=2, distributed_optimizer=False),
    ],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """Every kind of tiny model with its oracle."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 101, (NUM_SEQUENCES, NUM_TOKENS), generator=generator)
    coefficients = torch.randn(NUM_SEQUENCES, NUM_TOKENS, 101, generator=generator)
    for kind in KINDS:
        save_oracle(save_tiny(kind, folder), token_ids, coefficients)
    return {kind: str(folder / kind) for kind in KINDS}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_outputs_gradients_and_pieces_equal_transformers(directories, world_size):
    run_ranks(_compare_all, world_size, directories, timeout_s=400)


def _compare_all(rank: int, world_size: int, directories: dict[str, str]) -> None:
    from megarl.parallel import groups

    for parallel in LAYOUTS[world_size]:
        layout = groups.initialize(parallel, seed=0)
        for kind, directory in directories.items():
            try:
                _compare(Path(directory), parallel, layout)
            except Exception as error:
                raise AssertionError(f"{kind} under {parallel}: {error}") from error


def _compare(directory: Path, parallel: ParallelConfig, layout) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel import pipeline

    spec = read_spec(directory)
    role = "critic" if directory.name.endswith("critic") else "actor"
    table = spec.table(role)
    chunks = build_model(spec, role, parallel, "fp32", layout)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = pipeline.finalize
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=False)
    chunks = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    pieces = source_pieces(chunks, table)
    load_pieces(pieces, SafetensorsSource(directory))
    _check_cover(pieces, table)
    oracle = load_oracle(directory)
    _check_outputs(chunks, oracle, parallel, layout)
    _check_gradients(chunks, oracle, parallel, layout, table)


def _head(model, hidden, sequences, rows):
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    while hasattr(model, "module"):
        model = model.module
    if model.role == "critic":
        return model.output_layer(hidden).t().unsqueeze(-1)
    logits = model.output_layer(hidden, weight=model.output_weight())[0]
    return gather_from_tensor_model_parallel_region(logits).transpose(0, 1)[:, :, : model.spec.vocab_size]


def _microbatches(oracle, layout):
    """This data rank's rows, two a microbatch, as records of tokens; the coefficients ride along in their order."""
    from megarl.records import TokenBatch

    share = NUM_SEQUENCES // layout.data
    mine = slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    token_ids = oracle["token_ids"][mine]
    lengths = torch.full((share,), NUM_TOKENS)
    size = min(2, share)
    starts = range(0, share, size)
    return mine, [TokenBatch(token_ids[i : i + size], lengths[i : i + size]) for i in starts]


def _check_outputs(chunks, oracle, parallel, layout) -> None:
    from megarl.parallel import pipeline

    mine, microbatches = _microbatches(oracle, layout)
    for chunk in chunks:
        chunk.eval()
    outputs = pipeline.forward_only(chunks, microbatches, _head)
    assert bool(outputs) == layout.is_last_stage
    if layout.is_last_stage:
        torch.testing.assert_close(torch.cat(outputs), oracle["outputs"][mine], atol=TOLERANCE, rtol=0)


def _check_gradients(chunks, oracle, parallel, layout, table) -> None:
    """Every weight's gradient, box by box: written into the parameters, it is found by the same pieces as the weights."""
    from megarl.metrics import Metrics
    from megarl.models.pieces import source_pieces
    from megarl.parallel import pipeline

    mine, microbatches = _microbatches(oracle, layout)
    coefficients = iter(oracle["coefficients"][mine].split(len(microbatches[0])))

    def loss(outputs, rows):
        return (outputs * next(coefficients)[:, :, : outputs.shape[2]]).sum(), Metrics()

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    pipeline.forward_backward(chunks, microbatches, _head, loss)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    for piece in source_pieces(chunks, table):
        expected = oracle[f"grad.{piece.hf_name}"][tuple(slice(o, o + n) for o, n in piece.box)]
        scale = oracle[f"grad.{piece.hf_name}"].abs().max().item()
        difference = (piece.view - expected).abs().max().item()
        assert difference <= TOLERANCE * max(scale, 1.0), f"gradient of {piece.hf_name} differs by {difference}, largest {scale}"


def _check_cover(pieces, table) -> None:
    """Over the world, owners hold every element of every Hugging Face tensor exactly once, and nothing else."""
    import torch.distributed as dist

    from megarl.parallel.collectives import gather_json

    held = gather_json([(piece.hf_name, piece.box) for piece in pieces if piece.is_owner], dist.group.WORLD)
    counts = {name: torch.zeros(shape, dtype=torch.int) for name, shape in table.hf_shapes.items()}
    for name, box in (pair for rank_pairs in held for pair in rank_pairs):
        counts[name][tuple(slice(offset, offset + size) for offset, size in box)] += 1
    wrong = [name for name, count in counts.items() if not bool((count == 1).all())]
    assert not wrong, f"not covered exactly once: {wrong}"
