"""Which models count as the same one."""

import pytest

from megarl.checkpoint.restore import spec_differences
from megarl.models.family import spec_from_hf_config
from tests.course.lesson_files import SHAPE
from tests.multi_rank.role_cases import MIXTURE


@pytest.mark.parametrize("shape", [SHAPE, SHAPE | MIXTURE], ids=["dense", "mixture"])
def test_a_model_read_twice_is_the_same(shape):
    first, second = spec_from_hf_config(dict(shape)), spec_from_hf_config(dict(shape))
    assert spec_differences(first, second) == ""
    wide = spec_from_hf_config(shape | {"num_hidden_layers": 3})
    assert spec_differences(first, wide) == "num_layers 2 in the checkpoint, 3 in the run"
