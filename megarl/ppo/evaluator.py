"""Greedy accuracy on held-out prompts, through the same sampler and verifier that training uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from megarl.checkpoint.train_state import TrainState
from megarl.config import EvalConfig
from megarl.data.tokenizers import Tokenizer
from megarl.metrics import Metric, Metrics
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.records import Prompt, RolloutRequest
from megarl.rewards.exact import ExactAnswer
from megarl.rollout.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found: metrics reduced over all ranks, this data rank's answers as JSON objects. Empty when none was due."""

    metrics: Metrics = field(default_factory=Metrics)
    samples: list[dict] = field(default_factory=list)


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

    Args: `prompts` of this data rank and one greedy request for each. The sampler must hold the weights to evaluate.
    """

    def __init__(
        self,
        config: EvalConfig,
        prompts: Sequence[Prompt],
        requests: Sequence[RolloutRequest],
        engine: Engine,
        memory: Phases,
        tokenizer: Tokenizer,
        layout: ParallelLayout,
        total_steps: int,
    ):
        self.config = config
        self.total_steps = total_steps
        self._prompts, self._engine, self._memory, self._tokenizer, self._layout = prompts, engine, memory, tokenizer, layout
        self._requests = requests

    def at_start(self, state: TrainState) -> Evaluation:
        """The accuracy before training; a resumed run has said it already."""
        return self.evaluate() if state.step == 0 else Evaluation()

    def after_step(self, state: TrainState) -> Evaluation:
        """The accuracy after `state.step` finished steps, when it is due."""
        every = self.config.every_steps
        is_due = state.step == self.total_steps or (every > 0 and state.step % every == 0)
        return self.evaluate() if is_due else Evaluation()

    def evaluate(self) -> Evaluation:
        """Answer every held-out prompt greedily and compare with its answer."""
        with self._memory.generating():
            completions = self._engine.generate(self._requests)
        texts = [self._tokenizer.decode_response(completion.token_ids) for completion in completions]
        scores = ExactAnswer().score(self._prompts, completions, texts)
        count = float(len(scores))
        metrics = Metrics(
            {
                "eval/accuracy": Metric(sum(scores), count),
                "eval/response_length": Metric(float(sum(len(c.token_ids) for c in completions)), count),
                "eval/truncated_share": Metric(float(sum(c.finish_reason == "length" for c in completions)), count),
            }
        )
        samples = [
            {"kind": "eval", "prompt": prompt.text, "response": text, "answer": prompt.answer, "accuracy": score}
            for prompt, text, score in zip(self._prompts, texts, scores)
        ]
        return Evaluation(metrics.reduced(partial(collectives.gather_json, group=groups.group(self._layout, "dp"))), samples)
