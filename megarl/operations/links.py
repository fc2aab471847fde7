"""Bandwidth between pairs of hosts, and which of them are slow. Part of `preflight`."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megarl.parallel import collectives, device

PAIR_BYTES, SMALL_BYTES = 4 << 20, 1 << 16
ONCE_S, NEVER_S = 1.0, 5.0  # a link that needs so long for a large message gets one of them, or none
MOST_ROUNDS = 8
TIMES_AGAIN = 2
SLOW = 3.0  # times slower than the better pairs

Pair = tuple[int, int]  # places in the list of hosts


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` players once, in rounds in which nobody plays twice (the circle method)."""
    players = [*range(count), *([-1] if count % 2 else [])]
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        matches = zip(players[:half], reversed(players[half:]))
        found.append([(min(a, b), max(a, b)) for a, b in matches if -1 not in (a, b)])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def measure_pairs(leaders: Sequence[int], hosts: Sequence[str], group: dist.ProcessGroup, deadline: float) -> list[tuple[str, str, float]]:
    """Bandwidth between hosts, as many rounds of pairs as fit before the deadline. Every rank calls it.

    Pairs that were slow are measured again, alone: a process of another user, or a packet that was lost, is no bad link.
    """
    best: dict[Pair, float] = {}
    for matches in rounds(len(leaders))[: MOST_ROUNDS if device.is_cuda() else None]:  # NCCL makes buffers for each pair
        best |= _play(matches, leaders, group)
        if any(collectives.gather_json(time.monotonic() > deadline, group)):
            break
    best = _gathered(best, group)
    for _ in range(TIMES_AGAIN):
        slow = slow_pairs(best)
        again = _gathered(_play(slow, leaders, group, deadline), group) if slow else {}
        best |= {pair: max(bandwidth, best[pair]) for pair, bandwidth in again.items()}
    return sorted((hosts[leaders[a]], hosts[leaders[b]], bandwidth) for (a, b), bandwidth in best.items())


def slow_pairs(bandwidths: Mapping[Any, float]) -> list:
    """The pairs that are far slower than most. Fewer than three cannot be compared."""
    if len(bandwidths) < 3:
        return []
    return sorted(pair for pair, bandwidth in bandwidths.items() if bandwidth < usual(bandwidths.values()) / SLOW)


def usual(bandwidths: Iterable[float]) -> float:
    """Of the better ones, not the middle: one bad host of three makes two slow pairs of three."""
    fastest_first = sorted(bandwidths, reverse=True)
    return fastest_first[len(fastest_first) // 4]


def _play(matches: Sequence[Pair], leaders: Sequence[int], group: dist.ProcessGroup, deadline: float = math.inf) -> dict[Pair, float]:
    """Bytes a second of the pairs in which this rank is the first; after the deadline none begins."""
    rank, found = dist.get_rank(group), {}
    for a, b in matches:
        if rank in (leaders[a], leaders[b]):
            other = leaders[b] if rank == leaders[a] else leaders[a]
            is_first = rank < other
            if not _told(int(time.monotonic() < deadline), other, is_first, group):
                continue
            bandwidth = _bandwidth(other, is_first, group)
            if is_first:
                found[a, b] = bandwidth
    return found


def _gathered(found: Mapping[Pair, float], group: dist.ProcessGroup) -> dict[Pair, float]:
    """What all ranks have found. Every rank calls it."""
    parts = collectives.gather_json([[a, b, bandwidth] for (a, b), bandwidth in found.items()], group)
    return {(a, b): bandwidth for part in parts for a, b, bandwidth in part}


def _bandwidth(other: int, is_first: bool, group: dist.ProcessGroup) -> float:
    """Bytes a second to and from another rank, the best of three, fewer where one takes long. A first message made the connection."""
    small = min(_exchange(SMALL_BYTES, other, is_first, group) for _ in range(3))
    expected = small * PAIR_BYTES / SMALL_BYTES
    count = _told(3 if expected < ONCE_S else 1 if expected < NEVER_S else 0, other, is_first, group)
    if count == 0:
        return 2 * SMALL_BYTES / small
    return 2 * PAIR_BYTES / max(min(_exchange(PAIR_BYTES, other, is_first, group) for _ in range(count)), 1e-9)


def _exchange(num_bytes: int, other: int, is_first: bool, group: dist.ProcessGroup) -> float:
    """Seconds for so many bytes there and back."""
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device.device())
    began = time.monotonic()
    steps = [partial(dist.send, tensor, other, group=group), partial(dist.recv, tensor, other, group=group)]
    for step in steps if is_first else reversed(steps):
        step()
    device.synchronize()
    return time.monotonic() - began


def _told(count: int, other: int, is_first: bool, group: dist.ProcessGroup) -> int:
    """The `count` of the first of two ranks, on both."""
    tensor = torch.tensor([count], dtype=torch.uint8, device=device.device())
    if is_first:
        dist.send(tensor, other, group=group)
    else:
        dist.recv(tensor, other, group=group)
    return int(tensor.item())


def judge_pairs(pairs: Sequence[tuple[str, str, float]]) -> tuple[list[tuple[str, str]], list[str]]:
    """(hosts that are slow to most others, warnings about single slow pairs). Pure. Fewer than three pairs cannot be compared."""
    bandwidths = {(a, b): bandwidth for a, b, bandwidth in pairs}
    slow = [(a, b, bandwidths[a, b]) for a, b in slow_pairs(bandwidths)]
    if not slow:
        return [], []
    normal = usual(bandwidths.values())
    faults = []
    for name in sorted({name for a, b, _ in pairs for name in (a, b)}):
        own, bad = (sum(name in (a, b) for a, b, _ in some) for some in (pairs, slow))
        if bad > own / 2 and own > 1:
            worst = min(bandwidth for a, b, bandwidth in slow if name in (a, b))
            reason = f"its link is slow to {bad} of {own} hosts: {worst / 1e6:.0f} MB/s, others have {normal / 1e6:.0f} MB/s"
            faults.append((name, reason))
    guilty = {name for name, _ in faults}
    warnings = [
        f"the link between {a} and {b} is slow: {bandwidth / 1e6:.0f} MB/s, others have {normal / 1e6:.0f} MB/s"
        for a, b, bandwidth in slow
        if a not in guilty and b not in guilty
    ]
    return faults, warnings
