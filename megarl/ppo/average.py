"""Evaluation of the policy's moving average: the sampler gets it for as long as the held-out prompts take, and then the policy again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megarl.bridge.sync import WeightSync
from megarl.checkpoint.train_state import TrainState
from megarl.parallel.memory import Phases
from megarl.ppo.evaluator import Evaluation, Evaluator
from megarl.ppo.roles import Actor


@dataclass(frozen=True)
class AveragedPolicy:
    """Puts the actor's moving average into the sampler. The actor keeps one."""

    actor: Actor
    weight_sync: WeightSync
    memory: Phases

    @contextmanager
    def in_sampler(self, version: int) -> Iterator[None]:
        """Inside, the sampler draws from the average, and afterwards from the policy, called `version` both times. Entered by every rank.

        Two weight syncs, verified like any other. After an error nothing is put back: it ends the run.
        """
        self._exchange(version)
        yield
        self._exchange(version)

    def _exchange(self, version: int) -> None:
        ema = self.actor.learner.ema
        assert ema is not None
        with self.memory.exchanging():
            ema.exchange()
        with self.memory.publishing():
            self.weight_sync.push(self.actor, version=version)


@dataclass(frozen=True)
class AveragedEvaluator:
    """An evaluator that answers the held-out prompts from the average, too, whenever it answers them from the policy."""

    policy: Evaluator
    average: AveragedPolicy

    def at_start(self, state: TrainState) -> Evaluation:
        """As the policy's: before training the average is the policy."""
        return self.policy.at_start(state)

    def after_step(self, state: TrainState) -> Evaluation:
        """The policy's metrics, and under `ema/` the average's."""
        found = self.policy.after_step(state)
        if not found.metrics:
            return found
        with self.average.in_sampler(state.policy_version):
            second = self.policy.evaluate()
        samples = [[{**sample, "kind": f"ema {sample['kind']}"} for sample in of_set] for of_set in second.samples]
        return Evaluation(found.metrics + second.metrics.under("ema"), [*found.samples, *samples])
