"""Trainer and sampler on the same ranks under many layouts: weights, log-probabilities and samples agree whoever holds what."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig, RolloutConfig
from tests.ranks import run_ranks
from tests.rollout.tiny_models import greedy_difference, save_tiny

MAX_LEN, TEMPERATURE = 64, 0.7
TP2, PP2, DP = ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig()
TP2_PP2, CP2 = ParallelConfig(tensor=2, pipeline=2), ParallelConfig(context=2)
VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2)
CP2_PP2 = ParallelConfig(context=2, pipeline=2)

# kind of model, trainer's layout, tensor-parallel ranks a generator
CASES = {
    2: [("llama", TP2, 2), ("qwen3-tied", PP2, 2), ("qwen2", DP, 2), ("qwen2", TP2, 1), ("llama", DP, 1)],
    4: [("qwen3-tied", TP2_PP2, 2), ("llama", TP2, 4), ("llama", TP2_PP2, 1), ("qwen2", TP2, 1)],
}
OTHER_AXES = {2: [("llama-deep", VPP2, 1), ("qwen2", CP2, 1)], 4: [("qwen3-tied", CP2_PP2, 2), ("llama-deep", VPP2, 1)]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: [save_tiny(kind, seed, folder) for seed in (0, 1)] for kind in ("llama", "llama-deep", "qwen2", "qwen3-tied")}


@pytest.mark.parametrize(
    "world_size, cases",
    [
        (2, CASES[2]),
        pytest.param(4, CASES[4], marks=pytest.mark.slow),
        *(pytest.param(world_size, cases, marks=pytest.mark.slow) for world_size, cases in OTHER_AXES.items()),
    ],
    ids=["2", "4", "2 other axes", "4 other axes"],
)
def test_the_sampler_follows_the_trainer_under_every_layout(models, world_size, cases):
    ranks = run_ranks(check_cases, world_size, cases, models, timeout_s=380)
    for case, reports in zip(cases, zip(*ranks, strict=True)):
        kind, parallel, tensor = case
        data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        samples = {tuple(answer[:2]): answer[2] for report in reports for answer in report["samples"]}
        assert len(samples) == 14, case
        for report in reports:
            print(case, {key: value for key, value in report.items() if key != "samples"})
            assert all(worst < 1e-4 and agreement == 1.0 for worst, agreement in report["greedy"]), case
            assert report["trainer_difference"] < 1e-4, case
            assert report["moved_bytes"] == report["target_bytes"], case
            assert report["corrupted"] and all("from rank" in message for message in report["corrupted"]), case
            assert report["repeats"], case
        if parallel.tensor == tensor and parallel.pipeline == 1 and data == 1:
            assert all(report["received_bytes"] == 0 for report in reports), "equal layouts move nothing"


def check_cases(rank: int, world_size: int, cases: list, models: dict[str, list[Path]]) -> list[dict]:
    return [check_case(kind, parallel, tensor, models[kind]) for kind, parallel, tensor in cases]


def check_case(kind: str, parallel: ParallelConfig, tensor: int, folders: list[Path]) -> dict:
    from megarl.bridge.sync import WeightSync
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.models.replica import Replica
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.rollout.engine import make_greedy_requests, make_requests
    from megarl.rollout.vllm_engine import VllmEngine

    forget_generator_groups()
    layout = groups.initialize(parallel, seed=0)
    spec = read_spec(folders[0])
    rollout = RolloutConfig(
        prompts_per_step=8, samples_per_prompt=2, max_response_tokens=12, temperature=TEMPERATURE, kv_cache_bytes=8 << 20
    )
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, tensor), "fp32", MAX_LEN)
    chunks = build_model(spec, "actor", parallel, "fp32", layout)
    owner = Owner(source_pieces(chunks, spec.table("actor")))
    sync = WeightSync(engine, layout, bucket_bytes=40_000, verify_first=3)
    prompts = my_prompts(layout)
    greedy = make_greedy_requests(prompts, rollout, stop_token_ids=(3,))
    report: dict = {"greedy": []}
    for version, folder in enumerate(folders):
        load_pieces(owner.pieces, SafetensorsSource(folder))
        pushed = sync.push(owner, version)
        report["greedy"].append(greedy_difference(folder, engine.generate(greedy), greedy))
    first = prompts[0].prompt_id if prompts else 0  # numbered by their place in the step
    requests = make_requests(prompts, rollout, stop_token_ids=(3,), seed=(0, 1), first_position=first)
    answers = engine.generate(requests)
    report["samples"] = [(answer.prompt_id, answer.sample_index, answer.token_ids) for answer in answers]
    report["repeats"] = engine.generate(requests) == answers
    report["trainer_difference"] = trainer_difference(Replica(chunks, layout, 3), answers, requests)
    report["push_ms"] = round(pushed.seconds * 1e3, 1)
    report["received_bytes"], report["num_buckets"] = pushed.received_bytes, pushed.num_buckets
    report["moved_bytes"] = pushed.received_bytes + pushed.local_bytes
    report["target_bytes"] = 4 * sum(place.canonical.num_elements_loaded for place in engine._endpoint._places.values())
    report["corrupted"] = corrupt_one_element(sync, owner, engine)
    sync.push(owner, 9)
    one = make_greedy_requests(prompts[:1] if layout.dp_rank == 0 else [], rollout, ())  # most replicas get nothing to do
    assert [answer.policy_version for answer in engine.generate(one)] == [9] * len(one)
    return report


class Owner:
    def __init__(self, pieces):
        self.pieces = pieces


def forget_generator_groups() -> None:
    """vLLM keeps its groups for the life of a process; another generator layout needs new ones."""
    from megarl.rollout import vllm_platform

    vllm_platform.import_vllm()
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()


def my_prompts(layout) -> list:
    """Seven prompts, dealt unevenly to the data ranks."""
    from megarl.records import Prompt

    prompts = [Prompt(index, tuple((7 * index + 3 * position) % 201 for position in range(1 + 4 * index))) for index in range(7)]
    cuts = {1: [0, 7], 2: [0, 5, 7], 4: [0, 4, 4, 6, 7]}[layout.data]
    return prompts[cuts[layout.dp_rank] : cuts[layout.dp_rank + 1]]


def trainer_difference(replica, answers, requests) -> float:
    """Largest difference between the sampler's log-probabilities and the trainer's own forward pass."""
    from megarl.models.token_stats import LogprobHead
    from megarl.records import RolloutBatch

    if not answers:
        return 0.0
    rows = [[*request.token_ids, *answer.token_ids] for request, answer in zip(requests, answers)]
    width = max(len(row) for row in rows)
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
    batch = RolloutBatch(
        token_ids, torch.tensor([len(row) for row in rows]), mask, sampled, zeros, zeros.bool(), zeros.long(), torch.arange(len(rows))
    )
    with torch.no_grad():
        logprobs = replica.forward(batch, LogprobHead(1 << 20, TEMPERATURE, "response_mask"))
    assert bool((sampled[mask] != 0).any())
    return float((logprobs - sampled)[mask].abs().max())


class Flip:
    """A transport that changes one element of the last slice that arrives on rank 1."""

    def __init__(self, inner, rank: int):
        self.inner, self.rank, self.done = inner, rank, False

    def run(self, bucket, read, write) -> None:
        self.inner.run(bucket, read, write)
        mine = [op for op in bucket if op.target_rank == self.rank == 1]
        if mine and not self.done:
            self.done = True
            write(mine[-1]).view(-1)[-1] += 1e-3


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
