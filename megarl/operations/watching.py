"""How a launcher has its ranks watched: a folder for their heartbeats on node-local storage, and a monitor process beside them.

Settings, from the environment of the launcher: `MEGARL_WATCH` = kill (a hang ends the ranks), warn (it is reported only) or off;
`MEGARL_HANG_FLOOR`, `MEGARL_HANG_FACTOR`, `MEGARL_HANG_FIRST` are the limits of `verdict.Limits`.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megarl.errors import ConfigError
from megarl.operations import stacks
from megarl.operations.heartbeat import FOLDER

MODE = "MEGARL_WATCH"
LIMITS = {"MEGARL_HANG_FLOOR": "--floor", "MEGARL_HANG_FACTOR": "--factor", "MEGARL_HANG_FIRST": "--first"}
MODES = ("kill", "warn", "off")
MEMORY = Path("/dev/shm")
PREFIX, LEFT_S = "megarl-heartbeat-", 10  # after which a folder that nobody holds has been left
FLIGHT_RECORDER = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "nccl-rank-", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "nccl-pipe-"}


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ranks that are started inside the block are watched. Raises `ConfigError` for settings that mean nothing."""
    mode, options = _settings(os.environ)
    if mode == "off":
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    hold = os.open(folder, os.O_RDONLY)
    fcntl.flock(hold, fcntl.LOCK_EX)
    _sweep(folder.parent)
    os.environ[FOLDER] = str(folder)
    for name, file in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, str(folder / file))
    command = [sys.executable, "-m", "megarl.operations.watchdog", "--folder", str(folder), "--parent", str(os.getpid()), *options]
    command += ["--warn-only"] if mode == "warn" else []
    monitor = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[hold])  # it holds the folder too
    try:
        yield
    finally:
        monitor.kill()  # it is deaf to signals that whole jobs get
        monitor.wait()
        stacks.keep_flight_records(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(hold)


def _sweep(place: Path) -> None:
    """Remove the folders of launchers that were killed together with their monitors, as Slurm does."""
    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, held, or just removed
            found = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > LEFT_S:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(found)


def _settings(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """(mode, options of the monitor)."""
    faults, options = [], []
    mode = environment.get(MODE) or "kill"
    if mode not in MODES:
        faults.append(f"{MODE} is {mode!r}; expected {', '.join(MODES)}")
    for name, option in LIMITS.items():
        text = environment.get(name)
        if not text:
            continue
        try:
            is_positive = float(text) > 0
        except ValueError:
            is_positive = False
        if not is_positive:
            faults.append(f"{name} is {text!r}; expected a number over 0")
        options += [option, text]
    if faults:
        raise ConfigError(faults)
    return mode, options
