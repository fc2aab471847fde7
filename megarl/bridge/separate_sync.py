"""Pushes weights into generators that are processes of their own: the same plan, with ranks behind the trainer's that only receive.

Where all processes that exchange anything lie on one host, weights travel through rings of shared memory, else through one joint process
group. A generator samples again only when every process of every generator has all its weights: until then none has a version.
"""

import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.bridge.boxes import box_text
from megarl.bridge.joint import JointGroup, Meeting, process_name, reserve
from megarl.bridge.plan import Op, Outline, WeightPlan
from megarl.bridge.ring import RingWriter
from megarl.bridge.sync import DEFAULT_BUCKET_BYTES, RankDescription, RankEnds, SourcePiece, WeightReceiver, WeightSync
from megarl.bridge.transport import BufferedTransport
from megarl.bridge.verify import NAMED, digest
from megarl.bridge.wires import Delivery, JointWire, RingWire, SyncWire
from megarl.errors import MegarlError, RolloutError
from megarl.parallel import device
from megarl.parallel.collectives import Group, agree, broadcast_json, exchange_rows, gather_distinct_json, gather_json, together
from megarl.parallel.layout import ParallelLayout

Rounds = tuple[tuple[Op, ...], ...]
SLOT_BYTES = 16 << 20  # a part of a message; larger slots save nothing
WIND_UP_S = 10.0  # for generators to say what they know of a sync that has failed


class SeparateReceiver(WeightReceiver, Protocol):
    """The trainer's view of generators: `rollout.separate_engine.SeparateEngine`."""

    tensor: int  # processes of a generator
    process_numbers: Sequence[int]  # of the generator processes this rank speaks for
    descriptions: Sequence[dict[str, Any]]  # what each of them wants, and its host

    def ask_to_connect(self, deliveries: Sequence[dict[str, Any]], timeout_s: float) -> list: ...
    def ask_to_receive(self, sync: int, is_verified: bool, timeout_s: float) -> list: ...
    def wait_for(self, questions: list, timeout_s: float) -> list[dict[str, Any]]: ...


