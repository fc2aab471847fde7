"""Digests of weight slices: what they see, what they cost, and who is named."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.bridge import verify
from megarl.bridge.plan import Op
from megarl.bridge.verify import Digests, digest
from megarl.config import ParallelConfig
from megarl.errors import RolloutError
from megarl.parallel import groups

LARGE = (700, 300)  # several blocks


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setitem(verify.BLOCK_WORDS, "cpu", 1 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 7), (1, 3, 41), LARGE])
def test_one_changed_bit_changes_the_digest(blocks, shape, dtype):
    values = torch.randn(shape).to(dtype)
    before = digest(values)
    for position in {0, values.numel() // 2, values.numel() - 1}:
        for bit in (0, 7, 14):
            flipped = values.clone()
            flipped.view(-1).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[position] ^= 1 << bit
            assert digest(flipped) != before
    assert digest(values) == before
    assert digest(-values) != before  # every sign at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_counts_and_strides_do_not(blocks, dtype):
    values = torch.randn(LARGE).to(dtype)
    assert digest(values) == digest(values.t().contiguous().t())
    columns = values[:, 17:120]
    assert digest(columns) == digest(columns.contiguous())
    assert digest(values) != digest(values.t())
    for first, second in (((0, 0), (0, 1)), ((0, 0), (699, 299)), ((5, 0), (350, 0))):
        swapped = values.clone()
        swapped[first], swapped[second] = values[second], values[first]
        assert digest(swapped) != digest(values)
    rows = values.clone()
    rows[[3, 400]] = values[[400, 3]]
    assert digest(rows) != digest(values)
    assert digest(torch.zeros(4, dtype=dtype)) != digest(torch.zeros(5, dtype=dtype))


def test_a_cast_on_the_way_is_the_cast_of_all(blocks):
    values = torch.randn(LARGE)
    assert digest(values[:, :33], torch.bfloat16) == digest(values[:, :33].bfloat16().contiguous()) != digest(values[:, :33])


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes anew."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {argument.untyped_storage()._cdata for argument in args if isinstance(argument, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("take", [lambda t: t, lambda t: t[:, 1000:3000], lambda t: t.t()], ids=["whole", "columns", "transposed"])
def test_memory_is_bounded_however_large_the_slice(take):
    tensor = take(torch.zeros(4096, 4096, dtype=torch.bfloat16))
    digest(torch.zeros(8))  # the table of factors is made once
    with Largest() as largest:
        digest(tensor)
    assert 0 < largest.num_bytes <= 8 * verify.BLOCK_WORDS["cpu"]


def test_whoever_differs_is_named():
    group = groups.group(groups.initialize(ParallelConfig(), seed=0), "world")
    ops = [Op(f"layer.{i}.weight", ((8 * i, 4), (0, 6)), 0, i, 0, i) for i in range(12)]
    values = [torch.randn(4, 6) for _ in ops]

    def compare(changed: set[int]) -> None:
        digests = Digests(ops, 0, torch.device("cpu"))
        for index, (op, value) in enumerate(zip(ops, values)):
            digests.sent(op, value, torch.float32)
            digests.arrived(op, value.flip(0) if index in changed else value)
        digests.compare(group)

    try:
        compare(set())
        with pytest.raises(RolloutError, match=r"^1 of 12 .* altered: layer.3.weight \[24:28, 0:6\] from rank 0 to rank 0$"):
            compare({3})
        with pytest.raises(RolloutError, match="^10 of 12 ") as caught:
            compare(set(range(10)))
        assert str(caught.value).count("from rank") == verify.NAMED
    finally:
        groups.shutdown()
