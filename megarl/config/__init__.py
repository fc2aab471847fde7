"""Every knob of a run: its meaning, its unit, its check. Configurations are frozen; unknown keys are refused.

A run is one YAML file plus `a.b=c` overrides. All runs share the sections of `Run`, the lessons those of `LessonRun`.
"""

from megarl.config.course import (
    ComparisonConfig,
    DpoConfig,
    DpoRun,
    LessonConfig,
    LessonData,
    LessonRun,
    RewardRun,
    RrhfConfig,
    RrhfRun,
    SftRun,
)
from megarl.config.data import Dataset, DataSource
from megarl.config.models import ModelConfig, OptimizerConfig, ParallelConfig, TrainedModelConfig
from megarl.config.ppo import CorrectionConfig, EmaConfig, EvalConfig, EvalSet, KlConfig, PpoConfig, PpoRun, PtxConfig, ReferenceRefresh
from megarl.config.rewards import RewardPart
from megarl.config.rollout import LengthSchedule, MemoryConfig, PartialConfig, PromptData, RefillConfig, RolloutConfig
from megarl.config.run import CheckpointConfig, ClusterConfig, LogConfig, Run
from megarl.config.sample import SampleConfig, SampleRun
from megarl.config.section import Section

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "ComparisonConfig",
    "CorrectionConfig",
    "DataSource",
    "Dataset",
    "DpoConfig",
    "DpoRun",
    "EmaConfig",
    "EvalConfig",
    "EvalSet",
    "KlConfig",
    "LengthSchedule",
    "LessonConfig",
    "LessonData",
    "LessonRun",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PartialConfig",
    "PpoConfig",
    "PpoRun",
    "PromptData",
    "PtxConfig",
    "ReferenceRefresh",
    "RefillConfig",
    "RewardPart",
    "RewardRun",
    "RolloutConfig",
    "RrhfConfig",
    "RrhfRun",
    "Run",
    "SampleConfig",
    "SampleRun",
    "Section",
    "SftRun",
    "TrainedModelConfig",
]
