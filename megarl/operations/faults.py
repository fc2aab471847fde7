"""Faults on purpose, for rehearsals: `MEGARL_FAULT=phase:rank:iteration:action`, refused unless `MEGARL_ALLOW_FAULTS=1` is set as well.

Phases are those of `heartbeat` (setup, load, publish, generate, score, learn, save, evaluate); an iteration is the step being worked on,
from 1, and 0 before the first. Several faults stand with commas between them. With `MEGARL_FAULT_ONCE=FILE` each strikes once: it adds a
line with its name and the time to FILE, and a run that starts again is spared those that stand there.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megarl.errors import ConfigError

FAULT, ALLOW, ONCE = "MEGARL_FAULT", "MEGARL_ALLOW_FAULTS", "MEGARL_FAULT_ONCE"
PHASES = ("setup", "load", "publish", "generate", "score", "learn", "save", "evaluate")
FOREVER_S = 10**6
SLOW_S = 2.0  # a pause of the action `slow`, in each step from the iteration on
EXIT_CODE = 7


@dataclass(frozen=True)
class Fault:
    """What happens when `rank` enters `phase` of step `iteration`."""

    phase: str
    rank: int
    iteration: int
    action: str
    once: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "tuple[Fault, ...]":
        """The faults that were asked for. Raises `ConfigError` where they are not allowed or one is not understood."""
        text = environment.get(FAULT, "")
        if text and environment.get(ALLOW) != "1":
            raise ConfigError(f"{FAULT}={text} would break this run on purpose: unset it, or set {ALLOW}=1 to rehearse the fault")
        return tuple(cls.from_text(name, environment.get(ONCE, "")) for name in text.split(",")) if text else ()

    @classmethod
    def from_text(cls, text: str, once: str) -> "Fault":
        """The fault that `text` describes. Raises `ConfigError`."""
        parts = text.split(":")
        numbers = parts[1:3]
        if len(parts) != 4 or parts[0] not in PHASES or not all(map(str.isdigit, numbers)) or parts[3] not in ACTIONS:
            raise ConfigError(
                f"{FAULT} is {text!r}; expected phase:rank:iteration:action with a phase of {', '.join(PHASES)} and an action of"
                f" {', '.join(ACTIONS)}"
            )
        return cls(parts[0], int(numbers[0]), int(numbers[1]), parts[3], once)

    @property
    def name(self) -> str:
        """The fault as it is asked for."""
        return f"{self.phase}:{self.rank}:{self.iteration}:{self.action}"

    def strikes(self, phase: str, rank: int, iteration: int) -> bool:
        """Whether this is the moment. `slow` lasts from its iteration on."""
        is_time = iteration >= self.iteration if self.action == "slow" else iteration == self.iteration
        return (phase, rank) == (self.phase, self.rank) and is_time and self.name not in struck(self.once)

    def strike(self) -> None:
        """Do it; `kill`, `exit` and the endless ones do not return."""
        if self.once:
            descriptor = os.open(self.once, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            os.write(descriptor, f"{self.name} {time.time():.3f}\n".encode())
            os.close(descriptor)
        ACTIONS[self.action]()


def struck(path: str | os.PathLike) -> dict[str, float]:
    """Names of the faults that have struck, by the file in `MEGARL_FAULT_ONCE`, with the wall-clock time of each."""
    try:
        with open(path) as file:
            return {name: float(when) for name, when in (line.split() for line in file)}
    except OSError:
        return {}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _exit() -> None:
    os._exit(EXIT_CODE)


def _hang() -> None:
    time.sleep(FOREVER_S)


def _hold_interpreter() -> None:
    """Native code that keeps the interpreter's lock: no other thread of this process runs Python any more."""
    ctypes.PyDLL(None).sleep(FOREVER_S)


def _slow() -> None:
    time.sleep(SLOW_S)


def _skip_collective() -> None:
    """The next gather of this rank does not happen: it goes on with what it has, and meets the others in the wrong exchange."""
    import torch.distributed as dist

    original = dist.all_gather

    def skipped(parts, tensor, *arguments, **options):
        dist.all_gather = original
        for part in parts:
            part.copy_(tensor)

    dist.all_gather = skipped


def _deadlock() -> None:
    """This rank waits for a message that nobody sends, and the others for this rank."""
    import torch
    import torch.distributed as dist

    dist.recv(torch.zeros(1), src=(dist.get_rank() + 1) % dist.get_world_size(), tag=4711)


def _poison() -> None:
    """One activation of this rank's next forward pass becomes nan, and with it the loss and the gradients."""
    import torch

    def poison(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.requires_grad:
            handle.remove()
            return output * float("nan")
        return None

    handle = torch.nn.modules.module.register_module_forward_hook(poison)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "stop": _stop,
    "exit": _exit,
    "hang": _hang,
    "gil": _hold_interpreter,
    "slow": _slow,
    "deadlock": _deadlock,
    "skip-collective": _skip_collective,
    "nan": _poison,
}
