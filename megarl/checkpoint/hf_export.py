"""From a checkpoint to a Hugging Face directory that was proven before it got its name: `megarl export CHECKPOINT OUT`."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.export_proof import LOGITS_PARAMETERS, Proof, check_names, compare_logits
from megarl.checkpoint.hf_files import CONFIG_NAMES, copy_tokenizer, hf_config, write_generation_config, write_index
from megarl.checkpoint.manifest import Manifest
from megarl.checkpoint.model_card import model_card
from megarl.checkpoint.publish import GENERATION, STAGING, start_output
from megarl.checkpoint.sharded import TensorEntry, WrittenFile, cover_faults, sync, write_tensors, write_text
from megarl.checkpoint.sources import AveragedSource, CheckpointSource, SafetensorsSource
from megarl.checkpoint.streams import MAX_SHARD_BYTES, CastSource, first_difference, plan_shards, row_blocks, wanted_dtype
from megarl.errors import CheckpointError, SetupError
from megarl.models.family import ModelSpec, read_spec
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout

Result = TypeVar("Result")


@dataclass(frozen=True)
class ExportPlan:
    """What is exported: a model of a checkpoint, and the tensors of each file. The same on every rank."""

    directory: Path
    manifest: Manifest
    model: str
    spec: ModelSpec
    dtype: torch.dtype  # that config.json names
    shards: dict[str, list[TensorEntry]]
    is_average: bool = False  # the moving average instead of the weights

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def entries(self) -> list[TensorEntry]:
        return [entry for held in self.shards.values() for entry in held]

    def share(self, rank: int, size: int) -> dict[str, list[TensorEntry]]:
        """The files that one of `size` ranks takes care of."""
        return {name: held for number, (name, held) in enumerate(self.shards.items()) if number % size == rank}

    def source(self) -> "CheckpointSource | AveragedSource":
        """What is exported, of the stored type or f32."""
        return (AveragedSource if self.is_average else CheckpointSource)(self.directory, self.model)


def export(
    checkpoint: Path,
    out: Path,
    model: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    proof: Proof = "auto",
    layout: ParallelLayout | None = None,
    is_average: bool = False,
) -> Path:
    """Write the model of a checkpoint as `transformers` and vLLM read it, prove it, and return `out`.

    Args: `checkpoint` is a checkpoint or a run's output directory (its newest one); `model` a name in it (default: `actor`, else the only
    one); `dtype` `bf16`, `fp32` or `fp16` (default: as stored). A block of rows is in memory at a time. With a `layout`, every rank of the
    world calls it, and the ranks share the files. `is_average`: the moving average of the weights (`ppo.ema`) instead of the weights.

    What is proven: every element is read back and compared with the checkpoint, transformers expects exactly these tensors, and (`proof`
    `logits`, or `auto` and a small model) transformers computes the logits that our layers compute from the checkpoint.
    Raises `CheckpointError` (missing, damaged, incomplete, not proven) or `SetupError` (`out` exists, no room), with nothing left behind.
    """
    plan, out = plan_export(Path(checkpoint), model, dtype, max_shard_bytes, is_average), Path(out)
    rank, size = (0, 1) if layout is None else (layout.rank, layout.world_size)
    source = plan.source()
    staging = out.with_name(STAGING + out.name)

    def start() -> None:
        if rank == 0:
            start_output(out, plan.num_bytes, "the export", "export")

    def write() -> dict[str, WrittenFile]:
        files = plan.share(rank, size).items()
        return {name: _write_shard(staging / name, held, source) for name, held in files}

    def read_back() -> None:
        held = [entry for entries in plan.share((rank + 1) % size, size).values() for entry in entries]
        if fault := first_difference(source, SafetensorsSource(staging), held):
            raise CheckpointError(f"{staging}: {fault}: what was written is not what is in {plan.directory}")

    def finish(files: dict[str, WrittenFile], note: str) -> None:
        proofs = [f"every element of {len(plan.entries)} tensors was read back and compared with the checkpoint"]
        proofs += _prove(staging, plan, source, proof, layout)
        card = model_card(plan.manifest, plan.model, plan.spec, CONFIG_NAMES[plan.dtype], files, proofs, note, plan.is_average)
        write_text(staging / "README.md", card)
        sync(staging)
        os.replace(staging, out)  # an empty directory may be replaced
        sync(out.parent)

    started = False
    try:
        _together(start, out, layout)
        started = True
        written = _gathered(_together(write, out, layout), layout)
        files = {name: written[name] for name in plan.shards}
        note = _together(lambda: _write_rest(staging, plan) if rank == 0 else "", out, layout)
        _together(read_back, out, layout)
        _together(lambda: finish(files, note) if rank == 0 else None, out, layout)
    finally:
        if started and rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
    return out


def plan_export(checkpoint: Path, model: str | None, dtype: str | None, max_shard_bytes: int, is_average: bool = False) -> ExportPlan:
    """What an export will write. Raises `CheckpointError` or `SetupError` for what cannot be exported."""
    directory = manifests.find_checkpoint(checkpoint)
    if directory is None:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint and holds none (checkpoints/step-*): expected a directory with {manifests.MANIFEST}"
        )
    manifest = manifests.read_manifest(directory)
    model = _choose(directory, manifest, model)
    for path, file in manifest.files_of("config", model).items():
        manifests.verify(directory, path, file)
    spec, source = read_spec(directory / model), (AveragedSource if is_average else CheckpointSource)(directory, model)
    _check_complete(directory, manifest, model, spec)
    shapes = manifest.models[model].shapes
    entries = [TensorEntry(name, wanted_dtype(dtype, source.dtype(name)), tuple(shape)) for name, shape in shapes.items()]
    shards = plan_shards(entries, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return ExportPlan(directory, manifest, model, spec, _common_dtype(entries), dict(zip(names, shards, strict=True)), is_average)


def _write_shard(path: Path, held: list[TensorEntry], source: CheckpointSource | AveragedSource) -> WrittenFile:
    return write_tensors(path, held, lambda entry: row_blocks(source, entry), metadata={"format": "pt"}, new_hash=hashlib.sha256)


def _write_rest(staging: Path, plan: ExportPlan) -> str:
    """Everything but the weights and the README; returns the note about the tokenizer."""
    is_scalar_head = manifests.ROLES[plan.model] == "critic"
    config = hf_config(plan.spec, is_scalar_head, plan.dtype, plan.manifest.tokenizer)
    write_text(staging / "config.json", json.dumps(config, indent=2))
    if not is_scalar_head:
        write_generation_config(staging, plan.directory / plan.model / GENERATION, config)
    write_index(staging, plan.shards)
    note = copy_tokenizer(staging, plan.directory, plan.manifest)
    if note:
        print(f"megarl: warning: {note}", file=sys.stderr)
    return note


def _prove(
    staging: Path, plan: ExportPlan, source: CheckpointSource | AveragedSource, proof: Proof, layout: ParallelLayout | None
) -> list[str]:
    role = manifests.ROLES[plan.model]
    dtypes = {entry.key: entry.dtype for entry in plan.entries}
    proofs = [check_names(staging, {entry.key: entry.shape for entry in plan.entries})]
    if proof == "logits" or (proof == "auto" and plan.spec.num_parameters(role) <= LOGITS_PARAMETERS):
        proofs.append(compare_logits(staging, plan.spec, role, CastSource(source, dtypes), layout))
    return proofs


def _together(work: Callable[[], Result], out: Path, layout: ParallelLayout | None) -> Result:
    """This rank's part of something on disk; when any rank's part fails, every rank raises."""

    def on_disk() -> Result:
        try:
            return work()
        except OSError as error:
            raise SetupError(f"{error.filename or out}: {error.strerror}: the export was not written") from error

    return on_disk() if layout is None else collectives.together(on_disk, groups.group(layout, "world"))


def _gathered(written: dict[str, WrittenFile], layout: ParallelLayout | None) -> dict[str, WrittenFile]:
    """The files of all ranks."""
    if layout is None:
        return written
    own = {name: [file.num_bytes, file.digest] for name, file in written.items()}
    parts = collectives.gather_json(own, groups.group(layout, "world"))
    return {name: WrittenFile(*file) for part in parts for name, file in part.items()}


def _choose(directory: Path, manifest: Manifest, model: str | None) -> str:
    names = sorted(manifest.models)
    if model is None:
        model = "actor" if "actor" in names or len(names) != 1 else names[0]
    if model not in names:
        raise CheckpointError(f"{directory} holds the models {names}; expected {model!r}")
    return model


def _check_complete(directory: Path, manifest: Manifest, model: str, spec: ModelSpec) -> None:
    """Every tensor of the family's table, each element exactly once."""
    stored = manifest.models[model]
    shapes = {name: tuple(shape) for name, shape in spec.table(manifests.ROLES[model]).hf_shapes.items()}
    boxes = [(tensor.name, tensor.box) for file in manifest.files_of("weights", model).values() for tensor in file.tensors]
    faults = cover_faults(shapes, boxes)
    if shapes != {name: tuple(shape) for name, shape in stored.shapes.items()}:
        faults.insert(0, "its tensor shapes are not those of its config.json")
    if faults:
        raise CheckpointError(f"{directory}: model {model} is not complete: {'; '.join(faults[:3])}")


def _common_dtype(entries: list[TensorEntry]) -> torch.dtype:
    """The dtype that config.json names: of most bytes."""
    totals: dict[torch.dtype, int] = {}
    for entry in entries:
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.num_bytes
    return max(totals, key=totals.__getitem__)
