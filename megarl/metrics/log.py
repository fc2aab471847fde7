"""The run's log: reduces nothing, decides nothing, hands finished steps to the writers of the one rank that has any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.config import LogConfig
from megarl.metrics.terminal import Terminal
from megarl.metrics.values import Metrics
from megarl.metrics.writers import JsonLines, MetricsWriter, TensorBoard, Wandb
from megarl.operations import heartbeat


@dataclass(frozen=True)
class RunLog:
    """Writers of metrics, and `samples.jsonl`. On every rank but the writing one both are empty, so callers need no rank test."""

    writers: tuple[MetricsWriter, ...] = ()
    samples: JsonLines | None = None
    num_samples: int = 0  # samples of each kind kept a step

    @classmethod
    def open(
        cls,
        stage: str,
        output_dir: Path,
        config: LogConfig,
        total_steps: int,
        headline: Mapping[str, str],
        is_writer: bool,
        run_json: dict,
    ) -> "RunLog":
        """The log of one stage. `is_writer` is True on global rank 0; `run_json` is the resolved run, shown by wandb.

        Raises `SetupError` on the writing rank when a package that the configuration asks for is missing.
        """
        if not is_writer:
            return cls()
        writers: list[MetricsWriter] = [JsonLines(output_dir / "metrics.jsonl"), Terminal(stage, total_steps, headline)]
        if config.tensorboard:
            writers.append(TensorBoard(output_dir / "tensorboard"))
        if config.wandb_project is not None:
            writers.append(Wandb(config.wandb_project, output_dir.name, output_dir, run_json))
        return cls(tuple(writers), JsonLines(output_dir / "samples.jsonl"), config.samples)

    def start(self, step: int) -> None:
        """The run begins (0) or continues with `step` finished steps. Called once, before the first `write`, by every rank."""
        heartbeat.step(step, is_first=True)
        for writer in self._all():
            writer.start(step)

    def write(self, step: int, metrics: Metrics, *samples: Sequence[dict]) -> None:
        """Reduced metrics after `step` finished steps, and the first few of each kind of samples. Nothing to say writes nothing.

        Called by every rank.
        """
        heartbeat.step(step)
        if not metrics or not self.writers:
            return
        values = metrics.values_by_name()
        if "response/tokens" in values and values.get("seconds/step"):
            values["tokens_per_s"] = values["response/tokens"] / values["seconds/step"]
        for writer in self.writers:
            writer.write(step, values)
        for kind in samples:
            for sample in kind[: self.num_samples]:
                self.samples.write(step, sample)

    def close(self) -> None:
        """Flush and let go; also after a failure (`contextlib.closing`), or the terminal stays in its live state."""
        for writer in self._all():
            writer.close()

    def _all(self) -> list[MetricsWriter]:
        return [*self.writers, *([self.samples] if self.samples is not None else [])]
