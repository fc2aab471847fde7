"""Which updates are made: not those of numbers that are none, or of a gradient above the limit; several in a row end the run."""

import math

import pytest

from megarl.config import OptimizerConfig
from megarl.errors import LearningError
from megarl.models.guard import FEW, UpdateGuard
from megarl.parallel.layout import ParallelLayout


def guard(**keys) -> UpdateGuard:
    return UpdateGuard("actor", OptimizerConfig(**keys), ParallelLayout(1, 1, 1), None)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_no_update_without_finite_numbers(loss, norm, capsys):
    judge = guard()
    assert not judge.allows(loss, norm, 7, None) and judge.num_skipped == 1
    assert "actor: the update of optimizer step 7 is skipped" in capsys.readouterr().err
    assert judge.allows(1.0, 1.0, 8, None) and judge.num_skipped == 0


def test_a_gradient_above_the_limit_is_skipped_where_one_is_set(capsys):
    assert guard().allows(1.0, 1e6, 0, None)
    judge = guard(skip_above=5.0)
    assert judge.allows(1.0, 5.0, 0, None) and not judge.allows(1.0, 5.1, 1, None)
    assert "step 1 is skipped: loss 1, gradient norm 5.1 above actor.optimizer.skip_above=5" in capsys.readouterr().err


def test_several_in_a_row_end_the_run():
    judge = guard(skip_above=5.0, max_skipped_updates=3)
    assert not judge.allows(1.0, 9.0, 0, None) and not judge.allows(math.nan, 1.0, 1, None)
    with pytest.raises(LearningError, match=r"so were the 2 before it \(actor\.optimizer\.max_skipped_updates=3\)"):
        judge.allows(1.0, 9.0, 2, None)


def test_a_loss_that_jumps_is_said_and_learned_from(capsys):
    judge = guard()
    for step in range(FEW):
        assert judge.allows(1.0 + 0.01 * (step % 3), 1.0, step, None)
    assert capsys.readouterr().err == ""
    assert judge.allows(0.0, 1.0, FEW, None) and capsys.readouterr().err == ""  # downwards is no fault
    assert judge.allows(4.0, 1.0, FEW + 1, None)
    assert f"actor: the loss of optimizer step {FEW + 1} jumped to 4; the median of the last is 1.01" in capsys.readouterr().err
