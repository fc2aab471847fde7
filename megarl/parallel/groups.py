"""Process groups and Megatron's parallel state from a layout. The torchrun environment is read here and in `torchrun`, nowhere else."""

import gc
import os
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import numpy
import torch
import torch.distributed as dist

from megarl.config import ParallelConfig
from megarl.errors import LayoutError
from megarl.parallel import device
from megarl.parallel.layout import EXPERT_TENSOR_PARALLEL_SIZE, ParallelLayout
from megarl.parallel.torchrun import rank_from_environment
from megarl.parallel.wires import KINDS, Kind, Wire, connect

device.prepare()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (the host is prepared first)

Axis = Literal["tp", "pp", "cp", "dp", "ep", "world"]

_wires: dict[Kind, Wire] = {}  # of the layout that `initialize` set, on hosts with GPUs


def initialize(parallel: ParallelConfig, seed: int) -> ParallelLayout:
    """Start torch.distributed (unless started), Megatron's parallel state and the random states. Every rank calls it.

    The rendezvous is torchrun's, or none for a world of one; a default process group that exists already is kept. A second
    call in one process replaces the layout and ends the groups of the one before: models built under it can compute no more.
    Raises `LayoutError` when the layout does not fit the world.
    """
    rank, world_size, local_rank = rank_from_environment()
    layout = ParallelLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        world_size=world_size,
        rank=rank,
        context=parallel.context,
        expert=parallel.expert,
    )
    if device.is_cuda():
        if local_rank >= torch.cuda.device_count():
            raise LayoutError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; start at most that many ranks a host"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        _start_torch_distributed(rank, world_size, parallel.timeout_s)
    if dist.get_world_size() != world_size:
        raise LayoutError(f"torch.distributed holds {dist.get_world_size()} ranks; expected WORLD_SIZE {world_size}")
    if parallel_state.model_parallel_is_initialized():
        _leave_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
        distributed_timeout_minutes=parallel.timeout_s / 60,
        create_gloo_process_groups=False,  # the default backend carries CPU tensors already
    )
    _lay_wires(layout)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return layout


def _leave_layout() -> None:
    """Ends the groups of the layout that `initialize` set. Every rank of the world calls it.

    Megatron only forgets its groups. torch keeps them, and with gloo each keeps a thread that wakes a hundred times a second, sockets
    and two workers: after thirty layouts four ranks did little but wake.
    """
    ended = [made for made in parallel_state._global_process_group_list or () if made is not None]  # None: the default group
    ended += [wire.group for wire in _wires.values()]
    dist.barrier()  # nobody still waits for a message in one of them
    parallel_state.destroy_model_parallel()
    _wires.clear()
    while ended:
        dist.destroy_process_group(ended.pop())
    gc.collect()  # a group's threads end with the last reference to it, and models hold theirs in cycles


def _start_torch_distributed(rank: int, world_size: int, timeout_s: int) -> None:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if local_world_size == world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look the host name up, which need not resolve
    if not device.is_cuda():
        threads = os.environ.get("OMP_NUM_THREADS")
        torch.set_num_threads(int(threads) if threads else max(1, (os.cpu_count() or 1) // local_world_size))
    # Without a device_id NCCL communicators are made at their first use. With one, torch would split every later group off the default
    # communicator, a collective call that ranks enter unequally for vLLM's CPU groups: known to hang.
    arguments = {"backend": device.process_group_backend(), "timeout": timedelta(seconds=timeout_s)}
    if "MASTER_ADDR" not in os.environ:
        if world_size > 1:
            raise LayoutError(f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set; start the ranks with torchrun")
        arguments.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(**arguments)


def group(layout: ParallelLayout, axis: Axis) -> dist.ProcessGroup:
    """The process group of this rank along `axis`; its ranks are `layout.ranks_along(axis)`, in that order."""
    if axis == "world":
        return dist.group.WORLD
    found = {
        "tp": parallel_state.get_tensor_model_parallel_group,
        "pp": parallel_state.get_pipeline_model_parallel_group,
        "cp": parallel_state.get_context_parallel_group,
        "dp": parallel_state.get_data_parallel_group,
        "ep": parallel_state.get_expert_model_parallel_group,
    }[axis]()
    assert sorted(dist.get_process_group_ranks(found)) == sorted(layout.ranks_along(axis)), (axis, layout)
    return found


def wires(layout: ParallelLayout) -> dict[Kind, Wire]:
    """The wires between the pipeline stages of this rank's replica."""
    if not device.is_cuda():
        return {kind: Wire(group(layout, "pp"), tag=number) for number, kind in enumerate(KINDS, start=1)}
    return dict(_wires)


def _lay_wires(layout: ParallelLayout) -> None:
    """A process group for each kind of message: NCCL knows no tags. Every rank of the world calls it."""
    if device.is_cuda() and layout.pipeline > 1:
        partition = sorted({layout.at(rank).ranks_along("pp") for rank in range(layout.world_size)})
        _wires.update({kind: Wire(new_group_of(partition), tag=0) for kind in KINDS})
    if layout.pipeline > 1:
        connect(wires(layout), layout.ranks_along("pp"), layout.pp_rank)


def new_group_of(partition: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """A group for each set of ranks in `partition`; returns the one that holds this rank. Every rank of the world calls it."""
    rank, mine = dist.get_rank(), None
    for ranks in partition:
        created = dist.new_group(list(ranks))
        if rank in ranks:
            mine = created
    if mine is None:
        raise ValueError(f"rank {rank} is in no part of {partition}")
    return mine


def shutdown() -> None:
    """Leave Megatron's parallel state and torch.distributed. Every rank calls it; harmless when nothing was started."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _wires.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
