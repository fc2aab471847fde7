"""A run's checkpoints: `output_dir/checkpoints/step-00000123/`, complete or not there at all.

Every rank writes its files into a staging directory; when all have, rank 0 writes the manifest last, renames the directory into place and
replaces the pointer `latest`. A process killed at any moment leaves the previous checkpoint as it was. Files of one checkpoint:

    manifest.json                           what every file holds, sizes and SHA-256
    <model>/config.json                     the model as Hugging Face describes it
    <model>/weights-00000.safetensors       pieces in Hugging Face coordinates that rank 0 owns, in the parameters' dtype
    <model>/optimizer-00000.safetensors     rank 0's optimizer state, float32 masters included; its numbers in optimizer-00000.json
    random-00000.safetensors                rank 0's random states
    tokenizer/                              what `transformers.AutoTokenizer` needs
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import safe_open

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import FORMAT, ROLES, Manifest, StoredFile, StoredLayout, StoredModel, StoredTensor
from megarl.checkpoint.publish import (
    NOT_WRITTEN,
    STAGING,
    TRASH,
    check_room,
    discard,
    point_to,
    publish,
    special_tokens,
    stored,
    versions,
    with_digest,
    write_config,
    write_tokenizer,
)
from megarl.checkpoint.sharded import DTYPE_NAMES, TensorEntry, cover_faults, write_tensors, write_text
from megarl.checkpoint.sources import CheckpointSource
from megarl.checkpoint.train_state import TrainState
from megarl.config import Run
from megarl.data.tokenizers import Tokenizer
from megarl.errors import CheckpointError
from megarl.models.family import ModelSpec, read_spec
from megarl.models.learner import Learner
from megarl.models.pieces import Piece, load_pieces
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout

Result = TypeVar("Result")


class Checkpointable(Protocol):
    """What the store keeps of a trained model: `Actor`, `Critic`, and the student of a lesson."""

    spec: ModelSpec
    pieces: Sequence[Piece]
    learner: Learner


@dataclass(frozen=True)
class PlannedFile:
    """A file that a rank will write: live tensors under their keys, or a text."""

    file: StoredFile
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    text: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values()) + len(self.text)

    def write(self, path: Path) -> StoredFile:
        """Write it and return its entry of the manifest."""
        if self.text:
            return with_digest(self.file, write_text(path, self.text))
        entries = [TensorEntry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in self.tensors.items()]
        return with_digest(self.file, write_tensors(path, entries, lambda entry: self.tensors[entry.key]))


class Checkpoints:
    """Saves and restores one run. Every method that touches disk is entered by all ranks; a failure on one is raised on all of them."""

    def __init__(self, course: str, run: Run, layout: ParallelLayout, tokenizer: Tokenizer, total_steps: int):
        self.course = course
        self.run = run
        self.layout = layout
        self.tokenizer = tokenizer
        self.total_steps = total_steps
        self.directory = Path(run.output_dir) / "checkpoints"
        self._world = groups.group(layout, "world")

    def due(self, state: TrainState) -> bool:
        """True every `checkpoint.every_steps` steps, and after the last step."""
        every = self.run.checkpoint.every_steps
        return state.step == self.total_steps or (every > 0 and state.step % every == 0)

    # ---------------------------------------------------------------- save
    def save(self, state: TrainState, checkpointables: Mapping[str, Checkpointable]) -> Path:
        """Write a checkpoint of `state` and return its directory. Raises `SetupError` (no room) or `CheckpointError` on every rank."""
        final = self.directory / f"step-{state.step:08d}"
        staging = self.directory / (STAGING + final.name)
        plan = self._plan(checkpointables)
        needed = sum(collectives.gather_json(sum(file.num_bytes for file in plan.values()), self._world))
        self._together(lambda: self._prepare(staging, checkpointables, needed) if self.layout.rank == 0 else None)
        written = self._together(lambda: {path: file.write(staging / path) for path, file in plan.items()})
        files: dict[str, dict] = {}
        for part in collectives.gather_json({path: file.model_dump(mode="json") for path, file in written.items()}, self._world):
            files.update(part)
        self._together(lambda: self._publish(staging, final, state, checkpointables, files) if self.layout.rank == 0 else None)
        return final

    def _plan(self, checkpointables: Mapping[str, Checkpointable]) -> dict[str, PlannedFile]:
        """The files this rank writes, by path."""
        rank, plan = self.layout.rank, {}
        for model, kept in checkpointables.items():
            owned = {_piece_key(piece): piece for piece in kept.pieces if piece.is_owner}
            held = tuple(StoredTensor(key=key, name=p.hf_name, box=p.box, dtype=DTYPE_NAMES[p.view.dtype]) for key, p in owned.items())
            if owned:
                file = stored("weights", NOT_WRITTEN, model=model, rank=rank, tensors=held)
                plan[f"{model}/weights-{rank:05d}.safetensors"] = PlannedFile(file, {key: piece.view for key, piece in owned.items()})
            file = stored("optimizer", NOT_WRITTEN, model=model, rank=rank)
            plan[f"{model}/optimizer-{rank:05d}.safetensors"] = PlannedFile(file, kept.learner.optimizer_tensors())
            plan[f"{model}/optimizer-{rank:05d}.json"] = PlannedFile(file, text=json.dumps(kept.learner.optimizer_json()))
        plan[f"random-{rank:05d}.safetensors"] = PlannedFile(stored("random", NOT_WRITTEN, rank=rank), device.random_states())
        return plan

    def _check_room(self, needed: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        check_room(self.directory, needed, "a checkpoint needs", "lower checkpoint.keep_last, or move output_dir")

    def _prepare(self, staging: Path, checkpointables: Mapping[str, Checkpointable], needed: int) -> None:
        self._check_room(needed)
        for model in checkpointables:
            (staging / model).mkdir(parents=True)

    def _publish(
        self, staging: Path, final: Path, state: TrainState, checkpointables: Mapping[str, Checkpointable], files: dict[str, dict]
    ) -> None:
        found = {path: StoredFile.model_validate(file) for path, file in files.items()}
        models = {}
        for model, kept in checkpointables.items():
            shapes = kept.spec.table(ROLES[model]).hf_shapes
            pieces = [(t.name, t.box) for file in found.values() if file.kind == "weights" and file.model == model for t in file.tensors]
            if faults := cover_faults(shapes, pieces):
                raise AssertionError(f"the pieces of {model} do not make up the model: {'; '.join(faults[:5])}")
            models[model] = StoredModel(shapes=shapes)
            found |= write_config(staging, model, kept.spec.hf_config)
        found |= write_tokenizer(staging, self.tokenizer)
        manifest = Manifest(
            format=FORMAT,
            course=self.course,
            state=state.to_json(),
            layout=self._stored_layout(),
            models=models,
            files=found,
            tokenizer=special_tokens(self.tokenizer),
            versions=versions(),
            run=self.run.model_dump(mode="json"),
        )
        publish(staging, final, manifest)
        point_to(final)
        for old in manifests.step_directories(self.directory)[: -self.run.checkpoint.keep_last]:
            discard(old)

    # ---------------------------------------------------------------- restore
    def restore_or_start(self, checkpointables: Mapping[str, Checkpointable], start: TrainState | None = None) -> TrainState:
        """Continue from the newest complete checkpoint of the output directory, or return `start` where there is none.

        Weights, optimizers and this rank's random states are put back. Raises `CheckpointError` on every rank when the checkpoint is
        damaged, or belongs to another model, layout or stage of the course, naming both, and `SetupError` when the disk has no room for
        the next checkpoint: hours of training must not end there.
        """
        owned = sum(_num_bytes_saved(piece.view) for kept in checkpointables.values() for piece in kept.pieces if piece.is_owner)
        needed = sum(collectives.gather_json(owned, self._world))
        self._together(lambda: self._check_room(needed) if self.layout.rank == 0 else None)
        found = collectives.gather_json(self._together(self._choose), self._world)[0]
        if found is None:
            return start or TrainState()
        return self._together(lambda: self._restore(self.directory / found, checkpointables))

    def _choose(self) -> str | None:
        """Name of the checkpoint to continue from; only rank 0 looks, so that all ranks agree."""
        if self.layout.rank != 0:
            return None
        directories = manifests.step_directories(self.directory)
        if directories and not self.run.checkpoint.resume:
            raise CheckpointError(
                f"{self.directory} already holds {directories[-1].name}, but checkpoint.resume is false: set it to true to continue that"
                " run, or choose another output_dir"
            )
        return directories[-1].name if directories else None

    def _restore(self, directory: Path, checkpointables: Mapping[str, Checkpointable]) -> TrainState:
        manifest = manifests.read_manifest(directory)
        self._check_same_run(directory, manifest, checkpointables)
        rank = self.layout.rank
        for model, kept in checkpointables.items():
            load_pieces(kept.pieces, CheckpointSource(directory, model))
            tensors, numbers = _read_own(directory, manifest.files_of("optimizer", model, rank))
            kept.learner.load_optimizer(tensors, numbers)
        device.restore_random_states(_read_own(directory, manifest.files_of("random", rank=rank))[0])
        return TrainState.from_json(manifest.state)

    def _check_same_run(self, directory: Path, manifest: Manifest, checkpointables: Mapping[str, Checkpointable]) -> None:
        if manifest.course != self.course or set(manifest.models) != set(checkpointables):
            raise CheckpointError(
                f"{directory} is a {manifest.course} checkpoint of {sorted(manifest.models)}; this is a {self.course} run of"
                f" {sorted(checkpointables)}: choose another output_dir"
            )
        if manifest.layout != self._stored_layout():
            raise CheckpointError(
                f"{directory} was written by the layout {manifest.layout}; this run has {self._stored_layout()}: continue with the layout"
                " that wrote it, or start a new output_dir from its weights (model path)"
            )
        for model, kept in checkpointables.items():
            if differences := spec_differences(read_spec(directory / model), kept.spec):
                raise CheckpointError(f"{directory} holds another {model}: {differences}; choose another output_dir or that model's path")

    def _stored_layout(self) -> StoredLayout:
        axes = {axis: getattr(self.layout, axis) for axis in ("tensor", "pipeline", "context", "expert", "world_size")}
        parallel = self.run.parallel
        return StoredLayout(
            **axes,
            virtual_pipeline=parallel.virtual_pipeline,
            distributed_optimizer=parallel.distributed_optimizer,
            precision=self.run.precision,
        )

    def _sweep(self) -> None:
        """Remove what killed writers left."""
        for path in self.directory.iterdir():
            if path.name.startswith((STAGING, TRASH)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _together(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part of something on disk; when any rank's part fails, every rank raises."""

        def on_disk() -> Result:
            try:
                return work()
            except OSError as error:
                raise CheckpointError(f"{error.filename or self.directory}: {error.strerror}") from error

        return collectives.together(on_disk, self._world)


