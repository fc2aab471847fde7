"""How far a run has come: the one record that owns progress. Everything else a resume needs is tensors."""

import math
from dataclasses import asdict, dataclass, fields, replace

from megarl.errors import CheckpointError


@dataclass(frozen=True)
class TrainState:
    """Progress at the start of step `step`: this many steps are finished.

    `policy_version` counts the policies published to the sampler (the starting weights are version 0), `prompts_consumed` the prompts of
    all data-parallel ranks together (a supervised lesson counts its examples or pairs), `kl_coef` is the coefficient the next step uses.
    """

    step: int = 0
    policy_version: int = 0
    prompts_consumed: int = 0
    kl_coef: float = 0.0

    def advance(self, prompts_consumed: int, kl_coef: float | None = None, is_policy_updated: bool = True) -> "TrainState":
        """The state after one more step that used `prompts_consumed` prompts; the policy version moves only when the policy did."""
        return replace(
            self,
            step=self.step + 1,
            policy_version=self.policy_version + int(is_policy_updated),
            prompts_consumed=self.prompts_consumed + prompts_consumed,
            kl_coef=self.kl_coef if kl_coef is None else kl_coef,
        )

    def to_json(self) -> dict[str, int | float]:
        """A JSON object; floats survive the way exactly (shortest repr)."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "TrainState":
        """The state `to_json` wrote. Raises `CheckpointError` for missing, unknown or non-numeric fields."""
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise CheckpointError(f"train state holds {found}; expected {sorted(names)}: the checkpoint is of another megarl version")
        for f in fields(cls):
            kinds = (int,) if f.type is int else (int, float)
            number = value[f.name]
            if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number) or number < 0:
                raise CheckpointError(f"train state {f.name} is {number!r}; expected a number that is not negative")
        return cls(**value)
