"""When what is sent, and by whom: rounds in which no rank sends or receives more than B bytes, with the busiest ranks kept busy.

This is a greedy colouring of the edges between senders and receivers. The ranks of one generator replica go through the layers
together; a layer that was begun goes on in the next rounds until it is complete, so that what the receiver stages of it stays for a
short time. A replica that is free turns to the trainer's stage that has most left to send, to all and to itself, and there to the team
of holders that has sent least: only to teams whose time is not taken by layers that are open, so that an open layer is never held up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megarl.bridge.demand import Demand, Numbers
from megarl.bridge.senders import Structure, Teams

TOLERANCE = 0.15  # of a rank's time, in which rates are rounded
LOOK_AHEAD = 64  # slices tried at once
WORTHWHILE = 16  # a layer is begun in a round in which the receivers have at least this part of the round left


class Visit(NamedTuple):
    """In this round the ranks `receivers` (one of each class, or one rank) take slices [first, last) of a layer.

    `senders[i]` sends the layer's i-th unit of those that these receivers need; -1 where the receiver has it.
    """

    round: int
    receivers: tuple[int, ...]
    senders: tuple[int, ...]
    layer: int
    first: int
    last: int


@dataclass(frozen=True)
class Schedule:
    """`visits` in the order in which every rank runs them. `critical` adds up the most that one rank sends or receives in each round."""

    visits: tuple[Visit, ...]
    num_rounds: int
    critical: int  # elements
    received: Numbers  # i64[rank]
    sent: Numbers  # i64[rank]


class _Block:
    """One layer on its way to one replica from one team."""

    def __init__(self, layer: int, structure: Structure, teams: Teams, team: int, receiver_of: Numbers):
        self.layer, self.num_slices = layer, teams.num_slices
        self.family, self.rates, self.receive_rate = structure.family, teams.rates[team], float(teams.receive_rate[team])
        self.chosen = tuple(teams.chosen[team].tolist())
        self.senders, self.sent = teams.senders[team], teams.sent(team)
        self.receivers, self.received = receiver_of[teams.classes], teams.received
        self.next = 0

    @property
    def is_done(self) -> bool:
        return self.next == self.num_slices

    def advance(self, to_send: Numbers, to_receive: Numbers) -> int:
        """Go on by as many slices as fit into what the ranks may still send and receive, which is lowered; how many these are."""
        now, ahead = self.next, slice(self.next + 1, self.next + 1 + LOOK_AHEAD)
        fits = (self.sent[ahead] - self.sent[now] <= to_send[self.senders]).all(1)
        fits &= (self.received[ahead] - self.received[now] <= to_receive[self.receivers]).all(1)
        self.next += int(fits.sum())
        to_send[self.senders] -= self.sent[self.next] - self.sent[now]
        to_receive[self.receivers] -= self.received[self.next] - self.received[now]
        return self.next - now


class _State:
    """What the replicas share while rounds are made."""

    def __init__(self, world_size: int, limit: int):
        self.limit = limit
        self.busy = np.zeros(world_size)  # the part of every rank's time that open blocks take of it as a sender
        self.sent, self.received = np.zeros(world_size, np.int64), np.zeros(world_size, np.int64)  # by blocks that were begun
        self.unsent: dict[bytes, float] = {}  # of a family, for each of its ranks
        self.new_round()

    def new_round(self) -> None:
        self.to_send, self.to_receive = np.full_like(self.sent, self.limit), np.full_like(self.sent, self.limit)

    @property
    def load(self) -> int:
        """The most that a rank sends or receives in this round."""
        return self.limit - min(int(self.to_send.min()), int(self.to_receive.min()))


class _Stage:
    """The layers of one structure that a replica still lacks, last first, and who can send them."""

    def __init__(self, structure: Structure, receiver_of: Numbers, nodes: Numbers):
        self.structure, self.layers = structure, []
        self.units = np.flatnonzero(receiver_of[structure.classes] >= 0)
        receivers = receiver_of[structure.classes]
        remote = (receivers >= 0) & ~structure.holds[receivers, np.arange(len(receivers))]
        self.teams = structure.teams(remote)
        self.family = structure.family.tobytes()
        chosen = self.teams.chosen
        is_near = (chosen >= 0) & (nodes[chosen] == nodes[receivers])
        self.near = (is_near * structure.totals).sum(1)  # elements that stay on a node, by team
        self.size = int(self.teams.received[-1].sum())

    def free_team(self, state: _State, spare: float) -> int | None:
        """The team that has sent least of those whose senders have time, or None; one on the receivers' node may be a layer ahead."""
        ranks, rates = self.structure.family, self.teams.rates
        is_free = ((state.busy[ranks] + rates).max(1) <= 1 + TOLERANCE) & (self.teams.receive_rate <= spare)
        if not is_free.any():
            return None
        sent = np.where(rates > 0, state.sent[ranks], 0).max(1)
        ahead = sent - sent[is_free].min() > self.teams.received[-1].max()
        order = np.lexsort((sent, np.where(ahead, 0, -self.near), ~is_free))
        return int(order[0])


