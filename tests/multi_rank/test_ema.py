"""The policy's moving average on several ranks: the formula under every layout, weights that come back, checkpoints, a slow reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.checkpoint.sharded import whole
from megarl.checkpoint.sources import CheckpointFiles, CheckpointSource
from megarl.models.family import spec_from_hf_config
from megarl.parallel import groups
from megarl.parallel.memory import Phases
from megarl.parallel.phases import REFERENCE
from megarl.ppo.reference import RefreshedReference
from megarl.ppo.roles import Actor, Reference
from tests.multi_rank.role_cases import NUM_ROWS, Case, DictSource, assembled, hf_config, make_experience, make_run, weights
from tests.ranks import run_all
from tests.resting import Resting
from tests.unit.text_files import sentencepiece_file

DECAY, STEPS = 0.75, 3
TRAINING = {"lr": 0.01, "eps": 1e-5, "clip_grad": 0.5}
EMA = {"ema": {"decay": DECAY}}
PLAIN = {"distributed_optimizer": False}
LAYOUTS = [{}, PLAIN, {"pipeline": 2}, {"tensor": 2, "sequence": True}]
CASES = [Case(parallel, ppo=EMA, optimizer=TRAINING) for parallel in LAYOUTS]
CASES += [Case(parallel, ppo=EMA, optimizer=TRAINING, precision="bf16") for parallel in LAYOUTS[:2]]


def start(case: Case, run=None) -> tuple[Actor, object]:
    run = run or make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    return Actor(spec, run, layout, DictSource(weights(spec, "actor", 1))), layout


def share(layout):
    size = NUM_ROWS // layout.data
    return make_experience().rows(slice(layout.dp_rank * size, (layout.dp_rank + 1) * size))


def owned(pieces) -> list:
    return [(piece.hf_name, piece.box, piece.view.clone().float()) for piece in pieces if piece.is_owner]


def masters(actor: Actor) -> list:
    """What Adam updates: the float32 copies, or the weights where there are none."""
    return owned(actor.learner.optimizer_pieces(actor.pieces).get("main", actor.pieces))


def average(rank: int, world_size: int, case: Case) -> dict:
    actor, layout = start(case)
    ema = actor.learner.ema
    history = [masters(actor)]
    for _ in range(STEPS):
        actor.update(share(layout))
        history.append(masters(actor))
    spoiled = replace(share(layout), advantages=share(layout).advantages * float("nan"))
    found = owned(actor.learner.optimizer_pieces(actor.pieces)["ema"])
    actor.update(spoiled)
    after = owned(actor.learner.optimizer_pieces(actor.pieces)["ema"])
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(found, after, strict=True)), "a skipped update is no step"
    before = [piece.view.clone() for piece in actor.pieces]
    logprobs = actor.logprobs(share(layout))
    ema.exchange()
    shown = owned(actor.pieces)
    everywhere = [piece.view.clone() for piece in actor.pieces]
    averaged_logprobs = actor.logprobs(share(layout))
    ema.exchange()
    assert all(torch.equal(piece.view, view) for piece, view in zip(actor.pieces, before, strict=True))
    assert torch.equal(actor.logprobs(share(layout)), logprobs)
    again = owned(actor.learner.optimizer_pieces(actor.pieces)["ema"])
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(found, again, strict=True))
    assert not torch.equal(averaged_logprobs, logprobs)
    return {f"actor {i}": held for i, held in enumerate(history)} | {
        "actor ema": found,
        "actor shown": shown,
        "everywhere": [view.double().sum().item() for view in everywhere],
        "held": sum(tensor.numel() for tensor in ema.averages()),
    }


def refresh(rank: int, world_size: int, source: str, offload: str) -> None:
    """Every second step the reference says what the policy, or its average, says; between them it says what it said."""
    case = Case({}, ppo=EMA | {"reference_refresh": {"every_steps": 2, "source": source}}, optimizer=TRAINING, precision="bf16")
    actor, layout = start(case)
    run, memory = make_run(case), Phases(Resting(), offload)
    memory.admit("actor", actor.movables)
    model = Reference(actor.spec, run, layout, DictSource(weights(actor.spec, "actor", 3)))
    memory.admit(REFERENCE, model.movables)
    reference = RefreshedReference(model, "k1", run.ppo.reference_refresh, actor, memory)
    batch, said, expected = share(layout), [], torch.zeros(0)
    for step in range(4):
        with memory.scoring():
            said.append(reference.logprobs(batch, actor.logprobs(batch)))
        with memory.learning():
            actor.update(batch)
        reference.refresh(step + 1)
        if step == 1:
            with memory.exchanging():
                if source == "ema":
                    actor.learner.ema.exchange()
                expected = actor.logprobs(batch)
                if source == "ema":
                    actor.learner.ema.exchange()
    assert torch.equal(said[2], expected)
    assert torch.equal(said[0], said[1]) and torch.equal(said[2], said[3]) and not torch.equal(said[1], said[2])
    assert reference.counts() == {"num_refreshes": 2}
    with memory.saving():
        assert all(piece.view.numel() for piece in reference.pieces)
        assert memory.resident_bytes()["reference weights"] > 0


def stored_run(root: Path, name: str, case: Case):
    run = make_run(case)
    files = {"output_dir": root / name, "tokenizer": root / "sp.model"}
    return run.model_copy(update=files | {"actor": run.actor.model_copy(update={"path": root / "model"})})


def checkpoints_of(run, layout):
    from megarl.checkpoint.store import Checkpoints
    from megarl.data.tokenizers import load_tokenizer

    return Checkpoints("ppo", run, layout, load_tokenizer(run.tokenizer), 100)


def keep(rank: int, world_size: int, root: Path, writer: dict, readers: list[dict]) -> None:
    """Average and refreshed reference written under one layout; read under others, and written again at once."""
    import shutil

    import torch.distributed as dist

    from megarl.checkpoint.train_state import TrainState

    ppo = EMA | {"reference_refresh": {"every_steps": 1}}

    def parts(name: str, parallel: dict):
        case = Case(parallel, ppo=ppo, optimizer=TRAINING, precision="bf16")
        run = stored_run(root, name, case)
        actor, layout = start(case, run)
        model = Reference(actor.spec, run, layout, DictSource(weights(actor.spec, "actor", 3)))
        reference = RefreshedReference(model, "k1", run.ppo.reference_refresh, actor, Phases(Resting(), "none"))
        return {"actor": actor, "reference": reference}, checkpoints_of(run, layout), layout

    kept, store, layout = parts("written", writer)
    for _ in range(2):
        kept["actor"].update(share(layout))
    kept["reference"].refresh(1)
    kept["actor"].update(share(layout))
    store.restore_or_start(kept)
    store.save(TrainState(step=2), kept)
    store.finish()
    for index, reader in enumerate(readers):
        if rank == 0:
            shutil.copytree(root / "written" / "checkpoints", root / f"read{index}" / "checkpoints", ignore=shutil.ignore_patterns(".*"))
        dist.barrier()
        kept, store, _ = parts(f"read{index}", reader)
        state = store.restore_or_start(kept)
        assert state.step == 2 and kept["reference"].counts() == {"num_refreshes": 1}
        store.save(TrainState(step=3), kept)
        store.finish()


def resume(rank: int, world_size: int, root: Path) -> list[list[str]]:
    """Two updates, a checkpoint, two updates; and the same from the checkpoint: averages in hex."""
    from megarl.checkpoint.train_state import TrainState

    case = Case({}, ppo=EMA, optimizer=TRAINING)
    run, ends = stored_run(root, "resumed", case), []
    for is_resumed in (False, True):
        actor, layout = start(case, run)
        store = checkpoints_of(run, layout)
        store.restore_or_start({"actor": actor})
        if not is_resumed:
            actor.update(share(layout)), actor.update(share(layout))
            store.save(TrainState(step=1), {"actor": actor})
            store.finish()
        actor.update(share(layout)), actor.update(share(layout))
        ends.append([value.hex() for tensor in actor.learner.ema.averages() for value in tensor.tolist()[::17]])
    return ends


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ema")
    sentencepiece_file(place / "sp.model", ["1+2=3", "4+5=9"], vocab_size=20, model_type="char")
    (place / "model").mkdir()
    return place


READERS = [PLAIN, {"tensor": 2, "sequence": True}, {"pipeline": 2}]


@pytest.fixture(scope="module")
def on_two(root) -> list[list]:
    refreshes = [
        (refresh, (source, offload)) for source, offload in (("policy", "none"), ("policy", "all"), ("ema", "frozen"), ("ema", "all"))
    ]
    return run_all([*((average, (case,)) for case in CASES), (resume, (root,)), (keep, (root, {}, READERS)), *refreshes], 2)


def test_the_average_is_the_formula_under_every_layout(on_two):
    for case, ranks in zip(CASES, on_two, strict=False):
        history = [assembled(ranks, f"actor {i}", case) for i in range(STEPS + 1)]
        expected = {name: tensor.double() for name, tensor in history[0].items()}
        for now in history[1:]:
            expected = {name: DECAY * tensor + (1 - DECAY) * now[name].double() for name, tensor in expected.items()}
        found, shown = assembled(ranks, "actor ema", case), assembled(ranks, "actor shown", case)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)
            moved = (found[name].double() - history[-1][name].double()).abs().max()
            assert moved > 1e-4, f"{name}: the test must train"
            cast = found[name].bfloat16().float() if case.precision == "bf16" else found[name]
            assert torch.equal(shown[name], cast), f"{name}: what the model computes with meanwhile"


def test_every_rank_computes_with_the_whole_average(on_two):
    for case, ranks in zip(CASES, on_two, strict=False):
        if case.parallel in ({}, PLAIN):  # two data ranks: equal weights
            assert ranks[0]["everywhere"] == ranks[1]["everywhere"]


def test_it_is_sharded_like_the_optimizer(on_two):
    sharded, plain = on_two[0], on_two[1]
    assert sum(rank["held"] for rank in sharded) == plain[0]["held"] == plain[1]["held"]


def test_a_resumed_average_is_the_one_that_went_on(on_two):
    for straight, resumed in on_two[len(CASES)]:
        assert straight == resumed and straight


def test_any_layout_reads_average_and_reference(on_two, root):
    def contents(directory: Path) -> dict:
        files = CheckpointFiles(directory)
        found = {}
        for model, slots in (("actor", ("weight", "main", "ema")), ("reference", ("weight",))):
            for slot in slots:
                source = CheckpointSource(directory, model, slot, files)
                found |= {(model, slot, name): source.read(name, whole(source.shape(name))) for name in source.names()}
        return found

    written = contents(root / "written" / "checkpoints" / "step-00000002")
    names = {name for _, _, name in written}
    assert {(model, slot) for model, slot, _ in written} == {("actor", s) for s in ("weight", "main", "ema")} | {("reference", "weight")}
    assert all(not torch.equal(written["actor", "ema", n], written["actor", "main", n]) for n in names)
    assert any(not torch.equal(written["actor", "weight", n], written["reference", "weight", n]) for n in names)
    for index in range(len(READERS)):
        again = contents(root / f"read{index}" / "checkpoints" / "step-00000003")
        assert again.keys() == written.keys()
        assert [key for key in written if not torch.equal(written[key], again[key])] == [], READERS[index]
