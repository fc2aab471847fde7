"""How many tokens a packed microbatch holds. Apart from `packing`, so that `--check` needs no arrays."""

from megarl.config import ParallelConfig

TILE = 8  # a pack is padded to a multiple of this many tokens on every tensor-parallel rank: aligned for tensor cores


def token_budget(parallel: ParallelConfig) -> int:
    """Real tokens that fit in a microbatch of `max_tokens_per_microbatch`: the multiple of the tile below it."""
    tile = TILE * parallel.tensor
    return parallel.max_tokens_per_microbatch // tile * tile
