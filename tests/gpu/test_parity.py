"""Trainer, sampler and transformers agree about the same weights, through sleep and wake, CUDA graphs and in-place updates."""

from pathlib import Path

import pytest

from tests.gpu.processes import run_on_devices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PROMPT_TOKENS, RESPONSE_TOKENS, TEMPERATURE = 24, 32, 0.8
# Mean |log-probability difference| a token, nats. bf16 keeps 8 bits: logits of a few units are off by hundredths.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}

# ranks: [(trainer's layout, tensor-parallel ranks a generator)]
LAYOUTS = {
    1: [({}, 1)],
    2: [({"tensor": 2, "sequence": True}, 2), ({"pipeline": 2}, 1), ({}, 2)],
    4: [({"tensor": 2, "pipeline": 2, "sequence": True}, 2), ({"tensor": 2}, 1)],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3-tied"])
def test_one_device(machine, kind, precision, tmp_path):
    check(machine, kind, precision, 1, *LAYOUTS[1][0], tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_ranks", "case"), [(n, case) for n in (2, 4) for case in range(len(LAYOUTS[n]))])
def test_several_devices(machine, num_ranks, case, precision, tmp_path):
    machine.need(num_ranks)
    check(machine, "llama", precision, num_ranks, *LAYOUTS[num_ranks][case], tmp_path)


def check(machine, kind: str, precision: str, num_ranks: int, parallel: dict, tensor: int, folder: Path) -> None:
    reports = run_on_devices(
        compare,
        num_ranks,
        folder,
        models=[str(save_model(kind, seed, folder, machine.model)) for seed in (0, 1)],
        precision=precision,
        parallel=parallel,
        tensor=tensor,
        kv_cache_bytes=machine.kv_cache_bytes,
        is_cuda=not machine.is_rehearsal,
    )
    print(reports)
    for report in reports:
        assert report["device"] == ("cpu" if machine.is_rehearsal else "cuda")
        for version in report["versions"]:
            assert version["sampler"] < TOLERANCE[precision] and version["transformers"] < TOLERANCE[precision], version
        assert report["told_apart"] > 10 * TOLERANCE[precision], "the two sets of weights must differ visibly"
        assert report["same_after_sleep"]
        assert report["moved_bytes"] == report["target_bytes"]


def save_model(kind: str, seed: int, folder: Path, sizes: dict[str, int]) -> Path:
    """A random model whose weights bf16 holds exactly, so that only the arithmetic differs."""
    from safetensors.torch import load_file, save_file

    from tests.rollout.tiny_models import save_tiny

    path = save_tiny(kind, seed, folder, **sizes)
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def compare(models: list[str], precision: str, parallel: dict, tensor: int, kv_cache_bytes: int, is_cuda: bool) -> dict:
    """One rank: push both sets of weights in turn, sample, and compare the same tokens three ways."""
    from megarl.bridge.sync import WeightSync
    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.config import ParallelConfig, RolloutConfig
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.models.replica import Replica
    from megarl.parallel import device, groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.parallel.memory import Phases
    from megarl.rollout.engine import make_greedy_requests, make_requests
    from megarl.rollout.vllm_engine import VllmEngine

    assert device.is_cuda() == is_cuda
    layout = groups.initialize(ParallelConfig(**parallel), seed=0)
    spec = read_spec(Path(models[0]))
    rollout = RolloutConfig(
        prompts_per_step=16,
        samples_per_prompt=2,
        max_response_tokens=RESPONSE_TOKENS,
        temperature=TEMPERATURE,
        kv_cache_bytes=kv_cache_bytes,
        tensor_parallel=tensor,
    )
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, tensor), precision, PROMPT_TOKENS + RESPONSE_TOKENS)
    engine.sleep()  # a run's order: the models arrive while the sampler's memory is free
    replica = Replica(build_model(spec, "actor", ParallelConfig(**parallel), precision, layout), layout, 8)
    owner = Owner(source_pieces(replica.chunks, spec.table("actor")))
    sync, phases = WeightSync(engine, layout), Phases(engine)
    prompts = make_prompts(spec.vocab_size, layout)
    sampled = make_requests(prompts, rollout, (), seed=(0, 1))
    greedy = make_greedy_requests(prompts, rollout, ())
    versions, logprobs_of = [], []
    for version, folder in enumerate(models):
        load_pieces(owner.pieces, SafetensorsSource(Path(folder)))
        pushed = sync.push(owner, version)
        with phases.generating():
            answers, likeliest = engine.generate(sampled), engine.generate(greedy)
        with phases.scoring():
            batch = pack_answers(prompts, answers, layout)
            logprobs = trainer_logprobs(replica, batch)
        expected = transformers_logprobs(Path(folder), batch)
        mask = batch.response_mask
        gaps = {"sampler": (batch.rollout_logprobs - logprobs)[mask].abs(), "transformers": (logprobs - expected)[mask].abs()}
        versions.append({name: float(gap.mean()) for name, gap in gaps.items()})
        logprobs_of.append((batch, logprobs))
    batch, before = logprobs_of[0]  # answers of the first weights, read with the second
    told_apart = float((trainer_logprobs(replica, batch) - before)[batch.response_mask].abs().mean())
    sync.push(owner, 9)  # the engine sleeps since it was scored: its weights come back, where CUDA graphs look for them
    with phases.generating():
        again = engine.generate(greedy)
    return {
        "device": device.device().type,
        "has_transformer_engine": device.has_transformer_engine(),
        "versions": versions,
        "told_apart": told_apart,
        "same_after_sleep": [a.token_ids for a in again] == [a.token_ids for a in likeliest],
        "moved_bytes": pushed.received_bytes + pushed.local_bytes,
        "target_bytes": engine.dtype.itemsize * sum(place.canonical.num_elements_loaded for place in engine._endpoint._places.values()),
    }


class Owner:
    def __init__(self, pieces):
        self.pieces = pieces


def make_prompts(vocab_size: int, layout) -> list:
    """Sixteen prompts of different lengths; this data rank's share."""
    from megarl.records import Prompt

    prompts = [Prompt(i, tuple((31 * i + 7 * j) % vocab_size for j in range(1 + (5 * i) % PROMPT_TOKENS))) for i in range(16)]
    return prompts[layout.dp_rank :: layout.data]


def pack_answers(prompts: list, answers: list, layout):
    """The answers as the loop packs them, on the CPU."""
    from megarl.data.batching import pack
    from megarl.records import Trajectory

    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    trajectories = [Trajectory(by_id[answer.prompt_id], answer, 0.0) for answer in answers]
    width = -(-(PROMPT_TOKENS + RESPONSE_TOKENS) // (8 * layout.tensor)) * 8 * layout.tensor
    return pack(trajectories, 0, width, range(len(answers)), range(len(answers)))


def trainer_logprobs(replica, batch):
    """f32[B, T] of the trainer's forward pass, on the CPU."""
    from megarl.models.token_stats import LogprobHead
    from megarl.parallel import device

    return replica.forward(batch.to(device.device()), LogprobHead(1 << 24, TEMPERATURE, "response_mask")).cpu()


def transformers_logprobs(folder: Path, batch):
    """f32[B, T] of transformers in float32 on the CPU, entry t about token t."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(batch.token_ids).logits[:, :-1] / TEMPERATURE
    chosen = logits.log_softmax(-1).gather(2, batch.token_ids[:, 1:, None]).squeeze(2)
    return torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)
