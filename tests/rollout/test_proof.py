"""One changed element anywhere between the trainer's weights and what the sampler computes with: who notices, and what is said."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig, RolloutConfig
from tests.ranks import run_ranks
from tests.rollout.tiny_models import save_tiny

MAX_LEN, TENSOR = 64, "model.layers.1.mlp.down_proj.weight"


class Owner:
    """What the weight sync asks of a role."""

    def __init__(self, pieces):
        self.pieces = pieces


class Hooked:
    """The ends of a transport with one of their methods changed."""

    def __init__(self, ends, **changes):
        self._ends, self._changes = ends, changes

    def __getattr__(self, name):
        method = getattr(self._ends, name)
        return (lambda op: self._changes[name](op, method)) if name in self._changes else method


def is_chosen(op) -> bool:
    """The slice of the tensor that goes from rank 0 to rank 1."""
    return (op.hf_name, op.source_rank, op.target_rank) == (TENSOR, 0, 1)


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with one element off by a bit in its last place."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    last = copy.view(-1)[-1:]
    last.view(torch.int32).bitwise_xor_(1)
    return copy


class SendsAnother:
    """Packing: what leaves is not what the trainer holds."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, rounds, ends):
        self.inner.run(rounds, Hooked(ends, read=lambda op, read: changed(read(op)) if is_chosen(op) else read(op)))


class LosesABit:
    """The wire: what arrives is not what left."""

    def __init__(self, inner, rank: int):
        self.inner, self.wire, self.is_victim, self.done = inner, inner.wire, rank == 1, False

    def run(self, rounds, ends):
        self.inner.wire = self
        try:
            self.inner.run(rounds, ends)
        finally:
            self.inner.wire = self.wire

    def post(self, sends, receives):
        pending = self.wire.post(sends, receives)
        return Tampered(pending, self, [tensor for _, tensor in receives]) if self.is_victim and receives else pending


class Tampered:
    def __init__(self, pending, wire, received):
        self.pending, self.wire, self.received = pending, wire, received

    def wait(self):
        self.pending.wait()
        if not self.wire.done:
            self.wire.done = True
            self.received[0][:1].view(torch.int32).bitwise_xor_(1)


