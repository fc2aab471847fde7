"""Rank 0's last act of a save, possibly behind the training: what no rank owns, the manifest, the rename, and what may go for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.attempts import Attempt
from megarl.checkpoint.manifest import STEP_NAME, Manifest, StoredFile
from megarl.checkpoint.publish import discard, point_to, publish, write_config, write_files
from megarl.checkpoint.retention import kept_steps
from megarl.checkpoint.sharded import cover_faults
from megarl.checkpoint.sources import generation_config
from megarl.config import Run
from megarl.errors import DamageError
from megarl.models.family import ModelSpec


@dataclass(frozen=True)
class Publication:
    """Makes the staging directory the checkpoint `final`. Touches files only: no tensors, no collectives.

    `manifest` lacks the files; `specs` are the models by name, `texts` the tokenizer's files.
    """

    attempt: Attempt
    staging: Path
    final: Path
    manifest: Manifest
    specs: Mapping[str, ModelSpec]
    run: Run
    texts: Mapping[str, bytes]

    def __call__(self, files: dict[str, StoredFile]) -> None:
        """`files` are those of all ranks. Raises `FencedError` when a newer start has taken over, and `OSError`."""
        written = dict(files)
        for model, stored in self.manifest.models.items():
            if faults := incomplete(stored.shapes, [file for file in files.values() if file.model == model]):
                raise AssertionError(f"the pieces of {model} do not make up the model: {'; '.join(faults[:5])}")
            config = next(found for name in (model, "model", "actor") if (found := getattr(self.run, name, None)) is not None)
            written |= write_config(self.staging, model, self.specs[model].hf_config, generation_config(config.path, model))
        written |= write_files(self.staging, "tokenizer", self.texts)
        try:
            publish(self.staging, self.final, self.manifest.model_copy(update={"files": written}), self.attempt.check)
        except OSError:
            self.attempt.check()  # a newer start takes staging directories away
            raise
        point_to(self.final)
        self._discard_old()

    def _discard_old(self) -> None:
        config = self.run.checkpoint
        directories = {int(STEP_NAME.fullmatch(path.name)[1]): path for path in manifests.step_directories(self.final.parent)}
        metrics = {step: {} if config.keep_best is None else _metrics(path) for step, path in directories.items()}
        for step in sorted(metrics.keys() - kept_steps(metrics, config)):
            discard(directories[step])


def incomplete(shapes: Mapping[str, tuple[int, ...]], files: list[StoredFile]) -> list[str]:
    """What is wrong with the tensors of one model: every weight once, and what an optimizer holds for a weight once."""
    tensors = [tensor for file in files for tensor in file.tensors]
    faults = cover_faults(shapes, [(tensor.name, tensor.box) for tensor in tensors if tensor.slot == "weight"])
    for slot in sorted({tensor.slot for tensor in tensors} - {"weight"}):
        boxes = [(tensor.name, tensor.box) for tensor in tensors if tensor.slot == slot]
        learning = {name: shapes[name] for name, _ in boxes}  # a weight that is frozen has no optimizer state
        faults += [f"{slot}: {fault}" for fault in cover_faults(learning, boxes)]
    return faults


def _metrics(directory: Path) -> Mapping[str, float]:
    """What a checkpoint's step reported; nothing where it is damaged: it cannot be the best."""
    try:
        return manifests.read_manifest(directory).metrics
    except DamageError:
        return {}
