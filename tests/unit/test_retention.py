"""Which checkpoints stay."""

import pytest

from megarl.checkpoint.retention import kept_steps
from megarl.config import CheckpointConfig

METRICS = {10: {"eval/accuracy": 0.5}, 20: {"eval/accuracy": 0.9}, 30: {"loss": 1.0}, 40: {"eval/accuracy": 0.9}, 50: {}, 60: {}}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 9}, {10, 20, 30, 40, 50, 60}),
        ({"keep_last": 1, "keep_every_steps": 20}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": "eval/accuracy"}, {40, 60}),
        ({"keep_last": 1, "keep_best": "-eval/accuracy"}, {10, 60}),
        ({"keep_last": 1, "keep_best": "unknown"}, {60}),
    ],
)
def test_newest_round_and_best_stay(settings, kept):
    assert kept_steps(METRICS, CheckpointConfig.model_validate(settings)) == kept
