"""Looks at a job's nodes before any model is loaded: what is wrong with one is said in seconds, by name, and not by a timeout in an hour.

Every rank calls `preflight`. A host that cannot work is written to `bad_nodes` in the run's folder, one name a line, so that whoever starts
the run again can leave it out; `preflight.json` holds all measurements. One rank a host speaks for it.
"""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.errors import ConfigError, SetupError
from megarl.operations import host
from megarl.operations.attempts import BAD_HOSTS_FILE, bad_hosts
from megarl.parallel import collectives, device

BUDGET_S = 15.0  # for the pairs of hosts: as many rounds as fit
PAIR_BYTES, REDUCE_BYTES = 4 << 20, 1 << 20
CLOCK_S = 2.0  # between a host and the middle of all
MOST_ROUNDS = 8
SLOW = 3.0  # times slower than the better pairs
LEAST_SHARED, LEAST_MEMORY = 256 << 20, 1 << 30
FREE_SHARE = 0.8  # of a GPU's memory
REPORT = "preflight.json"
NODE = "SLURMD_NODENAME"  # what Slurm calls this host; its own name may be longer
WISH = "MEGARL_PREFLIGHT"


@dataclass(frozen=True)
class Findings:
    """What was measured. `faults` (host, reason) keep the run from starting; `warnings` do not."""

    hosts: tuple[str, ...]
    seconds: float
    clocks_s: Mapping[str, float]  # ahead of the middle of all
    all_reduce_ms: float
    pairs: tuple[tuple[str, str, float], ...]  # bytes a second
    faults: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def is_wanted() -> bool:
    """Whether this start looks at its nodes first: MEGARL_PREFLIGHT=on or off says so, else when there are several."""
    wish = os.environ.get(WISH) or "auto"
    if wish not in ("auto", "on", "off"):
        raise ConfigError(f"{WISH} is {wish!r}; expected auto, on or off")
    return wish == "on" or (wish == "auto" and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1)


def preflight(run: Path, name: str | None = None, own_faults: Callable[[Path], list[str]] | None = None) -> Findings:
    """Examine all hosts of the world. Every rank calls it; raises `SetupError` on all of them, naming the bad hosts.

    Args: `name` of this host and `own_faults` of it, for rehearsals.
    """
    group = dist.new_group()  # its connections end with it
    try:
        found = _examine(run, name or os.environ.get(NODE) or socket.gethostname(), own_faults or faults_of_this_host, group)
    finally:
        dist.destroy_process_group(group)
    _conclude(run, found, dist.get_rank())
    return found


def _examine(run: Path, name: str, own_faults: Callable[[Path], list[str]], group: dist.ProcessGroup) -> Findings:
    began = time.monotonic()
    hosts = collectives.gather_json(name, group)
    first = {host_name: rank for rank, host_name in reversed(list(enumerate(hosts)))}
    is_speaker, leaders = first[name] == dist.get_rank(group), sorted(first.values())
    faults = [(name, fault) for fault in own_faults(run)] if is_speaker else []
    _probe(run, name).touch() if is_speaker and not faults else None
    clocks = _clocks(hosts, group)
    if is_speaker and not faults:
        faults += _unseen(run, name, [hosts[rank] for rank in leaders])
    milliseconds = _time_all_reduce(group)
    pairs = _pairs(leaders, hosts, group, began + BUDGET_S)
    collectives.gather_json(None, group)  # everyone has looked at the probes
    if is_speaker:
        _probe(run, name).unlink(missing_ok=True)
    faults = [tuple(fault) for part in collectives.gather_json(faults, group) for fault in part]
    faults += [
        (host_name, f"its clock is {ahead:+.1f} s from the middle of all hosts")
        for host_name, ahead in clocks.items()
        if abs(ahead) > CLOCK_S
    ]
    slow, warnings = judge_pairs(pairs)
    faults += slow
    return Findings(tuple(sorted(first)), time.monotonic() - began, clocks, milliseconds, tuple(pairs), tuple(faults), tuple(warnings))


def faults_of_this_host(run: Path) -> list[str]:
    """What would keep ranks of this host from working."""
    found = []
    try:
        run.mkdir(parents=True, exist_ok=True)
        host.time_of_write(run)
    except OSError as error:
        found.append(f"{run} cannot be written there: {error.strerror}")
    if (free := host.free_bytes(Path("/dev/shm"))) < LEAST_SHARED:
        found.append(f"only {free >> 20} MiB of shared memory are free, expected {LEAST_SHARED >> 20}")
    if (free := host.free_memory()) < LEAST_MEMORY:
        found.append(f"only {free >> 20} MiB of memory are free, expected {LEAST_MEMORY >> 20}")
    if device.is_cuda():
        found += _gpu_faults()
    return found


def _gpu_faults() -> list[str]:
    found = [f"GPU {gpu.index} has {gpu.ecc_errors} uncorrected memory errors" for gpu in host.gpus() if gpu.ecc_errors]
    expected = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for index in range(min(expected, torch.cuda.device_count())):
        free, total = torch.cuda.mem_get_info(index)
        if free < FREE_SHARE * total:
            found.append(f"only {free >> 30} of {total >> 30} GiB of GPU {index} are free: another process uses it")
    return found


def _probe(run: Path, name: str) -> Path:
    return run / f".preflight-{name}"


