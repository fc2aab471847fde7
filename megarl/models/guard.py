"""What stands between a gradient and the weights: updates that must not be made, their batches on disk, losses that jump.

Every rank of the world judges by the same numbers, so all skip together, and all stop together.
"""

import json
import math
import statistics
import sys
from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megarl.config import OptimizerConfig
from megarl.errors import LearningError
from megarl.parallel.layout import ParallelLayout

MAX_DUMPS = 32  # batches that a process writes down
MANY, FEW = 64, 16  # losses that a new one is compared with: at most, at least
JUMP = 10.0  # a loss so many times farther from the median than most


class UpdateGuard:
    """Of one learner. `num_skipped` counts the updates in a row that were not made.

    Args: `name` of the model in messages; `config` says which gradient is too large and after how many skipped updates in a row the run
    stops; `directory` gets the batches of skipped updates, None: they are not written.
    """

    def __init__(self, name: str, config: OptimizerConfig, layout: ParallelLayout, directory: Path | None):
        self.name, self.config, self.num_skipped = name, config, 0
        self._layout, self._directory, self._num_dumps = layout, directory, 0
        self._losses: deque[float] = deque(maxlen=MANY)

    def allows(self, loss: float, grad_norm: float, step: int, batch: Any) -> bool:
        """Whether the update of optimizer step `step` may be made: loss and gradient norm, equal on all ranks, are finite numbers, and the
        norm is not above `skip_above`.

        A batch whose update may not is written down. A loss that jumps is said. Raises `LearningError` on every rank.
        """
        too_large = 0 < self.config.skip_above < grad_norm
        if math.isfinite(loss) and math.isfinite(grad_norm) and not too_large:
            self.num_skipped = 0
            self._look_for_jump(loss, step)
            return True
        self.num_skipped += 1
        what = f"{self.name}: the update of optimizer step {step} is skipped: loss {loss:g}, gradient norm {grad_norm:g}"
        if too_large:
            what += f" above {self.name}.optimizer.skip_above={self.config.skip_above:g}"
        written = self._write(step, batch)
        if self.num_skipped >= self.config.max_skipped_updates:
            raise LearningError(
                f"{what}; so were the {self.num_skipped - 1} before it"
                f" ({self.name}.optimizer.max_skipped_updates={self.config.max_skipped_updates})."
                " The weights are those from before the first of them, and so is the newest checkpoint:"
                f" look at the batches{written}, or continue with a lower {self.name}.optimizer.lr"
            )
        self._say(what + written)
        return False

    def _look_for_jump(self, loss: float, step: int) -> None:
        """A warning where a loss is far outside what the last ones were."""
        if len(self._losses) >= FEW:
            middle = statistics.median(self._losses)
            usual = statistics.median(abs(other - middle) for other in self._losses)
            if abs(loss - middle) > JUMP * max(usual, 1e-3 * abs(middle), 1e-12) and loss > middle:
                self._say(f"{self.name}: the loss of optimizer step {step} jumped to {loss:g}; the median of the last is {middle:g}")
        self._losses.append(loss)

    def _write(self, step: int, batch: Any) -> str:
        """Each data rank's rows as JSON lines; returns where, for a message."""
        if self._directory is None or self._num_dumps >= MAX_DUMPS:
            return ""
        self._num_dumps += 1
        name = f"{self.name}-update-{step:08d}-data-{self._layout.dp_rank:05d}.jsonl"
        if self._layout.ranks_along("model")[0] == self._layout.rank:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row) + "\n" for row in rows_of(batch))
                (self._directory / name).write_text(text, encoding="utf-8")
            except OSError as error:
                print(f"megarl: warning: {self._directory / name}: {error.strerror}: the batch is not written", file=sys.stderr)
        return f" ({self._directory / name.replace(f'{self._layout.dp_rank:05d}', '*')})"

    def _say(self, what: str) -> None:
        if self._layout.rank == 0:
            print(f"megarl: warning: {what}", file=sys.stderr)


def rows_of(batch: Any) -> list[dict]:
    """The sequences of a batch as JSON objects: `sample_id` (else the row), `token_ids`, and the fields that hold no finite number."""
    sequences = batch.sequences()
    sample_ids = getattr(batch, "sample_ids", None)
    numbers = {f.name: value for f in fields(batch) if (value := getattr(batch, f.name)).is_floating_point() and len(value) == len(batch)}
    broken = {name: (~torch.isfinite(value)).reshape(len(value), -1).any(1).tolist() for name, value in numbers.items()}
    found = []
    for index, (tokens, length) in enumerate(zip(sequences.token_ids.tolist(), sequences.lengths.tolist(), strict=True)):
        row = index % len(batch)
        not_finite = [name for name, flags in broken.items() if flags[row]]
        sample_id = row if sample_ids is None else int(sample_ids[row])
        found.append({"sample_id": sample_id, "token_ids": tokens[:length], "not_finite": not_finite})
    return found
