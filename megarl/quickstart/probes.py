"""What an export is tried with: held-out problems, as prompts and as whole sequences with their right answers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megarl.config import PromptData
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import Tokenizer
from megarl.records import Prompt, TokenBatch

NUM_SEQUENCES = 64  # whose logits are compared
NUM_GREEDY = 256  # prompts answered by vLLM and by transformers


@dataclass(frozen=True)
class Probes:
    """`prompts` to answer, and the first `NUM_SEQUENCES` of them with their answers as right-padded `sequences`, on the CPU."""

    prompts: list[Prompt]
    sequences: TokenBatch


def read_probes(heldout: Path, tokenizer: Tokenizer) -> Probes:
    """The first problems of the held-out file. Raises `DataError` for a malformed file."""
    prompts = PromptSet(PromptData(path=heldout), tokenizer, needs_answers=True).prompts[:NUM_GREEDY]
    rows = [[*prompt.token_ids, *tokenizer.encode(prompt.answer), tokenizer.eos_id] for prompt in prompts[:NUM_SEQUENCES]]
    width = max(map(len, rows))
    token_ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    return Probes(prompts, TokenBatch(token_ids, torch.tensor([len(row) for row in rows])))
