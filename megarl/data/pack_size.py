"""How many tokens a packed microbatch holds. Apart from `packing`, so that `--check` needs no arrays."""

from megarl.config import ParallelConfig

TILE = 8  # a pack is padded to a multiple of this many tokens on every tensor- and context-parallel rank: aligned for tensor cores


def tile_of(parallel: ParallelConfig) -> int:
    """Tokens of a pack come in multiples of this."""
    return TILE * parallel.tensor * parallel.context


def token_budget(parallel: ParallelConfig) -> int:
    """Real tokens that fit in a microbatch of `max_tokens_per_microbatch`: the multiple of the tile below it."""
    return parallel.max_tokens_per_microbatch // tile_of(parallel) * tile_of(parallel)
