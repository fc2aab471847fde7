"""Removing checkpoints that the retention rules of their run no longer keep: `megarl checkpoint prune RUN`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.inspection import list_checkpoints
from megarl.checkpoint.publish import discard
from megarl.checkpoint.retention import kept_steps
from megarl.config import CheckpointConfig
from megarl.errors import CheckpointError


@dataclass(frozen=True)
class PrunePlan:
    """What a pruning does to each checkpoint: `kept` and `removed` by name, `untouched` with the reason."""

    directory: Path
    rules: str
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    untouched: dict[str, str]
    num_bytes: int  # that become free

    def carry_out(self) -> None:
        """Remove what the plan removes, oldest first; each at once, by a rename. Raises `CheckpointError`."""
        for name in self.removed:
            try:
                discard(self.directory / name)
            except OSError as error:
                raise CheckpointError(f"{self.directory / name}: {error.strerror}: not removed") from error


def plan_prune(path: Path, **rules: Any) -> PrunePlan:
    """Which checkpoints of a run go by its own retention rules, those in `rules` (keys of `checkpoint`) replaced.

    What is damaged or unfinished neither counts nor is removed. Raises `CheckpointError` where there is nothing to go by.
    """
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    listed = list_checkpoints(path)
    whole = {entry.step: entry for entry in listed if not entry.state and entry.step is not None}
    if not whole:
        raise CheckpointError(f"{directory} holds no complete checkpoint: nothing is removed")
    found = {step: manifests.read_manifest(directory / entry.name) for step, entry in whole.items()}
    settings = found[max(found)].run.get("checkpoint") or {}
    try:
        config = CheckpointConfig.model_validate({key: settings[key] for key in settings if key in CheckpointConfig.model_fields} | rules)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"retention rule {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}") from error
    kept = kept_steps({step: manifest.metrics for step, manifest in found.items()}, config)
    removed = [step for step in sorted(whole) if step not in kept]
    return PrunePlan(
        directory,
        f"keep_last {config.keep_last}, keep_every_steps {config.keep_every_steps}, keep_best {config.keep_best}",
        tuple(whole[step].name for step in sorted(kept)),
        tuple(whole[step].name for step in removed),
        {entry.name: entry.state for entry in listed if entry.state},
        sum(whole[step].num_bytes for step in removed),
    )
