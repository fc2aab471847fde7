"""What the trained actor itself says: float32 logits of held-out sequences from Megatron, read from the checkpoint, not from the export.

    NPROC=1 MEGARL_MODULE=megarl.quickstart.trained_logits bash launch/torchrun.sh CHECKPOINT TOKENIZER HELDOUT OUT
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megarl.checkpoint.sources import open_weights
from megarl.config import ParallelConfig
from megarl.data.tokenizers import load_tokenizer
from megarl.models.build import build_model
from megarl.models.pieces import load_pieces, source_pieces
from megarl.models.replica import Replica
from megarl.parallel import groups
from megarl.quickstart.probes import read_probes
from megarl.records import TokenBatch


@dataclass(frozen=True)
class LogitsHead:
    """f32[B, T, V] logits, entry t about token t + 1, on one tensor-parallel rank. For models and sequences that are small."""

    vocab_size: int

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> Tensor:
        num_tokens = sequences.token_ids.shape[1]
        return (hidden.transpose(0, 1)[:, :num_tokens] @ model.output_weight().t())[..., : self.vocab_size].float()

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return (*sequences.token_ids.shape, self.vocab_size)


def trained_logits(checkpoint: Path, sequences: TokenBatch) -> Tensor:
    """Logits f32[B, T, V] of the actor of `checkpoint` (a checkpoint or a run's folder). Call in a world of one rank."""
    parallel = ParallelConfig()
    layout = groups.initialize(parallel, seed=0)
    spec, source = open_weights(checkpoint, "actor")
    chunks = build_model(spec, "actor", parallel, "fp32", layout)
    load_pieces(source_pieces(chunks, spec.table("actor")), source)
    return Replica(chunks, layout, parallel.microbatch_size).forward(sequences, LogitsHead(spec.vocab_size)).cpu()


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write Megatron's logits of held-out sequences.")
    for name in ("checkpoint", "tokenizer", "heldout", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    probes = read_probes(arguments.heldout, load_tokenizer(arguments.tokenizer))
    save_file({"logits": trained_logits(arguments.checkpoint, probes.sequences).contiguous()}, arguments.out)


if __name__ == "__main__":
    main()