class _Replica:
    """Receivers that move together."""

    def __init__(self, receiver_of: Numbers, structures: Sequence[tuple[int, Structure]], state: _State, nodes: Numbers):
        self.receiver_of = receiver_of
        self.rows = receiver_of[receiver_of >= 0]
        self.ranks = tuple(self.rows.tolist())
        stages: dict[int, _Stage] = {}
        for layer, structure in structures:
            if (receiver_of[structure.classes] >= 0).any():
                if id(structure) not in stages:
                    stages[id(structure)] = _Stage(structure, receiver_of, nodes)
                stages[id(structure)].layers.insert(0, layer)
        self.local = [stage for stage in stages.values() if stage.teams.is_local]
        self.stages = [stage for stage in stages.values() if not stage.teams.is_local]
        self.unreceived = np.zeros(len(self.rows), np.int64)
        for stage in self.stages:
            per_rank = dict(zip(receiver_of[stage.teams.classes].tolist(), stage.teams.received[-1].tolist()))
            self.unreceived += len(stage.layers) * np.array([per_rank.get(rank, 0) for rank in self.ranks])
            share = stage.size * len(stage.layers) / len(stage.structure.family)
            state.unsent[stage.family] = state.unsent.get(stage.family, 0.0) + share
        self.open: list[_Block] = []
        self.quiet_rounds: list[int] = []  # those that begin with no open block

    @property
    def is_done(self) -> bool:
        return not self.stages and not self.open

    def priority(self, state: _State) -> tuple[bool, int, tuple[int, ...]]:
        """Smallest first: who has a layer open, then who has most left."""
        return (not self.open, int((state.received[self.rows] - self.unreceived).min()), self.ranks)

    def begin(self, state: _State) -> _Block | None:
        """Open the next layer, or None when it must wait.

        A second one is opened beside the first only where senders alone cannot keep the receivers busy: a sampler's rank that takes a
        half of what a trainer's rank holds.
        """
        spare = 1 + TOLERANCE - sum(block.receive_rate for block in self.open)
        if spare <= 0 or int(state.to_receive[self.rows].min()) * WORTHWHILE < state.limit:
            return None
        for stage in sorted(
            self.stages, key=lambda stage: -(state.unsent[stage.family] + stage.size * len(stage.layers) / len(self.ranks))
        ):
            team = stage.free_team(state, spare)
            if team is None:
                continue
            block = _Block(stage.layers.pop(), stage.structure, stage.teams, team, self.receiver_of)
            if not stage.layers:
                self.stages.remove(stage)
            state.unsent[stage.family] -= stage.size / len(block.family)
            state.busy[block.family] += block.rates
            state.sent[block.senders] += block.sent[-1]
            state.received[block.receivers] += block.received[-1]
            self.open.append(block)
            return block
        return None

    def visits(self, number: int, state: _State) -> Iterator[Visit]:
        """What the replica takes in this round."""
        blocks = list(self.open)
        while blocks:
            block, first = blocks.pop(0), 0
            first = block.next
            if block.advance(state.to_send, state.to_receive):
                yield Visit(number, self.ranks, block.chosen, block.layer, first, block.next)
            if block.is_done:
                state.busy[block.family] -= block.rates
                self.open.remove(block)
            if not blocks and (opened := self.begin(state)):
                blocks.append(opened)

    def local_visits(self) -> Iterator[Visit]:
        """Layers that need no message, spread over rounds in which the replica has no other layer open."""
        rounds = self.quiet_rounds or [0]
        layers = [(layer, stage) for stage in self.local for layer in reversed(stage.layers)]
        for index, (layer, stage) in enumerate(layers):
            nobody = tuple(stage.teams.chosen[0].tolist())
            yield Visit(rounds[index * len(rounds) // len(layers)], self.ranks, nobody, layer, 0, stage.teams.num_slices)


def make_schedule(demand: Demand, node_of: Callable[[int], int], limit: int) -> Schedule:
    """Rounds of at most `limit` elements sent and received by every rank. A slice never exceeds the limit (`demand.make_demand`)."""
    state = _State(demand.world_size, limit)
    nodes = np.array([node_of(rank) for rank in range(demand.world_size)])
    structures = _structures(demand)
    replicas = [_Replica(receiver_of, structures, state, nodes) for receiver_of in _receivers(demand)]
    visits: list[Visit] = []
    critical, number = 0, 0
    while waiting := [replica for replica in replicas if not replica.is_done]:
        state.new_round()
        waiting.sort(key=lambda replica: replica.priority(state))
        for replica in waiting:
            if not replica.open:
                replica.quiet_rounds.append(number)
                replica.begin(state)
        for replica in waiting:
            visits += replica.visits(number, state)
        critical += state.load
        number += 1
    visits = [visit for replica in replicas for visit in replica.local_visits()] + visits
    visits.sort(key=lambda visit: visit.round)  # stable: a replica's visits keep their order, local ones first
    return Schedule(tuple(visits), max(number, int(bool(visits))), critical, state.received, state.sent)


def _structures(demand: Demand) -> list[tuple[int, Structure]]:
    """(layer, structure) for every layer; layers that are alike share one."""
    known: dict[tuple, Structure] = {}
    result = []
    for layer, units in enumerate(demand.layers):
        key = tuple((unit.target_class, unit.holder, unit.sizes.tobytes()) for unit in units)
        if key not in known:
            known[key] = Structure(demand, units)
        result.append((layer, known[key]))
    return result


def _receivers(demand: Demand) -> Iterator[Numbers]:
    """The rank of each class (-1: none) of those who go together: the i-th of all classes, or single ranks where these are uneven."""
    if len({len(ranks) for ranks in demand.classes}) == 1:
        yield from np.array(demand.classes).T
    else:
        for number, ranks in enumerate(demand.classes):
            for rank in ranks:
                receivers = np.full(len(demand.classes), -1)
                receivers[number] = rank
                yield receivers
