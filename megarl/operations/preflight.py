"""Looks at a job's nodes before any model is loaded: what is wrong with one is said in seconds, by name, and not by a timeout in an hour.

Every rank calls `preflight`. A host that cannot work is written to `bad_nodes` in the run's folder, one name a line, so that whoever starts
the run again can leave it out; `preflight.json` holds all measurements. One rank a host speaks for it.
"""

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.errors import ConfigError, SetupError
from megarl.operations import host
from megarl.operations.attempts import BAD_HOSTS_FILE, bad_hosts
from megarl.operations.links import judge_pairs, measure_pairs
from megarl.parallel import collectives, device

BUDGET_S = 12.0  # for the pairs of hosts: as many rounds as fit
REDUCE_BYTES = 1 << 18
CLOCK_S = 2.0  # between a host and the middle of all
LEAST_SHARED, LEAST_MEMORY, LEAST_DISK = 256 << 20, 1 << 30, 256 << 20
FREE_SHARE = 0.8  # of a GPU's memory
REPORT = "preflight.json"
NODE = "SLURMD_NODENAME"  # what Slurm calls this host; its own name may be longer
SLURM_GPUS, HEAD_GPUS = "SLURM_GPUS_ON_NODE", "MEGARL_HOST_GPUS"
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


def count_gpus(run: Path) -> None:
    """Whether every rank of this host has a GPU, before any is used: without one it could not even join the others. Every rank calls it.

    Raises `SetupError` where Slurm, or the host that started the job, counts more GPUs than torch sees: this host is bad then. Ranks that
    are too many for any host are the user's mistake, which `groups.initialize` refuses.
    """
    found, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    promised = max(int(os.environ.get(variable) or 0) for variable in (SLURM_GPUS, HEAD_GPUS))
    if torch.version.cuda is None or found >= ranks or promised < ranks:
        return
    name = _own_name()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError), (run / BAD_HOSTS_FILE).open("a") as file:
            file.write(f"{name}\n")
    raise SetupError(f"{name} shows {found} GPUs, expected {promised}: see nvidia-smi there ({run / BAD_HOSTS_FILE} names it)")


def _own_name() -> str:
    return os.environ.get(NODE) or socket.gethostname()


def preflight(run: Path, name: str | None = None, own_faults: Callable[[Path], list[str]] | None = None) -> Findings:
    """Examine all hosts of the world. Every rank calls it; raises `SetupError` on all of them, naming the bad hosts.

    Args: `name` of this host and `own_faults` of it, for rehearsals.
    """
    group = dist.new_group()  # its connections end with it
    try:
        found = _examine(run, name or _own_name(), own_faults or faults_of_this_host, group)
    finally:
        dist.destroy_process_group(group)
    _conclude(run, found, dist.get_rank())
    return found


def _examine(run: Path, name: str, own_faults: Callable[[Path], list[str]], group: dist.ProcessGroup) -> Findings:
    began = time.monotonic()
    hosts = collectives.gather_json(name, group)
    first = {host_name: rank for rank, host_name in reversed(list(enumerate(hosts)))}
    is_speaker, leaders = first[name] == dist.get_rank(group), sorted(first.values())
    faults = [(name, fault) for fault in [*(own_faults(run) if is_speaker else ()), *faults_of_this_gpu()]]
    _probe(run, name).touch() if is_speaker and not faults else None
    clocks = _clocks(hosts, group)
    if is_speaker and not faults:
        faults += _unseen(run, name, [hosts[rank] for rank in leaders])
    milliseconds = _time_all_reduce(group)
    pairs = measure_pairs(leaders, hosts, group, began + BUDGET_S)
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
    for place in (run, Path(tempfile.gettempdir())):
        if (free := host.free_bytes(place)) < LEAST_DISK:
            found.append(f"only {free >> 20} MiB of the disk of {place} are free, expected {LEAST_DISK >> 20}")
    if device.is_cuda():
        found += [f"GPU {gpu.index} has {gpu.ecc_errors} uncorrected memory errors" for gpu in host.gpus() if gpu.ecc_errors]
    return found


def faults_of_this_gpu() -> list[str]:
    """What is wrong with this rank's GPU. Each rank looks at its own: looking at another one takes memory from it for good."""
    if not device.is_cuda():
        return []
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    if free >= FREE_SHARE * total:
        return []
    return [f"only {free >> 30} of {total >> 30} GiB of GPU {index} are free: another process uses it"]


def _probe(run: Path, name: str) -> Path:
    return run / f".preflight-{name}"


def _unseen(run: Path, name: str, others: Sequence[str]) -> list[tuple[str, str]]:
    """Hosts whose file this one cannot see: the folder is not shared."""
    seen = set(os.listdir(run))  # network file systems look again when a directory is read, and are asked once instead of once a host
    missing = [other for other in others if _probe(run, other).name not in seen]
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
    for num_bytes in (4, REDUCE_BYTES):  # the first one makes connections
        tensor = torch.full((num_bytes // 4,), 1.0, device=device.device())
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
