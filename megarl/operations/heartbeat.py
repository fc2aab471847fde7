"""Where this rank is: one small file a rank on node-local storage, which the node's monitor (`watchdog`) reads.

The run says which phase of which step it enters; a thread looks five times a second where the main thread is and writes it down. So the
file of a rank tells more than that it lives: a stopped process, or native code that holds the interpreter's lock, leaves an old pulse, a
rank inside a collective waits for others, and a rank outside of it is the one they wait for. Nothing is written outside of `rank_of`
and, for the file, a launcher named a folder in `MEGARL_HEARTBEAT`. Rank 0 also tells `events.jsonl` when a phase ends.
"""

import contextlib
import faulthandler
import itertools
import json
import linecache
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megarl.operations.events import GOOD_END, NAME, EventLog
from megarl.operations.faults import Fault
from megarl.operations.verdict import FAILED
from megarl.parallel.torchrun import rank_from_environment

FOLDER, ATTEMPT = "MEGARL_HEARTBEAT", "MEGARL_ATTEMPT"
ENDED = "ended"  # the phase of a rank that has left as it should
PULSE_S = 0.2
RECORD_BYTES = 8192
DUMP_SIGNAL = signal.SIGUSR2
_OWN = os.sep + "megarl" + os.sep
_DISTRIBUTED = os.path.join("torch", "distributed") + os.sep
_SITES = 10  # frames of megarl that a record holds
GPU_WAIT = "its GPU's queue"  # where a rank stands when a collective of NCCL does not end
_GPU_WAITS = (".item(", ".tolist(", ".cpu(", ".numpy(", ".nonzero(", '.to("cpu"', "synchronize(")
_PLAIN_WAITS = ("threading.py", "subprocess.py", "selectors.py", "_base.py")


class Heartbeat:
    """The record of one rank. `run` is the run's folder; `folder` is where the file goes, None for none; rank 0 passes `events`."""

    def __init__(
        self,
        rank: int,
        run: Path,
        folder: Path | None,
        attempt: str,
        events: EventLog | None,
        faults: Sequence[Fault],
        patience_s: float = 0.0,
    ):
        self.rank, self.step, self.phase = rank, 0, "setup"
        self._run, self._attempt, self._events, self._faults = run, attempt, events, faults
        self._since = self._waited_from = self._last_pulse = time.monotonic()
        self._longest: dict[str, float] = {}
        self._busy, self._waited = 0.0, False
        self._sites: list[str] = []
        self._collective = ""
        self._main = threading.main_thread().ident
        self._patience_s = patience_s
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._descriptor = -1
        if folder is not None:
            self._start_file(folder)

    def _start_file(self, folder: Path) -> None:
        self._stacks = folder / f"rank-{self.rank}.stacks"
        self._stacks_file = self._stacks.open("w")
        faulthandler.register(DUMP_SIGNAL, file=self._stacks_file, all_threads=True)
        self._descriptor = os.open(folder / f"rank-{self.rank}.json", os.O_WRONLY | os.O_CREAT, 0o600)
        self._write()
        threading.Thread(target=self._pulse, name="heartbeat", daemon=True).start()

    def enter(self, name: str, step: int | None = None) -> tuple[str, float, int]:
        """A phase begins, inside another one perhaps; returns what `leave` needs."""
        outer = (self.phase, self._since, self.step)
        inside = self.phase.split(" ")[-1] == name
        self.phase = self.phase if inside else f"{self.phase} {name}".strip()
        self.step = self.step if step is None else step
        if not inside:
            self._since = time.monotonic()
            self._write()
            self.meet(name)
        return outer

    def meet(self, phase: str) -> None:
        """The faults on purpose that are due where `phase` begins."""
        for fault in self._faults:
            if fault.strikes(phase, self.rank, self.step):
                fault.strike()

    def leave(self, outer: tuple[str, float, int], is_done: bool = True) -> None:
        """The phase has ended (`is_done`) or failed."""
        phase, since, step = outer
        if self.phase != phase:
            self._finished(self.phase, time.monotonic() - self._since, is_done)
        self.phase, self.step = phase, step
        self._since = since if phase else time.monotonic()  # between phases a step's clock starts anew
        self._write()

    def _finished(self, phase: str, seconds: float, is_done: bool) -> None:
        if is_done:
            self._longest[phase] = max(self._longest.get(phase, 0.0), seconds)
        if self._events is not None:
            self._events.write("phase", name=phase, step=self.step, seconds=round(seconds, 4), **({} if is_done else {"failed": True}))

    def start_step(self, step: int, is_first: bool) -> None:
        """Work on `step` begins; the setup is over with the first."""
        if is_first:  # on every rank: what a setup takes is the limit of the next one, on every host
            self._finished(self.phase or "setup", time.monotonic() - self._since, True)
        if self._events is not None and (is_first or step != self.step):
            self._events.write("continue" if is_first else "step", step=step - 1)
        self.phase, self.step, self._since = "", step, time.monotonic()
        self._write()

    def end(self, outcome: str) -> None:
        """The rank leaves on its own account; `outcome` is done, or the name of the error that ended it."""
        self._ended.set()
        self.phase, self._since = ENDED if outcome == GOOD_END else FAILED, time.monotonic()
        self._write()
        if self._events is not None:
            self._events.write("end", step=max(0, self.step - 1), outcome=outcome)

    # ---------------------------------------------------------------- the pulse
    def _pulse(self) -> None:
        while not self._ended.wait(PULSE_S):
            now, self._last_pulse = time.monotonic(), self._last_pulse
            self._look(now)
            self._write()

    def _look(self, now: float) -> None:
        frame = sys._current_frames().get(self._main)
        collective = collective_of(frame)
        sites = sites_of(frame)
        if (collective, sites) != (self._collective, self._sites):
            self._collective, self._sites, self._waited_from = collective, sites, now
        if not collective and self.phase not in ("", "setup"):
            self._busy += now - self._last_pulse
        self._last_pulse = now

    def _write(self) -> None:
        if self._descriptor < 0:
            return
        with self._lock:
            content = json.dumps(self._record()).encode()
            os.pwrite(self._descriptor, content[:RECORD_BYTES].ljust(RECORD_BYTES), 0)

    def _record(self) -> dict[str, Any]:
        return {
            "attempt": self._attempt,
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run": str(self._run),
            "phase": self.phase,
            "step": self.step,
            "since": self._since,
            "pulse": self._last_pulse,
            "collective": self._collective,
            "sites": self._sites,
            "sites_since": self._waited_from,
            "patience": self._patience_s,
            "busy": round(self._busy, 3),
            "longest": {name: round(seconds, 3) for name, seconds in self._longest.items()},
            "stacks": str(self._stacks),
        }


