import pytest

from megarl.config import OptimizerConfig
from megarl.models.learning_rate import lr_at


def rates(total, **settings):
    config = OptimizerConfig(lr=2.0, **settings)
    return [lr_at(config, step, total) for step in range(total)]


def test_constant_after_a_linear_warm_up():
    assert rates(6, warmup_steps=3) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_decay_ends_at_the_smallest_rate():
    assert rates(5, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_cosine_decay_is_half_way_in_the_middle_and_stays_at_the_end():
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup_steps=1, min_lr_ratio=0.1)
    assert lr_at(config, 1, 12) == pytest.approx(2.0)
    assert lr_at(config, 6, 12) == pytest.approx(1.1)
    assert lr_at(config, 11, 12) == pytest.approx(0.2)
    assert lr_at(config, 50, 12) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_one_step_runs_learn_at_the_full_rate(schedule):
    assert rates(1, schedule=schedule) == [2.0]
