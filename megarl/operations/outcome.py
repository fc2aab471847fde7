"""`outcome.json` in a run's folder: how the newest attempt at the run ended. The contract between the ranks and whoever starts them again.

An exit code cannot be that contract: torchrun and srun make one number of many ranks' ends, and a rank that a signal ended says nothing.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from megarl.errors import ConfigError, DataError, FencedError, LayoutError, WeightMapError
from megarl.operations import heartbeat
from megarl.operations.verdict import FAILED
from megarl.parallel.torchrun import rank_from_environment

NAME, CURRENT = "outcome.json", ".attempt"
RUN, ALONE = "MEGARL_RUN", "alone"
Kind = Literal["done", "drained", "retry", "config-error", "data-error", "no-progress"]
EXIT_CODES: dict[Kind, int] = {"done": 0, "drained": 75, "retry": 75, "config-error": 78, "data-error": 65, "no-progress": 93}
"""What a launcher that keeps exit codes ends with: 75 means that the same command will go on where this one stopped."""
MAX_REASON = 2000
HANG = "hang: "


@dataclass(frozen=True)
class Outcome:
    """`iteration`: the last complete one, None where nobody knows; `rank` and `phase`: who ended it and doing what, where one did."""

    outcome: Kind
    epoch: str
    iteration: int | None = None
    reason: str = ""
    rank: int | None = None
    phase: str | None = None
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=lambda: round(time.time(), 3))

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    def write(self, run: Path) -> bool:
        """Put it into the folder of the run; False, and nothing done, when a newer attempt is in charge there."""
        if not is_current(run, self.epoch):
            return False
        replace_text(run / NAME, json.dumps(asdict(self), indent=1) + "\n")
        return True

    def write_first(self, run: Path) -> bool:
        """`write`, unless a rank of the same attempt has written: one of those that fail together wins, whatever a host's cache shows."""
        before = read(run)
        if (before is not None and before.epoch == self.epoch) or not is_current(run, self.epoch):
            return False
        staging = _staging(run / NAME)
        staging.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        try:
            os.link(staging, run / NAME)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(staging, run / NAME)
        finally:
            staging.unlink(missing_ok=True)
        return True


def read(run: Path) -> Outcome | None:
    """The outcome in the folder of a run; None where there is none, or none that can be read."""
    try:
        found = Outcome(**json.loads((run / NAME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.outcome in get_args(Kind) else None


def epoch() -> str:
    """The name of this attempt, as the attempt loop made it."""
    return os.environ.get(heartbeat.ATTEMPT) or ALONE


def current(run: Path) -> str:
    """The newest attempt at the run; empty where no attempt loop has ever been."""
    try:
        return (run / CURRENT).read_text().strip()
    except FileNotFoundError:
        return ""


def is_current(run: Path, name: str) -> bool:
    """Whether the attempt `name` is the newest one of the run. True where no attempt loop has ever been."""
    return current(run) in ("", name)


def make_current(run: Path, name: str) -> None:
    """From now on the attempt `name` is in charge of the run's folder, and how an earlier one ended no longer counts."""
    replace_text(run / CURRENT, name + "\n")
    with suppress(FileNotFoundError):
        (run / NAME).unlink()


def ended(step: int, total_steps: int, why: str) -> Outcome:
    """The outcome of a run that has come to `step` without a failure; `why` it was asked to stop, if it was."""
    if step >= total_steps:
        return Outcome("done", epoch(), step, f"{step} of {total_steps} steps")
    return Outcome("drained", epoch(), step, f"{why or 'a rank was asked to stop'}: stopped after {step} of {total_steps} steps")


def kind_of(error: BaseException) -> Kind:
    """What an error means for the next attempt: a mistake of the user's comes again, anything else may not."""
    if isinstance(error, ConfigError | LayoutError | WeightMapError):
        return "config-error"
    return "data-error" if isinstance(error, DataError) else "retry"


@contextmanager
def recorded(run: Path | None = None) -> Iterator[None]:
    """Writes down why the block failed; the first rank to fail is the one that counts. `run` None: the folder in MEGARL_RUN, if any."""
    try:
        yield
    except FencedError:  # another attempt writes there now
        raise
    except BaseException as error:
        place = run or (Path(os.environ[RUN]) if os.environ.get(RUN) else None)
        if place is not None and not isinstance(error, SystemExit):
            _record_failure(place, error)
        raise


def _record_failure(run: Path, error: BaseException) -> None:
    phase, iteration = heartbeat.where()
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON]
    with suppress(OSError):  # the reason is on stderr as well, and a full disk may be the reason
        Outcome(kind_of(error), epoch(), iteration, reason, rank_from_environment()[0], phase).write_first(run)


def record_signal(rank: int, name: str) -> None:
    """What the launcher knows and no rank could say. It counts more than what the other ranks made of the silence."""
    if not os.environ.get(RUN):
        return
    run = Path(os.environ[RUN])
    before = read(run)
    known = before if before is not None and before.epoch == epoch() else Outcome("retry", epoch())
    if known.reason.startswith(HANG):  # the node's monitor has ended the ranks, and said why
        return
    with suppress(OSError):
        Outcome("retry", epoch(), known.iteration, f"rank {rank} was ended by {name}", rank, known.phase).write(run)


def record_hang(run: Path, rank: int, phase: str, iteration: int, verdict: str, is_certain: bool) -> None:
    """What the node's monitor found, before it ends the ranks.

    One that only saw its ranks wait leaves another node's word alone; so does one whose rank has failed and does not leave: why it failed
    is told already.
    """
    with suppress(OSError):
        os.listdir(run)  # network file systems look again when a directory is read
        before = read(run)
        if before is not None and before.epoch == epoch() and (phase == FAILED or (not is_certain and before.reason.startswith(HANG))):
            return
        Outcome("retry", epoch(), iteration, HANG + verdict, rank, phase).write(run)


def replace_text(path: Path, text: str) -> None:
    """A reader finds the old text or the new one."""
    staging = _staging(path)
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
