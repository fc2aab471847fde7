"""Responses are scored while real vLLM still samples others, and earn what they would have earned afterwards."""

from pathlib import Path

import pytest

from benchmarks.scoring_overlap import PROMPTS, SAMPLES, judges, take_turns, write_files
from tests.ranks import run_ranks


def both_orders(rank: int, world_size: int, root: Path, name: str) -> dict[str, list[dict]]:
    with judges() as parts:
        return take_turns(root, parts[name], repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["function", "http"])
def test_scores_come_while_others_are_sampled_and_are_the_same(tmp_path: Path, name: str) -> None:
    write_files(tmp_path)
    (found,) = run_ranks(both_orders, 1, tmp_path, name)
    assert [step["scored_early"] for step in found["after"]] == [0, 0]
    assert all(step["scored_early"] > PROMPTS * SAMPLES / 4 for step in found["overlapping"]), found
    samples = [step["samples"] for steps in found.values() for step in steps]
    assert len(samples[0]) == PROMPTS * SAMPLES and all(told == samples[0] for told in samples)
    assert len({sample["reward"] for sample in samples[0]}) > 10  # no constant that would be equal in any order
