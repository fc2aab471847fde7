"""Run a function on N gloo ranks of this machine: spawned processes, a file rendezvous, the traceback of the rank that failed.

    def check(rank, world_size, width):    # at module level, so that a spawned process can import it
        layout = groups.initialize(ParallelConfig(tensor=2), seed=0)
        ...
        return {"loss": 1.5}

    results = run_ranks(check, 4, 64)                   # results[rank]

torch.distributed is started before the function is called. Start-up costs seconds, so check several things in one call:
`groups.initialize` may be called again with another layout.
"""

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 120


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 300, environment: dict[str, str] | None = None) -> list:
    """Call `function(rank, world_size, *args)` on every rank; returns what each returned, in rank order.

    Returned values cross a process boundary: numbers, strings, tensors, lists, tuples and dictionaries of them.
    Raises `AssertionError` with the traceback of the first rank that failed, or naming the ranks still busy after `timeout_s`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="megarl-ranks-") as folder:
        init_method = f"file://{Path(folder) / 'rendezvous'}"
        ranks, replies = [], {}
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(function, rank, world_size, init_method, args, sender))
            with _environment(_torchrun_variables(rank, world_size) | (environment or {})):
                process.start()
            sender.close()
            ranks.append(process)
            replies[receiver] = rank
        try:
            return _collect(replies, world_size, ranks, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def run_all(functions: list[tuple[Callable, tuple]], world_size: int, timeout_s: float = 300) -> list[list]:
    """`run_ranks` for several functions in one group of ranks; each item is (function, its extra arguments)."""
    results = run_ranks(_in_turn, world_size, functions, timeout_s=timeout_s)
    return [[rank_results[index] for rank_results in results] for index in range(len(functions))]


def _in_turn(rank: int, world_size: int, functions: list[tuple[Callable, tuple]]) -> list:
    return [function(rank, world_size, *args) for function, args in functions]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The environment a process is started with: it must hold before that process imports torch."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _torchrun_variables(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _serve(function: Callable, rank: int, world_size: int, init_method: str, args: tuple, sender) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        )
        sender.send(("done", _portable(function(rank, world_size, *args))))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()
        for child in multiprocessing.active_children():  # Megatron's checkpoint writer starts a server that would outlive the rank
            child.terminate()
        # A rank that failed leaves collectives of the others open; waiting for them in destructors would hang.
        os._exit(0)


def _portable(value: Any) -> Any:
    """`value` with every tensor copied, so that no shared-memory file outlives the sender."""
    import torch

    if isinstance(value, torch.Tensor):
        return _Tensor(value.detach().cpu())
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_portable(item) for item in value)
    return value


class _Tensor:
    """A tensor as bytes."""

    def __init__(self, tensor):
        import torch

        self.dtype, self.shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        self.data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def tensor(self):
        import torch

        dtype = getattr(torch, self.dtype)
        values = torch.frombuffer(bytearray(self.data), dtype=dtype) if self.data else torch.empty(0, dtype=dtype)
        return values.reshape(self.shape)


def _unpack(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpack(item) for item in value)
    return value


def _collect(replies: dict, world_size: int, ranks: list, timeout_s: float) -> list:
    results, deadline = {}, time.monotonic() + timeout_s
    while replies:
        ready = wait(list(replies), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(replies.values())} of {world_size} still busy after {timeout_s} s")
        for receiver in ready:
            rank = replies.pop(receiver)
            try:
                status, value = receiver.recv()
            except EOFError:
                ranks[rank].join()
                raise AssertionError(f"rank {rank} of {world_size} died with exit code {ranks[rank].exitcode}") from None
            if status == "failed":
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
            results[rank] = _unpack(value)
    return [results[rank] for rank in range(world_size)]
