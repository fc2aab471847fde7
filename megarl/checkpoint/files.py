"""What one rank writes of a checkpoint: which tensors go into which file, and their copies in host memory.

Every element of every weight, moment and master is written by exactly one rank. Large amounts are dealt to several files, which are
written, hashed and verified side by side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megarl.checkpoint.manifest import StoredFile, StoredTensor
from megarl.checkpoint.publish import NOT_WRITTEN, stored
from megarl.checkpoint.sharded import DTYPE_NAMES
from megarl.checkpoint.side_by_side import side_by_side
from megarl.models.family import ModelSpec
from megarl.models.optimizer_pieces import Slot
from megarl.models.pieces import Piece
from megarl.parallel import device

FILE_BYTES = 64 << 20  # less is not worth another file
BUFFER_BYTES = 256 << 20
ALIGNMENT = 64
MAX_FILES = 4  # of one kind, a model and rank: as many are written at once


class Kept(Protocol):
    """What a checkpoint keeps of a model beside its weights: `models.learner.Learner`, and what a reference has instead."""

    def optimizer_pieces(self, weights: Sequence[Piece]) -> Mapping[Slot, Sequence[Piece]]: ...
    def counts(self) -> dict[str, int]: ...
    def load_counts(self, counts: dict[str, int]) -> None: ...
    def restart_ema(self) -> bool: ...
    @property
    def is_skipping(self) -> bool: ...
    def state_bytes(self, weights: Tensor) -> int: ...


class Checkpointable(Protocol):
    """What a checkpoint keeps of a model that changes: `Actor`, `Critic`, a reference that is refreshed, the student of a lesson."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def pieces(self) -> Sequence[Piece]: ...
    @property
    def learner(self) -> Kept: ...


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank will write: tensors by key, and the manifest's entry without size and hash."""

    path: str
    entry: StoredFile
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_files(rank: int, checkpointables: Mapping[str, Checkpointable]) -> list[PlannedFile]:
    """The files of this rank, with live tensors: what its models own, and its random states."""
    plan = []
    for model, kept in checkpointables.items():
        weights = {_key("weight", piece): ("weight", piece) for piece in kept.pieces if piece.is_owner}
        state = {
            _key(slot, piece): (slot, piece)
            for slot, pieces in kept.learner.optimizer_pieces(kept.pieces).items()
            for piece in pieces
            if piece.is_owner
        }
        plan += _dealt("weights", model, rank, weights) + _dealt("optimizer", model, rank, state)
    random = stored("random", NOT_WRITTEN, rank=rank)
    return [*plan, PlannedFile(f"random-{rank:05d}.safetensors", random, device.random_states())]


def num_bytes_saved(kept: Checkpointable) -> int:
    """Bytes of a model's tensors that this rank will write: known before the optimizer has any state."""
    owned = [piece.view for piece in kept.pieces if piece.is_owner]
    return sum(weights.nbytes + kept.learner.state_bytes(weights) for weights in owned)


class HostBuffers:
    """Copies of a plan's tensors in host memory, pinned on a GPU host; the memory is kept for the next copy.

    Tensors share blocks, because pinned memory comes in powers of two.
    """

    def __init__(self) -> None:
        self._shape: list[tuple] = []
        self._copies: list[dict[str, Tensor]] = []
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def copy(self, plan: Sequence[PlannedFile]) -> list[PlannedFile]:
        """The same plan with copies that training leaves alone. Returns when they are complete."""
        shape = [(file.path, key, tensor.shape, tensor.dtype) for file in plan for key, tensor in file.tensors.items()]
        if shape != self._shape:
            self._blocks, self._copies, self._shape = [], [], []
            self._blocks, self._copies = _buffers(plan)
            self._shape = shape
        pairs = list(zip(plan, self._copies, strict=True))
        if device.is_cuda():
            for pair in pairs:
                _copy(pair)  # in this thread's stream, behind the step's last kernels
            device.synchronize()
        else:
            side_by_side(_copy, pairs, MAX_FILES)
        return [replace(file, tensors=copies) for file, copies in zip(plan, self._copies, strict=True)]


def _copy(pair: tuple[PlannedFile, dict[str, Tensor]]) -> None:
    file, copies = pair
    for key, tensor in file.tensors.items():
        copies[key].copy_(tensor, non_blocking=True)


def _buffers(plan: Sequence[PlannedFile]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Blocks of at most `BUFFER_BYTES` (a larger tensor has its own), and in them a tensor like each of the plan's, file by file."""
    places: list[tuple[int, int]] = []  # block and offset, in the plan's order
    sizes: list[int] = []
    for tensor in (tensor for file in plan for tensor in file.tensors.values()):
        room = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + room > BUFFER_BYTES:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += room
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=device.is_cuda()) for size in sizes]
    free = iter(places)
    copies = []
    for file in plan:
        copies.append({})
        for key, tensor in file.tensors.items():
            block, offset = next(free)
            copies[-1][key] = blocks[block][offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return blocks, copies


def _dealt(kind: str, model: str, rank: int, held: Mapping[str, tuple[str, Piece]]) -> list[PlannedFile]:
    """The tensors in files of about equal size: largest first, each to the file that has least."""
    if not held:
        return []
    total = sum(piece.view.nbytes for _, piece in held.values())
    shares: list[dict[str, tuple[str, Piece]]] = [{} for _ in range(min(MAX_FILES, len(held), math.ceil(total / FILE_BYTES)))]
    sizes = [0] * len(shares)
    for key, (slot, piece) in sorted(held.items(), key=lambda item: (-item[1][1].view.nbytes, item[0])):
        least = sizes.index(min(sizes))
        shares[least][key] = (slot, piece)
        sizes[least] += piece.view.nbytes
    files = []
    for number, share in enumerate(shares):
        tensors = tuple(
            StoredTensor(key=key, name=piece.hf_name, box=piece.box, dtype=DTYPE_NAMES[piece.view.dtype], slot=slot)
            for key, (slot, piece) in sorted(share.items())
        )
        entry = stored(kind, NOT_WRITTEN, model=model, rank=rank, tensors=tensors)
        path = f"{model}/{kind}-{rank:05d}-{number}.safetensors"
        files.append(PlannedFile(path, entry, {key: piece.view for key, (_, piece) in share.items()}))
    return files


def _key(slot: str, piece: Piece) -> str:
    box = ",".join(f"{offset}:{size}" for offset, size in piece.box)
    return f"{piece.hf_name}|{box}" if slot == "weight" else f"{slot}|{piece.hf_name}|{box}"
