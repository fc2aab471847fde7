"""From parts of the configuration to scorers, reward models included: for the rewards of a run and the metrics of its evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megarl.checkpoint.sources import open_weights
from megarl.config import PpoRun, RewardPart
from megarl.data.batching import pad_rows, padded_length
from megarl.data.tokenizers import Tokenizer
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.parallel.phases import FROZEN
from megarl.ppo.judge import TOKENS_A_TENSOR_RANK
from megarl.ppo.roles import RewardModel
from megarl.records import TokenBatch
from megarl.rewards.build import RUN_ONCE, ahead_of, build_scorer
from megarl.rewards.check import distinct_names
from megarl.rewards.model import ModelScorer
from megarl.rewards.scorer import Scorer, Term


@dataclass(frozen=True)
class SequenceScores:
    """Scores of whole sequences by a reward model, for `rewards.model.ModelScorer`. Called by every rank of a replica.

    Where data ranks share the experts of a mixture, by every rank of the world: one without a sequence computes along.
    """

    model: RewardModel
    pad_id: int

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        if not sequences:
            if self.model.layout.expert > 1:
                self([[self.pad_id]])
            return []
        length = padded_length([len(row) for row in sequences], TOKENS_A_TENSOR_RANK * self.model.layout.tensor)
        token_ids, lengths = pad_rows(sequences, self.pad_id, length)
        return self.model.scores(TokenBatch(token_ids, lengths).to(device.device())).tolist()


class TermBuilder:
    """Builds the terms of several lists of parts; a reward model named twice is loaded once. Every rank calls it in the same order."""

    def __init__(self, run: PpoRun, layout: ParallelLayout, tokenizer: Tokenizer, memory: Phases):
        self._run, self._layout, self._tokenizer, self._memory = run, layout, tokenizer, memory
        self._together = partial(collectives.together, group=groups.group(layout, "world"))
        self._models: dict[Path, ModelScorer] = {}

    def terms(self, key: str, parts: Sequence[RewardPart]) -> tuple[Term, ...]:
        """A term for each part of the list that the configuration has under the dotted name `key`. Raises on all ranks what any raises."""
        names = distinct_names([part.kind for part in parts])
        return tuple(
            Term(name, part.weight, self._scorer(f"{key}.{index}", part), part.kind in RUN_ONCE, ahead_of(part))
            for index, (name, part) in enumerate(zip(names, parts, strict=True))
        )

    def _scorer(self, key: str, part: RewardPart) -> Scorer:
        if part.path is None:
            return self._together(lambda: build_scorer(key, part, self._run))
        if part.path not in self._models:
            spec, source = self._together(lambda: open_weights(part.path, "reward"))
            model = RewardModel(spec, self._run, self._layout, source)
            self._memory.admit(FROZEN, model.movables)
            self._models[part.path] = ModelScorer(SequenceScores(model, self._tokenizer.pad_id))
        return self._models[part.path]
