"""The manifest of a checkpoint: what each file holds, and how to know that it is still what was written. No pickle anywhere.

`checkpoints/step-00000123/manifest.json` is written last; a directory without one was never finished and is never read.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megarl.bridge.plan import Box
from megarl.checkpoint import sharded
from megarl.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
ROLES: dict[str, Literal["actor", "critic"]] = {"actor": "actor", "critic": "critic", "reward": "critic"}  # weight table of each model
STEP_NAME = re.compile(r"step-(\d{8,})")


class Stored(BaseModel):
    """A part of the manifest: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredTensor(Stored):
    """A tensor of a weights file: the part `box` of the Hugging Face tensor `name`, under `key`."""

    key: str
    name: str
    box: Box
    dtype: str


class StoredFile(Stored):
    """A file, by its path inside the checkpoint."""

    kind: Literal["weights", "optimizer", "random", "config", "tokenizer"]
    num_bytes: int
    sha256: str
    model: str = ""
    rank: int = 0
    tensors: tuple[StoredTensor, ...] = ()


class StoredModel(Stored):
    """A model: the shape of every tensor in Hugging Face coordinates. Its name says which weight table it follows (`ROLES`)."""

    shapes: dict[str, tuple[int, ...]]


class StoredLayout(Stored):
    """The ranks that wrote the checkpoint. Optimizer and random state fit only an equal one."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    world_size: int = 1
    distributed_optimizer: bool = True
    precision: str = "fp32"

    def __str__(self) -> str:
        data = self.world_size // (self.tensor * self.pipeline * self.context)
        axes = f"tp{self.tensor} pp{self.pipeline} dp{data}" + "".join(
            f" {axis}{size}" for axis, size in (("vpp", self.virtual_pipeline), ("cp", self.context), ("ep", self.expert)) if size > 1
        )
        return f"{axes} {self.precision}" + ("" if self.distributed_optimizer else " without distributed optimizer")


class StoredTokenizer(Stored):
    """Special tokens of the tokenizer, which the export writes into the model's configuration."""

    eos_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None


class Manifest(Stored):
    """Everything a reader must know before it opens another file of the checkpoint."""

    format: int
    course: str
    state: dict[str, int | float]
    layout: StoredLayout
    models: dict[str, StoredModel]
    files: dict[str, StoredFile]
    tokenizer: StoredTokenizer = StoredTokenizer()
    versions: dict[str, str] = {}
    run: dict = {}

    def files_of(self, kind: str, model: str = "", rank: int | None = None) -> dict[str, StoredFile]:
        """Files of one kind and model (and rank, when given), by path."""
        return {
            path: file
            for path, file in self.files.items()
            if file.kind == kind and file.model == model and (rank is None or file.rank == rank)
        }


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest of a checkpoint directory. Raises `CheckpointError`: missing, damaged, another format, paths that leave it."""
    path = directory / MANIFEST
    try:
        text = path.read_text()
    except OSError as error:
        raise CheckpointError(f"{directory} is not a complete checkpoint: cannot read {MANIFEST} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: not UTF-8 text at byte {error.start}") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise CheckpointError(f"{path} is damaged or of another megarl version: {where}: {first['msg']}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}; this megarl reads format {FORMAT}")
    if unknown := manifest.models.keys() - ROLES.keys():
        raise CheckpointError(f"{path} names the models {sorted(unknown)}; this megarl knows {sorted(ROLES)}")
    for name in manifest.files:
        if not is_inside(name):
            raise CheckpointError(f"{path} names the file {name!r}, which is outside the checkpoint: refused")
    return manifest


def is_inside(name: str) -> bool:
    """True for a relative path that cannot leave its directory."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def verify(directory: Path, name: str, file: StoredFile) -> None:
    """Read a file once and compare it with the manifest. Raises `CheckpointError` naming the file."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != file.num_bytes:
            raise CheckpointError(f"{path} has {size} bytes; its manifest says {file.num_bytes}: the checkpoint is damaged")
        found = sharded.measure(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}: the checkpoint is incomplete") from error
    if found.sha256 != file.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found.sha256[:16]}...; its manifest says {file.sha256[:16]}...: the checkpoint is damaged"
        )


def step_directories(directory: Path) -> list[Path]:
    """Finished checkpoints in a run's `checkpoints` directory, oldest first."""
    if not directory.is_dir():
        return []
    steps = [(STEP_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps if match and (path / MANIFEST).is_file())]


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint `path` means: itself, or the newest complete one of a run's output directory; None when there is none."""
    if (path / MANIFEST).is_file():
        return path
    for directory in (path / "checkpoints", path):
        if found := step_directories(directory):
            return found[-1]
    return None
