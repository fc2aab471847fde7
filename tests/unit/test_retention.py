"""Which checkpoints stay."""

import pytest

from megarl.checkpoint.retention import BestSoFar, kept_steps
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


@pytest.mark.parametrize(("name", "is_best"), [("a", [True, False, True, False, False]), ("-a", [True, True, False, False, False])])
def test_a_new_best_is_seen_once(name, is_best):
    best = BestSoFar(name)
    assert not best.has_seen
    assert [best.take(values) for values in ({"a": 0.5}, {"a": 0.4}, {"a": 0.9}, {"a": 0.9}, {"b": 5.0})] == is_best
    assert best.has_seen and not BestSoFar(None).take({"a": 1.0})
