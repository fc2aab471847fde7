"""Which positions a context-parallel rank holds: a partition, the same causal work for every rank, and Megatron's own order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.parallel.context import padded_length, positions_of

sizes = st.integers(1, 8)


@given(st.integers(1, 200), sizes, sizes)
def test_positions_are_a_partition_of_equal_work(num_tokens, context, split_over_tensor):
    length = padded_length(num_tokens, context, split_over_tensor)
    parts = [positions_of(rank, context, length) for rank in range(context)]
    assert torch.cat(parts).sort().values.tolist() == list(range(length))
    assert length >= num_tokens and all(len(part) * context == length and len(part) % split_over_tensor == 0 for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert len({int((part + 1).sum()) for part in parts}) == 1, "a query costs as many keys as stand up to it"


@given(st.integers(1, 200), sizes)
def test_no_more_padding_than_needed(num_tokens, context):
    assert padded_length(num_tokens, 1) == num_tokens
    assert padded_length(num_tokens, context) < num_tokens + 2 * context


class Group:
    """What Megatron asks of a process group here."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = (lambda: rank), (lambda: size)


def test_positions_are_those_of_megatrons_rotary_embeddings():
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    for context in (2, 3, 4):
        everywhere = torch.arange(8 * context).view(-1, 1)
        for rank in range(context):
            theirs = get_pos_emb_on_this_cp_rank(everywhere, 0, Group(rank, context))
            assert torch.equal(theirs.flatten(), positions_of(rank, context, 8 * context))
