"""A process that has a small student and its checkpoints, and forks a child for every fault: a fault costs milliseconds, not a start.

`in_workshop(work, ...)` calls `work(*arguments)` there. `forked(function)` runs a function in a child and tells what became of it.
`Trap` counts the bytes and system calls of a save and kills the process at one of them, with SIGKILL, as a power cut would.
"""

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.course.lesson_files import sft_run

PRELOADED = ["megarl.checkpoint.store", "megarl.ppo.roles", "megarl.course.lesson", "tests.faults.workshop"]
CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
STEPS = 10_000


def in_workshop(work: Callable, *arguments: Any) -> Any:
    """What `work(*arguments)` returns in a new process in which torch and Megatron are imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, arguments, sender))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the workshop died with exit code {process.exitcode}") from None
    process.join()
    assert kind == "done", value
    return value


def _serve(work: Callable, arguments: tuple, sender) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        sender.send(("done", work(*arguments)))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))


def forked(function: Callable[[], Any]) -> tuple[int, Any]:
    """Run `function` in a forked child: (0, what it returned, as JSON), (1, its traceback), or (-signal, None) when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = [0, function()]
        except BaseException:
            answer = [1, traceback.format_exc()]
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return tuple(json.loads(text)) if code == 0 else (code, None)


@dataclass
class Bench:
    """A run with one student, whose every weight and moment holds the number of the step."""

    checkpoints: Any
    students: dict
    directory: Path

    def fill(self, step: int) -> None:
        for tensor in self.tensors():
            tensor.fill_(float(step))

    def tensors(self) -> list:
        (student,) = self.students.values()
        slots = student.learner.optimizer_pieces(student.pieces).values()
        return [piece.view for pieces in (student.pieces, *slots) for piece in pieces]

    def filled_with(self) -> list[float]:
        """The different numbers in all weights and moments."""
        return sorted({value for tensor in self.tensors() for value in tensor.unique().tolist()})

    def restore(self):
        return self.checkpoints.restore_or_start(self.students)

    def save(self, state):
        """The next step's checkpoint, wholly written; its state."""
        state = state.advance(16)
        self.fill(state.step)
        self.checkpoints.save(state, self.students)
        self.checkpoints.finish()
        return state

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


def make_bench(root: Path, **settings: Any) -> Bench:
    """The student of `root`'s files (see `write_files`) and the checkpoints of `root`/run."""
    from megarl.checkpoint.sources import open_start
    from megarl.checkpoint.store import Checkpoints
    from megarl.course.lesson import Student
    from megarl.data.tokenizers import load_tokenizer
    from megarl.parallel import groups
    from megarl.ppo.roles import build_learner

    run = sft_run(root, "run", STEPS, checkpoint=settings)
    layout = groups.initialize(run.parallel, run.seed)
    spec, source = open_start(run.model, "actor", 0)
    learner, pieces = build_learner(spec, "actor", run.model, run, layout, source, 10)
    checkpoints = Checkpoints("sft", run, layout, load_tokenizer(run.tokenizer), STEPS)
    return Bench(checkpoints, {"actor": Student(spec, learner, pieces)}, run.output_dir / "checkpoints")


class Trap:
    """Counts bytes written and system calls from now on, and kills this process at a byte or before a call when told to."""

    def __init__(self, at_byte: int | None = None, at_call: int | None = None, act: Callable[[], None] | None = None):
        from megarl.checkpoint import sharded

        self.at_byte, self.at_call, self.act = at_byte, at_call, act or self.kill
        self.num_bytes, self.calls = 0, []
        self._lock = threading.RLock()
        self._write_all, sharded._write_all = sharded._write_all, self._write
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, file, block) -> None:
        with self._lock:
            room = None if self.at_byte is None else self.at_byte - self.num_bytes
            self.num_bytes += len(block)
            is_due = room is not None and 0 <= room < len(block)
            if is_due:
                self._write_all(file, memoryview(block)[:room])
                self.act()
        self._write_all(file, memoryview(block)[room:] if is_due else block)

    def _counted(self, name: str, original: Callable) -> Callable:
        def call(*arguments, **keywords):
            with self._lock:
                self.calls.append(name)
                if self.at_call == len(self.calls):
                    self.act()
            return original(*arguments, **keywords)

        return call
