"""The manifest of a checkpoint: what each file holds, and how to know that it is still what was written. No pickle anywhere.

`checkpoints/step-00000123/manifest.json` is written last; a directory without one was never finished and is never read. Its own hash lies
beside it. `docs/checkpoints.md` describes every field.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megarl.bridge.plan import Box
from megarl.checkpoint import sharded
from megarl.errors import CheckpointError, DamageError

FORMAT = 3
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.json.sha256"
LATEST = "latest"
ROLES: dict[str, Literal["actor", "critic"]] = {"actor": "actor", "critic": "critic", "reward": "critic", "reference": "actor"}
"""The weight table of each model."""
STEP_NAME = re.compile(r"step-(\d{8,})")


class Stored(BaseModel):
    """A part of the manifest: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredTensor(Stored):
    """A tensor of a file: the part `box` of the Hugging Face tensor `name`, or of what the optimizer holds for it, under `key`."""

    key: str
    name: str
    box: Box
    dtype: str
    slot: Literal["weight", "exp_avg", "exp_avg_sq", "main", "ema"] = "weight"


class StoredFile(Stored):
    """A file, by its path inside the checkpoint."""

    kind: Literal["weights", "optimizer", "random", "carried", "config", "tokenizer"]
    num_bytes: int
    blake3: str
    model: str = ""
    rank: int = 0
    tensors: tuple[StoredTensor, ...] = ()


class StoredModel(Stored):
    """A model: the shape of every tensor in Hugging Face coordinates. Its name says which weight table it follows (`ROLES`).

    `counts` is what its learner counts (`Learner.counts`); empty where there are only weights.
    """

    shapes: dict[str, tuple[int, ...]]
    counts: dict[str, int] = {}


class StoredLayout(Stored):
    """The ranks that wrote the checkpoint. Random states fit only an equal one."""

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
    """Everything a reader must know before it opens another file of the checkpoint.

    `parent` names the checkpoint that the run had saved or read before this one, `attempt` the start of the run that wrote it (they are
    counted, see `attempts`), `metrics` what the step reported.
    """

    format: int
    course: str
    state: dict[str, int | float]
    layout: StoredLayout
    models: dict[str, StoredModel]
    files: dict[str, StoredFile]
    tokenizer: StoredTokenizer = StoredTokenizer()
    versions: dict[str, str] = {}
    run: dict = {}
    parent: str = ""
    attempt: int = 0
    metrics: dict[str, float] = {}

    def files_of(self, kind: str, model: str = "", rank: int | None = None) -> dict[str, StoredFile]:
        """Files of one kind and model (and rank, when given), by path."""
        return {
            path: file
            for path, file in self.files.items()
            if file.kind == kind and file.model == model and (rank is None or file.rank == rank)
        }


def read_manifest(directory: Path) -> Manifest:
    """The checked manifest of a checkpoint directory.

    Raises `DamageError` where it is missing, not what was written, or of another step than its directory's name says, and
    `CheckpointError` for another format and for paths that leave the directory.
    """
    path = directory / MANIFEST
    try:
        data, recorded = path.read_bytes(), (directory / MANIFEST_HASH).read_bytes()
    except OSError as error:
        raise DamageError(
            f"{directory} is not a complete checkpoint: cannot read {Path(error.filename).name} ({error.strerror})"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if recorded != manifest_hash_line(found):
        raise DamageError(f"{path} has SHA-256 {found}; {MANIFEST_HASH} says {recorded[:64].decode(errors='replace')}: damaged")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise CheckpointError(f"{path} is of another megarl version: {where}: {first['msg']}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}; this megarl reads format {FORMAT}")
    if unknown := manifest.models.keys() - ROLES.keys():
        raise CheckpointError(f"{path} names the models {sorted(unknown)}; this megarl knows {sorted(ROLES)}")
    for name in manifest.files:
        if not is_inside(name):
            raise CheckpointError(f"{path} names the file {name!r}, which is outside the checkpoint: refused")
    if (named := STEP_NAME.fullmatch(directory.name)) and int(named[1]) != manifest.state.get("step"):
        raise DamageError(f"{path} is of step {manifest.state.get('step')}; its directory is called {directory.name}")
    return manifest


def manifest_hash_line(digest: str) -> bytes:
    """What the file beside the manifest says, as `sha256sum` writes it."""
    return f"{digest}  {MANIFEST}\n".encode()


def is_inside(name: str) -> bool:
    """True for a relative path that cannot leave its directory."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def verify(directory: Path, name: str, file: StoredFile) -> None:
    """Read a file once and compare it with the manifest. Raises `DamageError` naming the file, what was expected and what was found."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != file.num_bytes:
            raise DamageError(f"{path} has {size} bytes; its manifest says {file.num_bytes}: damaged")
        found = sharded.measure(path)
    except OSError as error:
        raise DamageError(f"{path} cannot be read: {error.strerror}: the checkpoint is incomplete") from error
    if found.digest != file.blake3:
        raise DamageError(f"{path} has BLAKE3 {found.digest}; its manifest says {file.blake3}: damaged")


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