def spec_differences(stored_spec: ModelSpec, run_spec: ModelSpec) -> str:
    """Fields in which two models differ, both values named; empty when they are the same model."""
    names = [f.name for f in fields(ModelSpec) if f.name != "hf_config" and getattr(stored_spec, f.name) != getattr(run_spec, f.name)]
    return ", ".join(f"{name} {getattr(stored_spec, name)} in the checkpoint, {getattr(run_spec, name)} in the run" for name in names)


def _num_bytes_saved(weights: torch.Tensor) -> int:
    """A weight, Adam's two float32 moments, and a float32 copy of what is narrower: known before the optimizer has any state."""
    return weights.nbytes + weights.numel() * (8 if weights.itemsize >= 4 else 12)


def _piece_key(piece: Piece) -> str:
    return piece.hf_name + "|" + ",".join(f"{offset}:{size}" for offset, size in piece.box)


def _read_own(directory: Path, files: Mapping[str, StoredFile]) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and numbers of one rank's files, after verifying them."""
    tensors, numbers = {}, {}
    if not files:
        raise CheckpointError(f"{directory} holds weights only; a run continues from what it wrote itself: name it as a model path")
    for path, file in files.items():
        manifests.verify(directory, path, file)
        if path.endswith(".json"):
            numbers = json.loads((directory / path).read_text())
        else:
            with safe_open(directory / path, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    return tensors, numbers
