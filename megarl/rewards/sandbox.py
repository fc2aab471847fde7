"""Runs a program nobody has read: namespaces, a root of its own, limits, a fixed environment, and an end by the clock.

With namespaces the program sees no network, no other process, no file of the user but the Python it runs with, and writes into memory only.
What it does not have: a filter of system calls. Source of the recipe: `unshare(1)` and `mount_setattr(2)` (Linux 5.12).
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megarl.errors import RewardError, SetupError
from megarl.rewards.check import ROOT_REFUSED

JAIL = Path(__file__).with_name("jail.py")
UNSHARE = ("--user", "--map-root-user", "--net", "--pid", "--ipc", "--uts", "--mount", "--fork", "--kill-child")
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr")
START_S = 60.0  # for building the walls, on a busy machine; the program's own time is `timeout_s`


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_s: int
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20  # of one file, and of what it prints
    scratch_bytes: int = 64 << 20
    files: int = 64
    processes: int = 32


@dataclass(frozen=True)
class Ending:
    """How a program ended. `code` None: the clock ended it. `output` and `errors` are what it printed, at most `Limits.file_bytes` each."""

    code: int | None
    output: bytes
    errors: bytes


class Sandbox:
    """Starts programs in a jail. Safe to use from several threads.

    Args: `timeout_s` wall-clock seconds of a program; `accept` holds "root" where the user accepts to run as root, and "no_namespaces"
    where limits alone must do (then network and files of the user are open to the program); `key` names the part of the configuration.
    Raises `SetupError` where one is needed and not accepted, and where the jail cannot be built.
    """

    def __init__(self, timeout_s: float, accept: Sequence[str], key: str):
        if os.geteuid() == 0 and "root" not in accept:
            raise SetupError(f"{key}: {ROOT_REFUSED.format(key=key)}")
        self.timeout_s, self.limits = timeout_s, Limits(cpu_s=int(timeout_s) + 1)
        self.has_namespaces = "no_namespaces" not in accept
        try:
            ending = self.run([sys.executable, "-I", "-S", "-c", "print('ready')"], {})
        except RewardError as error:
            remedy = f", or {key}.accept: [no_namespaces]" if self.has_namespaces else ""
            raise SetupError(
                f"{key}: the sandbox cannot be built here: {error}; expected a Linux that lets users unshare{remedy}"
            ) from None
        if ending.output != b"ready\n":
            raise SetupError(f"{key}: Python does not start in the sandbox: {ending.errors[-200:].decode(errors='replace')!r}")

    def run(self, command: Sequence[str], files: Mapping[str, str], stdin: str = "") -> Ending:
        """The end of `command`, started in a directory with `files`. Raises `RewardError` when the jail itself failed."""
        with (
            tempfile.TemporaryDirectory(prefix="megarl-jail-") as place,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            reader, writer = os.pipe()
            spec = {"command": list(command), "files": dict(files), "stdin": stdin, "limits": asdict(self.limits), "status": writer}
            spec |= {"scratch": place, "root": place if self.has_namespaces else None, "readable": readable_directories()}
            unshare = ["unshare", *UNSHARE, "--"] if self.has_namespaces else []
            with tempfile.TemporaryFile() as orders:
                orders.write(json.dumps(spec).encode())
                orders.seek(0)
                try:
                    process = subprocess.Popen(
                        [*unshare, sys.executable, "-I", "-S", str(JAIL)],
                        stdin=orders,
                        stdout=output,
                        stderr=errors,
                        pass_fds=(writer,),
                        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
                        start_new_session=True,
                    )
                except OSError as error:
                    os.close(reader)
                    raise RewardError(f"unshare does not start: {error}") from None
                finally:
                    os.close(writer)
            try:
                is_ready = _says_ready(reader, START_S)
                code = _wait(process, self.timeout_s if is_ready else 0.5)
            finally:
                os.close(reader)
                _end(process)
            output.seek(0)
            errors.seek(0)
            if not is_ready:
                said = errors.read(self.limits.file_bytes).decode(errors="replace").strip()
                raise RewardError(said.splitlines()[-1] if said else f"the jail ended with {code} before the program started")
            return Ending(code, output.read(self.limits.file_bytes), errors.read(self.limits.file_bytes))


def readable_directories() -> list[str]:
    """The directories a Python program needs: the system's, and this Python's own with its packages."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(Path(sys.executable).resolve().parents[1])}
    return [path for path in (*SYSTEM, *sorted(own)) if os.path.isdir(path) and path != "/"]


def _says_ready(reader: int, timeout_s: float) -> bool:
    ready, _, _ = select.select([reader], [], [], timeout_s)
    return bool(ready) and os.read(reader, 8) == b"ready"


def _wait(process: subprocess.Popen, timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen) -> None:
    """End whatever is left of the process and its session; with namespaces, its whole process tree ends with it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
