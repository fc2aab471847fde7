"""Who does a piece of scoring where several ranks hold the same samples: each of them, or one for all, or whoever sampled them."""

from collections.abc import Callable
from dataclasses import dataclass

from megarl.errors import MegarlError, error_kinds
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.rewards.ahead import EarlyScores
from megarl.rewards.scorer import Found


@dataclass(frozen=True)
class SharedScoring:
    """Does the pieces of `rewards.scorer.WeightedSum.judge`. Every rank of the world calls it for the same pieces in the same order."""

    layout: ParallelLayout

    def __call__(self, runs_once: bool, work: Callable[[], list[float]]) -> list[float]:
        """What `work` returns: on each rank, or on the first rank of the replica, which tells the others. An error is raised everywhere."""
        # A reward model communicates inside its replica only, and all ranks of a replica fail alike.
        scoring = (lambda: self._once(work)) if runs_once else work
        return collectives.together(scoring, groups.group(self.layout, "world"))

    def _once(self, work: Callable[[], list[float]]) -> list[float]:
        scores, error = None, None
        if self.layout.rank == self.layout.ranks_along("model")[0]:
            try:
                scores = work()
            except MegarlError as failure:
                error = [type(failure).__name__, str(failure)]
        told = [scores, error]
        for axis in ("tp", "cp", "pp"):  # its neighbours along tp first, then those of all of them along cp, then pp
            told = collectives.broadcast_json(told, self.layout.ranks_along(axis)[0], groups.group(self.layout, axis))
        scores, error = told
        if error is not None:
            raise error_kinds()[error[0]](error[1])
        return scores


@dataclass(frozen=True)
class ScoredAhead:
    """What the ranks that sample for one another score while they sample. `group` are those ranks."""

    layout: ParallelLayout
    early: EarlyScores
    group: collectives.Group

    def gathered(self) -> dict[str, Found]:
        """What all ranks of the group found since the last call, by the terms' names. Entered by every rank of the world.

        Waits for what is being scored. Raises `RewardError` on all ranks when one of them waits in vain.
        """
        own = collectives.together(self.early.settle, groups.group(self.layout, "world"))
        parts = collectives.gather_json(own, self.group)
        return {name: {key: entry for part in parts for key, entry in part[name].items()} for name in own}
