"""The models of a run, as far as a plan cares: who holds what for how long. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from megarl.config import DpoRun, LessonRun, PpoRun, Run, SampleRun, TrainedModelConfig
from megarl.models.spec import ModelSpec, Role
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.phases import FROZEN, REFERENCE
from megarl.planner.shards import Shard, shards_of
from megarl.rewards.check import parts_of


@dataclass(frozen=True)
class Owned:
    """Bytes that a rank owns of one model, resident or away."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class PlannedModel:
    """One model of a run. `owner` is the name under which `parallel.phases.RESIDENT` knows it.

    `is_scoring`: it looks at every step's rollout, and not at held-out answers alone.
    """

    key: str
    owner: str
    role: Role
    spec: ModelSpec
    shards: tuple[Shard, ...]  # of a rank of every stage
    owned: tuple[Owned, ...]
    is_scoring: bool = True

    @property
    def is_trained(self) -> bool:
        return any(owned.gradients for owned in self.owned)


def models_of(run: Run, specs: Mapping[str, ModelSpec], layout: ParallelLayout) -> list[PlannedModel]:
    """The models in the order in which they are loaded; one whose shape is not known is left out."""
    found = []

    def add(
        key: str, owner: str, role: Role, trained: TrainedModelConfig | None = None, shape: str = "", is_averaged: bool = False
    ) -> None:
        spec = specs.get(shape or key)
        if spec is None:
            return
        shards = shards_of(spec, role, run.parallel, 0 if trained is None else trained.frozen_layers)
        owned = tuple(owned_of(run, shard, layout, trained is not None, is_averaged) for shard in shards)
        found.append(PlannedModel(key, owner, role, spec, shards, owned, is_scoring=not key.startswith("eval.")))

    if isinstance(run, PpoRun):
        add("actor", "actor", "actor", run.actor, is_averaged=run.ppo.ema is not None)
        if needs_reference(run):
            owner = FROZEN if run.ppo.reference_refresh is None else REFERENCE
            add("reference", owner, "actor", shape="" if run.reference is not None else "actor")
        if run.critic is not None:
            add("critic", "critic", "critic", run.critic)
    elif isinstance(run, SampleRun):
        add("actor", "actor", "actor")
    if isinstance(run, PpoRun | SampleRun):
        judges = {part.path: key for key, part in reversed(parts_of(run)) if part.kind == "model"}  # named twice, loaded once
        for key in sorted(judges.values(), key=[key for key, _ in parts_of(run)].index):
            add(key, FROZEN, "critic")
    elif isinstance(run, LessonRun):
        add("model", "actor", run.role, run.model)
        if isinstance(run, DpoRun):
            add("reference", FROZEN, "actor", shape="" if run.reference is not None else "model")
    return found


def needs_reference(run: PpoRun) -> bool:
    """Without a KL term nobody asks the reference, and a run that does not name one holds none."""
    return run.reference is not None or run.ppo.kl.coef > 0 or run.ppo.kl.target is not None


def owned_of(run: Run, shard: Shard, layout: ParallelLayout, is_trained: bool, is_averaged: bool = False) -> Owned:
    """What a rank owns: weights; of those that learn gradients, Adam's moments, in bf16 copies and perhaps a moving average, all float32.

    With the distributed optimizer all but weights and gradients are shared out over ranks with equal weights: data x context ranks for
    dense ones, every `expert`-th rank of the stage for experts.
    """
    width = 2 if run.precision == "bf16" else 4
    if not is_trained:
        return Owned(shard.total * width)
    own = float(shard.learned)
    if run.parallel.distributed_optimizer:
        dense, experts = shard.dense - shard.still_dense, shard.experts - shard.still_experts
        own = dense / (layout.data * layout.context) + experts / max(1, layout.stage_size // layout.expert)
    optimizer = int(own * (12 if width == 2 else 8))
    return Owned(shard.total * width, shard.learned * 4, optimizer, int(own * 4) if is_averaged else 0)


def fullest(model: PlannedModel) -> Owned:
    """What the rank owns that holds most of this model."""
    return max(model.owned, key=lambda owned: owned.total)
