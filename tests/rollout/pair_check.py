"""What every rank does for one pair of layouts: push, sample, and hold the sampler against transformers and against a fresh engine.

A process runs several pairs one after the other: an engine leaves when nothing refers to it, vLLM's groups when they are told to.
"""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.rollout.pairs import Pair
from tests.rollout.tiny_models import greedy_difference

MAX_LEN, TEMPERATURE = 64, 0.7
NUM_PROMPTS, SAMPLES = 7, 2


def check_pairs(rank: int, world_size: int, pairs: list[Pair], models: dict[str, list[Path]]) -> list[dict]:
    """A report for each pair; an error names the pair."""
    reports = []
    for pair in pairs:
        try:
            reports.append(check_pair(pair, models[model_key(pair)]))
        except BaseException as error:
            error.add_note(f"in the pair {pair}")
            raise
    return reports


def model_key(pair: Pair) -> str:
    """Pairs of one key share their models."""
    return " ".join([pair.family, *(f"{name}={size}" for name, size in pair.sizes.items())])


def check_pair(pair: Pair, folders: list[Path]) -> dict:
    """Numbers of this rank. Bits: True where the sampler's state, or what it samples, equals a fresh engine's of the same weights."""
    from megarl.bridge.sync import WeightSync
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.config import RolloutConfig
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces
    from megarl.models.replica import Replica
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.rollout.engine import make_greedy_requests, make_requests
    from megarl.rollout.vllm_engine import VllmEngine

    forget_generator_groups()
    layout = groups.initialize(pair.training, seed=0)
    spec = read_spec(folders[0])
    rollout = RolloutConfig(
        prompts_per_step=8, samples_per_prompt=SAMPLES, max_response_tokens=12, temperature=TEMPERATURE, kv_cache_bytes=8 << 20
    )
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, pair.generator), pair.precision[1], MAX_LEN)
    owner = Owner(build_model(spec, "actor", pair.training, pair.precision[0], layout), pair, layout)
    sync = WeightSync(engine, layout, bucket_bytes=40_000, verify_first=3)
    prompts = my_prompts(layout)
    greedy = make_greedy_requests(prompts, rollout, stop_token_ids=(3,))
    report: dict = {"greedy": []}
    for version, folder in enumerate(folders):
        load_pieces(owner.pieces, SafetensorsSource(folder))
        if pair.learns:
            owner.step()
            folder = owner.save(folder, folder.with_name(f"{folder.name}-learned-{dist.get_world_size()}"))
        pushed = sync.push(owner, version)
        completions = engine.generate(greedy)
        if completions and layout.rank == layout.rank_at(dp=layout.dp_rank):  # others hold the same
            report["greedy"].append(greedy_difference(folder, completions, greedy))
    first = prompts[0].prompt_id if prompts else 0  # numbered by their place in the step
    requests = make_requests(prompts, rollout, stop_token_ids=(3,), seed=(0, 1), first_position=first)
    answers = engine.generate(requests)
    report["samples"] = [(answer.prompt_id, answer.sample_index, answer.token_ids) for answer in answers]
    report["repeats"] = engine.generate(requests) == answers
    replica = Replica(owner.chunks, layout, 3)
    report["trainer"] = trainer_difference(replica, answers, requests)
    report["received_bytes"] = pushed.received_bytes
    report["moved_bytes"] = pushed.received_bytes + pushed.local_bytes
    report["target_bytes"] = engine.dtype.itemsize * sum(place.canonical.num_elements_loaded for place in engine._endpoint._places.values())
    report |= compared_with_fresh(engine, rollout, pair.precision[1], folder, [*requests, *greedy])
    report["corrupted"] = corrupt_one_element(sync, owner, engine)
    sync.push(owner, 9)
    one = make_greedy_requests(prompts[:1] if layout.dp_rank == 0 else [], rollout, ())  # most replicas get nothing to do
    assert [answer.policy_version for answer in engine.generate(one)] == [9] * len(one)
    return report