def collective_of(frame: FrameType | None) -> str:
    """The exchange with other ranks that a thread is in by its innermost frames: `all_reduce`, `wait`; empty when it is in none.

    NCCL's collectives return at once; a rank waits for them, and for whatever its GPU does before, where it needs a value.
    """
    name = ""
    if frame is not None and _is_on_gpu() and any(word in _line(frame) for word in _GPU_WAITS):
        return GPU_WAIT
    for _ in range(6):
        if frame is None:
            break
        file = frame.f_code.co_filename
        if _DISTRIBUTED in file:
            if not frame.f_code.co_name.startswith(("_", "wrapper", "<")):
                name = frame.f_code.co_name
            name = name or "a collective"
        elif name:
            break
        elif ".wait(" in _line(frame) and not file.endswith(_PLAIN_WAITS):
            return "wait"
        frame = frame.f_back
    return name


def _line(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)


def _is_on_gpu() -> bool:
    """Whether this process has work on a GPU. Imports nothing."""
    is_initialized = getattr(sys.modules.get("torch.cuda"), "is_initialized", None)  # torch may be half imported
    return is_initialized is not None and is_initialized()


def sites_of(frame: FrameType | None) -> list[str]:
    """The frames of megarl that a thread is in, outermost first, as `ppo/loop.py:44 train`."""
    found: list[str] = []
    while frame is not None:
        head, own, tail = frame.f_code.co_filename.rpartition(_OWN)
        if own:
            found.append(f"{tail}:{frame.f_lineno or 0} {frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1][-_SITES:]


# ---------------------------------------------------------------- of this process
_current: Heartbeat | None = None
_runs = itertools.count()


def _age_s() -> float:
    """Seconds since this process was made."""
    made = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - made


@contextlib.contextmanager
def rank_of(run: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Inside the block this process is a rank of the run in the folder `run`, whose scorers may take `patience_s` by limits of their own.

    Raises `ConfigError` for a fault hook that is set and not allowed.
    """
    global _current
    faults = Fault.from_environment(os.environ)
    rank, world_size, _ = rank_from_environment()
    attempt, folder = os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RUN_ID", "alone"), os.environ.get(FOLDER)
    events = EventLog(run / NAME, attempt=attempt) if rank == 0 else None
    if events is not None:
        age = round(_age_s(), 3) if next(_runs) == 0 else 0.0  # the first run of this process begins with its imports
        events.write("start", ranks=world_size, host=socket.gethostname(), pid=os.getpid(), age=age)
    _current = Heartbeat(rank, run, Path(folder) if folder else None, attempt, events, faults, patience_s)
    _current.meet("setup")
    try:
        yield
    except BaseException as error:
        _current.end(type(error).__name__)
        raise
    else:
        _current.end(GOOD_END)
    finally:
        _current = None


@contextlib.contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """The block is the phase `name`, of `step` where that is not the one being worked on. A phase inside itself is the same one."""
    if _current is None:
        yield
        return
    outer = _current.enter(name, step)
    try:
        yield
    except BaseException:
        _current.leave(outer, is_done=False)
        raise
    _current.leave(outer)


def step(finished: int, is_first: bool = False) -> None:
    """`finished` steps are done; `is_first`: by an earlier start, and this one goes on from there."""
    if _current is not None:
        _current.start_step(finished + 1, is_first)


def where() -> tuple[str | None, int | None]:
    """The phase this rank is in, and the last step it has finished; (None, None) outside of `rank_of`."""
    return (None, None) if _current is None else (_current.phase or "between phases", max(0, _current.step - 1))


def read(path: Path) -> dict[str, Any] | None:
    """The record in `path`; None while it is being written."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
