"""Mixtures of experts through the bridge in a world of one rank: the sampler's experts are packed on a CPU."""

import pytest

from tests.ranks import run_ranks
from tests.rollout.test_one_process import check_family
from tests.rollout.tiny_models import save_tiny


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("mixtral", "fp32"), *(pytest.param("qwen3-moe", precision, marks=pytest.mark.slow) for precision in ("fp32", "bf16"))],
)
def test_a_pushed_engine_equals_a_freshly_loaded_one(kind, precision, tmp_path):
    folders = [save_tiny(kind, seed, tmp_path) for seed in (0, 1)]
    (report,) = run_ranks(check_family, 1, kind, precision, *folders)
    print(kind, precision, report)
    assert report["bit_identical"] and report["repeats"]
    if precision == "fp32":
        assert all(worst < 1e-4 and agreement == 1.0 for worst, agreement in report["differences"])
