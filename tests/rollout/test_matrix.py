"""Any layout to any layout: trainer and sampler on the same ranks, under the pairs of `pairs.py`. The sampler agrees with transformers,
with the trainer, and bit for bit with a fresh engine that reads the same weights from disk.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.rollout.pair_check import NUM_PROMPTS, SAMPLES, check_pairs, model_key
from tests.rollout.pairs import PAIRS, Pair
from tests.rollout.tiny_models import save_tiny

TOLERANCE = 1e-4


def test_the_matrix_has_every_kind_of_layout():
    assert len({str(pair) for pair in PAIRS}) == len(PAIRS) >= 20
    kinds = {
        "equal layouts": lambda pair: pair.trainer == pair.sampler,
        "fewer tensor ranks": lambda pair: pair.training.tensor > pair.generator,
        "more tensor ranks": lambda pair: pair.training.tensor < pair.generator,
        "coprime tensor ranks": lambda pair: {pair.training.tensor, pair.generator} == {2, 3},
        "pipeline": lambda pair: pair.training.pipeline > 1,
        "uneven layers": lambda pair: pair.sizes.get("num_hidden_layers", 2) % pair.training.pipeline != 0,
        "virtual pipeline": lambda pair: pair.training.virtual_pipeline > 1,
        "context": lambda pair: pair.training.context > 1,
        "experts": lambda pair: pair.training.expert > 1,
        "sequence": lambda pair: pair.training.sequence,
        "training replicas": lambda pair: pair.data > 1,
        "sampling replicas": lambda pair: pair.ranks > pair.generator,
        "replicated key-value heads": lambda pair: pair.generator > pair.sizes.get("num_key_value_heads", 2),
        "cut key-value groups": lambda pair: pair.training.tensor > pair.sizes.get("num_key_value_heads", 2),
        "a vocabulary without padding": lambda pair: "vocab_size" in pair.sizes,
        "tied over a pipeline": lambda pair: "tied" in pair.family and pair.training.pipeline > 1,
        "biases": lambda pair: pair.family == "qwen2",
        "fp32 to bf16": lambda pair: pair.precision == ("fp32", "bf16"),
        "fp32 masters of bf16": lambda pair: pair.learns and pair.precision == ("bf16", "bf16"),
    }
    assert [kind for kind, is_one in kinds.items() if not any(map(is_one, PAIRS))] == []


@pytest.mark.slow
def test_a_slice_of_the_matrix(tmp_path):
    run(tmp_path, [pair for pair in PAIRS if pair.is_quick])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world_size", sorted({pair.ranks for pair in PAIRS}))
def test_the_matrix(tmp_path, world_size):
    run(tmp_path, [pair for pair in PAIRS if pair.ranks == world_size])


def run(folder: Path, pairs: list[Pair]) -> None:
    for pair, reports in checked(folder, pairs):
        assert faults(pair, reports) == [], pair


def checked(folder: Path, pairs: Iterable[Pair], timeout_s: float = 1400) -> list[tuple[Pair, list[dict]]]:
    """Each pair with the reports of its ranks. Pairs of one number of ranks share their processes."""
    models = {}
    for pair in pairs:
        if (key := model_key(pair)) not in models:
            home = folder / str(len(models))
            home.mkdir()
            models[key] = [save_tiny(pair.family, seed, home, **pair.sizes) for seed in (0, 1)]
    done = []
    for world_size in sorted({pair.ranks for pair in pairs}):
        mine = [pair for pair in pairs if pair.ranks == world_size]
        ranks = run_ranks(check_pairs, world_size, mine, models, timeout_s=timeout_s)
        done += zip(mine, zip(*ranks, strict=True), strict=True)
    return done


def faults(pair: Pair, reports: list[dict]) -> list[str]:
    """What is not as it must be."""
    found = []
    for rank, report in enumerate(reports):
        checks = {
            "the moved bytes are not the target's": report["moved_bytes"] == report["target_bytes"],
            f"the state differs from a fresh engine's in {report['differing_state'][:3]}": not report["differing_state"],
            "a fresh engine samples otherwise": report["same_samples"],
            "the same requests got other samples": report["repeats"],
            "a corrupted element was not named": all("from rank" in message for message in report["corrupted"]),
        }
        if pair.precision == ("fp32", "fp32"):  # in bf16 the three round differently, whatever the weights
            checks["transformers disagrees"] = all(worst < TOLERANCE and agreed == 1.0 for worst, agreed in report["greedy"])
            checks["the trainer disagrees"] = report["trainer"] < TOLERANCE
        found += [f"rank {rank}: {what}: {report}" for what, is_fine in checks.items() if not is_fine]
    samples = {tuple(answer[:2]): answer[2] for report in reports for answer in report["samples"]}
    if len(samples) != NUM_PROMPTS * SAMPLES:
        found.append(f"{len(samples)} samples")
    is_cut = pair.training.tensor > pair.sizes.get("num_key_value_heads", 2)  # the trainer cuts through a group, the sampler copies heads
    if pair.trainer == pair.sampler and not is_cut and any(report["received_bytes"] for report in reports):
        found.append("equal layouts moved something")
    return found