class SeparateSync(WeightSync):
    """As `WeightSync`, for a `SeparateReceiver`.

    Args: `host` is where rank 0 is reached by generators on other hosts; `always_joint` takes the joint group on one host, too.
    """

    def __init__(
        self,
        engine: SeparateReceiver,
        layout: ParallelLayout,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        verify_first: int = 2,
        verify_every: int = 0,
        timeout_s: float = 600.0,
        host: str = "127.0.0.1",
        always_joint: bool = False,
    ):
        super().__init__(
            engine, layout, bucket_bytes=bucket_bytes, verify_first=verify_first, verify_every=verify_every, timeout_s=timeout_s
        )
        self.engine: SeparateReceiver = engine
        self.host, self.always_joint = host, always_joint
        self.wire: SyncWire | None = None
        self._hosts: list[str] = []
        self._rounds: dict[int, Rounds] = {}  # of each generator process this rank speaks for, by its rank in the plan
        self._is_broken = False

    def _everyone(self, mine: RankDescription) -> list[RankDescription]:
        """The trainer's ranks, then the generators' processes by their numbers."""
        spoken_for = [[number, told["wanted"], told["host"]] for number, told in zip(self.engine.process_numbers, self.engine.descriptions)]
        speakers = gather_distinct_json(spoken_for, self._group)  # most trainer ranks speak for nobody
        generators = {number: RankDescription([], wanted, host) for told in speakers for number, wanted, host in told}
        everyone = super()._everyone(mine) + [generators[number] for number in sorted(generators)]
        self._hosts = [rank.host for rank in everyone]
        return everyone

    def _write_out(self, outline: Outline) -> WeightPlan:
        ranks = [self.layout.world_size + number for number in self.engine.process_numbers]
        self._rounds = {rank: outline.write_out(rank).rounds for rank in ranks}
        return super()._write_out(outline)

    def _digests(self, plan: WeightPlan) -> "GeneratorDigests":
        return GeneratorDigests(plan, self._rounds, self.layout, self.engine.tensor)

    def _run(self, plan: WeightPlan, pieces: list[SourcePiece], digests: "GeneratorDigests | None") -> None:
        if self._is_broken:
            raise RolloutError(
                "an earlier weight sync lost a generator or a rank; start the run again: it continues from its last checkpoint"
            )
        if self.wire is None:
            self.wire = self._open(plan)
            self.transport = BufferedTransport(self.layout.rank, self.engine.dtype, device.device(), self.wire)
        fault = None
        questions: list = []
        try:
            questions = self.engine.ask_to_receive(self._num_pushes, digests is not None, self.timeout_s)
            self.wire.begin(self._num_pushes, self.timeout_s)
            self.transport.run(plan.rounds, RankEnds(self.engine, self.layout.rank, plan.ops, pieces, digests))
            self.wire.drain()
        except RolloutError as error:
            fault = error
            self.wire.close()  # whoever waits for this rank learns of it
        told: list[list[int]] = []
        try:
            patience_s = min(self.timeout_s, WIND_UP_S) if fault else self.timeout_s
            told = [answer["digests"] for answer in self.engine.wait_for(questions, patience_s)]
        except MegarlError as error:
            fault = RolloutError(f"{fault}; {error}") if fault else error
            self.wire.close()
        self._is_broken = True  # unless everybody agrees that nothing went wrong
        agree(fault, self._group)
        self._is_broken = False
        if digests is not None:
            digests.told = told

    # --- wires ---

    def _open(self, plan: WeightPlan) -> SyncWire:
        is_abroad = any(self._hosts[op.source_rank] != self._hosts[op.target_rank] for op in plan.ops)
        needs_group = self.always_joint or any(gather_json(is_abroad, self._group))
        return self._open_group() if needs_group else self._open_rings(plan)

    def _ask_to_connect(self, key: str, meeting: Meeting | None) -> list:
        """Tell the processes this rank speaks for what they will receive; with `key`, through rings of that name."""
        deliveries = []
        for rank, rounds in self._rounds.items():
            sources = sorted({op.source_rank for ops in rounds for op in ops}) if key else ()
            rings = {source: _ring_name(key, source, rank) for source in sources}
            deliveries.append(Delivery(rank, rounds, rings, meeting).to_json())
        return self.engine.ask_to_connect(deliveries, self.timeout_s)

    def _open_rings(self, plan: WeightPlan) -> RingWire:
        key = broadcast_json(f"megarl-{os.getpid()}-{secrets.token_hex(6)}", 0, self._group)
        largest = max((op.num_elements for op in plan.ops), default=1) * self.engine.dtype.itemsize
        size = -(-min(SLOT_BYTES, self.bucket_bytes, max(largest, 1 << 16)) // 64) * 64
        writers: dict[int, RingWriter] = {}

        def create() -> None:
            for target in sorted({op.target_rank for op in plan.ops}):
                writers[target] = RingWriter(_ring_name(key, self.layout.rank, target), size, self._name(target))

        def connect() -> None:
            self.engine.wait_for(self._ask_to_connect(key, None), self.timeout_s)

        try:
            together(create, self._group)
            together(connect, self._group)
            together(lambda: [writer.meet_reader() for writer in writers.values()], self._group)
        finally:
            for writer in writers.values():
                writer.unlink()
        return RingWire(writers)

    def _open_group(self) -> JointWire:
        listening, port = reserve(self.host) if self.layout.rank == 0 else (None, 0)
        port = broadcast_json(port, 0, self._group)
        meeting = Meeting(self.host, port, self.layout.world_size, len(self._hosts) - self.layout.world_size, self.engine.tensor)

        def join() -> JointGroup:
            questions = self._ask_to_connect("", meeting)
            joined = JointGroup(meeting, self.layout.rank, self.timeout_s, listening)
            self.engine.wait_for(questions, self.timeout_s)
            return joined

        return JointWire(together(join, self._group))

    def _name(self, target: int) -> str:
        return process_name(target - self.layout.world_size, self.engine.tensor)


class GeneratorDigests:
    """Digests of one sync whose slices all arrive in generators, which tell theirs to the rank that speaks for them."""

    def __init__(self, plan: WeightPlan, rounds: dict[int, Rounds], layout: ParallelLayout, tensor: int):
        self.told: list[list[int]] = []  # of each process this rank speaks for, in the order of what it received
        self._layout, self._tensor = layout, tensor
        self._ending = {target: [op for ops in several for op in ops] for target, several in rounds.items()}
        self._starting: dict[int, list[Op]] = defaultdict(list)
        for op in plan.ops:
            self._starting[op.target_rank].append(op)
        self._sent: dict[Op, int] = {}

    def sent(self, op: Op, tensor: Tensor, dtype: torch.dtype) -> None:
        """`tensor` is the source slice, cast to `dtype` by the sender."""
        self._sent[op] = int(digest(tensor, dtype))

    def compare(self, group: Group) -> None:
        """Raises `RolloutError` on all ranks, naming the copies whose two ends differ (the first eight)."""
        speakers = gather_json(list(self._ending), group)
        sources = torch.tensor([op.source_rank for ops in self._ending.values() for op in ops], dtype=torch.int64, device=device.device())
        told = torch.tensor([value for process in self.told for value in process], dtype=torch.int64, device=device.device())
        arrived = exchange_rows({"digests": told}, sources, group)["digests"].tolist()
        mine = [op for targets in speakers for target in targets for op in self._starting[target]]
        wrong = [op for op, value in zip(mine, arrived, strict=True) if self._sent[op] != value]
        first = self._layout.world_size
        named = [
            f"{op.hf_name} {box_text(op.box)} from rank {op.source_rank} to {process_name(op.target_rank - first, self._tensor)}"
            for op in wrong[:NAMED]
        ]
        found = gather_json([len(mine), len(wrong), named], group)
        if any(number for _, number, _ in found):
            names = [name for _, _, several in found for name in several]
            count, total = sum(rank[1] for rank in found), sum(rank[0] for rank in found)
            raise RolloutError(f"{count} of {total} weight slices arrived in the sampler altered: {'; '.join(names[:NAMED])}")


def _ring_name(key: str, source: int, target: int) -> str:
    return f"{key}-{source}-{target}"
