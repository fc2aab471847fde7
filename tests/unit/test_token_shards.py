"""Dealing the head's work: shares partition it, are balanced, and keep rows and pairs together where asked."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.models.token_stats import LogprobHead, ScoreHead, ValueHead
from megarl.parallel.token_shards import deal_rows, deal_tokens
from megarl.records import DemonstrationBatch, PreferenceBatch


def batch(num_rows: int, num_tokens: int, seed: int) -> DemonstrationBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, num_tokens + 1, (num_rows,), generator=generator)
    mask = (torch.rand(num_rows, num_tokens, generator=generator) < 0.6) & (torch.arange(num_tokens) < lengths[:, None])
    return DemonstrationBatch(torch.randint(1, 50, (num_rows, num_tokens), generator=generator), lengths, mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.integers(1, 9), st.integers(0, 999))
def test_tokens_are_dealt_once_evenly_and_in_order(num_rows, num_tokens, num_shares, seed):
    """Also where there are fewer tokens than shares."""
    mask = batch(num_rows, num_tokens, seed).loss_mask
    masks = deal_tokens(mask, num_shares)
    assert torch.equal(sum(part.long() for part in masks), mask.long())
    sizes = [int(part.sum()) for part in masks]
    assert max(sizes) - min(sizes) <= 1
    owners = torch.cat([torch.full((size,), share) for share, size in enumerate(sizes)])
    assert torch.equal(sum(share * part for share, part in enumerate(masks))[mask], owners), "contiguous runs in row order"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 6), st.integers(0, 7))
def test_whole_rows_are_dealt_once(sizes, num_shares, turn):
    parts = deal_rows(torch.tensor(sizes), num_shares, turn)
    assert torch.equal(sum(part.long() for part in parts), torch.ones(len(sizes), dtype=torch.int64))
    most = max(sum(size for size, mine in zip(sizes, part.tolist()) if mine) for part in parts)
    assert most <= sum(sizes) / num_shares + max(sizes), "as equal as whole rows allow"


def test_one_row_goes_round_the_stages():
    owners = [[part.tolist() for part in deal_rows(torch.tensor([7]), 3, turn)].index([True]) for turn in range(6)]
    assert sorted(owners[:3]) == [0, 1, 2] and owners[:3] == owners[3:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["tokens", "rows"]))
def test_shares_look_where_the_whole_head_looks(num_rows, num_tokens, num_shares, seed, deals):
    rows = batch(num_rows, num_tokens, seed)
    for head in (LogprobHead(1 << 20, mask_field="loss_mask", deals=deals), ValueHead(mask_field="loss_mask", deals=deals)):
        shares = head.deal(rows, rows, num_shares, turn=seed)
        targets = torch.cat([share.targets for share in shares])
        expected = rows.loss_mask.clone()
        expected[:, 0] = False  # nothing predicts the first token
        assert sorted(targets.tolist()) == expected.flatten().nonzero().squeeze(1).tolist()
        for share in shares:
            row, token = share.targets // num_tokens, share.targets % num_tokens
            assert torch.equal(share.positions, (token - 1) * num_rows + row), "hidden states are [S, B]"
            assert torch.equal(share.rows.loss_mask.flatten().nonzero().squeeze(1), share.targets)
            assert torch.equal(share.rows.token_ids, rows.token_ids)


def test_pairs_stay_together():
    ids = torch.arange(1, 31).view(6, 5)
    lengths = torch.tensor([5, 2, 3, 4, 1, 5])
    pairs = PreferenceBatch(ids[:3], lengths[:3], ids[3:], lengths[3:])
    shares = ScoreHead().deal(pairs, pairs.sequences(), 2, turn=0)
    assert sorted(torch.cat([share.targets for share in shares]).tolist()) == list(range(6))
    for share in shares:
        mine = (share.rows.chosen_lengths > 0).nonzero().squeeze(1)
        assert torch.equal(mine, (share.rows.rejected_lengths > 0).nonzero().squeeze(1))
        assert torch.equal(share.targets, torch.cat([mine, mine + 3]))
        assert torch.equal(share.positions, (lengths[share.targets] - 1) * 6 + share.targets)
