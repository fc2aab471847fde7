"""The exchanges between ranks on device tensors, over NCCL."""

import pytest

from tests.gpu.processes import run_on_devices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_exchanges(machine, num_ranks, tmp_path):
    machine.need(num_ranks)
    assert run_on_devices(exchange, num_ranks, tmp_path) == [{"backend": "gloo" if machine.is_rehearsal else "nccl"}] * num_ranks


def exchange() -> dict:
    import torch
    import torch.distributed as dist

    from megarl.config import ParallelConfig
    from megarl.errors import DataError
    from megarl.parallel import device, groups
    from megarl.parallel.collectives import agree, broadcast_json, exchange_rows, gather_json, gather_rows, sum_over

    layout = groups.initialize(ParallelConfig(), seed=0)
    rank, size, where, world = layout.rank, layout.world_size, device.device(), groups.group(layout, "world")
    pairs = groups.new_group_of([[2 * i, 2 * i + 1] for i in range(size // 2)])
    assert gather_json(rank, pairs) == [rank - rank % 2, rank - rank % 2 + 1]
    assert sum_over(torch.ones(2, dtype=torch.float64, device=where), world).tolist() == [size, size]
    assert gather_json({"rank": rank, "text": "é" * 50 * rank}, world) == [{"rank": r, "text": "é" * 50 * r} for r in range(size)]
    assert broadcast_json({"from": rank} if rank == 1 else None, 1, world) == {"from": 1}
    rows = gather_rows(torch.full((rank, 2), rank, device=where), world)
    assert rows.tolist() == [[r, r] for r in range(size) for _ in range(r)]
    names = torch.arange(rank + 1, device=where) + 10 * rank  # row p goes to rank (r + p) % size
    tensors = {"name": names, "mask": names[:, None].repeat(1, 3) % 2 == 0, "half": names[:, None].to(torch.bfloat16)}
    got = exchange_rows(tensors, (rank + torch.arange(rank + 1, device=where)) % size, world)
    expected = [10 * r + p for r in range(size) for p in range(r + 1) if (r + p) % size == rank]
    assert got["name"].tolist() == expected and got["name"].device == where
    assert got["mask"].tolist() == [[name % 2 == 0] * 3 for name in expected]
    assert got["half"].squeeze(1).tolist() == expected
    agree(None, world)
    try:
        agree(DataError("line 3 is empty") if rank == 1 else None, world)
    except DataError as error:
        assert str(error) == "line 3 is empty (rank 1)"
    else:
        raise AssertionError("nobody was told")
    return {"backend": dist.group.WORLD._get_backend(where).name().lower()}
