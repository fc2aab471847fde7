"""Mixtures of experts against transformers under expert, tensor, pipeline and data parallelism, and what the optimizer does with them."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig
from tests.multi_rank.test_models import compare
from tests.ranks import run_all
from tests.tiny_hf import MIXTURES, save_oracle, save_tiny

LAYOUTS = {
    1: [ParallelConfig(recompute="full")],
    2: [ParallelConfig(expert=2), ParallelConfig(tensor=2, sequence=True), ParallelConfig(tensor=2, sequence=True, expert=2), ParallelConfig()],
    4: [
        ParallelConfig(tensor=2, sequence=True, expert=2, recompute="full"),
        ParallelConfig(pipeline=2, expert=2),
        ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2),
        ParallelConfig(expert=4),
    ],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """Every kind of tiny mixture with its oracle."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 101, (4, 12), generator=generator)
    coefficients = torch.randn(4, 12, 101, generator=generator)
    for kind in MIXTURES:
        save_oracle(save_tiny(kind, folder), token_ids, coefficients)
    return {kind: str(folder / kind) for kind in MIXTURES}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_outputs_gradients_and_pieces_equal_transformers(directories, world_size):
    run_all([(compare_all, (directories,))], world_size, timeout_s=400)


def compare_all(rank: int, world_size: int, directories: dict[str, str]) -> None:
    from megarl.parallel import groups

    for parallel in LAYOUTS[world_size]:
        layout = groups.initialize(parallel, seed=0)
        for kind, directory in directories.items():
            try:
                compare(Path(directory), parallel, layout)
            except Exception as error:
                raise AssertionError(f"{kind} under {parallel}: {error}") from error