class WritesBeside:
    """Unpacking: the last row of a slice lands in the row before it."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, rounds, ends):
        self.inner.run(rounds, Hooked(ends, write=self.shifted))

    def shifted(self, op, write):
        return write(op).roll(1, 0) if is_chosen(op) else write(op)  # a copy: what is copied into it is lost


class SpoilsStaging:
    """Staging: something writes into a slice that has landed, before the sampler takes the whole parameter over."""

    def __init__(self, inner, engine):
        self.inner, self.engine, self.landed = inner, engine, []

    def run(self, rounds, ends):
        self.inner.run(rounds, Hooked(ends, landed=self.spoil))

    def spoil(self, op, landed):
        from megarl.bridge.sync import slice_of_parameter

        if op.hf_name == TENSOR and op.target_rank == 1:
            self.landed.append(op)
            if len(self.landed) == 2:  # the second half completes it
                first = self.landed[0]
                wanted = self.engine.targets[first.target_index]
                view = slice_of_parameter(self.engine.target(wanted.parameter), wanted, first.box)
                view.copy_(changed(view))
        landed(op)


def corrupt_every_hop(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """What a sync says about one bit of one element, changed at each hop in turn; the sampler must refuse to generate each time."""
    from megarl.bridge.sync import WeightSync
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.errors import RolloutError
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.records import Prompt
    from megarl.rollout.engine import make_greedy_requests
    from megarl.rollout.vllm_engine import VllmEngine

    parallel = ParallelConfig(tensor=2)
    layout = groups.initialize(parallel, seed=0)
    spec = read_spec(folder)
    rollout = RolloutConfig(prompts_per_step=8, max_response_tokens=4, kv_cache_bytes=8 << 20)
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, 1), "fp32", MAX_LEN)
    owner = Owner(source_pieces(build_model(spec, "actor", parallel, "fp32", layout), spec.table("actor")))
    load_pieces(owner.pieces, SafetensorsSource(folder))
    sync = WeightSync(engine, layout, bucket_bytes=40_000, verify_first=1, verify_every=2)
    greedy = make_greedy_requests([Prompt(0, (5, 6, 7))], rollout, ())
    sync.push(owner, 0)
    clean, said = engine.generate(greedy), {}
    transport = sync.transport
    hops = {
        "pack": SendsAnother(transport),
        "wire": LosesABit(transport, rank),
        "scatter": WritesBeside(transport),
        "staging": SpoilsStaging(transport, engine),
    }
    for hop, broken in hops.items():
        sync.num_syncs = 1  # the second sync is one of those whose digests are compared
        sync.transport = broken
        with pytest.raises(RolloutError) as caught:
            sync.push(owner, 1)
        said[hop] = str(caught.value)
        with pytest.raises(RolloutError, match="no weights"):
            engine.generate(greedy)
        sync.transport, transport.wire = transport, hops["wire"].wire
        sync.push(owner, 0)
        assert engine.generate(greedy) == clean, "a sync after a failed one is whole again"
    # A sync whose digests nobody compares does not notice.
    sync.num_syncs, sync.transport = 2, SendsAnother(transport)
    sync.push(owner, 2)
    return said


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", 0, tmp_path_factory.mktemp("models"))


def test_one_changed_bit_is_named_at_every_hop(model):
    ranks = run_ranks(corrupt_every_hop, 2, model)
    assert ranks[0] == ranks[1]
    for hop, message in ranks[0].items():
        print(hop, message)
        assert "weight slices arrived in the sampler altered" in message, hop
        assert "to rank 1" in message and (TENSOR in message or hop == "wire"), hop


def disturb_the_sampler(rank: int, world_size: int, root: Path) -> dict[str, str]:
    """Every digest is right, but the sampler computes with something else: stale packed copies, another rotary setting, a wrong scale."""
    from dataclasses import replace

    from megarl.errors import RolloutError
    from megarl.parallel import groups
    from megarl.ppo.assembly import build_parts
    from megarl.ppo.loop import train
    from tests.course.test_ppo import ppo_run

    run = ppo_run(root, "disturbed", eval=None, checkpoint={})
    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts(run, layout)
    endpoint = parts.engine._endpoint
    said = {}

    def start(parts) -> str:
        with pytest.raises(RolloutError) as caught:
            train(run, layout, parts)
        return str(caught.value)

    derived, endpoint._with_derived_copies = endpoint._with_derived_copies, []
    said["never filled"] = start(parts)  # the output layer is a packed copy of the zeros that the sampler started with
    endpoint._with_derived_copies = derived
    temperature = run.rollout.temperature
    hot = run.model_copy(update={"rollout": run.rollout.model_copy(update={"temperature": 0.5})})
    gate = type(parts.parity)(hot, layout, parts.parity._prompts, parts.parity._stops, parts.engine, parts.memory, parts.judge, parts.actor)
    assert temperature == 1.0
    said["temperature"] = start(replace(parts, parity=gate))

    class Stale:
        """Leaves the derived copies as they are from the third sync on."""

        def __init__(self, inner):
            self.inner = inner

        def push(self, owner, version):
            endpoint._with_derived_copies = derived if version < 2 else []
            return self.inner.push(owner, version)

    said["stale"] = start(replace(parts, weight_sync=Stale(parts.weight_sync)))
    return said


def test_what_digests_cannot_see_stops_at_the_gate(tmp_path):
    from megarl.quickstart.make_data import make_data

    make_data(tmp_path / "data", seed=0)
    (said,) = run_ranks(disturb_the_sampler, 1, tmp_path)
    for name, message in said.items():
        print(name, message)
        assert "sampler and trainer disagree" in message and "rollout.parity_tolerance = 0.01" in message
    assert "(1) the two sides do not follow each other" in said["never filled"]
    assert "(1) the trainer's log-probabilities are about" in said["temperature"] and "rollout.temperature" in said["temperature"]
    assert "earlier comparisons were fine: the newest weight sync did not reach" in said["stale"]
