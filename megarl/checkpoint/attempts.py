"""Whose turn it is to write in a run's `checkpoints` directory: every start of a run takes a number, and only the newest may publish.

A node that lost its link may go on writing to the shared file system after its job was started again elsewhere. Order makes this safe:
a start first takes its number, then moves away every staging directory it finds, and only then chooses the checkpoint to continue from;
a publisher looks for a newer number when its staging directory is complete, and then renames it. So either the rename comes before the
newer start looked, which then sees the checkpoint, or it finds no newer number but its staging directory gone, and fails.
"""

import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megarl.checkpoint.publish import STAGING, TRASH
from megarl.errors import FencedError

NAME = re.compile(r"\.attempt-(\d{8,})")


@dataclass(frozen=True)
class Attempt:
    """The start number `number` of the run whose checkpoints are in `directory`."""

    directory: Path
    number: int

    @classmethod
    def take(cls, directory: Path) -> "Attempt":
        """The next number. Creating its file is atomic, on network file systems too: two starts never get the same."""
        number = newest(directory) + 1
        while True:
            try:
                descriptor = os.open(_file(directory, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                break
            except FileExistsError:
                number += 1
        said = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with open(descriptor, "w") as file:
            file.write(json.dumps(said))
            file.flush()
            os.fsync(file.fileno())
        for path in directory.iterdir():
            if (found := NAME.fullmatch(path.name)) and int(found[1]) < number:
                path.unlink(missing_ok=True)
        return cls(directory, number)

    def check(self) -> None:
        """Raise `FencedError` when a newer start has taken over."""
        if (number := newest(self.directory)) > self.number:
            raise FencedError(
                f"{self.directory}: start {number} of this run ({_who(_file(self.directory, number))}) has taken over; this is start"
                f" {self.number}, which publishes nothing more: stop one of the two, or give it another output_dir"
            )

    def staging(self, name: str) -> Path:
        """Where this start builds the checkpoint `name`: no other start writes there."""
        return self.directory / f"{STAGING}{self.number}-{name}"


def newest(directory: Path) -> int:
    """The highest number taken so far; 0 for none."""
    return max((int(found[1]) for path in directory.iterdir() if (found := NAME.fullmatch(path.name))), default=0)


def sweep(directory: Path) -> None:
    """Remove what killed writers left. Whoever still writes there finds its directory gone. Links are removed, never followed."""
    for path in [path for path in directory.iterdir() if path.name.startswith(STAGING)]:
        try:
            os.rename(path, path.with_name(f"{TRASH}{os.getpid()}-{path.name}"))
        except FileNotFoundError:  # published or removed in this moment
            continue
    for path in [path for path in directory.iterdir() if path.name.startswith(TRASH)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # a writer of another start may still add to it: the next sweep has it
        else:
            path.unlink(missing_ok=True)


def _file(directory: Path, number: int) -> Path:
    return directory / f".attempt-{number:08d}"


def _who(path: Path) -> str:
    try:
        said = json.loads(path.read_text())
        return f"process {said['pid']} on {said['host']} since {said['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # just being written
        return "another process"
