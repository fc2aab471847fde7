"""The algorithm and the run `megarl ppo`."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megarl.config.course import LessonData
from megarl.config.models import ModelConfig, TrainedModelConfig
from megarl.config.rewards import RewardPart
from megarl.config.rollout import MemoryConfig, PromptData, RolloutConfig
from megarl.config.run import Run
from megarl.config.section import Beta, Fraction, NotNegative, Positive, Section, UserPath


class KlConfig(Section):
    """KL against the reference, taken off the reward or added to the loss (semantics sections 1 and 3)."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    place: Literal["reward", "loss"] = "reward"  # reward: off every token's reward; loss: of the policy as it learns, with gradient
    estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    target: Annotated[float, Field(gt=0)] | None = None  # with a target the coefficient adapts (Ziegler et al. 2019)
    horizon: Positive = 10000  # sequences


class CorrectionConfig(Section):
    """The policy loss times w, trainer's over sampler's probability of what was sampled (semantics section 3). `low` is for mask alone."""

    kind: Literal["none", "tis", "mask"] = "none"  # tis: min(w, high); mask: w, but 0 outside low to high
    level: Literal["token", "sequence"] = "token"  # w of each token, or of the whole response (their product)
    low: Annotated[float, Field(ge=0)] = 0.5
    high: Annotated[float, Field(gt=0)] = 2.0


class EmaConfig(Section):
    """An exponential moving average of the policy's weights, kept in float32 (semantics section 3)."""

    decay: Beta = 0.992  # after each policy update: average = decay * average + (1 - decay) * weights


class ReferenceRefresh(Section):
    """The reference is no longer frozen: every so many steps it becomes what the policy is."""

    every_steps: Positive
    source: Literal["policy", "ema"] = "policy"  # the policy's weights, or their moving average: a slow reference


class PtxConfig(Section):
    """Text that the policy imitates in every update: its loss + coef * mean NLL of the text's learned tokens (semantics section 3)."""

    coef: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 8  # rows an optimizer step, over all data-parallel ranks
    data: LessonData  # as for megarl sft; learn: all for pre-training text


class PpoConfig(Section):
    """The algorithm (docs/algorithms.md; semantics sections 1 to 4 and 6)."""

    total_steps: Positive
    num_epochs: Positive = 1
    minibatch_size: Positive  # sequences an optimizer step, over all data-parallel ranks
    # gae and single_step learn values with a critic; the others hold none, and those with a group need several samples a prompt
    advantage: Literal["gae", "single_step", "rloo", "grpo", "dr_grpo", "remax", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95  # gae alone
    loss: Literal["clip", "cispo"] = "clip"  # clip: PPO's surrogate; cispo: log-prob times advantage and the clipped ratio, no gradient cut
    ratio_level: Literal["token", "sequence"] = "token"  # new over old probability of each token, or of a response, geometric mean (GSPO)
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_fixed"] = "token_mean"
    whiten: bool | None = None  # advantages over the whole rollout; null: as the estimator's paper does (docs/algorithms.md)
    critic_warmup_steps: NotNegative = 0
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    reward_scale: Literal["none", "std", "normal"] = "none"  # by the run's rewards so far: over their std; less their mean first
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0  # off the reward of a response that the length limit cut
    bootstrap_truncated: bool = False
    correction: CorrectionConfig = CorrectionConfig()
    kl: KlConfig = KlConfig()
    ptx: PtxConfig | None = None
    ema: EmaConfig | None = None
    reference_refresh: ReferenceRefresh | None = None


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError("a name of letters, digits, dots, hyphens and underscores: it becomes a part of metrics' names")
    return name


class EvalSet(Section):
    """One held-out set of prompts with metrics of its own (docs/evaluation.md)."""

    name: Annotated[str, AfterValidator(_plain_name)]  # its metrics are eval/<name>/<metric>
    data: PromptData  # nothing of the run's own data section is taken over
    metrics: tuple[RewardPart, ...]  # scored as rewards are; weights mean nothing
    num_prompts: Positive = 256  # the first so many
    samples: NotNegative = 0  # responses a prompt beside the greedy one, for pass@k
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0  # of those


class EvalConfig(Section):
    """Held-out prompts, answered at the start, every N steps and at the end. Short form: `path`, for greedy exact accuracy."""

    path: UserPath | None = None  # read as the run's own data: eval/accuracy
    every_steps: NotNegative = 0
    num_prompts: Positive = 256  # of path
    sets: tuple[EvalSet, ...] = ()
    ema: bool = False  # answer once more from the policy's moving average (ppo.ema): ema/eval/...


class PpoRun(Run):
    """`megarl ppo CONFIG`"""

    actor: TrainedModelConfig
    critic: TrainedModelConfig | None = None  # with gae and single_step alone
    reference: ModelConfig | None = None  # default: the actor's start
    rewards: tuple[RewardPart, ...]
    reward_hook: str | None = None  # module:function or file.py:function that changes the weighted sums of a step
    data: PromptData
    rollout: RolloutConfig
    ppo: PpoConfig
    memory: MemoryConfig = MemoryConfig()
    eval: EvalConfig | None = None
