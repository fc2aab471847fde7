"""What the trained models themselves say, from Megatron and their checkpoints, not from an export.

    NPROC=1 MEGARL_MODULE=megarl.quickstart.trained bash launch/torchrun.sh PPO_RUN SFT_RUN TOKENIZER HELDOUT OUT

Writes the PPO actor's float32 logits of the held-out sequences to OUT, and the SFT model's greedy accuracy on them to JSON beside it.
"""

import argparse
import json
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
from megarl.parallel.layout import ParallelLayout
from megarl.quickstart.probes import answered_right, read_probes
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


def actor_logits(checkpoint: Path, sequences: TokenBatch, layout: ParallelLayout) -> Tensor:
    """Logits f32[B, T, V] of the actor of `checkpoint` (a checkpoint or a run's folder), on the CPU. For a world of one rank."""
    parallel = ParallelConfig(microbatch_size=64)
    spec, source = open_weights(checkpoint, "actor")
    chunks = build_model(spec, "actor", parallel, "fp32", layout)
    load_pieces(source_pieces(chunks, spec.table("actor")), source)
    return Replica(chunks, layout, parallel.microbatch_size).forward(sequences, LogitsHead(spec.vocab_size)).cpu()


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write what the trained models say about held-out sequences.")
    for name in ("ppo_run", "sft_run", "tokenizer", "heldout", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    probes = read_probes(arguments.heldout, load_tokenizer(arguments.tokenizer))
    layout = groups.initialize(ParallelConfig(), seed=0)
    save_file({"logits": actor_logits(arguments.ppo_run, probes.sequences, layout).contiguous()}, arguments.out)
    accuracy = answered_right(actor_logits(arguments.sft_run, probes.sequences, layout), probes)
    arguments.out.with_suffix(".json").write_text(json.dumps({"sft_heldout_accuracy": accuracy}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
