"""Stacks of a process that may not answer: py-spy where it is installed, else the process's own dump on a signal, else what /proc tells."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megarl.operations.heartbeat import DUMP_SIGNAL, read
from megarl.operations.verdict import Process

PY_SPY_S = 3.0
OWN_DUMP_S = 1.0
KILLED_S = 2.0  # a process that sleeps in the kernel ends when it wakes up


def look(pid: int) -> Process:
    """The kernel's view of a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Process("X")
    return Process(state, _read(pid, "wchan").strip("0 "), tuple((child, look(child).state) for child in _children(pid)))


def started(pid: int) -> str:
    """When the process began, in clock ticks: with its number, its identity. Empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def dump(record: Mapping[str, Any]) -> str:
    """The stacks of a rank and of its children, without local variables, or what else can be told. Takes a few seconds at most."""
    pid = record["pid"]
    parts = [_dump_one(pid, lambda: _own_dump(pid, Path(record["stacks"])))]
    parts += [f"child {child}:\n{_dump_one(child, lambda: '')}" for child in _children(pid)[:8]]
    return "\n".join(parts)


def flight_records(folder: Path, destination: Path) -> list[Path]:
    """What NCCL's flight recorders of this node's ranks last saw, as files in `destination`; none on a host without NCCL.

    The files are torch's, pickles: read them with its own analyser, and only those you trust.
    """
    for pipe in folder.glob("nccl-pipe-*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(descriptor, b"1")
            os.close(descriptor)
            time.sleep(OWN_DUMP_S)
    found = []
    for path in sorted(folder.glob("nccl-rank-*")):
        with contextlib.suppress(OSError):
            found.append(Path(shutil.copy(path, destination / path.name)))
    return found


def keep_flight_records(folder: Path) -> None:
    """Before the heartbeats of this node's ranks are removed: what torch wrote beside them when a collective of NCCL took too long."""
    record = next((found for path in folder.glob("rank-*.json") if (found := read(path))), None)
    written = sorted(folder.glob("nccl-rank-*"))
    if record is None or not written:
        return
    destination = Path(record["run"]) / "hangs"
    with contextlib.suppress(OSError):
        destination.mkdir(mode=0o700, exist_ok=True)
        for path in written:
            shutil.copy(path, destination / path.name)
        print(f"megarl: the last collectives of {len(written)} ranks, as NCCL's flight recorders saw them: {destination}", file=sys.stderr)


def _dump_one(pid: int, fallback: Callable[[], str]) -> str:
    return _py_spy(pid) or fallback() or _proc(pid)


def _py_spy(pid: int) -> str:
    """A stopped process can be read too: `--nonblocking` does not ask it to pause."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=PY_SPY_S)
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _own_dump(pid: int, path: Path) -> str:
    """Python's faulthandler writes every thread's stack from a signal handler, also while native code holds the interpreter's lock."""
    try:
        before = path.stat().st_size
        os.kill(pid, DUMP_SIGNAL)
    except OSError:
        return ""
    deadline, size = time.monotonic() + OWN_DUMP_S, before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = path.stat().st_size
        if now > before and now == size:
            break
        size = now
    with path.open() as file:
        file.seek(before)
        return file.read().strip()


def _proc(pid: int) -> str:
    status = [line for line in _read(pid, "status").splitlines() if line.startswith(("Name", "State", "VmRSS", "Threads", "SigPnd"))]
    return "\n".join([*status, f"wchan: {_read(pid, 'wchan')}", _read(pid, "stack")]).strip()


def _children(pid: int) -> list[int]:
    return [int(word) for word in _read(pid, f"task/{pid}/children").split()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def kill_started(variable: str, value: str) -> None:
    """End every process that was started with `variable`=`value` in its environment but this one, and what those start meanwhile."""
    wanted, deadline = f"{variable}={value}".encode(), time.monotonic() + KILLED_S
    while time.monotonic() < deadline and (found := [pid for pid in _pids() if wanted in _environment(pid)]):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _environment(pid: int) -> list[bytes]:
    """Empty for processes of other users, and for those that have ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def kill(record: Mapping[str, Any], identity: str) -> None:
    """End a rank, unless its number belongs to another process by now."""
    if identity and started(record["pid"]) == identity:
        os.kill(record["pid"], signal.SIGKILL)
