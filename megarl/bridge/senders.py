"""Who may send a layer to a replica: teams of holders; and what no choice of senders can beat.

Where several ranks hold the same piece, a *team* picks one of them for every receiver. The teams of a layer are rotations: the receivers
that need a piece get different holders where there are enough, and the team's number says with which holder the first of them begins.
So replicas of the trainer serve different generator replicas at the same time, and a generator replica is served by few ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarl.bridge.demand import Demand, Numbers, Unit

SMALL = 256  # this part of a layer is taken from somebody who sends to the receiver anyway: norms and routers, which many hold


@dataclass(frozen=True)
class Bound:
    """What no plan can beat, in elements: every rank receives once what it lacks, and somebody sends it.

    `received` i64[rank] is exact. `sent` is a lower bound on what the busiest sender sends, whichever replicas send.
    """

    received: Numbers
    sent: int

    @property
    def critical(self) -> int:
        """The least that the busiest rank sends or receives."""
        return max(self.sent, int(self.received.max(initial=0)))


def lower_bound(demand: Demand) -> Bound:
    """The bound of a demand when a rank keeps what it holds and nothing arrives twice."""
    totals = demand.totals()
    received = np.zeros(demand.world_size, np.int64)
    lacking = np.zeros(len(demand.holders), np.int64)
    for needed, ranks in zip(totals, demand.classes):
        missing = ~demand.holds[list(ranks)] * needed
        received[list(ranks)] = missing.sum(1)
        lacking += missing.sum(0)
    inside = demand.holds.astype(np.int64)
    sizes = inside.sum(0)
    is_subset = inside.T @ inside == sizes[:, None]  # [holder, other]: all ranks of holder are among those of other
    forced = (lacking[:, None] * is_subset).sum(0)
    everyone = -(-int(lacking.sum()) // max(1, int(demand.holds.any(1).sum())))
    return Bound(received, max(everyone, int((-(-forced // sizes)).max(initial=0))))


class Structure:
    """The units that several layers have alike: their classes, holders and sizes; `family` are the ranks that hold any of it."""

    def __init__(self, demand: Demand, units: Sequence[Unit]):
        self.classes = np.array([unit.target_class for unit in units])
        self.holder_ids = np.array([unit.holder for unit in units])
        self.holders = [demand.holders[unit.holder] for unit in units]
        self.sizes = np.stack([unit.sizes for unit in units])
        self.totals = self.sizes.sum(1)
        self.holds = demand.holds[:, self.holder_ids]
        self.family = np.flatnonzero(self.holds.any(1))
        self.is_small = self.totals * SMALL <= np.bincount(self.classes, self.totals)[self.classes]
        self._teams: dict[bytes, Teams] = {}

    def teams(self, remote: NDArray[np.bool_]) -> "Teams":
        """The teams that can serve the units of the mask `remote`, bool[unit]."""
        key = remote.tobytes()
        if key not in self._teams:
            self._teams[key] = Teams(self, remote)
        return self._teams[key]


class Teams:
    """All teams for the same part of the same structure. Slices are those of `demand`.

    `chosen` i64[team, unit] is the sender of each unit (-1: the receiver has it), `rates` f64[team, family] the part of its time that a
    rank sends while nothing holds the team up, `receive_rate` the same of the busiest receiver.
    """

    def __init__(self, structure: Structure, remote: NDArray[np.bool_]):
        counts = np.array([len(ranks) for ranks in structure.holders])
        large = remote & ~structure.is_small
        sizes = counts[large if large.any() else remote]
        most, least = (int(sizes.max()), int(sizes.min())) if len(sizes) else (1, 1)
        starts = range(0, most, most // least if most % least == 0 else 1)
        turn = _turns(structure, remote)
        chosen = np.full((len(starts), len(remote)), -1, np.int64)
        for unit in np.flatnonzero(remote):
            ranks, count = structure.holders[unit], int(counts[unit])
            chosen[:, unit] = [ranks[(start * count // most + turn[unit]) % count] for start in starts]
        for unit in np.flatnonzero(remote & structure.is_small):
            partner = _partner(structure, large, unit)
            if partner >= 0:
                is_holder = np.isin(chosen[:, partner], structure.holders[unit])
                chosen[is_holder, unit] = chosen[is_holder, partner]
        self.chosen, self.num_slices = chosen, structure.sizes.shape[1]
        self.senders, self._sent = zip(*(_cumulated(row[remote], structure.sizes[remote]) for row in chosen))
        self.classes, self.received = _cumulated(structure.classes[remote], structure.sizes[remote])
        self.is_local = not remote.any()
        self.rates = np.zeros((len(chosen), len(structure.family)))
        receive_rates = []
        for rates, senders, sent in zip(self.rates, self.senders, self._sent):
            fastest = max(int(sent[-1].max(initial=0)), int(self.received[-1].max(initial=0)), 1)
            rates[np.searchsorted(structure.family, senders)] = sent[-1] / fastest
            receive_rates.append(int(self.received[-1].max(initial=0)) / fastest)
        self.receive_rate = np.array(receive_rates)

    def sent(self, team: int) -> Numbers:
        """What each of `senders[team]` has sent before each slice, and in all: i64[slices + 1, sender]."""
        return self._sent[team]


def _turns(structure: Structure, remote: NDArray[np.bool_]) -> Numbers:
    """How many receivers before this one need something from the same holders."""
    seen: Mapping[int, int]
    seen, turns = {}, np.zeros(len(remote), np.int64)
    for unit in np.flatnonzero(remote):
        holder = int(structure.holder_ids[unit])
        turns[unit] = seen.get(holder, 0)
        seen[holder] = int(turns[unit]) + 1
    return turns


def _partner(structure: Structure, large: NDArray[np.bool_], unit: int) -> int:
    """The largest unit of the same receiver that holders of this unit can send; -1 when there is none."""
    same = np.flatnonzero(large & (structure.classes == structure.classes[unit]))
    able = [other for other in same if set(structure.holders[other]) <= set(structure.holders[unit])]
    return int(max(able, key=lambda other: structure.totals[other])) if able else -1


def _cumulated(names: Numbers, sizes: Numbers) -> tuple[Numbers, Numbers]:
    """(distinct names i64[n], elements before each slice and of all i64[slices + 1, n]) of rows with a name and sizes [row, slice]."""
    names, place = np.unique(names, return_inverse=True)
    total = np.zeros((len(names), sizes.shape[1] + 1), np.int64)
    np.add.at(total[:, 1:], place, sizes)
    return names, np.ascontiguousarray(total.cumsum(1).T)