class Owner:
    """The trainer's side: a model whose pieces are pushed. `step` and `save` are collective."""

    def __init__(self, chunks: list, pair: Pair, layout):
        from megarl.config import OptimizerConfig
        from megarl.models.learner import Learner
        from megarl.models.pieces import source_pieces

        self.chunks, self.layout, self.spec = chunks, layout, chunks[0].spec
        if pair.learns:
            optimizer = OptimizerConfig(lr=1e-2, eps=1e-8)
            self.learner = Learner(chunks, optimizer, pair.training, pair.precision[0], layout, total_steps=9)
            self.chunks = self.learner.chunks
        self.pieces = source_pieces(self.chunks, self.spec.table("actor"))

    def step(self) -> None:
        """Imitate a few fixed sequences once: every weight moves by about the learning rate."""
        from megarl.course.sft import imitation_loss
        from megarl.models.token_stats import LogprobHead
        from megarl.records import DemonstrationBatch

        self.learner.refresh_main_params()
        before = [piece.view.clone() for piece in self.pieces]
        # No token 0: a Gemma embeds it as zeros, on which norm after norm multiplies the gradient by a thousand.
        token_ids = 1 + (torch.arange(2 * 16).reshape(2, 16) * 37 + 11 * self.layout.dp_rank) % 190
        learned = torch.ones(2, 16, dtype=torch.bool)
        learned[:, 0] = False
        batch = DemonstrationBatch(token_ids, torch.tensor([16, 16]), learned)
        total = 2.0 * 15 * self.layout.data
        self.learner.step(batch, LogprobHead(1 << 20, mask_field="loss_mask"), lambda stats, rows: imitation_loss(stats, rows, total))
        moved = sum(not old.equal(piece.view) for old, piece in zip(before, self.pieces))
        assert moved > len(before) // 2, f"{moved} of {len(before)} pieces moved: they are not live"

    def save(self, source: Path, folder: Path) -> Path:
        """A directory like `source` with the weights of now."""
        mine = [(piece.hf_name, piece.box, piece.view.detach().clone()) for piece in self.pieces if piece.is_owner]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shutil.copy(source / "config.json", folder)
            tensors = {name: torch.full(shape, torch.nan) for name, shape in self.spec.table("actor").hf_shapes.items()}
            for name, box, part in (item for rank in everyone for item in rank):
                tensors[name][tuple(slice(offset, offset + size) for offset, size in box)] = part.float()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        dist.barrier()
        return folder


def forget_generator_groups() -> None:
    """vLLM keeps its groups for the life of a process; another generator layout needs new ones."""
    from megarl.rollout import vllm_platform

    vllm_platform.import_vllm()
    from vllm.distributed.parallel_state import destroy_model_parallel

    gc.collect()
    destroy_model_parallel()


def my_prompts(layout) -> list:
    """Seven prompts, dealt unevenly to the data ranks."""
    from megarl.records import Prompt

    prompts = [Prompt(index, tuple((7 * index + 3 * position) % 190 for position in range(1 + 4 * index))) for index in range(NUM_PROMPTS)]
    cuts = {1: [0, 7], 2: [0, 5, 7], 4: [0, 4, 4, 6, 7]}[layout.data]
    return prompts[cuts[layout.dp_rank] : cuts[layout.dp_rank + 1]]


# --- against a fresh engine ---


def compared_with_fresh(engine, rollout, precision: str, folder: Path, requests) -> dict[str, bool]:
    """Does `engine` equal one that vLLM loads from `folder` by itself, bit for bit? Every rank asks; both sample the same requests."""
    from vllm import LLM

    from megarl.parallel import device, groups
    from megarl.rollout import vllm_platform
    from megarl.rollout.vllm_engine import _sampling_parameters

    arguments = engine._arguments(rollout, precision) | {"load_format": "auto", "model_loader_extra_config": {}}
    with device.preserved_random_state(), vllm_platform.launcher_environment(*groups.rank_from_environment()):
        fresh = LLM(model=str(folder), **arguments)
    fresh.llm_engine.engine_core._finalizer.detach()  # it would destroy the default process group
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(requests))
    ordered = sorted({request for rank in everyone for request in rank}, key=lambda request: (request.seed, request.prompt_id))

    def sampled(llm) -> list:
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in ordered]
        outputs = llm.generate(prompts, [_sampling_parameters(request) for request in ordered], use_tqdm=False)
        return [(tuple(output.outputs[0].token_ids), tuple(output.outputs[0].logprobs.logprobs)) for output in outputs]

    places = engine._endpoint._places
    shapes = {name: place.canonical.shape for name, place in places.items()}
    ours, theirs = (dict(state_of(llm, shapes)) for llm in (engine._llm, fresh))
    assert ours.keys() == theirs.keys() and len(ours) >= len(shapes)
    differing = [name for name in ours if not same_bits(ours[name], theirs[name])]
    report = {"differing_state": differing, "num_state": len(ours), "same_samples": sampled(engine._llm) == sampled(fresh)}
    fresh.llm_engine.model_executor.shutdown()
    return report


