"""Every knob of a run: its meaning, its unit, its check. Configurations are frozen; unknown keys are refused.

A run is one YAML file plus `a.b=c` overrides. `PpoRun`, `SftRun` and `RewardRun` share the sections of `Run`.
"""

from megarl.config.course import LessonConfig, LessonData, RewardRun, SftRun
from megarl.config.models import ModelConfig, OptimizerConfig, ParallelConfig, TrainedModelConfig
from megarl.config.ppo import CorrectionConfig, EvalConfig, KlConfig, PpoConfig, PpoRun
from megarl.config.rewards import RewardPart
from megarl.config.rollout import MemoryConfig, PromptData, RolloutConfig
from megarl.config.run import CheckpointConfig, ClusterConfig, LogConfig, Run
from megarl.config.section import Section

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "CorrectionConfig",
    "EvalConfig",
    "KlConfig",
    "LessonConfig",
    "LessonData",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PpoConfig",
    "PpoRun",
    "PromptData",
    "RewardPart",
    "RewardRun",
    "RolloutConfig",
    "Run",
    "Section",
    "SftRun",
    "TrainedModelConfig",
]
