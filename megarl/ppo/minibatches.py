"""Which samples form a minibatch and which data-parallel rank learns from them: a pure plan, then one exchange of rows an epoch.

A minibatch holds the same samples in the same order under every layout: the order is a function of (seed, step, epoch) over the
positions in the whole rollout (`sample_ids`). Data rank r takes the r-th contiguous part of every minibatch, or, where sequences are
packed, a part that is as much work as the others'. Semantics section 6.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from megarl.config import PpoConfig
from megarl.data.packing import dealt
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.microbatches import Packing
from megarl.records import Experience

PURPOSE = 4  # keeps this stream of random numbers apart from those that order datasets (data.order.Purpose)


@dataclass(frozen=True)
class MinibatchPlan:
    """One epoch: `order` i64[num_minibatches, minibatch_size] holds sample ids, `ranks` of the same shape who learns from each."""

    order: np.ndarray
    ranks: np.ndarray

    def share(self, dp_rank: int) -> list[np.ndarray]:
        """The sample ids that a data rank learns from, i64[n] for each minibatch."""
        return [ids[ranks == dp_rank] for ids, ranks in zip(self.order, self.ranks, strict=True)]

    def destinations(self, sample_ids: np.ndarray) -> np.ndarray:
        """The data rank that learns from each of `sample_ids` i64[B]: i64[B]."""
        rank_of = np.empty(self.order.size, dtype=np.int64)
        rank_of[self.order.reshape(-1)] = self.ranks.reshape(-1)
        return rank_of[sample_ids]


def plan_minibatches(
    num_samples: int, minibatch_size: int, data: int, seed: int, step: int, epoch: int, costs: np.ndarray | None = None
) -> MinibatchPlan:
    """A permutation of [0, num_samples) cut in minibatches.

    Args: `num_samples` of the whole rollout, `minibatch_size` over all data ranks (it divides `num_samples`, and `data` divides it:
    checked with the configuration), `costs` f64[num_samples] the work of each sample: given, every minibatch's rows are dealt so that the
    data ranks have equal work; without, they have equally many rows, in order.
    Raw 64-bit keys are sorted because numpy promises their stream for good.
    """
    assert num_samples % minibatch_size == 0 and minibatch_size % data == 0, (num_samples, minibatch_size, data)
    keys = np.random.PCG64(np.random.SeedSequence((seed, step, epoch, PURPOSE))).random_raw(num_samples)
    order = np.argsort(keys, kind="stable").reshape(-1, minibatch_size)
    if costs is None:
        ranks = np.broadcast_to(np.arange(minibatch_size) // (minibatch_size // data), order.shape)
    else:
        ranks = np.stack([dealt(costs[ids], data) for ids in order])
    return MinibatchPlan(order, ranks)


def minibatches(
    experience: Experience, config: PpoConfig, seed: int, step: int, layout: ParallelLayout, packing: Packing | None = None
) -> Iterator[Experience]:
    """This data rank's share of every minibatch of every epoch, in order. Iterated by every rank; rows move once an epoch.

    `experience` is this data rank's part of the rollout; all parts have equally many rows and the same T. Where sequences are packed,
    data ranks get shares of equal work, else of equally many rows; the minibatches are the same.
    """
    group = groups.group(layout, "dp")
    costs = None if packing is None else _costs(experience, packing, group)
    for epoch in range(config.num_epochs):
        plan = plan_minibatches(len(experience) * layout.data, config.minibatch_size, layout.data, seed, step, epoch, costs)
        destinations = torch.from_numpy(plan.destinations(experience.sample_ids.cpu().numpy()))
        tensors = {f.name: getattr(experience, f.name) for f in fields(experience)}
        mine = Experience(**collectives.exchange_rows(tensors, destinations.to(experience.sample_ids.device), group))
        arrived = torch.argsort(mine.sample_ids)  # arrived[i] is the row of the i-th smallest id
        for share in plan.share(layout.dp_rank):
            wanted = torch.from_numpy(share).to(arrived.device)
            yield mine.rows(arrived[torch.searchsorted(mine.sample_ids[arrived], wanted)])


def _costs(experience: Experience, packing: Packing, group: collectives.Group) -> np.ndarray:
    """The work of every sample of the whole rollout by its id, f64[B * data]. Called by every rank of `group`, the data-parallel one."""
    mine = torch.stack([experience.sample_ids, experience.lengths], dim=1)
    sample_ids, lengths = collectives.gather_rows(mine, group).cpu().numpy().T
    costs = np.empty(len(sample_ids))
    costs[sample_ids] = packing.cost.of(lengths)
    return costs
