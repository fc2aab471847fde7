"""Writing one checkpoint: every rank its files, then rank 0 the manifest and the rename. The same steps in the foreground and behind it.

The ranks agree through the file system, not through collectives, which a thread behind the training must not enter: a rank that has
written and hashed its files leaves a note in the staging directory, and rank 0 publishes when it has found everybody's.
"""

import atexit
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megarl.checkpoint.files import MAX_FILES, PlannedFile
from megarl.checkpoint.manifest import StoredFile
from megarl.checkpoint.publish import with_digest
from megarl.checkpoint.sharded import TensorEntry, sync, write_tensors, write_text
from megarl.checkpoint.side_by_side import side_by_side
from megarl.errors import CheckpointError, MegarlError

POLL_S = (0.005, 0.5)  # between two looks for the others' notes: at first, at last
_NOTE = TypeAdapter(dict[str, StoredFile])


@dataclass
class SaveJob:
    """One rank's part of the checkpoint `name`. `publish` gets the entries of all ranks' files; only rank 0 has it."""

    name: str
    staging: Path
    plan: Sequence[PlannedFile]
    rank: int
    world_size: int
    timeout_s: float
    publish: Callable[[dict[str, StoredFile]], None] | None = None
    started: float = field(default_factory=time.monotonic)
    is_given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.plan)

    @property
    def seconds_left(self) -> float:
        return self.started + self.timeout_s - time.monotonic()

    def write(self) -> None:
        """Write this rank's files and the note that says so. Raises `CheckpointError`, on a full disk with needed and free bytes."""
        with disk_errors(self.staging, self.num_bytes):
            entries = side_by_side(self._write_file, self.plan, MAX_FILES)
            written = dict(zip((file.path for file in self.plan), entries, strict=True))
            for folder in {(self.staging / path).parent for path in written}:
                sync(folder)
            note = self.staging / _note(self.rank)
            unfinished = note.with_suffix(".unfinished")
            write_text(unfinished, json.dumps({path: file.model_dump(mode="json") for path, file in written.items()}))
            os.rename(unfinished, note)  # from here on rank 0 may rename the directory

    def collect(self) -> dict[str, StoredFile]:
        """Wait for the notes of all ranks and take them away. Raises `CheckpointError` naming the ranks that are late."""
        expected = {_note(rank): rank for rank in range(self.world_size)}
        pause, limit = POLL_S
        with disk_errors(self.staging, self.num_bytes):
            while missing := expected.keys() - {entry.name for entry in os.scandir(self.staging)}:
                if self.is_given_up.wait(min(pause, limit)):
                    raise CheckpointError(f"{self.staging}: given up, because another rank could not write its files")
                if self.seconds_left <= 0:
                    late = sorted(expected[name] for name in missing)
                    raise CheckpointError(
                        f"{self.staging}: ranks {late} have not written their files in checkpoint.timeout_s={self.timeout_s:g} s: raise it,"
                        " or look at their disks"
                    )
                pause *= 1.5
            files: dict[str, StoredFile] = {}
            for name in expected:
                try:
                    files |= _NOTE.validate_json((self.staging / name).read_bytes())
                except ValidationError as error:
                    raise CheckpointError(f"{self.staging / name} is damaged: {error.errors()[0]['msg']}") from error
                (self.staging / name).unlink()
            return files

    def conclude(self) -> None:
        """Publish when everybody has written; nothing to do on the other ranks."""
        if self.publish is not None:
            files = self.collect()
            with disk_errors(self.staging, self.num_bytes):
                self.publish(files)

    def _write_file(self, file: PlannedFile) -> StoredFile:
        entries = [TensorEntry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in file.tensors.items()]
        return with_digest(file.entry, write_tensors(self.staging / file.path, entries, lambda entry: file.tensors[entry.key]))


class Background:
    """A job in a thread. A process that exits while it runs waits for it, up to its deadline, and says what is lost after that."""

    def __init__(self, job: SaveJob):
        self.job = job
        self.error: MegarlError | None = None
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()
        atexit.register(self._wait_at_exit)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """True after an error, and past the deadline."""
        return self.error is not None or self._fault is not None or (self.is_running and self.job.seconds_left < -2 * POLL_S[1])

    def wait(self) -> None:
        """Return when the job has ended; past its deadline `error` says so."""
        self._thread.join(max(0.0, self.job.seconds_left) + 2 * POLL_S[1])
        if self.is_running:
            self.error = CheckpointError(f"{self.job.staging}: still writing after checkpoint.timeout_s={self.job.timeout_s:g} s: raise it")
        atexit.unregister(self._wait_at_exit)
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        try:
            self.job.write()
            self.job.conclude()
        except MegarlError as error:
            self.error = error
        except BaseException as fault:  # ours: `wait` raises it where a traceback is seen
            self._fault = fault

    def _wait_at_exit(self) -> None:
        self._thread.join(max(0.0, self.job.seconds_left))
        if lost := ("still writing" if self.is_running else self.error or self._fault):
            print(f"megarl: warning: rank {self.job.rank} exits without the checkpoint {self.job.staging.name}: {lost}", file=sys.stderr)


@contextmanager
def disk_errors(place: Path, num_bytes: int) -> Iterator[None]:
    """Turns what the system says about a disk into a `CheckpointError` that names the path, what was needed and what is free."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain(error, place, num_bytes)) from error


def explain(error: OSError, place: Path, num_bytes: int) -> str:
    """One sentence: which path, what went wrong, and for a full disk how much is needed and free."""
    path = Path(error.filename) if error.filename else place
    said = f"{path}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f"this rank's part of the checkpoint needs {num_bytes} bytes, " if num_bytes else ""
        return f"{said}: {needed}{_free(place)}: free some disk, or lower checkpoint.keep_last"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{said}: make it writable, or move output_dir"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return f"{said}: the directory of checkpoints has vanished during the run, or another start of this run has taken over"
    return said


def _free(place: Path) -> str:
    for folder in (place, *place.parents):
        try:
            return f"{shutil.disk_usage(folder).free} are free"
        except OSError:
            continue
    raise AssertionError("the root directory is always there")


def _note(rank: int) -> str:
    return f"part-{rank:05d}.json"
