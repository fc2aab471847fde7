"""What every rank needs and which ranks hold it, with equal ranks taken together: the first half of a plan.

Ranks that want the same boxes form a class (the i-th tensor-parallel rank of every generator replica), and pieces that lie on the same
ranks share a holder number. Everything later works on (class, layer, holder) units, of which there are few, however many ranks.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megarl.bridge.boxes import Box, SourceMeta, TargetBox, box_text, intersect, num_elements, split
from megarl.errors import WeightMapError

Numbers = NDArray[np.int64]
SLICES_PER_ROUND = 32  # a layer is cut into slices so fine that about so many of them fill a round
ATOMS_PER_ROUND = 128  # no copy is larger than this part of a round


class Atom(NamedTuple):
    """The smallest copy: a part of a source piece that a target box needs. `order` sorts the atoms of a class and layer."""

    order: int
    target_index: int
    hf_name: str
    piece: Box
    box: Box


@dataclass(frozen=True)
class Unit:
    """What a rank of one class needs of one layer from one set of holders.

    In slice k these are `atoms[first[k]:first[k + 1]]`, `sizes[k]` elements.
    """

    target_class: int
    holder: int
    atoms: tuple[Atom, ...]
    first: Numbers
    sizes: Numbers


@dataclass(frozen=True)
class Demand:
    """`layers[g]` are the units of one layer, all cut into the same slices. `holds` bool[rank, holder] tells who holds what."""

    classes: tuple[tuple[int, ...], ...]  # ranks, ascending
    layers: tuple[tuple[Unit, ...], ...]
    holders: tuple[tuple[int, ...], ...]  # ranks, ascending
    holds: NDArray[np.bool_]
    pieces: "Pieces"

    @property
    def world_size(self) -> int:
        return len(self.holds)

    def totals(self) -> Numbers:
        """Elements that a rank of a class needs from a holder, i64[class, holder]."""
        total = np.zeros((len(self.classes), len(self.holders)), np.int64)
        for units in self.layers:
            for unit in units:
                total[unit.target_class, unit.holder] += unit.sizes.sum()
        return total


class Pieces:
    """The distinct pieces of all ranks and who holds them."""

    def __init__(self, source: SourceMeta):
        self.classes = classes_of(source)
        self.class_of_rank = {rank: number for number, (_, ranks) in enumerate(self.classes) for rank in ranks}
        self._index: dict[str, dict[Box, dict[int, int]]] = {}  # name -> box -> class -> position
        for number, (pieces, _) in enumerate(self.classes):
            for index, (name, box) in enumerate(pieces):
                self._index.setdefault(name, {}).setdefault(box, {}).setdefault(number, index)
        self._holder_of_classes: dict[tuple[int, ...], int] = {}
        self.holders: list[tuple[int, ...]] = []

    def boxes(self, name: str) -> Iterable[Box]:
        """The distinct boxes in which the tensor is held."""
        return self._index.get(name, {})

    def index(self, rank: int, name: str, box: Box) -> int:
        """Position of this piece among those of the rank, which must hold it."""
        return self._index[name][box][self.class_of_rank[rank]]

    def holder(self, name: str, box: Box) -> int:
        """Number of the set of ranks that hold this piece."""
        key = tuple(self._index[name][box])
        if key not in self._holder_of_classes:
            self._holder_of_classes[key] = len(self.holders)
            self.holders.append(tuple(sorted(rank for number in key for rank in self.classes[number][1])))
        return self._holder_of_classes[key]


def classes_of(lists: Sequence[Sequence]) -> list[tuple[Sequence, list[int]]]:
    """(list, ranks that have it) for the distinct lists that are not empty. One shared object is compared once, however many have it."""
    number_of_id: dict[int, int] = {}
    number_of_value: dict[tuple, int] = {}
    classes: list[tuple[Sequence, list[int]]] = []
    for rank, items in enumerate(lists):
        if not items:
            continue
        if id(items) not in number_of_id:
            number = number_of_value.setdefault(tuple(items), len(classes))
            number_of_id[id(items)] = number
            if number == len(classes):
                classes.append((items, []))
        classes[number_of_id[id(items)]][1].append(rank)
    return classes


def make_demand(source: SourceMeta, target: Sequence[Sequence[TargetBox]], limit: int) -> Demand:
    """What the targets need. `limit` is the number of elements that a rank may send, and receive, in a round; at least 1.

    Raises `WeightMapError` when the source pieces do not cover a target box exactly once.
    """
    pieces, covers = Pieces(source), _Covers(max(1, limit // ATOMS_PER_ROUND))
    classes = classes_of(target)
    by_layer: dict[int, list[_Needs]] = defaultdict(list)
    for number, (boxes, ranks) in enumerate(classes):
        needs: dict[int, _Needs] = {}
        for index, wanted in enumerate(boxes):
            layer = layer_order(wanted.hf_name)
            if layer not in needs:
                needs[layer] = _Needs(number)
            covers.add(needs[layer], wanted, index, pieces, ranks[0])
        for layer, need in needs.items():
            by_layer[layer].append(need)
    holds = np.zeros((len(source), len(pieces.holders)), bool)
    for holder, ranks in enumerate(pieces.holders):
        holds[list(ranks), holder] = True
    layers = tuple(tuple(_slice(by_layer[layer], holds, limit)) for layer in sorted(by_layer))
    return Demand(tuple(tuple(ranks) for _, ranks in classes), layers, tuple(pieces.holders), holds, pieces)


def layer_order(name: str) -> int:
    """Embedding first, then the layers, then what follows them: a layer's pieces travel together."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer:
        return int(layer.group(1)) + 1
    return 0 if "embed" in name else 1 << 30


