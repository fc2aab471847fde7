"""A reference that follows the policy: every so many steps it becomes what the policy is, or the policy's moving average.

Its weights are then state of the run, and part of every checkpoint.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megarl.config import ReferenceRefresh
from megarl.models.optimizer_pieces import Slot
from megarl.models.pieces import Piece
from megarl.models.spec import ModelSpec
from megarl.parallel.memory import Phases
from megarl.ppo.kl import Estimator
from megarl.ppo.roles import Actor, Reference
from megarl.records import RolloutBatch


class RefreshedReference:
    """A reference model that is copied anew from `actor`, which has its layout: on the device, without a message or a file.

    With the source `ema` the actor keeps an average. What a checkpoint keeps of it are weights and the number of refreshes (`learner`).
    """

    def __init__(self, model: Reference, estimator: Estimator, config: ReferenceRefresh, actor: Actor, memory: Phases):
        self.model, self.estimator, self.num_refreshes = model, estimator, 0
        self._config, self._actor, self._memory = config, actor, memory

    def logprobs(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Tensor:
        """f32[B, T] under the reference as it is now. Called by every rank."""
        return self.model.logprobs(rollout)

    def refresh(self, step: int) -> None:
        """Take the actor's weights when `step` finished steps are a multiple of `every_steps`. Called by every rank."""
        if step % self._config.every_steps:
            return
        ema = self._actor.learner.ema if self._config.source == "ema" else None
        with self._memory.exchanging():
            if ema is not None:
                ema.exchange()
            self.model.take(self._actor)
            if ema is not None:
                ema.exchange()
        self.num_refreshes += 1

    # ------------------------------------------------ what a checkpoint keeps (`checkpoint.files.Checkpointable` and `Kept`)
    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def pieces(self) -> Sequence[Piece]:
        return self.model.pieces

    @property
    def learner(self) -> "RefreshedReference":
        return self

    def optimizer_pieces(self, weights: Sequence[Piece]) -> Mapping[Slot, Sequence[Piece]]:
        """It does not learn."""
        return {}

    def counts(self) -> dict[str, int]:
        """How often it was refreshed."""
        return {"num_refreshes": self.num_refreshes}

    def load_counts(self, counts: dict[str, int]) -> None:
        """Puts back what `counts` gave."""
        self.num_refreshes = counts["num_refreshes"]

    @property
    def is_skipping(self) -> bool:
        """There are no updates."""
        return False

    def restart_ema(self) -> bool:
        """There is none."""
        return False

    def state_bytes(self, weights: Tensor) -> int:
        """There is no state."""
        return 0
