import pytest
import torch

from megarl.config import ParallelConfig
from megarl.errors import ConfigError, DataError
from megarl.models.vocabulary import VocabularyShard, vocabulary_stats
from megarl.parallel import groups
from megarl.parallel.collectives import (
    agree,
    broadcast,
    broadcast_json,
    exchange_rows,
    gather_distinct_json,
    gather_json,
    gather_rows,
    sum_over,
)
from tests.ranks import run_ranks


def exchanges(rank, world_size):
    layout = groups.initialize(ParallelConfig(), seed=0)
    world = groups.group(layout, "world")
    ones = torch.ones(2)
    assert sum_over(ones * (rank + 1), world).tolist() == [6.0, 6.0]
    assert ones.tolist() == [1.0, 1.0], "the input is not changed"
    assert broadcast(torch.tensor([rank]), 1, world).item() == 1

    assert gather_json({"rank": rank, "text": "é" * 50 * rank}, world) == [{"rank": r, "text": "é" * 50 * r} for r in range(3)]
    first, second, third = gather_distinct_json(["same", "other", "same"][rank] * 9, world)
    assert (first, second) == ("same" * 9, "other" * 9) and third is first
    assert broadcast_json({"from": rank} if rank == 2 else None, 2, world) == {"from": 2}
    assert gather_rows(torch.full((rank, 2), rank), world).tolist() == [[1, 1], [2, 2], [2, 2]]
    assert gather_rows(torch.zeros(0, 2), world).shape == (0, 2)

    # rank r holds r + 1 rows named 10 r + position; row p goes to rank (r + p) % 3
    names = torch.arange(rank + 1) + 10 * rank
    tensors = {"name": names, "mask": names[:, None].repeat(1, 3) % 2 == 0, "half": names[:, None, None].to(torch.bfloat16)}
    got = exchange_rows(tensors, (rank + torch.arange(rank + 1)) % 3, world)
    expected = torch.tensor({0: [0, 21], 1: [10, 22], 2: [11, 20]}[rank])
    assert torch.equal(got["name"], expected)
    assert torch.equal(got["mask"], expected[:, None].repeat(1, 3) % 2 == 0) and got["mask"].dtype == torch.bool
    assert torch.equal(got["half"], expected[:, None, None].to(torch.bfloat16))
    assert list(got) == list(tensors)

    # everything to rank 1, two rows swapped in place: position order is kept
    got = exchange_rows({"name": names}, torch.ones(rank + 1, dtype=torch.int64), world)
    assert got["name"].tolist() == ([0, 10, 11, 20, 21, 22] if rank == 1 else [])

    agree(None, world)
    with pytest.raises(DataError, match=r"file a.jsonl line 3 is empty \(rank 1\)"):
        agree(None if rank == 0 else [None, DataError("file a.jsonl line 3 is empty"), ConfigError("other")][rank], world)
    return check_vocabulary(rank, world)


def check_vocabulary(rank, world):
    """The vocabulary in three parts of 16 columns with 20 real ones: the last rank holds padding only."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(48, 8, generator=generator)
    targets, coefs = torch.randint(0, 20, (9,), generator=generator), torch.randn(2, 9, generator=generator)
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    barred, ends = targets % 2 == 0, (1, 17)  # on two ranks
    whole = vocabulary_stats(whole_hidden, whole_weight, targets, VocabularyShard(0, 20, 0.8, 4, barred_ids=ends), True, barred)
    (torch.stack(whole) * coefs).sum().backward()
    hidden.requires_grad_()
    part = weight[16 * rank : 16 * (rank + 1)].clone().requires_grad_()
    found = vocabulary_stats(hidden, part, targets, VocabularyShard(16 * rank, 20, 0.8, 4, world, barred_ids=ends), True, barred)
    (torch.stack(found) * coefs).sum().backward()
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(part.grad, whole_weight.grad[16 * rank : 16 * (rank + 1)])
    torch.testing.assert_close(sum_over(hidden.grad, world), whole_hidden.grad)
    return "checked"


def test_exchanges_and_the_split_vocabulary():
    assert run_ranks(exchanges, 3) == ["checked"] * 3


def test_a_single_rank_needs_no_group():
    class Alone:
        def size(self):
            return 1

    tensors = {"name": torch.tensor([3, 4])}
    assert exchange_rows(tensors, torch.tensor([0, 0]), Alone())["name"].tolist() == [3, 4]
    assert gather_json({"a": 1}, Alone()) == [{"a": 1}]
    with pytest.raises(ConfigError, match="found"):
        agree(ConfigError("found"), Alone())
