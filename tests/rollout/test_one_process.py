"""The sampler in a world of one rank: no torchrun, weights from a directory, compared with vLLM's own loader and with transformers."""

import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.rollout.tiny_models import FAMILIES, WholeModel, greedy_difference, save_tiny

MAX_LEN = 64


def fresh_engine_answers(folder: Path, precision: str, batches) -> list:
    """(tokens, log-probs) of every request, batch by batch, from an engine that vLLM loads by itself."""
    from vllm import LLM

    from megarl.rollout.vllm_engine import _sampling_parameters

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",
        distributed_executor_backend="external_launcher",
        dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=8 << 20,
    )
    llm.llm_engine.engine_core._finalizer.detach()  # it would destroy the default process group
    answers = []
    for requests in batches:
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        outputs = llm.generate(prompts, [_sampling_parameters(request) for request in requests], use_tqdm=False)
        answers += [(tuple(out.outputs[0].token_ids), tuple(out.outputs[0].logprobs.logprobs)) for out in outputs]
    return answers


def assert_unchanged(before: dict) -> None:
    from megarl.parallel import device

    after = device.random_states()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert not changed, f"the engine changed the random states {changed}"


def check_family(rank: int, world_size: int, kind: str, precision: str, first: Path, second: Path) -> dict:
    from megarl.bridge.sync import WeightSync
    from megarl.config import ParallelConfig, RolloutConfig
    from megarl.errors import RolloutError
    from megarl.models.family import read_spec
    from megarl.parallel import device, groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.records import Prompt
    from megarl.rollout.engine import make_greedy_requests, make_requests
    from megarl.rollout.vllm_engine import VllmEngine

    layout = groups.initialize(ParallelConfig(), seed=0)
    rollout = RolloutConfig(prompts_per_step=64, samples_per_prompt=2, max_response_tokens=16, temperature=0.7, kv_cache_bytes=8 << 20)
    before = device.random_states()
    start = time.perf_counter()
    engine = VllmEngine(read_spec(first), rollout, RolloutLayout(layout, 1), precision, MAX_LEN)
    start_s = time.perf_counter() - start
    assert_unchanged(before)
    prompts = [Prompt(7, (5, 6, 7, 8)), Prompt(1, (100,)), Prompt(3, tuple(range(20, 50))), Prompt(9, (0, 199, 200))]
    greedy = make_greedy_requests(prompts, rollout, stop_token_ids=())
    sampled = make_requests(prompts, rollout, stop_token_ids=(), seed=(0, 3))
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(greedy)
    sync = WeightSync(engine, layout)
    report = {"start_s": start_s, "differences": []}
    for version, folder in enumerate((first, second)):
        pushed = sync.push(WholeModel.of(folder), version)
        completions = engine.generate(greedy)
        assert {completion.policy_version for completion in completions} == {version}
        report["differences"].append(greedy_difference(folder, completions, greedy))
        report["push_s"] = pushed.seconds
    before = device.random_states()
    answers = engine.generate(sampled)
    assert_unchanged(before)
    ours = [(completion.token_ids, completion.rollout_logprobs) for completion in [*answers, *engine.generate(greedy)]]
    report["bit_identical"] = ours == fresh_engine_answers(second, precision, [sampled, greedy])
    report["alone"] = [engine.generate([request])[0].token_ids for request in sampled] == [answer.token_ids for answer in answers]
    report["repeats"] = engine.generate(sampled) == answers
    report["varied"] = len({answer.token_ids for answer in answers})
    # More prompt tokens than one step takes and more sequences than the cache holds: some have to wait.
    crowd = make_requests([Prompt(100 + i, tuple((i * j) % 201 for j in range(45))) for i in range(64)], rollout, (), seed=(0, 3))
    crowded = engine.generate(crowd + sampled)
    report["crowded"] = [answer.token_ids for answer in crowded[-len(sampled) :]] == [answer.token_ids for answer in answers]
    with pytest.raises(RolloutError, match="prompt 5 has 60 tokens"):
        engine.generate(make_greedy_requests([Prompt(5, (1,) * 60)], rollout, ()))
    stopped = engine.generate(make_greedy_requests(prompts[:1], rollout, stop_token_ids=(answers[0].token_ids[2], ours[8][0][3])))[0]
    report["stopped"] = (stopped.finish_reason, len(stopped.token_ids) <= 4)
    assert engine.generate([]) == []
    return report


def refused_loads(rank: int, world_size: int) -> dict[str, str]:
    """What the tracer says about loaders it cannot follow."""
    import torch
    from torch import nn

    from megarl.errors import WeightMapError
    from megarl.rollout.vllm_loader import trace_loading

    class Model(nn.Module):
        def __init__(self, load):
            super().__init__()
            self.weight, self.load = nn.Parameter(torch.empty(4, 4)), load

        def load_weights(self, weights):
            for _, tensor in weights:
                self.load(self.weight.data, tensor)

    loads = {
        "transposed": lambda weight, tensor: weight.copy_(tensor.t()),
        "computed": lambda weight, tensor: weight.copy_(tensor * 2),
        "strided": lambda weight, tensor: weight[:2].copy_(tensor[::2]),
        "incomplete": lambda weight, tensor: weight[1:].copy_(tensor[1:]),
        "twice": lambda weight, tensor: (weight.copy_(tensor), weight[:2].copy_(tensor[2:])),
        "unused": lambda weight, tensor: None,
        "a buffer": lambda weight, tensor: torch.empty(4, 4).copy_(tensor),
    }
    said = {}
    for name, load in loads.items():
        with pytest.raises(WeightMapError) as caught:
            trace_loading(Model(load), {"a.weight": (4, 4)}, torch.float32)
        said[name] = str(caught.value)
    good = trace_loading(
        Model(lambda weight, tensor: (weight[:1].copy_(tensor[3:]), weight[1:].copy_(tensor[:3]))), {"a": (4, 4)}, torch.float32
    )
    assert [(box.hf_box, box.parameter_box) for box in good.targets] == [
        (((3, 1), (0, 4)), ((0, 1), (0, 4))),
        (((0, 3), (0, 4)), ((1, 3), (0, 4))),
    ]
    return said


def test_a_loader_that_does_more_than_copy_slices_is_refused():
    (said,) = run_ranks(refused_loads, 1)
    assert "not a box" in said["transposed"] and "not a box" in said["strided"]
    assert "copies a tensor it computed" in said["computed"]
    assert "gets 12 elements from a.weight; expected 16" in said["incomplete"]
    assert "twice" in said["twice"]
    assert "takes nothing from a.weight" in said["unused"]
    assert "into something that is no parameter" in said["a buffer"]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "fp32") for kind in FAMILIES),
        ("qwen2", "bf16"),
        ("gemma3", "fp32"),
        pytest.param("mistral", "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_pushed_engine_equals_a_freshly_loaded_one(kind, precision, tmp_path):
    folders = [save_tiny(kind, seed, tmp_path) for seed in (0, 1)]
    (report,) = run_ranks(check_family, 1, kind, precision, *folders)
    print(kind, precision, report)
    assert report["bit_identical"] and report["alone"] and report["crowded"] and report["repeats"] and report["varied"] == 8
    assert report["stopped"] == ("stop", True)
    if precision == "fp32":  # bf16 rounds differently in the two libraries, whatever the weights
        assert all(worst < 1e-4 and agreement == 1.0 for worst, agreement in report["differences"])
