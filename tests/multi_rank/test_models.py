"""Our models against transformers under tensor, sequence, pipeline and data parallelism: outputs, every gradient, every weight's place."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig
from tests.ranks import run_all
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


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_gradients_and_pieces_equal_transformers(directories, world_size):
    checks = [(_compare_all, (directories,))]
    if world_size == 2:
        checks += [(_bf16_is_close, (directories["qwen2"],)), (_views_follow_the_optimizer, (directories["qwen3-tied"],))]
    run_all(checks, world_size, timeout_s=400)


def _compare_all(rank: int, world_size: int, directories: dict[str, str]) -> None:
    from megarl.parallel import groups

    for parallel in LAYOUTS[world_size]:
        layout = groups.initialize(parallel, seed=0)
        for kind, directory in directories.items():
            try:
                compare(Path(directory), parallel, layout)
            except Exception as error:
                raise AssertionError(f"{kind} under {parallel}: {error}") from error


def compare(directory: Path, parallel: ParallelConfig, layout) -> None:
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


def _bf16_is_close(rank: int, world_size: int, directory: str) -> None:
    """Every parameter is bf16, padding of the vocabulary is zero, and outputs are those of fp32 to bf16's precision."""
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel import groups, pipeline

    parallel = ParallelConfig(tensor=2, sequence=True)
    layout = groups.initialize(parallel, seed=0)
    spec = read_spec(Path(directory))
    chunks = build_model(spec, "actor", parallel, "bf16", layout)
    load_pieces(source_pieces(chunks, spec.table("actor")), SafetensorsSource(Path(directory)))
    assert {parameter.dtype for parameter in chunks[0].parameters()} == {torch.bfloat16}
    rows = chunks[0].embedding.word_embeddings.weight
    real = max(0, spec.vocab_size - rank * len(rows))
    assert not rows[real:].any() and not chunks[0].output_weight()[real:].any()
    oracle = load_oracle(Path(directory))
    mine, microbatches = _microbatches(oracle, layout)
    outputs = torch.cat(pipeline.forward_only(chunks, microbatches, _head)).float()
    expected = oracle["outputs"][mine]
    assert (outputs - expected).abs().mean() < 0.02 * expected.abs().mean()


def _views_follow_the_optimizer(rank: int, world_size: int, directory: str) -> None:
    """Pieces taken once, after the optimizer is built, hold the weights of every later step."""
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.config import OptimizerConfig
    from megarl.metrics import Metrics
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.learner import Learner
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel import groups
    from megarl.records import TokenBatch

    parallel = ParallelConfig(pipeline=2, head="last_stage")  # `_head` is a function, which cannot be dealt to stages
    layout = groups.initialize(parallel, seed=0)
    spec = read_spec(Path(directory))
    table = spec.table("actor")
    learner = Learner(build_model(spec, "actor", parallel, "bf16", layout), OptimizerConfig(lr=0.01), parallel, "bf16", layout, 10)
    pieces = source_pieces(learner.chunks, table)
    load_pieces(pieces, SafetensorsSource(Path(directory)))
    learner.refresh_main_params()
    before = [piece.view.clone() for piece in pieces]
    tokens = load_oracle(Path(directory))["token_ids"]
    batch = TokenBatch(tokens, torch.full((len(tokens),), NUM_TOKENS))
    learner.step(batch, _head, lambda outputs, rows: (outputs.square().mean(), Metrics()))
    again = source_pieces(learner.chunks, table)
    for old, piece, fresh in zip(before, pieces, again, strict=True):
        assert not torch.equal(old, piece.view), f"{piece.hf_name} did not move"
        assert piece.view.data_ptr() == fresh.view.data_ptr() and piece.box == fresh.box


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
    from megarl.parallel.microbatches import cut
    from megarl.records import TokenBatch

    share = NUM_SEQUENCES // layout.data
    mine = slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    return mine, cut(TokenBatch(oracle["token_ids"][mine], torch.full((share,), NUM_TOKENS)), microbatch_size=2)


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
