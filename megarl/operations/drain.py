"""Being asked to stop: at the end of the step that is being computed, with a checkpoint, instead of in the middle of it.

Whoever starts the ranks names a file in `MEGARL_DRAIN` and makes it when they should stop; rank 0 looks for it after every step. A rank
that gets SIGTERM, which a cluster sends before it takes the nodes away, takes it the same way. Without `MEGARL_DRAIN` a signal ends a
rank as it always does.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

FILE = "MEGARL_DRAIN"


@dataclass
class Drain:
    """What one rank has heard."""

    path: Path
    signal_name: str = ""

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler. Signals come several times, from Slurm and from torchrun: once is enough."""
        self.signal_name = signal.Signals(number).name

    def reason(self, rank: int) -> str:
        """Why this rank should stop; empty when it should not. Only rank 0 looks at the disk."""
        if rank == 0:
            try:
                return self.path.read_text().strip() or "asked to stop"
            except OSError:
                pass
        return self.signal_name


_current: Drain | None = None


def listen() -> None:
    """This process is a rank that can be asked to stop, if whoever started it wants that."""
    global _current
    if is_wanted():
        _current = Drain(Path(os.environ[FILE]))
        signal.signal(signal.SIGTERM, _current.hear)


def is_wanted() -> bool:
    """Whether whoever started this process may ask its ranks to stop."""
    return bool(os.environ.get(FILE))


def is_listening() -> bool:
    """The same on all ranks of a run."""
    return _current is not None


def reason(rank: int) -> str:
    """Why this process, rank `rank`, should stop; empty when it should not."""
    return "" if _current is None else _current.reason(rank)
