"""The run `megarl sample`."""

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.models import ModelConfig
from megarl.config.rewards import RewardPart
from megarl.config.rollout import MemoryConfig, PromptData, RolloutConfig
from megarl.config.run import Run
from megarl.config.section import NotNegative, Section


class SampleConfig(Section):
    """Which prompts are answered, how, and what is kept (docs/lessons.md)."""

    num_prompts: NotNegative = 0  # the first so many; 0: all
    keep: Literal["all", "best"] = "all"  # a line holds all responses to a prompt, or the one with the highest score alone
    pass_score: float = 1.0  # a response with at least this score passes
    greedy: bool = False  # the likeliest token at every position
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # unlike in ppo, nothing is trained on these log-probabilities
    top_k: NotNegative = 0  # 0: all tokens


class SampleRun(Run):
    """`megarl sample CONFIG`"""

    actor: ModelConfig
    rewards: tuple[RewardPart, ...] = ()  # none: responses without scores
    reward_hook: str | None = None  # as for ppo
    data: PromptData
    rollout: RolloutConfig  # prompts_per_step prompts are sampled, scored and written at a time
    memory: MemoryConfig = MemoryConfig()
    sample: SampleConfig = SampleConfig()
