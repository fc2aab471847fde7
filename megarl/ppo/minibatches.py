"""Which samples form a minibatch and which data-parallel rank learns from them: a pure plan, then one exchange of rows an epoch.

A minibatch holds the same samples in the same order under every layout: the order is a function of (seed, step, epoch) over the
positions in the whole rollout (`sample_ids`), and data rank r takes the r-th contiguous part of every minibatch. Semantics section 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from megarl.config import PpoConfig
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.records import Experience

PURPOSE = 4  # keeps this stream of random numbers apart from those that order datasets (data.order.Purpose)


@dataclass(frozen=True)
class MinibatchPlan:
    """One epoch: `order` i64[num_minibatches, minibatch_size] holds sample ids; `data` is the number of data-parallel replicas."""

    order: np.ndarray
    data: int

    def share(self, dp_rank: int) -> np.ndarray:
        """The sample ids that a data rank learns from: i64[num_minibatches, minibatch_size / data]."""
        size = self.order.shape[1] // self.data
        return self.order[:, dp_rank * size : (dp_rank + 1) * size]

    def destinations(self, sample_ids: np.ndarray) -> np.ndarray:
        """The data rank that learns from each of `sample_ids` i64[B]: i64[B]."""
        size = self.order.shape[1] // self.data
        column = np.empty(self.order.size, dtype=np.int64)
        column[self.order.reshape(-1)] = np.tile(np.arange(self.order.shape[1]), len(self.order))
        return column[sample_ids] // size


def plan_minibatches(num_samples: int, minibatch_size: int, data: int, seed: int, step: int, epoch: int) -> MinibatchPlan:
    """A permutation of [0, num_samples) cut in minibatches.

    Args: `num_samples` of the whole rollout, `minibatch_size` over all data ranks (it divides `num_samples`, and `data` divides it:
    checked with the configuration). Raw 64-bit keys are sorted because numpy promises their stream for good.
    """
    assert num_samples % minibatch_size == 0 and minibatch_size % data == 0, (num_samples, minibatch_size, data)
    keys = np.random.PCG64(np.random.SeedSequence((seed, step, epoch, PURPOSE))).random_raw(num_samples)
    return MinibatchPlan(np.argsort(keys, kind="stable").reshape(-1, minibatch_size), data)


def minibatches(experience: Experience, config: PpoConfig, seed: int, step: int, layout: ParallelLayout) -> Iterator[Experience]:
    """This data rank's share of every minibatch of every epoch, in order. Iterated by every rank; rows move once an epoch.

    `experience` is this data rank's part of the rollout; all parts have equally many rows and the same T.
    """
    group = groups.group(layout, "dp")
    for epoch in range(config.num_epochs):
        plan = plan_minibatches(len(experience) * layout.data, config.minibatch_size, layout.data, seed, step, epoch)
        destinations = torch.from_numpy(plan.destinations(experience.sample_ids.cpu().numpy()))
        tensors = {f.name: getattr(experience, f.name) for f in fields(experience)}
        mine = Experience(**collectives.exchange_rows(tensors, destinations.to(experience.sample_ids.device), group))
        arrived = torch.argsort(mine.sample_ids)  # arrived[i] is the row of the i-th smallest id
        for share in plan.share(layout.dp_rank):
            wanted = torch.from_numpy(share).to(arrived.device)
            yield mine.rows(arrived[torch.searchsorted(mine.sample_ids[arrived], wanted)])