class _Needs:
    """The atoms of one class in one layer, as columns."""

    def __init__(self, target_class: int):
        self.target_class = target_class
        self.modules: dict[str, int] = {}
        self.module: list[int] = []
        self.holder: list[int] = []
        self.size: list[int] = []
        self.what: list[tuple[int, str, Box, Box]] = []


class _Covers:
    """Cuts target boxes at the borders of source pieces; boxes of equal geometry are cut once."""

    def __init__(self, atom_limit: int):
        self.atom_limit = atom_limit
        self._known: dict[tuple, list[tuple[Box, list[tuple[Box, int]]]]] = {}

    def add(self, needs: _Needs, wanted: TargetBox, index: int, pieces: Pieces, rank: int) -> None:
        held = pieces.boxes(wanted.hf_name)
        geometry = (wanted.hf_box, *held)
        if geometry not in self._known:
            parts = _cover(wanted, held, rank)
            self._known[geometry] = [(box, [(a, num_elements(a)) for a in split(common, self.atom_limit)]) for box, common in parts]
        module = needs.modules.setdefault(wanted.parameter.rpartition(".")[0], len(needs.modules))
        for box, atoms in self._known[geometry]:
            holder = pieces.holder(wanted.hf_name, box)
            for atom, size in atoms:
                needs.module.append(module)
                needs.holder.append(holder)
                needs.size.append(size)
                needs.what.append((index, wanted.hf_name, box, atom))


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


def _slice(layer: list[_Needs], holds: NDArray[np.bool_], limit: int) -> Iterable[Unit]:
    """The layer's units, cut into slices of which each fits into a round whoever sends it.

    A class takes its modules one after the other, and a module from all its holders at once, in equal parts: so a receiver has one
    module open at a time, and the senders of a layer are busy together.
    """
    columns = [(np.array(need.module), np.array(need.holder), np.array(need.size, np.int64)) for need in layer]
    needed = np.zeros((len(layer), holds.shape[1]), np.int64)
    for row, (_, holder, size) in zip(needed, columns):
        np.add.at(row, holder, size)
    most = max(int(needed.sum(1).max()), int(_most_sent(holds, needed[:, :, None])[0]))
    count = -(-most // max(1, limit // SLICES_PER_ROUND))
    orders, slices = [], []
    for module, holder, size in columns:
        position, total = _positions(module, holder, size)
        order = np.argsort(position, kind="stable")
        orders.append(order)
        slices.append((position * count // total)[order])
    sums = np.zeros((len(layer), holds.shape[1], count), np.int64)
    for row, (_, holder, size), order, number in zip(sums, columns, orders, slices):
        np.add.at(row, (holder[order], number), size[order])
    too_large = np.maximum(sums.sum(1).max(0), _most_sent(holds, sums)) > limit
    slices = _crumbled(slices, too_large)
    count = max(int(number.max()) for number in slices) + 1
    for need, (_, holder, size), order, number in zip(layer, columns, orders, slices):
        for which in np.unique(holder):
            mine = np.flatnonzero(holder[order] == which)
            first = np.searchsorted(number[mine], np.arange(count + 1))
            cumulated = np.concatenate([[0], np.cumsum(size[order[mine]])])
            atoms = tuple(Atom(int(place), *need.what[order[place]]) for place in mine)
            yield Unit(need.target_class, int(which), atoms, first, np.diff(cumulated[first]))


def _most_sent(holds: NDArray[np.bool_], needed: Numbers) -> Numbers:
    """The most that any rank would send of each slice, if it alone served one rank of every class: i64[slice] of [class, holder, slice]."""
    of_holder = needed.sum(0)
    used = np.flatnonzero(of_holder.any(1))
    distinct = np.unique(holds[:, used], axis=0)
    return (distinct.astype(np.int64) @ of_holder[used]).max(0)


def _positions(module: Numbers, holder: Numbers, size: Numbers) -> tuple[Numbers, int]:
    """Where each atom begins when modules follow one another and the holders of a module are drained in equal parts; and the total."""
    position, start = np.zeros(len(size), np.int64), 0
    for number in range(int(module.max()) + 1):
        inside = module == number
        length = int(size[inside].sum())
        for which in np.unique(holder[inside]):
            mine = np.flatnonzero(inside & (holder == which))
            begins = np.cumsum(size[mine]) - size[mine]
            position[mine] = start + begins * length // int(size[mine].sum())
        start += length
    return position, start


def _crumbled(slices: list[Numbers], too_large: NDArray[np.bool_]) -> list[Numbers]:
    """New numbers for the atoms' slices, in which those of a slice that is too large have one each."""
    if not too_large.any():
        return slices
    parts = np.ones(len(too_large), np.int64)
    parts[too_large] = sum(np.bincount(number, minlength=len(too_large)) for number in slices)[too_large]
    start = np.cumsum(parts) - parts
    result, used = [], np.zeros(len(too_large), np.int64)
    for number in slices:
        new = start[number]
        for which in np.flatnonzero(too_large):
            mine = np.flatnonzero(number == which)
            new[mine] += used[which] + np.arange(len(mine))
            used[which] += len(mine)
        result.append(new)
    return result
