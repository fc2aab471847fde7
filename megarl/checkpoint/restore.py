"""Reading one checkpoint back into a run: every byte is checked first, then each rank reads the boxes that its layout needs."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.files import MAX_FILES, Checkpointable
from megarl.checkpoint.manifest import Manifest
from megarl.checkpoint.side_by_side import side_by_side
from megarl.checkpoint.sources import CheckpointFiles, CheckpointSource
from megarl.errors import CheckpointError
from megarl.models.family import ModelSpec, read_spec
from megarl.models.pieces import load_pieces
from megarl.parallel import device


def verify_share(directory: Path, manifest: Manifest, rank: int, world_size: int) -> None:
    """Verify this rank's share of all files, the ones it wrote itself where as many ranks wrote; together the ranks read each byte once.

    Raises `DamageError`, naming the first damaged file.
    """
    mine = [(path, file) for path, file in manifest.files.items() if file.rank % world_size == rank]
    side_by_side(lambda item: manifests.verify(directory, *item), mine, MAX_FILES)


def check_same_run(directory: Path, manifest: Manifest, course: str, precision: str, specs: Mapping[str, ModelSpec | None]) -> None:
    """Raise `CheckpointError` when the checkpoint is of another stage, precision or model than this run. The layout may be another.

    `specs` are the run's models by their name in checkpoints; one whose shape is not known (None) is not compared.
    """
    if manifest.course != course or set(manifest.models) != set(specs):
        raise CheckpointError(
            f"{directory} is a {manifest.course} checkpoint of {sorted(manifest.models)}; this is a {course} run of"
            f" {sorted(specs)}: choose another output_dir"
        )
    if manifest.layout.precision != precision:
        raise CheckpointError(
            f"{directory} was written in precision {manifest.layout.precision}; this run has {precision}: set precision back, or"
            " start a new output_dir from its weights (model path)"
        )
    for model, spec in specs.items():
        if spec is not None and (differences := spec_differences(read_spec(directory / model), spec)):
            raise CheckpointError(f"{directory} holds another {model}: {differences}; choose another output_dir or that model's path")
        if not manifest.models[model].counts:
            raise CheckpointError(f"{directory} holds weights only; a run continues from what it wrote itself: name it as a model path")


def load(directory: Path, manifest: Manifest, checkpointables: Mapping[str, Checkpointable]) -> list[str]:
    """Read what this rank holds of every model, weights and optimizer state, from verified files; returns what a user should know.

    Beside the model itself a rank needs memory for one block of a tensor.
    """
    files, notices = CheckpointFiles(directory, manifest, is_verified=True), []
    for model, kept in checkpointables.items():
        load_pieces(kept.pieces, CheckpointSource(directory, model, files=files))
        stored = {tensor.slot for file in manifest.files_of("optimizer", model).values() for tensor in file.tensors}
        wanted = kept.learner.optimizer_pieces(kept.pieces)
        for slot, pieces in wanted.items():
            if slot in stored or slot != "ema":
                source = CheckpointSource(directory, model, slot, files)
                _check_learned(directory, model, {piece.hf_name for piece in pieces} - set(source.names()))
                load_pieces(pieces, source)
        if "ema" not in stored and kept.learner.restart_ema():
            notices.append(f"{directory.name} holds no moving average of {model}: it starts anew from the weights")
        if "ema" in stored and "ema" not in wanted:
            notices.append(f"{directory.name} holds a moving average of {model}, which this run does not keep (ppo.ema): it is dropped")
        kept.learner.load_counts(manifest.models[model].counts)
    return notices


def _check_learned(directory: Path, model: str, missing: set[str]) -> None:
    """Raise `CheckpointError` for weights that learn now and were frozen when the checkpoint was written."""
    if missing:
        raise CheckpointError(
            f"{directory} holds no optimizer state of {min(missing)} and {len(missing) - 1} other tensors of {model}: they were frozen; set"
            f" {model}.frozen_layers back, or start a new output_dir from its weights (model path)"
        )


def load_random_states(directory: Path, manifest: Manifest, rank: int) -> None:
    """Put back what `rank` had. Only ranks of the layout that wrote the checkpoint call it."""
    files = CheckpointFiles(directory, manifest, is_verified=True)
    for path in manifest.files_of("random", rank=rank):
        device.restore_random_states(files.read_all(path))


def spec_differences(stored_spec: ModelSpec, run_spec: ModelSpec) -> str:
    """Fields in which two models differ, both values named; empty when they are the same model."""
    compared = [f.name for f in fields(ModelSpec) if f.compare and f.name != "hf_config"]
    names = [name for name in compared if getattr(stored_spec, name) != getattr(run_spec, name)]
    return ", ".join(f"{name} {getattr(stored_spec, name)} in the checkpoint, {getattr(run_spec, name)} in the run" for name in names)
