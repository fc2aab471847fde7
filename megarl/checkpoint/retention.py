"""Which checkpoints of a run stay. Pure."""

import math
from collections.abc import Mapping

from megarl.config import CheckpointConfig


def kept_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """The steps to keep, given what each checkpoint's step reported: the newest ones, those at round numbers, and the best.

    `keep_best` names a metric, the highest of which wins; with a leading `-` the lowest. Of equal ones the newest stays.
    """
    steps = sorted(metrics)
    kept = set(steps[-config.keep_last :])
    if config.keep_every_steps > 0:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    if config.keep_best is not None:
        name, sign = best_metric(config.keep_best)
        rated = [(sign * metrics[step][name], step) for step in steps if name in metrics[step]]
        kept |= {step for _, step in [max(rated)]} if rated else set()
    return kept


def best_metric(keep_best: str) -> tuple[str, int]:
    """The metric's name, and 1 where more is better, -1 where less is."""
    return (keep_best[1:], -1) if keep_best.startswith("-") else (keep_best, 1)


class BestSoFar:
    """The best value of the metric that `keep_best` names (None: of none) among those it was shown."""

    def __init__(self, keep_best: str | None):
        self._name, self._sign = best_metric(keep_best) if keep_best is not None else ("", 1)
        self._best = -math.inf

    @property
    def has_seen(self) -> bool:
        """True when some step reported the metric."""
        return self._best > -math.inf

    def take(self, values: Mapping[str, float]) -> bool:
        """Look at what a step reported; True when it holds a better value than all before."""
        value = self._sign * values.get(self._name, math.nan)
        if not value > self._best:
            return False
        self._best = value
        return True
