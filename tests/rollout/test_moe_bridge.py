"""Mixtures of experts through the bridge: the sampler's experts are packed on a CPU, and lie on other ranks than the trainer's."""

import pytest

from megarl.config import ParallelConfig
from tests.ranks import run_ranks
from tests.rollout.test_layouts import check_cases
from tests.rollout.test_one_process import check_family
from tests.rollout.tiny_models import MIXTURES, save_tiny

EP2 = ParallelConfig(expert=2)
TP2 = ParallelConfig(tensor=2, sequence=True)
TP2_EP2 = ParallelConfig(tensor=2, sequence=True, expert=2)
PP2_EP2 = ParallelConfig(pipeline=2, expert=2)

# kind of model, trainer's layout, tensor-parallel ranks a generator
CASES = {
    2: [("qwen3-moe", EP2, 2), ("mixtral", TP2, 2), ("mixtral", TP2_EP2, 1)],
    4: [("qwen3-moe", PP2_EP2, 1), ("mixtral", TP2_EP2, 4), ("qwen3-moe", TP2_EP2, 2)],
}


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


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_sampler_follows_the_trainer_under_every_layout(world_size, tmp_path):
    models = {kind: [save_tiny(kind, seed, tmp_path) for seed in (0, 1)] for kind in MIXTURES}
    ranks = run_ranks(check_cases, world_size, CASES[world_size], models, timeout_s=380)
    for case, reports in zip(CASES[world_size], zip(*ranks, strict=True)):
        for report in reports:
            print(case, {key: value for key, value in report.items() if key != "samples"})
            assert all(worst < 1e-4 and agreement == 1.0 for worst, agreement in report["greedy"]), case
            assert report["trainer_difference"] < 1e-4, case
            assert report["moved_bytes"] == report["target_bytes"], case
            assert report["corrupted"] and all("from rank" in message for message in report["corrupted"]), case
