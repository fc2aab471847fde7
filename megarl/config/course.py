"""The supervised lessons' runs."""

from typing import Literal

from megarl.config.models import TrainedModelConfig
from megarl.config.run import Run
from megarl.config.section import NotNegative, Positive, Section, UserPath


class LessonData(Section):
    """Demonstrations (`prompt`/`response` or `messages`) or preferences (`prompt`/`chosen`/`rejected`), JSONL."""

    path: UserPath
    eval_path: UserPath | None = None
    max_tokens: Positive = 2048
    overlong: Literal["refuse", "skip", "truncate"] = "refuse"
    chat_template: bool = False


class LessonConfig(Section):
    """How long a supervised lesson lasts."""

    total_steps: Positive
    batch_size: Positive = 128  # examples an optimizer step, over all data-parallel ranks
    eval_every_steps: NotNegative = 0


class SftRun(Run):
    """`megarl sft CONFIG`"""

    model: TrainedModelConfig
    data: LessonData
    train: LessonConfig


class RewardRun(Run):
    """`megarl reward CONFIG`"""

    model: TrainedModelConfig
    data: LessonData
    train: LessonConfig
