"""How far a run has come: the one record that owns progress. Everything else a resume needs is tensors."""

import math
from dataclasses import asdict, dataclass, fields, replace

from megarl.errors import CheckpointError
from megarl.ppo.reward_shaping import Moments

PREFIX = "rewards_"  # of the names that the rewards' moments have in JSON


@dataclass(frozen=True)
class TrainState:
    """Progress at the start of step `step`: this many steps are finished.

    `policy_version` counts the policies published to the sampler (the starting weights are version 0), `prompts_consumed` the prompts of
    all data-parallel ranks together (a supervised lesson counts its examples or pairs), `kl_coef` is the coefficient the next step uses;
    `rewards_seen` is what `ppo.reward_scale` scales by.
    """

    step: int = 0
    policy_version: int = 0
    prompts_consumed: int = 0
    kl_coef: float = 0.0
    rewards_seen: Moments = Moments()

    def advance(
        self, prompts_consumed: int, kl_coef: float | None = None, is_policy_updated: bool = True, rewards_seen: Moments | None = None
    ) -> "TrainState":
        """The state after one more step that used `prompts_consumed` prompts; the policy version moves only when the policy did."""
        return replace(
            self,
            step=self.step + 1,
            policy_version=self.policy_version + int(is_policy_updated),
            prompts_consumed=self.prompts_consumed + prompts_consumed,
            kl_coef=self.kl_coef if kl_coef is None else kl_coef,
            rewards_seen=self.rewards_seen if rewards_seen is None else rewards_seen,
        )

    def to_json(self) -> dict[str, int | float]:
        """A JSON object; floats survive the way exactly (shortest repr). Rewards are told of only where the run has looked at them."""
        seen = {PREFIX + name: number for name, number in asdict(self.rewards_seen).items()} if self.rewards_seen.count else {}
        return {name: number for name, number in asdict(self).items() if name != "rewards_seen"} | seen

    @classmethod
    def from_json(cls, value: dict) -> "TrainState":
        """The state `to_json` wrote. Raises `CheckpointError` for missing, unknown or non-numeric fields."""
        own = {f.name: f.type for f in fields(cls) if f.name != "rewards_seen"}
        seen = {PREFIX + f.name: f.type for f in fields(Moments)}
        names = set(own)
        if not isinstance(value, dict) or set(value) not in (names, names | set(seen)):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise CheckpointError(f"train state holds {found}; expected {sorted(names)}: the checkpoint is of another megarl version")
        for name, number in value.items():
            kinds = (int,) if own.get(name) is int else (int, float)
            if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number):
                raise CheckpointError(f"train state {name} is {number!r}; expected a number")
            if number < 0 and name != PREFIX + "mean":
                raise CheckpointError(f"train state {name} is {number!r}; expected a number that is not negative")
        moments = {name.removeprefix(PREFIX): float(value[name]) for name in seen if name in value}
        return cls(**{name: value[name] for name in own}, rewards_seen=Moments(**moments))
