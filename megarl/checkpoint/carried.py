"""What a run hands from one step to the next beside its models: as text, one file for each data rank that has any."""

from pathlib import Path
from typing import Protocol

import torch

from megarl.checkpoint.files import PlannedFile
from megarl.checkpoint.manifest import Manifest
from megarl.checkpoint.publish import NOT_WRITTEN, stored
from megarl.checkpoint.sources import CheckpointFiles

KEY = "json"


class Carried(Protocol):
    """Who has something to hand on: `ppo.harvest.Harvester`."""

    def to_hand_on(self) -> bytes | None:
        """What this rank saves; None where another rank of its replica does."""

    def take_back(self, parts: list[bytes]) -> None:
        """Go on with what all data ranks saved, in their order; nothing where nobody did."""


def carried_file(rank: int, carried: Carried | None) -> list[PlannedFile]:
    """The file of this rank, if it has one."""
    told = None if carried is None else carried.to_hand_on()
    if told is None:
        return []
    tensor = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    return [PlannedFile(f"carried-{rank:05d}.safetensors", stored("carried", NOT_WRITTEN, rank=rank), {KEY: tensor})]


def read_carried(directory: Path, manifest: Manifest) -> list[bytes]:
    """What all data ranks saved, from verified files."""
    files = CheckpointFiles(directory, manifest, is_verified=True)
    return [bytes(files.read_all(path)[KEY].numpy()) for path in sorted(manifest.files_of("carried"))]
