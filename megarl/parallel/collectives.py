"""The few named exchanges between ranks that the rest of megarl uses. Every function here is entered by all ranks of its group.

Objects travel as JSON and tensors as raw bytes, never as pickles. Groups are `torch.distributed` process groups; tensors lie on
the device of the group's backend.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import MegarlError, RolloutError, error_kinds
from megarl.parallel import device

Group = dist.ProcessGroup
Result = TypeVar("Result")


def meet(what: str, group: Group, timeout_s: float, key: str) -> None:
    """Returns when every rank of the default `group` has come to `what`, whose `key` is used once. Every rank of the group calls it.

    Raises `RolloutError` on the ranks that came, naming those that did not within `timeout_s`: a collective call would end with a timeout
    that names nobody, or meet another call of the missing rank and mix the two up.
    """
    rank, size = dist.get_rank(group), group.size()
    if size == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"megarl/meet/{key}"
    store.set(f"{key}/{rank}", "here")
    if store.add(f"{key}/count", 1) == size:
        store.set(f"{key}/all", "here")
    try:
        store.wait([f"{key}/all"], timedelta(seconds=timeout_s))
    except RuntimeError:  # torch's DistStoreError is one
        missing = [other for other in range(size) if not store.check([f"{key}/{other}"])]
        if missing:
            names = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
            raise RolloutError(
                f"rank {names} did not come to {what} within {timeout_s:g} s; the other ranks of {size} wait there"
            ) from None
        raise


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """The elementwise sum over the ranks of `group`, as a new tensor. Called by every rank of the group with equal shapes."""
    total = tensor.detach().clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def max_over(tensor: Tensor, group: Group) -> Tensor:
    """The largest of every rank's `tensor`, element by element, on every rank. Every rank of `group` calls it; the argument is kept."""
    result = tensor.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def broadcast(tensor: Tensor, source_rank: int, group: Group) -> Tensor:
    """Overwrites `tensor` with the one of global rank `source_rank` and returns it. Called by every rank of the group."""
    if group.size() > 1:
        dist.broadcast(tensor, src=source_rank, group=group)
    return tensor


def gather_json(value: Any, group: Group) -> list[Any]:
    """The JSON value of every rank of `group`, in rank order. Called by every rank of the group; values may differ in size."""
    encoded = json.dumps(value).encode()
    if group.size() == 1:
        return [json.loads(encoded)]
    rows = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device.device())
    parts, sizes = _gather_ragged(rows, group)
    return [json.loads(bytes(part[:size].cpu().numpy())) for part, size in zip(parts, sizes)]


def gather_distinct_json(value: Any, group: Group) -> list[Any]:
    """As `gather_json`, for large values that many ranks have in common: each travels once, and ranks with equal ones share one object.

    Called by every rank of the group. Memory grows with the number of distinct values, not with the number of ranks.
    """
    encoded = json.dumps(value).encode()
    if group.size() == 1:
        return [json.loads(encoded)]
    digest = torch.frombuffer(bytearray(hashlib.sha256(encoded).digest()), dtype=torch.uint8).to(device.device())
    digests = [bytes(other.cpu().numpy()) for other in _all_gather(digest, group)]
    first = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    values = {
        digest: broadcast_json(value, dist.get_global_rank(group, index), group)
        for digest, index in sorted(first.items(), key=lambda item: item[1])
    }
    return [values[digest] for digest in digests]


def broadcast_json(value: Any, source_rank: int, group: Group) -> Any:
    """The JSON value of global rank `source_rank`; the others' `value` is ignored. Called by every rank of the group."""
    if group.size() == 1:
        return json.loads(json.dumps(value))
    is_source = dist.get_rank() == source_rank
    encoded = bytearray(json.dumps(value).encode()) if is_source else bytearray()
    size = torch.tensor([len(encoded)], dtype=torch.int64, device=device.device())
    dist.broadcast(size, src=source_rank, group=group)
    content = torch.frombuffer(encoded, dtype=torch.uint8).to(size.device) if is_source else size.new_empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=source_rank, group=group)
    return json.loads(bytes(content.cpu().numpy()))


def gather_rows(tensor: Tensor, group: Group) -> Tensor:
    """The rows of every rank of `group`, in rank order: [sum of n, ...] from [n, ...].

    Called by every rank of the group; the number of rows may differ, the other axes and the dtype may not.
    """
    if group.size() == 1:
        return tensor.clone()
    parts, sizes = _gather_ragged(tensor, group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def exchange_rows(tensors: dict[str, Tensor], destination: Tensor, group: Group) -> dict[str, Tensor]:
    """Sends row i of every tensor to the group rank `destination[i]`; returns the rows sent to this rank.

    Called by every rank of the group with equal names, dtypes and row shapes; B may differ between ranks. Received rows are ordered
    by source rank, then by their position there. Shapes: tensors [B, ...], `destination` i64[B] in 0..group size - 1.
    """
    order = torch.argsort(destination, stable=True)
    if group.size() == 1:
        return {name: tensor[order] for name, tensor in tensors.items()}
    sent = torch.bincount(destination, minlength=group.size()).to(device.device())
    counts = torch.stack(_all_gather(sent, group))  # [source, destination]
    received = counts[:, dist.get_rank(group)].tolist()
    result = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        rows = _as_bytes(tensor[order].contiguous())
        incoming = rows.new_empty((sum(received), rows.shape[1]))
        dist.all_to_all_single(incoming, rows, received, sent.tolist(), group=group)
        result[name] = incoming.view(tensor.dtype).view(-1, *tensor.shape[1:])
    return {name: result[name] for name in tensors}


def agree(error: MegarlError | None, group: Group) -> None:
    """Raises on all ranks of `group` when any of them has an error: the first failing rank's, with its rank number.

    Called by every rank of the group; without it one rank would stop alone and the others wait for its next collective.
    """
    if group.size() == 1:
        if error is not None:
            raise error
        return
    messages = gather_json(None if error is None else [type(error).__name__, str(error)], group)
    for index, message in enumerate(messages):
        if message is not None:
            name, text = message
            kind = error_kinds().get(name, MegarlError)
            raise kind(f"{text} (rank {dist.get_global_rank(group, index)})")


def together(work: Callable[[], Result], group: Group) -> Result:
    """What `work()` returns on this rank; a `MegarlError` on any rank is raised on all of them. Called by every rank of the group.

    `work` must not communicate: a rank that fails in the middle would leave the others waiting.
    """
    result, error = None, None
    try:
        result = work()
    except MegarlError as failure:
        error = failure
    agree(error, group)
    return result


def _all_gather(tensor: Tensor, group: Group) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _gather_ragged(tensor: Tensor, group: Group) -> tuple[list[Tensor], list[int]]:
    """Every rank's rows padded to the longest, and how many of them are real."""
    count = torch.tensor([len(tensor)], dtype=torch.int64, device=device.device())
    sizes = torch.cat(_all_gather(count, group)).tolist()
    if max(sizes) == 0:
        return [tensor] * group.size(), sizes
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return _all_gather(padded, group), sizes


def _as_bytes(tensor: Tensor) -> Tensor:
    """Rows as raw bytes, u8[B, bytes of a row]: one exchange serves every dtype, bool included."""
    return tensor.view(len(tensor), torch.Size(tensor.shape[1:]).numel()).view(torch.uint8)
