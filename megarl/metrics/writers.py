"""Where the numbers of a run go beside the terminal: `metrics.jsonl`, TensorBoard, Weights & Biases."""

import json
import os
import secrets
from pathlib import Path
from typing import Protocol

from megarl.errors import SetupError


class MetricsWriter(Protocol):
    """Takes the reduced metrics of finished steps. Only one rank of a run holds writers."""

    def start(self, step: int) -> None:
        """The run begins or continues with `step` finished steps: what was written about later steps is void."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """The values after `step` finished steps."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """One JSON object a line, each with `step`. A line is written whole; a resumed run drops the lines of steps it does again."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None

    def start(self, step: int) -> None:
        """Keeps whole lines of steps up to `step` (none at 0), drops the rest, opens for appending."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._whole_lines() if json.loads(line)["step"] <= step] if step > 0 else []
        staging = self.path.with_name(self.path.name + ".staging")
        with staging.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def _whole_lines(self) -> list[bytes]:
        """A run that was killed may have left half a line at the end, and a host that lost power a line of zeros or of nothing."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [line + b"\n" for line in lines if _has_step(line)]

    def write(self, step: int, values: dict) -> None:
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _has_step(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except ValueError:  # also what is not UTF-8
        return False
    return isinstance(value, dict) and isinstance(value.get("step"), int)


class TensorBoard:
    """Scalars for TensorBoard. Raises `SetupError` when the package is not installed."""

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError(f"log.tensorboard is true, but {error.name} is missing: install tensorboard or set it to false") from error
        self._directory = directory
        self._writer_class = SummaryWriter
        self._writer = None

    def start(self, step: int) -> None:
        """Scalars of steps that are done again are hidden by TensorBoard itself (purge_step)."""
        self._writer = self._writer_class(str(self._directory), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases. Raises `SetupError` when the package is not installed or refuses to start."""

    def __init__(self, project: str, name: str, directory: Path, config: dict):
        try:
            import wandb
        except ImportError as error:
            raise SetupError(f"log.wandb_project is {project!r}, but wandb cannot be imported: install wandb or remove the key") from error
        self._wandb = wandb
        self._arguments = {"project": project, "name": name, "dir": str(directory), "config": config, "resume": "allow"}
        self._id_file = directory / "wandb_run_id"
        self._run = None

    def start(self, step: int) -> None:
        """A resumed run continues its run there (by the id kept in the run's folder); steps done again keep their first values."""
        if step == 0 or not self._id_file.exists():
            self._id_file.write_text(secrets.token_hex(6) + "\n", encoding="utf-8")
        try:
            self._run = self._wandb.init(**self._arguments, id=self._id_file.read_text(encoding="utf-8").strip())
        except self._wandb.Error as error:
            raise SetupError(f"wandb did not start: {error}; set WANDB_API_KEY, WANDB_MODE=offline, or remove log.wandb_project") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
