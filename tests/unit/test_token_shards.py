"""Dealing the head's work: shares partition it, are balanced, and keep rows and pairs together where asked."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.models.token_stats import LogprobHead, ScoreHead, ValueHead
from megarl.parallel.context import Holders, positions_of
from megarl.parallel.token_shards import gathered_by_owner, owners_of_rows, owners_of_tokens
from megarl.records import DemonstrationBatch, PreferenceBatch


def batch(num_rows: int, num_tokens: int, seed: int) -> DemonstrationBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, num_tokens + 1, (num_rows,), generator=generator)
    mask = (torch.rand(num_rows, num_tokens, generator=generator) < 0.6) & (torch.arange(num_tokens) < lengths[:, None])
    return DemonstrationBatch(torch.randint(1, 50, (num_rows, num_tokens), generator=generator), lengths, mask)


def holders(num_positions: int, width: int, own_rank: int = 0, num_ranks: int = 1) -> Holders:
    """As `context.holders` says it, found by asking every rank for its positions."""
    held = [positions_of(rank, num_ranks, num_positions).tolist() for rank in range(num_ranks)]
    where = [(rank, held[rank].index(p)) for p in range(num_positions) for rank in range(num_ranks) if p in held[rank]]
    found = [(rank, row * width + column) for rank, row in where for column in range(width)]
    return Holders(*torch.tensor(found).view(-1, 2).t(), num_ranks, own_rank)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 12), st.integers(1, 9), st.integers(0, 999))
def test_tokens_are_dealt_once_evenly_and_in_order(num_rows, num_tokens, num_shares, seed):
    """Also where there are fewer tokens than shares."""
    mask = batch(num_rows, num_tokens, seed).loss_mask
    owners = owners_of_tokens(mask, num_shares)[mask]
    assert torch.equal(owners, owners.sort().values), "contiguous runs in row order"
    sizes = torch.bincount(owners, minlength=num_shares)
    assert len(sizes) == num_shares and sizes.max() - sizes.min() <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 6), st.integers(0, 7))
def test_whole_rows_are_dealt_once(sizes, num_shares, turn):
    owners = owners_of_rows(torch.tensor(sizes), num_shares, turn)
    assert owners.shape == (len(sizes),) and owners.min() >= 0
    most = int(torch.bincount(owners, weights=torch.tensor(sizes), minlength=num_shares).max())
    assert most <= sum(sizes) / num_shares + max(sizes), "as equal as whole rows allow"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 3), max_size=30))
def test_entries_are_gathered_by_their_owner(owners):
    found = gathered_by_owner(torch.tensor(owners, dtype=torch.int64), 4)
    assert [part.tolist() for part in found] == [[i for i, owner in enumerate(owners) if owner == share] for share in range(4)]


def test_one_row_goes_round_the_stages():
    owners = [owners_of_rows(torch.tensor([7]), 3, turn).item() for turn in range(6)]
    assert sorted(owners[:3]) == [0, 1, 2] and owners[:3] == owners[3:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["tokens", "rows"]))
def test_shares_look_where_the_whole_head_looks(num_rows, num_tokens, num_shares, seed, deals):
    rows = batch(num_rows, num_tokens, seed)
    for head in (LogprobHead(1 << 20, mask_field="loss_mask", deals=deals), ValueHead(mask_field="loss_mask", deals=deals)):
        shares = head.deal(rows, rows, holders(num_tokens, num_rows), num_shares, turn=seed)
        targets = torch.cat([share.targets for share in shares])
        expected = rows.loss_mask.clone()
        expected[:, 0] = False  # nothing predicts the first token
        assert sorted(targets.tolist()) == expected.flatten().nonzero().squeeze(1).tolist()
        for share in shares:
            row, token = share.targets // num_tokens, share.targets % num_tokens
            assert torch.equal(share.positions, (token - 1) * num_rows + row), "hidden states are [S, B]"
            assert torch.equal(share.rows.loss_mask.flatten().nonzero().squeeze(1), share.targets)
            assert torch.equal(share.rows.token_ids, rows.token_ids)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["tokens", "rows"]))
def test_context_ranks_look_at_what_they_hold_of_a_share(num_rows, chunk, num_ranks, num_shares, seed, deals):
    """Every rank has the same shares, of which it takes its own part; dealt by tokens these parts are even."""
    num_tokens = chunk * 2 * num_ranks
    rows, head = batch(num_rows, num_tokens, seed), LogprobHead(1 << 20, mask_field="loss_mask", deals=deals)
    of_rank = [head.deal(rows, rows, holders(num_tokens, num_rows, own, num_ranks), num_shares, turn=seed) for own in range(num_ranks)]
    for own, shares in enumerate(of_rank):
        held = positions_of(own, num_ranks, num_tokens)
        for share, same in zip(shares, of_rank[0], strict=True):
            assert torch.equal(share.rows.loss_mask, same.rows.loss_mask)
            row, before = share.targets // num_tokens, share.targets % num_tokens - 1
            assert torch.equal(held[share.positions // num_rows], before) and torch.equal(share.positions % num_rows, row)
        sizes = [len(share.targets) for share in shares]
        assert deals == "rows" or max(sizes) - min(sizes) <= 1
    for number in range(num_shares):
        targets = torch.cat([shares[number].targets for shares in of_rank]).sort().values
        assert torch.equal(targets, of_rank[0][number].rows.loss_mask.flatten().nonzero().squeeze(1))


def test_pairs_stay_together():
    ids = torch.arange(1, 31).view(6, 5)
    lengths = torch.tensor([5, 2, 3, 4, 1, 5])
    pairs = PreferenceBatch(ids[:3], lengths[:3], ids[3:], lengths[3:], torch.zeros(3))
    shares = ScoreHead().deal(pairs, pairs.sequences(), holders(5, 6), 2, turn=0)
    assert sorted(torch.cat([share.targets for share in shares]).tolist()) == list(range(6))
    for share in shares:
        mine = (share.rows.chosen_lengths > 0).nonzero().squeeze(1)
        assert torch.equal(mine, (share.rows.rejected_lengths > 0).nonzero().squeeze(1))
        assert torch.equal(share.targets, torch.cat([mine, mine + 3]))
        assert torch.equal(share.positions, (lengths[share.targets] - 1) * 6 + share.targets)
