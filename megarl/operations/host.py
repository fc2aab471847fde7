"""Facts about this host, read where Linux tells them: disks, memory, clock, GPUs, limits. Imports nothing heavy and changes nothing."""

import ctypes
import os
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

TIME_ERROR = 5  # of adjtimex: the kernel does not know that the clock is right
COMMAND_S = 10.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it; `ecc_errors` uncorrected since the driver was loaded, None where the GPU has no ECC."""

    index: int
    name: str
    total_mib: int
    used_mib: int
    ecc_errors: int | None


def gpus() -> list[Gpu]:
    """The GPUs of this host; none where there is no working nvidia-smi."""
    return parse_gpus(ask_gpus()[0])


def ask_gpus() -> tuple[str, str]:
    """(nvidia-smi's lines of GPUs, what it complains of); both empty where there is none."""
    query = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except OSError:
        return "", ""
    except subprocess.TimeoutExpired:
        return "", f"no answer within {COMMAND_S:g} s"
    if done.returncode == 0:
        return done.stdout, ""
    return done.stdout, " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"


def parse_gpus(text: str) -> list[Gpu]:
    """nvidia-smi's lines; those that are none are passed over."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and all(field.isdigit() for field in (fields[0], fields[2], fields[3])):
            errors = int(fields[4]) if fields[4].isdigit() else None
            found.append(Gpu(int(fields[0]), fields[1], int(fields[2]), int(fields[3]), errors))
    return found


def clock_error_s() -> float | None:
    """How wrong the kernel believes its clock to be; None where nobody has set it right."""

    class Timex(ctypes.Structure):
        _fields_ = [("modes", ctypes.c_uint)] + [(name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")]
        _fields_ += [("rest", ctypes.c_byte * 512)]

    found = Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(found))
    return None if state in (-1, TIME_ERROR) else found.esterror / 1e6


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write to the file system of `path`, or of the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory() -> int:
    """Bytes of host memory that processes of this host, or of this container, may still take."""
    available = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").open() if line.startswith("MemAvailable"))
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no limit, or another version of cgroups
        return available
    return min(available, limit - used)


def open_files_limit() -> int:
    """Files and sockets a process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def own_address() -> str:
    """The address this host's own name stands for; empty where the name cannot be resolved."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def listening_everywhere() -> list[int]:
    """TCP ports of any process of this host that listen on all interfaces."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[3] == "0A" and not address.strip("0"):
                found.add(int(port, 16))
    return sorted(found)


def time_of_write(directory: Path) -> float:
    """Seconds to make, flush, rename and remove a small file in `directory`, which must exist. Raises `OSError` where that fails."""
    began = time.monotonic()
    name = directory / f".probe-{socket.gethostname()}-{os.getpid()}"
    with name.open("wb") as file:
        file.write(b"megarl")
        file.flush()
        os.fsync(file.fileno())
    renamed = name.with_name(name.name + ".renamed")
    os.rename(name, renamed)
    renamed.unlink()
    return time.monotonic() - began
