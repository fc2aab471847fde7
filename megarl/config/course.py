"""The supervised lessons' runs."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.data import Dataset
from megarl.config.models import ModelConfig, TrainedModelConfig
from megarl.config.run import Run
from megarl.config.section import NotNegative, Positive, Section, UserPath


class LessonData(Dataset):
    """Demonstrations (`prompt`/`response` or `messages`), preferences (`prompt`/`chosen`/`rejected`) or ranked responses."""

    eval_path: UserPath | None = None  # held-out examples, read with the same keys
    max_tokens: Positive = 2048
    overlong: Literal["refuse", "skip", "truncate"] = "refuse"
    learn: Literal["responses", "last_response", "all"] = "responses"  # sft: tokens of all assistant turns, of the last, or all


class LessonConfig(Section):
    """How long a supervised lesson lasts."""

    total_steps: Positive
    batch_size: Positive = 128  # examples an optimizer step, over all data-parallel ranks
    eval_every_steps: NotNegative = 0


class LessonRun(Run):
    """What every supervised lesson has."""

    role: ClassVar[Literal["actor", "critic"]] = "actor"  # of the model that learns
    unit: ClassVar[str] = "examples"  # what a batch consists of

    model: TrainedModelConfig
    data: LessonData
    train: LessonConfig

    @property
    def sequences_per_row(self) -> int:
        """Sequences of an example at most."""
        return 1


class SftRun(LessonRun):
    """`megarl sft CONFIG`"""


class ComparisonConfig(Section):
    """The loss of a reward model (semantics section 5)."""

    form: Literal["end", "tokens"] = "end"  # scores at the last token; tokens: from the first difference on, as DeepSpeed-Chat
    margin: bool = False  # a pair's column `margin` inside the sigmoid
    centring_coef: Annotated[float, Field(ge=0)] = 0.0  # of (score of chosen + score of rejected)^2, which keeps scores around 0


class RewardRun(LessonRun):
    """`megarl reward CONFIG`"""

    role = "critic"
    unit = "pairs"

    comparison: ComparisonConfig = ComparisonConfig()

    @property
    def sequences_per_row(self) -> int:
        return 2


class DpoConfig(Section):
    """The loss of direct preference optimisation (semantics section 5)."""

    loss: Literal["dpo", "ipo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1  # how dear it is to leave the reference
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # dpo alone: how probable it is that a pair is the wrong way round
    nll_coef: Annotated[float, Field(ge=0)] = 0.0  # of imitating the chosen response, too, by the token: keeps it likely


class DpoRun(LessonRun):
    """`megarl dpo CONFIG`"""

    unit = "pairs"

    reference: ModelConfig | None = None  # default: the model's start
    dpo: DpoConfig = DpoConfig()

    @property
    def sequences_per_row(self) -> int:
        return 2


class RrhfConfig(Section):
    """The loss over ranked responses (semantics section 5)."""

    length_exponent: Annotated[float, Field(ge=0)] = 1.0  # log-probabilities are divided by tokens to this power
    nll_coef: Annotated[float, Field(ge=0)] = 1.0  # of imitating the best response
    max_responses: Annotated[int, Field(ge=2)] = 8  # of a list; a longer one is refused


class RrhfRun(LessonRun):
    """`megarl rrhf CONFIG`"""

    unit = "lists"

    rrhf: RrhfConfig = RrhfConfig()

    @property
    def sequences_per_row(self) -> int:
        return self.rrhf.max_responses
