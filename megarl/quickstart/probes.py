"""What trained models and exports are tried with: held-out problems, as prompts and as whole sequences with their right answers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarl.config import PromptData
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import Tokenizer
from megarl.records import Prompt, TokenBatch


@dataclass(frozen=True)
class Probes:
    """`prompts` to answer; the same with their right answers and end-of-text as right-padded `sequences`, on the CPU."""

    prompts: list[Prompt]
    sequences: TokenBatch

    @property
    def is_answer(self) -> Tensor:
        """bool[B, T]: the tokens of the right answer, end-of-text included."""
        positions = torch.arange(self.sequences.token_ids.shape[1])
        starts = torch.tensor([len(prompt.token_ids) for prompt in self.prompts])
        return (positions >= starts[:, None]) & (positions < self.sequences.lengths[:, None])


def read_probes(heldout: Path, tokenizer: Tokenizer, count: int | None = None) -> Probes:
    """The first `count` problems of the held-out file, or all. Raises `DataError` for a malformed file."""
    prompts = PromptSet(PromptData(path=heldout), tokenizer, needs_answers=True).prompts[:count]
    rows = [[*prompt.token_ids, *tokenizer.encode(prompt.answer), tokenizer.eos_id] for prompt in prompts]
    width = max(map(len, rows))
    token_ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    return Probes(prompts, TokenBatch(token_ids, torch.tensor([len(row) for row in rows])))


def answered_right(logits: Tensor, probes: Probes) -> float:
    """Share of prompts that greedy decoding answers right. `logits` f32[B, T, V], entry t about token t + 1.

    Greedy decoding gives the right answer exactly when every token of it is the likeliest one after those before it.
    """
    is_likeliest = logits[:, :-1].argmax(-1) == probes.sequences.token_ids[:, 1:]
    return float((is_likeliest | ~probes.is_answer[:, 1:]).all(1).double().mean())
