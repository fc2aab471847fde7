"""Generators in processes of their own on CUDA devices: weights through rings of GPU memory (CUDA IPC), and through a joint NCCL group."""

from pathlib import Path

import pytest

from tests.gpu.processes import run_on_devices
from tests.gpu.test_parity import save_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

TOLERANCE = 1e-3  # mean |log-probability difference| a token, nats, fp32


def test_one_device_shared_by_trainer_and_generator(machine, tmp_path):
    """The rings need no second device; a copy within the device says what they could reach."""
    (report,) = run(machine, 1, 1, False, tmp_path)
    print(report)
    assert report["wire"] == "RingWire"


@pytest.mark.parametrize(("num_ranks", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_rings_between_devices(machine, num_ranks, tensor, tmp_path):
    machine.need(num_ranks + tensor)
    run(machine, num_ranks, tensor, False, tmp_path)


@pytest.mark.parametrize(("num_ranks", "tensor"), [(1, 1), (2, 2)])
def test_a_joint_group(machine, num_ranks, tensor, tmp_path):
    """NCCL refuses two members on one device, so every process needs its own."""
    machine.need(num_ranks + tensor)
    for report in run(machine, num_ranks, tensor, True, tmp_path):
        assert report["wire"] == "JointWire"


def run(machine, num_ranks: int, tensor: int, joint: bool, folder: Path) -> list[dict]:
    models = [str(save_model("llama", seed, folder, machine.model)) for seed in (0, 1)]
    arguments = {"models": models, "tensor": tensor, "joint": joint, "kv_cache_bytes": machine.kv_cache_bytes}
    reports = run_on_devices(follow, num_ranks, folder, **arguments)
    for report in reports:
        assert all(mean < TOLERANCE for mean in report["differences"]), report
        assert report["versions"] == [1, 2]
    return reports


def follow(models: list[str], tensor: int, joint: bool, kv_cache_bytes: int) -> dict:
    """One rank: push both sets of weights in turn, sample greedily, compare with transformers."""
    from megarl.bridge.separate_sync import SeparateSync
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.config import ParallelConfig, RolloutConfig
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.parallel import groups
    from megarl.parallel.torchrun import rank_from_environment
    from megarl.records import Prompt
    from megarl.rollout.engine import make_greedy_requests
    from megarl.rollout.separate_engine import start_separate
    from tests.rollout.tiny_models import WholeModel

    parallel = ParallelConfig(tensor=rank_from_environment()[1])
    layout = groups.initialize(parallel, seed=0)
    spec = read_spec(Path(models[0]))
    rollout = RolloutConfig(
        placement="separate",
        tensor_parallel=tensor,
        prompts_per_step=4,
        max_response_tokens=16,
        kv_cache_bytes=kv_cache_bytes,
        gpu_memory_fraction=0.3,
    )
    engine = start_separate(spec, rollout, layout, "fp32", 64, 300.0)
    owner = WholeModel(source_pieces(build_model(spec, "actor", parallel, "fp32", layout), spec.table("actor")))
    sync = SeparateSync(engine, layout, verify_first=1, timeout_s=300.0, always_joint=joint)
    requests = make_greedy_requests([Prompt(i, tuple(range(5 + i, 25 + 2 * i))) for i in range(4)], rollout, ())
    report: dict = {"differences": [], "versions": []}
    for version, folder in enumerate(models, 1):
        load_pieces(owner.pieces, SafetensorsSource(Path(folder)))
        sync.push(owner, version)
        pushed = sync.push(owner, version)  # without digests and connections to make
        completions = engine.generate(requests)
        report["versions"].append(completions[0].policy_version)
        report["differences"].append(mean_difference(Path(folder), completions, requests))
    report |= {"wire": type(sync.wire).__name__, "gb_per_s": pushed.sent_bytes / pushed.seconds / 1e9, "copy_gb_per_s": copy_speed()}
    engine.close()
    return report


def mean_difference(folder: Path, completions, requests) -> float:
    """Mean |log-probability difference| to transformers on these weights, on the CPU."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    differences = []
    for request, completion in zip(requests, completions):
        with torch.no_grad():
            logprobs = model(torch.tensor([[*request.token_ids, *completion.token_ids]])).logits[0].log_softmax(-1)
        first = len(request.token_ids) - 1
        for offset, (token, value) in enumerate(zip(completion.token_ids, completion.rollout_logprobs)):
            differences.append(abs(float(logprobs[first + offset, token]) - value))
    return sum(differences) / len(differences)


def copy_speed() -> float:
    """GB/s of a copy of 256 MiB on this device, counted once."""
    import time

    import torch

    from megarl.parallel import device

    source = torch.empty(1 << 28, dtype=torch.uint8, device=device.device())
    target = torch.empty_like(source)
    target.copy_(source)
    device.synchronize()
    start = time.perf_counter()
    target.copy_(source)
    device.synchronize()
    return source.numel() / (time.perf_counter() - start) / 1e9