def _unseen(run: Path, name: str, others: Sequence[str]) -> list[tuple[str, str]]:
    """Hosts whose file this one cannot see: the folder is not shared."""
    os.listdir(run)  # network file systems look again when a directory is read
    missing = [other for other in others if not _probe(run, other).exists()]
    if len(missing) < max(2, len(others) // 2):  # those whose own file is missing have a fault of their own
        return []
    return [(name, f"it does not see what {', '.join(missing[:3])} wrote to {run}: the folder must be on a shared file system")]


def _clocks(hosts: Sequence[str], group: dist.ProcessGroup) -> dict[str, float]:
    """Seconds each host's clock is ahead of the middle of all, to within a collective call."""
    collectives.gather_json(None, group)
    times = collectives.gather_json(time.time(), group)
    middle = statistics.median(times)
    return {name: max((when - middle for other, when in zip(hosts, times) if other == name), key=abs) for name in sorted(set(hosts))}


def _time_all_reduce(group: dist.ProcessGroup) -> float:
    """Milliseconds of one small all-reduce, whose sum is checked. Raises `SetupError` where it is wrong."""
    size = group.size()
    for _ in range(2):  # the first one makes connections
        tensor = torch.full((REDUCE_BYTES // 4,), 1.0, device=device.device())
        began = time.monotonic()
        dist.all_reduce(tensor, group=group)
        device.synchronize()
        seconds = time.monotonic() - began
    is_right = bool((tensor == size).all())
    if not all(collectives.gather_json(is_right, group)):
        raise SetupError(
            f"an all-reduce over {size} ranks gave {float(tensor.min())} to {float(tensor.max())}; expected {size}: broken network"
        )
    return seconds * 1e3


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


def _pairs(leaders: Sequence[int], hosts: Sequence[str], group: dist.ProcessGroup, deadline: float) -> list[tuple[str, str, float]]:
    """Bandwidth between hosts, as many rounds of pairs as fit before the deadline. Every rank calls it."""
    rank, found = dist.get_rank(group), []
    for matches in rounds(len(leaders))[: MOST_ROUNDS if device.is_cuda() else None]:  # NCCL makes buffers for each pair
        for a, b in matches:
            if rank in (leaders[a], leaders[b]):
                other = leaders[b] if rank == leaders[a] else leaders[a]
                bandwidth = _bandwidth(other, rank < other, group)
                if rank < other:
                    found.append((hosts[leaders[a]], hosts[leaders[b]], bandwidth))
        if any(collectives.gather_json(time.monotonic() > deadline, group)):
            break
    return sorted(tuple(pair) for part in collectives.gather_json(found, group) for pair in part)


def _bandwidth(other: int, is_first: bool, group: dist.ProcessGroup) -> float:
    """Bytes a second to and from another rank, the best of three; a first message makes the connection."""
    seconds = []
    for size in (1, PAIR_BYTES, PAIR_BYTES, PAIR_BYTES):
        tensor = torch.zeros(size, dtype=torch.uint8, device=device.device())
        began = time.monotonic()
        steps = [partial(dist.send, tensor, other, group=group), partial(dist.recv, tensor, other, group=group)]
        for step in steps if is_first else reversed(steps):
            step()
        device.synchronize()
        seconds.append(time.monotonic() - began)
    return 2 * PAIR_BYTES / max(min(seconds[1:]), 1e-9)


def judge_pairs(pairs: Sequence[tuple[str, str, float]]) -> tuple[list[tuple[str, str]], list[str]]:
    """(hosts that are slow to most others, warnings about single slow pairs). Pure. Fewer than three pairs cannot be compared."""
    if len(pairs) < 3:
        return [], []
    fastest_first = sorted((bandwidth for _, _, bandwidth in pairs), reverse=True)
    usual = fastest_first[len(pairs) // 4]  # not the middle: one bad host of three makes two slow pairs of three
    slow = [(a, b, bandwidth) for a, b, bandwidth in pairs if bandwidth < usual / SLOW]
    faults = []
    for name in sorted({name for a, b, _ in pairs for name in (a, b)}):
        own, bad = (sum(name in (a, b) for a, b, _ in some) for some in (pairs, slow))
        if bad > own / 2 and own > 1:
            worst = min(bandwidth for a, b, bandwidth in slow if name in (a, b))
            faults.append(
                (
                    name,
                    f"its link is slow to {bad} of {own} hosts: {worst / 1e6:.0f} MB/s, others have {usual / 1e6:.0f} MB/s",
                )
            )
    guilty = {name for name, _ in faults}
    warnings = [
        f"the link between {a} and {b} is slow: {bandwidth / 1e6:.0f} MB/s, others have {usual / 1e6:.0f} MB/s"
        for a, b, bandwidth in slow
        if a not in guilty and b not in guilty
    ]
    return faults, warnings


def _conclude(run: Path, found: Findings, rank: int) -> None:
    """Rank 0 writes everything down and says what is wrong; all ranks stop for a fault."""
    bad = sorted({name for name, _ in found.faults})
    if rank == 0:
        for warning in found.warnings:
            print(f"megarl: warning: preflight: {warning}", file=sys.stderr)
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / REPORT).write_text(json.dumps(found.to_json(), indent=1) + "\n")
            if bad and len(bad) < len(found.hosts):  # leaving all of them out helps nobody
                (run / BAD_HOSTS_FILE).write_text("".join(f"{name}\n" for name in sorted({*bad_hosts(run), *bad})))
        except OSError:  # perhaps the very fault that is to be told
            pass
    if bad:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.faults)
        raise SetupError(
            f"{len(bad)} of {len(found.hosts)} hosts cannot take part: {reasons}; leave them out ({run / BAD_HOSTS_FILE} names them)"
        )
