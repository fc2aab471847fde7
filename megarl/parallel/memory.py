"""Phases of a step and what the accelerator holds in each: the sampler's weights and KV cache, or what the trainer's models need.

On a GPU host trainer and sampler share every GPU. The sampler keeps its memory from a weight sync through `generating` (so that an
evaluation may follow a rollout) and gives it back when another phase begins; the next sync wakes its weights, the next `generating` its KV
cache. What the trainer does not need in a phase waits in host memory. `phases.RESIDENT` is the table; `docs/bridge.md` shows it with bytes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from megarl.operations import heartbeat
from megarl.parallel import device
from megarl.parallel.phases import FROZEN, REFERENCE, RESIDENT, Offload, Phase

Contents = Literal["changing", "constant", "scratch"]


class Sleeper(Protocol):
    """A sampler that can give its memory back: `rollout.engine.Engine`."""

    policy_version: int | None

    def wake(self, part: str) -> None: ...
    def sleep(self) -> None: ...


class Movable:
    """Tensors that leave the device together and come back in place: every view of them, wherever it is held, stays valid.

    Their storages are emptied and refilled, so a tensor must not be read in between. `tensors()` names them each time they leave; several
    may share a storage. `contents` says what the copy in host memory (pinned on a GPU host, kept for the next time) is good for: it
    follows every change, it never changes after the first copy, or there is none because the next user overwrites everything.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], contents: Contents = "changing"):
        self._tensors, self._contents = tensors, contents
        self._host: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # holding a storage keeps its identity its own
        self._away: dict[int, tuple[torch.UntypedStorage, int]] = {}  # with its size in bytes

    @property
    def is_away(self) -> bool:
        """True between `offload` and `onload`."""
        return bool(self._away)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the storages that are on the device now."""
        return sum(storage.nbytes() for storage in storages_of(self._tensors()).values())

    @torch.no_grad()
    def offload(self) -> None:
        """Copy to host memory and free the device's. Nothing to do for what is away already."""
        if self._away:
            return
        # A CPU's storage that numpy has seen (as when a checkpoint was written) cannot be resized any more: it stays.
        storages = {key: storage for key, storage in storages_of(self._tensors()).items() if storage.resizable()}
        for key, storage in storages.items():
            if self._contents == "changing" or (self._contents == "constant" and key not in self._host):
                self._host_copy(key, storage).copy_(_bytes_of(storage), non_blocking=True)
        device.synchronize()
        for key, storage in storages.items():
            self._away[key] = (storage, storage.nbytes())
            storage.resize_(0)

    @torch.no_grad()
    def onload(self) -> None:
        """Back to the device, bit for bit (scratch: with undefined contents). Nothing to do for what is there."""
        for key, (storage, num_bytes) in self._away.items():
            storage.resize_(num_bytes)
            if self._contents != "scratch":
                _bytes_of(storage).copy_(self._host[key][1], non_blocking=True)
        device.synchronize()
        self._away = {}

    def _host_copy(self, key: int, storage: torch.UntypedStorage) -> Tensor:
        if key not in self._host:
            self._host[key] = (storage, torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device.is_cuda()))
        return self._host[key][1]


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages behind `tensors`, by an identity that survives resizing."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Phases:
    """Contexts that the loop names its phases with. Every rank enters them together; an inner one decides for what follows it.

    Args: `offload` says what may leave the device: nothing, the frozen models, or all that a phase does without; `refill(version)` pushes
    the actor's weights as that version into a sampler that gave them up before it was asked to generate.
    """

    def __init__(self, engine: Sleeper, offload: Offload = "none", refill: Callable[[int], object] | None = None):
        self._engine, self.offload, self._refill = engine, offload, refill
        self._movables: list[tuple[str, str, Movable]] = []
        self._version: int | None = None  # of the weights the sampler gave up

    def admit(self, owner: str, parts: Mapping[str, Movable]) -> None:
        """Take charge of what a model owns, all of it resident. Frozen models leave at once where they may: others are still to come."""
        self._movables += [(owner, name, movable) for name, movable in parts.items()]
        if owner == FROZEN and self.offload != "none":
            for movable in parts.values():
                movable.offload()

    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device by `<owner> <part>`, summed over models of the same name."""
        total: dict[str, int] = {}
        for owner, part, movable in self._movables:
            total[f"{owner} {part}"] = total.get(f"{owner} {part}", 0) + movable.resident_bytes
        return total

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """The actor's weights are resident and there is room for the sampler's, which the sync wakes."""
        with heartbeat.phase("publish"):
            self._make_room("publishing")
            self._bring("publishing")
            yield

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """The sampler's weights and KV cache are resident."""
        if self._engine.policy_version is None and self._version is not None and self._refill is not None:
            with self.publishing():
                self._refill(self._version)
        with heartbeat.phase("generate"):
            self._make_room("generating")
            self._engine.wake("kv_cache")
            yield

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """The weights of all models are resident, the sampler's memory is free for forward passes."""
        with heartbeat.phase("score"):
            self._enter("scoring")
            yield

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Weights, gradients and optimizers are resident, the sampler's memory is free for forward and backward passes."""
        with heartbeat.phase("learn"):
            self._enter("learning")
            yield

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """The actor's weights, its optimizer's copies and its average are resident, and a reference that may become one of them."""
        self._enter("exchanging")
        yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Weights and optimizers are resident. Where they may have left, the sampler gives way and is filled again before it generates."""
        if self.offload == "all":
            self._enter("saving")
        else:
            self._bring("saving")
        yield

    def _enter(self, phase: Phase) -> None:
        self._make_room(phase)
        if self._engine.policy_version is not None:
            self._version = self._engine.policy_version
        self._engine.sleep()
        self._bring(phase)

    def _may_leave(self, owner: str) -> bool:
        return self.offload == "all" or (self.offload == "frozen" and owner in (FROZEN, REFERENCE))

    def _make_room(self, phase: Phase) -> None:
        for owner, part, movable in self._movables:
            if (owner, part) not in RESIDENT[phase] and self._may_leave(owner):
                movable.offload()
        device.release_cached_memory()

    def _bring(self, phase: Phase) -> None:
        for owner, part, movable in self._movables:
            if (owner, part) in RESIDENT[phase]:
                movable.onload()
