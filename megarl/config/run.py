"""What every run has: where it writes, what it keeps, which machines it is written for."""

from typing import Literal

from megarl.config.models import ParallelConfig
from megarl.config.section import NotNegative, Positive, Section, UserPath


class CheckpointConfig(Section):
    """When the run is saved and whether it continues from what is there."""

    every_steps: NotNegative = 0  # 0: only at the end
    keep_last: Positive = 2  # the newest so many stay
    keep_every_steps: NotNegative = 0  # those of every so many steps stay, too; 0: none
    keep_best: str | None = None  # so does the one whose step reported the highest value of this metric; -name: the lowest
    background: Literal["off", "wait", "skip"] = "wait"  # write behind the training; when one is due and the last still being written
    timeout_s: Positive = 1800  # a save that takes longer has failed
    max_failures: NotNegative = 0  # failed saves in a row that the run survives with a warning
    resume: bool = True  # continue from the newest undamaged checkpoint in output_dir
    strict: bool = False  # refuse to continue where the newest one is damaged


class LogConfig(Section):
    """Where metrics go beside `metrics.jsonl` and the terminal."""

    tensorboard: bool = False
    wandb_project: str | None = None  # needs the package wandb and WANDB_API_KEY (or wandb's offline mode)
    samples: NotNegative = 2  # rollouts written to samples.jsonl a step


class ClusterConfig(Section):
    """The machines a run is written for. `--check` counts with them; a real run refuses to start on another number of ranks."""

    nodes: Positive = 1
    ranks_per_node: Positive = 8  # one a GPU

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class Run(Section):
    """What every stage of the course has."""

    output_dir: UserPath
    seed: NotNegative = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    tokenizer: UserPath  # sentencepiece .model file or Hugging Face directory
    cluster: ClusterConfig | None = None  # none: as many ranks as there are
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
