"""Who sends which slice to whom: a pure function of what every rank holds and what every rank needs.

Both sides speak of boxes in Hugging Face tensors. A box is one (offset, size) pair for each axis. The trainer's pieces come from
Megatron's sharded state, the sampler's boxes from a trace of its own loader; intersecting them is all there is to resharding, for
every combination of parallel layouts. `docs/design.md` draws the picture.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.bridge.boxes import Box, box_text, intersect, num_elements, split, within
from megarl.errors import WeightMapError

__all__ = ["Box", "Op", "SourceMeta", "TargetBox", "WeightPlan", "box_text", "intersect", "make_plan", "num_elements", "within"]

SourceMeta = Sequence[Sequence[tuple[str, Box]]]  # [rank][piece]: (Hugging Face name, box)


class TargetBox(NamedTuple):
    """One box of a Hugging Face tensor and where it lies in a parameter of one generator rank. Both boxes have equal sizes."""

    hf_name: str
    hf_box: Box
    parameter: str
    parameter_box: Box


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


def make_plan(
    source: SourceMeta,
    target: Sequence[Sequence[TargetBox]],
    *,
    bucket_bytes: int,
    element_bytes: int,
    node_of: Callable[[int], int] = lambda rank: 0,
) -> WeightPlan:
    """The plan that fills every target box from the pieces of `source`. Equal arguments give equal plans, on every rank.

    A rank takes what it holds itself; anything else comes from the least loaded replica, ranks of the same node first.
    Args: `source[rank]` and `target[rank]` describe what a rank holds and needs; `bucket_bytes` bounds what a rank sends and what it
    receives in one bucket, `element_bytes` is the size of a transferred element, `node_of` maps ranks to machines.
    Raises `WeightMapError` when a target box is not covered exactly once.
    """
    holders: dict[str, dict[Box, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for rank, pieces in enumerate(source):
        for index, (name, box) in enumerate(pieces):
            holders[name][box].append((rank, index))
    sent: Counter[int] = Counter()
    ops: list[Op] = []
    for rank, boxes in enumerate(target):
        for index, wanted in enumerate(boxes):
            for box, common in _cover(wanted, holders.get(wanted.hf_name, {}), rank):
                op = _assign(wanted.hf_name, common, holders[wanted.hf_name][box], rank, index, sent, node_of)
                ops += [op] if op.is_local else [op._replace(box=part) for part in split(op.box, max(1, bucket_bytes // element_bytes))]
    ops.sort(key=lambda op: (_layer_order(op.hf_name), op.hf_name, op.source_rank, op.target_rank, op.target_index, op.box))
    return WeightPlan(tuple(_rounds(ops, bucket_bytes // element_bytes)))


def _cover(wanted: TargetBox, held: Iterable[Box], rank: int) -> list[tuple[Box, Box]]:
    """(held box, part of `wanted` in it) for the held boxes that make up `wanted`; the parts are disjoint and leave nothing out."""
    found = [(box, common) for box in held if (common := intersect(box, wanted.hf_box)) is not None]
    covered = sum(num_elements(common) for _, common in found)
    needed = num_elements(wanted.hf_box)
    if covered == needed and not any(intersect(a, b) for i, (_, a) in enumerate(found) for _, b in found[:i]):
        return sorted(found)
    raise WeightMapError(
        f"the sampler's parameter {wanted.parameter} on rank {rank} needs {wanted.hf_name} {box_text(wanted.hf_box)}, {needed} elements;"
        f" the trainer's pieces cover {covered} of them ({', '.join(box_text(box) for box, _ in sorted(found)) or 'no piece'}):"
        " the family's weight table and the sampler's model disagree"
    )


def _assign(
    name: str,
    box: Box,
    holders: list[tuple[int, int]],
    rank: int,
    index: int,
    sent: Counter[int],
    node_of: Callable[[int], int],
) -> Op:
    own = next((holder for holder in holders if holder[0] == rank), None)
    chosen = own or min(holders, key=lambda holder: (node_of(holder[0]) != node_of(rank), sent[holder[0]], holder))
    if own is None:
        sent[chosen[0]] += num_elements(box)
    return Op(name, box, chosen[0], chosen[1], rank, index)


def _layer_order(name: str) -> int:
    """Embedding first, then the layers, then what follows them: a module's pieces land close together."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer:
        return int(layer.group(1)) + 1
    return 0 if "embed" in name else 1 << 30


def _rounds(ops: list[Op], limit: int) -> Iterable[tuple[Op, ...]]:
    bucket: list[Op] = []
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    for op in ops:
        size = 0 if op.is_local else op.num_elements
        if bucket and max(out[op.source_rank], into[op.target_rank]) + size > limit:
            yield tuple(bucket)
            bucket, out, into = [], Counter(), Counter()
        bucket.append(op)
        out[op.source_rank] += size
        into[op.target_rank] += size
    if bucket:
        yield tuple(bucket)
