"""Evaluation on held-out prompts, through the same sampler and scorers that training uses.

It changes nothing that training sees: seeds are a function of set, prompt and sample, and nothing random is drawn elsewhere.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from megarl.checkpoint.train_state import TrainState
from megarl.config import EvalConfig
from megarl.data.tokenizers import Tokenizer
from megarl.metrics import Metrics
from megarl.operations import heartbeat
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.ppo.eval_sets import SHORT, metric_names
from megarl.ppo.held_out import HeldOut, facts_of, summary
from megarl.ppo.scoring import SharedScoring
from megarl.records import Completion, Prompt
from megarl.rewards.model import ModelScorer
from megarl.rewards.scorer import Term, checked
from megarl.rollout.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found: metrics, equal on all ranks, and this data rank's answers as JSON objects, a list for each set.

    Empty when none was due.
    """

    metrics: Metrics = field(default_factory=Metrics)
    samples: list[list[dict]] = field(default_factory=list)


class NoEvaluator:
    """A run without held-out prompts."""

    def at_start(self, state: TrainState) -> Evaluation:
        """Nothing to say."""
        return Evaluation()

    def after_step(self, state: TrainState) -> Evaluation:
        """Nothing to say."""
        return Evaluation()


class Evaluator:
    """Evaluates before the first step, every `every_steps` steps and after the last one. Methods are entered by every rank.

    Args: the held-out `sets` of this data rank. The sampler must hold the weights to evaluate.
    """

    def __init__(
        self,
        config: EvalConfig,
        sets: Sequence[HeldOut],
        engine: Engine,
        memory: Phases,
        tokenizer: Tokenizer,
        layout: ParallelLayout,
        total_steps: int,
    ):
        self.config, self.sets, self.total_steps = config, tuple(sets), total_steps
        self._engine, self._memory, self._tokenizer, self._layout = engine, memory, tokenizer, layout
        self._shared = SharedScoring(layout)

    def at_start(self, state: TrainState) -> Evaluation:
        """The evaluation before training; a resumed run has said it already."""
        return self.evaluate() if state.step == 0 else Evaluation()

    def after_step(self, state: TrainState) -> Evaluation:
        """The evaluation after `state.step` finished steps, when it is due."""
        every = self.config.every_steps
        is_due = state.step == self.total_steps or (every > 0 and state.step % every == 0)
        return self.evaluate() if is_due else Evaluation()

    @heartbeat.phase("evaluate")
    def evaluate(self) -> Evaluation:
        """Answer every held-out prompt, greedily and as often as its set asks, and score the answers."""
        with self._memory.generating():
            answered = iter(self._engine.generate([request for held_out in self.sets for request in held_out.requests]))
        found = Evaluation()
        with self._memory.scoring() if self._has_models else contextlib.nullcontext():
            for held_out in self.sets:
                completions = list(islice(answered, len(held_out.requests)))
                one = self._judged(held_out, completions)
                found = Evaluation(found.metrics + one.metrics, found.samples + one.samples)
        return found

    @property
    def _has_models(self) -> bool:
        return any(isinstance(term.scorer, ModelScorer) for held_out in self.sets for term in held_out.terms)

    def _judged(self, held_out: HeldOut, completions: Sequence[Completion]) -> Evaluation:
        prompts = held_out.rows
        texts = [self._tokenizer.decode_response(completion.token_ids) for completion in completions]
        columns = [self._scores(held_out, term, prompts, completions, texts) for term in held_out.terms]
        facts = collectives.gather_json(facts_of(completions, columns), groups.group(self._layout, "dp"))
        samples = [
            _sample(held_out, prompt, completion, text, scores)
            for prompt, completion, text, *scores in zip(prompts, completions, texts, *columns, strict=True)
        ]
        return Evaluation(summary(held_out.config, [row for part in facts for row in part]), [samples])

    def _scores(
        self, held_out: HeldOut, term: Term, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
    ) -> list[float]:
        """One score a completion. A reward model whose experts data ranks share computes along where this one has none."""

        def work() -> list[float]:
            return checked(f"metric {held_out.prefix}{term.name}", term.scorer.score(prompts, completions, texts), completions)

        return self._shared(term.runs_once, work if completions or not term.runs_once else list)


def _sample(held_out: HeldOut, prompt: Prompt, completion: Completion, text: str, scores: Sequence[float]) -> dict:
    name = {} if held_out.config.name == SHORT else {"set": held_out.config.name, "sample": completion.sample_index}
    judged = dict(zip(metric_names(held_out.config), scores, strict=True))
    return {"kind": "eval", **name, "prompt": prompt.text, "response": text, "answer": prompt.answer, **judged}
