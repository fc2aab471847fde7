"""What a run reports: values that know how they reduce, what an experience looks like in numbers, and where the numbers go."""

from megarl.metrics.description import describe, describe_rewards
from megarl.metrics.log import RunLog
from megarl.metrics.values import Deviation, ExplainedVariance, Largest, Metric, Metrics, StepMetrics, Total

__all__ = [
    "Deviation",
    "ExplainedVariance",
    "Largest",
    "Metric",
    "Metrics",
    "RunLog",
    "StepMetrics",
    "Total",
    "describe",
    "describe_rewards",
]
