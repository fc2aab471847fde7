"""How a launcher has its ranks watched: a folder for their heartbeats on node-local storage, and a monitor process beside them.

Settings, from the environment of the launcher: `MEGARL_WATCH` = kill (a hang ends the ranks), warn (it is reported only) or off;
`MEGARL_HANG_FLOOR`, `MEGARL_HANG_FACTOR`, `MEGARL_HANG_FIRST` are the limits of `verdict.Limits`.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from megarl.errors import ConfigError
from megarl.operations import stacks
from megarl.operations.heartbeat import FOLDER

MODE = "MEGARL_WATCH"
LIMITS = {"MEGARL_HANG_FLOOR": "--floor", "MEGARL_HANG_FACTOR": "--factor", "MEGARL_HANG_FIRST": "--first"}
MODES = ("kill", "warn", "off")
MEMORY = Path("/dev/shm")
FLIGHT_RECORDER = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "nccl-rank-", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "nccl-pipe-"}


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ranks that are started inside the block are watched. Raises `ConfigError` for settings that mean nothing."""
    mode, options = _settings(os.environ)
    if mode == "off":
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="megarl-heartbeat-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    os.environ[FOLDER] = str(folder)
    for name, file in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, str(folder / file))
    command = [sys.executable, "-m", "megarl.operations.watchdog", "--folder", str(folder), "--parent", str(os.getpid()), *options]
    monitor = subprocess.Popen(command + (["--warn-only"] if mode == "warn" else []), stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        monitor.kill()  # it is deaf to signals that whole jobs get
        monitor.wait()
        stacks.keep_flight_records(folder)
        shutil.rmtree(folder, ignore_errors=True)


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
