"""What the loop is made of. Every rank holds the same parts (`ppo.assembly` builds them)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.bridge.sync import WeightSync
from megarl.checkpoint.store import Checkpointable, Checkpoints
from megarl.metrics import Metrics, RunLog
from megarl.parallel.memory import Phases
from megarl.ppo.average import AveragedEvaluator
from megarl.ppo.evaluator import Evaluator, NoEvaluator
from megarl.ppo.harvest import Harvester
from megarl.ppo.judge import Judge
from megarl.ppo.kl import Estimator
from megarl.ppo.parity import ParityGate
from megarl.ppo.reference import RefreshedReference
from megarl.ppo.roles import Actor, Critic, Reference
from megarl.records import Experience, RolloutBatch
from megarl.rollout.engine import Engine


class KlSource(Protocol):
    """Where the reference log-probabilities of a rollout come from. `estimator` None: nothing can be said about KL."""

    estimator: Estimator | None

    def logprobs(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Tensor:
        """f32[B, T] under the reference. Called by every rank."""

    def refresh(self, step: int) -> None:
        """What becomes of the reference after `step` finished steps. Called by every rank."""


@dataclass(frozen=True)
class FrozenReference:
    """A reference model beside the actor."""

    model: Reference
    estimator: Estimator

    def logprobs(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Tensor:
        return self.model.logprobs(rollout)

    def refresh(self, step: int) -> None:
        """It stays what it is."""


class NoReference:
    """A run whose KL coefficient is 0 for good holds no reference: the policy stands in for it, and no KL is reported."""

    estimator = None

    def logprobs(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Tensor:
        return old_logprobs

    def refresh(self, step: int) -> None:
        """There is none."""


class NoCritic:
    """A run whose advantages need no values holds no critic."""

    def values(self, rollout: RolloutBatch) -> Tensor:
        return torch.zeros_like(rollout.rollout_logprobs)

    def update(self, minibatch: Experience) -> Metrics:
        return Metrics()


@dataclass(frozen=True)
class Parts:
    """Everything `ppo.loop.train` uses. A part may be exchanged for another with the same methods."""

    harvester: Harvester
    engine: Engine
    memory: Phases
    judge: Judge
    actor: Actor
    critic: Critic | NoCritic
    reference: KlSource
    weight_sync: WeightSync
    parity: ParityGate
    evaluator: Evaluator | AveragedEvaluator | NoEvaluator
    checkpoints: Checkpoints
    log: RunLog

    @property
    def checkpointables(self) -> Mapping[str, Checkpointable]:
        """The models that change, by their name in checkpoints."""
        changing = {"actor": self.actor} | ({"critic": self.critic} if isinstance(self.critic, Critic) else {})
        return changing | ({"reference": self.reference} if isinstance(self.reference, RefreshedReference) else {})
