"""Who sends which slice to whom: a pure function of what every rank holds and what every rank needs.

Both sides speak of boxes in Hugging Face tensors. A box is one (offset, size) pair for each axis. The trainer's pieces come from
Megatron's sharded state, the sampler's boxes from a trace of its own loader; intersecting them is all there is to resharding, for
every combination of parallel layouts. `docs/design.md` draws the picture.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.bridge.boxes import Box, SourceMeta, TargetBox, box_text, intersect, join, num_elements, within
from megarl.bridge.demand import Demand, Unit, make_demand
from megarl.bridge.rounds import Schedule, Visit, make_schedule
from megarl.bridge.senders import Bound, lower_bound

__all__ = ["Box", "Op", "SourceMeta", "TargetBox", "WeightPlan", "box_text", "intersect", "make_plan", "num_elements", "within"]


class Op(NamedTuple):
    """Copy `box` of a Hugging Face tensor from a source piece of one rank into a target box of another (or the same)."""

    hf_name: str
    box: Box
    source_rank: int
    source_index: int  # position in the source rank's pieces
    target_rank: int
    target_index: int  # position in the target rank's boxes

    @property
    def num_elements(self) -> int:
        return num_elements(self.box)

    @property
    def is_local(self) -> bool:
        return self.source_rank == self.target_rank


@dataclass(frozen=True)
class WeightPlan:
    """Ops in rounds. A rank sends at most the plan's B bytes in a round, and receives at most as many.

    Ranks are those of one numbering that trainers and samplers share; a rank may hold pieces, targets, both or neither. A plan made
    for one `rank` has only the ops that start or end there; then `rounds` has the same length on every rank, and the ops between two
    ranks have the same order in a round on both. `rank` is None in a plan of everybody's ops.
    """

    rounds: tuple[tuple[Op, ...], ...]
    rank: int | None = None

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for ops in self.rounds for op in ops)


class Outline:
    """A plan before it is written out in ops: the same for all ranks, and small however many they are."""

    def __init__(self, demand: Demand, schedule: Schedule):
        self.demand, self.schedule = demand, schedule
        self._class_of = {rank: number for number, ranks in enumerate(demand.classes) for rank in ranks}
        self._units: list[dict[int, list[tuple[int, Unit]]]] = []  # [layer][class]: position in the layer, unit
        for units in demand.layers:
            self._units.append(defaultdict(list))
            for position, unit in enumerate(units):
                self._units[-1][unit.target_class].append((position, unit))

    @property
    def bound(self) -> Bound:
        """What no plan can beat."""
        return lower_bound(self.demand)

    def write_out(self, rank: int | None = None) -> WeightPlan:
        """The plan of one rank, or with None of all."""
        rounds: list[list[Op]] = [[] for _ in range(self.schedule.num_rounds)]
        for visit in self.schedule.visits:
            is_mine = rank is None or rank in visit.senders
            for receiver in visit.receivers:
                if is_mine or rank == receiver:
                    rounds[visit.round] += self._ops(visit, receiver, rank)
        return WeightPlan(tuple(map(tuple, rounds)), rank)

    def _ops(self, visit: Visit, receiver: int, rank: int | None) -> Iterable[Op]:
        copies = []
        for position, unit in self._units[visit.layer][self._class_of[receiver]]:
            sender = visit.senders[position]
            sender = receiver if sender < 0 else sender
            if rank in (None, receiver, sender):
                copies += [(atom, sender) for atom in unit.atoms[unit.first[visit.first] : unit.first[visit.last]]]
        copies.sort(key=lambda copy: copy[0].order)
        joined: dict[tuple[int, Box, int], list[Op]] = {}
        for atom, sender in copies:
            key = (atom.target_index, atom.piece, sender)
            parts = joined.setdefault(key, [])
            if parts and (box := join(parts[-1].box, atom.box)):
                parts[-1] = parts[-1]._replace(box=box)
            else:
                piece = self.demand.pieces.index(sender, atom.hf_name, atom.piece)
                parts.append(Op(atom.hf_name, atom.box, sender, piece, receiver, atom.target_index))
        return [op for parts in joined.values() for op in parts]


def make_outline(
    source: SourceMeta,
    target: Sequence[Sequence[TargetBox]],
    *,
    bucket_bytes: int,
    element_bytes: int,
    node_of: Callable[[int], int] = lambda rank: 0,
) -> Outline:
    """The part of `make_plan` that does not depend on a rank; same arguments."""
    limit = max(1, bucket_bytes // element_bytes)
    demand = make_demand(source, target, limit)
    return Outline(demand, make_schedule(demand, node_of, limit))


def make_plan(
    source: SourceMeta,
    target: Sequence[Sequence[TargetBox]],
    *,
    bucket_bytes: int,
    element_bytes: int,
    node_of: Callable[[int], int] = lambda rank: 0,
    rank: int | None = None,
) -> WeightPlan:
    """The plan that fills every target box from the pieces of `source`. Equal arguments give equal plans, on every rank.

    A rank takes what it holds itself; anything else comes from a replica, those of the same node first unless that delays the whole, and
    replicas share the work evenly.
    Args: `source[rank]` and `target[rank]` describe what a rank holds and needs (share the objects of ranks that have the same: they are
    compared once); `bucket_bytes` bounds what a rank sends and what it receives in one round, `element_bytes` is the size of a
    transferred element, `node_of` maps ranks to machines; with `rank` only its own ops are written out.
    Raises `WeightMapError` when a target box is not covered exactly once.
    """
    outline = make_outline(source, target, bucket_bytes=bucket_bytes, element_bytes=element_bytes, node_of=node_of)
    return outline.write_out(rank)
