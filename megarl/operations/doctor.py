"""`megarl doctor`: what one host can do for a run, each finding with what to do about it. Seconds; reads much, changes nothing."""

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megarl.operations import host
from megarl.run_folder import describe_versions

GIB = 1 << 30
Status = Literal["ok", "warning", "fault", "absent"]
REQUIRED = ("torch", "megatron-core", "vllm", "transformers")
LEAST_DISK, LEAST_SHARED, LEAST_MEMORY, LEAST_FILES = 20 * GIB, 1 * GIB, 4 * GIB, 4096
BUSY_MIB = 1024  # of a GPU's memory in use before a run starts
CLOCK_S = 0.5


@dataclass(frozen=True)
class Check:
    """One finding. `absent` is a part that may be missing."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return {"status": self.status, "found": self.found, "advice": self.advice}


def examine(run: Path) -> list[Check]:
    """All checks of this host for a run that writes to `run`."""
    return [*packages(), *accelerators(), *clock(), *memory(), *disks(run), *writable(run), *network(), *tools()]


def packages() -> list[Check]:
    """Versions, and which optional parts are in use. Imports torch."""
    found = []
    for name, version in describe_versions().items():
        if version == "missing" and name in REQUIRED:
            found.append(Check(name, "fault", version, "run bash launch/install.sh"))
        elif version.startswith(("missing", "not installed")):
            found.append(Check(name, "absent", version))
        elif "not active" in version:
            found.append(Check(name, "warning", version, "it needs a CUDA device"))
        else:
            found.append(Check(name, "ok", version))
    return found


def accelerators() -> list[Check]:
    """GPUs, their memory, who else uses them, and memory errors."""
    import torch

    text, trouble = host.ask_gpus()
    gpus = host.parse_gpus(text)
    found = [
        Check("GPU", "warning", f"nvidia-smi says: {line.strip()}", "it is lost, unless MIG divides it")
        for line in text.splitlines()
        if line[:1].isdigit() and not host.parse_gpus(line)
    ]
    if trouble:
        found.append(Check("nvidia-smi", "warning", trouble, "a GPU or the driver does not answer: have the node looked at"))
    if not gpus and not found:
        return [Check("GPUs", "absent", "none: this host computes on its CPU")]
    visible = torch.cuda.device_count()
    if visible == 0:
        found.append(Check("CUDA", "fault", f"torch sees none of {len(gpus)} GPUs", "compare the driver with torch's CUDA version"))
    elif visible != len(gpus):
        found.append(Check("CUDA", "warning", f"torch sees {visible} of {len(gpus)} GPUs", "look at CUDA_VISIBLE_DEVICES"))
    for gpu in gpus:
        what = f"{gpu.name}, {gpu.total_mib / 1024:.0f} GiB, {gpu.used_mib} MiB in use, ECC errors: {gpu.ecc_errors}"
        if gpu.ecc_errors:
            found.append(Check(f"GPU {gpu.index}", "fault", what, "memory of this GPU is broken: have the node drained"))
        elif gpu.used_mib > BUSY_MIB:
            found.append(Check(f"GPU {gpu.index}", "warning", what, "another process uses it: see nvidia-smi"))
        else:
            found.append(Check(f"GPU {gpu.index}", "ok", what))
    return found


def clock() -> list[Check]:
    """Whether the clock is kept right: logs of several hosts are compared by it."""
    error = host.clock_error_s()
    if error is None:
        return [Check("clock", "warning", "not synchronised, says the kernel", "let NTP (chrony) keep it")]
    status: Status = "ok" if error < CLOCK_S else "warning"
    return [Check("clock", status, f"synchronised, estimated error {error * 1e3:.3g} ms")]


def memory() -> list[Check]:
    """Host memory, shared memory and open files."""
    free, files = host.free_memory(), host.open_files_limit()
    few = "ulimit -n 65536, before the ranks start"
    return [
        _at_least("host memory", free, LEAST_MEMORY, "a model is loaded through host memory"),
        _at_least("shared memory", host.free_bytes(Path("/dev/shm")), LEAST_SHARED, "give a container more of /dev/shm (--shm-size)"),
        Check("open files", "ok" if files >= LEAST_FILES else "warning", f"{files} a process", "" if files >= LEAST_FILES else few),
    ]


def disks(run: Path) -> list[Check]:
    """Room where the run and temporary files go."""
    temporary = Path(tempfile.gettempdir())
    return [
        _at_least(f"disk of {run.resolve()}", host.free_bytes(run.resolve()), LEAST_DISK, "checkpoints go there"),
        _at_least(f"disk of {temporary}", host.free_bytes(temporary), GIB, "set TMPDIR to another local directory"),
    ]


def _at_least(name: str, found: int, least: int, what: str) -> Check:
    words = f"{found / GIB:.1f} GiB free"
    return Check(name, "ok", words) if found >= least else Check(name, "warning", words, f"less than {least / GIB:.0f} GiB: {what}")


def writable(run: Path) -> list[Check]:
    """Whether the run's directory can be written, or made."""
    place = run.resolve()
    while not place.exists():
        place = place.parent
    try:
        seconds = host.time_of_write(place)
    except OSError as error:
        return [Check("run directory", "fault", f"{place} cannot be written: {error.strerror}", "set output_dir to a directory of yours")]
    status: Status = "ok" if seconds < 1 else "warning"
    return [Check("run directory", status, f"{place}: a small file written, flushed, renamed and removed in {seconds * 1e3:.1f} ms")]


def network() -> list[Check]:
    """Names and ports."""
    found = []
    address = host.own_address()
    if not address:
        found.append(Check("host name", "warning", f"{socket.gethostname()} does not resolve", "several nodes need it: see /etc/hosts"))
    elif address.startswith("127."):
        advice = "several nodes need its real address: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the link between nodes"
        found.append(Check("host name", "warning", f"{socket.gethostname()} is {address} to itself", advice))
    else:
        found.append(Check("host name", "ok", f"{socket.gethostname()} is {address}"))
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            found.append(Check("loopback", "ok", f"port {server.getsockname()[1]} can be listened on"))
    except OSError as error:
        found.append(Check("loopback", "fault", f"no port can be listened on: {error.strerror}", "ranks of one host meet there"))
    ports = host.listening_everywhere()
    if ports:
        advice = "whose they are: ss -ltnp; megarl itself listens on loopback or where rollout.listen says"
        found.append(Check("open ports", "ok", f"on all interfaces: {', '.join(map(str, ports[:20]))}", advice))
    else:
        found.append(Check("open ports", "ok", "no process listens on all interfaces"))
    return found


def tools() -> list[Check]:
    """What makes reports of hangs better, and whether jobs stay offline."""
    spy = shutil.which("py-spy") or (str(path) if (path := Path(sys.executable).with_name("py-spy")).exists() else None)
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    return [
        Check("py-spy", "ok" if spy else "absent", spy or "not installed: stacks of hanging ranks come from faulthandler and /proc"),
        Check("downloads", "ok", "off (HF_HUB_OFFLINE=1)" if offline else "launch/env.sh turns them off for runs (HF_HUB_OFFLINE=1)"),
    ]
