"""What these tests run on. Nothing heavy is imported to collect them; without a CUDA device each is skipped with a reason.

`MEGARL_GPU_REHEARSAL=1` runs them small on a CPU host with two ranks instead: it shows that the tests themselves work, not that GPUs do.
"""

import os
from dataclasses import dataclass

import pytest

REHEARSAL = "MEGARL_GPU_REHEARSAL"


@dataclass(frozen=True)
class Machine:
    """Ranks that may be started, one a GPU, and the sizes that suit them."""

    num_ranks: int
    is_rehearsal: bool
    model: dict[str, int]  # changes of tests.rollout.tiny_models.SIZES
    kv_cache_bytes: int

    def need(self, num_ranks: int) -> None:
        """Skip the test where there are fewer."""
        if self.num_ranks < num_ranks:
            pytest.skip(f"needs {num_ranks} CUDA devices; found {self.num_ranks}")


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The devices of this host."""
    if os.environ.get(REHEARSAL) == "1":
        return Machine(2, True, {}, 8 << 20)
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch.cuda.is_available() is false ({REHEARSAL}=1 rehearses on a CPU)")
    sizes = {"vocab_size": 8009, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    return Machine(torch.cuda.device_count(), False, sizes | {"num_key_value_heads": 4, "max_position_embeddings": 512}, 2 << 30)