def state_of(llm, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """All that a rank's model computes with: its parameters and buffers, and what packed layers make of a unit matrix: their weights."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            width = (module.weight.shape if module.weight.dim() == 2 else shapes[f"{name}.weight"])[1]
            unit = torch.eye(width, dtype=llm.model_config.dtype)
            yield f"{name} packed", module.cpu_linear(unit, module.weight, None)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and first.contiguous().view(-1).view(torch.uint8).equal(second.contiguous().view(-1).view(torch.uint8))
    )


# --- against the trainer ---


def trainer_difference(replica, answers, requests) -> float:
    """Largest difference between the sampler's log-probabilities and the trainer's own forward pass."""
    from megarl.models.token_stats import LogprobHead
    from megarl.records import RolloutBatch

    # A data rank without prompts computes something all the same: where replicas share experts, they do so together.
    rows = [[*request.token_ids, *answer.token_ids] for request, answer in zip(requests, answers)] or [[4, 5, 6]]
    width = -(-max(len(row) for row in rows) // 8) * 8
    token_ids, mask, sampled = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.bool),
        torch.zeros(len(rows), width),
    )
    for index, (row, request, answer) in enumerate(zip(rows, requests, answers)):
        token_ids[index, : len(row)] = torch.tensor(row)
        mask[index, len(request.token_ids) : len(row)] = True
        sampled[index, len(request.token_ids) : len(row)] = torch.tensor(answer.rollout_logprobs)
    zeros = torch.zeros(len(rows))
    lengths, flags = torch.tensor([len(row) for row in rows]), zeros.bool()
    ages = torch.zeros_like(token_ids)
    numbers, nowhere = torch.arange(len(rows)), torch.zeros_like(mask)
    batch = RolloutBatch(token_ids, lengths, mask, sampled, zeros, flags, zeros.long(), numbers, zeros, flags, ages, nowhere)
    with torch.no_grad():
        logprobs = replica.forward(batch, LogprobHead(1 << 20, TEMPERATURE, "response_mask"))
    assert not answers or bool((sampled[mask] != 0).any())
    return max((logprobs - sampled)[mask].abs().tolist(), default=0.0)


# --- a fault on the way ---


class Flip:
    """A transport that changes one element of the last slice that lands on rank 1."""

    def __init__(self, inner, rank: int):
        self.inner, self.rank = inner, rank

    def run(self, rounds, ends) -> None:
        mine = [op for ops in rounds for op in ops if op.target_rank == self.rank == 1]
        self.inner.run(rounds, FlippedEnds(ends, mine[-1]) if mine else ends)


class FlippedEnds:
    def __init__(self, inner, chosen):
        self.read, self.write, self.is_live, self.inner, self.chosen = inner.read, inner.write, inner.is_live, inner, chosen

    def landed(self, op) -> None:
        if op == self.chosen:
            view = self.write(op)
            view[(-1,) * view.dim()] += 1.0
        self.inner.landed(op)


def corrupt_one_element(sync, owner, engine) -> list[str]:
    """The message of the sync that carried a wrong element. The sampler then refuses to generate."""
    from megarl.errors import RolloutError

    transport = sync.transport
    sync.transport = Flip(transport, sync.layout.rank)
    with pytest.raises(RolloutError, match="1 of .* altered: .* to rank 1") as caught:
        sync.push(owner, 5)
    sync.transport = transport
    with pytest.raises(RolloutError, match="no weights"):
        engine.generate([])
    return [str(caught.value)]
